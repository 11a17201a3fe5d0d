"""Stacks: reading, windowing, saving, averaging of pixels."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
from dicom_files import write_slice, write_stack
from pydicom.uid import ImplicitVRLittleEndian, JPEGLSLossless
from spines import SAGITTAL, make_affines, make_stack, ramp

from lsdc_utils.data.competition import Competition
from lsdc_utils.data.stacks import (
    WINDOW,
    Stack,
    _windows,
    coarsen,
    convert_studies,
    load_study,
    read_stack,
    read_study,
    save_stack,
    spacing_fault,
    window_images,
)
from lsdc_utils.dicom import DicomError, read_series
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


def anatomy() -> list[np.ndarray]:
    """Nine images (120, 100) of 12 bits: smooth structures that change slowly from image to image, in noise."""
    rng = np.random.default_rng(7)
    rows, cols = np.mgrid[:120, :100]
    bumps = [(rng.uniform(10, 110), rng.uniform(0, 100), rng.uniform(6, 20), rng.uniform(200, 900)) for _ in range(12)]
    images = []
    for k in range(9):
        image = sum(h * np.exp(-((rows - y - k) ** 2 + (cols - x) ** 2) / w**2) for y, x, w, h in bumps)
        images.append(np.hypot(*(image / 2**0.5 + rng.normal(0, 20, (2, 120, 100)))).astype("uint16"))
    return images


def read(folder: Path, images: list[np.ndarray], each: tuple[dict, ...] = (), **tags: Any) -> tuple[Stack, list[str]]:
    """The stack of images written to `folder`, with tags and with tags of each; the rules of its notes."""
    bits = 8 * images[0].itemsize
    for k, image in enumerate(images):
        own = {
            "BitsStored": bits,
            "HighBit": bits - 1,
            "spacing": (2.0, 2.0),
            "rle": bits < 32,
            **tags,
            **(each[k] if each else {}),
        }
        write_slice(folder / f"{k + 1}.dcm", k + 1, (0.0, 0.0, -4.0 * k), pixels=image, **own)
    stack, notes = read_stack(folder, 1, 1, AXIAL)
    return stack, [rule for rule, *_ in notes]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> np.ndarray:
    """Grey levels (9, 120, 100) of `anatomy`."""
    stack, rules = read(tmp_path_factory.mktemp("plain"), anatomy())
    assert rules == [] and (stack.pixels == 0).mean() < 0.05 and (stack.pixels == 255).mean() < 0.05
    return stack.pixels.astype(int)


INVERSE = {"PhotometricInterpretation": "MONOCHROME1"}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("change", "tags"),
    [
        (lambda v: v * 13 + 900, {}),
        (lambda v: v.astype("i2") - 1000, {}),
        (lambda v: v, dict(RescaleSlope="2.5", RescaleIntercept="-3000")),
        (lambda v: v, dict(RescaleSlope="1", RescaleIntercept="1e9")),
        (lambda v: 4095 - v, dict(RescaleSlope="-0.5", RescaleIntercept="10")),
        (lambda v: 4095 - v, INVERSE | dict(BitsStored=12, HighBit=11)),
        (lambda v: v.astype("u4") + 3 * 10**9, {}),
        (lambda v: v.astype("i4") * 900 - 2 * 10**9, {}),
    ],
)
def test_scale_and_offset_of_a_series_do_not_matter(tmp_path: Path, plain: np.ndarray, change, tags: dict) -> None:
    stack, rules = read(tmp_path, [change(image) for image in anatomy()], **tags)
    assert np.abs(stack.pixels - plain).max() <= 1 and rules == []


@pytest.mark.parametrize("inverse", [False, True])
def test_each_image_may_have_its_own_slope(tmp_path: Path, plain: np.ndarray, inverse: bool) -> None:
    images = [image * np.uint16(k + 1) for k, image in enumerate(anatomy())]
    each = tuple(dict(RescaleSlope=f"{1 / (k + 1):.9f}", RescaleIntercept="7") for k in range(9))
    if inverse:  # what is shown is the negative of the rescaled value
        images = [60000 - image for image in images]
        each = tuple(of | INVERSE | {"RescaleIntercept": f"{7 - 60000 / (k + 1):.3f}"} for k, of in enumerate(each))
    stack, rules = read(tmp_path, images, each)
    assert np.abs(stack.pixels - plain).max() <= 1 and rules == []


LIMITS = dict(PixelPaddingValue=3, PixelPaddingRangeLimit=50)
TWELVE = dict(BitsStored=12, HighBit=11)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("change", "padding", "tags"),
    [
        (lambda v: v, 4095, dict(PixelPaddingValue=4095)),
        (lambda v: v, 4095, dict(PixelPaddingValue=4095, syntax=JPEGLSLossless)),
        (lambda v: v.astype("i2"), -2000, dict(PixelPaddingValue=-2000, syntax=ImplicitVRLittleEndian)),
        (lambda v: v.astype("i2"), -32768, dict(PixelPaddingValue=-32768, RescaleSlope="2", RescaleIntercept="5000")),
        (lambda v: v, 0xF830, dict(PixelPaddingValue=0xF830, **TWELVE)),  # in bits that hold no signal
        (lambda v: v << 4 | 5, 4090 << 4 | 3, dict(PixelPaddingValue=4090, BitsStored=12, HighBit=15)),
        (lambda v: v.astype("i4"), -30000, dict(PixelPaddingValue=-30000)),
        (lambda v: (v // 16).astype("u1"), 255, dict(PixelPaddingValue=255)),
        (lambda v: v + 100, range(3, 51), LIMITS | dict(RescaleIntercept="-900")),
        (lambda v: v + 100, range(3, 51), dict(PixelPaddingValue=50, PixelPaddingRangeLimit=3)),
        (lambda v: 4095 - v, range(3, 51), LIMITS | INVERSE | TWELVE),
        (lambda v: 4095 - v, range(3, 51), LIMITS | dict(RescaleSlope="-1", RescaleIntercept="-7")),
    ],
)
def test_padding_is_background_and_no_signal(tmp_path: Path, plain: np.ndarray, change, padding, tags: dict) -> None:
    rng, images = np.random.default_rng(0), []
    for image in anatomy():
        values = change(image)
        framed = np.resize(rng.permutation(np.resize(padding, 999)), (150, 140)).astype(values.dtype)
        framed[15:-15, 20:-20] = values
        images.append(framed)
    stack, rules = read(tmp_path, images, **tags)
    inside, allowed = stack.pixels[:, 15:-15, 20:-20].copy(), 5 if images[0].itemsize == 1 else 1
    assert np.abs(inside - plain).max() <= allowed and rules == []
    stack.pixels[:, 15:-15, 20:-20] = 0
    assert not stack.pixels.any()


@pytest.mark.parametrize("value", [0, 700, 4095, 65535])
def test_a_frame_does_not_decide_the_window(tmp_path: Path, plain: np.ndarray, value: int) -> None:
    images = [np.pad(image + 300, ((15, 15), (20, 20)), constant_values=value) for image in anatomy()]
    stack, rules = read(tmp_path, images)
    assert np.abs(stack.pixels[:, 15:-15, 20:-20] - plain).max() <= 1 and rules == []


@pytest.mark.parametrize("soft", [False, True])
def test_burnt_in_text_does_not_decide_the_window(tmp_path: Path, plain: np.ndarray, soft: bool) -> None:
    images = []
    for k, image in enumerate(anatomy()):
        ink = cv2.putText(np.zeros(image.shape, "uint8"), f"NAME {k}", (3, 14), 0, 0.5, 255, 2) / 255
        ink = ink if soft else np.rint(ink)
        images.append((image + ink * (4095 - image)).astype("uint16"))
    assert np.mean(np.array(images) > 3000) > 0.005
    stack, rules = read(tmp_path, images)
    assert np.abs(stack.pixels - plain)[:, 25:].max() <= 2 and rules == []


@pytest.mark.parametrize(("factor", "offset"), [(10, 0), (2, 0), (0.2, 0), (1, 5000)])
def test_an_image_of_another_scale_is_shown_as_its_neighbours(
    tmp_path: Path, plain: np.ndarray, factor: float, offset: int
) -> None:
    images = anatomy()
    images[4] = (images[4] * factor + offset).astype("uint16")
    stack, rules = read(tmp_path, images)
    change = np.abs(stack.pixels - plain)
    assert rules == ["scale_differs"] and change[[0, 1, 2, 3, 5, 6, 7, 8]].max() <= 1
    assert change[4].mean() < 2 and change[4].max() <= 8


def test_noise_is_not_amplified(tmp_path: Path, plain: np.ndarray) -> None:
    images = anatomy()
    images[8] = np.hypot(*np.random.default_rng(1).normal(0, 20, (2, 120, 100))).astype("uint16")
    stack, rules = read(tmp_path, images)
    assert rules == [] and stack.pixels[8].mean() < 12 and np.abs(stack.pixels - plain)[:8].max() <= 3


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, 4095])
def test_an_image_of_one_value_is_left_out(tmp_path: Path, plain: np.ndarray, value: int) -> None:
    images = anatomy()
    images[3] = np.full_like(images[3], value)
    stack, rules = read(tmp_path, images)
    assert rules == ["file_unusable"] and stack.instance_numbers.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert np.abs(stack.pixels - np.delete(plain, 3, axis=0)).max() <= 3
    assert np.diff(stack.affines[:, 2, 3]).tolist() == [-4, -4, -8, -4, -4, -4, -4]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("noise", [0, 1, 2])
def test_a_series_of_one_grey_level_is_not_used(tmp_path: Path, noise: int) -> None:
    rng = np.random.default_rng(0)
    images = [(500 + rng.integers(-noise, noise + 1, (120, 100))).astype("uint16") for _ in range(3)]
    for image in images:
        image[::11, ::7] += rng.integers(0, 3000, (11, 15)).astype("uint16") * np.uint16(noise == 2)  # hot pixels
    with pytest.raises(DicomError, match="shows nothing"):
        read(tmp_path, images)
    with pytest.raises(DicomError, match="shows nothing"):
        read(tmp_path, images, PixelPaddingValue=0, PixelPaddingRangeLimit=9999)
