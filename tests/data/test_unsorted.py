"""Studies in any folder: found, told apart, their series typed by headers; what is skipped has a reason."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pydicom
import pytest
from dicom_files import AXIAL, SAGITTAL, write_slice

from lsdc_utils import dicom
from lsdc_utils import vocabulary as words
from lsdc_utils.data import competition, unsorted
from lsdc_utils.data.competition import Competition, CompetitionError
from lsdc_utils.data.stacks import read_study
from lsdc_utils.phantom import write_phantom

CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two test studies in the competition's layout."""
    return write_phantom(tmp_path_factory.mktemp("phantom") / "data", 0, 2, 5, second_axial=1)


def files_of(phantom: Path) -> list[Path]:
    return sorted(phantom.glob("test_images/*/*/*.dcm"))


def keyed(comp: Competition) -> pd.DataFrame:
    return comp.series.sort_values(["study_id", "series_id"]).reset_index(drop=True)


def contents(comp: Competition) -> dict[tuple[int, int], set[bytes]]:
    """The bytes of the files that are read of each series."""
    found = {}
    for row in comp.series.itertuples():
        source = comp.source(row.split, row.study_id, row.series_id)
        files = source.iterdir() if isinstance(source, Path) else source
        found[row.study_id, row.series_id] = {file.read_bytes() for file in files}
    return found


def stack(folder: Path, n: int = 6, orientation: Any = SAGITTAL, first: int = 1, **tags: Any) -> Path:
    """A series with the usual identifiers, one slice every 4 mm along its normal."""
    axis = {SAGITTAL: 0, CORONAL: 1, AXIAL: 2}[orientation]
    series = tags.setdefault("SeriesInstanceUID", f"1.2.{abs(hash(folder.name)) % 10**6}")
    tags = {"StudyInstanceUID": "1.2.3", "Modality": "MR", "SeriesDescription": "T2"} | tags
    for k in range(n):
        position = tuple(4.0 * k if i == axis else 0.0 for i in range(3))
        write_slice(
            folder / f"{first + k}.dcm", first + k, position, orientation, SOPInstanceUID=f"{series}.{k}", **tags
        )
    return folder


def rules(found: unsorted.Discovered) -> list[str]:
    return sorted(rule for _, _, rule, _, _ in found.findings)


def kinds(found: unsorted.Discovered) -> list[str]:
    return sorted(row["series_type"] for row in found.series)


def reasons(found: unsorted.Discovered) -> str:
    return "\n".join(value for _, _, rule, value, _ in found.findings if rule == "series_skipped")


@pytest.mark.parametrize("layout", ["no tables", "flat", "nested", "unicode"])
def test_the_same_studies_come_out_of_every_layout(phantom: Path, tmp_path: Path, layout: str) -> None:
    expected = competition.read(phantom)
    root = tmp_path / layout
    if layout == "no tables":
        shutil.copytree(phantom / "test_images", root / "test_images")
    for k, file in enumerate(files_of(phantom) if layout != "no tables" else ()):
        series, study = file.parent.name, file.parent.parent.name
        places = {
            "flat": root / f"IM{k:05d}",
            "nested": root / "disc 1" / "a" / study / "DICOM" / series / "x" / file.name,
            "unicode": root / f"Übung {study}" / f"Säge‑T2 {series}" / f"Bild №{file.stem}.dcm",
        }
        places[layout].parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, places[layout])
    comp = competition.read(root)
    pd.testing.assert_frame_equal(keyed(comp), keyed(expected))
    assert contents(comp) == contents(expected)
    assert sorted(comp.sample_rows) == sorted(expected.sample_rows)
    assert bool(comp.files) == (layout != "no tables")
    assert set(comp.findings.rule) <= {"series_type_missing", "series_type_repeated"}
    study = int(comp.series.study_id[0])
    stacks, problems = read_study(comp, "test", study)
    assert len(stacks) == (comp.series.study_id == study).sum() and problems.empty


def test_several_processes_find_the_same(phantom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unsorted, "FEW_FILES", 0)
    alone, together = unsorted.find(phantom), unsorted.find(phantom, workers=2)
    assert (alone.series, alone.files, alone.findings) == (together.series, together.files, together.findings)


def test_a_header_without_contrast_is_skipped_and_says_what_to_do(phantom: Path, tmp_path: Path) -> None:
    for file in files_of(phantom):
        dataset = pydicom.dcmread(file)
        del dataset.SeriesDescription
        dataset.save_as(tmp_path / f"{file.parent.name}-{file.name}")
    with pytest.raises(CompetitionError, match="the header does not say T1 or T2"):
        competition.read(tmp_path)
    stack(tmp_path / "named", SeriesDescription="T2")
    comp = competition.read(tmp_path)
    assert comp.series.series_type.tolist() == [words.T2]
    skipped = comp.findings[comp.findings.rule == "series_skipped"]
    assert len(skipped) == len(competition.read(phantom).series)
    assert skipped.action.str.contains("name T1 or T2 in SeriesDescription").all()
    assert skipped.action.str.contains("test_series_descriptions.csv").all()


@pytest.mark.parametrize(
    ("tags", "kind"),
    [
        ({"EchoTime": 110, "RepetitionTime": 3500}, words.T2),
        ({"EchoTime": 11, "RepetitionTime": 550}, words.T1),
        ({"EchoTime": 40, "RepetitionTime": 4000, "InversionTime": 160}, words.T2),
        ({"EchoTime": 12, "RepetitionTime": 2200, "InversionTime": 860}, words.T1),
        ({"SeriesDescription": "t2_tse_sag_fs"}, words.T2),
        ({"SeriesDescription": "SAG STIR"}, words.T2),
        ({"SeriesDescription": "Sag T1 FLAIR post +C"}, words.T1),
        ({"SeriesDescription": "sT1W_TSE T12-L5"}, words.T1),
        ({"SeriesDescription": "T1", "EchoTime": 100, "RepetitionTime": 4000}, words.T2),  # times are the machine's
    ],
)
def test_contrast_by_the_header(tmp_path: Path, tags: dict, kind: str) -> None:
    found = unsorted.find(stack(tmp_path / "s", **({"SeriesDescription": ""} | tags)))
    assert kinds(found) == [kind]
    assert ("contrast_differs" in rules(found)) == (len(tags) == 3 and "T1" in tags.values())


@pytest.mark.parametrize(
    ("tags", "orientation", "reason"),
    [
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, SAGITTAL, "localiser"),
        ({"SeriesDescription": "3-pl loc"}, SAGITTAL, "localiser"),
        ({"SeriesDescription": "Survey_T2"}, SAGITTAL, "localiser"),
        ({"ImageType": ["DERIVED", "SECONDARY", "MPR"]}, SAGITTAL, "projection or reformat"),
        ({"SeriesDescription": "T2 MYELOGRAM"}, SAGITTAL, "myelogram"),
        ({"SeriesDescription": "DWI b800"}, AXIAL, "diffusion"),
        ({"SeriesDescription": "PD tse", "EchoTime": 20, "RepetitionTime": 3000}, SAGITTAL, "proton density"),
        ({"SeriesDescription": "T2"}, CORONAL, "coronal"),
        ({"SeriesDescription": "T1"}, AXIAL, "axial T1"),
        ({"Modality": "CT"}, AXIAL, "modality other than MR"),
        ({"SeriesDescription": "T2 sag cervical"}, SAGITTAL, "other part of the spine"),
        ({"drop": ("ImageOrientationPatient",)}, SAGITTAL, "no orientation"),
    ],
)
def test_what_is_skipped_says_why(tmp_path: Path, tags: dict, orientation: Any, reason: str) -> None:
    found = unsorted.find(stack(tmp_path / "s", orientation=orientation, **tags))
    assert not found.series and reason in reasons(found)
    assert rules(found) == ["series_skipped", "study_without_series"]


def test_a_localiser_of_several_planes_and_a_series_of_two_stacks(tmp_path: Path) -> None:
    for n, folder in ((3, "few"), (6, "many"), (7, "two")):
        for first, orientation in ((1, SAGITTAL), (20, AXIAL), (40, CORONAL))[: 2 if folder == "two" else 3]:
            stack(tmp_path / folder, n, orientation, first, StudyInstanceUID=f"1.{n}", SeriesInstanceUID=f"1.{n}.1.{n}")
    found = unsorted.find(tmp_path)
    assert kinds(found) == [words.AXIAL, words.T2] and len({row["study_id"] for row in found.series}) == 1
    assert reasons(found).count("several planes") == 2


def test_copies_count_once_and_repeated_numbers_become_series(tmp_path: Path) -> None:
    stack(tmp_path / "a", SeriesInstanceUID="1.2.3.9")
    shutil.copytree(tmp_path / "a", tmp_path / "backup" / "a")
    found = unsorted.find(tmp_path)
    assert kinds(found) == [words.T2] and rules(found) == ["file_repeated"]
    assert [len(files) for files in found.files.values()] == [6]
    stack(tmp_path / "pile", SeriesInstanceUID="1.2.3.8")
    for k, file in enumerate(sorted((tmp_path / "pile").glob("*.dcm"))[:2]):
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID, dataset.ImagePositionPatient = f"9.9.{k}", [100.0 + k, 0, 0]
        dataset.save_as(tmp_path / "pile" / f"other{k}.dcm")
    found = unsorted.find(tmp_path)
    assert sorted(len(files) for files in found.files.values()) == [2, 6, 6]
    assert "instance_number_repeated" in rules(found)
    for files in found.files.values():
        assert dicom.read_series(files).slices


def test_one_series_uid_in_two_folders_is_two_series(tmp_path: Path) -> None:
    stack(tmp_path / "a", SeriesInstanceUID="1.5")
    stack(tmp_path / "b", SeriesInstanceUID="1.5", PixelSpacing=[0.5, 0.5])
    for file in (tmp_path / "b").iterdir():
        dataset = pydicom.dcmread(file)
        dataset.SOPInstanceUID = f"{dataset.SOPInstanceUID}.7"
        dataset.save_as(file)
    found = unsorted.find(tmp_path)
    assert sorted({file.parent.name for file in files} for files in found.files.values()) == [{"a"}, {"b"}]
    assert len({study for study, _ in found.files}) == 1


def test_two_echoes_of_one_series_are_told_apart(tmp_path: Path) -> None:
    stack(tmp_path / "x", SeriesInstanceUID="1.5", SeriesDescription="", EchoTime=100, RepetitionTime=3000)
    stack(tmp_path / "x", first=11, SeriesInstanceUID="1.5", SeriesDescription="", EchoTime=20, RepetitionTime=3000)
    found = unsorted.find(tmp_path)
    assert kinds(found) == [words.T2] and "proton density" in reasons(found)


def test_series_that_share_a_uid_and_numbers_are_told_apart_by_description(tmp_path: Path) -> None:
    for text in ("T1", "T2"):
        stack(tmp_path / text, SeriesInstanceUID="1.5", SeriesDescription=text)
        for file in (tmp_path / text).iterdir():
            file.rename(tmp_path / f"{text}-{file.name}")
    found = unsorted.find(tmp_path)
    assert kinds(found) == [words.T1, words.T2] and not found.findings


def test_uids_that_are_missing_or_shared(tmp_path: Path) -> None:
    for patient in "AB":
        stack(
            tmp_path / "shared" / patient, PatientID=patient, StudyInstanceUID="1.7", SeriesInstanceUID=f"1.7.{patient}"
        )
    for study in ("x", "y"):
        for series, text in (("1", "T1"), ("2", "T2")):
            folder = tmp_path / "bare" / study / series
            stack(folder, SeriesDescription=text, StudyInstanceUID="", SeriesInstanceUID="")
    found = unsorted.find(tmp_path)
    by_study = pd.DataFrame(found.series).groupby("study_id").series_type.apply(sorted).tolist()
    assert sorted(by_study) == sorted([[words.T2], [words.T2], [words.T1, words.T2], [words.T1, words.T2]])
    assert rules(found).count("study_uid_shared") == 2
    assert all(0 < study < 2**48 for study, _ in found.files)


def test_garbage_is_counted_and_broken_files_are_named(tmp_path: Path) -> None:
    folder = stack(tmp_path / "good")
    (folder / "7.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\x02\x00\xff\xff")
    (folder / "notes.txt").write_text("nothing")
    for name in (".DS_Store", "DICOMDIR"):
        (folder / name).write_bytes(b"junk")
    (tmp_path / "junk").mkdir()
    for k in range(50):
        (tmp_path / "junk" / f"{k}.dcm").write_bytes(os.urandom(300))
    (tmp_path / "junk" / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "junk" / "loop").symlink_to(tmp_path)
    found = unsorted.find(tmp_path)
    assert kinds(found) == [words.T2]
    assert rules(found) == ["file_unusable", "files_skipped", "files_skipped"]
    assert [value.partition(":")[0] for _, _, rule, value, _ in found.findings if rule == "file_unusable"] == [
        "good/7.dcm"
    ]
    assert any("51 of 51 files" in value for *_, value, _ in found.findings)


def test_nothing_to_find_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(CompetitionError, match="holds no files"):
        competition.read(tmp_path)
    (tmp_path / "readme.txt").write_text("x")
    with pytest.raises(CompetitionError, match=r"no sagittal T1.*1 of 1 files are not DICOM images"):
        competition.read(tmp_path)


def test_an_unknown_description_is_typed_by_the_header(phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom, tmp_path / "data")
    file = tmp_path / "data" / "test_series_descriptions.csv"
    table = pd.read_csv(file)
    table["series_description"] = table.series_description.replace(words.AXIAL, "ax t2 tse").where(table.index > 0)
    table.to_csv(file, index=False)
    comp, expected = competition.read(tmp_path / "data"), competition.read(phantom)
    pd.testing.assert_frame_equal(keyed(comp), keyed(expected))
    assert (comp.findings.rule == "series_type_unknown").sum() == 1 + (expected.series.series_type == words.AXIAL).sum()
    assert comp.findings.action.str.startswith("used as").any() and not comp.files


def test_training_images_without_a_table_of_series(phantom: Path, tmp_path: Path) -> None:
    shutil.copytree(phantom / "test_images", tmp_path / "train_images")
    comp = competition.read(tmp_path)
    assert set(comp.series.split) == {"train"} and comp.sample_rows == [] and not comp.files
