"""From detections to the five levels of a study, and from these to severity rows. Coordinates are LPS mm."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar

from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import CANAL_FROM_FORAMINA, study_canal
from lsdc_utils.detector.classes import Detector, DetectorConfig
from lsdc_utils.detector.detections import Detections, detect
from lsdc_utils.metric import WEIGHTS
from lsdc_utils.vocabulary import GROUPS, LEVELS, SEVERITIES, SIDES, row_id

FLOOR = 1e-7  # score of a class that no detection has, as published
LEVEL_STEP = (35.0, 9.0)  # mm between the centres of neighbouring lumbar discs, mean and spread
SAME_PLACE = 4.0  # mm: spread of the kernel by which detections support each other
NEAR = 8.0  # mm: detections this close to a level's point are evidence for it
FORAMEN_SPREAD = 6.0  # mm: how far a foramen may lie from where the canal's points let it be expected, one sigma
RECESS_REACH = 25.0  # mm from a level's canal point within which its recesses lie
POWERS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # of evidence, among which `fit_power` chooses


@dataclass(frozen=True)
class LevelEvidence:
    """The detections of one study that are evidence for one level, or for one side of it.

    A row's log p is the mean of the detections' log scores, weighted by their evidence to a config's `power`. The blend
    fits the temperature.
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
    """A study's evidence by level and side; levels without evidence are absent. `canal`: the study's canal points."""
    if not len(detections.scores):
        return []
    canal = None if canal is None or canal.empty else canal.set_index("level")[["X", "Y", "Z"]].astype(float)
    if config.condition == "scs":
        found = _sagittal_levels("", detections, np.arange(len(detections.scores)), None)
    else:
        found = {"nfn": _find_foramina, "ss": _find_recesses}[config.condition](detections, canal)
    result = []
    for side, level, point, evidence, scores in found:
        row = row_id(study_id, "_".join(filter(None, (side, GROUPS[config.condition].base))), level)
        result.append(LevelEvidence(row, study_id, level, side, point, float(scores.max()), evidence, scores))
    return result


def evidence_tables(levels: Sequence[LevelEvidence], power: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows (row_id, three natural probabilities) and points (study_id, level, side, X, Y, Z in LPS mm, confidence)."""
    names = ["study_id", "level", "side", "X", "Y", "Z", "confidence"]
    kinds = dict.fromkeys([*"XYZ", "confidence"], float) | {"study_id": "int64", "level": "str", "side": "str"}
    points = pd.DataFrame([(e.study_id, e.level, e.side, *e.point, e.confidence) for e in levels], columns=names)
    rows = pd.DataFrame(read_severities(levels, power), columns=SEVERITIES, dtype=float)
    rows.insert(0, "row_id", pd.Series([e.row_id for e in levels], dtype="str"))
    return rows, points.astype(kinds)  # of empty tables too


def read_severities(levels: Sequence[LevelEvidence], power: float) -> np.ndarray:
    """Natural probabilities (n, 3): the geometric mean of a level's detections, weighted by evidence to a power."""
    logits = np.empty((len(levels), len(SEVERITIES)))
    for target, level in zip(logits, levels, strict=True):
        several = len(level.evidence) > 1
        weight = (level.evidence / max(level.evidence.max(), FLOOR)) ** power if several else np.ones(1)
        target[:] = weight @ np.log(np.maximum(level.scores, FLOOR)) / weight.sum()
    rows = np.exp(logits - logits.max(axis=1, keepdims=True))
    return rows / rows.sum(axis=1, keepdims=True)


def fit_power(levels: Sequence[LevelEvidence], labels: pd.DataFrame) -> float:
    """The power, of `POWERS`, whose rows have the lowest official log loss against labels (row_id, severity), each
    power at its best temperature; the default of `DetectorConfig` if all labels have the same severity."""
    severity = labels[labels["severity"] >= 0].set_index("row_id")["severity"]
    levels = [level for level in levels if level.row_id in severity.index]
    truth = severity.loc[[level.row_id for level in levels]].to_numpy(dtype=int)
    if len(np.unique(truth)) < 2:
        return DetectorConfig.power
    weight = WEIGHTS[truth] / WEIGHTS[truth].sum()

    def loss(temperature: float, logs: np.ndarray) -> float:
        logits = temperature * logs + np.log(WEIGHTS)
        logits -= logits.max(axis=1, keepdims=True)
        return -weight @ (logits[np.arange(len(truth)), truth] - np.log(np.exp(logits).sum(axis=1)))

    def lowest_loss(power: float) -> float:
        logs = np.log(np.maximum(read_severities(levels, power), FLOOR))
        return minimize_scalar(loss, bounds=(0.05, 5), args=(logs,), method="bounded").fun

    return min(POWERS, key=lowest_loss)


def cross_read(levels: Sequence[LevelEvidence], labels: pd.DataFrame, seed: int, parts: int = 5) -> np.ndarray:
    """Natural probabilities (n, 3); the power for each study is fitted to studies of the other parts."""
    studies = np.array(sorted({level.study_id for level in levels}))
    part_of = dict(zip(studies, np.random.default_rng(seed).permutation(len(studies)) % parts, strict=True))
    part = np.array([part_of[level.study_id] for level in levels])
    rows = np.empty((len(levels), len(SEVERITIES)))
    for number in np.unique(part):
        power = fit_power([levels[i] for i in np.flatnonzero(part != number)], labels)
        rows[part == number] = read_severities([levels[i] for i in np.flatnonzero(part == number)], power)
    return rows


def assign_levels(points: np.ndarray, evidence: np.ndarray, expected: pd.DataFrame | None = None) -> np.ndarray:
    """One candidate for each of the five levels, chosen together: (5,) indices into points (m, 3).

    evidence (m, 5): how much each detection is evidence for each level. Detections close to each other in the sagittal
    plane support each other; going down the spine, neighbours lie `LEVEL_STEP` apart. `expected`: canal points (index
    level) that pull each level to its height. Solved exactly by dynamic programming.
    """
    # The strongest few of each level are enough to choose from.
    few = np.unique(np.argsort(-evidence, axis=0, kind="stable")[:40])
    plane = points[:, 1:]
    gain = np.log(_support(plane, evidence)[few] + 1e-3)
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


def nearby_levels(points: np.ndarray, evidence: np.ndarray, expected: pd.DataFrame) -> np.ndarray:
    """For each level the detection with most evidence near where it is `expected`: (5,) indices into points."""
    plane = points[:, 1:]
    off = np.linalg.norm(plane[:, None] - expected.loc[list(LEVELS), ["Y", "Z"]].to_numpy()[None], axis=2)
    return (np.log(_support(plane, evidence) + 1e-3) - 0.5 * (off / FORAMEN_SPREAD) ** 2).argmax(axis=0)


def _support(plane: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """Evidence (m, 5) at each place (m, 2) of the sagittal plane, summed over the detections near it."""
    apart = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    return np.exp(-0.5 * (apart / SAME_PLACE) ** 2) @ evidence


def _sagittal_levels(
    side: str, detections: Detections, index: np.ndarray, expected: pd.DataFrame | None
) -> list[tuple]:
    """(side, level, point, evidence, severity scores) of the levels from detections `index` on sagittal slices.

    `expected`: points (index level) where the canal's points let each level be; if they are five, they name the levels.
    """
    points, scores = detections.points[index], detections.scores[index].reshape(len(index), len(LEVELS), 3)
    evidence = scores.sum(axis=2)
    if expected is not None and len(expected) == len(LEVELS):
        chosen = nearby_levels(points, evidence, expected)
    else:
        chosen = assign_levels(points, evidence, expected)
    result = []
    for number, centre in enumerate(points[chosen]):
        apart = np.linalg.norm(points[:, 1:] - centre[1:], axis=1)
        weight = evidence[:, number] * np.exp(-0.5 * (apart / SAME_PLACE) ** 2)
        place = (weight[:, None] * points).sum(axis=0) / weight.sum()
        near = np.flatnonzero(np.linalg.norm(points[:, 1:] - place[1:], axis=1) <= NEAR)
        if len(near) and evidence[near, number].max() >= 1e-3:
            result.append((side, LEVELS[number], place, evidence[near, number], scores[near, number]))
    return result


def _find_foramina(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    """Left and right by patient x: more to the left than the canal at that height, or than the slices' middle."""
    x, z = detections.points[:, 0], detections.points[:, 2]
    if canal is None:
        middle, expected = np.full(len(x), (x.min() + x.max()) / 2), None
    else:
        line, expected = canal.sort_values("Z"), canal.copy()
        middle = np.interp(z, line["Z"], line["X"])
        expected[["Y", "Z"]] -= CANAL_FROM_FORAMINA[[LEVELS.index(level) for level in canal.index]]
    result = []
    for side, own in zip(SIDES, (x > middle, x < middle), strict=True):
        if own.any():
            result += _sagittal_levels(side, detections, np.flatnonzero(own), expected)
    return result


def _find_recesses(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    """Level by the detection's slice, side by patient x against its canal point; nothing without canal points."""
    points, result = detections.points, []
    for level, centre in zip(canal.index, canal.to_numpy(), strict=True) if canal is not None else ():
        near = np.linalg.norm(points - centre, axis=1) <= RECESS_REACH
        near &= detections.levels == LEVELS.index(level)
        for side, sign in zip(SIDES, (1, -1), strict=True):
            index = np.flatnonzero(near & (sign * (points[:, 0] - centre[0]) > 0))
            if len(index):
                scores = detections.scores[index]
                evidence = scores.sum(axis=1)
                place = (evidence[:, None] ** 2 * points[index]).sum(axis=0) / (evidence**2).sum()
                result.append((side, level, place, evidence, scores))
    return result


def detect_study(detector: Detector, stacks: Sequence[Stack], canal: pd.DataFrame | None = None) -> Detections:
    """Detections of one study, made as the detector's scheme says. `canal`: the study's canal points."""
    return (detector.scheme.detect or detect)(detector, stacks, canal)


def study_evidence(
    detector: Detector, detections: Detections, study_id: int, canal: pd.DataFrame | None = None
) -> list[LevelEvidence]:
    """Evidence of one study by level and side, read as the detector's scheme says. `canal`: its canal points."""
    return (detector.scheme.level_evidence or level_evidence)(detections, study_id, detector.config, canal)


def grade_condition(
    detectors: Sequence[Detector], study_id: int, stacks: Sequence[Stack], canal: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and points of a study by detectors of one condition, averaged over them (the folds, for test studies).

    `canal`: the study's canal points. The mean is over the detectors that have evidence; points are weighted by
    confidence.
    """
    tables = []
    for detector in detectors:
        found = study_evidence(detector, detect_study(detector, stacks, canal), study_id, canal)
        tables.append(evidence_tables(found, detector.config.power))
    rows, points = (pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True))
    weighted = points.assign(**{axis: points[axis] * points["confidence"] for axis in "XYZ"}, n=1)
    keys = ["study_id", "level", "side"]
    mean = weighted.groupby(keys, sort=False, as_index=False)[[*"XYZ", "confidence", "n"]].sum()
    mean[[*"XYZ"]] = mean[[*"XYZ"]].div(mean["confidence"], axis=0)
    mean["confidence"] /= mean.pop("n")
    return rows.groupby("row_id", sort=False, as_index=False)[list(SEVERITIES)].mean(), mean


def grade_study(
    detectors: dict[str, Sequence[Detector]], study_id: int, stacks: Sequence[Stack]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows and points (with their condition group) of one study by the detectors of all groups, and its canal points.

    The canal's detector goes first: its points give the others side and level. In studies where it finds nothing, such
    as those without a sagittal T2, the canal points come from the foramina.
    """
    rows, points = {}, {}
    rows["scs"], points["scs"] = grade_condition(detectors["scs"], study_id, stacks)
    rows["nfn"], points["nfn"] = grade_condition(detectors["nfn"], study_id, stacks, points["scs"])
    canal = study_canal(points["scs"], points["nfn"])
    rows["ss"], points["ss"] = grade_condition(detectors["ss"], study_id, stacks, canal)
    named = [table.assign(condition=key) for key, table in points.items()]
    return pd.concat(rows.values(), ignore_index=True), pd.concat(named, ignore_index=True), canal
