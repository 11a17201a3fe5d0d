"""The faults of a data folder, for `./run_all.sh validate` and 01_eda, and the label table without wrong points: those
that cannot be right by their place in the patient (`point_rules`). A grade is never changed."""

from collections import Counter, defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import dicom
from lsdc_utils import vocabulary as words
from lsdc_utils.data import competition
from lsdc_utils.data.competition import FINDINGS, KEY, NONE, POINTS, Competition, Findings, label_names
from lsdc_utils.data.parts import select
from lsdc_utils.data.point_rules import judge
from lsdc_utils.data.series_types import SHORT
from lsdc_utils.data.stacks import plane_and_contrast, spacing_fault
from lsdc_utils.data.tables import number_of
from lsdc_utils.files import count_studies, readable, write_table
from lsdc_utils.parallel import each, usable_cores

# rule -> what a finding of it means: rules of tables, of folders and files, of points in images and in the patient
RULES = pd.read_csv(Path(__file__).with_name("rules.csv"), index_col="rule")["meaning"].to_dict()
POINT_UNUSED = "point not used, grade kept"

FEW_SERIES = 100  # below this, starting processes takes longer than reading
SERIES = ["split", "study_id", "series_id"]  # identify a series
COLUMNS = (  # of the series table, from headers
    *("plane", "n_slices", "rows", "cols", "spacing_x", "spacing_y", "slice_step", "n_blocks"),
    *("first_instance", "last_instance", "instance_order", "n_skipped"),
)
TYPES = {"plane": object, "spacing_x": float, "spacing_y": float, "slice_step": float, "instance_order": object}
COUNTS = [name for name in COLUMNS if name not in TYPES]  # 0 if no image can be read


@dataclass(frozen=True)
class Checked:
    """A data folder whose tables and headers were checked.

    series: `Competition.series` with `COLUMNS`: n_slices (0 if no image can be read), rows, cols (of most slices),
        medians of spacings and slice_step (mm), n_blocks (parts of different tilt, or separated by a gap),
        instance_order (of instance numbers along the sorted slices: up, down or mixed), n_skipped (unusable files).
    labels: the training labels with their places: row_id, study_id, condition, level, severity (-1 missing), series_id,
        instance_number (-1 without a usable point), x, y (pixels), X, Y, Z (LPS mm). x and y are NaN without a usable
        point; X, Y and Z also if its image is not there.
    findings: the faults of tables and images, and what is done about each.
    """

    series: pd.DataFrame
    labels: pd.DataFrame
    findings: pd.DataFrame


def check(comp: Competition, workers: int = 1) -> Checked:
    """Read the header of every image, and check the label points by their place in the patient."""
    findings, points = Findings([comp.findings]), defaultdict(list)
    for point in comp.coordinates[POINTS].itertuples(index=False, name=None):
        points["train", *point[:2]].append(point)
    tasks = []
    for row in _on_disk(comp, findings)[[*SERIES, "series_type"]].to_dict("records"):
        key = tuple(row[name] for name in SERIES)
        tasks.append((comp.source(*key), row, points[key]))
    read = list(each(_read_headers, tasks, workers, FEW_SERIES, chunk=16))
    faults = [(row["study_id"], row["series_id"], *fault) for row, faults, _ in read for fault in faults]
    known = pd.concat([comp.series, comp.findings])  # findings name those left out of the tables
    listed = set(known[["study_id", "series_id"]].itertuples(index=False, name=None))
    studies = {*known.study_id.dropna(), *comp.labels.study_id}
    read_of = {getattr(file, "file", file).parent for source in comp.files.values() for file in source}
    used = {folder for inner in read_of for folder in (inner, *inner.parents)}
    for split in competition.SPLITS:
        for folder in sorted((comp.root / f"{split}_images").glob("[!.]*/")):
            study, value = number_of(folder.name), readable(f"{split}_images/{folder.name}")
            if folder not in used and study not in studies:
                study = study if str(study) == folder.name else None
                faults.append((study, None, "study_not_in_tables", value, "study left out"))
                continue
            for inner in sorted(folder.glob("[!.]*/")):
                series_id, of_series = number_of(inner.name), readable(f"{value}/{inner.name}")
                if inner not in used and (study, series_id) not in listed:
                    faults.append((study, series_id, "series_not_in_tables", of_series, "series left out"))
    findings.tables.append(pd.DataFrame(faults, columns=FINDINGS, dtype=object))  # which keeps every digit of an id
    headers = pd.DataFrame([row for row, *_ in read], columns=[*SERIES, *COLUMNS, "middle"])
    series = comp.series.merge(headers.drop(columns="middle"), "left", SERIES)
    series[COUNTS] = series[COUNTS].astype("float64").fillna(0)
    series = series.astype(TYPES | dict.fromkeys(COUNTS, "int64"))
    placed = pd.DataFrame([point for *_, points in read for point in points], columns=[*POINTS, *"XYZ"])
    middles = headers.dropna(subset="middle").set_index("study_id").middle.to_dict()
    return Checked(series, _label_table(comp, placed, middles, findings), findings.table())


def label_table(comp: Competition, workers: int = 1) -> pd.DataFrame:
    """The training labels with the places of usable points, as in `Checked.labels`."""
    return check(comp, workers).labels


def taken_models(labels: pd.DataFrame, conditions: Collection[str], points_from: str = "") -> list[str]:
    """Which models are taken from another run, since the label table has no points to train them: localiser and yolo,
    if no label of `conditions` (keys of GROUPS) has one or `points_from` asks for it; localiser, unless two studies (or
    folds, in that column) have levels with a canal point or both foramen points."""
    placed = labels[labels.X.notna()]
    group = placed.condition.map(words.GROUP_OF)
    if points_from or not group.isin(conditions).any():
        return ["localiser", "yolo"]
    sides = placed.groupby(["study_id", "level", group]).size().unstack(fill_value=0)
    levels = (sides.reindex(columns=["scs", "nfn"], fill_value=0) >= [1, len(words.SIDES)]).any(axis=1)
    counts = levels.groupby("study_id").sum()
    known = labels[labels.study_id.isin(counts.index[counts > 1])]
    return [] if known["fold" if "fold" in labels else "study_id"].nunique() > 1 else ["localiser"]


def wanted(labels: pd.DataFrame, conditions: Collection[str], points_from: str) -> tuple[list[str], list[str]]:
    """The condition groups to train (`vocabulary.groups_of`) by a label table, and their `taken_models`."""
    groups = words.groups_of(conditions, competition.graded_groups(labels))
    return groups, taken_models(labels, groups, points_from)


def untrainable(
    labels: pd.DataFrame, conditions: Collection[str] = words.GROUPS,
    points_from: str = "", source: str | Path = "", types: Collection[str] = words.SERIES_TYPES,
) -> str:  # fmt: skip
    """Why models of `conditions` cannot be trained from a label table, in one sentence; '' if they can.

    Each condition needs grades, each group graded points of two studies (grades if `taken_models` are in the folder
    `source`). If there is a column fold, it needs two folds, and this holds for each of them, where points of one study
    are enough. types: of the series; sagittal ones tell the levels.
    """
    folds = labels.groupby("fold") if "fold" in labels else [("", labels)]
    if "fold" in labels and 0 < labels["fold"].nunique() < 2:
        return "cannot train: all studies are in one fold, and each fold is graded by the models of the others"
    names = [name for name, key in words.GROUP_OF.items() if key in conditions]
    taken = taken_models(labels, conditions, points_from)
    for fold, part in folds:
        graded, where = part[(part.severity >= 0) & part.condition.isin(names)], f" in fold {fold}" * ("fold" in labels)
        if graded.empty:
            return f"cannot train: no training study has a grade{where}"
        if lacking := [words.CONDITIONS[n].title.lower() for n in names if n not in set(graded.condition)]:
            return f"cannot train: no grades for {', '.join(lacking)}{where}"
        what = "a grade" if "yolo" in taken else "a usable point with a grade"
        for key in conditions:
            usable = (graded.condition.map(words.GROUP_OF) == key) & (graded.X.notna() | ("yolo" in taken))
            studies = graded.study_id[usable].nunique()
            if studies < (1 if where else 2):
                found = "only one study has" if studies else "no study has"
                return f"cannot train: {found} {what} for {words.GROUPS[key].score} stenosis{where}"
    if not {words.T1, words.T2} & set(types):
        return "cannot train: there is no sagittal series to tell the levels"
    if taken and not Path(source, "blend.json").is_file():
        why = "no label has a point" if "yolo" in taken else "no points on sagittal images tell the levels"
        return f"cannot train: {why}, and there are no models to take them from (points_from)"
    return ""


def uses(series: pd.DataFrame, labels: pd.DataFrame, source: str | Path = "") -> str:
    """What a folder (see `Checked`) can be used for, in one line: training and evaluating (groups), predicting."""
    series, models = series[series.n_slices > 0], "/".join(Path(source).parts[-2:])
    absent = [kind for kind in words.SERIES_TYPES if kind not in set(series.series_type)]
    labels = labels[labels.study_id.isin(series.study_id[series.split == "train"])]
    graded = labels[labels.severity >= 0].assign(group=labels.condition.map(words.GROUP_OF))
    keys = [key for key in words.GROUPS if key in set(graded.group)]
    faults = {key: untrainable(labels, [key], "", source, series.series_type) for key in keys}
    able = [key for key in keys if not faults[key]]
    alone = [key for key in able if "yolo" in taken_models(labels, [key])]  # whose labels have no points
    trained = [key for key in able if key not in alone] or able
    taken = taken_models(labels, trained) if trained else []
    can, notes = [f"evaluating {', '.join(keys)}"] if keys else [], []
    if trained:
        n, placed = (part.groupby("group").study_id.nunique() for part in (graded, graded.dropna(subset="X")))
        points = {key: f", {placed[key]} with points" if 0 < placed.get(key, 0) < n[key] else "" for key in trained}
        can.insert(0, "training " + ", ".join(f"{key} ({count_studies(n[key])}{points[key]})" for key in trained))
        notes += [f"train with conditions={','.join(trained)}"] if trained != keys else []
    for kind in absent:
        other = [SHORT[name] for name in (words.T1, words.T2) if kind in SHORT and name not in absent]
        levels = f": levels from {other[0]}" if other and trained and not taken else ""
        notes.append(f"no {SHORT.get(kind, 'axial T2')}{levels}")
    notes += [f"levels {'and points ' * ('yolo' in taken)}from {models}"] if taken else []
    notes += [f"{key} with conditions={key}: levels and points from {models}" for key in alone if key not in trained]
    notes += [fault.replace("train:", f"train {key}:") for key, fault in faults.items() if fault]
    can += [f"predicting ({count_studies(series.study_id.nunique())})"]
    return "; ".join([f"usable for: {', '.join(can)}", *notes])


def _on_disk(comp: Competition, findings: Findings) -> pd.DataFrame:
    """The series whose files exist; findings name the others, or their study if all of its series are missing."""
    series = comp.series
    sources = [comp.source(*key) for key in zip(series.split, series.study_id, series.series_id, strict=True)]
    there = pd.Series([not isinstance(source, Path) or source.is_dir() for source in sources], series.index, dtype=bool)
    for split in competition.SPLITS:
        here = series.split == split
        missing = series[here & ~there]
        if len(missing) and not (comp.root / f"{split}_images").is_dir():
            no_study = pd.DataFrame({"study_id": [pd.NA]})
            findings.add(no_study, "images_missing", f"{split}_images", "only tables are used")
            continue
        whole = ~missing.study_id.isin(series.study_id[here & there])
        studies = missing.loc[whole, ["study_id"]].drop_duplicates()
        findings.add(studies, "study_not_on_disk", f"{split}_images", "study left out")
        findings.add(missing[~whole], "series_not_on_disk", missing.series_type[~whole], "series left out")
    return series[there]


def _read_headers(task: tuple[dicom.Source, dict, list[tuple]]) -> tuple[dict, list[tuple], list[tuple]]:
    """A series' line of the table with `middle` (x of sagittal slices, mm), faults, and points with X, Y, Z or NaN."""
    source, row, points = task
    unplaced = [(*point, np.nan, np.nan, np.nan) for point in points]
    try:
        source, left_out = select(source, row["series_type"])
        series = dicom.read_series(source, pixels=False, labelled=bool(points))
    except dicom.DicomError as error:
        return row, [("series_unusable", readable(error), "series left out")], unplaced
    skipped = (*left_out, *series.skipped)
    faults = [("file_unusable", readable(f"{file.name}: {why}"), "file left out") for file, why in skipped]
    faults += [("file_repaired", readable(f"{file.name}: {why}"), "repaired") for file, why in series.repaired]
    if len(shapes := {image.shape for image in series.slices}) > 1:
        value = ", ".join(f"{rows} x {cols}" for rows, cols in sorted(shapes))
        faults.append(("shapes_mixed", value, "each size kept"))
    if spacing := spacing_fault(series):
        return row, [*faults, ("spacing_outlier", spacing, "series left out")], unplaced
    row |= _measures(series)
    series_type = row["series_type"]
    plane, contrast = plane_and_contrast(series, series_type)
    if plane != words.PLANES[series_type]:
        value = f"{plane}, described as {series_type}"
        return row, [*faults, ("plane_differs", value, "series left out")], unplaced
    if contrast:
        faults.append(("contrast_differs", contrast, "used as the table says"))
    if plane == "sagittal":
        centres = [image.centre[0] for image in series.slices]
        row["middle"] = (min(centres) + max(centres)) / 2
    shapes = {image.instance_number: image.shape for image in series.slices}
    for k, (_, _, number, condition, level, x, y) in enumerate(points):
        rows, cols = shapes.get(number, (0, 0))
        if -0.5 <= x <= cols - 0.5 and -0.5 <= y <= rows - 0.5:
            unplaced[k] = (*points[k], *series.to_patient(number, x, y))
        else:
            rule = "point_outside_image" if rows else "point_on_missing_instance"
            faults.append((rule, f"{condition}_{level}", POINT_UNUSED))
    return row, faults, unplaced


def _measures(series: dicom.Series) -> dict[str, Any]:
    """The values of `COLUMNS`."""
    numbers, steps = [image.instance_number for image in series.slices], series.steps()
    turns = set(np.sign(np.diff(numbers)).tolist())
    order = "mixed" if len(turns) > 1 else "down" if turns == {-1} else "up"
    sizes = Counter(image.shape for image in series.slices).most_common(1)[0][0]
    sizes += tuple(np.median([image.spacing for image in series.slices], axis=0).tolist())
    step = float(np.median(steps)) if len(steps) else np.nan
    parts = step, series.slices[-1].block + 1, min(numbers), max(numbers), order, len(series.skipped)
    return dict(zip(COLUMNS, (series.plane, len(series.slices), *sizes, *parts), strict=True))


def _label_table(comp: Competition, points: pd.DataFrame, middles: dict, findings: Findings) -> pd.DataFrame:
    """The label table; points that cannot be right lose their place, and findings name them."""
    placed = points.dropna(subset="X")
    placed = placed.assign(rule=judge(placed, middles))
    for rule in ("point_on_wrong_side", "one_side_twice", "levels_out_of_order", "level_points_apart"):
        wrong = placed[placed["rule"] == rule]
        findings.add(wrong, rule, label_names(wrong), POINT_UNUSED)
    places = placed.loc[placed["rule"] == "", [*KEY, *"XYZ"]]
    places = places.astype({"study_id": "int64"} | dict.fromkeys("XYZ", "float64"))
    table = comp.labels.merge(comp.coordinates, "left", KEY).merge(places, "left", KEY)
    table.insert(0, "row_id", table.study_id.astype(str) + "_" + label_names(table))
    seen = pd.MultiIndex.from_frame(table[KEY]).isin(pd.MultiIndex.from_frame(points[KEY]))
    ids = ["series_id", "instance_number"]
    table.loc[seen & table.X.isna(), [*ids, "x", "y"]] = np.nan
    table[ids] = table[ids].fillna(NONE).astype("int64")
    return table[["row_id", *KEY, "severity", *ids, "x", "y", *"XYZ"]]


def summary(findings: pd.DataFrame) -> pd.DataFrame:
    """Counts by rule and action: rule, findings, studies, meaning, action, example (study/series: value)."""
    rows = []
    for (rule, action), part in findings.groupby(["rule", "action"], sort=False):
        first = part.iloc[0]
        place = "/".join(str(first[name]) for name in ("study_id", "series_id") if pd.notna(first[name]))
        example = ": ".join(filter(None, (place, first.value)))
        rows.append((rule, len(part), part.study_id.nunique(), RULES.get(rule, ""), action, example))
    columns = ["rule", "findings", "studies", "meaning", "action", "example"]
    return pd.DataFrame(rows, columns=columns).sort_values("findings", ascending=False, ignore_index=True)


def main(root: str | Path, out: str | Path | None = None, workers: int | None = None, source: str | Path = "") -> int:
    """Check `root`, print its findings and `uses`, write findings to the csv `out`; 0 if it is usable, else 1."""
    workers = workers or usable_cores()
    try:
        comp = competition.read(root, workers=workers)
        print(f"reading the headers of {len(comp.series)} series", flush=True)
        checked = check(comp, workers)
    except (competition.CompetitionError, dicom.DicomError) as error:
        print(f"not usable: {error}")
        return 1
    series, labels, findings = checked.series, checked.labels, checked.findings
    if out is not None:
        write_table(out, findings)
        comp.write_ids(Path(out).parent)
    for split, part in series.groupby("split"):
        print(f"{split}: {count_studies(part.study_id.nunique())}, {len(part)} series, {part.n_slices.sum()} images")
    if len(labels):
        print(f"labels: {(labels.severity >= 0).sum()} grades, {labels.X.notna().sum()} usable points")
    for row in summary(findings).itertuples():
        print(f"\n{row.rule}: {row.findings}" + f" (studies: {row.studies})" * bool(row.studies))
        print(f"    meaning: {row.meaning}\n    action: {row.action}\n    example: {row.example[:160]}")
    print(f"\nfindings: {len(findings)}, " + (f"written to {out}" if out else "use --out FILE.csv to list them all"))
    usable = (series.n_slices > 0).sum()
    if not usable:
        print("not usable: no image of any series can be read")
        return 1
    print(f"usable: {usable} of {len(series)} series can be read\n{uses(series, labels, source)}")
    return 0
