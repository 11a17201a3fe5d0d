"""Versions of a study that must not change a grade. mirrored: left and right exchanged, also of rows. renumbered:
slices in reverse order. rescaled: other pixel values. renamed: other ids, also the series in reverse order."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from pydicom.uid import ExplicitVRLittleEndian

SERIES_TABLE = "test_series_descriptions.csv"
VERSIONS = ("as it is", "mirrored", "renumbered", "rescaled", "renamed")
STEP = 10**11  # added to the id of a study for each version after the first; real ids fill 32 bits
SCALE = 2.7  # of the values of a rescaled image


def id_of(study_id: int, version: str) -> int:
    """The id of a study's version."""
    return study_id + STEP * VERSIONS.index(version)


def write_versions(data: Path, studies: Iterable[int], root: Path) -> None:
    """A folder whose test studies are all versions of `studies`, test studies of `data`."""
    series = pd.read_csv(data / SERIES_TABLE)
    series = series[series["study_id"].isin(list(studies))]
    tables = []
    for version in VERSIONS:
        ids = STEP - series["series_id"] if version == "renamed" else series["series_id"]
        table = series.assign(study_id=[id_of(study, version) for study in series["study_id"]], series_id=ids)
        for (_, old), (_, new) in zip(series.iterrows(), table.iterrows(), strict=True):
            source = data / "test_images" / str(old["study_id"]) / str(old["series_id"])
            _write(source, root / "test_images" / str(new["study_id"]) / str(new["series_id"]), version)
        tables.append(table)
    pd.concat(tables).to_csv(root / SERIES_TABLE, index=False)


def _write(source: Path, target: Path, version: str) -> None:
    """Write a version of the series in folder `source`."""
    if version in ("as it is", "renamed"):
        shutil.copytree(source, target)
        return
    target.mkdir(parents=True)
    files = sorted(source.iterdir(), key=lambda file: int(file.stem), reverse=version == "renumbered")
    for file in files:
        dataset = pydicom.dcmread(file)
        match version:
            case "mirrored":
                _mirror(dataset)
            case "renumbered":
                dataset.InstanceNumber = int(files[0].stem) + int(files[-1].stem) - int(dataset.InstanceNumber)
            case "rescaled":
                _store(dataset, np.rint(dataset.pixel_array * SCALE))
                dataset.BitsStored, dataset.HighBit = 16, 15
        dataset.save_as(target / f"{dataset.InstanceNumber}.dcm")


def _mirror(dataset: pydicom.FileDataset) -> None:
    """Patient x becomes -x: axial images are flipped, sagittal slices keep their pixels and change places."""
    column, row = np.reshape(dataset.ImageOrientationPatient, (2, 3)).astype(float)
    place = np.array(dataset.ImagePositionPatient, float)
    if np.abs(column).argmax() == 0:
        place = place + column * float(dataset.PixelSpacing[1]) * (dataset.Columns - 1)
        column = -column
        _store(dataset, dataset.pixel_array[:, ::-1])
    over = np.array([-1.0, 1.0, 1.0])
    dataset.ImageOrientationPatient = [round(float(v), 9) for v in (*(column * over), *(row * over))]
    dataset.ImagePositionPatient = [round(float(v), 6) for v in place * over]


def _store(dataset: pydicom.FileDataset, image: np.ndarray) -> None:
    """Put 16-bit pixels into a data set, uncompressed."""
    dataset.PixelData = np.ascontiguousarray(image, "<u2").tobytes()
    dataset["PixelData"].is_undefined_length = False
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
