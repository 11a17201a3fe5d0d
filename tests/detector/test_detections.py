"""Prediction by a detector: what it is shown, and that a mirrored patient is found mirrored."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from toy_spine import canal_points, config, level_centre, toy_study

from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import AXIAL_REACH, axial_levels
from lsdc_utils.detector.classes import Detector, class_table
from lsdc_utils.detector.detections import detect, forward
from lsdc_utils.detector.images import network_inputs, shown, wanted
from lsdc_utils.detector.training import quiet_ultralytics
from lsdc_utils.vocabulary import AXIAL, GROUPS, LEVELS


def mirror(stack: Stack) -> Stack:
    """The mirrored patient: x changes sign. Axial images change columns, sagittal series the order of slices."""
    affines, pixels = stack.affines.copy(), stack.pixels
    if stack.series_type == AXIAL:
        pixels = pixels[:, :, ::-1]
        last = stack.affines[:, :3, 3] + stack.affines[:, :3, 0] * (pixels.shape[2] - 1)
        affines[:, :3, 3] = last * [-1, 1, 1]
    else:
        affines[:, 0, 3] *= -1
        affines, pixels = affines[::-1], pixels[::-1]
    return replace(stack, pixels=np.ascontiguousarray(pixels), affines=affines)


def test_channels_run_from_medial_to_lateral():
    stack, _ = toy_study("nfn")
    settings = config("nfn")
    for canal, other in ((canal_points(), canal_points()), (canal_points(shift=3), canal_points(shift=-3))):
        seen, mirrored = network_inputs(stack, settings, canal), network_inputs(mirror(stack), settings, other)
        aside = np.abs(stack.affines[:, 0, 3] - canal["X"].mean()) > 3  # the middle slice has no lateral neighbour
        np.testing.assert_array_equal(seen[aside], mirrored[::-1][aside])
        plain = shown(stack, settings, canal)
        left, right = np.flatnonzero(stack.affines[:, 0, 3] == 20)[0], np.flatnonzero(stack.affines[:, 0, 3] == -20)[0]
        np.testing.assert_array_equal(seen[left], plain[[left - 1, left, left + 1]])
        np.testing.assert_array_equal(seen[right], plain[[right + 1, right, right - 1]])


@pytest.mark.parametrize("condition", GROUPS)
def test_a_mirrored_patient_is_found_mirrored(condition, tmp_path):
    """With flipped views, an untrained network too finds in the mirrored patient what it finds in the patient."""
    quiet_ultralytics(tmp_path)
    from ultralytics.nn.tasks import DetectionModel

    settings = config(condition, views=((1.0, False),) if condition == "nfn" else ((1.0, False), (1.0, True)))
    torch.manual_seed(1)
    model = DetectionModel("yolov10n.yaml", nc=len(class_table(settings)), verbose=False).eval()
    stack, _ = toy_study(condition)
    there = Detector(model, settings, 0, {})
    seen = detect(there, [stack], canal_points(shift=2.0))
    mirrored = detect(there, [mirror(stack)], canal_points(shift=-2.0))
    assert len(seen.scores) == len(mirrored.scores) > 0

    def ordered(points: np.ndarray) -> np.ndarray:
        """Places in an order that does not depend on that of slices and views."""
        return points[np.lexsort(points.round(2).T)]

    np.testing.assert_allclose(ordered(seen.points * [-1, 1, 1]), ordered(mirrored.points), atol=0.02)
    np.testing.assert_allclose(np.sort(seen.scores, axis=0), np.sort(mirrored.scores, axis=0), atol=1e-5)


def test_slices_of_two_series_have_numbers_of_their_own(tmp_path):
    quiet_ultralytics(tmp_path)
    from ultralytics.nn.tasks import DetectionModel

    settings, (stack, _) = config("ss", views=((1.0, False),)), toy_study("ss")
    there = Detector(DetectionModel("yolov10n.yaml", nc=3, verbose=False).eval(), settings, 0, {})
    few = {key: value[:7] for key, value in vars(stack).items() if isinstance(value, np.ndarray)}
    both = [stack, replace(stack, series_id=stack.series_id + 1, **few)]
    looked = sum(int(wanted(one, settings, canal_points()).sum()) for one in both)
    for order in (both, both[::-1]):
        seen = detect(there, order, canal_points())
        assert len(set(seen.slices)) == looked > len(set(detect(there, order[:1], canal_points()).slices))
        assert (pd.Series(seen.levels).groupby(seen.slices).nunique() == 1).all()


def test_a_flipped_view_of_the_foramina_is_the_view_itself(tmp_path):
    quiet_ultralytics(tmp_path)
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(1)
    there = Detector(DetectionModel("yolov10n.yaml", nc=3, verbose=False).eval(), config("nfn"), 0, {})
    inputs = network_inputs(toy_study("nfn")[0], config("nfn"), canal_points())[:2]
    for plain, flipped in zip(forward(there, inputs, 1.0, False), forward(there, inputs, 1.0, True), strict=True):
        np.testing.assert_array_equal(plain, flipped)


def test_nothing_is_looked_for_without_canal_points():
    for canal in (None, canal_points().head(0)):
        seen = detect(Detector(torch.nn.Identity(), config("scs"), 0, {}), [toy_study("scs")[0]], canal)
        assert seen.points.shape == (0, 3) and seen.scores.shape == (0, 3)


def test_axial_slices_take_the_level_whose_point_is_nearest_to_their_plane():
    stack, _ = toy_study("ss")
    z = stack.affines[:, 2, 3]
    apart = np.abs(z[:, None] - [level_centre(level)[2] for level in LEVELS])
    expected = np.where(apart.min(axis=1) <= AXIAL_REACH, apart.argmin(axis=1), -1)
    assert set(expected) == {-1, 0, 1, 2, 3, 4}
    np.testing.assert_array_equal(axial_levels(stack, canal_points()), expected)
    np.testing.assert_array_equal(axial_levels(stack, canal_points().iloc[::-1]), expected)
    without = np.where(np.isin(expected, [1, 3]), -1, expected)
    np.testing.assert_array_equal(axial_levels(stack, canal_points().iloc[[0, 2, 4]]), without)
    assert (axial_levels(stack, canal_points().head(0)) == -1).all()
