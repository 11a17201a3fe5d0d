"""Strings that must not leave DICOM headers: planted in a folder's files, and looked for in whatever came of them."""

from __future__ import annotations

import base64
import gzip
import io
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pydicom
from pydicom.dataset import Dataset

SECRETS = {
    "PatientName": "Zqhidden^Zqperson",
    "PatientID": "ZQPAT4711",
    "PatientBirthDate": "19530817",
    "StudyDate": "20190223",
    "StudyTime": "031415.926535",
    "AcquisitionDateTime": "20190223031416.535897",
    "AccessionNumber": "ZQACC771",
    "InstitutionName": "Zqhospital of Nowhere",
    "ReferringPhysicianName": "Zqreferring^Doctor",
    "OperatorsName": "Zqoperator",
    "StationName": "ZQSTATION",
    "DeviceSerialNumber": "ZQSERIAL9",
    "StudyDescription": "Zqstudy words",
    "SeriesDescription": "Zqseries words",
    "ProtocolName": "Zqprotocol",
    "PatientComments": "Zqcomments on a patient",
    "ImageComments": "Zqcomments on an image",
}
PRIVATE = "Zqprivate element"
UID_ROOT = "1.2.826.0.1.3680043.8.498.777"  # legal UIDs: they may be referred to in exports, and nowhere else
WORDS = [*SECRETS.values(), *(part for value in SECRETS.values() for part in re.split(r"\^| ", value) if "q" in part)]
WORDS = sorted({word.lower() for word in [*WORDS, PRIVATE] if len(word) > 7})


def plant(folder: Path) -> None:
    """Rewrite every DICOM file under `folder` with all of `SECRETS`, a private element and legal, unique UIDs."""
    for number, file in enumerate(sorted(folder.rglob("*.dcm"))):
        dataset = pydicom.dcmread(file)
        contrast = dataset.SeriesDescription
        for keyword, value in SECRETS.items():
            setattr(dataset, keyword, value)
        dataset.SeriesDescription = f"{contrast} {SECRETS['SeriesDescription']}"
        dataset.private_block(0x0011, "ZQPRIVATE", create=True).add_new(0x01, "LO", PRIVATE)
        series = file.parent
        dataset.StudyInstanceUID = f"{UID_ROOT}.{series.parent.name}"
        dataset.SeriesInstanceUID = f"{UID_ROOT}.{series.parent.name}.{series.name}"
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"{dataset.SeriesInstanceUID}.{number}"
        dataset.save_as(file)


def found_in(name: str, content: bytes, words: list[str]) -> Iterator[str]:
    """'file: word' for each of `words` (lower case) in a file: in its bytes, and in what is packed or encoded in it."""
    for part in _parts(name, content):
        lower = part.lower()
        for word in words:
            if any(word.encode(code) in lower for code in ("utf-8", "utf-16-le", "utf-32-le")):
                yield f"{name}: {word}"


def _parts(name: str, content: bytes) -> Iterator[bytes]:
    """The bytes of a file and of all that lies in it: tables, archives, streams, images in text, elements."""
    yield content
    if content[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(content)) as opened:
            for inner in opened.namelist():
                yield inner.encode()
                yield from _parts(inner, opened.read(inner))
    elif content[:2] == b"\x1f\x8b":
        yield from _parts(name, gzip.decompress(content))
    elif content[:4] == b"PAR1":
        yield pd.read_parquet(io.BytesIO(content)).to_csv().encode()
    elif content[128:132] == b"DICM":
        yield "\n".join(_values(pydicom.dcmread(io.BytesIO(content), force=True))).encode()
    elif name.endswith((".html", ".ipynb", ".css", ".md", ".json")):
        for image in re.findall(rb"[A-Za-z0-9+/]{400,}={0,2}", content.replace(b"\\n", b"")):
            yield from _parts("image", base64.b64decode(image[: len(image) // 4 * 4]))
    for start in (match.start() for match in re.finditer(rb"x[\x01\x5e\x9c\xda]", content)):  # deflated: PNG, PDF
        try:
            yield zlib.decompressobj().decompress(content[start:], 2**22)
        except zlib.error:
            continue


def _values(dataset: Dataset) -> Iterator[str]:
    """Every element's value as text, those of sequences and private ones too."""
    for element in (*getattr(dataset, "file_meta", ()), *dataset):
        if element.VR == "SQ":
            for item in element.value:
                yield from _values(item)
        elif not isinstance(element.value, bytes):
            yield str(element.value)


def leaks(folder: Path, words: list[str]) -> list[str]:
    """'file: word' for each word found in names and files under `folder`."""
    lines = []
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()):
        name = str(file.relative_to(folder))
        lines += [f"{name}: {word} in its name" for word in words if word in name.lower()]
        lines += sorted(set(found_in(name, file.read_bytes(), words)))
    return lines
