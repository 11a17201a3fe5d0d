"""The whole study resampled to one grid, as published. Coordinates are LPS mm."""

import numpy as np
from scipy.ndimage import map_coordinates

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack, coarsen
from lsdc_utils.vocabulary import SERIES_TYPES

LONE_STEP = 5.0  # mm between slices, taken for a block of a single slice


def study_grid(stacks: list[Stack], size: int = 64) -> np.ndarray:
    """The study as uint8 (3 series types, size, size, size) to the left, to posterior, to the head; 0 outside. The grid
    spans what the sagittal series cover (all, where there is none), so voxels differ between studies and axes. Of
    several series or tilted blocks the nearest slice counts. ValueError without stacks."""
    points, steps = grid_points(stacks, size)
    points, spacing = points.reshape(-1, 3), float(steps[1:].min())
    grid = np.zeros((len(SERIES_TYPES), size**3), dtype=np.uint8)
    for values, series_type in zip(grid, SERIES_TYPES, strict=True):
        nearest = np.full(size**3, np.inf)
        for stack in (coarsen(stack, spacing) for stack in stacks if stack.series_type == series_type):
            for block in np.unique(stack.blocks):
                sampled, distance = _sample_block(stack, np.flatnonzero(stack.blocks == block), points)
                closer = distance < nearest
                values[closer], nearest[closer] = np.rint(sampled[closer]), distance[closer]
    return grid.reshape(-1, size, size, size)


def grid_points(stacks: list[Stack], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Patient points (size, size, size, 3) of the voxels of `study_grid`, and the sides (3,) of a voxel in mm."""
    if not stacks:
        raise ValueError("a grid needs at least one series that can be read")
    sagittal = [stack for stack in stacks if stack.series_type in SERIES_TYPES[:2]] or stacks
    shares = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    corners = [geometry.to_patient(s.affines[:, None], (s.shapes[:, None, ::-1] - 1) * shares) for s in sagittal]
    corners = np.concatenate([places.reshape(-1, 3) for places in corners])
    low, high = corners.min(axis=0), corners.max(axis=0)
    steps = (high - low) / size
    return low + (np.moveaxis(np.indices((size,) * 3), 0, -1) + 0.5) * steps, steps


def _sample_block(stack: Stack, members: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Trilinear values (n,) of parallel slices at points (n, 3), and mm to the nearest slice, infinite outside."""
    affine = stack.affines[members[0]]
    origins = geometry.to_pixels(affine, stack.affines[members, :3, 3])  # column, row and place of each slice
    order = np.argsort(origins[:, 2], kind="stable")
    members, origins = members[order], origins[order]
    pixels, numbers = geometry.to_pixels(affine, points), np.arange(len(members))
    number = np.interp(pixels[:, 2], origins[:, 2], numbers)  # of a slice, with its fraction
    column, row = (pixels[:, k] - np.interp(number, numbers, origins[:, k]) for k in (0, 1))
    values = map_coordinates(stack.pixels[members], [number, row, column], np.float32, order=1, mode="nearest")
    distance = np.abs(pixels[:, 2] - origins[np.rint(number).astype(int), 2])
    step = np.median(np.diff(origins[:, 2])) if len(members) > 1 else LONE_STEP
    rows, cols = stack.shapes[members].max(axis=0)
    inside = (np.minimum(column, row) >= -0.5) & (column <= cols - 0.5) & (row <= rows - 0.5)
    return values, np.where(inside & (distance <= step / 2 + 1e-6), distance, np.inf)
