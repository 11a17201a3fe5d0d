"""Experiments round a finished run: what each ingredient is worth, and what more studies are worth.

`notebooks/ablations.yml` names the ingredients; each is taken away alone, by changing parameters, in a run of its own,
`outputs/<run>-<name>/`. That run begins as a copy of the finished one, so that Snakemake repeats no step but those that
the change touches: an ingredient of the transformer leaves the detectors as they are. The learning curve repeats the
run with other numbers of training studies; its test studies stay the same.

Both end in a table beside the run: `outputs/<run>/ablation.csv` and `outputs/<run>/curve.csv`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lsdc_utils.metric import PARTS, Scorer, StudyLosses, solution_of, weight_table
from lsdc_utils.steps import NOTEBOOKS, read_parameters

ABLATIONS = NOTEBOOKS / "ablations.yml"
NOT_COPIED = ("report", "predict", "work", ".lock", "ablation.csv", "curve.csv")
DRAWS = 2000  # of a paired bootstrap


@dataclass(frozen=True)
class Ablation:
    """One ingredient and the parameters that take it away."""

    name: str  # plain, since a folder is named by it
    without: str  # what is taken away, for people
    change: dict[str, Any]


def read_ablations(file: Path = ABLATIONS) -> list[Ablation]:
    """The ingredients of a table such as notebooks/ablations.yml, in its order."""
    return [Ablation(name, **entry) for name, entry in yaml.safe_load(file.read_text()).items()]


def begin(base: Path, folder: Path) -> None:
    """Make `folder` a copy of the finished run `base`, unless it is there; files keep their times, by which Snakemake
    knows them."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(base, unfinished, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    unfinished.rename(folder)


def ablation_table(base: Path, tried: list[tuple[Ablation, Path]]) -> pd.DataFrame:
    """A row for the run and for each ablation of it: name, without, and the ensemble's score out of fold.

    Scores are those of `PARTS`, skill is the total's (absent without an oracle); worse_by, low and high are how much
    the total rose against the run, with a 95 % interval of a bootstrap over studies that both runs share.
    """
    reference = _out_of_fold(base)
    draws = _draws(len(reference.studies))
    rows = [{"name": base.name, "without": "", **_scores(base)}]
    for ablation, folder in tried:
        losses = _out_of_fold(folder)
        if list(losses.studies) != list(reference.studies):
            raise ValueError(f"{folder} graded other studies than {base}: an ablation must leave the data alone")
        apart = losses.resampled(draws)[:, -1] - reference.resampled(draws)[:, -1]
        low, high = np.nanquantile(apart, [0.025, 0.975])
        row = {"name": ablation.name, "without": ablation.without, **_scores(folder)}
        rows.append(row | {"worse_by": row["total"] - rows[0]["total"], "low": low, "high": high})
    return pd.DataFrame(rows)


def curve_table(runs: list[tuple[int, Path]]) -> pd.DataFrame:
    """A row for each number of training studies and block (oof, test): the ensemble's scores, skill and interval."""
    rows = []
    for n_train, folder in sorted(runs):
        scores = json.loads((folder / "scores.json").read_text())
        for block in (name for name in ("oof", "test") if scores.get(name)):
            low, high = scores[block]["interval"]["ensemble"]["total"]
            rows.append({"n_train": n_train, "block": block, **_scores(folder, block), "low": low, "high": high})
    return pd.DataFrame(rows)


def _scores(folder: Path, block: str = "oof") -> dict[str, float]:
    """The ensemble's scores in one block of a run's scores.json, and the total's skill where it is known."""
    scores = json.loads((folder / "scores.json").read_text())[block]
    skill = {"skill": scores["skill"]["ensemble"]["total"]} if scores["skill"] else {}
    return {part: scores["scores"]["ensemble"][part] for part in PARTS} | skill


def _out_of_fold(folder: Path) -> StudyLosses:
    """What each study adds to the out-of-fold score of a run's ensemble."""
    labels = pd.read_parquet(folder / "tables/labels.parquet")
    labels = labels[labels["fold"].isin(read_parameters(folder)["folds"])]
    rows = solution_of(labels).merge(pd.read_parquet(folder / "predictions/ensemble_oof.parquet"), on="row_id")
    return Scorer(rows).losses(weight_table(rows).drop(columns="row_id").to_numpy())


def _draws(n: int, seed: int = 0) -> np.ndarray:
    """How often each of `n` studies is drawn in each of `DRAWS` resamples: (DRAWS, n)."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=DRAWS)
