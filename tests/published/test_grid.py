"""The grid of a whole study."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from spines import AXIAL_PLANE, SAGITTAL, make_affines, make_stack, mirror_study, noisy_study, ramp

from lsdc_utils.published.grid import grid_points, study_grid
from lsdc_utils.vocabulary import AXIAL, T1, T2

SIZE = (60, 50)


def sagittal(n=11, series_type=T2, **geometry):
    return make_stack(
        ramp, make_affines(n, 1.5, 4.5, centre=(2, 30, -20), size=SIZE, **SAGITTAL | geometry), SIZE, series_type
    )


def turned(stack, order):
    names = ("pixels", "shapes", "affines", "instance_numbers", "blocks")
    return replace(stack, **{name: getattr(stack, name)[order] for name in names})


@pytest.mark.parametrize("lean", [0.0, 0.15])
def test_a_linear_field_is_returned(lean):
    stack = sagittal(columns=(lean, np.sqrt(1 - lean**2), 0))
    points = grid_points([stack], 16)[0]
    inner = (slice(2, -2),) * 3  # the outermost voxels are beyond the last pixels' centres
    grid = study_grid([stack], 16)[1][inner].astype(float)
    inside = grid > 0
    assert inside.mean() > (0.99 if lean == 0 else 0.7)
    assert np.abs(grid - ramp(points[inner]))[inside].max() < (1.1 if lean == 0 else 2.0)


def test_slices_in_any_order_give_the_same_grid():
    stack = sagittal()
    np.testing.assert_array_equal(study_grid([turned(stack, slice(None, None, -1))], 16), study_grid([stack], 16))


def test_a_series_type_that_is_missing_is_blank_and_a_lone_slice_answers_for_what_is_near_it():
    grid = study_grid([sagittal(), sagittal(1, T1)], 32)
    assert not grid[2].any() and grid[1].any()
    points = grid_points([sagittal(), sagittal(1, T1)], 32)[0]
    assert np.abs(points[grid[0] > 0][:, 0] - 2).max() <= 2.5


def test_tilted_blocks_answer_by_their_nearest_slice():
    size, turn = (40, 40), np.deg2rad(25)
    flat = make_affines(4, 1.5, 4.0, centre=(0, 0, 30), size=size, **AXIAL_PLANE)
    rows = (0, np.cos(turn), -np.sin(turn))
    tilted = make_affines(4, 1.5, 4.0, centre=(0, 0, -10), size=size, columns=(1, 0, 0), rows=rows)
    stack = make_stack(ramp, np.concatenate([flat, tilted]), size, AXIAL, np.repeat([0, 1], 4).astype(np.int32))
    grid, points = study_grid([stack], 24)[2].astype(float), grid_points([stack], 24)[0]
    inside = (grid > 0) & (np.abs(points[..., :2]) < 20).all(axis=-1)
    assert np.abs(grid - ramp(points))[inside].max() < 2.5 and 0.2 < (grid > 0).mean() < 0.9


def test_a_mirrored_study_gives_the_mirrored_grid():
    stacks = noisy_study()
    grid = study_grid(stacks, 16).astype(int)
    mirrored = study_grid([mirror_study(s) for s in stacks], 16).astype(int)
    assert np.abs(mirrored[:, ::-1] - grid).max() <= 1
    with pytest.raises(ValueError, match="at least one series"):
        study_grid([], 16)
