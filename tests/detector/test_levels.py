"""From detections to levels, sides and severity rows."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from toy_spine import (
    canal_labels,
    canal_points,
    config,
    discs,
    foramen_points,
    ideal,
    level_centre,
    no_detections,
    toy_labels,
    toy_points,
    toy_stack,
)

from lsdc_utils import metric
from lsdc_utils.detector.canal import readers_canal, recess_canal
from lsdc_utils.detector.classes import CANAL_FROM_FORAMINA, Detector, DetectorConfig
from lsdc_utils.detector.levels import (
    LevelEvidence,
    Scheme,
    cross_read,
    evidence_tables,
    fit_power,
    grade_study,
    level_evidence,
    read_severities,
)
from lsdc_utils.detector.localiser import CALIBRATION, Localiser, LocaliserConfig
from lsdc_utils.detector.spine import CANAL_COLUMNS
from lsdc_utils.detector.spine import canal_points as localised_points
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
            levels.append(LevelEvidence(row, study, level, "", np.zeros(3), scores))
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
    """Detections lie where the canal's points and the way to them let foramina be expected."""
    detections, settings = ideal("nfn", dict.fromkeys(toy_points("nfn"), 1))
    settings, canal = replace(settings, canal_from_foramina=CANAL_FROM_FORAMINA), canal_points()
    canal[["Y", "Z"]] += np.array(CANAL_FROM_FORAMINA)
    for some in (canal, canal.iloc[::-1], canal.iloc[[1, 3]]):
        levels = level_evidence([detections], 1, [settings], some)[0]
        assert len(levels) == 2 * len(some)
        for level in levels:
            assert np.abs(level.point[1:] - level_centre(level.level)[1:]).max() < 1, level.level


def test_rows_are_as_sure_of_their_levels_as_the_least_sure_canal_point():
    detections, settings = ideal("scs", dict.fromkeys(toy_points("scs"), 1))
    canal = canal_points().assign(level_confidence=[0.9, 0.7, 0.9, 0.9, 0.9])
    assert {level.level_confidence for level in level_evidence([detections], 1, [settings], canal)[0]} == {0.7}


@pytest.mark.parametrize("condition", GROUPS)
def test_perfect_detections_give_perfect_rows_and_points(condition):
    rng = np.random.default_rng(3)
    severities = {key: int(rng.integers(3)) for key in toy_points(condition)}
    stack = toy_stack(condition, severities)
    detections, settings = ideal(condition, severities)
    rows, points = evidence_tables(level_evidence([detections], 1, [settings], canal_points())[0], settings.power)
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


def test_no_evidence_no_rows():
    for condition in GROUPS:
        settings = config(condition)
        levels = level_evidence([no_detections(settings)], 1, [settings], canal_points())[0]
        rows, points = evidence_tables(levels, settings.power)
        assert rows.empty and points.empty and list(rows) == ["row_id", *SEVERITIES]
    severities = dict.fromkeys(toy_points("ss"), 0)
    detections, settings = ideal("ss", severities)
    assert level_evidence([detections], 1, [settings], None) == [[]]  # no canal points, no levels


@pytest.fixture
def graded(monkeypatch):
    """Grade a study by perfect detectors and by localisers that see `seen`."""
    found = {key: ideal(key, dict.fromkeys(toy_points(key), 1)) for key in GROUPS}

    def detected(detector, stacks, canal):
        key = detector.config.condition
        return found[key][0] if canal is not None and len(canal) else no_detections(found[key][1])

    def grade(seen, keys=GROUPS):
        some = iter(seen)
        monkeypatch.setattr("lsdc_utils.detector.levels.find_discs", lambda network, stacks: next(some))
        detectors = {key: [Detector(torch.nn.Identity(), found[key][1], 0, {})] for key in keys}
        networks = [Localiser(LocaliserConfig((2, 2))) for _ in seen]
        return grade_study(networks, detectors, 1, [], Scheme(detect=detected))

    return grade


def test_the_localisers_points_are_the_canal_and_name_the_levels_of_all(graded):
    truth = {level: level_centre(level) for level in LEVELS}
    seen = [discs(truth, seed) for seed in range(3)]
    rows, points = graded(seen)
    assert len(rows) == 25 and rows["row_id"].is_unique
    canal = points[points["condition"] == "scs"].drop(columns="condition")
    assert canal.pop("s1_s2").isna().all()  # no slice to measure it on
    pd.testing.assert_frame_equal(canal, localised_points(seen, 1, [CALIBRATION] * 3))
    np.testing.assert_allclose(canal[[*"XYZ"]], list(truth.values()), atol=1)
    assert points.groupby("condition").size().to_dict() == {"nfn": 10, "scs": 5, "ss": 10}
    assert np.allclose(points["level_confidence"], canal["level_confidence"].min())
    some, found = graded(seen, ["nfn", "ss"])  # without a detector of the canal, whose points stay
    assert set(some["row_id"]) == set(metric.rows_of_groups(rows, ["nfn", "ss"])["row_id"])
    pd.testing.assert_frame_equal(found, points)


def test_a_study_without_a_disc_has_neither_rows_nor_points(graded):
    rows, points = graded([discs({}, clutter=0)])
    assert rows.empty and points.empty
    assert list(rows) == ["row_id", *SEVERITIES] and {*points} == {*CANAL_COLUMNS, "condition", "s1_s2"}


def test_levels_that_no_reader_clicked_take_their_canal_point_from_both_foramina():
    clicked = canal_labels(1).iloc[:3]
    nfn = pd.concat([foramen_points(1), foramen_points(2)])
    nfn = nfn.assign(condition=nfn["side"] + "_neural_foraminal_narrowing")
    lone = (nfn["study_id"] == 2) & (nfn["level"] == "l1_l2") & (nfn["side"] == "left")
    canal = readers_canal(pd.concat([clicked, nfn[~lone]]), CANAL_FROM_FORAMINA)
    assert list(canal) == ["study_id", "level", *"XYZ"]
    assert canal.groupby("study_id")["level"].agg(list).to_dict() == {1: list(LEVELS), 2: list(LEVELS[1:])}
    truth = np.array([level_centre(level) for level in canal["level"]])
    way = np.array(CANAL_FROM_FORAMINA)[[LEVELS.index(level) for level in canal["level"]]]
    way[:3] = 0  # of the clicked ones
    np.testing.assert_allclose(canal[[*"XYZ"]], truth + np.c_[np.zeros(len(way)), way])
    assert readers_canal(nfn[lone], CANAL_FROM_FORAMINA).empty
    assert list(readers_canal(clicked.head(0), CANAL_FROM_FORAMINA)) == ["study_id", "level", *"XYZ"]


def test_tables_without_evidence_join_with_others() -> None:
    rows, points = evidence_tables([], 2.0)
    labels = pd.DataFrame({"row_id": ["1_spinal_canal_stenosis_l1_l2"], "level": ["l1_l2"], "side": [""]})
    assert labels.merge(points, on=["level", "side"]).merge(rows, on="row_id").empty


def test_windows_lie_behind_the_recesses_where_only_these_were_clicked():
    pairs = [("left", 10.0, -2.0), ("right", -6.0, 0.0)]
    rows = [
        {"study_id": 1, "level": "l4_l5", "condition": f"{side}_subarticular_stenosis", "X": x, "Y": y, "Z": 5.0}
        for side, x, y in pairs
    ]
    both = pd.DataFrame([*rows, rows[0] | {"level": "l5_s1"}])  # a level with one side tells no middle
    assert recess_canal(both).to_dict("records") == [{"study_id": 1, "level": "l4_l5", "X": 2.0, "Y": 2.0, "Z": 5.0}]
    assert readers_canal(both, CANAL_FROM_FORAMINA).empty
