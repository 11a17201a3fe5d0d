"""Series as stacks of 8-bit slices in patient space, and what networks read from them: level crops and study grids.

All coordinates are LPS millimetres: x grows to the patient's left, y to posterior, z to the head. Crops are cut in the
plane of each slice, nothing is resampled between slices; in a grid values between slices are linear in the position
along their normal. Slice thickness and instance numbers are never used.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from lsdc_utils import dicom, validation
from lsdc_utils.competition import FINDINGS, Competition
from lsdc_utils.files import atomic, readable
from lsdc_utils.processes import each
from lsdc_utils.vocabulary import AXIAL, LEVELS, SERIES_TYPES, SIDES, T1, T2

WINDOW = (0.5, 99.5)  # percentiles of a series that become 0 and 255
SPARSE = 5  # an odd step in pixels, by which they are taken
PIECE = 2**15  # points that are sampled at once: what the processor's cache holds
LARGEST = 32_000  # rows or columns of an image that OpenCV samples from
FEW_STUDIES = 20  # so many are converted sooner than processes start
LONE_SLICE_REACH = 2.5  # mm off its plane that a slice without neighbours answers for; usual steps are 4 to 5 mm
WIDEST_GAP = 2.2  # in steps of the block: one lost slice is bridged, a wider gap is not

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


Source = Path | str | tuple[Path, ...]  # of a series: its folder, or its files
Skipped = tuple[tuple[Path, str], ...]  # files left out, with the reason


class VolumeError(ValueError):
    """Slices or points that cannot be brought into patient space; the message names the study and the series."""


@dataclass(frozen=True)
class Stack:
    """One series, windowed to 8 bit: slices of one size (smaller ones padded right and below) with their places."""

    study_id: int
    series_id: int
    series_type: str  # one of vocabulary.SERIES_TYPES
    pixels: np.ndarray  # (n, rows, cols) uint8
    shapes: np.ndarray  # (n, 2) int32: rows and columns of each slice before padding
    affines: np.ndarray  # (n, 4, 4) float64: (column, row, 0, 1) -> LPS mm
    instance_numbers: np.ndarray  # (n,) int32
    blocks: np.ndarray  # (n,) int32: slices of one block are parallel


def read_stack(source: Source, study_id: int, series_id: int, series_type: str) -> tuple[Stack, Skipped]:
    """Read a series and window it by its own percentiles; also the files left out, with the reason.

    source: its folder, or its files. dicom.DicomError where nothing is usable, or its sizes are not those of a spine.
    """
    series = dicom.read_series(source)
    if fault := validation.spacing_fault(series):
        raise dicom.DicomError(f"series {series.folder}: {fault}, which no lumbar MR has")
    shapes = np.array([image.shape for image in series.pixels], dtype=np.int32)
    pixels = np.zeros((len(shapes), *shapes.max(axis=0)), dtype=np.uint8)
    window(series.pixels, *_percentiles(series.pixels), pixels)
    stack = Stack(
        study_id=int(study_id),
        series_id=int(series_id),
        series_type=series_type,
        pixels=pixels,
        shapes=shapes,
        affines=np.stack([s.affine for s in series.slices]).astype(np.float64),
        instance_numbers=np.array([s.instance_number for s in series.slices], dtype=np.int32),
        blocks=np.array([s.block for s in series.slices], dtype=np.int32),
    )
    return stack, series.skipped


def _percentiles(images: list[np.ndarray]) -> np.ndarray:
    """The two percentiles `WINDOW` of all images, by every `SPARSE`-th pixel each way, which costs little.

    A mirrored image has the same. In 60 phantom series the lower moved by less than a grey level, the upper by 1.4 on
    average and 9 at most; networks are shown images by their own mean and deviation, or with varied brightness.
    """
    seen = np.concatenate([image[_sparse(image.shape[0]), _sparse(image.shape[1])].ravel() for image in images])
    if seen.dtype.kind != "u" or seen.itemsize > 2:
        return np.percentile(seen, WINDOW)
    # The same by counting, in a third of the time.
    rank = np.array(WINDOW) / 100 * (len(seen) - 1)
    at_most = np.bincount(seen).cumsum()
    low, high = (np.searchsorted(at_most, np.floor(rank) + k, side="right") for k in (0, 1))
    return low + (np.minimum(high, len(at_most) - 1) - low) * (rank % 1)


def _sparse(count: int) -> slice:
    """Every `SPARSE`-th of `count` pixels, as many left over before as behind; the step is odd so that this can be."""
    over = (count - 1) % SPARSE
    first = over // 2 if over % 2 == 0 else (over + SPARSE) // 2
    return slice(first, count - first, SPARSE) if 2 * first < count else slice(None)


def window(images: list[np.ndarray], low: float, high: float, target: np.ndarray) -> None:
    """Write images, each (rows, cols), to the upper left of target (n, rows, cols) uint8; `low` becomes 0, `high` 255.

    Integers of up to 16 bits go through a table of all their values: a fifth of the time of floating-point images.
    """
    table = None
    for place, image in zip(target, images, strict=True):
        image = np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("="))
        place = place[: image.shape[0], : image.shape[1]]
        if image.dtype.kind not in "iu" or image.itemsize > 2:
            place[:] = _to_grey(image, low, high)
            continue
        index = np.dtype(f"u{image.itemsize}")  # a negative value's bits are an index as good as any
        if table is None or table.dtype != image.dtype:
            values = np.arange(256**image.itemsize, dtype=index)
            table = values.view(image.dtype)
            grey = _to_grey(table, low, high)
        cv2.LUT(image.view(index), grey, dst=place)


def _to_grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values of any kind as grey levels 0..255, uint8."""
    scaled = (values.astype(np.float32) - np.float32(low)) * np.float32(255 / max(float(high - low), 1e-6))
    return np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)


def save_stack(stack: Stack, path: str | Path) -> None:
    """Write a stack as .npz, atomically. Not compressed: the noise of an MR image gains little and costs the reader."""
    with atomic(path) as temporary:
        np.savez(temporary, **{field.name: getattr(stack, field.name) for field in fields(Stack)})


def load_stack(path: str | Path) -> Stack:
    """Read a stack that `save_stack` wrote."""
    with np.load(path, allow_pickle=False) as content:
        values = {field.name: content[field.name] for field in fields(Stack)}
    numbers = {name: int(values[name]) for name in ("study_id", "series_id")}
    return Stack(**{**values, **numbers, "series_type": str(values["series_type"])})


def load_study(slices_dir: str | Path, study_id: int) -> list[Stack]:
    """The stacks saved as <slices_dir>/<study>/<series>.npz, by series id; empty where the study has none."""
    files = (Path(slices_dir) / str(study_id)).glob("[0-9]*.npz")
    return [load_stack(path) for path in sorted(files, key=lambda path: int(path.stem))]


def read_study(comp: Competition, split: str, study_id: int) -> tuple[list[Stack], pd.DataFrame]:
    """The stacks of a study's series, by series id, and what could not be read as lines of a findings table.

    A series that cannot be read is left out: the study is graded from the others.
    """
    stacks, problems = [], []
    for stack, found in _read_series(_sources(comp, split, study_id)):
        stacks += [stack] if stack else []
        problems += found
    return stacks, pd.DataFrame(problems, columns=FINDINGS)


Described = tuple[Source, int, int, str]  # a series as `read_stack` takes it


def _sources(comp: Competition, split: str, study_id: int) -> list[Described]:
    """The series of a study, by series id."""
    mine = comp.series[(comp.series["study_id"] == study_id) & (comp.series["split"] == split)]
    rows = sorted(zip(mine["series_id"].tolist(), mine["series_type"], strict=True))
    return [(comp.source(split, study_id, number), int(study_id), number, kind) for number, kind in rows]


def _read_series(sources: Iterable[Described]) -> Iterator[tuple[Stack | None, list[tuple]]]:
    """For each series its stack, None where it cannot be read, and its lines of the findings table."""
    for source in sources:
        _, study_id, series_id, _ = source
        try:
            stack, skipped = read_stack(*source)
        except dicom.DicomError as error:
            yield None, [(study_id, series_id, "series_unusable", readable(error), "series left out")]
            continue
        reasons = [readable(f"{file.name}: {reason}") for file, reason in skipped]
        yield stack, [(study_id, series_id, "file_unusable", reason, "file left out") for reason in reasons]


def convert(
    comp: Competition, split: str, studies: Iterable[int], folder: str | Path, workers: int = 1
) -> Iterator[pd.DataFrame]:
    """Read, window and write studies as <folder>/<study>/<series>.npz; of each in turn, what could not be read.

    Tables are as in `read_study`. A process holds two series at most, and the files are the same whatever the number
    of workers, which work as `processes.each` says.
    """
    tasks = [_sources(comp, split, study) for study in studies]
    yield from each(
        partial(_convert_study, Path(folder)), tasks, workers, FEW_STUDIES, begin=partial(cv2.setNumThreads, 1)
    )


def _convert_study(folder: Path, sources: list[Described]) -> pd.DataFrame:
    """Write the stacks of one study; what could not be read."""
    problems = []
    for stack, found in _read_series(sources):
        if stack:
            save_stack(stack, folder / str(stack.study_id) / f"{stack.series_id}.npz")
        problems += found
    return pd.DataFrame(problems, columns=FINDINGS)


def coarsen(stack: Stack, spacing: float) -> Stack:
    """Average whole pixels until they measure about `spacing` mm in the plane; images as coarse as that stay.

    Sampling fine pixels at a coarser step without averaging would take their noise and alias their edges.
    """
    pixel = np.linalg.norm(stack.affines[:, :3, :2], axis=1).max()
    factor = int(spacing / pixel + 0.25)
    rows, cols = stack.pixels.shape[1] // max(factor, 1), stack.pixels.shape[2] // max(factor, 1)
    if factor < 2 or not rows or not cols:
        return stack
    pixels = np.empty((len(stack.pixels), rows, cols), dtype=np.uint8)
    for coarse, image in zip(pixels, stack.pixels[:, : rows * factor, : cols * factor], strict=True):
        cv2.resize(image, (cols, rows), dst=coarse, interpolation=cv2.INTER_AREA)
    affines = stack.affines.copy()
    affines[:, :3, 3] += affines[:, :3, :2].sum(axis=2) * (factor - 1) / 2  # centre of the first averaged pixel
    affines[:, :3, :2] *= factor
    return replace(stack, pixels=pixels, affines=affines, shapes=np.maximum(stack.shapes // factor, 1))


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


def sample(stack: Stack, lattice: Lattice) -> tuple[np.ndarray, np.ndarray]:
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
        normal = np.cross(stack.affines[members[0], :3, 0], stack.affines[members[0], :3, 1])
        normal /= np.linalg.norm(normal)
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
    """`sample` of a stack's blocks."""
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


def level_frames(points: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Centres (5, 3) of a study's levels in the canal, LPS mm, and the directions (5, 3, 3) of a frame at each.

    points: the canal points of one study: level, X, Y, Z and, where they are detections, confidence. Rows of a frame
    are unit vectors to the left, to posterior and to the head along the canal. Missing levels are set between their
    neighbours by the shape of an average spine. X is smoothed along the spine, because a point clicked on the
    neighbouring slice is 4 mm off the midline. VolumeError where there is no point at all.
    """
    places = np.stack([points[axis].to_numpy(dtype=float) for axis in "XYZ"], axis=1)
    weight = np.maximum(points["confidence"].to_numpy(), 1e-6) if "confidence" in points else np.ones(len(points))
    mine = (points["level"].to_numpy() == np.array(LEVELS)[:, None]) & np.isfinite(places).all(axis=1)  # (5, points)
    if not mine.any():
        raise VolumeError(f"no canal point for study {points['study_id'].iloc[0] if len(points) else '(none given)'}")
    share = mine * weight
    with np.errstate(invalid="ignore"):
        weighted = share @ np.nan_to_num(places) / share.sum(axis=1, keepdims=True)  # NaN where a level has no point

    order = np.arange(len(LEVELS))
    found = np.isfinite(weighted[:, 0])
    average = np.stack([np.zeros(len(LEVELS)), SPINE_Y, SPINE_Z], axis=1)
    offset = weighted - average
    offset = np.stack([np.interp(order, order[found], offset[found, axis]) for axis in range(3)], axis=1)
    centres = average + offset
    z = centres[:, 2]
    centres[:, 0] = _smooth(z, centres[:, 0], 1)
    slope_y = SPINE_SLOPE + np.gradient(_smooth(z, offset[:, 1], 2), z)
    slope_x = np.gradient(centres[:, 0], z)
    head = _unit(np.stack([slope_x, slope_y, np.ones(len(LEVELS))], axis=1))
    left = _unit(np.array([1.0, 0, 0]) - head * head[:, :1])
    return centres, np.stack([left, np.cross(head, left), head], axis=1)


def _smooth(z: np.ndarray, values: np.ndarray, degree: int) -> np.ndarray:
    """A polynomial in z through values (n,) of levels, held back by a ridge: spines bend less than clicks err."""
    scaled = (z - z.mean()) / 50  # mm: about half a lumbar spine
    basis = np.stack([scaled**power for power in range(degree + 1)], axis=1)
    ridge = np.diag([0.0] + [0.5] * degree)  # a click's variance over that of a slope of 3 mm in 50 mm
    return basis @ np.linalg.solve(basis.T @ basis + ridge, basis.T @ values)


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


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
        axes = self.affine[:3, :2]
        to_pixel = (axes / (axes**2).sum(axis=0)).T
        corner = to_pixel @ (self.origin - self.affine[:3, 3])
        matrix = np.column_stack([to_pixel @ self.columns, to_pixel @ self.rows, corner])
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
        found = []
        for kind, side in SLOTS:
            outward = LATERAL[SIDES.index(side)] if side else 1.0
            aim = outward * FORAMEN if kind == T1 else 0.0
            chosen = _nearest(slices[kind], centre, aim, count)
            found.append([_cut(one, kind, centre, frame, outward, size, spacing) for one in chosen])
        levels.append(found)
    return levels


_Slice = tuple[np.ndarray, np.ndarray, np.ndarray]  # image (rows, cols), affine (4, 4), normal (3,) to the left or head


def _slices(stacks: list[Stack], series_type: str, spacing: float) -> Iterator[_Slice]:
    """All slices of a series type, coarsened to `spacing` mm where they are finer."""
    for stack in stacks:
        if stack.series_type != series_type:
            continue
        stack = coarsen(stack, spacing)
        for image, affine, (rows, cols) in zip(stack.pixels, stack.affines, stack.shapes, strict=True):
            normal = _unit(np.cross(affine[:3, 0], affine[:3, 1]))
            towards = normal[2] if series_type == AXIAL else normal[0]
            yield image[:rows, :cols], affine, normal if towards > 0 else -normal


def _place(one: _Slice, centre: np.ndarray) -> float:
    """Where a slice lies, mm along its normal from a patient point."""
    _, affine, normal = one
    return float(normal @ (affine[:3, 3] - centre))


def _nearest(slices: list[_Slice], centre: np.ndarray, aim: float, count: int) -> list[_Slice]:
    """The slices nearest to the place `aim` (mm), at most `SLICE_REACH` from it; of a repeated slice one alone."""
    chosen, places = [], []
    off = [abs(_place(one, centre) - aim) for one in slices]
    for index in np.argsort(off, kind="stable"):
        place = _place(slices[index], centre)
        if len(chosen) == count or off[index] > SLICE_REACH:
            break
        if all(abs(place - other) >= SAME_SLICE for other in places):
            chosen.append(slices[index])
            places.append(place)
    return chosen


def _cut(
    one: _Slice, kind: str, centre: np.ndarray, frame: np.ndarray, outward: float, size: int, spacing: float
) -> Cut:
    """The square of a slice whose middle lies `AXIAL_MIDDLE` or `SAGITTAL_MIDDLE` off a level's point."""
    image, affine, normal = one
    place = _place(one, centre)
    across, down = (frame[0] * outward, frame[1]) if kind == AXIAL else (frame[1], frame[2])
    across = _unit(across - normal * (normal @ across))
    down = down - normal * (normal @ down)
    down = _unit(down - across * (across @ down))
    offset = AXIAL_MIDDLE if kind == AXIAL else SAGITTAL_MIDDLE
    middle = centre + normal * place + across * offset[0] + down * offset[1]
    origin = middle - (across + down) * (size - 1) / 2 * spacing
    return Cut(image, affine, origin, across * spacing, down * spacing, place if kind == AXIAL else place * outward)


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


def study_grid(stacks: list[Stack], size: int = 64) -> np.ndarray:
    """The whole study as one grid uint8 (3 series types, size, size, size) to the left, to posterior, to the head.

    The grid spans what the sagittal series cover (all series, where there is none), so its voxels differ from study to
    study and from axis to axis. VolumeError where there are no stacks.
    """
    lattice = grid_lattice(stacks, size)
    spacing = float(lattice.steps.diagonal()[1:].min())
    return np.stack([_fill(stacks, kind, [lattice], spacing)[0] for kind in SERIES_TYPES])


def grid_lattice(stacks: list[Stack], size: int) -> Lattice:
    """Where the voxels of `study_grid` lie."""
    if not stacks:
        raise VolumeError("a grid needs at least one series that can be read")
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
