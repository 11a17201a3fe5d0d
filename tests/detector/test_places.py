"""Levels chosen once from the detections of all detectors, how sure they are, and sides from pairs of recesses."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from toy_spine import canal_points, config, foramen_points, ideal, level_centre, toy_labels, toy_points, toy_stack

from lsdc_utils.detector.canal import canal_from_foramina
from lsdc_utils.detector.chain import CEILINGS, MISSED, NOTHING, TEMPERATURES, calibrate, chain
from lsdc_utils.detector.classes import CANAL_FROM_FORAMINA
from lsdc_utils.detector.detections import Detections, pool_detections
from lsdc_utils.detector.levels import evidence_tables, level_evidence
from lsdc_utils.detector.places import FINDERS, calibrate_levels, recess_middles
from lsdc_utils.vocabulary import LEVELS, SIDES


def slipped(detections: Detections, by: int = 1) -> Detections:
    """Detections by a detector that counts the levels `by` too far up."""
    scores = detections.scores.reshape(-1, len(LEVELS), 3)
    moved = np.full_like(scores, 1e-6)
    moved[:, :-by] = scores[:, by:]
    return replace(detections, scores=moved.reshape(len(scores), -1))


def jittered(detections: Detections, seed: int) -> Detections:
    return replace(detections, points=detections.points + np.random.default_rng(seed).normal(0, 0.7, (1, 3)))


@pytest.fixture
def five() -> list[Detections]:
    """What five canal detectors say of one study."""
    detections, _ = ideal("scs", dict.fromkeys(toy_points("scs"), 1))
    return [jittered(detections, seed) for seed in range(5)]


def test_one_detector_of_five_that_counts_a_level_off_moves_no_point(five):
    configs = [config("scs")] * 5
    without = FINDERS["scs"](pool_detections(five), five, configs, None)
    seen = [slipped(five[0]), *five[1:]]
    places = FINDERS["scs"](pool_detections(seen), seen, configs, None)
    assert places.names == without.names == [("", level) for level in LEVELS]
    assert np.linalg.norm(places.points - without.points, axis=1).max() < 1
    assert (without.sure > 0.95).all() and (places.sure < 0.8).all()
    rows = [evidence_tables(found, 2.0)[0] for found in level_evidence(seen, 1, configs)]
    assert [len(table) for table in rows[1:]] == [5, 5, 5, 5]


@pytest.mark.parametrize("condition", ["scs", "nfn", "ss"])
def test_the_mirrored_detections_have_the_same_places_on_the_other_side(condition):
    points = toy_points(condition)
    seen = jittered(ideal(condition, {key: k % 3 for k, key in enumerate(points)})[0], 3)
    canal = canal_points().set_index("level")
    order = np.arange(len(seen.scores))[::-1]
    other = Detections(*(values[order] for values in (seen.points * (-1, 1, 1), seen.scores, seen.levels, seen.slices)))
    before, after = (
        FINDERS[condition](one, [one], [config(condition)], canal.assign(X=sign * canal["X"]))
        for one, sign in ((seen, 1), (other, -1))
    )
    exchanged = dict(zip(SIDES, SIDES[::-1], strict=True)) | {"": ""}
    places = dict(zip(after.names, after.points, strict=True))
    assert len(places) == len(before.names) == len(points)
    for (side, level), point in zip(before.names, before.points, strict=True):
        assert np.linalg.norm(places[exchanged[side], level] - point * (-1, 1, 1)) < 0.1  # the order decides ties


def test_no_detection_serves_two_levels(five):
    """Two levels 10 mm apart, as of a compressed spine: what lies between belongs to the nearer one."""
    points = np.array([[0, 0, 70.0], [0, 0, 60.0], [0, 0, 66.0], [0, 0, 64.0]])
    scores = np.full((4, 5, 3), 1e-6)
    scores[0, 0, 0], scores[1, 1, 0] = 0.9, 0.9
    scores[2:, :2, 0] = 0.3
    seen = Detections(points, scores.reshape(4, -1), np.full(4, -1), np.zeros(4, int))
    places = FINDERS["scs"](seen, [seen], [config("scs")], None)
    assert places.names[:2] == [("", "l1_l2"), ("", "l2_l3")]
    assert places.owner.tolist() == [0, 1, 0, 1]


def test_a_level_that_is_not_imaged_is_missing_and_not_put_elsewhere():
    points = np.array([level_centre(level) for level in LEVELS[1:]])
    evidence = np.full((4, 5), 1e-6)
    evidence[range(4), range(1, 5)] = 0.9
    assert chain(points, evidence).best().tolist() == [-1, 0, 1, 2, 3]
    assert chain(points[:0], evidence[:0]).best().tolist() == [-1] * 5


def test_best_choice_and_chance_are_those_of_all_choices_listed():
    rng = np.random.default_rng(4)
    points = np.array([level_centre(level) for level in LEVELS[:4]]) + rng.normal(0, 5, (4, 3))
    found = chain(points, rng.uniform(0, 0.5, (4, 5)) ** 3)
    weights = {}
    for choice in itertools.product(range(-1, 4), repeat=5):
        there = [level for level in range(5) if choice[level] >= 0]
        log = (5 - len(there)) * np.log(MISSED * NOTHING) + sum(found.gain[choice[level], level] for level in there)
        log += sum(found.move[b - a, choice[a], choice[b]] for a, b in itertools.pairwise(there))
        weights[choice] = np.exp(log)
    best = max(weights, key=weights.get)
    assert found.best().tolist() == list(best)
    places = np.array([found.plane[k] if k >= 0 else (np.nan, np.nan) for k in best])
    allowed = [{-1} | ({k for k in range(4) if np.hypot(*(found.plane[k] - place)) <= 15}) for place in places]
    agreeing = sum(
        w for choice, w in weights.items() if all(k in some for k, some in zip(choice, allowed, strict=True))
    )
    assert found.chance(places, 1.0) == pytest.approx(agreeing / sum(weights.values()))
    assert found.chance(places, 16.0) < found.chance(places, 1.0)


def test_calibration_is_how_often_held_out_levels_are_right():
    rng = np.random.default_rng(0)
    chances = np.tile(np.linspace(1, 0.5, len(TEMPERATURES)), (200, 1))
    sure, ceiling = calibrate(chances, np.full(200, True))
    assert ceiling == CEILINGS[-1] and sure <= 1  # always right: never quite sure
    temperature, ceiling = calibrate(chances, rng.random(200) < 0.75)
    assert ceiling * chances[0, TEMPERATURES.index(temperature)] == pytest.approx(0.75, abs=0.07)
    severities = dict.fromkeys(toy_points("scs"), 1)
    detections, settings = ideal("scs", severities)
    labels = toy_labels(toy_stack("scs", severities), "scs", severities)
    many = pd.concat([labels.assign(study_id=study) for study in range(30)])
    right = calibrate_levels(dict.fromkeys(range(30), detections), many, settings)
    wrong = calibrate_levels(dict.fromkeys(range(30), slipped(detections)), many, settings)
    assert right[1] > 0.95 > 0.85 > wrong[1]
    assert calibrate_levels({}, labels, settings) == settings.calibration


def test_foramina_on_a_single_slice_have_no_side_and_calibrate_nothing():
    severities = dict.fromkeys(toy_points("nfn"), 1)
    detections, settings = ideal("nfn", severities)
    single = replace(detections, points=detections.points * [0, 1, 1] + [3, 0, 0])
    labels = toy_labels(toy_stack("nfn", severities), "nfn", severities)
    assert calibrate_levels({1: single}, labels, settings) == settings.calibration
    assert level_evidence([single], 1, [settings]) == [[]]


@pytest.mark.parametrize("half", [5.6, 7.5, 9.9])
@pytest.mark.parametrize("offset", [-5.7, 0.0, 3.1])
def test_the_side_of_a_recess_is_that_of_its_pair(half, offset):
    """The pair lies off the canal's point of another series; one side is missing on some slices; places are noisy."""
    rng, canal = np.random.default_rng(1), canal_points().set_index("level")
    points, scores, levels, slices, truth = [], [], [], [], []
    for number, level in enumerate(LEVELS):
        for k in range(3):
            for sign in (1, -1):
                if (number, k, sign) in ((1, 0, 1), (4, 2, -1)):
                    continue
                place = level_centre(level) + np.array([offset + sign * half, 2.0, 4.0 * k - 4])
                points.append(place + rng.normal(0, [1.5, 1.5, 0]))
                scores.append([0.3, 0.1, 0.05])
                levels.append(number)
                slices.append(3 * number + k)
                truth.append(sign)
    for _ in range(60):  # clutter
        points.append(level_centre(LEVELS[2]) + rng.uniform([-20, -20, -5], [20, 20, 5]))
        scores.append([1e-3, 1e-3, 1e-3])
        levels.append(2)
        slices.append(7)
        truth.append(0)
    seen = Detections(np.array(points), np.array(scores), np.array(levels), np.array(slices))
    truth = np.array(truth)
    middles = recess_middles(seen, canal)
    assert (np.sign(seen.points[:, 0] - middles) == truth)[truth != 0].all()
    assert np.abs(middles[truth != 0] - offset).max() < 2.5
    places = FINDERS["ss"](seen, [seen], [config("ss")], canal)
    assert set(places.names) == {(side, level) for side in SIDES for level in LEVELS}


def test_without_a_pair_the_canal_s_point_is_the_middle():
    seen = Detections(np.array([[9.0, 20, 70]]), np.array([[0.5, 0.1, 0.1]]), np.array([0]), np.array([0]))
    assert recess_middles(seen, canal_points().set_index("level")) == pytest.approx(0.0)


def test_the_way_from_foramina_to_canal_is_measured_in_the_labels():
    rows = []
    for study in range(7):
        canal, foramina = canal_points(study), foramen_points(study)
        canal[["Y", "Z"]] += [6.0, -12.0]
        if study == 0:
            canal["Y"] += 100  # one wild study
        rows.append(canal.assign(condition="spinal_canal_stenosis"))
        rows.append(foramina.assign(condition=foramina["side"] + "_neural_foraminal_narrowing"))
    labels = pd.concat(rows)
    few = labels[(labels["level"] != "l5_s1") | (labels["study_id"] < 4)]
    measured = np.array(canal_from_foramina(few))
    np.testing.assert_allclose(measured[:4], np.tile([6.0, -12.0], (4, 1)), atol=1e-6)
    assert tuple(measured[4]) == CANAL_FROM_FORAMINA[4]  # four studies are too few
    assert canal_from_foramina(labels.iloc[:0]) == CANAL_FROM_FORAMINA
