"""A data folder in the competition's layout: its tables read, checked and repaired, each repair with a finding.

    root/train.csv, train_label_coordinates.csv, train_series_descriptions.csv, test_series_descriptions.csv,
    sample_submission.csv, {train,test}_images/<study_id>/<series_id>/<instance_number>.dcm

Tables or images may be absent. Without a table of series, in any folder of DICOM files, `unsorted` finds the series.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import vocabulary as words
from lsdc_utils.data import tables, unsorted
from lsdc_utils.data.tables import FINDINGS, KEY, CompetitionError, Findings, Table, read_required_table
from lsdc_utils.dicom import Frames
from lsdc_utils.files import write_table

SPLITS = ("train", "test")
POINTS = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
EXCLUDE = ["study_id", "series_id", "condition", "level", "reason"]
NONE = -1  # series or instance number where there is none


@dataclass(frozen=True)
class Competition:
    """The tables of a data folder after repair; ids are ints.

    labels: study_id, condition, level, severity (0, 1, 2, -1 missing): the 25 `COLUMNS` of each training study.
    coordinates: study_id, series_id, instance_number, condition, level, x, y (pixels): at most one row per label.
    series: study_id, series_id, series_type, split (train or test).
    sample_rows: the row ids that a submission must hold.
    findings: the faults of the tables, and what was done about each.
    files: (study_id, series_id) -> the files, or frames of them, of a series without a folder of its own.
    names: id -> the text that it is the number of, see `tables.number_of`; none where ids are numbers.
    """

    root: Path
    labels: Table
    coordinates: Table
    series: Table
    sample_rows: list[str]
    findings: Table
    files: Mapping[tuple[int, int], tuple[Path | Frames, ...]] = field(default_factory=dict)
    names: Mapping[int, str] = field(default_factory=dict)

    def source(self, split: str, study_id: int, series_id: int) -> Path | tuple[Path | Frames, ...]:
        """What `dicom.read_series` reads of a series: its folder, or its files if it has no folder of its own."""
        names = (self.names.get(number, number) for number in (study_id, series_id))
        return self.files.get((study_id, series_id)) or series_folder(self.root, split, *names)

    def write_ids(self, folder: Path) -> None:
        """Write study_ids.csv (study_id, id) to `folder`: the studies whose ids are text."""
        (folder / "study_ids.csv").unlink(missing_ok=True)
        if studies := sorted({*self.series["study_id"], *self.labels["study_id"]} & {*self.names}):
            table = pd.DataFrame({"study_id": studies, "id": map(self.names.get, studies)})
            write_table(folder / "study_ids.csv", table)


def label_names(rows: Table) -> pd.Series:
    """Condition and level of each row in one word, e.g. spinal_canal_stenosis_l1_l2."""
    return rows.condition.astype(str) + "_" + rows.level.astype(str)


def read(
    root: str | Path, exclude_csv: str | Path = "", points_csv: str | Path = "", workers: int = 1, labels_csv: Any = ""
) -> Competition:
    """Read, check and repair the tables of a data folder; answers beside the test tables are never opened.

    exclude_csv: what to leave out: study_id, series_id (blank: the whole study), condition and level (blank: all; if
        one is given, the points of these labels are not used, and their grades stay), reason.
    points_csv: points to use instead of the folder's own, in the columns of train_label_coordinates.csv.
    labels_csv: grades to use instead of train.csv, in any form of `tables.read_grades`.
    Raises CompetitionError if a table, or a line of the two files, cannot be used, or if there is no series.
    """
    root, findings = Path(root), Findings()
    labels = tables.read_grades(Path(labels_csv), findings) if labels_csv else read_labels(root, findings)
    series, files = _read_series_tables(root, findings, workers)
    sample_rows = _read_sample(root, series, findings)
    coordinates = _read_coordinates(root, findings)
    if points_csv:
        coordinates = _correct_points(coordinates, Path(points_csv), labels, series, findings)
    if exclude_csv:
        labels, coordinates, series = _leave_out(labels, coordinates, series, Path(exclude_csv), findings)
    coordinates = _check_points(coordinates, labels, series, findings)
    counts = series.groupby(["split", "study_id", "series_type"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=list(words.SERIES_TYPES), fill_value=0).reset_index()
    for kind in words.SERIES_TYPES:
        findings.add(counts[counts[kind] == 0], "series_type_missing", kind, "graded from the other series")
        several = counts[counts[kind] > 1]
        findings.add(several, "series_type_repeated", several[kind].map(f"{{}} x {kind}".format), "all are used")
    training = series.study_id if labels_csv else series.study_id[series.split == "train"]
    without_series = labels.loc[~labels.study_id.isin(training), ["study_id"]].drop_duplicates()
    findings.add(without_series, "study_without_series", "in train.csv only", "labels kept")
    without_labels = pd.DataFrame({"study_id": training[~training.isin(labels.study_id)].unique()})
    findings.add(without_labels, "study_without_labels", "not in train.csv", "not used for training")
    names = {number: name for number, name in findings.names.items() if name != str(number)}
    return Competition(root, labels, coordinates, series, sample_rows, findings.table(), files, names)


def series_folder(root: str | Path, split: str, study_id: int | str, series_id: int | str) -> Path:
    """The folder of a series' DICOM files."""
    return Path(root) / f"{split}_images" / str(study_id) / str(series_id)


def data_dir(run_dir: str | Path, data_dir: str = "") -> Path:
    """The data folder of a run: `data_dir` if given, otherwise the one that 00_get_data recorded in data.json."""
    folder = Path(data_dir)
    if not data_dir:
        record = Path(run_dir) / "data.json"
        if not record.is_file():
            raise CompetitionError(f"{record} does not exist: run 00_get_data first, or give data_dir")
        folder = Path(os.path.normpath(Path(run_dir) / json.loads(record.read_text())["data_dir"]))
    if not folder.is_dir():
        raise CompetitionError(f"the data folder {folder} does not exist")
    return folder


def _read_table(file: Path, columns: Sequence[str], ids: Sequence[str], names: dict[int, str]) -> Table:
    """As `read_required_table`; without rows where there is no file."""
    if file.is_file():
        return read_required_table(file, columns, ids, names)
    return pd.DataFrame(columns=columns, dtype="str").astype(dict.fromkeys(ids, "int64"))


def _read_series_tables(root: Path, findings: Findings, workers: int) -> tuple[Table, dict]:
    """The series, those not listed or in unknown words typed by headers, and files of those without own folder."""
    ids, files = ["study_id", "series_id"], {split: root / f"{split}_series_descriptions.csv" for split in SPLITS}
    columns, names = [*ids, "series_description"], findings.names
    parts = [_read_table(file, columns, ids, names).assign(split=split) for split, file in files.items()]
    listed = pd.concat(parts, ignore_index=True).rename(columns={"series_description": "series_type"})
    repeated = listed.duplicated(["split", *ids])
    findings.add(listed[repeated], "series_repeated", listed.series_type[repeated], "first line kept")
    listed = listed[~repeated]
    kinds = listed.series_type.fillna("").map(tables.plain).map({tables.plain(name): name for name in words.PLANES})
    listed = listed.assign(series_type=kinds.astype(object).fillna(listed.series_type)).astype({"split": object})
    unknown = listed[~listed.series_type.isin(words.SERIES_TYPES)]
    unlisted = [split for split in SPLITS if not files[split].is_file()]
    places = [(split, root / f"{split}_images") for split in unlisted]
    for row in unknown.itertuples():
        places.append((row.split, series_folder(root, row.split, names[row.study_id], names[row.series_id])))
    places = [(split, folder) for split, folder in places if folder.is_dir()]
    discovered = unsorted.find(root, places, workers, names) if places or len(unlisted) == 2 else unsorted.Discovered()
    if len(unlisted) == 2 and not discovered.series:
        reasons = "; ".join(value for *_, value, _ in discovered.findings[:3]) or "the folder holds no files"
        lacking = f"no {' or '.join(file.name for file in files.values())}, and no sagittal T1, sagittal T2 or axial T2"
        raise CompetitionError(f"{root}: there is {lacking} series among the files: {reasons}")
    table = pd.DataFrame(discovered.findings, columns=FINDINGS)
    covered = table.rule.isin(("series_skipped", "study_without_series")) & table.study_id.isin(listed.study_id)
    findings.tables += [table[~covered]] if len(table) else []
    types = {(row["split"], row["study_id"], row["series_id"]): row["series_type"] for row in discovered.series}
    for row in unknown.itertuples():
        series_type = types.get((row.split, row.study_id, row.series_id))
        action = f"used as {series_type}, by its headers" if series_type else "series left out"
        findings.add(unknown.loc[[row.Index]], "series_type_unknown", row.series_type, action)
    series = pd.concat([listed.drop(unknown.index), pd.DataFrame(discovered.series, columns=listed.columns)])
    return series.astype(dict.fromkeys(ids, "int64")).reset_index(drop=True), discovered.files


def read_labels(root: str | Path, findings: Findings | None = None) -> Table:
    """The labels of a data folder alone, see `Competition`; none without train.csv."""
    file = Path(root) / "train.csv"
    if file.is_file():
        return tables.read_grades(file, findings or Findings())
    return pd.DataFrame(columns=[*KEY, "severity"]).astype({"study_id": "int64", "severity": "int64"})


def graded_groups(labels: Table) -> set[str]:
    """The keys of the condition groups for which a label table holds a grade."""
    return set(labels.condition[labels.severity != words.MISSING].map(words.GROUP_OF))


def _read_coordinates(root: Path, findings: Findings) -> Table:
    """The points of train_label_coordinates.csv in the vocabulary's words, without unreadable and repeated ones."""
    raw = _read_table(root / "train_label_coordinates.csv", POINTS, ["study_id", "series_id"], findings.names)
    points, usable = _tidy_points(raw)
    text = raw.condition.fillna("") + " " + raw.level.fillna("")
    findings.add(raw[~usable], "point_unusable", text[~usable], "point left out")
    repeated = points.duplicated(KEY)
    findings.add(points[repeated], "point_repeated", label_names(points[repeated]), "first point kept")
    return points[~repeated].reset_index(drop=True)


def _tidy_points(raw: Table) -> tuple[Table, pd.Series]:
    """Points in the vocabulary's words and types, and which lines of `raw` could be read."""
    points = raw.copy()
    labels = (points.condition.fillna("") + " " + points.level.fillna("")).map(tables.named_label).astype(object)
    points["condition"], points["level"] = labels.str[0], labels.str[1]
    points["instance_number"] = points.instance_number.map(tables.whole_number, na_action="ignore").astype(float)
    for name in ("x", "y"):
        cells = points[name].astype(object)
        commas = cells[cells.str.contains(",", na=False)]
        if not (cells.str.contains(".", regex=False, na=False).any() or commas.str.fullmatch(r"\d\d?,\d{3}").all()):
            cells = cells.str.replace(",", ".", n=1)  # decimal commas; what may be thousands stays unreadable
        points[name] = pd.to_numeric(cells, errors="coerce").astype(float)
    usable = points.notna().all(axis=1) & np.isfinite(points[["x", "y"]]).all(axis=1)
    return points[usable].astype(dict.fromkeys(["study_id", "series_id", "instance_number"], "int64")), usable


def _read_sample(root: Path, series: Table, findings: Findings) -> list[str]:
    """Row ids of sample_submission.csv; without that file, those of all test studies."""
    studies = series.study_id[series.split == "test"].unique()
    file = root / "sample_submission.csv"
    if not file.is_file():
        return [row for study in studies for row in words.study_row_ids(study)]
    rows = read_required_table(file, ["row_id"]).row_id.dropna().drop_duplicates()
    listed = tables.row_keys(file, rows, findings.names)
    absent = pd.DataFrame({"study_id": sorted({*listed.study_id} - {*studies})})
    findings.add(absent, "study_without_series", "in sample_submission.csv only", "answered by the prior")
    return (listed.study_id.astype(str) + "_" + listed.label).tolist()


def _correct_points(points: Table, file: Path, labels: Table, series: Table, findings: Findings) -> Table:
    """Points with those of `file` replacing or added to the folder's own; CompetitionError names a wrong line."""
    raw = read_required_table(file, POINTS, ["study_id", "series_id"], findings.names)
    given, usable = _tidy_points(raw)
    ids = ["study_id", "series_id"]
    training = series[series.split == "train"].set_index(ids).index
    faults = {
        "is not a point: condition, level or a number cannot be read": ~usable,
        "names a study that train.csv does not hold": ~raw.study_id.isin(labels.study_id),
        "names a label that an earlier line has a point for": given.duplicated(KEY),
        "names a series that is not one of the training study's": ~given.set_index(ids).index.isin(training),
    }
    for fault, wrong in faults.items():
        if wrong.any():
            raise CompetitionError(f"{file}: line {raw.index[np.argmax(wrong)]} {fault}")
    new = ~given.set_index(KEY).index.isin(points.set_index(KEY).index)
    for part, action in ((given[~new], "replaces the table's point"), (given[new], "added")):
        findings.add(part, "point_corrected", label_names(part), action)
    return pd.concat([given, points], ignore_index=True).drop_duplicates(KEY, ignore_index=True)


def _leave_out(labels: Table, points: Table, series: Table, file: Path, findings: Findings) -> tuple[Table, ...]:
    """Labels, points and series without what `file` names; CompetitionError if a line names something unknown."""
    known = pd.concat([series[["study_id", "series_id"]], labels[["study_id"]].drop_duplicates()])
    accepted = {"condition": [c.title for c in words.CONDITIONS.values()], "level": words.LEVEL_NAMES}
    for row in read_required_table(file, EXCLUDE, ["study_id"], findings.names).fillna("").itertuples():
        line, place, label = row.Index, {"study_id": row.study_id}, {}
        if row.series_id:
            place["series_id"] = tables.number_of(row.series_id) or -1
        if not _matches(known, place).any():
            named = f"study_id {findings.names[row.study_id]}" + f" and series_id {row.series_id}" * bool(row.series_id)
            raise CompetitionError(f"{file}: line {line} names {named}, which the tables do not hold")
        for key, expected in accepted.items():
            if text := getattr(row, key):
                label[key], other = tables.named_label(text)[:: -1 if key == "level" else 1]
                if label[key] is None or other:
                    asked = f"known are {', '.join(expected)}"
                    raise CompetitionError(f"{file}: line {line} names {key} {text!r}; {asked}")
        points = points[~_matches(points, place | label)]
        action = f"points not used: {' '.join(label.values())}"
        if not label:
            series = series[~_matches(series, place)]
            labels = labels if row.series_id else labels[~_matches(labels, place)]
            action = "series left out" if row.series_id else "study left out"
        findings.add(pd.DataFrame([place]), "excluded", row.reason, action)
    return labels, points, series


def trained_rows(labels: Table, not_trained_csv: str | Path) -> pd.Series:
    """Whether each row of a label table (`checks.label_table`) is trained on: all but those that a line of a file fits.

    The file has the columns `EXCLUDE`. A line fits by the study, the series of the label's point, the condition (with
    a side, or both sides) and the level; what is blank fits all. The list may be of a larger data set than the folder,
    so ids need not be there. CompetitionError names a line that cannot be read, or that has no id.
    """
    described = [words.CONDITIONS[name] for name in labels.condition]
    known = labels[["study_id", "series_id", "level"]].assign(
        group=[condition.group for condition in described], side=[condition.side for condition in described]
    )
    kept, file = pd.Series(True, labels.index), Path(not_trained_csv)
    for row in read_required_table(file, EXCLUDE).fillna("").itertuples():
        given = {name: getattr(row, name) for name in ("study_id", "series_id") if getattr(row, name)}
        ids = {name: tables.number_of(text) for name, text in given.items()}
        label = tables.label_parts(f"{row.condition} {row.level}")
        if not ids or None in ids.values() or label is None:
            asked = "expected a study_id or series_id with all digits, and words for condition and level"
            raise CompetitionError(f"{file}: line {row.Index} cannot be read; {asked}")
        kept &= ~_matches(known, ids | label)
    return kept


def _matches(table: Table, values: Mapping[str, Any]) -> pd.Series:
    return (table[list(values)] == pd.Series(values)).all(axis=1)


def _check_points(points: Table, labels: Table, series: Table, findings: Findings) -> Table:
    """Points checked against labels and series; those on a series that no table names are left out."""
    training = series.loc[series.split == "train", ["study_id", "series_id", "series_type"]]
    points = points.merge(training, how="left", on=["study_id", "series_id"])
    unknown = points.series_type.isna()
    findings.add(points[unknown], "point_on_unknown_series", label_names(points[unknown]), "point left out")
    points = points[~unknown]
    expected = points.condition.map({c.name: words.GROUPS[c.group].series_type for c in words.CONDITIONS.values()})
    other = points[expected != points.series_type]
    value = label_names(other) + " on " + other.series_type.astype(str)
    findings.add(other, "point_on_other_series_type", value, "point used")
    both = labels.merge(points[[*KEY, "series_id"]], how="outer", on=KEY)
    ungraded = both[(both.severity == words.MISSING) | both.severity.isna()].dropna(subset="series_id")
    findings.add(ungraded, "point_without_grade", label_names(ungraded), "point kept, without a grade")
    missing = ((both.severity >= 0) & both.series_id.isna()).groupby(both.study_id).sum().loc[lambda n: n > 0]
    value = missing.map("{} of 25".format)
    findings.add(missing.reset_index(), "grade_without_point", value, "grades kept, not used to train detectors")
    return points[POINTS].reset_index(drop=True)


def read_points(file: Path) -> Table:
    """The usable points of a table with the columns `POINTS`, in the vocabulary's words."""
    return _tidy_points(read_required_table(file, POINTS, ["study_id", "series_id"]))[0]


def read_listed(root: str | Path, table: str | Path) -> Competition:
    """The studies of one shard as a Competition without labels, all as test studies."""
    listed = pd.read_parquet(table)
    series = listed.loc[listed["series_id"] != NONE, ["study_id", "series_id", "series_type"]].drop_duplicates()
    files, there = {}, listed[listed["file"] != b""]
    for *key, file, frames in there[["study_id", "series_id", "file", "frames"]].itertuples(index=False, name=None):
        path = Path(os.fsdecode(file))
        files.setdefault(tuple(key), []).append(Frames(path, tuple(map(int, frames))) if len(frames) else path)
    files = {key: tuple(parts) for key, parts in files.items()}
    series = series.assign(split="test").reset_index(drop=True)
    sample_rows = [row for study in listed["study_id"].unique() for row in words.study_row_ids(study)]
    labels, coordinates, findings = (pd.DataFrame(columns=names) for names in ([*KEY, "severity"], POINTS, FINDINGS))
    return Competition(Path(root), labels, coordinates, series, sample_rows, findings, files)
