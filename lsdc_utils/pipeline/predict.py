"""Grading the studies of any folder with a finished run: list them, cut them into shards, grade each by 05, join. The
folder given by `--out` holds tables/ (the files of each shard, findings), shards/<k>/ (what 05 wrote), and RESULTS once
all shards are done. Of the run only its weights and blend.json are needed."""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import metric
from lsdc_utils.data import competition
from lsdc_utils.data.stacks import read_study
from lsdc_utils.data.unsorted import walk
from lsdc_utils.dicom import Frames
from lsdc_utils.files import count_studies, readable, sha256, write_json, write_table
from lsdc_utils.grading.basis import basis_words
from lsdc_utils.grading.run_tables import read_graded, read_recipe
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import all_steps, declared, module_files
from lsdc_utils.vocabulary import SEVERITIES, parse_row_id

LARGEST_SHARD = 100  # studies: bounds the memory of a process and what a kill can lose
SMALLEST_SHARD = 20  # studies: fewer take less time than the start of another notebook
FEW_PAGES = 20  # studies up to which pages are written unasked
RESULTS = ("submission.csv", "grades.csv", "findings.csv")
Chosen = tuple[competition.Competition, list[int]]  # a folder as it was read, and the studies of it to grade


def prepare(root: Path, run: Path, out: Path, cores: int, chosen: Chosen | None = None) -> dict[str, Any]:
    """List what is to be graded, unless that is done, and return the parameters of the prediction. RunError or
    CompetitionError: run or tables cannot be used. UsageError: no study, or `out` is of another folder."""
    recipe, record = read_recipe(run), out / "tables" / "listed.json"
    listed = json.loads(record.read_text()) if record.is_file() else {"data_dir": str(root), "digest": ""}
    if listed["data_dir"] != str(root):
        raise UsageError(f"{out} holds the grades of {listed['data_dir']}: give another folder with --out")
    if listed["digest"] != (digest := f"{_digest(root)}{chosen[1] if chosen else ''}"):
        if record.is_file():
            write_json(record, listed | {"digest": ""})  # until the new tables are whole
        listed |= {"digest": digest, "n_shards": _list_studies(root, out, cores, chosen)}
        write_json(record, listed)
    for name in RESULTS:
        (out / name).unlink(missing_ok=True)
    shutil.rmtree(out / "pages", ignore_errors=True)
    if missing := recipe["missing_members"]:
        print(f"graded without the transformers {', '.join(missing)}, by a blend that was fitted without them")
    places = {"run_dir": run, "predict_dir": out, "data_dir": root, "weights_dir": run / "weights"}
    known = {name: str(place) for name, place in places.items()} | {"n_shards": listed["n_shards"]}
    return declared("05_ensemble_inference") | known | grading_parameters(recipe)


def grading_parameters(recipe: dict[str, Any]) -> dict[str, Any]:
    """The parameters of 05 that grade new studies with the models and the blend of `recipe`, a run's blend.json."""
    same = {name: recipe[name] for name in ("conditions", "folds", "vit_views", "threads")}
    members = [{"name": name} for name in recipe["members"]]
    return {"fit_blend": False, "published_method": recipe["kind"] == "published", "vit_members": members, **same}


def _digest(root: Path) -> str:
    """Hash of every file's path, size and time of change under `root`, and of the code that lists studies."""
    digest = hashlib.sha256()
    for file in walk(root, []):
        with contextlib.suppress(OSError):  # a broken link
            facts = file.stat()
            digest.update(f"{file} {facts.st_size} {facts.st_ctime_ns}\n".encode(errors="surrogateescape"))
    for file in [*sorted(module_files("from lsdc_utils.data import competition")), Path(__file__)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _list_studies(root: Path, out: Path, workers: int, chosen: Chosen | None) -> int:
    """Write the tables of shards and findings; return the number of shards. Graded are the chosen studies, else the
    test studies of a folder's tables, as by 05; without test studies or tables, every study."""
    print(f"listing studies in {root}", flush=True)
    comp, studies = chosen or (competition.read(root, workers=workers), ())
    series = comp.series
    described = any((root / f"{split}_series_descriptions.csv").is_file() for split in competition.SPLITS)
    if chosen:
        series = series[series["study_id"].isin(studies)]
    elif described and (series["split"] == "test").any():
        series = series[series["split"] == "test"]
        studies = {int(parse_row_id(row)[0]) for row in comp.sample_rows}
    studies = sorted({*studies, *series["study_id"].tolist()})
    if not studies:
        raise UsageError(f"{root}: no study to grade; looked for tables of series and for DICOM files at any depth")
    count = max(-(-len(studies) // LARGEST_SHARD), min(workers, len(studies) // SMALLEST_SHARD), 1)
    for number, shard in enumerate(np.array_split(studies, count)):
        write_table(out / f"tables/shard{number:03d}.parquet", files_of(comp, series, shard.tolist()))
    findings = comp.findings[comp.findings["study_id"].isna() | comp.findings["study_id"].isin(studies)]
    write_table(out / "tables/findings.parquet", findings)
    comp.write_ids(out)
    print(f"{count_studies(len(studies))} with {len(series)} series, in {count} shard{'s' * (count > 1)}", flush=True)
    others = 0 if chosen else comp.series["study_id"].nunique() - series["study_id"].nunique()
    if others:
        print(f"skipped: {count_studies(others, 'training')} of the tables; to grade them, give their folder of images")
    return count


def joined(parameters: dict[str, Any], name: str) -> pd.DataFrame:
    """A table that 05 wrote for each shard of a prediction, as one."""
    files = (Path(step.given["out_dir"], f"predictions/{name}_test.parquet") for step in all_steps(parameters))
    return pd.concat(map(pd.read_parquet, files), ignore_index=True)


def listed_studies(parameters: dict[str, Any]) -> competition.Competition:
    """The studies of all shards of a prediction, all as test studies."""
    tables = [step.given["studies_table"] for step in all_steps(parameters)]
    comps = [competition.read_listed(parameters["data_dir"], table) for table in tables]
    files = {key: source for comp in comps for key, source in comp.files.items()}
    return replace(comps[0], series=pd.concat([comp.series for comp in comps], ignore_index=True), files=files)


def collect(parameters: dict[str, Any], basis: str) -> tuple[str, int, int]:
    """Join the answers of the shards to RESULTS; return a summary, the number of studies, and of those with uncertain
    levels. parameters: those of `prepare`. The findings are `without_names`; tables/ and the shards keep them.

    grades.csv: row_id, study_id, condition, level, natural probabilities, grade (the most probable severity), source
    (models joined by +, or prior), own_series (whether the study has the series on which this condition is read),
    level_confidence (probability that levels are named right; empty where none was found), grade_basis."""
    out, tables = Path(parameters["predict_dir"]), ("ensemble", "sources", "findings", "points")
    natural, sources, problems, points = (joined(parameters, name) for name in tables)
    keys = metric.row_keys(natural["row_id"])[["row_id", "study_id", "condition", "level"]]
    grades = natural.assign(grade=natural[list(SEVERITIES)].idxmax(axis=1))
    grades = keys.merge(grades, on="row_id").merge(sources, on="row_id")
    sure = points.groupby(points["study_id"].astype(str))["level_confidence"].min()
    grades["level_confidence"] = grades["study_id"].map(sure).astype(float)
    grades["grade_basis"] = basis
    findings = pd.concat([pd.read_parquet(out / "tables" / "findings.parquet"), problems]).drop_duplicates()
    findings["value"] = without_names(findings["value"], Path(parameters["data_dir"]))
    for name, table in zip(RESULTS, (metric.weight_table(natural), grades, findings), strict=True):
        write_table(out / name, table, float_format="%.9f")
    lines = [f"{count_studies(grades['study_id'].nunique())} graded, {len(grades)} rows:"]
    lines += [f"  {count:>8} by {source}" for source, count in grades["source"].value_counts().items()]
    if count := int((~grades["own_series"]).sum()):
        lines += [f"  {count:>8} of them without the series that the condition is read on"]
    if len(findings):
        lines += ["findings: " + ", ".join(f"{n} {rule}" for rule, n in findings["rule"].value_counts().items())]
    uncertain = findings.loc[findings["rule"] == "levels_uncertain", "study_id"].nunique()
    return "\n".join([*lines, basis_words(basis)]), grades["study_id"].nunique(), uncertain


def without_names(texts: pd.Series, root: Path) -> pd.Series:
    """The texts with '[name]' for `root`, its name, and each name with two letters or six digits in a row of a file or
    folder under it, even where such a name is an ordinary word."""
    parts = {part for file in walk(root, []) for part in file.relative_to(root).parts}
    parts = {readable(part) for part in parts if re.search(r"[^\W\d_]{2}|\d{6}", Path(part).stem)}
    whole = "\n".join(texts.astype(str))
    there = [name for name in {str(root), root.name, *parts} if name in whole]
    pattern = "|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(there, key=len, reverse=True))
    return texts.replace(pattern, "[name]", regex=True) if there else texts


def write_pages(parameters: dict[str, Any], name: str, basis: str, evaluated: Path | None = None) -> Path:
    """Write the pages of the studies that `collect` joined, graded by models called `name`; returns their index.
    evaluated: the folder of results of an evaluation, whose report is written instead."""
    from lsdc_utils.report.pages import write_study_pages

    out, comp, findings = Path(parameters["predict_dir"]), listed_studies(parameters), {}
    graded = [evaluated] if evaluated else [step.given["out_dir"] for step in all_steps(parameters)]
    rows = pd.concat([read_graded(place, "test") for place in graded])
    told = pd.read_csv(out / "findings.csv", dtype={"study_id": "Int64"})[["study_id", "rule", "value"]]
    for study, rule, value in told.dropna().to_numpy():
        findings.setdefault(int(study), []).append((rule, value))
    weights, read = Path(parameters["weights_dir"]), lambda study: read_study(comp, "test", study)[0]
    shown = (evaluated / "report", evaluated / "notebooks/evaluate.ipynb") if evaluated else (out / "pages", None)
    return write_study_pages(shown[0], name, rows, read, weights, basis, findings, shown[1])


def files_of(comp: competition.Competition, series: pd.DataFrame, studies: Iterable[int]) -> pd.DataFrame:
    """The files of the studies: study_id, series_id, series_type, file (bytes: a name need not be UTF-8), frames (those
    read; none: all), sha256. A series without files, or a study without series, has one line with an empty file."""
    lines, nothing, by_study = [], (b"", (), ""), dict(list(series.groupby("study_id")))
    for study_id in studies:
        if study_id not in by_study:
            lines.append((study_id, competition.NONE, "", *nothing))
            continue
        for row in by_study[study_id].itertuples():
            source = comp.source(row.split, study_id, row.series_id)
            if isinstance(source, Path):
                inside = source.iterdir() if source.is_dir() else ()
                source = sorted(file for file in inside if file.is_file() and not file.name.startswith("."))
            parts = [part if isinstance(part, Frames) else Frames(part, ()) for part in source]
            known = [sha256(part.file) if os.access(part.file, os.R_OK) else "" for part in parts]
            facts = [(os.fsencode(part.file), part.frames, content) for part, content in zip(parts, known, strict=True)]
            lines += [(study_id, row.series_id, row.series_type, *fact) for fact in facts or [nothing]]
    return pd.DataFrame(lines, columns=["study_id", "series_id", "series_type", "file", "frames", "sha256"])
