"""How well rows are graded: loss by any trait, discrimination, agreement, calibration, suspect labels.

All functions but `difference` take judged rows (`judge`), in the same order for every model.
"""

import itertools
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score, precision_recall_curve, roc_curve

from lsdc_utils import metric
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.vocabulary import GROUPS

Judged = dict[str, pd.DataFrame]  # by model
POINTS = (0.2, 0.5)  # natural probabilities at which sensitivity and specificity are stated
EVENTS = {"severe": 2, "moderate or severe": 1}  # the mildest severity that counts as the event
FEWEST, FEW = 10, 30  # patients: below them no interval, and one to distrust
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
    intervals = zip(metric.PARTS, metric.interval(samples[model] - samples[other]), strict=True)
    return {part: (scores[model][part] - scores[other][part], low, high) for part, (low, high) in intervals}


def by_trait(judged: Judged, trait: pd.Series, unit: str = "study_id") -> pd.DataFrame:
    """The weighted log loss of rows that share a value of `trait` (n,): a line a value; missing values are left out.

    Columns: studies (different values in the column `unit`), rows, the loss of each model; low, high: 95 % interval
    over these of the ensemble's skill where there is an oracle, else of its loss; skill.
    """
    lines = {}
    for value, places in judged["ensemble"].groupby(trait.to_numpy()).indices.items():
        codes, studies = pd.factorize(judged["ensemble"][unit].iloc[places])
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


def cut_offs(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """The natural probability of each group's events with the largest sum of sensitivity and specificity (Youden,
    Cancer 1950) on judged rows: group -> event -> probability; none where no row, or every row, is the event."""
    points = {}
    for group, (event, mildest) in itertools.product(GROUPS.values(), EVENTS.items()):
        of_group = rows[rows["group"] == group.key]
        truth = of_group["severity"] >= mildest
        if truth.nunique() == 2:
            missed, found, point = roc_curve(truth, of_group[PROBABILITIES[mildest:]].sum(axis=1))
            best = 1 + int(np.argmax((found - missed)[1:]))  # the first point is infinite
            points.setdefault(group.score, {})[event] = float(point[best])
    return points


def reference(run: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What other data are compared with: `prior`, the run's natural label frequencies by condition and level, and
    `points`, its `cut_offs`, of out-of-fold rows. Of packed models what `pack` kept; without it points are empty."""
    kept, oof = run / "reference.json", run / "predictions/ensemble_oof.parquet"
    if kept.is_file() or not oof.is_file():
        return json.loads(kept.read_text()) if kept.is_file() else {"prior": recipe["prior"], "points": {}}
    labels = pd.read_parquet(run / "tables/labels.parquet")
    points = cut_offs(judge(pd.read_parquet(oof), metric.solution_of(labels)))
    return {"prior": metric.prior(labels).to_dict("records"), "points": points}


def performance(rows: pd.DataFrame, points: dict[str, dict[str, float]]) -> pd.DataFrame:
    """A line for each group, event and cut-off: patients, rows, events, AUC, sensitivity and specificity there.

    rows: judged, with a column patient. points: `cut_offs` of other data; `POINTS` where it has none. The three numbers
    have their 95 % intervals (`_with_interval`) as columns <number>_low and <number>_high.
    """
    lines = []
    for group, (event, mildest) in itertools.product(GROUPS.values(), EVENTS.items()):
        of_group = rows[rows["group"] == group.key]
        truth, chance = (of_group["severity"] >= mildest).to_numpy(), of_group[PROBABILITIES[mildest:]].sum(axis=1)
        counts = _drawn(of_group)
        head = {"group": group.score, "event": event, "patients": of_group["patient"].nunique(), "rows": len(truth)}
        head |= {"events": int(truth.sum())} | _with_interval("AUC", _auc(counts, truth, chance.to_numpy()))
        own = points.get(group.score, {}).get(event)
        for cut in () if of_group.empty else POINTS if own is None else (own,):
            called = (chance >= cut).to_numpy()
            for name, hit, of in (("sensitivity", called, truth), ("specificity", ~called, ~truth)):
                with np.errstate(invalid="ignore"):
                    head |= {"cut_off": cut} | _with_interval(name, counts @ (hit & of) / (counts @ of))
            lines.append(dict(head))
    return pd.DataFrame(lines)


def linear_kappa(rows: pd.DataFrame) -> pd.DataFrame:
    """Linear kappa (Cohen 1968) of labels with the most probable grade, and its interval, of each group of `rows`, as
    of `performance`."""
    lines, apart = {}, np.abs(np.subtract.outer(np.arange(3), np.arange(3)))
    for group in GROUPS.values():
        of_group = rows[rows["group"] == group.key]
        cells = 3 * of_group["severity"].to_numpy(int) + of_group[PROBABILITIES].to_numpy().argmax(axis=1)
        joint = (_drawn(of_group) @ np.eye(9)[cells]).reshape(-1, 3, 3)
        by_chance = np.einsum("di,dj,ij->d", joint.sum(axis=2), joint.sum(axis=1), apart)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = 1 - (joint * apart).sum(axis=(1, 2)) * joint.sum(axis=(1, 2)) / by_chance
        lines[group.score] = _with_interval("kappa", values) | {"rows": len(cells)}
    return pd.DataFrame.from_dict(lines, orient="index")


def _drawn(rows: pd.DataFrame) -> np.ndarray:
    """How often each row (n,) is in the data as they are and in bootstrap samples of patients: (1 + draws, n)."""
    codes, patients = pd.factorize(rows["patient"])
    drawn = metric.bootstrap(len(patients)) if len(patients) >= FEWEST else np.empty((0, len(patients)))
    return np.vstack([np.ones(len(patients)), drawn])[:, codes]


def _with_interval(name: str, values: np.ndarray) -> dict[str, float]:
    """The first value, and the 95 % interval of the others; NaN under `FEWEST` patients, where there are none."""
    [(low, high)] = metric.interval(values[1:, None]) if len(values) > 1 else [(np.nan, np.nan)]
    return {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}


def _auc(counts: np.ndarray, truth: np.ndarray, chance: np.ndarray) -> np.ndarray:
    """The AUC (draws,) of rows (n,) that each draw holds `counts` (draws, n) times; ties count half."""
    if not len(chance):
        return np.full(len(counts), np.nan)
    values, place = np.unique(chance, return_inverse=True)
    order = np.argsort(place, kind="stable")
    starts = np.searchsorted(place[order], np.arange(len(values)))
    events, others = (np.add.reduceat((counts * part)[:, order], starts, axis=1) for part in (truth, ~truth))
    below = np.cumsum(others, axis=1) - others / 2
    with np.errstate(invalid="ignore"):
        return (events * below).sum(axis=1) / (events.sum(axis=1) * others.sum(axis=1))


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
