"""What headers tell of a folder's studies as a group, and whether models were trained on any of them; names no one."""

import contextlib
import hashlib
import json
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from lsdc_utils import dicom, vocabulary
from lsdc_utils.data.competition import Competition
from lsdc_utils.data.tables import IDS, CompetitionError, read_required_table, row_keys
from lsdc_utils.dicom.headers import first_number, frame_datasets, opened, text
from lsdc_utils.parallel import each

TRAITS = {"manufacturer": "Manufacturer", "field_strength": "MagneticFieldStrength", "age": "PatientAge",
          "sex": "PatientSex", "slice_thickness": "SliceThickness"}  # fmt: skip
TRAINED_ON = "trained_on.json"  # in a run's folder and in what `pack` makes of it
MOST_STUDIES = 10  # of one patient; an identifier in more headers is a word for everyone
FEW_STUDIES = 20  # below this, starting processes takes longer than reading
# A legal UID with a root. Those of the competition are bare numbers, which collide: pixels alone tell them apart.
REAL_UID = re.compile(r"[0-2](\.(0|[1-9]\d*)){4,}")


def describe(comp: Competition, studies: Sequence[int], workers: int = 1, graded: Iterable[Path] = ()) -> pd.DataFrame:
    """One line a study: study_id, patient (a number that its studies share) and `TRAITS` as text, '' if unknown. A
    patients.csv in the folder (study_id, and any of these) takes precedence over the patients in tables `graded`, these
    over headers; studies that it lacks go with those of the same header. Without an identifier, or where one stands for
    more than half of the studies and there is no other, or in headers for more than 10 and a tenth of all, each is a
    patient of its own."""
    facts = list(_of_studies(_facts, comp, studies, workers))
    table = pd.DataFrame(facts, pd.Index(studies, name="study_id"), ["patient", *TRAITS], dtype=object)
    table["patient"] = _names(table["patient"])
    shared = table["patient"].map(table["patient"].value_counts()) > max(MOST_STUDIES, len(table) / 10)
    table.loc[shared, "patient"] = np.nan
    for file, columns in [*((file, ["patient"]) for file in graded), (comp.root / "patients.csv", [*table])]:
        if file.is_file():
            given, ids = read_required_table(file, ()).rename(columns=dict.fromkeys(IDS[2:], "patient")), ["study_id"]
            rows = row_keys(file, given["row_id"], {}) if "row_id" in given else read_required_table(file, ids, ids)
            of_study = given[given.columns.intersection(columns)].groupby(rows["study_id"])
            if (of_study.nunique() > 1).any(axis=None):
                raise CompetitionError(f"{file}: a study has lines with different values of {', '.join(columns)}")
            kin, named = table["patient"], of_study.first().reindex(table.index)
            if "patient" in named:  # of the studies with the same header, where it has one name for them
                pairs = pd.DataFrame({"kin": kin, "name": named["patient"]}).dropna().drop_duplicates()
                names = pairs.drop_duplicates("kin", keep=False).set_index("kin")["name"]
                named["patient"] = named["patient"].astype(object).fillna(kin.map(names))
            table.update(named)
    own = pd.Series([f"study {study}" for study in studies], table.index)
    table["patient"] = pd.factorize(_names(table["patient"]).fillna(own))[0]
    return table.fillna("").reset_index()


def _names(patients: pd.Series) -> pd.Series:
    """Names of studies' patients; none where one stands for more than half of the studies and there is no other."""
    everyone = patients.nunique() == 1 and 2 * patients.count() > len(patients)
    return patients.where(patients.isna()) if everyone else patients


def _facts(sources: list[dicom.Source]) -> dict[str, str]:
    """Patient (a hash) and `TRAITS`, as far as known, from the middle file of each series, the first series first."""
    facts = {}
    for source in sources:
        with contextlib.suppress(dicom.DicomError):
            parts = dicom.series_files(source)[1]
            file = parts[len(parts) // 2].file if parts else Path()
            with opened(file) as header:
                found = {name: text(header.dataset, keyword) for name, keyword in TRAITS.items()}
                thickness = first_number(frame_datasets(header.dataset, 0), "SliceThickness")
            found |= {"patient": dicom.read_tags(file).patient, "slice_thickness": str(thickness or "")}
            facts = {name: value for name, value in found.items() if value} | facts
    return facts


def fingerprints(comp: Competition, studies: Sequence[int], workers: int = 1) -> list[dict[str, Any]]:
    """The content of `TRAINED_ON` for these studies: [{"salt", "hashes"}], of one image of each series."""
    salt = secrets.token_hex(16)
    keys = set().union(*_of_studies(partial(_image_keys, every=False), comp, studies, workers))
    return [{"salt": salt, "hashes": sorted(_salted(salt, key) for key in keys)}]


def trained_on(folder: Path) -> list[dict[str, Any]]:
    """What a run, or packed models, in `folder` recorded of its training images, and runs whose models it took."""
    kept, file = folder / TRAINED_ON, folder / "parameters.yml"
    parameters = yaml.safe_load(file.read_text()) if file.is_file() else {}
    taken = {Path(parameters.get(key) or "") for key in ("start_from", "points_from")}  # names alone in an archive
    blocks = json.loads(kept.read_text()) if kept.is_file() else []
    return blocks + [block for run in sorted(taken) if run.is_absolute() for block in trained_on(run)]


def overlap(blocks: list[dict[str, Any]], comp: Competition, studies: Sequence[int], workers: int = 1) -> list[int]:
    """Those of `studies` of which an image is, by UID or by pixels, among the training images in `blocks`."""
    seen = [(block["salt"], set(block["hashes"])) for block in blocks]
    found = zip(studies, _of_studies(partial(_image_keys, every=True), comp, studies, workers), strict=True)
    return [study for study, keys in found if any(_salted(salt, key) in known for salt, known in seen for key in keys)]


def _of_studies(function: Callable, comp: Competition, studies: Sequence[int], workers: int) -> Iterator[Any]:
    """What `function` returns for the list of each study's series, sagittal T2 first."""
    kinds = [vocabulary.T2, *vocabulary.SERIES_TYPES]
    series = comp.series.iloc[np.argsort(comp.series["series_type"].map(kinds.index), kind="stable")]
    keys = dict(list(series[["split", "study_id", "series_id"]].groupby("study_id")))
    lines = [keys[study].itertuples(index=False, name=None) if study in keys else () for study in studies]
    sources = [[comp.source(*key) for key in own] for own in lines]
    return each(function, sources, workers, FEW_STUDIES, chunk=4)


def _image_keys(sources: list[dicom.Source], every: bool) -> set[str]:
    """What names the middle image of each series, or `every` image: UIDs, and hashes of pixels unless all are equal."""
    keys = set()
    for source in sources:
        with contextlib.suppress(dicom.DicomError):
            parts = dicom.series_files(source)[1]
            series = dicom.read_series(source if every else parts[len(parts) // 2 :][:1], labelled=False)
            images = list(zip(series.slices, series.pixels, strict=True))
            images = images if every else images[len(images) // 2 :][:1]
            uids = {dicom.read_tags(file).sop_uid for file in {image.file for image, _ in images}}
            grey = [np.ascontiguousarray(pixels, dtype=np.float32) for _, pixels in images if np.ptp(pixels) > 0]
            keys |= {uid for uid in uids if REAL_UID.fullmatch(uid)}
            keys |= {hashlib.sha256(f"{image.shape}".encode() + image.tobytes()).hexdigest() for image in grey}
    return keys


def _salted(salt: str, key: str) -> str:
    return hashlib.sha256(f"{salt} {key}".encode()).hexdigest()[:16]
