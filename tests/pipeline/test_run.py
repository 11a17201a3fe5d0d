"""Runs of a tiny project: real Snakefile and run_all.sh, stand-in notebooks. First run, what runs again, failures."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import psutil
import pytest
import yaml
from conftest import TINY_NOTEBOOKS, run_all, write_tiny_notebook

from lsdc_utils.pipeline import graph, parameters, run
from lsdc_utils.pipeline.experiments import copy_run
from lsdc_utils.pipeline.progress import last_lines

GRADING = ["05_ensemble_inference", "06_evaluation", "07_stress_tests", "08_report"]


def would_run(project: Path, *arguments: str) -> list[str]:
    """Steps that a dry run names."""
    done = run_all(project, "--dry-run", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert max(map(len, done.stdout.splitlines())) < 400  # of long lists of files the first alone is named
    return re.findall(r"^would run (\w+):", done.stdout, re.MULTILINE)


def code_of(name: str) -> str:
    return TINY_NOTEBOOKS[name][1]


# ---- the first run --------------------------------------------------------------------------------------------------


def test_a_run_prints_each_step_and_ends_with_scores_and_report(finished_tiny_project: Path) -> None:
    said = (finished_tiny_project / "first_run.txt").read_text()
    assert said.count(" done in ") == 18
    assert "[1/18] 00_get_data" in said
    assert "[18/18] 08_report done in" in said
    assert re.search(r"ensemble +0\.400 +0\.600 +0\.700 +- +0\.500", said)
    assert re.search(r"report: .*outputs/demo/report/index.html\nthe run took \d+:\d\d\n$", said)


def test_steps_run_after_what_they_read(finished_tiny_project: Path) -> None:
    done = re.findall(r"\] (\w+) done", (finished_tiny_project / "first_run.txt").read_text())
    began = re.findall(r"\] (\w+)$", (finished_tiny_project / "first_run.txt").read_text(), re.MULTILINE)
    assert done[0] == "00_get_data" and done[-1] == "08_report"
    trainings = [step for step in began if step.startswith("03")]
    assert set(trainings[:2]) == {"03_train_localiser_fold0", "03_train_localiser_fold1"}
    last = max(done.index(step) for step in done if step[:2] in ("03", "04"))
    assert done.index("02_convert_labels") < began.index(trainings[0])
    assert last < done.index("05_ensemble_inference") < min(map(done.index, ("06_evaluation", "07_stress_tests")))


def test_each_step_leaves_notebook_log_and_benchmark(finished_tiny_project: Path) -> None:
    folder = finished_tiny_project / "outputs" / "demo"
    parameters = yaml.safe_load((folder / "parameters.yml").read_text())
    names = [step.name for step in graph.all_steps(parameters)]
    assert len(names) == 18
    assert sorted(path.stem for path in (folder / "notebooks").iterdir()) == sorted(names)
    assert not list((folder / "logs").glob("*.ipynb"))
    for name in names:
        assert (folder / "logs" / f"{name}.log").is_file()
        assert "max_rss" in (folder / "logs" / f"{name}.tsv").read_text()
    table = pd.read_csv(folder / "logs" / "steps.csv", index_col="step")
    assert sorted(table.index) == sorted([*names, "total"])
    assert (table["cpu_s"] > 0.2).all()
    assert table.loc["total", "cpu_s"] == pytest.approx(table["cpu_s"].drop("total").sum(), abs=0.1)
    assert table["share_s"].drop("total").sum() < table["seconds"].drop("total").sum()  # some ran in parallel
    assert "epoch 3/3" in (folder / "logs" / "03_train_yolo_scs_fold1.log").read_text()


def test_two_trainings_side_by_side_take_a_gpu_each(finished_tiny_project: Path) -> None:
    """The localisers of two folds, which begin together."""
    logs = [finished_tiny_project / f"outputs/demo/logs/03_train_localiser_fold{fold}.log" for fold in (0, 1)]
    assert {re.search("device (.*)", log.read_text())[1] for log in logs} == {"4", "5"}


def test_threads_come_from_the_profile_whatever_the_cores(tiny_project: Path) -> None:
    done = run_all(tiny_project, "--cores", "1", "--until", "03_train_yolo_scs_fold0", "threads=2")
    assert done.returncode == 0, done.stderr
    assert "threads 2" in (tiny_project / "outputs/demo/logs/03_train_yolo_scs_fold0.log").read_text()


# ---- what runs again ------------------------------------------------------------------------------------------------


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


def test_a_copy_for_an_experiment_runs_nothing_up_to_05(tiny_project: Path) -> None:
    copy_run(tiny_project / "outputs/demo", tiny_project / "outputs/demo-copy")
    assert would_run(tiny_project, "--run", "demo-copy", "--until", "05") == []
    assert would_run(tiny_project, "--run", "demo-copy") == GRADING[1:]


def test_a_changed_module_runs_what_depends_on_it_and_no_more(tiny_project: Path) -> None:
    with (tiny_project / "lsdc_utils/report.py").open("a") as module:
        module.write("TITLE = 'new'\n")
    assert would_run(tiny_project) == ["08_report"]
    with (tiny_project / "lsdc_utils/used.py").open("a") as module:
        module.write("from . import helper\n")
    (tiny_project / "lsdc_utils/helper.py").write_text("")
    assert len(would_run(tiny_project)) == 15  # all but 00, the phantom and 01
    assert would_run(tiny_project, "--until", "02") == ["02_convert_labels"]


def test_a_changed_code_cell_runs_the_step_and_what_follows(tiny_project: Path) -> None:
    write_tiny_notebook(tiny_project, "04_train_vit3d", code_of("04_train_vit3d") + "\nprint('new')")
    assert would_run(tiny_project) == ["04_train_vit3d_fold0", "04_train_vit3d_fold1", *GRADING]


def test_a_changed_parameter_runs_the_steps_that_declare_it(tiny_project: Path) -> None:
    assert would_run(tiny_project, "vit_lr=1e-4", "--until", "04") == ["04_train_vit3d_fold0", "04_train_vit3d_fold1"]
    # Of the epochs by condition only the recesses' changed: the other two detectors stay.
    assert would_run(tiny_project, "yolo_epochs={nfn: 2, scs: 3, ss: 5}") == [
        "03_train_yolo_ss_fold0",
        "03_train_yolo_ss_fold1",
        "04_train_vit3d_fold0",
        "04_train_vit3d_fold1",
        *GRADING,
    ]


def test_softened_labels_wait_for_the_answers_and_a_blend_for_the_run_it_is_of(tiny_project: Path) -> None:
    outputs, asked = tiny_project / "outputs", ("--run", "copy", "vit_soften=0.5", "blend_of=demo")
    shutil.copytree(outputs / "demo", outputs / "copy")
    inner = [f"04_train_vit3d_fold{fold}_inner{part}" for fold in (0, 1) for part in (0, 1)]
    trained = ["04_train_vit3d_fold0", "04_train_vit3d_fold1"]
    assert would_run(tiny_project, *asked) == [*inner, *trained, *GRADING]
    done = run_all(tiny_project, *asked, "--until", "05")
    order = re.findall(r"\] (\w+) done", done.stdout)
    assert done.returncode == 0 and set(order[:-1]) == {*inner, *trained} and order[-1] == GRADING[0]
    for fold in (0, 1):
        answers = [order.index(f"04_train_vit3d_fold{fold}_inner{part}") for part in (0, 1)]
        assert max(answers) < order.index(f"04_train_vit3d_fold{fold}")
    assert would_run(tiny_project, *asked, "--until", "05") == []
    (outputs / "demo/predictions/vit3d_fold0_oof.parquet").write_text("other")
    assert would_run(tiny_project, *asked, "--until", "05") == GRADING[:1]


def test_files_written_again_with_the_same_bytes_run_nothing(tiny_project: Path) -> None:
    labels = tiny_project / "outputs/demo/tables/labels.parquet"
    labels.write_text("whole")
    assert would_run(tiny_project) == []
    labels.write_text("other")
    assert "03_train_yolo_scs_fold0" in would_run(tiny_project)


def test_a_copy_and_new_times_run_nothing_and_a_changed_byte_does(tiny_project: Path) -> None:
    outputs = tiny_project / "outputs"
    shutil.copytree(outputs / "demo", outputs / "copy", copy_function=shutil.copyfile)
    assert would_run(tiny_project, "--run", "copy") == []
    for path in sorted((outputs / "copy").rglob("*")):
        os.utime(path, (2e9, 2e9))
    assert would_run(tiny_project, "--run", "copy") == []
    changed = outputs / "copy" / "slices/1.npz"
    changed.write_text("other")
    os.utime(changed, (1e9, 1e9))
    trained = would_run(tiny_project, "--run", "copy")
    assert trained[0] == "03_train_localiser_fold0" and len(trained) == 14
    changed.write_text("whole")
    points = outputs / "copy" / "predictions/points_ss_fold0_oof.parquet"
    points.write_text("other")
    os.utime(points, (1e9, 1e9))  # an older file took its place
    trained = ["04_train_vit3d_fold0", "04_train_vit3d_fold1"]  # whose squares lie about the recesses
    assert would_run(tiny_project, "--run", "copy") == [*trained, *GRADING]
    shutil.rmtree(outputs / "demo" / "yolo/ss")
    assert "02_convert_labels" in would_run(tiny_project)


def test_a_changed_exploration_trains_nothing(tiny_project: Path) -> None:
    write_tiny_notebook(tiny_project, "01_eda", "print('another figure')")
    assert would_run(tiny_project) == ["01_eda", "06_evaluation", "08_report"]  # both read its tables


def test_lost_data_and_forced_steps_run_again(tiny_project: Path) -> None:
    assert would_run(tiny_project, "--force", "05") == GRADING
    assert would_run(tiny_project, "stress_bodies=0") == ["08_report"]  # is of the others
    (tiny_project / "outputs/data").rmdir()
    assert would_run(tiny_project)[:3] == ["00_get_data", "phantom", "01_eda"]


def test_another_run_has_a_folder_of_its_own_and_fewer_folds(tiny_project: Path) -> None:
    steps_of_other = would_run(tiny_project, "--profile", "other")
    assert len(steps_of_other) == 13
    assert not [name for name in steps_of_other if "fold1" in name]
    assert not (tiny_project / "outputs/other").exists()


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_failing_step_is_explained_and_the_run_can_resume(tiny_project: Path) -> None:
    write_tiny_notebook(tiny_project, "05_ensemble_inference", "print('blending')\nraise ValueError('no study 42')")
    done = run_all(tiny_project, "--cores", "2", "tta=false")
    assert done.returncode != 0
    for part in (
        "05_ensemble_inference failed",
        "notebooks/05_ensemble_inference.ipynb",
        "outputs/demo/logs/05_ensemble_inference.ipynb",
        "failing cell: number 3",  # without what papermill adds
        "      raise ValueError('no study 42')",
        "blending",
        "ValueError: no study 42",
        "./run_all.sh --profile demo --run demo --cores 2 tta=false",
    ):
        assert part in done.stderr
    assert not (tiny_project / "outputs/demo/submission.csv").exists()  # the old one is not taken for the new one
    write_tiny_notebook(tiny_project, "05_ensemble_inference")
    done = run_all(tiny_project, "tta=false")
    assert done.returncode == 0
    assert "4 steps run" in done.stdout


def test_any_name_of_a_folder_and_any_settings_of_the_user_will_do(tiny_project: Path, tmp_path: Path) -> None:
    project = tiny_project.rename(tmp_path / os.fsdecode(b"-O'Brien {3F2504E0-4F89} {} caf\xe9 %s #1 [x] = "))
    assert would_run(project) == []
    home = tmp_path / "home"
    settings = {".config/matplotlib/matplotlibrc": "backend: svg", ".ipython/profile_default/startup/0.py": "plt = 1"}
    for name, text in settings.items():
        (home / name).parent.mkdir(parents=True)
        (home / name).write_text(text)
    code = "assert 'plt' not in globals()\nimport matplotlib.pyplot as plt\nplt.plot([1, 2])\nplt.show()"
    write_tiny_notebook(project, "08_report", code)
    surroundings = {"HOME": str(home), "TMPDIR": str(project), "MPLBACKEND": "Agg", "PYTHONWARNINGS": "error"}
    done = run_all(project, **surroundings, PYTHONPATH="/foreign", PYTHONOPTIMIZE="2", LANG="C")
    assert done.returncode == 0 and "1 steps run" in done.stdout, done.stderr


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
    command = [sys.executable, "-m", "lsdc_utils.pipeline.commands"]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, cwd=project, env=environment, **pipes)
    deadline = time.time() + 60
    while last_lines(project / "outputs/demo/logs/08_report.log") != ["asleep"]:
        assert time.time() < deadline, "the step did not start"
        time.sleep(0.2)
    return running


def processes_in(project: Path) -> list[psutil.Process]:
    return run.processes_of(project / "outputs" / "demo")


def test_after_a_kill_the_next_run_ends_what_is_left_and_resumes(tiny_project: Path) -> None:
    running = start_sleeping_run(tiny_project)
    second = run_all(tiny_project)
    assert second.returncode == 2
    assert "is locked by another run_all.sh" in second.stderr
    running.kill()
    running.communicate()
    assert len(processes_in(tiny_project)) >= 3  # Snakemake, the step and its kernel live on
    write_tiny_notebook(tiny_project, "08_report")
    done = run_all(tiny_project)
    assert done.returncode == 0, done.stderr
    assert "1 steps run" in done.stdout
    assert processes_in(tiny_project) == []


@pytest.mark.parametrize("times", [1, 5])
def test_a_stopped_run_leaves_no_process_and_says_how_to_resume(tiny_project: Path, times: int) -> None:
    running = start_sleeping_run(tiny_project)
    for _ in range(times):
        running.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    _, message = running.communicate(timeout=30)
    assert running.returncode == 130
    assert "./run_all.sh --profile demo" in message
    assert processes_in(tiny_project) == []


@pytest.mark.slow
def test_transformers_are_trained_on_a_phantom_first_and_start_from_there(tiny_project: Path) -> None:
    asked = ("pretrain_phantom=12", "--until", "04")
    said = run_all(tiny_project, "--dry-run", *asked).stdout
    [name] = re.findall(r"^first outputs/(on-phantom-\w+), on phantom studies:$", said, re.MULTILINE)
    assert not (tiny_project / "outputs" / name).exists()
    done = run_all(tiny_project, *asked)
    assert done.returncode == 0, done.stderr
    folder, demo = tiny_project / "outputs" / name, tiny_project / "outputs/demo"
    own = graph.read_parameters(folder)
    wanted = {"n_train": 12, "phantom_seed": 9101, "phantom_scale": "realistic", "n_splits": 5, "pretrain_phantom": 0}
    assert {key: own[key] for key in wanted} == wanted and own["data_dir"] == "" and own["phantom"]
    starts = {run: starts_of(tiny_project / "outputs" / run) for run in (name, "demo")}
    assert starts == {name: [""], "demo": [f"../outputs/{name}"] * 2}
    assert would_run(tiny_project, *asked) == []
    assert "first outputs/" not in run_all(tiny_project, "--dry-run", "pretrain_phantom=12", "--until", "03").stdout
    (folder / "weights/vit3d_fold0.safetensors").write_text("other weights")
    assert would_run(tiny_project, *asked) == ["04_train_vit3d_fold0", "04_train_vit3d_fold1"]
    assert (demo / "weights/vit3d_fold1.safetensors").is_file()


def test_runs_share_a_first_one_unless_its_trainings_differ() -> None:
    asked = parameters.load_parameters("kaggle", ["pretrain_phantom=200"])
    name, own = graph.phantom_run(asked)
    assert own["vit_members"] == asked["vit_members"] and graph.phantom_run(own) is None
    for change in ({"workers": 3}, {"yolo_batch": 9}, {"missing_members": ["vit"], "vit_members": []}, {"folds": [1]}):
        assert graph.phantom_run(asked | change)[0] == name, change
    for change in ({"pretrain_phantom": 201}, {"vit_lr": 1e-4}, {"seed": 1}, {"conditions": ["nfn"]}):
        assert graph.phantom_run(asked | change)[0] != name, change


def test_a_step_is_forced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = "vit_members=[{name: a}, {name: b}]"
    asked = parameters.load_parameters("demo", [members, "allow_missing_members=true", "pretrain_phantom=2"])
    (tmp_path / "own").mkdir()
    given = run.Run(tmp_path / "own", asked, "", 1, force=("04_train_vit3d-b_fold0",))
    calls: list[list[str]] = []

    def popen(command: list[str], **_: object) -> subprocess.CompletedProcess:
        calls.append(command)
        last = "--forcerun" in command
        return subprocess.CompletedProcess(command, int(last))  # the forced training fails

    failed = SimpleNamespace(failed=["04_train_vit3d-b_fold0"], spans={})
    monkeypatch.setattr(run.subprocess, "Popen", popen)
    monkeypatch.setattr(run, "follow", lambda *_: failed)
    assert run.work(given) == 0
    assert calls[0][-1] == "notebooks/02_convert_labels.ipynb"
    forced = ["--forcerun" in command for command in calls]  # 02, the phantom's run, the run; then without the member
    assert forced == [False, False, True, False, False, False]


def starts_of(folder: Path) -> list[str]:
    """`start_from` of the executed trainings of transformers."""
    notebooks = map(nbformat.read, sorted(folder.glob("notebooks/04_*.ipynb")), [4, 4])
    return [re.search(r'^start_from = "(.*)"', "".join(c.source for c in n.cells), re.MULTILINE)[1] for n in notebooks]


def test_gpus_are_those_that_may_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,3")
    assert run.visible_gpus() == ["1", "3"]
    for words, devices in {
        "": [], "NoDevFiles": [], "none": [], "-1": [], "0,-1,1": ["0"], " 0, 1": ["0", "1"], "0,void": ["0"],
        "GPU-8932f937,MIG-GPU-1/2/0": ["GPU-8932f937", "MIG-GPU-1/2/0"],
    }.items():  # fmt: skip
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", words)
        assert run.visible_gpus() == devices, words


FAILS = "\n(run / 'tries').open('a').write(member)\nassert member != 'b' or {ok}, 'no luck'"


@pytest.fixture
def with_members(tiny_project: Path) -> list[str]:
    """What asks for a run of the members a and b, in a project that does not know what a transformer can be."""
    module = tiny_project / "lsdc_utils/pipeline/parameters.py"
    text = module.read_text()
    assert "            check_member(" in text
    module.write_text(text.replace("            check_member(", "            dict("))
    shutil.copytree(tiny_project / "outputs/demo", tiny_project / "outputs/two")
    return ["--run", "two", "vit_members=[{name: a}, {name: b}]", "--until", "05"]


def test_a_member_that_fails_is_tried_again_and_then_the_run_stops_or_goes_on_without_it(tiny_project, with_members):
    code = code_of("04_train_vit3d")
    folder = tiny_project / "outputs/two"
    second = "(run / 'tries').read_text().count('b') > 1"
    write_tiny_notebook(tiny_project, "04_train_vit3d", code + FAILS.format(ok=second))
    done = run_all(tiny_project, *with_members)
    assert done.returncode == 0, done.stderr
    assert (folder / "weights/vit3d-b_fold0.json").is_file() and "05_ensemble_inference done" in done.stdout
    (folder / "tries").unlink()
    write_tiny_notebook(tiny_project, "04_train_vit3d", code + FAILS.format(ok="False"))
    done = run_all(tiny_project, *with_members)
    assert done.returncode == 1 and "no luck" in done.stderr and "Resume with" in done.stderr
    tries = (folder / "tries").read_text()
    done = run_all(tiny_project, *with_members, "allow_missing_members=true")
    assert done.returncode == 0 and "continues without the transformer b" in done.stderr
    parameters = graph.read_parameters(folder)
    assert parameters["vit_members"] == [{"name": "a"}] and parameters["missing_members"] == ["b"]
    assert tries.count("b") >= 2 and "05_ensemble_inference done" in done.stdout
