"""Valid DICOM files of every kind, and ways to corrupt them, all drawn from one random stream."""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
from dicom_files import LOSSLESS, LOSSLESS_RAMP, RAMP, write_frames, write_slice
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from lsdc_utils.dicom.headers import WANTED_TAGS

Random = np.random.Generator

SYNTAXES = (*LOSSLESS, uid.JPEG2000)
OTHER_SYNTAXES = (*SYNTAXES, uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.MPEG2MPML, "1.2.3", "")
SIZES = (0, 1, 2, 7, 8, 255, 4096, 0x7FFF, 0xFFFE, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)
VALUES = (
    "",
    "nan",
    "-inf",
    "1e400",
    "-1",
    "0",
    "0\\0\\0",
    "1\\2\\3\\4\\5\\6",
    "\\\\\\",
    "99999999999999999999",
    "x" * 3000,
)
NUMBERS = (0, 1, 2, 7, 16, 64, 255, 4000, 20000, 65535)
ITEM, SEQUENCE = b"\xfe\xff\x00\xe0\xff\xff\xff\xff", b"\x40\x00\x75\x02SQ\x00\x00\xff\xff\xff\xff"
ELEMENT = re.compile(rb"[\x02-\x60]\x00..(?:AE|AS|CS|DA|DS|IS|LO|OB|OW|PN|SH|SQ|UI|UN|US)", re.DOTALL)


def seeds(folder: Path) -> list[bytes]:
    """Files that can be read, of every transfer syntax, one and several frames, with and without preamble."""
    image = np.tile(RAMP, (8, 6))
    text = {"Modality": "MR", "SeriesDescription": "t2_sag", "EchoTime": "90", "ImageType": ["ORIGINAL", "PRIMARY"]}
    files = [
        write_slice(folder / f"{k}.dcm", 1, (0, 0, 0), pixels=image, syntax=syntax, **text)
        for k, syntax in enumerate(SYNTAXES)
    ]
    lossless = {"syntax": uid.JPEGLosslessSV1, "encoded": [LOSSLESS_RAMP]}
    files.append(write_slice(folder / "lossless.dcm", 1, (0, 0, 0), pixels=RAMP, RescaleSlope="2", **lossless))
    jpeg = io.BytesIO()
    Image.fromarray((image // 16).astype("uint8")).save(jpeg, "jpeg")
    baseline = {"syntax": uid.JPEGBaseline8Bit, "encoded": [jpeg.getvalue()]}
    files.append(write_slice(folder / "baseline.dcm", 1, (0, 0, 0), pixels=(image // 16).astype("uint8"), **baseline))
    signed = {"PhotometricInterpretation": "MONOCHROME1", "RescaleIntercept": "-5"}
    files.append(write_slice(folder / "signed.dcm", 1, (0, 0, 0), pixels=(RAMP // 2).astype("int16"), **signed))
    extended = pydicom.dcmread(get_testdata_file("JPGExtended.dcm"))
    extended.ImagePositionPatient, extended.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    extended.PixelSpacing = [1, 1]
    extended.save_as(folder / "extended.dcm")
    files.append(folder / "extended.dcm")
    places = [(0.0, 0.0, z) for z in (0.0, 4.0, 8.0)]
    for syntax in (uid.ExplicitVRLittleEndian, uid.RLELossless, uid.JPEGLSLossless):
        frames = np.stack([RAMP, RAMP + 1, RAMP + 2])
        file = folder / f"frames{len(files)}.dcm"
        files.append(write_frames(file, 1, places, frames, slopes=[1, 2, 3], syntax=syntax))
    contents = [file.read_bytes() for file in files]
    plain = contents[SYNTAXES.index(uid.ExplicitVRLittleEndian)]
    return [*contents, plain[plain.index(b"\x08\x00\x08\x00CS") :]]


def mutate(random: Random, files: list[bytes]) -> bytes:
    """One of the files, corrupted in one to three ways."""
    content = files[random.integers(len(files))]
    for _ in range(random.choice([1, 1, 1, 2, 2, 3])):
        corrupt = WAYS[random.integers(len(WAYS))]
        try:
            content = corrupt(random, content, files)
        except Exception:  # pydicom cannot read or write what is corrupt already
            continue
    return content


def _place(random: Random, content: bytes) -> int:
    """A byte of the header, of the start of the pixels, or anywhere: where it hurts more often than not."""
    pixels = max(content.rfind(b"\xe0\x7f\x10\x00"), content.rfind(b"\x7f\xe0\x00\x10"))
    kind = random.choice(["header", "pixels", "pixels", "start of pixels", "anywhere"])
    if kind == "header" and pixels > 140:
        return int(random.integers(128, pixels))
    if kind == "start of pixels" and pixels > 0:
        return min(pixels + int(random.integers(150)), len(content) - 1)
    return int(random.integers(pixels if kind == "pixels" and pixels > 0 else 0, max(len(content), 1)))


def _put(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def flip_bytes(random: Random, content: bytes, _: list[bytes]) -> bytes:
    for _ in range(random.integers(1, 9)):
        content = _put(content, _place(random, content), random.bytes(1))
    return content


def flip_bit(random: Random, content: bytes, _: list[bytes]) -> bytes:
    at = _place(random, content)
    return _put(content, at, bytes([content[at] ^ 1 << random.integers(8)]))


def fill(random: Random, content: bytes, _: list[bytes]) -> bytes:
    return _put(content, _place(random, content), bytes([random.choice([0, 255])]) * int(random.integers(1, 200)))


def truncate(random: Random, content: bytes, _: list[bytes]) -> bytes:
    return content[: _place(random, content)]


def remove(random: Random, content: bytes, _: list[bytes]) -> bytes:
    at = _place(random, content)
    return content[:at] + content[at + int(random.integers(1, 64)) :]


def insert(random: Random, content: bytes, files: list[bytes]) -> bytes:
    other = files[random.integers(len(files))]
    start, at = _place(random, other), _place(random, content)
    return content[:at] + other[start : start + int(random.integers(1, 300))] + content[at:]


def change_length(random: Random, content: bytes, _: list[bytes]) -> bytes:
    """Another length for an element, an item or a fragment."""
    size = int(random.choice(SIZES))
    ends = [match.end() for match in ELEMENT.finditer(content)]
    items = [match.end() for match in re.finditer(rb"\xfe\xff\x00\xe0", content)]
    if items and random.random() < 0.4:
        return _put(content, int(random.choice(items)), struct.pack("<L", size))
    at = int(random.choice(ends))
    if content[at - 2 : at] in (b"OB", b"OW", b"SQ", b"UN"):
        return _put(content, at + 2, struct.pack("<L", size))
    return _put(content, at, struct.pack("<H", size & 0xFFFF))


def change_value(random: Random, content: bytes, _: list[bytes]) -> bytes:
    """Another value for a tag that the reader looks at, or none."""
    dataset = pydicom.dcmread(io.BytesIO(content), force=True)
    for _ in range(random.integers(1, 4)):
        tag = int(random.choice(WANTED_TAGS))
        vr = dictionary_VR(tag)
        if tag == tag_for_keyword("TransferSyntaxUID") or random.random() < 0.2:
            dataset.pop(tag, None)
        elif vr == "SQ":
            dataset.add(DataElement(tag, vr, [Dataset()] * int(random.integers(4))))
        elif vr == "US":
            dataset.add(DataElement(tag, vr, int(random.choice(NUMBERS))))
        elif vr in ("FD", "FL"):
            dataset.add(DataElement(tag, vr, float(random.choice([0.0, -1.0, np.nan, np.inf, 1e300]))))
        else:
            dataset.add_new(tag, "LO", str(random.choice(VALUES)))
    return _saved(dataset)


def nest(random: Random, content: bytes, _: list[bytes]) -> bytes:
    """Sequences in sequences that nobody closes."""
    start = int(random.choice([match.start() for match in ELEMENT.finditer(content)]))
    return content[:start] + (SEQUENCE + ITEM) * int(random.choice([1, 30, 1000, 5000])) + content[start:]


def swap_syntax(random: Random, content: bytes, _: list[bytes]) -> bytes:
    """Another transfer syntax than the file has."""
    match = re.search(rb"\x02\x00\x10\x00UI(..)", content, re.DOTALL)
    end = match.end() + struct.unpack("<H", match[1])[0]
    name = str(random.choice(OTHER_SYNTAXES)).encode()
    name += b"\0" * (len(name) % 2)
    return content[: match.start(1)] + struct.pack("<H", len(name)) + name + content[end:]


def deflate(random: Random, content: bytes, files: list[bytes]) -> bytes:
    """The content of a deflated file, corrupted before it is deflated, sometimes with many zeros at its end."""
    start = content.index(b"\x08\x00", 132)
    whole = uid.DeflatedExplicitVRLittleEndian.encode() in content[:start]
    body = zlib.decompress(content[start:], -15) if whole else content[start:]
    body = WAYS[random.integers(len(WAYS) - 1)](random, body, files)
    deflater = zlib.compressobj(1, wbits=-15)
    packed = [deflater.compress(body)]
    if random.random() < 0.02:
        packed += [deflater.compress(bytes(1 << 20)) for _ in range(300)]
    head = next(file for file in files if uid.DeflatedExplicitVRLittleEndian.encode() in file[:400])
    tag = head.index(uid.DeflatedExplicitVRLittleEndian.encode()) + 22
    return head[:tag] + b"".join(packed) + deflater.flush()


def _saved(dataset: pydicom.FileDataset) -> bytes:
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    return buffer.getvalue()


Way = Callable[[Random, bytes, list[bytes]], bytes]
WAYS: tuple[Way, ...] = (
    *[flip_bytes, flip_bit, change_length] * 3,
    *[change_value] * 2,
    *[fill, truncate, remove, insert, swap_syntax, nest, deflate],
)
