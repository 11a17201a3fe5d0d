"""Runs that are killed, run out of disk or of memory, resume and end as an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import copy_project, run_all
from faults import KINDS, Moment, kill_run

LONGER = ["--profile", "smoke", "--run", "demo", "vit_epochs=4", "yolo_epochs={nfn: 2, scs: 4, ss: 2}"]


def results(project: Path) -> dict[str, str | bytes]:
    """The submission, and the checksums of all weights."""
    run = project / "outputs" / "demo"
    sums = {file.name: json.loads(file.read_text())["sha256"] for file in sorted((run / "weights").glob("*.json"))}
    return {"submission.csv": (run / "submission.csv").read_bytes(), **sums}


def assert_ends_as(undisturbed: Path, project: Path, arguments: list[str]) -> None:
    """The run resumes and ends as an undisturbed one; no half-written file is left."""
    done = run_all(project, *arguments, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(project) == results(undisturbed)
    assert [str(path) for path in project.glob("outputs/**/.writing-*")] == []
    assert {path.name for path in (project / "outputs/demo/work").iterdir()} <= {"crops"}  # 05 deletes those


def log_of(project: Path, step: str) -> str:
    return (project / "outputs/demo/logs" / f"{step}.log").read_text()


def test_killed_trainings_resume_to_the_same_weights(smoke_project: Path, smoke_copy: Path) -> None:
    again = ["--profile", "smoke", "--run", "demo", "--until", "04_train_vit3d_fold0"]
    weights = smoke_copy / "outputs/demo/weights"
    (weights / "vit3d_fold0.safetensors").unlink()
    (smoke_copy / "outputs/demo/notebooks/04_train_vit3d_fold0.ipynb").unlink()
    kill_run(smoke_copy, again, "demo", Moment("04_train_vit3d_fold0", 3.0), "kernel")
    kill_run(smoke_copy, again, "demo", Moment("04_train_vit3d_fold0", has_checkpoint=True), "group")
    assert_ends_as(smoke_project, smoke_copy, again)
    assert "resumes after epoch" in log_of(smoke_copy, "04_train_vit3d_fold0")


# ---- the whole pipeline, many times --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of several epochs a training, from start to end."""
    project = copy_project(tmp_path_factory.mktemp("undisturbed") / "project")
    done = run_all(project, *LONGER)
    assert done.returncode == 0, done.stdout + done.stderr
    return project


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "count"), list(zip(KINDS, (7, 7, 6), strict=True)))
def test_a_run_that_is_killed_again_and_again_ends_the_same(
    undisturbed: Path, tmp_path: Path, kind: str, count: int
) -> None:
    project, run = copy_project(tmp_path / "project"), tmp_path / "project/outputs/demo"
    rng, resumed = np.random.default_rng([20, KINDS.index(kind)]), 0
    costs = sorted((undisturbed / "outputs/demo/logs").glob("*.tsv"), key=lambda file: file.stat().st_mtime)
    for number, index in enumerate(np.sort(rng.choice(len(costs), count, replace=False))):
        waiting = [cost for cost in costs if not (run / "notebooks" / f"{cost.stem}.ipynb").exists()]
        cost = costs[index] if costs[index] in waiting else waiting[0]
        seconds = float(rng.uniform(0, 0.9 * pd.read_csv(cost, sep="\t")["s"].iloc[0]))
        moment = Moment(cost.stem, seconds, in_checkpoint=cost.stem[:2] in ("03", "04") and number % 2 == 0)
        print(f"{kind}: {moment}", flush=True)
        kill_run(project, LONGER, "demo", moment, kind)
        resumed += sum("after epoch" in log.read_text() for log in run.glob("logs/0*.log"))
    assert_ends_as(undisturbed, project, LONGER)
    assert "nothing to do" in run_all(project, *LONGER).stdout
    assert resumed + sum("after epoch" in log.read_text() for log in run.glob("logs/0*.log")) > 0


def in_namespace(project: Path, script: str) -> subprocess.CompletedProcess:
    """Run a bash script with mounts of its own, so that it may mount a small disk."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["unshare", "--user", "--map-root-user", "--mount", "bash", "-euc", script]
    return subprocess.run(command, cwd=project, env={**os.environ, "PATH": path}, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.1, 0.45, 0.75, 0.95])
def test_a_full_disk_stops_a_run_that_then_resumes(undisturbed: Path, tmp_path: Path, share: float) -> None:
    project = copy_project(tmp_path / "project")
    need = sum(file.stat().st_blocks * 512 for file in (undisturbed / "outputs").rglob("*") if file.is_file())
    (project / "outputs").mkdir()
    run = f"bash run_all.sh {' '.join(repr(word) for word in LONGER)}"
    script = f"""
        mount -t tmpfs -o size={int(need * share)} none outputs
        if {run} > first.txt 2>&1; then echo 'the disk was not full'; exit 1; fi
        mount -o remount,size={need * 3} outputs
        {run}
        cp -r outputs kept
    """
    done = in_namespace(project, script)
    assert done.returncode == 0, (project / "first.txt").read_text() + done.stdout + done.stderr
    first = (project / "first.txt").read_text()
    assert "No space left on device" in first and "Resume with" in first
    (project / "outputs").rmdir()
    shutil.move(project / "kept", project / "outputs")
    assert_ends_as(undisturbed, project, LONGER)


@pytest.mark.slow
def test_one_step_at_a_time_gives_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    project = copy_project(tmp_path / "project")
    assert_ends_as(undisturbed, project, [*LONGER, "--cores", "1"])


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1.2, 2.5])
def test_short_memory_stops_a_run_that_then_resumes(undisturbed: Path, tmp_path: Path, limit: float) -> None:
    project = copy_project(tmp_path / "project")
    run = f"ulimit -v {int(limit * 2**20)}; exec bash run_all.sh {' '.join(repr(word) for word in LONGER)}"
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-c", run]
    done = subprocess.run(command, cwd=project, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert done.returncode not in (0, 2), done.stdout + done.stderr
    assert_ends_as(undisturbed, project, LONGER)
