"""A run's grades for other systems: a tidy table, and a DICOM structured report, for each study in a folder of its own.

    exports/<study>/grades.csv   25 rows: natural probabilities, grade, source, point (LPS mm), label where known
    exports/<study>/sr.dcm       the same as a DICOM SR by template TID 1500 (PS3.16), with references to key images
    exports/<study>/images/      key images, only where the sources' own UIDs cannot be referred to
    exports/<study>/uids.csv     what those were renamed from: file, frame and UIDs before and after

The SR refers to the sources where their UIDs are legal (PS3.5, 9.1) and no other file of the data has the same. The
competition's are bare numbers and collide: study, series and instance then get UIDs derived from study, series and the
file's bytes (2.25 and a UUID, PS3.5 B.2), and key images are written with them. Of the sources' headers only geometry
and contrast are taken over; a patient is named by the study's number in the data set.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from highdicom import sr
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

from lsdc_utils import geometry
from lsdc_utils.data.competition import Competition
from lsdc_utils.dicom import DicomError, Series, Slice, read_series
from lsdc_utils.files import git_commit
from lsdc_utils.grading.marks import REACH, SHORT_NAMES
from lsdc_utils.grading.run_tables import BLOCKS, SOURCE_NAMES, read_data, read_graded
from lsdc_utils.vocabulary import GROUPS, LEVEL_NAMES, LEVELS, SEVERITIES, SEVERITY_NAMES

NAME = "lsdc_utils: grading of lumbar-spine MRI"
NOTICE = "Research software, not for clinical use"
SCHEME = "99LSDC"  # private codes, where SNOMED CT has none that is known here
LEGAL_UID = re.compile(r"[0-2](\.(0|[1-9]\d*)){2,}")
CONTRAST = ("ScanningSequence", "SequenceVariant", "EchoTime", "RepetitionTime", "FlipAngle", "MagneticFieldStrength",
            "SliceThickness", "SpacingBetweenSlices")  # fmt: skip

EMPTY = ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber", "StudyID",
         "ReferringPhysicianName")  # fmt: skip

FINDINGS = {
    "scs": codes.SCT.Stenosis,
    "nfn": Code("NFN", SCHEME, "Neural foraminal narrowing"),
    "ss": Code("SAS", SCHEME, "Subarticular stenosis"),
}
SITES = {"scs": codes.SCT.SpinalCanalStructure, "nfn": codes.SCT.LumbarSpine, "ss": codes.SCT.LumbarSpine}
LEVEL_CODES = dict(
    zip(
        LEVELS,
        (
            codes.SCT.LevelOfL1L2IntervertebralDisc,
            codes.SCT.LevelOfL2L3IntervertebralDisc,
            codes.SCT.LevelOfL3L4IntervertebralDisc,
            codes.SCT.LevelOfL4L5IntervertebralDisc,
            codes.SCT.LevelOfL5S1IntervertebralDisc,
        ),
        strict=True,
    )
)
SIDE_CODES = {"left": codes.SCT.Left, "right": codes.SCT.Right, "": None}
GRADES = (Code("NORMALMILD", SCHEME, "Normal or mild"), codes.SCT.Moderate, codes.SCT.Severe)
CHANCES = tuple(Code(f"P{k}", SCHEME, f"Probability of {name.lower()}") for k, name in enumerate(SEVERITY_NAMES))
SOURCES = {name: Code(f"FROM{k}", SCHEME, words) for k, (name, words) in enumerate(SOURCE_NAMES.items())}


Counted = Callable[[str], int]  # how many files of the data have a SOP Instance UID


class ExportError(ValueError):
    """What cannot be exported, with the run or the study and the reason."""


@dataclass(frozen=True)
class Key:
    """An image that a row refers to: the source, as what it is referred to, and the point's column and row on it."""

    image: Slice
    pixels: np.ndarray | None  # (rows, cols) where the image has to be written anew
    header: Dataset  # UIDs, class and the patient's stand-in; else what the standard wants, empty
    before: dict[str, str]  # the source's own UIDs
    point: tuple[float, float]


def export_studies(
    run_dir: str | Path, study_ids: Iterable[int] | None = None, out: str | Path | None = None
) -> pd.DataFrame:
    """Export studies of a finished run to `out` (default: <run>/exports); a line a study: what its folder holds.

    study_ids: graded studies; default: the test studies, or all graded out of fold where there are none.
    A study's folder appears whole or not at all, and takes the place of an earlier one.
    Columns: study_id, block, images_referred (in the SR), images_written, problem (what could not be read).
    Raises ExportError where the run has no grades or did not grade a study.
    """
    run = Path(run_dir)
    tables = {
        block: read_graded(run, block) for block in BLOCKS if (run / f"predictions/sources_{block}.parquet").is_file()
    }
    if not tables:
        raise ExportError(f"the run in {run} has no grades: run it up to 05_ensemble_inference")
    comp, folder = read_data(run), Path(out or run / "exports")
    known = {int(study): block for block, table in tables.items() for study in table["study_id"].unique()}
    default = "test" if len(tables.get("test", ())) else "oof"
    asked = [study for study, block in known.items() if block == default] if study_ids is None else list(study_ids)
    if strange := [str(study) for study in asked if study not in known]:
        raise ExportError(f"the run in {run} did not grade {', '.join(strange)}")
    when = datetime.datetime.fromtimestamp((run / "scores.json").stat().st_mtime)
    seen, lines = uid_counter(comp), []
    for number, study in enumerate(sorted(asked), 1):
        rows = tables[known[study]]
        mine = rows[rows["study_id"] == study]
        lines.append(_export_study(comp, seen, mine, folder / str(study), when))
        if number % 20 == 0:
            print(f"exported study {number}/{len(asked)}", flush=True)
    return pd.DataFrame(lines, columns=["study_id", "block", "images_referred", "images_written", "problem"])


def _export_study(comp: Competition, seen: Counted, rows: pd.DataFrame, folder: Path, when: datetime.datetime) -> tuple:
    """Write one study's folder; its line of the table that is returned."""
    study, block = int(rows["study_id"].iloc[0]), rows["block"].iloc[0]
    beside = folder.with_name(f".writing-{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    rows.drop(columns=["block"]).to_csv(beside / "grades.csv", index=False, float_format="%.6f")
    keys, problems = find_keys(comp, seen, rows)
    new = {key.header.SOPInstanceUID: key for key in keys.values() if key.pixels is not None}
    if keys:
        report = make_report(rows, keys, when)
        report.save_as(beside / "sr.dcm", enforce_file_format=True)
        if new:
            _write_images(new, beside, when)
    else:
        problems.append("no image to refer to, so there is no sr.dcm")
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    referred = len({key.header.SOPInstanceUID for key in keys.values()})
    return study, block, referred, len(new), "; ".join(problems)


# ---- key images ----------------------------------------------------------------------------------------------------


def uid_counter(comp: Competition) -> Counted:
    """Tells how many files of the data have a SOP Instance UID; they are looked through when it is first asked."""

    def files(row) -> list[Path]:
        """Files of a series, a row of the series table."""
        source = comp.source(row.split, row.study_id, row.series_id)
        if not isinstance(source, Path):
            return list(source)
        return sorted(file for file in source.iterdir() if file.is_file()) if source.is_dir() else []

    @functools.cache
    def counts() -> Counter:
        """How many files have a UID, by UID."""
        return Counter(_uid(file) for row in comp.series.itertuples() for file in files(row))

    return lambda uid: counts()[uid]


def _uid(file: Path) -> str:
    """The SOP Instance UID of a file; empty where it cannot be read."""
    try:
        return str(pydicom.dcmread(file, specific_tags=["SOPInstanceUID"], stop_before_pixels=True).SOPInstanceUID)
    except (OSError, AttributeError, pydicom.errors.InvalidDicomError):
        return ""


def find_keys(comp: Competition, seen: Counted, rows: pd.DataFrame) -> tuple[dict[str, Key], list[str]]:
    """The image nearest to the point of each row that has one, by row id, and what could not be read."""
    study = int(rows["study_id"].iloc[0])
    split = BLOCKS[rows["block"].iloc[0]]
    mine = comp.series[(comp.series["study_id"] == study) & (comp.series["split"] == split)]
    keys, problems = {}, []
    for series_type, described in mine.groupby("series_type", sort=True):
        wanted = [r for r in rows.itertuples() if GROUPS[r.group].series_type == series_type and r.X == r.X]
        read = []
        for series_id in described["series_id"] if wanted else ():
            try:
                read.append((int(series_id), read_series(comp.source(split, study, series_id))))
            except DicomError as error:
                problems.append(str(error))
        for row in wanted if read else ():
            found = [(series.to_pixel(row.X, row.Y, row.Z), series_id, series) for series_id, series in read]
            (n, x, y, off), series_id, series = min(found, key=lambda one: one[0][3])
            if off <= REACH:
                keys[row.row_id] = _key(seen, study, series_id, series, n, (x, y))
    return keys, problems


def _key(seen: Counted, study: int, series_id: int, series: Series, n: int, point: tuple[float, float]) -> Key:
    """One image as it can be referred to: by its own UIDs where they are legal and unique, else by new ones."""
    image, pixels = series.slices[n], series.pixels[n]
    source = pydicom.dcmread(image.file, stop_before_pixels=True)
    header = Dataset()
    for name in EMPTY:
        setattr(header, name, "")
    header.PatientID, header.PatientName, header.Modality = str(study), f"Study^{study}", "MR"
    names = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "SOPClassUID")
    own = before = {name: str(source.get(name, "")) for name in names}
    legal = all(LEGAL_UID.fullmatch(uid) and len(uid) <= 64 for uid in own.values())
    if legal and seen(own["SOPInstanceUID"]) == 1:
        pixels = None
    else:
        place = f"{study}/{series_id}"
        bytes_of = f"{place}/{image.frame}/".encode() + image.file.read_bytes()
        own = dict(zip(names, (new_uid(str(study)), new_uid(place), new_uid(bytes_of), MRImageStorage), strict=True))
        for name in CONTRAST:
            if source.get(name) not in (None, ""):
                setattr(header, name, source.get(name))
        header.SeriesNumber = series_id % 2**31
    for name, uid in own.items():
        setattr(header, name, uid)
    header.Rows, header.Columns = image.shape
    return Key(image, pixels, header, before, point)


def new_uid(content: str | bytes) -> str:
    """The UID 2.25.<UUID as a number> that a content always gets (PS3.5, B.2)."""
    digest = bytearray(hashlib.sha256(content.encode() if isinstance(content, str) else content).digest()[:16])
    digest[6], digest[8] = digest[6] & 0x0F | 0x80, digest[8] & 0x3F | 0x80  # version 8 and variant of RFC 9562
    return f"2.25.{int.from_bytes(digest, 'big')}"


def _write_images(keys: dict[str, Key], folder: Path, when: datetime.datetime) -> None:
    """Write the images that got new UIDs to images/, and the table of what they were."""
    (folder / "images").mkdir()
    lines = []
    for number, key in enumerate(keys.values(), 1):
        name = f"images/{number}.dcm"
        make_image(key, number, when).save_as(folder / name, enforce_file_format=True)
        line = {"image": name, "file": "/".join(key.image.file.parts[-3:]), "frame": key.image.frame + 1}
        for word in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            line |= {f"{word}_before": key.before[word], word: key.header[word].value}
        lines.append(line)
    pd.DataFrame(lines).to_csv(folder / "uids.csv", index=False)


def make_image(key: Key, number: int, when: datetime.datetime) -> Dataset:
    """A key image as an MR image (PS3.3, A.4) with its source's geometry, contrast and values alone."""
    header, image = Dataset(), key.image
    header.update(key.header)
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.Manufacturer = ""
    header.ImageType = ["DERIVED", "SECONDARY", "OTHER"]
    header.BodyPartExamined, header.PatientPosition = "LSPINE", "HFS"
    for name in ("PositionReferenceIndicator", "ScanOptions", "MRAcquisitionType"):
        setattr(header, name, "")
    for name in ("EchoTime", "RepetitionTime", "EchoTrainLength", "SliceThickness"):
        if name not in header:
            setattr(header, name, None)
    header.ScanningSequence = header.get("ScanningSequence") or "RM"
    header.SequenceVariant = header.get("SequenceVariant") or "NONE"
    header.ContentDate, header.ContentTime = when.strftime("%Y%m%d"), when.strftime("%H%M%S")
    header.InstanceNumber = number
    header.FrameOfReferenceUID = new_uid(f"{header.StudyInstanceUID}/frame")
    header.ImagePositionPatient = [f"{value:.6f}"[:16] for value in image.affine[:3, 3]]
    directions = geometry.unit(image.affine[:3, :2].T)
    header.ImageOrientationPatient = [f"{value:.6f}"[:16] for value in directions.ravel()]
    header.PixelSpacing = [f"{value:.6f}"[:16] for value in image.spacing[::-1]]
    _set_pixels(header, key.pixels)
    return header


def _set_pixels(header: Dataset, pixels: np.ndarray) -> None:
    """Values as 16 bits: as they are where they fit, else stretched over 12 bits; MR signal has no unit."""
    whole = np.round(np.nan_to_num(pixels.astype(np.float64)))
    if whole.min() < -(2**15) or whole.max() >= 2**15 or not np.array_equal(whole, pixels):
        low, high = float(pixels.min()), float(pixels.max())
        whole = np.round((pixels - low) / max(high - low, 1e-12) * 4095)
    low, high = np.percentile(whole, (1, 99))
    header.WindowCenter, header.WindowWidth = int((low + high) / 2), max(1, int(high - low))
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated, header.BitsStored, header.HighBit, header.PixelRepresentation = 16, 16, 15, 1
    header.PixelData = whole.astype("<i2").tobytes()


# ---- the structured report -----------------------------------------------------------------------------------------


def make_report(rows: pd.DataFrame, keys: dict[str, Key], when: datetime.datetime) -> sr.ComprehensiveSR:
    """The 25 rows as a structured report by TID 1500: unverified, by a device."""
    study_uid, version = next(iter(keys.values())).header.StudyInstanceUID, git_commit()
    device = sr.DeviceObserverIdentifyingAttributes(
        uid=new_uid(NAME), name=NAME, manufacturer_name="lsdc_utils", model_name=NOTICE
    )
    observer = sr.ObserverContext(codes.DCM.Device, device)
    content = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=Code("113091000", "SCT", "Magnetic resonance imaging"),
        imaging_measurements=[_finding(row, keys.get(row.row_id), study_uid, version) for row in rows.itertuples()],
        title=codes.DCM.ImagingMeasurementReport,
    )
    report = sr.ComprehensiveSR(
        evidence=list({key.header.SOPInstanceUID: key.header for key in keys.values()}.values()),
        content=content[0],
        series_instance_uid=new_uid(f"{study_uid}/report"),
        series_number=1,
        sop_instance_uid=new_uid(f"{study_uid}/report/{rows.to_csv(index=False)}"),
        instance_number=1,
        manufacturer="lsdc_utils",
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    report.SeriesDescription = NOTICE
    report.SoftwareVersions, report.ManufacturerModelName = version, NAME
    scheme = Dataset()
    scheme.CodingSchemeDesignator, scheme.CodingSchemeName = SCHEME, f"Private codes of {NAME}"
    scheme.CodingSchemeResponsibleOrganization = "lsdc_utils"
    report.CodingSchemeIdentificationSequence = [scheme]
    # Not the time of the export, so that the same grades give the same file.
    for dataset in (report, *report.ContributingEquipmentSequence):
        for element in dataset:
            if element.value and element.VR in ("DA", "TM", "DT"):
                element.value = when.strftime({"DA": "%Y%m%d", "TM": "%H%M%S", "DT": "%Y%m%d%H%M%S"}[element.VR])
    return report


def _finding(row, key: Key | None, study_uid: str, version: str) -> sr.MeasurementsAndQualitativeEvaluations:
    """One row: site, level and side, its grade, three probabilities, where it came from, and its point."""
    name = f"{LEVEL_NAMES[LEVELS.index(row.level)]} {SHORT_NAMES[row.condition]}"
    chances = (getattr(row, severity) for severity in SEVERITIES)
    common = {
        "tracking_identifier": sr.TrackingIdentifier(new_uid(f"{study_uid}/{row.condition}/{row.level}"), name),
        "finding_type": FINDINGS[row.group],
        "finding_sites": [
            sr.FindingSite(SITES[row.group], SIDE_CODES[row.side], topographical_modifier=LEVEL_CODES[row.level])
        ],
        "algorithm_id": sr.AlgorithmIdentification(NAME, version=version),
        "measurements": [
            sr.Measurement(name=code, value=round(float(chance), 6), unit=codes.UCUM.NoUnits)
            for code, chance in zip(CHANCES, chances, strict=True)
        ],
        "qualitative_evaluations": [
            sr.QualitativeEvaluation(codes.SCT.Severity, GRADES[row.grade]),
            sr.QualitativeEvaluation(Code("SOURCE", SCHEME, "Source of the row"), SOURCES[row.source]),
        ],
    }
    if key is None:
        return sr.MeasurementsAndQualitativeEvaluations(**common)
    frames = [key.image.frame + 1] if key.pixels is None and key.image.frame else None
    uids = (str(key.header.SOPClassUID), str(key.header.SOPInstanceUID))
    place = np.array([key.point]) + 0.5  # SCOORD counts from the corner of the first pixel (PS3.3, C.18.6)
    region = sr.ImageRegion(sr.GraphicTypeValues.POINT, place, sr.SourceImageForRegion(*uids, frames))
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(referenced_region=region, **common)
