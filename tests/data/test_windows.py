"""Windowing: scale, padding, text and odd images do not matter, the coil's field is taken out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from dicom_files import write_slice
from pydicom.uid import ImplicitVRLittleEndian, JPEGLSLossless
from spines import SAGITTAL, make_affines

from lsdc_utils.data.stacks import Stack, read_stack
from lsdc_utils.data.windows import WINDOW, _signal, _windows, to_grey, window_image
from lsdc_utils.dicom import DicomError
from lsdc_utils.vocabulary import AXIAL


def window_of(images: list[np.ndarray]) -> np.ndarray:
    return _windows(images, _signal(images))[0]


@pytest.mark.parametrize("kind", ["u1", "i1", "<u2", "<i2", ">u2", ">i2", "<u4", "<i4", "<f4"])
def test_windowing_is_the_plain_formula_for_any_kind_of_pixels(kind):
    rng = np.random.default_rng(0)
    limits = (-1000, 4000) if np.dtype(kind).itemsize > 1 else (-100, 100)
    images = [rng.integers(*limits, shape).clip(0 if "u" in kind else None).astype(kind) for shape in ((9, 7), (5, 8))]
    for low, high in ((10.3, 90.9), (limits[0] * 0.8, limits[1] * 0.9), (5, 5)):
        target = np.full((2, 9, 8), 77, dtype=np.uint8)
        for image, grey in zip(images, target, strict=True):
            window_image(image, np.array([low, high]), np.full((2, 3), 255, np.float32), grey)
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
    np.testing.assert_allclose(window_of(images), [np.percentile(seen, WINDOW)] * 3, rtol=1e-6)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (7, 4), (9, 6), (33, 40), (64, 61), (70, 62), (51, 63)])
def test_a_mirrored_image_has_the_same_window(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(3).integers(0, 4000, shape).astype(np.uint16)
    window = window_of([image]).tolist()
    assert window_of([image[:, ::-1]]).tolist() == window
    assert window_of([image[::-1]]).tolist() == window
    np.testing.assert_allclose(window_of([image.astype(float)[:, ::-1]]), window)


def alike(grey: np.ndarray, expected: np.ndarray, allowed: int) -> bool:
    """Whether 99 in 100 pixels differ by at most `allowed` grey levels, and none by more than 16."""
    change = np.abs(grey.astype(int) - expected)
    return bool(np.percentile(change, 99) <= allowed and change.max() <= 16)


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
    inside, allowed = stack.pixels[:, 15:-15, 20:-20].copy(), 8 if images[0].itemsize == 1 else 3
    assert alike(inside, plain, allowed) and rules == []
    stack.pixels[:, 15:-15, 20:-20] = 0
    assert not stack.pixels.any()


@pytest.mark.parametrize("value", [0, 700, 4095, 65535])
def test_a_frame_does_not_decide_the_window(tmp_path: Path, plain: np.ndarray, value: int) -> None:
    images = [np.pad(image + 300, ((15, 15), (20, 20)), constant_values=value) for image in anatomy()]
    stack, rules = read(tmp_path, images)
    assert alike(stack.pixels[:, 15:-15, 20:-20], plain, 3) and rules == []


@pytest.mark.parametrize("soft", [False, True])
def test_burnt_in_text_does_not_decide_the_window(tmp_path: Path, plain: np.ndarray, soft: bool) -> None:
    images = []
    for k, image in enumerate(anatomy()):
        ink = cv2.putText(np.zeros(image.shape, "uint8"), f"NAME {k}", (3, 14), 0, 0.5, 255, 2) / 255
        ink = ink if soft else np.rint(ink)
        images.append((image + ink * (4095 - image)).astype("uint16"))
    assert np.mean(np.array(images) > 3000) > 0.005
    stack, rules = read(tmp_path, images)
    assert alike(stack.pixels[:, 25:], plain[:, 25:], 4) and rules == []


@pytest.mark.parametrize(("factor", "offset"), [(10, 0), (2, 0), (0.2, 0), (1, 5000)])
def test_an_image_of_another_scale_is_shown_as_its_neighbours(
    tmp_path: Path, plain: np.ndarray, factor: float, offset: int
) -> None:
    images = anatomy()
    images[4] = (images[4] * factor + offset).astype("uint16")
    stack, rules = read(tmp_path, images)
    change = np.abs(stack.pixels - plain)
    assert rules == ["scale_differs"] and change[[0, 1, 2, 3, 5, 6, 7, 8]].max() <= 2
    assert change[4].mean() < 2 and change[4].max() <= 8


def test_noise_is_not_amplified(tmp_path: Path, plain: np.ndarray) -> None:
    images = anatomy()
    images[8] = np.hypot(*np.random.default_rng(1).normal(0, 20, (2, 120, 100))).astype("uint16")
    stack, rules = read(tmp_path, images)
    assert rules == [] and stack.pixels[8].mean() < 12 and alike(stack.pixels[:8], plain[:8], 5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0, 4095])
def test_an_image_of_one_value_is_left_out(tmp_path: Path, plain: np.ndarray, value: int) -> None:
    images = anatomy()
    images[3] = np.full_like(images[3], value)
    stack, rules = read(tmp_path, images)
    assert rules == ["file_unusable"] and stack.instance_numbers.tolist() == [1, 2, 3, 5, 6, 7, 8, 9]
    assert alike(stack.pixels, np.delete(plain, 3, axis=0), 3)
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


def body(places: np.ndarray) -> np.ndarray:
    """Signal of a T2 image at places (..., 2) in mm, backwards and upwards of the spine's middle: air around fat and
    muscle, vertebrae with a dark rim and dark discs, CSF behind them, the belly's fat in front."""
    back, up = places[..., 0], places[..., 1]
    signal = np.full(back.shape, 150.0)  # muscle
    signal[(back < -45) & (np.sin(back / 9) * np.sin(up / 13) > 0)] = 450  # between the bowels
    signal[np.abs(back + 15) < 18] = 300
    signal[(np.abs(back + 15) < 18) & (np.abs(up % 36 - 18) < 5)] = 100
    signal[np.abs(np.abs(back + 15) - 18) < 1.5] = 15  # cortical bone
    signal[np.abs(back - 11) < 7] = 900
    signal[back > 60] = 600  # below the skin
    signal[(back > 85) | (back < -130)] = 0
    return signal


def picture(field: float, size: int, shift: float = 0.0, length: float = np.inf, noise: float = 10.0) -> tuple:
    """Three sagittal slices (size, size) of `body` for a field of view in mm, dimmer by e in each `length` mm from the
    back; their grey levels by place, every 2 mm of the spine (n, 61, 31), and all grey levels."""
    spacing, rng = field / size, np.random.default_rng(size)
    offsets = (np.arange(size) - (size - 1) / 2) * spacing
    places = np.stack(np.meshgrid(offsets + shift, offsets), axis=-1)
    coil = np.exp(np.minimum(places[..., 0] - 85, 0) / length)
    noises = rng.normal(0, noise, (3, 2, size, size))
    images = [np.hypot(body(places) * coil + real, imaginary) for real, imaginary in noises]
    affines = make_affines(3, spacing, 4.0, centre=(0, 0, 0), size=(size, size), **SAGITTAL)
    grey = np.zeros((3, size, size), np.uint8)
    assert (to_grey([(4 * image).astype("uint16") for image in images], affines, grey) == 1).all()
    smooth = [cv2.GaussianBlur(image, (0, 0), 1.2 / spacing).astype(np.float32) for image in grey]
    back, up = np.meshgrid(np.arange(-30.0, 31, 2), np.arange(-60.0, 61, 2))
    column, row = (((mm + (size - 1) / 2 * spacing) / spacing).astype(np.float32) for mm in (back - shift, up))
    return np.stack([cv2.remap(image, column, row, cv2.INTER_LINEAR) for image in smooth]), grey


@pytest.mark.parametrize("length", [30, 40, 50, 80])
def test_the_field_of_a_coil_is_taken_out(length: float) -> None:
    flat, dim = picture(320, 256)[0], picture(320, 256, length=length, noise=0.5)[0]
    change = np.abs(dim - flat)
    assert change.mean() <= 1.5 and np.percentile(change, 95) <= 4
    assert 50 < np.median(flat) < 120


@pytest.mark.parametrize(
    ("field", "size", "shift"),
    [(140, 160, 0), (180, 512, 0), (320, 1024, 0), (420, 256, 0), (320, 256, 40), (320, 256, -40)],
)
def test_field_of_view_pixels_and_place_do_not_matter(field: float, size: int, shift: float) -> None:
    change = np.abs(picture(field, size, shift)[0] - picture(300, 256)[0])
    mean, most = (14, 40) if field < 150 else (7, 32)  # without the belly; edges of finer pixels
    assert change.mean() <= mean and np.percentile(change, 95) <= most


def test_csf_is_not_clipped_and_air_stays_dark() -> None:
    spine, grey = picture(420, 400, length=40, noise=1.0)
    assert 170 < spine[:, :, 20].mean() < 235 and spine.max() < 250  # 10 mm behind the middle
    assert np.percentile(grey[:, :, :60], 99) < 40 and np.percentile(grey[:, :, -60:], 99) < 40


def test_a_series_may_have_one_slice_or_several_sizes() -> None:
    images = anatomy()
    places = make_affines(9, 2.0, 4.0, centre=(0, 0, 0), size=(120, 100), **SAGITTAL)
    one, mixed = np.zeros((1, 120, 100), np.uint8), np.zeros((9, 120, 100), np.uint8)
    assert to_grey(images[4:5], places[4:5], one).tolist() == [1]
    images[4] = images[4][:100, :90]
    assert to_grey(images, places, mixed).tolist() == [1] * 9
    assert not mixed[4, 100:].any() and not mixed[4, :, 90:].any()
    assert (
        10 < np.abs(one).mean() < 120
        and np.corrcoef(one[0, :100, :90].ravel(), mixed[4, :100, :90].ravel())[0, 1] > 0.97
    )
