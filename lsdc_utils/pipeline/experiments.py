"""Experiments round a finished run: what each ingredient, more studies, and labels kept out of training are worth.

`notebooks/ablations.yml` names the ingredients; each is taken away alone, by changing parameters, in a run of its own,
`outputs/<run>-<name>/`. That run begins as a copy of the finished one, so that Snakemake repeats no step but those that
the change touches: an ingredient of the transformer leaves the detectors as they are. The learning curve repeats the
run with other numbers of training studies; its test studies stay the same. Label noise is planted in the phantom's
training labels; the labels that the models of that run call improbable are then kept out of a second training.

Each ends in a table beside the run, which its report shows: `ablation.csv`, `curve.csv`, `noise.csv`.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lsdc_utils.data.competition import data_dir
from lsdc_utils.grading.evaluation import difference
from lsdc_utils.metric import PARTS, solution_of
from lsdc_utils.pipeline.steps import EXPERIMENT_TABLES, NOTEBOOKS, read_parameters

ABLATIONS = NOTEBOOKS / "ablations.yml"
NOT_COPIED = ("report", "predict", "work", ".lock", *EXPERIMENT_TABLES)


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
    rows = [{"name": base.name, "without": "", **_scores(base)}]
    for ablation, folder in tried:
        worse_by, low, high = _apart(folder, base, "oof")
        row = {"name": ablation.name, "without": ablation.without, **_scores(folder)}
        rows.append(row | {"worse_by": worse_by, "low": low, "high": high})
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


def noise_table(base: Path, wrong: Path, left_out: Path) -> pd.DataFrame:
    """A row for a run, for the same run with wrong labels planted, and for that run with its suspects kept out.

    Scores and skill are the ensemble's on test studies, whose labels are as their readers meant them. better_by, low
    and high: how much the total fell against the run with wrong labels, with its paired 95 % interval. planted, listed,
    precision, recall and precision_at_half tell how well a run's suspects find what was planted, as
    `evaluation.suspicion` says.
    """
    rows = []
    labels = {base: "as read", wrong: "with wrong labels", left_out: "with wrong labels, suspects kept out"}
    for folder, name in labels.items():
        row = {"labels": name, **_scores(folder, "test")}
        if folder != wrong:
            worse_by, low, high = _apart(folder, wrong, "test")
            row |= {"better_by": -worse_by, "low": -high, "high": -low}
        rows.append(row | json.loads((folder / "scores.json").read_text())["oof"].get("suspects", {}))
    return pd.DataFrame(rows)


def _scores(folder: Path, block: str = "oof") -> dict[str, float]:
    """The ensemble's scores in one block of a run's scores.json, and the total's skill where it is known."""
    scores = json.loads((folder / "scores.json").read_text())[block]
    skill = {"skill": scores["skill"]["ensemble"]["total"]} if scores["skill"] else {}
    return {part: scores["scores"]["ensemble"][part] for part in PARTS} | skill


def _apart(folder: Path, base: Path, block: str) -> tuple[float, float, float]:
    """Total score of a run's ensemble minus that of `base`, on the same studies, with its paired 95 % interval."""
    solution = _solution(base, block)
    if set(_solution(folder, block)["row_id"]) != set(solution["row_id"]):
        raise ValueError(f"{folder} graded other studies than {base}: such runs cannot be compared")
    file = f"predictions/ensemble_{block}.parquet"
    tables = {"one": pd.read_parquet(folder / file), "other": pd.read_parquet(base / file)}
    return difference(solution, tables, "one", "other")["total"]


def _solution(folder: Path, block: str) -> pd.DataFrame:
    """The labels, row_id and severity, that a run is scored by out of fold (oof) or on test studies (test)."""
    if block == "test":
        return pd.read_csv(data_dir(folder) / "solution.csv")
    labels = pd.read_parquet(folder / "tables/labels.parquet")
    return solution_of(labels[labels["fold"].isin(read_parameters(folder)["folds"])])
