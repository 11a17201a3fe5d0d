"""Adaptation to another population, measured: `python tests/proofs/adapt.py CACHE [--run NAME] [--cores N] [--check]`.

A run's models grade new phantom studies: some of the population that it was trained on, and some of a second one, whose
severe narrowings are 1.5 times as frequent, whose reader is more lenient and whose scanner differs in field of view,
contrast, pixel and noise. `adapt` learns from 20, 50 and 100 of them, five draws each, and is scored on 400 others.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

from lsdc_utils import metric
from lsdc_utils.data import competition
from lsdc_utils.files import atomic
from lsdc_utils.grading import grade
from lsdc_utils.grading.run_tables import read_recipe
from lsdc_utils.phantom import labels, write_phantom
from lsdc_utils.pipeline.arguments import OUTPUTS
from lsdc_utils.vocabulary import MISSING, row_id

BLOCK = 20  # studies that are drawn, graded and forgotten together
SCANNER = {"stir": 1.0, "population": "close", "pixel": 1.3, "noise": 2.0}
SEVERE, LENIENT = 1.5, 0.06  # factor of severe narrowing's prevalence; added to the reader's cut-offs
SEEDS = {"first": 77_000, "second": 78_000}  # training draws neither


def narrowing_of(name: str, seed: int) -> np.ndarray:
    """Narrowings (BLOCK, 25) of a population, shifted by condition group so that severe is `SEVERE` times as frequent."""
    drawn = labels.draw_grades(BLOCK, [seed, 0]).narrowing
    if name == "first":
        return drawn
    many, shifted = (
        ndtri(labels.draw_grades(4000, [1, 0]).narrowing.clip(1e-6, 1 - 1e-6)),
        ndtri(drawn.clip(1e-6, 1 - 1e-6)),
    )
    for group in metric.GROUPS:
        columns = labels.COLUMN_GROUPS == group

        def excess(shift: float, columns: np.ndarray = columns) -> float:
            severe = labels.oracle(ndtr(many + shift))[:, columns, 2].mean()
            return severe / labels.oracle(ndtr(many))[:, columns, 2].mean() - SEVERE

        shifted[:, columns] += brentq(excess, 0, 1, xtol=1e-4)
    return ndtr(shifted).round(6)


def graded_block(models: grade.Models, name: str, seed: int, folder: Path) -> tuple[dict, pd.DataFrame]:
    """A block's tables and labels (row_id, study_id, condition, level, severity)."""
    narrowing, lenient = narrowing_of(name, seed), LENIENT * (name == "second")
    choices = SCANNER if name == "second" else {}
    comp = competition.read(write_phantom(folder / "phantom", BLOCK, 0, seed, narrowing=narrowing, **choices))
    studies = sorted(comp.labels["study_id"].unique())
    read = comp.labels.assign(
        row_id=[row_id(*key) for key in comp.labels[["study_id", "condition", "level"]].to_numpy()]
    )
    own = labels.grade(narrowing - lenient, [seed, 0]).labels  # the same as with cut-offs that much higher
    rows = grade.rows_of(studies)["row_id"]
    told = pd.Series(own.ravel(), index=rows)
    read["severity"] = np.where(read["severity"] == MISSING, MISSING, read["row_id"].map(told))
    return grade.grade_studies(models, comp, "train", studies), read


def population(
    models: grade.Models | None, cache: Path, name: str, first: int, blocks: int
) -> tuple[dict, pd.DataFrame]:
    """Graded tables and labels of `blocks` blocks, from the cache as far as they are there."""
    parts = []
    for seed in range(first, first + blocks):
        files = {kind: cache / f"{name}-{seed}-{kind}.parquet" for kind in ("yolo", "vit3d", "series", "labels")}
        if not all(file.is_file() for file in files.values()):
            with tempfile.TemporaryDirectory() as folder:
                graded, read = graded_block(models, name, seed, Path(folder))
            for kind, file in files.items():
                with atomic(file) as temporary:
                    (read if kind == "labels" else graded[kind]).to_parquet(temporary, index=False)
            print(f"{name}: block {seed - first + 1}/{blocks}", flush=True)
        parts.append({kind: pd.read_parquet(file) for kind, file in files.items()})
    joined = {kind: pd.concat([part[kind] for part in parts], ignore_index=True) for kind in parts[0]}
    return joined, joined.pop("labels").astype({"study_id": str})
