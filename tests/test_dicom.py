"""Tests of lsdc_utils.dicom, on small series that the tests write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_files import SAGITTAL, tilted, write_slice, write_stack
from pydicom.pixels import get_decoder
from pydicom.uid import RLELossless

from lsdc_utils.dicom import DicomError, read_series


def level(degrees: float, centre: float, n: int = 3, step: float = 4.0) -> list[tuple[float, float, float]]:
    """Positions of a stack of n tilted slices round height z = centre, from its foot to its head."""
    along_x, along_y = (np.array(v) for v in tilted(degrees))
    normal = np.cross(along_x, along_y)
    corner = np.array([0.0, 0.0, centre]) - 3.5 * 0.75 * along_x - 2.5 * 0.5 * along_y  # of an image of 6 x 8 pixels
    return [tuple(corner + (k - (n - 1) / 2) * step * normal) for k in range(n)]


def test_pixels_have_their_place_in_the_patient(tmp_path: Path) -> None:
    write_slice(tmp_path / "7.dcm", 7, (-10.0, -20.0, 30.0))
    series = read_series(tmp_path)
    assert series.slices[0].spacing == (0.75, 0.5)
    assert series.to_patient(7, 0, 0) == (-10.0, -20.0, 30.0)
    assert series.to_patient(7, 4, 2) == (-10.0 + 4 * 0.75, -20.0 + 2 * 0.5, 30.0)
    sagittal = read_series(write_stack(tmp_path / "sagittal", [(5.0, -20.0, 30.0)], orientation=SAGITTAL))
    assert sagittal.to_patient(1, 4, 2) == (5.0, -20.0 + 4 * 0.75, 30.0 - 2 * 0.5)
    with pytest.raises(DicomError, match="no readable instance with number 8"):
        series.to_patient(8, 0, 0)


@pytest.mark.parametrize("degrees", [0.0, 12.0, -25.0])
def test_to_pixel_is_the_inverse_of_to_patient(tmp_path: Path, degrees: float) -> None:
    series = read_series(write_stack(tmp_path, level(degrees, 0.0), orientation=tilted(degrees)))
    for index, image in enumerate(series.slices):
        point = series.to_patient(image.instance_number, 3.25, 1.5)
        assert series.to_pixel(*point) == pytest.approx((index, 3.25, 1.5, 0.0), abs=1e-9)
        aside = np.array(point) + 1.5 * image.affine[:3, 2]
        assert series.to_pixel(*aside) == pytest.approx((index, 3.25, 1.5, 1.5), abs=1e-9)


@pytest.mark.parametrize("reverse", [False, True])
def test_slices_are_sorted_by_position_whatever_their_numbers(tmp_path: Path, reverse: bool) -> None:
    heights = [0.0, 4.0, 8.0, 12.0][:: -1 if reverse else 1]
    axial = read_series(write_stack(tmp_path / "a", [(0.0, 0.0, z) for z in heights], first=5043))
    assert [image.affine[2, 3] for image in axial.slices] == [12.0, 8.0, 4.0, 0.0]  # from head to foot
    assert axial.steps().tolist() == [4.0, 4.0, 4.0]
    assert [int(pixels[0, 0]) for pixels in axial.pixels] == [
        image.instance_number % 4096 for image in axial.slices
    ]  # 12 bits
    sagittal = read_series(write_stack(tmp_path / "s", [(x, 0.0, 0.0) for x in heights], orientation=SAGITTAL))
    assert [image.affine[0, 3] for image in sagittal.slices] == [0.0, 4.0, 8.0, 12.0]  # from right to left
    assert (axial.plane, sagittal.plane) == ("axial", "sagittal")


def test_thickness_and_gaps_in_numbers_do_not_matter(tmp_path: Path) -> None:
    for number, height in ((3, 0.0), (11, 0.6), (900, 1.2)):  # slices thinner than 1 mm
        write_slice(tmp_path / f"{number}.dcm", number, (0.0, 0.0, height), SliceThickness=4.0)
    series = read_series(tmp_path)
    assert [image.instance_number for image in series.slices] == [900, 11, 3]
    assert series.steps() == pytest.approx([0.6, 0.6]) and {image.block for image in series.slices} == {0}


def test_blocks_of_different_tilt_are_kept_apart(tmp_path: Path) -> None:
    planes = [(-15.0, -60.0), (-5.0, -30.0), (0.0, 0.0), (6.0, 30.0), (20.0, 60.0)]  # degrees, height of the centre
    number = 0
    for degrees, height in planes:
        for position in level(degrees, height):
            number += 1
            write_slice(tmp_path / f"{number}.dcm", number, position, tilted(degrees))
    series = read_series(tmp_path)
    assert [image.block for image in series.slices] == sorted([0, 1, 2, 3, 4] * 3)
    heights = [image.centre[2] for image in series.slices]
    assert heights[::3] == sorted(heights[::3], reverse=True)
    assert all(a > b for k in range(5) for a, b in zip(heights[3 * k :], heights[3 * k + 1 : 3 * k + 3], strict=False))
    assert series.steps() == pytest.approx([4.0] * 10)
    # A point at the height of the last block lies between planes of other blocks too, but outside their images.
    for index in (0, 7, 14):
        place = series.slices[index].centre
        assert series.to_pixel(*place) == pytest.approx((index, 3.5, 2.5, 0.0), abs=1e-6)


def test_a_wide_gap_ends_a_block(tmp_path: Path) -> None:
    heights = [0.0, 4.0, 8.0, 16.0, 43.0, 47.0]  # one slice lacks after 8, after 16 nothing was imaged for 27 mm
    series = read_series(write_stack(tmp_path, [(0.0, 0.0, z) for z in heights]))
    assert [image.block for image in series.slices] == [0, 0, 1, 1, 1, 1]


def test_one_place_imaged_twice_is_in_the_order_of_numbers(tmp_path: Path) -> None:
    series = read_series(write_stack(tmp_path, [(0.0, 0.0, z) for z in (4.0, 0.0, 4.0, 0.0)]))
    assert [image.instance_number for image in series.slices] == [1, 3, 2, 4]
    assert {image.block for image in series.slices} == {0}


def test_stored_values_become_signal(tmp_path: Path) -> None:
    stored = np.arange(48, dtype="uint16").reshape(6, 8) * 80
    write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 3.0), pixels=stored)
    write_slice(tmp_path / "2.dcm", 2, (0.0, 0.0, 2.0), pixels=stored, rle=False)
    write_slice(tmp_path / "3.dcm", 3, (0.0, 0.0, 1.0), pixels=stored, PhotometricInterpretation="MONOCHROME1")
    write_slice(tmp_path / "4.dcm", 4, (0.0, 0.0, 0.0), pixels=stored, RescaleSlope="0.5", RescaleIntercept="-100")
    write_slice(tmp_path / "5.dcm", 5, (0.0, 0.0, -1.0), pixels=stored | 0xF000)  # bits that are no part of the value
    signed = (stored.astype("int16") - 2000).astype("int16")
    write_slice(tmp_path / "6.dcm", 6, (0.0, 0.0, -2.0), pixels=signed, rle=False)
    write_slice(tmp_path / "7.dcm", 7, (0.0, 0.0, -3.0), pixels=signed, PhotometricInterpretation="MONOCHROME1")
    plain, raw, inverse, scaled, dirty, below, inverse_below = read_series(tmp_path).pixels
    for pixels in (plain, raw, dirty):
        assert pixels.dtype == np.uint16 and (pixels == stored).all()
    assert (inverse == 4095 - stored).all()
    assert scaled.dtype == np.float32 and np.allclose(scaled, stored * 0.5 - 100)
    assert below.dtype == np.int16 and (below == signed).all()
    assert (inverse_below == -1 - signed).all()


def test_headers_alone_give_the_same_geometry(tmp_path: Path) -> None:
    write_stack(tmp_path, level(10.0, 0.0), orientation=tilted(10.0))
    series, headers = read_series(tmp_path), read_series(tmp_path, pixels=False)
    assert headers.pixels is None and len(series.pixels) == 3
    for one, other in zip(series.slices, headers.slices, strict=True):
        assert (one.file, one.shape, one.block) == (other.file, other.shape, other.block)
        assert (one.affine == other.affine).all()


def test_mixed_shapes_stay_as_they_are(tmp_path: Path) -> None:
    write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 4.0))
    write_slice(tmp_path / "2.dcm", 2, (0.0, 0.0, 0.0), pixels=np.zeros((5, 4), "uint16"))
    series = read_series(tmp_path)
    assert [image.shape for image in series.slices] == [(6, 8), (5, 4)] == [pixels.shape for pixels in series.pixels]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop": ("ImageOrientationPatient",)}, "has no ImageOrientationPatient"),
        ({"drop": ("ImagePositionPatient",)}, "has no ImagePositionPatient"),
        ({"drop": ("PixelSpacing",)}, "has no PixelSpacing"),
        ({"drop": ("Rows",)}, "has no Rows"),
        ({"drop": ("PixelData",)}, "Pixel Data"),
        ({"spacing": (0.0, 1.0)}, "PixelSpacing"),
        ({"orientation": ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0))}, "not two directions at right angles"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
        ({"NumberOfFrames": 5}, "holds 5 frames"),
        ({"SamplesPerPixel": 3}, "colour"),
    ],
)
def test_a_file_that_cannot_be_used_is_left_out_with_its_reason(tmp_path: Path, options: dict, reason: str) -> None:
    write_stack(tmp_path, [(0.0, 0.0, 0.0), (0.0, 0.0, 4.0)])
    bad = write_slice(tmp_path / "3.dcm", 3, **({"position": (0.0, 0.0, 8.0)} | options))
    series = read_series(tmp_path)
    assert [image.instance_number for image in series.slices] == [2, 1]
    assert len(series.pixels) == 2
    assert [file for file, _ in series.skipped] == [bad]
    assert reason in series.skipped[0][1]


def test_broken_files_are_left_out(tmp_path: Path) -> None:
    good = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0))
    whole = good.read_bytes()
    (tmp_path / "2.dcm").write_bytes(whole[:-30])
    (tmp_path / "3.dcm").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").write_text("not looked at")
    series = read_series(tmp_path)
    assert [image.file for image in series.slices] == [good]
    assert {file.name for file, _ in series.skipped} == {"2.dcm", "3.dcm", "notes.txt"}
    assert all(reason for _, reason in series.skipped)


def test_an_instance_number_from_the_name_of_the_file(tmp_path: Path) -> None:
    write_slice(tmp_path / "12.dcm", 1, (0.0, 0.0, 0.0), drop=("InstanceNumber",))
    write_slice(tmp_path / "first.dcm", 1, (0.0, 0.0, 4.0), drop=("InstanceNumber",))
    series = read_series(tmp_path)
    assert [image.instance_number for image in series.slices] == [12]
    assert "InstanceNumber" in series.skipped[0][1]


def test_series_that_cannot_be_used_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DicomError, match="no such folder"):
        read_series(tmp_path / "gone")
    with pytest.raises(DicomError, match="the folder is empty"):
        read_series(tmp_path)
    (tmp_path / "1.dcm").write_bytes(b"no DICOM")
    with pytest.raises(DicomError, match=r"no file can be used \(1.dcm: "):
        read_series(tmp_path)
    twice = tmp_path / "twice"
    for name, height in (("a", 0.0), ("b", 4.0)):
        write_slice(twice / f"{name}.dcm", 5, (0.0, 0.0, height))
    with pytest.raises(DicomError, match=r"a.dcm and b.dcm both have instance number 5"):
        read_series(twice)
    assert issubclass(DicomError, ValueError)


def test_rle_is_decoded_by_the_fast_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = get_decoder(RLELossless)  # one object for all of pydicom
    monkeypatch.setitem(decoder._available, "pydicom", lambda *_: pytest.fail("its own decoder is three times slower"))
    series = read_series(write_stack(tmp_path, [(0.0, 0.0, 0.0)]))
    assert series.skipped == () and (series.pixels[0] == 1).all()
