"""The labelled studies of a folder, graded by a run's models: what `evaluate` scores and `adapt` fits a run to."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from lsdc_utils import metric
from lsdc_utils.data import checks, competition
from lsdc_utils.files import atomic
from lsdc_utils.pipeline import predict
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.run import Run, work

# raw_*: each model's own rows before the blend; a row without evidence is not there.
TABLES = ("ensemble", "yolo", "vit3d", "raw_yolo", "raw_vit3d", "points", "sources", "slices")


@dataclass(frozen=True)
class Labelled:
    """Labelled studies of a folder."""

    comp: competition.Competition  # the whole folder
    labels: pd.DataFrame  # row_id, study_id (int), condition, level, severity (0, 1 or 2): rows with a label and images
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

    Labels are those of `labels_csv` (row_id, severity), else those of train.csv and, of test studies, of a solution.csv
    beside the tables. UsageError where no study has one, CompetitionError where a table cannot be read.
    """
    comp = competition.read(root, workers=cores)
    answers, points = comp.labels[comp.labels["severity"] >= 0], [comp.coordinates]
    given = labels_csv or root / "solution.csv"
    if given.is_file() or labels_csv:
        solution = competition.read_solution(given)
        solution = metric.row_keys(solution["row_id"]).merge(solution, on="row_id").astype({"study_id": "int64"})
        answers = solution if labels_csv else pd.concat([answers, solution]).drop_duplicates(competition.KEY)
    if (file := root / "solution_coordinates.csv").is_file():
        points.append(competition.read_points(file))
    answers = answers[[*competition.KEY, "severity"]]
    answers.insert(0, "row_id", answers["study_id"].astype(str) + "_" + competition.label_names(answers))
    there = answers["study_id"].isin(comp.series["study_id"])
    if not there.any():
        place = labels_csv or f"{root}: train.csv or solution.csv"
        raise UsageError(f"{place}: no label of a study with images; expected row_id,severity with ids of its studies")
    points = pd.concat(points).drop_duplicates(competition.KEY)
    points = points[points["study_id"].isin(answers["study_id"])].reset_index(drop=True)
    lost = answers.loc[~there, "study_id"].nunique()
    return Labelled(comp, answers[there].reset_index(drop=True), points, lost)


def grade(found: Labelled, trained: Path, out: Path, cores: int, resume: str = "") -> Graded:
    """Grade the studies of `found` with the models of the run, or of the unpacked archive, in folder `trained`.

    They are graded in `out`/work, which resumes after a stop and may be deleted afterwards; the joined tables go to
    `out`/predictions. Errors as of `predict.prepare`; SystemExit where a step failed or was stopped.
    """
    place, studies = out / "work", sorted(found.labels["study_id"].unique().tolist())
    parameters = predict.prepare(found.comp.root, trained.resolve(), place, cores, (found.comp, studies))
    planned = Run(place, parameters, resume, cores, snakefile="predict.smk")
    if status := work(planned):
        raise SystemExit(status)
    shards = [Path(step.given["out_dir"]) for step in planned.steps]
    for name in TABLES:
        parts = [pd.read_parquet(shard / f"predictions/{name}_test.parquet") for shard in shards]
        with atomic(out / f"predictions/{name}_test.parquet") as file:
            pd.concat(parts, ignore_index=True).to_parquet(file, index=False)
    return Graded(out / "predictions", place, shards, parameters)


def label_table(found: Labelled, graded: Graded, cores: int) -> pd.DataFrame:
    """The labels with X, Y, Z (LPS mm) of the readers' points, NaN where there is none, as in `checks.label_table`."""
    root, tables = found.comp.root, graded.work / "tables"
    parts = [competition.read_listed(root, tables / f"{shard.name}.parquet") for shard in graded.shards]
    series = pd.concat([part.series for part in parts], ignore_index=True).assign(split="train")
    files = {key: source for part in parts for key, source in part.files.items()}
    labels = found.labels.drop(columns="row_id")
    whole = replace(found.comp, series=series, files=files, labels=labels, coordinates=found.points)
    return checks.label_table(whole, cores) if len(found.points) else found.labels.assign(X=None, Y=None, Z=None)


def level_prior(trained: Path, recipe: dict[str, Any], row_ids: pd.Series) -> pd.DataFrame:
    """The label-frequency baseline of a run for these rows: of its training labels, else that of its blend.json, which
    counts both sides together."""
    rows, labels = metric.row_keys(row_ids), trained / "tables/labels.parquet"
    if labels.is_file():
        return metric.prior_rows(pd.read_parquet(labels), rows)
    return rows.merge(pd.DataFrame(recipe["prior"]), on=["condition", "level"])[["row_id", *metric.PROBABILITIES]]
