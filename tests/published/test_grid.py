"""The grid of a whole study: stacks sampled in patient space."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from spines import AXIAL_PLANE, SAGITTAL, make_affines, make_stack, mirror_study, noisy_study, ramp

from lsdc_utils.published.grid import Lattice, sample_stack, study_grid
from lsdc_utils.vit.crops import CropError
from lsdc_utils.vocabulary import AXIAL


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


def test_a_mirrored_study_gives_the_mirrored_grid():
    stacks = noisy_study()
    grid = study_grid(stacks, 16).astype(int)
    mirrored = study_grid([mirror_study(s) for s in stacks], 16).astype(int)
    assert np.abs(mirrored[:, ::-1] - grid).max() <= 1
    with pytest.raises(CropError):
        study_grid([], 16)
