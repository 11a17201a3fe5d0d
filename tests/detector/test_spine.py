"""Discs named from below: chains, how sure they are, and named canal points."""

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from toy_spine import discs

from lsdc_utils.detector.chain import (
    CEILINGS,
    CLEAR,
    MISSED,
    NOTHING,
    SHARPNESS,
    STATES,
    STEPS,
    TEMPERATURES,
    calibrate,
    chain,
)
from lsdc_utils.detector.spine import (
    CANAL_COLUMNS,
    Discs,
    calibrate_levels,
    canal_points,
    evidence,
    join_discs,
    name_discs,
)
from lsdc_utils.vocabulary import LEVELS, T1, T2

UPPER = ("t11_t12", "t12_l1")
SEEN = [*UPPER, *LEVELS]  # of a usual image, with S1/S2 below


def centres(names=SEEN, step: float = 34.0, x: float = 3.0) -> dict[str, np.ndarray]:
    """An ideal spine: LPS mm of discs by name, with the usual shares of the mean step between them, in lordosis."""
    z = 90 - step * np.concatenate([[0], np.cumsum(STEPS)])
    return {name: np.array([x, 20 + z[k] ** 2 / 1000, z[k]]) for k, name in enumerate(STATES) if name in names}


def assert_named(points: pd.DataFrame, truth: dict[str, np.ndarray], names=LEVELS, off: float = 1.0) -> None:
    """Exactly these levels, each within `off` mm of its disc."""
    assert points["level"].tolist() == [name for name in LEVELS if name in names and name in truth]
    for row in points.itertuples():
        assert np.linalg.norm(np.array([row.X, row.Y, row.Z]) - truth[row.level]) < off, row.level


@pytest.mark.parametrize("step", [24.0, 29.0, 34.0, 39.0, 44.0])
@pytest.mark.parametrize("names", [LEVELS, SEEN[1:], SEEN, [*SEEN, "s1_s2"]], ids=["5", "6", "7", "7 and S1/S2"])
def test_names_are_counted_from_below_whatever_the_size_and_the_field_of_view(names, step):
    truth = centres(names, step)
    points = canal_points([discs(truth)], 7)
    assert_named(points, truth)
    assert (points["level_confidence"] > 0.9).all() and (points["study_id"] == 7).all()


@pytest.mark.parametrize(
    "settings",
    [{"series": (T1,)}, {"series": (T2,)}, {"series": (T1,), "slices": 1}, {"series": (T2,), "slices": 1}],
    ids=["T1", "T2", "one T1 slice", "one T2 slice"],
)
def test_one_series_and_even_one_slice_is_enough(settings):
    truth = centres()
    assert_named(canal_points([discs(truth, **settings)], 7), truth, off=3 if "slices" in settings else 1)


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_upper_discs_beyond_the_image_are_missing_and_the_others_keep_their_names(cut):
    truth = centres([*LEVELS[cut:], "s1_s2"])
    assert_named(canal_points([discs(truth)], 7), truth)


@pytest.mark.parametrize("lost", LEVELS[:4])
def test_a_disc_that_is_not_found_leaves_a_gap_and_shifts_no_name(lost):
    truth = centres([name for name in SEEN if name != lost])
    assert_named(canal_points([discs(truth)], 7), truth)


def test_without_the_lumbosacral_disc_the_names_are_uncertain():
    """L1/L2 to L4/L5 may as well be counted from any other disc: nothing tells which is the lowest one."""
    for names in (LEVELS[:4], [*UPPER, *LEVELS[:4]]):
        points = canal_points([discs(centres(names))], 7)
        assert len(points) and (points["level_confidence"] < 0.8).all()


def test_clutter_is_never_named():
    assert canal_points([discs({})], 7).empty
    truth = centres(["l4_l5", "l5_s1"])  # nothing is looked for above them
    for seed in range(3):
        assert_named(canal_points([discs(truth, seed, clutter=6)], 7), truth)


def test_a_weak_lumbosacral_score_still_names_a_spine_less_surely():
    sure, weak = (canal_points([discs(centres(), l5_s1=score)], 7)["level_confidence"].min() for score in (0.9, 0.3))
    assert weak < sure


def slipped(truth: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The discs of a spine by a localiser that takes L4/L5 for the lumbosacral disc."""
    names = [*STATES[1:], "below"]
    return {names[STATES.index(name)]: centre for name, centre in truth.items() if name != "s1_s2"}


def test_one_localiser_of_five_that_counts_a_level_off_moves_no_point_and_lowers_the_confidence():
    truth = centres()
    agreed = canal_points([discs(truth, seed) for seed in range(5)], 7, [(1.0, 0.98)] * 5)
    seen = [discs(slipped(truth)), *(discs(truth, seed) for seed in range(1, 5))]
    assert_named(canal_points(seen[:1], 7, [(1.0, 0.98)]), slipped(truth))
    points = canal_points(seen, 7, [(1.0, 0.98)] * 5)
    assert_named(points, truth)
    assert np.linalg.norm(points[[*"XYZ"]] - agreed[[*"XYZ"]], axis=1).max() < 1
    assert (agreed["level_confidence"] > 0.95).all() and (points["level_confidence"] < 0.8).all()


def test_a_mirrored_study_has_mirrored_points():
    seen = discs(centres(x=4.0))
    before, after = (canal_points([one], 7) for one in (seen, replace(seen, points=seen.points * [-1, 1, 1])))
    np.testing.assert_allclose(after[[*"XYZ"]], before[[*"XYZ"]] * [-1, 1, 1])
    assert np.allclose(before["level_confidence"], after["level_confidence"])


def test_points_lie_on_the_slices_that_show_the_canal_and_in_the_plane_where_t2_has_them():
    truth = centres(x=5.0)  # the series' middle slice; canal on those within 5 mm of it
    t1 = discs(
        {name: centre + np.array([0, 3, -4]) for name, centre in truth.items()}, series=(T1,)
    )  # the patient moved
    t2 = discs(truth, series=(T2,))
    parts = [np.concatenate([getattr(one, name) for one in (t1, t2)]) for name in ("points", "scores", "on_t2")]
    assert_named(canal_points([Discs(*parts, t1.slices + t2.slices)], 7), truth, off=0.7)


@pytest.mark.parametrize("count", [1, 2])
def test_no_detection_gives_an_empty_table_with_columns_of_the_usual_types(count):
    none, some = (
        canal_points([discs({}, clutter=0)] * count, 7, [(1.0, 0.98)] * count),
        canal_points([discs(centres())], 7),
    )
    assert none.empty and list(none) == list(some) == list(CANAL_COLUMNS)
    assert none.dtypes.to_dict() == some.dtypes.to_dict()
    pd.testing.assert_frame_equal(pd.concat([none, some], ignore_index=True), some)


def test_evidence_is_a_share_of_the_slices():
    """Half as many slices with the same detections on each: the same evidence."""
    sums = [evidence(discs({"l5_s1": np.zeros(3)}, slices=n, clutter=0, canal=0.0)).sum(axis=0) for n in (6, 12)]
    np.testing.assert_allclose(sums[0][STATES.index("l5_s1")], [0.9 * 0.9, sums[1][STATES.index("l5_s1")]], rtol=0.01)


# ---- the chain itself ------------------------------------------------------------------------------------------------


def some_chain(seed: int, count: int):
    """Candidates near a lumbar spine, with evidence at random."""
    rng = np.random.default_rng(seed)
    points = np.array(list(centres(LEVELS[:count]).values())) + rng.normal(0, 5, (count, 3))
    return chain(points, rng.uniform(0, 0.5, (count, len(STATES))) ** 3)


def all_choices(found) -> dict[tuple[int, ...], float]:
    """The weight of every choice of candidates (-1: none) for the states; those that go upwards have none."""
    count, weights = len(found.index), {}
    for choice in itertools.product(range(-1, count), repeat=len(STATES)):
        there = [state for state in range(len(STATES)) if choice[state] >= 0]
        log = sum(np.log(MISSED[state] * NOTHING) for state in range(len(STATES)) if choice[state] < 0)
        log += sum(found.gain[choice[state], state] for state in there)
        log += sum(found.move[a, b, choice[a], choice[b]] for a, b in itertools.pairwise(there))
        if np.isfinite(log):
            weights[choice] = np.exp(log)
    return weights


@pytest.mark.parametrize("seed", [4, 5])
def test_best_choice_and_chance_are_those_of_all_choices_listed(seed):
    found = some_chain(seed, 3)
    weights = all_choices(found)
    best = max(weights, key=weights.get)
    assert found.best().tolist() == list(best)
    assert found.weight() == pytest.approx(np.log(weights[best]))
    lumbar = best[2:7]
    places = np.array([found.plane[k] if k >= 0 else (np.nan, np.nan) for k in lumbar])
    allowed = [{-1} | {k for k in range(3) if np.hypot(*(found.plane[k] - place)) <= 15} for place in places]
    agree = [
        max(choice[2:7]) >= 0 and all(k in some for k, some in zip(choice[2:7], allowed, strict=True))
        for choice in weights
    ]
    for temperature in (1.0, 16.0):
        shares = np.array(list(weights.values())) ** (1 / temperature)
        assert found.chance(places, temperature) == pytest.approx(shares[agree].sum() / shares.sum())


def test_discs_are_assigned_once_and_downwards_in_any_order_of_detections():
    points = np.array(list(centres(LEVELS).values()))
    table = np.full((5, len(STATES)), 0.01)
    table[:, 2:7] += 0.8 * np.eye(5)
    table[2, 2:7] = [0.01, 0.5, 0.45, 0.01, 0.01]  # on its own, L3/L4 would rather be L2/L3
    for some in (np.arange(5), np.array([3, 0, 4, 2, 1])):
        found = chain(points[some], table[some])
        assert some[found.index[found.best()[2:7]]].tolist() == [0, 1, 2, 3, 4]
        assert found.best()[[0, 1, 7]].tolist() == [-1, -1, -1]
    assert chain(points[:0], table[:0]).best().tolist() == [-1] * len(STATES)


def test_weak_candidates_between_discs_are_left_out_and_clear_ones_are_taken():
    """T11/T12 is not imaged: something weak between two discs must not move the names above it up by one."""
    places = np.array(list(centres([*SEEN[1:], "s1_s2"]).values()))
    table = np.full((7, len(STATES)), 0.01)
    table[:6, :6] = 0.6
    table[5, :7], table[5, 6], table[6, 7] = 0.2, 0.6, 0.6
    truth = [-1, 0, 1, 2, 3, 4, 5, 6]
    for below in range(5):
        weak = np.vstack([places, (places[below] + places[below + 1]) / 2 + (0, 24, 0)])  # in the canal
        found = chain(weak, np.vstack([table, np.full(len(STATES), 0.03)]))
        names = np.append(found.index, -1)[found.best()]
        assert names.tolist() == truth, below
    squeezed = places + np.outer([0, 0, 0, 0, -15, 0, 0], [0, 0, 1.0])  # L4/L5 lies close to L5/S1
    found = chain(squeezed, table)
    assert np.append(found.index, -1)[found.best()].tolist() == truth


def test_a_disc_with_spread_detections_is_one_candidate():
    """A disc of 60 detections that spread over 20 mm is one candidate; two discs 18 mm apart are two."""
    rng = np.random.default_rng(0)
    disc = rng.normal(0, (0, 5, 5), (60, 3))
    table = np.full((60, len(STATES)), 0.01)
    one = chain(disc, table)
    two = chain(np.concatenate([disc[:30], disc[30:] * 0.4 + (0, 0, 18)]), table)
    clear = [np.exp(found.gain.max(axis=1) / SHARPNESS) > CLEAR for found in (one, two)]
    assert [own.sum() for own in clear] == [1, 2]


def test_detections_of_one_disc_are_one_candidate():
    seen = discs(centres(), clutter=0)
    assert len(chain(seen.points, evidence(seen)).index) == len(SEEN)


def test_calibration_is_how_often_held_out_levels_are_right():
    rng = np.random.default_rng(0)
    chances = np.tile(np.linspace(1, 0.5, len(TEMPERATURES)), (200, 1))
    sure, ceiling = calibrate(chances, np.full(200, True))
    assert ceiling == CEILINGS[-1] and sure <= 1  # always right: never quite sure
    temperature, ceiling = calibrate(chances, rng.random(200) < 0.75)
    assert ceiling * chances[0, TEMPERATURES.index(temperature)] == pytest.approx(0.75, abs=0.07)


def test_names_are_right_where_the_nearest_readers_point_has_the_same_name():
    truth = centres()
    table = pd.DataFrame([(level, *truth[level]) for level in LEVELS], columns=["level", *"XYZ"])
    found = discs(truth, slices=3)
    readers = pd.concat([table.assign(study_id=study) for study in range(30)], ignore_index=True)
    right = calibrate_levels(dict.fromkeys(range(30), found), readers)
    wrong = calibrate_levels(dict.fromkeys(range(30), discs(slipped(truth), slices=3)), readers)
    assert right[1] > 0.95 > 0.85 > wrong[1]
    assert calibrate_levels(dict.fromkeys(range(30), found), readers.groupby("study_id").head(2))[1] > 0.95
    for seen, some in (({}, readers), ({0: found}, readers.groupby("study_id").head(1))):
        assert calibrate_levels(seen, some) == (1.0, 0.98)  # too little to judge by


def test_names_of_no_disc_are_nan():
    found, places = name_discs(discs({}, clutter=0))
    assert not len(found.index) and places.shape == (8, 2) and np.isnan(places).all()


@pytest.mark.parametrize(("below", "share"), [(80.0, 1.0), (20.0, 0.5), (0.0, 0.5)])
def test_names_are_less_sure_where_the_images_end_less_than_a_level_below_l5_s1(below: float, share: float) -> None:
    seen = discs(centres())
    lowest = canal_points([seen], 7)["Z"].min()
    free, cut = (canal_points([replace(seen, floor=z)], 7) for z in (-np.inf, lowest - below))
    np.testing.assert_allclose(cut["level_confidence"], share * free["level_confidence"])
    assert_named(cut, centres())


@pytest.mark.parametrize(("shift", "share"), [(4.0, 1.0), (-33.0, 0.5), (33.0, 0.5)])
def test_names_are_less_sure_where_t1_and_t2_lie_at_other_heights(shift: float, share: float) -> None:
    truth = centres()
    moved = {name: centre + np.array([0, 0, shift]) for name, centre in truth.items()}
    alone = canal_points([discs(truth, series=(T2,))], 7)["level_confidence"].max()
    parts = [discs(truth, series=(T2,)), discs(moved, 1, series=(T1,))]
    together = canal_points([join_discs(parts)], 7)["level_confidence"].max()
    assert together <= share * 1.02 and (share < 1) == (together < 0.6 * alone)
