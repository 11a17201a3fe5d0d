"""What is wrong with a data folder, and which label points teach no detector: `./run_all.sh validate` and 01 say it.

`competition.read` judges tables; here the header of every image is read, and points are judged by where they lie in the
patient: side against the canal, levels against each other. A grade is never changed. A point that cannot be right loses
its place in the label table, so that what a finding says is what the conversion to data sets does.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from lsdc_utils import dicom
from lsdc_utils import vocabulary as words
from lsdc_utils.data import unsorted
from lsdc_utils.data.competition import (
    FINDINGS,
    KEY,
    SPLITS,
    Competition,
    CompetitionError,
    Notes,
    names,
    number_of,
    read,
)
from lsdc_utils.files import atomic, readable
from lsdc_utils.parallel import each, usable_cores

RULES = {  # rule -> what a finding of it means
    # the tables
    "study_repeated": "the study has more than one line in train.csv",
    "series_repeated": "the series has more than one line in the table of series",
    "series_type_unknown": "the description in the table is none of the three series types",
    "series_type_missing": "the study has no series of this type",
    "series_type_repeated": "the study has several series of this type",
    "study_without_series": "the study is in a table, or has files, and no series that could be graded",
    "study_without_labels": "the training study has series and no line in train.csv",
    "grade_unknown": "the grade is none of Normal/Mild, Moderate, Severe",
    "labels_missing": "so many of the study's 25 grades are missing",
    "point_unusable": "condition, level or a number of the point cannot be read",
    "point_repeated": "the label has more than one point",
    "point_without_grade": "the label has a point and no grade",
    "grade_without_point": "so many of the study's grades have no point",
    "point_on_unknown_series": "the point lies on a series that the table of series does not hold",
    "point_on_other_series_type": "the point lies on a series of another type than its condition is graded on",
    "excluded": "left out because exclude.csv says so, for the reason given",
    "point_corrected": "the point comes from points.csv",
    # folders and files
    "images_missing": "there is no folder of images of this split",
    "study_not_on_disk": "the tables name the study, and it has no folder",
    "series_not_on_disk": "the tables name the series, and it has no folder",
    "study_not_in_tables": "the study has a folder, and no table names it",
    "series_not_in_tables": "the series has a folder, and the table of series does not name it",
    "study_uid_shared": "images of several patients have one StudyInstanceUID",
    "series_passed_over": "the series is none that is graded, for the reason given",
    "files_passed_over": "files in the folder are no DICOM images",
    "file_repeated": "several files hold the same image",
    "instance_number_repeated": "different images of one series have the same instance number",
    "file_unusable": "the file cannot be used as an image, for the reason given",
    "file_repaired": "something missing in the file's header was taken from the other files of its series",
    "series_unusable": "the series cannot be read, for the reason given",
    "shapes_mixed": "the series holds images of several sizes",
    "plane_differs": "the images lie in another plane than their description says",
    "contrast_differs": "the header describes another contrast than the table does",
    "spacing_outlier": "pixels, field of view or steps between slices have a size that no lumbar MR has",
    # points in images and in the patient
    "point_on_missing_instance": "the point lies on an image that is not there",
    "point_outside_image": "the point lies outside its image",
    "point_on_wrong_side": "the point lies on the other side of the canal than its condition says",
    "one_side_twice": "left and right point of a level lie on one side; this is the one on the wrong side",
    "levels_out_of_order": "the point lies below that of a lower level, or above that of a higher one",
    "level_points_apart": "the point lies far above or below where the other series have its level",
}
NO_PLACE = "grade kept, no place"

MARGIN = 3.0  # mm beyond the canal's middle that a point may lie on the other side: clicks and patients move
LEAN = 0.15  # mm more for each mm of height to the nearest place where the canal is known: spines lean
MIDDLE_MARGIN = 8.0  # mm, where the canal is only known to be near the middle of the sagittal slices
HALF_PAIR = 4.0  # mm from each of two points to their midpoint, below which that tells nothing of the canal
CANAL_REACH = 20.0  # mm along the body's axis over which what is known of the canal counts
LEVEL_APART = 25.0  # mm along the body's axis: points of one level lie within 16 on three series, levels 25 to 40 apart
PIXEL = (0.1, 3.0)  # mm: plausible distances of pixels,
FIELD = (80.0, 600.0)  # of the longer side of an image,
STEP = (0.3, 40.0)  # and of neighbouring slices; a stack may have one slice a disc
FEW_TASKS = 100  # so many series are read sooner than processes start
NONE = -1  # series or instance number of a label without a point
_HEADERS = (
    *("plane", "n_slices", "rows", "cols", "spacing_x", "spacing_y", "slice_step", "n_blocks"),
    *("first_instance", "last_instance", "instance_order", "n_skipped"),
)


@dataclass(frozen=True)
class Checked:
    """A data folder whose tables and headers were looked at.

    series: `Competition.series` with plane, n_slices (0 where no image could be read), rows, cols (of most slices),
        spacing_x, spacing_y, slice_step (mm; the median of distances between positions), n_blocks (parts of different
        tilt, or with a gap between them), first_instance, last_instance, instance_order (what instance numbers do along
        the sorted slices: up, down or mixed) and n_skipped (files that could not be used).
    labels: the training labels with their places: row_id, study_id, condition, level, severity (-1 missing), series_id,
        instance_number (-1 where the label has no point, or one that is not used), x, y (pixels), X, Y, Z (LPS mm). x
        and y are NaN without a point, X, Y and Z also where its image is not there.
    findings: what was found in tables and images, and what is done about it.
    """

    series: pd.DataFrame
    labels: pd.DataFrame
    findings: pd.DataFrame


def check(comp: Competition, workers: int = 1) -> Checked:
    """Read the header of every image, and judge the label points by where they lie in the patient.

    A header takes about half a millisecond and process; with `workers` above 1 a script needs Python's
    `if __name__ == "__main__"`.
    """
    notes = Notes([comp.findings])
    tasks = _tasks(comp, _on_disk(comp, notes))
    looked = [_Looked(*one) for one in each(_inspect, tasks, workers, FEW_TASKS, chunk=16)]
    problems = [(one.row["study_id"], one.row["series_id"], *problem) for one in looked for problem in one.problems]
    notes.tables.append(pd.DataFrame(problems, columns=FINDINGS))
    _check_folders(comp, notes)
    series = comp.series.merge(
        pd.DataFrame([one.row for one in looked], columns=["split", "study_id", "series_id", *_HEADERS]),
        how="left",
        on=["split", "study_id", "series_id"],
    )
    whole = ["n_slices", "rows", "cols", "n_blocks", "first_instance", "last_instance", "n_skipped"]
    series[whole] = series[whole].astype("float64").fillna(0).astype("int64")
    lengths = ["spacing_x", "spacing_y", "slice_step"]
    series = series.astype(dict.fromkeys(lengths, "float64") | {"plane": object, "instance_order": object})
    return Checked(series, _label_table(comp, looked, notes), notes.table())


def label_table(comp: Competition, workers: int = 1) -> pd.DataFrame:
    """The training labels with the places of those points that can be right, as in `Checked.labels`."""
    return check(comp, workers).labels


# ---- images ---------------------------------------------------------------------------------------------------------


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


class _Looked(NamedTuple):
    """What the headers of one series say."""

    row: dict[str, Any]  # a line of the series table
    problems: list[tuple[str, str, str]] = ()  # rule, value, action
    places: list[tuple[Any, ...]] = ()  # study_id, series_id, condition, level, X, Y, Z of points that may be used
    unplaced: list[tuple[Any, ...]] = ()  # study_id, condition, level of points that may not
    middle: float = np.nan  # patient x of the middle of sagittal slices, mm


def _on_disk(comp: Competition, notes: Notes) -> pd.DataFrame:
    """The series whose files are there; the others are noted, by study where nothing of it is there."""
    series = comp.series
    missing = [split for split in SPLITS if not (comp.root / f"{split}_images").is_dir()]
    keys = zip(series.study_id, series.series_id, strict=True)
    foldered = pd.Series([key not in comp.files for key in keys], series.index, dtype=bool)
    for split in missing:
        if ((series.split == split) & foldered).any():
            notes.add(pd.DataFrame({"study_id": [pd.NA]}), "images_missing", f"{split}_images", "tables only")
    series = series[~(series.split.isin(missing) & foldered)]
    sources = [comp.source(*key) for key in zip(series.split, series.study_id, series.series_id, strict=True)]
    there = pd.Series([not isinstance(source, Path) or source.is_dir() for source in sources], series.index, dtype=bool)
    any_there = there.groupby([series.split, series.study_id]).transform("any")
    gone = series[~any_there][["split", "study_id"]].drop_duplicates()
    notes.add(gone[["study_id"]], "study_not_on_disk", gone.split + "_images", "study left out")
    alone = series[~there & any_there]
    notes.add(alone, "series_not_on_disk", alone.series_type, "series left out")
    return series[there]


def _tasks(comp: Competition, series: pd.DataFrame) -> list[_Task]:
    """One task a series, with its own points."""
    points = defaultdict(list)
    for point in comp.coordinates.itertuples(index=False):
        points["train", point.study_id, point.series_id].append(_Point(*point))
    rows = series[["study_id", "series_id", "series_type", "split"]].to_dict("records")
    keys = [(row["split"], row["study_id"], row["series_id"]) for row in rows]
    return [_Task(comp.source(*key), row, points[key]) for key, row in zip(keys, rows, strict=True)]


def _inspect(task: _Task) -> _Looked:
    """Read the headers of one series: its line of the series table, what is wrong with it, places of its points."""
    row = dict(task.row)
    series_type = row.pop("series_type")
    labels = [(point.study_id, point.condition, point.level) for point in task.points]
    try:
        series = dicom.read_series(task.source, pixels=False)
    except dicom.DicomError as error:
        return _Looked(row, [("series_unusable", readable(error), "series left out")])
    found = [("file_unusable", readable(f"{file.name}: {reason}"), "file left out") for file, reason in series.skipped]
    found += [("file_repaired", readable(f"{file.name}: {what}"), "used as repaired") for file, what in series.repaired]
    shapes = Counter(image.shape for image in series.slices)
    if len(shapes) > 1:
        found.append(("shapes_mixed", ", ".join(f"{r} x {c}" for r, c in sorted(shapes)), "each kept as it is"))
    row |= _measures(series) | dict(zip(("rows", "cols"), shapes.most_common(1)[0][0], strict=True))
    if fault := spacing_fault(series):
        return _Looked(row, [*found, ("spacing_outlier", fault, "series left out")], unplaced=labels)
    if series.plane != words.PLANES[series_type]:
        found.append(("plane_differs", f"{series.plane}, described as {series_type}", "its points are not used"))
        return _Looked(row, found, unplaced=labels)
    if fault := _contrast_fault(series, series_type):
        found.append(("contrast_differs", fault, "used as the table says"))
    centres = [image.centre[0] for image in series.slices]
    middle = (min(centres) + max(centres)) / 2 if series.plane == "sagittal" else np.nan
    problems, places, unplaced = _places(task.points, series)
    return _Looked(row, found + problems, places, unplaced, float(middle))


def _measures(series: dicom.Series) -> dict[str, Any]:
    """What the series table tells besides the size of the images."""
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


def spacing_fault(series: dicom.Series) -> str:
    """What in the sizes of a series no lumbar MR has, or ''."""
    spacing = np.median([image.spacing for image in series.slices], axis=0)
    field = np.median([max(np.multiply(image.spacing, image.shape[::-1])) for image in series.slices])
    steps = series.steps()
    sizes = {"pixels": (spacing, PIXEL), "a field of view": (field, FIELD)}
    if len(steps):
        sizes["steps between slices"] = (np.median(steps), STEP)
    for what, (size, (least, most)) in sizes.items():
        if np.min(size) < least or np.max(size) > most:
            return f"{what} of {' x '.join(f'{mm:.3g}' for mm in np.atleast_1d(size))} mm"
    return ""


def _contrast_fault(series: dicom.Series, series_type: str) -> str:
    """Where the header's description names the other weighting alone, T1 against T2 or STIR, or ''."""
    try:
        named = unsorted.named_contrast(dicom.read_tags(series.slices[0].file))
    except dicom.DicomError:
        return ""
    expected = words.T1 if series_type == words.T1 else words.T2
    return f"{unsorted.SHORT[named]} in the header, described as {series_type}" if named not in (None, expected) else ""


def _places(points: list[_Point], series: dicom.Series) -> tuple[list[tuple[str, str, str]], list[tuple], list[tuple]]:
    """Points against the images they lie on: what is wrong with them, places of those in their images, and the others.

    The three are `_Looked.problems`, `_Looked.places` and `_Looked.unplaced`.
    """
    shapes = {image.instance_number: image.shape for image in series.slices}
    found, places, unplaced = [], [], []
    for point in points:
        label = point.study_id, point.condition, point.level
        rows, cols = shapes.get(point.instance_number, (0, 0))
        if -0.5 <= point.x <= cols - 0.5 and -0.5 <= point.y <= rows - 0.5:
            place = series.to_patient(point.instance_number, point.x, point.y)
            places.append((point.study_id, point.series_id, point.condition, point.level, *place))
            continue
        rule = "point_outside_image" if rows else "point_on_missing_instance"
        found.append((rule, f"{point.condition}_{point.level}", NO_PLACE))
        unplaced.append(label)
    return found, places, unplaced


def _check_folders(comp: Competition, notes: Notes) -> None:
    """Folders of studies and series that no table names."""
    named = comp.findings[["study_id", "series_id"]]  # those left out of the tables are there all the same
    series = {*zip(comp.series.study_id, comp.series.series_id, strict=True), *named.itertuples(index=False, name=None)}
    studies = {*comp.series.study_id, *comp.labels.study_id, *named.study_id.dropna()}
    for split in SPLITS:
        for folder in sorted((comp.root / f"{split}_images").glob("[!.]*/")):
            study = number_of(folder.name)
            if study not in studies:
                place = pd.DataFrame({"study_id": [study]}, dtype="Int64")
                notes.add(place, "study_not_in_tables", readable(f"{split}_images/{folder.name}"), "study left out")
                continue
            for inner in sorted(folder.glob("[!.]*/")):
                number = number_of(inner.name)
                if (study, number) not in series:
                    place = pd.DataFrame({"study_id": [study], "series_id": [number]}, dtype="Int64")
                    value = readable(f"{split}_images/{folder.name}/{inner.name}")
                    notes.add(place, "series_not_in_tables", value, "series left out")


# ---- points in the patient ------------------------------------------------------------------------------------------


def _label_table(comp: Competition, looked: list[_Looked], notes: Notes) -> pd.DataFrame:
    """The label table; points that cannot be right are noted and lose their place."""
    table = comp.labels.merge(comp.coordinates, how="left", on=KEY)
    table.insert(0, "row_id", table.study_id.astype(str) + "_" + names(table))
    places = [place for one in looked for place in one.places]
    places = pd.DataFrame(places, columns=["study_id", "series_id", "condition", "level", "X", "Y", "Z"])
    middles = {one.row["study_id"]: one.middle for one in looked if np.isfinite(one.middle)}
    places["rule"] = judge(places, middles)
    wrong = places[places["rule"] != ""]
    for rule in ("point_on_wrong_side", "one_side_twice", "levels_out_of_order", "level_points_apart"):
        notes.add(part := wrong[wrong["rule"] == rule], rule, names(part), NO_PLACE)
    places = places[[*KEY, "X", "Y", "Z"]].astype({"study_id": "int64"} | dict.fromkeys("XYZ", "float64"))
    table = table.merge(places, how="left", on=KEY)
    unused = {label for one in looked for label in one.unplaced} | set(wrong[KEY].itertuples(index=False, name=None))
    lost = [label in unused for label in table[KEY].itertuples(index=False, name=None)]
    ids = ["series_id", "instance_number"]
    table.loc[lost, [*ids, "x", "y", "X", "Y", "Z"]] = np.nan
    table[ids] = table[ids].fillna(NONE).astype("int64")
    return table[["row_id", *KEY, "severity", *ids, "x", "y", "X", "Y", "Z"]]


class _Place(NamedTuple):
    """Where a label's point lies in the patient, LPS mm."""

    series_id: int
    x: float
    z: float


_Places = dict[tuple[str, str], _Place]  # of one study: (condition, level) -> place


def judge(places: pd.DataFrame, middles: dict[int, float]) -> list[str]:
    """The rule that each point breaks, '' where none; the first of side, order of levels, distance of levels.

    places: study_id, series_id, condition, level, X, Y, Z (LPS mm), at most one row a label. middles: patient x of the
    middle of a study's sagittal slices, which stands in where nothing else tells where the canal is.
    """
    broken = {}
    for study, part in places.groupby("study_id"):
        rows = zip(part.condition, part.level, part.series_id, part.X, part.Z, strict=True)
        here = {(condition, level): _Place(*place) for condition, level, *place in rows}
        rules = (
            dict.fromkeys(_apart(here), "level_points_apart")
            | dict.fromkeys(_out_of_order(here), "levels_out_of_order")
            | _wrong_sides(here, middles.get(study))
        )
        broken |= {(study, *label): rule for label, rule in rules.items()}
    return [broken.get(label, "") for label in places[KEY].itertuples(index=False, name=None)]


def _wrong_sides(here: _Places, middle: float | None) -> dict[tuple[str, str], str]:
    """Points of one study on the wrong side of the canal -> rule.

    What is known of the canal are the points clicked on it and the midpoints of other pairs, left and right of a level.
    A pair whose left lies to the right of its right needs no more than itself.
    """
    pairs: dict[tuple[str, str], dict[str, _Place]] = defaultdict(dict)
    canal = []  # (group, level), z, x
    for (condition, level), place in here.items():
        kind = words.CONDITIONS[condition]
        if kind.side is None:
            canal.append(((kind.group, level), place.z, place.x))
        else:
            pairs[kind.group, level][kind.side] = place
    for key, pair in pairs.items():
        if len(pair) == 2 and abs(pair["left"].x - pair["right"].x) > 2 * HALF_PAIR:
            canal.append((key, *(sum(getattr(place, axis) for place in pair.values()) / 2 for axis in "zx")))
    found = {}
    for key, pair in pairs.items():
        known = [(z, x) for other, z, x in canal if other != key]
        z = sum(place.z for place in pair.values()) / len(pair)
        rule, sides = _judge_pair(pair, *_canal_x(known, z, middle))
        group, level = key
        conditions = {c.side: c.name for c in words.CONDITIONS.values() if c.group == group}
        found |= {(conditions[side], level): rule for side in sides}
    return found


def _canal_x(known: list[tuple[float, float]], z: float, middle: float | None) -> tuple[float | None, float]:
    """Patient x of the canal at height z, None where nothing tells, and the margin of a judgement by it; mm.

    known: (z, x) of points in the canal. Their median, each counting the more the nearer it is in height: one point
    clicked on the slice beside the canal's, 4 mm off, does not move it.
    """
    if not known:
        return middle, MIDDLE_MARGIN
    heights, xs = np.array(sorted(known, key=lambda point: point[1])).T
    off = (heights - z) / CANAL_REACH
    share = np.cumsum(np.exp(-(off**2 - (off**2).min()) / 2))
    low, high = np.searchsorted(share, share[-1] * np.array([0.5 - 1e-9, 0.5 + 1e-9]))
    return float(xs[low] + xs[high]) / 2, MARGIN + LEAN * CANAL_REACH * float(np.abs(off).min())


def _judge_pair(pair: dict[str, _Place], canal: float | None, margin: float) -> tuple[str, tuple[str, ...]]:
    """Rule that the points of one condition group and level break, and the sides that break it."""
    to_left = {side: place.x - canal if canal is not None else 0.0 for side, place in pair.items()}
    if len(pair) == 1:
        ((side, off),) = to_left.items()
        wrong = off < -margin if side == "left" else off > margin
        return "point_on_wrong_side", (side,) if wrong else ()
    if min(to_left.values()) > margin:
        return "one_side_twice", ("right",)
    if max(to_left.values()) < -margin:
        return "one_side_twice", ("left",)
    swapped = pair["left"].x - pair["right"].x < -2 * MARGIN
    return "point_on_wrong_side", words.SIDES if swapped else ()


def _out_of_order(here: _Places) -> set[tuple[str, str]]:
    """Points of one study without which each condition's levels follow each other from head to foot.

    The point that stands in wrong order with most others goes first; of two that only contradict each other, both go.
    """
    found = set()
    for condition in words.CONDITIONS:
        heights = {level: here[condition, level].z for level in words.LEVELS if (condition, level) in here}
        while True:
            wrong = Counter(
                level
                for upper in heights
                for lower in heights
                if words.LEVELS.index(upper) < words.LEVELS.index(lower) and heights[upper] <= heights[lower]
                for level in (upper, lower)
            )
            if not wrong:
                break
            worst = [level for level, count in wrong.items() if count == max(wrong.values())]
            found |= {(condition, level) for level in worst}
            heights = {level: z for level, z in heights.items() if level not in worst}
    return found


def _apart(here: _Places) -> set[tuple[str, str]]:
    """Points of one study that lie far in height from where most of at least two others see their level.

    The others are each other series, by its nearest point of the level, and the point of the other side.
    """
    found = set()
    for (condition, level), place in here.items():
        others = defaultdict(list)
        for kind in words.CONDITIONS:
            other = here.get((kind, level))
            if other is not None and kind != condition:
                source = kind if other.series_id == place.series_id else other.series_id
                others[source].append(abs(other.z - place.z))
        far = [min(offs) > LEVEL_APART for offs in others.values()]
        if len(far) >= 2 and sum(far) > len(far) / 2:
            found.add((condition, level))
    return found


# ---- the command ----------------------------------------------------------------------------------------------------


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Counts by rule, most first: rule, findings, studies, meaning, action, example (study, series: value)."""
    rows = []
    for (rule, action), part in findings.groupby(["rule", "action"], sort=False):
        first = part.iloc[0]
        place = "/".join(str(first[name]) for name in ("study_id", "series_id") if pd.notna(first[name]))
        example = ": ".join(filter(None, (place, first.value)))
        rows.append((rule, len(part), part.study_id.nunique(), RULES.get(rule, ""), action, example))
    columns = ["rule", "findings", "studies", "meaning", "action", "example"]
    return pd.DataFrame(rows, columns=columns).sort_values("findings", ascending=False, ignore_index=True)


def main(root: str | Path, out: str | Path | None = None, workers: int | None = None) -> int:
    """Check the folder `root`, print what is wrong with it, and write findings to the csv `out` where one is given.

    Returns 0 where the folder can be used, else 1: tables that cannot be read, or not one series of images.
    """
    workers = workers or usable_cores()
    try:
        comp = read(root, workers=workers)
        print(f"reading the headers of {len(comp.series)} series", flush=True)
        checked = check(comp, workers)
    except (CompetitionError, dicom.DicomError) as error:
        print(f"not usable: {error}")
        return 1
    series, findings = checked.series, checked.findings
    if out is not None:
        with atomic(out) as file:
            findings.to_csv(file, index=False)
    for split, part in series.groupby("split"):
        print(f"{split}: {part.study_id.nunique()} studies, {len(part)} series, {part.n_slices.sum()} images")
    if len(labels := checked.labels):
        print(f"labels: {(labels.severity >= 0).sum()} grades, {labels.X.notna().sum()} points with a usable place")
    print(*_told(summary(findings)), sep="\n")
    print(
        f"{len(findings)} findings: " + (f"written to {out}" if out else "give --out FILE.csv to have each as a line")
    )
    usable = (series.n_slices > 0).sum()
    if not usable:
        print("not usable: no image of any series can be read")
        return 1
    print(f"usable: {usable} of {len(series)} series can be read")
    return 0


def _told(counts: pd.DataFrame) -> Iterable[str]:
    """Lines on each rule that was broken."""
    for row in counts.itertuples():
        where = f" in {row.studies} studies" * bool(row.studies)
        yield f"\n{row.findings:7} x {row.rule}{where}: {row.action}"
        yield f"          {row.meaning}"
        yield f"          e.g. {row.example[:160]}"
    yield ""
