"""Exports of a run's grades: a table and a DICOM structured report for each study, in a folder of its own.

exports/<study>/grades.csv   25 rows: natural probabilities, grade, source, point (LPS mm), label if known
exports/<study>/sr.dcm       the same as a DICOM SR by template TID 1500 (PS3.16), with references to key images
exports/<study>/images/      key images, only where the sources' own UIDs cannot be referred to
exports/<study>/uids.csv     their sources: file, frame and UIDs before and after
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import pandas as pd

from lsdc_utils.data.competition import Competition
from lsdc_utils.export.images import UidCount, find_keys, uid_counter, write_images
from lsdc_utils.export.sr import make_report
from lsdc_utils.grading.run_tables import BLOCKS, read_data, read_graded, read_recipe


class ExportError(ValueError):
    """Studies that cannot be exported; the message names the run or the study and the reason."""


def export_studies(
    run_dir: str | Path, study_ids: Iterable[int] | None = None, out: str | Path | None = None
) -> pd.DataFrame:
    """Export studies of a finished run to `out` (default: <run>/exports); returns a row for each study.

    study_ids: graded studies; default: the test studies, or all graded out of fold if there are none.
    A study's folder appears complete or not at all, and replaces an earlier one.
    Columns: study_id, block, images_referred (in the SR), images_written, problem (what could not be read).
    RunError if the run is not finished or was made by older code; ExportError if it did not grade a study.
    """
    run = Path(run_dir)
    read_recipe(run)
    tables = {
        block: read_graded(run, block) for block in BLOCKS if (run / f"predictions/sources_{block}.parquet").is_file()
    }
    if not tables:
        raise ExportError(f"the run in {run} has no grades: run it to 05_ensemble_inference")
    comp, folder = read_data(run), Path(out or run / "exports")
    known = {int(study): block for block, table in tables.items() for study in table["study_id"].unique()}
    default = "test" if len(tables.get("test", ())) else "oof"
    asked = [study for study, block in known.items() if block == default] if study_ids is None else list(study_ids)
    if unknown := [str(study) for study in asked if study not in known]:
        raise ExportError(f"the run in {run} did not grade {', '.join(unknown)}")
    when = datetime.fromtimestamp((run / "scores.json").stat().st_mtime)
    count_of, lines = uid_counter(comp), []
    for number, study in enumerate(sorted(asked), 1):
        rows = tables[known[study]].query("study_id == @study")
        lines.append(_export_study(comp, count_of, rows, folder / str(study), when))
        if number % 20 == 0:
            print(f"exported study {number}/{len(asked)}", flush=True)
    return pd.DataFrame(lines, columns=["study_id", "block", "images_referred", "images_written", "problem"])


def _export_study(comp: Competition, count_of: UidCount, rows: pd.DataFrame, folder: Path, when: datetime) -> tuple:
    """Write one study's folder; returns its row of `export_studies`."""
    study, block = int(rows["study_id"].iloc[0]), rows["block"].iloc[0]
    beside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    rows.drop(columns=["block"]).to_csv(beside / "grades.csv", index=False, float_format="%.6f")
    keys, problems = find_keys(comp, count_of, rows)
    new = {key.header.SOPInstanceUID: key for key in keys.values() if key.pixels is not None}
    if keys:
        report = make_report(rows, keys, when)
        report.save_as(beside / "sr.dcm", enforce_file_format=True)
        if new:
            write_images(new, beside, when)
    else:
        problems.append("no image to refer to, so no sr.dcm was written")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    referred = len({key.header.SOPInstanceUID for key in keys.values()})
    return study, block, referred, len(new), "; ".join(problems)
