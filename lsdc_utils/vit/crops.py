"""Squares round each level, cut in the plane of each slice; LPS mm.

Nothing is resampled between slices. Slice thickness and instance numbers are never used.
"""

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
AIMS = [FORAMEN if kind == T1 else 0.0 for kind, _ in SLOTS]  # mm outwards: where each slot looks
# For each slot the columns and rows of its squares and the way outwards (axial: up), in a level's frame.
SLOT_AXES = np.array([np.eye(3)[[0, 1, 2] if kind == AXIAL else [1, 2, 0]] for kind, _ in SLOTS])
SLOT_AXES[:, :, 0] *= np.array([[LATERAL[SIDES.index(side)] if side else 1.0] for _, side in SLOTS])
SLICE_REACH = 14.0  # mm from there that a slice may lie: three steps
SAME_SLICE = 1.0  # mm between slices that show the same
SAGITTAL_MIDDLE = (-1.0, 4.0)  # mm to posterior and to the head from a level's point to the middle of its square
AXIAL_MIDDLE = (8.0, -1.0)  # mm outwards and to posterior


def level_frames(points: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Centres (5, 3) of a study's levels in the canal, and frames (5, 3, 3): unit vectors to the left, to posterior and
    to the head along the canal.

    points: canal points of one study: level, X, Y, Z and, where they are detections, confidence; ValueError for
    none. Missing levels follow the shape of an average spine. X is smoothed along the spine, because a point clicked on
    the neighbouring slice is 4 mm off the midline.
    """
    places = points[["X", "Y", "Z"]].to_numpy(dtype=float)
    weight = np.maximum(points["confidence"].to_numpy(), 1e-6) if "confidence" in points else np.ones(len(points))
    of_level = (points["level"].to_numpy() == np.array(LEVELS)[:, None]) & np.isfinite(places).all(axis=1)
    if not of_level.any():
        raise ValueError(f"no canal point for study {points['study_id'].iloc[0] if len(points) else '(none given)'}")
    share = of_level * weight  # (5, points)
    with np.errstate(invalid="ignore"):
        weighted = share @ np.nan_to_num(places) / share.sum(axis=1, keepdims=True)  # NaN where a level has no point

    order, known = np.arange(len(LEVELS)), np.isfinite(weighted[:, 0])
    average = np.stack([np.zeros(len(LEVELS)), SPINE_Y, SPINE_Z], axis=1)
    offset = (weighted - average)[known]
    offset = np.stack([np.interp(order, order[known], offset[:, axis]) for axis in range(3)], axis=1)
    centres = average + offset
    z = centres[:, 2]
    centres[:, 0] = _smooth(z, centres[:, 0], 1)
    slope_y = SPINE_SLOPE + np.gradient(_smooth(z, offset[:, 1], 2), z)
    head = geometry.unit(np.stack([np.gradient(centres[:, 0], z), slope_y, np.ones(len(LEVELS))], axis=1))
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
    """A square in the plane of one slice: pixel (row r, column c) is the patient point origin + c columns + r rows."""

    image: np.ndarray  # (rows, cols) uint8: the slice
    affine: np.ndarray  # (4, 4): (column, row, 0, 1) of the slice -> mm
    origin: np.ndarray  # (3,)
    columns: np.ndarray  # (3,) mm a pixel
    rows: np.ndarray  # (3,) mm a pixel
    place: float  # of the slice, mm from the level's point: outwards (T2: to the left) or, if axial, to the head

    def sample(self, size: int) -> np.ndarray:
        """Its grey values uint8 (size, size), bilinear in the slice; 0 outside."""
        corners = self.origin + np.stack([self.columns, self.rows, 0 * self.rows])
        matrix = geometry.to_pixels(self.affine, corners)[:, :2].T
        matrix[:, :2] -= matrix[:, 2:]
        return cv2.warpAffine(self.image, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def level_cuts(
    stacks: list[Stack], points: pd.DataFrame, size: int, spacing: float, count: int
) -> list[list[list[Cut]]]:
    """For each of five levels and each of `SLOTS` the squares of the `count` slices nearest to where a slot looks, from
    whichever series of the type holds them; there may be fewer, or none.

    points: as in `level_frames`. Squares have `size` pixels of `spacing` mm a side. Columns lead to posterior and rows
    to the head; in axial slices columns lead outwards, so right halves are mirrored onto left ones, rows to posterior.
    """
    slices = {kind: [] for kind in SERIES_TYPES}
    for stack in (coarsen(stack, spacing) for stack in stacks):
        for image, affine, (rows, cols) in zip(stack.pixels, stack.affines, stack.shapes, strict=True):
            slices[stack.series_type].append((image[:rows, :cols], affine, geometry.normals(affine)))
    levels = []
    for centre, frame in zip(*level_frames(points), strict=True):
        slots = []
        for (kind, _), aim, axes in zip(SLOTS, AIMS, SLOT_AXES, strict=True):
            across, down, _ = axes @ frame
            offset, cuts = AXIAL_MIDDLE if kind == AXIAL else SAGITTAL_MIDDLE, []
            for place, image, affine, normal in _nearest(slices[kind], centre, axes[2], aim, count):
                columns = geometry.unit(across - normal * (normal @ across))
                rows = down - normal * (normal @ down)
                rows = geometry.unit(rows - columns * (columns @ rows))
                middle = centre + normal * place + columns * offset[0] + rows * offset[1]
                origin = middle - (columns + rows) * (size - 1) / 2 * spacing
                cuts.append(Cut(image, affine, origin, columns * spacing, rows * spacing, place))
            slots.append(cuts)
        levels.append(slots)
    return levels


def _nearest(slices: list[tuple], centre: np.ndarray, outwards: np.ndarray, aim: float, count: int) -> list[tuple]:
    """Place (mm outwards of `centre`), image, affine and normal outwards of the slices nearest to the place `aim`, at
    most `SLICE_REACH` from it; of a repeated slice only the first."""
    placed = []
    for image, affine, normal in slices:
        normal = normal if normal @ outwards > 0 else -normal
        placed.append((float(normal @ (affine[:3, 3] - centre)), image, affine, normal))
    chosen = []
    for candidate in sorted(placed, key=lambda member: abs(member[0] - aim)):
        if len(chosen) == count or abs(candidate[0] - aim) > SLICE_REACH:
            break
        if all(abs(candidate[0] - other[0]) >= SAME_SLICE for other in chosen):
            chosen.append(candidate)
    return chosen
