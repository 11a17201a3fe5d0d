"""Key images of an export: which image shows a row, and how a structured report can refer to it. It refers to the
sources if the UIDs of all of them are legal (PS3.5, 9.1) and unique in the data. The competition's are bare numbers and
collide: key images are then written with UIDs derived from study, series and the file's bytes (PS3.5 B.2), with only
geometry and contrast of the sources' headers. The patient is named by the study's number in the data set."""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from lsdc_utils import geometry
from lsdc_utils.data.competition import Competition
from lsdc_utils.data.parts import select
from lsdc_utils.data.stacks import described, read_study
from lsdc_utils.dicom import Series, Slice, read_series
from lsdc_utils.dicom.headers import integer
from lsdc_utils.grading.marks import REACH
from lsdc_utils.grading.run_tables import BLOCKS
from lsdc_utils.vocabulary import GROUPS

UIDS = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
LEGAL_UID = re.compile(r"[0-2](\.(0|[1-9]\d*)){2,}")
CONTRAST = ("ScanningSequence", "SequenceVariant", "EchoTime", "RepetitionTime", "FlipAngle", "MagneticFieldStrength",
            "SliceThickness", "SpacingBetweenSlices")  # fmt: skip
EMPTY = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID",
         "ReferringPhysicianName")  # fmt: skip
REQUIRED = ("EchoTime", "RepetitionTime", "EchoTrainLength", "SliceThickness", "PositionReferenceIndicator",
            "ScanOptions", "MRAcquisitionType")  # fmt: skip

UidCounts = Callable[[], Counter]  # gives `count_uids` of the data, where that is needed


@dataclass(frozen=True)
class Key:
    """An image that a row refers to, and the point's column and row on it."""

    image: Slice
    pixels: np.ndarray | None  # (rows, cols) if the image has to be written
    header: Dataset  # UIDs, class, the study's number as the patient; the rest of what is required is empty
    before: dict[str, str]  # the source's own UIDs
    point: tuple[float, float]
    several: bool = False  # whether the file that is referred to holds more frames than this one


def count_uids(comp: Competition) -> Counter:
    """Number of files of the data by SOP Instance UID, from their headers."""
    uids = Counter()
    for row in comp.series.itertuples():
        source = comp.source(row.split, row.study_id, row.series_id)
        files = source.glob("*") if isinstance(source, Path) else {getattr(part, "file", part) for part in source}
        for file in filter(Path.is_file, files):
            with contextlib.suppress(OSError, AttributeError, pydicom.errors.InvalidDicomError):
                header = pydicom.dcmread(file, specific_tags=["SOPInstanceUID"], stop_before_pixels=True)
                uids[str(header.SOPInstanceUID)] += 1
    return uids


def find_keys(comp: Competition, counts: UidCounts, rows: pd.DataFrame) -> tuple[dict[str, Key], list[str]]:
    """Of the images that grading used, the one nearest to the point of each row that has one, by row id; and which
    series it could not use. Either all are referred to by their own UIDs or none, since a report is of one study."""
    study, split = int(rows["study_id"].iloc[0]), BLOCKS[rows["block"].iloc[0]]
    stacks, findings = read_study(comp, split, study)
    read, used, chosen = {}, {stack.series_id: stack for stack in stacks}, {}
    left_out = findings[findings["rule"].str.startswith("series_") | (findings["rule"] == "patient_differs")]
    left_out = left_out.loc[~left_out["series_id"].isin(used), ["series_id", "value"]].to_numpy()
    problems = [text if text.startswith("series ") else f"series {number}: {text}" for number, text in left_out]
    for source, _, series_id, kind, labelled in described(comp, split, study):
        if series_id in used:
            series = read_series(select(source, kind)[0], labelled=labelled)
            numbers = used[series_id].instance_numbers
            shown = [n for n, image in enumerate(series.slices) if image.instance_number in numbers]
            slices, pixels = tuple(series.slices[n] for n in shown), [series.pixels[n] for n in shown]
            read.setdefault(kind, []).append((series_id, replace(series, slices=slices, pixels=pixels)))
    for row in rows[rows["X"].notna()].itertuples():
        places = [(*_nearest(series, row), key, series) for key, series in read.get(GROUPS[row.group].series_type, ())]
        n, x, y, off, series_id, series = min(places, key=lambda place: place[3], default=(0, 0, 0, np.inf, 0, None))
        if off <= REACH:
            chosen[row.row_id] = (series_id, series, n, (x, y))
    files = {series.slices[n].file for _, series, n, _ in chosen.values()}
    own = all(_referable(counts, pydicom.dcmread(file, stop_before_pixels=True)) for file in files)
    return {row: _key(own, study, *place) for row, place in chosen.items()}, problems


def _nearest(series: Series, row) -> tuple[int, float, float, float]:
    """Of the image nearest to a row's point: index in the series, column, row, mm off the image, also beside it."""
    n, x, y, _ = series.to_pixel(row.X, row.Y, row.Z)
    image, point = series.slices[n], np.array([[row.X, row.Y, row.Z]])
    return n, x, y, geometry.image_distances(image.affine[None], np.array([image.shape]), point).item()


def _referable(counts: UidCounts, source: Dataset) -> bool:
    """Whether the UIDs of a file are legal, and that of its image unique."""
    own = [str(source.get(name, "")) for name in UIDS]
    return all(LEGAL_UID.fullmatch(uid) and len(uid) <= 64 for uid in own) and counts()[own[2]] == 1


def _key(own_uids: bool, study: int, series_id: int, series: Series, n: int, point: tuple[float, float]) -> Key:
    """One image and how to refer to it: by its own UIDs or by new ones."""
    image, pixels = series.slices[n], series.pixels[n]
    source = pydicom.dcmread(image.file, stop_before_pixels=True)
    header = Dataset()
    for name in EMPTY:
        setattr(header, name, "")
    header.PatientID, header.PatientName, header.Modality = str(study), f"Study^{study}", "MR"
    own = before = {name: str(source.get(name, "")) for name in UIDS}
    if own_uids:
        pixels = None
    else:
        place = f"{study}/{series_id}"
        bytes_of = f"{place}/{image.frame}/".encode() + image.file.read_bytes()
        own = dict(zip(UIDS, (new_uid(str(study)), new_uid(place), new_uid(bytes_of), MRImageStorage), strict=True))
        for name in CONTRAST:
            if source.get(name) not in (None, ""):
                setattr(header, name, source.get(name))
        header.SeriesNumber = series_id % 2**31
    for name, uid in own.items():
        setattr(header, name, uid)
    header.Rows, header.Columns = image.shape
    several = pixels is None and (integer(source, "NumberOfFrames") or 1) > 1
    return Key(image, pixels, header, before, point, several)


def new_uid(content: str | bytes) -> str:
    """The UID 2.25.<UUID as a number> derived from a content (PS3.5, B.2)."""
    digest = bytearray(hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x80, digest[8] & 0x3F | 0x80  # version 8 and variant of RFC 9562
    return f"2.25.{int.from_bytes(digest, 'big')}"


def write_images(keys: list[Key], folder: Path, when: datetime) -> None:
    """Write the images with new UIDs to images/, and the table of their sources."""
    (folder / "images").mkdir()
    lines = []
    for number, key in enumerate(keys, 1):
        name = f"images/{number}.dcm"
        _make_image(key, number, when).save_as(folder / name, enforce_file_format=True)
        line = {"image": name, "file": "/".join(key.image.file.parts[-3:]), "frame": key.image.frame + 1}
        for word in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            line |= {f"{word}_before": key.before[word], word: key.header[word].value}
        lines.append(line)
    pd.DataFrame(lines).to_csv(folder / "uids.csv", index=False)


def _make_image(key: Key, number: int, when: datetime) -> Dataset:
    """A key image as an MR image (PS3.3, A.4) with its source's geometry, contrast and values only."""
    header, image = Dataset(), key.image
    header.update(key.header)
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.Manufacturer = ""
    header.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    header.BodyPartExamined, header.PatientPosition = "LSPINE", "HFS"
    for name in REQUIRED:
        setattr(header, name, header.get(name))
    header.ScanningSequence = header.get("ScanningSequence") or "RM"
    header.SequenceVariant = header.get("SequenceVariant") or "NONE"
    header.ContentDate, header.ContentTime = when.strftime("%Y%m%d"), when.strftime("%H%M%S")
    header.InstanceNumber = number
    header.FrameOfReferenceUID = new_uid(f"{header.StudyInstanceUID}/frame")
    header.ImagePositionPatient = [f"{value:.6f}"[:16] for value in image.affine[:3, 3]]
    directions = geometry.unit(image.affine[:3, :2].T)
    header.ImageOrientationPatient = [f"{value:.6f}"[:16] for value in directions.ravel()]
    header.PixelSpacing = [f"{value:.6f}"[:16] for value in image.spacing[::-1]]
    # 16 bits: unchanged if the values fit, else scaled to 12 bits; MR signal has no unit.
    values = key.pixels.astype(np.float64)
    values[~np.isfinite(values)] = np.min(values, where=np.isfinite(values), initial=values.max())  # padding
    whole = np.round(values)
    if whole.min() < -(2**15) or whole.max() >= 2**15 or not np.array_equal(whole, values):
        whole = np.round(np.interp(values, (values.min(), values.max()), (0, 4095)))
    low, high = np.percentile(whole, (1, 99))
    header.WindowCenter, header.WindowWidth = int((low + high) / 2), max(1, int(high - low))
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
    header.PixelData = whole.astype("<i2").tobytes()
    return header
