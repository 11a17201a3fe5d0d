"""Joining the models' answers: a geometric mixture of every model and the prior, fitted on out-of-fold rows.

For a row with prior pi and models p_m, in natural probabilities,

    p  proportional to  exp( sum_m a_m log p_m  +  (1 - sum_m a_m) log pi  +  bias )

One set of numbers per condition group, shared over levels and sides: a weight a_m for each model and a bias for
moderate and for severe. The prior takes what the models leave of the weight, so a model that knows nothing falls to
the prior and not to a uniform guess, the sum of the weights is an inverse temperature, and a row without a model's
evidence is filled by the prior in the same formula.

The numbers are pulled towards a simple blend (`simple_blend`): equal weights or one model alone, whichever scores best,
without temperature and bias. Equal weights alone would drag a good model down to a poor one where the two differ much.

A row without evidence from any model is then expected from the study's other rows by a Gaussian copula (`complete`):
behind each column j stands a latent severity z_j ~ N(0, 1), cut by thresholds into the prior's shares, and the latents
of a study are jointly normal. With no evidence at all the expectation is the prior.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import minimize, minimize_scalar
from scipy.special import ndtr, ndtri, softmax

from lsdc_utils.metric import (
    PARTS,
    PROBABILITIES,
    Scorer,
    StudyLosses,
    interval,
    resampled_scores,
    solution_of,
    study_losses,
    weight_rows,
    weight_table,
)
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, GROUPS, LEVELS, parse_row_id, study_row_ids

PUBLISHED_WEIGHTS = {"yolo": 0.65, "vit3d": 0.35}  # of the bronze-medal method's arithmetic mean
SMALLEST = 1e-7  # probabilities are raised to this before a logarithm: the published floor of a confidence
WITHOUT_EVIDENCE = ("expectation", "prior")  # sources of rows that no model gave
SHRINKAGE = 10.0  # pull to the simple blend, in studies: it fades as studies are added


@dataclass(frozen=True)
class Mixture:
    """How one condition group is blended; weights are of log probabilities, bias is added to moderate and severe.

    `gain`, where `choose_blend` measured it: what the fitted numbers take off the group's parts of the score compared
    with the simple ones, with its 95 % interval; `kept` says which of the two these numbers are.
    """

    weights: dict[str, float]
    bias: tuple[float, float] = (0.0, 0.0)
    gain: tuple[float, ...] = ()  # mean, low, high
    kept: str = "fitted"  # or simple


Blend = dict[str, Mixture]  # by condition group: nfn, scs, ss
Tables = dict[str, pd.DataFrame]  # by model: row_id and three natural probabilities; rows may be missing


def equal_blend(models: list[str]) -> Blend:
    """Equal weights, temperature 1, no bias."""
    return {group: Mixture(dict.fromkeys(models, 1 / len(models)), kept="simple") for group in GROUPS}


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


def simple_blend(tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> Blend:
    """For each group equal weights or one model alone, at temperature 1 without bias: what scores best on `labels`."""
    return fit_blend(tables, prior, labels, only=())


def fit_blend(
    tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame, only: Collection[str] = tuple(GROUPS)
) -> Blend:
    """The blend with the best official score on `labels` (row_id, severity), pulled towards the simple blend.

    `tables` and `prior` must be out of fold for the rows of `labels`. Groups that are not among `only` keep the simple
    blend, groups without a single label equal weights.
    """
    labelled = prior.merge(solution_of(labels), on="row_id")
    logs, groups, blend = _log_ratios(tables, labelled), _groups(labelled), equal_blend(list(tables))
    for key in GROUPS:
        rows = groups == key
        if rows.any():
            stacked = np.stack([logs[model][rows] for model in tables])
            blend[key] = _fit_group(list(tables), stacked, logs["prior"][rows], Scorer(labelled[rows]), key in only)
    return blend


def _fit_group(models: list[str], stacked: np.ndarray, log_prior: np.ndarray, scorer: Scorer, freely: bool) -> Mixture:
    """Minimise the parts of the score that these rows touch (for the canal: spinal and any-severe): over the simple
    blends, and then, where `freely`, over all numbers round the best of them."""

    def loss(parameters: np.ndarray) -> float:
        """The score's parts."""
        return _touched(scorer.losses(weight_rows(_mix(parameters, stacked, log_prior))))

    simple = [np.full(len(models), 1 / len(models)), *(np.eye(len(models)) if len(models) > 1 else ())]
    start = min((np.append(weights, [0.0, 0.0]) for weights in simple), key=loss)

    def objective(parameters: np.ndarray) -> float:
        """The score's parts, with the pull to the simple blend."""
        return loss(parameters) + float(SHRINKAGE / len(scorer.studies) * np.sum((parameters - start) ** 2))

    found = minimize(objective, start, method="L-BFGS-B", options={"maxiter": 60}).x if freely else start
    weights, bias = found[: len(models)].tolist(), found[len(models) :].tolist()
    kept = "fitted" if freely else "simple"
    return Mixture(dict(zip(models, weights, strict=True)), (bias[0], bias[1]), kept=kept)


def choose_blend(tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> Blend:
    """`fit_blend` for each group whose cross-fitted gain over `simple_blend` is sure, `simple_blend` for the others.

    Sure: the 95 % bootstrap interval of the gain over studies lies above 0. The canal's gain is in the sum of its two
    parts of the score, spinal and any-severe. Both are cross-fitted, the choice between them is made once a group.
    """
    fits = {"simple": simple_blend, "fitted": fit_blend}
    rows = {name: cross_fitted(tables, prior, labels, fit) for name, fit in fits.items()}
    solution = solution_of(labels[labels["row_id"].isin(prior["row_id"])])
    losses = {name: study_losses(solution, weight_table(table)) for name, table in rows.items()}
    drawn = resampled_scores(losses)
    whole = {name: np.array(list(of_study.score().values())) for name, of_study in losses.items()}
    gains = {}
    for key, group in GROUPS.items():
        touched = [group.score, "any_severe"] if key == "scs" else [group.score]
        parts = [PARTS.index(part) for part in touched]
        mean = (whole["simple"] - whole["fitted"])[parts].sum()
        [(low, high)] = interval((drawn["simple"] - drawn["fitted"])[:, parts].sum(axis=1, keepdims=True))
        gains[key] = (float(mean), low, high) if np.isfinite([mean, low, high]).all() else ()
    sure = [key for key, gain in gains.items() if gain and gain[1] > 0]
    blend = fit_blend(tables, prior, labels, sure)
    return {key: replace(mixture, gain=gains[key]) for key, mixture in blend.items()}


def _touched(losses: StudyLosses) -> float:
    """The sum of the parts of the score that have a value: those that the scored rows touch."""
    return float(np.nansum([value for part, value in losses.score().items() if part != "total"]))


def temper(temperatures: dict[str, float], tables: Tables, prior: pd.DataFrame) -> pd.DataFrame:
    """Rows p proportional to (the geometric mean of the models' rows)^T, with one temperature T a condition group.

    A model's missing row is the prior's there; a row that no model gives stays the prior.
    """
    shares = prior[PROBABILITIES].to_numpy()
    given = np.stack([_aligned(table, prior) for table in tables.values()])
    logs = np.log(np.maximum(np.where(np.isnan(given), shares, given), SMALLEST)).mean(axis=0)
    powers = pd.Series(_groups(prior)).map(temperatures).to_numpy(float)
    natural = softmax(powers[:, None] * logs, axis=1)
    return _table(prior["row_id"], np.where(np.isnan(given).all(axis=(0, 2))[:, None], shares, natural))


def fit_temperatures(tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> dict[str, float]:
    """The temperatures of `temper` with the best official score on `labels`, pulled to 1 (kept without a label)."""
    labelled, found = prior.merge(solution_of(labels), on="row_id"), dict.fromkeys(GROUPS, 1.0)
    groups = _groups(labelled)
    for key in set(groups):
        mine = labelled[groups == key]
        scorer = Scorer(mine)

        def objective(log_power: float, key: str = key, mine: pd.DataFrame = mine, scorer: Scorer = scorer) -> float:
            """The score's parts that the group's rows touch, with the pull to 1."""
            rows = temper({key: np.exp(log_power)}, tables, mine)[PROBABILITIES].to_numpy()
            return _touched(scorer.losses(weight_rows(rows))) + SHRINKAGE / len(scorer.studies) * log_power**2

        found[key] = float(np.exp(minimize_scalar(objective, bounds=(-4, 2), method="bounded").x))
    return found


def cross_fitted(
    tables: Tables,
    prior: pd.DataFrame,
    labels: pd.DataFrame,
    fit: Callable = fit_blend,
    apply: Callable = apply_blend,
    parts: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Each row blended by numbers that were fitted on other studies, so that its score is honest.

    `labels`: row_id, study_id, severity. Studies are dealt into `parts` at random. `fit` and `apply` are a pair such as
    `fit_blend` and `apply_blend`.
    """
    study_of = prior["row_id"].map(lambda row: parse_row_id(row)[0])
    studies = np.random.default_rng(seed).permutation(np.sort(study_of.unique()))
    blended = []
    for held_out in np.array_split(studies, min(parts, len(studies))):
        mine = study_of.isin(held_out)
        fitted_on = labels[~labels["study_id"].astype(str).isin(held_out)]
        found = fit(tables, prior[~mine], fitted_on)
        blended.append(apply(found, tables, prior[mine].reset_index(drop=True)))
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


# ---- rows without evidence -----------------------------------------------------------------------------------------


def pair_kinds() -> np.ndarray:
    """What pairs of columns (25, 25) are alike: groups, whether sides agree, and how many levels lie between them."""
    cells = [(condition, level) for condition in CONDITIONS.values() for level in range(len(LEVELS))]
    kinds = np.full((len(cells), len(cells)), "", dtype=object)
    for i, (one, level) in enumerate(cells):
        for j, (other, other_level) in enumerate(cells):
            sided = one.side and other.side
            side = ("same side, " if one.side == other.side else "other side, ") if sided else ""
            groups = "-".join(sorted((one.group, other.group)))
            kinds[i, j] = f"{groups}: {side}{abs(level - other_level)} levels apart"
    return kinds


def fit_correlations(labels: pd.DataFrame, prior: pd.DataFrame) -> dict[str, float]:
    """Polychoric correlation (Olsson 1979) of the latents of each kind of pair, from labels; missing ones do not count.

    labels: study_id, condition, level, severity; prior: condition, level and three probabilities, as `metric.prior`
    gives them. The likelihood of a kind is the mean over its pairs, and `SHRINKAGE` studies speak for 0.
    """
    column = labels["condition"] + "_" + labels["level"]
    wide = labels.assign(column=column).pivot(index="study_id", columns="column", values="severity")
    seen = wide.reindex(columns=list(COLUMNS)).to_numpy()[..., None] == np.arange(3)  # (n, 25, 3)
    counts = np.einsum("nik,njl->ijkl", seen.astype(float), seen.astype(float))
    shares = _by_column(prior)
    nodes, weights = np.polynomial.legendre.leggauss(16)
    first = shares.cumsum(axis=1) - shares
    z = ndtri(first[..., None] + shares[..., None] * (nodes + 1) / 2)[:, :, None, :, None]  # (i, k, 1, node, 1)
    grid, kinds = np.linspace(-0.9, 0.9, 37), pair_kinds()
    likelihood = np.empty((len(grid), *kinds.shape))
    for step, rho in enumerate(grid):
        below = ndtr((_cuts(shares)[:, None] - rho * z) / np.sqrt(1 - rho**2))  # of z_j, given z_i: (i, k, j, node, 4)
        given = np.einsum("ikjgl,g->ijkl", np.diff(below), weights / 2)
        likelihood[step] = (counts * np.log(np.maximum(given, SMALLEST))).sum(axis=(2, 3))
    off = ~np.eye(len(kinds), dtype=bool)
    found = {}
    for kind in dict.fromkeys(kinds[off]):
        gain = likelihood[:, (kinds == kind) & off].mean(axis=1) - SHRINKAGE / 2 * grid**2
        found[kind] = float(grid[gain.argmax()].round(3))
    return found


def correlation_matrix(correlations: dict[str, float]) -> np.ndarray:
    """The latents' correlations (25, 25) in the order of COLUMNS, made positive definite."""
    kinds = pair_kinds()
    matrix = np.vectorize(lambda kind: correlations.get(kind, 0.0), otypes=[float])(kinds)
    np.fill_diagonal(matrix, 1.0)
    values, vectors = np.linalg.eigh(matrix)
    matrix = (vectors * np.maximum(values, 0.05)) @ vectors.T
    scale = np.sqrt(np.diag(matrix))
    return matrix / scale / scale[:, None]


def expect(natural: np.ndarray, prior: np.ndarray, correlation: np.ndarray) -> np.ndarray:
    """Probabilities (n, 25, 3) of all rows of studies, expected from the rows `natural` (n, 25, 3) that are not NaN.

    A row p speaks for its latent by the mean m and variance v that z has when its interval k (between thresholds) has
    probability p_k; divided by the N(0, 1) before, that is a Gaussian message of precision t = max(1/v - 1, 0) and
    of precision times mean e = m (1 + t). Given all messages, with T = diag(t), z has the covariance
    S = (R^-1 + T)^-1 = (I + R T)^-1 R and the mean S e, and a row has the normal mass between its thresholds.
    prior: (n, 25, 3) or (25, 3).
    """
    cuts = _cuts(np.broadcast_to(prior, natural.shape))
    density = np.exp(-0.5 * cuts**2) / np.sqrt(2 * np.pi)
    moment = np.where(np.isfinite(cuts), cuts, 0) * density
    mean = (-np.diff(density) / prior * natural).sum(axis=-1)  # of z, by the truncated normals' moments
    variance = ((1 - np.diff(moment) / prior) * natural).sum(axis=-1) - mean**2
    precision = np.nan_to_num(np.maximum(1 / variance - 1, 0))
    message = np.nan_to_num(mean) * (1 + precision)
    identity = np.eye(natural.shape[1])
    covariance = np.linalg.solve(identity + correlation * precision[:, None, :], correlation[None])
    centre = np.einsum("nij,nj->ni", covariance, message)
    spread = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))
    return np.diff(ndtr((cuts - centre[..., None]) / spread[..., None]))


def complete(
    table: pd.DataFrame, sources: pd.Series, prior: pd.DataFrame, correlations: dict[str, float]
) -> pd.DataFrame:
    """`table` with the rows that `sources` (by its index) calls expectation or prior expected from the others.

    `table` and `prior` hold the same row ids, 25 a study.
    """
    studies = dict.fromkeys(parse_row_id(row)[0] for row in table["row_id"])
    rows = [row for study in studies for row in study_row_ids(study)]
    lacking = sources.reindex(table["row_id"]).isin(WITHOUT_EVIDENCE).to_numpy()
    known, shape = table[~lacking].set_index("row_id")[PROBABILITIES], (len(studies), len(COLUMNS), 3)
    natural = known.reindex(rows).to_numpy().reshape(shape)
    shares = prior.set_index("row_id")[PROBABILITIES].loc[rows].to_numpy().reshape(shape)
    expected = expect(natural, shares, correlation_matrix(correlations)).reshape(-1, 3)
    expected = pd.DataFrame(expected, rows, PROBABILITIES).loc[table["row_id"]]
    return _table(table["row_id"], np.where(lacking[:, None], expected, table[PROBABILITIES]))


def finish(
    blended: Tables, given: Tables, prior: pd.DataFrame, correlations: dict[str, float], unseen: Collection[str] = ()
) -> tuple[Tables, pd.Series]:
    """Blended tables (each model's own, and `ensemble`) with their last rows, and the sources of the ensemble's rows.

    `given` are the models' tables before blending, `unseen` the ids of rows whose own series is missing. Rows that no
    model gave are expected. An unseen row that one model alone gave is blended as that model's own: the transformer
    still grades from the other series. On 80 phantom studies with T1, T2 or axial series hidden, the affected part of
    the score was .57, .42, .71 this way, .58, .45, .73 by the ensemble's formula, .76, .52, .80 expected from the other
    rows, and .77, .79, .99 by the prior. Where the series is there and a model found nothing on it, the ensemble's
    formula stays: it hedges, and the level may have been sought at a wrong place.
    """
    sources = {name: row_sources({name: given[name]}, prior["row_id"]) for name in given}
    sources["ensemble"] = row_sources(given, prior["row_id"])
    joined = {name: _aligned(table, prior) for name, table in blended.items()}
    unseen = prior["row_id"].isin(list(unseen)).to_numpy()
    for name in given:
        alone = unseen & (sources["ensemble"] == name).to_numpy()
        joined["ensemble"] = np.where(alone[:, None], joined[name], joined["ensemble"])
    tables = {name: _table(prior["row_id"], table) for name, table in joined.items()}
    return {name: complete(tables[name], sources[name], prior, correlations) for name in tables}, sources["ensemble"]


def row_sources(tables: Tables, row_ids: pd.Series, expected: bool = True) -> pd.Series:
    """Where each row's probabilities come from, by row id: the models that gave it, joined by +; else `expectation`
    from the study's other rows; `prior` where it has none, or where nothing is to be `expected`."""
    given = pd.DataFrame({model: row_ids.isin(table["row_id"]) for model, table in tables.items()})
    named = ["+".join(given.columns[row]) for row in given.to_numpy()]
    study = row_ids.map(lambda row: parse_row_id(row)[0])
    known = given.any(axis=1)
    lacking = np.where(known.groupby(study).transform("any") & expected, *WITHOUT_EVIDENCE)
    return pd.Series(np.where(known, named, lacking), index=row_ids.to_numpy(), name="source")


def _by_column(prior: pd.DataFrame) -> np.ndarray:
    """The prior (25, 3) in the order of COLUMNS."""
    return prior.set_index(prior["condition"] + "_" + prior["level"])[PROBABILITIES].loc[list(COLUMNS)].to_numpy()


def _cuts(shares: np.ndarray) -> np.ndarray:
    """Thresholds (..., 4) of the latent, from -inf to inf, that cut it into shares (..., 3)."""
    inner = ndtri(shares.cumsum(axis=-1)[..., :-1])
    edge = np.full((*shares.shape[:-1], 1), np.inf)
    return np.concatenate([-edge, inner, edge], axis=-1)


def to_json(blend: Blend) -> dict:
    """The blend as plain numbers, for `blend.json`."""
    return {key: asdict(mixture) for key, mixture in blend.items()}


def from_json(content: dict) -> Blend:
    """The inverse of `to_json`."""
    tuples = ("bias", "gain")
    return {
        key: Mixture(**{name: tuple(value) if name in tuples else value for name, value in entry.items()})
        for key, entry in content.items()
    }


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
    log_prior = np.log(np.maximum(prior[PROBABILITIES].to_numpy(float), SMALLEST))
    logs = {"prior": log_prior}
    for model, table in tables.items():
        natural = np.log(np.maximum(_aligned(table, prior).astype(float), SMALLEST))  # NaN stays NaN
        logs[model] = np.where(np.isnan(natural), 0.0, natural - log_prior)
    return logs


def _aligned(table: pd.DataFrame, prior: pd.DataFrame) -> np.ndarray:
    """The table's probabilities (n, 3) in the order of the prior's rows, NaN where it has no row."""
    return table.set_index("row_id")[PROBABILITIES].reindex(prior["row_id"]).to_numpy(float)


def _groups(prior: pd.DataFrame) -> np.ndarray:
    return np.array([CONDITIONS[parse_row_id(row)[1]].group for row in prior["row_id"]])


def _table(row_ids: pd.Series, probabilities: np.ndarray) -> pd.DataFrame:
    table = pd.DataFrame(probabilities, columns=PROBABILITIES)
    table.insert(0, "row_id", np.asarray(row_ids))
    return table
