"""Small data folders in the competition's layout, without faults; tests add the faults."""

from __future__ import annotations

from pathlib import Path

import dicom_files
import numpy as np
import pandas as pd

from lsdc_utils import vocabulary as words
from lsdc_utils.data import competition

Tables = dict[str, pd.DataFrame]  # file name without .csv -> its content
TYPES = dict(zip((1, 2, 3), words.SERIES_TYPES, strict=True))  # last digit of a series id -> its type
HEIGHTS = dict(zip(words.LEVEL_NAMES, (60.0, 30.0, 0.0, -30.0, -60.0), strict=True))  # patient z of the levels, mm
OFF_CANAL = {"nfn": 16.0, "scs": 0.0, "ss": 8.0}  # mm to the side of the canal, which is at x = 0
# Images of 2 mm pixels: nine sagittal slices from x = -16 to 16, 13 axial ones from z = 60 to -60.
PIXEL, SAGITTAL_STEP, AXIAL_STEP = 2.0, 4.0, 10.0
SHAPES = {"sagittal": (80, 50), "axial": (50, 60)}


def point(study: int, condition: words.Condition, level: str) -> tuple:
    """A line of train_label_coordinates.csv: where the images have the label's place."""
    kind = words.GROUPS[condition.group].series_type
    series = study * 10 + words.SERIES_TYPES.index(kind) + 1
    x = OFF_CANAL[condition.group] * {"left": 1, "right": -1, None: 0}[condition.side]
    z = HEIGHTS[level]
    if kind == words.AXIAL:
        return study, series, round((60 - z) / AXIAL_STEP) + 1, condition.title, level, (x + 60) / PIXEL, 25.0
    return study, series, round((x + 16) / SAGITTAL_STEP) + 1, condition.title, level, 25.0, (80 - z) / PIXEL


def write_tables(root: Path, n_train: int = 12, n_test: int = 2, seed: int = 0) -> Tables:
    """A data folder without images: the tables as the competition writes them, which are returned to be changed."""
    rng = np.random.default_rng(seed)
    train, test = range(101, 101 + n_train), range(501, 501 + n_test)
    grades = rng.choice(words.SEVERITY_NAMES, p=[0.7, 0.2, 0.1], size=(n_train, len(words.COLUMNS)))
    points = [point(study, c, level) for study in train for c in words.CONDITIONS.values() for level in HEIGHTS]
    tables = {
        "train": pd.DataFrame(grades, columns=list(words.COLUMNS)).assign(study_id=list(train)),
        "train_label_coordinates": pd.DataFrame(points, columns=competition.POINTS),
        "sample_submission": pd.DataFrame({"row_id": [row for s in test for row in words.study_row_ids(s)]}),
    }
    for split, studies in (("train", train), ("test", test)):
        series = [(study, study * 10 + k, kind) for study in studies for k, kind in TYPES.items()]
        columns = ["study_id", "series_id", "series_description"]
        tables[f"{split}_series_descriptions"] = pd.DataFrame(series, columns=columns)
    save(root, tables)
    return tables


def save(root: Path, tables: Tables) -> None:
    """Write tables as csv files into `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(root / f"{name}.csv", index=False)


def write_images(root: Path, tables: Tables) -> None:
    """Small slices for each series of `tables`, in which the points of `point` lie where they should."""
    for split in competition.SPLITS:
        for row in tables[f"{split}_series_descriptions"].itertuples():
            write_series(competition.series_folder(root, split, row.study_id, row.series_id), row.series_description)


def write_series(folder: Path, series_type: str, **tags: object) -> None:
    """The slices of one series."""
    plane = words.PLANES[series_type]
    if plane == "axial":
        places = [(-60.0, -50.0, 60.0 - AXIAL_STEP * k) for k in range(13)]
    else:
        places = [(-16.0 + SAGITTAL_STEP * k, -50.0, 80.0) for k in range(9)]
    dicom_files.write_stack(
        folder,
        places,
        orientation=dicom_files.AXIAL if plane == "axial" else dicom_files.SAGITTAL,
        pixels=np.zeros(SHAPES[plane], "uint16"),
        spacing=(PIXEL, PIXEL),
        rle=False,
        **tags,
    )
