"""DICOM files as sparse as the competition's: RLE Lossless, 16 bits allocated, 12 stored, about 27 tags."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import PYDICOM_IMPLEMENTATION_UID, RLELossless
from rle.utils import encode_frame

ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"  # what the real files' meta header names, though each holds one frame


def write_slice(path: Path, pixels: np.ndarray, affine: np.ndarray, header: dict) -> None:
    """Write one slice: pixels (rows, cols) uint16 below 4096, affine (4, 4) from (column, row, 0, 1) to LPS mm.

    `header`: keyword -> value for the tags that do not follow from pixels and affine, such as InstanceNumber.
    """
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ENHANCED_MR
    meta.MediaStorageSOPInstanceUID = header["SOPInstanceUID"]
    meta.TransferSyntaxUID = RLELossless
    meta.ImplementationClassUID = PYDICOM_IMPLEMENTATION_UID
    spacing = np.linalg.norm(affine[:3, :2], axis=0)  # mm from column to column, and from row to row
    rows, columns = pixels.shape
    low, high = np.percentile(pixels[::4, ::4], [1, 99])
    ds = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    for keyword, value in {
        **header,
        "PatientPosition": "HFS",
        "ImagePositionPatient": _decimals(affine[:3, 3]),
        "ImageOrientationPatient": _decimals(np.concatenate([affine[:3, 0] / spacing[0], affine[:3, 1] / spacing[1]])),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": rows,
        "Columns": columns,
        "PixelSpacing": _decimals(spacing[::-1]),
        "BitsAllocated": 16,
        "BitsStored": 12,
        "HighBit": 11,
        "PixelRepresentation": 0,
        "WindowCenter": int((low + high) / 2),
        "WindowWidth": max(1, int(high - low)),
    }.items():
        setattr(ds, keyword, value)
    frame = encode_frame(np.ascontiguousarray(pixels, dtype="<u2").tobytes(), rows, columns, 1, 16, "<")
    ds.PixelData = encapsulate([bytes(frame)])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


def _decimals(values: np.ndarray) -> list[str]:
    """Numbers as DICOM's decimal strings: at most 16 characters, a ten-thousandth of a millimetre and better."""
    return [f"{value:.8f}"[:16] for value in values]
