"""Scores and skill of the ensemble in each setting, as means over many simulated readers of each study."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import metric
from lsdc_utils.grading import grade
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.phantom import labels
from lsdc_utils.stress.cases import USUAL, Case
from lsdc_utils.stress.responses import READERS


def scores_by_setting(cases: Sequence[Case], rows: pd.DataFrame, recipe: dict[str, Any]) -> pd.DataFrame:
    """The ensemble in each setting: factor, setting, studies, score, skill with its 95 % interval over studies (low,
    high), and lost: the skill lost against `USUAL` on the same bodies, with lost_low and lost_high."""
    usual = {case.body: case.narrowing for case in cases if case.factor == USUAL}
    bodies, truth = list(usual), np.stack(list(usual.values()))
    read = [labels.read(truth, np.random.default_rng([7, reader])) for reader in range(READERS)]
    keys = grade.rows_of(bodies)
    natural = {"prior": grade.prior_of(recipe, keys)[PROBABILITIES].to_numpy()}
    natural["oracle"] = labels.oracle(truth).reshape(-1, 3)
    rows = rows[(rows["model"] == "ensemble") & (rows["factor"] != "dose")]
    for setting, part in rows.groupby(["factor", "setting"], sort=False):
        part = part.astype({"body": str}).rename(columns={"body": "study_id"})
        natural[setting] = keys.merge(part, on=["study_id", "condition", "level"])[PROBABILITIES].to_numpy()
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
