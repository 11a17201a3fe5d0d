"""The height of S1/S2 in images of a known one, and nothing where it cannot be measured."""

from dataclasses import replace

import numpy as np
import pytest

from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector import numbering
from lsdc_utils.detector.numbering import DOUBTFUL, remnant
from lsdc_utils.vocabulary import AXIAL, T1, T2

SIDE, STEP = 160, 30.0  # pixels of an image of 1 mm a pixel; mm from L5/S1 to S1/S2
UPPER = np.array([0.0, 10.0])  # y and z of L5/S1, mm


def spine(height: float, tilt: float = 0.0, kind: str = T1) -> tuple[Stack, np.ndarray]:
    """Five sagittal slices of bone, crossed by a disc `STEP` mm below L5/S1, and the middles of both discs."""
    down = np.array([np.sin(np.deg2rad(tilt)), -np.cos(np.deg2rad(tilt))])
    middle = UPPER + STEP * down
    rows, columns = np.mgrid[:SIDE, :SIDE]
    off = np.abs((columns - 80 - middle[0]) * down[0] + (80 - rows - middle[1]) * down[1])
    image = 150 - 90 * np.clip(height / 2 + 0.5 - off, 0, 1)
    affines = np.tile(np.array([[0, 0, 1, 0], [1, 0, 0, -80], [0, -1, 0, 80], [0, 0, 0, 1]], float), (5, 1, 1))
    affines[:, 0, 3] = np.linspace(-8, 8, 5)
    pixels = np.tile(np.rint(image).astype(np.uint8), (5, 1, 1))
    shapes, numbers = np.full((5, 2), SIDE, np.int32), np.arange(5, dtype=np.int32)
    return Stack(1, 2, kind, pixels, shapes, affines, numbers, numbers), np.array([UPPER, middle])


@pytest.mark.parametrize("tilt", [-40.0, 0.0, 25.0])
@pytest.mark.parametrize("height", [3.0, 6.0, 9.0])
def test_the_height_is_measured_whatever_the_tilt_of_the_sacrum(height, tilt):
    stack, middles = spine(height, tilt)
    assert remnant([stack], 0.0, middles) == pytest.approx(height / STEP, abs=0.75 / STEP)


def test_a_disc_between_free_and_fused_is_doubtful_and_a_thin_one_is_not():
    for height, doubtful in ((2.0, False), (4.0, False), (6.0, True), (8.0, True)):
        stack, middles = spine(height)
        assert (DOUBTFUL[0] < remnant([stack], 0.0, middles) < DOUBTFUL[1]) == doubtful, height


def test_bone_without_a_disc_and_places_that_were_not_found_have_no_height():
    stack, middles = spine(6.0)
    nothing = replace(stack, pixels=np.full_like(stack.pixels, 150))
    assert np.isnan(remnant([nothing], 0.0, middles)) and np.isnan(remnant([], 0.0, middles))
    assert np.isnan(remnant([stack], 0.0, np.array([UPPER, [np.nan, np.nan]])))
    assert np.isnan(remnant([stack], np.nan, middles))
    assert np.isnan(remnant([replace(stack, series_type=AXIAL)], 0.0, middles))


def test_slices_that_show_something_else_do_not_decide():
    stack, middles = spine(4.0, kind=T2)
    odd = spine(10.0)[0]
    stack.pixels[:2] = odd.pixels[:2]
    assert remnant([stack], 0.0, middles) < DOUBTFUL[0]
    assert len(numbering.ALONG) == 81 and numbering.ALONG[40] == 0
