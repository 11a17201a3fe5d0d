"""A data folder in the competition's layout: its tables read, checked and put in order, its folds cut.

What tables alone tell is repaired here, and every repair is a line of the findings table: study_id, series_id, rule,
value, action (`validation` says what each rule means, and looks at the images). A grade is never changed: where it
cannot be read, it is missing.

    root/train.csv, train_label_coordinates.csv, train_series_descriptions.csv, test_series_descriptions.csv,
    sample_submission.csv, {train,test}_images/<study_id>/<series_id>/<instance_number>.dcm

A table or the images may be absent, as long as one of the two tables of series is there. Where images lie without
a table of series, or in any other folder of DICOM files, `archive` finds the series and tells their types.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import vocabulary as words
from lsdc_utils.data import unsorted

SPLITS = ("train", "test")
KEY = ["study_id", "condition", "level"]  # what a label and its point have in common
FINDINGS = ["study_id", "series_id", "rule", "value", "action"]
POINTS = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
EXCLUDE = ["study_id", "series_id", "condition", "level", "reason"]
CONDITION_WORDS = {word: c.name for c in words.CONDITIONS.values() for word in (c.title, c.name)}
LEVEL_WORDS = dict(zip(words.LEVEL_NAMES, words.LEVELS, strict=True)) | {level: level for level in words.LEVELS}


class CompetitionError(ValueError):
    """A data folder that cannot be used, with the table and the reason in words."""


@dataclass(frozen=True)
class Competition:
    """The tables of a data folder after repair; ids are ints.

    labels: study_id, condition, level, severity (0, 1, 2, -1 missing): 25 rows a training study, in the order of
        `vocabulary.COLUMNS`.
    coordinates: study_id, series_id, instance_number, condition, level, x, y (pixels): at most one row a label.
    series: study_id, series_id, series_type, split (train or test).
    sample_rows: the row ids that a submission must hold.
    findings: what was found in the tables and what was done about it.
    files: (study_id, series_id) -> the files of series that do not lie in the competition's layout.
    """

    root: Path
    labels: pd.DataFrame
    coordinates: pd.DataFrame
    series: pd.DataFrame
    sample_rows: list[str]
    findings: pd.DataFrame
    files: Mapping[tuple[int, int], tuple[Path, ...]] = field(default_factory=dict)

    def source(self, split: str, study_id: int, series_id: int) -> Path | tuple[Path, ...]:
        """What `dicom.read_series` reads of a series: its folder, or its files where it has no folder of its own."""
        return self.files.get((study_id, series_id)) or series_folder(self.root, split, study_id, series_id)


@dataclass
class Notes:
    """Collects findings while tables are read."""

    tables: list[pd.DataFrame] = field(default_factory=list)

    def add(self, rows: pd.DataFrame, rule: str, value: str | pd.Series, action: str) -> None:
        """One finding for each of `rows` (study_id, and series_id where it has one)."""
        if len(rows):
            value = value.astype(str).to_numpy() if isinstance(value, pd.Series) else value
            self.tables.append(rows.assign(rule=rule, value=value, action=action).reindex(columns=FINDINGS))

    def table(self) -> pd.DataFrame:
        """All findings; an id is <NA> where a finding has none."""
        found = pd.concat(self.tables, ignore_index=True) if self.tables else pd.DataFrame(columns=FINDINGS)
        return found.astype({"study_id": "Int64", "series_id": "Int64", "rule": str, "value": str, "action": str})


def names(rows: pd.DataFrame) -> pd.Series:
    """Condition and level of each row as one word, e.g. spinal_canal_stenosis_l1_l2."""
    return rows.condition.astype(str) + "_" + rows.level.astype(str)


def read(root: str | Path, exclude_csv: str | Path = "", points_csv: str | Path = "", workers: int = 1) -> Competition:
    """Read, check and repair the tables of a data folder; no answer beside the test tables is opened.

    Images are opened where no table says what they are: their headers, by `workers` processes (`unsorted.find`).

    exclude_csv: what to leave out: study_id, series_id (blank: the whole study), condition and level (blank: all; where
        one is given, points of these labels are not used, and their grades stay), reason.
    points_csv: points to use instead of the folder's own, in the columns of train_label_coordinates.csv.
    Raises CompetitionError where a table lacks a column or holds an id that is no number, where there is neither a
    table of series nor a series among the files, or where a line of the two files names what is not there.
    """
    root = Path(root)
    notes = Notes()
    series, files = _read_series_tables(root, notes, workers)
    sample_rows = _read_sample(root, series, notes)
    labels = _read_labels(root, notes)
    coordinates = _read_coordinates(root, notes)
    if points_csv:
        coordinates = _correct_points(coordinates, Path(points_csv), labels, series, notes)
    if exclude_csv:
        labels, coordinates, series = _leave_out(labels, coordinates, series, Path(exclude_csv), notes)
    coordinates = _check_points(coordinates, labels, series, notes)
    _check_series(series, labels, notes)
    return Competition(root, labels, coordinates, series, sample_rows, notes.table(), files)


def number_of(text: str) -> int | None:
    """The id that a text is, None where it is none that a table can hold."""
    return int(text) if text.isdecimal() and int(text) < 2**63 else None


def series_folder(root: str | Path, split: str, study_id: int, series_id: int) -> Path:
    """Where the DICOM files of a series lie."""
    return Path(root) / f"{split}_images" / str(study_id) / str(series_id)


def data_dir(run_dir: str | Path, data_dir: str = "") -> Path:
    """The data folder of a run: `data_dir` where it is given, else what 00_get_data recorded in <run_dir>/data.json."""
    if data_dir:
        folder = Path(data_dir)
    else:
        record = Path(run_dir) / "data.json"
        if not record.is_file():
            raise CompetitionError(f"{record} does not exist: run 00_get_data first, or give data_dir")
        folder = Path(os.path.normpath(Path(run_dir) / json.loads(record.read_text())["data_dir"]))
    if not folder.is_dir():
        raise CompetitionError(f"the data folder {folder} does not exist")
    return folder


def _read_table(file: Path, columns: Iterable[str], ids: Iterable[str] = ()) -> pd.DataFrame | None:
    """Columns of a csv as text, those of `ids` as int64; None where there is no such file."""
    if not file.is_file():
        return None
    try:
        table = pd.read_csv(file, dtype=str, skipinitialspace=True)
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError, OSError) as error:
        raise CompetitionError(f"{file}: cannot be read as a table ({error})") from None
    columns = list(columns)
    if lacking := [column for column in columns if column not in table]:
        raise CompetitionError(f"{file}: lacks the column(s) {', '.join(lacking)}")
    table = table[columns].copy()
    for column in ids:
        numbers = pd.to_numeric(table[column].astype(object), errors="coerce")  # of no rows: not text
        if (bad := ~(numbers.abs() < 2.0**63) | (numbers % 1 != 0)).any():
            line = int(np.flatnonzero(bad)[0])
            raise CompetitionError(
                f"{file}: {column} in line {line + 2} is {table[column].iloc[line]!r}, no whole number"
            )
        table[column] = numbers.astype("int64")
    return table


def _required(file: Path, columns: Iterable[str], ids: Iterable[str]) -> pd.DataFrame:
    """`_read_table` of a file that has to be there."""
    table = _read_table(file, columns, ids)
    if table is None:
        raise CompetitionError(f"{file}: there is no such file")
    return table


def _read_series_tables(
    root: Path, notes: Notes, workers: int
) -> tuple[pd.DataFrame, dict[tuple[int, int], tuple[Path, ...]]]:
    """study_id, series_id, series_type, split of both splits, and the files of series that have no folder of their own.

    Repeated series are left out. What is not in a table, or described in no known words, is told by its headers.
    """
    tables = {}
    for split in SPLITS:
        file = root / f"{split}_series_descriptions.csv"
        table = _read_table(file, ["study_id", "series_id", "series_description"], ["study_id", "series_id"])
        if table is not None:
            tables[split] = table.rename(columns={"series_description": "series_type"}).assign(split=split)
    columns = ["study_id", "series_id", "series_type", "split"]
    series = pd.concat([pd.DataFrame(columns=columns), *tables.values()], ignore_index=True)
    repeated = series.duplicated(["split", "study_id", "series_id"])
    notes.add(series[repeated], "series_repeated", series.series_type[repeated], "first line kept")
    series = series[~repeated].astype({"study_id": "int64", "series_id": "int64"})
    series["series_type"] = series.series_type.str.strip()
    unknown = series[~series.series_type.isin(words.SERIES_TYPES)]
    places = [(split, root / f"{split}_images") for split in SPLITS if split not in tables]
    places += [(row.split, series_folder(root, row.split, row.study_id, row.series_id)) for row in unknown.itertuples()]
    places = [place for place in places if place[1].is_dir()]
    found = unsorted.Found()
    if places or not tables:
        found = unsorted.find(root, places, workers)
        findings = pd.DataFrame(found.findings, columns=FINDINGS)
        told = findings.rule.isin(("series_passed_over", "study_without_series"))
        notes.tables.append(findings[~(told & findings.study_id.isin(series.study_id))])  # a line below says it
    kinds = {(row["split"], row["study_id"], row["series_id"]): row["series_type"] for row in found.series}
    for row in unknown.itertuples():
        kind = kinds.get((row.split, row.study_id, row.series_id))
        action = f"used as {kind}, by its images" if kind else "series left out"
        notes.add(unknown.loc[[row.Index]], "series_type_unknown", row.series_type, action)
    if not tables and not found.series:
        reasons = "".join(f"; {value}" for *_, value, _ in found.findings[:3])
        names = " and ".join(f"{split}_series_descriptions.csv" for split in SPLITS)
        raise CompetitionError(
            f"{root}: neither of {names} exists, and no sagittal T1, sagittal T2 or axial T2 series "
            f"is among the files{reasons or '; the folder holds no files'}"
        )
    series = pd.concat([series.drop(unknown.index), pd.DataFrame(found.series, columns=columns)], ignore_index=True)
    return series.astype({"study_id": "int64", "series_id": "int64"}), found.files


def _read_labels(root: Path, notes: Notes) -> pd.DataFrame:
    """Tidy labels of train.csv: study_id, condition, level, severity; no rows where there is no train.csv."""
    wide = _read_table(root / "train.csv", ["study_id", *words.COLUMNS], ["study_id"])
    keys = pd.DataFrame(
        [(c, level) for c in words.CONDITIONS for level in words.LEVELS], columns=["condition", "level"]
    )
    if wide is None:
        return keys.iloc[:0].assign(study_id=np.int64(0), severity=np.int64(0))[[*KEY, "severity"]]
    repeated = wide.study_id.duplicated()
    notes.add(wide[repeated], "study_repeated", "in train.csv", "first line kept")
    wide = wide[~repeated]
    grades = wide[list(words.COLUMNS)].stack(future_stack=True).str.strip()
    codes = grades.map({name: k for k, name in enumerate(words.SEVERITY_NAMES)})
    labels = keys.loc[np.tile(keys.index, len(wide))].reset_index(drop=True)
    labels.insert(0, "study_id", np.repeat(wide.study_id.to_numpy(), len(keys)))
    labels["severity"] = codes.fillna(words.MISSING).astype("int64").to_numpy()
    unknown = (grades.notna() & codes.isna()).to_numpy()
    notes.add(labels[unknown], "grade_unknown", grades[unknown], "read as missing")
    lacking = (labels.severity == words.MISSING).groupby(labels.study_id).sum().loc[lambda n: n > 0]
    notes.add(lacking.reset_index(), "labels_missing", lacking.map("{} of 25".format), "masked in loss and score")
    return labels


def _read_coordinates(root: Path, notes: Notes) -> pd.DataFrame:
    """The points of train_label_coordinates.csv in the project's words; what names nothing known is left out."""
    raw = _read_table(root / "train_label_coordinates.csv", POINTS, ["study_id", "series_id"])
    raw = pd.DataFrame(columns=POINTS) if raw is None else raw
    points, usable = _tidy_points(raw)
    text = raw.condition.fillna("") + " " + raw.level.fillna("")
    notes.add(raw[~usable], "point_unusable", text[~usable], "point left out")
    repeated = points.duplicated(KEY)
    notes.add(points[repeated], "point_repeated", names(points[repeated]), "first point kept")
    return points[~repeated].reset_index(drop=True)


def _tidy_points(raw: pd.DataFrame) -> tuple[pd.DataFrame, pd.Series]:
    """Points in the project's words and types, and which lines of `raw` gave one."""
    points = raw.copy()
    points["condition"] = points.condition.str.strip().map(CONDITION_WORDS)
    points["level"] = points.level.str.strip().map(LEVEL_WORDS)
    numbers = ["instance_number", "x", "y"]
    points[numbers] = points[numbers].apply(pd.to_numeric, errors="coerce").astype(float)
    usable = points.notna().all(axis=1) & np.isfinite(points[numbers].astype(float)).all(axis=1)
    usable &= points.instance_number % 1 == 0
    ids = ["study_id", "series_id", "instance_number"]
    return points[usable].astype(dict.fromkeys(ids, "int64") | {"x": "float64", "y": "float64"}), usable


def _correct_points(
    points: pd.DataFrame, file: Path, labels: pd.DataFrame, series: pd.DataFrame, notes: Notes
) -> pd.DataFrame:
    """Points with those of `file` in place of the labels' own, or added; CompetitionError where a line is wrong."""
    raw = _required(file, POINTS, ["study_id", "series_id"])
    given, usable = _tidy_points(raw)
    ours = set(series.loc[series.split == "train", ["study_id", "series_id"]].itertuples(index=False, name=None))
    lines = given[["study_id", "series_id"]].itertuples(index=False, name=None)
    faults = {
        "is no point: condition, level or a number cannot be read": ~usable,
        "names a study that train.csv does not hold": ~raw.study_id.isin(labels.study_id),
        "names a label that an earlier line has a point for": given.duplicated(KEY).reindex(
            raw.index, fill_value=False
        ),
        "names a series that is not one of the training study's": ~pd.Series(
            [line in ours for line in lines], given.index
        ),
    }
    for fault, wrong in faults.items():
        if wrong.any():
            raise CompetitionError(f"{file}: line {wrong.idxmax() + 2} {fault}")
    new = ~given.set_index(KEY).index.isin(points.set_index(KEY).index)
    for part, action in ((given[~new], "in place of the table's point"), (given[new], "added")):
        notes.add(part, "point_corrected", names(part), action)
    return pd.concat([given, points], ignore_index=True).drop_duplicates(KEY, ignore_index=True)


def _leave_out(
    labels: pd.DataFrame, points: pd.DataFrame, series: pd.DataFrame, file: Path, notes: Notes
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Labels, points and series without what `file` names; CompetitionError names a line that names nothing."""
    known = pd.concat([series[["study_id", "series_id"]], labels[["study_id"]].drop_duplicates()])
    for line, row in enumerate(_required(file, EXCLUDE, ["study_id"]).fillna("").itertuples(index=False), start=2):
        place, label = {"study_id": row.study_id}, {}
        if row.series_id:
            place["series_id"] = number_of(row.series_id) or -1
        if not _fits(known, place).any():
            named = " and ".join(f"{key} {getattr(row, key)}" for key in place)
            raise CompetitionError(f"{file}: line {line} names {named}, which the tables do not hold together")
        for key, meaning in (("condition", CONDITION_WORDS), ("level", LEVEL_WORDS)):
            if text := getattr(row, key).strip():
                if text not in meaning:
                    raise CompetitionError(f"{file}: line {line} names {key} {text!r}; known are {', '.join(meaning)}")
                label[key] = meaning[text]
        points = points[~_fits(points, place | label)]
        if not label:
            series = series[~_fits(series, place)]
        if not label and not row.series_id:
            labels = labels[~_fits(labels, place)]
        what = f"points not used: {' '.join(label.values())}" if label else "series" if row.series_id else "study"
        notes.add(pd.DataFrame([place]), "excluded", row.reason, what if label else f"{what} left out")
    return labels, points, series


def _fits(table: pd.DataFrame, values: Mapping[str, Any]) -> pd.Series:
    """Which rows hold these values."""
    return (table[list(values)] == pd.Series(values)).all(axis=1)


def _check_points(points: pd.DataFrame, labels: pd.DataFrame, series: pd.DataFrame, notes: Notes) -> pd.DataFrame:
    """Points against labels and series; those on a series that no table names are left out."""
    known = series.loc[series.split == "train", ["study_id", "series_id", "series_type"]]
    points = points.merge(known, how="left", on=["study_id", "series_id"])
    unknown = points.series_type.isna()
    notes.add(points[unknown], "point_on_unknown_series", names(points[unknown]), "point left out")
    points = points[~unknown]
    expected = points.condition.map({c.name: words.GROUPS[c.group].series_type for c in words.CONDITIONS.values()})
    other = points[expected != points.series_type]
    series_type = other.series_type.astype(str)
    notes.add(other, "point_on_other_series_type", names(other) + " on " + series_type, "kept for its place")
    both = labels.merge(points[[*KEY, "series_id"]], how="outer", on=KEY)
    bare = both[(both.severity == words.MISSING) | both.severity.isna()].dropna(subset="series_id")
    notes.add(bare, "point_without_grade", names(bare), "place kept, no grade")
    lacking = ((both.severity >= 0) & both.series_id.isna()).groupby(both.study_id).sum().loc[lambda n: n > 0]
    notes.add(lacking.reset_index(), "grade_without_point", lacking.map("{} of 25".format), "grade kept, no place")
    return points[POINTS].reset_index(drop=True)


def _check_series(series: pd.DataFrame, labels: pd.DataFrame, notes: Notes) -> None:
    """Each study should have one series of each type; findings where it has none or several."""
    counts = series.groupby(["split", "study_id", "series_type"]).size().unstack(fill_value=0)
    counts = counts.reindex(columns=list(words.SERIES_TYPES), fill_value=0).reset_index()
    for kind in words.SERIES_TYPES:
        notes.add(counts[counts[kind] == 0], "series_type_missing", kind, "graded from what is there")
        several = counts[counts[kind] > 1]
        notes.add(several, "series_type_repeated", several[kind].map(f"{{}} x {kind}".format), "all are used")
    trained = series.study_id[series.split == "train"]
    bare = labels.loc[~labels.study_id.isin(trained), ["study_id"]].drop_duplicates()
    notes.add(bare, "study_without_series", "in train.csv only", "labels kept")
    unlabelled = pd.DataFrame({"study_id": trained[~trained.isin(labels.study_id)].unique()})
    notes.add(unlabelled, "study_without_labels", "not in train.csv", "not trained on")


def _read_sample(root: Path, series: pd.DataFrame, notes: Notes) -> list[str]:
    """Row ids of sample_submission.csv, or those of all test studies where there is no such file."""
    studies = series.study_id[series.split == "test"].unique()
    sample = _read_table(root / "sample_submission.csv", ["row_id"])
    if sample is None:
        return [row for study in studies for row in words.study_row_ids(study)]
    rows = sample.row_id.dropna().str.strip().drop_duplicates().tolist()
    known = {str(study) for study in studies}
    absent = {row.partition("_")[0] for row in rows} - known
    bare = pd.DataFrame({"study_id": sorted(filter(None, map(number_of, absent)))})
    notes.add(bare, "study_without_series", "in sample_submission.csv only", "answered by the prior")
    return rows


def make_folds(labels: pd.DataFrame, n_splits: int, seed: int) -> pd.DataFrame:
    """Cut the studies of a label table into folds that are alike: study_id, fold (0 .. n_splits - 1).

    Alike in any-severe canal and in the counts of moderate and severe grades of each condition group. The studies with
    most findings are dealt first, n_splits at a time and one to each fold, each to the fold that lacks most of what the
    study has; so folds differ by one study at most. The same labels and seed give the same folds, in any order of rows.
    """
    group = labels.condition.map({c.name: c.group for c in words.CONDITIONS.values()})
    traits = pd.DataFrame({"study_id": labels.study_id})
    for key in words.GROUPS:
        for severity in (1, 2):
            traits[f"{key}_{severity}"] = ((group == key) & (labels.severity == severity)).astype(float)
    counts = traits.groupby("study_id").sum().sort_index()
    if not 2 <= n_splits <= len(counts):
        raise CompetitionError(f"cannot cut {len(counts)} studies into {n_splits} folds")
    counts["any_severe"] = (counts.scs_2 > 0).astype(float)
    share = (counts / counts.sum().clip(lower=1)).to_numpy()  # of all there is of a trait, what one study has
    order = np.random.default_rng(seed).permutation(len(share))
    order = order[np.argsort(-share[order].sum(axis=1), kind="stable")]
    fold = np.zeros(len(share), dtype="int64")
    held = np.zeros((n_splits, share.shape[1]))
    for start in range(0, len(order), n_splits):
        free = list(range(n_splits))
        for i in order[start : start + n_splits]:
            fold[i] = min(free, key=lambda k: (held[k] @ share[i], held[k].sum()))
            held[fold[i]] += share[i]
            free.remove(fold[i])
    return pd.DataFrame({"study_id": counts.index.to_numpy(dtype="int64"), "fold": fold})


def read_folds(file: str | Path) -> pd.DataFrame:
    """Published folds from a csv with the columns study_id and fold, one or more lines a study."""
    folds = _required(Path(file), ["study_id", "fold"], ["study_id", "fold"]).drop_duplicates()
    if (twice := folds.study_id[folds.study_id.duplicated()]).any():
        raise CompetitionError(f"{file}: study {twice.iloc[0]} is in more than one fold")
    return folds.reset_index(drop=True)


def mark_trained(labels: pd.DataFrame, suspects_csv: str | Path = "") -> pd.DataFrame:
    """The label table with the column `trained`: whether training uses a label; False for those of `suspects_csv`.

    suspects_csv: a table with the column row_id, such as suspect_labels.csv of a finished run. Raises CompetitionError
    where it lacks that column or names a row that is no label.
    """
    distrusted = _required(Path(suspects_csv), ["row_id"], []).row_id if suspects_csv else pd.Series([], dtype=str)
    if (unknown := ~distrusted.isin(labels.row_id)).any():
        raise CompetitionError(f"{suspects_csv}: no label has the row_id {distrusted[unknown].iloc[0]!r}")
    return labels.assign(trained=~labels.row_id.isin(distrusted))


def as_trained(labels: pd.DataFrame) -> pd.DataFrame:
    """The label table as training sees it: labels that it does not use have no grade; their points stay."""
    return labels.assign(severity=labels.severity.where(labels.trained, words.MISSING))
