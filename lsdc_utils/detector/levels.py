"""From the places of a study's levels to severity rows and points, by each detector and by all. Coordinates: LPS mm."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.chain import NOTHING
from lsdc_utils.detector.classes import Detector, DetectorConfig, class_table
from lsdc_utils.detector.detections import Detections, detect
from lsdc_utils.detector.localiser import Localiser
from lsdc_utils.detector.numbering import remnant
from lsdc_utils.detector.places import find_places
from lsdc_utils.detector.spine import CANAL_COLUMNS, CONFIDENCES, canal_points, find_discs, join_discs, name_discs
from lsdc_utils.metric import WEIGHTS
from lsdc_utils.vocabulary import GROUPS, SEVERITIES, row_id

FLOOR = 1e-7  # score of a class that no detection has, as published
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
    scores: np.ndarray  # (k, 3) by severity; the evidence of a detection is their sum
    level_confidence: float = np.nan  # probability that the study's levels are named right; NaN: not known


def level_evidence(
    seen: Sequence[Detections], study_id: int, configs: Sequence[DetectorConfig], canal: pd.DataFrame | None = None
) -> list[list[LevelEvidence]]:
    """For each detector its evidence by level and side; what it has none for is absent.

    seen: detections of one study by each detector of a condition, with their configs. Sides and points are those of all
    detections together, levels those of the study's canal points, `canal`.
    """
    result = [[] for _ in seen]
    if canal is None or canal.empty:
        return result
    joined = Detections(*(np.concatenate([getattr(one, field.name) for one in seen]) for field in fields(Detections)))
    config, sure = configs[0], float(canal["level_confidence"].min())
    places = find_places(joined, config, canal.set_index("level"))
    detector = np.repeat(np.arange(len(seen)), [len(one.scores) for one in seen])
    for k, ((side, level), point) in enumerate(zip(places.names, places.points, strict=True)):
        row = row_id(study_id, "_".join(filter(None, (side, GROUPS[config.condition].base))), level)
        for number, found in enumerate(result):
            scores = joined.scores[(places.owner == k) & (detector == number)]
            if scores.sum(axis=1).max(initial=0) >= NOTHING:
                found.append(LevelEvidence(row, study_id, level, side, point, scores, sure))
    return result


def evidence_tables(levels: Sequence[LevelEvidence], power: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows (row_id, three natural probabilities) and points: study_id, level, side, X, Y, Z (LPS mm), `CONFIDENCES`."""
    lines = [(e.study_id, e.level, e.side, *e.point, float(e.scores.max()), e.level_confidence) for e in levels]
    points = pd.DataFrame(lines, columns=list(CANAL_COLUMNS)).astype(CANAL_COLUMNS)  # of empty tables too
    rows = pd.DataFrame(read_severities(levels, power), columns=SEVERITIES, dtype=float)
    rows.insert(0, "row_id", pd.Series([e.row_id for e in levels], dtype="str"))
    return rows, points


def read_severities(levels: Sequence[LevelEvidence], power: float) -> np.ndarray:
    """Natural probabilities (n, 3): the geometric mean of a level's detections, weighted by evidence to a power."""
    logits = np.empty((len(levels), len(SEVERITIES)))
    for target, level in zip(logits, levels, strict=True):
        evidence = level.scores.sum(axis=1)
        weight = (evidence / max(evidence.max(), FLOOR)) ** power if len(evidence) > 1 else np.ones(1)
        target[:] = weight @ np.log(np.maximum(level.scores, FLOOR)) / weight.sum()
    return softmax(logits, axis=1)


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
        """The official log loss of rows by their log probabilities (n, 3) times a temperature."""
        return -weight @ log_softmax(temperature * logs + np.log(WEIGHTS), axis=1)[np.arange(len(truth)), truth]

    def lowest_loss(power: float) -> float:
        """The loss of a power at its best temperature."""
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


@dataclass(frozen=True)
class Scheme:
    """What the classes of detectors mean, and how their detections are made and read."""

    class_table: Callable = class_table
    detect: Callable = detect
    level_evidence: Callable = level_evidence


def grade_condition(
    detectors: Sequence[Detector], study_id: int, stacks: Sequence[Stack],
    canal: pd.DataFrame | None = None, scheme: Scheme = Scheme(),
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Rows and points of a study by detectors of one condition (the folds, for test studies).

    Levels and points come once, from the detections of all. Rows are read by each detector at these levels; they and
    the confidence are the mean over the detectors that have evidence. `canal`: the study's canal points.
    """
    seen = [scheme.detect(detector, stacks, canal) for detector in detectors]
    found = scheme.level_evidence(seen, study_id, [detector.config for detector in detectors], canal)
    tables = [evidence_tables(own, one.config.power) for own, one in zip(found, detectors, strict=True)]
    rows, points = (pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True))
    weighted = points.assign(**{axis: points[axis] * points["confidence"] for axis in "XYZ"}, n=1)
    keys = ["study_id", "level", "side"]
    mean = weighted.groupby(keys, sort=False, as_index=False)[[*"XYZ", *CONFIDENCES, "n"]].sum(min_count=1)
    mean[[*"XYZ"]] = mean[[*"XYZ"]].div(mean["confidence"], axis=0)
    mean[[*CONFIDENCES]] = mean[[*CONFIDENCES]].div(mean.pop("n"), axis=0)
    return rows.groupby("row_id", sort=False, as_index=False)[list(SEVERITIES)].mean(), mean


def grade_study(
    localisers: Sequence[Localiser], detectors: dict[str, Sequence[Detector]], study_id: int, stacks: Sequence[Stack],
    scheme: Scheme = Scheme(),
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """Rows and points of one study by the detectors of all groups; condition: the group of a point, scs for the canal.

    The localisers go first, since their points tell where to look, and name levels. Without any (the published method)
    the canal points are those of its canal detectors. s1_s2, of the localisers' canal points: see `numbering.remnant`.
    """
    seen = [find_discs(network, stacks) for network in localisers]
    canal = canal_points(seen, study_id, [network.calibration for network in localisers]) if seen else None
    keys = [key for key in ("scs", "nfn", "ss") if key in detectors]
    rows, points = zip(*(grade_condition(detectors[key], study_id, stacks, canal, scheme) for key in keys), strict=True)
    points = dict(zip(keys, points, strict=True))
    if canal is not None:
        height = remnant(stacks, canal["X"].median(), name_discs(join_discs(seen))[1][-2:])
        points = {"scs": canal.assign(s1_s2=height)} | {key: points[key] for key in keys if key != "scs"}
    named = [table.assign(condition=key) for key, table in points.items()]
    return pd.concat(rows, ignore_index=True), pd.concat(named, ignore_index=True)
