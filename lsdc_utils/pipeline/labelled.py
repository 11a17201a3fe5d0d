"""The labelled studies of any folder, graded by a run's models and scored, for `evaluate` and `adapt`. They are graded
in work/ in the folder of results. What `evaluate` leaves there names neither the folder nor a file."""

import contextlib
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
from lsdc_utils.dicom import DicomError, series_files
from lsdc_utils.dicom.headers import opened, text
from lsdc_utils.files import count_studies, write_json, write_table
from lsdc_utils.grading.basis import PHANTOM_ONLY, grade_basis
from lsdc_utils.grading.evaluation import reference
from lsdc_utils.grading.run_tables import read_recipe, tables_of
from lsdc_utils.pipeline import predict
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import Step, execute
from lsdc_utils.pipeline.run import Run, locked, work


@dataclass(frozen=True)
class Labelled:
    """Labelled studies of a folder."""

    comp: competition.Competition  # the whole folder
    labels: pd.DataFrame  # row_id, study_id (int), condition, level, severity (0, 1, 2): rows with a label and images
    points: pd.DataFrame  # readers' points of these studies, as `Competition.coordinates`; may be empty
    people: pd.DataFrame  # what `cohort.describe` tells of these studies; patients by a column of the labels too
    lost: list[int]  # studies with a label and without images


def find(root: Path, labels_csv: Path | None, cores: int) -> Labelled:
    """The studies of folder `root` that have images and a label. Labels are those of `labels_csv` (row_id and severity,
    or any form of `tables.read_grades`), else those of train.csv and, of test studies, of a solution.csv beside the
    tables. UsageError where no study has one or patients are named instead, CompetitionError for a wrong table."""
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
    here, asked, lost = (t["study_id"].unique().tolist() for t in (comp.series, labels, labels[~there]))
    _check_ids(comp, asked, place)
    first = [", ".join(comp.names.get(n, str(n)) for n in ids[:3]) for ids in (here, asked, lost)]
    if not there.any():
        raise UsageError(f"{place}: no graded study has images: grades are of {first[1]} ..., images of {first[0]} ...")
    if lost:
        print(f"{place}: {count_studies(len(lost), 'labelled')} without images, e.g. {first[2]}")
    points = points[points["study_id"].isin(labels["study_id"][there])].reset_index(drop=True)
    graded = [labels_csv] if labels_csv else [root / "train.csv", root / "solution.csv"]
    people = cohort.describe(comp, sorted({*asked} - {*lost}), cores, graded)
    return Labelled(comp, labels[there].reset_index(drop=True), points, people, lost)


def _check_ids(comp: competition.Competition, asked: list[int], place: Path | str) -> None:
    """UsageError where one of the ids `asked`, of labelled studies, is a patient's: of one whose studies have other
    ids, or of one whose studies lie in a folder named so, which would be taken for one study."""
    studies = {}  # PatientID -> study_id -> StudyInstanceUIDs, or id in a table
    for key in comp.series[["split", "study_id", "series_id"]].itertuples(index=False, name=None):
        with contextlib.suppress(DicomError, IndexError), opened(series_files(comp.source(*key))[1][0].file) as file:
            own = text(file.dataset, "StudyInstanceUID") if key[1:] in comp.files else ""
            name = own or comp.names.get(key[1], str(key[1]))
            studies.setdefault(text(file.dataset, "PatientID"), {}).setdefault(key[1], set()).add(name)
    for number in asked:
        own = studies.get(name := comp.names.get(number, str(number)), {})
        if len(own.get(number, ())) > 1 or (own and number not in {*comp.series["study_id"]}):
            ids = ", ".join(sorted(set().union(*own.values()))[:3])
            remedy = f"write the ids of studies there ({ids} ...), and those of patients in a column patient_id"
            raise UsageError(f"{place}: study_id holds PatientIDs, e.g. {name}: {remedy}")


def check_overlap(found: Labelled, trained: Path, allowed: bool, cores: int) -> tuple[list[int], str]:
    """The studies on whose patients the models in folder `trained` were trained, and words on that, '' without any.
    UsageError where there are some and `allowed` is False."""
    studies, blocks = sorted(found.labels["study_id"].unique().tolist()), cohort.trained_on(trained)
    if not blocks:
        phantom = grade_basis(trained) == PHANTOM_ONLY
        return [], "" if phantom else "overlap not checked, since these models record no training images"
    known, people = cohort.overlap(blocks, found.comp, studies, cores), found.people
    words = f"trained on {len(known)} of these {count_studies(len(studies))}"
    kin = people["study_id"][people["patient"].isin(people["patient"][people["study_id"].isin(known)])].tolist()
    words += f" and on the patients of {len(kin) - len(known)} more" * (len(kin) > len(known))
    if known and not allowed:
        remedy = "leave them out, or add --allow-trained, with which every page is marked"
        raise UsageError(f"these models were {words}, e.g. {known[0]}, on which scores are too good: {remedy}")
    return kin, f"{words}: the scores are too good" if known else ""


def trained_for(found: Labelled, trained: Path) -> Labelled:
    """`found` with the labels whose conditions the models in `trained` were trained for, and the people of these."""
    rows = metric.rows_of_groups(found.labels, read_recipe(trained)["conditions"])
    if rows.empty:
        raise UsageError("every label is of a condition for which these models were not trained")
    return replace(found, labels=rows, people=found.people[found.people["study_id"].isin(rows["study_id"])])


def grade(found: Labelled, trained: Path, out: Path, cores: int, resume: str) -> dict[str, Any]:
    """Grade the studies of `found` by the models of the run, or of the unpacked archive, in folder `trained`; returns
    the parameters of the prediction. They are graded in `out`/work, which may be deleted afterwards; tables go to
    `out`/predictions. Errors as of `predict.prepare`; SystemExit where a step failed or was stopped."""
    place, studies = out / "work", sorted(found.labels["study_id"].unique().tolist())
    with locked(place):
        parameters = predict.prepare(found.comp.root, trained.resolve(), place, cores, (found.comp, studies))
        if status := work(Run(place, parameters, resume, cores, snakefile="predict.smk")):
            raise SystemExit(status)
    members = [member["name"] for member in parameters["vit_members"]]
    for name in (*tables_of(members), "points", "sources", "slices"):
        write_table(out / f"predictions/{name}_test.parquet", predict.joined(parameters, name))
    return parameters


def evaluate(
    found: Labelled, trained: Path, out: Path, models: str, overlap: tuple[list[int], str], cores: int, resume: str
) -> dict[str, Any]:
    """Grade and score the studies of `found` by models called `models`; returns the content of evaluation.json.
    overlap: see `check_overlap`. Errors as of `grade`; RuntimeError where a cell of the notebook fails."""
    found = trained_for(found, trained)
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
    known_to = found.people["study_id"].isin(overlap[0])
    write_table(out / "tables/studies.parquet", found.people.assign(trained_on=known_to))
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
