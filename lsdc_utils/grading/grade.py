"""Studies graded by the frozen models of a run: from stacks to each model's rows, and from these to the ensemble's.

The test studies of a run (05), those of any folder (`predict`) and the studies of the stress tests (07) are all graded
here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, read_study
from lsdc_utils.detector.classes import Detector
from lsdc_utils.detector.levels import grade_study
from lsdc_utils.detector.training import load_detector
from lsdc_utils.grading import blend, localisation
from lsdc_utils.vit.model import Vit3d, load_vit
from lsdc_utils.vit.predict import predict_studies
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, SEVERITIES, parse_row_id, study_row_ids

MEMBERS = {"yolo": ["yolo"], "vit3d": ["vit3d"], "ensemble": ["yolo", "vit3d"]}  # of each blended table
READ_ON = {name: GROUPS[condition.group].series_type for name, condition in CONDITIONS.items()}
COLUMNS_OF = {  # of the tables that a study's grading gives, where it gives none
    "yolo": ["row_id", *SEVERITIES],
    "vit3d": ["row_id", *SEVERITIES],
    "points": ["study_id", "level", "side", "X", "Y", "Z", "confidence", "condition"],
    "findings": competition.FINDINGS,
    "series": ["study_id", "series_type"],
    "slices": ["study_id"],
}
Graded = dict[str, pd.DataFrame]  # tables by the keys of COLUMNS_OF


@dataclass(frozen=True)
class Models:
    """The frozen models of some folds: detectors by condition group, transformers, and how many views these take."""

    yolos: dict[str, list[Detector]]
    vits: list[Vit3d]
    views: int

    def grade(self, study_id: int, stacks: Sequence[Stack], problems: pd.DataFrame | None = None) -> Graded:
        """One study's tables: rows of both kinds of models, level points, `problems` of its files, series types that
        are there, and axial slices with their level. A study is graded from the series that it has."""
        rows, points, canal = grade_study(self.yolos, study_id, stacks)
        seen = predict_studies(self.vits, [(study_id, list(stacks))], canal, self.views)
        there = pd.DataFrame({"study_id": study_id, "series_type": list({stack.series_type for stack in stacks})})
        told = problems if problems is not None else pd.DataFrame(columns=COLUMNS_OF["findings"])
        slices = localisation.axial_slices(stacks, canal)
        return {"yolo": rows, "vit3d": seen, "points": points, "findings": told, "series": there, "slices": slices}


def load_models(weights: str | Path, folds: Iterable[int], views: int) -> Models:
    """The models of these folds in a folder of weights; errors as `load_detector` and `load_vit` raise them."""
    weights, folds = Path(weights), list(folds)
    yolos = {key: [load_detector(weights / f"yolo_{key}_fold{fold}.pt") for fold in folds] for key in GROUPS}
    return Models(yolos, [load_vit(weights / f"vit3d_fold{fold}.safetensors") for fold in folds], views)


def join_graded(graded: Sequence[Graded]) -> Graded:
    """The tables of many studies as one each."""
    joined = {}
    for kind, columns in COLUMNS_OF.items():
        tables = [study[kind] for study in graded if len(study[kind])]
        joined[kind] = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    return joined


def grade_studies(models: Models, comp: competition.Competition, split: str, studies: Sequence[int]) -> Graded:
    """Grade studies of a data folder, each once, and say how far it is."""
    graded = []
    for number, study_id in enumerate(studies, 1):
        graded.append(models.grade(study_id, *read_study(comp, split, study_id)))
        if number % 10 == 0 or number == len(studies):
            print(f"graded study {number}/{len(studies)}", flush=True)
    return join_graded(graded)


def rows_of(studies: Iterable[int]) -> pd.DataFrame:
    """Every row of these studies: row_id, study_id, condition, level, all as text."""
    rows = pd.DataFrame({"row_id": [row for study in studies for row in study_row_ids(study)]}, dtype=str)
    rows[["study_id", "condition", "level"]] = [parse_row_id(row) for row in rows["row_id"]] or np.empty((0, 3), str)
    return rows


def prior_of(recipe: dict[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """The prior of a recipe (blend.json) for rows of `rows_of`: row_id and natural probabilities."""
    return rows.merge(pd.DataFrame(recipe["prior"]), on=["condition", "level"])[["row_id", *SEVERITIES]]


def without_own_series(rows: pd.DataFrame, there: pd.DataFrame) -> set[str]:
    """Ids of rows whose study lacks the series that readers grade them on; there: study_id, series_type."""
    known = set(zip(there["study_id"].astype(str), there["series_type"], strict=True))
    mine = zip(rows["study_id"], rows["condition"].map(READ_ON), strict=True)
    return set(rows["row_id"][[key not in known for key in mine]])


def blend_rows(recipe: dict[str, Any], name: str, tables: blend.Tables, prior: pd.DataFrame) -> pd.DataFrame:
    """The rows of `prior` by one model alone or by the ensemble (`MEMBERS`), as a recipe says."""
    tables = {model: tables[model] for model in MEMBERS[name]}
    if recipe["kind"] == "published":
        return blend.published_blend(tables, prior)
    return blend.apply_blend(blend.from_json(recipe[name]), tables, prior)


def finish_rows(
    recipe: dict[str, Any], tables: blend.Tables, given: blend.Tables, prior: pd.DataFrame, unseen: Collection[str]
) -> tuple[blend.Tables, pd.Series]:
    """Blended tables with their last rows, and where each row of the ensemble comes from; `given` and `unseen` as
    `blend.finish` takes them."""
    if recipe["kind"] == "published":
        return tables, blend.row_sources(given, prior["row_id"], expected=False)
    return blend.finish(tables, given, prior, recipe["correlations"], unseen)


def blend_studies(recipe: dict[str, Any], graded: Graded, studies: Iterable[int]) -> tuple[blend.Tables, pd.Series]:
    """Every row of graded studies by each of `MEMBERS`, as a recipe says, and the sources of the ensemble's rows."""
    rows = rows_of(studies)
    prior, given = prior_of(recipe, rows), {model: graded[model] for model in MEMBERS["ensemble"]}
    tables = {name: blend_rows(recipe, name, given, prior) for name in MEMBERS}
    return finish_rows(recipe, tables, given, prior, without_own_series(rows, graded["series"]))
