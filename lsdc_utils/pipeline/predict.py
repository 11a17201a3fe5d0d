"""Grading the studies of any folder with a finished run: listed once, cut into shards, each graded by 05, then joined.

The folder given by `--out` holds

    tables/listed.json          what was looked through, so that an unchanged folder is not looked through again
    tables/findings.parquet     what was found in the folder's tables and headers
    tables/shard<k>.parquet     the studies of a shard with every file
    shards/<k>/                 what 05 wrote for the shard
    notebooks/, logs/           05 as executed for each shard
    submission.csv, grades.csv, findings.csv   the result, there only where all shards are done

A run needs no more than its weights and blend.json to be used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import metric
from lsdc_utils.data import competition
from lsdc_utils.data.listing import files_of
from lsdc_utils.files import atomic, write_json
from lsdc_utils.pipeline import steps
from lsdc_utils.vocabulary import GROUPS, SEVERITIES, parse_row_id

LARGEST_SHARD = 100  # studies: bounds the memory of a process and what a kill can lose
SMALLEST_SHARD = 20  # studies: fewer are graded sooner than another notebook starts
RESULTS = ("submission.csv", "grades.csv", "findings.csv")


class PredictError(ValueError):
    """A run or a folder that cannot be used; the message says what is missing."""


# ---- before: the run, the studies, the shards ----------------------------------------------------------------------


def read_recipe(run: Path) -> dict[str, Any]:
    """blend.json of a finished run; PredictError where it or weights are missing, with their names."""
    file = run / "blend.json"
    recipe = json.loads(file.read_text()) if file.is_file() else {}
    if recipe and "threads" not in recipe:
        raise PredictError(f"{file} was written by an older version: run 05 of this run again")
    names = [f"weights/yolo_{key}_fold{fold}.pt" for key in GROUPS for fold in recipe.get("folds", [])]
    names += [f"weights/vit3d_fold{fold}.safetensors" for fold in recipe.get("folds", [])]
    names += [str(Path(name).with_suffix(".json")) for name in names]
    if missing := [name for name in ("blend.json", *names) if not (run / name).is_file()]:
        raise PredictError(f"the run in {run} is not finished: it lacks {', '.join(missing)}")
    return recipe


def prepare(root: Path, run: Path, out: Path, cores: int) -> dict[str, Any]:
    """List what is to be graded, unless that was done, and return the parameters of the prediction.

    PredictError where the run is not finished, the folder holds no study, or `out` is of another folder.
    """
    recipe = read_recipe(run)
    record = out / "tables" / "listed.json"
    known = json.loads(record.read_text()) if record.is_file() else {"data_dir": str(root)}
    if known["data_dir"] != str(root):
        raise PredictError(f"{out} holds the grades of {known['data_dir']}: give another folder by --out")
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    state = {"data_dir": str(root), "digest": _digest(root)}
    if {name: known.get(name) for name in state} != state:
        record.unlink(missing_ok=True)
        known = state | {"n_shards": _list_studies(root, out, cores)}
        write_json(record, known)
    return steps.declared("05_ensemble_inference") | {
        "run_dir": str(run),
        "predict_dir": str(out),
        "data_dir": str(root),
        "weights_dir": str(run / "weights"),
        "n_shards": known["n_shards"],
        **graded_by(recipe),
    }


def graded_by(recipe: dict[str, Any]) -> dict[str, Any]:
    """The parameters of 05 under which a run's models grade new studies as blend.json, `recipe`, was fitted for."""
    same = {name: recipe[name] for name in ("folds", "vit_views", "threads")}
    return {"fit_blend": False, "blend_kind": recipe["kind"], **same}


def _digest(root: Path) -> str:
    """Hash of every file's path, size and time under `root`, and of the code that tells studies from them."""
    digest, seen = hashlib.sha256(), set()
    for folder, inner, files in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:  # a link back to a folder above
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        for name in sorted(files):
            with contextlib.suppress(OSError):  # a link to nothing
                found = os.stat(os.path.join(folder, name))
                digest.update(f"{folder}/{name} {found.st_size} {found.st_mtime_ns}\n".encode(errors="surrogateescape"))
    for file in sorted(steps.module_files("import lsdc_utils.predict")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _list_studies(root: Path, out: Path, workers: int) -> int:
    """Write the tables of shards and findings; return the number of shards.

    Of a folder with tables the test studies are graded, as by 05 itself; where there are none, and of any other folder,
    every study.
    """
    print(f"looking for studies in {root}", flush=True)
    try:
        comp = competition.read(root, workers=workers)
    except competition.CompetitionError as error:
        raise PredictError(str(error)) from error
    described = any((root / f"{split}_series_descriptions.csv").is_file() for split in competition.SPLITS)
    tested = described and (comp.series["split"] == "test").any()
    series = comp.series[comp.series["split"] == "test"] if tested else comp.series
    sampled = [int(parse_row_id(row)[0]) for row in comp.sample_rows] if tested else []
    studies = sorted({*series["study_id"].tolist(), *sampled})
    if not studies:
        raise PredictError(f"{root}: no study to grade; looked for tables of series and for DICOM files at any depth")
    count = max(-(-len(studies) // LARGEST_SHARD), min(workers, len(studies) // SMALLEST_SHARD), 1)
    for number, mine in enumerate(np.array_split(studies, count)):
        with atomic(out / "tables" / f"{steps.shard_name(number)}.parquet") as file:
            files_of(comp, series, mine.tolist()).to_parquet(file, index=False)
    findings = comp.findings[comp.findings["study_id"].isna() | comp.findings["study_id"].isin(studies)]
    with atomic(out / "tables" / "findings.parquet") as file:
        findings.to_parquet(file, index=False)
    print(f"{len(studies)} studies with {len(series)} series, in {count} shard{'s' * (count > 1)}", flush=True)
    if others := comp.series["study_id"].nunique() - series["study_id"].nunique():
        print(f"{others} training studies of the tables are passed over: give their folder of images to grade these")
    return count


# ---- after: one result ---------------------------------------------------------------------------------------------


def collect(out: Path, n_shards: int) -> str:
    """Join the shards' answers to submission.csv, grades.csv and findings.csv; return what a person should know.

    grades.csv: row_id, study_id, condition, level, natural probabilities, grade (the most probable severity), source
    (the models that graded the row, joined by +; expectation from the study's other rows; prior) and own_series (was
    the series there on which readers grade this condition).
    """
    folders = [out / "shards" / steps.shard_name(number) / "predictions" for number in range(n_shards)]
    natural, sources, problems = (
        pd.concat([pd.read_parquet(folder / f"{name}_test.parquet") for folder in folders], ignore_index=True)
        for name in ("ensemble", "sources", "findings")
    )
    grades = natural.merge(sources, on="row_id")
    keys = pd.DataFrame([parse_row_id(row) for row in grades["row_id"]], columns=["study_id", "condition", "level"])
    for place, name in enumerate(keys, start=1):
        grades.insert(place, name, keys[name])
    grades.insert(7, "grade", grades[list(SEVERITIES)].idxmax(axis=1))
    known = pd.read_parquet(out / "tables" / "findings.parquet")
    findings = pd.concat([known, problems], ignore_index=True).drop_duplicates()
    for name, table in (
        ("findings.csv", findings),
        ("grades.csv", grades),
        ("submission.csv", metric.weight_table(natural)),
    ):
        with atomic(out / name) as file:
            table.to_csv(file, index=False, float_format="%.9f")
    counts = grades["source"].value_counts()
    told = [f"{grades['study_id'].nunique()} studies graded, {len(grades)} rows:"]
    told += [f"  {count:>8} by {source}" for source, count in counts.items()]
    if away := int((~grades["own_series"]).sum()):
        told += [f"  {away:>8} of them without the series that the condition is read on"]
    if len(findings):
        told += ["findings: " + ", ".join(f"{n} {rule}" for rule, n in findings["rule"].value_counts().items())]
    return "\n".join(told)
