"""The commands: help, mistakes, and what each hands over."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from argparse import Namespace
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from conftest import ROOT, run_all

from lsdc_utils import metric
from lsdc_utils.pipeline import arguments, commands


def test_help_lists_every_command_once(capsys) -> None:
    with pytest.raises(SystemExit):
        commands.main(["--help"])
    table = capsys.readouterr().out
    for name in arguments.COMMANDS:
        assert len(re.findall(rf"^  {name}\b", table, re.MULTILINE)) == 1, name
        with pytest.raises(SystemExit) as ended:
            commands.main([name, "--help"])
        assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: ./run_all.sh {name}")
    for line in table.splitlines():
        assert len(line) <= 120


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["n_trian=3"], "n_train"),
        (["predit", "."], "predit: no command, and not KEY=VALUE; commands: run, validate, predict"),
        (["n_train=3.5"], "int"),
        (["run_dir=elsewhere"], "unknown key"),
        (["--profile", "nope"], "other"),
        (["--until", "09"], "08_report"),
        (["--force", "03_train_yolo_scs_fold7"], "fold0"),
        (["--data", "nowhere"], "no such folder"),
        (["--run", "../escape"], "plain name"),
        (["--run", "data"], "plain name"),
        (["--cores", "0"], "1 or more"),
        (["--nonsense"], "unrecognized"),
        (["predict", "nowhere", "--run", "demo"], "no such folder"),
        (["predict"], "required"),
        (["predict", ".", "--run", "demo", "--pages", "yes"], "unrecognized"),
        (["--run", "predict"], "plain name"),
        (["curve", "0"], "1 or more"),
        (["folds=2"], "n_splits"),
        (["folds=[]"], "n_splits"),
    ],
)
def test_mistakes_are_errors_before_anything_runs(
    finished_tiny_project: Path, arguments: list[str], message: str
) -> None:
    before = sorted(finished_tiny_project.rglob("*"))
    done = run_all(finished_tiny_project, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("run_all.sh: ")
    assert message in done.stderr
    assert [path for path in sorted(finished_tiny_project.rglob("*")) if "__pycache__" not in path.parts] == [
        path for path in before if "__pycache__" not in path.parts
    ]


def test_benchmarks_run_one_after_the_other_and_helpers_do_not(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(commands, "BENCHMARKS", tmp_path)
    (tmp_path / "shared.py").write_text("1 / 0\n")
    for name, end in (("read", 0), ("write", 3)):
        (tmp_path / f"{name}.py").write_text(f'if __name__ == "__main__":\n    print("ratio 1.1")\n    exit({end})\n')
    assert commands.main(["bench", "rea"]) == 0
    assert capfd.readouterr().out.split() == ["read", "ratio", "1.1"]
    assert commands.main(["bench"]) == 1
    printed = capfd.readouterr()
    assert printed.out.split() == ["read", "ratio", "1.1", "write", "ratio", "1.1"]
    assert "failed: write" in printed.err
    assert commands.main(["bench", "nothing"]) == 2
    assert "there are: read, write" in capfd.readouterr().err


def test_validate_hands_over_a_folder_that_exists(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(
        "lsdc_utils.data.checks.main", lambda folder, out, source: 1 if (folder, out) == (tmp_path, None) else 0
    )
    assert commands.main(["validate", str(tmp_path)]) == 1
    with pytest.raises(SystemExit) as ended:
        commands.main(["validate", str(tmp_path / "nowhere")])
    assert ended.value.code == 2 and "no such folder" in capsys.readouterr().err


def test_a_check_does_not_replace_the_ids_of_others(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("lsdc_utils.data.checks.main", lambda folder, out, source: 0)
    out = tmp_path / "findings.csv"
    assert commands.main(["validate", str(tmp_path), "--out", str(out)]) == 0
    (tmp_path / "study_ids.csv").touch()
    assert commands.main(["validate", str(tmp_path), "--out", str(out)]) == 2
    assert "study_ids.csv would be replaced" in capsys.readouterr().err
    out.touch()  # both are of an earlier check
    assert commands.main(["validate", str(tmp_path), "--out", str(out)]) == 0


def test_nothing_goes_into_the_folder_of_the_ready_made_models(tmp_path: Path, monkeypatch) -> None:
    archive = tmp_path / "pretrained.zip"
    archive.touch()
    asked = Namespace(run=str(archive), folder=tmp_path / "dicom", out=None)
    assert commands.grading(asked, "predict")[1] == commands.OUTPUTS / "predict/dicom"
    ready = Namespace(run=commands.OUTPUTS / "pretrained", out=None, ready=False, measured=None, user=None)
    for command in (commands.pack, commands.kaggle_bundle):
        with pytest.raises(commands.UsageError, match="tell with --out where it goes"):
            command(ready)


def test_a_stop_is_a_sentence_and_a_missing_table_is_refused_at_once(tmp_path, monkeypatch, capsys) -> None:
    def stopped(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("lsdc_utils.data.checks.main", stopped)
    assert commands.main(["validate", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "run_all.sh: stopped; the same command resumes\n"
    with pytest.raises(SystemExit) as ended:
        commands.main(["evaluate", str(tmp_path), "--labels", str(tmp_path / "none.csv")])
    assert ended.value.code == 2 and "none.csv: no such file" in capsys.readouterr().err


def test_a_run_that_ends_earlier_does_not_print_the_scores_and_report_of_the_last_one(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(commands, "OUTPUTS", tmp_path)
    monkeypatch.setattr(commands, "work", lambda planned: 0)
    (tmp_path / "own/report").mkdir(parents=True)
    (tmp_path / "own/report/index.html").touch()
    block = {"n_studies": 1, "scores": {"ensemble": dict.fromkeys(metric.PARTS, 0.5)}, "skill": None}
    (tmp_path / "own/scores.json").write_text(json.dumps({"oof": block, "test": None}))
    for until, printed in (
        ("04", ()),
        ("phantom", ()),
        ("05", ("0.500",)),
        ("07", ("0.500",)),
        ("08", ("0.500", "report")),
    ):
        assert commands.main(["--run", "own", "--until", until]) == 0
        said = capsys.readouterr().out
        assert [word for word in ("0.500", "report") if word in said] == list(printed)
    assert commands.main(["--run", "own"]) == 0 and "report: " in capsys.readouterr().out


def test_lab_installs_the_filter_that_keeps_outputs_out_of_git(tmp_path: Path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setattr(commands, "git_commit", lambda: "of this tree")
    (tmp_path / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    called, run = [], subprocess.run
    monkeypatch.setattr(commands, "NOTEBOOKS", tmp_path / "notebooks")

    def started(command: list, **options) -> subprocess.CompletedProcess:
        called.append(command)
        return subprocess.CompletedProcess(command, 0) if "jupyterlab" in command else run(command, **options)

    monkeypatch.setattr(commands.subprocess, "run", started)
    assert commands.main(["lab", "--port", "8899", "--no-browser"]) == 0
    monkeypatch.undo()
    as_root = ["--allow-root"] if os.geteuid() == 0 else []
    alone = ["--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]  # no network
    options = ["--LabApp.default_url=/lab/tree/start.ipynb", *alone, *as_root, "--port", "8899", "--no-browser"]
    assert called[-1][-len(options) :] == options
    assert (ROOT / "notebooks/start.ipynb").is_file()
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text="out")], execution_count=1)
    cell.metadata["papermill"] = {"duration": 1}
    file = tmp_path / "notebooks" / "a.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {}}), file)
    git = ["git", "-C", tmp_path]
    subprocess.run([*git, "add", "notebooks"], check=True)
    stored = json.loads(subprocess.run([*git, "show", ":notebooks/a.ipynb"], check=True, capture_output=True).stdout)
    assert stored["cells"][0]["outputs"] == []
    assert stored["cells"][0]["id"] == cell.id
    assert "papermill" not in json.dumps(stored)
    assert json.loads(file.read_text())["cells"][0]["outputs"]


def test_the_filter_of_an_environment_that_is_gone_does_not_stop_git(tmp_path: Path) -> None:
    kept = ["sh", "-c", commands.FILTER, "/nowhere/python", "--keep-id"]
    for tool in ("sh", "cat"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    options = {"input": "{}", "capture_output": True, "text": True, "cwd": tmp_path}
    done = subprocess.run(kept, env={"PATH": str(tmp_path)}, **options)
    assert (done.returncode, done.stdout) == (0, "{}") and "run_all.sh lab" in done.stderr
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    done = subprocess.run(kept, env={"PATH": str(tmp_path)}, **options)
    assert done.stdout == "-m nbstripout --keep-id\n"


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.EEXIST])
def test_a_folder_that_cannot_be_written_is_one_sentence(code: int, monkeypatch, capsys) -> None:
    def denied(asked: object) -> int:
        raise OSError(code, os.strerror(code), "/temporary", None, "/results")

    monkeypatch.setattr(commands, "run", denied)
    assert commands.main([]) == 2
    assert capsys.readouterr().err.startswith(f"run_all.sh: /results: {os.strerror(code)}; ")


def test_results_for_the_card_are_a_file_that_exists(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main(["pack", "--ready", "--run", arguments.READY, "--measured", str(tmp_path / "none.csv")])
    assert ended.value.code == 2 and "none.csv: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(("referred", "status"), [([3, 4], 0), ([3, 0], 1)])
def test_an_export_fails_where_a_study_got_no_report(referred: list[int], status: int, monkeypatch, capsys) -> None:
    table = {"study_id": [1, 2], "images_referred": referred, "images_written": 0, "problem": ["", "no sr.dcm"]}
    monkeypatch.setattr("lsdc_utils.export.studies.export_studies", lambda *_: pd.DataFrame(table))
    assert commands.main(["export", "--run", arguments.READY]) == status
    assert "study 2: no sr.dcm" in capsys.readouterr().err
