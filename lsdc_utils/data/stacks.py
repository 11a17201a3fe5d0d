"""Series as stacks of 8-bit slices with their places in the patient (LPS mm): read, windowed, saved, loaded."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from lsdc_utils import dicom, geometry
from lsdc_utils import vocabulary as words
from lsdc_utils.data.competition import FINDINGS, Competition
from lsdc_utils.data.parts import far_from_others, lying, select
from lsdc_utils.data.series_types import SHORT, contrast_of
from lsdc_utils.data.windows import to_grey
from lsdc_utils.files import atomic, readable
from lsdc_utils.parallel import each

UPRIGHT = {  # plane -> directions in the patient (LPS) in which columns and rows grow
    "sagittal": np.array([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0]]),
    "axial": np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]),
}
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
    """A series flattened and windowed, see `windows`, notes (rule, file, reason, action); DicomError if it is unusable.
    labelled: whether a table of points names its images by number, see `dicom.read_series`."""
    source, left_out = select(source, series_type)
    series = dicom.read_series(source, labelled=labelled)
    if fault := spacing_fault(series):
        raise dicom.DicomError(f"series {series.folder}: {fault}, implausible for a lumbar MR")
    plane, contrast = plane_and_contrast(series, series_type)
    if plane != words.PLANES[series_type]:
        raise dicom.DicomError(f"series {series.folder}: its images are {plane}, not those of {series_type}")
    turned = (upright(one, image.affine, plane) for one, image in zip(series.pixels, series.slices, strict=True))
    images, affines = zip(*turned, strict=True)
    shapes, affines = np.array([image.shape for image in images], dtype=np.int32), np.stack(affines)
    pixels = np.zeros((len(shapes), *shapes.max(axis=0)), dtype=np.uint8)
    scales = to_grey(images, affines, pixels)
    notes = [("file_unusable", *note, "file left out") for note in (*left_out, *series.skipped)]
    notes += [("contrast_differs", series.slices[0].file, contrast, "used as the table says")] * bool(contrast)
    for i in np.flatnonzero(scales != 1):
        image, what = series.slices[i], f"has {scales[i]:.3g} times its neighbours' scale, or an offset against them"
        blank = "file_unusable", image.file, f"image {image.instance_number} {BLANK}", "image left out"
        notes.append(("scale_differs", image.file, what, "scaled as its neighbours") if scales[i] else blank)
    if not len(kept := np.flatnonzero(scales)):
        raise dicom.DicomError(f"series {series.folder}: {BLANK}: check it in a viewer, and export it again")
    shapes, affines, slices = shapes[kept], affines[kept], [series.slices[i] for i in kept]
    pixels = pixels[kept, : shapes[:, 0].max(), : shapes[:, 1].max()]
    numbers = np.array([image.instance_number for image in slices], dtype=np.int32)
    blocks = np.array([image.block for image in slices], dtype=np.int32)
    return Stack(int(study_id), int(series_id), series_type, pixels, shapes, affines, numbers, blocks), notes


def plane_and_contrast(series: dicom.Series, series_type: str) -> tuple[str, str]:
    """The plane of most images of a series, and in words which contrast its header names instead of that of
    `series_type`, or ''."""
    plane = Counter(lying(image.affine[:3, 2]) for image in series.slices).most_common(1)[0][0]
    contrast = contrast_of(dicom.read_tags(series.slices[0].file))[0]
    usual = contrast in (None, words.T1 if series_type == words.T1 else words.T2)
    return plane, "" if usual else f"{SHORT[contrast]} in the header, described as {series_type}"


def upright(image: np.ndarray, affine: np.ndarray, plane: str) -> tuple[np.ndarray, np.ndarray]:
    """An image (rows, cols) and its affine, turned or flipped as readers and networks see it: columns lead to posterior
    and rows to the feet, or in axial images columns to the patient's left and rows to posterior."""
    affine = affine.astype(np.float64)
    if np.abs(UPRIGHT[plane][0] @ affine[:3, :2]).argmax() == 1:
        image, affine[:, :2] = image.T, affine[:, 1::-1].copy()
    for axis, wanted in enumerate(UPRIGHT[plane]):
        if affine[:3, axis] @ wanted < 0:
            image = np.flip(image, 1 - axis)
            affine[:3, 3] += affine[:3, axis] * (image.shape[1 - axis] - 1)
            affine[:3, axis] *= -1
    return np.ascontiguousarray(image), affine


def spacing_fault(series: dicom.Series) -> str:
    """Which size of a series is implausible for a lumbar MR, or ''."""
    spacing = np.median([image.spacing for image in series.slices], axis=0)
    field = np.median([max(np.multiply(image.spacing, image.shape[::-1])) for image in series.slices])
    steps = series.steps()
    sizes = {"pixels": (spacing, (0.1, 3.0)), "a field of view": (field, (80.0, 600.0))}  # plausible mm
    if len(steps):
        sizes["steps between slices"] = (np.median(steps), (0.3, 40.0))  # a stack may have one slice per disc
    places = {tuple(image.affine[:3, 3].round(1)) for image in series.slices}
    if 2 * len(places) < len(series.slices):
        return f"{len(series.slices)} images at {len(places)} place{'s' * (len(places) > 1)}"
    for what, (size, (least, most)) in sizes.items():
        if np.min(size) < least or np.max(size) > most:
            return f"{what} of {' x '.join(f'{mm:.3g}' for mm in np.atleast_1d(size))} mm"
    return ""


def save_stack(stack: Stack, path: str | Path) -> None:
    """Write a stack as .npz, atomically. Not compressed: noisy MR images shrink little and would load more slowly."""
    with atomic(path) as temporary:
        np.savez(temporary, **vars(stack))


def load_stack(path: str | Path) -> Stack:
    """The stack that `save_stack` wrote."""
    with np.load(path, allow_pickle=False) as content:
        return Stack(**{name: value if value.ndim else value.item() for name, value in content.items()})


def load_study(slices_dir: str | Path, study_id: int) -> list[Stack]:
    """The stacks saved as <slices_dir>/<study>/<series>.npz, by series id; empty if the study has none."""
    files = (Path(slices_dir) / str(study_id)).glob("[0-9]*.npz")
    return [load_stack(path) for path in sorted(files, key=lambda path: int(path.stem))]


def read_study(comp: Competition, split: str, study_id: int) -> tuple[list[Stack], pd.DataFrame]:
    """The stacks of a study's readable series, by series id, and findings about the other series and files."""
    stacks, rows = _near_stacks(described(comp, split, study_id))
    return stacks, pd.DataFrame(rows, columns=FINDINGS)


def _near_stacks(series: list[Described]) -> tuple[list[Stack], list[tuple]]:
    """The stacks of a study that can be read and lie near the others, by series id, and rows of the findings table."""
    read = list(_read_series(series))
    stacks = {stack.series_id: stack for stack, _ in read if stack}
    rows = [row for _, rows in read for row in rows]
    middles = {key: (stack.affines, (stack.shapes[:, ::-1] - 1) / 2) for key, stack in stacks.items()}
    heights = {key: float(np.median(geometry.to_patient(*middle)[:, 2])) for key, middle in middles.items()}
    for series_id, distance in far_from_others(heights).items():
        value = f"its middle lies {distance:+.0f} mm above that of the study's other series"
        rows.append((series[0][1], series_id, "series_far_away", value, "series left out"))
        del stacks[series_id]
    patients = {key: _patient(source) for source, _, key, *_ in series if key in stacks}
    named = Counter(filter(None, patients.values())).most_common()
    for series_id in [key for key, patient in patients.items() if len(named) > 1 and patient not in ("", named[0][0])]:
        known = named[0][1] > named[1][1]  # which patient the study is of
        value = "its header names another patient than those of the study's other series"
        rows.append((series[0][1], series_id, "patient_differs", value, "series left out" if known else "used"))
        if known:
            del stacks[series_id]
    return list(stacks.values()), rows


def _patient(source: dicom.Source) -> str:
    """A hash that tells the patient of a series from others, by the first header that can be read; '' if unknown."""
    for part in dicom.series_files(source)[1]:
        with contextlib.suppress(dicom.DicomError):
            return dicom.read_tags(part.file).patient
    return ""


def described(comp: Competition, split: str, study_id: int) -> list[Described]:
    """What the tables tell of a study's series, by series id."""
    series = comp.series[(comp.series["study_id"] == study_id) & (comp.series["split"] == split)]
    rows = sorted(zip(series["series_id"].tolist(), series["series_type"], strict=True))
    labelled = set(comp.coordinates["series_id"][comp.coordinates["study_id"] == study_id]) if split == "train" else ()
    return [(comp.source(split, study_id, n), int(study_id), n, kind, n in labelled) for n, kind in rows]


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
    tasks = [(described(comp, split, study), (use or {}).get(study, ())) for study in studies]
    convert = partial(_convert_study, Path(folder))
    yield from each(convert, tasks, workers, FEW_STUDIES, begin=partial(cv2.setNumThreads, 1))


def _convert_study(folder: Path, task: tuple[list[Described], Iterable[Callable]]) -> tuple[pd.DataFrame, list]:
    (series, functions), results = task, []
    stacks, findings = _near_stacks(series)
    for stack in stacks:
        save_stack(stack, folder / str(stack.study_id) / f"{stack.series_id}.npz")
        results += [function(stack) for function in functions]
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
