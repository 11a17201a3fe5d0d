"""Joining the models' answers: a geometric mixture of every model and the prior, fitted on out-of-fold rows.

For a row with prior pi and models p_m, in natural probabilities,

    p  proportional to  exp( sum_m a_m log p_m  +  (1 - sum_m a_m) log pi  +  bias )

Each condition group has its own numbers, shared over levels and sides: a weight a_m for each model and a bias for
moderate and for severe. The prior takes what the models leave of the weight, so a model that knows nothing falls to
the prior and not to a uniform guess, and the sum of the weights is an inverse temperature. Where one model has no
evidence for a row, the prior takes its place in the formula. A row without evidence from any model is the prior.

The numbers are pulled towards a simple blend (`simple_blend`): equal weights or one model alone, whichever scores best,
without temperature and bias. Equal weights alone would drag a good model down to a poor one where the two differ much.
"""

from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
from scipy.optimize import minimize, minimize_scalar
from scipy.special import softmax

from lsdc_utils import metric
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, parse_row_id

SMALLEST = 1e-7  # probabilities are raised to this before a logarithm: the published floor of a confidence
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
        of_group = groups == key
        stacked = np.stack([logs[model][of_group] for model in mixture.weights])
        parameters = np.array([*mixture.weights.values(), *mixture.bias])
        natural[of_group] = _mix(parameters, stacked, logs["prior"][of_group])
    return as_table(prior["row_id"], natural)


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
    labelled = prior.merge(metric.solution_of(labels), on="row_id")
    logs, groups, blend = _log_ratios(tables, labelled), _groups(labelled), equal_blend(list(tables))
    for key in GROUPS:
        of_group = groups == key
        if of_group.any():
            stacked = np.stack([logs[model][of_group] for model in tables])
            scorer = metric.Scorer(labelled[of_group])
            blend[key] = _fit_group(list(tables), stacked, logs["prior"][of_group], scorer, key in only)
    return blend


def _fit_group(
    models: list[str], stacked: np.ndarray, log_prior: np.ndarray, scorer: metric.Scorer, freely: bool
) -> Mixture:
    """Minimise the parts of the score that these rows touch (for the canal: spinal and any-severe): over the simple
    blends, and then, where `freely`, over all numbers round the best of them."""

    def loss(parameters: np.ndarray) -> float:
        """The score's parts."""
        return _touched_parts(scorer.losses(metric.weight_rows(_mix(parameters, stacked, log_prior))))

    simple = [np.full(len(models), 1 / len(models)), *(np.eye(len(models)) if len(models) > 1 else ())]
    start = min((np.append(weights, [0.0, 0.0]) for weights in simple), key=loss)

    def objective(parameters: np.ndarray) -> float:
        """The score's parts, with the pull to the simple blend."""
        return loss(parameters) + float(SHRINKAGE / len(scorer.studies) * np.sum((parameters - start) ** 2))

    best = minimize(objective, start, method="L-BFGS-B", options={"maxiter": 60}).x if freely else start
    weights, (moderate, severe) = best[: len(models)].tolist(), best[len(models) :].tolist()
    return Mixture(dict(zip(models, weights, strict=True)), (moderate, severe), kept="fitted" if freely else "simple")


def choose_blend(tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> Blend:
    """`fit_blend` for each group whose cross-fitted gain over `simple_blend` is sure, `simple_blend` for the others.

    Sure: the 95 % bootstrap interval of the gain over studies lies above 0. The canal's gain is in the sum of its two
    parts of the score, spinal and any-severe. Both are cross-fitted; the choice between them is made once a group.
    """
    solution = metric.solution_of(labels[labels["row_id"].isin(prior["row_id"])])
    losses = {
        name: metric.study_losses(solution, metric.weight_table(cross_fitted(tables, prior, labels, fit)))
        for name, fit in (("simple", simple_blend), ("fitted", fit_blend))
    }
    drawn = metric.resampled_scores(losses)
    scores = {name: np.array(list(of_study.score().values())) for name, of_study in losses.items()}
    gains = {}
    for key, group in GROUPS.items():
        touched = [group.score, "any_severe"] if key == "scs" else [group.score]
        parts = [metric.PARTS.index(part) for part in touched]
        mean = (scores["simple"] - scores["fitted"])[parts].sum()
        [(low, high)] = metric.interval((drawn["simple"] - drawn["fitted"])[:, parts].sum(axis=1, keepdims=True))
        gains[key] = (float(mean), low, high) if np.isfinite([mean, low, high]).all() else ()
    sure = [key for key, gain in gains.items() if gain and gain[1] > 0]
    blend = fit_blend(tables, prior, labels, sure)
    return {key: replace(mixture, gain=gains[key]) for key, mixture in blend.items()}


def _touched_parts(losses: metric.StudyLosses) -> float:
    """The sum of the parts of the score that have a value: those that the scored rows touch."""
    return float(np.nansum([value for part, value in losses.score().items() if part != "total"]))


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
        in_part = study_of.isin(held_out)
        others = labels[~labels["study_id"].astype(str).isin(held_out)]
        numbers = fit(tables, prior[~in_part], others)
        blended.append(apply(numbers, tables, prior[in_part].reset_index(drop=True)))
    return prior[["row_id"]].merge(pd.concat(blended), on="row_id")


def finish(
    blended: Tables, given: Tables, prior: pd.DataFrame, unseen: Collection[str] = ()
) -> tuple[Tables, pd.Series]:
    """Blended tables (each model's own, and `ensemble`) with their last rows, and the sources of the ensemble's rows.

    `given` are the models' tables before blending, `unseen` the ids of rows whose own series is missing. A row without
    evidence is the prior. An unseen row that one model alone gave is blended as that model's own: the transformer still
    grades from the other series. On 80 phantom studies with T1, T2 or axial series hidden, the affected part of the
    score was .57, .42, .71 this way, .58, .45, .73 by the ensemble's formula, and .77, .79, .99 by the prior. Where the
    series is there and a model found nothing on it, the ensemble's formula stays: it hedges, and the level may have
    been sought at a wrong place.
    """
    sources, shares = row_sources(given, prior["row_id"]), prior[PROBABILITIES].to_numpy()
    natural = {name: aligned(table, prior) for name, table in blended.items()}
    unseen = prior["row_id"].isin(list(unseen)).to_numpy()
    for model, table in given.items():
        alone = unseen & (sources == model).to_numpy()
        natural["ensemble"] = np.where(alone[:, None], natural[model], natural["ensemble"])
        known = prior["row_id"].isin(table["row_id"]).to_numpy()
        natural[model] = np.where(known[:, None], natural[model], shares)
    natural["ensemble"] = np.where((sources == "prior").to_numpy()[:, None], shares, natural["ensemble"])
    return {name: as_table(prior["row_id"], rows) for name, rows in natural.items()}, sources


def row_sources(tables: Tables, row_ids: pd.Series) -> pd.Series:
    """Where each row's probabilities come from, by row id: the models that gave it, joined by +, or `prior`."""
    given = pd.DataFrame({model: row_ids.isin(table["row_id"]) for model, table in tables.items()})
    names = ["+".join(given.columns[row]) or "prior" for row in given.to_numpy()]
    return pd.Series(names, index=row_ids.to_numpy(), name="source", dtype=str)


# ---- equal weights and a temperature alone, for comparison -----------------------------------------------------------


def temper(temperatures: dict[str, float], tables: Tables, prior: pd.DataFrame) -> pd.DataFrame:
    """Rows p proportional to (the geometric mean of the models' rows)^T, with one temperature T a condition group.

    A model's missing row is the prior's there; a row that no model gives stays the prior.
    """
    shares = prior[PROBABILITIES].to_numpy()
    given = np.stack([aligned(table, prior) for table in tables.values()])
    logs = np.log(np.maximum(np.where(np.isnan(given), shares, given), SMALLEST)).mean(axis=0)
    powers = pd.Series(_groups(prior)).map(temperatures).to_numpy(float)
    natural = softmax(powers[:, None] * logs, axis=1)
    return as_table(prior["row_id"], np.where(np.isnan(given).all(axis=(0, 2))[:, None], shares, natural))


def fit_temperatures(tables: Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> dict[str, float]:
    """The temperatures of `temper` with the best official score on `labels`, pulled to 1 (kept without a label)."""
    labelled, temperatures = prior.merge(metric.solution_of(labels), on="row_id"), dict.fromkeys(GROUPS, 1.0)
    for key, rows in labelled.groupby(_groups(labelled)):
        scorer = metric.Scorer(rows)

        def objective(log_power: float, key=key, rows=rows, scorer=scorer) -> float:
            """The score's parts that the group's rows touch, with the pull to 1."""
            natural = temper({key: np.exp(log_power)}, tables, rows)[PROBABILITIES].to_numpy()
            pull = SHRINKAGE / len(scorer.studies) * log_power**2
            return _touched_parts(scorer.losses(metric.weight_rows(natural))) + pull

        temperatures[key] = float(np.exp(minimize_scalar(objective, bounds=(-4, 2), method="bounded").x))
    return temperatures


# ---- tables and numbers --------------------------------------------------------------------------------------------


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
    logits = log_prior + np.tensordot(parameters[: len(stacked)], stacked, axes=1)
    logits[:, 1:] += parameters[len(stacked) :]
    return softmax(logits, axis=1)


def _log_ratios(tables: Tables, prior: pd.DataFrame) -> dict[str, np.ndarray]:
    """The log prior, and for each model log(p / prior) (n, 3): 0 where the model gives no row."""
    log_prior = np.log(np.maximum(prior[PROBABILITIES].to_numpy(float), SMALLEST))
    logs = {"prior": log_prior}
    for model, table in tables.items():
        natural = np.log(np.maximum(aligned(table, prior), SMALLEST))  # NaN stays NaN
        logs[model] = np.where(np.isnan(natural), 0.0, natural - log_prior)
    return logs


def aligned(table: pd.DataFrame, prior: pd.DataFrame) -> np.ndarray:
    """The table's probabilities (n, 3) in the order of the prior's rows, NaN where it has no row."""
    return table.set_index("row_id")[PROBABILITIES].reindex(prior["row_id"]).to_numpy(float)


def _groups(prior: pd.DataFrame) -> np.ndarray:
    return np.array([CONDITIONS[parse_row_id(row)[1]].group for row in prior["row_id"]])


def as_table(row_ids: pd.Series, probabilities: np.ndarray) -> pd.DataFrame:
    """A prediction table of rows (n, 3)."""
    table = pd.DataFrame(probabilities, columns=PROBABILITIES, dtype=float)
    table.insert(0, "row_id", np.asarray(row_ids))
    return table
