"""How well rows are graded: loss by any trait, discrimination, agreement, calibration, suspect labels. All functions
but `difference` take judged rows (`judge`), in the same order for every model."""

import itertools
import json
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.metrics import precision_recall_curve, roc_curve

from lsdc_utils import metric
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.vocabulary import GROUPS

Judged = dict[str, pd.DataFrame]  # by model
POINTS = (0.2, 0.5)  # natural probabilities at which sensitivity and specificity are stated
EVENTS = {"severe": 2, "moderate or severe": 1}  # the mildest severity that counts as the event
FEWEST, FEW = metric.FEWEST, 30  # patients: under the first there are no intervals, under the second they are rough
SUSPECT = 0.05  # a label this improbable to models that did not see it is worth a second look


def judge(table: pd.DataFrame, solution: pd.DataFrame) -> pd.DataFrame:
    """Labelled rows: `metric.row_keys`, severity, natural probabilities, weight and loss in the official score."""
    rows = metric.row_keys(solution["row_id"]).merge(solution[["row_id", "severity"]], on="row_id")
    rows = rows.merge(table[["row_id", *PROBABILITIES]], on="row_id")
    of_label = _of_label(rows, metric.weight_rows(rows[PROBABILITIES].to_numpy()))
    rows["weight"] = metric.WEIGHTS[rows["severity"].to_numpy(int)]
    return rows.assign(loss=-rows["weight"] * np.log(np.clip(of_label, metric.SMALLEST, 1)))


def difference(
    solution: pd.DataFrame, tables: dict[str, pd.DataFrame], model: str, other: str, patients: pd.Series | None = None
) -> dict[str, tuple[float, float, float]]:
    """Score of `model` minus that of `other` in each part, with its paired 95 % interval: below 0 `model` is better.
    patients: as `metric.patients_of`, which are resampled; else studies are."""
    losses = {name: metric.study_losses(solution, metric.weight_table(tables[name])) for name in (model, other)}
    scores = {name: of_study.score() for name, of_study in losses.items()}
    samples = metric.resampled_scores(losses, patients)
    intervals = zip(losses[model].parts, metric.interval(samples[model] - samples[other]), strict=True)
    return {part: (scores[model][part] - scores[other][part], low, high) for part, (low, high) in intervals}


def by_trait(judged: Judged, trait: pd.Series, unit: str = "study_id") -> pd.DataFrame:
    """The weighted log loss of rows that share a value of `trait` (n,): a line a value; missing values are left out.
    Columns: studies, rows, the loss of each model; low, high: 95 % interval over studies of the ensemble's skill where
    there is an oracle, else of its loss; skill. unit: a column to count and resample instead of studies."""
    lines = {}
    for value, places in judged["ensemble"].groupby(trait.to_numpy()).indices.items():
        codes, studies = pd.factorize(judged["ensemble"][unit].iloc[places])
        counts = np.vstack([np.ones(len(studies)), metric.bootstrap(len(studies))])  # first the studies as they are
        weight = counts @ np.bincount(codes, judged["ensemble"]["weight"].iloc[places])
        loss = {name: counts @ np.bincount(codes, rows["loss"].iloc[places]) / weight for name, rows in judged.items()}
        line = {"studies": len(studies), "rows": len(places)} | {name: drawn[0] for name, drawn in loss.items()}
        drawn = loss["ensemble"]
        if "oracle" in judged:
            drawn = (loss["prior"] - drawn) / (loss["prior"] - loss["oracle"])
            line["skill"] = drawn[0]
        [(low, high)] = metric.interval(drawn[1:, None])
        lines[value] = line | {"low": low, "high": high}
    return pd.DataFrame.from_dict(lines, orient="index")


def discrimination(rows: pd.DataFrame, cut_offs: dict[str, dict[str, float]] | None = None) -> pd.DataFrame:
    """For each group and event: rows, events, AUC, sensitivity and specificity at `POINTS` or that of `cut_offs`."""
    lines = {}
    for group, event, truth, chance in _events(rows):
        line = lines[group, event] = {"rows": len(truth), "events": truth.sum(), "AUC": metric.auc(truth, chance)}
        own = (cut_offs or {}).get(group, {}).get(event)
        line |= {} if own is None else {"cut-off": own}
        points = [(f" at {point}", point) for point in POINTS] if own is None else [("", own)]
        for name, point in points if truth.nunique() == 2 else ():
            line[f"sensitivity{name}"] = (chance[truth] >= point).mean()
            line[f"specificity{name}"] = (chance[~truth] < point).mean()
    return pd.DataFrame.from_dict(lines, orient="index")


def own_evidence(judged: Judged) -> pd.DataFrame:
    """Whether models read a row's own place or only its study or level (0.5). A line a group: the pairs of rows with
    different labels from both sides of a level or two levels of a canal, and the share of them in which each model
    gives the worse one higher log odds of moderate or worse, over the prior's; ties are half right."""
    odds = {name: np.log(rows[PROBABILITIES[1:]].sum(axis=1) / rows["normal_mild"]) for name, rows in judged.items()}
    rows, lines = judged["prior"].assign(place=np.arange(len(judged["prior"]))), {}
    for key, group in GROUPS.items():
        of_group, same = rows[rows["group"] == key], ["study_id", "level"] if key != "scs" else ["study_id"]
        pairs = of_group.merge(of_group, on=same).query("severity_x > severity_y")
        worse, better = pairs["place_x"].to_numpy(), pairs["place_y"].to_numpy()
        lines[group.score] = {"pairs": len(pairs)}
        for name in (name for name in judged if name != "prior"):
            over = (odds[name] - odds["prior"]).to_numpy()
            right = (np.sign(over[worse] - over[better]) + 1) / 2
            lines[group.score][name] = right.mean() if len(pairs) else np.nan
    return pd.DataFrame.from_dict(lines, orient="index")


def find_cut_offs(rows: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Of each group and event the natural probability with the largest sum of sensitivity and specificity (Youden,
    Cancer 1950); events that no row, or every row, is are left out."""
    found = {}
    for group, event, truth, chance in _events(rows):
        if truth.nunique() == 2:
            others, events, points = roc_curve(truth, chance)
            found.setdefault(group, {})[event] = float(points[1:][np.argmax((events - others)[1:])])  # first: infinite
    return found


def _events(rows: pd.DataFrame) -> Iterator[tuple[str, str, pd.Series, pd.Series]]:
    """Group, event, and of the group's rows whether they are the event and its natural probability."""
    for group, (event, mildest) in itertools.product(GROUPS.values(), EVENTS.items()):
        own = rows[rows["group"] == group.key]
        yield group.score, event, own["severity"] >= mildest, own[PROBABILITIES[mildest:]].sum(axis=1)


def reference(run: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What other data are compared with: the run's `prior`, natural label frequencies by condition and level, and
    `cut_offs` of its out-of-fold rows. Of packed models what `pack` kept of these, else the recipe's prior alone."""
    kept, oof = run / "reference.json", run / "predictions/ensemble_oof.parquet"
    if kept.is_file() or not oof.is_file():
        return json.loads(kept.read_text()) if kept.is_file() else {"prior": recipe["prior"], "cut_offs": {}}
    labels = pd.read_parquet(run / "tables/labels.parquet")
    rows = judge(pd.read_parquet(oof), metric.solution_of(labels))
    return {"prior": metric.prior(labels).to_dict("records"), "cut_offs": find_cut_offs(rows)}


def intervals(rows: pd.DataFrame, measure: Callable[[pd.DataFrame], pd.DataFrame], draws: int = 300) -> list[Any]:
    """The low and the high end, two tables like `measure(rows)`, of 95 % intervals from bootstrap samples of patients
    (a column of `rows`); NaN under `FEWEST` patients, also of them with rows of the group, or of the condition where
    there is no group, that a line or column is of. `measure` sees texts as categories."""
    rows = rows.astype(dict.fromkeys(rows.select_dtypes(["object", "str"]), "category"))  # which is fast
    table, places = measure(rows), list(rows.groupby("patient").indices.values())
    drawn = np.random.default_rng(0).integers(len(places), size=(draws if len(places) >= FEWEST else 0, len(places)))
    samples = (rows.iloc[np.concatenate([places[k] for k in draw])] for draw in drawn)
    drawn = [measure(sample).reindex_like(table).to_numpy(float).ravel() for sample in samples]
    ends = np.array(metric.interval(np.array(drawn).reshape(-1, table.size))).T.reshape(2, *table.shape)
    people = rows.groupby("group" if "group" in rows else "condition", observed=True)["patient"].nunique()
    few = [GROUPS[key].score if key in GROUPS else key for key in people.index[people < FEWEST]]
    hidden = np.add.outer(table.index.get_level_values(0).isin(few), table.columns.isin(few))
    return [pd.DataFrame(end, table.index, table.columns).mask(hidden) for end in ends]


def agreement(judged: Judged) -> pd.DataFrame:
    """Linear and quadratic kappa (Cohen 1968) of labels with each model's most probable grade, for each group. If there
    is an oracle q, `two readers` is the kappa expected of two independent readers who both draw their grades from q."""
    lines = {}
    for group, (weights, power) in itertools.product(GROUPS.values(), {"linear": 1, "quadratic": 2}.items()):
        line = lines[group.score, weights] = {}
        for model in (name for name in ("yolo", "vit3d", "ensemble", "oracle") if name in judged):
            rows = judged[model][judged[model]["group"] == group.key]
            natural = rows[PROBABILITIES].to_numpy()
            if len(rows):
                cells = 3 * rows["severity"].to_numpy(int) + natural.argmax(axis=1)
                line[model] = _kappa(np.bincount(cells, minlength=9).reshape(3, 3), power)
            if len(rows) and model == "oracle":
                line["two readers"] = _kappa(natural.T @ natural, power)
    return pd.DataFrame.from_dict(lines, orient="index")


def _kappa(joint: np.ndarray, power: int) -> float:
    """Kappa, weighted by a power of the grades' distance, of how often two grades meet (3, 3); NaN where undefined."""
    apart = np.abs(np.subtract.outer(range(3), range(3))) ** power
    by_chance = (apart * np.outer(joint.sum(axis=1), joint.sum(axis=0))).sum()
    return float(1 - (apart * joint).sum() * joint.sum() / by_chance) if by_chance else np.nan


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
