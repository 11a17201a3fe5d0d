"""Versions of a study that must not change a grade: from files to stacks to rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.spatial import cKDTree

from lsdc_utils import geometry
from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, read_study
from lsdc_utils.detector.levels import Scheme
from lsdc_utils.grading.grade import Graded, blend_studies, join_graded, load_models
from lsdc_utils.phantom import write_phantom
from lsdc_utils.stress import symmetry
from lsdc_utils.vit.predict import predict_studies
from lsdc_utils.vocabulary import SEVERITIES, mirrored, parse_row_id, row_id


@pytest.fixture(scope="module")
def stacks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Stack]]:
    """The stacks of a study and of its symmetry."""
    folder = tmp_path_factory.mktemp("versions")
    data = write_phantom(folder / "phantom", 0, 1, 8, tilted_blocks=1.0, second_axial=0.0, non_square=1.0)
    study = int(pd.read_csv(data / symmetry.SERIES_TABLE)["study_id"].iloc[0])
    symmetry.write_versions(data, [study], folder / "versions")
    comp = competition.read(folder / "versions")
    return {name: read_study(comp, "test", symmetry.id_of(study, name))[0] for name in symmetry.VERSIONS}


def test_the_mirrored_study_shows_each_place_where_its_mirror_image_was(stacks):
    for before, after in zip(stacks["as it is"], stacks["mirrored"], strict=True):
        spot = np.array([7.0, 11.0, 0.0, 1.0])  # column and row
        for k, affine in enumerate(before.affines):
            place = affine @ spot * (-1, 1, 1, 1)
            same = np.flatnonzero(np.abs(geometry.plane_distances(after.affines, place[None, :3])[:, 0]) < 1e-3)
            pixels = np.rint(np.stack([np.linalg.solve(after.affines[j], place) for j in same])[:, :2]).astype(int)
            values = [after.pixels[j, y, x] for j, (x, y) in zip(same, pixels, strict=True) if min(x, y) >= 0]
            assert before.pixels[k, 11, 7] in values
        directions = [stack.affines[0, :3, :2] / np.linalg.norm(stack.affines[0, :3, 0]) for stack in (before, after)]
        assert (np.abs(directions[0] - directions[1]) < 0.3).all()  # images run the usual way still


def test_a_renumbered_study_is_the_same_stacks(stacks):
    for one, other in zip(stacks["as it is"], stacks["renumbered"], strict=True):
        assert np.array_equal(one.pixels, other.pixels) and np.array_equal(one.affines, other.affines)
        assert np.array_equal(one.instance_numbers, other.instance_numbers[::-1])


def test_a_rescaled_study_looks_the_same(stacks):
    for one, other in zip(stacks["as it is"], stacks["rescaled"], strict=True):
        assert np.array_equal(one.affines, other.affines)
        assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1


def test_a_renamed_study_has_its_series_in_the_reverse_order(stacks):
    named = {stack.series_id for stack in stacks["as it is"]}
    for one, other in zip(stacks["as it is"], stacks["renamed"][::-1], strict=True):
        assert np.array_equal(one.pixels, other.pixels) and one.series_type == other.series_type
        assert one.study_id != other.study_id and other.series_id not in named


@pytest.fixture(scope="module")
def graded(smoke_project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Graded]:
    """A test study of the finished run and its versions as the run's models grade them, with the ensemble's rows.

    At the canal points of the study as it is: `seen`, the detections of every detector, and `at_points`, the
    transformer's rows. The smallest run's detectors score all places alike: which become levels is a toss-up.
    """
    run, folder = smoke_project / "outputs/demo", tmp_path_factory.mktemp("graded")
    recipe = json.loads((run / "blend.json").read_text())
    models = load_models(run / "weights", recipe["folds"], recipe["vit_views"])
    detectors = [detector for group in models.yolos.values() for detector in group]
    data = (run / json.loads((run / "data.json").read_text())["data_dir"]).resolve()
    study = int(pd.read_csv(data / symmetry.SERIES_TABLE)["study_id"].min())
    symmetry.write_versions(data, [study], folder)
    comp, found = competition.read(folder), {}
    for name in symmetry.VERSIONS:
        own = symmetry.id_of(study, name)
        seen, problems = read_study(comp, "test", own)
        found[name] = models.grade(own, seen, problems)
        points = found["as it is"]["points"]
        canal = points[points["condition"] == "scs"].assign(study_id=own)
        canal = canal.assign(X=-canal["X"]) if name == "mirrored" else canal
        found[name]["seen"] = [Scheme().detect(detector, seen, canal) for detector in detectors]
        found[name]["at_points"] = predict_studies(models.vits["vit3d"], [(own, seen)], canal, models.views)
        found[name]["ensemble"] = blend_studies(recipe, join_graded([found[name]]), [own])[0]["ensemble"]
    return found


def moved(graded: dict[str, Graded], version: str, rows: str) -> float:
    """The largest change of a probability; infinite where a row is lacking in one of the two."""
    before, after = (graded[name][rows].set_index("row_id")[list(SEVERITIES)] for name in ("as it is", version))
    assert len(before)
    if len(before) != len(after):
        return np.inf
    own = parse_row_id(after.index[0])[0]
    keys = [parse_row_id(row)[1:] for row in before.index]
    names = [row_id(own, mirrored(c) if version == "mirrored" else c, level) for c, level in keys]
    return float(np.abs(before.to_numpy() - after.reindex(names).fillna(np.inf).to_numpy()).max())


def test_mirroring_exchanges_left_and_right_in_the_transformers_rows(graded):
    assert moved(graded, "mirrored", "at_points") < 1e-3


def test_a_detector_sees_in_the_mirrored_study_what_it_saw_and_on_the_other_side(graded):
    for before, after in zip(graded["as it is"]["seen"], graded["mirrored"]["seen"], strict=True):
        keys = [np.hstack([one.points * (sign, 1, 1), one.scores]) for one, sign in ((before, -1), (after, 1))]
        apart, same = cKDTree(keys[1]).query(keys[0])
        assert len(keys[0]) == len(keys[1]) and apart.max() < 1e-3  # mm, and of scores
        assert (before.levels == after.levels[same]).all()


@pytest.mark.parametrize("rows", ["yolo", "vit3d", "ensemble"])
def test_numbers_ids_and_order_change_nothing_at_all(graded, rows):
    assert moved(graded, "renumbered", rows) == 0
    assert moved(graded, "renamed", rows) == 0


def test_other_pixel_values_change_what_models_see_by_a_rounding_error(graded):
    assert moved(graded, "rescaled", "at_points") < 0.01
    for before, after in zip(graded["as it is"]["seen"], graded["rescaled"]["seen"], strict=True):
        keys = [np.hstack([one.points, one.scores]) for one in (before, after)]
        assert np.quantile(cKDTree(keys[1]).query(keys[0])[0], 0.95) < 1  # mm, and of scores
