"""Mirroring a study exchanges left and right, numbering its slices otherwise changes nothing: from files to rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mirror
import numpy as np
import pandas as pd
import pytest
from proofs import symmetry

from lsdc_utils import competition, volume
from lsdc_utils.phantom import write_phantom
from lsdc_utils.vocabulary import SEVERITIES, SIDES, mirrored

ROWS = ("yolo", "vit3d", "at_points", "ensemble")


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A folder with a test study, its mirror image and its renumbered copy, and the id of the study."""
    folder = tmp_path_factory.mktemp("versions")
    data = write_phantom(folder / "phantom", 0, 1, 8, tilted_blocks=1.0, second_axial=0.0, non_square=1.0)
    study = int(pd.read_csv(data / mirror.SERIES_TABLE)["study_id"].iloc[0])
    mirror.write_versions(data, [study], folder / "versions")
    return folder / "versions", study


def test_the_mirrored_study_shows_each_place_where_its_mirror_image_was(versions):
    root, study = versions
    comp = competition.read(root)
    pairs = zip(*(volume.read_study(comp, "test", study + added)[0] for added in (0, mirror.MIRRORED)), strict=True)
    for before, after in pairs:
        spot = np.array([7.0, 11.0, 0.0, 1.0])  # column and row
        for k, affine in enumerate(before.affines):
            place = affine @ spot * (-1, 1, 1, 1)
            off = np.abs(np.einsum("ni,ni->n", place[:3] - after.affines[:, :3, 3], _normals(after)))
            same = np.flatnonzero(off < 1e-3)
            pixels = np.rint(np.stack([np.linalg.solve(after.affines[j], place) for j in same])[:, :2]).astype(int)
            values = [after.pixels[j, y, x] for j, (x, y) in zip(same, pixels, strict=True) if min(x, y) >= 0]
            assert before.pixels[k, 11, 7] in values
        directions = [stack.affines[0, :3, :2] / np.linalg.norm(stack.affines[0, :3, 0]) for stack in (before, after)]
        assert (np.abs(directions[0] - directions[1]) < 0.3).all()  # images run the usual way still


def _normals(stack: volume.Stack) -> np.ndarray:
    normal = np.cross(stack.affines[:, :3, 0], stack.affines[:, :3, 1])
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


def test_a_renumbered_study_is_the_same_stacks(versions):
    root, study = versions
    comp = competition.read(root)
    before, after = (volume.read_study(comp, "test", study + added)[0] for added in (0, mirror.RENUMBERED))
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one.pixels, other.pixels) and np.array_equal(one.affines, other.affines)
        assert np.array_equal(one.instance_numbers, other.instance_numbers[::-1])


@pytest.fixture(scope="module")
def graded(smoke_project: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Rows of a test study of the finished run and of its versions.

    The run's prior is made the same for both sides first: counts of a few labels differ between them.
    """
    folder = tmp_path_factory.mktemp("graded")
    source = smoke_project / "outputs/demo"
    shutil.copytree(source / "weights", folder / "run/weights")
    recipe = json.loads((source / "blend.json").read_text())
    prior = pd.DataFrame(recipe["prior"]).set_index(["condition", "level"])[list(SEVERITIES)]
    other = prior.rename(index=mirrored, level="condition").reindex(prior.index)
    recipe["prior"] = ((prior + other) / 2).reset_index().to_dict("records")
    (folder / "run/blend.json").write_text(json.dumps(recipe))
    data = (source / json.loads((source / "data.json").read_text())["data_dir"]).resolve()
    study = int(pd.read_csv(data / mirror.SERIES_TABLE)["study_id"].min())
    mirror.write_versions(data, [study], folder / "versions")
    return symmetry.grade(folder / "run", folder / "versions", [study])


@pytest.mark.parametrize(("rows", "bar"), [("at_points", 1e-3), ("yolo", 0.02), ("vit3d", 0.02), ("ensemble", 0.02)])
def test_mirroring_exchanges_left_and_right_rows(graded, rows, bar):
    found = symmetry.differences(graded[rows], mirror.MIRRORED)
    assert len(found) and found["difference"].max() < bar, found.sort_values("difference").tail()


def test_mirroring_exchanges_left_and_right_points(graded):
    points = graded["points"]
    before = mirror.mirror_points(points[points["study_id"] < mirror.MIRRORED])
    both = before.merge(points, on=["study_id", "condition", "level", "side"], suffixes=("", "_found"))
    assert len(both) == len(before) and set(both["side"]) <= {"", *SIDES}
    off = both[["X", "Y", "Z"]].to_numpy() - both[["X_found", "Y_found", "Z_found"]].to_numpy()
    assert np.linalg.norm(off, axis=1).max() < 1


@pytest.mark.parametrize("rows", ROWS)
def test_the_order_of_slices_changes_nothing_at_all(graded, rows):
    found = symmetry.differences(graded[rows], mirror.RENUMBERED)
    assert len(found) and (found["difference"] == 0).all()
