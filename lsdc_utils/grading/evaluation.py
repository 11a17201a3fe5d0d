"""How well rows are graded: loss by any trait, discrimination, agreement, calibration, and the rows that are worst.

Everything here takes judged rows, as `judge` makes them: labelled rows in the order of the solution, so that the tables
of several models stand row by row beside each other. Probabilities are natural; only `loss` uses the weighted row.
"""

from collections.abc import Collection

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score, precision_recall_curve

from lsdc_utils import metric
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, parse_row_id

Judged = dict[str, pd.DataFrame]  # by model
POINTS = (0.2, 0.5)  # natural probabilities at which sensitivity and specificity are stated
EVENTS = {"severe": 2, "moderate or severe": 1}  # the mildest severity that counts as the event
SUSPECT = 0.05  # a label this improbable to models that did not see it is worth a second look


def judge(table: pd.DataFrame, solution: pd.DataFrame) -> pd.DataFrame:
    """Labelled rows: row_id, study_id, condition, level, group, side, severity, natural probabilities, weight, loss.

    `weight` is the row's in the official score and `loss` what it adds there: weight times -log of the weighted row.
    """
    rows = solution[["row_id", "severity"]].merge(table[["row_id", *PROBABILITIES]], on="row_id")
    keys = [parse_row_id(row) for row in rows["row_id"]]
    for name, values in zip(("study_id", "condition", "level"), zip(*keys, strict=True), strict=False):
        rows[name] = values
    rows["group"] = [CONDITIONS[condition].group for _, condition, _ in keys]
    rows["side"] = [CONDITIONS[condition].side or "" for _, condition, _ in keys]
    severity = rows["severity"].to_numpy(int)
    of_label = _of_label(rows, metric.weight_rows(rows[PROBABILITIES].to_numpy()))
    rows["weight"] = metric.WEIGHTS[severity]
    rows["loss"] = -rows["weight"] * np.log(np.clip(of_label, metric.SMALLEST, 1))
    return rows


def difference(
    solution: pd.DataFrame, tables: dict[str, pd.DataFrame], model: str, other: str
) -> dict[str, tuple[float, float, float]]:
    """Score of `model` minus score of `other` in each part, with its paired 95 % interval: below 0, `model` is
    better."""
    losses = {name: metric.study_losses(solution, metric.weight_table(tables[name])) for name in (model, other)}
    scores = {name: of_study.score() for name, of_study in losses.items()}
    samples = metric.resampled_scores(losses)
    intervals = zip(metric.PARTS, metric.interval(samples[model] - samples[other]), strict=True)
    return {part: (scores[model][part] - scores[other][part], low, high) for part, (low, high) in intervals}


def by_trait(judged: Judged, trait: np.ndarray, model: str = "ensemble", draws: int = 1000) -> pd.DataFrame:
    """The weighted log loss of rows that share a value of `trait` (n,): a line a value; None values are left out.

    Columns: studies, rows, the loss of each model; low, high: 95 % interval over studies of the skill of `model` where
    `prior` and `oracle` are among them, else of its loss; skill.
    """
    lines, skilled = {}, {"prior", "oracle"} <= judged.keys()
    for value in sorted({value for value in trait if value is not None}):
        same = np.array([other == value for other in trait])
        codes, studies = pd.factorize(judged[model].loc[same, "study_id"])
        counts = np.random.default_rng(0).multinomial(len(studies), np.full(len(studies), 1 / len(studies)), draws)
        counts = np.vstack([np.ones(len(studies)), counts])  # the first line is the studies as they are
        weight = counts @ np.bincount(codes, judged[model].loc[same, "weight"])
        loss = {name: counts @ np.bincount(codes, rows.loc[same, "loss"]) / weight for name, rows in judged.items()}
        line = {"studies": len(studies), "rows": int(same.sum())} | {name: drawn[0] for name, drawn in loss.items()}
        shown = loss[model]
        if skilled:
            shown = (loss["prior"] - loss[model]) / (loss["prior"] - loss["oracle"])
            line["skill"] = shown[0]
        [(low, high)] = metric.interval(shown[1:, None])
        lines[value] = line | {"low": low, "high": high}
    return pd.DataFrame.from_dict(lines, orient="index")


def discrimination(rows: pd.DataFrame) -> pd.DataFrame:
    """For each group and event: how many rows, how many are the event, AUC, sensitivity and specificity at `POINTS`."""
    lines = {}
    for key, group in GROUPS.items():
        of_group = rows[rows["group"] == key]
        for event, mildest in EVENTS.items():
            truth = (of_group["severity"] >= mildest).to_numpy()
            chance = of_group[PROBABILITIES[mildest:]].sum(axis=1).to_numpy()
            line = {"rows": len(of_group), "events": int(truth.sum()), "AUC": metric.auc(truth, chance)}
            for point in POINTS if truth.any() and not truth.all() else ():
                line[f"sensitivity at {point}"] = (chance[truth] >= point).mean()
                line[f"specificity at {point}"] = (chance[~truth] < point).mean()
            lines[group.score, event] = line
    return pd.DataFrame.from_dict(lines, orient="index")


def agreement(judged: Judged, models: tuple[str, ...] = ("yolo", "vit3d", "ensemble", "oracle")) -> pd.DataFrame:
    """Linear and quadratic kappa (Cohen 1968) of labels with each model's most probable grade, for each group.

    `two readers`, where an oracle is known: the kappa expected of two independent readers who grade these very rows,
    each by the oracle's probabilities. A row's grades are then together (a, b) with the probability q_a q_b.
    """
    lines = {}
    for key, group in GROUPS.items():
        for weights in ("linear", "quadratic"):
            line = {}
            for model in (name for name in models if name in judged):
                rows = judged[model][judged[model]["group"] == key]
                if len(rows):
                    grade = rows[PROBABILITIES].to_numpy().argmax(axis=1)
                    line[model] = cohen_kappa_score(rows["severity"], grade, labels=[0, 1, 2], weights=weights)
            if "oracle" in line:
                q = judged["oracle"].loc[judged["oracle"]["group"] == key, PROBABILITIES].to_numpy()
                first, second = np.divmod(np.arange(9), 3)
                joint = (q.T @ q).ravel()
                line["two readers"] = cohen_kappa_score(first, second, weights=weights, sample_weight=joint)
            lines[group.score, weights] = line
    return pd.DataFrame.from_dict(lines, orient="index")


def calibration(judged: Judged) -> pd.DataFrame:
    """The expected calibration error of each model, by group and of all rows."""
    groups = {group.score: [key] for key, group in GROUPS.items()} | {"all rows": list(GROUPS)}
    errors = {}
    for name, keys in groups.items():
        chosen = {model: rows[rows["group"].isin(keys)] for model, rows in judged.items()}
        errors[name] = {
            model: metric.calibration_error(rows[PROBABILITIES].to_numpy(), rows["severity"].to_numpy())
            for model, rows in chosen.items()
            if len(rows)
        }
    return pd.DataFrame(errors)


def suspects(rows: pd.DataFrame, chance: float = SUSPECT) -> pd.DataFrame:
    """Labels less probable than `chance` to models that did not see them, the least probable first.

    Columns: row_id, study_id, condition, level, severity, probability (of that label), grade and its probability.
    """
    natural = rows[PROBABILITIES].to_numpy()
    table = rows[["row_id", "study_id", "condition", "level", "severity"]].assign(
        probability=_of_label(rows, natural), grade=natural.argmax(axis=1), grade_probability=natural.max(axis=1)
    )
    return table[table["probability"] < chance].sort_values(["probability", "row_id"]).reset_index(drop=True)


def suspicion(rows: pd.DataFrame, wrong: Collection[str], chance: float = SUSPECT) -> dict[str, float]:
    """How well improbable labels find wrong ones, where the row ids of the wrong are known.

    planted: how many rows are wrong; listed: how many `suspects` lists, with its precision and recall; and the
    precision where, with the least probable labels first, half of the wrong ones are found (`suspicion_curve`).
    """
    planted, listed = set(rows["row_id"]) & set(wrong), set(suspects(rows, chance)["row_id"])
    hits, curve = len(planted & listed), suspicion_curve(rows, wrong)
    return {
        "planted": len(planted),
        "listed": len(listed),
        "precision": hits / max(len(listed), 1),
        "recall": hits / max(len(planted), 1),
        "precision_at_half": float(curve.loc[curve["recall"] >= 0.5, "precision"].iloc[-1]),
    }


def suspicion_curve(rows: pd.DataFrame, wrong: Collection[str]) -> pd.DataFrame:
    """Precision and recall of wrong labels among those below each probability, from all labels to the fewest."""
    truth = rows["row_id"].isin(list(wrong)).to_numpy()
    precision, recall, _ = precision_recall_curve(truth, -_of_label(rows, rows[PROBABILITIES]))
    return pd.DataFrame({"precision": precision, "recall": recall})


def _of_label(rows: pd.DataFrame, probabilities: np.ndarray | pd.DataFrame) -> np.ndarray:
    """The probability (n,) of each row's own label."""
    return np.asarray(probabilities)[np.arange(len(rows)), rows["severity"].to_numpy(int)]
