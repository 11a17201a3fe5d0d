"""Stacks: reading, windowing, saving, averaging of pixels."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from dicom_files import write_stack
from spines import SAGITTAL, make_affines, make_stack, ramp

from lsdc_utils.data.competition import Competition
from lsdc_utils.data.stacks import (
    WINDOW,
    Stack,
    _windows,
    coarsen,
    convert_studies,
    load_study,
    read_study,
    save_stack,
    spacing_fault,
    window_images,
)
from lsdc_utils.dicom import read_series
from lsdc_utils.geometry import to_patient
from lsdc_utils.vocabulary import AXIAL, T1


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


@pytest.mark.parametrize("kind", ["u1", "i1", "<u2", "<i2", ">u2", ">i2", "<u4", "<i4", "<f4"])
def test_windowing_is_the_plain_formula_for_any_kind_of_pixels(kind):
    rng = np.random.default_rng(0)
    limits = (-1000, 4000) if np.dtype(kind).itemsize > 1 else (-100, 100)
    images = [rng.integers(*limits, shape).clip(0 if "u" in kind else None).astype(kind) for shape in ((9, 7), (5, 8))]
    for low, high in ((10.3, 90.9), (limits[0] * 0.8, limits[1] * 0.9), (5, 5)):
        target = np.full((2, 9, 8), 77, dtype=np.uint8)
        window_images(images, [(low, high)] * 2, target)
        for image, grey in zip(images, target, strict=True):
            expected = (image.astype(float) - low) * 255 / max(high - low, 1e-6)
            found = grey[: image.shape[0], : image.shape[1]].astype(float)
            assert np.abs(found - np.clip(expected, 0, 255)).max() <= 0.51  # rounded, and that in 32 bits
        assert (target[0, :, 7] == 77).all() and (target[1, 5:] == 77).all()


@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4"])
@pytest.mark.parametrize(
    ("shape", "rows", "columns"),
    [((23, 24), range(1, 23, 5), range(4, 24, 5)), ((41, 60), range(0, 41, 5), range(2, 60, 5))],
)
def test_percentiles_are_numpys(kind, shape, rows, columns):
    images = [np.random.default_rng(k).gamma(2, 30, shape).astype(kind) for k in range(3)]
    seen = np.stack(images)[:, list(rows)][:, :, list(columns)]
    np.testing.assert_allclose(_windows(images)[0], [np.percentile(seen, WINDOW)] * 3, rtol=1e-6)


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
            write_stack(folder, [(0, 0, 4.0 * k) for k in range(3)], pixels=pixels, spacing=spacing)
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


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 4), (9, 6), (33, 40), (64, 61), (70, 62), (51, 63)])
def test_a_mirrored_image_has_the_same_window(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(3).integers(0, 4000, shape).astype(np.uint16)
    window = _windows([image])[0].tolist()
    assert _windows([image[:, ::-1]])[0].tolist() == window
    assert _windows([image[::-1]])[0].tolist() == window
    np.testing.assert_allclose(_windows([image.astype(float)[:, ::-1]])[0], window)


@pytest.mark.parametrize(
    ("spacing", "places", "fault"),
    [
        ((0.5, 0.5), [(0.0, 0.0, 4.0 * k) for k in range(3)], ""),
        ((0.5, 0.5), [(0.0, 0.0, 0.0)], ""),
        ((0.05, 0.05), [(0.0, 0.0, 0.0)], "pixels of 0.05 x 0.05 mm"),
        ((0.3, 0.3), [(0.0, 0.0, 0.0)], "a field of view of 60 mm"),
        ((0.5, 0.5), [(0.0, 0.0, 60.0 * k) for k in range(3)], "steps between slices of 60 mm"),
        ((0.5, 0.5), [(0.0, 0.0, 0.1 * k) for k in range(3)], "steps between slices of 0.1 mm"),
    ],
)
def test_implausible_sizes(tmp_path: Path, spacing, places, fault: str) -> None:
    write_stack(tmp_path, places, spacing=spacing, pixels=np.zeros((160, 200), "uint16"))
    assert spacing_fault(read_series(tmp_path, pixels=False)) == fault
