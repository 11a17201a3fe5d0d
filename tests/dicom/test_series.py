"""Tests of lsdc_utils.dicom, on small series that the tests write."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import LOSSLESS, LOSSLESS_RAMP, RAMP, SAGITTAL, _item, tilted, write_frames, write_slice, write_stack
from PIL import Image
from pydicom import uid
from pydicom.data import get_testdata_file

from lsdc_utils.dicom import DicomError, NotDicomError, headers, read_series, read_tags

BIG = uid.ExplicitVRBigEndian


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


def test_images_stored_mirrored_or_turned_are_of_one_block(tmp_path: Path) -> None:
    right, down = np.eye(3)[:2]
    for number, height in enumerate((0.0, 4.0, 8.0, 12.0, 16.0), 1):
        sides = [(right, down), (-right, down), (down, right), (-down, -right), (right, down)][number - 1]
        write_slice(tmp_path / f"{number}.dcm", number, (0.0, 0.0, height), np.array(sides))
    series = read_series(tmp_path)
    assert [(image.instance_number, image.block) for image in series.slices] == [(n, 0) for n in (5, 4, 3, 2, 1)]
    assert series.steps() == pytest.approx([4.0] * 4)
    turned = np.array([[np.cos(0.3), np.sin(0.3), 0], [-np.sin(0.3), np.cos(0.3), 0]])  # 17 degrees: not beside them
    write_slice(tmp_path / "6.dcm", 6, (0.0, 0.0, 20.0), turned)
    blocks = {image.instance_number: image.block for image in read_series(tmp_path).slices}
    assert len({blocks[number] for number in range(1, 6)}) == 1 and blocks[6] != blocks[1]


def test_a_wide_gap_ends_a_block(tmp_path: Path) -> None:
    heights = [0.0, 4.0, 8.0, 16.0, 43.0, 47.0]  # one slice lacks after 8, after 16 nothing was imaged for 27 mm
    series = read_series(write_stack(tmp_path, [(0.0, 0.0, z) for z in heights]))
    assert [image.block for image in series.slices] == [0, 0, 1, 1, 1, 1]


def test_images_of_one_place_go_to_stacks_of_their_own(tmp_path: Path) -> None:
    echoes = [(0.0, 0.0, z) for z in (8.0, 8.0, 4.0, 4.0, 0.0, 0.0)] + [(0.0, 0.0, 3.999)]  # and one taken again
    series = read_series(write_stack(tmp_path, echoes))
    assert [image.instance_number for image in series.slices] == [1, 3, 5, 2, 4, 6, 7]
    assert [image.block for image in series.slices] == [0, 0, 0, 1, 1, 1, 2]
    assert series.steps().tolist() == [4.0] * 4


@pytest.mark.parametrize(("moved", "step", "stacks"), [(0.05, 4.0, 2), (0.4, 4.0, 2), (2.0, 4.0, 1), (0.3, 0.6, 1)])
def test_a_second_scan_of_a_patient_who_moved_a_little_is_a_stack_of_its_own(
    tmp_path: Path, moved: float, step: float, stacks: int
) -> None:
    heights = [k * step for k in range(5)]
    series = read_series(write_stack(tmp_path, [(0.0, 0.0, z) for z in heights + [z + moved for z in heights]]))
    blocks = [image.block for image in series.slices]
    assert [blocks.count(block) for block in range(stacks)] == [10 // stacks] * stacks
    assert np.median(series.steps()) == pytest.approx(step if stacks == 2 else step / 2)


def test_two_slices_a_disc_are_no_second_scan(tmp_path: Path) -> None:
    heights = [disc + step for disc in (0.0, 30.0, 60.0, 90.0) for step in (0.0, 4.0)]
    series = read_series(write_stack(tmp_path, [(0.0, 0.0, z) for z in heights]))
    assert [image.affine[2, 3] for image in series.slices] == heights[::-1]


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
    padded = (stored // 4).astype("int16") - 1
    write_slice(tmp_path / "8.dcm", 8, (0.0, 0.0, -4.0), pixels=padded, rle=False, PixelPaddingValue=-1)
    tags = {"PixelPaddingValue": 3600, "PixelPaddingRangeLimit": 4095, "RescaleSlope": "-2", "RescaleIntercept": "5"}
    write_slice(tmp_path / "9.dcm", 9, (0.0, 0.0, -5.0), pixels=stored, PhotometricInterpretation="MONOCHROME1", **tags)
    plain, raw, inverse, scaled, dirty, below, inverse_below, hole, limits = read_series(tmp_path).pixels
    for pixels in (plain, raw, dirty):
        assert pixels.dtype == np.uint16 and (pixels == stored).all()
    assert (inverse == 4095 - stored).all()
    assert scaled.dtype == np.float32 and np.allclose(scaled, stored * 0.5 - 100)
    assert below.dtype == np.int16 and (below == signed).all()
    assert (inverse_below == -1 - signed).all()
    assert hole.dtype == limits.dtype == np.float32 and hole[0, 0] == -np.inf
    assert (hole.ravel()[1:] == padded.ravel()[1:]).all()
    assert (limits == np.where(stored >= 3600, -np.inf, 2 * stored - 5.0)).all()


@pytest.mark.parametrize("sign", ["uint16", "int16"])
@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_every_lossless_way_of_storing_gives_the_same_pixels(tmp_path: Path, syntax: uid.UID, sign: str) -> None:
    stored = np.tile(RAMP, (8, 6)).astype(sign)
    stored -= 2000 * (sign == "int16")
    write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), pixels=stored, syntax=syntax)
    series = read_series(tmp_path)
    assert series.skipped == () and series.pixels[0].dtype == sign
    assert (series.pixels[0] == stored).all()
    series.pixels[0][:] = 0  # can be written to


@pytest.mark.parametrize("syntax", [uid.JPEGLossless, uid.JPEGLosslessSV1], ids=lambda syntax: syntax.keyword)
def test_lossless_jpeg(tmp_path: Path, syntax: uid.UID) -> None:
    write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), pixels=RAMP, syntax=syntax, encoded=[LOSSLESS_RAMP])
    halves = [LOSSLESS_RAMP[:50], LOSSLESS_RAMP[50:]]  # one frame may come in pieces
    write_slice(tmp_path / "2.dcm", 2, (0.0, 0.0, 1.0), pixels=RAMP, syntax=syntax, encoded=halves)
    signed = np.where(RAMP < 2048, RAMP, RAMP - 4096.0).astype("int16")
    write_slice(tmp_path / "3.dcm", 3, (0.0, 0.0, 2.0), pixels=signed, syntax=syntax, encoded=[LOSSLESS_RAMP])
    series = read_series(tmp_path)
    assert series.skipped == ()
    assert (series.pixels[2] == RAMP).all() and (series.pixels[1] == RAMP).all() and (series.pixels[0] == signed).all()


def test_lossy_ways_of_storing(tmp_path: Path) -> None:
    smooth = (np.add.outer(np.arange(64), np.arange(48)) * 20).astype("uint16")
    write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 2.0), pixels=smooth, syntax=uid.JPEG2000)
    eight = (smooth // 16).astype("uint8")
    jpeg = io.BytesIO()
    Image.fromarray(eight).save(jpeg, "jpeg", quality=95)
    write_slice(
        tmp_path / "2.dcm", 2, (0.0, 0.0, 1.0), pixels=eight, syntax=uid.JPEGBaseline8Bit, encoded=[jpeg.getvalue()]
    )
    extended = pydicom.dcmread(get_testdata_file("JPGExtended.dcm"))  # 12 bits, which few decoders know
    extended.ImagePositionPatient, extended.ImageOrientationPatient = [0, 0, 0], [1, 0, 0, 0, 1, 0]
    extended.PixelSpacing, extended.InstanceNumber = [1, 1], 3
    extended.save_as(tmp_path / "3.dcm")
    series = read_series(tmp_path)
    assert series.skipped == ()
    assert np.abs(series.pixels[0].astype(int) - smooth).max() < 60
    assert series.pixels[1].dtype == np.uint8 and np.abs(series.pixels[1].astype(int) - eight).max() < 5
    assert series.pixels[2].shape == (1024, 256) and 0 < series.pixels[2].max() < 4096


def test_bits_wherever_they_lie(tmp_path: Path) -> None:
    write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 3.0), pixels=RAMP << 4 | 0xF, HighBit=15)
    write_slice(tmp_path / "2.dcm", 2, (0.0, 0.0, 2.0), pixels=(RAMP // 16).astype("uint8"), rle=False)
    write_slice(tmp_path / "3.dcm", 3, (0.0, 0.0, 1.0), pixels=RAMP.astype("int32") * -100, rle=False)
    below = RAMP.astype("int16") - 2000
    write_slice(tmp_path / "4.dcm", 4, (0.0, 0.0, 0.0), pixels=below & 0x0FFF, rle=False)  # no sign in the high bits
    words = (RAMP // 16).astype("uint8")
    write_slice(tmp_path / "5.dcm", 5, (0.0, 0.0, -1.0), pixels=words[:, [1, 0, 3, 2, 5, 4, 7, 6]], syntax=BIG)
    high, byte, long, sign, swapped = read_series(tmp_path).pixels
    assert (high == RAMP).all() and (sign == below).all()
    assert byte.dtype == np.uint8 and (byte == RAMP // 16).all() and (swapped == byte).all()
    assert long.dtype == np.int32 and (long == RAMP.astype("int32") * -100).all()


@pytest.mark.parametrize("syntax", [uid.RLELossless, uid.ExplicitVRLittleEndian, uid.JPEGLSLossless])
def test_frames_of_an_enhanced_image_have_places_and_scales_of_their_own(tmp_path: Path, syntax: str) -> None:
    pixels = np.stack([RAMP, RAMP + 1, RAMP + 2])
    heights = [0.0, 8.0, 4.0]
    write_frames(tmp_path / "1.dcm", 7, [(0.0, 0.0, z) for z in heights], pixels, slopes=[1, 2, 3], syntax=syntax)
    write_frames(tmp_path / "2.dcm", 7, [(0.0, 0.0, z + 12) for z in heights], pixels, syntax=syntax)
    series = read_series(tmp_path)
    assert series.skipped == ()
    assert [image.affine[2, 3] for image in series.slices] == [20.0, 16.0, 12.0, 8.0, 4.0, 0.0]
    assert [image.instance_number for image in series.slices] == [5, 6, 4, 2, 3, 1]
    assert [image.frame for image in series.slices] == [1, 2, 0, 1, 2, 0]
    assert series.slices[0].spacing == (0.75, 0.5)
    for values, expected in zip(series.pixels, [RAMP + 1, RAMP + 2, RAMP, (RAMP + 1.0) * 2 + 1], strict=False):
        assert (values == expected).all()
    assert (series.pixels[4] == (RAMP + 2.0) * 3 + 1).all()
    lone = read_tags(tmp_path / "1.dcm")
    assert (lone.frames, lone.echo_time, lone.repetition_time) == (3, 90.0, 3000.0)
    assert lone.orientation == (1.0, 0.0, 0.0, 0.0, 1.0, 0.0) and lone.position == (0.0, 0.0, 0.0)


def test_frames_in_several_pieces(tmp_path: Path) -> None:
    halves = [LOSSLESS_RAMP[:50], LOSSLESS_RAMP[50:]] * 2
    pixels = np.stack([RAMP, RAMP])
    positions = [(0.0, 0.0, 4.0), (0.0, 0.0, 0.0)]
    file = write_frames(tmp_path / "1.dcm", 1, positions, pixels, syntax=uid.JPEGLosslessSV1, encoded=halves)
    assert all((values == RAMP).all() for values in read_series(tmp_path).pixels)
    dataset = pydicom.dcmread(file)
    table = struct.pack("<HHL2L", 0xFFFE, 0xE000, 8, 0, 16 + 102)  # where each frame starts, after the table
    dataset.PixelData = table + b"".join(struct.pack("<HHL", 0xFFFE, 0xE000, len(h)) + h for h in halves)
    dataset.save_as(file)
    assert all((values == RAMP).all() for values in read_series(tmp_path).pixels)


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


@pytest.mark.parametrize("pixels", [True, False])
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"drop": ("ImagePositionPatient",)}, "has no ImagePositionPatient"),
        ({"drop": ("Rows",)}, "has Rows 0 and Columns 8"),
        ({"Rows": 0}, "has Rows 0 and Columns 8: it holds no image"),
        ({"Rows": 60000, "Columns": 60000}, "which no scanner makes"),
        ({"Rows": 4000, "Columns": 4000}, "too short for its image"),
        ({"Rows": 4000, "Columns": 4000, "rle": False}, "is truncated, with 96 of 32000000 bytes"),
        ({"drop": ("PixelData",)}, "has no integer pixels"),
        ({"spacing": (0.0, 1.0)}, "PixelSpacing"),
        ({"orientation": ((1.0, 0.0, 0.0), (1.0, 0.0, 0.0))}, "not two directions at right angles"),
        ({"ImagePositionPatient": None}, "ImagePositionPatient"),
        ({"ImagePositionPatient": [1e5, 0, 0]}, "far outside of any scanner"),
        ({"ImagePositionPatient": [1, 2]}, "where 3 finite numbers are expected"),
        ({"NumberOfFrames": 5}, "is truncated, with 1 of 5 frames"),
        ({"NumberOfFrames": 10**9}, "which no scanner makes"),
        ({"SamplesPerPixel": 3}, "colour"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "colour"),
        ({"BitsAllocated": 1}, "BitsAllocated 1"),
        ({"InstanceNumber": 2**40}, "which no scanner gives"),
        ({"syntax": uid.MPEG2MPML, "encoded": [b"film"]}, "cannot be read here: 'MPEG2"),
    ],
)
def test_a_file_that_cannot_be_used_is_left_out_with_its_reason(
    tmp_path: Path, options: dict, reason: str, pixels: bool
) -> None:
    write_stack(tmp_path, [(0.0, 0.0, 0.0), (0.0, 0.0, 4.0)])
    bad = write_slice(tmp_path / "3.dcm", 3, **({"position": (0.0, 0.0, 8.0)} | options))
    series = read_series(tmp_path, pixels)
    assert [image.instance_number for image in series.slices] == [2, 1]
    assert not pixels or len(series.pixels) == 2
    assert [file for file, _ in series.skipped] == [bad] and series.repaired == ()
    assert reason in series.skipped[0][1]


@pytest.mark.parametrize("rle", [True, False])
def test_a_header_that_is_wrong_about_compression(tmp_path: Path, rle: bool) -> None:
    file = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), rle=rle)
    syntaxes = [f"{syntax}\0".encode() for syntax in (uid.RLELossless, uid.ExplicitVRLittleEndian)]
    file.write_bytes(file.read_bytes().replace(*syntaxes[:: 1 if rle else -1]))
    for pixels in (True, False):
        with pytest.raises(
            DicomError, match="not compressed, but they are:" if rle else "compressed, but they are not:"
        ):
            read_series(tmp_path, pixels)


def test_broken_pixels_are_left_out(tmp_path: Path) -> None:
    write_stack(tmp_path, [(0.0, 0.0, 0.0), (0.0, 0.0, 4.0)])
    broken = LOSSLESS_RAMP[:20] + bytes(60)
    write_slice(tmp_path / "3.dcm", 3, (0.0, 0.0, 8.0), syntax=uid.JPEGLossless, encoded=[broken])
    small = {"pixels": np.zeros((7, 8), "uint16"), "syntax": uid.JPEGLossless, "encoded": [LOSSLESS_RAMP]}
    write_slice(tmp_path / "4.dcm", 4, (0.0, 0.0, 12.0), **small)
    write_slice(tmp_path / "5.dcm", 5, (0.0, 0.0, 16.0), RescaleSlope="1e300")
    rle = write_slice(tmp_path / "6.dcm", 6, (0.0, 0.0, 20.0))
    rle.write_bytes(rle.read_bytes()[:-20] + bytes([0x7F] * 12) + rle.read_bytes()[-8:])
    series = read_series(tmp_path)
    assert [image.instance_number for image in series.slices] == [2, 1]
    reasons = {file.stem: reason for file, reason in series.skipped}
    assert "broken pixel data" in reasons["3"] and "image of 6 x 8 pixels" in reasons["4"]
    assert "RescaleSlope 1e+300" in reasons["5"] and "broken pixel data" in reasons["6"]


@pytest.mark.parametrize("missing", ["ImageOrientationPatient", "PixelSpacing"])
def test_what_a_slice_lacks_is_taken_from_others_that_agree(tmp_path: Path, missing: str) -> None:
    write_stack(tmp_path, level(10.0, 0.0), orientation=tilted(10.0))
    bare = write_slice(tmp_path / "4.dcm", 4, (0.0, 0.0, 20.0), tilted(10.0), drop=(missing,))
    series = read_series(tmp_path)
    assert series.skipped == () and [file for file, _ in series.repaired] == [bare]
    assert f"has no {missing}" in series.repaired[0][1]
    given, taken = (next(s for s in series.slices if s.instance_number == n).affine for n in (1, 4))
    assert given[:3, :3] == pytest.approx(taken[:3, :3])
    odd = {"orientation": tilted(20.0)} if missing == "ImageOrientationPatient" else {"spacing": (1.0, 1.0)}
    write_slice(tmp_path / "5.dcm", 5, (0.0, 0.0, 30.0), **({"orientation": tilted(10.0)} | odd))
    series = read_series(tmp_path)
    assert series.repaired == () and [file for file, _ in series.skipped] == [bare]
    assert "on which all its images agree" in series.skipped[0][1]
    with pytest.raises(DicomError, match=f"has no {missing}"):
        read_series([bare])


def test_the_same_image_twice_counts_once(tmp_path: Path) -> None:
    write_stack(tmp_path, [(0.0, 0.0, 0.0), (0.0, 0.0, 4.0)], SOPInstanceUID="1.2.3")
    copy = tmp_path / "copy.dcm"
    copy.write_bytes((tmp_path / "2.dcm").read_bytes())
    for pixels in (True, False):
        series = read_series(tmp_path, pixels)
        assert [image.instance_number for image in series.slices] == [2, 1]
        assert series.skipped == ((copy, "is the same image as 2.dcm"),)
    write_slice(copy, 2, (0.0, 0.0, 4.0), pixels=RAMP, SOPInstanceUID="1.2.3")
    with pytest.raises(DicomError, match="both have instance number 2"):
        read_series(tmp_path)


def test_broken_files_are_left_out(tmp_path: Path) -> None:
    good = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0))
    whole = good.read_bytes()
    (tmp_path / "2.dcm").write_bytes(whole[:-30])
    (tmp_path / "3.dcm").write_bytes(b"")
    (tmp_path / "4.dcm").write_bytes(whole[:200])
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").write_text("not looked at")
    (tmp_path / "folder").mkdir()
    for pixels in (True, False):
        series = read_series(tmp_path, pixels)
        assert [image.file for image in series.slices] == [good]
        reasons = {file.name: reason for file, reason in series.skipped}
        assert reasons["2.dcm"].startswith("is truncated") and reasons["3.dcm"] == "is empty"
        assert reasons["notes.txt"] == "is not a DICOM file" and "4.dcm" in reasons
    with pytest.raises(DicomError, match="is not a regular file"):
        read_series([tmp_path / "folder"])
    with pytest.raises(DicomError, match="No such file"):
        read_series([tmp_path / "gone"])


def test_an_error_of_our_own_code_is_not_reported_as_the_file_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0))
    for error in (NameError("a name of ours"), KeyError("x"), OSError("no space"), RecursionError(), MemoryError()):
        with pytest.raises(type(error)) as raised, headers.opened(file) as header:
            raise error
        assert raised.value is error and header.stream.closed

    def fail(*_: object) -> None:
        raise NameError("a name of ours")

    for name in ("read_layout", "frame_datasets", "_rescale"):
        with monkeypatch.context() as patch:
            patch.setattr(f"lsdc_utils.dicom.series.{name}", fail)
            with pytest.raises(NameError, match="of ours"):
                read_series(tmp_path)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (NotImplementedError("VR"), r"broken header \(NotImplementedError: VR\)"),
        (RecursionError(), "nested too deeply"),
        (MemoryError(), "more memory than there is"),
        (OSError(5, "Input/output error"), "cannot be read: Input/output error"),
        (OSError("No tag"), "broken header"),
    ],
)
def test_an_error_of_parsing_is_the_file_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    file = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0))
    monkeypatch.setattr("lsdc_utils.dicom.headers.read_dataset", fail)
    for read in (read_tags, read_series):
        with pytest.raises(DicomError, match=reason):
            read(file if read is read_tags else tmp_path)


def test_files_that_are_not_dicom_have_their_own_error(tmp_path: Path) -> None:
    for name, content in (("empty", b""), ("text", b"no image"), ("zeros", bytes(500))):
        (tmp_path / name).write_bytes(content)
    for name in ("empty", "text", "zeros", "."):
        with pytest.raises(NotDicomError):
            read_tags(tmp_path / name)
    file = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0))
    file.write_bytes(file.read_bytes()[:136] + bytes(400))
    with pytest.raises(DicomError) as raised:
        read_series([file])
    assert not isinstance(raised.value, NotDicomError)


def test_data_sets_without_preamble(tmp_path: Path) -> None:
    for k, syntax in enumerate((uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian, BIG)):
        file = write_slice(tmp_path / f"{k}.dcm", k, (0.0, 0.0, k), syntax=syntax, pixels=RAMP, Modality="MR")
        content = file.read_bytes()
        start = next(at for at in (content.find(head, 132) for head in (b"\x08\0\x60\0", b"\0\x08\0\x60")) if at > 0)
        file.write_bytes(content[start:])
        assert read_tags(file).modality == "MR"
    series = read_series(tmp_path)
    assert series.skipped == ()
    assert all((values == RAMP).all() for values in series.pixels)


def test_headers_that_would_never_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), drop=("PixelData",), rle=False).read_bytes()

    def reason(content: bytes) -> str:
        (tmp_path / "1.dcm").write_bytes(content)
        with pytest.raises(DicomError) as error:
            read_tags(tmp_path / "1.dcm")
        return str(error.value)

    sequence = b"\x40\0\x75\x02SQ\0\0\xff\xff\xff\xff"  # of undefined length, as its items
    item = b"\xfe\xff\0\xe0\xff\xff\xff\xff"
    assert "nested too deeply" in reason(head + (sequence + item) * 3000)
    private = b"\x41\0\x10\x10OB\0\0\xff\xff\xff\xff"
    assert "header of more than 32 MB" in reason(head + private + bytes(1 << 26))
    groups = b"\0\x52\x30\x92SQ\0\0\x08\0\x80\0\xfe\xff\0\xe0\0\0\x80\0" + bytes(1 << 23)
    assert "functional groups of more than 4 MB" in reason(head + groups)
    items = b"\xfe\xff\0\xe0\0\0\0\0" * 20_001
    groups = b"\0\x52\x30\x92SQ\0\0" + len(items).to_bytes(4, "little") + items
    assert "or 20000 items" in reason(head + groups)
    monkeypatch.setattr("lsdc_utils.dicom.headers.MAX_READS", 1000)
    assert "more than 1000 reads" in reason(head + sequence + item + b"\x40\0\x76\x02LO\0\0" * 2000)
    assert reason(head + sequence + items)


def test_deflated_files_do_not_grow_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), syntax=uid.DeflatedExplicitVRLittleEndian)
    monkeypatch.setattr("lsdc_utils.dicom.headers.MAX_INFLATED", 100)
    with pytest.raises(DicomError, match="inflates to more than"):
        read_tags(file)
    monkeypatch.undo()
    file.write_bytes(file.read_bytes()[:-40])  # what is there is read, and found to be too little
    with pytest.raises(DicomError, match="has no integer pixels, or a header broken before them"):
        read_series(tmp_path)


def test_a_header_longer_than_the_buffer(tmp_path: Path) -> None:
    long = {name: "x" * 10_000 for name in ("AdditionalPatientHistory", "PatientComments", "AcquisitionComments")}
    long |= {name: "y" * 10_000 for name in ("VisitComments", "ImageComments", "FrameComments", "StudyComments")}
    file = write_slice(tmp_path / "1.dcm", 1, (0.0, 0.0, 0.0), **long)
    assert len(file.read_bytes()) > headers.BUFFER
    assert read_series(tmp_path).skipped == ()


def test_tags_of_a_header(tmp_path: Path) -> None:
    file = write_slice(
        tmp_path / "1.dcm",
        4,
        (1.0, 2.0, 3.0),
        SAGITTAL,
        StudyInstanceUID="1.2",
        SeriesInstanceUID="1.3",
        SOPInstanceUID="1.4",
        PatientID="7",
        Modality="MR",
        SeriesDescription="t2_tse_sag",
        ProtocolName="Lumbar",
        BodyPartExamined="LSPINE",
        ImageType=["ORIGINAL", "PRIMARY", "M"],
        ScanningSequence=["SE", "IR"],
        EchoTime="90.5",
        RepetitionTime="3000",
        InversionTime="160",
        AcquisitionNumber="2",
    )
    tags = read_tags(file)
    assert (tags.study_uid, tags.series_uid, tags.sop_uid) == ("1.2", "1.3", "1.4")
    assert (tags.modality, tags.description) == ("MR", "t2_tse_sag Lumbar")
    assert tags.image_type == ("ORIGINAL", "PRIMARY", "M") and tags.sequence == ("SE", "IR")
    assert (tags.echo_time, tags.repetition_time, tags.inversion_time) == (90.5, 3000.0, 160.0)
    assert tags.orientation == (0.0, 1.0, 0.0, 0.0, 0.0, -1.0) and tags.position == (1.0, 2.0, 3.0)
    assert (tags.frames, tags.rows, tags.columns, tags.instance_number, tags.acquisition_number) == (1, 6, 8, 4, 2)
    assert tags.has_pixels and len(tags.patient) == 16 and tags.patient != "7"
    bare = read_tags(write_slice(tmp_path / "2.dcm", 1, (0.0, 0.0, 0.0), drop=("ImageOrientationPatient", "PixelData")))
    assert (bare.orientation, bare.echo_time, bare.patient, bare.has_pixels) == (None, None, "", False)
    for content in (b"", b"no DICOM", bytes(500)):
        file.write_bytes(content)
        with pytest.raises(DicomError):
            read_tags(file)
    with pytest.raises(DicomError):
        read_tags(tmp_path)


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


def test_a_panic_of_the_rle_decoder_is_a_reason_and_an_interrupt_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """As pyo3's PanicException."""

    def decode(*_: object) -> bytes:
        raise error

    monkeypatch.setattr("lsdc_utils.dicom.pixels.decode_frame", decode)
    write_stack(tmp_path, [(0.0, 0.0, 0.0)])
    error: BaseException = Panic("index out of range")
    with pytest.raises(DicomError, match="index out of range"):
        read_series(tmp_path)
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        read_series(tmp_path)


def test_a_series_of_more_pixels_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_stack(tmp_path, [(0.0, 0.0, z) for z in range(5)])
    monkeypatch.setattr("lsdc_utils.dicom.series.MAX_SERIES", 200)
    with pytest.raises(DicomError, match="is it several series in one"):
        read_series(tmp_path)
    assert len(read_series(tmp_path, pixels=False).slices) == 5


def test_a_spacing_tells_nothing_of_images_of_another_size(tmp_path: Path) -> None:
    write_stack(tmp_path, [(0.0, 0.0, 0.0), (0.0, 0.0, 4.0)])
    bare = write_slice(
        tmp_path / "3.dcm", 3, (0.0, 0.0, 8.0), pixels=np.zeros((5, 4), "uint16"), drop=("PixelSpacing",)
    )
    gone = tmp_path / "4.dcm"
    gone.symlink_to(tmp_path / "nowhere")
    series = read_series(tmp_path)
    assert series.repaired == () and [file for file, _ in series.skipped] == [gone, bare]


def test_frames_without_groups_of_their_own_beside_others_that_have_them_are_refused(tmp_path: Path) -> None:
    places = [(0.0, 0.0, 4.0 * k) for k in range(4)]
    groups = [_item(PlanePositionSequence=[_item(ImagePositionPatient=[*place])]) for place in places]
    pixels = np.ones((6, 6, 8), "uint16")
    tags = {"PerFrameFunctionalGroupsSequence": groups, "ImagePositionPatient": [0.0, 0.0, 0.0]}
    write_frames(tmp_path / "1.dcm", 1, [*places, *places[:2]], pixels, **tags)
    with pytest.raises(DicomError, match="functional groups for 4 frames alone"):
        read_series(tmp_path, labelled=False)
