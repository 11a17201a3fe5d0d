"""A geometric mixture of the models and the prior, fitted on out-of-fold rows: natural probabilities of a row are

    p  proportional to  exp( sum_m a_m log p_m  +  (1 - sum_m a_m) log prior  +  bias )

with a weight a_m >= 0 for each model and a bias for moderate and severe, by condition group. The prior takes the rest
of the weight (below 0 where models are not sure enough), so a model that knows nothing falls to the prior, and it takes
the place of a model without evidence for a row.
"""

from collections.abc import Collection
from typing import TypedDict

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import softmax

from lsdc_utils import metric
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.vocabulary import GROUPS

SMALLEST = 1e-7  # probabilities are raised to this before a logarithm: the published floor of a confidence
SHRINKAGE = 10.0  # pull to the simple blend, in studies: it fades as studies are added
PARTS = 5  # of the studies, each blended by numbers that were fitted on the others


class Mixture(TypedDict):
    """How one condition group is blended, as blend.json holds it."""

    weights: dict[str, float]  # of log probabilities, by model
    bias: list[float]  # added to moderate and to severe
    kept: str  # fitted or simple: which numbers these are
    gain: list[float]  # cross-fitted gain of fitted over simple numbers: mean, low, high (95 %); empty if not measured


Blend = dict[str, Mixture]  # by condition group: nfn, scs, ss
Tables = dict[str, pd.DataFrame]  # by model: row_id and three natural probabilities; rows may be missing


def apply_blend(blend: Blend, tables: Tables, prior: pd.DataFrame) -> pd.DataFrame:
    """The blended table: the rows of `prior` in its order, natural probabilities that sum to 1."""
    groups, natural = metric.row_keys(prior["row_id"])["group"], np.empty((len(prior), 3))
    for key, mixture in blend.items():
        of_group, weights = (groups == key).to_numpy(), mixture["weights"]
        ratios = log_ratios({model: tables[model] for model in weights}, prior[of_group])
        natural[of_group] = mix(np.array([*weights.values(), *mixture["bias"]]), *ratios)
    return as_table(prior["row_id"], natural)


def fit_blend(tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame, only: Collection[str] = GROUPS) -> Blend:
    """The blend with the best official score on `labels` (row_id, severity), pulled towards the simple blend: equal
    weights, of all models or of a kind, or one model alone, whichever scores best, without bias. Groups not in `only`
    keep the simple blend, ones without a label equal weights. `tables` and `prior` are out of fold for the labels."""
    labelled = prior.merge(metric.solution_of(labels), on="row_id")
    groups = metric.row_keys(labelled["row_id"])["group"]
    return {key: _fit_group(tables, labelled[groups == key], key in only) for key in GROUPS}


def _fit_group(tables: Tables, rows: pd.DataFrame, freely: bool) -> Mixture:
    """Minimise these rows' parts of the score over the simple blends, then, if `freely`, over all numbers."""
    scorer, ratios, n_models = metric.Scorer(rows), log_ratios(tables, rows), len(tables)

    def loss(parameters: np.ndarray) -> float:
        """The parts of the score that these rows touch, of the blend with these numbers."""
        scores = scorer.losses(metric.weight_rows(mix(parameters, *ratios))).score()
        return float(np.nansum([scores[part] for part in metric.PARTS[:-1]]))

    simple = [np.full(n_models, 1 / n_models), *(np.eye(n_models) if n_models > 1 else ())]
    kinds = np.equal.outer([*map(family, tables)], list(dict.fromkeys(map(family, tables))))
    if n_models > kinds.shape[1]:  # several members: also the mean of a kind, and that of the kinds' means
        means = kinds / kinds.sum(axis=0)
        simple += [*means.T, means.mean(axis=1)]
    start = best = min((np.append(weights, [0.0, 0.0]) for weights in simple), key=loss)
    freely = freely and len(rows) > 0
    if freely:
        pull = SHRINKAGE / len(scorer.studies)  # towards the best simple blend
        bounds = [(0, None)] * n_models + [(None, None)] * 2  # no model is read backwards
        how = {"method": "L-BFGS-B", "options": {"maxiter": 60}, "bounds": bounds}
        best = minimize(lambda x: loss(x) + float(pull * np.sum((x - start) ** 2)), start, **how).x
    weights = dict(zip(tables, best[:n_models].tolist(), strict=True))
    return {"weights": weights, "bias": best[n_models:].tolist(), "kept": "fitted" if freely else "simple", "gain": []}


def choose_blend(tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> Blend:
    """The fitted numbers for each group whose cross-fitted gain over the simple blend is sure, else the simple blend.
    Sure: the 95 % bootstrap interval of the gain lies above 0; the canal's is that in spinal plus any-severe."""
    solution = metric.solution_of(labels[labels["row_id"].isin(prior["row_id"])])
    rows = {"simple": cross_fitted(tables, prior, labels, ()), "fitted": cross_fitted(tables, prior, labels)}
    losses = {name: metric.study_losses(solution, metric.weight_table(table)) for name, table in rows.items()}
    drawn, gains = metric.resampled_scores(losses, metric.patients_of(labels)), {}
    scores = {name: np.array(list(of_study.score().values())) for name, of_study in losses.items()}
    for key, group in GROUPS.items():
        touched = [group.score, "any_severe"] if key == "scs" else [group.score]
        parts = [metric.PARTS.index(part) for part in touched]
        mean = (scores["simple"] - scores["fitted"])[parts].sum()
        [interval] = metric.interval((drawn["simple"] - drawn["fitted"])[:, parts].sum(axis=1, keepdims=True))
        gains[key] = [float(mean), *interval] if np.isfinite([mean, *interval]).all() else []
    blend = fit_blend(tables, prior, labels, [key for key, gain in gains.items() if gain and gain[1] > 0])
    return {key: {**mixture, "gain": gains[key]} for key, mixture in blend.items()}


def cross_fitted(
    tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame,
    only: Collection[str] = GROUPS, fitted_on: Tables | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The rows of `prior`, each blended by numbers (`fit_blend`) that were fitted on other studies of `labels` (row_id,
    study_id, severity; patient, whose studies are kept together), on the rows of `fitted_on` if not on `tables`."""
    study_of = metric.row_keys(prior["row_id"])["study_id"].to_numpy()
    studies, known = np.unique(study_of), metric.patients_of(labels)
    patient_of = studies if known is None else known[studies].to_numpy()
    patients, blended = np.random.default_rng(0).permutation(pd.unique(patient_of)), []
    for part in np.array_split(patients, min(PARTS, len(patients))):
        held_out = studies[np.isin(patient_of, part)]
        in_part = np.isin(study_of, held_out)
        others = labels[~labels["study_id"].astype(str).isin(held_out)]
        fitted = fit_blend(fitted_on or tables, prior[~in_part], others, only)
        blended.append(apply_blend(fitted, tables, prior[in_part]))
    return prior[["row_id"]].merge(pd.concat(blended), on="row_id")


def finish(blended: Tables, given: Tables, prior: pd.DataFrame, unseen: Collection[str]) -> tuple[Tables, pd.Series]:
    """Blended tables (each model's own, and `ensemble`) with their last rows, and the sources of the ensemble's rows.

    `given`: the models' tables before blending; `unseen`: ids of rows whose own series is missing. A row without
    evidence is the prior. An unseen row that one model alone gave is blended as that model's own: on 80 phantom studies
    with T1, T2 or axial series hidden, the affected part of the score was .57, .42, .71 this way, .58, .45, .73 by the
    ensemble's formula (which stays if the series is there), and .77, .79, .99 by the prior.
    """
    sources, shares = row_sources(given, prior["row_id"]), prior[PROBABILITIES].to_numpy()
    natural = {name: aligned(table, prior) for name, table in blended.items()}
    unseen = prior["row_id"].isin(list(unseen)).to_numpy()
    for name in natural.keys() - {"ensemble"}:
        alone = unseen & (sources == name).to_numpy()
        natural["ensemble"] = np.where(alone[:, None], natural[name], natural["ensemble"])
        own = [table["row_id"] for model, table in given.items() if name in (model, family(model))]
        known = prior["row_id"].isin(pd.concat(own)).to_numpy()
        natural[name] = np.where(known[:, None], natural[name], shares)
    natural["ensemble"] = np.where((sources == "prior").to_numpy()[:, None], shares, natural["ensemble"])
    return {name: as_table(prior["row_id"], rows) for name, rows in natural.items()}, sources


def row_sources(tables: Tables, row_ids: pd.Series) -> pd.Series:
    """Where each row's probabilities come from, by row id: kinds of models that gave it, joined by +, or `prior`."""
    given = pd.DataFrame({model: row_ids.isin(table["row_id"]) for model, table in tables.items()})
    given = given.T.groupby(family, sort=False).any().T
    names = ["+".join(given.columns[row]) or "prior" for row in given.to_numpy()]
    return pd.Series(names, index=row_ids.to_numpy(), name="source", dtype=str)


def family(model: str) -> str:
    """The kind of a model: vit3d of a member of the transformers' blend."""
    return model.partition("-")[0]


def mix(parameters: np.ndarray, stacked: np.ndarray, log_prior: np.ndarray) -> np.ndarray:
    """Natural probabilities (n, 3) from weights and bias, log(p_m / prior) `stacked` (models, n, 3) and log prior."""
    logits = log_prior + np.tensordot(parameters[: len(stacked)], stacked, axes=1)
    logits[:, 1:] += parameters[len(stacked) :]
    return softmax(logits, axis=1)


def log_ratios(tables: Tables, prior: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """log(p / prior) of each model (models, n, 3), 0 where it gives no row, and the log prior (n, 3)."""
    log_prior = np.log(np.maximum(prior[PROBABILITIES].to_numpy(float), SMALLEST))
    logs = np.log(np.maximum([aligned(table, prior) for table in tables.values()], SMALLEST))  # NaN stays NaN
    return np.where(np.isnan(logs), 0.0, logs - log_prior), log_prior


def aligned(table: pd.DataFrame, prior: pd.DataFrame) -> np.ndarray:
    """The table's probabilities (n, 3) in the order of the prior's rows, NaN where it has no row."""
    return table.set_index("row_id")[PROBABILITIES].reindex(prior["row_id"]).to_numpy(float)


def as_table(row_ids: pd.Series, probabilities: np.ndarray) -> pd.DataFrame:
    """A prediction table of rows (n, 3)."""
    table = pd.DataFrame(probabilities, columns=PROBABILITIES, dtype=float)
    table.insert(0, "row_id", np.asarray(row_ids))
    return table
