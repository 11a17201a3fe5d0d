"""Exports of a run's grades: a table and a DICOM structured report for each study, in a folder of its own.

exports/<study>/grades.csv   25 rows: natural probabilities, grade, source, point (LPS mm), label if known
exports/<study>/sr.dcm       the same as a DICOM SR by template TID 1500 (PS3.16), with references to key images
exports/<study>/images/      key images, only where the sources' own UIDs cannot be referred to
exports/<study>/uids.csv     their sources: file, frame and UIDs before and after
"""

import functools
import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pandas as pd

from lsdc_utils.data.competition import Competition
from lsdc_utils.export.images import UidCounts, count_uids, find_keys, write_images
from lsdc_utils.export.sr import make_report
from lsdc_utils.files import atomic_folder
from lsdc_utils.grading.basis import PHANTOM_ONLY, grade_basis
from lsdc_utils.grading.run_tables import BLOCKS, read_data, read_graded, read_recipe


class ExportError(ValueError):
    """Studies that cannot be exported; the message names the run or the study and the reason."""


def export_studies(run_dir: str | Path, studies: Iterable[int] | None = None, out: Path | None = None) -> pd.DataFrame:
    """Export studies of a finished run to `out` (default: <run>/exports); returns a row for each study: study_id,
    block, images_referred (in the SR), images_written, problem (what could not be read).

    studies: default: the test studies, or all graded out of fold if there are none. RunError if the run cannot be used;
    ExportError if it did not grade a study, if models that were trained on a phantom alone graded other studies, or if
    `out` lies in the data or holds anything but an export in place of a study's."""
    run, record = Path(run_dir), Path(run_dir) / "data.json"
    synthetic = record.is_file() and json.loads(record.read_text())["kind"] == "phantom"
    if not synthetic and grade_basis(run) == PHANTOM_ONLY:
        grades = f"grades by the models in {run} are {PHANTOM_ONLY}"
        raise ExportError(f"{grades}: no DICOM SR of a patient is made from them")
    adapted = "adapted" in read_recipe(run)
    tables = {key: read_graded(run, key) for key in BLOCKS if (run / f"predictions/sources_{key}.parquet").is_file()}
    if not tables:
        remedy = "it was adapted and keeps no study; use predict" if adapted else "run it to 05_ensemble_inference"
        raise ExportError(f"the run in {run} has no grades to export: {remedy}")
    comp, folder = read_data(run), (out or run / "exports").resolve()
    if folder != (run / "exports").resolve() and folder.is_relative_to(comp.root.resolve()):
        raise ExportError(f"{folder} lies in the folder of the data: give another one with --out")
    known = {int(study): block for block, table in tables.items() for study in table["study_id"].unique()}
    last = max(known.values(), default="")  # "test" comes after "oof"
    asked = [study for study, block in known.items() if block == last] if studies is None else list(studies)
    if unknown := [str(study) for study in asked if study not in known]:
        raise ExportError(f"the run in {run} did not grade {', '.join(unknown)}")
    for place in (folder / str(study) for study in asked):
        if place.exists() and not _is_export(place):
            raise ExportError(f"{place} is there, and no export wrote it: give another folder with --out")
    when = datetime.fromtimestamp((run / "scores.json").stat().st_mtime)
    counts, lines = functools.cache(lambda: count_uids(comp)), []
    for number, study in enumerate(sorted(asked), 1):
        rows = tables[known[study]].query("study_id == @study")
        lines.append(_export_study(comp, counts, rows, folder / str(study), when))
        if number % 20 == 0:
            print(f"exported study {number}/{len(asked)}", flush=True)
    return pd.DataFrame(lines, columns=["study_id", "block", "images_referred", "images_written", "problem"])


def _is_export(place: Path) -> bool:
    """Whether what lies in place of a study's folder is what an export wrote, and nothing else."""
    names = {file.name for file in place.iterdir()} if place.is_dir() else set()
    return "grades.csv" in names and names <= {"grades.csv", "sr.dcm", "images", "uids.csv"}


def _export_study(comp: Competition, counts: UidCounts, rows: pd.DataFrame, folder: Path, when: datetime) -> tuple:
    """Write one study's folder, complete or not at all; returns its row of `export_studies`."""
    keys, problems = find_keys(comp, counts, rows)
    new = {key.header.SOPInstanceUID: key for key in keys.values() if key.pixels is not None}
    with atomic_folder(folder) as beside:
        rows.drop(columns=["block"]).to_csv(beside / "grades.csv", index=False, float_format="%.6f")
        if keys:
            make_report(rows, keys, when).save_as(beside / "sr.dcm", enforce_file_format=True)
        else:
            problems.append("no image to refer to, so no sr.dcm was written")
        if new:
            write_images(list(new.values()), beside, when)
    referred = {key.header.SOPInstanceUID for key in keys.values()}
    return *rows[["study_id", "block"]].iloc[0], len(referred), len(new), "; ".join(problems)
