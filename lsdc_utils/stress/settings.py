"""Scores and skill of the ensemble in each setting, as means over many simulated readers of each study."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import metric
from lsdc_utils.phantom import labels
from lsdc_utils.phantom.study import COLUMN_KEYS
from lsdc_utils.stress.cases import USUAL, Case
from lsdc_utils.stress.responses import READERS
from lsdc_utils.vocabulary import COLUMNS, SEVERITIES, study_row_ids


def scores_by_setting(cases: Sequence[Case], rows: pd.DataFrame, recipe: dict[str, Any]) -> pd.DataFrame:
    """The ensemble in each setting: factor, setting, studies, score, skill with its 95 % interval over studies (low,
    high), and lost: the skill lost against `USUAL` on the same bodies, with lost_low and lost_high."""
    usual = {case.body: case.narrowing for case in cases if case.factor == USUAL}
    bodies, truth = list(usual), np.stack(list(usual.values()))
    read = [labels.read(truth, np.random.default_rng([7, reader])) for reader in range(READERS)]
    prior = (
        pd.DataFrame(recipe["prior"]).set_index(["condition", "level"]).loc[COLUMN_KEYS, list(SEVERITIES)].to_numpy()
    )
    natural = {"oracle": labels.oracle(truth), "prior": np.broadcast_to(prior, (len(bodies), *prior.shape))}
    rows = rows[(rows["model"] == "ensemble") & (rows["factor"] != "dose")]
    order = [(body, *key) for body in bodies for key in COLUMN_KEYS]
    for setting, part in rows.groupby(["factor", "setting"], sort=False):
        table = part.set_index(["body", "condition", "level"])[list(SEVERITIES)]
        natural[setting] = table.loc[order].to_numpy().reshape(len(bodies), len(COLUMNS), 3)
    row_ids, losses = pd.DataFrame({"row_id": [row for body in bodies for row in study_row_ids(body)]}), {}
    scorers = [metric.Scorer(row_ids.assign(severity=severity.ravel())) for severity in read]
    for name, table in natural.items():
        weighted = metric.weight_rows(table.reshape(-1, 3))
        own = [scorer.losses(weighted) for scorer in scorers]
        means = (np.mean([getattr(each, part) for each in own], axis=0) for part in ("losses", "weights"))
        losses[name] = metric.StudyLosses(own[0].studies, *means)
    drawn = metric.resampled_scores(losses)
    whole = {name: part.resampled(np.ones((1, len(bodies)))) for name, part in losses.items()}
    lines = []
    for key in (name for name in losses if isinstance(name, tuple)):
        skill, lost = _skill(whole, key), _skill(whole, (USUAL, USUAL)) - _skill(whole, key)
        [(low, high)] = metric.interval(_skill(drawn, key)[:, None])
        [(least, most)] = metric.interval((_skill(drawn, (USUAL, USUAL)) - _skill(drawn, key))[:, None])
        lines.append((*key, len(bodies), whole[key][0, -1], skill[0], low, high, lost[0], least, most))
    names = ["factor", "setting", "studies", "score", "skill", "low", "high", "lost", "lost_low", "lost_high"]
    return pd.DataFrame(lines, columns=names)


def _skill(scores: dict[Any, np.ndarray], key: tuple[str, str]) -> np.ndarray:
    """Skill (n,) of total scores, the last column of arrays (n, parts)."""
    prior, model, oracle = (scores[name][:, -1] for name in ("prior", key, "oracle"))
    return (prior - model) / (prior - oracle)
