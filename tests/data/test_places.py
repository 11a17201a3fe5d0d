"""Coordinates from DICOM to networks: a bright ball is placed in the patient by the positions and orientations in the
headers alone, and must be found there, within half a voxel, in every representation made from the files."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.uid import ExplicitVRLittleEndian
from toy_spine import write_dataset

from lsdc_utils import dicom
from lsdc_utils.data.stacks import Stack, load_study, read_stack, save_stack
from lsdc_utils.detector.canal import AXIAL_REACH, axial_levels, readers_canal
from lsdc_utils.detector.classes import DetectorConfig
from lsdc_utils.detector.detections import Detections, patient_points
from lsdc_utils.detector.images import wanted, windows
from lsdc_utils.detector.places import find_places
from lsdc_utils.phantom.body import FIRST, Body
from lsdc_utils.phantom.contrast import Visit
from lsdc_utils.phantom.files import write_slice
from lsdc_utils.phantom.scanner import Protocol, plan_series, render
from lsdc_utils.published.grid import grid_points, study_grid
from lsdc_utils.vit.crops import SLOTS, level_cuts
from lsdc_utils.vit.inputs import study_input
from lsdc_utils.vit.model import VitConfig
from lsdc_utils.vocabulary import AXIAL, GROUPS, LEVELS, SERIES_TYPES, SIDES, SPINAL_CANAL, T1, T2

RADIUS = 3.0  # mm, sd of the ball
BRIGHT = 3000  # at its middle; the anatomy is dimmed to 200 at most, and 4095 is white
LEVEL = 2  # of the ball
CASES = {
    "plain": {},
    "tilted blocks": {"tilted": True, "backwards": True},
    "oblique": {"turn": (8, -6, 9), "square": False},
    "all at once": {"tilted": True, "turn": (-5, 8, -10), "backwards": True, "square": False},
}


@dataclass(frozen=True)
class Planted:
    """A study on disk, its body, and where the ball is."""

    folder: Path
    body: Body
    ball: np.ndarray  # (3,) LPS mm, to the patient's left of the canal

    @property
    def canal(self) -> pd.DataFrame:
        """The true canal points."""
        points = pd.DataFrame(self.body.points()[:5], columns=list("XYZ"))
        return points.assign(study_id=7, level=LEVELS, side="", confidence=1.0)

    def series(self, series_type: str) -> dicom.Series:
        return dicom.read_series(self.folder / str(SERIES_TYPES.index(series_type)))

    def stack(self, series_type: str) -> Stack:
        number = SERIES_TYPES.index(series_type)
        return read_stack(self.folder / str(number), 7, number, series_type)[0]


def turned(degrees: tuple[float, float, float]) -> np.ndarray:
    """A rotation (3, 3) by a vector of degrees."""
    return cv2.Rodrigues(np.deg2rad(degrees))[0]


def write_study(folder: Path, tilted=False, turn=(0, 0, 0), backwards=False, square=True) -> Planted:
    """A study of the phantom with a ball; `turn` (degrees) turns all its slices about the spine, `backwards` their
    numbers; without `square` neither are the images, nor their pixels."""
    rng = np.random.default_rng(3)
    body = Body.draw(rng, np.full(25, 0.3), slip=False, transitional=False)
    middle = body.points()[LEVEL]
    turning = np.eye(4)
    turning[:3, :3] = turned(turn)
    turning[:3, 3] = middle - turning[:3, :3] @ middle
    ball = body.to_patient(16.0, 3.0, body.discs[FIRST + LEVEL] + 0.6)
    visit = replace(Visit.draw(rng), view=320.0)  # mm, so that the bright corner is far from the spine
    for series, series_type in enumerate(SERIES_TYPES):
        plan = plan_series(rng, body, series_type, (0, 1, 2, 3, 4), tilted, square, Protocol(stir=0), visit)
        plan = replace(plan, affines=turning @ plan.affines)
        (folder / str(series)).mkdir(parents=True)
        for k, (image, affine) in enumerate(zip(render(body, plan, rng), plan.affines, strict=True)):
            number = len(plan.affines) - k if backwards else 1 + k
            header = {"SOPInstanceUID": f"1.2.{series}.{number}", "InstanceNumber": number}
            file = folder / str(series) / f"{number}.dcm"
            image, affine = (image, affine) if square else stretched(image, affine)
            write_slice(file, image // 20, affine, header)
            plant(file, ball)
    return Planted(folder, body, ball)


def stretched(image: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same image with a fifth fewer, wider columns."""
    columns = image.shape[1] * 4 // 5
    factor = image.shape[1] / columns
    affine = affine.copy()
    affine[:3, 3] += affine[:3, 0] * (factor - 1) / 2
    affine[:3, 0] *= factor
    return cv2.resize(image, (columns, image.shape[0]), interpolation=cv2.INTER_AREA), affine


def plant(file: Path, ball: np.ndarray) -> None:
    """Add the ball to an image, as PS3.3 C.7.6.2.1.1 places its pixels."""
    dataset = pydicom.dcmread(file)
    image = dataset.pixel_array.astype(float)
    along_x, along_y = np.reshape(dataset.ImageOrientationPatient, (2, 3)).astype(float)
    down, across = (float(mm) for mm in dataset.PixelSpacing)
    row, column = np.indices(image.shape)[..., None]
    place = np.array(dataset.ImagePositionPatient, float) + column * across * along_x + row * down * along_y
    image += BRIGHT * np.exp(-((place - ball) ** 2).sum(axis=-1) / (2 * RADIUS**2))
    dataset.PixelData = np.rint(image).astype("<u2").tobytes()
    dataset["PixelData"].is_undefined_length = False
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.save_as(file)


@pytest.fixture(autouse=True)
def fixed_window(monkeypatch) -> None:
    """Grey levels in proportion to signal, as places are tested alone."""

    def to_grey(images: list[np.ndarray], _: np.ndarray, target: np.ndarray) -> np.ndarray:
        for image, place in zip(images, target, strict=True):
            place[: image.shape[0], : image.shape[1]] = np.clip(image / 16, 0, 255)
        return np.ones(len(images))

    monkeypatch.setattr("lsdc_utils.data.stacks.to_grey", to_grey)


@pytest.fixture(scope="module", params=CASES, ids=[name.replace(" ", "-") for name in CASES])
def planted(request, tmp_path_factory) -> Planted:
    return write_study(tmp_path_factory.mktemp("planted"), **CASES[request.param])


def centre(values: np.ndarray, places: np.ndarray, planted: Planted) -> np.ndarray:
    """Middle of what is bright among places (..., 3) with values (...), looked for within 60 mm of the canal."""
    near = np.linalg.norm(places - planted.body.points()[LEVEL], axis=-1) < 60
    weight = np.clip(values.astype(float) - 25, 0, None) * near
    assert weight.max() > 30, "the ball is not to be seen"
    return (weight[..., None] * places).reshape(-1, 3).sum(axis=0) / weight.sum()


def assert_half_a_voxel(found: np.ndarray, planted: Planted, voxel: np.ndarray) -> None:
    """`found` is off the ball by half a voxel at most along each of the voxel's edges (3, 3), rows in mm."""
    off = np.linalg.solve(voxel.T, found - planted.ball)
    assert (np.abs(off) <= 0.5).all(), f"off by {off.round(2)} voxels"


def edges(stack: Stack) -> np.ndarray:
    """Edges (3, 3) of a voxel of a stack: a pixel to the right, a pixel down, a step to the next slice."""
    affine = stack.affines[0]
    steps = np.linalg.norm(np.diff(stack.affines[stack.blocks == stack.blocks[0], :3, 3], axis=0), axis=1)
    return np.stack([affine[:3, 0], affine[:3, 1], affine[:3, 2] * np.median(steps)])


@pytest.mark.parametrize("series_type", SERIES_TYPES)
def test_the_reader_leads_from_the_patient_to_the_pixel_and_back(planted, series_type):
    series = planted.series(series_type)
    index, x, y, off = series.to_pixel(*planted.ball)
    image = series.pixels[index].astype(float)
    image[:20, :20] = 0
    row, column = np.indices(image.shape)
    weight = np.clip(image - 400, 0, None)
    seen = (weight * column).sum() / weight.sum(), (weight * row).sum() / weight.sum()
    assert np.abs(np.subtract(seen, (x, y))).max() < 0.5
    assert all(image.max() >= other[20:].max() for other in series.pixels)  # the brightest slice is the nearest
    assert off <= series.steps().max() / 2
    back = np.array(series.to_patient(series.slices[index].instance_number, *seen))
    in_plane = series.slices[index].affine[:3, :2] / series.slices[index].spacing
    assert np.abs((back - planted.ball) @ in_plane).max() < 0.5 * max(series.slices[index].spacing)
    assert np.linalg.norm(back - planted.ball) == pytest.approx(off, abs=0.5)


@pytest.mark.parametrize("series_type", SERIES_TYPES)
def test_the_cached_stack_shows_the_ball_where_it_is(planted, series_type, tmp_path):
    save_stack(planted.stack(series_type), tmp_path / "7/1.npz")
    (stack,) = load_study(tmp_path, 7)
    row, column = np.indices(stack.pixels.shape[1:])
    pixel = np.stack([column, row, 0 * row, 1 + 0 * row], axis=-1)
    places = np.einsum("nij,rcj->nrci", stack.affines, pixel)[..., :3]
    assert_half_a_voxel(centre(stack.pixels, places, planted), planted, edges(stack))


@pytest.mark.parametrize("key", GROUPS)
def test_the_detectors_image_shows_the_ball_where_its_label_is(planted, key, tmp_path):
    settings = {"nfn": ((200.0, 80.0), (160, 64)), "scs": ((200.0, 120.0), (224, 160)), "ss": ((80.0, 80.0), (96, 96))}
    config = DetectorConfig(key, *settings[key], True, 14.0)
    stack = planted.stack(GROUPS[key].series_type)
    series = planted.series(GROUPS[key].series_type)
    index, x, y, _ = series.to_pixel(*planted.ball)
    condition = GROUPS[key].base if key == "scs" else f"left_{GROUPS[key].base}"
    place = series.to_patient(series.slices[index].instance_number, x, y)
    label = {"row_id": f"7_{condition}_l3_l4", "study_id": 7, "condition": condition, "level": "l3_l4", "severity": 1}
    label |= {"series_id": stack.series_id, "instance_number": series.slices[index].instance_number, "x": x, "y": y}
    labels = pd.DataFrame([label | dict(zip("XYZ", place, strict=True))])
    others = planted.canal.assign(condition=SPINAL_CANAL, severity=0, series_id=99, x=0.0, y=0.0)
    others["row_id"] = [f"7_{SPINAL_CANAL}_{level}" for level in LEVELS]
    labels = pd.concat([labels, others[~others["row_id"].isin(labels["row_id"])]], ignore_index=True)
    canal = readers_canal(labels, config.canal_from_foramina)
    images, boxes, skipped = write_dataset([stack], labels, tmp_path, config, 5.0, 2.0, 0)
    assert not skipped["row_id"].isin(labels["row_id"][:1]).any() and (boxes["slice"] == index).any()
    for line in images.itertuples():
        image = cv2.imread(str(tmp_path / line.file))[..., 1].astype(float)  # between its neighbours
        if line.slice != index and image.max() < 50:
            continue  # a slice that has the box of its neighbour, but little of the ball
        weight = np.clip(image - 25, 0, None)
        row, column = np.indices(image.shape)
        seen = np.array([(weight * column).sum(), (weight * row).sum()]) / weight.sum()
        written = (tmp_path / line.file.replace("images", "labels")).with_suffix(".txt").read_text().split()
        label_at = np.array(written[1:3], float) * image.shape[::-1] - 0.5
        assert np.abs(seen - label_at).max() < 0.5
        share = ((seen + 0.5) / image.shape[::-1])[None, None]
        window = windows(stack, config, canal)[[line.slice]]
        back = patient_points(stack.affines[[line.slice]], window, share)[0, 0]
        affine = stack.affines[line.slice]
        pixel = window[:, 2:] / image.shape[::-1]
        off = (back - planted.ball) @ affine[:3, :2] / (affine[:3, :2] ** 2).sum(axis=0)  # in pixels of the series
        assert (np.abs(off) < 0.5 * np.maximum(pixel, 1)).all()


def test_squares_show_the_ball_in_its_place_and_on_its_side(planted):
    """The ball lies 16 mm to the left of the canal: in the squares of the left side, and there to half a pixel."""
    stacks = [planted.stack(kind) for kind in SERIES_TYPES]
    size, spacing = 40, (1.0, 1.0, 1.0)  # wide enough to hold all of the ball
    config, canal = VitConfig(spacing=spacing, margin=0), planted.canal.assign(condition="scs")
    images = study_input(stacks, canal, config)["images"]
    by_slot = images[LEVEL].reshape(len(SLOTS), config.slices, config.size, config.size)
    cuts = list(level_cuts(stacks, canal, size, spacing, config.slices))
    for number, ((kind, side), seen) in enumerate(zip(SLOTS, by_slot, strict=True)):
        if side == "right":
            assert (seen < 60).all()
        if side != "left":
            continue
        assert seen.max() > 100
        rows, cols = np.indices((size, size))[..., None]
        mine = [cut for level, slot, _, cut in cuts if (level, slot) == (LEVEL, number)]
        nearest = max(mine, key=lambda cut: cut.sample(size).max())  # of the slices to the ball; blocks lie unlike
        found = centre(nearest.sample(size), nearest.origin + cols * nearest.columns + rows * nearest.rows, planted)
        off = [(found - planted.ball) @ step / (step @ step) for step in (nearest.columns, nearest.rows)]
        assert (np.abs(off) <= 0.5).all(), f"{kind}: off by {np.round(off, 2)} pixels"


def test_the_study_grid_shows_the_ball_in_its_place(planted):
    stacks = [planted.stack(kind) for kind in SERIES_TYPES]
    points, steps = grid_points(stacks, 64)
    for grid in study_grid(stacks, 64):
        assert_half_a_voxel(centre(grid, points, planted), planted, np.diag(steps))


def detected(planted: Planted, columns: slice, series_type: str) -> Detections:
    """Sure detections of the body's points of these columns, each on the slice of a series that lies nearest to it."""
    series, points = planted.series(series_type), []
    for point in planted.body.points()[columns]:
        index, x, y, _ = series.to_pixel(*point)
        points.append(series.to_patient(series.slices[index].instance_number, x, y))
    scores = np.tile([1e-6, 0.9, 1e-6], (len(points), 1))
    levels = np.arange(len(points)) % len(LEVELS) if series_type == AXIAL else np.full(len(points), -1)
    return Detections(np.array(points), scores, levels, levels)


def test_side_and_level_of_foramina_and_recesses_come_from_the_patient(planted):
    canal = planted.canal.set_index("level")[["X", "Y", "Z"]]
    truth = planted.body.points()
    for key, columns, series_type in (("nfn", slice(5, 15), T1), ("ss", slice(15, 25), AXIAL)):
        settings = DetectorConfig(key, (80.0, 80.0), (96, 96), True, 10.0)
        seen = detected(planted, columns, series_type)
        found = find_places(seen, settings, canal)
        named = dict(zip(found.names, found.points, strict=True))
        assert len(named) == len(truth[columns])
        for number, (side, level) in enumerate((side, level) for side in SIDES for level in LEVELS):
            assert np.linalg.norm(named[side, level] - truth[columns][number]) < 5  # a step between slices, not a level
            assert (named[side, level][0] > canal.loc[level, "X"]) == (side == "left")


def test_axial_slices_show_the_level_whose_point_lies_near_their_plane(planted):
    config = DetectorConfig("ss", (80.0, 80.0), (96, 96), True, 10.0)
    stack, canal = planted.stack(AXIAL), planted.canal
    shown = wanted(stack, config, canal)
    series = planted.series(AXIAL)
    for point in canal[["X", "Y", "Z"]].to_numpy():
        assert shown[series.to_pixel(*point)[0]]
    for k, image in enumerate(series.slices):
        normal, origin = image.affine[:3, 2], image.affine[:3, 3]
        nearest = np.abs((canal[["X", "Y", "Z"]].to_numpy() - origin) @ normal).min()
        assert shown[k] == (nearest <= AXIAL_REACH)
    levels = axial_levels(stack, canal)
    assert (levels[[series.to_pixel(*point)[0] for point in canal[["X", "Y", "Z"]].to_numpy()]] == range(5)).all()


def test_the_canal_is_looked_for_where_it_is(planted):
    config = DetectorConfig("scs", (200.0, 120.0), (224, 160), True, 14.0)
    shown = wanted(planted.stack(T2), config, planted.canal)
    series = planted.series(T2)
    assert all(shown[series.to_pixel(*point)[0]] for point in planted.body.points()[:5])
    assert not shown.all()
