"""What a finished run holds: its models and blend, and one tidy table of graded rows for pages, viewers and exports."""

import json
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import metric
from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, load_study, read_study
from lsdc_utils.vocabulary import COLUMNS, GROUPS, MISSING, SEVERITIES, SIDES, transformers

FORMAT = 4  # of blend.json
RECIPE_KEYS = ("kind", "folds", "vit_views", "threads", "prior")  # of blend.json, besides its numbers
BLOCKS = {"oof": "train", "test": "test"}  # block of the scores -> the split its studies come from
SOURCE_NAMES = {  # values of the column `source`, in words
    "yolo+vit3d": "detector and ViT",
    "yolo": "detector alone",
    "vit3d": "ViT alone",
    "prior": "prior: no model had evidence",
}


class RunError(ValueError):
    """A run that cannot be used: not finished, or made by other code; the message says which, and what to do."""


def tables_of(members: Iterable[str]) -> list[str]:
    """The tables of rows that 05 writes of a block: blended ones, and raw_* of each model before the blend."""
    vits = transformers(members)
    return [*dict.fromkeys(["yolo", *vits, "vit3d", "ensemble"]), "raw_yolo", *(f"raw_{vit}" for vit in vits)]


def weight_files(
    folds: Iterable[int], published: bool = False, conditions: Iterable[str] = GROUPS, members: Iterable[str] = ()
) -> list[str]:
    """The weights of the models of these folds, relative to the run's folder; each has a .json beside it."""
    yolos = (f"yolo_{key}_fold{{}}.pt" for key in conditions)
    names = ["localiser_fold{}.safetensors", *yolos, *(f"{vit}_fold{{}}.safetensors" for vit in transformers(members))]
    return [f"weights/{name.format(fold)}" for name in names[published:] for fold in folds]


def read_recipe(run_dir: str | Path) -> dict[str, Any]:
    """blend.json of a finished run; RunError where files are missing (names them), its code had another format, or its
    weights were trained after it was fitted."""
    run = Path(run_dir)
    recipe = json.loads((run / "blend.json").read_text()) if (run / "blend.json").is_file() else {}
    if recipe and (recipe.get("format") != FORMAT or not recipe.keys() >= set(RECIPE_KEYS)):
        remedy = "run it again, or use the version in its provenance.json"
        raise RunError(f"the run in {run} was made by an older version of the code: {remedy}")
    for key, value in {"conditions": list(GROUPS), "members": [], "missing_members": []}.items():
        recipe.setdefault(key, value)  # which older recipes do not name
    for name, blends in recipe.get("without", {}).items():  # numbers for the case that one member's weights are gone
        others = [other for other in recipe["members"] if other != name]
        if _lacks(run, recipe) and not _lacks(run, recipe | {"members": others}):
            recipe |= blends | {"members": others, "missing_members": [*recipe["missing_members"], name], "without": {}}
    if missing := _lacks(run, recipe):
        raise RunError(f"the run in {run} is not finished: it lacks {', '.join(missing)}")
    known = recipe.get("weights", {})  # which older recipes lack
    sums = weight_sums(run, recipe) if known else {}
    if other := [name for name in sums if known.get(name) != sums[name]]:
        remedy = "run it again, to 05_ensemble_inference or further"
        raise RunError(f"the run in {run} was blended with other weights than its {', '.join(other)}: {remedy}")
    return recipe


def weight_sums(run_dir: str | Path, recipe: dict[str, Any]) -> dict[str, str]:
    """The SHA-256 of each of the weights of a recipe's models by name, as told beside them."""
    files = [Path(run_dir, name).with_suffix(".json") for name in _weights(recipe)]
    return {file.stem: json.loads(file.read_text()).get("sha256", "") for file in files}


def _weights(recipe: dict[str, Any]) -> list[str]:
    published = recipe.get("kind") == "published"
    return weight_files(recipe.get("folds", ()), published, recipe["conditions"], recipe["members"])


def _lacks(run: Path, recipe: dict[str, Any]) -> list[str]:
    """The files of a recipe's models that a run's folder lacks."""
    weights = _weights(recipe)
    needed = ["blend.json", *weights, *(str(Path(name).with_suffix(".json")) for name in weights)]
    return [name for name in needed if not (run / name).is_file()]


def read_folds(run_dir: str | Path, name: str, folds: Iterable[int]) -> pd.DataFrame:
    """What 03 or 04 left out of fold as predictions/<name>_fold<k>_oof.parquet, the folds joined."""
    return pd.concat([_read(Path(run_dir), f"{name}_fold{fold}_oof") for fold in folds], ignore_index=True)


def read_models(
    run_dir: str | Path, folds: Collection[int], conditions: Collection[str] = GROUPS, members: Iterable[str] = ()
) -> dict[str, pd.DataFrame]:
    """Each model's out-of-fold rows before they are blended: yolo (all conditions) and each of `transformers`."""
    yolo = pd.concat([read_folds(run_dir, f"yolo_{key}", folds) for key in conditions], ignore_index=True)
    rows = {vit: read_folds(run_dir, vit, folds) for vit in transformers(members)}
    return {"yolo": yolo} | {vit: metric.rows_of_groups(table, conditions) for vit, table in rows.items()}


def read_points(run_dir: str | Path, folds: Iterable[int], conditions: Iterable[str], least: float = 0) -> pd.DataFrame:
    """The out-of-fold points with their condition, a key of GROUPS; the canal's are the localiser's where its detector
    was not trained. Studies whose level confidence is under `least` are left out."""
    keys = [key for key in GROUPS if key in conditions or key == "scs"]
    names = {key: f"points_{key if key in conditions else 'canal'}" for key in keys}
    tables = [read_folds(run_dir, name, folds).assign(condition=key) for key, name in names.items()]
    points = pd.concat(tables, ignore_index=True)
    return points[~points["study_id"].isin(points["study_id"][points["level_confidence"] < least])] if least else points


def read_graded(run_dir: str | Path, block: str) -> pd.DataFrame:
    """The graded rows of a run's `oof` or `test` studies, by study and in the order of `vocabulary.COLUMNS`.

    Columns: those of `metric.row_keys` (study_id as int) and block; the ensemble's natural probabilities; grade (0, 1,
    2: the most probable) and confidence, its probability; source (a key of `SOURCE_NAMES`) and own_series (whether the
    study has the series on which readers grade the row); X, Y, Z (LPS mm) of the detected point and the study's
    level_confidence, NaN where unknown; severity, the label (-1 where unknown); the models' own probabilities as
    detector_<severity> and vit_<severity>. FileNotFoundError where 05 has not run.
    """
    run = Path(run_dir)
    natural = _read(run, f"ensemble_{block}")
    rows = metric.row_keys(natural["row_id"]).astype({"study_id": int})
    rows.insert(2, "block", block)
    rows[list(SEVERITIES)] = chances = natural[list(SEVERITIES)].to_numpy()
    rows = rows.assign(grade=chances.argmax(axis=1), confidence=chances.max(axis=1, initial=0))
    rows = rows.merge(_read(run, f"sources_{block}"), on="row_id", how="left")
    points = _read(run, f"points_{block}")
    rows = rows.join(points_of(rows, points), on="row_id")
    rows["level_confidence"] = rows["study_id"].map(points.groupby("study_id")["level_confidence"].min())
    rows["severity"] = rows["row_id"].map(_labels(run, block)).fillna(MISSING).astype(int)
    for model, prefix in (("yolo", "detector"), ("vit3d", "vit")):
        rows = rows.join(_read(run, f"{model}_{block}").set_index("row_id").add_prefix(f"{prefix}_"), on="row_id")
    order = (rows["condition"] + "_" + rows["level"]).map(COLUMNS.index)
    return rows.iloc[np.lexsort((order, rows["study_id"]))].reset_index(drop=True)


def points_of(rows: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """The detected point of each row that has one: X, Y, Z (LPS mm) by row_id. rows: row_id, study_id, group, level,
    side; points: as predictions/points_*.parquet hold them, condition is a group's key."""
    sided = np.where(points["side"].isin(SIDES), points["side"], "")
    points = points.assign(study_id=points["study_id"].astype(str), side=sided, group=points["condition"])
    keys = ["study_id", "group", "level", "side"]
    rows = rows[["row_id", *keys]].assign(study_id=rows["study_id"].astype(str))
    return rows.merge(points[[*keys, *"XYZ"]], on=keys).set_index("row_id")[list("XYZ")]


def _read(run: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(run / "predictions" / f"{name}.parquet")


def _labels(run: Path, block: str) -> dict[str, int]:
    """Label by row id, as far as labels are known: a phantom's test studies have theirs beside the tables."""
    if block == "oof":
        file, read = run / "tables/labels.parquet", pd.read_parquet
    else:  # what `predict` wrote has no data.json
        folder = competition.data_dir(run) if (run / "data.json").is_file() else run
        file, read = folder / "solution.csv", pd.read_csv
    return dict(read(file)[["row_id", "severity"]].to_numpy()) if file.is_file() else {}


def read_data(run_dir: str | Path) -> competition.Competition:
    """The data that a run was made from, without what its exclude_csv left out."""
    excluded = Path(run_dir) / "tables" / "exclude.csv"
    return competition.read(competition.data_dir(run_dir), excluded if excluded.is_file() else "")


def study_reader(run_dir: str | Path, block: str) -> Callable[[int], list[Stack]]:
    """A function that gives a study's stacks by its id: those that 02 kept, or a test study's, read from its files."""
    run = Path(run_dir)
    if block == "oof":
        return lambda study_id: load_study(run / "slices", study_id)
    comp = read_data(run)
    return lambda study_id: read_study(comp, "test", study_id)[0]
