import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import log_loss

from lsdc_utils import metric
from lsdc_utils.vocabulary import COLUMNS, MISSING, SEVERITIES, parse_row_id

CASES = json.loads((Path(__file__).parent / "data" / "metric_cases.json").read_text())["cases"]


def tables(rows):
    solution = pd.DataFrame([(row, label) for row, label, _ in rows], columns=["row_id", "severity"])
    submission = pd.DataFrame([(row, *numbers) for row, _, numbers in rows], columns=["row_id", *SEVERITIES])
    return solution, submission


def good_model(copies=1):
    """Solution and submission of four studies, or of some copies of each."""
    [rows] = [case["rows"] for case in CASES if case["name"] == "good_model"]
    return tables([(f"{k}{row}", *others) for k in range(1, copies + 1) for row, *others in rows])


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_worked_cases(case):
    ours = metric.score(*tables(case["rows"]))
    for part, expected in case["expected"].items():
        if expected is None:
            assert np.isnan(ours[part])
        else:
            assert ours[part] == pytest.approx(expected, abs=1e-6), part


def test_no_severe_spinal_label_anywhere():
    """The public implementation raises here; any_severe knows both classes even where one does not occur."""
    rows = next(case["rows"] for case in CASES if case["name"] == "good_model")
    rows = [(row, min(label, 1) if "spinal" in row else label, numbers) for row, label, numbers in rows]
    solution, submission = tables(rows)
    spinal = submission[submission["row_id"].str.contains("spinal")]
    study = spinal["row_id"].str.split("_").str[0]
    labels = solution.set_index("row_id").loc[spinal["row_id"], "severity"].to_numpy()
    weights = pd.Series(metric.WEIGHTS[labels], index=spinal.index).groupby(study).max()
    severe = spinal["severe"].groupby(study).max()
    expected = log_loss(np.zeros(len(severe)), severe, sample_weight=weights, labels=[0, 1])
    assert metric.score(solution, submission)["any_severe"] == pytest.approx(expected, abs=1e-9)


def test_order_and_extra_rows_do_not_matter():
    solution, submission = tables(CASES[0]["rows"])
    extra = pd.DataFrame([("99_" + COLUMNS[0], 1.0, 0.0, 0.0)], columns=submission.columns)
    shuffled = pd.concat([submission.sample(frac=1, random_state=1), extra])
    assert metric.score(solution, shuffled) == metric.score(solution, submission)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((0.5, 0.5, 0.5), "sum to 1"),
        ((1.5, -0.5, 0.0), "negative"),
        ((np.nan, 0.5, 0.5), "finite"),
        ((np.inf, 0.0, 0.0), "finite"),
    ],
)
def test_bad_rows_are_named(numbers, said):
    solution, submission = tables(CASES[0]["rows"])
    submission.loc[2, list(SEVERITIES)] = numbers
    with pytest.raises(ValueError, match=said) as error:
        metric.score(solution, submission)
    assert submission.loc[2, "row_id"] in str(error.value)


def test_missing_and_doubled_rows_are_named():
    solution, submission = tables(CASES[0]["rows"])
    with pytest.raises(ValueError, match="missing") as error:
        metric.score(solution, submission.drop(3))
    assert submission.loc[3, "row_id"] in str(error.value)
    for doubled in (
        (pd.concat([solution, solution[:1]]), submission),
        (solution, pd.concat([submission, submission[:1]])),
    ):
        with pytest.raises(ValueError, match="doubled"):
            metric.score(*doubled)


def test_a_group_without_rows_is_nan():
    solution, submission = tables(CASES[0]["rows"])
    spinal = solution["row_id"].str.contains("spinal")
    parts = metric.score(solution[~spinal], submission)
    assert np.isnan([parts["spinal"], parts["any_severe"], parts["total"]]).all()
    assert np.isfinite([parts["foraminal"], parts["subarticular"]]).all()


def test_weighted_rows_are_the_best_rows():
    """For rows drawn from p, no other constant row does better than w_k p_k (checked against a grid)."""
    p = np.array([0.7, 0.2, 0.1])
    rng = np.random.default_rng(0)
    labels = rng.choice(3, size=20000, p=p)

    def loss(row):
        return -(metric.WEIGHTS[labels] * np.log(row[labels])).sum()

    best = loss(metric.weight_rows(p))
    for a in np.linspace(0.05, 0.9, 18):
        for b in np.linspace(0.05, 0.94 - a, 10) if a < 0.89 else ():
            assert loss(np.array([a, b, 1 - a - b])) > best * 0.999
    assert best < loss(p)


def labels_table(n, rng, columns=COLUMNS):
    rows = [
        (f"{study}_{column}", severity)
        for study in range(n)
        for column, severity in zip(columns, rng.integers(0, 3, len(columns)), strict=True)
    ]
    table = pd.DataFrame(rows, columns=["row_id", "severity"])
    table[["study_id", "condition", "level"]] = [parse_row_id(row) for row in table["row_id"]]
    table["fold"] = table["study_id"].astype(int) % 2
    return table


def test_prior_is_finite_without_a_severe_label_and_blind_to_its_own_fold():
    labels = labels_table(12, np.random.default_rng(1))
    labels.loc[labels["condition"] == "spinal_canal_stenosis", "severity"] = 0
    rows = metric.prior_out_of_fold(labels)
    assert set(rows["row_id"]) == set(labels["row_id"])
    assert np.allclose(rows[metric.PROBABILITIES].sum(axis=1), 1)
    assert (rows[metric.PROBABILITIES] > 0).all(axis=None)
    assert np.isfinite(list(metric.score(metric.solution_of(labels), metric.weight_table(rows)).values())).all()
    changed = labels.copy()
    changed.loc[changed["fold"] == 0, "severity"] = 2
    again = metric.prior_out_of_fold(changed).set_index("row_id").loc[rows["row_id"]].reset_index()
    mine = labels.set_index("row_id").loc[rows["row_id"], "fold"].to_numpy() == 0
    pd.testing.assert_frame_equal(again[mine], rows[mine])
    assert not np.allclose(again.loc[~mine, metric.PROBABILITIES], rows.loc[~mine, metric.PROBABILITIES])


def test_missing_labels_do_not_count():
    labels = labels_table(6, np.random.default_rng(2))
    labels.loc[::3, "severity"] = -1
    assert len(metric.solution_of(labels)) == (labels["severity"] >= 0).sum()
    counted = metric.prior(labels[labels["severity"] >= 0])
    assert len(counted) == 25
    pd.testing.assert_frame_equal(metric.prior(labels), counted)


def test_the_prior_may_count_both_sides_together() -> None:
    conditions = ["left_neural_foraminal_narrowing"] * 3 + ["right_neural_foraminal_narrowing"] * 2
    labels = pd.DataFrame({"condition": conditions, "level": "l4_l5", "severity": [0, 0, 2, 1, -1]})
    pooled = metric.prior(labels, pool_sides=True).set_index(["condition", "level"])[metric.PROBABILITIES]
    here = pooled.index.isin([(condition, "l4_l5") for condition in conditions])
    assert (pooled[here].to_numpy() == np.array([2.5, 1.5, 1.5]) / 5.5).all() and here.sum() == 2
    assert len(pooled) == 25 and (pooled[~here] == 1 / 3).all(axis=None)  # nothing is known of rows without a label
    own = metric.prior(labels).set_index(["condition", "level"])
    assert own.loc[("right_neural_foraminal_narrowing", "l4_l5"), "moderate"] == 1.5 / 2.5


def test_skill_is_0_at_the_prior_and_1_at_the_oracle():
    parts = dict.fromkeys(metric.PARTS, 0.5)
    assert metric.skill(parts, parts, dict.fromkeys(metric.PARTS, 0.2))["total"] == 0
    assert metric.skill(dict.fromkeys(metric.PARTS, 0.2), parts, dict.fromkeys(metric.PARTS, 0.2))["total"] == 1


def test_models_are_resampled_together_and_an_interval_holds_the_score():
    losses = metric.study_losses(*good_model(copies=3))
    samples = metric.resampled_scores({"one": losses, "other": losses})
    np.testing.assert_array_equal(samples["one"], samples["other"])
    low, high = metric.interval(samples["one"])[-1]
    assert low < losses.score()["total"] < high
    samples["one"][:10, -1] = np.nan
    assert np.isfinite(metric.interval(samples["one"])[-1]).all()
    assert np.isnan(metric.interval(np.full((10, 1), np.nan))).all()


@pytest.mark.parametrize(("patients", "known"), [(metric.FEWEST, True), (metric.FEWEST - 1, False)])
def test_few_patients_have_scores_and_no_interval(patients, known):
    """Two studies of the last patient do not count as two."""
    rows = [(f"{n}_spinal_canal_stenosis_l4_l5", n % 3) for n in range(patients + 1)]
    solution = pd.DataFrame(rows, columns=["row_id", "severity"])
    table = pd.DataFrame({"row_id": solution["row_id"]}).assign(**dict.fromkeys(SEVERITIES, 1 / 3))
    people = pd.Series({f"{n}": min(n, patients - 1) for n in range(patients + 1)})
    block = metric.score_block(solution, {"ensemble": table}, people)
    assert block["n_studies"] == patients + 1 and block["scores"]["ensemble"]["spinal"] > 0
    assert (block["interval"]["ensemble"]["spinal"] != [None, None]) == known


def test_calibration_error_tells_calibrated_from_sharpened():
    rng = np.random.default_rng(3)
    p = rng.dirichlet([2, 1, 1], size=50000)
    labels = (rng.random(len(p))[:, None] > p.cumsum(axis=1)).sum(axis=1)
    assert metric.calibration_error(p, labels) < 0.01
    sharpened = p**3 / (p**3).sum(axis=1, keepdims=True)
    assert metric.calibration_error(sharpened, labels) > 0.05


def test_score_block_has_numbers_that_json_can_hold():
    solution, submission = good_model(copies=3)
    flat = submission.assign(normal_mild=1 / 3, moderate=1 / 3, severe=1 / 3)
    block = metric.score_block(solution, {"prior": flat, "ensemble": submission, "oracle": submission})
    assert block["n_studies"] == 12
    assert block["skill"]["ensemble"]["total"] == 1 and block["skill"]["prior"]["total"] == 0
    for part in metric.PARTS:
        low, high = block["interval"]["ensemble"][part]
        assert low <= block["scores"]["ensemble"][part] <= high
    assert block["skill"]["oracle"]["total"] == 1 and set(block) == {"n_studies", "scores", "skill", "interval"}
    spinal = solution[solution["row_id"].str.contains("spinal")]
    partial = metric.score_block(spinal, {"prior": flat, "ensemble": submission})
    assert partial["skill"] is None and partial["scores"]["ensemble"]["total"] is None
    json.dumps(partial, allow_nan=False)


def test_the_mean_of_groups_stands_beside_a_total_without_value():
    solution, submission = good_model(copies=3)
    flat = submission.assign(normal_mild=1 / 3, moderate=1 / 3, severe=1 / 3)
    models = {"prior": flat, "ensemble": submission, "oracle": submission}
    whole = metric.score(solution, metric.weight_table(submission))
    for word, groups, parts in (("neural|sub", ["nfn", "ss"], ["foraminal", "subarticular"]),
                                ("spinal", ["scs"], ["spinal", "any_severe"])):  # fmt: skip
        rows = solution[solution["row_id"].str.contains(word)]
        block = metric.score_block(rows, models)
        scores = block["scores"]["ensemble"]
        assert block["groups"] == groups and metric.overall(scores) == metric.MEAN
        assert scores[metric.MEAN] == pytest.approx(np.mean([whole[part] for part in parts]))
        assert [part for part in metric.PARTS if scores[part] is None] == [p for p in metric.PARTS if p not in parts]
        low, high = block["interval"]["ensemble"][metric.MEAN]
        assert low <= scores[metric.MEAN] <= high and block["skill"]["ensemble"][metric.MEAN] == 1
        assert set(metric.score(rows, metric.weight_table(submission))) == set(metric.PARTS)
    assert metric.overall(metric.study_losses(solution, submission).score()) == "total"


def test_labels_and_rows_of_other_groups_are_left_out():
    labels = pd.DataFrame({"condition": ["spinal_canal_stenosis", "left_subarticular_stenosis"], "severity": [2, 1]})
    assert metric.only_groups(labels, ["ss"])["severity"].tolist() == [MISSING, 1] and labels["severity"].tolist() == [
        2,
        1,
    ]
    rows = pd.DataFrame({"row_id": ["1_spinal_canal_stenosis_l1_l2", "1_left_subarticular_stenosis_l1_l2"]})
    assert metric.rows_of_groups(rows, ["ss"])["row_id"].tolist() == rows["row_id"].tolist()[1:]


def test_the_area_under_the_curve_counts_pairs_and_ties() -> None:
    positive = np.array([False, False, True, True])
    assert metric.auc(positive, np.array([0.1, 0.4, 0.4, 0.8])) == (3 + 0.5) / 4
    assert metric.auc(~positive, np.array([0.1, 0.4, 0.4, 0.8])) == 0.5 / 4
    assert np.isnan(metric.auc(positive[:2], np.array([0.1, 0.2]))) and np.isnan(metric.auc(positive[:0], np.array([])))
