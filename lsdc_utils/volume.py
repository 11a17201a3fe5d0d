"""Series as stacks of 8-bit slices in patient space, and what networks read from them: level crops and study grids.

All coordinates are LPS millimetres: x grows to the patient's left, y to posterior, z to the head. Values between slices
are linear in the position along the slices' normal; slice thickness and instance numbers are never used.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd

from lsdc_utils import dicom
from lsdc_utils.competition import FINDINGS, Competition
from lsdc_utils.files import atomic
from lsdc_utils.vocabulary import LEVELS, SERIES_TYPES

WINDOW = (0.5, 99.5)  # percentiles of a series that become 0 and 255
LONE_SLICE_REACH = 2.5  # mm off its plane that a slice without neighbours answers for; usual steps are 4 to 5 mm
WIDEST_GAP = 2.2  # in steps of the block: one lost slice is bridged, a wider gap is not

# Where the canal points of an average spine lie, mm to posterior and to the head of L3/L4: the competition's label
# points (mean x over width and y over height of the image) on a usual field of view of 280 mm.
SPINE_Y = np.array([10.0, 4.0, 0.0, 1.0, 9.0])
SPINE_Z = np.array([64.0, 32.0, 0.0, -31.0, -56.0])
SPINE_SLOPE = np.tan(np.deg2rad([11.0, 8.0, 2.0, -9.0, -26.0]))  # mm to posterior a mm up: usual tilts of the discs
LATERAL = np.array([1.0, -1.0])  # x direction that leads outwards, for each of vocabulary.SIDES


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

    source: its folder, or its files. dicom.DicomError where nothing is usable.
    """
    series = dicom.read_series(source)
    shapes = np.array([image.shape for image in series.pixels], dtype=np.int32)
    # Every 4th pixel each way: the percentiles move by less than a grey level and cost a sixteenth.
    seen = np.concatenate([image[::4, ::4].ravel() for image in series.pixels])
    low, high = np.percentile(seen, WINDOW)
    pixels = np.zeros((len(shapes), *shapes.max(axis=0)), dtype=np.uint8)
    scale = 255 / max(float(high - low), 1e-6)
    for target, image in zip(pixels, series.pixels, strict=True):
        windowed = np.clip((image.astype(np.float32) - low) * scale, 0, 255)
        target[: image.shape[0], : image.shape[1]] = np.rint(windowed)
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
    series = comp.series[(comp.series["study_id"] == study_id) & (comp.series["split"] == split)]
    for row in series.sort_values("series_id").itertuples():
        try:
            stack, skipped = read_stack(
                comp.source(split, study_id, row.series_id), study_id, row.series_id, row.series_type
            )
        except dicom.DicomError as error:
            problems.append((study_id, row.series_id, "series_unusable", str(error), "series left out"))
            continue
        stacks.append(stack)
        reasons = [f"{file.name}: {reason}" for file, reason in skipped]
        problems += [(study_id, row.series_id, "file_unusable", reason, "file left out") for reason in reasons]
    return stacks, pd.DataFrame(problems, columns=FINDINGS)


def coarsen(stack: Stack, spacing: float) -> Stack:
    """Average whole pixels until they measure about `spacing` mm in the plane; images as coarse as that stay.

    Sampling fine pixels at a coarser step without averaging would take their noise and alias their edges.
    """
    pixel = np.linalg.norm(stack.affines[:, :3, :2], axis=1).max()
    factor = int(spacing / pixel + 0.25)
    rows, cols = stack.pixels.shape[1] // max(factor, 1), stack.pixels.shape[2] // max(factor, 1)
    if factor < 2 or not rows or not cols:
        return stack
    whole = stack.pixels[:, : rows * factor, : cols * factor].reshape(-1, rows, factor, cols, factor)
    pixels = np.rint(whole.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)
    affines = stack.affines.copy()
    affines[:, :3, 3] += affines[:, :3, :2].sum(axis=2) * (factor - 1) / 2  # centre of the first averaged pixel
    affines[:, :3, :2] *= factor
    return replace(stack, pixels=pixels, affines=affines, shapes=np.maximum(stack.shapes // factor, 1))


def sample(stack: Stack, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grey values at patient points: bilinear in the slice, linear between the slices of a block by their positions.

    points: (..., 3) LPS mm. Returns values (...) float32 in 0..255, 0 outside, and inside (...) bool. A point is inside
    where it lies in the images and between slices, or within half a step of the last one; where tilted blocks overlap,
    the block with the nearest slice answers.
    """
    flat = np.asarray(points, dtype=np.float32).reshape(-1, 3)
    values = np.zeros(len(flat), dtype=np.float32)
    nearest = np.full(len(flat), np.inf, dtype=np.float32)
    for block in np.unique(stack.blocks):
        found, distance = _sample_block(stack, np.flatnonzero(stack.blocks == block), flat)
        better = distance < nearest
        values[better], nearest[better] = found[better], distance[better]
    shape = np.shape(points)[:-1]
    return values.reshape(shape), np.isfinite(nearest).reshape(shape)


def _sample_block(stack: Stack, members: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values (m,) of a block of parallel slices at points (m, 3), and mm to its nearest slice, inf outside."""
    affines = stack.affines[members]
    columns, rows = affines[0, :3, 0], affines[0, :3, 1]
    normal = np.cross(columns, rows)
    normal /= np.linalg.norm(normal)
    order = np.argsort(affines[:, :3, 3] @ normal, kind="stable")
    members, affines = members[order], affines[order]
    places = (affines[:, :3, 3] @ normal).astype(np.float32)
    gaps = np.diff(places)
    step = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 2 * LONE_SLICE_REACH

    along = points @ normal.astype(np.float32)
    above = np.clip(np.searchsorted(places, along), min(1, len(places) - 1), len(places) - 1)
    below = np.maximum(above - 1, 0)
    gap = places[above] - places[below]
    share = np.clip((along - places[below]) / np.maximum(gap, 1e-6), 0, 1)
    share = np.where(gap > WIDEST_GAP * step, np.rint(share), share)
    distance = np.minimum(np.abs(along - places[below]), np.abs(along - places[above]))
    between = (along >= places[below]) & (along <= places[above]) & (gap <= WIDEST_GAP * step)
    inside = between | (distance <= step / 2)

    values = np.zeros(len(points), dtype=np.float32)
    for slices, weight in ((below, 1 - share), (above, share)):
        used = np.flatnonzero(inside & (weight > 0))
        found, seen = _sample_slices(stack, members[slices[used]], points[used])
        values[used] += found * weight[used]
        inside[used[~seen]] = False
    values[~inside] = 0
    return values, np.where(inside, distance, np.inf)


def _sample_slices(stack: Stack, index: np.ndarray, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bilinear values (m,) of slice index[i] at points[i] projected onto it, and whether they are in the image."""
    axes = stack.affines[:, :3, :2]
    to_pixel = axes / (axes**2).sum(axis=1, keepdims=True)  # (n, 3, 2): direction over spacing, of columns and rows
    first = np.einsum("ni,nij->nj", stack.affines[:, :3, 3], to_pixel).astype(np.float32)
    if np.allclose(to_pixel, to_pixel[:1], rtol=1e-5, atol=1e-7):
        place = points @ to_pixel[0].astype(np.float32)
    else:
        place = np.einsum("mi,mij->mj", points, to_pixel.astype(np.float32)[index])
    place = place - first[index]
    last = stack.shapes[:, ::-1].astype(np.float32)[index] - 1  # x counts columns, y rows
    inside = ((place >= -0.5) & (place <= last + 0.5)).all(axis=1)
    place = np.clip(place, 0, last)
    low = np.minimum(place.astype(np.int64), np.maximum(last - 1, 0).astype(np.int64))
    share = place - low.astype(np.float32)
    step = (last > 0).astype(np.int64)
    cols = stack.pixels.shape[2]
    start = (index * stack.pixels.shape[1] + low[:, 1]) * cols + low[:, 0]
    flat = stack.pixels.reshape(-1)
    right, down = step[:, 0], step[:, 1] * cols
    top = flat[start] * (1 - share[:, 0]) + flat[start + right] * share[:, 0]
    bottom = flat[start + down] * (1 - share[:, 0]) + flat[start + down + right] * share[:, 0]
    return top * (1 - share[:, 1]) + bottom * share[:, 1], inside


def level_frames(points: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Centres (5, 3) of a study's levels in the canal, LPS mm, and the directions (5, 3, 3) of a frame at each.

    points: the canal points of one study: level, X, Y, Z and, where they are detections, confidence. Rows of a frame
    are unit vectors to the left, to posterior and to the head along the canal. Missing levels are set between their
    neighbours by the shape of an average spine. X is smoothed along the spine, because a point clicked on the
    neighbouring slice is 4 mm off the midline. VolumeError where there is no point at all.
    """
    known = points[points["level"].isin(LEVELS) & np.isfinite(points[["X", "Y", "Z"]]).all(axis=1)]
    if known.empty:
        raise VolumeError(f"no canal point for study {points['study_id'].iloc[0] if len(points) else '(none given)'}")
    weight = known["confidence"].clip(lower=1e-6) if "confidence" in known else pd.Series(1.0, known.index)
    weighted = known[["X", "Y", "Z"]].mul(weight, axis=0).groupby(known["level"]).sum()
    weighted = weighted.div(weight.groupby(known["level"]).sum(), axis=0).reindex(LEVELS).to_numpy()

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


def crop_points(
    centres: np.ndarray, axes: np.ndarray, size: tuple, spacing: tuple, offset: tuple, margin: int
) -> np.ndarray:
    """Patient points (5, 2, l, p, h, 3) of the half crops of each level and side, LPS mm.

    `size` voxels of `spacing` mm go outwards, to posterior and to the head; `offset` mm is the way from the level's
    centre to the crop's middle along these; `margin` voxels are added all round, for crops cut off-centre.
    """
    steps = [(np.arange(n + 2 * margin) - (n + 2 * margin - 1) / 2) * d for n, d in zip(size, spacing, strict=True)]
    grid = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1) + np.asarray(offset, dtype=np.float64)
    outward = np.stack([axes * np.array([side, 1.0, 1.0])[:, None] for side in LATERAL], axis=1)  # (5, 2, 3, 3)
    points = np.einsum("lphi,vsij->vslphj", grid, outward) + centres[:, None, None, None, None]
    return points.astype(np.float32)


def level_crops(
    stacks: list[Stack], points: pd.DataFrame, size: tuple, spacing: tuple, offset: tuple, margin: int = 0
) -> np.ndarray:
    """Half crops uint8 (5 levels, 2 sides, 3 series types, l, p, h) of one study round its canal points.

    The right side is cut mirrored, so that both sides look alike and the first axis of a crop leads outwards: no side
    needs to be learnt, and a mirrored study gives the same crops with the sides exchanged. A series that the study
    lacks, or that does not reach, is 0. Arguments as in `level_frames` and `crop_points`.
    """
    places = crop_points(*level_frames(points), size, spacing, offset, margin)
    return np.stack([_fill(stacks, kind, places, min(spacing)) for kind in SERIES_TYPES], axis=2)


def study_grid(stacks: list[Stack], size: int = 64) -> np.ndarray:
    """The whole study as one grid uint8 (3 series types, size, size, size) to the left, to posterior, to the head.

    The grid spans what the sagittal series cover (all series, where there is none), so its voxels differ from study to
    study and from axis to axis. VolumeError where there are no stacks.
    """
    if not stacks:
        raise VolumeError("a grid needs at least one series that can be read")
    sagittal = [stack for stack in stacks if stack.series_type in SERIES_TYPES[:2]] or stacks
    corners = np.concatenate([_corners(stack) for stack in sagittal])
    low, high = corners.min(axis=0), corners.max(axis=0)
    steps = [(np.arange(size) + 0.5) / size * (b - a) + a for a, b in zip(low, high, strict=True)]
    places = np.stack(np.meshgrid(*steps, indexing="ij"), axis=-1)
    return np.stack([_fill(stacks, kind, places, float((high - low)[1:].min()) / size) for kind in SERIES_TYPES])


def _corners(stack: Stack) -> np.ndarray:
    """Patient points (n, 4, 3) at the corners of each slice, as (4n, 3)."""
    rows, cols = stack.shapes[:, 0] - 1, stack.shapes[:, 1] - 1
    zero, one = np.zeros(len(rows)), np.ones(len(rows))
    pixel = np.array([[x, y, zero, one] for x in (zero, cols) for y in (zero, rows)])
    return np.einsum("nij,cjn->nci", stack.affines, pixel)[..., :3].reshape(-1, 3)


def _fill(stacks: list[Stack], series_type: str, places: np.ndarray, spacing: float) -> np.ndarray:
    """Grey values uint8 (...) at places (..., 3) from the series of one type; of several, the fullest answers."""
    sampled = [sample(coarsen(stack, spacing), places) for stack in stacks if stack.series_type == series_type]
    result = np.zeros(places.shape[:-1], dtype=np.uint8)
    for values, inside in sorted(sampled, key=lambda answer: answer[1].sum()):
        result[inside] = np.rint(values[inside])
    return result
