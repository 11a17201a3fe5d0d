"""The published method with the functions of `grading.grade`: its models, and the mean of their rows, without a fit."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils.grading.blend import Tables, aligned, as_table, row_sources
from lsdc_utils.grading.grade import Models, blends_of
from lsdc_utils.metric import PROBABILITIES
from lsdc_utils.published.detector import SCHEME, load_detectors
from lsdc_utils.published.vit import load_vits, predict_studies

WEIGHTS = {"yolo": 0.65, "vit3d": 0.35}  # of the arithmetic mean


def load_models(weights: str | Path, folds: Iterable[int], views: int, *_: Collection[str]) -> Models:
    """The published models of these folds in a folder of weights; they are always of all conditions."""
    folds = list(folds)
    vits = {"vit3d": load_vits(weights, folds)}
    return Models([], load_detectors(weights, folds), vits, views, predict_studies, SCHEME)


def published_mean(tables: Tables, prior: pd.DataFrame) -> pd.DataFrame:
    """The weighted mean of the models' rows; a row that one lacks is the other's, one that both lack the prior's."""
    natural = np.stack([aligned(table, prior) for table in tables.values()])  # (models, n, 3)
    weights = np.array([WEIGHTS[model] for model in tables])[:, None, None] * ~np.isnan(natural[..., :1])
    total = weights.sum(axis=0)
    mean = (weights * np.nan_to_num(natural)).sum(axis=0) / np.where(total > 0, total, 1)
    return as_table(prior["row_id"], np.where(total > 0, mean, prior[PROBABILITIES].to_numpy(float)))


def fit_blends(given: Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> dict[str, Any]:
    """What a recipe holds of the blend."""
    return {"kind": "published", "ensemble": WEIGHTS}


def blend_rows(
    recipe: dict[str, Any], given: Tables, prior: pd.DataFrame, unseen: Collection[str] = (), *_: Any, **__: Any
) -> tuple[Tables, pd.Series]:
    """The rows of `prior` by each of `blends_of`, and the sources of the ensemble's rows."""
    blends = blends_of(given)
    tables = {name: published_mean({model: given[model] for model in models}, prior) for name, models in blends.items()}
    return tables, row_sources(given, prior["row_id"])
