"""What a finished run says of each study, in one tidy table: for pages, viewers and exports.

A study was graded either as a test study or out of fold, by models that had not seen it. Its labels are read only to be
shown beside the grades.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, load_study, read_study
from lsdc_utils.grading.evaluation import points_of
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, MISSING, SEVERITIES, parse_row_id

BLOCKS = {"oof": "train", "test": "test"}  # block of the scores -> the split its studies come from
SOURCE_NAMES = {  # values of the column `source`, in words
    "yolo+vit3d": "detector and ViT",
    "yolo": "detector alone",
    "vit3d": "ViT alone",
    "expectation": "expected from the study's other rows",
    "prior": "prior: no model had evidence",
}
PARTS = {"yolo": "detector", "vit3d": "vit"}  # models whose own probabilities stand beside the ensemble's


def read_graded(run_dir: str | Path, block: str) -> pd.DataFrame:
    """The graded rows of a run's `oof` or `test` studies, by study and in the order of `vocabulary.COLUMNS`.

    Columns: row_id, study_id (int), block, condition, level, side ('' for the canal), group (nfn, scs, ss), the
    ensemble's natural probabilities normal_mild, moderate, severe; grade (0, 1, 2: the most probable) and
    confidence, its probability; source (models that gave the row joined by +, expectation or prior) and own_series
    (whether the series was there that readers grade it on); X, Y, Z (LPS mm) of the detected point, NaN where there is
    none; severity, the label (-1 where none is known); and the models' own probabilities as detector_<severity> and
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
    named = rows.assign(study_id=rows["study_id"].astype(str))
    rows = rows.join(points_of(named, _read(run, f"points_{block}")), on="row_id")
    rows["severity"] = rows["row_id"].map(_labels(run, block)).fillna(MISSING).astype(int)
    for model, name in PARTS.items():
        own = _read(run, f"{model}_{block}").set_index("row_id").add_prefix(f"{name}_")
        rows = rows.join(own, on="row_id")
    place = {column: k for k, column in enumerate(COLUMNS)}
    order = (rows["condition"] + "_" + rows["level"]).map(place)
    return rows.iloc[np.lexsort((order, rows["study_id"]))].reset_index(drop=True)


def _read(run: Path, name: str) -> pd.DataFrame:
    """A table of predictions."""
    return pd.read_parquet(run / "predictions" / f"{name}.parquet")


def _labels(run: Path, block: str) -> dict[str, int]:
    """Label by row id, as far as labels are known: a phantom's test studies have theirs beside the tables."""
    file = run / "tables/labels.parquet" if block == "oof" else competition.data_dir(run) / "solution.csv"
    if not file.is_file():
        return {}
    table = pd.read_parquet(file) if block == "oof" else pd.read_csv(file)
    return dict(zip(table["row_id"], table["severity"].astype(int), strict=True))


def read_data(run_dir: str | Path) -> competition.Competition:
    """The data that a run was made from, without what the run was told to leave out."""
    told = Path(run_dir) / "tables" / "exclude.csv"
    return competition.read(competition.data_dir(run_dir), told if told.is_file() else "")


def study_reader(run_dir: str | Path, block: str) -> Callable[[int], list[Stack]]:
    """A function that gives a study's stacks by its id: those that 02 kept, or a test study's, read from its files."""
    run = Path(run_dir)
    if block == "oof":
        return lambda study_id: load_study(run / "slices", study_id)
    comp = read_data(run)
    return lambda study_id: read_study(comp, "test", study_id)[0]
