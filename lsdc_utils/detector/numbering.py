"""Whether the count of lumbar vertebrae is in doubt: how high the disc S1/S2 is, measured in the pixels.

A transitional vertebra leaves a disc at S1/S2, or a low one at L5/S1. Of the second nothing is said: a degenerate disc
is as low, and frequent. Heights are widened by the pixels, thin discs most, so `DOUBTFUL` is of measured ones.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.vocabulary import PLANES

ALONG, ACROSS = np.arange(-10, 10.01, 0.25), np.arange(-6, 6.01, 1.5)  # mm: a strip at right angles to the disc
TURNS = np.deg2rad(np.arange(-18, 18.1, 6))  # of the strip; that with most contrast is used
REACH = 6.0  # mm off the middle of S1/S2 in which the disc lies; beside it there is bone
OFF = 11.0  # mm off the middle of the spine up to which a slice counts
FAINT, QUANTILE = 6.0, 0.35  # grey values by which a disc is darker than bone; of the heights, some are too large
# Heights of S1/S2 as a share of the step from L5/S1: where 4 % of 160 phantom spines without a transitional vertebra
# lie, and 63 % of 57 with a remnant disc at S1/S2; tests/proofs/numbering.py measures others. Above, it is no disc.
DOUBTFUL = (0.175, 0.3)


def remnant(stacks: Sequence[Stack], x: float, middles: np.ndarray) -> float:
    """Height of the disc S1/S2 as a share of the step from L5/S1, over all sagittal slices near the middle of the
    spine; NaN where it cannot be measured. x: mm to the left; middles (2, 2): y and z of L5/S1 and S1/S2, or NaN."""
    heights, (upper, middle) = [], middles
    for stack in stacks if np.isfinite([x, *upper, *middle]).all() else ():
        off = np.abs(geometry.plane_distances(stack.affines, np.array([[x, *upper]]))[:, 0])
        for index in np.flatnonzero((off <= OFF) & (PLANES[stack.series_type] == "sagittal")):
            heights.append(_height(_profile(stack.pixels[index], stack.affines[index], x, middle, upper - middle)))
    known = np.array(heights)[np.isfinite(heights)]
    return float(np.quantile(known, QUANTILE) / np.linalg.norm(upper - middle)) if len(known) else np.nan


def _profile(image: np.ndarray, affine: np.ndarray, x: float, middle: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Grey values `ALONG` a strip through a disc, in the direction `up` (y, z) or turned to the greatest contrast."""
    angles = np.arctan2(up[1], up[0]) + TURNS
    axis = np.stack([np.cos(angles), np.sin(angles)], axis=-1)[:, None, None]
    places = middle + ALONG[:, None, None] * axis + ACROSS[:, None] * (axis[..., ::-1] * (-1, 1))
    points = np.concatenate([np.full((*places.shape[:-1], 1), x), places], axis=-1).reshape(-1, 3)
    at = geometry.to_pixels(affine, points)[:, :2].astype(np.float32).reshape(len(TURNS), -1, 2)
    profiles = np.median(cv2.remap(image, at, None, cv2.INTER_LINEAR).reshape(places.shape[:-1]), axis=2)
    return profiles[profiles.std(axis=1).argmax()]


def _height(profile: np.ndarray) -> float:
    """Height in mm of what is darker than the bone above and below, at half its depth; NaN if nothing is."""
    inside = np.abs(ALONG) <= REACH
    dark = inside * (np.median(profile[~inside]) - profile)
    return np.ptp(ALONG[dark >= 0.5 * dark.max()]) + 0.25 if dark.max() >= FAINT else np.nan
