"""The blend of a run fitted to another population, from few labelled studies that its models never saw.

By condition group all weights get one factor (a temperature), moderate and severe a further bias, and the prior the new
level frequencies; the pull back to the run's own numbers is chosen by inner folds, and may be infinite.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import softmax

from lsdc_utils import metric
from lsdc_utils.grading import blend, grade
from lsdc_utils.grading.blend import Mixture, Tables
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.vocabulary import GROUPS

FEWEST = 20  # labelled studies
FEW = 35  # below, one temperature is fitted for all groups, and no bias
STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, np.inf)  # of the pull, in studies
PSEUDO = 20.0  # studies that the run's prior counts as


def adapt(recipe, given: Tables, labels: pd.DataFrame, name='ensemble', **kw):
    ...


class Problem:
    """Rows of some studies, with everything that does not depend on the fitted numbers."""

    def __init__(self, mixtures: dict[str, Mixture], tables: Tables, prior: pd.DataFrame, severity: np.ndarray):
        self.keys = metric.row_keys(prior["row_id"])
        self.row_ids, self.severity = prior["row_id"], severity
        self.log_prior = np.log(prior[PROBABILITIES].to_numpy(float))
        group = self.keys["group"].to_numpy()
        self.summed, self.total = np.zeros((len(prior), 3)), np.zeros(len(prior))
        self.bias = np.zeros((len(prior), 3))
        for model, table in tables.items():
            weight = np.array([mixtures[g]["weights"][model] for g in group])
            logs = np.log(np.maximum(blend.aligned(table, prior), blend.SMALLEST))
            there = ~np.isnan(logs[:, 0])
            self.summed[there] += weight[there, None] * logs[there]
            self.total[there] += weight[there]
        for k in range(2):
            self.bias[:, k + 1] = [mixtures[g]["bias"][k] for g in group]
        self.group = group
        self.studies = self.keys["study_id"].to_numpy()
        self.level = (self.keys["group"] + self.keys["level"]).to_numpy()

    def natural(self, theta, log_prior, at):
        """theta: log t, b1, b2"""
        logits = log_prior + np.exp(theta[0]) * (self.summed[at] - self.total[at][:, None] * log_prior) + self.bias[at]
        logits[:, 1:] += theta[1:3]
        return softmax(logits, axis=1)

    def prior_from(self, learn, pseudo):
        """log prior (n, 3) of all rows, counted in rows `learn` (n,) bool"""
        out = self.log_prior.copy()
        if not np.isfinite(pseudo):
            return out
        per = 1 + (self.group != "scs")
        for level in np.unique(self.level):
            of = self.level == level
            run = np.exp(self.log_prior[of][0])
            seen = self.severity[of & learn]
            counts = np.bincount(seen[seen >= 0], minlength=3)
            k = pseudo * per[of][0]
            out[of] = np.log((counts + k * run) / (counts.sum() + k))
        return out


def fit(problem, groups, learn, strength, few, pseudo, free=(0, 1, 2)):
    """theta fitted on rows of groups among learn; log prior"""
    if not np.isfinite(strength):
        return np.zeros(3), problem.log_prior
    log_prior = problem.prior_from(learn, pseudo)
    at = np.isin(problem.group, groups) & learn & (problem.severity >= 0)
    rows = pd.DataFrame({"row_id": problem.row_ids[at], "severity": problem.severity[at]})
    scorer = metric.Scorer(rows)
    open_ = [0] if few else [k for k in free if k == 0 or (problem.severity[at] == k).any()]
    lp = log_prior[at]
    n = len(scorer.studies)

    def loss(values):
        theta = np.zeros(3)
        theta[open_] = values
        parts = scorer.losses(metric.weight_rows(problem.natural(theta, lp, at))).score()
        return np.nansum([v for k, v in parts.items() if k != "total"]) + strength / n * np.sum(values**2)

    theta = np.zeros(3)
    theta[open_] = minimize(loss, np.zeros(len(open_)), method="L-BFGS-B", options={"maxiter": 30}, bounds=[(-2, 2)] * len(open_)).x
    return theta, log_prior


def parts_of(studies, n, seed=0):
    names = np.random.default_rng(seed).permutation(np.unique(studies))
    return [np.isin(studies, held) for held in np.array_split(names, min(n, len(names)))]


def part_loss(problem, groups, natural, at):
    at = at & np.isin(problem.group, groups) & (problem.severity >= 0)
    rows = pd.DataFrame({"row_id": problem.row_ids[at], "severity": problem.severity[at]})
    parts = metric.Scorer(rows).losses(metric.weight_rows(natural[at])).score()
    return np.nansum([v for k, v in parts.items() if k != "total"])


def choose(problem, groups, learn, few, pseudo, strengths=STRENGTHS, n_inner=5, rule="min"):
    folds = [h & learn for h in parts_of(problem.studies[learn], 1)] if False else None
    names = np.random.default_rng(1).permutation(np.unique(problem.studies[learn]))
    losses = []
    naturals = {s: np.zeros((len(problem.row_ids), 3)) for s in strengths}
    for held in np.array_split(names, n_inner):
        out = np.isin(problem.studies, held) & learn
        for s in strengths:
            theta, lp = fit(problem, groups, learn & ~out, s, few, pseudo)
            sel = out & np.isin(problem.group, groups)
            naturals[s][sel] = problem.natural(theta, lp[sel], sel)
    losses = [part_loss(problem, groups, naturals[s], learn) for s in strengths]
    return strengths[int(np.argmin(losses))], losses
