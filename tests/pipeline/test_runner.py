"""The command line on a tiny project: real Snakefile and run_all.sh, stand-in notebooks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from conftest import ROOT, TINY_NOTEBOOKS, run_all, write_tiny_notebook

from lsdc_utils.pipeline import runner, steps
from lsdc_utils.pipeline.runner import Progress, UsageError, last_lines, parse_override, score_table

DEFAULTS = yaml.safe_load(
    "{name: '007', n: 3, rate: 0.1, tta: true, folds: [0, 1], epochs: {nfn: 1, scs: 2}, views: [[1.0, 0]]}"
)


def would_run(project: Path, *arguments: str) -> list[str]:
    """Steps that a dry run names."""
    done = run_all(project, "--dry-run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^would run (\w+):", done.stdout, re.MULTILINE)


def code_of(name: str) -> str:
    return TINY_NOTEBOOKS[name][1]


# ---- parameters ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name=042", "042"),
        ("name=no", "no"),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ("n=5", 5),
        ("rate=1e-3", 0.001),
        ("rate=2", 2.0),
        ("tta=false", False),
        ("folds=0", [0]),
        ("folds=1,0", [1, 0]),
        ("folds=[1]", [1]),
        ("epochs={nfn: 3, scs: 4}", {"nfn": 3, "scs": 4}),
        ("views=[[0.8, 1], [1.0, 0]]", [[0.8, 1], [1.0, 0]]),
    ],
)
def test_an_override_takes_the_type_of_the_default(text: str, value: object) -> None:
    key, parsed = parse_override(text, DEFAULTS)
    assert key == text.split("=")[0]
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_file_or_folder_is_looked_for_from_where_the_user_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = {"data_dir": "", "folds_csv": "", "name": "", "yolo_model": ""}
    assert parse_override("folds_csv=tables/folds.csv", defaults)[1] == str(tmp_path / "tables/folds.csv")
    assert parse_override("data_dir=/elsewhere", defaults)[1] == "/elsewhere"
    assert parse_override("data_dir=", defaults)[1] == ""
    assert parse_override("name=a/b", defaults)[1] == "a/b"
    (tmp_path / "own.pt").touch()
    assert parse_override("yolo_model=own.pt", defaults)[1] == str(tmp_path / "own.pt")
    assert parse_override("yolo_model=yolov10x.pt", defaults)[1] == "yolov10x.pt"  # the notebooks know where it may be


@pytest.mark.parametrize(
    "text",
    ["n", "m=1", "n=1.5", "n=true", "n=many", "rate=fast", "rate=true", "tta=1", "folds=a", "folds=0.5",
     "epochs={nfn: 3}", "epochs=3", "epochs={nfn: 3, scs: x}", "n=[1", "nn=3"],
)  # fmt: skip
def test_a_wrong_key_or_type_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text.split("=")[0])):
        parse_override(text, DEFAULTS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["n_trian=3"], "n_train"),
        (["n_train=3.5"], "int"),
        (["run_dir=elsewhere"], "known key"),
        (["--profile", "nope"], "other"),
        (["--until", "09"], "08_report"),
        (["--force", "03_train_yolo_scs_fold7"], "fold0"),
        (["--data", "nowhere"], "no such folder"),
        (["--run", "../escape"], "plain name"),
        (["--run", "data"], "plain name"),
        (["--cores", "0"], "1 or more"),
        (["folds=2"], "n_splits"),
        (["folds=[]"], "n_splits"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
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


def test_help_names_every_command_and_option() -> None:
    done = run_all(ROOT, "--help")
    assert done.returncode == 0
    for word in (
        "--profile",
        "--data",
        "--run",
        "--cores",
        "--until",
        "--force",
        "--slurm",
        "--dry-run",
        "KEY=VALUE",
        "validate DIR",
        "predict DIR --run NAME",
        "export [STUDY ...]",
        "bench [NAME]",
        "test",
        "lab",
    ):
        assert word in done.stdout


# ---- the first run -------------------------------------------------------------------------------------------------


def test_a_run_tells_each_step_and_ends_with_scores_and_report(finished_tiny_project: Path) -> None:
    said = (finished_tiny_project / "first_run.txt").read_text()
    assert said.count(" done in ") == 14
    assert "[1/14] 00_get_data" in said
    assert "[14/14] 08_report done in" in said
    assert re.search(r"ensemble +0\.400 +0\.600 +0\.700 +- +0\.500", said)
    assert said.rstrip().endswith("outputs/demo/report/index.html")


def test_steps_run_after_what_they_read(finished_tiny_project: Path) -> None:
    done = re.findall(r"\] (\w+) done", (finished_tiny_project / "first_run.txt").read_text())
    began = re.findall(r"\] (\w+)$", (finished_tiny_project / "first_run.txt").read_text(), re.MULTILINE)
    assert done[:3] == ["00_get_data", "01_eda", "02_convert_labels"]
    assert set(began[3:5]) == {"03_train_yolo_scs_fold0", "03_train_yolo_scs_fold1"}
    assert done[-3:] == ["05_ensemble_inference", "07_stress_tests", "08_report"]


def test_each_step_leaves_notebook_log_and_benchmark(finished_tiny_project: Path) -> None:
    run = finished_tiny_project / "outputs" / "demo"
    parameters = yaml.safe_load((run / "parameters.yml").read_text())
    names = [step.name for step in steps.all_steps(parameters)]
    assert len(names) == 14
    assert sorted(path.stem for path in (run / "notebooks").iterdir()) == sorted(names)
    assert not list((run / "logs").glob("*.ipynb"))
    for name in names:
        assert (run / "logs" / f"{name}.log").is_file()
        assert "max_rss" in (run / "logs" / f"{name}.tsv").read_text()
    assert "epoch 3/3" in (run / "logs" / "03_train_yolo_scs_fold1.log").read_text()


def test_two_trainings_side_by_side_take_a_gpu_each(finished_tiny_project: Path) -> None:
    logs = [finished_tiny_project / f"outputs/demo/logs/03_train_yolo_scs_fold{fold}.log" for fold in (0, 1)]
    assert {re.search("device (.*)", log.read_text())[1] for log in logs} == {"4", "5"}


def test_threads_come_from_the_profile_whatever_the_cores(tiny_project: Path) -> None:
    done = run_all(tiny_project, "--cores", "1", "--until", "03_train_yolo_scs_fold0", "threads=2")
    assert done.returncode == 0, done.stderr
    assert "threads 2" in (tiny_project / "outputs/demo/logs/03_train_yolo_scs_fold0.log").read_text()


# ---- what runs again -----------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(tiny_project: Path) -> None:
    done = run_all(tiny_project)
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert "0.500" in done.stdout


def test_a_saved_notebook_a_comment_and_a_new_place_run_nothing(tiny_project: Path) -> None:
    executed = nbformat.read(tiny_project / "outputs/demo/notebooks/01_eda.ipynb", as_version=4)
    executed.cells.append(nbformat.v4.new_markdown_cell("a remark"))
    nbformat.write(executed, tiny_project / "notebooks/01_eda.ipynb")
    write_tiny_notebook(tiny_project, "03_train_yolo", "# the loop\n" + code_of("03_train_yolo"))
    with (tiny_project / "lsdc_utils/used.py").open("a") as module:
        module.write("# a comment\n")
    assert would_run(tiny_project) == []


def test_a_changed_module_runs_what_depends_on_it_and_no_more(tiny_project: Path) -> None:
    with (tiny_project / "lsdc_utils/report.py").open("a") as module:
        module.write("TITLE = 'new'\n")
    assert would_run(tiny_project) == ["08_report"]
    with (tiny_project / "lsdc_utils/used.py").open("a") as module:
        module.write("from . import helper\n")
    (tiny_project / "lsdc_utils/helper.py").write_text("")
    assert len(would_run(tiny_project)) == 12  # all but 00 and 01
    assert would_run(tiny_project, "--until", "02") == ["02_convert_labels"]


def test_a_changed_code_cell_runs_the_step_and_what_follows(tiny_project: Path) -> None:
    write_tiny_notebook(tiny_project, "04_train_vit3d", code_of("04_train_vit3d") + "\nprint('new')")
    expected = ["04_train_vit3d_fold0", "04_train_vit3d_fold1", "05_ensemble_inference", "07_stress_tests", "08_report"]
    assert would_run(tiny_project) == expected


def test_a_changed_parameter_runs_the_steps_that_declare_it(tiny_project: Path) -> None:
    assert would_run(tiny_project, "vit_lr=1e-4", "--until", "04") == ["04_train_vit3d_fold0", "04_train_vit3d_fold1"]
    # Of the epochs by condition only the recesses' changed: the other two detectors stay, and what reads their points.
    assert would_run(tiny_project, "yolo_epochs={nfn: 2, scs: 3, ss: 5}") == [
        "03_train_yolo_ss_fold0",
        "03_train_yolo_ss_fold1",
        "05_ensemble_inference",
        "07_stress_tests",
        "08_report",
    ]


def test_files_written_again_with_the_same_bytes_run_nothing(tiny_project: Path) -> None:
    labels = tiny_project / "outputs/demo/tables/labels.parquet"
    labels.write_text("whole")
    assert would_run(tiny_project) == []
    labels.write_text("other")
    assert "03_train_yolo_scs_fold0" in would_run(tiny_project)


def test_a_changed_exploration_trains_nothing(tiny_project: Path) -> None:
    write_tiny_notebook(tiny_project, "01_eda", "print('another figure')")
    assert would_run(tiny_project) == ["01_eda", "08_report"]


def test_lost_data_and_forced_steps_run_again(tiny_project: Path) -> None:
    assert would_run(tiny_project, "--force", "05") == ["05_ensemble_inference", "07_stress_tests", "08_report"]
    assert would_run(tiny_project, "stress_bodies=0") == ["08_report"]  # is of the others
    (tiny_project / "outputs/data").rmdir()
    assert would_run(tiny_project)[:2] == ["00_get_data", "01_eda"]


def test_another_run_has_a_folder_of_its_own_and_fewer_folds(tiny_project: Path) -> None:
    steps_of_other = would_run(tiny_project, "--profile", "other")
    assert len(steps_of_other) == 10
    assert not [name for name in steps_of_other if "fold1" in name]
    assert not (tiny_project / "outputs/other").exists()


# ---- on a cluster --------------------------------------------------------------------------------------------------


def test_a_cluster_runs_the_same_steps(tiny_project: Path) -> None:
    assert would_run(tiny_project, "--slurm") == []
    changed = ("yolo_epochs={nfn: 2, scs: 3, ss: 5}", "--force", "01")
    assert would_run(tiny_project, "--slurm", *changed) == would_run(tiny_project, *changed)
    assert len(would_run(tiny_project, "--slurm", "--run", "other")) == 14


def test_a_cluster_is_held_back_by_its_profile_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    on_slurm, here = (runner.run_from([*slurm, "--cores", "3"])[0] for slurm in (["--slurm"], []))
    asked = " ".join(runner.snakemake_command(on_slurm, tmp_path / "parameters.yml", 0))
    assert f"--workflow-profile {runner.PROFILES}/slurm --slurm-logdir {on_slurm.folder}/logs/slurm" in asked
    assert "--cores 3" in asked and "--resources" not in asked
    assert on_slurm.resume == f"{here.resume} --slurm"
    asked = " ".join(runner.snakemake_command(here, tmp_path / "parameters.yml", 1))
    assert "--resources gpu=1" in asked and "--workflow-profile" not in asked
    assert "CUDA_VISIBLE_DEVICES" not in runner.child_environment(on_slurm, [])
    assert runner.child_environment(here, ["3"])["CUDA_VISIBLE_DEVICES"] == "3"


def test_the_profile_of_a_cluster_names_the_rules_that_take_a_gpu() -> None:
    rules = re.split(r"^rule ", (ROOT / "notebooks/Snakefile").read_text(), flags=re.MULTILINE)[1:]
    profile = yaml.safe_load((runner.PROFILES / "slurm/config.yaml").read_text())
    assert set(profile["set-resources"]) == {rule.split(":")[0] for rule in rules if "gpu=" in rule}
    assert profile["executor"] == "slurm" and profile["jobs"] > 1


def test_jobs_left_on_a_cluster_are_cancelled_and_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "record"
    for name, text in {
        "scancel": f'echo "scancel $*" >> {record}',
        "squeue": f'[ $(wc -l < {record}) = 1 ] && echo "squeue $*" | tee -a {record}',  # the job is listed once
    }.items():
        stub_tool(tmp_path / "tools", name, f"#!/bin/bash\n{text}\n")
    monkeypatch.setenv("PATH", f"{tmp_path}/tools", prepend=os.pathsep)
    runner.cancel_jobs(tmp_path)  # nothing was started here
    assert not record.exists()
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/snakemake.log").write_text("Building DAG of jobs...\nSLURM run ID: 2b95c8ca-af8c\nJob stats:\n")
    runner.cancel_jobs(tmp_path)
    assert record.read_text() == "scancel --name 2b95c8ca-af8c\nsqueue --noheader --name 2b95c8ca-af8c\n"


# ---- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_failing_step_is_told_and_the_run_can_go_on(tiny_project: Path) -> None:
    write_tiny_notebook(tiny_project, "05_ensemble_inference", "print('blending')\nraise ValueError('no study 42')")
    done = run_all(tiny_project, "--cores", "2", "tta=false")
    assert done.returncode != 0
    for told in (
        "05_ensemble_inference failed",
        "notebooks/05_ensemble_inference.ipynb",
        "outputs/demo/logs/05_ensemble_inference.ipynb",
        "failing cell: number 3",  # without what papermill adds
        "      raise ValueError('no study 42')",
        "blending",
        "ValueError: no study 42",
        "./run_all.sh --profile demo --run demo --cores 2 tta=false",
    ):
        assert told in done.stderr
    assert not (tiny_project / "outputs/demo/submission.csv").exists()  # the old one is not taken for the new one
    write_tiny_notebook(tiny_project, "05_ensemble_inference")
    done = run_all(tiny_project, "tta=false")
    assert done.returncode == 0
    assert "3 steps run" in done.stdout


@pytest.mark.parametrize(
    "code", ["import sys\nsys.exit(0)", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"], ids=["exit", "kill"]
)
def test_a_notebook_that_ends_early_is_a_failed_step(tiny_project: Path, code: str) -> None:
    write_tiny_notebook(tiny_project, "08_report", code)
    done = run_all(tiny_project)
    assert done.returncode != 0
    assert "08_report failed" in done.stderr
    assert code.splitlines()[-1] in done.stderr
    assert not (tiny_project / "outputs/demo/notebooks/08_report.ipynb").exists()


def start_sleeping_run(project: Path) -> subprocess.Popen:
    """A run whose last step sleeps; returns once it does."""
    write_tiny_notebook(project, "08_report", "import time\nprint('asleep')\ntime.sleep(300)")
    command = [sys.executable, "-m", "lsdc_utils.pipeline.runner"]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, cwd=project, env=environment, **pipes)
    deadline = time.time() + 60
    while last_lines(project / "outputs/demo/logs/08_report.log") != ["asleep"]:
        assert time.time() < deadline, "the step did not start"
        time.sleep(0.2)
    return running


def processes_in(project: Path) -> list[psutil.Process]:
    return runner.processes_of(project / "outputs" / "demo")


def test_after_a_kill_the_next_run_ends_what_is_left_and_goes_on(tiny_project: Path) -> None:
    running = start_sleeping_run(tiny_project)
    second = run_all(tiny_project)
    assert second.returncode == 2
    assert "being worked on" in second.stderr
    running.kill()
    running.communicate()
    assert len(processes_in(tiny_project)) >= 3  # Snakemake, the step and its kernel live on
    write_tiny_notebook(tiny_project, "08_report")
    done = run_all(tiny_project)
    assert done.returncode == 0, done.stderr
    assert "1 steps run" in done.stdout
    assert processes_in(tiny_project) == []


@pytest.mark.parametrize("times", [1, 5])
def test_a_stopped_run_leaves_no_process_and_says_how_to_go_on(tiny_project: Path, times: int) -> None:
    running = start_sleeping_run(tiny_project)
    for _ in range(times):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "./run_all.sh --profile demo" in told
    assert processes_in(tiny_project) == []


# ---- pieces --------------------------------------------------------------------------------------------------------


def test_two_gpus_are_held_by_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-b")
    with steps.own_gpus(1):
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-b")
        with steps.own_gpus(1):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b"


def test_gpus_are_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert runner.visible_gpus() == ["1", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert runner.visible_gpus() == []


def test_modules_are_followed_through_packages_and_relative_imports(monkeypatch, tmp_path: Path) -> None:
    package = tmp_path / "lsdc_utils"
    (package / "deep" / "templates").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "a.py": "def late():\n    from .deep import inner",
        "b.py": "",
        "deep/__init__.py": "",
        "deep/inner.py": "from ..b import thing\nfrom . import other",
        "deep/other.py": "",
        "deep/templates/page.html": "<p>",
        "deep/unused.py": "",
    }.items():
        (package / name).write_text(text)
    monkeypatch.setattr(steps, "ROOT", tmp_path)
    found = {str(path.relative_to(package)) for path in steps.module_files("%matplotlib inline\nimport lsdc_utils.a")}
    assert found == {
        "__init__.py", "a.py", "b.py", "deep/__init__.py", "deep/inner.py", "deep/other.py", "deep/templates/page.html"
    }  # fmt: skip


def test_the_last_line_is_what_a_progress_bar_shows_now(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\n  1%\r 50%\r100%\x1b[0m\n\n")
    assert last_lines(log) == ["100%"]
    assert last_lines(log, 5) == ["first", "100%"]
    assert last_lines(tmp_path / "none") == []


def test_progress_is_read_from_snakemakes_words() -> None:
    progress = Progress()
    said = [progress.read(line) for line in SNAKEMAKE_SAYS.splitlines()]
    assert [line for line in said if line] == [
        "[1/2] 01_eda",
        "[1/2] 01_eda done in 0:00",
        "[2/2] 04_train_vit3d_fold0",
        "04_train_vit3d_fold0 failed",
    ]
    assert progress.reasons["01_eda"] == "Missing output files: a"
    assert progress.failed == ["04_train_vit3d_fold0"]
    assert progress.running == {}


def test_what_a_cluster_says_of_a_failed_job_is_told() -> None:
    progress, words = Progress(), SNAKEMAKE_SAYS.replace("None", "SLURM-job '5' ran out of time")
    said = [progress.read(line) for line in words.splitlines()]
    assert said[-1] == "04_train_vit3d_fold0 failed: SLURM-job '5' ran out of time"


SNAKEMAKE_SAYS = """\
total                    2

localrule eda:
    input: data.json
    log: logs/01_eda.log
    jobid: 3
    reason: Missing output files: a
Finished jobid: 3 (Rule: eda)
rule train_vit3d:
    log: logs/04_train_vit3d_fold0.log
    jobid: 1
    reason: Params have changed
RuleException:
Error in rule train_vit3d:
    message: None
    jobid: 1
    log: logs/04_train_vit3d_fold0.log (check log file(s) for error details)
"""


def test_scores_show_test_first_and_out_of_fold_alone_without_test_labels() -> None:
    parts = dict.fromkeys(runner.PARTS, 0.5)
    block = {
        "n_studies": 7,
        "scores": {"prior": parts, "ensemble": parts},
        "skill": {"ensemble": {**parts, "total": 0.25}},
        "interval": {"ensemble": {"total": [0.4, 0.6]}},
    }
    both = score_table({"oof": block, "test": block})
    assert both.index("test studies") < both.index("out of fold")
    assert "0.250" in both
    assert "0.400 to 0.600" in both
    alone = score_table({"oof": {**block, "skill": None}, "test": None})
    assert "test studies" not in alone
    assert "skill" not in alone


# ---- other commands ------------------------------------------------------------------------------------------------


def test_benchmarks_run_one_after_the_other_and_helpers_do_not(tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr(runner, "BENCHMARKS", tmp_path)
    (tmp_path / "shared.py").write_text("1 / 0\n")
    for name, end in (("read", 0), ("write", 3)):
        (tmp_path / f"{name}.py").write_text(f'if __name__ == "__main__":\n    print("ratio 1.1")\n    exit({end})\n')
    assert runner.main(["bench", "rea"]) == 0
    assert capfd.readouterr().out.split() == ["read", "ratio", "1.1"]
    assert runner.main(["bench"]) == 1
    told = capfd.readouterr()
    assert told.out.split() == ["read", "ratio", "1.1", "write", "ratio", "1.1"]
    assert "failed: write" in told.err
    assert runner.main(["bench", "nothing"]) == 2
    assert "there are: read, write" in capfd.readouterr().err


def test_validate_hands_over_a_folder_that_exists(tmp_path, monkeypatch, capsys) -> None:

    monkeypatch.setattr(
        "lsdc_utils.data.checks.main", lambda folder, out: 1 if (folder, out) == (tmp_path, None) else 0
    )
    assert runner.main(["validate", str(tmp_path)]) == 1
    assert runner.main(["validate", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


# ---- the environment -----------------------------------------------------------------------------------------------

STUB_PYTHON = """\
#!/bin/bash
# Stands for a Python without the pins: it records what it is asked for, and makes an environment like itself.
echo "$0 $*" >> "{record}"
case "$*" in
"- "*) exit 1 ;;
"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-c import cv2") exit 1 ;;
"-m lsdc_utils.pipeline.runner"*) echo handed over ;;
esac
"""


def stub_tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def run_with_tools(project: Path, tools: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(project)}
    command = ["bash", str(project / "run_all.sh"), *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


@pytest.fixture
def bare_project(tmp_path: Path) -> Path:
    """Only what setting up needs."""
    for name in ("run_all.sh", "requirements.txt", "environment.yml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def test_without_an_environment_one_is_made_from_the_pins(bare_project: Path) -> None:
    record, tools = bare_project / "record", bare_project / "tools"
    for name in ("python", "python3"):
        stub_tool(tools, name, STUB_PYTHON.format(record=record))
    done = run_with_tools(bare_project, tools, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "handed over\n"
    asked = record.read_text()
    python = f"{bare_project}/.venv/bin/python"
    assert f"{tools}/python3 -m venv {bare_project}/.venv\n" in asked
    assert f"{python} -m pip install --quiet --requirement {bare_project}/requirements.txt\n" in asked
    # Where cv2 does not load for want of a desktop's libraries, the build without them takes its place.
    assert re.search(r"--no-deps opencv-python-headless==\d+\.\d+", asked)
    assert asked.endswith(f"{python} -m lsdc_utils.pipeline.runner --dry-run\n")


def test_an_environment_that_satisfies_the_pins_is_taken(bare_project: Path) -> None:
    record, tools = bare_project / "record", bare_project / "tools"
    real = f'#!/bin/bash\n[ "$1" = -m ] && echo "$0" && exit\nexec "{sys.executable}" "$@"\n'
    stub_tool(tools, "python", STUB_PYTHON.format(record=record))
    stub_tool(bare_project / ".venv/bin", "python", real)
    assert run_with_tools(bare_project, tools).stdout == f"{bare_project}/.venv/bin/python\n"
    stub_tool(tools, "python", real)  # the active one comes first
    assert run_with_tools(bare_project, tools).stdout == f"{tools}/python\n"
    with (bare_project / "requirements.txt").open("a") as pins:
        pins.write("a-package-nobody-has==1\n")
    stub_tool(tools, "python3", STUB_PYTHON.format(record=record))
    assert run_with_tools(bare_project, tools).stdout == "handed over\n"


def test_conda_users_get_the_same_pins(bare_project: Path) -> None:
    """A stub stands for conda and records its arguments, since no channel can be reached where tests run."""
    record, tools = bare_project / "record", bare_project / "tools"
    stub_tool(tools, "conda", f'#!/bin/bash\necho "$*" >> "{record}"\n')
    text = (bare_project / "environment.yml").read_text()
    command = re.search(r"^# +(conda env create .*?) &&", text, re.MULTILINE)[1]
    environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    subprocess.run(command, shell=True, check=True, cwd=bare_project, env=environment)
    assert record.read_text() == "env create --file environment.yml\n"
    assert yaml.safe_load(text)["dependencies"][-1] == {"pip": ["-r requirements.txt"]}


def test_pins_are_exact_and_bound_to_no_platform() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+", line) for line in lines)
    names = [line.split("==")[0].lower() for line in lines]
    assert len(names) == len(set(names))
    assert {"torch", "torchvision", "ultralytics", "timm", "snakemake", "papermill"} <= set(names)
    assert not [name for name in names if re.match(r"nvidia-(?!ml-py)|cuda|triton", name)]


def test_lab_installs_the_filter_that_keeps_outputs_out_of_git(tmp_path: Path, monkeypatch) -> None:
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / ".gitattributes").write_bytes((ROOT / ".gitattributes").read_bytes())
    (tmp_path / "notebooks").mkdir()
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    commands, run = [], subprocess.run
    monkeypatch.setattr(runner, "NOTEBOOKS", tmp_path / "notebooks")

    def started(command: list, **options) -> subprocess.CompletedProcess:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0) if "jupyterlab" in command else run(command, **options)

    monkeypatch.setattr(runner.subprocess, "run", started)
    assert runner.lab([]) == 0
    monkeypatch.undo()
    assert commands[-1][-1] == "--LabApp.default_url=/lab/tree/start.ipynb"
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


def test_help_lists_every_command_once(capsys) -> None:
    with pytest.raises(SystemExit):
        runner.main(["--help"])
    table = capsys.readouterr().out
    for name in runner.COMMANDS:
        assert len(re.findall(rf"^  {name}\b", table, re.MULTILINE)) == 1, name
        with pytest.raises(SystemExit) as ended:
            runner.main([name, "--help"])
        assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"usage: ./run_all.sh {name}")
    for line in table.splitlines():
        assert len(line) <= 120
