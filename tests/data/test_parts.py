"""Series that mix kinds, planes, sizes and stations: the part that is meant is read, the rest is left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import AXIAL, SAGITTAL, _item, write_frames, write_slice

from lsdc_utils import vocabulary as words
from lsdc_utils.data import competition, unsorted
from lsdc_utils.data.parts import far_from_others, select
from lsdc_utils.data.stacks import convert_studies, read_study
from lsdc_utils.dicom import Frames, read_series

CORONAL = ((1.0, 0.0, 0.0), (0.0, 0.0, -1.0))
PLAIN = ("ORIGINAL", "PRIMARY", "T2", "NONE")
T2 = {"StudyInstanceUID": "1.2.3", "SeriesInstanceUID": "1.5", "Modality": "MR", "SeriesDescription": "t2"}
Image = tuple[float, Sequence[str], float, Any]  # x in mm, image type, echo time, orientation


def images(kind: Sequence[str] = PLAIN, echo: float = 100.0, orientation: Any = SAGITTAL, n: int = 10) -> list[Image]:
    return [(4.0 * k, kind, echo, orientation) for k in range(n)]


def write(folder: Path, form: str, series: list[Image], **tags: Any) -> Path:
    """The series as one file an image or as one enhanced file; the n-th image has the value n everywhere."""
    folder.mkdir(parents=True, exist_ok=True)
    if form == "classic":
        for n, (x, kind, echo, orientation) in enumerate(series):
            own = {"ImageType": list(kind), "EchoTime": echo, "RepetitionTime": 3000, "SOPInstanceUID": f"1.5.{n}"}
            pixels = np.full((6, 8), n, "uint16")
            write_slice(folder / f"{n}.dcm", n + 1, (x, 0, 0), orientation, pixels, **{**T2, **own, **tags})
        return folder
    frames = [
        _item(
            MRImageFrameTypeSequence=[_item(FrameType=list(kind))],
            MREchoSequence=[_item(EffectiveEchoTime=echo)],
            PlanePositionSequence=[_item(ImagePositionPatient=[x, 0.0, 0.0])],
            PlaneOrientationSequence=[_item(ImageOrientationPatient=[*orientation[0], *orientation[1]])],
        )
        for x, kind, echo, orientation in series
    ]
    pixels = np.arange(len(series), dtype="uint16")[:, None, None] * np.ones((6, 8), "uint16")
    tags = {**T2, "ImageType": ["ORIGINAL", "PRIMARY", "T2", "MIXED"], **tags}
    places = [(x, 0.0, 0.0) for x, *_ in series]
    write_frames(folder / "all.dcm", 1, places, pixels, PerFrameFunctionalGroupsSequence=frames, **tags)
    return folder


def values(source: Any) -> list[int]:
    """The value of each image that is read."""
    return [int(image[0, 0]) for image in read_series(source, labelled=False).pixels]


def reasons(found: unsorted.Discovered) -> str:
    return "\n".join(value for _, _, rule, value, _ in found.findings if rule == "series_skipped")


def dixon(word: str) -> list[Image]:
    return images(("ORIGINAL", "PRIMARY", "DIXON", word))


MIXTURES = {
    "fat image": [*dixon("FAT"), *images()],
    "opposed-phase image": [*dixon("OPP_PHASE"), *images()],
    "DIXON": [*dixon("WATER"), *dixon("IN_PHASE")],
    "phase image": [*images(("ORIGINAL", "PRIMARY", "P")), *images()],
    "diffusion": [*images(("DERIVED", "PRIMARY", "DIFFUSION", "ADC")), *images()],
    "echo time 100 ms": [*images(echo=15.0), *images()],
    "another echo": [*images(echo=15.0, n=1), *[(x + 4, *rest) for x, *rest in images()]],
    "image type": [(-4.0, ("DERIVED", "PRIMARY", "T2", "NONE"), 100.0, SAGITTAL), *images()],
    "lying across": [*images(orientation=AXIAL, n=1), *images()],
    "tilt": [(20.0, PLAIN, 100.0, ((0.6, 0.8, 0.0), (0.0, 0.0, -1.0))), *images()],
}


@pytest.mark.parametrize("form", ["classic", "enhanced"])
@pytest.mark.parametrize("reason", MIXTURES)
def test_the_meant_part_of_a_mixture_is_read(tmp_path: Path, reason: str, form: str) -> None:
    series = MIXTURES[reason]
    folder = write(tmp_path / "s", form, series)
    found = unsorted.find(tmp_path)
    expected = list(range(len(series) - 10, len(series)))
    assert [row["series_type"] for row in found.series] == [words.T2]
    assert [values(files) for files in found.files.values()] == [expected] and reason in reasons(found)
    source, notes = select(folder, words.T2)  # as a table lists it
    assert values(source) == expected and reason in notes[0][1]
    assert select(source, words.T2) == (source, [])
    if form == "enhanced":
        assert source == [Frames(folder / "all.dcm", tuple(expected))]
        assert [image.instance_number for image in read_series(source).slices] == [n + 1 for n in expected]


@pytest.mark.parametrize("form", ["classic", "enhanced"])
def test_three_planes_are_a_localiser(tmp_path: Path, form: str) -> None:
    series = [image for plane in (SAGITTAL, AXIAL, CORONAL) for image in images(orientation=plane)]
    folder = write(tmp_path / "s", form, series)
    found = unsorted.find(tmp_path)
    assert not found.series and "several planes" in reasons(found)
    assert values(select(folder, words.T2)[0]) == list(range(10))  # which a table may list as a series all the same


def test_usual_series_stay_whole(tmp_path: Path) -> None:
    kind = ("DERIVED", "PRIMARY", "M", "NORM", "DIS2D", "FIL")
    write(tmp_path / "a", "classic", images(kind), BodyPartExamined="LSPINE")
    assert len(read_series(tmp_path / "a").slices) == 10 and not unsorted.find(tmp_path).findings
    blocks = [((1.0, 0.0, 0.0), (0.0, c, -s)) for c, s in ((1.0, 0.0), (0.8, 0.6))]
    for n in range(13):  # the second block, of another tilt, has its own size
        block, shape = (1, (5, 7)) if n >= 11 else (0, (6, 8))
        pixels = np.full(shape, n, "uint16")
        write_slice(tmp_path / "b" / f"{n}.dcm", n, (0, 0, -4.0 * n), blocks[block], pixels, **T2)
    assert select(tmp_path / "b", words.AXIAL) == (tmp_path / "b", [])


@pytest.mark.parametrize("step", [250.0, -250.0])
def test_stations_far_from_most_series_of_the_study_are_skipped(tmp_path: Path, step: float) -> None:
    for k, (text, height) in enumerate((("t1", 0.0), ("t2", 0.0), ("t2", step))):
        for n in range(6):
            tags = T2 | {"SeriesDescription": text, "SeriesInstanceUID": f"1.{k}", "SOPInstanceUID": f"1.{k}.{n}"}
            write_slice(tmp_path / f"{k}/{n}.dcm", n, (4.0 * n, 0, height), SAGITTAL, **tags)
    found = unsorted.find(tmp_path)
    assert sorted(row["series_type"] for row in found.series) == [words.T1, words.T2]
    assert f"250 mm {'above' if step > 0 else 'below'}" in reasons(found)
    assert far_from_others({"T2 low": 0.0, "T2 high": 240.0}) == {"T2 high": 240.0}
    assert far_from_others({"L1": 70.0, "L5": -70.0, "sagittal": 0.0}) == {}


@pytest.mark.parametrize(
    ("text", "part", "used"),
    [
        *[
            (text, "", False)
            for text in ("t2_tse_sag_384_C1-C8", "t2 T1-T12", "T2 Th1-12", "HWS t2", "rachis dorsal t2")
        ],
        *[(text, "", False) for text in ("t2 colonna cervicale", "T2 whole spine", "t2 Hüfte", "T2 SIJ", "t2 knee")],
        *[(text, "", True) for text in ("t2 L1-S1", "T2 T12-S1", "LWS t2", "T2 3 mm", "t2 thoracolumbar", "T2 LS")],
        *[("t2", part, part in ("LSPINE", "SPINE")) for part in ("CSPINE", "HEAD", "PELVIS", "LSPINE", "SPINE")],
    ],
)
def test_series_of_another_region_are_skipped(tmp_path: Path, text: str, part: str, used: bool) -> None:
    tags = {"SpecificCharacterSet": "ISO_IR 100", "SeriesDescription": text, "BodyPartExamined": part}
    write(tmp_path / "s", "classic", images(n=6), **tags)
    found = unsorted.find(tmp_path)
    assert bool(found.series) == used and ("other part" in reasons(found)) == (not used)


def test_a_position_is_enough_where_no_label_needs_a_number(tmp_path: Path) -> None:
    for n in range(6):
        write_slice(tmp_path / f"uid{n}.dcm", n, (20.0 - 4 * n, 0, 0), SAGITTAL, drop=("InstanceNumber",), **T2)
    series = read_series(tmp_path, labelled=False)
    assert [image.instance_number for image in series.slices] == [1, 2, 3, 4, 5, 6] and not series.skipped
    assert [int(image[0, 0]) for image in series.pixels] == [5, 4, 3, 2, 1, 0]
    for n in range(6):
        tags = T2 | {"SOPInstanceUID": f"1.5.{n}"}
        write_slice(tmp_path / f"uid{n}.dcm", 1, (4.0 * n, 0, 0), SAGITTAL, np.full((6, 8), n, "uint16"), **tags)
    assert values(tmp_path) == [0, 1, 2, 3, 4, 5]
    assert len(unsorted.find(tmp_path).series) == 1


def test_a_series_of_another_station_that_a_table_lists_is_not_used(tmp_path: Path) -> None:
    rows = ["study_id,series_id,series_description"]
    for k, (kind, height) in enumerate(((words.T1, 0.0), (words.T2, 0.0), (words.T2, 300.0)), 1):
        rows.append(f"1,{k},{kind}")
        for n in range(1, 6):
            file = tmp_path / f"test_images/1/{k}/{n}.dcm"
            write_slice(
                file,
                n,
                (4.0 * n, 0, height),
                SAGITTAL,
                np.arange(2500, dtype="uint16").reshape(50, 50),
                spacing=(2.0, 2.0),
            )
    (tmp_path / "test_series_descriptions.csv").write_text("\n".join(rows))
    stacks, findings = read_study(competition.read(tmp_path), "test", 1)
    assert [stack.series_id for stack in stacks] == [1, 2]
    assert findings[["series_id", "rule"]].to_numpy().tolist() == [[3, "series_far_away"]]
    [(same, _)] = convert_studies(competition.read(tmp_path), "test", [1], tmp_path / "slices")  # as for training
    assert same.equals(findings)
    assert sorted(file.name for file in (tmp_path / "slices/1").iterdir()) == ["1.npz", "2.npz"]


def test_a_mixture_of_images_without_orientation_is_no_error(tmp_path: Path) -> None:
    write(tmp_path / "s", "classic", images())
    for n in range(10, 18):
        own = {"ImageType": ["DERIVED", "SECONDARY"], "drop": ("ImageOrientationPatient", "ImagePositionPatient")}
        write_slice(tmp_path / f"s/{n}.dcm", n + 1, (0, 0, 0), SOPInstanceUID=f"1.5.{n}", **own, **T2)
    assert values(select(tmp_path / "s", words.T2)[0]) == list(range(10))
    assert [values(files) for files in unsorted.find(tmp_path).files.values()] == [list(range(10))]


@pytest.mark.parametrize(("kind", "wanted"), [(words.T2, range(6)), (words.T1, range(6, 16))])
def test_of_t1_and_t2_in_one_folder_the_listed_contrast_is_read(tmp_path: Path, kind: str, wanted: range) -> None:
    for n in range(16):  # as many headers have it: no times
        name, x = ("sag t2", 4.0 * n) if n < 6 else ("sag t1", 4.0 * (n - 6) + 1)
        tags = {**T2, "SeriesDescription": name, "SOPInstanceUID": f"1.5.{n}"}
        write_slice(tmp_path / f"{n}.dcm", n + 1, (x, 0, 0), SAGITTAL, np.full((6, 8), n, "uint16"), **tags)
    source, left_out = select(tmp_path, kind)
    assert sorted(values(source)) == list(wanted)
    assert "contrast" in left_out[0][1]
