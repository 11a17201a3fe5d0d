"""Spoils the training studies of a written phantom as hospitals and people do, and lists what data checks must report.

A study gets one kind of `KINDS`, and only if it has no reported flaw yet, so that nothing hides anything else. The list
uses the rules of `lsdc_utils.data.checks`, with what follows from a flaw: an unknown grade is also a missing label.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileDataset

from lsdc_utils import dicom
from lsdc_utils.vocabulary import (
    AXIAL,
    COLUMNS,
    FORAMINAL,
    LEVELS,
    SERIES_TYPES,
    SEVERITY_NAMES,
    SIDES,
    SPINAL_CANAL,
    SUBARTICULAR,
    T1,
)

OF_TABLES = (  # kinds of dirt in rows of studies and series
    *("study_not_in_tables", "study_without_series", "study_without_labels", "study_repeated", "series_repeated"),
    *("series_type_unknown", "plane_differs", "grade_unknown"),
)
OF_POINTS = (  # in rows of label points
    *("point_repeated", "point_on_unknown_series", "point_on_other_series_type", "point_on_missing_instance"),
    *("point_outside_image", "foramina_swapped", "one_side_twice", "levels_out_of_order", "level_points_apart"),
)
OF_FILES = (  # on disk
    *("study_not_on_disk", "series_not_on_disk", "localiser", "wide_pixels", "wide_steps", "contrast_differs"),
    *("files_broken", "tags_missing", "series_unusable", "shapes_mixed"),
)
KINDS = OF_TABLES + OF_POINTS + OF_FILES
NEEDS_SECOND_AXIAL = ("plane_differs", "wide_pixels", "wide_steps")  # one without points
FORMS = ("uncompressed", "monochrome1", "rescaled", "signed", "high_bits", "headers_silent")  # the same image otherwise
SYNTAXES = (
    *(uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian),
    uid.DeflatedExplicitVRLittleEndian,
)
FAR = 40.0  # mm, more than from one level to the next
NO_IMAGE = b"no image " * 200
PLANTED = ["study_id", "series_id", "rule", "value"]


class Tables:
    """The training tables of a phantom, and the rows that data checks must report of what was spoilt."""

    def __init__(self, root: Path) -> None:
        self.root, self.planted = root, []
        self.labels, self.series, self.points = (pd.read_csv(file) for file in self.files())
        names = self.points["condition"] + "_" + self.points["level"]
        self.points["column"] = names.str.lower().str.replace("[ /]", "_", regex=True)

    def files(self) -> list[Path]:
        names = ("train", "train_series_descriptions", "train_label_coordinates")
        return [self.root / f"{name}.csv" for name in names]

    def save(self) -> None:
        titles = self.points["column"].str.replace("_", " ").str.title()
        points = self.points.assign(condition=titles.str[:-6], level=titles.str[-5:].str.replace(" ", "/"))
        for table, file in zip((self.labels, self.series, points.drop(columns="column")), self.files(), strict=True):
            table.to_csv(file, index=False)

    def plant(self, study: int, series: int | None, rule: str, value: object = "") -> None:
        self.planted.append((study, series, rule, str(value)))

    def folder(self, study: int, series: int | None = None) -> Path:
        return self.root / "train_images" / str(study) / (str(series) if series else "")

    def rows(self, study: int) -> pd.DataFrame:
        """The points of a study, in the order of the table."""
        return self.points[self.points["study_id"] == study]

    def point(self, study: int, column: str) -> int:
        """Index of a label's point."""
        return self.points.index[(self.points["study_id"] == study) & (self.points["column"] == column)][0]

    def drop(self, study: int, *tables: str) -> None:
        for name in tables:
            table = getattr(self, name)
            setattr(self, name, table[table["study_id"] != study].reset_index(drop=True))

    def add(self, name: str, rows: pd.DataFrame) -> None:
        setattr(self, name, pd.concat([getattr(self, name), rows], ignore_index=True))

    def files_of(self, study: int, series: int) -> list[Path]:
        """The files of a series, by their place."""
        return [image.file for image in dicom.read_series(self.folder(study, series), pixels=False).slices]

    def without_point(self, study: int, series: int) -> list[Path]:
        """The files that no point lies on."""
        rows = self.rows(study)
        numbers = set(rows.loc[rows["series_id"] == series, "instance_number"])
        return [file for file in self.files_of(study, series) if int(file.stem) not in numbers]

    def missing(self) -> list[tuple]:
        """What each study's rows lack, as planted rows, whatever caused it."""
        out = []
        for study in sorted({*self.labels["study_id"], *self.series["study_id"]}):
            series = self.series[self.series["study_id"] == study].drop_duplicates("series_id")
            types = series.set_index("series_id")["series_description"]
            types = types[types.isin(SERIES_TYPES)]
            counts = types.value_counts().reindex(SERIES_TYPES, fill_value=0)
            for name, n in counts.items() if len(types) else ():
                if n != 1:
                    rule, value = ("series_type_repeated", f"{n} x {name}") if n else ("series_type_missing", name)
                    out.append((study, None, rule, value))
            labels = self.labels[self.labels["study_id"] == study]
            if labels.empty:
                continue
            grades = labels.iloc[0][list(COLUMNS)]
            graded, points = set(grades.index[grades.isin(SEVERITY_NAMES)]), self.rows(study)
            placed = dict(zip(points["column"], points["series_id"], strict=True))
            placed = {column: series_id for column, series_id in placed.items() if series_id in types.index}
            out += [(study, placed[column], "point_without_grade", column) for column in placed.keys() - graded]
            lacking = {"labels_missing": len(COLUMNS) - len(graded), "grade_without_point": len(graded - placed.keys())}
            out += [(study, None, rule, f"{n} of {len(COLUMNS)}") for rule, n in lacking.items() if n]
        return out


def spoil(
    root: Path, kinds: Sequence[str] = KINDS, straight: Path | None = None
) -> tuple[pd.DataFrame, dict[int, str]]:
    """Spoil one training study of the phantom at `root` by each kind: rows study_id, series_id, rule, value that data
    checks must report of the whole folder, and which study got which kind. ValueError where too few studies are clean.

    straight: the tables of the same phantom without swapped sides, where this one may have some.
    """
    tables = Tables(root)
    if straight is not None:
        turned = tables.points[tables.points["column"] != Tables(straight).points["column"]]
        for row in turned.itertuples():
            tables.plant(row.study_id, row.series_id, "point_on_wrong_side", row.column)
    flawed = {study for study, _, rule, _ in tables.planted + tables.missing() if rule != "series_type_repeated"}
    clean = [study for study in tables.labels["study_id"] if study not in flawed]
    spines = pd.read_csv(root / "spines.csv").set_index("study_id")
    spoilt: dict[int, str] = {}
    for kind in sorted(kinds, key=lambda kind: kind not in NEEDS_SECOND_AXIAL):
        able = [study for study in clean if study not in spoilt]
        if kind in NEEDS_SECOND_AXIAL:
            able = [study for study in able if _empty_axial(tables, study) and not spines["tilted_blocks"][study]]
        if not able:
            raise ValueError(f"no clean study left for {kind}")
        spoilt[able[0]] = kind
        rng = np.random.default_rng(able[0])
        change = _spoil_tables if kind in OF_TABLES else _spoil_points if kind in OF_POINTS else _spoil_files
        change(kind, tables, able[0], rng)
    tables.save()
    return pd.DataFrame(tables.planted + tables.missing(), columns=PLANTED).astype({"series_id": "Int64"}), spoilt


def change_forms(root: Path, forms: Sequence[str], share: float = 1.0) -> None:
    """Write a share of the series in each of `forms` (of FORMS): the same images, stored otherwise."""
    rng = np.random.default_rng(0)
    for k, folder in enumerate(sorted(root.glob("train_images/*/*"))):
        chosen = [form for form, draw in zip(forms, rng.random(len(forms)), strict=True) if draw < share]
        for file in sorted(folder.iterdir()) if chosen else ():
            _write_otherwise(file, chosen, SYNTAXES[k % len(SYNTAXES)])


def _empty_axial(tables: Tables, study: int) -> list[int]:
    """The axial series of a study that no point lies on."""
    of_study = tables.series[tables.series["study_id"] == study]
    axial = of_study.loc[of_study["series_description"] == AXIAL, "series_id"]
    return [series for series in axial if series not in set(tables.rows(study)["series_id"])]


def _spoil_tables(kind: str, tables: Tables, study: int, rng: np.random.Generator) -> None:
    """Rows of studies and series that are missing, repeated or wrong."""
    of_study, series = tables.series["study_id"] == study, None
    match kind:
        case "study_not_in_tables":
            tables.drop(study, "series", "points", "labels")
        case "study_without_series":  # only in train.csv
            tables.drop(study, "series", "points")
            shutil.rmtree(tables.folder(study))
        case "study_without_labels":
            tables.drop(study, "points", "labels")
        case "study_repeated":
            tables.add("labels", tables.labels[tables.labels["study_id"] == study])
        case "series_repeated":
            series = tables.series.loc[of_study, "series_id"].iloc[0]
            tables.add("series", tables.series[of_study].head(1))
        case "series_type_unknown":
            series = _add_localiser(tables, study)
            row = {"study_id": [study], "series_id": [series], "series_description": ["Localizer"]}
            tables.add("series", pd.DataFrame(row))
        case "plane_differs":
            series = _empty_axial(tables, study)[0]
            tables.series.loc[tables.series["series_id"] == series, "series_description"] = T1
        case "grade_unknown":
            column = COLUMNS[rng.integers(len(COLUMNS))]
            tables.labels.loc[tables.labels["study_id"] == study, column] = "Grave"
            tables.points = tables.points.drop(index=tables.point(study, column)).reset_index(drop=True)
    tables.plant(study, series, kind)


def _spoil_points(kind: str, tables: Tables, study: int, rng: np.random.Generator) -> None:
    """Points that are written down wrongly: one of the study, or some of one condition."""
    points = tables.points
    if kind in ("foramina_swapped", "levels_out_of_order"):
        return _swap_points(kind, tables, study, rng)
    k = rng.choice(tables.rows(study).index)
    match kind:
        case "point_repeated":
            tables.add("points", points.loc[[k]].assign(x=points.at[k, "x"] + 1))
        case "point_on_unknown_series":
            points.at[k, "series_id"] = _new_series(tables)
        case "point_on_missing_instance":
            points.at[k, "instance_number"] += 10_000
        case "point_outside_image":
            points.at[k, "x"] = 10_000.0
        case "point_on_other_series_type":
            k = tables.point(study, f"{SPINAL_CANAL}_{rng.choice(LEVELS)}")
            _move_to_t1(tables, study, k)
        case "one_side_twice":
            level = rng.choice(LEVELS)
            k, other = (tables.point(study, f"{side}_{SUBARTICULAR}_{level}") for side in SIDES)
            columns = ["series_id", "instance_number", "x", "y"]
            points.loc[k, columns] = points.loc[other, columns]
            points.at[k, "y"] += 1
        case "level_points_apart":
            k = tables.point(study, f"{SPINAL_CANAL}_{LEVELS[-1]}")
            image = dicom.read_series(tables.folder(study, points.at[k, "series_id"]), pixels=False).slices[0]
            points.at[k, "y"] = min(points.at[k, "y"] + FAR / image.spacing[0], image.shape[0] - 1.0)
    tables.plant(study, tables.points.at[k, "series_id"], kind, tables.points.at[k, "column"])


def _swap_points(kind: str, tables: Tables, study: int, rng: np.random.Generator) -> None:
    """Left and right foramen of two levels change places, or two neighbouring levels of one condition do."""
    rule, first = kind, rng.integers(len(LEVELS) - 1)
    if kind == "foramina_swapped":
        rule, levels = "point_on_wrong_side", rng.choice(LEVELS, 2, replace=False)
        pairs = [[f"{side}_{FORAMINAL}_{level}" for side in SIDES] for level in levels]
    else:
        condition = rng.choice([SPINAL_CANAL, f"left_{FORAMINAL}", f"right_{SUBARTICULAR}"])
        pairs = [[f"{condition}_{level}" for level in LEVELS[first : first + 2]]]
    for pair in pairs:
        rows = [tables.point(study, column) for column in pair]
        tables.points.loc[rows, "column"] = pair[::-1]
        for k in rows:
            tables.plant(study, tables.points.at[k, "series_id"], rule, tables.points.at[k, "column"])


def _move_to_t1(tables: Tables, study: int, k: int) -> None:
    """Write a point down on the sagittal T1 series, at the place in the patient where it is."""
    row = tables.points.loc[k]
    of_study = tables.series[tables.series["study_id"] == study]
    t1 = of_study.loc[of_study["series_description"] == T1, "series_id"].iloc[0]
    old, new = (dicom.read_series(tables.folder(study, series), pixels=False) for series in (row["series_id"], t1))
    index, x, y, _ = new.to_pixel(*old.to_patient(row["instance_number"], row["x"], row["y"]))
    place = [t1, new.slices[index].instance_number, round(x, 3), round(y, 3)]
    for name, value in zip(("series_id", "instance_number", "x", "y"), place, strict=True):
        tables.points.at[k, name] = value


def _spoil_files(kind: str, tables: Tables, study: int, rng: np.random.Generator) -> None:
    """Folders that are missing, files that cannot be used, and wrong headers."""
    if kind in ("contrast_differs", "tags_missing", "files_broken"):
        change = {"contrast_differs": _swap_names, "tags_missing": _lose_tags, "files_broken": _break_files}[kind]
        return change(tables, study)
    rule, value, parts = kind, "", _parts(tables, study)
    series = _empty_axial(tables, study)[0] if kind in NEEDS_SECOND_AXIAL else rng.choice(parts)
    files = tables.files_of(study, series)
    match kind:
        case "study_not_on_disk":
            series = None
            shutil.rmtree(tables.folder(study))
        case "series_not_on_disk":
            shutil.rmtree(tables.folder(study, series))
        case "localiser":
            rule, series = "series_not_in_tables", _add_localiser(tables, study)
        case "series_unusable":
            for file in files:
                file.write_bytes(NO_IMAGE)
        case "shapes_mixed":
            file = tables.without_point(study, series)[0]
            rule, value = "file_unusable", file.name  # a single stranger
            dataset = pydicom.dcmread(file)
            _store(file, dataset, dataset.pixel_array[:-16])
        case "wide_pixels":
            rule = "spacing_outlier"
            for file in files:
                wide = 10 * float(pydicom.dcmread(file).PixelSpacing[0])
                _edit(file, PixelSpacing=[wide, wide])
        case "wide_steps":
            rule, first = "spacing_outlier", dicom.read_series(files[0].parent, pixels=False).slices[0].affine
            for k, file in enumerate(files):
                _edit(file, ImagePositionPatient=[round(p, 6) for p in first[:3, 3] + k * 60.0 * first[:3, 2]])
    tables.plant(study, series, rule, value)


def _parts(tables: Tables, study: int) -> list[int]:
    """A study's first series of each type."""
    of_study = tables.series[tables.series["study_id"] == study].drop_duplicates("series_description")
    return of_study.set_index("series_description")["series_id"][list(SERIES_TYPES)].tolist()


def _swap_names(tables: Tables, study: int) -> None:
    """The headers of the sagittal T1 series say T2, and the reverse."""
    for series, name in zip(_parts(tables, study)[:2], ("T2", "T1"), strict=True):
        for file in tables.files_of(study, series):
            _edit(file, SeriesDescription=name)
        tables.plant(study, series, "contrast_differs", f"{name} in the headers")


def _lose_tags(tables: Tables, study: int) -> None:
    """Two slices of T1, whose slices are all parallel, lack what the others have."""
    series = _parts(tables, study)[0]
    files = tables.files_of(study, series)
    for k, tag in enumerate(("ImageOrientationPatient", "PixelSpacing")):
        file = files[3 * k + 3]
        _edit(file, **{tag: None})
        tables.plant(study, series, "file_repaired", f"{file.name}: no {tag}")


def _break_files(tables: Tables, study: int) -> None:
    """Files without a point become unusable, each in another way."""
    ways = {
        "truncated pixel data": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
        "not DICOM": lambda file: file.write_bytes(NO_IMAGE),
        "no pixel data": lambda file: _edit(file, PixelData=None),
        "no position": lambda file: _edit(file, ImagePositionPatient=None),
        "absurd size": lambda file: _edit(file, Rows=65535, Columns=65535),
    }
    parts = _parts(tables, study)
    files = {series: tables.without_point(study, series) for series in parts}
    for k, (name, spoil_file) in enumerate(ways.items()):
        file = files[parts[k % 3]][k // 3]
        spoil_file(file)
        tables.plant(study, parts[k % 3], "file_unusable", f"{file.name}: {name}")


def _add_localiser(tables: Tables, study: int) -> int:
    """Write one more series, a slice of each of the others, and return its id."""
    series, parts = _new_series(tables), _parts(tables, study)
    middles = [files[len(files) // 2] for files in (tables.files_of(study, part) for part in parts)]
    tables.folder(study, series).mkdir()
    for number, middle in enumerate(middles, 1):
        file = tables.folder(study, series) / f"{number}.dcm"
        shutil.copyfile(middle, file)
        uids = {"SeriesInstanceUID": f"{study}.{series}", "SOPInstanceUID": f"{study}.9.{number}"}
        image_type = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
        _edit(file, **uids, InstanceNumber=number, SeriesDescription="LOCALIZER", ImageType=image_type)
    return series


def _new_series(tables: Tables) -> int:
    """An id that no series has: below those of the phantom, another for each that was planted."""
    return 1000 + len(tables.planted)


def _write_otherwise(file: Path, forms: Sequence[str], syntax: str) -> None:
    """Write a file's pixels in other `forms` that mean the same image."""
    dataset = pydicom.dcmread(file)
    if "headers_silent" in forms:
        del dataset.SeriesDescription
    values = dataset.pixel_array
    if "monochrome1" in forms:
        dataset.PhotometricInterpretation, values = "MONOCHROME1", 4095 - values
    if "signed" in forms:
        dataset.PixelRepresentation, values = 1, values.astype("int16") - 2048
    if "rescaled" in forms:
        dataset.RescaleSlope, dataset.RescaleIntercept = "0.5", "-100"
    if "high_bits" in forms:  # what lies above the 12 stored bits means nothing
        above = np.arange(values.size, dtype="uint16").reshape(values.shape) << 12
        values = values.view("uint16") & 0x0FFF | above
    _store(file, dataset, values, syntax if "uncompressed" in forms else uid.ExplicitVRLittleEndian)


def _store(file: Path, dataset: FileDataset, values: np.ndarray, syntax: str = uid.ExplicitVRLittleEndian) -> None:
    """Write 16-bit pixels (rows, columns) uncompressed in place of what the file holds."""
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    dataset.Rows, dataset.Columns = values.shape
    dataset.add_new("PixelData", "OW", values.astype(values.dtype.newbyteorder(order)).tobytes())
    fresh = Dataset({element.tag: element for element in dataset})  # a data set that was read keeps its byte order
    fresh.file_meta = dataset.file_meta
    fresh.file_meta.TransferSyntaxUID = syntax
    fresh.save_as(file, enforce_file_format=True)


def _edit(file: Path, **tags: object) -> None:
    """Set tags of a file; None removes one."""
    dataset = pydicom.dcmread(file)
    for name, value in tags.items():
        if value is None:
            delattr(dataset, name)
        else:
            setattr(dataset, name, value)
    dataset.save_as(file)
