"""Small DICOM files for tests, with headers as sparse as the competition's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    JPEG2000,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

SAGITTAL = ((0.0, 1.0, 0.0), (0.0, 0.0, -1.0))  # columns run to the back, rows to the feet
AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))  # columns run to the patient's left, rows to the back
LOSSLESS = (  # transfer syntaxes that tests can write and that give the same pixels back
    *(ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian),
    *(RLELossless, JPEGLSLossless, JPEG2000Lossless),
)
ENCODERS: dict[str, dict] = {RLELossless: {}, JPEGLSLossless: {}, JPEG2000Lossless: {}, JPEG2000: {"j2k_cr": [4]}}

# np.arange(48).reshape(6, 8) * 80 in 12 bits, as lossless JPEG of the first predictor, encoded by GDCM 3.2.6.
RAMP = np.arange(48, dtype="uint16").reshape(6, 8) * 80
LOSSLESS_RAMP = bytes.fromhex(
    "ffd8ffc3000b100006000801011100ffc400160001010100000000000000000000000000070a10ffda0008010100010000ca0a0a0a0a0a0a15"
    "00a0a0a0a0a0a0a1500a0a0a0a0a0a0a1500a0a0a0a0a0a0a1500a0a0a0a0a0a0a1500a0a0a0a0a0a0a1ffd900"
)


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
    syntax: str = "",
    encoded: list[bytes] | None = None,
    drop: tuple[str, ...] = (),
    **tags: Any,
) -> Path:
    """One image; `spacing` is that of rows, then of columns; `drop` leaves tags out, `tags` sets some.

    pixels: (rows, columns), or (frames, rows, columns). `syntax` names another transfer syntax than RLE (`rle`) or
    explicit little endian; `encoded` are the fragments of its pixel data where pydicom has no encoder for it.
    """
    pixels = np.full((6, 8), number, "uint16") if pixels is None else pixels
    syntax = syntax or (RLELossless if rle else ExplicitVRLittleEndian)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax in ENCODERS else syntax
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    meta.MediaStorageSOPInstanceUID = f"1.2.{number}"
    dataset = Dataset()
    dataset.file_meta = meta
    dataset.InstanceNumber = number
    dataset.ImagePositionPatient = list(position)
    dataset.ImageOrientationPatient = [*orientation[0], *orientation[1]]
    dataset.PixelSpacing = list(spacing)
    dataset.Rows, dataset.Columns = pixels.shape[-2:]
    if pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = pixels.dtype.itemsize * 8
    dataset.BitsStored = 12 if pixels.dtype.itemsize == 2 else dataset.BitsAllocated
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    dataset.PixelData = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    dataset["PixelData"].VR = "OW"
    if encoded is not None:
        dataset.PixelData = encapsulate(encoded, has_bot=False)
        dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    elif syntax in ENCODERS:
        dataset.compress(syntax, generate_instance_uid=False, **ENCODERS[syntax])
    for name, value in tags.items():
        setattr(dataset, name, value)
    for name in drop:
        delattr(dataset, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(file, enforce_file_format=True)
    return file


def write_frames(
    file: Path,
    number: int,
    positions: list[tuple[float, float, float]],
    pixels: np.ndarray,
    slopes: list[float] | None = None,
    drop: tuple[str, ...] = (),
    **tags: Any,
) -> Path:
    """An enhanced multi-frame image (PS3.3, C.7.6.16): positions and slopes of each frame, the rest shared."""
    shared, frames = Dataset(), []
    shared.PlaneOrientationSequence = [_item(ImageOrientationPatient=[*AXIAL[0], *AXIAL[1]])]
    shared.PixelMeasuresSequence = [_item(PixelSpacing=[0.5, 0.75])]
    shared.MREchoSequence = [_item(EffectiveEchoTime=90.0)]
    shared.MRTimingAndRelatedParametersSequence = [_item(RepetitionTime=3000)]
    for k, position in enumerate(positions):
        groups = _item(PlanePositionSequence=[_item(ImagePositionPatient=list(position))])
        if slopes:
            groups.PixelValueTransformationSequence = [_item(RescaleSlope=slopes[k], RescaleIntercept=1)]
        frames.append(groups)
    tags = {"SharedFunctionalGroupsSequence": [shared], "PerFrameFunctionalGroupsSequence": frames} | tags
    drop = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", *drop)
    return write_slice(file, number, positions[0], pixels=pixels, drop=drop, **tags)


def _item(**tags: Any) -> Dataset:
    item = Dataset()
    for name, value in tags.items():
        setattr(item, name, value)
    return item


def write_stack(folder: Path, positions: list[tuple[float, float, float]], first: int = 1, **options: Any) -> Path:
    """A series of parallel slices, numbered from `first` in the order of `positions`; `options` go to `write_slice`."""
    for number, position in enumerate(positions, start=first):
        write_slice(folder / f"{number}.dcm", number, position, **options)
    return folder
