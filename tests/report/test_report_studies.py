"""Pages of single studies: the right slice, marks in the right place, left where left is, and studies worth a look."""

import base64
import io
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from report_run import write_run

from lsdc_utils.data.stacks import load_study
from lsdc_utils.grading import run_tables
from lsdc_utils.report import studies
from lsdc_utils.vocabulary import COLUMNS, SEVERITIES, SPINAL_CANAL


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("outputs") / "made-up", n_studies=6)


@pytest.fixture(scope="module")
def rows(run_dir) -> pd.DataFrame:
    return run_tables.read_graded(run_dir, "oof")


def test_graded_rows_are_those_of_the_run(rows, run_dir):
    assert len(rows) == 150 and rows["row_id"].tolist()[:25] == [f"1_{column}" for column in COLUMNS]
    table = pd.read_parquet(run_dir / "predictions/ensemble_oof.parquet").set_index("row_id")
    labels = pd.read_parquet(run_dir / "tables/labels.parquet").set_index("row_id")["severity"]
    assert np.array_equal(rows[list(SEVERITIES)], table.loc[rows["row_id"], list(SEVERITIES)])
    assert np.array_equal(rows["grade"], table.loc[rows["row_id"], list(SEVERITIES)].to_numpy().argmax(axis=1))
    assert np.array_equal(rows["severity"], labels[rows["row_id"]])
    assert (rows.loc[rows["side"] == "left", "X"] == 10).all() and (rows.loc[rows["side"] == "right", "X"] == -10).all()
    assert rows["source"].value_counts().to_dict() == {"yolo+vit3d": 138, "vit3d": 6, "prior": 6}
    assert rows.loc[~rows["own_series"], "source"].eq("prior").all()


def test_no_graded_study_is_an_empty_table(run_dir, tmp_path):
    (tmp_path / "predictions").mkdir()
    for file in (run_dir / "predictions").glob("*_oof.parquet"):
        pd.read_parquet(file)[:0].to_parquet(tmp_path / "predictions" / file.name)
    empty = run_tables.read_graded(tmp_path, "oof")
    assert empty.empty and {"X", "grade", "source", "severity", "vit_severe"} <= set(empty)


def test_marks_lie_where_the_points_are(rows, run_dir):
    mine, stacks = rows[rows["study_id"] == 2], load_study(run_dir / "slices", 2)
    keys, viewers = studies.show_study(mine, stacks, {"scs": 14.6}, whole=True)
    assert set(keys) == set(mine.loc[mine["grade"] > 0, "row_id"]) and len(viewers) == 3
    for row in mine[mine["grade"] > 0].itertuples():
        film, viewer, n = keys[row.row_id]
        stack = next(s for k, s in enumerate(sorted_stacks(stacks)) if f"series{k}" == viewer)
        off = [abs(np.linalg.solve(a, [row.X, row.Y, row.Z, 1])[2]) for a in stack.affines]
        assert n == int(np.argmin(off))
        [mark] = film["marks"]
        assert mark["grade"] == row.grade and mark["box_mm"] == (14.6 if row.group == "scs" else 0)
        assert (
            min(film["width"], film["height"]) > 60 and 0 < mark["x"] < film["width"] and 0 < mark["y"] < film["height"]
        )
        assert f"{row.confidence:.0%}" in film["alt"] and mark["words"] in film["alt"]


def sorted_stacks(stacks):
    order = ["Sagittal T1", "Sagittal T2/STIR", "Axial T2"]
    return sorted(stacks, key=lambda stack: order.index(stack.series_type))


def test_the_patients_left_is_at_the_viewers_right(rows, run_dir):
    _, viewers = studies.show_study(rows[rows["study_id"] == 3], load_study(run_dir / "slices", 3), {}, whole=True)
    axial = next(viewer for viewer in viewers if viewer["title"].startswith("Axial"))
    film = next(film for film in axial["films"] if len(film["marks"]) >= 2)
    assert (film["letters"]["left"], film["letters"]["right"]) == ("R", "L")
    places = {mark["words"].split()[1]: mark["x"] for mark in film["marks"]}
    assert places["left"] > places["right"]
    assert studies.GRID.index("left_subarticular_stenosis") > studies.GRID.index("right_subarticular_stenosis")
    image = Image.open(io.BytesIO(base64.b64decode(film["address"].partition(",")[2])))
    assert image.format == "AVIF" and image.size == (64, 64)


def test_a_study_without_images_or_points_has_its_grades(rows):
    mine = rows[rows["study_id"] == 1].assign(X=np.nan, Y=np.nan, Z=np.nan)
    assert studies.show_study(mine, [], {}, whole=True) == ({}, [])


def test_a_point_beyond_every_slice_has_no_key_slice(rows, run_dir):
    mine = rows[rows["study_id"] == 1].assign(grade=2)
    stacks = load_study(run_dir / "slices", 1)
    assert set(studies.show_study(mine, stacks, {}, whole=False)[0]) == set(mine["row_id"])
    assert studies.show_study(mine.assign(X=500.0), stacks, {}, whole=False) == ({}, [])


def test_studies_are_chosen_by_loss_certainty_and_chance(rows):
    chosen = studies.choose_studies(rows, 4, seed=0)
    losses, sure = studies.study_losses(rows), rows.groupby("study_id")["confidence"].mean()
    assert list(chosen.values()) == ["among the largest losses"] * 2 + ["among the surest", "drawn at random"]
    assert set(list(chosen)[:2]) == set(losses.nlargest(2).index)
    assert list(chosen)[2] == sure.drop(list(chosen)[:2]).idxmax()
    assert studies.choose_studies(rows, 4, seed=0) == chosen
    unlabelled = rows.assign(severity=-1)
    assert "among the least sure" in studies.choose_studies(unlabelled, 3, seed=0).values()
    assert len(studies.choose_studies(rows, 50, seed=0)) == 6 and studies.choose_studies(rows, 0, seed=0) == {}


def test_a_study_without_a_narrow_place_shows_its_least_sure_level(rows):
    mine = rows[rows["study_id"] == 4].copy()
    columns = mine["condition"] + mine["level"]
    for order, (grades, expected) in enumerate((((0, 0), (0, 0.55, "L3/L4")), ((1, 1), (1, 0.8, "L4/L5")))):
        mine["grade"], mine["confidence"] = 0, 0.9
        for level, grade, confidence in (("l3_l4", grades[0], 0.55), ("l4_l5", grades[1], 0.8)):
            here = columns == f"{SPINAL_CANAL}{level}"
            mine.loc[here, ["grade", "confidence"]] = grade, confidence
        [line] = studies.overview(mine)
        assert line["cells"][studies.GRID.index(SPINAL_CANAL)] == expected, order


def test_a_studys_loss_is_the_scores(rows):
    mine = rows[(rows["study_id"] == 4) & (rows["severity"] >= 0)]
    weights = np.array([1.0, 2.0, 4.0])
    weighted = mine[list(SEVERITIES)].to_numpy() * weights
    chance = weighted[np.arange(len(mine)), mine["severity"]] / weighted.sum(axis=1)
    expected = np.average(-np.log(chance), weights=weights[mine["severity"]])
    assert studies.study_losses(rows)[4] == pytest.approx(expected)
    line = next(line for line in studies.overview(rows) if line["study_id"] == 4)
    assert (line["agreed"], line["known"]) == ((mine["grade"] == mine["severity"]).sum(), len(mine))
