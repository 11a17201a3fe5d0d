import numpy as np
import pandas as pd
import pytest

from lsdc_utils import blend, metric
from lsdc_utils.vocabulary import COLUMNS, SEVERITIES, parse_row_id


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
    rows = blend.apply_blend(blend.default_blend(["yolo", "vit3d"]), {"yolo": truth[5:], "vit3d": truth[9:]}, prior)
    by_row = rows.set_index("row_id")
    lost = truth["row_id"][:5]
    np.testing.assert_allclose(by_row.loc[lost], prior.set_index("row_id").loc[lost])
    np.testing.assert_allclose(by_row.loc[truth["row_id"][9:]], truth.set_index("row_id")[9:])
    assert np.allclose(rows[list(SEVERITIES)].sum(axis=1), 1)


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


def test_published_blend_is_the_published_mean(world):
    labels, truth, sharp, _ = world
    prior = metric.prior_out_of_fold(labels)
    rows = blend.published_blend({"yolo": truth[3:], "vit3d": sharp[1:]}, prior).set_index("row_id")
    expected = 0.65 * truth.set_index("row_id") + 0.35 * sharp.set_index("row_id")
    pd.testing.assert_frame_equal(rows.loc[truth["row_id"][3:]], expected[3:])
    pd.testing.assert_frame_equal(rows.loc[truth["row_id"][1:3]], sharp.set_index("row_id")[1:3])
    pd.testing.assert_frame_equal(rows.loc[truth["row_id"][:1]], prior.set_index("row_id").loc[truth["row_id"][:1]])


def test_json_round_trip_and_fold_mean(world):
    labels, truth, sharp, _ = world
    fitted = blend.fit_blend({"vit3d": sharp}, metric.prior_out_of_fold(labels), labels)
    assert blend.from_json(blend.to_json(fitted)) == fitted
    mean = blend.mean_over_folds([truth[:4], truth[2:]]).set_index("row_id")
    pd.testing.assert_frame_equal(mean.loc[truth["row_id"]], truth.set_index("row_id"))
