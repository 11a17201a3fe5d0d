"""The whole study resampled to one grid, as published. Values between slices are linear in the position along their
normal. Coordinates are LPS mm.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import cv2
import numpy as np

from lsdc_utils import geometry
from lsdc_utils.data.stacks import (
    Stack,
    coarsen,
)
from lsdc_utils.vit.crops import (
    CropError,
)
from lsdc_utils.vocabulary import SERIES_TYPES

PIECE = 2**15  # points that are sampled at once: what the processor's cache holds
LARGEST = 32_000  # rows or columns of an image that OpenCV samples from
LONE_SLICE_REACH = 2.5  # mm off its plane that a slice without neighbours answers for; usual steps are 4 to 5 mm
WIDEST_GAP = 2.2  # in steps of the block: one lost slice is bridged, a wider gap is not


@dataclass(frozen=True)
class Lattice:
    """The patient points origin + i steps[0] + j steps[1] + k steps[2] for all i, j, k below `shape`; LPS mm."""

    origin: np.ndarray  # (3,)
    steps: np.ndarray  # (3, 3): a row for each axis of the lattice
    shape: tuple[int, int, int]

    def indices(self) -> list[np.ndarray]:
        """The counts i, j, k along each axis, float32 of shapes (l, 1, 1), (1, p, 1) and (1, 1, h)."""
        return np.meshgrid(*(np.arange(n, dtype=np.float32) for n in self.shape), indexing="ij", sparse=True)

    def points(self) -> np.ndarray:
        """All points, (*shape, 3)."""
        return self.origin + sum(i[..., None] * step for i, step in zip(self.indices(), self.steps, strict=True))

    def halves(self, axis: int) -> list[tuple[slice, Lattice]]:
        """Two parts along an axis, each with the indices that it has here."""
        middle, parts = self.shape[axis] // 2, []
        for start, stop in ((0, middle), (middle, self.shape[axis])):
            shape = (*self.shape[:axis], stop - start, *self.shape[axis + 1 :])
            moved = Lattice(self.origin + start * self.steps[axis], self.steps, shape)
            parts.append(((slice(None),) * axis + (slice(start, stop),), moved))
        return parts


def sample_stack(stack: Stack, lattice: Lattice) -> tuple[np.ndarray, np.ndarray]:
    """Grey values at the points of a lattice: bilinear in the slice, linear between the slices of a block by their
    positions.

    Returns values float32 in 0..255, 0 outside, and inside bool, both in the lattice's shape. A point is inside where
    it lies in the images and between slices, or within half a step of the last one; where tilted blocks overlap, the
    block with the nearest slice answers.
    """
    return _sample_blocks(_blocks(stack), lattice)


@dataclass(frozen=True)
class _Block:
    """Parallel slices in the order of their places along their normal, with what maps patient points to pixels."""

    pixels: np.ndarray  # (n, rows, cols) uint8; n is 2 or more
    last: np.ndarray  # (n, 2) float32: column and row of each image's last pixel
    normal: np.ndarray  # (3,) unit vector
    places: np.ndarray  # (n,) mm along the normal
    reach: tuple[float, float]  # mm along the normal between which points are inside
    step: float  # mm, the usual distance of neighbours
    to_pixel: np.ndarray  # (n, 2, 4): (x, y, z, 1) in mm -> column and row of each slice
    alike: bool  # a point has the same column and row in all slices, to a hundredth of a pixel


def _blocks(stack: Stack) -> list[_Block]:
    """The blocks of a stack; a slice that is alone in its block is there twice."""
    found = []
    for number in np.unique(stack.blocks):
        members = np.flatnonzero(stack.blocks == number)
        normal = geometry.normals(stack.affines[members[0]])
        places = stack.affines[members, :3, 3] @ normal
        order = np.argsort(places, kind="stable") if len(members) > 1 else [0, 0]
        members, places = members[order], places[order]
        gaps = np.diff(places)
        step = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 2 * LONE_SLICE_REACH
        axes, origins = stack.affines[members, :3, :2], stack.affines[members, :3, 3]
        turn = (axes / (axes**2).sum(axis=1, keepdims=True)).transpose(0, 2, 1)  # direction over spacing
        to_pixel = np.concatenate([turn, -turn @ origins[:, :, None]], axis=2)
        last = stack.shapes[members, ::-1].astype(np.float32) - 1
        alike = (np.ptp(to_pixel, axis=0) < (1e-5, 1e-5, 1e-5, 1e-2)).all() and (last == last[0]).all()
        reach = places[0] - step / 2, places[-1] + step / 2
        found.append(_Block(stack.pixels[members], last, normal, places, reach, step, to_pixel, bool(alike)))
    return found


def _sample_blocks(blocks: list[_Block], lattice: Lattice) -> tuple[np.ndarray, np.ndarray]:
    """`sample_stack` of a stack's blocks."""
    values = np.zeros(lattice.shape, dtype=np.float32)
    nearest = np.full(lattice.shape, np.inf, dtype=np.float32)
    for block in blocks:
        _sample_block(block, lattice, values, nearest)
    return values, np.isfinite(nearest)


def _sample_block(block: _Block, lattice: Lattice, values: np.ndarray, nearest: np.ndarray) -> None:
    """Where a block knows of points nearer than `nearest` mm, write their values and their mm to its nearest slice."""
    extents = (lattice.steps @ block.normal) * (np.array(lattice.shape) - 1)
    start = block.normal @ lattice.origin
    low, high = start + np.minimum(extents, 0).sum(), start + np.maximum(extents, 0).sum()
    if high < block.reach[0] or low > block.reach[1]:
        return
    first = min(max(np.searchsorted(block.places, low) - 1, 0), len(block.places) - 2)
    end = max(np.searchsorted(block.places, high) + 1, first + 2)
    answer = _sample_slices(block, slice(first, end), lattice) if np.prod(lattice.shape) <= PIECE else None
    if answer is None:  # cut across the slices, so that a part meets few of them
        axis = int(np.argmax(np.where(np.array(lattice.shape) > 1, np.abs(extents) + 1e-9, -1)))
        for box, half in lattice.halves(axis):
            _sample_block(block, half, values[box], nearest[box])
        return
    found, inside, distance = answer
    better = inside & (distance < nearest)
    np.copyto(values, found, where=better)
    np.copyto(nearest, distance, where=better)


def _sample_slices(block: _Block, used: slice, lattice: Lattice) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Value of each point of a lattice, whether it is inside, and mm to the nearest slice, from those slices of a block
    between which all the points lie. None where OpenCV refuses so large a part of the images."""
    places = (block.places[used] - block.places[0]).astype(np.float32)
    along = _linear(np.append(lattice.steps @ block.normal, block.normal @ lattice.origin - block.places[0]), lattice)
    low, high = np.array(block.reach) - block.places[0]
    inside = (along >= low) & (along <= high)
    above = np.zeros(lattice.shape, dtype=np.float32)  # how many slices, with their fractions, lie before each point
    for a, b in pairwise(places):
        if b - a <= WIDEST_GAP * block.step:
            above += np.clip((along - a) * np.float32(1 / max(b - a, 1e-6)), 0, 1)
        else:
            inside &= (along <= a + block.step / 2) | (along >= b - block.step / 2)
            above += along > (a + b) / 2
    distance = np.abs(along - places[np.rint(above).astype(np.uint16)])
    below = np.minimum(np.floor(above), len(places) - 2)
    share = above - below
    pixels, values, seen = block.pixels[used], None, None
    for slices, weight in ((below, 1 - share), (below + 1, share)):
        if values is None or not block.alike:
            x, y, seen = _to_pixels(block, used, lattice, slices)
        found = _bilinear(pixels, slices, x, y)
        if found is None:
            return None
        found *= weight
        values = found if values is None else values + found
        inside &= seen | (weight == 0)
    return values, inside, distance


def _to_pixels(
    block: _Block, used: slice, lattice: Lattice, slices: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column and row of a lattice's points, each projected onto its own of the used slices and moved into its image,
    and whether they were in it."""
    frame = np.zeros((4, 4))  # from the lattice's indices to mm
    frame[:3, :3], frame[:3, 3], frame[3, 3] = lattice.steps.T, lattice.origin, 1
    numbers, last = block.to_pixel[used] @ frame, block.last[used]
    index = 0 if block.alike else slices.astype(np.uint16)
    numbers, last = numbers[index], last[index]
    x, y = (_linear(numbers[..., axis, :], lattice) for axis in (0, 1))
    inside = (x >= -0.5) & (x <= last[..., 0] + 0.5) & (y >= -0.5) & (y <= last[..., 1] + 0.5)
    return np.clip(x, 0, last[..., 0], out=x), np.clip(y, 0, last[..., 1], out=y), inside


def _linear(numbers: np.ndarray, lattice: Lattice) -> np.ndarray:
    """numbers (4,) @ (i, j, k, 1) over a lattice, float32; numbers (*shape, 4) are those of each point."""
    numbers = numbers.astype(np.float32)
    i, j, k = lattice.indices()
    return numbers[..., 3] + numbers[..., 0] * i + numbers[..., 1] * j + numbers[..., 2] * k


def _bilinear(pixels: np.ndarray, slices: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray | None:
    """Values at columns x and rows y of slices, all float32 (l, p, h); None where OpenCV refuses."""
    left, right, top, bottom = int(x.min()), int(x.max()) + 2, int(y.min()), int(y.max()) + 2
    part = pixels[:, top:bottom, left:right].astype(np.float32)
    tall = part.reshape(-1, part.shape[2])  # the slices below each other
    if max(*tall.shape, x.size // x.shape[2]) > LARGEST:
        return None
    down = slices * np.float32(part.shape[1])
    down += y
    down -= np.float32(top)
    x = (x - np.float32(left)).reshape(-1, x.shape[2])
    return cv2.remap(tall, x, down.reshape(x.shape), cv2.INTER_LINEAR).reshape(y.shape)


def study_grid(stacks: list[Stack], size: int = 64) -> np.ndarray:
    """The whole study as one grid uint8 (3 series types, size, size, size) to the left, to posterior, to the head.

    The grid spans what the sagittal series cover (all series, where there is none), so its voxels differ from study to
    study and from axis to axis. CropError where there are no stacks.
    """
    lattice = grid_lattice(stacks, size)
    spacing = float(lattice.steps.diagonal()[1:].min())
    return np.stack([_fill(stacks, kind, [lattice], spacing)[0] for kind in SERIES_TYPES])


def grid_lattice(stacks: list[Stack], size: int) -> Lattice:
    """Where the voxels of `study_grid` lie."""
    if not stacks:
        raise CropError("a grid needs at least one series that can be read")
    sagittal = [stack for stack in stacks if stack.series_type in SERIES_TYPES[:2]] or stacks
    corners = np.concatenate([_corners(stack) for stack in sagittal])
    low, high = corners.min(axis=0), corners.max(axis=0)
    return Lattice(low + (high - low) / (2 * size), np.diag((high - low) / size), (size,) * 3)


def _corners(stack: Stack) -> np.ndarray:
    """Patient points (n, 4, 3) at the corners of each slice, as (4n, 3)."""
    rows, cols = stack.shapes[:, 0] - 1, stack.shapes[:, 1] - 1
    zero, one = np.zeros(len(rows)), np.ones(len(rows))
    pixel = np.array([[x, y, zero, one] for x in (zero, cols) for y in (zero, rows)])
    return np.einsum("nij,cjn->nci", stack.affines, pixel)[..., :3].reshape(-1, 3)


def _fill(stacks: list[Stack], series_type: str, lattices: list[Lattice], spacing: float) -> np.ndarray:
    """Grey values uint8 (n, *shape) at n lattices from the series of one type; of several, the fullest answers."""
    mine = [coarsen(stack, spacing) for stack in stacks if stack.series_type == series_type]
    sampled = [[_sample_blocks(blocks, lattice) for lattice in lattices] for blocks in map(_blocks, mine)]
    result = np.zeros((len(lattices), *lattices[0].shape), dtype=np.uint8)
    for answers in sorted(sampled, key=lambda answers: sum(inside.sum() for _, inside in answers)):
        for target, (values, inside) in zip(result, answers, strict=True):
            np.copyto(target, np.rint(values), where=inside, casting="unsafe")
    return result
