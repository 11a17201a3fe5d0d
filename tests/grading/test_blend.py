import json

import numpy as np
import pandas as pd
import pytest

from lsdc_utils import metric
from lsdc_utils.grading import blend
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, SEVERITIES, mirrored, parse_row_id


@pytest.fixture(scope="module")
def world():
    """300 studies with a known probability for each row, labels drawn from it, and what two models say of it."""
    rng = np.random.default_rng(0)
    rows = [f"{study}_{column}" for study in range(300) for column in COLUMNS]
    level_shift = np.array([parse_row_id(row)[2] == "l4_l5" for row in rows])[:, None] * np.array([[0.0, 0.8, 1.2]])
    logit = rng.normal(size=(len(rows), 1)) * np.array([[-1.5, 0.5, 1.5]]) + np.array([[1.5, 0, -0.5]]) + level_shift
    natural = np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True)
    labels = pd.DataFrame({"row_id": rows})
    labels["severity"] = (rng.random(len(rows))[:, None] > natural.cumsum(axis=1)).sum(axis=1)
    labels[["study_id", "condition", "level"]] = [parse_row_id(row) for row in rows]
    labels["fold"] = labels["study_id"].astype(int) % 2
    sharp = natural**3 / (natural**3).sum(axis=1, keepdims=True)
    noise = rng.dirichlet([1, 1, 1], size=len(rows))
    return labels, table(rows, natural), table(rows, sharp), table(rows, noise)


def table(rows, probabilities):
    out = pd.DataFrame(probabilities, columns=list(SEVERITIES))
    out.insert(0, "row_id", rows)
    return out


def total(labels, rows):
    return metric.score(metric.solution_of(labels), metric.weight_table(rows))["total"]


def test_a_sharpened_model_is_cooled_and_noise_is_silenced(world):
    labels, truth, sharp, noise = world
    prior = metric.prior_out_of_fold(labels)
    fitted = blend.fit_blend({"yolo": noise, "vit3d": sharp}, prior, labels)
    for mixture in fitted.values():
        assert abs(mixture.weights["yolo"]) < 0.15
        assert 0.2 < mixture.weights["vit3d"] < 0.5  # the model is p^3: a third undoes it
    honest = blend.cross_fitted({"yolo": noise, "vit3d": sharp}, prior, labels)
    alone = blend.cross_fitted({"vit3d": sharp}, prior, labels)
    assert total(labels, honest) < total(labels, alone) + 0.01  # a useless part does not drag the better one
    assert total(labels, honest) < total(labels, truth) + 0.02
    assert total(labels, honest) < total(labels, sharp) - 0.05


def test_ignorance_falls_to_the_prior(world):
    labels, _, _, noise = world
    prior = metric.prior_out_of_fold(labels)
    alone = blend.cross_fitted({"yolo": noise}, prior, labels)
    assert total(labels, alone) < total(labels, prior) + 0.005


def test_a_missing_row_is_the_prior_with_the_group_s_bias_at_most(world):
    labels, truth, _, _ = world
    prior = metric.prior_out_of_fold(labels)
    rows = blend.apply_blend(blend.equal_blend(["yolo", "vit3d"]), {"yolo": truth[5:], "vit3d": truth[9:]}, prior)
    by_row = rows.set_index("row_id")
    lost = truth["row_id"][:5]
    np.testing.assert_allclose(by_row.loc[lost], prior.set_index("row_id").loc[lost])
    np.testing.assert_allclose(by_row.loc[truth["row_id"][9:]], truth.set_index("row_id")[9:])
    assert np.allclose(rows[list(SEVERITIES)].sum(axis=1), 1)


def test_no_rows_blend_to_no_rows():
    empty = pd.DataFrame(columns=["row_id", *SEVERITIES])  # of a run without test studies: columns have no type
    given = {"yolo": empty, "vit3d": empty}
    rows = blend.apply_blend(blend.equal_blend(["yolo", "vit3d"]), given, empty)
    assert rows.empty and list(rows) == ["row_id", *SEVERITIES]


def test_cross_fitting_does_not_see_the_row_it_blends(world):
    labels, truth, _, _ = world
    prior = metric.prior_out_of_fold(labels)
    before = blend.cross_fitted({"vit3d": truth}, prior, labels)
    changed = labels.copy()
    mine = changed["study_id"] == "7"
    changed.loc[mine, "severity"] = 2 - changed.loc[mine, "severity"]
    after = blend.cross_fitted({"vit3d": truth}, prior, changed)
    np.testing.assert_array_equal(
        before.loc[mine[before.index], list(SEVERITIES)], after.loc[mine[after.index], list(SEVERITIES)]
    )
    assert not before.equals(after)


def test_fitted_numbers_are_kept_where_their_gain_is_sure(world):
    labels, truth, sharp, noise = world
    prior = metric.prior_out_of_fold(labels)
    sure = blend.choose_blend({"yolo": noise, "vit3d": sharp}, prior, labels)
    assert {mixture.kept for mixture in sure.values()} == {"fitted"}
    assert all(0 < low < mean < high for mean, low, high in (mixture.gain for mixture in sure.values()))
    idle = blend.choose_blend({"yolo": truth, "vit3d": truth}, prior, labels)  # equal weights are right already
    kept = [mixture for mixture in idle.values() if mixture.kept == "simple"]
    assert len(kept) >= 2  # one in forty is sure by chance
    assert all(mixture.weights == {"yolo": 0.5, "vit3d": 0.5} and mixture.gain[1] <= 0 for mixture in kept)
    assert blend.from_json(json.loads(json.dumps(blend.to_json(idle)))) == idle
    spinal = labels["condition"] == "spinal_canal_stenosis"
    alone = blend.choose_blend({"vit3d": truth}, prior, labels[spinal])
    assert alone["ss"] == blend.Mixture({"vit3d": 1.0}, kept="simple")  # no label, nothing to gain


def test_the_simple_blend_drops_a_useless_model_and_the_fit_begins_there(world):
    labels, truth, _, noise = world
    prior = metric.prior_out_of_fold(labels)
    simple = blend.simple_blend({"yolo": noise, "vit3d": truth}, prior, labels)
    assert all(mixture.weights == {"yolo": 0.0, "vit3d": 1.0} for mixture in simple.values())
    assert all(mixture.bias == (0.0, 0.0) and mixture.kept == "simple" for mixture in simple.values())
    fitted = blend.fit_blend({"yolo": noise, "vit3d": truth}, prior, labels)
    assert all(abs(mixture.weights["yolo"]) < 0.1 and mixture.weights["vit3d"] > 0.8 for mixture in fitted.values())
    mixed = blend.fit_blend({"yolo": noise, "vit3d": truth}, prior, labels, only=["scs"])
    assert [mixture.kept for mixture in mixed.values()] == ["fitted" if key == "scs" else "simple" for key in mixed]


def test_one_temperature_undoes_a_power_and_leaves_rows_without_evidence_to_the_prior(world):
    labels, truth, sharp, noise = world
    prior = metric.prior_out_of_fold(labels)
    powers = blend.fit_temperatures({"vit3d": sharp}, prior, labels)
    assert np.allclose(list(powers.values()), 1 / 3, atol=0.1)  # pulled to 1
    rows = blend.cross_fitted({"vit3d": sharp[5:]}, prior, labels, blend.fit_temperatures, blend.temper)
    assert total(labels, rows) < total(labels, truth) + 0.02
    by_row, lost = rows.set_index("row_id"), truth["row_id"][:5]
    np.testing.assert_allclose(by_row.loc[lost], prior.set_index("row_id").loc[lost])
    both = blend.temper(dict.fromkeys(powers, 1.0), {"yolo": noise[5:], "vit3d": truth}, prior).set_index("row_id")
    mean = np.sqrt(prior.set_index("row_id").loc[lost] * truth.set_index("row_id").loc[lost])  # half of it is the prior
    np.testing.assert_allclose(both.loc[lost], mean.div(mean.sum(axis=1), axis=0))


def test_published_blend_is_the_published_mean(world):
    labels, truth, sharp, _ = world
    prior = metric.prior_out_of_fold(labels)
    rows = blend.published_blend({"yolo": truth[3:], "vit3d": sharp[1:]}, prior).set_index("row_id")
    expected = 0.65 * truth.set_index("row_id") + 0.35 * sharp.set_index("row_id")
    pd.testing.assert_frame_equal(rows.loc[truth["row_id"][3:]], expected[3:])
    pd.testing.assert_frame_equal(rows.loc[truth["row_id"][1:3]], sharp.set_index("row_id")[1:3])
    pd.testing.assert_frame_equal(rows.loc[truth["row_id"][:1]], prior.set_index("row_id").loc[truth["row_id"][:1]])


def test_json_round_trip(world):
    labels, _, sharp, _ = world
    fitted = blend.fit_blend({"vit3d": sharp}, metric.prior_out_of_fold(labels), labels)
    assert blend.from_json(blend.to_json(fitted)) == fitted


# ---- rows without evidence -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cohort():
    """800 studies of normal latents with known correlations, cut where `prior` says; labels and their prior."""
    rng = np.random.default_rng(1)
    truth = {kind: 0.75 ** (1 + int(kind.split(" levels")[0][-1])) for kind in blend.pair_kinds().ravel()}
    correlation = blend.correlation_matrix(truth)
    latent = rng.multivariate_normal(np.zeros(25), correlation, size=800)
    shares = np.array([[0.9, 0.08, 0.02], [0.7, 0.2, 0.1], [0.6, 0.25, 0.15], [0.5, 0.3, 0.2], [0.8, 0.15, 0.05]] * 5)
    severity = (latent[..., None] > blend._cuts(shares)[:, 1:3]).sum(axis=-1)
    labels = pd.DataFrame({"row_id": [f"{study}_{column}" for study in range(800) for column in COLUMNS]})
    labels[["study_id", "condition", "level"]] = [parse_row_id(row) for row in labels["row_id"]]
    labels["severity"] = severity.ravel()
    labels.loc[rng.random(len(labels)) < 0.05, "severity"] = -1
    return labels, metric.prior(labels), correlation, severity


def certain(severity):
    """Rows (..., 3) that are all but sure of `severity`."""
    return np.eye(3)[severity] * 0.97 + 0.01


def test_without_evidence_the_expectation_is_the_prior(cohort):
    _, prior, correlation, _ = cohort
    shares = blend._by_column(prior)
    nothing = np.full((2, 25, 3), np.nan)
    np.testing.assert_allclose(blend.expect(nothing, shares, correlation)[1], shares, atol=1e-12)
    # Rows that only repeat the prior tell nothing of the others either.
    nothing[0, :10] = shares[:10]
    np.testing.assert_allclose(blend.expect(nothing, shares, correlation)[0], shares, atol=1e-9)


def test_more_severe_neighbours_raise_the_expectation_on_both_sides_alike(cohort):
    _, prior, _, _ = cohort
    correlation = blend.correlation_matrix(dict.fromkeys(blend.pair_kinds().ravel(), 0.4))
    shares = np.tile(blend._by_column(prior)[:5], (5, 1))
    seen = np.full((3, 25, 3), np.nan)
    for study in range(3):
        seen[study, :5] = certain(study)  # the canal of study k has grade k at all levels
    expected = blend.expect(seen, shares, correlation)[:, 5:]
    np.testing.assert_allclose(expected.sum(axis=2), 1)
    assert (np.diff(expected[..., 2], axis=0) > 0).all()
    assert (np.diff(expected[..., 0], axis=0) < 0).all()
    conditions = list(CONDITIONS)[1:]
    by_condition = expected.reshape(3, len(conditions), 5, 3)
    other = [conditions.index(mirrored(condition)) for condition in conditions]
    np.testing.assert_allclose(by_condition, by_condition[:, other], atol=1e-12)


def test_correlations_are_found_again_and_beat_the_prior(cohort):
    labels, prior, truth, severity = cohort
    half = labels["study_id"].astype(int) < 400
    correlations = blend.fit_correlations(labels[half], prior)
    matrix = blend.correlation_matrix(correlations)
    assert np.linalg.eigvalsh(matrix).min() > 0
    assert np.abs(matrix - truth).mean() < 0.05
    shares = blend._by_column(prior)
    seen = certain(severity[400:]).astype(float)
    seen[:, 15:] = np.nan  # the recesses are not seen
    hidden = severity[400:, 15:, None]
    loss = {}
    for name, found in (("fitted", matrix), ("true", truth), ("none", np.eye(25))):
        loss[name] = -np.log(np.take_along_axis(blend.expect(seen, shares, found)[:, 15:], hidden, axis=2)).mean()
    assert loss["fitted"] < loss["none"] - 0.05
    assert loss["fitted"] < loss["true"] + 0.01


def test_few_or_missing_labels_give_correlations_near_zero(cohort):
    labels, prior, _, _ = cohort
    few = labels[labels["study_id"].astype(int) < 2]
    assert max(map(abs, blend.fit_correlations(few, prior).values())) < 0.5
    assert set(blend.fit_correlations(few.assign(severity=-1), prior).values()) == {0.0}


def test_rows_without_evidence_are_completed_and_named(cohort):
    labels, prior, _, _ = cohort
    rows = labels[["row_id", "condition", "level"]][:75].merge(prior, on=["condition", "level"])
    shares = rows[["row_id", *SEVERITIES]]
    yolo = table(list(shares["row_id"][:3]), np.tile([0.1, 0.2, 0.7], (3, 1)))
    vit3d = table(list(shares["row_id"][2:6]), np.tile([0.2, 0.2, 0.6], (4, 1)))
    given = {"yolo": yolo, "vit3d": vit3d}
    correlations = dict.fromkeys(blend.pair_kinds().ravel(), 0.3)
    blended = {name: blend.apply_blend(blend.equal_blend([name]), given, shares) for name in given}
    blended["ensemble"] = blend.apply_blend(blend.equal_blend(list(given)), given, shares)
    unseen = set(shares["row_id"][[0, 1, 3, 4, 9]])
    finished, sources = blend.finish(blended, given, shares, correlations, unseen)
    assert list(sources[:7]) == ["yolo", "yolo", "yolo+vit3d", "vit3d", "vit3d", "vit3d", "expectation"]
    assert list(sources.unique()) == ["yolo", "yolo+vit3d", "vit3d", "expectation", "prior"]
    assert list(sources[25:]) == ["prior"] * 50
    values = finished["ensemble"][list(SEVERITIES)].to_numpy()
    np.testing.assert_allclose(values.sum(axis=1), 1)
    np.testing.assert_allclose(values[:2], yolo[list(SEVERITIES)][:2])  # not half way to the prior
    np.testing.assert_allclose(values[3:5], vit3d[list(SEVERITIES)][1:3])
    np.testing.assert_allclose(values[5], blended["ensemble"][list(SEVERITIES)].iloc[5])  # looked at, and not found
    assert (values[6:25, 2] > shares["severe"][6:25]).all()
    np.testing.assert_allclose(values[25:], shares[list(SEVERITIES)][25:], atol=1e-12)
    assert list(finished["yolo"]["row_id"]) == list(shares["row_id"])


def test_no_study_is_no_error():
    nothing = table([], np.empty((0, 3)))
    tables = {name: nothing for name in ("yolo", "vit3d", "ensemble")}
    finished, sources = blend.finish(tables, {"yolo": nothing, "vit3d": nothing}, nothing, {})
    assert finished["ensemble"].empty and sources.empty
