"""The labelled studies of any folder, graded by a run's models and scored, for `evaluate` and `adapt`.

They are graded in work/ in the folder of results, which resumes after a stop. What `evaluate` leaves there names
neither the folder nor a file: evaluation.json, grades.csv, findings.csv, report/, its notebook and tables.
"""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lsdc_utils import metric
from lsdc_utils.data import checks, cohort, competition
from lsdc_utils.data.tables import Findings, read_grades
from lsdc_utils.files import atomic, write_json
from lsdc_utils.grading.basis import PHANTOM_ONLY, grade_basis
from lsdc_utils.grading.evaluation import reference
from lsdc_utils.grading.run_tables import read_recipe
from lsdc_utils.pipeline import predict
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import Step, execute
from lsdc_utils.pipeline.run import Run, work

# raw_*: each model's own rows before the blend; a row without evidence is not there.
TABLES = ("ensemble", "yolo", "vit3d", "raw_yolo", "raw_vit3d", "points", "sources", "slices")


@dataclass(frozen=True)
class Labelled:
    """Labelled studies of a folder."""

    comp: competition.Competition  # the whole folder
    labels: pd.DataFrame  # row_id, study_id (int), condition, level, severity (0, 1, 2): rows with a label and images
    points: pd.DataFrame  # readers' points of these studies, as `Competition.coordinates`; may be empty
    lost: int  # studies with a label and without images


@dataclass(frozen=True)
class Graded:
    """Where the grades of labelled studies are."""

    tables: Path  # folder of `TABLES`, each as <name>_test.parquet, natural probabilities
    work: Path  # folder in which they were graded; holds names of files
    shards: list[Path]
    parameters: dict[str, Any]  # of 05


def find(root: Path, labels_csv: Path | None, cores: int) -> Labelled:
    """The studies of folder `root` that have images and a label.

    Labels are those of `labels_csv` (row_id and severity, or any form of `tables.read_grades`), else those of train.csv
    and, of test studies, of a solution.csv beside the tables. UsageError where no study has one, CompetitionError where
    a table cannot be read.
    """
    comp = competition.read(root, workers=cores, labels_csv=labels_csv or "")
    labels, points = comp.labels, comp.coordinates
    if (file := root / "solution.csv").is_file() and not labels_csv:
        labels = pd.concat([labels, read_grades(file, Findings())])
    if (file := root / "solution_coordinates.csv").is_file():
        points = pd.concat([points, competition.read_points(file)]).drop_duplicates(competition.KEY)
    labels = labels[labels["severity"] >= 0].drop_duplicates(competition.KEY).reset_index(drop=True)
    labels.insert(0, "row_id", labels["study_id"].astype(str) + "_" + competition.label_names(labels))
    there = labels["study_id"].isin(comp.series["study_id"])
    if not there.any():
        place = labels_csv or f"{root}: train.csv or solution.csv"
        raise UsageError(f"{place}: no label of a study with images; expected row_id,severity with ids of its studies")
    points = points[points["study_id"].isin(labels["study_id"][there])].reset_index(drop=True)
    return Labelled(comp, labels[there].reset_index(drop=True), points, labels["study_id"][~there].nunique())


def check_overlap(found: Labelled, trained: Path, allowed: bool, cores: int) -> tuple[list[int], str]:
    """The studies on which the models in folder `trained` were trained, and words on that, '' if there are none.

    UsageError where there are some and `allowed` is False.
    """
    studies, blocks = sorted(found.labels["study_id"].unique().tolist()), cohort.trained_on(trained)
    if not blocks:
        phantom = grade_basis(trained) == PHANTOM_ONLY
        return [], "" if phantom else "overlap not checked, since these models record no training images"
    known = cohort.overlap(blocks, found.comp, studies, cores)
    words = f"trained on {len(known)} of these {len(studies)} studies"
    if known and not allowed:
        remedy = "leave them out, or add --allow-trained, with which every page is marked"
        raise UsageError(f"these models were {words}, e.g. {known[0]}, on which scores are too good: {remedy}")
    return known, f"{words}: the scores are too good" if known else ""


def grade(found: Labelled, trained: Path, out: Path, cores: int, resume: str = "") -> Graded:
    """Grade the studies of `found` by the models of the run, or of the unpacked archive, in folder `trained`.

    They are graded in `out`/work, which may be deleted afterwards; the joined tables go to `out`/predictions. Errors as
    of `predict.prepare`; SystemExit where a step failed or was stopped.
    """
    place, studies = out / "work", sorted(found.labels["study_id"].unique().tolist())
    parameters = predict.prepare(found.comp.root, trained.resolve(), place, cores, (found.comp, studies))
    planned = Run(place, parameters, resume, cores, snakefile="predict.smk")
    if status := work(planned):
        raise SystemExit(status)
    shards = [Path(step.given["out_dir"]) for step in planned.steps]
    for name in TABLES:
        parts = [pd.read_parquet(shard / f"predictions/{name}_test.parquet") for shard in shards]
        save(pd.concat(parts, ignore_index=True), out / f"predictions/{name}_test.parquet")
    return Graded(out / "predictions", place, shards, parameters)


def save(table: pd.DataFrame, file: Path) -> None:
    """Write a table as Parquet, atomically."""
    with atomic(file) as temporary:
        table.to_parquet(temporary, index=False)


def label_table(found: Labelled, graded: Graded, cores: int) -> pd.DataFrame:
    """The labels with X, Y, Z (LPS mm) of the readers' points, NaN where there is none, as in `checks.label_table`."""
    listed = [graded.work / "tables" / f"{shard.name}.parquet" for shard in graded.shards]
    parts = [competition.read_listed(found.comp.root, table) for table in listed]
    series = pd.concat([part.series for part in parts], ignore_index=True).assign(split="train")  # labelled ones
    files = {key: source for part in parts for key, source in part.files.items()}
    whole = replace(found.comp, series=series, files=files, labels=found.labels[[*competition.KEY, "severity"]])
    return checks.label_table(replace(whole, coordinates=found.points), cores)


def evaluate(
    found: Labelled, trained: Path, out: Path, models: str, overlap: tuple[list[int], str], cores: int, resume: str
) -> dict[str, Any]:
    """Grade and score the studies of `found` by models called `models`; returns the content of evaluation.json.

    overlap: see `check_overlap`. Errors as of `grade`; RuntimeError where a cell of the notebook fails.
    """
    basis, graded = grade_basis(trained), grade(found, trained, out, cores, resume)
    basis, known = " | ".join(filter(None, [basis, overlap[1]])), reference(trained, read_recipe(trained))
    predict.collect(found.comp.root, graded.work, graded.shards, basis)
    keys = metric.row_keys(pd.read_parquet(graded.tables / "ensemble_test.parquet")["row_id"])
    prior = keys.merge(pd.DataFrame(known["prior"]), on=["condition", "level"])
    save(prior[["row_id", *metric.PROBABILITIES]], graded.tables / "prior_test.parquet")
    save(label_table(found, graded, cores), out / "tables/labels.parquet")
    people = cohort.describe(found.comp, sorted(found.labels["study_id"].unique().tolist()), cores)
    save(people.assign(trained_on=people["study_id"].isin(overlap[0])), out / "tables/studies.parquet")
    with atomic(out / "solution.csv") as file:
        found.labels[["row_id", "severity"]].to_csv(file, index=False)
    about = {"models": models, "grade_basis": basis, "trained_on": len(overlap[0]), "cut_offs": known["cut_offs"]}
    write_json(out / "about.json", about | {"overlap": overlap[1], "studies_without_images": found.lost})
    execute(out, Step("evaluate", "evaluate", {"evaluation_dir": "."}, cwd=out), {})
    predict.write_pages(graded.work, graded.shards, graded.parameters, models, basis, out)
    for file in ("grades.csv", "findings.csv"):
        os.replace(graded.work / file, out / file)
    found.comp.write_ids(out)
    for folder in (graded.work, out / "logs"):
        shutil.rmtree(folder)
    return json.loads((out / "evaluation.json").read_text())
