"""Named canal points of a study, from the discs that localisers of one or several folds found; LPS mm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.chain import LUMBAR, SAME_PLACE, STATES, TEMPERATURES, Chain, calibrate, chain
from lsdc_utils.detector.localiser import CALIBRATION, MAPS, Localiser, detect_discs, disc_places
from lsdc_utils.vocabulary import LEVELS, PLANES, T2

WITHOUT_LOWEST = 0.5  # of the confidence where L5/S1 was not found
SAME_HEIGHT, DISAGREE = 10.0, 0.5  # mm by which T1 and T2 may differ, and what is left of the confidence where they do
EXPECTED = 0.05  # weight of the place where the canal is expected, against squared scores of detections
CANAL_SPREAD = 6.0  # mm: how far the canal may lie from where it is expected behind its disc, one sigma
FAINT = 0.01  # scores below this are clutter
CONFIDENCES = ("confidence", "level_confidence")  # columns of points: highest score; whether the levels are named right
CANAL_COLUMNS = {"study_id": "int64", "level": "str", "side": "str"} | dict.fromkeys([*"XYZ", *CONFIDENCES], float)


@dataclass(frozen=True)
class Discs:
    """What one localiser found on all sagittal slices of a study: n detections."""

    points: np.ndarray  # (n, 3) LPS mm
    scores: np.ndarray  # (n, maps)
    on_t2: np.ndarray  # (n,) bool: whether the slice is of a T2 series
    slices: int  # how many were looked at
    floor: float = -np.inf  # z in mm of the lowest image's lower edge


def find_discs(network: Localiser, stacks: Sequence[Stack]) -> Discs:
    """All detections of a study on its sagittal series."""
    parts = [(np.empty((0, 3)), np.empty((0, len(MAPS))), np.empty(0, bool), 0, np.inf)]
    for stack in stacks:
        if PLANES[stack.series_type] == "sagittal":
            points, scores = (values.reshape(-1, values.shape[-1]) for values in detect_discs(network, stack))
            kept = scores.max(axis=1) >= FAINT
            t2 = np.full(kept.sum(), stack.series_type == T2)
            edges = geometry.to_patient(stack.affines, (stack.shapes[:, ::-1] - 1) * (0.5, 1.0))[:, 2]
            parts.append((points[kept], scores[kept], t2, len(stack.pixels), np.median(edges)))
    *found, slices, floors = zip(*parts, strict=True)
    return Discs(*map(np.concatenate, found), sum(slices), min(floors))


def join_discs(seen: Sequence[Discs]) -> Discs:
    """The detections of several localisers as those of one."""
    parts = (np.concatenate([getattr(one, name) for one in seen]) for name in ("points", "scores", "on_t2"))
    return Discs(*parts, sum(one.slices for one in seen), min(one.floor for one in seen))


def evidence(discs: Discs) -> np.ndarray:
    """Evidence (n, 8) of detections for each of `chain.STATES`, as a share of the slices."""
    disc, l5_s1, s1_s2 = (discs.scores[:, MAPS.index(name)] for name in ("disc", "l5_s1", "s1_s2"))
    table = np.repeat((disc * (1 - l5_s1))[:, None], len(STATES), axis=1)
    table[:, STATES.index("l5_s1")] = disc * l5_s1
    table[:, STATES.index("s1_s2")] = s1_s2
    return table / max(discs.slices, 1)


def name_discs(discs: Discs) -> tuple[Chain, np.ndarray]:
    """A study's chain of candidates, and the middles (8, 2) of the discs `STATES`, y and z in mm; NaN: not found."""
    found = chain(discs.points, evidence(discs))
    best = found.best()
    middles = np.full((len(STATES), 2), np.nan)
    middles[best >= 0] = found.plane[best[best >= 0]]
    return found, middles


def canal_points(
    seen: Sequence[Discs], study_id: int, calibrations: Sequence[tuple[float, float]] = (CALIBRATION,)
) -> pd.DataFrame:
    """The canal points of a study, `CANAL_COLUMNS`: levels named once, from the detections of all localisers together.

    Behind the middle of a level's disc its canal is expected; the point is moved to what was detected of the canal
    there, on T2 if there is one, since patients move between series. level_confidence: the mean over the localisers of
    the probability of these names, so that one that counts in another way takes its share of it.
    """
    joined = join_discs(seen)
    middles = name_discs(joined)[1][LUMBAR]
    chances, sure = [], 1.0 if _agree(joined) else DISAGREE
    for one, (temperature, ceiling) in zip(seen, calibrations, strict=True):
        chances.append(sure * ceiling * _chance(chain(one.points, evidence(one)), middles, temperature, one.floor))
    found = np.flatnonzero(np.isfinite(middles[:, 0]))
    names = [LEVELS[k] for k in found]
    disc, canal = (joined.scores[:, MAPS.index(name)] for name in ("disc", "canal"))
    canal = canal * joined.on_t2 if joined.on_t2.any() else canal
    near = _near(joined, middles[found]) * disc
    x = near @ joined.points[:, 0] / np.maximum(near.sum(axis=1), 1e-9)
    expected = disc_places(np.column_stack([x, middles[found]]), names, 1.0)
    weight = _near(joined, expected[:, 1:], CANAL_SPREAD) * canal**2
    points = (weight @ joined.points + EXPECTED * expected) / (weight.sum(axis=1, keepdims=True) + EXPECTED)
    places = zip(names, points, near, strict=True)
    lines = [(study_id, level, "", *point, own.max(), np.mean(chances)) for level, point, own in places]
    return pd.DataFrame(lines, columns=list(CANAL_COLUMNS)).astype(CANAL_COLUMNS)


def _chance(found: Chain, middles: np.ndarray, temperature: float, floor: float) -> float:
    """`Chain.chance`, halved where there is nothing to count from: L5/S1 was not found, or the images end less than a
    level below it (`floor`: their lower edge), so that it may be another disc."""
    there = np.flatnonzero(np.isfinite(middles[:, 1]))
    steps = there[-1] - there[0] if len(there) else 0
    step = (middles[there[0], 1] - middles[there[-1], 1]) / steps if steps else 0.0
    seen = middles[-1, 1] - floor > step  # also False where it is NaN
    return found.chance(middles, temperature) * (1.0 if seen else WITHOUT_LOWEST)


def _agree(discs: Discs) -> bool:
    """Whether T1 and T2 alone show the lumbar discs at the same heights, where both show two or more."""
    own = ((discs.points[t2], discs.scores[t2], discs.on_t2[t2]) for t2 in (discs.on_t2, ~discs.on_t2))
    parts = [Discs(*part, discs.slices // 2) for part in own]
    apart = np.subtract(*(name_discs(part)[1][LUMBAR, 1] for part in parts))
    return not (np.isfinite(apart).sum() > 1 and abs(np.nanmedian(apart)) > SAME_HEIGHT)


def _near(discs: Discs, places: np.ndarray, spread: float = SAME_PLACE) -> np.ndarray:
    """How near (k, n) detections lie to places (k, 2) in the sagittal plane, 1 at best; spread: mm."""
    apart = np.linalg.norm(discs.points[None, :, 1:] - places[:, None], axis=2)
    return np.exp(-0.5 * (apart / spread) ** 2)


def calibrate_levels(seen: Mapping[int, Discs], canal: pd.DataFrame) -> tuple[float, float]:
    """How sure a localiser's names are, see `chain.calibrate`, from its detections of held-out studies.

    canal: the readers' canal points (study_id, level, X, Y, Z). Names are right if the reader's point nearest to each
    level's place is that of its level.
    """
    chances, right = [], []
    for study, truth in canal.groupby("study_id"):
        if study not in seen or len(truth) < 2:
            continue
        found, discs = name_discs(seen[study])
        middles = discs[LUMBAR]
        known = np.isfinite(middles[:, 0]) & np.isin(LEVELS, truth["level"])
        if not known.any():
            continue
        truth = truth.sort_values("Z", ascending=False)
        read = disc_places(truth[[*"XYZ"]].to_numpy(dtype=float), list(truth["level"]))[:, 1:]
        off = np.linalg.norm(middles[known, None] - read, axis=2)
        right.append((truth["level"].to_numpy()[off.argmin(axis=1)] == np.array(LEVELS)[known]).all())
        chances.append([_chance(found, middles, temperature, seen[study].floor) for temperature in TEMPERATURES])
    return calibrate(np.array(chances), np.array(right)) if right else CALIBRATION
