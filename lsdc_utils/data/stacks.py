"""Series as stacks of 8-bit slices with their places in the patient (LPS mm): read, windowed, saved, loaded."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from lsdc_utils import dicom, geometry
from lsdc_utils.data.competition import FINDINGS, Competition
from lsdc_utils.data.parts import far_from_others, select
from lsdc_utils.files import atomic, readable
from lsdc_utils.parallel import each

WINDOW = (0.5, 99.5)  # percentiles of a series that become 0 and 255
SPARSE = 5  # every 5th pixel each way is used for them; odd, so that a mirrored image uses the same
STANDS_OUT = 16  # times as many pixels as of the next values; real saturated tissue is below
EMPTY, FEW_VALUES = 0.02, 8  # least share of signal in an image, and number of different values in a series
ODD, NOISE = 1.75, 0.2  # deviation against the usual (ordinary: 1.4 at most); correlation of pixels `SPARSE` apart
BLANK = "shows nothing: it holds one grey value, or next to no others"
FEW_STUDIES = 20  # below this, starting processes takes longer than converting
Described = tuple[dicom.Source, int, int, str, bool]  # as `read_stack` takes them


@dataclass(frozen=True)
class Stack:
    """One series, windowed to 8 bit: slices of one size (smaller ones padded right and below), each with its affine."""

    study_id: int
    series_id: int
    series_type: str  # one of vocabulary.SERIES_TYPES
    pixels: np.ndarray  # (n, rows, cols) uint8
    shapes: np.ndarray  # (n, 2) int32: rows and columns of each slice before padding
    affines: np.ndarray  # (n, 4, 4) float64: (column, row, 0, 1) -> LPS mm
    instance_numbers: np.ndarray  # (n,) int32
    blocks: np.ndarray  # (n,) int32: slices of one block are parallel


def read_stack(
    source: dicom.Source, study_id: int, series_id: int, series_type: str, labelled: bool = False
) -> tuple[Stack, list]:
    """A series windowed by its own percentiles, notes (rule, file, reason, action); DicomError if it is unusable.

    labelled: whether a table of points names its images by number, see `dicom.read_series`.
    """
    source, left_out = select(source, series_type)
    series = dicom.read_series(source, labelled=labelled)
    if fault := spacing_fault(series):
        raise dicom.DicomError(f"series {series.folder}: {fault}, implausible for a lumbar MR")
    windows, scales = _windows(series.pixels)
    notes = [("file_unusable", *note, "file left out") for note in (*left_out, *series.skipped)]
    for i in np.flatnonzero(scales != 1):
        image, what = series.slices[i], f"has {scales[i]:.3g} times its neighbours' scale, or an offset against them"
        blank = "file_unusable", image.file, f"image {image.instance_number} {BLANK}", "image left out"
        notes.append(("scale_differs", image.file, what, "scaled as its neighbours") if scales[i] else blank)
    if not len(kept := np.flatnonzero(scales)):
        raise dicom.DicomError(f"series {series.folder}: {BLANK}: check it in a viewer, and export it again")
    slices, images = ([of[i] for i in kept] for of in (series.slices, series.pixels))
    shapes = np.array([image.shape for image in images], dtype=np.int32)
    pixels = np.zeros((len(kept), *shapes.max(axis=0)), dtype=np.uint8)
    window_images(images, windows[kept], pixels)
    affines = np.stack([image.affine for image in slices]).astype(np.float64)
    numbers = np.array([image.instance_number for image in slices], dtype=np.int32)
    blocks = np.array([image.block for image in slices], dtype=np.int32)
    return Stack(int(study_id), int(series_id), series_type, pixels, shapes, affines, numbers, blocks), notes


def spacing_fault(series: dicom.Series) -> str:
    """Which size of a series is implausible for a lumbar MR, or ''."""
    spacing = np.median([image.spacing for image in series.slices], axis=0)
    field = np.median([max(np.multiply(image.spacing, image.shape[::-1])) for image in series.slices])
    steps = series.steps()
    sizes = {"pixels": (spacing, (0.1, 3.0)), "a field of view": (field, (80.0, 600.0))}  # plausible mm
    if len(steps):
        sizes["steps between slices"] = (np.median(steps), (0.3, 40.0))  # a stack may have one slice per disc
    for what, (size, (least, most)) in sizes.items():
        if np.min(size) < least or np.max(size) > most:
            return f"{what} of {' x '.join(f'{mm:.3g}' for mm in np.atleast_1d(size))} mm"
    return ""


def _windows(images: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Values of each image that become 0 and 255 (n, 2), and its scale against its neighbours' (n,): 0 if it is blank.

    The values are the percentiles `WINDOW` of the signal in all images. Not signal: padding (-inf), and values that
    stand out of the histogram, as of borders and text, and two pixels around. An image of another scale or offset
    counts, and is shown, as if it had those of its neighbours, unless it is noise.
    """
    seen = [_sample(image).ravel() for image in images]
    values, counts = np.unique(np.concatenate(seen), return_counts=True)
    near = np.pad(counts, 2)
    near = np.max([near[:-4], near[1:-3], near[3:-1], near[4:]], axis=0)  # of the two next values each way
    fills = values[~np.isfinite(values) | (counts > np.maximum(STANDS_OUT * near, 9))]
    for i, image in enumerate(images if len(fills) else ()):
        seen[i] = seen[i][_sample(cv2.dilate(np.isin(image, fills).astype(np.uint8), np.ones((5, 5)))).ravel() == 0]
        seen[i] = seen[i] if seen[i].size > EMPTY * _sample(image).size else np.zeros(1)
    middle, spread = np.array([(part.mean(), np.abs(part - part.mean()).mean()) for part in seen]).T
    windows, scales, full = np.zeros((len(images), 2)), np.zeros(len(images)), spread > 0
    usual, centre = (np.median(of[full]) if full.any() else 0 for of in (spread, middle))
    alike = full & (spread <= ODD * usual) & (usual <= ODD * spread) & (np.abs(middle - centre) <= ODD * usual)
    alike = alike if alike.any() else full  # of two images none is usual
    if len(np.unique(seen[np.argmax(alike)])) < FEW_VALUES:
        return windows, scales
    odd = [i for i in np.flatnonzero(full & ~alike) if np.corrcoef(seen[i][1:], seen[i][:-1])[0, 1] > NOISE]
    near = {i: [np.interp(i, np.flatnonzero(alike), of[alike]) for of in (middle, spread)] for i in odd}
    pool = [(seen[i] - middle[i]) * (wide / spread[i]) + place for i, (place, wide) in near.items()]
    pool += [seen[i] for i in np.flatnonzero(alike)]
    low, high, *most = np.percentile(np.concatenate(pool), (*WINDOW, 5, 95))
    if np.ptp(most) > (high - low) / 255:  # else nearly all have one grey level
        windows[full], scales[full] = (low, high), 1
        for i, (place, wide) in near.items():
            scales[i] = spread[i] / wide
            windows[i] = middle[i] + (np.array([low, high]) - place) * scales[i]
    return windows, scales


def _sample(image: np.ndarray) -> np.ndarray:
    """Every `SPARSE`-th pixel each way; the same ones, mirrored, of a mirrored image."""
    return image[_sparse(image.shape[0]), _sparse(image.shape[1])]


def _sparse(count: int) -> slice:
    """Every `SPARSE`-th of `count` pixels, with as many before the first as behind the last."""
    rest = (count - 1) % SPARSE
    first = rest // 2 if rest % 2 == 0 else (rest + SPARSE) // 2
    return slice(first, count - first, SPARSE) if 2 * first < count else slice(None)


def window_images(images: list[np.ndarray], windows: np.ndarray, target: np.ndarray) -> None:
    """Write images, each (rows, cols), to the upper left of target (n, rows, cols) uint8; windows (n, 2) as above."""
    table, window = None, None  # of all values of up to 16 bits: takes a fifth of the time
    for place, image, (low, high) in zip(target, images, windows, strict=True):
        image = np.ascontiguousarray(image, dtype=image.dtype.newbyteorder("="))
        place = place[: image.shape[0], : image.shape[1]]
        if image.dtype.kind not in "iu" or image.itemsize > 2:
            place[:] = _to_grey(image, low, high)
            continue
        index = np.dtype(f"u{image.itemsize}")  # the bits of a negative value are an index too
        if table is None or table.dtype != image.dtype or window != (low, high):
            window = low, high
            table = np.arange(256**image.itemsize, dtype=index).view(image.dtype)
            grey = _to_grey(table, low, high)
        cv2.LUT(image.view(index), grey, dst=place)


def _to_grey(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Grey levels 0..255 (uint8) of values of any type."""
    scaled = np.subtract(values, low, dtype=np.result_type(values, np.float32))  # float64 for 32-bit integers
    scaled *= 255 / max(float(high - low), 1e-6)
    return np.rint(np.clip(scaled, 0, 255, out=scaled), out=scaled).astype(np.uint8)


def save_stack(stack: Stack, path: str | Path) -> None:
    """Write a stack as .npz, atomically. Not compressed: noisy MR images shrink little and would load more slowly."""
    with atomic(path) as temporary:
        np.savez(temporary, **{field.name: getattr(stack, field.name) for field in fields(Stack)})


def load_stack(path: str | Path) -> Stack:
    """The stack that `save_stack` wrote."""
    with np.load(path, allow_pickle=False) as content:
        values = {field.name: content[field.name] for field in fields(Stack)}
    numbers = {name: int(values[name]) for name in ("study_id", "series_id")}
    return Stack(**{**values, **numbers, "series_type": str(values["series_type"])})


def load_study(slices_dir: str | Path, study_id: int) -> list[Stack]:
    """The stacks saved as <slices_dir>/<study>/<series>.npz, by series id; empty if the study has none."""
    files = (Path(slices_dir) / str(study_id)).glob("[0-9]*.npz")
    return [load_stack(path) for path in sorted(files, key=lambda path: int(path.stem))]


def read_study(comp: Competition, split: str, study_id: int) -> tuple[list[Stack], pd.DataFrame]:
    """The stacks of a study's readable series, by series id, and findings about the other series and files."""
    read = list(_read_series(_described(comp, split, study_id)))
    stacks = {stack.series_id: stack for stack, _ in read if stack}
    rows = [row for _, rows in read for row in rows]
    for series_id, distance in far_from_others({key: _height(stack) for key, stack in stacks.items()}).items():
        value = f"its middle lies {distance:+.0f} mm above that of the study's other series"
        rows.append((study_id, series_id, "series_far_away", value, "series left out"))
        del stacks[series_id]
    return list(stacks.values()), pd.DataFrame(rows, columns=FINDINGS)


def _height(stack: Stack) -> float:
    """Median z in mm of the middles of the slices."""
    return float(np.median(geometry.to_patient(stack.affines, (stack.shapes[:, ::-1] - 1) / 2)[:, 2]))


def _described(comp: Competition, split: str, study_id: int) -> list[Described]:
    series = comp.series[(comp.series["study_id"] == study_id) & (comp.series["split"] == split)]
    rows = sorted(zip(series["series_id"].tolist(), series["series_type"], strict=True))
    labelled = set(comp.coordinates["series_id"][comp.coordinates["study_id"] == study_id]) if split == "train" else ()
    return [
        (comp.source(split, study_id, number), int(study_id), number, kind, number in labelled) for number, kind in rows
    ]


def _read_series(series: Iterable[Described]) -> Iterator[tuple[Stack | None, list[tuple]]]:
    """For each series its stack (None if it cannot be read) and its rows of the findings table."""
    for source, study_id, series_id, kind, labelled in series:
        try:
            stack, notes = read_stack(source, study_id, series_id, kind, labelled)
        except dicom.DicomError as error:
            yield None, [(study_id, series_id, "series_unusable", readable(error), "series left out")]
            continue
        findings = [(rule, readable(f"{file.name}: {reason}"), action) for rule, file, reason, action in notes]
        yield stack, [(study_id, series_id, *finding) for finding in findings]


def convert_studies(
    comp: Competition, split: str, studies: Iterable[int], folder: str | Path, workers: int = 1, use: dict | None = None
) -> Iterator[tuple[pd.DataFrame, list]]:
    """Write the stacks of studies as <folder>/<study>/<series>.npz; yields each study's findings as in `read_study`,
    and what the functions in use[study], called in the same process, returned for each of its stacks."""
    tasks = [(_described(comp, split, study), (use or {}).get(study, ())) for study in studies]
    convert = partial(_convert_study, Path(folder))
    yield from each(convert, tasks, workers, FEW_STUDIES, begin=partial(cv2.setNumThreads, 1))


def _convert_study(folder: Path, task: tuple[list[Described], Iterable[Callable]]) -> tuple[pd.DataFrame, list]:
    (series, functions), findings, results = task, [], []
    for stack, rows in _read_series(series):
        if stack:
            save_stack(stack, folder / str(stack.study_id) / f"{stack.series_id}.npz")
            results += [function(stack) for function in functions]
        findings += rows
    return pd.DataFrame(findings, columns=FINDINGS), results


def coarsen(stack: Stack, spacing: float) -> Stack:
    """A stack whose pixels are averages of whole pixels and measure about `spacing` mm; a coarser one is unchanged."""
    factor = int(spacing / geometry.spacing(stack.affines).max() + 0.25)
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
