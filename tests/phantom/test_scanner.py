"""What a scanner makes of a body: frames within their ranges, greys by physics or within limits, correlated noise."""

from dataclasses import replace

import numpy as np
import pytest

from lsdc_utils import geometry
from lsdc_utils.phantom import contrast, scanner
from lsdc_utils.phantom.body import FIRST, Body
from lsdc_utils.phantom.contrast import NAMES, Visit, draw_greys
from lsdc_utils.phantom.scanner import Protocol, plan_series
from lsdc_utils.vocabulary import AXIAL, T1, T2

CANAL, L1, L5 = slice(0, 5), 0, 4


def bodies(n=60):
    return [Body.draw(np.random.default_rng([i, 1]), np.full(25, 0.2)) for i in range(n)]


def seen(acquisition, body):
    """Whether each of the 25 points lies in the image of its nearest slice, and how far off that slice it is."""
    local = geometry.to_pixels(acquisition.affines[:, None], acquisition.to_scanner(body.points()))
    near = np.abs(local[..., 2]).argmin(0)
    x, y, away = local[near, np.arange(25)].T
    return (x >= 0) & (x < acquisition.cols) & (y >= 0) & (y < acquisition.rows), np.abs(away)


def plans(series_type, **choices):
    rngs = [np.random.default_rng([i, 2]) for i in range(60)]
    return [(b, plan_series(r, b, series_type, **choices)) for b, r in zip(bodies(), rngs, strict=True)]


def test_sagittal_frames_fill_their_ranges_and_show_all_levels():
    drawn = plans(T2)
    views = np.array([max(a.rows, a.cols) * a.spacing for _, a in drawn])
    assert 180 <= views.min() < 215 and 360 < views.max() <= 420
    middles = np.array([a.to_scanner(b.points()[CANAL].mean(0)) for b, a in drawn])
    centres = np.array([a.affines[0] @ [(a.cols - 1) / 2, (a.rows - 1) / 2, 0, 1] for _, a in drawn])[:, :3]
    off = (centres - middles)[:, 1:]
    assert (np.abs(off) < 45).all() and (off.min(0) < -20).all() and (off.max(0) > 20).all()
    steps, numbers = np.array([a.step for _, a in drawn]), np.array([len(a.affines) for _, a in drawn])
    assert 3 <= steps.min() < 3.3 and 5.7 < steps.max() <= 6
    assert 9 <= numbers.min() < 11 and 18 < numbers.max() <= 25
    for body, acquisition in drawn:
        inside, away = seen(acquisition, body)
        assert inside.all() and (away[:15] <= acquisition.step).all()


def test_series_of_a_patient_differ_in_field_and_a_cut_field_may_lose_upper_levels_alone():
    ratios, lost = [], np.zeros(5)
    for i, body in enumerate(bodies(40)):
        visit = Visit.draw(np.random.default_rng([i, 3]))
        rng = np.random.default_rng([i, 4])
        a, b = (plan_series(rng, body, t, visit=visit) for t in (T1, T2))
        ratios.append(a.rows * a.spacing / (b.rows * b.spacing))
        small = replace(visit, cut=True)
        lost += ~seen(plan_series(rng, body, T1, visit=small), body)[0][CANAL]
    assert 1.2 < np.exp(np.abs(np.log(ratios))).max() <= 1.5
    assert 5 < lost[L1] < 30 and lost[L5] == 0 and lost.sum() < 0.2 * 40 * 5


def test_far_populations_leave_the_usual_ranges():
    narrow = plans(T1, protocol=Protocol(population="narrow"))
    assert all(139 < max(a.rows, a.cols) * a.spacing < 176 for _, a in narrow)
    assert all(seen(a, b)[0][L5] for b, a in narrow)
    rng, visit = np.random.default_rng(0), Visit.draw(np.random.default_rng(1))
    orders = {tuple(np.argsort(list(draw_greys(rng, visit, "t2", free=True).values()))) for _ in range(20)}
    assert len(orders) == 20
    usual = {plan_series(np.random.default_rng(3), b, AXIAL).greys["csf"] for b in bodies(3)}
    grey = {
        plan_series(np.random.default_rng(3), b, AXIAL, protocol=Protocol(population="grey")).greys["csf"]
        for b in bodies(3)
    }
    assert usual == grey, "axial greys stay readable"
    for name in ("scale", "population"):
        with pytest.raises(ValueError, match=f"{name} is one of"):
            Protocol(**{name: "strange"})


def test_realistic_pixels():
    for series_type in (T1, AXIAL):
        for _, a in plans(series_type, protocol=Protocol(scale="realistic"))[:20]:
            assert 320 <= max(a.rows, a.cols) <= 1024 and 0.4 <= a.spacing <= 0.7


def test_axial_blocks_have_at_most_25_slices_and_overlap():
    overlapping = 0
    for body, a in plans(AXIAL):
        sizes = np.bincount(a.blocks)
        assert sizes.min() >= 5 and sizes.max() <= 26 and 159 < max(a.rows, a.cols) * a.spacing < 211
        assert (seen(a, body)[1][np.r_[0:5, 15:25]] <= a.step).all()  # foramina lie 9 mm higher
        if len(sizes) == 2:
            upper, lower = (a.affines[a.blocks == k] for k in (0, 1))
            canal = a.to_scanner(body.to_patient(0, 7, np.linspace(body.discs[FIRST], body.discs[FIRST + 4], 500)))
            covered = [np.abs(geometry.plane_distances(part, canal)).min(0) <= a.step / 2 for part in (upper, lower)]
            assert np.logical_or(*covered).all() and np.logical_and(*covered).any()
            overlapping += 1
    assert overlapping > 15


def test_signal_follows_the_equations():
    visit = replace(Visit.draw(np.random.default_rng(0)), water=np.array([[0.8, 0, 1000, 50]] * 2), fat=(300.0, 150.0))
    visit.water[1, 1] = 1  # a tissue of fat alone
    spin = contrast.signal(visit, "t1", 500, 10, 0, 1.0)
    np.testing.assert_allclose(spin[0], 0.8 * (1 - np.exp(-0.5)) * np.exp(-0.2))
    assert contrast.signal(visit, "stir", 1e5, 60, 300 * np.log(2), 1.0)[1] == pytest.approx(0, abs=1e-9)
    suppressed, plain = (contrast.signal(visit, "t2", 4000, 100, 0, left)[1] for left in (0.1, 1.0))
    assert suppressed == pytest.approx(0.1 * plain)


@pytest.mark.parametrize("plausible", [True, False])
def test_grades_stay_readable_in_both_kinds_of_greys(plausible):
    rng, greys = np.random.default_rng(0), {sequence: [] for sequence in contrast.SEQUENCES}
    for _ in range(200):
        visit = replace(Visit.draw(rng), plausible=plausible)
        for sequence, rows in greys.items():
            rows.append(list(draw_greys(rng, visit, sequence).values()))
    of = {s: dict(zip(NAMES, np.array(rows).T, strict=True)) for s, rows in greys.items()}
    for sequence in ("t2", "t2fs", "stir"):
        for dark in ("disc", "ligament", "root"):
            assert (of[sequence][dark] < 0.75 * of[sequence]["csf"]).all(), (sequence, dark)
    assert (of["t2"]["fat"] > of["t2"]["root"] + 0.1).all()
    for dark in ("csf", "disc", "ligament", "root"):
        assert (of["t1"][dark] < 0.75 * of["t1"]["fat"]).all(), dark
    assert np.median(of["stir"]["fat"]) < 0.25 < np.median(of["t2"]["fat"])
    spread = np.std(np.log(of["t2"]["marrow"] + 0.01))
    assert (spread < 0.3) == plausible


def test_noise_is_correlated_and_has_its_size():
    neighbours = []
    for seed in range(8):
        air = scanner._acquire(np.random.default_rng(seed), np.zeros((4, 128, 128), np.float32), 0.04)
        assert np.sqrt((air.astype(float) ** 2).mean() / 2) == pytest.approx(0.04, rel=0.03)
        off = air - air.mean()
        neighbours.append([(off[:, 1:] * off[:, :-1]).mean(), (off[:, :, 1:] * off[:, :, :-1]).mean()] / off.var())
    assert np.mean(neighbours) > 0.06 and np.min(neighbours) > -0.02


def test_coils_fall_off_in_two_thirds_of_scanners():
    coils = np.array([Visit.draw(np.random.default_rng(i)).coil for i in range(300)])
    assert 0.25 < np.isinf(coils).mean() < 0.42
    assert 40 <= coils.min() < 45 and 280 < coils[np.isfinite(coils)].max() <= 320


@pytest.mark.parametrize("series_type", [T1, T2, AXIAL])
def test_no_plan_knows_the_narrowing(series_type):
    plans = []
    for narrowing in (0.05, 0.95):
        body = Body.draw(np.random.default_rng(1), np.full(25, narrowing))
        plans.append(plan_series(np.random.default_rng(2), body, series_type))
    one, other = plans
    np.testing.assert_array_equal(one.affines, other.affines)
    assert (one.rows, one.cols, one.step, one.greys, one.coil) == (
        other.rows, other.cols, other.step, other.greys, other.coil,
    )  # fmt: skip
