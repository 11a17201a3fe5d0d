"""Places by level and side: detections near the named canal points, and sides from pairs of recesses."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from spines import SAGITTAL, make_affines, make_stack, ramp
from toy_spine import canal_points, config, foramen_points, ideal, level_centre, toy_points

from lsdc_utils.detector.canal import canal_from_foramina
from lsdc_utils.detector.classes import CANAL_FROM_FORAMINA
from lsdc_utils.detector.detections import Detections
from lsdc_utils.detector.images import wanted
from lsdc_utils.detector.levels import level_evidence
from lsdc_utils.detector.places import RECESS_REACH, SAGITTAL_REACH, find_places, recess_middles
from lsdc_utils.vocabulary import LEVELS, SIDES, T1

CANAL = canal_points().set_index("level")


def detections(points, levels=-1, scores=(0.3, 0.1, 0.05)) -> Detections:
    points = np.array(points, dtype=float).reshape(-1, 3)
    levels = np.broadcast_to(levels, len(points))
    return Detections(points, np.tile(scores, (len(points), 1)), levels, np.arange(len(points)))


@pytest.mark.parametrize("condition", ["scs", "nfn", "ss"])
def test_the_mirrored_detections_have_the_same_places_on_the_other_side(condition):
    points = toy_points(condition)
    seen = ideal(condition, {key: k % 3 for k, key in enumerate(points)})[0]
    seen = replace(seen, points=seen.points + np.array([0.4, -0.3, 0.5]))
    order = np.arange(len(seen.scores))[::-1]
    other = Detections(*(values[order] for values in (seen.points * (-1, 1, 1), seen.scores, seen.levels, seen.slices)))
    before, after = (
        find_places(one, config(condition), CANAL.assign(X=sign * CANAL["X"])) for one, sign in ((seen, 1), (other, -1))
    )
    exchanged = dict(zip(SIDES, SIDES[::-1], strict=True)) | {"": ""}
    places = dict(zip(after.names, after.points, strict=True))
    assert len(places) == len(before.names) == len(points)
    for (side, level), point in zip(before.names, before.points, strict=True):
        np.testing.assert_allclose(places[exchanged[side], level], point * (-1, 1, 1), atol=1e-9)


def test_no_detection_serves_two_levels():
    """Two levels 10 mm apart, as of a compressed spine: what lies between belongs to the nearer one."""
    canal = CANAL.iloc[:2].assign(Y=0.0, Z=[70.0, 60.0])
    places = find_places(detections([(0, 0, 70), (0, 0, 60), (0, 0, 66), (0, 0, 64)]), config("scs"), canal)
    assert places.names == [("", "l1_l2"), ("", "l2_l3")]
    assert places.owner.tolist() == [0, 1, 0, 1]
    np.testing.assert_allclose(places.points, [[0, 0, 68], [0, 0, 62]])


@pytest.mark.parametrize("condition", ["scs", "nfn", "ss"])
def test_detections_beyond_the_reach_belong_to_none(condition):
    axial = condition == "ss"
    reach = RECESS_REACH if axial else SAGITTAL_REACH
    place = level_centre("l3_l4", {"scs": 0, "nfn": 15, "ss": 9}[condition])
    far = np.sqrt(reach**2 - 9**2) if axial else reach  # in front of the canal; recesses lie beside it too
    seen = detections([place, place - [0, far - 0.5, 0], place - [0, far + 0.5, 0]], 2 if axial else -1)
    places = find_places(seen, config(condition), CANAL)
    assert places.names == [("" if condition == "scs" else "left", "l3_l4")]
    assert places.owner.tolist() == [0, 0, -1]
    nowhere = find_places(detections([place - 200], 2 if axial else -1), config(condition), CANAL)
    none = find_places(detections([]), config(condition), CANAL)
    for empty in (nowhere, none):
        assert empty.names == [] and empty.points.shape == (0, 3) and (empty.owner == -1).all()


def test_a_recess_is_of_the_level_that_its_slice_shows_and_of_none_if_that_is_far():
    pair = [level_centre("l3_l4", x) + np.array([0, 0, 12]) for x in (9, -9)]
    assert find_places(detections(pair, 2), config("ss"), CANAL).names == [("left", "l3_l4"), ("right", "l3_l4")]
    assert find_places(detections(pair, 1), config("ss"), CANAL).names == [("left", "l2_l3"), ("right", "l2_l3")]
    assert find_places(detections(pair, 4), config("ss"), CANAL).names == []  # whose canal lies 80 mm below
    assert find_places(detections(pair, -1), config("ss"), CANAL).names == []


@pytest.mark.parametrize("curve", [0.0, 0.2, -0.2])
def test_foramina_of_the_left_are_never_right_in_a_curved_spine(curve):
    """A scoliotic spine leaves the body's middle by more than its foramina lie beside it."""
    canal = CANAL.assign(X=curve * CANAL["Z"])
    rng, points, truth = np.random.default_rng(0), [], []
    for level in LEVELS:
        for side, sign in zip(SIDES, (1, -1), strict=True):
            for _ in range(5):
                centre = canal.loc[level, [*"XYZ"]].to_numpy(float) + np.array([sign * 15, 0, 0])
                points.append(centre + rng.uniform([-8, -6, -6], [8, 6, 6]))
                truth.append((side, level))
    places = find_places(detections(points), config("nfn"), canal)
    assert [places.names[number] for number in places.owner] == truth


def test_a_slice_with_the_foramen_of_one_level_and_the_canal_of_another_is_looked_at_for_the_first():
    """In a bowed spine; what is detected on it beside the other level's canal is no foramen."""
    size = (200, 160)
    stack = make_stack(ramp, make_affines(17, 1.0, 4.0, centre=(0, 0, 0), size=size, **SAGITTAL), size, T1)
    bowed = CANAL.assign(X=[-16.0, -8.0, 0.0, -8.0, -16.0]).reset_index()
    looked = stack.affines[wanted(stack, config("nfn"), bowed), 0, 3]
    assert looked.min() <= -32 and {-16.0, 0.0} <= set(looked.round(6))  # right foramina of L3/L4, left ones of L1/L2
    points = foramen_points().set_index(["side", "level"])[[*"XYZ"]]
    on_canal = points.loc["left", "l1_l2"].to_numpy() * (0, 1, 1) + np.array([-16 + 4.0, 0, 0])
    beside = points.loc["left", "l1_l2"].to_numpy() * (0, 1, 1) + np.array([-16 + 15.0, 0, 0])
    places = find_places(detections([on_canal, beside]), config("nfn"), bowed.set_index("level"))
    assert places.names == [("left", "l1_l2")] and places.owner.tolist() == [-1, 0]


def test_foramina_on_a_single_slice_have_the_side_of_that_slice():
    """Left of the canal, all that is found there is left; on the canal itself it has no side."""
    centres = CANAL[[*"XYZ"]].to_numpy(float)
    places = find_places(detections(centres + np.array([14, 0, 0])), config("nfn"), CANAL)
    assert places.names == [("left", level) for level in LEVELS]
    assert find_places(detections(centres), config("nfn"), CANAL).names == []
    assert level_evidence([detections(centres)], 1, [config("nfn")], canal_points()) == [[]]


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
    places = find_places(seen, config("ss"), canal)
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
