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
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset

from lsdc_utils import geometry
from lsdc_utils.phantom.study import COLUMN_KEYS, Dirt, Series, Study, StudyPlan
from lsdc_utils.vocabulary import COLUMNS, FORAMINAL, LEVELS, SERIES_TYPES, SIDES, SPINAL_CANAL, SUBARTICULAR, T1

OF_TABLES = (  # kinds of dirt in rows of studies and series
    *("study_not_in_tables", "study_without_series", "study_without_labels", "study_repeated", "series_repeated"),
    *("series_type_unknown", "plane_differs", "grade_unknown"),
)
OF_POINTS = (  # in rows of label points
    *("point_repeated", "point_on_unknown_series", "point_on_other_series_type", "point_on_missing_instance"),
    *("point_outside_image", "foramina_swapped", "one_side_twice", "levels_out_of_order", "level_points_apart"),
)
OF_FILES = (  # on disk, nowhere where no images are written
    *("study_not_on_disk", "series_not_on_disk", "localiser", "spacing_outlier", "contrast_differs", "files_broken"),
    *("tags_missing", "series_unusable", "shapes_mixed"),
)
KINDS = OF_TABLES + OF_POINTS + OF_FILES
IN_TEST = (*OF_FILES, "series_repeated", "series_type_unknown", "plane_differs")  # what a study without labels may have
NEEDS_SECOND_AXIAL = ("plane_differs", "spacing_outlier")  # which no point lies on
FORMS = ("uncompressed", "monochrome1", "rescaled", "signed", "high_bits")  # of files that read as they did before
SYNTAXES = (
    *(uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian),
    uid.DeflatedExplicitVRLittleEndian,
)
NO_GRADE = 3  # a label whose word in train.csv is none of the three grades
FAR = 40.0  # mm, more than from one level to the next
NO_IMAGE = b"no image " * 200

ALL_DIRT = {  # each rule of a validator at least once in 60 training studies, each kind for test studies in 12
    **dict.fromkeys(KINDS, 0.02),
    **dict.fromkeys((*FORMS, "headers_silent"), 0.05),
    **{"series_missing": 0.3, "second_axial": 0.3, "axial_split": 0.5, "short_stack": 0.3, "label_missing": 0.01},
    **{"point_missing": 0.05, "sides_swapped": 0.1, "spacing_outlier": 0.04},
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
    off |= {"sides_swapped": 0.0, "second_axial": float(kind in NEEDS_SECOND_AXIAL)}
    if kind == "spacing_outlier":
        off["tilted_blocks"] = 0.0  # steps of one stack
    if kind == "contrast_differs":
        off["headers_silent"] = 0.0
    return replace(dirt, **off)


def spoil(plan: StudyPlan, study: Study, images: Path | None) -> None:
    """Spoil the rows of a study and, in <images>/<study>, its files; list in `study.planted` what a validator is to
    find, the real kinds of dirt included."""
    rng = np.random.default_rng([*plan.seed, 5])
    folder = None if images is None else images / str(plan.study_id)
    _change_forms(plan, study, folder, rng)
    kind, turn = plan.spoilt or ("", 0)
    if kind in OF_TABLES:
        _spoil_tables(kind, plan, study, folder, rng)
    elif kind in OF_POINTS:
        _spoil_points(kind, turn, plan, study, rng)
    elif kind in OF_FILES and folder is not None:
        _spoil_files(kind, turn, plan, study, folder)
    _list_what_rows_show(plan, study)


def _change_forms(plan: StudyPlan, study: Study, folder: Path | None, rng: np.random.Generator) -> None:
    """Toss in which of `FORMS` each series comes, and whether the study's headers are silent, and write it so."""
    happens = rng.random((len(study.parts), len(FORMS))) < [getattr(plan.dirt, form) for form in FORMS]
    silent, syntax = rng.random() < plan.dirt.headers_silent, int(rng.integers(len(SYNTAXES)))
    for k, part in enumerate(study.parts if folder is not None else ()):
        forms = [form for form, does in zip(FORMS, happens[k], strict=True) if does]
        for file in _files(folder, part) if forms or silent else ():
            _write_otherwise(file, forms, SYNTAXES[(syntax + k) % len(SYNTAXES)], silent)


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
            if folder is not None:
                _add_localiser(plan, study, folder)
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
            row["x"] = _part(study, row).acquisition.cols + 10.0
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
        row, image = rows[column], _part(study, rows[column]).acquisition
        row["y"] = min(round(row["y"] + FAR / image.spacing, 3), image.rows - 1.0)
        study.plant(kind, row["series_id"], COLUMNS[column])
        return
    condition = (SPINAL_CANAL, f"left_{FORAMINAL}", f"right_{SUBARTICULAR}")[turn % 3]
    first = COLUMNS.index(f"{condition}_{LEVELS[0]}")
    pairs = [(column, column + 1) for column in range(first, first + 4) if {column, column + 1} <= rows.keys()]
    above, below = pairs[rng.integers(len(pairs))]
    rows[above]["column"], rows[below]["column"] = below, above
    for column in (above, below):
        study.plant(kind, rows[column]["series_id"], COLUMNS[column])


def _move_to_t1(study: Study, row: dict) -> None:
    """Write a point down on the sagittal T1 series, at the place in the patient where it is."""
    old, new = _part(study, row), study.parts[0]
    affine = old.acquisition.affines[list(old.numbers).index(row["instance_number"])]
    place = geometry.to_patient(affine, np.array([row["x"], row["y"]]))
    x, y, away = geometry.to_pixels(new.acquisition.affines, place).T
    k = int(np.argmin(np.abs(away)))
    row.update(series_id=new.series_id, instance_number=int(new.numbers[k]))
    row.update(x=round(float(x[k]), 3), y=round(float(y[k]), 3))


def _part(study: Study, row: dict) -> Series:
    """The series that a point lies on."""
    return next(part for part in study.parts if part.series_id == row["series_id"])


def _spoil_files(kind: str, turn: int, plan: StudyPlan, study: Study, folder: Path) -> None:
    """Folders that are not there, files that cannot be used, and headers that do not say what is."""
    part = study.parts[-1 if kind in NEEDS_SECOND_AXIAL else turn % 3]
    files, series_id = _files(folder, part), part.series_id
    match kind:
        case "contrast_differs":
            return _exchange_names(study, folder)
        case "tags_missing":
            return _lose_tags(study, folder)
        case "files_broken":
            return _break_files(study, folder)
        case "study_not_on_disk":
            series_id = None
            shutil.rmtree(folder)
        case "series_not_on_disk":
            shutil.rmtree(files[0].parent)
        case "localiser":
            kind, series_id = "series_not_in_tables", _add_localiser(plan, study, folder)
        case "series_unusable":
            for file in files:
                file.write_bytes(NO_IMAGE)
        case "shapes_mixed":
            file = _unpointed(study, folder, part)[0]
            dataset = pydicom.dcmread(file)
            _store(file, dataset, dataset.pixel_array[:-16])
        case "spacing_outlier":  # once pixels ten times as wide, once steps of 60 mm
            wide, first = 10 * part.acquisition.spacing, part.acquisition.affines[0]
            for k, file in enumerate(files):
                place = [round(p, 6) for p in first[:3, 3] + k * 60.0 * first[:3, 2]]
                _edit(file, **{"ImagePositionPatient": place} if turn % 2 else {"PixelSpacing": [wide, wide]})
    study.plant(kind, series_id)


def _exchange_names(study: Study, folder: Path) -> None:
    """The headers of the sagittal T1 series say T2, and the reverse."""
    for part, name in zip(study.parts[:2], ("T2", "T1"), strict=True):
        for file in _files(folder, part):
            _edit(file, SeriesDescription=name)
        study.plant("contrast_differs", part.series_id, f"{name} in the headers")


def _lose_tags(study: Study, folder: Path) -> None:
    """Two slices of T1, all of whose slices lie the same way, lack what the others tell."""
    for k, tag in enumerate(("ImageOrientationPatient", "PixelSpacing")):
        file = _files(folder, study.parts[0])[3 * k + 3]
        _edit(file, **{tag: None})
        study.plant("file_repaired", study.parts[0].series_id, f"{file.name}: no {tag}")


def _break_files(study: Study, folder: Path) -> None:
    """Files without a point become useless, each in another way."""
    harms = {
        "truncated pixel data": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "not DICOM": lambda file: file.write_bytes(NO_IMAGE),
        "no pixel data": lambda file: _edit(file, PixelData=None),
        "no position": lambda file: _edit(file, ImagePositionPatient=None),
        "absurd size": lambda file: _edit(file, Rows=65535, Columns=65535),
    }
    for k, (what, harm) in enumerate(harms.items()):
        part = study.parts[k % 3]
        file = _unpointed(study, folder, part)[k // 3]
        harm(file)
        study.plant("file_unusable", part.series_id, f"{file.name}: {what}")


def _add_localiser(plan: StudyPlan, study: Study, folder: Path) -> int:
    """Write one series more, a slice of each of the others, and return its id."""
    series_id = plan.series_ids[-1]
    (folder / str(series_id)).mkdir()
    for number, part in enumerate(study.parts, 1):
        file = folder / str(series_id) / f"{number}.dcm"
        shutil.copyfile(_files(folder, part)[len(part.numbers) // 2], file)
        uids = {"SeriesInstanceUID": f"{plan.study_id}.{series_id}", "SOPInstanceUID": f"{plan.study_id}.9.{number}"}
        image_type = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        _edit(file, **uids, InstanceNumber=number, SeriesDescription="LOCALIZER", ImageType=image_type)
    return series_id


def _write_otherwise(file: Path, forms: list[str], syntax: str, silent: bool) -> None:
    """Write a file's pixels in other `forms` that mean the same image, and without its description where `silent`."""
    dataset = pydicom.dcmread(file)
    if silent:
        del dataset.SeriesDescription
    if not forms:
        return dataset.save_as(file)
    values = dataset.pixel_array
    if "monochrome1" in forms:
        dataset.PhotometricInterpretation, values = "MONOCHROME1", 4095 - values
    if "signed" in forms:
        dataset.PixelRepresentation, values = 1, values.astype("int16") - 2048
    if "rescaled" in forms:
        dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", "-100"
    if "high_bits" in forms:  # what lies above the 12 bits stored means nothing
        above = np.arange(values.size, dtype="uint16").reshape(values.shape) << 12
        values = values.view("uint16") & 0x0FFF | above
    _store(file, dataset, values, syntax if "uncompressed" in forms else uid.ExplicitVRLittleEndian)


def _store(file: Path, dataset: FileDataset, values: np.ndarray, syntax: str = uid.ExplicitVRLittleEndian) -> None:
    """Write 16-bit pixels (rows, columns) uncompressed in place of what the file holds."""
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    dataset.Rows, dataset.Columns = values.shape
    dataset.add_new("PixelData", "OW", values.astype(values.dtype.newbyteorder(order)).tobytes())
    fresh = Dataset({element.tag: element for element in dataset})  # one that was read keeps to its order of bytes
    fresh.file_meta = dataset.file_meta
    fresh.file_meta.TransferSyntaxUID = syntax
    fresh.save_as(file, enforce_file_format=True)


def _edit(file: Path, **tags: object) -> None:
    """Set tags of a file; None takes one out."""
    dataset = pydicom.dcmread(file)
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(file)


def _files(folder: Path, part: Series) -> list[Path]:
    """Files of a series of the study in `folder`, from right to left or from head to foot."""
    return [folder / str(part.series_id) / f"{number}.dcm" for number in part.numbers]


def _unpointed(study: Study, folder: Path, part: Series) -> list[Path]:
    """Those that no label points at."""
    pointed = {row["instance_number"] for row in study.clicked if row["series_id"] == part.series_id}
    return [file for file in _files(folder, part) if int(file.stem) not in pointed]


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
