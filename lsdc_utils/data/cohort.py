"""What headers tell of a folder's studies as a group, and whether models were trained on any of them; names no one."""

import hashlib
import json
import re
import secrets
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lsdc_utils import dicom, vocabulary
from lsdc_utils.data.competition import Competition, read_required_table
from lsdc_utils.dicom.headers import first_number, frame_datasets, opened, text
from lsdc_utils.parallel import each

TRAITS = ("manufacturer", "field_strength", "slice_thickness", "age", "sex")
NAMES = ("Manufacturer", "MagneticFieldStrength", "SliceThickness", "PatientAge", "PatientSex")
TRAINED_ON = "trained_on.json"  # in a run's folder and in what `pack` makes of it
FEW_STUDIES = 20  # below this, starting processes takes longer than reading
# A legal UID with a root. Those of the competition are bare numbers, which collide: pixels alone tell them apart.
REAL_UID = re.compile(r"[0-2](\.(0|[1-9]\d*)){4,}")
Sources = list[dicom.Source]  # of a study's series


def sources_of(comp: Competition, studies: Collection[int]) -> list[Sources]:
    """The series of each study, sagittal T2 first."""
    series = comp.series[comp.series["study_id"].isin(studies)]
    order = series["series_type"].map([vocabulary.T2, *vocabulary.SERIES_TYPES].index)
    by_study = dict(list(series.iloc[np.argsort(order, kind="stable")].groupby("study_id")))
    keys = ["split", "study_id", "series_id"]
    return [[comp.source(*key) for key in by_study[study][keys].itertuples(index=False)] for study in studies]


def describe(comp: Competition, studies: Collection[int], workers: int = 1) -> pd.DataFrame:
    """One line a study: study_id, patient (a number that its studies share) and `TRAITS` as classes, '' if unknown.

    From headers, replaced by what a patients.csv in the folder says (study_id, and any of patient_id and `TRAITS`).
    Without an identifier, or where all studies have the same, each study is a patient of its own.
    """
    lines = list(each(_facts, sources_of(comp, studies), workers, FEW_STUDIES, chunk=4))
    table = pd.DataFrame(lines, columns=["patient", *TRAITS], index=pd.Index(studies, name="study_id"), dtype=object)
    if (file := comp.root / "patients.csv").is_file():
        header = pd.read_csv(file, sep=None, engine="python", nrows=0).columns.str.strip().str.lower()
        columns = ["study_id", *header.intersection(["patient_id", *TRAITS])]
        given = read_required_table(file, columns, ["study_id"]).drop_duplicates("study_id")
        table.update(given.set_index("study_id").rename(columns={"patient_id": "patient"}))
    named = table["patient"].replace("", np.nan)
    anonymous = len(table) > 1 and named.nunique() == 1 and named.notna().all()
    patient = pd.Series([f"study {study}" for study in studies], table.index) if anonymous else named
    table["patient"] = pd.factorize(patient.fillna(pd.Series(studies, table.index).astype(str)))[0]
    for name in TRAITS:
        table[name] = table[name].fillna("").astype(str).map(partial(_class_of, name))
    return table.reset_index()


def _facts(sources: Sources) -> list[str]:
    """Patient (a hash) and `TRAITS` as text, each of the first series whose first readable file has it."""
    facts = [""] * (1 + len(TRAITS))
    for source in sources:
        for part in dicom.series_files(source)[1] if not isinstance(source, Path) or source.is_dir() else ():
            try:
                patient = dicom.read_tags(part.file).patient
                with opened(part.file) as header:
                    datasets = frame_datasets(header.dataset, 0)
                    thickness = first_number(datasets, "SliceThickness")
                    found = [text(header.dataset, name) for name in NAMES]
            except dicom.DicomError:
                continue
            found[2] = "" if thickness is None else str(thickness)
            facts = [known or new for known, new in zip(facts, [patient, *found], strict=True)]
            break
    return facts


def _class_of(trait: str, value: str) -> str:
    """The class of a value of `TRAITS`, as a person reads it; '' for a value that cannot be read."""
    number = re.match(r"\s*(\d+(?:[.,]\d+)?)\s*([DWM]?)", value.upper())
    amount = float(number[1].replace(",", ".")) if number else np.nan
    if trait == "manufacturer":
        return (re.findall(r"[A-Z]+", value.upper()) or [""])[0]
    if trait == "sex":
        return {"M": "male", "F": "female"}.get(value.strip()[:1].upper(), "")
    if not np.isfinite(amount):
        return ""
    if trait == "age":
        amount = 0 if number[2] else amount  # given in days, weeks or months
        return "under 40" if amount < 40 else "40 to 59" if amount < 60 else "60 and over"
    if trait == "slice_thickness":
        return "under 4 mm" if amount < 4 else "4 mm and more"
    return f"{amount / 10_000 if amount > 100 else amount:.1f} T"  # some write gauss


def fingerprints(comp: Competition, studies: Collection[int], workers: int = 1) -> list[dict[str, Any]]:
    """The content of `TRAINED_ON` for these studies: [{"salt", "hashes"}], of one image of each series."""
    salt, found = secrets.token_hex(16), set()
    for keys in _keys(comp, studies, workers, every=False):
        found |= {_salted(salt, key) for key in keys}
    return [{"salt": salt, "hashes": sorted(found)}]


def trained_on(folder: Path) -> list[dict[str, Any]]:
    """What a run, or packed models, in `folder` recorded of their training images, and the run that it began with."""
    files, parameters = [folder / TRAINED_ON], folder / "parameters.yml"
    begun = yaml.safe_load(parameters.read_text()).get("start_from") if parameters.is_file() else ""
    own = json.loads(files[0].read_text()) if files[0].is_file() else []
    return own + (trained_on(Path(begun)) if begun and Path(begun) != folder else [])


def overlap(blocks: list[dict[str, Any]], comp: Competition, studies: Collection[int], workers: int = 1) -> list[int]:
    """Those of `studies` of which an image is, by UID or by pixels, among the training images in `blocks`."""
    seen = [(block["salt"], set(block["hashes"])) for block in blocks]
    found = zip(studies, _keys(comp, studies, workers, every=True), strict=True)
    return [study for study, keys in found if any(_salted(salt, key) in known for salt, known in seen for key in keys)]


def _keys(comp: Competition, studies: Collection[int], workers: int, every: bool) -> Iterator[set[str]]:
    return each(partial(_study_keys, every=every), sources_of(comp, studies), workers, FEW_STUDIES, chunk=4)


def _study_keys(sources: Sources, every: bool) -> set[str]:
    """What names images of these series, of each middle file or of `every` one: UIDs, and hashes of pixels.

    Images of one value are not distinct. Series that cannot be read have none.
    """
    keys = set()
    for source in sources:
        try:
            parts = dicom.series_files(source)[1]
            series = dicom.read_series(source if every else parts[len(parts) // 2 :][:1], labelled=False)
            images = list(zip(series.slices, series.pixels, strict=True))
            images = images if every else images[len(images) // 2 :][:1]
            uids = {dicom.read_tags(file).sop_uid for file in {image.file for image, _ in images}}
        except dicom.DicomError:
            continue
        keys |= {uid for uid in uids if REAL_UID.fullmatch(uid)}
        grey = [np.ascontiguousarray(pixels, dtype=np.float32) for _, pixels in images if np.ptp(pixels) > 0]
        keys |= {hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest() for image in grey}
    return keys


def _salted(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt} {key}".encode()).hexdigest()[:16]
