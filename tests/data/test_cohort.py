"""Traits of a cohort from headers and a table, and hashes that tell whether a study was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import data_folders
import numpy as np
import pandas as pd
import pydicom
import pytest
import yaml
from conftest import ROOT

from lsdc_utils import parallel
from lsdc_utils.data import cohort, competition
from lsdc_utils.files import write_json
from lsdc_utils.grading.basis import PHANTOM_ONLY, grade_basis
from lsdc_utils.vocabulary import AXIAL, T1, T2

ROOT_UID = "1.2.826.0.1.3680043.8.498.55"


def write_study(root: Path, study: int, seed: int, **tags: object) -> None:
    """Three series of noise: a study that no other shares its pixels with; `tags` go into each header."""
    rng = np.random.default_rng(seed)
    for number, kind in enumerate((T1, T2, AXIAL), 1):
        folder = root / "test_images" / str(study) / str(10 * study + number)
        data_folders.write_series(folder, kind, **tags)
        for file in folder.glob("*.dcm"):
            dataset = pydicom.dcmread(file)
            noise = rng.integers(1, 4000, (dataset.Rows, dataset.Columns)).astype("uint16")
            dataset.PixelData = noise.tobytes()
            uid = f"{ROOT_UID}.{seed}.{number}.{dataset.InstanceNumber}"
            dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = uid
            dataset.save_as(file)


def read(root: Path) -> tuple[competition.Competition, list[int]]:
    """A folder with a table of its series, and its studies."""
    lines = ["study_id,series_id,series_description"]
    for folder in sorted(root.glob("test_images/*/*")):
        kind = (T1, T2, AXIAL)[int(folder.name[-1]) - 1]
        lines.append(f"{folder.parent.name},{folder.name},{kind}")
    (root / "test_series_descriptions.csv").write_text("\n".join(lines))
    comp = competition.read(root)
    return comp, sorted(comp.series["study_id"].unique().tolist())


@pytest.fixture
def trained(tmp_path: Path) -> tuple[competition.Competition, list[int]]:
    for study in (1, 2):
        write_study(tmp_path / "trained", study, study)
    return read(tmp_path / "trained")


def test_traits_come_from_headers_and_a_table_has_the_last_word(tmp_path: Path) -> None:
    scanner = {"Manufacturer": "SIEMENS", "MagneticFieldStrength": 1.5, "SliceThickness": 4.4}
    write_study(tmp_path, 1, 1, **scanner, PatientID="ann", PatientAge="057Y", PatientSex="F")
    write_study(tmp_path, 2, 2, PatientID="ann")
    write_study(tmp_path, 3, 3, PatientID="bob")
    write_study(tmp_path, 4, 4, PatientID="cyd")
    comp, studies = read(tmp_path)
    table = cohort.describe(comp, studies).set_index("study_id")
    assert table.loc[1, list(cohort.TRAITS)].tolist() == ["SIEMENS", "1.5", "057Y", "F", "4.4"]
    assert (table.loc[2:, list(cohort.TRAITS)] == "").all(axis=None)
    assert table["patient"].tolist() == [0, 0, 1, 2]  # numbers, which name no one
    (tmp_path / "patients.csv").write_text("Study_ID; Sex; patient\n2; M; x\n3; ; x\n9; F; y\n")
    table = cohort.describe(comp, studies).set_index("study_id")
    assert table["sex"].tolist() == ["F", "M", "", ""]
    assert table["patient"].tolist() == [0, 0, 0, 1]  # study 1, which the table lacks, has the header of study 2
    (tmp_path / "patients.csv").write_text("study_id,patient\n1,x\n2,y\n")
    assert cohort.describe(comp, studies)["patient"].tolist() == [0, 1, 2, 3]


def test_a_patient_of_few_studies_is_not_a_word_for_everyone(tmp_path: Path) -> None:
    for study in range(1, 7):
        write_study(tmp_path, study, study)
    comp, studies = read(tmp_path)
    (tmp_path / "patients.csv").write_text("study_id,patient\n2,ann\n5,ann\n")
    assert cohort.describe(comp, studies)["patient"].tolist() == [0, 1, 2, 3, 1, 4]


def test_studies_without_a_name_of_their_own_are_patients_of_their_own(tmp_path: Path) -> None:
    for study in (1, 2, 3):
        write_study(tmp_path, study, study, PatientID="ANONYMOUS")
    comp, studies = read(tmp_path)
    assert cohort.describe(comp, studies)["patient"].tolist() == [0, 1, 2]
    for file in tmp_path.glob("test_images/2/*/*"):
        file.write_text("no image")
    assert cohort.describe(comp, studies)["patient"].is_unique


def test_one_name_for_the_anonymous_beside_real_names_is_no_patient(tmp_path: Path, monkeypatch) -> None:
    for study in range(1, 8):
        write_study(tmp_path, study, study, PatientID="ANON" if study < 4 else f"{study // 6}")
    comp, studies = read(tmp_path)
    assert cohort.describe(comp, studies)["patient"].tolist() == [0, 0, 0, 1, 1, 2, 2]  # so few may be one patient's
    monkeypatch.setattr(cohort, "MOST_STUDIES", 2)
    assert cohort.describe(comp, studies)["patient"].tolist() == [0, 1, 2, 3, 3, 4, 4]
    (tmp_path / "patients.csv").write_text("study_id,patient\n1,ann\n2,ann\n3,ann\n")  # a table is believed
    assert cohort.describe(comp, studies)["patient"].tolist() == [0, 0, 0, 1, 1, 2, 2]


def test_a_study_is_known_again_by_its_pixels_or_by_its_uids(trained, tmp_path: Path) -> None:
    comp, studies = trained
    blocks = cohort.fingerprints(comp, studies)
    assert set(blocks[0]) == {"salt", "hashes"} and len(blocks[0]["hashes"]) == 12  # 2 studies, 3 series, 2 kinds
    assert all(len(word) == 16 for word in blocks[0]["hashes"])
    assert cohort.overlap(blocks, comp, studies) == studies
    clinic = tmp_path / "clinic"
    write_study(clinic, 7, 1)  # the same images in other series, with other UIDs
    for file in clinic.rglob("*.dcm"):
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = f"2.25.{dataset.InstanceNumber}"
        dataset.save_as(file)
    write_study(clinic, 8, 2)  # other pixels under the same UIDs
    for file in clinic.glob("test_images/8/*/*"):
        dataset = pydicom.dcmread(file)
        dataset.PixelData = bytes(reversed(dataset.PixelData))
        dataset.save_as(file)
    write_study(clinic, 9, 9)
    found, wanted = read(clinic)
    assert cohort.overlap(blocks, found, wanted) == [7, 8]
    assert cohort.overlap([], found, wanted) == []


def test_hashes_are_salted_and_a_run_knows_those_of_the_run_it_began_with(trained, tmp_path: Path) -> None:
    comp, studies = trained
    first, second = cohort.fingerprints(comp, studies[:1]), cohort.fingerprints(comp, studies[:1])
    assert not set(first[0]["hashes"]) & set(second[0]["hashes"])
    base, run = tmp_path / "base", tmp_path / "run"
    for folder, start, content in ((base, "", first), (run, str(base), second)):
        folder.mkdir()
        (folder / cohort.TRAINED_ON).write_text(json.dumps(content))
        (folder / "parameters.yml").write_text(yaml.safe_dump({"start_from": start, "points_from": start}))
    assert cohort.trained_on(run) == second + first
    (run / "parameters.yml").write_text(yaml.safe_dump({"start_from": "", "points_from": str(base)}))
    assert cohort.trained_on(run) == second + first
    (base / cohort.TRAINED_ON).unlink()
    assert cohort.trained_on(run) == second and cohort.trained_on(base) == []


def test_02_refuses_models_that_saw_a_study_whatever_its_folder_is_called(trained, tmp_path: Path) -> None:
    comp, studies = trained
    models, run = tmp_path / "models", tmp_path / "run"
    models.mkdir()
    (models / cohort.TRAINED_ON).write_text(json.dumps(cohort.fingerprints(comp, studies[1:])))
    (models / "data.json").write_text(json.dumps({"kind": "folder", "studies": 1}))
    cells = json.loads((ROOT / "notebooks/02_convert_labels.ipynb").read_text())["cells"]
    [code] = ["".join(cell["source"]) for cell in cells if "cohort.overlap" in "".join(cell["source"])]
    names = {
        "labels": pd.DataFrame({"study_id": studies}),
        "studies": studies,
        "comp": comp,
        "root": comp.root,
        "run": run,
    }
    names |= {"cohort": cohort, "competition": competition, "parallel": parallel, "Path": Path, "points_from": ""}
    names |= {"grade_basis": grade_basis, "PHANTOM_ONLY": PHANTOM_ONLY, "write_json": write_json}
    run.mkdir()
    for key in ("start_from", "points_from"):
        asked = names | {"start_from": ""} | {key: str(models)}
        with pytest.raises(
            competition.CompetitionError, match=f"were trained on 1 of these 2 studies, e.g. {studies[1]}"
        ):
            exec(code, asked)
    assert not (run / cohort.TRAINED_ON).exists()
    (models / cohort.TRAINED_ON).write_text("[]")
    exec(code, names | {"start_from": str(models)})
    assert cohort.overlap(cohort.trained_on(run), comp, studies) == studies


def test_images_of_one_value_and_uids_that_collide_tell_nothing(tmp_path: Path) -> None:
    for study in (1, 2):  # black images; the UIDs of both are 1.2.<number>
        data_folders.write_series(tmp_path / f"test_images/{study}/{study}2", T2)
    comp, studies = read(tmp_path)
    assert cohort.fingerprints(comp, studies)[0]["hashes"] == []
