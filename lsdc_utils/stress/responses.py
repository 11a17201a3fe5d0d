"""What the answers say: response curves to doses, their slopes, leaks to other rows, scores in settings, key numbers.

Truth is the oracle's: it knows the narrowing and how readers err. Readers are simulated, `READERS` for each study.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import metric
from lsdc_utils.grading import grade
from lsdc_utils.phantom import labels
from lsdc_utils.stress.cases import USUAL, Case
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, GROUPS

READERS = 50


def responses(cases: Sequence[Case], rows: pd.DataFrame) -> pd.DataFrame:
    """Dose and response: case, body, condition, level, dose, model (or oracle, readers), probabilities `severe` and
    `moderate` (or worse) of the narrowed row, an error-free reader's cut-offs `severe_from` and `moderate_from`."""
    lines = []
    for number, case in ((number, case) for number, case in enumerate(cases) if case.factor == "dose"):
        condition, level = case.row
        column = COLUMNS.index(f"{condition}_{level}")
        moderate_from, severe_from = labels.CUTS[CONDITIONS[condition].group]
        key = {"case": number, "body": case.body, "condition": condition, "level": level}
        key |= {"dose": float(case.narrowing[column]), "moderate_from": moderate_from, "severe_from": severe_from}
        many = np.repeat(case.narrowing[None], READERS, axis=0)
        read = labels.read(many, np.random.default_rng([case.body, column]))[:, column]
        own = rows[(rows["case"] == number) & (rows["condition"] == condition) & (rows["level"] == level)]
        natural = dict(zip(own["model"], own[metric.PROBABILITIES].to_numpy(), strict=True))
        natural["oracle"] = labels.oracle(case.narrowing[None])[0, column]
        natural["readers"] = np.bincount(read, minlength=3) / READERS
        for model, (_, moderate, severe) in natural.items():
            lines.append(key | {"model": model, "moderate": moderate + severe, "severe": severe})
    return pd.DataFrame(lines)


def slopes(curves: pd.DataFrame) -> pd.DataFrame:
    """The rise of each mean response per unit of narrowing, from the second dose below the cut-off to the second above,
    by condition and event: a column for each model, and `ratio`, the ensemble's slope over the oracle's."""
    lines = []
    for (condition, model), rows in curves.groupby(["condition", "model"], sort=False):
        for event in ("moderate", "severe"):
            curve = rows.groupby("dose")[event].mean()
            above = int(np.searchsorted(curve.index, rows[f"{event}_from"].iloc[0]))
            low, high = curve.index[max(above - 2, 0)], curve.index[min(above + 1, len(curve) - 1)]
            slope = (curve[high] - curve[low]) / (high - low)
            lines.append({"condition": condition, "event": event, "model": model, "slope": slope})
    table = pd.DataFrame(lines).pivot_table(index=["condition", "event"], columns="model", values="slope", sort=False)
    return table.assign(ratio=table["ensemble"] / table["oracle"])


def leaks(cases: Sequence[Case], rows: pd.DataFrame) -> pd.DataFrame:
    """The range over doses of each other row's probability of moderate or worse: narrowed, body, row, leak."""
    rows = rows[(rows["factor"] == "dose") & (rows["model"] == "ensemble")]
    rows = rows.assign(leak=rows["moderate"] + rows["severe"], row=rows["condition"] + "_" + rows["level"])
    rows["narrowed"] = ["_".join(cases[number].row) for number in rows["case"]]
    spans = rows.groupby(["narrowed", "body", "row"], sort=False)["leak"].agg(np.ptp).reset_index()
    return spans[spans["row"] != spans["narrowed"]].reset_index(drop=True)


def scores_by_setting(cases: Sequence[Case], rows: pd.DataFrame, recipe: dict[str, Any]) -> pd.DataFrame:
    """The ensemble in each setting: factor, setting, studies, score, skill with its 95 % interval over studies (low,
    high), and lost: the skill lost against `USUAL` on the same bodies, with lost_low and lost_high."""
    usual = {case.body: case.narrowing for case in cases if case.factor == USUAL}
    bodies, truth = list(usual), np.stack(list(usual.values()))
    read = [labels.read(truth, np.random.default_rng([7, reader])) for reader in range(READERS)]
    keys = grade.rows_of(bodies)
    natural = {"prior": grade.prior_of(recipe, keys)[metric.PROBABILITIES].to_numpy()}
    natural["oracle"] = labels.oracle(truth).reshape(-1, 3)
    rows = rows[(rows["model"] == "ensemble") & (rows["factor"] != "dose")]
    for setting, part in rows.groupby(["factor", "setting"], sort=False):
        part = part.astype({"body": str}).rename(columns={"body": "study_id"})
        natural[setting] = keys.merge(part, on=["study_id", "condition", "level"])[metric.PROBABILITIES].to_numpy()
    scorers = [metric.Scorer(keys.assign(severity=severity.ravel())) for severity in read]
    counts = np.vstack([np.ones(len(bodies)), metric.bootstrap(len(bodies))])  # first the studies as they are
    totals, lines = {}, []
    for name, table in natural.items():
        own = [scorer.losses(metric.weight_rows(table)) for scorer in scorers]
        means = (np.mean([getattr(each, part) for each in own], axis=0) for part in ("losses", "weights"))
        totals[name] = metric.StudyLosses(own[0].studies, *means).resampled(counts)[:, -1]
    prior, oracle = totals.pop("prior"), totals.pop("oracle")
    skills = {key: (prior - total) / (prior - oracle) for key, total in totals.items()}
    for key, skill in skills.items():
        lost = skills[USUAL, USUAL] - skill
        intervals = metric.interval(np.column_stack([skill, lost])[1:])
        lines.append((*key, len(bodies), totals[key][0], skill[0], *intervals[0], lost[0], *intervals[1]))
    names = ["factor", "setting", "studies", "score", "skill", "low", "high", "lost", "lost_low", "lost_high"]
    return pd.DataFrame(lines, columns=names)


def key_numbers(curves: pd.DataFrame, leak: pd.DataFrame, looks: pd.DataFrame, moves: pd.DataFrame) -> dict[str, Any]:
    """The numbers of stress/numbers.json, None where nothing was measured: slope, by group too (mean ratio to the
    oracle's), leak (largest), looked (the transformer's mean share near the place), moved (largest), bodies (dosed)."""
    slope = slopes(curves)
    parts = [GROUPS[CONDITIONS[condition].group].score for condition, _ in slope.index]
    by_group = slope["ratio"].groupby(parts, sort=False).mean()
    trained = looks[(looks["weights"] == "trained") & (looks["model"] == "vit3d")]
    numbers = {"slope": slope["ratio"].mean(), "slope_by_group": by_group.to_dict(), "leak": leak["leak"].max()}
    numbers |= {"looked": trained["share"].mean(), "moved": moves["moved"].max(), "bodies": curves["body"].nunique()}
    return metric.without_nan(numbers)
