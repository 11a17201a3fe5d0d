"""Named canal points of a study, from the discs that localisers of one or several folds found; LPS mm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.chain import LUMBAR, SAME_PLACE, STATES, TEMPERATURES, Chain, calibrate, chain
from lsdc_utils.detector.localiser import MAPS, Localiser, detect_discs
from lsdc_utils.vocabulary import LEVELS, PLANES, T2

FAINT = 0.01  # scores below this are no detection
CANAL_COLUMNS = ("study_id", "level", "side", *"XYZ", "confidence", "level_confidence")


@dataclass(frozen=True)
class Discs:
    """What one localiser found on all sagittal slices of a study: n detections."""

    points: np.ndarray  # (n, 3) LPS mm
    scores: np.ndarray  # (n, maps)
    on_t2: np.ndarray  # (n,) bool: whether the slice is of a T2 series
    slices: int  # how many were looked at


def find_discs(network: Localiser, stacks: Sequence[Stack]) -> Discs:
    """All detections of a study on its sagittal series."""
    parts = [(np.empty((0, 3)), np.empty((0, len(MAPS))), np.empty(0, bool), 0)]
    for stack in stacks:
        if PLANES[stack.series_type] == "sagittal":
            points, scores = (values.reshape(-1, values.shape[-1]) for values in detect_discs(network, stack))
            kept = scores.max(axis=1) >= FAINT
            t2 = np.full(kept.sum(), stack.series_type == T2)
            parts.append((points[kept], scores[kept], t2, len(stack.pixels)))
    *found, slices = zip(*parts, strict=True)
    return Discs(*map(np.concatenate, found), sum(slices))


def evidence(discs: Discs) -> np.ndarray:
    """Evidence (n, 8) of detections for each of `chain.STATES`, as a share of the slices."""
    disc, l5_s1, s1_s2 = (discs.scores[:, MAPS.index(name)] for name in ("disc", "l5_s1", "s1_s2"))
    table = np.repeat((disc * (1 - l5_s1))[:, None], len(STATES), axis=1)
    table[:, STATES.index("l5_s1")] = disc * l5_s1
    table[:, STATES.index("s1_s2")] = s1_s2
    return table / max(discs.slices, 1)


def name_levels(discs: Discs) -> tuple[Chain, np.ndarray]:
    """The chain of a study's candidates, and the places (5, 2) of its levels, y and z in mm, NaN for one not found."""
    found = chain(discs.points, evidence(discs))
    chosen = found.best()[LUMBAR]
    return found, np.where(chosen[:, None] >= 0, found.plane[chosen] if len(found.plane) else [[np.nan] * 2], np.nan)


def canal_points(
    seen: Sequence[Discs], study_id: int, calibrations: Sequence[tuple[float, float]] = ((1.0, 0.98),)
) -> pd.DataFrame:
    """The canal points of a study, `CANAL_COLUMNS`: levels named once, from the detections of all localisers together.

    A point is the mean of the detections near its level, by score: across the slices of those that show the canal, in
    the plane of those on T2 if there are any, since patients move between series. level_confidence: the mean over the
    localisers of the probability of these names, so that one that counts in another way takes its share of it; half of
    it where L5/S1, from which names are counted, was not found.
    """
    joined = Discs(*(np.concatenate([getattr(one, name) for one in seen]) for name in ("points", "scores", "on_t2")),
                   sum(one.slices for one in seen))  # fmt: skip
    _, places = name_levels(joined)
    chances = []
    for one, (temperature, ceiling) in zip(seen, calibrations, strict=True):
        chances.append(ceiling * chain(one.points, evidence(one)).chance(places, temperature))
    sure = np.mean(chances) * (1 if np.isfinite(places[-1, 0]) else 0.5)
    lines, disc = [], joined.scores[:, MAPS.index("disc")]
    shows = joined.scores[:, MAPS.index("canal")]
    for level, place in zip(LEVELS, places, strict=True):
        near = np.exp(-0.5 * (np.linalg.norm(joined.points[:, 1:] - place, axis=1) / SAME_PLACE) ** 2)
        if np.isnan(place[0]) or not (weight := near * disc).sum():
            continue
        own = weight * (joined.on_t2 if (weight * joined.on_t2).sum() > 0.1 * weight.sum() else 1)
        y, z = own @ joined.points[:, 1:] / own.sum()
        across = own * (shows + 1e-6) ** 2
        x = across @ joined.points[:, 0] / across.sum()
        lines.append((study_id, level, "", x, y, z, (near > 0.5) @ disc / max((near > 0.5).sum(), 1), sure))
    table = pd.DataFrame(lines, columns=list(CANAL_COLUMNS))
    return table.astype(
        dict.fromkeys([*"XYZ", *CANAL_COLUMNS[-2:]], float) | {"study_id": "int64", "level": "str", "side": "str"}
    )


def calibrate_levels(seen: Mapping[int, Discs], canal: pd.DataFrame) -> tuple[float, float]:
    """How sure a localiser's names are, see `chain.calibrate`, from its detections of held-out studies.

    canal: the readers' canal points (study_id, level, X, Y, Z). Names are right if the reader's point nearest to each
    level's place is that of its level.
    """
    chances, right = [], []
    for study, truth in canal.groupby("study_id"):
        if study not in seen or len(truth) < 2:
            continue
        found, places = name_levels(seen[study])
        known = np.isfinite(places[:, 0]) & np.isin(LEVELS, truth["level"])
        off = np.linalg.norm(places[known, None] - truth[["Y", "Z"]].to_numpy(dtype=float), axis=2)
        right.append((truth["level"].to_numpy()[off.argmin(axis=1)] == np.array(LEVELS)[known]).all())
        chances.append([found.chance(places, temperature) for temperature in TEMPERATURES])
    return calibrate(np.array(chances), np.array(right)) if right else (1.0, 0.98)
