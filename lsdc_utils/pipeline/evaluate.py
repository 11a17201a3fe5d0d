"""Scoring models on the labelled studies of any folder: what `evaluate` writes names neither the folder nor a file.

The folder of results holds evaluation.json, grades.csv, findings.csv, report/, the executed notebook and the tables it
read. Studies are graded in work/ inside it, which has names of files; it is deleted at the end.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from lsdc_utils.data import cohort
from lsdc_utils.files import atomic, write_json
from lsdc_utils.grading.basis import PHANTOM_ONLY, grade_basis
from lsdc_utils.grading.evaluation import reference
from lsdc_utils.grading.run_tables import read_graded, read_recipe
from lsdc_utils.metric import PROBABILITIES, row_keys
from lsdc_utils.pipeline import labelled, predict
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import Step, execute
from lsdc_utils.pipeline.labelled import Labelled
from lsdc_utils.report.studies import study_losses

NOTEBOOK = "evaluate"
WORST = 12  # studies with a page: those with the largest loss


def check_overlap(found: Labelled, trained: Path, allowed: bool, cores: int) -> tuple[list[int], str]:
    """The studies on which the models were trained, and words on that, '' if there are none.

    UsageError where there are some and `allowed` is False.
    """
    studies, blocks = sorted(found.labels["study_id"].unique().tolist()), cohort.trained_on(trained)
    if not blocks:
        words = "overlap not checked, since these models record no training images"
        return [], "" if grade_basis(trained) == PHANTOM_ONLY else words
    known = cohort.overlap(blocks, found.comp, studies, cores)
    words = f"trained on {len(known)} of these {len(studies)} studies"
    if known and not allowed:
        raise UsageError(
            f"these models were {words}, e.g. {known[0]}, and scores on these are too good: leave them out of the "
            "folder or the labels, or add --allow-trained, with which every page is marked"
        )
    return known, f"{words}: the scores are too good" if known else ""


def evaluate(
    found: Labelled, trained: Path, out: Path, models: str, overlap: tuple[list[int], str], cores: int, resume: str
) -> dict[str, Any]:
    """Grade and score the studies of `found` by models called `models`; returns the content of evaluation.json.

    Errors as of `labelled.grade`; RuntimeError where a cell of the notebook fails.
    """
    basis, recipe = "; ".join(filter(None, [grade_basis(trained), overlap[1]])), read_recipe(trained)
    graded = labelled.grade(found, trained, out, cores, resume)
    predict.collect(found.comp.root, graded.work, graded.shards, basis)
    known, tables = reference(trained, recipe), graded.tables
    keys = row_keys(pd.read_parquet(tables / "ensemble_test.parquet")["row_id"])
    prior = keys.merge(pd.DataFrame(known["prior"]), on=["condition", "level"])[["row_id", *PROBABILITIES]]
    people = cohort.describe(found.comp, sorted(found.labels["study_id"].unique().tolist()), cores)
    people["trained_on"] = people["study_id"].isin(overlap[0])
    labels = labelled.label_table(found, graded, cores)
    for name, table in {"predictions/prior_test": prior, "tables/studies": people, "tables/labels": labels}.items():
        with atomic(out / f"{name}.parquet") as file:
            table.to_parquet(file, index=False)
    with atomic(out / "solution.csv") as file:
        found.labels[["row_id", "severity"]].to_csv(file, index=False)
    about = {"models": models, "grade_basis": basis, "trained_on": len(overlap[0]), "points": known["points"]}
    write_json(out / "about.json", about | {"studies_without_images": found.lost})
    execute(out, Step(NOTEBOOK, NOTEBOOK, {"evaluation_dir": "."}, out), {})
    rows = read_graded(out, "test")
    worst = rows[rows["study_id"].isin(study_losses(rows).nlargest(WORST).index)]
    notebook = out / f"notebooks/{NOTEBOOK}.ipynb"
    graded_by = (graded.work, graded.shards, graded.parameters, models, basis)
    predict.write_pages(*graded_by, worst, out / "report", notebook)
    for file in ("grades.csv", "findings.csv"):
        os.replace(graded.work / file, out / file)
    for folder in (graded.work, out / "logs"):
        shutil.rmtree(folder)
    return json.loads((out / "evaluation.json").read_text())
