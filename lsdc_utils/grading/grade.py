"""Studies graded by the frozen models of a run: from stacks to each model's rows, and from these to the ensemble's.

The test studies of a run (05), those of any folder (`predict`) and the studies of the stress tests (07) are all graded
here. `published.grade` has the same functions for the published method.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, read_study
from lsdc_utils.detector.canal import axial_slices
from lsdc_utils.detector.classes import Detector
from lsdc_utils.detector.levels import grade_study
from lsdc_utils.detector.training import load_detector
from lsdc_utils.grading import blend
from lsdc_utils.vit.model import load_vit
from lsdc_utils.vit.predict import predict_studies
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, SEVERITIES, parse_row_id, study_row_ids

BLENDS = {"yolo": ["yolo"], "vit3d": ["vit3d"], "ensemble": ["yolo", "vit3d"]}  # blended table -> models in it
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
    """The frozen models of some folds: detectors by condition group, transformers, and how these predict."""

    yolos: dict[str, list[Detector]]
    vits: list[Any]  # of one kind, such as Vit3d
    views: int  # that a transformer averages
    predict: Callable[..., pd.DataFrame] = predict_studies

    def grade(self, study_id: int, stacks: Sequence[Stack], findings: pd.DataFrame | None = None) -> Graded:
        """One study's tables: rows of both kinds of models, level points, `findings` of its files, the series types
        that it has, and axial slices with their level. A study is graded from the series that it has."""
        rows, points, canal = grade_study(self.yolos, study_id, stacks)
        types = sorted({stack.series_type for stack in stacks})
        return {
            "yolo": rows,
            "vit3d": self.predict(self.vits, [(study_id, list(stacks))], canal, self.views),
            "points": points,
            "findings": pd.DataFrame(columns=COLUMNS_OF["findings"]) if findings is None else findings,
            "series": pd.DataFrame({"study_id": study_id, "series_type": types}),
            "slices": axial_slices(stacks, canal),
        }


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
    """Grade studies of a data folder, each once, and print progress."""
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


def without_own_series(rows: pd.DataFrame, series: pd.DataFrame) -> set[str]:
    """Ids of rows whose study lacks the series that readers grade them on; series: study_id, series_type."""
    existing = set(zip(series["study_id"].astype(str), series["series_type"], strict=True))
    needed = zip(rows["study_id"], rows["condition"].map(READ_ON), strict=True)
    return set(rows["row_id"][[key not in existing for key in needed]])


# ---- blended rows ----------------------------------------------------------------------------------------------------


def fit_blends(given: blend.Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> dict[str, Any]:
    """What a recipe holds of the blend: its kind, and numbers for each of `BLENDS`, fitted on out-of-fold rows."""
    fits = {
        name: blend.choose_blend({model: given[model] for model in models}, prior, labels)
        for name, models in BLENDS.items()
    }
    return {"kind": "fitted", **{name: blend.to_json(fit) for name, fit in fits.items()}}


def blend_rows(
    recipe: dict[str, Any],
    given: blend.Tables,
    prior: pd.DataFrame,
    unseen: Collection[str] = (),
    labels: pd.DataFrame | None = None,
) -> tuple[blend.Tables, pd.Series]:
    """The rows of `prior` by each of `BLENDS`, and the sources of the ensemble's rows.

    given, prior, unseen: as for `blend.finish`. labels: of out-of-fold rows (row_id, study_id, severity); with them
    each study is blended by numbers that were fitted on other studies, without them by those of the recipe.
    """
    tables = {}
    for name, models in BLENDS.items():
        mixtures, inputs = blend.from_json(recipe[name]), {model: given[model] for model in models}
        fit = partial(blend.fit_blend, only=[key for key, mixture in mixtures.items() if mixture.kept == "fitted"])
        if labels is None:
            tables[name] = blend.apply_blend(mixtures, inputs, prior)
        else:
            tables[name] = blend.cross_fitted(inputs, prior, labels, fit)
    return blend.finish(tables, given, prior, unseen)


def blend_studies(recipe: dict[str, Any], graded: Graded, studies: Iterable[int]) -> tuple[blend.Tables, pd.Series]:
    """Every row of graded studies by each of `BLENDS`, and the sources of the ensemble's rows."""
    rows = rows_of(studies)
    given = {model: graded[model] for model in BLENDS["ensemble"]}
    return blend_rows(recipe, given, prior_of(recipe, rows), without_own_series(rows, graded["series"]))
