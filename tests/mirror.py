"""Studies of a data folder written anew: mirrored left to right, or with their slices numbered the other way round."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from pydicom.uid import ExplicitVRLittleEndian

SERIES_TABLE = "test_series_descriptions.csv"
MIRRORED, RENUMBERED = 10**11, 2 * 10**11  # added to the id of a study


def write_versions(data: Path, studies: list[int], root: Path) -> None:
    """A folder whose test studies are `studies` (test studies of `data`), their mirror images and renumbered copies."""
    series = pd.read_csv(data / SERIES_TABLE)
    series = series[series["study_id"].isin(studies)]
    for row in series.itertuples():
        source = data / "test_images" / str(row.study_id) / str(row.series_id)
        for added, write in ((0, shutil.copytree), (MIRRORED, mirror), (RENUMBERED, renumber)):
            write(source, root / "test_images" / str(row.study_id + added) / str(row.series_id))
    versions = [series.assign(study_id=series["study_id"] + added) for added in (0, MIRRORED, RENUMBERED)]
    pd.concat(versions).to_csv(root / SERIES_TABLE, index=False)


def mirror(source: Path, target: Path) -> None:
    """Write the series in folder `source` as it would look with left and right of the patient exchanged.

    Patient x becomes -x. Axial images are turned over too, so that their columns still run to the patient's left;
    sagittal slices keep their pixels and change places.
    """
    target.mkdir(parents=True)
    for file in source.iterdir():
        dataset = pydicom.dcmread(file)
        column, row = np.reshape(dataset.ImageOrientationPatient, (2, 3)).astype(float)
        place = np.array(dataset.ImagePositionPatient, float)
        if np.abs(column).argmax() == 0:
            place = place + column * float(dataset.PixelSpacing[1]) * (dataset.Columns - 1)
            column = -column
            _store(dataset, dataset.pixel_array[:, ::-1])
        over = np.array([-1.0, 1.0, 1.0])
        dataset.ImageOrientationPatient = [round(float(v), 9) for v in (*(column * over), *(row * over))]
        dataset.ImagePositionPatient = [round(float(v), 6) for v in place * over]
        dataset.save_as(target / file.name)


def renumber(source: Path, target: Path) -> None:
    """Write a series with instance numbers, file names and the order of writing the other way round."""
    target.mkdir(parents=True)
    files = sorted(source.iterdir(), key=lambda file: int(file.stem), reverse=True)
    ends = int(files[0].stem) + int(files[-1].stem)
    for file in files:
        dataset = pydicom.dcmread(file)
        dataset.InstanceNumber = ends - int(dataset.InstanceNumber)
        dataset.save_as(target / f"{dataset.InstanceNumber}.dcm")


def mirror_points(points: pd.DataFrame) -> pd.DataFrame:
    """Points as the mirrored study has them."""
    side = points["side"].map({"left": "right", "right": "left", "": ""}) if "side" in points else None
    moved = points.assign(study_id=points["study_id"] + MIRRORED, X=-points["X"])
    return moved if side is None else moved.assign(side=side)


def _store(dataset: pydicom.FileDataset, image: np.ndarray) -> None:
    """Put 16-bit pixels into a data set, uncompressed."""
    dataset.PixelData = np.ascontiguousarray(image, "<u2").tobytes()
    dataset["PixelData"].is_undefined_length = False
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
