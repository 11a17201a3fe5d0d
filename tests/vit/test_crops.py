"""Crops per level: frames along the canal, and the squares that the transformer sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from spines import SAGITTAL, make_affines, make_stack, mirror_study, noisy_study, ramp, spine

from lsdc_utils.vit.crops import SAGITTAL_MIDDLE, level_cuts, level_frames
from lsdc_utils.vit.inputs import study_input
from lsdc_utils.vit.model import VitConfig
from lsdc_utils.vocabulary import T2


def level_slices(stacks, points, size, spacing, slices):
    """Images (5, slots * slices, size, size) and places (5, slots * slices) of a study."""
    record = study_input(stacks, points, VitConfig(size=size, spacing=spacing, slices=slices, margin=0, patch=1))
    return record["images"], record["places"]


def test_frames_follow_the_canal_and_fill_missing_levels():
    centres, axes = level_frames(spine(tilt=0.1))
    np.testing.assert_allclose(centres, spine(tilt=0.1)[["X", "Y", "Z"]], atol=1.0)
    np.testing.assert_allclose(axes @ axes.transpose(0, 2, 1), np.tile(np.eye(3), (5, 1, 1)), atol=1e-9)
    assert (np.linalg.det(axes) > 0.99).all() and (axes[:, [0, 1, 2], [0, 1, 2]] > 0.85).all()
    assert axes[0, 2, 1] > 0 > axes[4, 2, 1] and (np.abs(axes[:, 2, 0] - 0.1) < 0.03).all()
    filled, _ = level_frames(spine(n_missing=2))
    np.testing.assert_allclose(filled, level_frames(spine())[0], atol=1e-6)
    with pytest.raises(ValueError, match="no canal point"):
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
