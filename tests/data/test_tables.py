"""Ids as text: one number for each, in tables and for folders, and none for what may have lost digits."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from data_folders import Tables, save, write_images, write_series, write_tables

from lsdc_utils import vocabulary as words
from lsdc_utils.data import checks, competition
from lsdc_utils.data.competition import CompetitionError
from lsdc_utils.data.tables import number_of

NAMES = {study: f"ABC-{study}" if study % 2 else f"00{study}" for study in range(101, 104)} | {104: "104"}
SHORT = {words.T1: "T1", words.T2: "T2", words.AXIAL: "T2"}


@pytest.mark.parametrize("text", ["ABC-001", "0012", "2023-001", "a", "1.2.840.113619.2.5", "Müller_3", "007a"])
def test_text_has_a_stable_number_of_52_bits(text: str) -> None:
    names: dict[int, str] = {}
    number = number_of(f" {text} ", names)
    assert number == number_of(text) and 2**32 < number < 2**52 and names == {number: text}


def test_the_number_is_the_beginning_of_sha_256() -> None:
    assert number_of("ABC-001") == 0x64DF9C1F21F7E  # printf ABC-001 | sha256sum


def test_two_ids_of_one_number_are_refused() -> None:
    with pytest.raises(CompetitionError, match="the ids 'other' and 'ABC-001' have the same number: rename one"):
        number_of("ABC-001", {0x64DF9C1F21F7E: "other"})


@pytest.mark.parametrize("text", ["", "-", "1e5", "1.01E+02", "1,010", "1.5", "-7", "12 345", "9" * 19, "#REF!", "a/b"])
def test_what_may_have_lost_digits_has_none(text: str) -> None:
    assert number_of(text) is None


def test_whole_numbers_are_themselves() -> None:
    assert [number_of(text) for text in ("12", "+12", "12.0", "0", "9007199254740993")] == [12, 12, 12, 0, 2**53 + 1]


def renamed(root: Path) -> Tables:
    """The tables of four training studies, three of them with text as id, saved without test studies."""
    tables = write_tables(root, 4, 1)
    for name in ("test_series_descriptions", "sample_submission"):
        tables[name] = tables[name].iloc[:0]
    tables = {name: t.assign(study_id=t.study_id.map(NAMES)) if "study_id" in t else t for name, t in tables.items()}
    save(root, tables)
    return tables


def placed(root: Path) -> pd.DataFrame:
    """The labels of a folder as `checks.check` places them, with ids as they are spelled."""
    comp = competition.read(root)
    labels = checks.check(comp).labels
    return labels.assign(study_id=[comp.names.get(study, str(study)) for study in labels.study_id]).drop(
        columns="row_id"
    )


@pytest.fixture
def plain(tmp_path: Path) -> pd.DataFrame:
    """The labels of the same folder with numbers as ids."""
    tables = write_tables(tmp_path / "plain", 4, 1)
    write_images(tmp_path / "plain", tables)
    labels = placed(tmp_path / "plain")
    assert labels.X.notna().all()
    return labels.assign(study_id=labels.study_id.astype(int).map(NAMES))


@pytest.mark.parametrize("listed", [True, False], ids=["listed", "by headers"])
def test_text_ids_of_tables_and_folders_meet(tmp_path: Path, plain: pd.DataFrame, listed: bool) -> None:
    root = tmp_path / "text"
    tables = renamed(root)
    for row in tables["train_series_descriptions"].itertuples():
        folder = root / "train_images" / row.study_id / str(row.series_id)
        write_series(folder, row.series_description, SeriesDescription=SHORT[row.series_description])
    if not listed:
        for split in competition.SPLITS:
            (root / f"{split}_series_descriptions.csv").unlink()
    pd.testing.assert_frame_equal(placed(root), plain)
    comp = competition.read(root)
    assert comp.findings.empty and checks.check(comp).findings.empty
    assert {name for name in comp.names.values()} == {"ABC-101", "ABC-103", "00102"}
    assert checks.main(root, tmp_path / "out/findings.csv") == 0
    ids = pd.read_csv(tmp_path / "out/study_ids.csv", dtype=str)
    assert dict(ids.to_numpy()) == {str(number_of(name)): name for name in ("ABC-101", "ABC-103", "00102")}


@pytest.mark.parametrize("ids", ["folders", "deep", "uids"])
def test_labels_meet_the_studies_of_a_plain_folder(tmp_path: Path, ids: str) -> None:
    root = tmp_path / "any"
    names = {study: f"1.2.840.5.77.{study}" for study in NAMES} if ids == "uids" else NAMES
    rows = [f"{name},{study % 3}" for study, name in names.items()]
    root.mkdir()
    (root / "train.csv").write_text("study_id,scs_l1_l2\n" + "\n".join(rows))
    for study, name in [*names.items(), (109, "other")]:
        for k, (kind, text) in enumerate(SHORT.items()):
            folder = root / ({"deep": f"train_images/{name}/x/y", "uids": f"{study}"}.get(ids, name)) / f"s{k}"
            uid = names.get(study, "1.2.840.5.77.9") if ids == "uids" else f"1.2.3.{study}"
            write_series(folder, kind, SeriesDescription=text, StudyInstanceUID=uid, SeriesInstanceUID=f"{uid}.{k}")
    comp = competition.read(root)
    expected = {number_of(name): study % 3 for study, name in names.items()}
    assert comp.labels[comp.labels.severity >= 0].set_index("study_id").severity.to_dict() == expected
    counts = comp.series.groupby(["study_id", "split"]).size()
    assert {study: counts[study].to_dict() for study in expected} == {study: {"train": 3} for study in expected}
    (other,) = {*comp.series.study_id} - {*expected}
    assert counts[other].to_dict() == {"train" if ids == "deep" else "test": 3} and other not in comp.names


def test_a_folder_of_several_patients_is_not_one_study(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("study_id,scs_l1_l2\nbatch1,Severe\n")
    for patient in "AB":
        uid = f"1.2.3.{ord(patient)}"
        tags = dict(SeriesDescription="T2", PatientID=patient, StudyInstanceUID=uid, SeriesInstanceUID=f"{uid}.1")
        write_series(tmp_path / "batch1" / patient, words.T2, **tags)
    comp = competition.read(tmp_path)
    assert comp.series.study_id.nunique() == 2 and number_of("batch1") not in set(comp.series.study_id)
    assert "study_without_series" in set(comp.findings.rule)
