"""The phantom's body: sizes as promised, findings in their own places, and images that show them where they are."""

import numpy as np
import pytest

from lsdc_utils.phantom import scanner
from lsdc_utils.phantom.body import AXIS, DISC_NAMES, FIRST, LAST, MARKS, STEP, Body, _draw_traits, draw_bow
from lsdc_utils.phantom.causes import CANAL_CAUSES, FORAMEN_CAUSES, RECESS, RECESS_CAUSES, RIM, deal_causes  # fmt: skip
from lsdc_utils.phantom.labels import draw_grades
from lsdc_utils.phantom.layers import Points, paint
from lsdc_utils.vocabulary import AXIAL, COLUMNS, LEVELS, SERIES_TYPES, T1, T2

CANAL, LEFT_FORAMEN, LEFT_RECESS = (COLUMNS.index(f"{c}_l4_l5") for c in (
    "spinal_canal_stenosis", "left_neural_foraminal_narrowing", "left_subarticular_stenosis"))  # fmt: skip


def body(narrowing=0.2, seed=1, **switches):
    return Body.draw(np.random.default_rng(seed), np.broadcast_to(narrowing, len(COLUMNS)), **switches)


def tissue_share(patient, u, v, s, wanted):
    """Share of each point that is one of the wanted tissues, with sharp edges."""
    u, v, s = (a.ravel().astype(np.float32) for a in np.broadcast_arrays(u, v, s))
    value = np.zeros(u.size, np.float32)
    for index, cover, tissue in paint(Points.of(patient, u, v, s, 0.05)):
        assert cover.dtype == np.float32, "double precision would halve the speed"
        value[index] += cover * ((tissue in wanted) - value[index])
    return value


def clean_images(patient, seed=2, **plan):
    """Three series without noise, bias and motion."""
    rng = np.random.default_rng(seed)
    out = {}
    for series_type in SERIES_TYPES:
        acquisition = scanner.plan_series(rng, patient, series_type, protocol=scanner.Protocol(stir=0), **plan)
        acquisition.motion[:] = np.eye(4)
        out[series_type] = acquisition, scanner.expose(patient, acquisition)
    return out


def test_same_generator_state_gives_the_same_bytes():
    images = []
    for _ in range(2):
        rng = np.random.default_rng(7)
        patient = Body.draw(rng, np.full(25, 0.3))
        acquisition = scanner.plan_series(rng, patient, AXIAL, tilted=True)
        images.append(scanner.render(patient, acquisition, rng))
    assert images[0].dtype == np.uint16 and images[0].max() <= 4095
    assert images[0].shape == (20, acquisition.rows, acquisition.cols)
    assert np.array_equal(*images)


@pytest.mark.parametrize("narrowing", [np.full(24, 0.5), np.full(25, 1.1), np.full(25, np.nan)])
def test_narrowing_outside_its_range_is_refused(narrowing):
    with pytest.raises(ValueError, match="25 numbers"):
        Body.draw(np.random.default_rng(0), narrowing)


def test_a_size_is_the_same_function_of_narrowing_in_every_build_and_level():
    steps = np.linspace(0, 1, 5)
    measures = np.array([[body(n, seed).measures().reshape(5, 5) for n in steps] for seed in range(4)])
    assert np.ptp(measures, axis=(0, 3)).max() < 0.01 * measures.max()
    assert (np.diff(measures.mean(axis=(0, 3)), axis=0) < 0).all()


@pytest.mark.parametrize("narrowing", [0.0, 0.35, 0.7, 1.0])
@pytest.mark.parametrize("seed", [3, 4, 5])
def test_measures_are_what_is_built_whatever_the_cause(narrowing, seed):
    patient = body(narrowing, seed, slip=seed == 4)
    measures, recesses = patient.measures().reshape(5, 5), patient.traits["recess_u"]
    for k, disc in enumerate(patient.discs[FIRST : LAST + 1]):
        u, v = (a.ravel() for a in np.meshgrid(np.arange(-11, 11, 0.1), np.arange(-1, 19, 0.1)))
        recess_u = np.where(u > 0, *recesses[:, k])
        outside = ((np.abs(u) - recess_u) / RECESS[1]) ** 2 + ((v - RECESS[0]) / (RECESS[2] + RIM)) ** 2 > 1
        area = 0.01 * (tissue_share(patient, u, v, disc, ("csf", "root", "cord")) * outside).sum()
        assert area == pytest.approx(measures[0, k], rel=0.08)
        v, t = np.meshgrid(np.arange(-3, 10.2, 0.1), np.arange(-6, 17, 0.1))
        for side, sign in enumerate((1, -1)):
            out = sign * patient.traits["foramen_u"][side, k]
            area = 0.01 * tissue_share(patient, out, v, disc + t, ("fat", "root", "vessel")).sum()
            assert area == pytest.approx(measures[1 + side, k], rel=0.1)
            w = np.arange(RECESS[0] - RECESS[2] - RIM, RECESS[0] + RECESS[2] + RIM, 0.02)
            depth = 0.02 * tissue_share(patient, sign * recesses[side, k], w, disc, ("fat", "root")).sum()
            assert depth == pytest.approx(measures[3 + side, k], abs=0.3)


def test_causes_add_up_to_narrowings_and_shared_ones_fit_the_least_narrowed_place():
    narrowing = np.random.default_rng(0).random((200, 25)) ** 2
    for seed, n in enumerate(narrowing):
        dealt = deal_causes(np.random.default_rng(seed), n, slip=3)
        canal, (foramen, recess) = n[:5], n[5:].reshape(2, 2, 5)
        np.testing.assert_allclose(dealt["canal"].sum(-1), canal)
        np.testing.assert_allclose(dealt["foramen"].sum(-1), foramen)
        np.testing.assert_allclose(dealt["recess"].sum(-1), recess)
        assert all((amounts >= 0).all() for amounts in dealt.values())
        least = np.minimum(canal, np.minimum(foramen, recess).min(0))
        assert (dealt["bulge"] <= least).all() and (dealt["facet"] <= np.minimum(foramen, recess)).all()
        assert (dealt["slip"] <= np.minimum(canal, foramen.min(0))).all() and not dealt["slip"][[0, 1, 2, 4]].any()


def test_every_cause_leads_somewhere():
    narrowing = np.full(25, 0.8)
    dealt = [deal_causes(np.random.default_rng(seed), narrowing, slip=2) for seed in range(300)]
    for place, names in (("canal", CANAL_CAUSES), ("foramen", FORAMEN_CAUSES), ("recess", RECESS_CAUSES)):
        first = np.concatenate([causes[place].reshape(-1, len(names)) for causes in dealt]).argmax(-1)
        shares = np.bincount(first, minlength=len(names)) / first.size
        assert shares.shape == (len(names),) and shares.min() > 0.005 and shares.max() < 0.7


def test_causes_and_traits_tell_nothing_about_a_grade_beyond_its_size():
    """Labels less their expectation given the narrowing are uncorrelated with what causes and traits a body has."""
    grades = draw_grades(1500, 3)
    expected = grades.oracle @ [0, 1, 2]
    variance = grades.oracle @ [0, 1, 4] - expected**2
    told = []
    for seed, narrowing in enumerate(grades.narrowing):
        dealt = deal_causes(np.random.default_rng([seed, 1]), narrowing, slip=3)
        traits = _draw_traits(np.random.default_rng([seed, 2]))
        names = (
            "size",
            "lordosis",
            "pelvis",
            "lumbar",
            "transitional",
            "hydration",
            "lip",
            "lobes",
            "recess_u",
            "foramen_u",
        )
        values = [*dealt.values(), *(traits[name] for name in names)]
        told.append(np.concatenate([np.ravel(value).astype(float) for value in values]))
    told = np.array(told)
    told = told[:, told.std(0) > 1e-6]
    told = (told - told.mean(0)) / told.std(0)
    # Standard normal scores if they are independent; about 4,000 of them, so the largest lies near 3.7.
    score = told.T @ (grades.labels - expected) / np.sqrt((told**2).T @ variance)
    assert abs(score).max() < 4.5 and 0.8 < score.std() < 1.2


def test_levels_are_named_from_below():
    seen = {"lumbar": set(), "ratio": []}
    for seed in range(90):
        patient = body(seed=seed)
        index = np.rint((patient.discs - AXIS[0]) / STEP).astype(int)
        height = patient.tables["disc_half"][np.clip(index, 0, AXIS.size - 1)]
        assert height[LAST] >= 0.5 * height[LAST - 1] and height[LAST + 1] < 0.5 * height[LAST]
        ratio = height[LAST + 1] / height[LAST], height[LAST] / height[LAST - 1]
        if patient.traits["transitional"]:
            assert 0.34 < ratio[0] < 0.49 or 0.51 < ratio[1] < 0.66
        else:
            assert ratio[0] < 0.34
        seen["lumbar"].add(patient.traits["lumbar"])
    assert seen["lumbar"] == {4, 5, 6}


def test_an_additional_lumbar_vertebra_lies_above_the_one_called_l1():
    def conus_above_l5_s1(lumbar):
        patient = body(seed=2, slip=False, bow={"lumbar": lumbar, "conus": 0.0})
        return np.searchsorted(patient.tables["cord"], 0.01) * STEP + AXIS[0], patient

    for lumbar in (4, 5, 6):
        tip, patient = conus_above_l5_s1(lumbar)
        assert tip == pytest.approx(patient.discs[LAST - lumbar + 1], abs=2 * STEP)
        assert patient.points().shape == (25, 3)


def test_marks_lie_in_the_canal_at_discs_that_are_not_graded():
    patient = body(seed=6)
    marks, canal = patient.marks(), patient.points()[:5]
    assert list(marks) == ["t11_t12", "t12_l1", "s1_s2", "sacrum", "conus"]
    path = np.array([marks["t11_t12"], marks["t12_l1"], *canal, marks["s1_s2"], marks["sacrum"]])
    steps = np.linalg.norm(np.diff(path, axis=0), axis=1)
    assert (np.diff(path[:, 2]) < 0).all() and steps.min() > 12 and steps.max() < 45
    heights = {name: patient.discs[DISC_NAMES.index(disc)] for name, disc in MARKS.items()}
    heights["conus"] = AXIS[np.flatnonzero(patient.tables["cord"])[0]]
    for name, place in marks.items():
        u, v, s = patient.to_spine(place[None])
        assert abs(u[0]) < 0.05 and s[0] == pytest.approx(heights[name], abs=2 * STEP)
        assert tissue_share(patient, u, v + 1.5, s, ("csf", "root", "cord"))[0] > 0.5


def test_a_lumbosacral_disc_between_free_and_fused_is_marked():
    seen = set()
    for seed in range(40):
        patient = body(seed=seed, slip=False, transitional=seed % 2 == 0)
        half = np.interp(patient.discs[LAST - 1 : LAST + 2], AXIS, patient.tables["disc_half"])
        ratio = half[1:] / half[:-1]  # of L5/S1 and of S1/S2 to the disc above
        between = [k for k in range(2) if 0.35 <= ratio[k] <= 0.65]
        assert ("transitional" in patient.marks()) == bool(between) and (seed % 2 == 1 or between)
        if between:
            place = patient.to_spine(patient.marks()["transitional"][None])[2]
            assert place[0] == pytest.approx(patient.discs[LAST + between[-1]], abs=0.1)
        seen.add(tuple(between))
    assert {(), (0,), (1,)} <= seen


def test_places_vary_as_real_clicks_do():
    traits = [body(seed=seed).traits for seed in range(90)]
    recess, foramen = (np.array([t[name] for t in traits]) for name in ("recess_u", "foramen_u"))
    assert recess.min() >= 5.5 and recess.max() <= 9.5 and (np.diff(recess.mean((0, 1))) > 0.2).all()
    np.testing.assert_allclose(foramen.mean((0, 1)), np.linspace(15.5, 20.5, 5), atol=0.4)
    assert 0.7 < (foramen[:, 0] - foramen[:, 1]).std() < 1.3


def test_spine_coordinates_and_back():
    patient = body(seed=5)
    u, v, s = np.random.default_rng(0).uniform([-30, -40, -60], [30, 40, 100], (200, 3)).T
    assert np.allclose(patient.to_spine(patient.to_patient(u, v, s)), (u, v, s), atol=0.05)


@pytest.fixture(scope="module")
def bowed():
    """A spine that bows 15 mm to the left at L3/L4, its vertebrae turned by a third of the Cobb angle."""
    bow = draw_bow(np.random.default_rng(0), 15.0) | {"scoliosis_phase": np.pi / 2, "scoliosis_wave": 300.0}
    cobb = 2 * np.arcsin(15 * 2 * np.pi / 300)
    return body(seed=5, slip=False, bow=bow | {"turn": cobb / 3 / 15})


def test_what_is_drawn_of_a_bow_lies_within_its_bounds():
    bows = [draw_bow(np.random.default_rng(seed), 15.0) for seed in range(400)]
    waves, phases, turns = (np.array([bow[n] for bow in bows]) for n in ("scoliosis_wave", "scoliosis_phase", "turn"))
    shares = 15 * turns / (2 * np.arcsin(2 * np.pi * 15 / waves))
    for values, low, high in ((waves, 250, 400), (phases, 0, 2 * np.pi), (shares, 0, 1 / 3)):
        assert low <= values.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < values.max() <= high


def test_a_bow_has_its_size_and_its_discs_lean_with_it(bowed):
    zero = np.argmin(np.abs(AXIS))
    assert bowed.centre[zero, 0] == pytest.approx(15) and bowed.centre[:, 0].min() == pytest.approx(-15, abs=0.01)
    np.testing.assert_allclose(np.linalg.norm(np.diff(bowed.centre, axis=0), axis=1), STEP, rtol=1e-3)
    along = np.gradient(bowed.centre, axis=0) / STEP
    _, normals = bowed.disc_planes()
    for disc, normal in zip(bowed.discs[FIRST : FIRST + 5], normals, strict=True):
        np.testing.assert_allclose(along[np.argmin(np.abs(AXIS - disc))], normal, atol=0.002)


def test_turned_vertebrae_take_their_points_and_tissues_with_them(bowed):
    points = bowed.points()
    front, _ = bowed.disc_planes()
    recesses = points[17] - points[22]  # left and right at L3/L4, the apex
    turn = 2 * np.arcsin(15 * 2 * np.pi / 300) / 3
    assert np.arctan2(recesses[1], recesses[0]) == pytest.approx(turn, abs=0.01)
    assert front[2, 0] > points[2, 0] + 5, "the body turns to the convex side, the left"
    assert np.linalg.norm(recesses) == pytest.approx(bowed.traits["recess_u"][:, 2].sum())
    u, v, s = np.random.default_rng(0).uniform([-60, -60, -60], [60, 50, 100], (300, 3)).T
    np.testing.assert_allclose(bowed.to_spine(bowed.to_patient(u, v, s)), (u, v, s), atol=0.05)
    acquisition, image = clean_images(bowed)[AXIAL]
    pixels = np.linalg.solve(acquisition.affines, np.append(points[2], 1))
    k = np.abs(pixels[:, 2]).argmin()
    col, row = np.rint(pixels[k, :2]).astype(int)
    assert image[k, row, col] > 0.8 * acquisition.greys["csf"]


def test_points_lie_in_order():
    points = body(seed=4).points().reshape(5, len(LEVELS), 3)
    assert (np.diff(points[:, :, 2], axis=1) < -15).all(), "levels run from head to foot"
    canal, left_foramen, right_foramen, left_recess, right_recess = points
    assert (left_foramen[:, 0] > left_recess[:, 0]).all() and (left_recess[:, 0] > canal[:, 0]).all()
    assert (right_foramen[:, 0] < right_recess[:, 0]).all() and (right_recess[:, 0] < canal[:, 0]).all()
    assert (left_foramen[:, 2] > left_recess[:, 2]).all(), "the exiting root lies above the disc"


@pytest.mark.parametrize("column", [CANAL, LEFT_FORAMEN, LEFT_RECESS, LEFT_FORAMEN + 5, LEFT_RECESS + 5])
def test_a_narrowing_changes_its_own_place_alone(column):
    before, narrow = np.full(25, 0.2), np.full(25, 0.2)
    narrow[column] = 1.0
    here = body(before).points()[column]
    open_images, narrow_images = clean_images(body(before)), clean_images(body(narrow))
    for series_type, (acquisition, image) in open_images.items():
        change = np.abs(narrow_images[series_type][1] - image)
        k, row, col = np.nonzero(change > 0.05)
        pixels = np.stack([col, row, 0 * row, 0 * row + 1], axis=1)
        places = np.einsum("nij,nj->ni", acquisition.affines[k], pixels)[:, :3]
        away = np.linalg.norm(places - here, axis=1)
        assert len(k) > 10 and (away < 17).mean() > (0.5 if column == CANAL else 0.999)
        assert away.max() < (45 if column == CANAL else 17), "roots may lie in loops above a narrow canal"
        assert change.max() > 0.15


def test_two_narrowings_of_a_level_share_no_place():
    images = {}
    for column in (None, CANAL, LEFT_FORAMEN, LEFT_RECESS):
        narrowing = np.full(25, 0.2)
        narrowing[[] if column is None else column] = 1.0
        images[column] = clean_images(body(narrowing))[AXIAL][1]
    change = {c: np.abs(images[c] - images[None]) for c in images if c is not None}
    for one, other in ((CANAL, LEFT_RECESS), (CANAL, LEFT_FORAMEN), (LEFT_RECESS, LEFT_FORAMEN)):
        shared = np.minimum(change[one], change[other]).sum()
        assert shared < 0.12 * min(change[one].sum(), change[other].sum())


def test_csf_is_bright_on_t2_and_dark_on_t1_at_the_same_place():
    patient = body(0.0)
    levels = {}
    for series_type, (acquisition, image) in clean_images(patient).items():
        point = np.append(patient.points()[2], 1)
        pixel = np.array([np.linalg.solve(affine, point) for affine in acquisition.affines])
        k = np.abs(pixel[:, 2]).argmin()
        col, row = np.rint(pixel[k, :2]).astype(int)
        levels[series_type] = image[k, row, col] / acquisition.greys["csf" if series_type != T1 else "fat"]
    assert levels[T2] > 0.8 and levels[AXIAL] > 0.8 and levels[T1] < 0.5


def test_motion_between_series_is_small_and_told():
    rng, patient = np.random.default_rng(0), body()
    points = patient.points()
    moved = [
        np.linalg.norm(scanner.plan_series(rng, patient, T1).to_scanner(points) - points, axis=1) for _ in range(50)
    ]
    assert 0.8 < np.median(moved) < 2.5


def test_axial_stack_reaches_the_levels_asked_for():
    rng, patient = np.random.default_rng(0), body()
    z = patient.points()[:5, 2]
    for tilted in (False, True):
        affines = scanner.plan_series(rng, patient, AXIAL, levels=(2, 3, 4), tilted=tilted).affines
        assert (np.abs(affines[:, :3, 0] @ [1, 0, 0]) > 0.5).all()
        middle = np.einsum("nij,j->ni", affines, [80, 80, 0, 1])[:, 2]
        assert middle.max() > z[2] > z[4] > middle.min() and middle.max() < z[1]


def test_switches_force_a_slip_and_a_transitional_vertebra():
    slipped, straight = body(slip=True), body(slip=False)
    assert slipped.traits["slip"] != 0 and straight.traits["slip"] == 0
    for wanted in (True, False):
        assert body(transitional=wanted).traits["transitional"] is wanted
