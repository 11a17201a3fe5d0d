import json

import numpy as np
import pandas as pd
import pytest

from lsdc_utils import metric
from lsdc_utils.grading import blend
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


def equal(*models):
    """Equal weights without bias, for each group."""
    mixture = {"weights": dict.fromkeys(models, 1 / len(models)), "bias": [0.0, 0.0], "kept": "simple", "gain": []}
    return dict.fromkeys(("nfn", "scs", "ss"), mixture)


def total(labels, rows):
    return metric.score(metric.solution_of(labels), metric.weight_table(rows))["total"]


def test_a_sharpened_model_is_cooled_and_noise_is_silenced(world):
    labels, truth, sharp, noise = world
    prior = metric.prior_out_of_fold(labels)
    fitted = blend.fit_blend({"yolo": noise, "vit3d": sharp}, prior, labels)
    for mixture in fitted.values():
        assert abs(mixture["weights"]["yolo"]) < 0.15
        assert 0.2 < mixture["weights"]["vit3d"] < 0.5  # the model is p^3: a third undoes it
    honest = blend.cross_fitted({"yolo": noise, "vit3d": sharp}, prior, labels)
    alone = blend.cross_fitted({"vit3d": sharp}, prior, labels)
    assert total(labels, honest) < total(labels, alone) + 0.01  # a useless part does not drag the better one
    assert total(labels, honest) < total(labels, truth) + 0.02
    assert total(labels, honest) < total(labels, sharp) - 0.05


def test_no_model_is_read_backwards(world):
    labels, truth, _, _ = world
    inverse = 1 / truth[list(SEVERITIES)].to_numpy()
    backwards = table(truth["row_id"], inverse / inverse.sum(axis=1, keepdims=True))
    for mixture in blend.fit_blend({"yolo": backwards}, metric.prior_out_of_fold(labels), labels).values():
        assert mixture["weights"]["yolo"] == 0.0  # -1 would undo it


def test_a_patients_studies_are_blended_by_numbers_fitted_on_neither(world, monkeypatch):
    labels, _, sharp, _ = world
    prior, fitted_on = metric.prior_out_of_fold(labels), []
    monkeypatch.setattr(blend, "fit_blend", lambda *given: fitted_on.append({*given[2]["study_id"]}) or equal("vit3d"))
    for kin in (1, 3):
        labels = labels.assign(patient=labels["study_id"].astype(int) // kin)
        blend.cross_fitted({"vit3d": sharp}, prior, labels)
        left_out = [{*labels["study_id"]} - studies for studies in fitted_on]
        assert sorted(study for part in left_out for study in part) == sorted({*labels["study_id"]})
        people = [{int(study) // kin for study in part} for part in left_out]
        assert sum(map(len, people)) == 300 // kin  # each patient in one part
        fitted_on.clear()


def test_numbers_fitted_on_other_rows_blend_the_given_ones(world):
    labels, truth, sharp, noise = world
    prior = metric.prior_out_of_fold(labels)
    own = blend.cross_fitted({"vit3d": sharp}, prior, labels)
    same = blend.cross_fitted({"vit3d": sharp}, prior, labels, fitted_on={"vit3d": sharp})
    pd.testing.assert_frame_equal(own, same)
    silenced = blend.cross_fitted({"vit3d": sharp}, prior, labels, fitted_on={"vit3d": noise})
    assert total(labels, silenced) > total(labels, own) + 0.05  # by the weight that noise gets: nearly the prior
    trusted = blend.cross_fitted({"vit3d": noise}, prior, labels, fitted_on={"vit3d": truth})
    assert total(labels, trusted) > total(labels, prior) + 0.1


def test_ignorance_falls_to_the_prior(world):
    labels, _, _, noise = world
    prior = metric.prior_out_of_fold(labels)
    alone = blend.cross_fitted({"yolo": noise}, prior, labels)
    assert total(labels, alone) < total(labels, prior) + 0.005


def test_a_missing_row_is_the_prior_with_the_group_s_bias_at_most(world):
    labels, truth, _, _ = world
    prior = metric.prior_out_of_fold(labels)
    rows = blend.apply_blend(equal("yolo", "vit3d"), {"yolo": truth[5:], "vit3d": truth[9:]}, prior)
    by_row = rows.set_index("row_id")
    lost = truth["row_id"][:5]
    np.testing.assert_allclose(by_row.loc[lost], prior.set_index("row_id").loc[lost])
    np.testing.assert_allclose(by_row.loc[truth["row_id"][9:]], truth.set_index("row_id")[9:])
    assert np.allclose(rows[list(SEVERITIES)].sum(axis=1), 1)


def test_no_rows_blend_to_no_rows():
    empty = pd.DataFrame(columns=["row_id", *SEVERITIES])  # of a run without test studies: columns have no type
    given = {"yolo": empty, "vit3d": empty}
    rows = blend.apply_blend(equal("yolo", "vit3d"), given, empty)
    assert rows.empty and list(rows) == ["row_id", *SEVERITIES]


def test_cross_fitting_does_not_see_the_row_it_blends(world):
    labels, truth, _, _ = world
    prior = metric.prior_out_of_fold(labels)
    before = blend.cross_fitted({"vit3d": truth}, prior, labels)
    changed = labels.copy()
    study = changed["study_id"] == "7"
    changed.loc[study, "severity"] = 2 - changed.loc[study, "severity"]
    after = blend.cross_fitted({"vit3d": truth}, prior, changed)
    np.testing.assert_array_equal(
        before.loc[study[before.index], list(SEVERITIES)], after.loc[study[after.index], list(SEVERITIES)]
    )
    assert not before.equals(after)


def test_fitted_numbers_are_kept_where_their_gain_is_sure(world):
    labels, truth, sharp, noise = world
    prior = metric.prior_out_of_fold(labels)
    sure = blend.choose_blend({"yolo": noise, "vit3d": sharp}, prior, labels)
    assert {mixture["kept"] for mixture in sure.values()} == {"fitted"}
    assert all(0 < low < mean < high for mean, low, high in (mixture["gain"] for mixture in sure.values()))
    idle = blend.choose_blend({"yolo": truth, "vit3d": truth}, prior, labels)  # equal weights are right already
    kept = [mixture for mixture in idle.values() if mixture["kept"] == "simple"]
    assert len(kept) >= 2  # one in forty is sure by chance
    assert all(mixture["weights"] == {"yolo": 0.5, "vit3d": 0.5} and mixture["gain"][1] <= 0 for mixture in kept)
    assert json.loads(json.dumps(idle)) == idle
    spinal = labels["condition"] == "spinal_canal_stenosis"
    alone = blend.choose_blend({"vit3d": truth}, prior, labels[spinal])
    assert alone["ss"] == equal("vit3d")["ss"]  # no label, nothing to gain


def test_the_simple_blend_drops_a_useless_model_and_the_fit_begins_there(world):
    labels, truth, _, noise = world
    prior = metric.prior_out_of_fold(labels)
    simple = blend.fit_blend({"yolo": noise, "vit3d": truth}, prior, labels, only=())
    assert all(mixture["weights"] == {"yolo": 0.0, "vit3d": 1.0} for mixture in simple.values())
    assert all(mixture["bias"] == [0.0, 0.0] and mixture["kept"] == "simple" for mixture in simple.values())
    fitted = blend.fit_blend({"yolo": noise, "vit3d": truth}, prior, labels)
    weights = pd.DataFrame([mixture["weights"] for mixture in fitted.values()])
    assert (weights["yolo"].abs() < 0.1).all() and (weights["vit3d"] > 0.8).all()
    mixed = blend.fit_blend({"yolo": noise, "vit3d": truth}, prior, labels, only=["scs"])
    assert [mixture["kept"] for mixture in mixed.values()] == ["fitted" if key == "scs" else "simple" for key in mixed]


# ---- rows without evidence -----------------------------------------------------------------------------------------


def test_rows_without_evidence_are_the_prior_and_sources_are_named(world):
    labels, truth, _, _ = world
    prior = metric.prior_out_of_fold(labels).merge(truth[["row_id"]][:75], on="row_id")
    prior = prior.set_index("row_id").loc[truth["row_id"][:75]].reset_index()
    yolo = table(list(prior["row_id"][:3]), np.tile([0.1, 0.2, 0.7], (3, 1)))
    vit3d = table(list(prior["row_id"][2:6]), np.tile([0.2, 0.2, 0.6], (4, 1)))
    given = {"yolo": yolo, "vit3d": vit3d}
    biased = {key: {**mixture, "bias": [0.3, 0.5]} for key, mixture in equal(*given).items()}
    blended = {name: blend.apply_blend(equal(name), given, prior) for name in given}
    blended["ensemble"] = blend.apply_blend(biased, given, prior)
    unseen = set(prior["row_id"][[0, 1, 3, 4, 9]])
    finished, sources = blend.finish(blended, given, prior, unseen)
    assert list(sources[:7]) == ["yolo", "yolo", "yolo+vit3d", "vit3d", "vit3d", "vit3d", "prior"]
    assert list(sources.unique()) == ["yolo", "yolo+vit3d", "vit3d", "prior"]
    values, shares = finished["ensemble"][list(SEVERITIES)].to_numpy(), prior[list(SEVERITIES)].to_numpy()
    np.testing.assert_allclose(values[:2], yolo[list(SEVERITIES)][:2])  # not half way to the prior
    np.testing.assert_allclose(values[3:5], vit3d[list(SEVERITIES)][1:3])
    np.testing.assert_allclose(values[[2, 5]], blended["ensemble"][list(SEVERITIES)].iloc[[2, 5]])  # series is there
    np.testing.assert_array_equal(values[6:], shares[6:])  # without the blend's bias
    for name, last in (("yolo", 3), ("vit3d", 6)):
        np.testing.assert_array_equal(finished[name][list(SEVERITIES)].iloc[last:], shares[last:])
        assert list(finished[name]["row_id"]) == list(prior["row_id"])


def test_no_study_is_no_error():
    nothing = table([], np.empty((0, 3)))
    tables = {name: nothing for name in ("yolo", "vit3d", "ensemble")}
    finished, sources = blend.finish(tables, {"yolo": nothing, "vit3d": nothing}, nothing, ())
    assert finished["ensemble"].empty and sources.empty
