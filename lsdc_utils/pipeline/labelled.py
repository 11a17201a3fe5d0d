"""The labelled studies of any folder, graded by a run's models and scored, for `evaluate` and `adapt`. They are graded
in work/ in the folder of results. What `evaluate` leaves there names neither the folder nor a file."""

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
from lsdc_utils.files import write_json, write_table
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


def find(root: Path, labels_csv: Path | None, cores: int) -> Labelled:
    """The studies of folder `root` that have images and a label. Labels are those of `labels_csv` (row_id and severity,
    or any form of `tables.read_grades`), else those of train.csv and, of test studies, of a solution.csv beside the
    tables. UsageError where no study has one, CompetitionError where a table cannot be read."""
    comp = competition.read(root, workers=cores, labels_csv=labels_csv or "")
    comp = replace(comp, findings=comp.findings[comp.findings["rule"] != "grade_without_point"])  # matters to training
    labels, points = comp.labels, comp.coordinates
    if (file := root / "solution.csv").is_file() and not labels_csv:
        labels = pd.concat([labels, read_grades(file, Findings())])
    if (file := root / "solution_coordinates.csv").is_file():
        points = pd.concat([points, competition.read_points(file)]).drop_duplicates(competition.KEY)
    labels = labels[labels["severity"] >= 0].drop_duplicates(competition.KEY).reset_index(drop=True)
    labels.insert(0, "row_id", labels["study_id"].astype(str) + "_" + competition.label_names(labels))
    there, place = labels["study_id"].isin(comp.series["study_id"]), labels_csv or f"{root}: train.csv or solution.csv"
    if labels.empty:
        raise UsageError(f"{place}: there is no grade; give a table of grades with --labels FILE.csv")
    if not there.any():
        here, asked = (
            ", ".join(comp.names.get(n, str(n)) for n in t["study_id"].unique()[:3]) for t in (comp.series, labels)
        )
        raise UsageError(f"{place}: no graded study has images: grades are of {asked} ..., images of {here} ...")
    points = points[points["study_id"].isin(labels["study_id"][there])].reset_index(drop=True)
    return Labelled(comp, labels[there].reset_index(drop=True), points, labels["study_id"][~there].nunique())


def check_overlap(found: Labelled, trained: Path, allowed: bool, cores: int) -> tuple[list[int], str]:
    """The studies on which the models in folder `trained` were trained, and words on that, '' if there are none.
    UsageError where there are some and `allowed` is False."""
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


def grade(found: Labelled, trained: Path, out: Path, cores: int, resume: str) -> dict[str, Any]:
    """Grade the studies of `found` by the models of the run, or of the unpacked archive, in folder `trained`; returns
    the parameters of the prediction. They are graded in `out`/work, which may be deleted afterwards; `TABLES` go to
    `out`/predictions. Errors as of `predict.prepare`; SystemExit where a step failed or was stopped."""
    place, studies = out / "work", sorted(found.labels["study_id"].unique().tolist())
    parameters = predict.prepare(found.comp.root, trained.resolve(), place, cores, (found.comp, studies))
    if status := work(Run(place, parameters, resume, cores, snakefile="predict.smk")):
        raise SystemExit(status)
    for name in TABLES:
        write_table(out / f"predictions/{name}_test.parquet", predict.joined(parameters, name))
    return parameters


def evaluate(
    found: Labelled, trained: Path, out: Path, models: str, overlap: tuple[list[int], str], cores: int, resume: str
) -> dict[str, Any]:
    """Grade and score the studies of `found` by models called `models`; returns the content of evaluation.json.
    overlap: see `check_overlap`. Errors as of `grade`; RuntimeError where a cell of the notebook fails."""
    (out / "evaluation.json").unlink(missing_ok=True)  # an earlier one, which a stop would leave beside new tables
    shutil.rmtree(out / "report", ignore_errors=True)
    parameters, known = grade(found, trained, out, cores, resume), reference(trained, read_recipe(trained))
    basis = "; ".join(filter(None, [grade_basis(trained), overlap[1]]))
    predict.collect(parameters, basis)
    keys = metric.row_keys(pd.read_parquet(out / "predictions/ensemble_test.parquet")["row_id"])
    prior = keys.merge(pd.DataFrame(known["prior"]), on=["condition", "level"])
    write_table(out / "predictions/prior_test.parquet", prior[["row_id", *metric.PROBABILITIES]])
    listed, labels = predict.listed_studies(parameters), found.labels[[*competition.KEY, "severity"]]
    series = listed.series.assign(split="train")  # those that have labels
    comp = replace(found.comp, series=series, files=listed.files, labels=labels, coordinates=found.points)
    write_table(out / "tables/labels.parquet", checks.label_table(comp, cores))  # with the places of readers' points
    people = cohort.describe(found.comp, sorted(found.labels["study_id"].unique().tolist()), cores)
    people["trained_on"] = people["study_id"].isin(overlap[0])
    write_table(out / "tables/studies.parquet", people)
    write_table(out / "solution.csv", found.labels[["row_id", "severity"]])
    about = {"models": models, "grade_basis": basis, "trained_on": len(overlap[0]), "cut_offs": known["cut_offs"]}
    write_json(out / "about.json", about | {"overlap": overlap[1], "studies_without_images": found.lost})
    execute(out, Step("evaluate", "evaluate", {"evaluation_dir": "."}, cwd=out), {})
    predict.write_pages(parameters, models, basis, out)
    for file in ("grades.csv", "findings.csv"):
        os.replace(out / "work" / file, out / file)
    found.comp.write_ids(out)
    for folder in ("work", "logs"):
        shutil.rmtree(out / folder)
    return json.loads((out / "evaluation.json").read_text())
