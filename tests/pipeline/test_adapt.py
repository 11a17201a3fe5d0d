"""adapt: what the new run holds, what it does not tell, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import yaml

from lsdc_utils import metric
from lsdc_utils.data import cohort
from lsdc_utils.files import write_json
from lsdc_utils.grading import evaluation, grade
from lsdc_utils.grading.run_tables import FORMAT, read_recipe, weight_files
from lsdc_utils.pipeline import adapt, arguments, commands, labelled
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.parameters import check_start, load_parameters
from lsdc_utils.pipeline.run import Run, locked, work
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, GROUPS, LEVELS, SERIES_TYPES, SEVERITIES

BLENDS = grade.blends_of(["yolo", "vit3d"])

SECRET, STUDIES = "hospital-xq", 44
UNREAD = {f"1003_{column}" for column in COLUMNS if "subarticular" in column}  # of a series left out


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A finished run whose weights are a few bytes each."""
    run = tmp_path / "outputs" / "first"
    prior = [{"condition": c, "level": v, **dict(zip(SEVERITIES, (0.8, 0.14, 0.06), strict=True))}
             for c in CONDITIONS for v in LEVELS]  # fmt: skip
    blends = {
        name: {
            key: {"weights": dict.fromkeys(models, 1 / len(models)), "bias": [0.0, 0.0], "kept": "simple", "gain": []}
            for key in GROUPS
        }
        for name, models in BLENDS.items()
    }
    used = {"format": FORMAT, "kind": "fitted", "folds": [0], "vit_views": 1, "threads": 1, "prior": prior}
    write_json(run / "blend.json", used | {"conditions": list(GROUPS)} | blends)
    (run / "weights").mkdir()
    for name in weight_files([0]):
        (run / name).write_text(name)
        write_json((run / name).with_suffix(".json"), {"sha256": "0"})
    write_json(run / "provenance.json", {"data": {"kind": "phantom", "studies": 9}})
    theirs = load_parameters("demo", ["vit_epochs=10"]) | {"yolo_epochs": {"nfn": 12, "scs": 2, "ss": 7}}
    (run / "parameters.yml").write_text(yaml.safe_dump(theirs | {"exclude_csv": "own.csv"}))
    return run


def found_in(folder: Path, n: int, seed: int = 1) -> tuple[labelled.Labelled, dict[str, pd.DataFrame]]:
    """`n` labelled studies whose reader calls fewer rows severe than the models, and the models' rows."""
    rng = np.random.default_rng(seed)
    rows = [f"{1000 + study}_{column}" for study in range(n) for column in COLUMNS]
    said = np.log([0.8, 0.14, 0.06]) + rng.normal(0, 1.2, (len(rows), 1)) * [-1, 0.3, 1]
    true = np.add(said, [0, 0.6, -1.4])
    said, true = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (said, true))
    labels = metric.row_keys(rows)[["row_id", "study_id", "condition", "level"]].astype({"study_id": int})
    labels["severity"] = (rng.random(len(rows))[:, None] > true.cumsum(axis=1)).sum(axis=1)
    series = pd.DataFrame([(1000 + study, kind) for study in range(n) for kind in SERIES_TYPES],
                          columns=["study_id", "series_type"])  # fmt: skip
    table = pd.DataFrame(said, columns=list(SEVERITIES)).assign(row_id=rows)
    comp = SimpleNamespace(root=folder, series=series)
    names = ("raw_yolo", "raw_vit3d", "ensemble")
    people = pd.DataFrame({"study_id": [1000 + study for study in range(n)], "patient": range(n)})
    return labelled.Labelled(comp, labels, pd.DataFrame(), people, []), dict.fromkeys(names, table)


@pytest.fixture
def graded(monkeypatch: pytest.MonkeyPatch) -> dict[str, pd.DataFrame]:
    """The tables that grading writes; filled by the test."""
    tables: dict[str, pd.DataFrame] = {}

    def write(found: labelled.Labelled, trained: Path, out: Path, cores: int, resume: str) -> None:
        (out / "predictions").mkdir(parents=True)
        (out / "names.txt").write_text(str(found.comp.root))
        for name, table in tables.items():
            table.to_parquet(out / f"predictions/{name}_test.parquet")
        rows = next(iter(tables.values()))["row_id"]
        sources = pd.DataFrame({"row_id": rows, "own_series": ~rows.isin(UNREAD)})
        sources.to_parquet(out / "predictions/sources_test.parquet")

    monkeypatch.setattr(labelled, "grade", write)
    monkeypatch.setattr(cohort, "fingerprints", lambda *_: [{"salt": "s", "hashes": ["h"]}])
    return tables


def test_the_new_run_is_a_run_like_any_other(trained: Path, graded: dict, tmp_path: Path) -> None:
    found, tables = found_in(tmp_path / SECRET, STUDIES)
    graded |= tables
    out = trained.with_name("second")
    about = adapt.adapt_run(found, trained, out, 1, f"adapt {SECRET}")
    recipe, before = read_recipe(out), read_recipe(trained)
    assert set(about["changed"]) == set(GROUPS) and recipe["adapted"] == about and about["studies"] == STUDIES
    assert recipe["ensemble"]["scs"]["bias"][1] < -0.3 < before["ensemble"]["scs"]["bias"][1]
    scores = json.loads((out / "scores.json").read_text())
    assert scores["test"] is None and scores["oof"]["skill"] is None and scores["oof"]["n_studies"] == STUDIES
    assert list(scores["oof"]["scores"]) == ["prior", *BLENDS]
    assert scores["oof"]["scores"]["ensemble"]["total"] == pytest.approx(about["after"]["total"])
    assert about["after"]["total"] < about["before"]["total"] - 0.02
    for name in weight_files([0]):
        assert (out / name).read_bytes() == (trained / name).read_bytes()
        assert not (out / name).samefile(trained / name)  # what is trained there later changes no weights here
    rows = pd.read_parquet(out / "predictions/ensemble_oof.parquet")
    assert len(rows) == STUDIES * len(COLUMNS) and not rows["row_id"].duplicated().any()
    assert set(evaluation.reference(out, recipe)["cut_offs"]) == {group.score for group in GROUPS.values()}
    assert cohort.trained_on(out) == [{"salt": "s", "hashes": ["h"]}]
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["adapted"]["run"] == "first" and provenance["data"]["studies"] == 9
    for file in (file for file in out.rglob("*") if file.is_file()):
        assert SECRET.encode() not in file.read_bytes() and SECRET not in str(file)


def test_after_is_graded_as_before_was_where_a_listed_series_could_not_be_read(
    trained: Path, graded: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, tables = found_in(tmp_path / SECRET, 20)
    graded |= tables
    told, rows = [], dict.fromkeys(BLENDS, tables["ensemble"])
    monkeypatch.setattr(adapt.adapt, "cross_fitted", lambda *given: told.append(given[3]) or rows)
    adapt.adapt_run(found, trained, trained.with_name("second"), 1, "")
    assert told == [UNREAD] and len(UNREAD) == 10


def test_studies_of_a_patient_are_never_fitted_and_graded_apart(
    trained: Path, graded: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, tables = found_in(tmp_path / SECRET, STUDIES)
    graded |= tables
    found.people["patient"] //= 2
    monkeypatch.setattr(adapt.adapt, "fit_recipe", lambda recipe, *_: recipe | {"adapted": {}})
    monkeypatch.setattr(adapt.adapt, "cross_fitted", lambda *_: dict.fromkeys(BLENDS, tables["ensemble"]))
    adapt.adapt_run(found, trained, trained.with_name("second"), 1, "")
    labels = pd.read_parquet(trained.with_name("second") / "tables/labels.parquet")
    assert (labels.groupby("patient")["fold"].nunique() == 1).all() and labels["patient"].nunique() == STUDIES // 2
    scores = json.loads((trained.with_name("second") / "scores.json").read_text())["oof"]
    found.people["patient"] = found.people["study_id"]
    adapt.adapt_run(found, trained, trained.with_name("third"), 1, "")
    alone = json.loads((trained.with_name("third") / "scores.json").read_text())["oof"]
    assert alone["interval"]["prior"]["total"] != scores["interval"]["prior"]["total"]
    found.people["patient"] //= 10
    with pytest.raises(UsageError, match=r"20 or more patients .* has [45]$"):
        adapt.check(found, trained, 1)


def test_conditions_that_were_not_trained_are_not_fitted_or_scored(
    trained: Path, graded: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = json.loads((trained / "blend.json").read_text())
    write_json(trained / "blend.json", recipe | {"conditions": ["ss"]})
    found, tables = found_in(tmp_path / SECRET, STUDIES)
    graded |= tables
    about = adapt.adapt_run(found, trained, trained.with_name("second"), 1, "")
    assert about["before"]["spinal"] is None and "scs" not in about["changed"] and about["changed"]
    block = json.loads((trained.with_name("second") / "scores.json").read_text())["oof"]
    assert block["groups"] == ["ss"] and read_recipe(trained.with_name("second"))["prior"] != recipe["prior"]
    monkeypatch.setattr(labelled, "check_overlap", lambda *_: ([], ""))
    canal = found.labels["condition"].eq("spinal_canal_stenosis") | (found.labels["study_id"] < 1019)
    alone = replace(found, labels=found.labels[canal])  # of 19 studies there are others than of the canal
    with pytest.raises(UsageError, match=r"20 or more patients .* has 19"):
        adapt.check(alone, trained, 1)


def test_too_few_known_or_published(trained: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, _ = found_in(tmp_path, 19)
    with pytest.raises(UsageError, match=r"20 or more patients .* has 19"):
        adapt.check(found, trained, 1)
    found, _ = found_in(tmp_path, 20)
    monkeypatch.setattr(labelled, "check_overlap", lambda *_: ([], ""))
    assert adapt.check(found, trained, 1) is None
    (trained / "provenance.json").rename(tmp_path / "kept.json")  # of a run that ended before its report
    with pytest.raises(UsageError, match=r"lacks provenance\.json: run it to its report"):
        adapt.check(found, trained, 1)
    recipe = json.loads((trained / "blend.json").read_text())
    write_json(trained / "blend.json", recipe | {"kind": "published"})
    (trained / "weights/localiser_fold0.safetensors").unlink()
    with pytest.raises(UsageError, match="no blend to adapt"):
        adapt.check(found, trained, 1)


def write_grades(file: Path, columns: list[str]) -> None:
    pd.DataFrame({"study_id": [1000, 1001]} | dict.fromkeys(columns, "Moderate")).to_csv(file, index=False)


def test_a_run_of_adapt_is_not_replaced_by_another(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    recipe = json.loads((trained / "blend.json").read_text())
    write_json(trained / "blend.json", recipe | {"adapted": {"patients": 30}})
    with pytest.raises(UsageError, match="was made by adapt and would be replaced"):
        work(Run(trained, load_parameters("demo"), "", 1))
    monkeypatch.setattr(commands, "OUTPUTS", trained.parent)
    monkeypatch.setattr(arguments, "OUTPUTS", trained.parent)
    (trained.parent / "other").mkdir()
    theirs = load_parameters("demo") | {"data_dir": "/elsewhere"}
    (trained.parent / "other/parameters.yml").write_text(yaml.safe_dump(theirs))
    (trained / "scores.json").touch()
    folder = tmp_path / SECRET
    folder.mkdir()
    write_grades(folder / "train.csv", COLUMNS)
    monkeypatch.setattr(labelled, "find", lambda *_: found_in(folder, 30)[0])
    monkeypatch.setattr(adapt, "check", lambda *_: None)
    monkeypatch.setattr(commands, "finish", lambda *_: 0)
    asked = ["adapt", str(folder), "--run", "first", "--train", "--out"]
    assert commands.main([*asked, "other"]) == 2
    assert "--out other: there is another run; give another name" in capsys.readouterr().err
    assert commands.main([*asked, "new"]) == 0


def test_a_second_grading_waits_for_no_process_that_was_left(trained: Path, tmp_path: Path, monkeypatch) -> None:
    found, _ = found_in(tmp_path, 20)

    def prepare(*_: object) -> None:
        with pytest.raises(UsageError, match="locked by another"), locked(tmp_path / "out/work"):
            pass
        raise UsageError("asked for nothing more")

    monkeypatch.setattr(labelled.predict, "prepare", prepare)
    with pytest.raises(UsageError, match="asked for nothing more"):
        labelled.grade(found, trained, tmp_path / "out", 1, "")


def test_parameters_of_further_training(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / SECRET
    folder.mkdir()
    found, _ = found_in(folder, 30)
    write_grades(folder / "train.csv", COLUMNS)
    theirs = yaml.safe_load((trained / "parameters.yml").read_text())
    refined = {"blend_of": "other", "vit_soften": 0.5}  # by rows of other studies
    (trained / "parameters.yml").write_text(yaml.safe_dump(theirs | refined))
    parameters, demo = adapt.training_parameters(found, trained), load_parameters("demo")
    assert parameters["blend_of"] == "" and parameters["vit_soften"] == 0.0
    assert parameters["conditions"] == list(GROUPS)
    assert parameters["vit_epochs"] == 3 and parameters["yolo_epochs"] == {"nfn": 4, "scs": 1, "ss": 2}
    assert parameters["vit_lr"] == demo["vit_lr"] / 10 and parameters["yolo_rate"]["ss"] == demo["yolo_rate"]["ss"] / 10
    assert parameters["localiser_batches"] == demo["localiser_batches"] // 3
    assert parameters["start_from"] == str(trained) and parameters["data_dir"] == str(folder)
    assert parameters["vit_encoder_rate"] == 0.0 and set(parameters) == set(demo)
    assert parameters["exclude_csv"] == ""  # which is about other studies
    check_start(parameters)
    assert parameters["points_from"] == str(trained)  # few studies made the detectors worse
    more, _ = found_in(folder, 100)
    with pytest.raises(UsageError, match=r"lacks train_label_coordinates\.csv"):
        adapt.training_parameters(more, trained)
    (folder / "train_label_coordinates.csv").touch()
    assert parameters["folds"] == [0, 1] and parameters["n_splits"] == 2
    thawed = adapt.training_parameters(more, trained)
    assert thawed["vit_encoder_rate"] == demo["vit_encoder_rate"] and thawed["points_from"] == ""
    write_grades(folder / "train.csv", [column for column in COLUMNS if "foraminal" not in column])
    assert adapt.training_parameters(more, trained)["conditions"] == ["scs", "ss"]
