"""Stacks: reading, saving, averaging of pixels."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path

import dicom_files
import numpy as np
import pandas as pd
import pytest
from dicom_files import AXIAL as AXIAL_LIES
from dicom_files import write_stack
from spines import SAGITTAL, make_affines, make_stack, ramp

from lsdc_utils.data.checks import RULES
from lsdc_utils.data.competition import Competition
from lsdc_utils.data.stacks import (
    Stack,
    coarsen,
    convert_studies,
    load_study,
    read_stack,
    read_study,
    save_stack,
    spacing_fault,
)
from lsdc_utils.dicom import DicomError, read_series
from lsdc_utils.geometry import to_patient
from lsdc_utils.vocabulary import AXIAL, T1, T2


@pytest.fixture
def sagittal():
    size = (60, 50)
    return make_stack(ramp, make_affines(11, 1.5, 4.5, centre=(2, 30, -20), size=size, **SAGITTAL), size)


def test_coarsened_pixels_stay_where_they_are(sagittal):
    size = (120, 100)
    fine = make_stack(ramp, make_affines(5, 0.5, 4.5, centre=(2, 30, -20), size=size, **SAGITTAL), size)
    coarse = coarsen(fine, 1.5)
    assert coarse.pixels.shape == (5, 40, 33)
    column_row = np.stack(np.meshgrid(np.arange(33), np.arange(40)), axis=-1)
    places = to_patient(coarse.affines[:, None, None], column_row)
    np.testing.assert_allclose(coarse.pixels, ramp(places), atol=1)
    assert coarsen(sagittal, 1.5) is sagittal


@pytest.fixture
def competition_of_five(tmp_path):
    """Five test studies of two series each: of the third study one series holds a broken file, one is not there."""
    rows = []
    for study in range(1, 6):
        for series, kind in ((1, T1), (2, AXIAL)):
            rows.append((study, series, kind, "test"))
            if (study, series) == (3, 2):
                continue
            pixels = np.random.default_rng(study).integers(0, 900, (60, 80), "uint16")
            spacing = (30.0, 30.0) if (study, series) == (5, 1) else (2.0, 2.5)  # no scan of a spine measures 2.4 m
            folder = tmp_path / f"test_images/{study}/{series}"
            places, lies = [(0, 0, 4.0 * k) for k in range(3)], dicom_files.AXIAL
            if kind == T1:
                places, lies = [(4.0 * k, 0, 0) for k in range(3)], dicom_files.SAGITTAL
            write_stack(folder, places, pixels=pixels, spacing=spacing, orientation=lies)
            if study == 3:
                (folder / "2.dcm").write_bytes(b"no image")
    series = pd.DataFrame(rows, columns=["study_id", "series_id", "series_type", "split"])
    none = pd.DataFrame()
    return Competition(tmp_path, none, none, series, [], none)


def both_ids(study: int, stack: Stack) -> tuple[int, int]:
    return study, stack.study_id


@pytest.mark.parametrize("workers", [1, 2])
def test_conversion_writes_what_was_read_and_reports_what_was_not(competition_of_five, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("lsdc_utils.data.stacks.FEW_STUDIES", 2)
    comp, studies = competition_of_five, [5, 3, 1]
    use = {5: [partial(both_ids, 5)], 3: [partial(both_ids, 3)]}
    converted = list(convert_studies(comp, "test", studies, tmp_path / "slices", workers, use))
    problems = [findings for findings, _ in converted]
    assert [table["rule"].tolist() for table in problems] == [
        ["series_unusable"],
        ["file_unusable", "series_unusable"],
        [],
    ]
    assert (problems[1]["study_id"] == 3).all() and problems[1]["series_id"].tolist() == [1, 2]
    assert sorted(path.name for path in (tmp_path / "slices").iterdir()) == ["1", "3", "5"]
    read = [len(load_study(tmp_path / "slices", study)) for study in studies]
    assert [len(results) for _, results in converted] == [*read[:2], 0]
    assert all(result == (5, 5) for result in converted[0][1]) and read[0] > 0
    for study in studies:
        stacks, again = read_study(comp, "test", study)
        saved = load_study(tmp_path / "slices", study)
        assert len(saved) == len(stacks) and again.equals(problems[studies.index(study)])
        for one, other in zip(saved, stacks, strict=True):
            for field in fields(Stack):
                np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_a_stack_is_kept_whole(sagittal, tmp_path):
    save_stack(sagittal, tmp_path / "7" / "1.npz")
    (back,) = load_study(tmp_path, 7)
    for field in fields(Stack):
        np.testing.assert_array_equal(getattr(back, field.name), getattr(sagittal, field.name))
    assert isinstance(back.study_id, int) and isinstance(back.series_type, str)
    assert load_study(tmp_path, 8) == []


@pytest.mark.parametrize(
    ("spacing", "places", "fault"),
    [
        ((0.5, 0.5), [(0.0, 0.0, 4.0 * k) for k in range(3)], ""),
        ((0.5, 0.5), [(0.0, 0.0, 0.0)], ""),
        ((0.05, 0.05), [(0.0, 0.0, 0.0)], "pixels of 0.05 x 0.05 mm"),
        ((0.3, 0.3), [(0.0, 0.0, 0.0)], "a field of view of 60 mm"),
        ((0.5, 0.5), [(0.0, 0.0, 60.0 * k) for k in range(3)], "steps between slices of 60 mm"),
        ((0.5, 0.5), [(0.0, 0.0, 0.1 * k) for k in range(3)], "steps between slices of 0.1 mm"),
        ((0.5, 0.5), [(0.0, 0.0, 0.0)] * 5, "5 images at 1 place"),
        ((0.5, 0.5), [(0.0, 0.0, 4.0 * (k // 2)) for k in range(6)], ""),  # taken twice
    ],
)
def test_implausible_sizes(tmp_path: Path, spacing, places, fault: str) -> None:
    write_stack(tmp_path, places, spacing=spacing, pixels=np.zeros((160, 200), "uint16"))
    assert spacing_fault(read_series(tmp_path, pixels=False)) == fault


def turned(image: np.ndarray, orientation: tuple, corner: np.ndarray, spacing: float, way: str) -> dict:
    """The same image of the same places, stored in another way: arguments of `write_slice`."""
    (across, down), (rows, cols) = (np.array(axis) * spacing for axis in orientation), image.shape
    if "transposed" in way:
        image, across, down, rows, cols = image.T, down, across, cols, rows
    if "left" in way:
        image, corner, across = image[:, ::-1], corner + across * (cols - 1), -across
    if "down" in way:
        image, corner, down = image[::-1], corner + down * (rows - 1), -down
    lies = tuple(across / spacing), tuple(down / spacing)
    return {"pixels": np.ascontiguousarray(image), "position": tuple(corner), "orientation": lies}


@pytest.mark.parametrize("way", ["left", "down", "left down", "transposed", "transposed left", "transposed left down"])
@pytest.mark.parametrize(("lies", "kind"), [(AXIAL_LIES, AXIAL), (dicom_files.SAGITTAL, T1)])
def test_images_stored_upside_down_or_turned_are_seen_upright(tmp_path: Path, way: str, lies: tuple, kind: str) -> None:
    rng, normal = np.random.default_rng(0), np.cross(*lies)
    for number in range(3):
        image = rng.integers(0, 900, (90, 110), dtype=np.uint16)
        for name in ("usual", way):
            corner = np.array([5.0, -20.0, 30.0]) + 4.0 * number * normal
            own = turned(image, lies, corner, 2.0, "" if name == "usual" else way)
            file = tmp_path / name / f"{number}.dcm"
            dicom_files.write_slice(file, number + 1, spacing=(2.0, 2.0), **own)
    usual, other = (read_stack(tmp_path / name, 1, 2, kind)[0] for name in ("usual", way))
    order = [int(np.abs(other.affines[:, :3, 3] - affine[:3, 3]).sum(axis=1).argmin()) for affine in usual.affines]
    np.testing.assert_allclose(other.affines[order][:, :3, [0, 1, 3]], usual.affines[:, :3, [0, 1, 3]], atol=1e-9)
    np.testing.assert_array_equal(other.pixels[order], usual.pixels)
    assert usual.pixels.shape == (3, 90, 110) and usual.pixels.std() > 20


def test_images_of_another_plane_are_refused_and_of_another_contrast_told(tmp_path: Path) -> None:
    places, pixels = [(4.0 * k, 0, 0) for k in range(3)], np.random.default_rng(0).integers(0, 900, (90, 90), "uint16")
    tags = {"SeriesDescription": "sag t1", "orientation": dicom_files.SAGITTAL, "spacing": (2.0, 2.0)}
    write_stack(tmp_path / "series", places, pixels=pixels, **tags)
    assert read_stack(tmp_path / "series", 1, 2, T1)[1] == []
    [(rule, file, contrast, action)] = read_stack(tmp_path / "series", 1, 2, T2)[1]
    assert (rule, action) == ("contrast_differs", "used as the table says")
    assert file.name == "1.dcm" and contrast == "T1 in the header, described as Sagittal T2/STIR"
    with pytest.raises(DicomError, match="its images are sagittal, not those of Axial T2"):
        read_stack(tmp_path / "series", 1, 2, AXIAL)
    coronal = {**tags, "orientation": ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))}
    write_stack(tmp_path / "coronal", [(0, 4.0 * k, 0) for k in range(3)], pixels=pixels, **coronal)
    for kind in (T1, AXIAL):
        with pytest.raises(DicomError, match="its images are coronal"):
            read_stack(tmp_path / "coronal", 1, 2, kind)


@pytest.mark.parametrize(("patients", "lost"), [("aab", [3]), ("abb", [1]), ("aaa", []), ("a-b", []), ("a--", [])])
def test_a_series_of_another_patient_is_left_out(tmp_path: Path, patients: str, lost: list[int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 900, (90, 90), "uint16")
    for series, patient in enumerate(patients, start=1):
        tags = {"PatientID": patient.strip("-"), "orientation": dicom_files.SAGITTAL, "spacing": (2.0, 2.0)}
        write_stack(tmp_path / f"test_images/1/{series}", [(4.0 * k, 0, 0) for k in range(3)], pixels=pixels, **tags)
    rows = [(1, series, T1, "test") for series in (1, 2, 3)]
    none, columns = pd.DataFrame(), ["study_id", "series_id", "series_type", "split"]
    comp = Competition(tmp_path, none, none, pd.DataFrame(rows, columns=columns), [], none)
    stacks, findings = read_study(comp, "test", 1)
    assert {1, 2, 3} - {stack.series_id for stack in stacks} == set(lost)
    told = findings[findings["rule"] == "patient_differs"]
    assert set(findings["rule"]) <= set(RULES)  # by which reports say what a finding means
    assert told["series_id"].tolist() == (lost or ([3] if patients == "a-b" else []))
    assert set(told["action"]) == ({"series left out"} if lost else {"used"} if patients == "a-b" else set())
    assert len(told) == len(findings)
