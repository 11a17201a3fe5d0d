"""Grading a folder with a finished run: whole and doctored studies, a kill in between, folders that hold nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import run_all
from private import UID_ROOT, WORDS, leaks

from lsdc_utils.data import competition
from lsdc_utils.data.stacks import read_study
from lsdc_utils.grading import run_tables
from lsdc_utils.pipeline import arguments, commands, graph, predict, run
from lsdc_utils.vocabulary import (
    AXIAL,
    CONDITIONS,
    GROUPS,
    SERIES_TYPES,
    SEVERITIES,
    T1,
    T2,
    parse_row_id,
    study_row_ids,
)

SERIES_TABLE = "test_series_descriptions.csv"
SHARDS = 2
KEPT_SLICES = 4


@pytest.fixture(scope="module")
def project(smoke_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with no more of its run than weights and blend.json, as if these had travelled; shards are small."""
    project = tmp_path_factory.mktemp("predict") / "project"
    shutil.copytree(smoke_project, project, ignore=shutil.ignore_patterns("outputs"))
    folder = project / "outputs" / "demo"
    shutil.copytree(smoke_project / "outputs/demo/weights", folder / "weights")
    shutil.copy(smoke_project / "outputs/demo/blend.json", folder)
    module = project / "lsdc_utils" / "pipeline" / "predict.py"
    module.write_text(re.sub(r"SMALLEST_SHARD = \d+", "SMALLEST_SHARD = 3", module.read_text()))
    return project


@pytest.fixture(scope="module")
def data(smoke_project: Path) -> Path:
    folder = smoke_project / "outputs" / "demo"
    return (folder / json.loads((folder / "data.json").read_text())["data_dir"]).resolve()


@pytest.fixture(scope="module")
def doctored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    """A folder in the competition's layout: the phantom's test studies, and others of which something is missing.

    Also what is missing -> study: no T1, no T2, no axial, few slices, only axial, broken files, nothing on disk.
    """
    root = tmp_path_factory.mktemp("clinic")
    series = pd.read_csv(data / "train_series_descriptions.csv")
    studies = dict(
        zip(("t1", "t2", "axial", "few", "only axial", "broken", "nowhere"), sorted(set(series.study_id)), strict=False)
    )
    gone = {"t1": [T1], "t2": [T2], "axial": [AXIAL], "only axial": [T1, T2]}
    for what, study in studies.items():
        lost = series.study_id.eq(study) & series.series_description.isin(gone.get(what, []))
        series = series[~lost]
        for name in series.series_id[series.study_id == study].astype(str) if what != "nowhere" else ():
            folder = root / "test_images" / str(study) / name
            shutil.copytree(data / "train_images" / str(study) / name, folder, copy_function=os.link)
            files = sorted(folder.iterdir(), key=lambda file: int(file.stem))
            for file in files[len(files) // 2 :][KEPT_SLICES:] + files[: len(files) // 2] if what == "few" else ():
                file.unlink()
            for file in files if what == "broken" else ():
                file.unlink()
                file.write_text("no image")
    shutil.copytree(data / "test_images", root / "test_images", copy_function=os.link, dirs_exist_ok=True)
    tables = [series[series.study_id.isin(studies.values())], pd.read_csv(data / SERIES_TABLE)]
    pd.concat(tables).to_csv(root / SERIES_TABLE, index=False)
    return root, studies


@pytest.fixture(scope="module")
def killed(project: Path, doctored: tuple[Path, dict[str, int]]) -> dict[str, list[str]]:
    """What a prediction left that was killed while it graded, by folder."""
    out = project / "outputs/demo/predict" / doctored[0].name
    command = [
        sys.executable,
        "-m",
        "lsdc_utils.pipeline.commands",
        "predict",
        str(doctored[0]),
        "--run",
        "demo",
        "--cores",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = subprocess.Popen(command, cwd=project, env=environment, **quiet)
    deadline = time.time() + 120
    while not any("studies with" in log.read_text() for log in out.glob("logs/05*.log")):
        assert time.time() < deadline and running.poll() is None, "no shard began"
        time.sleep(0.2)
    running.send_signal(signal.SIGKILL)
    running.wait()
    run.end_processes(out)
    return {"results": sorted(file.name for file in out.glob("*.csv")), "done": sorted(out.glob("notebooks/*.ipynb"))}


@pytest.fixture(scope="module")
def out(project: Path, doctored: tuple[Path, dict[str, int]], killed: dict) -> Path:
    """The prediction taken up again and finished."""
    done = run_all(project, "predict", str(doctored[0]), "--run", "demo", "--cores", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    out = project / "outputs/demo/predict" / doctored[0].name
    (out / "said.txt").write_text(done.stdout)
    return out


@pytest.fixture(scope="module")
def grades(out: Path) -> pd.DataFrame:
    return pd.read_csv(out / "grades.csv")


def test_a_killed_prediction_leaves_no_result_and_goes_on(killed: dict, out: Path) -> None:
    assert killed == {"results": [], "done": []}
    assert f"{SHARDS} steps run" in (out / "said.txt").read_text()
    for number in range(SHARDS):
        notebook = out / "notebooks" / f"05_ensemble_inference_shard{number:03d}.ipynb"
        assert graph.all_ran(nbformat.read(notebook, as_version=4))


def test_every_study_has_25_weighted_rows(out: Path, doctored: tuple[Path, dict[str, int]], grades) -> None:
    studies = sorted(set(pd.read_csv(doctored[0] / SERIES_TABLE).study_id))
    rows = [row for study in studies for row in study_row_ids(study)]
    submission = pd.read_csv(out / "submission.csv")
    assert list(submission.row_id) == rows
    assert list(submission) == ["row_id", *SEVERITIES]
    np.testing.assert_allclose(submission[list(SEVERITIES)].sum(axis=1), 1, atol=1e-6)
    assert list(grades.row_id) == rows
    natural = grades[list(SEVERITIES)].to_numpy()
    np.testing.assert_allclose(natural.sum(axis=1), 1, atol=1e-6)
    assert (grades.grade == np.array(SEVERITIES)[natural.argmax(axis=1)]).all()
    parsed = pd.DataFrame([parse_row_id(row) for row in rows], columns=["study_id", "condition", "level"])
    pd.testing.assert_frame_equal(grades[list(parsed)].astype(str), parsed.astype(str), check_dtype=False)


def test_whole_studies_are_graded_as_the_run_graded_them(out: Path, smoke_project: Path) -> None:
    expected = pd.read_csv(smoke_project / "outputs/demo/submission.csv").set_index("row_id")
    submission = pd.read_csv(out / "submission.csv").set_index("row_id")
    np.testing.assert_allclose(submission.loc[expected.index], expected, atol=1e-6)


def test_a_study_is_graded_from_the_series_that_it_has(
    project: Path, doctored: tuple[Path, dict[str, int]], grades: pd.DataFrame
) -> None:
    read_on = grades.condition.map({name: GROUPS[c.group].series_type for name, c in CONDITIONS.items()})
    recipe = json.loads((project / "outputs/demo/blend.json").read_text())
    prior = pd.DataFrame(recipe["prior"]).set_index(["condition", "level"])[list(SEVERITIES)]
    lost = {"t1": {T1}, "t2": {T2}, "axial": {AXIAL}, "few": set(), "only axial": {T1, T2}}
    for what, study in doctored[1].items():
        rows, gone = grades[grades.study_id == study], lost.get(what, set(SERIES_TYPES))
        assert (rows.own_series == ~read_on[rows.index].isin(gone)).all(), what
        assert not rows.source[~rows.own_series].str.contains("yolo").any(), what
        if len(gone) < 2:
            assert rows.source.str.contains("vit3d").all(), what
        else:  # nothing tells where the levels are
            assert set(rows.source) == {"prior"}, what
            expected = prior.loc[list(zip(rows.condition, rows.level, strict=True))]
            np.testing.assert_allclose(rows[list(SEVERITIES)], expected, atol=1e-9)


def test_findings_say_what_was_missing(out: Path, doctored: tuple[Path, dict[str, int]]) -> None:
    findings = pd.read_csv(out / "findings.csv")
    rules = {what: set(findings.rule[findings.study_id == study]) for what, study in doctored[1].items()}
    for what in ("t1", "t2", "axial", "only axial"):
        assert "series_type_missing" in rules[what]
    for what in ("broken", "nowhere"):
        assert "series_unusable" in rules[what]
    assert "no image" not in findings.to_csv()  # reasons, not contents


def test_a_finished_prediction_is_not_made_again(
    project: Path, doctored: tuple[Path, dict[str, int]], out: Path
) -> None:
    before = {name: (out / name).read_bytes() for name in predict.RESULTS}
    done = run_all(project, "predict", str(doctored[0]), "--run", "demo", "--cores", "1")
    assert done.returncode == 0
    assert "nothing to do" in done.stdout
    assert {name: (out / name).read_bytes() for name in predict.RESULTS} == before


def test_the_same_files_in_one_pile_give_the_same_rows(
    project: Path, doctored: tuple[Path, dict[str, int]], grades: pd.DataFrame, tmp_path: Path
) -> None:
    pile = tmp_path / "pile"
    pile.mkdir()
    without = {doctored[1][what] for what in ("broken", "nowhere")}
    files = sorted(path for path in doctored[0].rglob("*.dcm") if int(path.parts[-3]) not in without)
    study_of = {}
    for number, file in enumerate(np.random.default_rng(0).permutation(np.array(files, dtype=object))):
        os.link(file, pile / f"IM{number:05d}")
        study_of[os.fsencode(pile / f"IM{number:05d}")] = int(file.parts[-3])
    done = run_all(project, "predict", str(pile), "--run", "demo", "--cores", "2", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    piled, expected = pd.read_csv(tmp_path / "out/grades.csv"), grades[~grades.study_id.isin(without)]
    listed = pd.concat(pd.read_parquet(file) for file in (tmp_path / "out/tables").glob("shard*.parquet"))
    ids = dict(zip(listed.study_id, listed.file.map(study_of), strict=True))
    assert set(ids).isdisjoint(ids.values())  # in a pile an id is its UID's hash, where that is no bare number
    piled["study_id"] = piled.study_id.map(ids)
    keys = ["study_id", "condition", "level"]
    piled, expected = (table.sort_values(keys, ignore_index=True) for table in (piled, expected))
    keys += ["grade", "source", "own_series", "level_confidence"]
    pd.testing.assert_frame_equal(piled[keys], expected[keys])
    np.testing.assert_allclose(piled[list(SEVERITIES)], expected[list(SEVERITIES)], atol=1e-6)
    assert leaks(tmp_path / "out", [*WORDS, UID_ROOT]) == []


# ---- before anything is graded -------------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has all that prediction needs, as far as one can see without opening it."""
    for module in (arguments, commands):
        monkeypatch.setattr(module, "OUTPUTS", tmp_path / "outputs")
    folder = tmp_path / "outputs" / "demo"
    (folder / "weights").mkdir(parents=True)
    for name in run_tables.weight_files([0]):
        (folder / name).write_text("")
        (folder / name).with_suffix(".json").write_text("")
    recipe = dict.fromkeys(run_tables.RECIPE_KEYS, "") | {"format": run_tables.FORMAT, "folds": [0]}
    (folder / "blend.json").write_text(json.dumps(recipe | {"vit_views": 7, "threads": 1}))
    (folder / "scores.json").write_text("{}")
    return folder


def asked(*arguments: object) -> int:
    return commands.main(["predict", *map(str, arguments)])


def test_mistakes_are_errors(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert asked(tmp_path, "--run", "nope") == 2
    assert "finished runs: demo" in capsys.readouterr().err
    assert asked(tmp_path, "--run", "demo") == 2
    assert "--out" in capsys.readouterr().err  # grades would lie among the images
    garbage = tmp_path / "garbage"
    garbage.mkdir()
    assert asked(garbage, "--run", "demo", "--out", finished) == 2
    assert "a run's own folder" in capsys.readouterr().err
    (tmp_path / "taken").write_text("a file")
    assert asked(garbage, "--run", "demo", "--out", tmp_path / "taken") == 2
    assert "is a file" in capsys.readouterr().err
    (finished / "weights/vit3d_fold0.json").unlink()
    assert asked(garbage, "--run", "demo") == 2
    assert "vit3d_fold0.json" in capsys.readouterr().err
    (finished / "weights/vit3d_fold0.safetensors").unlink()
    assert asked(garbage, "--run", "demo") == 2
    assert "vit3d_fold0.safetensors" in capsys.readouterr().err
    (finished / "blend.json").unlink()
    assert asked(garbage, "--run", "demo") == 2
    assert "blend.json" in capsys.readouterr().err


def test_a_run_made_by_older_code_is_refused_in_one_sentence(finished: Path, tmp_path: Path, capsys) -> None:
    recipe = json.loads((finished / "blend.json").read_text())
    (finished / "blend.json").write_text(json.dumps({key: value for key, value in recipe.items() if key != "format"}))
    (finished / "provenance.json").write_text("{}")
    (tmp_path / "data").mkdir()
    for words in (["predict", str(tmp_path / "data"), "--out", str(tmp_path / "out")], ["pack"], ["kaggle-bundle"]):
        assert commands.main([*words, "--run", "demo"]) in (1, 2)
        error = capsys.readouterr().err
        assert error.startswith("run_all.sh: the run in ") and error.count("\n") == 1
        assert "older version of the code" in error


def test_a_folder_of_garbage_is_said_to_hold_nothing(finished: Path, tmp_path: Path, capsys) -> None:
    garbage = tmp_path / "garbage"
    (garbage / "deep").mkdir(parents=True)
    (garbage / "deep" / "1.dcm").write_text("no image")
    (garbage / "photo.jpg").write_bytes(bytes(1000))
    assert asked(garbage, "--run", "demo") == 2
    assert str(garbage) in capsys.readouterr().err
    assert not (finished / "predict/garbage").exists()


def write_listing(root: Path, studies: int) -> None:
    lines = [(study, study * 10 + 1, T2) for study in range(1, studies + 1)]
    for study, series, _ in lines:
        folder = root / "test_images" / str(study) / str(series)
        folder.mkdir(parents=True)
        (folder / "1.dcm").write_text("pixels")
    pd.DataFrame(lines, columns=["study_id", "series_id", "series_description"]).to_csv(
        root / SERIES_TABLE, index=False
    )


def test_studies_are_cut_into_shards_and_listed_once(finished: Path, tmp_path: Path, capsys) -> None:
    root, out = tmp_path / "data", tmp_path / "out"
    root.mkdir()
    write_listing(root, 250)
    assert predict.prepare(root, finished, out, cores=2)["n_shards"] == 3
    shards = sorted((out / "tables").glob("shard*.parquet"))
    listed = [competition.read_listed(root, shard) for shard in shards]
    studies = [study for comp in listed for study in comp.series.study_id]
    assert studies == list(range(1, 251))
    assert max(len(comp.series) for comp in listed) <= predict.LARGEST_SHARD
    assert listed[0].source("test", 1, 11) == (root / "test_images/1/11/1.dcm",)
    assert listed[0].sample_rows[:25] == study_row_ids(1)
    before = [shard.read_bytes() for shard in shards]
    capsys.readouterr()
    parameters = predict.prepare(root, finished, out, cores=64)  # other cores cut no other shards
    assert parameters["n_shards"] == 3
    assert "listing studies" not in capsys.readouterr().out
    assert {step.given["studies_table"] for step in graph.all_steps(parameters)} == set(map(str, shards))
    (root / "test_images/250/2501/1.dcm").write_text("other pixels")
    predict.prepare(root, finished, out, cores=2)
    assert [shard.read_bytes() for shard in shards[:2]] == before[:2]  # Snakemake compares contents
    assert shards[2].read_bytes() != before[2]
    (out / "grades.csv").write_text("")
    with pytest.raises(predict.UsageError, match="--out"):
        predict.prepare(tmp_path, finished, out, cores=2)
    assert (out / "grades.csv").is_file()
    predict.prepare(root, finished, out, cores=2)
    assert not (out / "grades.csv").is_file()


def test_a_file_s_name_need_not_be_utf8(tmp_path: Path) -> None:
    write_listing(tmp_path, 1)
    file = tmp_path / "test_images/1/11" / os.fsdecode(b"M\xfcller.dcm")
    file.write_text("no image")
    comp = competition.read(tmp_path)
    predict.files_of(comp, comp.series, [1, 2]).to_parquet(tmp_path / "listed.parquet")
    listed = competition.read_listed(tmp_path, tmp_path / "listed.parquet")
    assert file in listed.source("test", 1, 11)
    assert listed.sample_rows == study_row_ids(1) + study_row_ids(2)
    read_study(listed, "test", 1)[1].to_parquet(tmp_path / "findings.parquet")


@pytest.mark.parametrize(("studies", "cores", "shards"), [(1, 8, 1), (39, 8, 1), (40, 8, 2), (250, 8, 8)])
def test_small_folders_are_cut_only_where_it_pays(finished: Path, tmp_path: Path, studies, cores, shards) -> None:
    write_listing(tmp_path / "data", studies)
    assert predict.prepare(tmp_path / "data", finished, tmp_path / "out", cores)["n_shards"] == shards
