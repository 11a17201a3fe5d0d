"""Joining the models' answers: a geometric mixture of every model and the prior, fitted on out-of-fold rows.

For a row with prior pi and models p_m, in natural probabilities,

    p  proportional to  exp( sum_m a_m log p_m  +  (1 - sum_m a_m) log pi  +  bias )

One set of numbers per condition group, shared over levels and sides: a weight a_m for each model and a bias for
moderate and for severe. The prior takes what the models leave of the weight, so a model that knows nothing falls to
the prior and not to a uniform guess, the sum of the weights is an inverse temperature, and a row without a model's
evidence is filled by the prior in the same formula.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from lsdc_utils.metric import PROBABILITIES, Scorer, solution_of, weight_rows
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, parse_row_id

PUBLISHED_WEIGHTS = {"yolo": 0.65, "vit3d": 0.35}  # of the bronze-medal method's arithmetic mean
SMALLEST = 1e-7  # probabilities are raised to this before a logarithm: the published floor of a confidence
SHRINKAGE = 10.0  # pull to equal weights and no bias, in studies: it fades as studies are added


@dataclass(frozen=True)
class Mixture:
    """How one condition group is blended; weights are of log probabilities, bias is added to moderate and severe."""

    weights: dict[str, float]
    bias: tuple[float, float] = (0.0, 0.0)


Blend = dict[str, Mixture]  # by condition group: nfn, scs, ss
Tables = dict[str, pd.DataFrame]  # by model: row_id and three natural probabilities; rows may be missing


def default_blend(models: list[str]) -> Blend:
    """Equal weights, temperature 1, no bias."""
    return {group: Mixture(dict.fromkeys(models, 1 / len(models))) for group in GROUPS}


def apply_blend(blend: Blend, tables: Tables, prior: pd.DataFrame) -> pd.DataFrame:
    """The blended table: the rows of `prior` in its order, natural probabilities that sum to 1."""
    groups = _groups(prior)
    logs = _log_ratios(tables, prior)
    natural = np.empty((len(prior), 3))
    for key, mixture in blend.items():
        rows = groups == key
        stacked = np.stack([logs[model][rows] for model in mixture.weights])
        parameters = np.array([*mixture.weights.values(), *mixture.bias])
        natural[rows] = _mix(parameters, stacked, logs["prior"][rows])
    return _table(prior["row_id"], natural)


def fit_blend(tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> Blend:
    """The blend with the best official score on `labels` (row_id, severity), pulled towards `default_blend`.

    `tables` and `prior` must be out of fold for the rows of `labels`. A group without a single label keeps the default.
    """
    labelled = prior.merge(solution_of(labels), on="row_id")
    logs, groups, blend = _log_ratios(tables, labelled), _groups(labelled), default_blend(list(tables))
    for key in GROUPS:
        rows = groups == key
        if rows.any():
            stacked = np.stack([logs[model][rows] for model in tables])
            blend[key] = _fit_group(list(tables), stacked, logs["prior"][rows], Scorer(labelled[rows]))
    return blend


def _fit_group(models: list[str], stacked: np.ndarray, log_prior: np.ndarray, scorer: Scorer) -> Mixture:
    """Minimise the parts of the score that these rows touch (for the canal: spinal and any-severe)."""
    start = np.array([1 / len(models)] * len(models) + [0.0, 0.0])

    def objective(parameters: np.ndarray) -> float:
        parts = scorer.losses(weight_rows(_mix(parameters, stacked, log_prior))).score()
        loss = np.nansum([value for part, value in parts.items() if part != "total"])
        return float(loss + SHRINKAGE / len(scorer.studies) * np.sum((parameters - start) ** 2))

    found = minimize(objective, start, method="L-BFGS-B", options={"maxiter": 60}).x.tolist()
    weights, bias = found[: len(models)], found[len(models) :]
    return Mixture(dict(zip(models, weights, strict=True)), (bias[0], bias[1]))


def cross_fitted(
    tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame, parts: int = 5, seed: int = 0
) -> pd.DataFrame:
    """Each row blended by numbers that were fitted on other studies, so that its score is honest.

    `labels`: row_id, study_id, severity. Studies are dealt into `parts` at random.
    """
    study_of = prior["row_id"].map(lambda row: parse_row_id(row)[0])
    studies = np.random.default_rng(seed).permutation(np.sort(study_of.unique()))
    blended = []
    for held_out in np.array_split(studies, min(parts, len(studies))):
        mine = study_of.isin(held_out)
        fitted_on = labels[~labels["study_id"].astype(str).isin(held_out)]
        blend = fit_blend(tables, prior[~mine], fitted_on)
        blended.append(apply_blend(blend, tables, prior[mine].reset_index(drop=True)))
    return prior[["row_id"]].merge(pd.concat(blended), on="row_id")


def published_blend(tables: Tables, prior: pd.DataFrame) -> pd.DataFrame:
    """The published mean, 0.65 YOLO and 0.35 ViT; a row that one model lacks takes the other's, else the prior's."""
    total, weight = np.zeros((len(prior), 3)), np.zeros((len(prior), 1))
    for model, table in tables.items():
        natural = _aligned(table, prior)
        there = ~np.isnan(natural[:, :1])
        total += PUBLISHED_WEIGHTS[model] * np.where(there, natural, 0)
        weight += PUBLISHED_WEIGHTS[model] * there
    natural = np.where(weight > 0, total / np.maximum(weight, SMALLEST), prior[PROBABILITIES].to_numpy())
    return _table(prior["row_id"], natural)


def mean_over_folds(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """One model's rows from several folds' weights, averaged; a row is there if any fold gave it."""
    return pd.concat(tables).groupby("row_id", sort=False)[PROBABILITIES].mean().reset_index()


def to_json(blend: Blend) -> dict:
    """The blend as plain numbers, for `blend.json`."""
    return {key: asdict(mixture) for key, mixture in blend.items()}


def from_json(content: dict) -> Blend:
    """The inverse of `to_json`."""
    return {key: Mixture(dict(entry["weights"]), tuple(entry["bias"])) for key, entry in content.items()}


def _mix(parameters: np.ndarray, stacked: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    """Natural probabilities (n, 3) from log(p_m / prior) `stacked` (models, n, 3) and the log prior (n, 3)."""
    n_models = len(stacked)
    logit = log_prior + np.tensordot(parameters[:n_models], stacked, axes=1)
    logit[:, 1:] += parameters[n_models:]
    logit -= logit.max(axis=1, keepdims=True)
    natural = np.exp(logit)
    return natural / natural.sum(axis=1, keepdims=True)


def _log_ratios(tables: Tables, prior: pd.DataFrame) -> dict[str, np.ndarray]:
    """The log prior, and for each model log(p / prior) (n, 3): 0 where the model gives no row."""
    log_prior = np.log(np.maximum(prior[PROBABILITIES].to_numpy(), SMALLEST))
    logs = {"prior": log_prior}
    for model, table in tables.items():
        natural = np.log(np.maximum(_aligned(table, prior), SMALLEST))  # NaN stays NaN
        logs[model] = np.where(np.isnan(natural), 0.0, natural - log_prior)
    return logs


def _aligned(table: pd.DataFrame, prior: pd.DataFrame) -> np.ndarray:
    """The table's probabilities (n, 3) in the order of the prior's rows, NaN where it has no row."""
    return table.set_index("row_id")[PROBABILITIES].reindex(prior["row_id"]).to_numpy()


def _groups(prior: pd.DataFrame) -> np.ndarray:
    return np.array([CONDITIONS[parse_row_id(row)[1]].group for row in prior["row_id"]])


def _table(row_ids: pd.Series, probabilities: np.ndarray) -> pd.DataFrame:
    table = pd.DataFrame(probabilities, columns=PROBABILITIES)
    table.insert(0, "row_id", np.asarray(row_ids))
    return table
