"""Stacks: reading, keeping, sampling in patient space, and the crops and grids that networks see."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pandas as pd
import pytest
from dicom_files import write_stack
from spines import AXIAL_PLANE, SAGITTAL, make_affines, make_stack, mirror_study, noisy_study, ramp, spine

from lsdc_utils.data.competition import Competition
from lsdc_utils.data.stacks import (
    WINDOW,
    Stack,
    _percentiles,
    coarsen,
    convert_studies,
    load_study,
    read_study,
    save_stack,
    window_images,
)
from lsdc_utils.published.grid import Lattice, sample_stack, study_grid
from lsdc_utils.vit.crops import SAGITTAL_MIDDLE, CropError, level_cuts, level_frames, level_slices
from lsdc_utils.vocabulary import AXIAL, T1, T2


def lattice_of(low, high, shape, turn=(0, 0, 0)):
    """A lattice of `shape` points from one corner to the other, then turned a little about its middle."""
    low, high = np.array(low, float), np.array(high, float)
    x, y, z = turn
    turned = np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    steps = np.diag((high - low) / (np.array(shape) - 1)) @ turned
    return Lattice((low + high) / 2 - (np.array(shape) - 1) / 2 @ steps, steps, tuple(shape))


def at(stack, *points):
    """Values and inside (n,) of a stack at single points."""
    found = [sample_stack(stack, Lattice(np.array(p, float), np.eye(3), (1, 1, 1))) for p in points]
    return tuple(np.array([answer[k].item() for answer in found]) for k in (0, 1))


@pytest.fixture
def sagittal():
    size = (60, 50)
    return make_stack(ramp, make_affines(11, 1.5, 4.5, centre=(2, 30, -20), size=size, **SAGITTAL), size)


@pytest.mark.parametrize("turn", [(0, 0, 0), (0.1, -0.05, 0.2)])
def test_sample_returns_a_linear_field(sagittal, turn):
    lattice = lattice_of([-10, 10, -45], [13, 50, 5], (40, 31, 57), turn)  # more points than are sampled at once
    values, inside = sample_stack(sagittal, lattice)
    assert inside.all() and values.shape == (40, 31, 57) and values.dtype == np.float32
    assert np.abs(values - ramp(lattice.points())).max() < 0.6  # pixels are whole grey levels


def test_sample_is_the_same_for_slices_in_any_order(sagittal):
    lattice = lattice_of([-30, -20, -70], [30, 80, 30], (9, 10, 11), (0.05, 0.1, 0))
    turn = slice(None, None, -1)
    reverse = replace(sagittal, pixels=sagittal.pixels[turn].copy(), affines=sagittal.affines[turn].copy())
    for one, other in zip(sample_stack(sagittal, lattice), sample_stack(reverse, lattice), strict=True):
        np.testing.assert_array_equal(one, other)


def test_slices_that_differ_a_little_in_tilt_or_place_are_each_projected_by_themselves():
    size, rng = (60, 50), np.random.default_rng(0)
    affines = make_affines(11, 1.5, 4.5, centre=(2, 30, -20), size=size, **SAGITTAL)
    for affine in affines:
        x, y, z = rng.normal(0, 0.003, 3)
        affine[:3, :3] = (np.eye(3) + np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])) @ affine[:3, :3]
        affine[:3, 3] += affine[:3, :2] @ rng.normal(0, 3, 2)
    lattice = lattice_of([-10, 20, -35], [13, 40, -5], (20, 20, 20), (0.1, 0, 0))
    values, inside = sample_stack(make_stack(ramp, affines, size), lattice)
    assert inside.all() and np.abs(values - ramp(lattice.points())).max() < 0.8


def test_outside_is_zero_and_said_so(sagittal):
    values, inside = at(sagittal, [2 + 5.4 * 4.5, 30, -20], [2, 30 + 40, -20], [2, 30, 40], [2 + 5.6 * 4.5, 30, -20])
    assert inside.tolist() == [True, False, False, False]  # the first: .4 of a step off
    assert values[1:].tolist() == [0, 0, 0]


def test_one_lost_slice_is_bridged_and_a_wide_gap_is_not(sagittal):
    def keep(*members):
        names = ("pixels", "shapes", "affines", "instance_numbers", "blocks")
        return replace(sagittal, **{name: getattr(sagittal, name)[list(members)] for name in names})

    point = np.array([2.0, 30, -20])  # on the sixth slice
    values, inside = at(keep(0, 1, 2, 3, 4, 6, 7, 8, 9, 10), point)
    assert inside.all() and abs(values[0] - ramp(point)) < 1
    gap = keep(0, 1, 2, 3, 7, 8, 9, 10)
    assert at(gap, point, (6.6, 30, -20), (9, 30, -20))[1].tolist() == [False, False, True]


def test_a_lone_slice_answers_for_what_is_near_it(sagittal):
    size = (60, 50)
    one = make_stack(ramp, make_affines(1, 1.5, 4.5, centre=(2, 30, -20), size=size, **SAGITTAL), size)
    values, inside = at(one, [2, 30, -20], [4, 30, -20], [4.6, 30, -20])
    assert inside.tolist() == [True, True, False]
    np.testing.assert_allclose(values[:2], ramp([2, 30, -20]), atol=0.6)


def test_images_too_large_for_opencv_are_sampled_in_parts(sagittal, monkeypatch):
    lattice = lattice_of([-10, 10, -45], [13, 50, 5], (8, 9, 10))
    whole = sample_stack(sagittal, lattice)
    monkeypatch.setattr("lsdc_utils.published.grid.LARGEST", 40)
    for one, other in zip(whole, sample_stack(sagittal, lattice), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_tilted_blocks_answer_by_their_nearest_slice():
    size, turn = (40, 40), np.deg2rad(25)
    flat = make_affines(4, 1.5, 4.0, centre=(0, 0, 30), size=size, **AXIAL_PLANE)
    rows = (0, np.cos(turn), -np.sin(turn))
    tilted = make_affines(4, 1.5, 4.0, centre=(0, 0, -10), size=size, columns=(1, 0, 0), rows=rows)
    stack = make_stack(ramp, np.concatenate([flat, tilted]), size, AXIAL, np.repeat([0, 1], 4).astype(np.int32))
    points = np.array([[3, 4, 31], [3, 4, -10], [-5, -10, -8.0], [0, 0, 14]])
    values, inside = at(stack, *points)
    assert inside.tolist() == [True, True, True, False]
    np.testing.assert_allclose(values[:3], ramp(points[:3]), atol=1)


def test_padding_of_a_smaller_slice_is_outside(sagittal):
    shapes = sagittal.shapes.copy()
    shapes[:, 1] = 20
    narrow = replace(sagittal, shapes=shapes)
    x, y, z, _ = narrow.affines[5] @ np.array([[19, 10, 0, 1], [22, 10, 0, 1]]).T
    assert at(narrow, *np.stack([x, y, z], axis=-1))[1].tolist() == [True, False]


def test_coarsened_pixels_stay_where_they_are(sagittal):
    size = (120, 100)
    fine = make_stack(ramp, make_affines(5, 0.5, 4.5, centre=(2, 30, -20), size=size, **SAGITTAL), size)
    coarse = coarsen(fine, 1.5)
    assert coarse.pixels.shape == (5, 40, 33)
    lattice = lattice_of([-6, 20, -40], [10, 40, 0], (6, 7, 8))
    np.testing.assert_allclose(sample_stack(coarse, lattice)[0], ramp(lattice.points()), atol=1)
    assert coarsen(sagittal, 1.5) is sagittal


@pytest.mark.parametrize("kind", ["u1", "i1", "<u2", "<i2", ">u2", ">i2", "<u4", "<i4", "<f4"])
def test_windowing_is_the_plain_formula_for_any_kind_of_pixels(kind):
    rng = np.random.default_rng(0)
    limits = (-1000, 4000) if np.dtype(kind).itemsize > 1 else (-100, 100)
    images = [rng.integers(*limits, shape).clip(0 if "u" in kind else None).astype(kind) for shape in ((9, 7), (5, 8))]
    for low, high in ((10.3, 90.9), (limits[0] * 0.8, limits[1] * 0.9), (5, 5)):
        target = np.full((2, 9, 8), 77, dtype=np.uint8)
        window_images(images, low, high, target)
        for image, grey in zip(images, target, strict=True):
            expected = (image.astype(float) - low) * 255 / max(high - low, 1e-6)
            found = grey[: image.shape[0], : image.shape[1]].astype(float)
            assert np.abs(found - np.clip(expected, 0, 255)).max() <= 0.51  # rounded, and that in 32 bits
        assert (target[0, :, 7] == 77).all() and (target[1, 5:] == 77).all()


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize(
    ("shape", "rows", "columns"), [((1, 1), [0], [0]), ((7, 9), [3], [4]), ((41, 60), range(0, 41, 5), range(2, 60, 5))]
)
def test_percentiles_are_numpys(kind, shape, rows, columns):
    images = [np.random.default_rng(k).gamma(2, 30, shape).astype(kind) for k in range(3)]
    seen = np.stack(images)[:, list(rows)][:, :, list(columns)]
    np.testing.assert_allclose(_percentiles(images), np.percentile(seen, WINDOW), rtol=1e-6)


@pytest.fixture
def competition_of_five(tmp_path):
    """Five test studies of two series each: of the third study one series holds a broken file, one is not there."""
    rows = []
    for study in range(1, 6):
        for series, kind in ((1, T1), (2, AXIAL)):
            rows.append((study, series, kind, "test"))
            if (study, series) == (3, 2):
                continue
            pixels = np.random.default_rng(study).integers(0, 900, (60, 80), "uint16")
            spacing = (30.0, 30.0) if (study, series) == (5, 1) else (2.0, 2.5)  # no scan of a spine measures 2.4 m
            folder = tmp_path / f"test_images/{study}/{series}"
            write_stack(folder, [(0, 0, 4.0 * k) for k in range(3)], pixels=pixels, spacing=spacing)
            if study == 3:
                (folder / "2.dcm").write_bytes(b"no image")
    series = pd.DataFrame(rows, columns=["study_id", "series_id", "series_type", "split"])
    none = pd.DataFrame()
    return Competition(tmp_path, none, none, series, [], none)


@pytest.mark.parametrize("workers", [1, 2])
def test_conversion_writes_what_was_read_and_tells_what_was_not(competition_of_five, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("lsdc_utils.data.stacks.FEW_STUDIES", 2)
    comp, studies = competition_of_five, [5, 3, 1]
    problems = list(convert_studies(comp, "test", studies, tmp_path / "slices", workers))
    assert [table["rule"].tolist() for table in problems] == [
        ["series_unusable"],
        ["file_unusable", "series_unusable"],
        [],
    ]
    assert (problems[1]["study_id"] == 3).all() and problems[1]["series_id"].tolist() == [1, 2]
    assert sorted(path.name for path in (tmp_path / "slices").iterdir()) == ["1", "3", "5"]
    for study in studies:
        stacks, again = read_study(comp, "test", study)
        saved = load_study(tmp_path / "slices", study)
        assert len(saved) == len(stacks) and again.equals(problems[studies.index(study)])
        for one, other in zip(saved, stacks, strict=True):
            for field in fields(Stack):
                np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_a_stack_is_kept_whole(sagittal, tmp_path):
    save_stack(sagittal, tmp_path / "7" / "1.npz")
    (back,) = load_study(tmp_path, 7)
    for field in fields(Stack):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(sagittal, field.name))
    assert isinstance(back.study_id, int) and isinstance(back.series_type, str)
    assert load_study(tmp_path, 8) == []


def test_frames_follow_the_canal_and_fill_missing_levels():
    centres, axes = level_frames(spine(tilt=0.1))
    np.testing.assert_allclose(centres, spine(tilt=0.1)[["X", "Y", "Z"]], atol=1.0)
    np.testing.assert_allclose(axes @ axes.transpose(0, 2, 1), np.tile(np.eye(3), (5, 1, 1)), atol=1e-9)
    assert (np.linalg.det(axes) > 0.99).all() and (axes[:, [0, 1, 2], [0, 1, 2]] > 0.85).all()
    assert axes[0, 2, 1] > 0 > axes[4, 2, 1] and (np.abs(axes[:, 2, 0] - 0.1) < 0.03).all()
    filled, _ = level_frames(spine(n_missing=2))
    np.testing.assert_allclose(filled, level_frames(spine())[0], atol=1e-6)
    with pytest.raises(CropError, match="no canal point"):
        level_frames(spine().iloc[:0])


def test_a_click_on_the_next_slice_moves_the_midline_little():
    clicked = spine()
    clicked.loc[[1, 3], "X"] += 4.5
    centres, _ = level_frames(clicked)
    assert np.abs(centres[:, 0] - 3).max() < 2.5


def test_a_mirrored_study_gives_the_same_squares_with_sides_exchanged():
    stacks, points = noisy_study(), spine(tilt=0.05, x=3.9)
    images, places = level_slices(stacks, points, 12, 2.0, 3)
    mirrored = [mirror_study(s) for s in stacks]
    images_m, places_m = level_slices(mirrored, points.assign(X=-points["X"]), 12, 2.0, 3)
    assert images.shape == (5, 15, 12, 12) and places.shape == (5, 15) and np.isfinite(places).all()
    exchanged = [*range(3), *range(6, 9), *range(3, 6), *range(12, 15), *range(9, 12)]
    assert np.abs(images_m[:, exchanged].astype(int) - images).max() <= 2  # OpenCV rounds coordinates
    sign = np.where(np.arange(15) < 3, -1, 1)  # T2 lies to the left, all else outwards or to the head
    np.testing.assert_allclose(places_m[:, exchanged] * sign, places, atol=1e-4)
    grid = study_grid(stacks, 16).astype(int)
    turned = study_grid(mirrored, 16).astype(int)
    assert np.abs(turned[:, ::-1] - grid).max() <= 1
    with pytest.raises(CropError):
        study_grid([], 16)


def test_squares_do_not_depend_on_the_order_of_slices_or_their_numbers():
    stacks, points = noisy_study(), spine(x=3.9)
    names = ("pixels", "shapes", "affines", "blocks")
    reverse = [replace(s, **{name: getattr(s, name)[::-1].copy() for name in names}) for s in stacks]
    for one, other in zip(
        level_slices(stacks, points, 12, 2.0, 3), level_slices(reverse, points, 12, 2.0, 3), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_squares_are_where_they_say_and_series_that_lack_are_blank():
    size, points = (96, 96), spine()
    stack = make_stack(ramp, make_affines(21, 2.0, 4.5, centre=(3, 30, -40), size=size, **SAGITTAL), size, T2)
    images, places = level_slices([stack], points, 6, 2.0, 5)
    centres, frames = level_frames(points)
    for level, slots in enumerate(level_cuts([stack], points, 6, 2.0, 5)):
        assert [len(cuts) for cuts in slots] == [5, 0, 0, 0, 0]
        for k, cut in enumerate(slots[0]):
            rows, cols = np.indices((6, 6))[..., None]
            at_pixel = cut.origin + cols * cut.columns + rows * cut.rows
            np.testing.assert_allclose(images[level, k], np.clip(ramp(at_pixel), 0, 255), atol=1.5)
            off = (at_pixel.mean(axis=(0, 1)) - centres[level]) @ frames[level].T
            np.testing.assert_allclose(off[1:], SAGITTAL_MIDDLE, atol=1.0)
            assert places[level, k] == pytest.approx(at_pixel[0, 0, 0] - centres[level, 0], abs=1e-4)
    assert (np.diff(np.abs(places[:, :5]), axis=1) >= -1e-4).all() and np.isnan(places[:, 5:]).all()
    assert (images[:, 5:] == 0).all()


def test_a_repeated_series_gives_no_slice_twice_and_far_slices_none():
    stacks, points = noisy_study(n_axial=3), spine(x=3.9)
    again = [replace(s, series_id=9) for s in stacks]
    one = level_slices(stacks, points, 12, 2.0, 5)
    np.testing.assert_array_equal(level_slices(stacks + again, points, 12, 2.0, 5)[1], one[1])
    assert np.isnan(one[1][0, 15:]).all() and np.isfinite(one[1][:, :15]).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 4), (9, 6), (33, 40), (64, 61), (70, 62), (51, 63)])
def test_a_mirrored_image_has_the_same_window(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(3).integers(0, 4000, shape).astype(np.uint16)
    window = _percentiles([image]).tolist()
    assert _percentiles([image[:, ::-1]]).tolist() == window
    assert _percentiles([image[::-1]]).tolist() == window
    assert _percentiles([image.astype(float)[:, ::-1]]) == pytest.approx(window)
