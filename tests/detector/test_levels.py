"""From detections to levels, sides and severity rows."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from toy_spine import (
    canal_points,
    config,
    foramen_points,
    ideal,
    level_centre,
    no_detections,
    toy_labels,
    toy_points,
    toy_stack,
)

from lsdc_utils import metric
from lsdc_utils.detector.canal import study_canal
from lsdc_utils.detector.chain import chain
from lsdc_utils.detector.classes import CANAL_FROM_FORAMINA, Detector, DetectorConfig
from lsdc_utils.detector.levels import (
    LevelEvidence,
    cross_read,
    evidence_tables,
    fit_power,
    grade_study,
    level_evidence,
    read_severities,
)
from lsdc_utils.grading import localisation
from lsdc_utils.vocabulary import GROUPS, LEVELS, SEVERITIES, row_id


def noisy_evidence(studies: int, seed: int = 0) -> tuple[list[LevelEvidence], pd.DataFrame]:
    """Levels whose strongest detection tells the severity and whose weak ones do not, and their labels."""
    rng = np.random.default_rng(seed)
    levels, labels = [], []
    for study in range(1, studies + 1):
        for level in LEVELS:
            severity = int(rng.choice(3, p=[0.6, 0.25, 0.15]))
            scores = rng.uniform(0.01, 0.1, (6, 3))
            scores[0] = 0.1
            scores[0, severity if rng.random() < 0.9 else 0] = 0.7
            row = row_id(study, "spinal_canal_stenosis", level)
            levels.append(LevelEvidence(row, study, level, "", np.zeros(3), 0.7, scores.sum(axis=1), scores))
            labels.append((row, severity))
    return levels, pd.DataFrame(labels, columns=["row_id", "severity"])


def loss_of(rows: np.ndarray, labels: pd.DataFrame) -> float:
    weighted = metric.weight_rows(rows)
    truth = labels["severity"].to_numpy()
    return np.average(-np.log(weighted[np.arange(len(truth)), truth]), weights=metric.WEIGHTS[truth])


def test_evidence_is_read_by_the_power_that_fits():
    levels, labels = noisy_evidence(60)
    power = fit_power(levels, labels)
    assert power >= 2  # weak detections say nothing here
    fresh, truth = noisy_evidence(60, seed=1)
    assert loss_of(read_severities(fresh, power), truth) < loss_of(read_severities(fresh, 0.0), truth)
    np.testing.assert_allclose(read_severities(fresh, power).sum(axis=1), 1)
    assert fit_power(levels[:0], labels) == DetectorConfig.power
    assert fit_power(levels, labels.assign(severity=0)) == DetectorConfig.power


def test_no_study_takes_part_in_the_power_its_rows_are_read_by(monkeypatch):
    levels, labels = noisy_evidence(20)
    asked = []
    monkeypatch.setattr(
        "lsdc_utils.detector.levels.fit_power", lambda some, _: asked.append({f.study_id for f in some}) or len(asked)
    )
    rows = cross_read(levels, labels, seed=3)
    everyone = {level.study_id for level in levels}
    assert len(asked) == 5 and set.union(*(everyone - some for some in asked)) == everyone
    for power, some in enumerate(asked, start=1):
        own = [number for number, level in enumerate(levels) if level.study_id not in some]
        assert len(own) == 20
        np.testing.assert_array_equal(rows[own], read_severities([levels[number] for number in own], power))


def test_foramina_take_their_level_from_the_canal():
    """Where every detection is surest of the level below, the canal's points say otherwise."""
    severities = dict.fromkeys(toy_points("nfn"), 1)
    detections, settings = ideal("nfn", severities)
    scores = detections.scores.reshape(-1, 5, 3)
    slipped = replace(detections, scores=np.roll(scores, 1, axis=1).reshape(scores.shape[0], -1) + 0.02)
    canal = canal_points()
    canal[["Y", "Z"]] += np.array(CANAL_FROM_FORAMINA)
    levels = level_evidence([slipped], 1, [settings], canal)[0]
    assert len(levels) == 10
    for level in levels:
        assert np.abs(level.point[1:] - level_centre(level.level)[1:]).max() < 3, level.level


@pytest.mark.parametrize("condition", GROUPS)
def test_perfect_detections_give_perfect_rows_and_points(condition):
    rng = np.random.default_rng(3)
    severities = {key: int(rng.integers(3)) for key in toy_points(condition)}
    stack = toy_stack(condition, severities)
    detections, settings = ideal(condition, severities)
    canal = canal_points()
    if condition == "nfn":  # as the body has it: the canal's points lie behind and below the foramina's
        canal[["Y", "Z"]] += np.array(CANAL_FROM_FORAMINA)
    rows, points = evidence_tables(level_evidence([detections], 1, [settings], canal)[0], settings.power)
    labels = toy_labels(stack, condition, severities)
    both = rows.merge(labels, on="row_id")
    assert len(both) == len(labels) == len(rows)
    np.testing.assert_allclose(rows[list(SEVERITIES)].sum(axis=1), 1)
    assert (both[list(SEVERITIES)].to_numpy().argmax(axis=1) == both["severity"]).all()
    errors = localisation.point_errors(points, labels)
    assert errors["distance"].max() < 4
    assert (localisation.localisation(errors)["within_5_mm"] == 1).all()


@pytest.mark.parametrize("condition", ["nfn", "ss"])
def test_a_mirrored_study_exchanges_left_and_right(condition):
    severities = {key: int(key[0].startswith("left")) * 2 for key in toy_points(condition)}
    detections, settings = ideal(condition, severities)
    mirrored = replace(detections, points=detections.points * [-1, 1, 1])
    rows, mirror = (
        evidence_tables(level_evidence([d], 1, [settings], canal_points())[0], settings.power)[0].set_index("row_id")
        for d in (detections, mirrored)
    )
    for row in rows.index:
        other = row.replace("left", "*").replace("right", "left").replace("*", "right")
        np.testing.assert_allclose(rows.loc[row], mirror.loc[other], atol=1e-6)


def test_levels_are_assigned_once_in_anatomical_order():
    points = np.array([level_centre(level) for level in LEVELS])
    evidence = np.full((5, 5), 0.01) + 0.8 * np.eye(5)
    evidence[2] = [0.01, 0.5, 0.45, 0.01, 0.01]  # on its own, L3/L4 would rather be L2/L3
    order = np.array([3, 0, 4, 2, 1])
    for some in (np.arange(5), order):
        found = chain(points[some], evidence[some])
        assert some[found.index[found.best()]].tolist() == [0, 1, 2, 3, 4]


def test_no_evidence_no_rows():
    for condition in GROUPS:
        settings = config(condition)
        levels = level_evidence([no_detections(settings)], 1, [settings], canal_points())[0]
        rows, points = evidence_tables(levels, settings.power)
        assert rows.empty and points.empty and list(rows) == ["row_id", *SEVERITIES]
    severities = dict.fromkeys(toy_points("ss"), 0)
    detections, settings = ideal("ss", severities)
    assert level_evidence([detections], 1, [settings], None) == [[]]  # no canal points, no levels


def test_without_canal_detections_the_canal_follows_from_the_foramina(monkeypatch):
    """A study without sagittal T2: nothing for the canal, and still sides and levels for the recesses."""
    seen = {key: ideal(key, dict.fromkeys(toy_points(key), 1)) for key in ("nfn", "ss")}
    seen["scs"] = no_detections(config("scs")), config("scs")
    monkeypatch.setattr(
        "lsdc_utils.detector.levels.detect", lambda detector, stacks, canal: seen[detector.config.condition][0]
    )
    detectors = {key: [Detector(torch.nn.Identity(), seen[key][1], 0, {})] for key in GROUPS}
    rows, points, canal = grade_study(detectors, 1, [])
    assert set(points["condition"]) == {"nfn", "ss"}
    assert not rows["row_id"].str.contains("canal").any()
    assert len(rows) == 20
    np.testing.assert_allclose(canal["X"], 0, atol=1)
    shift = canal[["Y", "Z"]].to_numpy() - [level_centre(level)[1:] for level in canal["level"]]
    np.testing.assert_allclose(shift, CANAL_FROM_FORAMINA, atol=1)
    one_side = points[(points["condition"] == "nfn") & (points["side"] == "left")].drop(columns="condition")
    for foramina in (one_side, one_side.head(0)):
        assert study_canal(foramina.head(0), foramina, CANAL_FROM_FORAMINA).empty
        assert list(study_canal(foramina.head(0), foramina, CANAL_FROM_FORAMINA)) == list(one_side)


def test_only_studies_without_canal_points_take_them_from_their_foramina():
    nfn = pd.concat([foramen_points(1), foramen_points(2)])
    canal = study_canal(canal_points(1), nfn, CANAL_FROM_FORAMINA)
    assert list(canal) == list(canal_points(1)) and set(canal["side"]) == {""}
    pd.testing.assert_frame_equal(canal[canal["study_id"] == 1], canal_points(1))
    second = canal[canal["study_id"] == 2]
    assert list(second["level"]) == list(LEVELS)
    shift = second[["X", "Y", "Z"]].to_numpy() - [level_centre(level) for level in LEVELS]
    np.testing.assert_allclose(shift, np.c_[np.zeros(5), np.array(CANAL_FROM_FORAMINA)])
    assert study_canal(canal_points(1).head(0), foramen_points(2).head(0), CANAL_FROM_FORAMINA).empty


def test_tables_without_evidence_join_with_others() -> None:
    rows, points = evidence_tables([], 2.0)
    labels = pd.DataFrame({"row_id": ["1_spinal_canal_stenosis_l1_l2"], "level": ["l1_l2"], "side": [""]})
    assert labels.merge(points, on=["level", "side"]).merge(rows, on="row_id").empty
