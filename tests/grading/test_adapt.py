"""A run's blend fitted to few studies of another population."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lsdc_utils import metric
from lsdc_utils.grading import adapt, grade
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, GROUPS, LEVELS, SEVERITIES

NATURAL = np.array([0.8, 0.14, 0.06])
MODELS = ("yolo", "vit3d")
BLENDS = grade.blends_of(MODELS)
Part = tuple[dict[str, pd.DataFrame], pd.DataFrame]  # the models' rows, and the labels


@pytest.fixture(scope="module")
def recipe() -> dict:
    prior = [
        {"condition": c, "level": v, **dict(zip(SEVERITIES, NATURAL, strict=True))} for c in CONDITIONS for v in LEVELS
    ]
    blends = {}
    for name, models in BLENDS.items():
        mixture = {"weights": dict.fromkeys(models, 1 / len(models)), "bias": [0.0, 0.0], "kept": "simple", "gain": []}
        blends[name] = dict.fromkeys(GROUPS, mixture)
    return {"format": 4, "kind": "fitted", "folds": [0], "vit_views": 1, "threads": 1, "prior": prior, **blends}


def population(n: int, seed: int, shift: tuple[float, float] = (0, 0), factor: float = 1.0) -> Part:
    """`n` studies whose labels follow what both models say with its log odds times `factor` and then shifted."""
    rng = np.random.default_rng(seed)
    rows = [f"{seed * 1000 + study}_{column}" for study in range(n) for column in COLUMNS]
    said = np.log(NATURAL) + rng.normal(0, 1.2, (len(rows), 1)) * [-1, 0.3, 1]
    true = np.log(NATURAL) + factor * (said - np.log(NATURAL)) + [0, *shift]
    said, true = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (said, true))
    labels = metric.row_keys(rows)[["row_id", "study_id", "condition", "level"]]
    labels["severity"] = (rng.random(len(rows))[:, None] > true.cumsum(axis=1)).sum(axis=1)
    table = pd.DataFrame(said, columns=list(SEVERITIES)).assign(row_id=rows)
    return dict.fromkeys(MODELS, table), labels


def total(recipe: dict, part: Part) -> float:
    given, labels = part
    tables, _ = grade.blend_rows(recipe, given, grade.prior_of(recipe, grade.rows_of(labels["study_id"].unique())), ())
    return metric.score(metric.solution_of(labels), metric.weight_table(tables["ensemble"]))["total"]


def test_nothing_changes_where_the_runs_own_numbers_are_right(recipe: dict) -> None:
    for seed, n in ((1, 20), (2, 50), (3, 100)):
        fitted = adapt.fit_recipe(recipe, *population(n, seed))
        assert fitted["adapted"]["changed"] == [] and fitted["adapted"]["studies"] == n
        assert min(fitted["adapted"]["p"].values()) >= adapt.SURE
        assert {name: fitted[name] for name in BLENDS} == {name: recipe[name] for name in BLENDS}
        before, after = (pd.DataFrame(one["prior"])[list(SEVERITIES)] for one in (recipe, fitted))
        np.testing.assert_allclose(after, before)


@pytest.mark.parametrize(("n", "least"), [(50, 0.6), (100, 0.8)])
def test_a_shift_is_recovered(recipe: dict, n: int, least: float) -> None:
    """Of a population whose reader calls fewer rows severe and more moderate, most of what can be gained."""
    shift, unseen = (0.6, -1.2), population(400, 90, (0.6, -1.2))
    known = {name: {key: mixture | {"bias": list(shift)} for key, mixture in recipe[name].items()} for name in BLENDS}
    fitted = adapt.fit_recipe(recipe, *population(n, 5, shift))
    assert set(fitted["adapted"]["changed"]) == set(GROUPS)
    possible = total(recipe, unseen) - total(recipe | known, unseen)
    assert possible > 0.05 and total(recipe, unseen) - total(fitted, unseen) > least * possible
    for mixture in fitted["ensemble"].values():
        assert mixture["kept"] == "adapted" and mixture["bias"][0] > 0.1 and mixture["bias"][1] < -0.3
        assert mixture["weights"]["yolo"] == pytest.approx(mixture["weights"]["vit3d"])  # one temperature


def test_the_strength_is_chosen_with_the_numbers_that_are_fitted(recipe: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    free = []
    own_fit = adapt.Problem.fit
    monkeypatch.setattr(adapt.Problem, "fit", lambda problem, s: free.append(problem.biases) or own_fit(problem, s))
    for n, biases in ((36, [1, 2]), (34, [])):  # of the inner parts each leaves fewer than 35 to fit on
        adapt.fit_recipe(recipe, *population(n, 5, (0.6, -1.2)))
        assert free and all(own == biases for own in free)
        free.clear()


def test_few_studies_change_prior_and_one_temperature_only(recipe: dict) -> None:
    given, labels = population(30, 6, factor=0.2)
    fitted = adapt.fit_recipe(recipe, given, labels)
    assert set(fitted["adapted"]["changed"]) == set(GROUPS)
    mixtures = fitted["ensemble"].values()
    [factor] = {round(weight / 0.5, 9) for mixture in mixtures for weight in mixture["weights"].values()}
    assert factor < 0.8 and all(mixture["bias"] == [0.0, 0.0] for mixture in mixtures)
    unseen = population(200, 91, factor=0.2)
    assert total(fitted, unseen) < total(recipe, unseen) - 0.01
    assert fitted["prior"] != recipe["prior"]


def test_two_studies_of_a_patient_are_no_more_evidence_than_one(recipe: dict) -> None:
    given, labels = population(17, 4)  # 34 studies: still one temperature for all groups
    own = adapt.fit_recipe(recipe, given, labels)["adapted"]["p"]
    again = [table.assign(row_id="9" + table["row_id"]) for table in (given["yolo"], labels)]
    twice = pd.concat([labels, again[1].assign(study_id="9" + labels["study_id"])], ignore_index=True)
    patients = twice["study_id"].str[-4:]
    tables = dict.fromkeys(MODELS, pd.concat([given["yolo"], again[0]], ignore_index=True))
    assert adapt.fit_recipe(recipe, tables, twice.assign(patient=patients))["adapted"]["p"] == pytest.approx(own)
    alone = adapt.fit_recipe(recipe, tables, twice)["adapted"]["p"]
    assert alone["scs"] < own["scs"]


def test_the_bias_of_a_grade_without_a_case_stays(recipe: dict) -> None:
    given, labels = population(60, 7, (1.0, 0.0))
    labels["severity"] = labels["severity"].clip(upper=1)
    fitted = adapt.fit_recipe(recipe, given, labels)
    assert fitted["adapted"]["changed"]
    for key in fitted["adapted"]["changed"]:
        bias = fitted["ensemble"][key]["bias"]
        assert bias[0] > 0.2 and bias[1] == 0.0


def test_a_group_without_labels_stays(recipe: dict) -> None:
    given, labels = population(60, 8, (0.6, -1.2))
    fitted = adapt.fit_recipe(recipe, given, labels[labels["condition"].str.contains("foraminal")])
    assert fitted["adapted"]["changed"] == ["nfn"] and fitted["adapted"]["p"]["scs"] == 1.0
    assert fitted["ensemble"]["scs"] == recipe["ensemble"]["scs"]
    of = pd.DataFrame(fitted["prior"]).groupby(pd.DataFrame(fitted["prior"])["condition"].map(lambda c: c[-9:]))
    assert np.ptp(of["severe"].first()) > 0  # only that group's prior moved


def test_the_prior_counts_both_sides_and_is_worth_its_pseudo_labels(recipe: dict) -> None:
    rows = metric.row_keys(f"{study}_{column}" for study in range(1, 51) for column in COLUMNS).assign(severity=2)
    prior = pd.DataFrame(adapt.shrunk_prior(recipe["prior"], rows)).set_index(["condition", "level"])
    left, canal = ("left_neural_foraminal_narrowing", "l1_l2"), ("spinal_canal_stenosis", "l1_l2")
    assert prior.loc[left, "severe"] == pytest.approx((100 + 100 * 0.06) / 200)
    assert prior.loc[canal, "severe"] == pytest.approx((50 + 100 * 0.06) / 150)
    np.testing.assert_allclose(prior[list(SEVERITIES)].sum(axis=1), 1)


def test_a_study_is_graded_by_numbers_fitted_on_others(recipe: dict) -> None:
    given, labels = population(60, 9, (0.6, -1.2))
    labels = labels[labels["condition"].str.contains("canal")].reset_index(drop=True)  # one group, to save time
    labels["fold"] = labels["study_id"].astype(int) % 5
    before = adapt.cross_fitted(recipe, given, labels, set())["ensemble"]
    first = labels["fold"] == labels["fold"].iloc[0]
    other = labels.assign(severity=labels["severity"].where(~first, 2 - labels["severity"]))
    after = adapt.cross_fitted(recipe, given, other, set())["ensemble"]
    same = (before[list(SEVERITIES)].to_numpy() == after[list(SEVERITIES)].to_numpy()).all(axis=1)
    held_out = before["row_id"].str.split("_").str[0].isin(labels["study_id"][first])
    assert same[held_out].all() and not same[~held_out].all()
    assert list(before["row_id"]) == list(given["yolo"]["row_id"])


def test_one_patient_of_a_group_is_no_evidence(recipe: dict) -> None:
    given, labels = population(40, 9, (0.6, -1.2))
    alone = labels["study_id"].eq(labels["study_id"].iloc[0]) | ~labels["condition"].str.contains("canal")
    fitted = adapt.fit_recipe(recipe, given, labels[alone])
    assert fitted["adapted"]["p"]["scs"] == 1.0 and "scs" not in fitted["adapted"]["changed"]
    assert set(fitted["adapted"]["changed"]) == {"nfn", "ss"}


def test_blends_without_a_member_are_not_kept_as_they_were(recipe: dict) -> None:
    fitted = adapt.fit_recipe(recipe | {"without": {"b": {"ensemble": {}}}}, *population(50, 2, (0.6, -1.2)))
    assert fitted["adapted"]["changed"] and fitted["without"] == {}
