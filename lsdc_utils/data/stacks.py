"""Series as stacks of 8-bit slices in patient space: read, windowed, saved, loaded.

All coordinates are LPS millimetres: x grows to the patient's left, y to posterior, z to the head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from lsdc_utils import dicom
from lsdc_utils.data import checks
from lsdc_utils.data.competition import FINDINGS, Competition
from lsdc_utils.files import atomic, readable
from lsdc_utils.parallel import each

WINDOW = (0.5, 99.5)  # percentiles of a series that become 0 and 255
SPARSE = 5  # an odd step in pixels, by which they are taken
FEW_STUDIES = 20  # so many are converted sooner than processes start
Source = Path | str | tuple[Path, ...]  # of a series: its folder, or its files
Skipped = tuple[tuple[Path, str], ...]  # files left out, with the reason


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
    if fault := checks.spacing_fault(series):
        raise dicom.DicomError(f"series {series.folder}: {fault}, which no lumbar MR has")
    shapes = np.array([image.shape for image in series.pixels], dtype=np.int32)
    pixels = np.zeros((len(shapes), *shapes.max(axis=0)), dtype=np.uint8)
    window_images(series.pixels, *_percentiles(series.pixels), pixels)
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


def window_images(images: list[np.ndarray], low: float, high: float, target: np.ndarray) -> None:
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


def convert_studies(
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
