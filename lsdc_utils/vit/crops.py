"""Squares round each level, cut in the plane of each slice: where they lie, and their grey values.

Nothing is resampled between slices. Slice thickness and instance numbers are never used. Coordinates are LPS mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack, coarsen
from lsdc_utils.vocabulary import AXIAL, LEVELS, SERIES_TYPES, SIDES, T1, T2

# Where the canal points of an average spine lie, mm to posterior and to the head of L3/L4: the competition's label
# points (mean x over width and y over height of the image) on a usual field of view of 280 mm.
SPINE_Y = np.array([10.0, 4.0, 0.0, 1.0, 9.0])
SPINE_Z = np.array([64.0, 32.0, 0.0, -31.0, -56.0])
SPINE_SLOPE = np.tan(np.deg2rad([11.0, 8.0, 2.0, -9.0, -26.0]))  # mm to posterior a mm up: usual tilts of the discs
LATERAL = np.array([1.0, -1.0])  # x direction that leads outwards, for each of vocabulary.SIDES
# Which slices show a level: at the canal, at either foramen, at the disc; axial images are seen from each side.
SLOTS = ((T2, ""), (T1, SIDES[0]), (T1, SIDES[1]), (AXIAL, SIDES[0]), (AXIAL, SIDES[1]))
FORAMEN = 16.0  # mm outwards of the canal: where its outer wall narrows the nerve
SLICE_REACH = 14.0  # mm from there that a slice may lie: three steps
SAME_SLICE = 1.0  # mm between slices that show the same
SAGITTAL_MIDDLE = (-1.0, 4.0)  # mm to posterior and to the head from a level's point to the middle of its square
AXIAL_MIDDLE = (8.0, -1.0)  # mm outwards and to posterior


class CropError(ValueError):
    """Slices or points that cannot be brought into patient space; the message names the study."""


def level_frames(points: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Centres (5, 3) of a study's levels in the canal, LPS mm, and the directions (5, 3, 3) of a frame at each.

    points: the canal points of one study: level, X, Y, Z and, where they are detections, confidence. Rows of a frame
    are unit vectors to the left, to posterior and to the head along the canal. Missing levels are set between their
    neighbours by the shape of an average spine. X is smoothed along the spine, because a point clicked on the
    neighbouring slice is 4 mm off the midline. CropError where there is no point at all.
    """
    places = points[["X", "Y", "Z"]].to_numpy(dtype=float)
    weight = np.maximum(points["confidence"].to_numpy(), 1e-6) if "confidence" in points else np.ones(len(points))
    of_level = (points["level"].to_numpy() == np.array(LEVELS)[:, None]) & np.isfinite(places).all(axis=1)
    if not of_level.any():
        raise CropError(f"no canal point for study {points['study_id'].iloc[0] if len(points) else '(none given)'}")
    share = of_level * weight  # (5, points)
    with np.errstate(invalid="ignore"):
        weighted = share @ np.nan_to_num(places) / share.sum(axis=1, keepdims=True)  # NaN where a level has no point

    order, known = np.arange(len(LEVELS)), np.isfinite(weighted[:, 0])
    average = np.stack([np.zeros(len(LEVELS)), SPINE_Y, SPINE_Z], axis=1)
    offset = weighted - average
    offset = np.stack([np.interp(order, order[known], offset[known, axis]) for axis in range(3)], axis=1)
    centres = average + offset
    z = centres[:, 2]
    centres[:, 0] = _smooth(z, centres[:, 0], 1)
    slope_y = SPINE_SLOPE + np.gradient(_smooth(z, offset[:, 1], 2), z)
    slope_x = np.gradient(centres[:, 0], z)
    head = geometry.unit(np.stack([slope_x, slope_y, np.ones(len(LEVELS))], axis=1))
    left = geometry.unit(np.array([1.0, 0, 0]) - head * head[:, :1])
    return centres, np.stack([left, np.cross(head, left), head], axis=1)


def _smooth(z: np.ndarray, values: np.ndarray, degree: int) -> np.ndarray:
    """A polynomial in z through values (n,) of levels, held back by a ridge: spines bend less than clicks err."""
    scaled = (z - z.mean()) / 50  # mm: about half a lumbar spine
    basis = np.stack([scaled**power for power in range(degree + 1)], axis=1)
    ridge = np.diag([0.0] + [0.5] * degree)  # a click's variance over that of a slope of 3 mm in 50 mm
    return basis @ np.linalg.solve(basis.T @ basis + ridge, basis.T @ values)


@dataclass(frozen=True)
class Cut:
    """A square of pixels in the plane of one slice: pixel (row r, column c) is the patient point origin + c columns +
    r rows; LPS mm."""

    image: np.ndarray  # (rows, cols) uint8: the slice
    affine: np.ndarray  # (4, 4): (column, row, 0, 1) of the slice -> mm
    origin: np.ndarray  # (3,)
    columns: np.ndarray  # (3,) mm a pixel
    rows: np.ndarray  # (3,) mm a pixel
    place: float  # of the slice, mm from the level's point: outwards (T2: to the left) or, if axial, to the head

    def sample(self, size: int) -> np.ndarray:
        """Its grey values uint8 (size, size), bilinear in the slice; 0 outside."""
        corners = self.origin + np.stack([0 * self.rows, self.columns, self.rows])
        corners = geometry.to_pixels(self.affine, corners)[:, :2]
        matrix = np.column_stack([corners[1] - corners[0], corners[2] - corners[0], corners[0]])
        return cv2.warpAffine(self.image, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def level_cuts(
    stacks: list[Stack], points: pd.DataFrame, size: int, spacing: float, count: int
) -> list[list[list[Cut]]]:
    """For each of five levels and each of `SLOTS` the squares of the `count` slices nearest to where a slot looks.

    points: as in `level_frames`. Squares have `size` pixels of `spacing` mm a side. Columns lead to posterior and rows
    to the head; in axial slices columns lead outwards, so that a right half is mirrored onto a left one, and rows to
    posterior. Slices are taken as they are, from whichever series of the type holds them; there may be fewer, or none.
    """
    slices = {kind: list(_slices(stacks, kind, spacing)) for kind in SERIES_TYPES}
    levels = []
    for centre, frame in zip(*level_frames(points), strict=True):
        slots = []
        for kind, side in SLOTS:
            outward = LATERAL[SIDES.index(side)] if side else 1.0
            nearest = _nearest(slices[kind], centre, outward * FORAMEN if kind == T1 else 0.0, count)
            slots.append([_cut(source, kind, centre, frame, outward, size, spacing) for source in nearest])
        levels.append(slots)
    return levels


@dataclass(frozen=True)
class _Slice:
    image: np.ndarray  # (rows, cols)
    affine: np.ndarray  # (4, 4)
    normal: np.ndarray  # (3,) to the left or, if axial, to the head

    def place(self, centre: np.ndarray) -> float:
        """Where it lies, mm along its normal from a patient point."""
        return float(self.normal @ (self.affine[:3, 3] - centre))


def _slices(stacks: list[Stack], series_type: str, spacing: float) -> Iterator[_Slice]:
    """All slices of a series type, coarsened to `spacing` mm where they are finer."""
    for stack in stacks:
        if stack.series_type != series_type:
            continue
        stack = coarsen(stack, spacing)
        for image, affine, (rows, cols) in zip(stack.pixels, stack.affines, stack.shapes, strict=True):
            normal = geometry.normals(affine)
            towards = normal[2] if series_type == AXIAL else normal[0]
            yield _Slice(image[:rows, :cols], affine, normal if towards > 0 else -normal)


def _nearest(slices: list[_Slice], centre: np.ndarray, aim: float, count: int) -> list[_Slice]:
    """The slices nearest to the place `aim` (mm), at most `SLICE_REACH` from it; of a repeated slice only the first."""
    chosen = []
    for candidate in sorted(slices, key=lambda member: abs(member.place(centre) - aim)):
        place = candidate.place(centre)
        if len(chosen) == count or abs(place - aim) > SLICE_REACH:
            break
        if all(abs(place - other.place(centre)) >= SAME_SLICE for other in chosen):
            chosen.append(candidate)
    return chosen


def _cut(
    source: _Slice, kind: str, centre: np.ndarray, frame: np.ndarray, outward: float, size: int, spacing: float
) -> Cut:
    """The square of a slice whose middle lies `AXIAL_MIDDLE` or `SAGITTAL_MIDDLE` off a level's point."""
    place, normal = source.place(centre), source.normal
    across, down = (frame[0] * outward, frame[1]) if kind == AXIAL else (frame[1], frame[2])
    across = geometry.unit(across - normal * (normal @ across))
    down = down - normal * (normal @ down)
    down = geometry.unit(down - across * (across @ down))
    offset = AXIAL_MIDDLE if kind == AXIAL else SAGITTAL_MIDDLE
    middle = centre + normal * place + across * offset[0] + down * offset[1]
    origin = middle - (across + down) * (size - 1) / 2 * spacing
    place = place if kind == AXIAL else place * outward
    return Cut(source.image, source.affine, origin, across * spacing, down * spacing, place)


def level_slices(
    stacks: list[Stack], points: pd.DataFrame, size: int, spacing: float, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The squares of `level_cuts` as images uint8 (5 levels, slots * count, size, size), slot by slot, and their places
    float32 (5, slots * count) in mm, NaN where there is no slice."""
    images = np.zeros((len(LEVELS), len(SLOTS), count, size, size), dtype=np.uint8)
    places = np.full((len(LEVELS), len(SLOTS), count), np.nan, dtype=np.float32)
    for level, slots in enumerate(level_cuts(stacks, points, size, spacing, count)):
        for slot, cuts in enumerate(slots):
            for k, cut in enumerate(cuts):
                images[level, slot, k] = cut.sample(size)
                places[level, slot, k] = cut.place
    return images.reshape(len(LEVELS), -1, size, size), places.reshape(len(LEVELS), -1)
