"""The blend of a run fitted to another population, from few labelled studies that its models never saw.

In each condition group the weights of all models get one factor (a temperature), moderate and severe a further bias,
and the prior the new level frequencies. A ridge pulls to the run's own numbers; inner folds choose its strength.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.stats import f as f_distribution

from lsdc_utils import metric
from lsdc_utils.grading import blend, grade
from lsdc_utils.grading.blend import Blend, Tables
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.vocabulary import GROUP_OF, GROUPS

FEW = 35  # patients; with fewer, one temperature for all groups and no bias
STRENGTHS = (3.0, 10.0, 30.0, np.inf)  # of the ridge, in studies; infinite: the run's own numbers
RIDGE = np.array([10.0, 1.0, 1.0])  # on the temperature's logarithm and the biases
PSEUDO = 100.0  # labels of a level, both sides, that the run's prior counts as: 50 studies move it half way
PARTS = 5  # of the studies, outer and inner
SURE = 0.05  # chance of a change where none is right
STEP = 0.01  # of the numeric gradient


class Problem:
    """Labelled `rows` (as `metric.row_keys`, severity, patient) graded by a recipe's blend `name` but for three
    numbers: the logarithm of the temperature, and what is added to the biases. Prior: after the labels of `counted`.
    few: patients, so that the biases stay."""

    def __init__(
        self, recipe: dict[str, Any], name: str, given: Tables, counted: pd.DataFrame, rows: pd.DataFrame, few: bool
    ):
        rows = rows.merge(pd.DataFrame(shrunk_prior(recipe["prior"], counted)), on=["condition", "level"])
        self.scorer, self.natural, self.groups = metric.Scorer(rows), np.empty((len(rows), 3)), []
        for key, places in rows.groupby("group").indices.items():
            tables = {model: given[model] for model in grade.blends_of(given)[name]}
            self.groups.append((places, recipe[name][key], blend.log_ratios(tables, rows.iloc[places])))
        self.patients, _ = pd.factorize(rows.groupby("study_id")["patient"].first()[self.scorer.studies])
        self.biases = [] if few else [k for k in (1, 2) if k in rows["severity"].to_numpy()]  # without a case it stays

    def losses(self, numbers: np.ndarray) -> np.ndarray:
        """What each study adds to the sum of the parts of the official score that these rows touch: (studies,)."""
        for places, own, ratios in self.groups:
            weights = np.exp(numbers[0]) * np.array(list(own["weights"].values()))
            self.natural[places] = blend.mix(np.concatenate([weights, own["bias"] + numbers[1:]]), *ratios)
        parts = self.scorer.losses(metric.weight_rows(self.natural))
        return (parts.losses / np.maximum(parts.weights.sum(axis=0), metric.SMALLEST)).sum(axis=1)

    def misfit(self) -> float:
        """p that no small change of the biases (of the temperature, if these stay) is better: that of Hotelling's T2
        (Ann. Math. Stat. 2, 1931) of the patients' gradients. An interval of the cross-fitted gain above 0 would be
        less sensitive: on 50 phantom studies it kept a tenth of the gain, this three quarters."""
        steps = STEP * np.eye(3)[self.biases or [0]]
        changes = [self.losses(step) - self.losses(-step) for step in steps]
        slopes = np.array([np.bincount(self.patients, change) for change in changes])
        (k, n), mean = slopes.shape, slopes.mean(axis=1)
        if n <= k:  # too few patients to tell
            return 1.0
        t2 = n * mean @ np.linalg.pinv(np.atleast_2d(np.cov(slopes))) @ mean
        return float(f_distribution.sf(t2 * (n - k) / (k * (n - 1)), k, n - k))

    def fit(self, strength: float) -> np.ndarray:
        """The numbers (3,) with the least loss and ridge."""
        free, ridge = np.isin(range(3), [0, *self.biases]), strength / len(self.scorer.studies) * RIDGE
        if not np.isfinite(strength):
            return np.zeros(3)
        return free * minimize(lambda x: self.losses(x * free).sum() + ridge @ x**2, np.zeros(3), method="L-BFGS-B").x


def fit_recipe(recipe: dict[str, Any], given: Tables, labels: pd.DataFrame) -> dict[str, Any]:
    """A recipe (blend.json) for the population of `labels` (row_id, severity in {0, 1, 2}, any patient) of 20 patients
    or more. given: the models' rows before any blend. A group changes only where its ensemble surely does not fit
    (`Problem.misfit`). `adapted` in the recipe: the number of studies, that p by group, and the groups changed."""
    rows = metric.row_keys(labels["row_id"]).assign(severity=labels["severity"].to_numpy())
    rows["patient"] = labels["patient"].to_numpy() if "patient" in labels else rows["study_id"]
    changed, chances = rows[:0], dict.fromkeys(GROUPS, 1.0)
    fitted = {name: dict(recipe[name]) for name in grade.blends_of(given)}
    for _, unit in rows.groupby("group") if rows["patient"].nunique() >= FEW else [("all", rows)]:
        p = Problem(recipe, "ensemble", given, unit[:0], unit, unit["patient"].nunique() < FEW).misfit()
        chances |= dict.fromkeys(unit["group"].unique(), p)
        mixtures = {name: _fit_unit(recipe, name, given, unit) for name in fitted} if p < SURE else {}
        if mixtures.get("ensemble"):
            fitted = {name: mixture | mixtures[name] for name, mixture in fitted.items()}
            changed = pd.concat([changed, unit])
    about = {"studies": rows["study_id"].nunique(), "p": chances, "changed": changed["group"].unique().tolist()}
    fitted |= {"without": {}}  # blends without a member are not fitted anew: without its weights nothing is graded
    return recipe | fitted | {"prior": shrunk_prior(recipe["prior"], changed), "adapted": about}


def _fit_unit(recipe: dict[str, Any], name: str, given: Tables, rows: pd.DataFrame) -> Blend:
    """The mixtures of the groups of `rows`, which share a temperature; none where the run's own are the best."""
    patients, losses = np.random.default_rng(0).permutation(rows["patient"].unique()), np.zeros(len(STRENGTHS))
    few = len(patients) < FEW
    for part in np.array_split(patients, PARTS):
        held_out = rows["patient"].isin(part)
        fitting, trial = (Problem(recipe, name, given, rows[~held_out], rows[at], few) for at in (~held_out, held_out))
        losses += [trial.losses(fitting.fit(strength)).sum() for strength in STRENGTHS]
    factor, *bias = Problem(recipe, name, given, rows, rows, few).fit(STRENGTHS[int(losses.argmin())])
    changed = {}
    for key, own in recipe[name].items() if np.any([factor, *bias]) else ():
        weights = {model: float(np.exp(factor)) * weight for model, weight in own["weights"].items()}
        changed[key] = {"weights": weights, "bias": np.add(own["bias"], bias).tolist(), "kept": "adapted", "gain": []}
    return {key: changed[key] for key in rows["group"].unique() if key in changed}


def shrunk_prior(prior: list[dict[str, Any]], rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A recipe's prior p after the labels of `rows`, both sides together: (n + PSEUDO p) / (N + PSEUDO) by level."""
    table, counts = pd.DataFrame(prior), rows.groupby(["group", "level", "severity"]).size().unstack(fill_value=0)
    keys = pd.MultiIndex.from_arrays([table["condition"].map(GROUP_OF), table["level"]])
    numbers = PSEUDO * table[PROBABILITIES].to_numpy() + counts.reindex(keys, columns=range(3), fill_value=0).to_numpy()
    table[PROBABILITIES] = numbers / numbers.sum(axis=1, keepdims=True)
    return table.to_dict("records")


def cross_fitted(recipe: dict[str, Any], given: Tables, labels: pd.DataFrame, unseen: Collection[str]) -> Tables:
    """Every row of the studies of `labels` (row_id, study_id, severity, fold) by each of `grade.blends_of`, by a recipe
    that was fitted on the other folds. unseen: ids of the rows whose own series is missing, or could not be read."""
    rows, parts = grade.rows_of(labels["study_id"].unique()), []
    fold_of = dict(labels[["study_id", "fold"]].astype(str).to_numpy())
    for fold, held_out in rows.groupby(rows["study_id"].map(fold_of)):
        others = fit_recipe(recipe, given, labels[labels["fold"].astype(str) != fold])
        parts.append(grade.blend_rows(others, given, grade.prior_of(others, held_out), unseen)[0])
    return {name: rows[["row_id"]].merge(pd.concat([part[name] for part in parts])) for name in parts[0]}
