"""Occlusion: what is hidden, and that a model which looks at one place is found to look there."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.classes import Detector, DetectorConfig
from lsdc_utils.detector.images import windows
from lsdc_utils.phantom.body import Body
from lsdc_utils.phantom.scanner import plan_series, render
from lsdc_utils.stress import occlusion
from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.inputs import study_input
from lsdc_utils.vit.model import VitConfig
from lsdc_utils.vocabulary import COLUMNS, LEVELS, SERIES_TYPES, SPINAL_CANAL, T2

CONFIG = VitConfig(size=16, spacing=(1.75, 1.75, 1.75), margin=4, slices=5, width=32, heads=2)


@pytest.fixture(scope="module")
def study() -> tuple[list[Stack], pd.DataFrame]:
    """Stacks of a body and its canal points."""
    rng = np.random.default_rng(2)
    body, stacks = Body.draw(rng, np.full(25, 0.2), slip=False, transitional=False), []
    for number, kind in enumerate(SERIES_TYPES):
        plan = plan_series(rng, body, kind)
        pixels = (render(body, plan, rng) >> 4).astype(np.uint8)
        shapes = np.tile(pixels.shape[1:], (len(pixels), 1)).astype(np.int32)
        numbers = np.arange(1, len(pixels) + 1, dtype=np.int32)
        stacks.append(Stack(1, number, kind, pixels, shapes, plan.affines, numbers, plan.blocks.astype(np.int32)))
    points = pd.DataFrame(body.points()[:5], columns=list("XYZ")).assign(level=LEVELS, study_id=1)
    points = points.assign(side="", confidence=1.0, condition="scs")
    return stacks, points


class Bright(torch.nn.Module):
    """Answers by the grey near the middle of each level's own T2 slices: the brighter, the more severe."""

    def __init__(self) -> None:
        super().__init__()
        self.config = CONFIG
        self.gain = torch.nn.Parameter(torch.tensor(0.05))

    def forward(self, images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        slot = [kind for kind, _ in SLOTS].index(SERIES_TYPES[1]) * CONFIG.slices
        seen = images[:, :, slot : slot + CONFIG.slices, 6:10, 6:10].mean(dim=(2, 3, 4))  # (B, 5)
        logits = torch.stack([torch.zeros_like(seen), self.gain * seen, torch.zeros_like(seen)], -1)
        return logits.log_softmax(-1).repeat(1, len(COLUMNS) // len(LEVELS), 1)


def test_a_ball_is_hidden_in_its_slices_grey():
    images = np.arange(2 * 9 * 9, dtype=np.uint8).reshape(2, 9, 9)
    places = np.zeros((2, 9, 9, 3))
    places[..., 0], places[..., 1], places[1, ..., 2] = 2 * np.arange(9), 2 * np.arange(9)[:, None], 50.0
    shown = occlusion.hidden(images, places, np.array([8.0, 8.0, 0.0]))
    inside = np.linalg.norm(places[0] - [8.0, 8.0, 0.0], axis=-1) <= occlusion.BALL
    assert (
        inside.sum() == 29 and (shown[0][inside] == 40).all() and np.array_equal(shown[0][~inside], images[0][~inside])
    )
    assert np.array_equal(shown[1], images[1])  # far away
    assert np.array_equal(occlusion.hidden(images, np.full_like(places, np.nan), np.zeros(3)), images)


def test_pixels_of_the_input_lie_where_the_squares_were_cut(study):
    stacks, points = study
    places = occlusion._pixel_places(stacks, points, CONFIG)
    seen = study_input(stacks, points, CONFIG)
    assert places.shape == (*seen["images"].shape, 3)
    assert np.array_equal(np.isnan(places).all(axis=(2, 3, 4)), np.isnan(seen["places"]))
    for level, centre in enumerate(points[list("XYZ")].to_numpy()):
        off = np.nanmin(np.linalg.norm(places[level] - centre, axis=-1))
        assert off < 4


def test_a_model_that_looks_at_the_canal_is_found_to_do_so(study):
    stacks, points = study
    place = points.loc[points["level"] == "l3_l4", list("XYZ")].to_numpy()[0]
    row = (SPINAL_CANAL, "l3_l4")
    looked = occlusion.attention(occlusion.look_vit(Bright(), stacks, points, row, place))
    assert looked["share"] > 3 * looked["chance"] and looked["hit"] == 1
    elsewhere = points.loc[points["level"] == "l1_l2", list("XYZ")].to_numpy()[0]
    blind = occlusion.look_vit(Bright(), stacks, points, row, elsewhere)
    assert blind["change"].max() < 1e-3  # that place is in other levels' squares


def test_a_detector_that_looks_at_the_canal_is_found_to_do_so_and_needs_canal_points(study, monkeypatch):
    """The detector's one detection lies at the place; its score is the grey there."""
    stacks, points = study
    place = points.loc[points["level"] == "l3_l4", list("XYZ")].to_numpy()[0]
    stack = next(stack for stack in stacks if stack.series_type == T2)
    settings = DetectorConfig("scs", (200.0, 120.0), (96, 64), True, 14.0)
    nearest = np.abs(geometry.plane_distances(stack.affines, place[None])[:, 0]).argmin()
    left, top, width, height = windows(stack, settings, points)[nearest]
    x, y, _ = geometry.to_pixels(stack.affines[nearest], place)
    spot = np.array([(x + 0.5 - left) / width, (y + 0.5 - top) / height])
    column, row = (spot * settings.size[::-1]).astype(int)

    def forward(detector, images, scale, flip):
        grey = images[:, 1, row - 1 : row + 2, column - 1 : column + 2].mean(axis=(1, 2)) / 255
        return np.tile(spot, (len(images), 1, 1)), np.repeat(grey[:, None, None], 3, axis=2)

    monkeypatch.setattr(occlusion, "forward", forward)
    network = Detector(torch.nn.Identity(), settings, 0, {})
    looked = occlusion.attention(occlusion.look_detector(network, stacks, points, place))
    assert looked["share"] > 3 * looked["chance"] and looked["hit"] == 1
    recesses = points.assign(side="left")
    for some, known in ((stacks, recesses), (stacks, points.head(0)), ([], points)):
        assert occlusion.look_detector(network, some, known, place).empty


def test_shuffled_weights_are_the_same_numbers_elsewhere():
    model = torch.nn.Linear(40, 30)
    mixed = occlusion.shuffled(model, 1)
    assert not torch.equal(mixed.weight, model.weight)
    assert torch.equal(mixed.weight.flatten().sort().values, model.weight.flatten().sort().values)
    assert torch.equal(mixed.weight, occlusion.shuffled(model, 1).weight)


def test_nothing_that_changes_tells_nothing():
    still = pd.DataFrame({"off": [0.0, 30.0], "change": 0.0})
    for changes in (still, occlusion.NOTHING):
        assert all(np.isnan(value) for value in occlusion.attention(changes).values())
    told = occlusion.attention(still.assign(change=[3.0, 1.0]))
    assert told == {"share": 0.75, "hit": 1.0, "chance": 0.5}
