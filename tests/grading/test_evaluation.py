import numpy as np
import pandas as pd
import pytest

from lsdc_utils import metric
from lsdc_utils.grading import evaluation
from lsdc_utils.vocabulary import COLUMNS, SEVERITIES


@pytest.fixture(scope="module")
def world():
    """200 studies, their labels drawn from known probabilities (the oracle), and a model that blurs them."""
    rng = np.random.default_rng(0)
    rows = [f"{study}_{column}" for study in range(200) for column in COLUMNS]
    natural = rng.dirichlet([1.5, 0.5, 0.3], size=len(rows))
    severity = (rng.random(len(rows))[:, None] > natural.cumsum(axis=1)).sum(axis=1)
    blurred = 0.5 * natural + 0.5 * natural.mean(axis=0)
    tables = {
        "prior": table(rows, np.tile(natural.mean(axis=0), (len(rows), 1))),
        "ensemble": table(rows, blurred),
        "oracle": table(rows, natural),
    }
    return pd.DataFrame({"row_id": rows, "severity": severity}), tables


def table(rows, probabilities):
    return pd.DataFrame(probabilities, columns=list(SEVERITIES)).assign(row_id=rows)


@pytest.fixture(scope="module")
def judged(world):
    solution, tables = world
    return {model: evaluation.judge(rows, solution) for model, rows in tables.items()}


def test_judged_rows_add_up_to_the_score(world, judged):
    solution, tables = world
    score = metric.score(solution, metric.weight_table(tables["ensemble"]))
    sums = judged["ensemble"].groupby("group")[["loss", "weight"]].sum()
    for key, part in (("nfn", "foraminal"), ("scs", "spinal"), ("ss", "subarticular")):
        assert sums.loss[key] / sums.weight[key] == pytest.approx(score[part])
    assert evaluation.judge(tables["prior"], solution.head(0)).empty


def test_a_difference_is_paired(world):
    solution, tables = world
    for mean, low, high in evaluation.difference(solution, tables, "oracle", "ensemble").values():
        assert low <= mean <= high < 0
    assert set(evaluation.difference(solution, tables, "oracle", "oracle").values()) == {(0.0, 0.0, 0.0)}


def test_traits_split_the_rows_and_leave_out_what_is_not_known(judged):
    level = judged["ensemble"]["level"].where(judged["ensemble"]["level"] != "l1_l2", None)
    found = evaluation.by_trait(judged, level)
    assert list(found.index) == ["l2_l3", "l3_l4", "l4_l5", "l5_s1"]
    assert (found["rows"] == 1000).all() and (found["studies"] == 200).all()
    assert ((found.oracle < found.ensemble) & (found.ensemble < found.prior)).all()
    assert ((found.low < found.skill) & (found.skill < found.high)).all()
    alone = evaluation.by_trait({"ensemble": judged["ensemble"]}, level)
    assert "skill" not in alone and ((alone.low < alone.ensemble) & (alone.ensemble < alone.high)).all()


def test_discrimination_of_a_perfect_and_of_an_ignorant_model(world):
    solution, tables = world
    sure = tables["prior"].assign(**dict(zip(SEVERITIES, np.eye(3)[solution.severity].T, strict=True)))
    found = evaluation.discrimination(evaluation.judge(sure, solution))
    assert (found["AUC"] == 1).all() and (found[["sensitivity at 0.5", "specificity at 0.5"]] == 1).all(axis=None)
    assert (evaluation.discrimination(evaluation.judge(tables["prior"], solution))["AUC"] == 0.5).all()
    mild = solution[solution.severity == 0]
    assert evaluation.discrimination(evaluation.judge(sure, mild))["AUC"].isna().all()


def test_own_evidence_tells_a_reader_of_places_from_a_reader_of_company(world, judged):
    solution, tables = world
    company = tables["oracle"].copy()  # a study's mean says how ill it is, and nothing of a place
    study = company["row_id"].str.partition("_")[0]
    company[list(SEVERITIES)] = company.groupby(study)[list(SEVERITIES)].transform("mean")
    both = judged | {"company": evaluation.judge(company, solution)}
    truth = judged["prior"]
    perfect = np.eye(3)[truth["severity"]] * 0.97 + 0.01
    both["perfect"] = truth.assign(**dict(zip(SEVERITIES, perfect.T, strict=True)))
    found = evaluation.own_evidence(both)
    assert (found["company"] == 0.5).all() and (found["perfect"] > 0.8).all()  # moderate or worse are ties
    assert (found["oracle"] > 0.7).all() and "prior" not in found
    foramina = truth[truth["group"] == "nfn"].pivot(index=["study_id", "level"], columns="side", values="severity")
    assert found.loc["foraminal", "pairs"] == (foramina["left"] != foramina["right"]).sum()
    nothing = {model: rows.head(0) for model, rows in judged.items()}
    assert (evaluation.own_evidence(nothing)["pairs"] == 0).all()


def test_two_readers_kappa_is_what_two_drawn_readers_reach(world, judged):
    solution, tables = world
    natural = tables["oracle"][list(SEVERITIES)].to_numpy()
    draws = np.random.default_rng(1).random(len(natural))
    second = pd.DataFrame({"row_id": solution.row_id, "severity": (draws[:, None] > natural.cumsum(axis=1)).sum(1)})
    said = table(solution.row_id, np.eye(3)[second.severity])
    drawn = evaluation.agreement({"ensemble": evaluation.judge(said, solution)})
    expected = evaluation.agreement(judged)["two readers"]
    np.testing.assert_allclose(drawn["ensemble"], expected, atol=0.07)


def test_the_oracle_is_calibrated(judged):
    found = evaluation.calibration(judged)
    assert found.loc["oracle", "all rows"] < 0.015 < found.loc["ensemble", "all rows"]


def test_exchanged_labels_are_suspected_first(world):
    solution, tables = world
    clear = tables["oracle"][SEVERITIES[0]] > 0.97
    wrong = solution[clear].head(20)["row_id"]
    solution = solution.assign(severity=solution["severity"].mask(solution["row_id"].isin(wrong), 2))
    found = evaluation.suspects(evaluation.judge(tables["oracle"], solution))
    assert set(wrong) <= set(found["row_id"]) and (found["probability"].diff().dropna() >= 0).all()
    assert found["row_id"].head(20).isin(wrong).mean() > 0.5


def test_how_well_suspicion_finds_planted_labels(world):
    solution, tables = world
    sure = tables["oracle"].copy()  # a model that knows every label, and is asked about some that are wrong
    sure[list(SEVERITIES)] = 0.01 + 0.97 * np.eye(3)[solution.set_index("row_id")["severity"].loc[sure["row_id"]]]
    wrong = list(solution["row_id"].head(8))
    changed = solution.assign(severity=(solution["severity"] + solution["row_id"].isin(wrong)) % 3)
    told = evaluation.suspicion(evaluation.judge(sure, changed), wrong)
    assert told == {"planted": 8, "listed": 8, "precision": 1.0, "recall": 1.0, "precision_at_half": 1.0}
    told = evaluation.suspicion(evaluation.judge(sure, changed), wrong[:4])  # half of those listed are right after all
    assert told["precision"] == 0.5 and told["recall"] == 1.0 and told["precision_at_half"] == 0.5
    curve = evaluation.suspicion_curve(evaluation.judge(sure, solution), wrong)  # nothing is suspect
    assert curve.loc[curve["recall"] == 1, "precision"].min() == 8 / len(solution)


def test_cut_offs_are_those_of_other_rows_and_the_fixed_ones_without(judged):
    rows = judged["ensemble"]
    found = evaluation.find_cut_offs(rows)
    assert set(found) == {"foraminal", "spinal", "subarticular"}
    assert all(set(events) == {"severe", "moderate or severe"} for events in found.values())
    own = rows[rows["group"] == "scs"]
    sums = [
        (own["severe"][own.severity == 2] >= cut).mean() + (own["severe"][own.severity < 2] < cut).mean()
        for cut in own["severe"]
    ]
    cut = found["spinal"]["severe"]
    table = evaluation.discrimination(rows, found)
    line = table.loc[("spinal", "severe")]
    assert line["cut-off"] == cut and line["sensitivity"] + line["specificity"] == pytest.approx(max(sums))
    assert line["sensitivity"] == (own["severe"][own.severity == 2] >= cut).mean()
    mixed = evaluation.discrimination(rows, {"spinal": found["spinal"]}).loc[("foraminal", "severe")]
    assert np.isnan(mixed["cut-off"]) and mixed["sensitivity at 0.2"] > mixed["sensitivity at 0.5"]
    assert evaluation.find_cut_offs(rows[rows["severity"] == 0]) == {}


def test_intervals_resample_patients_and_need_ten(judged):
    rows = judged["ensemble"].assign(patient=judged["ensemble"]["study_id"])

    def share(sample):
        return pd.DataFrame({"share": [(sample["severity"] == 2).mean()]})

    low, high = (end.loc[0, "share"] for end in evaluation.intervals(rows, share, draws=400))
    value = share(rows).loc[0, "share"]
    of_study = (rows["severity"] == 2).groupby(rows["study_id"]).mean()
    assert high - low == pytest.approx(2 * 1.96 * of_study.std() / np.sqrt(200), rel=0.2) and low < value < high
    ten = rows.assign(patient=rows["study_id"].astype(int) // 20)  # every patient has twenty studies
    narrow, wide = (np.ptp([end.loc[0, "share"] for end in evaluation.intervals(some, share)]) for some in (rows, ten))
    twins = pd.concat([rows, rows.assign(study_id=rows["study_id"].astype(int) + 10**6)])  # two equal studies a patient
    by_patient = np.ptp([end.loc[0, "share"] for end in evaluation.intervals(twins, share, draws=400)])
    twins["patient"] = twins["study_id"]
    by_study = np.ptp([end.loc[0, "share"] for end in evaluation.intervals(twins, share, draws=400)])
    assert by_patient == pytest.approx(narrow, rel=0.15) and 1.2 < by_patient / by_study < 1.7  # in truth 1.41
    assert np.isfinite(wide)
    nine = ten[ten["patient"] < 9]
    assert all(np.isnan(end.loc[0, "share"]) for end in evaluation.intervals(nine, share))


def test_a_group_or_condition_of_nine_patients_has_no_interval_beside_others(judged):
    rows = judged["ensemble"].assign(patient=judged["ensemble"]["study_id"].astype(int))
    rows = rows[(rows["group"] != "scs") | (rows["patient"].rank(method="dense") < 10)]
    areas = evaluation.intervals(rows, evaluation.discrimination, 20)[0]["AUC"]
    assert areas["spinal"].isna().all() and areas.drop("spinal").notna().all()
    errors = evaluation.intervals(rows, lambda sample: evaluation.calibration({"ensemble": sample}), 20)[1].loc[
        "ensemble"
    ]
    assert errors.index[errors.isna()].tolist() == ["spinal"]
    points = rows.drop(columns="group")
    means = evaluation.intervals(points, lambda sample: sample.groupby("condition", observed=True)[["loss"]].mean(), 20)
    assert means[0].index[means[0]["loss"].isna()].tolist() == ["spinal_canal_stenosis"]


def test_subgroups_may_be_resampled_by_patient(judged):
    doubled = {model: rows.assign(patient=rows["study_id"].astype(int) // 2) for model, rows in judged.items()}
    everyone = pd.Series("all", judged["ensemble"].index)
    one, two = (evaluation.by_trait(doubled, everyone, unit).loc["all"] for unit in ("study_id", "patient"))
    assert (one["studies"], two["studies"]) == (200, 100)
    assert one["ensemble"] == pytest.approx(two["ensemble"]) and one["low"] != two["low"]


def test_the_reference_is_the_run_s_own_or_what_was_packed(world, tmp_path):
    solution, tables = world
    recipe = {"prior": [{"condition": "x"}]}
    assert evaluation.reference(tmp_path, recipe) == {"prior": recipe["prior"], "cut_offs": {}}
    for name in ("predictions", "tables"):
        (tmp_path / name).mkdir()
    tables["ensemble"].to_parquet(tmp_path / "predictions/ensemble_oof.parquet")
    labels = metric.row_keys(solution["row_id"]).merge(solution, on="row_id")
    labels.to_parquet(tmp_path / "tables/labels.parquet")
    found = evaluation.reference(tmp_path, recipe)
    assert found["cut_offs"] == evaluation.find_cut_offs(evaluation.judge(tables["ensemble"], solution))
    assert len(found["prior"]) == 25
    (tmp_path / "reference.json").write_text('{"prior": [], "cut_offs": {}}')
    assert evaluation.reference(tmp_path, recipe) == {"prior": [], "cut_offs": {}}
