"""Headers of DICOM files, read as far as the pixels and no farther, from files that nothing can be promised about.

A file is read in pieces of known size; what its header claims about sizes is checked before anything is made of it. All
that goes wrong is a `DicomError`.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydicom.dataelem import RawDataElement
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.sequence import Sequence
from pydicom.tag import Tag
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRBigEndian, ImplicitVRLittleEndian
from pydicom.values import converters

FIRST_READ = 1 << 16  # bytes; nearly every header of a single image is shorter
MAX_AT_ONCE = 1 << 26  # bytes; larger files are read frame by frame
MAX_HEADER = 1 << 25  # bytes; scanners' private elements may take some million
MAX_SEQUENCE = 1 << 22  # bytes of functional groups; a thousand frames take less
MAX_READS = 300_000  # calls of read a header; each element takes two or three
MAX_ITEMS = 20_000  # items of sequences in a header
MAX_INFLATED = (1 << 27) + MAX_HEADER  # bytes of a deflated file; inflating takes twice as many

PIXEL_DATA = (0x7FE00010, 0x7FE00008, 0x7FE00009)  # of whole numbers, and of floating-point ones
ITEMS = (b"\xfe\xff\x00\xe0", b"\xff\xfe\xe0\x00")  # tags that start an item, in either byte order
UNDEFINED = 0xFFFFFFFF  # the length of encapsulated pixel data

WANTED_NAMES = """
    AcquisitionContrast AcquisitionNumber BitsAllocated BitsStored Columns EchoPulseSequence
    EchoTime EffectiveEchoTime HighBit ImageOrientationPatient ImagePositionPatient ImageType InstanceNumber
    InversionTime InversionTimes Modality NumberOfFrames PatientBirthDate PatientID PatientName
    PerFrameFunctionalGroupsSequence PhotometricInterpretation PixelRepresentation PixelSpacing ProtocolName
    RepetitionTime RescaleIntercept RescaleSlope Rows SamplesPerPixel ScanningSequence
    SeriesDescription SeriesInstanceUID SharedFunctionalGroupsSequence SOPInstanceUID
    StudyInstanceUID TransferSyntaxUID
"""
WANTED = {name: int(Tag(name)) for name in WANTED_NAMES.split()}
WANTED_TAGS = list(WANTED.values())
GROUPS = {  # PS3.3, C.7.6.16: where a multi-frame file keeps what a single image has at the top
    "EffectiveEchoTime": "MREchoSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "ImagePositionPatient": "PlanePositionSequence",
    "InversionTimes": "MRModifierSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RepetitionTime": "MRTimingAndRelatedParametersSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
}
# 16-bit numbers and floating-point ones, where the header does not say so:
SHORTS = {"BitsAllocated", "BitsStored", "Columns", "HighBit", "PixelRepresentation", "Rows", "SamplesPerPixel"}
DOUBLES = {"EffectiveEchoTime", "InversionTimes"}
TEXTS = {"AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UN", "UR", "UT"}
GROUP_TAGS = {name: int(Tag(name)) for name in set(GROUPS.values())}


class DicomError(ValueError):
    """A series that cannot be used, or a file of it, with the reason in words."""


class NotDicomError(DicomError):
    """A file that is not DICOM at all: other content, empty, or not a regular file."""


@dataclass(frozen=True)
class Tags:
    """What one header says about its image, as plain values; empty or None where it says nothing.

    Of a multi-frame file: what its frames share, or the first frame's.
    """

    file: Path
    study_uid: str
    series_uid: str
    sop_uid: str
    patient: str  # a hash of identifier, name and birth date: tells patients apart and names none
    modality: str
    description: str  # of the series and of its protocol
    image_type: tuple[str, ...]  # upper-case words
    sequence: tuple[str, ...]  # upper-case words: scanning sequence, and of an enhanced image its echoes and contrast
    orientation: tuple[float, ...] | None  # direction of growing columns, then of growing rows, LPS
    position: tuple[float, ...] | None  # of the centre of the first pixel, LPS mm
    echo_time: float | None  # ms, as the next two
    repetition_time: float | None
    inversion_time: float | None
    frames: int
    rows: int | None
    columns: int | None
    instance_number: int | None
    acquisition_number: int | None
    has_pixels: bool


@dataclass(frozen=True)
class Header:
    """The wanted part of a header, and where in `stream` the pixels begin."""

    dataset: Dataset
    syntax: str  # transfer syntax UID; empty where the file does not give it
    little: bool  # whether it is little endian
    stream: BinaryIO  # the file; of a deflated one its inflated content
    size: int  # of the stream, in bytes
    pixels_at: int | None  # where the value of the pixel data begins; None where there is none
    pixels_length: int  # of the value in bytes as the header claims, or UNDEFINED
    pixels_vr: str | None  # OF for floating-point ones; None where the header is implicit


def read_tags(file: str | Path) -> Tags:
    """Read what tells one image's study, series, body plane and contrast, without its pixels.

    Raises DicomError, and nothing else, where the file is no DICOM file or its header cannot be read.
    """
    with opened(file) as header:
        dataset = header.dataset
        groups = frame_groups(dataset, 0)

        def word(*names: str) -> tuple[str, ...]:
            """The words in these tags, upper case."""
            return tuple(part.strip() for name in names for part in text(dataset, name).upper().split("\\") if part)

        return Tags(
            file=Path(file),
            study_uid=text(dataset, "StudyInstanceUID"),
            series_uid=text(dataset, "SeriesInstanceUID"),
            sop_uid=text(dataset, "SOPInstanceUID"),
            patient=_patient(dataset),
            modality=text(dataset, "Modality").upper(),
            description=" ".join(filter(None, (text(dataset, "SeriesDescription"), text(dataset, "ProtocolName")))),
            image_type=word("ImageType"),
            sequence=word("ScanningSequence", "EchoPulseSequence", "AcquisitionContrast"),
            orientation=_tuple(find(groups, "ImageOrientationPatient", 6)),
            position=_tuple(find(groups, "ImagePositionPatient", 3)),
            echo_time=_first(find(groups, "EchoTime"), find(groups, "EffectiveEchoTime")),
            repetition_time=_first(find(groups, "RepetitionTime")),
            inversion_time=_first(find(groups, "InversionTime"), find(groups, "InversionTimes")),
            frames=whole(dataset, "NumberOfFrames") or 1,
            rows=whole(dataset, "Rows"),
            columns=whole(dataset, "Columns"),
            instance_number=whole(dataset, "InstanceNumber"),
            acquisition_number=whole(dataset, "AcquisitionNumber"),
            has_pixels=header.pixels_at is not None,
        )


@contextmanager
def opened(file: str | Path, pixels: bool = False) -> Iterator[Header]:
    """The header of a file, whose stream stays open. Errors of any kind within become a DicomError.

    pixels: True where they will be asked for, so that a file of usual size is read at one go.
    """
    try:
        with warnings.catch_warnings():  # pydicom warns of odd values in headers by the thousand
            warnings.simplefilter("ignore")
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise NotDicomError("is no file")
            with open(file, "rb", buffering=0) as stream:
                at_once = pixels and status.st_size <= MAX_AT_ONCE
                yield read_header(io.BytesIO(stream.read()) if at_once else stream, status.st_size)
    except DicomError:
        raise
    except RecursionError:
        raise DicomError("has sequences nested too deeply") from None
    except MemoryError:
        raise DicomError("claims more memory than there is") from None
    except Exception as error:  # a broken header raises anything, from KeyError to NotImplementedError
        if isinstance(error, OSError) and error.errno:  # the system's, not pydicom's
            raise DicomError(f"cannot be opened: {error.strerror}") from None
        said = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise DicomError(f"has a broken header ({said}): copy it again from the archive") from None


def read_header(stream: BinaryIO, size: int) -> Header:
    """Parse the header of a stream of `size` bytes: from a short piece of it first, from more where it is longer."""
    piece = stream.read(FIRST_READ)
    syntax, start = _file_meta(piece)
    if syntax == DeflatedExplicitVRLittleEndian:
        stream.seek(start)
        inflated = _inflate(stream.read(MAX_INFLATED))
        stream, start, size = io.BytesIO(inflated), 0, len(inflated)
        piece = inflated[:FIRST_READ]
    implicit, little = _encoding(syntax, piece[start : start + 6])
    for limit in (FIRST_READ, MAX_HEADER):
        if limit > FIRST_READ:
            stream.seek(0)
            piece = stream.read(limit)
        whole_file = len(piece) == size
        try:
            dataset, found = _parse(piece, start, implicit, little)
        except Exception:
            if whole_file or limit == MAX_HEADER:
                raise
            continue
        if found or whole_file:
            return Header(dataset, syntax, little, stream, size, *(found or (None, 0, None)))
    raise DicomError(f"has a header of more than {MAX_HEADER >> 20} MB, which no image of a scanner has")


class _Piece(io.BytesIO):
    """Bytes that can be read from a limited number of times, so that a header of nothing but tags comes to an end."""

    reads = 0

    def read(self, n: int | None = -1) -> bytes:
        """As of any stream; DicomError where it is asked too often."""
        self.reads += 1
        if self.reads > MAX_READS:
            raise DicomError("has a header of more elements than any image has")
        return super().read(n)


def _file_meta(piece: bytes) -> tuple[str, int]:
    """Transfer syntax UID (empty where none is given) and where the data set starts.

    Some archives store the data set alone, without preamble: it is taken for DICOM where it starts with a tag that can
    be the first.
    """
    start = 132 if piece[128:132] == b"DICM" else 0
    if not start and piece[:2] not in (b"\x02\0", b"\x08\0", b"\0\x08"):
        raise NotDicomError("is not a DICOM file" if piece else "is empty")
    stream = _Piece(piece)
    stream.seek(start)
    meta = read_dataset(stream, False, True, stop_when=lambda tag, _, __: tag >> 16 != 2)
    return text(meta, "TransferSyntaxUID"), stream.tell()


def _encoding(syntax: str, first: bytes) -> tuple[bool, bool]:
    """Whether a data set is implicit VR, and whether little endian; guessed from its first tag where not told."""
    if syntax:
        return syntax == ImplicitVRLittleEndian, syntax != ExplicitVRBigEndian
    if len(first) < 6 or first[4:6].decode("latin-1") not in converters:
        return True, True
    return False, struct.unpack("<H", first[:2])[0] < 1024


def _inflate(data: bytes) -> bytes:
    """A deflated data set, at most MAX_INFLATED bytes of it; what is there of a truncated one."""
    try:
        inflated = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, MAX_INFLATED + 1)
    except zlib.error as error:
        raise DicomError(f"is deflated, and broken ({error})") from None
    if len(inflated) > MAX_INFLATED:
        raise DicomError(f"inflates to more than {MAX_INFLATED >> 20} MB")
    return inflated


def _parse(
    piece: bytes, start: int, implicit: bool, little: bool
) -> tuple[Dataset, tuple[int, int, str | None] | None]:
    """The wanted elements of a header, and of its pixel data: where they begin, the length they claim, and the VR."""
    if len(piece) > 8 * MAX_ITEMS and sum(map(piece.count, ITEMS)) > MAX_ITEMS:  # each takes 8 bytes at least
        raise DicomError(f"has a header of more than {MAX_ITEMS} items of sequences")
    stream = _Piece(piece)
    stream.seek(start)
    found = None

    def at_pixels(tag: int, vr: str | None, length: int) -> bool:
        """Whether the pixels are reached, which ends the header; notes where they are."""
        nonlocal found
        if tag in PIXEL_DATA:
            found = stream.tell(), length, vr if tag == PIXEL_DATA[0] else "OF"
        return found is not None

    dataset = read_dataset(stream, implicit, little, stop_when=at_pixels, specific_tags=WANTED_TAGS)
    return dataset, found


def frame_groups(dataset: Dataset, frame: int) -> list[Dataset]:
    """Where to look for a value of a frame: its own functional groups, then the shared ones, then the data set."""
    places = []
    for name, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = _items(dataset, WANTED[name])
        places += items[index : index + 1]
    return [*places, dataset]


def find(places: list[Dataset], name: str, n: int | None = None) -> list[float] | None:
    """The finite numbers of a tag in the first place that has it; None where none has, or not n of them."""
    for place in places:
        if name in GROUPS and place is not places[-1]:
            group = _items(place, GROUP_TAGS[GROUPS[name]])
            values = numbers(group[0], name) if group else None
        else:
            values = numbers(place, name)
        if values and (n is None or len(values) == n):
            return values
    return None


def numbers(dataset: Dataset, name: str) -> list[float] | None:
    """The numbers of a tag; None where it has none, or something that is no finite number."""
    try:
        values = [float(part) for part in text(dataset, name).split("\\")]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def whole(dataset: Dataset, name: str) -> int | None:
    """The first number of a tag as a whole one; None where there is none."""
    values = numbers(dataset, name)
    return int(values[0]) if values and values[0] == int(values[0]) else None


def text(dataset: Dataset, name: str) -> str:
    """The value of a tag as text, parts joined by a backslash; empty where it is missing or cannot be read.

    Text and numbers of a header are turned into Python's here, for pydicom's own way costs as much as the reading.
    """
    tag = WANTED[name]
    element = dataset.get_item(tag)
    if element is None:
        return ""
    if isinstance(element, RawDataElement) and isinstance(element.value, bytes):
        if element.VR == "US" or (element.VR is None and name in SHORTS):
            return str(int.from_bytes(element.value[:2], "little" if element.is_little_endian else "big"))
        if name not in DOUBLES and (element.VR is None or element.VR in TEXTS):
            return element.value.decode("latin-1").strip(" \0\t\r\n")
    try:
        value = dataset[tag].value
    except Exception:  # whatever pydicom makes of a broken element
        return ""
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        return "" if value is None else str(value)
    return "\\".join(str(part) for part in value)


def _items(dataset: Dataset, tag: int) -> Sequence | list[Dataset]:
    """The items of a sequence; none where it is missing or no sequence."""
    element = dataset.get_item(tag)
    if element is None:
        return []
    if isinstance(element, RawDataElement) and len(element.value or b"") > MAX_SEQUENCE:
        raise DicomError(f"has functional groups of more than {MAX_SEQUENCE >> 20} MB, which no image of a scanner has")
    value = dataset[tag].value
    return value if isinstance(value, Sequence) else []


def _patient(dataset: Dataset) -> str:
    """Identifier, name and birth date of the patient as a short hash; empty where there are none."""
    known = "|".join(text(dataset, name) for name in ("PatientID", "PatientName", "PatientBirthDate"))
    return hashlib.sha256(known.encode()).hexdigest()[:16] if known.strip("|") else ""


def _tuple(values: list[float] | None) -> tuple[float, ...] | None:
    return None if values is None else tuple(values)


def _first(*found: list[float] | None) -> float | None:
    return next((values[0] for values in found if values), None)
