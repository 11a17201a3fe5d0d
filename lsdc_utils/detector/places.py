"""Where the graded places of a study lie, by the detections of all detectors of a condition together; LPS mm.

Levels come from the study's named canal points, see `spine`; a detector tells where at its level the place lies.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from lsdc_utils.detector.classes import DetectorConfig
from lsdc_utils.detector.detections import Detections
from lsdc_utils.detector.images import FORAMEN_REACH
from lsdc_utils.vocabulary import LEVELS, SIDES

SAGITTAL_REACH = 12.0  # mm in the plane from where a level's canal or foramen is expected to what is detected of it
RECESS_REACH = 25.0  # mm from a level's canal point within which its recesses lie
PAIR = (16.0, 5.0)  # mm between the two recesses of a level across the body, mean and spread
LEAST_PAIR = 6.0  # mm; closer detections are of one recess
PAIR_TILT = 5.0  # mm from front to back between them, one sigma
PAIR_OFFSET = 6.0  # mm of their middle off the canal's point of another series, one sigma
SLICE_SHARE = 0.01  # product of two scores at which a slice's own pair counts as much as those of other slices


@dataclass(frozen=True)
class Places:
    """Where the graded places of a study lie, and which detections belong to each: none to two of them."""

    names: list[tuple[str, str]]  # side and level
    points: np.ndarray  # (n, 3) LPS mm
    owner: np.ndarray  # (m,) number of the place that each detection belongs to, -1: none


def find_places(detections: Detections, config: DetectorConfig, canal: pd.DataFrame) -> Places:
    """The places of one condition: each level and side that has detections, at the mean of these by squared score.

    canal: the study's canal points (index level). Foramina of a side lie beside the canal at their height, where the
    way from foramina to canal lets each level's be expected (a bowed spine's slice shows foramina of one level and the
    canal of another); a recess is of the level that its slice shows, and on the side of the middle of the pair there.
    """
    centres, points = canal[[*"XYZ"]].astype(float), detections.points
    numbers = np.array([LEVELS.index(level) for level in centres.index])
    if config.condition == "ss":
        sides = np.sign(points[:, 0] - recess_middles(detections, canal))
        off = np.linalg.norm(points[:, None] - centres.to_numpy(), axis=2)
        off[(detections.levels[:, None] != numbers) | (off > RECESS_REACH)] = np.inf
    else:
        expected, sides, far = centres[["Y", "Z"]].to_numpy(), np.zeros(len(points)), np.zeros(len(points), bool)
        if config.condition == "nfn":
            expected = expected - np.array(config.canal_from_foramina)[numbers]
            line = centres.sort_values("Z")
            aside = points[:, 0] - np.interp(points[:, 2], line["Z"], line["X"])
            far, sides = np.clip(np.abs(aside), *FORAMEN_REACH) != np.abs(aside), np.sign(aside)
        off = np.linalg.norm(points[:, None, 1:] - expected, axis=2)
        off[(off > SAGITTAL_REACH) | far[:, None]] = np.inf
    near = np.where(np.isfinite(off.min(axis=1)), off.argmin(axis=1), -1)
    names, means, owner = [], [], np.full(len(points), -1)
    strength = detections.scores.sum(axis=1)
    for side, sign in (("", 0),) if config.condition == "scs" else zip(SIDES, (1, -1), strict=True):
        for k, level in enumerate(centres.index):
            if (own := (near == k) & (sides == sign)).any():
                weight = strength[own, None] ** 2
                owner[own] = len(names)
                names.append((side, level))
                means.append((weight * points[own]).sum(axis=0) / weight.sum())
    return Places(names, np.array(means).reshape(-1, 3), owner)


def recess_middles(detections: Detections, canal: pd.DataFrame) -> np.ndarray:
    """Patient x (m,) of the middle between the two recesses on each detection's slice; NaN where it has no level.

    It is that of the pairs of detections on the slice that could be its two recesses, by their scores; where these say
    little, of the pairs on other slices of the level, then of the study. The canal's points are only a start: patients
    move between series, and in two real studies these lay 5.7 mm to the right to 3.1 mm to the left of the pair.
    """
    start = np.full(len(LEVELS), np.nan)
    start[[LEVELS.index(level) for level in canal.index]] = canal["X"].astype(float)
    slices, own = np.unique(detections.slices, return_inverse=True)
    level_of, sums = np.full(len(slices), -1), np.zeros((len(slices), 2))  # of weights times offset, and of weights
    level_of[own] = detections.levels
    strength = detections.scores.sum(axis=1)
    for k in np.flatnonzero(level_of >= 0):
        here = np.flatnonzero(own == k)
        x, y = detections.points[here, 0], detections.points[here, 1]
        offset = (x[:, None] + x) / 2 - start[level_of[k]]
        gap = x[:, None] - x
        off = ((gap - PAIR[0]) / PAIR[1]) ** 2 + ((y[:, None] - y) / PAIR_TILT) ** 2 + (offset / PAIR_OFFSET) ** 2
        weight = np.where(gap > LEAST_PAIR, strength[here, None] * strength[here] * np.exp(-0.5 * off), 0.0)
        sums[k] = (weight * offset).sum(), weight.sum()

    def mean(some: np.ndarray, usual: float) -> np.ndarray:
        """The mean offset of sums (..., 2), which is `usual` where they weigh little."""
        return (some[..., 0] + SLICE_SHARE * usual) / (some[..., 1] + SLICE_SHARE)

    middles, of_study = np.full(len(slices), np.nan), mean(sums.sum(axis=0), 0.0)
    for number in set(level_of[level_of >= 0].tolist()):
        here = level_of == number
        middles[here] = start[number] + mean(sums[here], mean(sums[here].sum(axis=0), of_study))
    return middles[own]
