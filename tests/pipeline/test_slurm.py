"""Runs on a SLURM cluster, as far as can be seen without one; tests/proofs/slurm.sh has one."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, run_all

from lsdc_utils.pipeline import arguments, commands, run
from lsdc_utils.pipeline.parameters import PROFILES


def would_run(project: Path, *arguments: str) -> list[str]:
    """Steps that a dry run names."""
    done = run_all(project, "--dry-run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^would run (\w+):", done.stdout, re.MULTILINE)


def test_a_cluster_runs_the_same_steps(tiny_project: Path) -> None:
    assert would_run(tiny_project, "--slurm") == []
    changed = ("yolo_epochs={nfn: 2, scs: 3, ss: 5}", "--force", "01")
    assert would_run(tiny_project, "--slurm", *changed) == would_run(tiny_project, *changed)
    assert len(would_run(tiny_project, "--slurm", "--run", "other")) == 18


def test_a_cluster_is_held_back_by_its_profile_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    on_slurm, here = (commands.run_of(arguments.parse([*slurm, "--cores", "3"])) for slurm in (["--slurm"], []))
    asked = " ".join(run.snakemake_command(on_slurm, tmp_path / "parameters.yml", 0))
    assert f"--workflow-profile {PROFILES}/slurm --slurm-logdir {on_slurm.folder}/logs/slurm" in asked
    assert "--cores 3" in asked and "--resources" not in asked
    assert on_slurm.resume == f"{here.resume} --slurm"
    asked = " ".join(run.snakemake_command(here, tmp_path / "parameters.yml", 1))
    assert "--resources gpu=1" in asked and "--workflow-profile" not in asked
    assert "CUDA_VISIBLE_DEVICES" not in run.child_environment(on_slurm, [])
    assert run.child_environment(here, ["3"])["CUDA_VISIBLE_DEVICES"] == "3"


def test_the_profile_of_a_cluster_names_the_rules_that_take_a_gpu() -> None:
    rules = re.split(r"^rule ", (ROOT / "notebooks/Snakefile").read_text(), flags=re.MULTILINE)[1:]
    profile = yaml.safe_load((PROFILES / "slurm/config.yaml").read_text())
    assert set(profile["set-resources"]) == {rule.split(":")[0] for rule in rules if "gpu=" in rule}
    assert profile["executor"] == "slurm" and profile["jobs"] > 1


def test_jobs_left_on_a_cluster_are_cancelled_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record"
    for name, text in {
        "scancel": f'echo "scancel $*" >> {record}',
        "squeue": f'[ $(wc -l < {record}) = 1 ] && echo "squeue $*" | tee -a {record}',  # the job is listed once
    }.items():
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "tools" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/tools", prepend=os.pathsep)
    run.cancel_jobs(tmp_path)  # nothing was started here
    assert not record.exists()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/snakemake.log").write_text("Building DAG of jobs...\nSLURM run ID: 2b95c8ca-af8c\nJob stats:\n")
    run.cancel_jobs(tmp_path)
    assert record.read_text() == "scancel --name 2b95c8ca-af8c\nsqueue --noheader --name 2b95c8ca-af8c\n"
