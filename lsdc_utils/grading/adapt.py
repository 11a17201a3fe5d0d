"""The blend of a run fitted to another population, from few labelled studies that its models never saw.

In each condition group the weights of all models get one factor (a temperature), moderate and severe a further bias, and
the prior the new level frequencies. A ridge pulls to the run's own numbers; inner folds choose its strength.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import softmax
from scipy.stats import f as f_distribution

from lsdc_utils import metric
from lsdc_utils.grading import blend, grade
from lsdc_utils.grading.blend import Blend, Tables
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.vocabulary import CONDITIONS, GROUPS

FEW = 35  # studies; with fewer, one temperature for all groups and no bias
STRENGTHS = (3.0, 10.0, 30.0, np.inf)  # of the ridge, in studies; infinite: the run's own numbers
RIDGE = np.array([10.0, 1.0, 1.0])  # on the temperature's logarithm and the biases
PSEUDO = 100.0  # labels of a level, both sides, that the run's prior counts as: of 50 studies it moves by half at most
PARTS = 5  # of the studies, outer and inner
SURE = 0.05  # chance of a change where none is right


def adapt_recipe(
    recipe: dict[str, Any], given: Tables, series: pd.DataFrame, labels: pd.DataFrame
) -> tuple[dict[str, Any], Tables, pd.Series]:
    """`fit_surely`, and the rows of its studies and their sources as `grade.blend_rows` returns them: each study is
    graded by numbers that were fitted on other studies.

    series: study_id, series_type; labels: also `fold`, the part of the studies. The recipe's `adapted` also holds the
    official total of these rows (`after`) and of the run's own (`before`), and for each group the gain: mean, low, high
    (95 %).
    """
    new, rows = fit_surely(recipe, given, labels), grade.rows_of(sorted(labels["study_id"].unique()))
    changed = [key for key, group in new["adapted"]["groups"].items() if group["p"] < SURE]
    fold_of, unseen = dict(labels[["study_id", "fold"]].to_numpy()), grade.without_own_series(rows, series)
    before, sources = grade.blend_rows(recipe, given, grade.prior_of(recipe, rows), unseen)
    blended = []
    for fold, held_out in rows.groupby(rows["study_id"].map(fold_of)):
        others = fit_recipe(recipe, given, with_keys(labels[labels["fold"] != fold]), changed)
        blended.append(grade.blend_rows(others, given, grade.prior_of(others, held_out), unseen)[0])
    after = {name: rows[["row_id"]].merge(pd.concat([part[name] for part in blended])) for name in before}
    solution = metric.solution_of(labels)
    for key, gain in blend.group_gains(solution, before["ensemble"], after["ensemble"]).items():
        new["adapted"]["groups"][key]["gain"] = gain
    for name, table in (("before", before), ("after", after)):
        new["adapted"][name] = metric.score(solution, metric.weight_table(table["ensemble"]))["total"]
    return metric.without_nan(new), after, sources


def fit_surely(recipe: dict[str, Any], given: Tables, labels: pd.DataFrame) -> dict[str, Any]:
    """A recipe (blend.json) for the population of `labels` (row_id, study_id as text, severity in {0, 1, 2}), which
    changes only those groups where the run's own numbers are surely not right, see `misfit`.

    given: rows of `yolo` and `vit3d` before any blend. `adapted` in the recipe holds the number of studies, and for each
    group p and whether it is changed.
    """
    rows = with_keys(labels)
    chances = misfit(recipe["ensemble"], given, grade.prior_of(recipe, rows), rows)
    new = fit_recipe(recipe, given, rows, [key for key, chance in chances.items() if chance < SURE])
    changed = {key: mixture["kept"] == "adapted" for key, mixture in new["ensemble"].items()}
    about = {key: {"changed": changed[key], "p": chances[key]} for key in GROUPS}
    return new | {"adapted": {"studies": rows["study_id"].nunique(), "groups": about}}


def with_keys(labels: pd.DataFrame) -> pd.DataFrame:
    """Labels (row_id, severity) with study_id, condition, level and group."""
    return metric.row_keys(labels["row_id"]).merge(labels[["row_id", "severity"]], on="row_id")


def misfit(own: Blend, given: Tables, prior: pd.DataFrame, rows: pd.DataFrame) -> dict[str, float]:
    """By group, the p of the hypothesis that the run's own numbers cannot be bettered by a small step: Hotelling's T2
    (Ann. Math. Stat. 2, 1931) of the studies' gradients of the loss by the biases, with `FEW` studies or more, else by
    the one temperature. 1 where there are too few studies.

    Of 50 studies of a population with another reader and scanner it kept four fifths of the gain; an interval of the
    cross-fitted gain above 0, which severe rows make wide, a tenth.
    """
    few, chances = rows["study_id"].nunique() < FEW, {}
    for unit in [list(GROUPS)] if few else [[key] for key in GROUPS]:
        there = rows["group"].isin(unit)
        problem = _Problem(own, given, prior[there.to_numpy()], rows[there])
        by_study = problem.slopes(np.zeros(3))[:, problem.biases(few) or [0]]
        n, k = by_study.shape
        chance = 1.0
        if 0 < k < n - 1:
            mean, spread = by_study.mean(axis=0), np.atleast_2d(np.cov(by_study.T))
            statistic = n * mean @ np.linalg.pinv(spread) @ mean * (n - k) / (k * (n - 1))
            chance = float(f_distribution.sf(statistic, k, n - k))
        chances |= dict.fromkeys(unit, chance)
    return chances


def fit_recipe(
    recipe: dict[str, Any], given: Tables, labels: pd.DataFrame, only: Iterable[str] = tuple(GROUPS)
) -> dict[str, Any]:
    """The recipe with the prior and the blends of the groups `only` fitted on `labels` (as of `with_keys`), at the
    strengths that inner folds choose, whether that is sure or not."""
    rows = labels[labels["group"].isin(list(only))].reset_index(drop=True)
    few, fitted = labels["study_id"].nunique() < FEW, {name: dict(recipe[name]) for name in grade.BLENDS}
    for unit in [rows] if few else [own.reset_index(drop=True) for _, own in rows.groupby("group")]:
        for name in grade.BLENDS if len(unit) else ():
            fitted[name] |= _fit_unit(recipe[name], given, recipe["prior"], unit, few)
    changed = [key for key, mixture in fitted["ensemble"].items() if mixture["kept"] == "adapted"]
    return recipe | fitted | {"prior": shrunk_prior(recipe["prior"], rows[rows["group"].isin(changed)])}


def shrunk_prior(prior: list[dict[str, Any]], rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A recipe's prior after the labels of `rows` (group, level, severity): (n + PSEUDO p) / (N + PSEUDO) at each level,
    both sides together."""
    table = pd.DataFrame(prior)
    keys = [table["condition"].map(lambda name: CONDITIONS[name].group), table["level"]]
    counts = rows.groupby(["group", "level", "severity"]).size().unstack(fill_value=0)
    counts = counts.reindex(index=pd.MultiIndex.from_arrays(keys), columns=range(3), fill_value=0).to_numpy(float)
    numbers = table[PROBABILITIES].to_numpy() * PSEUDO + counts
    table[PROBABILITIES] = numbers / numbers.sum(axis=1, keepdims=True)
    return table.to_dict("records")


def _fit_unit(own: Blend, given: Tables, prior: list[dict[str, Any]], rows: pd.DataFrame, few: bool) -> Blend:
    """The mixtures of the groups of `rows`, which share a temperature; none where the run's own are to stay."""

    def problem(learned: pd.DataFrame, there: pd.DataFrame) -> _Problem:
        return _Problem(own, given, grade.prior_of({"prior": shrunk_prior(prior, learned)}, there), there)

    studies = np.random.default_rng(1).permutation(rows["study_id"].unique())
    logits = np.tile(problem(rows[:0], rows).logits(np.zeros(3)), (len(STRENGTHS), 1, 1))
    for part in np.array_split(studies, PARTS):
        held_out = rows["study_id"].isin(part).to_numpy()
        learned, there = rows[~held_out], rows[held_out]
        fitting, applied = problem(learned, learned), problem(learned, there)
        for k, strength in enumerate(STRENGTHS[:-1] if len(learned) and len(there) else ()):
            logits[k, held_out] = applied.logits(fitting.fit(strength, few))
    whole = problem(rows, rows)
    best = STRENGTHS[int(np.argmin([whole.loss(one)[0] for one in logits]))]
    if not np.isfinite(best):
        return {}
    factor, *bias = whole.fit(best, few)
    changed = {}
    for key in rows["group"].unique():
        weights = {model: float(weight * np.exp(factor)) for model, weight in own[key]["weights"].items()}
        biases = (np.array(own[key]["bias"]) + bias).tolist()
        changed[key] = {"weights": weights, "bias": biases, "kept": "adapted", "gain": []}
    return changed


class _Problem:
    """Labelled rows (study_id, group, severity) with their prior, blended by a run's numbers but for the fitted ones:
    the logarithm of the temperature and two biases."""

    def __init__(self, own: Blend, given: Tables, prior: pd.DataFrame, rows: pd.DataFrame):
        models = list(next(iter(own.values()))["weights"])
        ratios, self.base = blend.log_ratios({model: given[model] for model in models}, prior)
        group, self.truth = rows["group"].to_numpy(), rows["severity"].to_numpy(int)
        self.ratio = np.zeros((len(rows), 3))
        for key in np.unique(group):
            there = group == key
            self.ratio[there] = np.tensordot(list(own[key]["weights"].values()), ratios[:, there], axes=1)
            self.base[there, 1:] += own[key]["bias"]
        self.studies, self.study = np.unique(rows["study_id"].to_numpy(str), return_inverse=True)
        weight = metric.WEIGHTS[self.truth]
        self.share = weight / pd.Series(weight).groupby(group).transform("sum").to_numpy()
        self.spinal = np.flatnonzero(group == "scs")
        highest = pd.Series(self.truth[self.spinal]).groupby(self.study[self.spinal]).max()
        self.any_severe = highest.to_numpy() == 2
        self.any_share = metric.WEIGHTS[highest] / metric.WEIGHTS[highest].sum()

    def logits(self, numbers: np.ndarray) -> np.ndarray:
        """Of the natural probabilities (n, 3), by temperature and biases (3,)."""
        return self.base + np.exp(numbers[0]) * self.ratio + np.append(0.0, numbers[1:])

    def loss(self, logits: np.ndarray) -> tuple[float, np.ndarray]:
        """The parts of the official score that these rows touch, summed, and the gradient by the logits (n, 3)."""
        weighted, truth = softmax(logits + np.log(metric.WEIGHTS), axis=1), np.eye(3)[self.truth]
        value = -(self.share * np.log((weighted * truth).sum(axis=1))).sum()
        slope = self.share[:, None] * (weighted - truth)
        if len(self.spinal):  # any severe: the highest row of each study
            order = self.spinal[np.lexsort((weighted[self.spinal, 2], self.study[self.spinal]))]
            highest = order[np.append(np.diff(self.study[order]) > 0, True)]
            chance = weighted[highest, 2].clip(metric.SMALLEST, 1 - metric.SMALLEST)
            value -= self.any_share @ np.where(self.any_severe, np.log(chance), np.log1p(-chance))
            by_chance = self.any_share * np.where(self.any_severe, -1.0, chance / (1 - chance))
            slope[highest] += by_chance[:, None] * (np.eye(3)[2] - weighted[highest])
        return float(value), slope

    def slopes(self, numbers: np.ndarray) -> np.ndarray:
        """Gradient of the loss by temperature and biases, as a sum over each study's rows: (studies, 3)."""
        slope = self.loss(self.logits(numbers))[1]
        rows = np.column_stack([np.exp(numbers[0]) * (slope * self.ratio).sum(axis=1), slope[:, 1:]])
        return np.array([np.bincount(self.study, column, len(self.studies)) for column in rows.T]).T

    def biases(self, few: bool) -> list[int]:
        """The biases that are fitted: with enough studies, those of grades that occur."""
        return [] if few else [grade for grade in (1, 2) if (self.truth == grade).any()]

    def fit(self, strength: float, few: bool) -> np.ndarray:
        """Temperature and biases (3,) with the least loss and ridge."""
        free = np.isin(range(3), [0, *self.biases(few)])
        ridge = strength / len(self.studies) * RIDGE

        def objective(values: np.ndarray) -> tuple[float, np.ndarray]:
            numbers = values * free
            loss = self.loss(self.logits(numbers))[0] + ridge @ numbers**2
            return loss, (self.slopes(numbers).sum(axis=0) + 2 * ridge * numbers) * free

        return minimize(objective, np.zeros(3), jac=True, method="L-BFGS-B", bounds=[(-3, 3)] * 3).x * free
