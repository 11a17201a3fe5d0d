"""What a finished run holds: its models and blend, and one tidy table of graded rows for pages, viewers and exports.

A study was graded either as a test study or out of fold, by models that had not seen it. Its labels are read only to be
shown beside the grades.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, load_study, read_study
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, GROUPS, MISSING, SEVERITIES, SIDES, parse_row_id

FORMAT = 2  # of blend.json
RECIPE_KEYS = ("kind", "folds", "vit_views", "threads", "prior")  # of blend.json, besides its numbers
BLOCKS = {"oof": "train", "test": "test"}  # block of the scores -> the split its studies come from
SOURCE_NAMES = {  # values of the column `source`, in words
    "yolo+vit3d": "detector and ViT",
    "yolo": "detector alone",
    "vit3d": "ViT alone",
    "prior": "prior: no model had evidence",
}
PREFIXES = {"yolo": "detector", "vit3d": "vit"}  # of the columns that hold one model's own probabilities


class RunError(ValueError):
    """A run that cannot be used: not finished, or made by other code; the message says which, and what to do."""


def weight_files(folds: Iterable[int]) -> list[str]:
    """The weights of the models of these folds, relative to the run's folder; each has a .json beside it."""
    detectors = [f"weights/yolo_{key}_fold{fold}.pt" for key in GROUPS for fold in folds]
    return detectors + [f"weights/vit3d_fold{fold}.safetensors" for fold in folds]


def read_recipe(run_dir: str | Path) -> dict[str, Any]:
    """blend.json of a finished run: how its models are used and blended.

    RunError where the run is not finished (names the missing files) or was made by code with another format.
    """
    run = Path(run_dir)
    recipe = json.loads((run / "blend.json").read_text()) if (run / "blend.json").is_file() else {}
    if recipe and (recipe.get("format") != FORMAT or not recipe.keys() >= set(RECIPE_KEYS)):
        raise RunError(
            f"the run in {run} was made by an older version of the code: run it again, or use the version in its "
            "provenance.json"
        )
    weights = weight_files(recipe.get("folds", ()))
    needed = ["blend.json", *weights, *(str(Path(name).with_suffix(".json")) for name in weights)]
    if missing := [name for name in needed if not (run / name).is_file()]:
        raise RunError(f"the run in {run} is not finished: it lacks {', '.join(missing)}")
    return recipe


def read_folds(run_dir: str | Path, name: str, folds: Iterable[int]) -> pd.DataFrame:
    """What 03 or 04 left out of fold as predictions/<name>_fold<k>_oof.parquet, the folds joined."""
    files = [Path(run_dir) / f"predictions/{name}_fold{fold}_oof.parquet" for fold in folds]
    return pd.concat([pd.read_parquet(file) for file in files], ignore_index=True)


def read_models(run_dir: str | Path, folds: Iterable[int]) -> dict[str, pd.DataFrame]:
    """Each model's out-of-fold rows before they are blended: yolo (all conditions) and vit3d."""
    folds = list(folds)
    yolo = pd.concat([read_folds(run_dir, f"yolo_{key}", folds) for key in GROUPS], ignore_index=True)
    return {"yolo": yolo, "vit3d": read_folds(run_dir, "vit3d", folds)}


def read_graded(run_dir: str | Path, block: str) -> pd.DataFrame:
    """The graded rows of a run's `oof` or `test` studies, by study and in the order of `vocabulary.COLUMNS`.

    Columns: row_id, study_id (int), block, condition, level, side ('' for the canal), group (nfn, scs, ss), the
    ensemble's natural probabilities normal_mild, moderate, severe; grade (0, 1, 2: the most probable) and
    confidence, its probability; source (the models that gave the row joined by +, or prior) and own_series (whether
    the study has the series on which readers grade the row); X, Y, Z (LPS mm) of the detected point, NaN where there
    is none; severity, the label (-1 where none is known); and the models' own probabilities as detector_<severity> and
    vit_<severity>. Empty where the run graded no such study. Raises FileNotFoundError where 05 has not run.
    """
    run = Path(run_dir)
    rows = _read(run, f"ensemble_{block}")
    keys = [(int(study), condition, level) for study, condition, level in map(parse_row_id, rows["row_id"])]
    kinds = {"study_id": int, "condition": str, "level": str}  # of a table without rows too
    keys = pd.DataFrame(keys, columns=list(kinds)).astype(kinds)
    rows = pd.concat([rows[["row_id"]], keys, rows[list(SEVERITIES)]], axis=1)
    rows.insert(2, "block", block)
    rows.insert(5, "side", rows["condition"].map({name: c.side or "" for name, c in CONDITIONS.items()}).astype(str))
    rows.insert(6, "group", rows["condition"].map({name: c.group for name, c in CONDITIONS.items()}).astype(str))
    natural = rows[list(SEVERITIES)].to_numpy()
    rows = rows.assign(grade=natural.argmax(axis=1), confidence=natural.max(axis=1, initial=0))
    rows = rows.merge(_read(run, f"sources_{block}"), on="row_id", how="left")
    rows = rows.join(points_of(rows, _read(run, f"points_{block}")), on="row_id")
    rows["severity"] = rows["row_id"].map(_labels(run, block)).fillna(MISSING).astype(int)
    for model, prefix in PREFIXES.items():
        rows = rows.join(_read(run, f"{model}_{block}").set_index("row_id").add_prefix(f"{prefix}_"), on="row_id")
    places = {column: k for k, column in enumerate(COLUMNS)}
    order = (rows["condition"] + "_" + rows["level"]).map(places)
    return rows.iloc[np.lexsort((order, rows["study_id"]))].reset_index(drop=True)


def points_of(rows: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """The detected point of each row that has one: X, Y, Z (LPS mm) by row_id.

    rows: row_id, study_id, group, level, side ('' for the canal). points: study_id, level, side, X, Y, Z, condition (a
    group's key), as predictions/points_*.parquet hold them.
    """
    sided = np.where(points["side"].isin(SIDES), points["side"], "")
    points = points.assign(study_id=points["study_id"].astype(str), side=sided, group=points["condition"])
    keys = ["study_id", "group", "level", "side"]
    rows = rows[["row_id", *keys]].assign(study_id=rows["study_id"].astype(str))
    return rows.merge(points[[*keys, *"XYZ"]], on=keys).set_index("row_id")[list("XYZ")]


def _read(run: Path, name: str) -> pd.DataFrame:
    """A table of predictions."""
    return pd.read_parquet(run / "predictions" / f"{name}.parquet")


def _labels(run: Path, block: str) -> dict[str, int]:
    """Label by row id, as far as labels are known: a phantom's test studies have theirs beside the tables."""
    file = run / "tables/labels.parquet"
    if block == "test":  # what `predict` wrote has no data.json
        file = competition.data_dir(run) / "solution.csv" if (run / "data.json").is_file() else run / "solution.csv"
    if not file.is_file():
        return {}
    table = pd.read_csv(file) if block == "test" else pd.read_parquet(file)
    return dict(zip(table["row_id"], table["severity"].astype(int), strict=True))


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
