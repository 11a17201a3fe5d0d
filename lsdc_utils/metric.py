"""The competition's score, and the baselines it is compared with.

The score is the mean of four weighted log losses (evaluation page of "RSNA 2024 Lumbar Spine Degenerative
Classification"): spinal, foraminal and subarticular rows, and one row a study for any severe spinal stenosis. A row
weighs w_k = 1, 2, 4 by its label, so the best row to submit is proportional to w_k p_k. All prediction tables hold the
natural probabilities p_k; only `weight_rows` makes weighted rows.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from lsdc_utils import vocabulary
from lsdc_utils.vocabulary import CONDITIONS, GROUP_OF, GROUPS, MISSING, SEVERITIES, SEVERITY_WEIGHTS, parse_row_id

PARTS = ("spinal", "foraminal", "subarticular", "any_severe", "total")
GROUP_PARTS = PARTS[:3]  # one a condition group
MEAN = "mean_of_groups"  # of the parts that have rows, where some have none and the total so has no value
WEIGHTS = np.array(SEVERITY_WEIGHTS)
PROBABILITIES = list(SEVERITIES)
SUM_TOLERANCE = 1e-4  # a row read back from a file of six decimals still sums to 1
DRAWS, FEWEST = 1000, 10  # bootstrap samples behind an interval; studies or patients under which there is none
BINS = 10  # of equal width, of the calibration error
SMALLEST = np.finfo(np.float64).eps  # log loss clips here, as scikit-learn does: a hard 0 costs 36 x the weight


def row_keys(row_ids: Iterable[str]) -> pd.DataFrame:
    """What row ids say, as text: row_id, study_id, condition, level, side ('' for the canal), group (nfn, scs, ss)."""
    keys = [(row, *parse_row_id(row)) for row in row_ids]
    of = [(CONDITIONS[condition].side or "", CONDITIONS[condition].group) for _, _, condition, _ in keys]
    columns = ["row_id", "study_id", "condition", "level", "side", "group"]
    return pd.DataFrame([key + more for key, more in zip(keys, of, strict=True)], columns=columns, dtype=str)


def weight_rows(natural: np.ndarray) -> np.ndarray:
    """Natural probabilities (..., 3) to the rows the score rewards: w_k p_k, each row normalised to 1."""
    weighted = np.asarray(natural, dtype=np.float64) * WEIGHTS
    return weighted / weighted.sum(axis=-1, keepdims=True)


def weight_table(table: pd.DataFrame) -> pd.DataFrame:
    """A prediction table (row_id and three natural probabilities) as the competition's submission."""
    weighted = dict(zip(PROBABILITIES, weight_rows(table[PROBABILITIES].to_numpy()).T, strict=True))
    return table[["row_id"]].reset_index(drop=True).assign(**weighted)


def score(solution: pd.DataFrame, submission: pd.DataFrame) -> dict[str, float]:
    """The official score and its `PARTS` (lower is better); a part without rows is NaN, and so is total then.

    `solution`: row_id and severity in {0, 1, 2}; rows without a label are absent. `submission`: row_id and the three
    weighted numbers; further rows are ignored. ValueError where one is missing, doubled or does not hold three shares.
    """
    scores = study_losses(solution, submission).score()
    return {part: scores[part] for part in PARTS}


def overall(scores: dict[str, Any]) -> str:
    """The name of the one number among parts of the score: total, or `MEAN` where that stands in for it."""
    return MEAN if MEAN in scores else PARTS[-1]


@dataclass(frozen=True)
class StudyLosses:
    """What each study adds to each part of the score: a part is sum(losses) / sum(weights) over the studies drawn."""

    studies: np.ndarray  # (n,) ids
    losses: np.ndarray  # (n, 4) sums over a study's rows in the order of `PARTS` without total
    weights: np.ndarray  # (n, 4)

    @property
    def parts(self) -> tuple[str, ...]:
        """`PARTS`, and `MEAN` where only some of them have rows."""
        return (*PARTS, MEAN) if 0 < (self.weights.sum(axis=0) > 0).sum() < len(PARTS) - 1 else PARTS

    def score(self) -> dict[str, float]:
        """The `parts` of the score and their mean."""
        return dict(zip(self.parts, self.resampled(np.ones((1, len(self.studies))))[0].tolist(), strict=True))

    def resampled(self, counts: np.ndarray) -> np.ndarray:
        """Scores (draws, 5 or 6) in the order of `parts`, for how often each study was drawn, counts (draws, n)."""
        weights, there = counts @ self.weights, self.weights.sum(axis=0) > 0
        parts = np.divide(counts @ self.losses, weights, out=np.full(weights.shape, np.nan), where=weights > 0)
        means = [parts.mean(axis=1), *([parts[:, there].mean(axis=1)] if MEAN in self.parts else ())]
        return np.column_stack([parts, *means])


def study_losses(solution: pd.DataFrame, submission: pd.DataFrame) -> StudyLosses:
    """The losses behind `score`, with its arguments and its errors."""
    rows = solution[["row_id", "severity"]].merge(submission[["row_id", *PROBABILITIES]], on="row_id", how="left")
    numbers = rows[PROBABILITIES].to_numpy(dtype=np.float64)
    for table, bad, what in (
        (solution, solution["row_id"].duplicated(), "rows doubled in the solution"),
        (submission, submission["row_id"].duplicated(), "rows doubled in the submission"),
        (solution, ~solution["severity"].isin([0, 1, 2]), "severities that are not 0, 1 or 2"),
        (rows, ~rows["row_id"].isin(submission["row_id"]), "rows of the solution missing from the submission"),
        (rows, ~np.isfinite(numbers).all(axis=1), "rows with numbers that are not finite"),
        (rows, (numbers < 0).any(axis=1), "rows with negative numbers"),
        (rows, np.abs(numbers.sum(axis=1) - 1) > SUM_TOLERANCE, "rows that do not sum to 1"),
    ):
        if bad.any():
            named = ", ".join(table.loc[bad, "row_id"].head(5))
            raise ValueError(f"{bad.sum()} {what}: {named}{', ...' if bad.sum() > 5 else ''}")
    return Scorer(rows).losses(numbers)


class Scorer:
    """The score of a fixed set of labelled rows, prepared for scoring many predictions of them. `solution` (n rows):
    row_id, severity in {0, 1, 2}; predictions (n, 3) come in its order and are not checked again."""

    def __init__(self, solution: pd.DataFrame):
        keys = row_keys(solution["row_id"])
        self.studies, self._study = np.unique(keys["study_id"].to_numpy(str), return_inverse=True)
        self._part = np.array([GROUP_PARTS.index(GROUPS[group].score) for group in keys["group"]], dtype=int)
        self._truth = solution["severity"].to_numpy(dtype=int)
        self._weight = WEIGHTS[self._truth]
        self._spinal = self._part == GROUP_PARTS.index("spinal")
        self._any_severe = self._highest(self._truth == 2)
        self._weights = self._sums(self._weight)
        self._weights[:, -1] = self._highest(self._weight)  # 0 for a study without a spinal row

    def losses(self, numbers: np.ndarray) -> StudyLosses:
        """The losses of weighted predictions (n, 3)."""
        of_truth = np.clip(numbers[np.arange(len(numbers)), self._truth], SMALLEST, 1 - SMALLEST)
        losses = self._sums(-self._weight * np.log(of_truth))
        severe = np.clip(self._highest(numbers[:, 2]), SMALLEST, 1 - SMALLEST)
        losses[:, -1] = -self._weights[:, -1] * np.where(self._any_severe == 1, np.log(severe), np.log1p(-severe))
        return StudyLosses(self.studies, losses, self._weights)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """Values (n,) summed by study and group part, with an empty last column: (studies, 4)."""
        n_parts = len(PARTS) - 1
        cell = self._study * n_parts + self._part
        return np.bincount(cell, weights=values, minlength=len(self.studies) * n_parts).reshape(-1, n_parts)

    def _highest(self, values: np.ndarray) -> np.ndarray:
        """The highest value (not negative) over each study's spinal rows: (studies,)."""
        highest = np.zeros(len(self.studies))
        np.maximum.at(highest, self._study[self._spinal], values[self._spinal])
        return highest


def prior(labels: pd.DataFrame, pool_sides: bool = False) -> pd.DataFrame:
    """The label-frequency baseline: condition, level and the natural probabilities (n + 0.5) / (N + 1.5) of `labels`
    (condition, level, severity; -1 is not counted): all 25 rows. `pool_sides`: left and right are counted together."""
    counts = pd.DataFrame({name: labels["severity"] == k for k, name in enumerate(SEVERITIES)}, index=labels.index)
    every = pd.MultiIndex.from_product([sorted(CONDITIONS), vocabulary.LEVELS], names=["condition", "level"])
    counts = counts.groupby([labels["condition"], labels["level"]]).sum().reindex(every, fill_value=0)
    if pool_sides:
        groups = counts.index.get_level_values("condition").map(lambda name: CONDITIONS[name].group)
        counts = counts.groupby([groups, counts.index.get_level_values("level")]).transform("sum")
    counts += 0.5
    return counts.div(counts.sum(axis=1), axis=0).reset_index()


def prior_rows(train: pd.DataFrame, rows: pd.DataFrame, pool_sides: bool = False) -> pd.DataFrame:
    """The prediction table that `prior(train)` gives for `rows` (row_id, condition, level)."""
    keys = ["condition", "level"]
    return rows[["row_id", *keys]].merge(prior(train, pool_sides), on=keys, how="left").drop(columns=keys)


def prior_out_of_fold(labels: pd.DataFrame, pool_sides: bool = False) -> pd.DataFrame:
    """The prior of each training row, counted on the other folds; `labels` as in tables/labels.parquet."""
    parts = [prior_rows(labels[labels["fold"] != fold], rows, pool_sides) for fold, rows in labels.groupby("fold")]
    return pd.concat(parts, ignore_index=True)


def patients_of(labels: pd.DataFrame) -> pd.Series | None:
    """The patient of each study of a label table by the study's id as text, for `resampled_scores`; None if unknown."""
    return labels.groupby(labels["study_id"].astype(str))["patient"].first() if "patient" in labels else None


def only_groups(labels: pd.DataFrame, groups: Collection[str]) -> pd.DataFrame:
    """A label table in which other condition groups have no label; their rows stay."""
    return labels.assign(severity=labels["severity"].where(labels["condition"].map(GROUP_OF).isin(groups), MISSING))


def rows_of_groups(rows: pd.DataFrame, groups: Collection[str]) -> pd.DataFrame:
    """The rows of a prediction table that are of these condition groups."""
    return rows[rows["row_id"].astype(str).str.contains("|".join(GROUPS[key].base for key in groups))]


def solution_of(labels: pd.DataFrame) -> pd.DataFrame:
    """The rows of a label table that have a label, as the score takes them: row_id, severity."""
    return labels.loc[labels["severity"] != MISSING, ["row_id", "severity"]].reset_index(drop=True)


def skill(model: dict[str, float], prior: dict[str, float], oracle: dict[str, float]) -> dict[str, float]:
    """(L_prior - L_model) / (L_prior - L_oracle) of each part: 0 is the prior, 1 the limit of the labels."""
    return {part: (prior[part] - model[part]) / (prior[part] - oracle[part]) for part in model}


def resampled_scores(losses: dict[str, StudyLosses], patients: pd.Series | None = None) -> dict[str, np.ndarray]:
    """Scores (draws, 5 or 6) of each model in the order of its `parts`, on the same bootstrap draws for all. patients:
    the patient of each study by its id, as text; the studies of one are drawn together."""
    studies = next(iter(losses.values())).studies
    codes, people = pd.factorize(studies if patients is None else patients[studies])
    counts = bootstrap(len(people))[:, codes]
    return {model: of_study.resampled(counts) for model, of_study in losses.items()}


def bootstrap(n_studies: int) -> np.ndarray:
    """How often each study is drawn in each of `DRAWS` bootstrap samples (draws, n); NaN under `FEWEST` studies, whose
    samples are too alike to tell an interval."""
    drawn = np.random.default_rng(0).multinomial(n_studies, np.full(n_studies, 1 / n_studies), size=DRAWS)
    return drawn if n_studies >= FEWEST else np.full(drawn.shape, np.nan)


def interval(samples: np.ndarray) -> list[list[float]]:
    """The [low, high] that hold 95 % of the finite draws (draws, k), for each of k columns; NaN if there is none."""
    finite = pd.DataFrame(np.where(np.isfinite(samples), samples, np.nan))
    return finite.quantile([0.025, 0.975]).T.to_numpy().tolist()


def score_block(solution: pd.DataFrame, tables: dict[str, pd.DataFrame], patients: Any = None) -> dict[str, Any]:
    """One block of `scores.json`: every model's scores and skill, with 95 % bootstrap intervals (`resampled_scores`).

    `tables`: model to its natural rows; skill needs `prior` and `oracle` among them and is None otherwise. Parts of a
    group without a labelled row are None; then `MEAN` stands beside them, and `groups` names those that have rows.
    """
    losses = {model: study_losses(solution, weight_table(table)) for model, table in tables.items()}
    scores = {model: of_study.score() for model, of_study in losses.items()}
    samples, skills = resampled_scores(losses, patients), None
    if "oracle" in scores:
        skills = {model: skill(parts, scores["prior"], scores["oracle"]) for model, parts in scores.items()}
    first = next(iter(losses.values()))
    intervals = {model: dict(zip(first.parts, interval(drawn), strict=True)) for model, drawn in samples.items()}
    block = {"n_studies": len(first.studies), "scores": scores, "skill": skills, "interval": intervals}
    if MEAN in first.parts:
        known = dict(zip(PARTS, first.weights.sum(axis=0) > 0, strict=False))
        block["groups"] = [key for key, group in GROUPS.items() if known[group.score]]
    return without_nan(block)


def without_nan(value: Any) -> Any:
    """Nested dicts and lists with None for every number that is not finite, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(part) for part in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def calibration_error(natural: np.ndarray, severity: np.ndarray) -> float:
    """Class-wise calibration error (Naeini et al., AAAI 2015) of natural probabilities (n, 3) for labels (n,): the mean
    over classes of |mean probability - share of the class| of the rows in each of `BINS`, weighted by their number."""
    errors = []
    for k, chance in enumerate(natural.T):
        bin_of = np.minimum((chance * BINS).astype(int), BINS - 1)
        expected, observed = (np.bincount(bin_of, values, BINS) for values in (chance, severity == k))
        errors.append(np.abs(expected - observed).sum() / len(severity))
    return float(np.mean(errors))


def auc(positive: np.ndarray, chance: np.ndarray) -> float:
    """Area under the ROC curve of `chance` (n,) for `positive` (n,) bool, ties counting half; NaN if all are alike."""
    positive, ranks = np.asarray(positive, bool), rankdata(chance)
    n, others = positive.sum(), (~positive).sum()
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * others)) if n and others else np.nan
