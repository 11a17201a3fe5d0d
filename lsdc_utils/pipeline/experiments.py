"""Experiments around a finished run: ablations and the learning curve.

Each experiment is a run of its own, `outputs/<run>-<name>/`. An ablation of `notebooks/ablations.yml` starts as a copy
of the finished run, so that only the steps that its change affects run again. The learning curve repeats the run with
other numbers of training studies; all sizes share the same test studies. The tables are `experiments/ablation.csv` and
`experiments/curve.csv` below the run; its report shows them.
"""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lsdc_utils.files import atomic, git_commit
from lsdc_utils.grading.evaluation import difference
from lsdc_utils.metric import PARTS, solution_of
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import NOTEBOOKS, read_parameters
from lsdc_utils.pipeline.parameters import changed
from lsdc_utils.pipeline.progress import shown
from lsdc_utils.pipeline.run import Run, locked, work

ABLATIONS = NOTEBOOKS / "ablations.yml"
NOT_COPIED = ("report", "predict", "work", "experiments", ".lock")


@dataclass(frozen=True)
class Ablation:
    """One part of the method and the parameters that remove it."""

    name: str  # plain, since it names a folder
    without: str  # what is removed, for people
    change: dict[str, Any]


def read_ablations(file: Path = ABLATIONS) -> list[Ablation]:
    """The ablations of a file such as notebooks/ablations.yml, in its order."""
    return [Ablation(name, **entry) for name, entry in yaml.safe_load(file.read_text()).items()]


def copy_run(base: Path, folder: Path) -> None:
    """Make `folder` a copy of the finished run `base`, unless it exists; files keep the times that Snakemake knows."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(base, unfinished, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    unfinished.rename(folder)


def run_ablations(base: Path, names: list[str], cores: int) -> int:
    """Run the ablations `names` (none: all) of the run `base`, write and print their table; the exit status."""
    ablations = read_ablations()
    if unknown := set(names) - {ablation.name for ablation in ablations}:
        known = ", ".join(ablation.name for ablation in ablations)
        raise UsageError(f"no ablation {', '.join(sorted(unknown))}; there are: {known}")
    runs = [(a, base.with_name(f"{base.name}-{a.name}")) for a in ablations if not names or a.name in names]
    for ablation, folder in runs:
        copy_run(base, folder)
        parameters = changed(read_parameters(base), ablation.change)
        if status := _run_to_scores(folder, parameters, ["ablate", *names, "--run", base.name], cores):
            return status
    return _write_table(base, "ablation", ablation_table(base, runs), cores)


def run_curve(base: Path, sizes: list[int], cores: int) -> int:
    """Repeat the run `base` on a phantom with other numbers of training studies; the exit status."""
    parameters = read_parameters(base)
    runs = [(n, base if n == parameters["n_train"] else base.with_name(f"{base.name}-n{n}")) for n in sizes]
    for n_train, folder in runs:
        command = ["curve", *map(str, sizes), "--run", base.name]
        change = changed(parameters, {"n_train": n_train})
        if folder != base and (status := _run_to_scores(folder, change, command, cores)):
            return status
    return _write_table(base, "curve", curve_table(runs), cores)


def _run_to_scores(folder: Path, parameters: dict[str, Any], command: list[str], cores: int) -> int:
    with locked(folder):
        return work(Run(folder, parameters, shlex.join(["./run_all.sh", *command]), cores, "05_ensemble_inference"))


def _write_table(base: Path, name: str, table: pd.DataFrame, cores: int) -> int:
    """Write a table of experiments, renew the run's report, which shows it, and print it; the exit status."""
    file = base / "experiments" / f"{name}.csv"
    with atomic(file) as temporary:
        table.assign(commit=git_commit()).to_csv(temporary, index=False)
    with locked(base):
        if status := work(Run(base, read_parameters(base), f"./run_all.sh --run {base.name}", cores)):
            return status
    print(f"\n{table.to_string(index=False, float_format='{:.3f}'.format, na_rep='')}\n\n{shown(file)}")
    return 0


def ablation_table(base: Path, ablations: list[tuple[Ablation, Path]]) -> pd.DataFrame:
    """A row for the run and for each ablation of it: name, without, and the ensemble's score out of fold.

    Scores are those of `PARTS`; skill is the total's (absent without an oracle); worse_by, low and high are the
    increase of the total and its paired 95 % interval (bootstrap over studies).
    """
    rows = [{"name": base.name, "without": "", **_scores(base, "oof")}]
    for ablation, folder in ablations:
        increase = dict(zip(("worse_by", "low", "high"), _increase(folder, base), strict=True))
        rows.append({"name": ablation.name, "without": ablation.without, **_scores(folder, "oof"), **increase})
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


def _scores(folder: Path, block: str) -> dict[str, float]:
    """The ensemble's scores in one block of a run's scores.json, and the total's skill if known."""
    scores = json.loads((folder / "scores.json").read_text())[block]
    skill = {"skill": scores["skill"]["ensemble"]["total"]} if scores["skill"] else {}
    return {part: scores["scores"]["ensemble"][part] for part in PARTS} | skill


def _increase(folder: Path, base: Path) -> tuple[float, float, float]:
    """Total out-of-fold score of a run's ensemble minus that of `base`, with its paired 95 % interval."""
    solutions = []
    for run in (folder, base):
        labels = pd.read_parquet(run / "tables/labels.parquet")
        solutions.append(solution_of(labels[labels["fold"].isin(read_parameters(run)["folds"])]))
    if set(solutions[0]["row_id"]) != set(solutions[1]["row_id"]):
        raise ValueError(f"{folder} and {base} graded different studies and cannot be compared")
    runs = {"ablation": folder, "run": base}
    tables = {name: pd.read_parquet(run / "predictions/ensemble_oof.parquet") for name, run in runs.items()}
    return difference(solutions[1], tables, "ablation", "run")["total"]
