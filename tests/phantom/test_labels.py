"""Labels of the phantom against the real ones, gross reader errors, and the oracle against simulated readers."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score

from lsdc_utils import metric, vocabulary
from lsdc_utils.phantom import labels
from lsdc_utils.vocabulary import COLUMNS, GROUPS, LEVELS, SEVERITIES

SIDED = ~np.equal(labels.COLUMN_GROUPS, "scs")
LEVEL = np.tile(np.arange(len(LEVELS)), 5)


@pytest.fixture(scope="module")
def grades() -> labels.Grades:
    return labels.draw_grades(50_000, 1)


def shares(given: np.ndarray) -> np.ndarray:
    """Share (25, 3) of each grade among labels (n, 25)."""
    return np.stack([(given == k).mean(axis=0) for k in range(3)], axis=1)


def parts(natural: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Spinal, foraminal and subarticular score, any severe canal, and their mean, of natural probabilities (n, 25, 3)
    against labels (n, 25): `metric.score`, without its tables."""
    weighted, weight = metric.weight_rows(natural), metric.WEIGHTS[given]
    losses = -weight * np.log(np.take_along_axis(weighted, given[..., None], axis=-1)[..., 0])
    groups = [np.equal(labels.COLUMN_GROUPS, key) for key in ("scs", "nfn", "ss")]
    scores = [losses[:, group].sum() / weight[:, group].sum() for group in groups]
    severe, any_severe = weighted[:, :5, 2].max(axis=1), (given[:, :5] == 2).any(axis=1)
    weight = weight[:, :5].max(axis=1)
    scores.append(-(weight * np.log(np.where(any_severe, severe, 1 - severe))).sum() / weight.sum())
    return np.array([*scores, np.mean(scores)])


# ---- against the real labels -----------------------------------------------------------------------------------------


def test_prevalence_is_real_after_all_reader_errors(grades):
    assert np.abs(shares(grades.labels) - labels.real_prevalence()).max() < 0.01
    any_severe = (grades.labels[:, :5] == 2).any(axis=1).mean()
    assert abs(any_severe - 365 / 1975) < 0.03


def test_prevalence_is_solved_with_gross_errors():
    """The oracle's mean over the latent of each column is its real prevalence, however small that is."""
    offset, slope, _ = labels.latent_model()
    z = np.linspace(-6, 6, 2001)[:, None]
    weights = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    expected = np.tensordot(weights[:, 0], labels.oracle(labels.ndtr(offset + slope * z)), axes=1)
    assert np.abs(expected - labels.real_prevalence()).max() < 1e-5


def test_correlation_of_each_pair_is_real_after_all_reader_errors(grades):
    miss = spearmanr(grades.labels).statistic - np.array(labels.real_facts()["label_spearman"])
    assert np.abs(miss).max() < 0.05
    assert np.sqrt((miss**2).mean()) < 0.012


def test_readers_agree_as_people_do(grades):
    one, other = (labels.read(grades.narrowing, np.random.default_rng(reader)) for reader in (1, 2))
    for group in GROUPS:
        columns = np.equal(labels.COLUMN_GROUPS, group)
        assert 0.45 < cohen_kappa_score(one[:, columns].ravel(), other[:, columns].ravel(), weights="linear") < 0.75


def test_a_longer_draw_begins_with_the_shorter_one(grades):
    short = labels.draw_grades(50, 1)
    for name in ("narrowing", "labels", "own", "gross"):
        assert np.array_equal(getattr(short, name), getattr(grades, name)[:50]), name


def test_nearest_correlation_of_a_correlation_is_itself():
    matrix = np.array([[1, 0.5, 0.2], [0.5, 1, 0.3], [0.2, 0.3, 1]])
    assert np.allclose(labels.nearest_correlation(matrix), matrix)
    impossible = np.array([[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]])
    assert np.linalg.eigvalsh(labels.nearest_correlation(impossible)).min() > 0


# ---- gross errors ----------------------------------------------------------------------------------------------------


def test_one_label_in_a_hundred_is_a_gross_error_of_each_kind_in_its_share(grades):
    found = {kind: (grades.gross == kind).mean(axis=0) for kind in ("", "level", "side", "two steps")}
    assert np.abs(1 - found[""] - 0.01).max() < 0.002  # 4.5 standard errors of a column
    assert abs(1 - found[""].mean() - 0.01) < 0.0004
    assert found["side"][~SIDED].max() == 0
    expected = {True: (0.0060, 0.0035, 0.0005), False: (0.0060 / 0.65, 0, 0.0005 / 0.65)}  # without a side: the others
    for sided, wanted in expected.items():
        of = [found[kind][sided == SIDED].mean() for kind in ("level", "side", "two steps")]
        assert np.allclose(of, wanted, atol=0.0006)


def test_a_label_without_gross_error_is_the_reader_s_own_grade(grades):
    usual = grades.gross == ""
    assert np.array_equal(grades.labels[usual], grades.own[usual])
    assert 0.2 < (grades.labels != grades.own)[~usual].mean() < 0.5  # a neighbour is often as normal


def test_a_gross_error_is_the_grade_beside_across_or_two_steps_off(grades):
    conditions = [column.removesuffix(f"_{LEVELS[k]}") for column, k in zip(COLUMNS, LEVEL, strict=True)]
    seen = set()
    for study, column in zip(*np.nonzero(grades.gross), strict=True):
        own, label, kind = grades.own[study], grades.labels[study, column], grades.gross[study, column]
        if kind == "level":
            beside = [column + step for step in (-1, 1) if 0 <= LEVEL[column] + step < len(LEVELS)]
            assert label in own[beside]
        elif kind == "side":
            assert label == own[COLUMNS.index(f"{vocabulary.mirrored(conditions[column])}_{LEVELS[LEVEL[column]]}")]
        else:
            assert label != own[column] and (own[column] == 1 or abs(label - own[column]) == 2)
            seen.add((own[column], label))
    assert seen == {(0, 2), (2, 0), (1, 0), (1, 2)}


def test_gross_errors_do_not_depend_on_the_grade(grades):
    gross = grades.gross != ""
    rates = [gross[grades.own == k].mean() for k in range(3)]
    assert np.allclose(rates, 0.01, atol=0.0015)


# ---- the oracle ------------------------------------------------------------------------------------------------------


def test_oracle_is_the_mixture_of_the_grades_beside_across_and_two_steps_off():
    """A study whose own grades are certain: only L4/L5 is abnormal, the canal severe, the left foramen moderate."""
    narrowing = np.zeros(len(COLUMNS))
    narrowing[COLUMNS.index("spinal_canal_stenosis_l4_l5")] = 2.0
    narrowing[COLUMNS.index("left_neural_foraminal_narrowing_l4_l5")] = 0.575
    natural = pd.DataFrame(labels.oracle(narrowing), index=COLUMNS, columns=list(SEVERITIES))
    at = natural.loc["spinal_canal_stenosis_l4_l5"]
    assert at.to_numpy() == pytest.approx([0.01, 0, 0.99], abs=1e-4)
    steps, beside = 0.01 * 0.05 / 0.65, 0.01 * 0.6 / 0.65
    assert natural.loc["spinal_canal_stenosis_l3_l4", "severe"] == pytest.approx(steps + beside / 2, abs=1e-4)
    assert natural.loc["spinal_canal_stenosis_l5_s1", "severe"] == pytest.approx(steps + beside, abs=1e-4)
    assert natural.loc["spinal_canal_stenosis_l1_l2", "severe"] == pytest.approx(steps, abs=1e-4)
    moderate = np.diff(labels.ndtr((np.array([0.45, 0.7]) - 0.575) / labels.NOISE["nfn"]))[0]
    across, near = ("right_neural_foraminal_narrowing_l4_l5", "left_neural_foraminal_narrowing_l3_l4")
    assert natural.loc[across, "moderate"] == pytest.approx(0.0035 * moderate, abs=1e-4)
    assert natural.loc[near, "moderate"] == pytest.approx(0.003 * moderate, abs=1e-4)


def test_oracle_treats_studies_alike_whatever_their_number(grades):
    some = grades.narrowing[:6]
    assert np.allclose(labels.oracle(some), [labels.oracle(one) for one in some], atol=1e-12)
    assert np.allclose(labels.oracle(some.reshape(2, 3, -1)), labels.oracle(some).reshape(2, 3, -1, 3), atol=1e-12)
    assert np.allclose(grades.oracle.sum(axis=-1), 1)
    assert labels.draw_grades(0, 1).oracle.shape == (0, len(COLUMNS), 3)


def test_oracle_is_calibrated(grades):
    assert metric.calibration_error(grades.oracle.reshape(-1, 3), grades.labels.ravel()) < 0.003
    for column in range(len(COLUMNS)):
        assert metric.calibration_error(grades.oracle[:, column], grades.labels[:, column]) < 0.008


def test_oracle_is_what_a_hundred_thousand_readers_of_one_study_say(grades):
    """Of a study with ten severe columns at least, so that gross errors show."""
    study = grades.narrowing[(grades.narrowing > 0.65).sum(axis=1) > 10][0]
    read = labels.read(np.repeat(study[None], 100_000, axis=0), np.random.default_rng(5))
    natural = labels.oracle(study)
    assert np.abs(shares(read) - natural).max() < 0.006  # 4 standard errors of a share
    assert np.abs(shares(read) - natural).mean() < 0.001
    assert metric.calibration_error(np.tile(natural, (100_000, 1)), read.ravel()) < 0.003


def test_no_mixture_with_the_prior_beats_the_oracle():
    drawn = labels.draw_grades(20_000, 3)
    prior, best = np.broadcast_to(labels.real_prevalence(), drawn.oracle.shape), parts(drawn.oracle, drawn.labels)
    for share in (0.002, 0.01, 0.03, 0.1):
        geometric = drawn.oracle ** (1 - share) * prior**share
        for mixture in ((1 - share) * drawn.oracle + share * prior, geometric / geometric.sum(axis=-1, keepdims=True)):
            gained = best - parts(mixture, drawn.labels)
            assert gained[:3].max() < 0.0002 and gained[-1] < 0.001, share
    blind = labels._own_odds(drawn.narrowing, labels._NOISE)  # an oracle that knows of no gross error is worse
    assert (parts(blind, drawn.labels) - best).min() > 0.002


def test_oracle_lands_where_the_best_solutions_did(grades):
    n = 20_000
    scores = {"oracle": parts(grades.oracle[:n], grades.labels[:n])}
    scores["prior"] = parts(np.broadcast_to(shares(grades.labels), grades.oracle[:n].shape), grades.labels[:n])
    assert np.abs(scores["oracle"][:4] - [0.25, 0.44, 0.52, 0.27]).max() < 0.015
    real = labels.real_facts()["best_constant_prediction_official_score"]
    wanted = [real[name] for name in ("spinal", "foraminal", "subarticular")]
    assert np.abs(scores["prior"][:3] - wanted).max() < 0.02
    assert abs(scores["prior"][-1] - real["total"]) < 0.04


def test_the_scores_above_are_the_official_one(grades):
    rows = pd.DataFrame({"row_id": [f"{i}_{column}" for i in range(200) for column in COLUMNS]})
    table = rows.assign(**dict(zip(SEVERITIES, grades.oracle[:200].reshape(-1, 3).T, strict=True)))
    solution = rows.assign(severity=grades.labels[:200].ravel())
    official = metric.score(solution, metric.weight_table(table))
    assert list(official.values()) == pytest.approx(parts(grades.oracle[:200], grades.labels[:200]))
