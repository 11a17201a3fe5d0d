"""Crops per level: frames along the canal, and the squares that the transformer sees."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from spines import SAGITTAL, make_affines, make_stack, mirror_study, noisy_study, ramp, spine

from lsdc_utils.vit.crops import CANAL_MIDDLE, FORAMEN, RECESS, SLOTS, level_cuts, level_frames, slot_centres
from lsdc_utils.vit.inputs import study_input
from lsdc_utils.vit.model import VitConfig
from lsdc_utils.vocabulary import AXIAL, LEVELS, SIDES, T1, T2


def level_slices(stacks, points, size, spacing, slices):
    """Images (5, slots * slices, size, size) and places (5, slots * slices) of a study."""
    config = VitConfig(size=size, spacing=(spacing,) * 3, slices=slices, margin=0, channels=(8,))
    record = study_input(stacks, points, config)
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


@pytest.mark.parametrize(
    ("off", "most"),
    [({1: 4.5, 3: 4.5}, 2.6), ({2: 4.0}, 1.2), ({1: -4.0}, 1.5), ({4: 4.0}, 2.6), ({2: 20.0}, 0.5), ({0: -20.0}, 1.5)],
    ids=["two clicks", "click", "other click", "click at the end", "wild", "wild at the end"],
)
def test_a_click_on_the_next_slice_moves_the_midline_little_and_a_wild_point_does_not(off, most):
    clicked = spine()
    for level, mm in off.items():
        clicked.loc[level, "X"] += mm
    centres, frames = level_frames(clicked)
    assert np.abs(centres[:, 0] - 3).max() < most
    assert np.abs(frames[:, 2, 0]).max() < 0.07


@pytest.mark.parametrize("wave", [250.0, 320.0, 400.0])
@pytest.mark.parametrize("phase", [0.0, 0.8, 1.6, 2.4])
def test_a_bow_is_followed(wave, phase):
    bowed, turn = spine(), 2 * np.pi / wave
    bowed["X"] += 15 * np.sin(turn * bowed["Z"] + phase)
    centres, frames = level_frames(bowed)
    assert np.abs(centres[:, 0] - bowed["X"]).max() < 1.5
    slope = 15 * turn * np.cos(turn * bowed["Z"] + phase)
    assert np.abs(frames[:, 2, 0] / frames[:, 2, 2] - slope).max() < 0.08
    bowed.loc[2, "X"] += 20  # on another structure
    assert np.abs(np.delete(level_frames(bowed)[0][:, 0] - bowed["X"], 2)).max() < 2.5


def recesses(points, outwards=7.0, posterior=-2.0, moved=(0.0, 0.0, 0.0), condition="ss"):
    """Points of both recesses (or foramina) of each level, beside its canal point."""
    sides = [
        points.assign(condition=condition, side=side, X=points["X"] + sign * outwards, Y=points["Y"] + posterior)
        for side, sign in zip(SIDES, (1, -1), strict=True)
    ]
    table = pd.concat(sides, ignore_index=True)
    table[[*"XYZ"]] += np.array(moved)
    return table


def off_recess(points, truth):
    """Distance (10,) in the axial plane of the axial slots' centres from true recesses."""
    found = slot_centres(points, *level_frames(points))
    place = truth.set_index(["level", "side"]).loc[[(level, side) for level in LEVELS for side in SIDES], ["X", "Y"]]
    return np.linalg.norm(found[:, 3:, :2].reshape(-1, 2) - place.to_numpy(), axis=1)


def test_axial_squares_lie_about_the_recesses_that_were_found_wherever_the_canal_point_lies():
    canal = spine(tilt=0.05)
    truth = recesses(canal, moved=(-5.7, 2.0, 0.0))
    assert off_recess(pd.concat([canal, truth]), truth).max() < 0.3
    centres, frames = level_frames(canal)
    none = slot_centres(canal, centres, frames)
    for slot, (kind, side) in enumerate(SLOTS):
        off = np.einsum("nij,nj->ni", frames, none[:, slot] - centres)
        usual = {AXIAL: RECESS, T1: FORAMEN, T2: np.zeros((5, 3))}[kind] * [1 if side != "right" else -1, 1, 1]
        np.testing.assert_allclose(off, usual, atol=1e-9)
    axial = [stack for stack in noisy_study() if stack.series_type == AXIAL]
    slots = set()
    for level, slot, _, cut in level_cuts(axial, pd.concat([canal, truth]), 6, [2.0] * 3, 5):
        is_own = (truth["level"] == LEVELS[level]) & (truth["side"] == SLOTS[slot][1])
        off = cut.origin + 2.5 * (cut.columns + cut.rows) - truth[is_own][[*"XYZ"]].to_numpy(float)[0]
        assert np.hypot(*off[:2]) < 0.3  # its middle is the recess, in the plane of the slice
        slots.add((level, slot))
    assert slots == {(level, slot) for level in range(5) for slot in (3, 4)}


def test_sagittal_t1_squares_lie_about_the_foramina_that_were_found():
    canal = spine()
    usual = recesses(canal, 0.0, 0.0, condition="nfn")
    usual["X"] += np.concatenate([FORAMEN[:, 0], -FORAMEN[:, 0]])
    usual[["Y", "Z"]] += np.tile(FORAMEN[:, 1:], (2, 1)) + np.array([2.0, -3.0])  # moved between the series
    found = slot_centres(pd.concat([canal, usual.drop(index=[2, 6])]), *level_frames(canal))
    for slot, (kind, side) in enumerate(SLOTS):
        if kind == T1:
            place = usual[usual["side"] == side][["Y", "Z"]].to_numpy()
            assert np.abs(found[:, slot, 1:] - place).max() < 1.0
    stack = next(stack for stack in noisy_study() if stack.series_type == T1)
    for level, slot, _, cut in level_cuts([stack], pd.concat([canal, usual]), 6, [2.0] * 3, 3):
        place = usual[(usual["level"] == LEVELS[level]) & (usual["side"] == SLOTS[slot][1])][[*"XYZ"]].to_numpy()[0]
        off = cut.origin + 2.5 * (cut.columns + cut.rows) - place
        assert np.hypot(*off[1:]) < 1.0 and abs(cut.place) < 8  # its middle is the foramen, on the nearest slices


def test_a_recess_without_a_point_lies_where_the_others_let_it_be_expected():
    canal = spine()
    truth = recesses(canal, moved=(-5.0, 1.0, 0.0))
    part = truth.drop(index=[0, 3, 7])  # of both sides
    assert off_recess(pd.concat([canal, part]), truth).max() < 0.6
    one_side = truth[truth["side"] == "left"]
    assert off_recess(pd.concat([canal, one_side]), truth).max() < 2.5
    assert off_recess(pd.concat([canal, truth.iloc[[2]]]), truth).max() < 3.0


def test_a_wild_recess_moves_no_square():
    canal = spine()
    truth = recesses(canal, moved=(-5.0, 1.0, 0.0))
    wild = truth.copy()
    wild.loc[[1, 8], ["X", "Y"]] += np.array([[12.0, -6.0], [-9.0, 9.0]])
    assert off_recess(pd.concat([canal, wild]), truth).max() < 0.8
    unsure = truth.copy()
    unsure.loc[4, ["X", "confidence"]] += [6.0, -0.95]
    assert off_recess(pd.concat([canal, unsure]), truth).max() < 1.5


def test_a_mirrored_study_gives_the_same_squares_with_sides_exchanged():
    stacks, canal = noisy_study(), spine(tilt=0.05, x=3.9)
    points = pd.concat([canal, recesses(canal, moved=(-4.0, 1.0, 0.0)).drop(index=[0, 3, 8])])
    images, places = level_slices(stacks, points, 12, 2.0, 3)
    mirrored = [mirror_study(s) for s in stacks]
    turned = points.assign(X=-points["X"], side=points["side"].map({"": "", "left": "right", "right": "left"}))
    images_m, places_m = level_slices(mirrored, turned, 12, 2.0, 3)
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
    cuts = list(level_cuts([stack], points, 6, [2.0] * 3, 5))
    assert [place for *place, _ in cuts] == [[level, 0, k] for level in range(5) for k in range(5)]
    for level, _, k, cut in cuts:
        rows, cols = np.indices((6, 6))[..., None]
        at_pixel = cut.origin + cols * cut.columns + rows * cut.rows
        np.testing.assert_allclose(images[level, k], np.clip(ramp(at_pixel), 0, 255), atol=1.5)
        off = (at_pixel.mean(axis=(0, 1)) - centres[level]) @ frames[level].T
        np.testing.assert_allclose(off[1:], CANAL_MIDDLE, atol=1.0)
        assert places[level, k] == pytest.approx(at_pixel[0, 0, 0] - centres[level, 0], abs=1e-4)
    assert (np.diff(np.abs(places[:, :5]), axis=1) >= -1e-4).all() and np.isnan(places[:, 5:]).all()
    assert (images[:, 5:] == 0).all()


def test_a_repeated_series_gives_no_slice_twice_and_far_slices_none():
    stacks, points = noisy_study(n_axial=3), spine(x=3.9)
    again = [replace(s, series_id=9) for s in stacks]
    one = level_slices(stacks, points, 12, 2.0, 5)
    np.testing.assert_array_equal(level_slices(stacks + again, points, 12, 2.0, 5)[1], one[1])
    assert np.isnan(one[1][0, 15:]).all() and np.isfinite(one[1][:, :15]).all()


@pytest.mark.parametrize(("off", "seen"), [(7.5, True), (8.5, False)])
def test_a_slot_that_no_slice_shows_has_no_square(off, seen):
    points = spine(x=0.0)
    whole = make_stack(
        ramp, make_affines(2, 2.0, 4.5, centre=(off + 2.25, 30, -40), size=(120, 90), **SAGITTAL), (120, 90)
    )
    shown = {level for level, *_ in level_cuts([whole], points, 6, [2.0] * 3, 3)}
    assert shown == (set(range(5)) if seen else set())
    cut_off = replace(whole, pixels=whole.pixels[:, :50], shapes=np.tile([50, 90], (2, 1)))  # above the lower levels
    shown = {level for level, *_ in level_cuts([cut_off], points, 6, [2.0] * 3, 3)}
    assert (0 in shown) == seen and 4 not in shown


def test_a_wider_square_shows_the_same_place_in_larger_pixels():
    config = VitConfig(size=9, spacing=(2.0, 2.0, 2.0), margin=1, slices=3, channels=(8,), wider=((3.0, 1),))
    stacks, points = noisy_study(), spine(x=3.9)
    stacks = [replace(stack, pixels=ramped(stack)) for stack in stacks]
    seen, slots, side = study_input(stacks, points, config), config.slots, config.size + 2 * config.margin
    assert seen["images"].shape == (len(LEVELS), len(SLOTS) * 4, side, side) and list(slots[15:]) == [0, 1, 2, 3, 4]
    compared = 0
    for level, slot in np.ndindex(len(LEVELS), len(SLOTS)):
        (first, *_), (wide,) = np.flatnonzero(slots[:15] == slot), 15 + np.flatnonzero(slots[15:] == slot)
        if np.isnan(seen["places"][level, first]):
            continue
        assert seen["places"][level, wide] == pytest.approx(seen["places"][level, first])  # of the nearest slice
        small, large = (seen["images"][level, k].astype(int) for k in (first, wide))
        inner = small[2::3, 2::3], large[4:7, 4:7]  # pixel 3 j - 10 of the first is pixel j of the other
        if (inner[0] > 0).all() and (inner[1] > 0).all():
            assert np.abs(inner[0] - inner[1]).max() <= 2
            compared += 1
    assert compared >= 15


def ramped(stack):
    """A stack's pixels as the linear `ramp`, which averaging pixels does not change."""
    rows, cols = np.indices(stack.pixels.shape[1:])
    pixel = np.stack([cols, rows, np.zeros_like(rows), np.ones_like(rows)], axis=-1)
    return np.clip(np.rint(ramp(np.einsum("nij,rcj->nrci", stack.affines, pixel)[..., :3])), 0, 255).astype(np.uint8)


def test_a_series_that_does_not_show_a_level_takes_no_place_from_one_that_does() -> None:
    whole = make_stack(ramp, make_affines(11, 2.0, 4.5, centre=(2, 30, -40), size=(120, 90), **SAGITTAL), (120, 90))
    rows = 50  # which end above the lower levels
    upper = replace(whole, series_id=0, pixels=whole.pixels[:, :rows] // 2, shapes=np.tile([rows, 90], (11, 1)))
    alone, both = (list(level_cuts(stacks, spine(), 16, (0.8, 1.0, 0.5), 3)) for stacks in ([whole], [upper, whole]))
    assert [cut[:3] for cut in alone] == [cut[:3] for cut in both]
    assert any(cut.image.shape[0] == rows for *_, cut in both)  # the upper levels are taken from the first
    for (level, *_, one), (*_, other) in zip(alone, both, strict=True):
        if level == 4:
            np.testing.assert_array_equal(one.sample(16), other.sample(16))
            assert one.sample(16).any()
