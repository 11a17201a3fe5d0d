"""Distances of detected points from true ones, exchanged sides, levels of axial slices: small cases counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import axial_levels, axial_slices
from lsdc_utils.grading import localisation
from lsdc_utils.vocabulary import AXIAL, CONDITIONS, GROUPS, LEVELS, SERIES_TYPES

TO_SIDE = {"nfn": 18.0, "scs": 0.0, "ss": 10.0}  # mm of the true places off the midline
STEP = 35.0  # mm between levels
AXIAL_MOVED = 2.0  # mm to the head by which the axial series sees everything elsewhere


def true_place(condition: str, level: str, series_type: str) -> tuple[float, float, float]:
    side = {"left": 1, "right": -1, None: 0}[CONDITIONS[condition].side]
    z = -STEP * LEVELS.index(level) + AXIAL_MOVED * (series_type == AXIAL)
    return side * TO_SIDE[CONDITIONS[condition].group], 0.0, z


@pytest.fixture
def anatomy() -> pd.DataFrame:
    """Two studies, three series each, all 25 places in every series."""
    rows = [
        (study, 10 * study + number, series_type, condition, level, *true_place(condition, level, series_type))
        for study in (1, 2)
        for number, series_type in enumerate(SERIES_TYPES)
        for condition in CONDITIONS
        for level in LEVELS
    ]
    return pd.DataFrame(rows, columns=["study_id", "series_id", "series_type", "condition", "level", *"XYZ"])


def detections(anatomy: pd.DataFrame) -> pd.DataFrame:
    """Points of all detectors that lie exactly where the anatomy is."""
    true = localisation.true_points(anatomy)
    sides = true["condition"].map(localisation.SIDE_OF)
    return true.assign(side=sides, condition=true["condition"].map(localisation.GROUP_OF), confidence=0.9)


def at(points: pd.DataFrame, study: int, group: str, level: str, side: str) -> pd.Series:
    keys = {"study_id": study, "condition": group, "level": level, "side": side}
    return (points[list(keys)] == list(keys.values())).all(axis=1)


def test_true_points_are_those_of_the_series_that_is_graded(anatomy):
    true = localisation.true_points(anatomy)
    assert len(true) == 2 * 25
    for row in true.itertuples():
        expected = true_place(row.condition, row.level, GROUPS[CONDITIONS[row.condition].group].series_type)
        assert expected == (row.X, row.Y, row.Z)
    second = anatomy[(anatomy["study_id"] == 1) & (anatomy["series_type"] == AXIAL)].assign(series_id=99)
    both = localisation.true_points(pd.concat([anatomy, second.assign(Z=second["Z"] + 3)]))
    moved = both.merge(true, on=["study_id", "condition", "level"]).eval("Z_x - Z_y")
    assert moved.eq(1.5).sum() == 10 and moved.eq(0).sum() == 40


def test_exact_points_have_no_error(anatomy):
    errors = localisation.point_errors(detections(anatomy), localisation.true_points(anatomy))
    assert len(errors) == 50 and (errors[["distance", "in_plane"]] == 0).all(axis=None)
    table = localisation.localisation(errors).set_index("condition")
    assert set(table.index) == set(CONDITIONS) and (table["points"] == 10).all()
    assert (table[["found", "within_5_mm", "in_plane_within_10_mm"]] == 1).all(axis=None)
    assert (table["sides_exchanged"] == 0).all()


def test_errors_across_slices_do_not_count_in_the_plane(anatomy):
    points = detections(anatomy)
    points.loc[at(points, 1, "scs", "l3_l4", ""), ["X", "Y"]] += np.array([6.0, 3.0])
    points.loc[at(points, 1, "ss", "l3_l4", "left"), ["X", "Z"]] += np.array([4.0, 8.0])
    errors = localisation.point_errors(points, localisation.true_points(anatomy))
    errors = errors[errors["distance"] > 0].set_index("condition")
    assert errors.loc["spinal_canal_stenosis", ["distance", "in_plane"]].tolist() == pytest.approx([45**0.5, 3])
    assert errors.loc["left_subarticular_stenosis", ["distance", "in_plane"]].tolist() == pytest.approx([80**0.5, 4])
    table = localisation.localisation(errors.reset_index()).set_index("condition")
    assert table.loc["spinal_canal_stenosis", ["within_5_mm", "within_10_mm"]].tolist() == [0, 1]
    assert table.loc["spinal_canal_stenosis", "in_plane_within_5_mm"] == 1


def test_exchanged_sides_are_counted(anatomy):
    points = detections(anatomy)
    for group, level in (("nfn", "l1_l2"), ("ss", "l5_s1")):
        for side in ("left", "right"):
            points.loc[at(points, 2, group, level, side), "X"] *= -1
    points.loc[at(points, 1, "nfn", "l4_l5", "left"), "Z"] -= STEP  # a level too low, on its side
    points.loc[at(points, 1, "ss", "l2_l3", "right"), "X"] = 0.1  # just beyond the midline
    errors = localisation.point_errors(points, localisation.true_points(anatomy))
    found = set(errors.loc[errors["exchanged"], ["study_id", "condition", "level"]].itertuples(index=False, name=None))
    nfn, ss = "neural_foraminal_narrowing", "subarticular_stenosis"
    assert found == {
        *(
            (2, f"{side}_{base}", level)
            for side in ("left", "right")
            for base, level in ((nfn, "l1_l2"), (ss, "l5_s1"))
        ),
        (1, f"right_{ss}", "l2_l3"),
    }
    table = localisation.localisation(errors).set_index("condition")["sides_exchanged"]
    assert table.to_dict() == {
        f"left_{nfn}": 1,
        f"right_{nfn}": 1,
        f"left_{ss}": 1,
        f"right_{ss}": 2,
        "spinal_canal_stenosis": 0,
    }


def test_missing_points_are_misses_and_unplaced_labels_do_not_count(anatomy):
    points, true = detections(anatomy), localisation.true_points(anatomy)
    true.loc[0, ["X", "Y", "Z"]] = np.nan
    errors = localisation.point_errors(points[points["study_id"] == 1], true)
    assert len(errors) == 49 and errors["distance"].isna().sum() == 25 and not errors["exchanged"].any()
    table = localisation.localisation(errors)
    assert table["points"].sum() == 49 and table["within_10_mm"].lt(0.6).all()
    nothing = localisation.localisation(localisation.point_errors(points.head(0), true))
    assert (nothing[["found", "within_5_mm", "sides_exchanged"]] == 0).all(axis=None)
    assert localisation.localisation(errors.head(0)).empty


def test_points_of_one_detector_are_held_against_readers_labels(anatomy):
    labels = localisation.true_points(anatomy).query("condition.str.contains('foraminal')", engine="python")
    labels = labels.assign(row_id=labels["condition"], severity=1)
    points = detections(anatomy).query("condition == 'nfn'").drop(columns="condition")
    errors = localisation.point_errors(points, labels)
    assert len(errors) == 20 and (errors["distance"] == 0).all() and (errors["severity"] == 1).all()


def axial_stack(heights: np.ndarray, study: int = 1) -> Stack:
    """Slices across the patient at these z."""
    n, affines = len(heights), np.tile(np.eye(4), (len(heights), 1, 1))
    affines[:, 2, 2], affines[:, 2, 3] = -1, heights
    shapes = np.full((n, 2), 4, np.int32)
    numbers = np.arange(n, dtype=np.int32)
    return Stack(study, 10 * study + 2, AXIAL, np.zeros((n, 4, 4), np.uint8), shapes, affines, numbers, 0 * numbers)


def test_axial_slices_near_a_disc_are_judged_by_their_level(anatomy):
    level_z = [-STEP * k + AXIAL_MOVED for k in range(5)]
    # Near L1/L2, at the limit, just beyond it, near L4/L5, near L5/S1.
    stack = axial_stack(np.array([level_z[0] + 1, level_z[1] + 4, level_z[2] - 4.1, level_z[3] - 2, level_z[4]]))
    canal = detections(anatomy).query("study_id == 1 and condition == 'scs'")
    canal = canal[canal["level"] != "l5_s1"].copy()
    canal.loc[canal["level"] == "l1_l2", "Z"] = level_z[3]  # a level that was taken for another one
    canal.loc[canal["level"] == "l4_l5", "Z"] -= 100
    slices = axial_slices([stack], canal)
    assert slices["level"].tolist() == ["", "l2_l3", "l3_l4", "l1_l2", ""]
    judged = localisation.slice_levels(slices, anatomy)
    assert judged["instance_number"].tolist() == [0, 1, 3, 4]
    assert judged["true_level"].tolist() == ["l1_l2", "l2_l3", "l4_l5", "l5_s1"]
    assert judged["level"].tolist() == ["", "l2_l3", "l1_l2", ""]


def test_the_level_of_a_slice_is_the_detectors(anatomy):
    stack, canal = axial_stack(np.linspace(20, -160, 61)), detections(anatomy).query("condition == 'scs'").head(5)
    expected = [LEVELS[k] if k >= 0 else "" for k in axial_levels(stack, canal)]
    assert axial_slices([stack], canal)["level"].tolist() == expected


def test_one_table_tells_of_ordinary_spines_and_others(anatomy, tmp_path: Path):
    stacks = [axial_stack(np.array([AXIAL_MOVED, AXIAL_MOVED - STEP]), study) for study in (1, 2)]
    points = detections(anatomy)
    points.loc[at(points, 2, "scs", "l1_l2", ""), "Z"] -= 20
    canal = points[points["condition"] == "scs"]
    slices = [axial_slices([s], canal[canal["study_id"] == s.study_id]) for s in stacks]
    slices = pd.concat(slices, ignore_index=True)
    assert localisation.against_anatomy(tmp_path, [1, 2], points, slices) is None
    anatomy.to_csv(tmp_path / "anatomy.csv", index=False)
    pd.DataFrame({"study_id": [1, 2], "ordinary": [True, False]}).to_csv(tmp_path / "spines.csv", index=False)
    table = localisation.against_anatomy(tmp_path, [1, 2], points, slices).set_index(["spines", "condition"])
    canal = table.xs("spinal_canal_stenosis", level="condition")
    assert canal["points"].to_dict() == {"all": 10, "ordinary": 5, "other": 5}
    assert canal["within_5_mm"].to_dict() == {"all": 0.9, "ordinary": 1, "other": 0.8}
    right = table.xs(localisation.SLICES, level="condition")
    assert right["points"].to_dict() == {"all": 4, "ordinary": 2, "other": 2}
    assert right["level_right"].to_dict() == {"all": 0.75, "ordinary": 1, "other": 0.5}
    alone = localisation.against_anatomy(tmp_path, [1], points.head(0), slices.head(0))
    assert set(alone.loc[alone["condition"] == localisation.SLICES, "points"]) == {0}
    assert (alone.loc[alone["condition"] != localisation.SLICES, "found"] == 0).all()
