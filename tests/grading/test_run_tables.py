"""What a finished run holds: its recipe, or why it cannot be used; its rows with points and labels."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pandas as pd
import pytest
from report_run import write_run

from lsdc_utils.grading import run_tables
from lsdc_utils.grading.run_tables import FORMAT, RunError, read_graded, read_recipe
from lsdc_utils.vocabulary import GROUPS, LEVELS

RECIPE = {"format": FORMAT, "kind": "fitted", "folds": [0, 3], "vit_views": 2, "threads": 1, "prior": []}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a finished run, as far as its recipe is concerned."""
    (tmp_path / "blend.json").write_text(json.dumps(RECIPE))
    (tmp_path / "weights").mkdir()
    for name in run_tables.weight_files([0, 3]):
        for file in (tmp_path / name, (tmp_path / name).with_suffix(".json")):
            file.touch()
    return tmp_path


def test_the_recipe_of_a_finished_run_is_read(run):
    usual = {"conditions": list(GROUPS), "members": [], "missing_members": []}  # which older recipes do not name
    assert read_recipe(run) == RECIPE | usual
    assert len(list((run / "weights").iterdir())) == 20  # a localiser, three detectors, a transformer a fold


def test_an_unfinished_run_is_refused_with_what_it_lacks(run, tmp_path_factory):
    (run / "weights/yolo_ss_fold3.json").unlink()
    with pytest.raises(RunError, match=r"not finished: it lacks weights/yolo_ss_fold3\.json$"):
        read_recipe(run)
    with pytest.raises(RunError, match=r"not finished: it lacks blend\.json$"):
        read_recipe(tmp_path_factory.mktemp("empty"))


@pytest.mark.parametrize("changed", [{"format": 1}, {"format": FORMAT + 1}, {"format": None}, {"threads": None}])
def test_a_run_of_older_code_is_refused_in_one_sentence(run, changed):
    recipe = {name: value for name, value in (RECIPE | changed).items() if value is not None}
    (run / "blend.json").write_text(json.dumps(recipe))
    with pytest.raises(RunError, match=r"older version of the code: run it again, .* provenance\.json$") as error:
        read_recipe(run)
    assert str(run) in str(error.value)


def test_rows_carry_grades_points_and_labels(tmp_path):
    folder = write_run(tmp_path / "made-up", n_studies=3)
    rows = read_graded(folder, "oof")
    assert len(rows) == 75 and rows["study_id"].dtype == int and set(rows["level"]) == set(LEVELS)
    assert (rows["confidence"] == rows[["normal_mild", "moderate", "severe"]].max(axis=1)).all()
    assert set(rows["severity"]) <= {-1, 0, 1, 2} and rows["X"].notna().all()
    assert {"detector_severe", "vit_severe", "own_series"} <= set(rows)
    (folder / "tables/labels.parquet").unlink()
    assert (read_graded(folder, "oof")["severity"] == -1).all()


def test_stacks_come_from_the_kept_slices(tmp_path):
    folder = write_run(tmp_path / "made-up", n_studies=2)
    stacks = run_tables.study_reader(folder, "oof")(2)
    assert len(stacks) == 3 and {stack.study_id for stack in stacks} == {2}


def test_a_row_finds_its_detected_point():
    points = pd.DataFrame([(3, "l4_l5", "left", 1.0, 2.0, 3.0, "ss"), (3, "l4_l5", "", 4.0, 5.0, 6.0, "scs")])
    points.columns = ["study_id", "level", "side", *"XYZ", "condition"]
    rows = pd.DataFrame({"row_id": ["a", "b", "c"], "study_id": [3, 3, 3], "level": "l4_l5"})
    rows = rows.assign(group=["ss", "scs", "ss"], side=["left", "", "right"])
    by_row = run_tables.points_of(rows, points)
    assert set(by_row.index) == {"a", "b"} and by_row.loc["b"].tolist() == [4.0, 5.0, 6.0]
    assert run_tables.points_of(rows.astype({"study_id": str}), points).equals(by_row)


def test_weights_that_were_trained_after_the_blend_was_fitted_are_refused(run):
    for number, file in enumerate(sorted(run.glob("weights/*.json"))):
        file.write_text(json.dumps({"sha256": f"{number}"}))
    sums = run_tables.weight_sums(run, RECIPE | {"conditions": list(GROUPS), "members": []})
    assert len(sums) == 10 and sums["localiser_fold0"] == "0" and sums["yolo_ss_fold3"] == "9"
    (run / "blend.json").write_text(json.dumps(RECIPE | {"weights": sums}))
    assert read_recipe(run)["weights"] == sums
    (run / "weights/vit3d_fold3.json").write_text(json.dumps({"sha256": "another"}))
    with pytest.raises(RunError, match=r"blended with other weights than its vit3d_fold3: run it again, to 05"):
        read_recipe(run)


def test_of_a_run_of_some_conditions_only_their_models_are_needed(run):
    for file in run.glob("weights/yolo_s*"):
        file.unlink()
    (run / "blend.json").write_text(json.dumps(RECIPE | {"conditions": ["nfn"]}))
    assert read_recipe(run)["conditions"] == ["nfn"]
    assert run_tables.weight_files([0], conditions=["nfn"])[1] == "weights/yolo_nfn_fold0.pt"


def test_canal_points_are_the_localisers_where_no_canal_detector_was_trained(tmp_path):
    (tmp_path / "predictions").mkdir()
    for key, fold in itertools.product(("nfn", "canal", "scs"), (0, 1)):
        table = pd.DataFrame({"study_id": [fold], "level_confidence": [0.7 + 0.2 * fold], "from": key})
        table.to_parquet(tmp_path / f"predictions/points_{key}_fold{fold}_oof.parquet")
    found = run_tables.read_points(tmp_path, [0, 1], ["nfn"])
    assert found[["from", "condition"]].drop_duplicates().to_numpy().tolist() == [["nfn", "nfn"], ["canal", "scs"]]
    assert set(run_tables.read_points(tmp_path, [0], ["nfn", "scs"])["from"]) == {"nfn", "scs"}
    assert set(run_tables.read_points(tmp_path, [0, 1], ["nfn"], 0.8)["study_id"]) == {1}


def test_where_a_members_weights_are_gone_the_numbers_without_it_are_used(tmp_path):
    without = {name: {"ensemble": f"without {name}", "vit3d": 1} for name in ("a", "b")}
    recipe = RECIPE | {"folds": [0], "members": ["a", "b"], "ensemble": "of both", "without": without}
    (tmp_path / "blend.json").write_text(json.dumps(recipe))
    (tmp_path / "weights").mkdir()
    for name in run_tables.weight_files([0], members=["a", "b"]):
        for file in (tmp_path / name, (tmp_path / name).with_suffix(".json")):
            file.touch()
    assert read_recipe(tmp_path)["ensemble"] == "of both"
    (tmp_path / "weights/vit3d-a_fold0.safetensors").unlink()
    found = read_recipe(tmp_path)
    assert (found["ensemble"], found["members"], found["missing_members"]) == ("without a", ["b"], ["a"])
    (tmp_path / "weights/vit3d-b_fold0.json").unlink()
    with pytest.raises(RunError, match=r"it lacks weights/vit3d-a_fold0\.safetensors, weights/vit3d-b_fold0\.json$"):
        read_recipe(tmp_path)
