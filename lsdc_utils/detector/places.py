"""Where the levels of a study lie, by the detections of all detectors of a condition together; LPS mm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lsdc_utils.detector.chain import NEAR, SAME_PLACE, TEMPERATURES, Chain, calibrate, chain
from lsdc_utils.detector.classes import DetectorConfig
from lsdc_utils.detector.detections import Detections
from lsdc_utils.vocabulary import CONDITIONS, LEVELS, SIDES

RECESS_REACH = 25.0  # mm from a level's canal point within which its recesses lie
PAIR = (16.0, 5.0)  # mm between the two recesses of a level across the body, mean and spread
LEAST_PAIR = 6.0  # mm; closer detections are of one recess
PAIR_TILT = 5.0  # mm from front to back between them, one sigma
PAIR_OFFSET = 6.0  # mm of their middle off the canal's point of another series, one sigma
SLICE_SHARE = 0.01  # product of two scores at which a slice's own pair counts as much as those of other slices


@dataclass(frozen=True)
class Places:
    """Where the levels of a study lie, and which detections belong to each: none to two of them."""

    names: list[tuple[str, str]]  # side and level
    points: np.ndarray  # (n, 3) LPS mm
    owner: np.ndarray  # (m,) number of the place that each detection belongs to, -1: none
    sure: np.ndarray  # (n,) level confidence


def _chain_of(
    detections: Detections, index: np.ndarray, detectors: int = 1, expected: pd.DataFrame | None = None
) -> Chain:
    """The chain of candidates among the detections `index` on sagittal slices; evidence is the mean of `detectors`."""
    scores = detections.scores[index].reshape(len(index), len(LEVELS), 3)
    return chain(detections.points[index], scores.sum(axis=2) / detectors, expected)


def _find_sagittal(
    joined: Detections, seen: Sequence[Detections], configs: Sequence[DetectorConfig], canal: pd.DataFrame | None
) -> Places:
    """The levels of the canal, or of the foramina of each side, which is that of the canal at that height or of the
    slices' middle. The foramina's levels are near where the canal's points let them be, and as sure as these; without
    canal points they are chosen by themselves."""
    middle, expected, names, points, sure = None, None, [], [], []
    owner = np.full(len(joined.points), -1)
    if configs[0].condition == "nfn" and canal is not None:
        line, expected = canal[[*"XYZ"]].astype(float).sort_values("Z"), canal[[*"XYZ"]].astype(float)
        middle = np.interp(joined.points[:, 2], line["Z"], line["X"])
        offsets = np.array(configs[0].canal_from_foramina)
        expected[["Y", "Z"]] -= offsets[[LEVELS.index(level) for level in canal.index]]
    for side, own in _sides(configs[0].condition, joined.points[:, 0], middle).items():
        places, level_of, chance = _chosen_levels(joined, seen, configs, np.flatnonzero(own), expected)
        for number in np.flatnonzero(np.isfinite(places[:, 0])):
            owner[level_of == number] = len(names)
            names.append((side, LEVELS[number]))
            points.append(places[number])
            sure.append(chance if expected is None else _sureness(canal))
    return Places(names, np.array(points).reshape(-1, 3), owner, np.array(sure))


def _sides(condition: str, x: np.ndarray, middle: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Which detections (m,) bool at patient x (m,) belong to each side, '' for the canal. middle: x (m,) between the
    sides, by default the middle of all detections."""
    if condition == "scs":
        return {"": np.full(len(x), True)}
    middle = (x.min() + x.max()) / 2 if middle is None else middle
    return dict(zip(SIDES, (x > middle, x < middle), strict=True))


def _chosen_levels(
    joined: Detections, seen: Sequence[Detections], configs: Sequence[DetectorConfig],
    index: np.ndarray, expected: pd.DataFrame | None,
) -> tuple[np.ndarray, np.ndarray, float]:  # fmt: skip
    """Points (5, 3) of the levels, NaN for a missing one, chosen from the detections `index` of `joined`; the level
    (m,) that each detection belongs to, -1: none; and the level confidence: the mean over the detectors, so that one
    that counts the levels in another way takes its share of it."""
    found = _chain_of(joined, index, len(seen), expected)
    points, scores = joined.points[index], joined.scores[index].reshape(len(index), len(LEVELS), 3)
    places = np.full((len(LEVELS), 3), np.nan)
    for number, candidate in enumerate(found.best()):
        if candidate >= 0:
            apart = np.linalg.norm(points[:, 1:] - found.plane[candidate], axis=1)
            weight = scores[:, number].sum(axis=1) * np.exp(-0.5 * (apart / SAME_PLACE) ** 2)
            places[number] = (weight[:, None] * points).sum(axis=0) / weight.sum()
    off = np.nan_to_num(np.linalg.norm(points[:, None, 1:] - places[None, :, 1:], axis=2), nan=np.inf)
    level_of = np.full(len(joined.points), -1)
    level_of[index] = np.where(off.min(axis=1) <= NEAR, off.argmin(axis=1), -1)
    detector, chances = np.repeat(np.arange(len(seen)), [len(one.scores) for one in seen])[index], []
    for number, (temperature, ceiling) in enumerate(config.calibration for config in configs):
        alone = _chain_of(joined, index[detector == number], 1, expected)
        chances.append(ceiling * alone.chance(places[:, 1:], temperature))
    return places, level_of, float(np.mean(chances))


def _sureness(canal: pd.DataFrame) -> float:
    """The level confidence of a study's canal points; NaN where it is not known, as of readers' points."""
    return canal.get("level_confidence", pd.Series(dtype=float)).min()


def _find_recesses(
    joined: Detections, seen: Sequence[Detections], configs: Sequence[DetectorConfig], canal: pd.DataFrame | None
) -> Places:
    """Level by the detection's slice, side by the middle of the pair there; nothing without canal points."""
    names, places, owner = [], [], np.full(len(joined.points), -1)
    if canal is None:
        return Places(names, np.empty((0, 3)), owner, np.empty(0))
    side_of, strength = np.sign(joined.points[:, 0] - recess_middles(joined, canal)), joined.scores.sum(axis=1)
    for level, centre in canal[[*"XYZ"]].astype(float).iterrows():
        near = np.linalg.norm(joined.points - centre.to_numpy(), axis=1) <= RECESS_REACH
        near &= joined.levels == LEVELS.index(level)
        for side, sign in zip(SIDES, (1, -1), strict=True):
            if (own := near & (side_of == sign)).any():
                weight = strength[own, None] ** 2
                owner[own] = len(names)
                names.append((side, level))
                places.append((weight * joined.points[own]).sum(axis=0) / weight.sum())
    return Places(names, np.array(places).reshape(-1, 3), owner, np.full(len(names), _sureness(canal)))


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


FINDERS = {"scs": _find_sagittal, "nfn": _find_sagittal, "ss": _find_recesses}


def calibrate_levels(
    seen: Mapping[int, Detections], labels: pd.DataFrame, config: DetectorConfig
) -> tuple[float, float]:
    """How sure a detector's choice of levels is, see `chain.calibrate`, from its detections of held-out studies.

    seen: study id -> detections; labels: those of the detector's condition, with places. A choice is right if the
    label point nearest to each of its points is that of its level. Foramina count as one chain a side.
    """
    chances, right = [], []
    for (study, _), truth in labels.dropna(subset=[*"XYZ"]).groupby(["study_id", "condition"]):
        side = CONDITIONS[truth["condition"].iloc[0]].side or ""
        detections = seen.get(study)
        if detections is None or not len(detections.points) or len(truth) < 2:
            continue
        own = np.flatnonzero(_sides(config.condition, detections.points[:, 0])[side])
        if not len(own):  # e.g. a series of one slice
            continue
        found = _chain_of(detections, own)
        chosen = found.best()
        plane = np.where(chosen[:, None] >= 0, found.plane[chosen], np.nan)
        known = np.isfinite(plane[:, 0]) & np.isin(LEVELS, truth["level"])
        off = np.linalg.norm(plane[known, None] - truth[["Y", "Z"]].to_numpy(dtype=float), axis=2)
        right.append((truth["level"].to_numpy()[off.argmin(axis=1)] == np.array(LEVELS)[known]).all())
        chances.append([found.chance(plane, temperature) for temperature in TEMPERATURES])
    if not right:
        return config.calibration
    return calibrate(np.array(chances), np.array(right))
