"""What spoils a phantom that is otherwise as the real data: dirt that hospitals and people add to files and tables.

A study gets at most one kind of `KINDS`, and then none of the real kinds that a validator reports as well (`quieted`),
so that nothing hides anything else. Kinds are dealt to studies in turn, each at least once where there are studies
enough. What changes a file alone, and nothing that a validator reports, is tossed for each series and study besides.
`planted.csv` lists what was done, under the rule by which a validator must report it, with what follows from it: a
grade of no known word is also a label missing. What follows in geometry is not listed: a point that is reported as out
of order, outside its image or on a wrong or unreadable image is no witness for any other rule.
"""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from lsdc_utils.phantom.scanner import Acquisition
from lsdc_utils.phantom.study import COLUMN_KEYS, Dirt, Study, StudyPlan, project
from lsdc_utils.vocabulary import COLUMNS, FORAMINAL, LEVELS, SERIES_TYPES, SIDES, SPINAL_CANAL, SUBARTICULAR, T1

OF_TABLES = (  # kinds of dirt in rows of studies and series
    *("study_not_in_tables", "study_without_series", "study_without_labels", "study_repeated", "series_repeated"),
    *("series_type_unknown", "plane_differs", "grade_unknown"),
)
OF_POINTS = (  # in rows of label points
    *("point_repeated", "point_on_unknown_series", "point_on_other_series_type", "point_on_missing_instance"),
    *("point_outside_image", "foramina_swapped", "one_side_twice", "levels_out_of_order", "level_points_apart"),
)
KINDS = OF_TABLES + OF_POINTS
IN_TEST = ("series_repeated", "series_type_unknown", "plane_differs")  # kinds that a study without labels may have
NEEDS_SECOND_AXIAL = ("plane_differs",)  # which no point lies on
NO_GRADE = 3  # a label whose word in train.csv is none of the three grades
FAR = 40.0  # mm, more than from level to level

ALL_DIRT = dict.fromkeys(KINDS, 0.02) | {  # each rule of a validator at least once in 60 training studies
    **{"series_missing": 0.3, "second_axial": 0.3, "axial_split": 0.5, "short_stack": 0.3, "label_missing": 0.01},
    **{"point_missing": 0.05, "sides_swapped": 0.1},
}


def deal(n: int, split: str, dirt: Dirt, seed: list[int]) -> list[tuple[str, int] | None]:
    """What each of the n studies of a split gets: None, or a kind and its turn, 0 where it is the first of its kind.

    A kind befalls its share of the studies, and one at least. Every kind has its first turn before any has its second.
    """
    rates = {kind: getattr(dirt, kind) for kind in KINDS if split == "train" or kind in IN_TEST}
    turns = [(turn, kind) for kind, rate in rates.items() if rate for turn in range(max(1, round(rate * n)))]
    dealt: list[tuple[str, int] | None] = [None] * n
    order = np.random.default_rng(seed).permutation(n)
    for i, (turn, kind) in zip(order, sorted(turns, key=lambda one: one[0]), strict=False):
        dealt[i] = kind, turn
    return dealt


def quieted(dirt: Dirt, kind: str) -> Dirt:
    """Rates for a study that gets `kind`: without the real dirt that a validator reports."""
    off = dict.fromkeys(("series_missing", "short_stack", "axial_split", "label_missing", "point_missing"), 0.0)
    return replace(dirt, **off, sides_swapped=0.0, second_axial=float(kind in NEEDS_SECOND_AXIAL))


def spoil(plan: StudyPlan, study: Study, images: Path | None) -> None:
    """Spoil the rows of a study and, in <images>/<study>, its files; list in `study.planted` what a validator is to
    find, the real kinds of dirt included."""
    rng = np.random.default_rng([*plan.seed, 5])
    folder = None if images is None else images / str(plan.study_id)
    kind, turn = plan.spoilt or ("", 0)
    if kind in OF_TABLES:
        _spoil_tables(kind, plan, study, folder, rng)
    elif kind in OF_POINTS:
        _spoil_points(kind, turn, plan, study, rng)
    _list_what_rows_show(plan, study)


def _spoil_tables(kind: str, plan: StudyPlan, study: Study, folder: Path | None, rng: np.random.Generator) -> None:
    """Rows of studies and series that lack, come twice or say what is not so."""
    series_id = None
    match kind:
        case "study_not_in_tables":
            study.series, study.clicked, study.label_rows = [], [], 0
            if folder is None:
                return
        case "study_without_series":  # in train.csv alone
            study.series, study.clicked = [], []
            if folder is not None:
                shutil.rmtree(folder)
        case "study_without_labels":
            study.clicked, study.label_rows = [], 0
        case "study_repeated":
            study.label_rows = 2
        case "series_repeated":
            series_id = study.series[0]["series_id"]
            study.series.append(dict(study.series[0]))
        case "series_type_unknown":
            series_id = plan.series_ids[-1]
            study.series.append({"series_id": series_id, "series_description": "Localizer"})
        case "plane_differs":
            series_id = study.series[-1]["series_id"]
            study.series[-1]["series_description"] = T1
        case "grade_unknown":
            column = rng.integers(len(COLUMNS))
            study.labels[column] = NO_GRADE
            study.clicked = [row for row in study.clicked if row["column"] != column]
    study.plant(kind, series_id)


def _spoil_points(kind: str, turn: int, plan: StudyPlan, study: Study, rng: np.random.Generator) -> None:
    """Points that are written down wrongly: one of the study, or some of one condition."""
    if kind in ("foramina_swapped", "one_side_twice"):
        return _spoil_sides(kind, study, rng)
    if kind in ("levels_out_of_order", "level_points_apart"):
        return _spoil_levels(kind, turn, study, rng)
    row = study.clicked[rng.integers(len(study.clicked))]
    match kind:
        case "point_repeated":
            study.clicked.append(row | {"x": row["x"] + 1})
        case "point_on_unknown_series":
            row["series_id"] = plan.series_ids[-1]
        case "point_on_missing_instance":
            row["instance_number"] += 10_000
        case "point_outside_image":
            row["x"] = _acquisition(study, row["series_id"]).cols + 10.0
        case "point_on_other_series_type":
            row = next(row for row in study.clicked if COLUMN_KEYS[row["column"]][0] == SPINAL_CANAL)
            _move_to_t1(study, row)
    study.plant(kind, row["series_id"], COLUMNS[row["column"]])


def _spoil_sides(kind: str, study: Study, rng: np.random.Generator) -> None:
    """Left and right points of some levels: on T1 they change places, or on axial slices both lie on one side."""
    rows = {row["column"]: row for row in study.clicked}
    base = FORAMINAL if kind == "foramina_swapped" else SUBARTICULAR
    pairs = [[COLUMNS.index(f"{side}_{base}_{level}") for side in SIDES] for level in LEVELS]
    pairs = [pair for pair in pairs if all(column in rows for column in pair)]
    if kind == "one_side_twice":
        left, right = pairs[rng.integers(len(pairs))]
        place = {key: rows[right][key] for key in ("series_id", "instance_number", "x", "y")}
        rows[left].update(place, y=place["y"] + 1)
        study.plant(kind, place["series_id"], COLUMNS[left])
        return
    for left, right in rng.permutation(pairs)[:2]:
        rows[left]["column"], rows[right]["column"] = int(right), int(left)
        for column in (left, right):
            study.plant("point_on_wrong_side", rows[column]["series_id"], COLUMNS[column])


def _spoil_levels(kind: str, turn: int, study: Study, rng: np.random.Generator) -> None:
    """Two neighbouring levels of a condition change places, or a canal's lowest point lies a level too low."""
    rows = {row["column"]: row for row in study.clicked}
    if kind == "level_points_apart":
        column = COLUMNS.index(f"{SPINAL_CANAL}_{LEVELS[-1]}")
        row = rows[column]
        row["y"] = round(row["y"] + FAR / _acquisition(study, row["series_id"]).spacing, 3)
        study.plant(kind, value=COLUMNS[column])
        return
    condition = (SPINAL_CANAL, f"left_{FORAMINAL}", f"right_{SUBARTICULAR}")[turn % 3]
    first = COLUMNS.index(f"{condition}_{LEVELS[0]}")
    pairs = [(column, column + 1) for column in range(first, first + 4) if {column, column + 1} <= rows.keys()]
    above, below = pairs[rng.integers(len(pairs))]
    rows[above]["column"], rows[below]["column"] = below, above
    study.plant(kind, rows[above]["series_id"], f"{COLUMNS[above]}, {COLUMNS[below]}")


def _move_to_t1(study: Study, row: dict) -> None:
    """Write a point down on the sagittal T1 series, at the place in the patient where it is."""
    old, new = next(part for part in study.parts if part.series_id == row["series_id"]), study.parts[0]
    affine = old.acquisition.affines[list(old.numbers).index(row["instance_number"])]
    x, y, away = project(new.acquisition.affines, affine[:3] @ (row["x"], row["y"], 0, 1))
    k = int(np.argmin(np.abs(away)))
    row.update(series_id=new.series_id, instance_number=int(new.numbers[k]), x=round(float(x[k]), 3))
    row["y"] = round(float(y[k]), 3)


def _acquisition(study: Study, series_id: int) -> Acquisition:
    return next(part.acquisition for part in study.parts if part.series_id == series_id)


def _list_what_rows_show(plan: StudyPlan, study: Study) -> None:
    """Plant what a look at the study's rows tells, whatever kind of dirt brought it about."""
    types = {row["series_id"]: row["series_description"] for row in study.series}
    types = {series_id: name for series_id, name in types.items() if name in SERIES_TYPES}
    counts = Counter(types.values())
    for name in SERIES_TYPES if types else ():
        if counts[name] == 0:
            study.plant("series_type_missing", value=name)
        elif counts[name] > 1:
            study.plant("series_type_repeated", value=f"{counts[name]} x {name}")
    if plan.split != "train" or not study.label_rows:
        return
    graded = set(np.flatnonzero(np.isin(study.labels, (0, 1, 2))).tolist())
    placed = {row["column"]: row["series_id"] for row in study.clicked if row["series_id"] in types}
    for column in sorted(placed.keys() - graded):
        study.plant("point_without_grade", placed[column], COLUMNS[column])
    lacking = {"labels_missing": len(COLUMNS) - len(graded), "grade_without_point": len(graded - placed.keys())}
    for rule, n in lacking.items():
        if n:
            study.plant(rule, value=f"{n} of {len(COLUMNS)}")
