"""From detections to the five levels of a study, and from these to severity rows. Coordinates are LPS mm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import CANAL_FROM_FORAMINA, study_canal
from lsdc_utils.detector.classes import (
    Detector,
    DetectorConfig,
    class_table,
)
from lsdc_utils.detector.detections import (
    Detections,
    detect,
)
from lsdc_utils.metric import WEIGHTS
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVELS, SEVERITIES, SIDES, row_id

FLOOR = 1e-7  # score of a class that no detection has, as published
LEVEL_STEP = (35.0, 9.0)  # mm between the centres of neighbouring lumbar discs, mean and spread
SAME_PLACE = 4.0  # mm: spread of the kernel by which detections support each other
NEAR = 8.0  # mm: detections this close to a level's point speak for it
FORAMEN_SPREAD = 6.0  # mm: how far a foramen may lie from where the canal's points let it be expected, one sigma
RECESS_REACH = 25.0  # mm from a level's canal point within which its recesses lie
POWERS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # of evidence, among which `fit_power` chooses


@dataclass(frozen=True)
class LevelEvidence:
    """What the detections of one study say of one level, or one side of it.

    A row is read off it by a config's `power`: log p is the mean of the detections' log scores, weighted by their
    evidence to that power. Its temperature is a matter of the blend.
    """

    row_id: str
    study_id: int
    level: str
    side: str  # left, right, or '' for the canal
    point: np.ndarray  # (3,) LPS mm
    confidence: float
    evidence: np.ndarray  # (k,) sum of scores of each detection
    scores: np.ndarray  # (k, 3) by severity


def level_evidence(
    detections: Detections, study_id: int, config: DetectorConfig, canal: pd.DataFrame | None = None
) -> list[LevelEvidence]:
    """What a study's detections say of each level; nothing of levels without evidence. `canal`: the study's points."""
    if not len(detections.scores):
        return []
    if config.scheme == "sided":
        return _find_sided(detections, study_id, config)
    canal = None if canal is None or canal.empty else canal.set_index("level")[["X", "Y", "Z"]].astype(float)
    find = {"scs": _find_canal, "nfn": _find_foramina, "ss": _find_recesses}[config.condition]
    found = []
    for side, level, point, evidence, scores in find(detections, canal):
        condition = "_".join(filter(None, (side, GROUPS[config.condition].base)))
        name = row_id(study_id, condition, level)
        found.append(LevelEvidence(name, study_id, level, side or "", point, float(scores.max()), evidence, scores))
    return found


def _find_sided(detections: Detections, study_id: int, config: DetectorConfig) -> list[LevelEvidence]:
    """As published: the highest confidence of each class over all slices and views."""
    table = class_table(config)
    found = []
    best = detections.scores.max(axis=0)
    for (condition, level), numbers in table.groupby(["condition", "level"], sort=False).groups.items():
        place = detections.points[detections.scores[:, numbers].max(axis=1).argmax()]
        name, side = row_id(study_id, condition, level), CONDITIONS[condition].side or ""
        scores = best[numbers][None]
        found.append(LevelEvidence(name, study_id, level, side, place, float(scores.max()), scores.sum(axis=1), scores))
    return found


def evidence_tables(found: Sequence[LevelEvidence], power: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows (row_id, three natural probabilities) and points (study_id, level, side, X, Y, Z, confidence) of findings.

    side is left, right, or '' for the canal; X, Y, Z are LPS mm.
    """
    names = ["study_id", "level", "side", "X", "Y", "Z", "confidence"]
    kinds = dict.fromkeys([*"XYZ", "confidence"], float) | {"study_id": "int64", "level": "str", "side": "str"}
    points = pd.DataFrame([(f.study_id, f.level, f.side, *f.point, f.confidence) for f in found], columns=names)
    rows = pd.DataFrame(read_severities(found, power), columns=SEVERITIES, dtype=float)
    rows.insert(0, "row_id", pd.Series([f.row_id for f in found], dtype="str"))
    return rows, points.astype(kinds)  # of empty tables too


def read_severities(found: Sequence[LevelEvidence], power: float) -> np.ndarray:
    """Natural probabilities (n, 3) of findings: their detections' geometric mean, weighted by evidence to a power."""
    logits = np.empty((len(found), len(SEVERITIES)))
    for target, one in zip(logits, found, strict=True):
        weight = (one.evidence / max(one.evidence.max(), FLOOR)) ** power if len(one.evidence) > 1 else np.ones(1)
        target[:] = weight @ np.log(np.maximum(one.scores, FLOOR)) / weight.sum()
    rows = np.exp(logits - logits.max(axis=1, keepdims=True))
    return rows / rows.sum(axis=1, keepdims=True)


def fit_power(found: Sequence[LevelEvidence], labels: pd.DataFrame) -> float:
    """The power, of `POWERS`, whose rows have the least official log loss against labels (row_id, severity) at their
    own best temperature; that of `DetectorConfig` where there is only one severity."""
    severity = labels[labels["severity"] >= 0].set_index("row_id")["severity"]
    found = [one for one in found if one.row_id in severity.index]
    truth = severity.loc[[one.row_id for one in found]].to_numpy(dtype=int)
    if len(np.unique(truth)) < 2:
        return DetectorConfig.power
    weight = WEIGHTS[truth] / WEIGHTS[truth].sum()

    def loss(temperature: float, logs: np.ndarray) -> float:
        """Weighted log loss of the weighted rows."""
        logits = temperature * logs + np.log(WEIGHTS)
        logits -= logits.max(axis=1, keepdims=True)
        return -weight @ (logits[np.arange(len(truth)), truth] - np.log(np.exp(logits).sum(axis=1)))

    def least(power: float) -> float:
        """The loss at the best temperature."""
        logs = np.log(np.maximum(read_severities(found, power), FLOOR))
        return minimize_scalar(loss, bounds=(0.05, 5), args=(logs,), method="bounded").fun

    return min(POWERS, key=least)


def cross_read(found: Sequence[LevelEvidence], labels: pd.DataFrame, seed: int, parts: int = 5) -> np.ndarray:
    """Natural probabilities (n, 3) of findings, each study's read by a power fitted to studies of the other parts."""
    studies = np.array(sorted({one.study_id for one in found}))
    part_of = dict(zip(studies, np.random.default_rng(seed).permutation(len(studies)) % parts, strict=True))
    part = np.array([part_of[one.study_id] for one in found])
    rows = np.empty((len(found), len(SEVERITIES)))
    for number in np.unique(part):
        power = fit_power([one for one, p in zip(found, part, strict=True) if p != number], labels)
        rows[part == number] = read_severities([one for one, p in zip(found, part, strict=True) if p == number], power)
    return rows


def assign_levels(points: np.ndarray, evidence: np.ndarray, expected: pd.DataFrame | None = None) -> np.ndarray:
    """One candidate for each of the five levels, chosen together: (5,) indices into points (m, 3).

    evidence (m, 5): how much each detection speaks for each level. Detections close to each other in the sagittal
    plane support each other; going down the spine, neighbours lie `LEVEL_STEP` apart. `expected`: canal points (index
    level) that pull each level to its height. Solved exactly by dynamic programming.
    """
    # The strongest few of each level are enough to choose from.
    few = np.unique(np.argsort(-evidence, axis=0, kind="stable")[:40])
    plane = points[:, 1:]
    apart = np.linalg.norm(plane[few, None] - plane[None], axis=2)
    support = np.exp(-0.5 * (apart / SAME_PLACE) ** 2) @ evidence
    gain = np.log(support + 1e-3)
    if expected is not None:
        for number, level in enumerate(LEVELS):
            if level in expected.index:
                gain[:, number] -= 0.5 * ((points[few, 2] - expected.loc[level, "Z"] - 5) / 10) ** 2
    steps = np.linalg.norm(plane[few, None] - plane[None, few], axis=2)
    move = -0.5 * ((steps - LEVEL_STEP[0]) / LEVEL_STEP[1]) ** 2
    move[points[few, None, 2] - points[None, few, 2] < 8] = -50  # the next level lies below
    total, back = gain[:, 0], []
    for number in range(1, len(LEVELS)):
        through = total[:, None] + move
        back.append(through.argmax(axis=0))
        total = through.max(axis=0) + gain[:, number]
    chosen = [int(total.argmax())]
    for step in reversed(back):
        chosen.append(int(step[chosen[-1]]))
    return few[np.array(chosen[::-1])]


def _sagittal_levels(detections: Detections, index: np.ndarray, expected: pd.DataFrame | None) -> list[tuple]:
    """(level, point, evidence, severity scores) of the five levels from detections `index` on sagittal slices.

    `expected`: points (index level) where the canal lets each level be; where they are five, they name the levels.
    """
    points, scores = detections.points[index], detections.scores[index].reshape(len(index), len(LEVELS), 3)
    evidence = scores.sum(axis=2)
    if expected is not None and len(expected) == len(LEVELS):
        chosen = nearby_levels(points, evidence, expected)
    else:
        chosen = assign_levels(points, evidence, expected)
    found = []
    for number, centre in enumerate(points[chosen]):
        apart = np.linalg.norm(points[:, 1:] - centre[1:], axis=1)
        weight = evidence[:, number] * np.exp(-0.5 * (apart / SAME_PLACE) ** 2)
        place = (weight[:, None] * points).sum(axis=0) / weight.sum()
        near = np.flatnonzero(np.linalg.norm(points[:, 1:] - place[1:], axis=1) <= NEAR)
        if len(near) and evidence[near, number].max() >= 1e-3:
            found.append((LEVELS[number], place, evidence[near, number], scores[near, number]))
    return found


def nearby_levels(points: np.ndarray, evidence: np.ndarray, expected: pd.DataFrame) -> np.ndarray:
    """For each level the detection that speaks for it most, near where it is `expected`: (5,) indices into points."""
    plane = points[:, 1:]
    apart = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    support = np.exp(-0.5 * (apart / SAME_PLACE) ** 2) @ evidence
    off = np.linalg.norm(plane[:, None] - expected.loc[list(LEVELS), ["Y", "Z"]].to_numpy()[None], axis=2)
    return (np.log(support + 1e-3) - 0.5 * (off / FORAMEN_SPREAD) ** 2).argmax(axis=0)


def _find_canal(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    return [(None, *found) for found in _sagittal_levels(detections, np.arange(len(detections.scores)), None)]


def _find_foramina(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    """Left and right by patient x: more to the left than the canal at that height, or than the slices' middle."""
    x, z = detections.points[:, 0], detections.points[:, 2]
    if canal is None:
        middle, expected = np.full(len(x), (x.min() + x.max()) / 2), None
    else:
        line = canal.sort_values("Z")
        middle = np.interp(z, line["Z"], line["X"])
        expected = canal.copy()
        expected[["Y", "Z"]] -= CANAL_FROM_FORAMINA[[LEVELS.index(level) for level in canal.index]]
    found = []
    for side, mine in zip(SIDES, (x > middle, x < middle), strict=True):
        index = np.flatnonzero(mine)
        found += [(side, *level) for level in _sagittal_levels(detections, index, expected)] if len(index) else []
    return found


def _find_recesses(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    """Level by the detection's slice, side by patient x against its canal point; nothing without canal points."""
    if canal is None:
        return []
    points, found = detections.points, []
    for level, centre in zip(canal.index, canal.to_numpy(), strict=True):
        here = detections.levels == LEVELS.index(level)
        here &= np.linalg.norm(points - centre, axis=1) <= RECESS_REACH
        for side, sign in zip(SIDES, (1, -1), strict=True):
            index = np.flatnonzero(here & (sign * (points[:, 0] - centre[0]) > 0))
            if len(index):
                scores = detections.scores[index]
                evidence = scores.sum(axis=1)
                place = (evidence[:, None] ** 2 * points[index]).sum(axis=0) / (evidence**2).sum()
                found.append((side, level, place, evidence, scores))
    return found


def find_levels(
    detector: Detector,
    studies: Iterable[tuple[int, Sequence[Stack]]],
    canal: pd.DataFrame | None = None,
    tell: Callable[[str], None] = print,
) -> list[LevelEvidence]:
    """Findings of one detector in studies, given as (study id, stacks). `canal`: points of any number of studies."""
    found = []
    for number, (study_id, stacks) in enumerate(studies, start=1):
        here = None if canal is None else canal[canal["study_id"] == study_id]
        found += level_evidence(detect(detector, stacks, here), study_id, detector.config, here)
        if number % 20 == 0:
            tell(f"{detector.config.condition}: {number} studies looked at")
    return found


def grade_condition(
    detectors: Sequence[Detector], study_id: int, stacks: Sequence[Stack], canal: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and points of a study by detectors of one condition, averaged over them (the folds, for test studies).

    `canal`: the study's canal points. Where only some detectors have evidence, the mean is over those; points are
    weighted by confidence.
    """
    each = [evidence_tables(find_levels(one, [(study_id, stacks)], canal), one.config.power) for one in detectors]
    rows, points = (pd.concat(parts, ignore_index=True) for parts in zip(*each, strict=True))
    return _mean_rows(rows), _mean_points(points)


def grade_study(
    detectors: dict[str, Sequence[Detector]], study_id: int, stacks: Sequence[Stack]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows and points (with their condition group) of one study by the detectors of all groups, and its canal points.

    The canal's detector goes first: its points tell the others side and level. Where it finds nothing, as without a
    sagittal T2, the canal points come from the foramina.
    """
    rows, points = {}, {}
    rows["scs"], points["scs"] = grade_condition(detectors["scs"], study_id, stacks)
    rows["nfn"], points["nfn"] = grade_condition(detectors["nfn"], study_id, stacks, points["scs"])
    canal = study_canal(points["scs"], points["nfn"])
    rows["ss"], points["ss"] = grade_condition(detectors["ss"], study_id, stacks, canal)
    named = [table.assign(condition=key) for key, table in points.items()]
    return pd.concat(rows.values(), ignore_index=True), pd.concat(named, ignore_index=True), canal


def _mean_rows(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.groupby("row_id", sort=False, as_index=False)[list(SEVERITIES)].mean()


def _mean_points(points: pd.DataFrame) -> pd.DataFrame:
    """Confidence-weighted mean of each study's points of one level and side."""
    weighted = points.assign(**{axis: points[axis] * points["confidence"] for axis in "XYZ"}, n=1)
    keys = ["study_id", "level", "side"]
    mean = weighted.groupby(keys, sort=False, dropna=False)[["X", "Y", "Z", "confidence", "n"]].sum().reset_index()
    mean[["X", "Y", "Z"]] = mean[["X", "Y", "Z"]].div(mean["confidence"], axis=0)
    return mean.assign(confidence=mean["confidence"] / mean["n"]).drop(columns="n")
