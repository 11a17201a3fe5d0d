"""Experiments around a finished run: ablations, learning curve, refinement; each is a run `outputs/<run>-<name>/`.
An ablation of `notebooks/ablations.yml` and a refined run start as copies of the run, so that only the steps that their
change affects run again. All sizes of the learning curve share the same test studies."""

import itertools
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lsdc_utils.data.competition import data_dir
from lsdc_utils.files import atomic_folder, git_commit, write_table
from lsdc_utils.grading.evaluation import difference
from lsdc_utils.metric import PARTS, overall, patients_of, rows_of_groups, solution_of
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import NOTEBOOKS, read_parameters
from lsdc_utils.pipeline.parameters import changed, load_parameters
from lsdc_utils.pipeline.progress import shown
from lsdc_utils.pipeline.run import Run, locked, work
from lsdc_utils.report.run import blocks
from lsdc_utils.vocabulary import GROUPS

ABLATIONS = NOTEBOOKS / "ablations.yml"
SCORES = "05_ensemble_inference"  # the step that writes scores.json
NOT_COPIED = ("report", "predict", "work", "experiments", ".lock", "evaluation", "exports", "kaggle", "*.zip", "stress",
              "provenance.json", "evaluation.json", "localisation.csv", "suspect_labels.csv", "0[678]_*")  # fmt: skip
REFINED_SHARE = 0.5  # of the answers in a refined run's targets


def copy_run(base: Path, folder: Path) -> None:
    """Make `folder`, unless it exists, a copy of the finished run `base` up to 05; its files keep their times."""
    if not folder.exists():
        with atomic_folder(folder) as copy:
            ignore = shutil.ignore_patterns(*NOT_COPIED)
            shutil.copytree(base, copy, symlinks=True, ignore=ignore, dirs_exist_ok=True)


def run_ablations(base: Path, names: list[str], cores: int) -> int:
    """Run the ablations `names` (none: all) of the run `base`, write and print their table; the exit status."""
    ablations = yaml.safe_load(ABLATIONS.read_text())
    if unknown := set(names) - set(ablations):
        raise UsageError(f"no ablation {', '.join(sorted(unknown))}; there are: {', '.join(ablations)}")
    folders = {name: base.with_name(f"{base.name}-{name}") for name in ablations if not names or name in names}
    own, command = _parameters(base), ["ablate", *names, "--run", base.name]
    if status := _work(base, own, command, cores, SCORES):  # by the code of the others
        return status
    for name, folder in folders.items():
        copy_run(base, folder)
        if status := _work(folder, changed(own, ablations[name]["change"]), command, cores, SCORES):
            return status
    removed = {folder: ablations[name]["without"] for name, folder in folders.items()}
    return _report_table(base, "ablation", ablation_table(base, removed), command, cores)


def run_curve(base: Path, sizes: list[int], cores: int) -> int:
    """Repeat the run `base` on a phantom with other numbers of training studies; the exit status."""
    parameters, runs, command = _parameters(base), {}, ["curve", *map(str, sizes), "--run", base.name]
    if parameters["blend_of"]:
        raise UsageError(f"--run {base.name}: its blend is of other rows; repeat --run {parameters['blend_of']}")
    if parameters["data_dir"] or not parameters["phantom"]:
        raise UsageError(f"--run {base.name}: its data is real; a learning curve needs a phantom")
    for n_train in sizes:
        runs[n_train] = base if n_train == parameters["n_train"] else base.with_name(f"{base.name}-n{n_train}")
        if status := _work(runs[n_train], changed(parameters, {"n_train": n_train}), command, cores, SCORES):
            return status
    return _report_table(base, "curve", curve_table(runs), command, cores)


def run_refined(base: Path, cores: int) -> int:
    """Train the transformers of the run `base` on half label, half answer, and print how scores differ; the status."""
    parameters, folder = _parameters(base), base.with_name(f"{base.name}-refined")
    if parameters["vit_soften"]:
        raise UsageError(f"--run {base.name}: its labels are softened already")
    change, command = changed(parameters, {"vit_soften": REFINED_SHARE, "blend_of": base.name}), ["refine", "--run"]
    if status := _work(base, parameters, [*command, base.name], cores, SCORES):  # by the code of the other
        return status
    copy_run(base, folder)
    if status := _work(folder, change, [*command, base.name], cores):
        return status
    print(f"\n{refined_table(base, folder).to_string(index=False, float_format='{:.4f}'.format, na_rep='')}")
    return 0


def _parameters(base: Path) -> dict[str, Any]:
    """The parameters of a run, also of one made by older code: those that it lacks are the demo's."""
    known = load_parameters("demo")
    return known | {key: value for key, value in read_parameters(base).items() if key in known}


def _work(folder: Path, parameters: dict[str, Any], command: list[str], cores: int, until: str | None = None) -> int:
    with locked(folder):
        return work(Run(folder, parameters, shlex.join(["./run_all.sh", *command]), cores, until))


def _report_table(base: Path, name: str, table: pd.DataFrame, command: list[str], cores: int) -> int:
    """Write a table of experiments, renew the run's report, which shows it, and print it; the exit status."""
    file = base / "experiments" / f"{name}.csv"
    write_table(file, table.assign(commit=git_commit()))
    if status := _work(base, _parameters(base), command, cores):
        return status
    print(f"\n{table.to_string(index=False, float_format='{:.3f}'.format, na_rep='')}\n\n{shown(file)}")
    return 0


def ablation_table(base: Path, removed: dict[Path, str]) -> pd.DataFrame:
    """A row for the run and each ablation (folder -> what is removed): name, without, the ensemble's out-of-fold
    `PARTS`, the skill (absent without an oracle); worse_by, low, high: the increase of the total, or of the mean of
    groups, and its paired 95 % interval (patients resampled). ValueError if an ablation graded other studies."""
    rows, solutions, natural, block = [], {}, {}, _blocks(base)["oof"]
    patients = patients_of(pd.read_parquet(base / "tables/labels.parquet"))
    for folder, without in {base: "", **removed}.items():
        solutions[folder] = rows_of_groups(_solution(folder, "oof"), block.get("groups", GROUPS))
        if set(solutions[folder]["row_id"]) != set(solutions[base]["row_id"]):
            raise ValueError(f"{folder} and {base} graded different studies and cannot be compared")
        natural[folder.name] = pd.read_parquet(folder / "predictions/ensemble_oof.parquet")
        row = {"name": folder.name.removeprefix(f"{base.name}-"), "without": without, **_scores(_blocks(folder)["oof"])}
        if folder != base:
            worse = difference(solutions[base], natural, folder.name, base.name, patients)
            row["worse_by"], row["low"], row["high"] = worse[overall(block["scores"]["ensemble"])]
        rows.append(row)
    return pd.DataFrame(rows)


def refined_table(base: Path, refined: Path) -> pd.DataFrame:
    """A row for each block with labels and each of vit3d and ensemble: block, model, the total score of both runs, what
    refinement adds to it (below 0: better), and the paired 95 % interval of that, low and high."""
    rows, runs = [], {"unrefined": base, "refined": refined}
    groups = json.loads((refined / "blend.json").read_text())["conditions"]  # which an older base does not name
    patients = {"oof": patients_of(pd.read_parquet(base / "tables/labels.parquet")), "test": None}
    scores = {name: _blocks(run) for name, run in runs.items()}
    for block, model in itertools.product(scores["unrefined"], ("vit3d", "ensemble")):
        tables = {name: pd.read_parquet(run / f"predictions/{model}_{block}.parquet") for name, run in runs.items()}
        part = overall(scores["unrefined"][block]["scores"][model])
        solution = rows_of_groups(_solution(base, block), groups)
        added, low, high = difference(solution, tables, "refined", "unrefined", patients[block])[part]
        totals = {name: scores[name][block]["scores"][model][part] for name in runs}
        rows.append({"block": block, "model": model, **totals, "added": added, "low": low, "high": high})
    return pd.DataFrame(rows)


def _solution(run: Path, block: str) -> pd.DataFrame:
    """The labels of a run's out-of-fold or, on a phantom, test rows: row_id, severity."""
    if block == "test":
        return pd.read_csv(data_dir(run) / "solution.csv")
    labels = pd.read_parquet(run / "tables/labels.parquet")
    return solution_of(labels[labels["fold"].isin(read_parameters(run)["folds"])])


def curve_table(runs: dict[int, Path]) -> pd.DataFrame:
    """A row for each number of training studies and block (oof, test): the ensemble's scores, skill and interval."""
    rows = []
    for n_train, folder in sorted(runs.items()):
        for name, block in _blocks(folder).items():
            low, high = block["interval"]["ensemble"][overall(block["scores"]["ensemble"])]
            rows.append({"n_train": n_train, "block": name, **_scores(block), "low": low, "high": high})
    return pd.DataFrame(rows).astype({"low": float, "high": float})


def _blocks(run: Path) -> dict[str, dict[str, Any]]:
    return blocks(json.loads((run / "scores.json").read_text()))


def _scores(block: dict[str, Any]) -> dict[str, float]:
    """The ensemble's scores in a block of scores.json, and the total's skill if known."""
    parts = block["scores"]["ensemble"]
    skill = {"skill": block["skill"]["ensemble"][overall(parts)]} if block["skill"] else {}
    return {part: parts[part] for part in dict.fromkeys([*PARTS, overall(parts)])} | skill
