"""Small DICOM files for tests, with headers as sparse as the competition's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))  # columns run to the back, rows to the feet
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))  # columns run to the patient's left, rows to the back


def tilted(degrees: float) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Axial orientation turned about the left-right axis: the back of the image lies lower."""
    turn = np.deg2rad(degrees)
    return AXIAL[0], (0.0, float(np.cos(turn)), float(-np.sin(turn)))


def write_slice(
    file: Path,
    number: int,
    position: tuple[float, float, float],
    orientation: tuple[tuple[float, float, float], tuple[float, float, float]] = AXIAL,
    pixels: np.ndarray | None = None,
    spacing: tuple[float, float] = (0.5, 0.75),
    rle: bool = True,
    drop: tuple[str, ...] = (),
    **tags: Any,
) -> Path:
    """One single-frame image; `spacing` is that of rows, then of columns; `drop` leaves tags out, `tags` sets some."""
    pixels = np.full((6, 8), number, "uint16") if pixels is None else pixels
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    meta.MediaStorageSOPInstanceUID = f"1.2.{number}"
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.InstanceNumber = number
    dataset.ImagePositionPatient = list(position)
    dataset.ImageOrientationPatient = [*orientation[0], *orientation[1]]
    dataset.PixelSpacing = list(spacing)
    dataset.Rows, dataset.Columns = pixels.shape
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    if rle:
        dataset.compress(RLELossless)
    for name, value in tags.items():
        setattr(dataset, name, value)
    for name in drop:
        delattr(dataset, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(file, enforce_file_format=True)
    return file


def write_stack(folder: Path, positions: list[tuple[float, float, float]], first: int = 1, **options: Any) -> Path:
    """A series of parallel slices, numbered from `first` in the order of `positions`; `options` go to `write_slice`."""
    for number, position in enumerate(positions, start=first):
        write_slice(folder / f"{number}.dcm", number, position, **options)
    return folder
