"""A data folder in the competition's layout: its tables read, checked and put in order, its folds cut.

Everything that is repaired is repaired here, and every repair is a line of the findings table: study_id, series_id,
rule, value, action. A grade is never changed: where it cannot be read, it is missing.

    root/train.csv, train_label_coordinates.csv, train_series_descriptions.csv, test_series_descriptions.csv,
    sample_submission.csv, {train,test}_images/<study_id>/<series_id>/<instance_number>.dcm

A table or the images may be absent, as long as one of the two tables of series is there.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lsdc_utils import dicom
from lsdc_utils import vocabulary as words

SPLITS = ("train", "test")
KEY = ["study_id", "condition", "level"]  # what a label and its point have in common
FINDINGS = ["study_id", "series_id", "rule", "value", "action"]
POINTS = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
FEW_TASKS = 100  # so many series are read sooner than processes start
NONE = -1  # series or instance number of a label without a point


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
class _Notes:
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


def read(root: str | Path) -> Competition:
    """Read, check and repair the tables of a data folder; no image is opened, and no answer beside the test tables.

    Raises CompetitionError where a table lacks a column or holds an id that is no number, or no table of series exists.
    """
    root = Path(root)
    notes = _Notes()
    series = _read_series_tables(root, notes)
    labels = _read_labels(root, notes)
    coordinates = _read_coordinates(root, notes)
    coordinates = _check_points(coordinates, labels, series, notes)
    _check_series(series, labels, notes)
    return Competition(root, labels, coordinates, series, _read_sample(root, series, notes), notes.table())


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
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise CompetitionError(f"{file}: cannot be read as a table ({error})") from None
    columns = list(columns)
    if lacking := [column for column in columns if column not in table]:
        raise CompetitionError(f"{file}: lacks the column(s) {', '.join(lacking)}")
    table = table[columns].copy()
    for column in ids:
        numbers = pd.to_numeric(table[column], errors="coerce")
        if (bad := numbers.isna() | (numbers % 1 != 0)).any():
            line = int(np.flatnonzero(bad)[0])
            raise CompetitionError(
                f"{file}: {column} in line {line + 2} is {table[column].iloc[line]!r}, no whole number"
            )
        table[column] = numbers.astype("int64")
    return table


def _read_series_tables(root: Path, notes: _Notes) -> pd.DataFrame:
    """study_id, series_id, series_type, split of both splits; unknown descriptions and repeated series left out."""
    tables = []
    for split in SPLITS:
        file = root / f"{split}_series_descriptions.csv"
        table = _read_table(file, ["study_id", "series_id", "series_description"], ["study_id", "series_id"])
        if table is not None:
            tables.append(table.rename(columns={"series_description": "series_type"}).assign(split=split))
    if not tables:
        raise CompetitionError(
            f"{root}: neither of {' and '.join(f'{s}_series_descriptions.csv' for s in SPLITS)} exists"
        )
    series = pd.concat(tables, ignore_index=True)
    repeated = series.duplicated(["split", "study_id", "series_id"])
    notes.add(series[repeated], "series_repeated", series.series_type[repeated], "first line kept")
    series = series[~repeated]
    series["series_type"] = series.series_type.str.strip()
    unknown = ~series.series_type.isin(words.SERIES_TYPES)
    notes.add(series[unknown], "series_type_unknown", series.series_type[unknown], "series left out")
    return series[~unknown].reset_index(drop=True)


def _read_labels(root: Path, notes: _Notes) -> pd.DataFrame:
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


def _read_coordinates(root: Path, notes: _Notes) -> pd.DataFrame:
    """The points of train_label_coordinates.csv in the project's words; what names nothing known is left out."""
    points = _read_table(root / "train_label_coordinates.csv", POINTS, ["study_id", "series_id"])
    points = pd.DataFrame(columns=POINTS) if points is None else points
    raw = points.copy()
    points["condition"] = points.condition.str.strip().map({c.title: c.name for c in words.CONDITIONS.values()})
    points["level"] = points.level.str.strip().map(dict(zip(words.LEVEL_NAMES, words.LEVELS, strict=True)))
    numbers = ["instance_number", "x", "y"]
    points[numbers] = points[numbers].apply(pd.to_numeric, errors="coerce")
    usable = points.notna().all(axis=1) & np.isfinite(points[numbers].astype(float)).all(axis=1)
    usable &= points.instance_number % 1 == 0
    text = raw.condition.fillna("") + " " + raw.level.fillna("")
    notes.add(raw[~usable], "point_unusable", text[~usable], "point left out")
    ids = ["study_id", "series_id", "instance_number"]
    points = points[usable].astype(dict.fromkeys(ids, "int64") | {"x": "float64", "y": "float64"})
    repeated = points.duplicated(KEY)
    notes.add(points[repeated], "point_repeated", _names(points[repeated]), "first point kept")
    return points[~repeated].reset_index(drop=True)


def _names(rows: pd.DataFrame) -> pd.Series:
    """Condition and level of each row as one word."""
    return rows.condition.astype(str) + "_" + rows.level.astype(str)


def _check_points(points: pd.DataFrame, labels: pd.DataFrame, series: pd.DataFrame, notes: _Notes) -> pd.DataFrame:
    """Points against labels and series; those on a series that no table names are left out."""
    known = series.loc[series.split == "train", ["study_id", "series_id", "series_type"]]
    points = points.merge(known, how="left", on=["study_id", "series_id"])
    unknown = points.series_type.isna()
    notes.add(points[unknown], "point_on_unknown_series", _names(points[unknown]), "point left out")
    points = points[~unknown]
    expected = points.condition.map({c.name: words.GROUPS[c.group].series_type for c in words.CONDITIONS.values()})
    other = points[expected != points.series_type]
    notes.add(other, "point_on_other_series_type", _names(other) + " on " + other.series_type, "kept for its place")
    both = labels.merge(points[[*KEY, "series_id"]], how="outer", on=KEY)
    bare = both[(both.severity == words.MISSING) | both.severity.isna()].dropna(subset="series_id")
    notes.add(bare, "point_without_grade", _names(bare), "place kept, no grade")
    lacking = ((both.severity >= 0) & both.series_id.isna()).groupby(both.study_id).sum().loc[lambda n: n > 0]
    notes.add(lacking.reset_index(), "grade_without_point", lacking.map("{} of 25".format), "grade kept, no place")
    _check_sides(points, notes)
    return points[POINTS].reset_index(drop=True)


def _check_sides(points: pd.DataFrame, notes: _Notes) -> None:
    """Left and right point of one level on one axial image: as shown to a reader, the patient's left is right."""
    axial = points[points.series_type == words.AXIAL]
    by_side = {side: axial[axial.condition == f"{side}_{words.SUBARTICULAR}"] for side in words.SIDES}
    pairs = by_side["left"].merge(by_side["right"], on=["study_id", "series_id", "instance_number", "level"])
    swapped = pairs[pairs.x_x < pairs.x_y]
    notes.add(swapped, "sides_swapped", swapped.level, "kept as given")


def _check_series(series: pd.DataFrame, labels: pd.DataFrame, notes: _Notes) -> None:
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


def _read_sample(root: Path, series: pd.DataFrame, notes: _Notes) -> list[str]:
    """Row ids of sample_submission.csv, or those of all test studies where there is no such file."""
    studies = series.study_id[series.split == "test"].unique()
    sample = _read_table(root / "sample_submission.csv", ["row_id"])
    if sample is None:
        return [row for study in studies for row in words.study_row_ids(study)]
    rows = sample.row_id.dropna().str.strip().drop_duplicates().tolist()
    known = {str(study) for study in studies}
    absent = {row.partition("_")[0] for row in rows} - known
    bare = pd.DataFrame({"study_id": sorted(int(study) for study in absent if study.isdigit())})
    notes.add(bare, "study_without_series", "in sample_submission.csv only", "answered by the prior")
    return rows


class _Point(NamedTuple):
    """A row of the coordinates."""

    study_id: int
    series_id: int
    instance_number: int
    condition: str
    level: str
    x: float
    y: float


@dataclass(frozen=True)
class _Task:
    """A series whose headers are to be read, with the label points on it."""

    source: Path | tuple[Path, ...]
    row: dict[str, Any]  # study_id, series_id, series_type, split
    points: list[_Point]


def scan(comp: Competition, workers: int = 1) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Read the header of every image: one line a series, and all findings, those of the tables included.

    The series table adds to `comp.series`: plane, n_slices (0 where no image could be read), rows, cols (of most
    slices), spacing_x, spacing_y, slice_step (mm; the median of distances between positions), n_blocks (parts of
    different tilt, or with a gap between them), first_instance, last_instance, instance_order (what instance numbers
    do along the sorted slices: up, down or mixed) and n_skipped (files that could not be used). A header takes about
    half a millisecond and process; with `workers` above 1 a script needs Python's `if __name__ == "__main__"`.
    """
    notes = _Notes([comp.findings])
    missing = [split for split in SPLITS if not (comp.root / f"{split}_images").is_dir()]
    for split in missing:
        if (comp.series.split == split).any():
            notes.add(pd.DataFrame({"study_id": [pd.NA]}), "images_missing", f"{split}_images", "tables only")
    found = _map(_inspect, _tasks(comp, comp.series[~comp.series.split.isin(missing)]), workers)
    table = comp.series.merge(
        pd.DataFrame([row for row, _ in found], columns=["split", "study_id", "series_id", *_HEADERS]),
        how="left",
        on=["split", "study_id", "series_id"],
    )
    problems = [(row["study_id"], row["series_id"], *problem) for row, several in found for problem in several]
    notes.tables.append(pd.DataFrame(problems, columns=FINDINGS))
    _check_folders(comp, notes)
    whole = ["n_slices", "rows", "cols", "n_blocks", "first_instance", "last_instance", "n_skipped"]
    table[whole] = table[whole].astype("float64").fillna(0).astype("int64")
    lengths = ["spacing_x", "spacing_y", "slice_step"]
    return table.astype(dict.fromkeys(lengths, "float64") | {"plane": object, "instance_order": object}), notes.table()


_HEADERS = (
    *("plane", "n_slices", "rows", "cols", "spacing_x", "spacing_y", "slice_step", "n_blocks"),
    *("first_instance", "last_instance", "instance_order", "n_skipped"),
)


def _tasks(comp: Competition, series: pd.DataFrame) -> list[_Task]:
    """One task a series, with its own points."""
    points = defaultdict(list)
    for point in comp.coordinates.itertuples(index=False):
        points["train", point.study_id, point.series_id].append(_Point(*point))
    rows = series[["study_id", "series_id", "series_type", "split"]].to_dict("records")
    keys = [(row["split"], row["study_id"], row["series_id"]) for row in rows]
    return [_Task(comp.source(*key), row, points[key]) for key, row in zip(keys, rows, strict=True)]


def _map(function: Callable[[_Task], Any], tasks: list[_Task], workers: int) -> list[Any]:
    """`function` of every task, in their order, by `workers` processes where that pays."""
    if workers <= 1 or len(tasks) < FEW_TASKS:
        return [function(task) for task in tasks]
    # Not forked from here, since a notebook's kernel has threads that a forked process would inherit in any state, but
    # from a server that has imported this module once for all.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(function, tasks, chunksize=16))


def _inspect(task: _Task) -> tuple[dict[str, Any], list[tuple[str, str, str]]]:
    """Headers of one series as a line of the series table, and what is wrong with it: rule, value, action."""
    row = dict(task.row)
    series_type = row.pop("series_type")
    try:
        series = dicom.read_series(task.source, pixels=False)
    except dicom.DicomError as error:
        return row, [("series_unusable", str(error), "series left out")]
    found = [("file_unusable", f"{file.name}: {reason}", "file left out") for file, reason in series.skipped]
    if series.plane != words.PLANES[series_type]:
        found.append(("plane_differs", f"{series.plane}, described as {series_type}", "used as described"))
    shapes = Counter(image.shape for image in series.slices)
    if len(shapes) > 1:
        found.append(("shapes_mixed", ", ".join(f"{r} x {c}" for r, c in sorted(shapes)), "each kept as it is"))
    row |= _measures(series) | dict(zip(("rows", "cols"), shapes.most_common(1)[0][0], strict=True))
    return row, found + _check_places(task.points, series)


def _measures(series: dicom.Series) -> dict[str, Any]:
    """What `scan` tells of a series besides the size of its images."""
    spacing = np.median([image.spacing for image in series.slices], axis=0)
    numbers = [image.instance_number for image in series.slices]
    turns = {int(turn) for turn in np.sign(np.diff(numbers))}
    steps = series.steps()
    return {
        "plane": series.plane,
        "n_slices": len(series.slices),
        "spacing_x": float(spacing[0]),
        "spacing_y": float(spacing[1]),
        "slice_step": float(np.median(steps)) if len(steps) else np.nan,
        "n_blocks": series.slices[-1].block + 1,
        "first_instance": min(numbers),
        "last_instance": max(numbers),
        "instance_order": "mixed" if len(turns) > 1 else "down" if turns == {-1} else "up",
        "n_skipped": len(series.skipped),
    }


def _check_places(points: list[_Point], series: dicom.Series) -> list[tuple[str, str, str]]:
    """Points against the images they lie on: rule, value, action."""
    shapes = {image.instance_number: image.shape for image in series.slices}
    found = []
    for point in points:
        name = f"{point.condition}_{point.level}"
        if point.instance_number not in shapes:
            found.append(("point_on_missing_instance", f"{name} on {point.instance_number}", "no place"))
            continue
        rows, cols = shapes[point.instance_number]
        if not (-0.5 <= point.x <= cols - 0.5 and -0.5 <= point.y <= rows - 0.5):
            found.append(("point_outside_image", name, "kept as given"))
    return found


def _check_folders(comp: Competition, notes: _Notes) -> None:
    """Folders of images that no table names."""
    known = set(comp.series[["split", "study_id", "series_id"]].itertuples(index=False, name=None))
    for split in SPLITS:
        for folder in sorted((comp.root / f"{split}_images").glob("*/*/")):
            ids = [part for part in folder.parts[-2:]]
            if all(part.isdigit() for part in ids) and (split, int(ids[0]), int(ids[1])) not in known:
                place = pd.DataFrame({"study_id": [int(ids[0])], "series_id": [int(ids[1])]})
                notes.add(place, "series_not_in_tables", f"{split}_images/{ids[0]}/{ids[1]}", "series left out")


def label_table(comp: Competition, workers: int = 1) -> pd.DataFrame:
    """The training labels with their places: row_id, study_id, condition, level, severity (-1 missing), series_id,
    instance_number (-1 where the label has no point), x, y (pixels), X, Y, Z (LPS mm).

    x and y are NaN without a point, X, Y and Z also where its image is not there. Reads the headers of the series that
    hold points, by `workers` processes as in `scan`.
    """
    table = comp.labels.merge(comp.coordinates, how="left", on=KEY)
    row_ids = table.study_id.astype(str) + "_" + table.condition + "_" + table.level
    table.insert(0, "row_id", row_ids)
    pointed = comp.series.merge(
        comp.coordinates[["study_id", "series_id"]].drop_duplicates(), on=["study_id", "series_id"]
    )
    pointed = pointed[pointed.split == "train"]
    places = [place for several in _map(_places, _tasks(comp, pointed), workers) for place in several]
    places = pd.DataFrame(places, columns=[*KEY, "X", "Y", "Z"])
    table = table.merge(places.astype({"study_id": "int64"} | dict.fromkeys("XYZ", "float64")), how="left", on=KEY)
    ids = ["series_id", "instance_number"]
    table[ids] = table[ids].fillna(NONE).astype("int64")
    return table[["row_id", *KEY, "severity", *ids, "x", "y", "X", "Y", "Z"]]


def _places(task: _Task) -> list[tuple[Any, ...]]:
    """study_id, condition, level, X, Y, Z (mm) of each point of a series whose image is there."""
    try:
        series = dicom.read_series(task.source, pixels=False)
    except dicom.DicomError:
        return []
    there = {image.instance_number for image in series.slices}
    return [
        (point.study_id, point.condition, point.level, *series.to_patient(point.instance_number, point.x, point.y))
        for point in task.points
        if point.instance_number in there
    ]


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
    folds = _read_table(Path(file), ["study_id", "fold"], ["study_id", "fold"])
    if folds is None:
        raise CompetitionError(f"{file}: there is no such file of folds")
    folds = folds.drop_duplicates()
    if (twice := folds.study_id[folds.study_id.duplicated()]).any():
        raise CompetitionError(f"{file}: study {twice.iloc[0]} is in more than one fold")
    return folds.reset_index(drop=True)
