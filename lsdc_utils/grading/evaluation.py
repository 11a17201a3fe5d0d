"""How well rows are graded: loss by any trait, discrimination, agreement, calibration, suspect labels.

All functions but `difference` take judged rows (`judge`), in the same order for every model.
"""

import itertools
from collections.abc import Collection

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score, precision_recall_curve

from lsdc_utils import metric
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.vocabulary import GROUPS

Judged = dict[str, pd.DataFrame]  # by model
POINTS = (0.2, 0.5)  # natural probabilities at which sensitivity and specificity are stated
EVENTS = {"severe": 2, "moderate or severe": 1}  # the mildest severity that counts as the event
SUSPECT = 0.05  # a label this improbable to models that did not see it is worth a second look


def judge(table: pd.DataFrame, solution: pd.DataFrame) -> pd.DataFrame:
    """Labelled rows: columns of `metric.row_keys`, severity, natural probabilities, weight (in the official score) and
    loss, what the row adds to that: weight times -log of the weighted row."""
    rows = metric.row_keys(solution["row_id"]).merge(solution[["row_id", "severity"]], on="row_id")
    rows = rows.merge(table[["row_id", *PROBABILITIES]], on="row_id")
    of_label = _of_label(rows, metric.weight_rows(rows[PROBABILITIES].to_numpy()))
    rows["weight"] = metric.WEIGHTS[rows["severity"].to_numpy(int)]
    return rows.assign(loss=-rows["weight"] * np.log(np.clip(of_label, metric.SMALLEST, 1)))


def difference(
    solution: pd.DataFrame, tables: dict[str, pd.DataFrame], model: str, other: str
) -> dict[str, tuple[float, float, float]]:
    """Score of `model` minus that of `other` in each part, with its paired 95 % interval: below 0 `model` is better."""
    losses = {name: metric.study_losses(solution, metric.weight_table(tables[name])) for name in (model, other)}
    scores = {name: of_study.score() for name, of_study in losses.items()}
    samples = metric.resampled_scores(losses)
    intervals = zip(losses[model].parts, metric.interval(samples[model] - samples[other]), strict=True)
    return {part: (scores[model][part] - scores[other][part], low, high) for part, (low, high) in intervals}


def by_trait(judged: Judged, trait: pd.Series) -> pd.DataFrame:
    """The weighted log loss of rows that share a value of `trait` (n,): a line a value; missing values are left out.

    Columns: studies, rows, the loss of each model; low, high: 95 % interval over studies of the ensemble's skill where
    there is an oracle, else of its loss; skill.
    """
    lines = {}
    for value, places in judged["ensemble"].groupby(trait.to_numpy()).indices.items():
        codes, studies = pd.factorize(judged["ensemble"]["study_id"].iloc[places])
        counts = np.vstack([np.ones(len(studies)), metric.bootstrap(len(studies))])  # first the studies as they are
        sums = {name: counts @ np.bincount(codes, rows["loss"].iloc[places]) for name, rows in judged.items()}
        weight = counts @ np.bincount(codes, judged["ensemble"]["weight"].iloc[places])
        loss = {name: drawn / weight for name, drawn in sums.items()}
        line = {"studies": len(studies), "rows": len(places)} | {name: drawn[0] for name, drawn in loss.items()}
        drawn = loss["ensemble"]
        if "oracle" in judged:
            drawn = (loss["prior"] - drawn) / (loss["prior"] - loss["oracle"])
            line["skill"] = drawn[0]
        [(low, high)] = metric.interval(drawn[1:, None])
        lines[value] = line | {"low": low, "high": high}
    return pd.DataFrame.from_dict(lines, orient="index")


def discrimination(rows: pd.DataFrame) -> pd.DataFrame:
    """For each group and event: how many rows, how many are the event, AUC, sensitivity and specificity at `POINTS`."""
    lines = {}
    for group, (event, mildest) in itertools.product(GROUPS.values(), EVENTS.items()):
        of_group = rows[rows["group"] == group.key]
        truth = of_group["severity"] >= mildest
        chance = of_group[PROBABILITIES[mildest:]].sum(axis=1)
        line = lines[group.score, event] = {"rows": len(truth), "events": truth.sum(), "AUC": metric.auc(truth, chance)}
        for point in POINTS if truth.nunique() == 2 else ():
            line[f"sensitivity at {point}"] = (chance[truth] >= point).mean()
            line[f"specificity at {point}"] = (chance[~truth] < point).mean()
    return pd.DataFrame.from_dict(lines, orient="index")


def agreement(judged: Judged) -> pd.DataFrame:
    """Linear and quadratic kappa (Cohen 1968) of labels with each model's most probable grade, for each group.

    `two readers`, if there is an oracle q: the kappa expected of two independent readers who grade each of these rows
    (a, b) with the probability q_a q_b.
    """
    lines = {}
    for group, weights in itertools.product(GROUPS.values(), ("linear", "quadratic")):
        line = lines[group.score, weights] = {}
        for model in (name for name in ("yolo", "vit3d", "ensemble", "oracle") if name in judged):
            rows = judged[model][judged[model]["group"] == group.key]
            natural = rows[PROBABILITIES].to_numpy()
            if len(rows):
                grade = natural.argmax(axis=1)
                line[model] = cohen_kappa_score(rows["severity"], grade, labels=[0, 1, 2], weights=weights)
            if len(rows) and model == "oracle":
                first, second, joint = *np.divmod(np.arange(9), 3), (natural.T @ natural).ravel()
                line["two readers"] = cohen_kappa_score(first, second, weights=weights, sample_weight=joint)
    return pd.DataFrame.from_dict(lines, orient="index")


def calibration(judged: Judged) -> pd.DataFrame:
    """The expected calibration error of each model, by group and of all rows."""
    groups, errors = {group.score: [key] for key, group in GROUPS.items()} | {"all rows": list(GROUPS)}, {}
    for (name, keys), model in itertools.product(groups.items(), judged):
        rows = judged[model][judged[model]["group"].isin(keys)]
        if len(rows):
            error = metric.calibration_error(rows[PROBABILITIES].to_numpy(), rows["severity"].to_numpy())
            errors.setdefault(name, {})[model] = error
    return pd.DataFrame(errors)


def suspects(rows: pd.DataFrame) -> pd.DataFrame:
    """Labels less probable than `SUSPECT` to models that did not see them, the least probable first: row_id, study_id,
    condition, level, severity, probability (of that label), grade and its probability."""
    natural = rows[PROBABILITIES].to_numpy()
    table = rows[["row_id", "study_id", "condition", "level", "severity"]].assign(probability=_of_label(rows, natural))
    table = table.assign(grade=natural.argmax(axis=1), grade_probability=natural.max(axis=1))
    return table[table["probability"] < SUSPECT].sort_values(["probability", "row_id"]).reset_index(drop=True)


def suspicion(rows: pd.DataFrame, wrong: Collection[str]) -> dict[str, float]:
    """How well improbable labels find the labels of row ids `wrong`: how many are planted, how many `suspects` lists,
    its precision and recall, and the precision where half of the wrong ones are found (`suspicion_curve`)."""
    planted, listed = set(rows["row_id"]) & set(wrong), set(suspects(rows)["row_id"])
    hits, curve = len(planted & listed), suspicion_curve(rows, wrong)
    numbers = {"planted": len(planted), "listed": len(listed)}
    numbers |= {"precision": hits / max(len(listed), 1), "recall": hits / max(len(planted), 1)}
    return numbers | {"precision_at_half": float(curve.loc[curve["recall"] >= 0.5, "precision"].iloc[-1])}


def suspicion_curve(rows: pd.DataFrame, wrong: Collection[str]) -> pd.DataFrame:
    """Precision and recall of wrong labels among those below each probability, from all labels to the fewest."""
    truth = rows["row_id"].isin(list(wrong)).to_numpy()
    precision, recall, _ = precision_recall_curve(truth, -_of_label(rows, rows[PROBABILITIES]))
    return pd.DataFrame({"precision": precision, "recall": recall})


def _of_label(rows: pd.DataFrame, probabilities: np.ndarray | pd.DataFrame) -> np.ndarray:
    """The probability (n,) of each row's own label."""
    return np.asarray(probabilities)[np.arange(len(rows)), rows["severity"].to_numpy(int)]
