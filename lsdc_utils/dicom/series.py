"""A folder of DICOM files as a `Series`: its images in order, with the place of each pixel in the patient.

Only positions and orientations are trusted: instance numbers run either way and have gaps, slice thickness varies.
"""

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from pydicom.dataset import Dataset

from lsdc_utils import geometry
from lsdc_utils.dicom.headers import DicomError, first_number, frame_datasets, frame_numbers, integer, opened, text
from lsdc_utils.dicom.pixels import Layout, check_lengths, read_frames, read_layout

ORDER = {  # plane -> patient direction in which its slices are sorted
    "sagittal": (1.0, 0.0, 0.0),  # from the patient's right to the left
    "coronal": (0.0, 1.0, 0.0),  # from front to back
    "axial": (0.0, 0.0, -1.0),  # from head to foot
}
SAME_TILT = 0.01  # direction cosines of one block's normals differ by less, i.e. by about half a degree
SAME_TURN = 0.996  # least cosine between sides of one block's images, which may be stored mirrored: 5 degrees
SAME_SPACING = 1e-3  # mm; likewise
SAME_PLACE = 0.01  # mm along the normal; slices are at least 0.3 mm apart
NEARLY = 0.6  # mm; a patient moves so much between two scans: one place where a usual step is thrice as long
FARTHEST = 1e4  # mm from the scanner's origin
FINEST, COARSEST = 0.01, 50.0  # mm of a pixel
MAX_SERIES = 1 << 28  # pixels of a series; 200 slices of 512 x 512 have a fifth
GAP = 3.0  # a step of more than this many usual steps ends a block: nothing was imaged in between

Note = tuple[Path, str]  # a file, and what there is to say about it


class Frames(NamedTuple):
    """Some frames of a multi-frame file, from 0."""

    file: Path
    frames: tuple[int, ...]


Source = str | Path | Sequence[Path | Frames]  # of a series: its folder, or its files and parts of files


@dataclass(frozen=True)
class Slice:
    """One image of a series. `affine` maps (x, y, 0, 1) to LPS mm; its third column is the unit normal of the plane."""

    file: Path
    frame: int  # of a multi-frame file; 0 otherwise
    instance_number: int
    affine: np.ndarray  # (4, 4) float64
    shape: tuple[int, int]  # rows, columns
    block: int  # slices of one block are parallel and follow each other without a gap

    @property
    def spacing(self) -> tuple[float, float]:
        """Distance in mm of neighbouring columns (along x) and of neighbouring rows (along y)."""
        return tuple(geometry.spacing(self.affine).tolist())

    @property
    def centre(self) -> np.ndarray:
        """Place of the image's middle in LPS mm, (3,)."""
        rows, columns = self.shape
        return (self.affine @ ((columns - 1) / 2, (rows - 1) / 2, 0.0, 1.0))[:3]


@dataclass(frozen=True)
class Series:
    """The images of one folder, sorted by block, and within a block along the normal, both as ORDER says."""

    folder: Path
    slices: tuple[Slice, ...]
    pixels: list[np.ndarray] | None  # one (rows, columns) array a slice; None where only headers were read
    skipped: tuple[Note, ...]  # files that cannot be used, or repeat another one's image, with the reason
    plane: str  # sagittal, coronal or axial: of most slices
    repaired: tuple[Note, ...] = ()  # files without orientation or spacing, which got those on which all others agree

    def to_patient(self, instance_number: int, x: float, y: float) -> tuple[float, float, float]:
        """Place (X, Y, Z) in LPS mm of column x, row y of an instance; DicomError where there is no such instance."""
        for image in self.slices:
            if image.instance_number == instance_number:
                return tuple(geometry.to_patient(image.affine, np.array([x, y])).tolist())
        raise DicomError(f"series {self.folder}: no readable instance with number {instance_number}")

    def to_pixel(self, x: float, y: float, z: float) -> tuple[int, float, float, float]:
        """Of the slice nearest to a patient point in mm: index in `slices`, column, row, mm off its plane."""
        affines, point = np.stack([image.affine for image in self.slices]), np.array([x, y, z])
        shapes = np.array([image.shape for image in self.slices])
        nearest = int(geometry.image_distances(affines, shapes, point[None])[:, 0].argmin())
        column, row, off = geometry.to_pixels(affines[nearest], point)
        return nearest, float(column), float(row), float(abs(off))

    def steps(self) -> np.ndarray:
        """Distances in mm along the normal of neighbouring slices of one block; (number of slices - blocks,)."""
        pairs = [(a.affine, b.affine) for a, b in pairwise(self.slices) if a.block == b.block]
        return np.array([abs(a[:3, 2] @ (b[:3, 3] - a[:3, 3])) for a, b in pairs])


def read_series(source: Source, pixels: bool = True, labelled: bool = True) -> Series:
    """Read one series, its images sorted by where they lie in the patient.

    source: the folder that holds the series and nothing else, or its files, or `Frames` of them.
    pixels: False reads headers alone, five times faster; truncated files are found as well. Pixels are rescaled where
    the header says so (float), and as stored otherwise. More signal is always a higher value; padding is -inf.
    labelled: labels may name an image by its number; if False, missing or repeated numbers do not matter. Images are
    then numbered 1, 2, ... in their order; so are those of files with several frames.
    Raises DicomError where no file can be used, or, if `labelled`, where two images have the same instance number.
    """
    folder, parts = series_files(source)
    images, skipped = [], []
    for part in parts:
        try:
            images += _read_file(part, pixels, labelled)
        except DicomError as error:
            skipped.append((part.file, str(error)))
        if pixels and sum(image.pixels.size for image in images) > MAX_SERIES:
            raise DicomError(f"series {folder}: holds more pixels than any of a spine; is it several series in one?")
    images, repaired = _repair(images, skipped)
    images = _without_duplicates(folder, images, skipped, labelled)
    if not images:
        reasons = "; ".join(f"{file.name}: {reason}" for file, reason in skipped[:3]) or "the folder is empty"
        raise DicomError(f"series {folder}: no file can be used ({reasons})")
    numbers = _numbers(images)
    counted = zip(images, numbers or range(1, len(images) + 1), strict=True)
    slices = [Slice(image.file, image.frame, n, _affine(image), image.shape, 0) for image, n in counted]
    planes = [geometry.plane_of(image.affine[:3, 2]) for image in slices]
    plane = max(ORDER, key=planes.count)
    order = [(i, block) for block, members in enumerate(_blocks(slices, np.array(ORDER[plane]))) for i in members]
    slices = [dataclasses.replace(slices[i], block=block) for i, block in order]
    if not numbers:
        slices = [dataclasses.replace(image, instance_number=n) for n, image in enumerate(slices, 1)]
    kept = [images[i].pixels for i, _ in order] if pixels else None
    skipped, repaired = dict.fromkeys(skipped), dict.fromkeys(repaired)  # once, where frames of a file share a note
    return Series(folder, tuple(slices), kept, tuple(skipped), plane, tuple(repaired))


def series_files(source: Source) -> tuple[Path, list[Frames]]:
    """The folder of a series and its files but hidden ones, 2.dcm before 10.dcm; without frames where all are read."""
    if not isinstance(source, str | Path):
        parts = [part if isinstance(part, Frames) else Frames(Path(part), ()) for part in source]
        if not parts:
            raise DicomError("a series needs at least one file")
        return parts[0].file.parent, parts
    folder = Path(source)
    if not os.path.isdir(folder):  # where pathlib's raises for a folder that is closed
        raise DicomError(f"series {folder}: no such folder")
    try:
        files = [file for file in folder.iterdir() if not file.name.startswith(".") and not os.path.isdir(file)]
    except OSError as error:
        raise DicomError(f"series {folder}: cannot be opened ({error.strerror or error})") from None
    return folder, [Frames(file, ()) for file in sorted(files, key=lambda file: (len(file.stem), file.name))]


@dataclass(frozen=True)
class _Image:
    """One image before its series is seen as a whole."""

    file: Path
    frame: int  # of a multi-frame file; 0 otherwise
    frames: int  # of the file
    number: int | None  # of the instance
    uid: str  # SOPInstanceUID
    shape: tuple[int, int]  # rows, columns
    position: list[float]
    orientation: list[float] | None  # direction of growing columns, then of growing rows; None where missing
    spacing: list[float] | None  # distance of rows, then of columns; None where missing
    pixels: np.ndarray | None  # None where only headers are read


def _read_file(part: Frames, pixels: bool, labelled: bool) -> list[_Image]:
    """One file's images with their pixels, if asked for; DicomError where it cannot be used."""
    file, chosen = part
    with opened(file) as header:
        layout = read_layout(header)
        check_lengths(header, layout)
        number, uid = integer(header.dataset, "InstanceNumber"), text(header.dataset, "SOPInstanceUID")
        number = int(file.stem) if number is None and file.stem.isdecimal() else number
        if number is None and labelled and layout.frames == 1:
            raise DicomError("has no InstanceNumber, and its name is not a number either: labels cannot name it")
        if abs(number or 0) >= 2**31:
            raise DicomError(f"has InstanceNumber {number}, which no scanner gives")
        chosen = [frame for frame in chosen if frame < layout.frames] or range(layout.frames)
        datasets = [frame_datasets(header.dataset, frame) for frame in chosen]
        places = [_place(of_frame) for of_frame in datasets]
        values = [None] * len(datasets)
        if pixels:
            frames = list(read_frames(header, layout))
            values = list(map(partial(_rescale, layout), [frames[frame] for frame in chosen], datasets))
    head, shape = (layout.frames, number, uid), (layout.rows, layout.columns)
    placed = zip(chosen, places, values, strict=True)
    return [_Image(file, frame, *head, shape, *place, value) for frame, place, value in placed]


def _place(datasets: list[Dataset]) -> tuple[list[float], list[float] | None, list[float] | None]:
    """Position, orientation and spacing of one frame by its header; DicomError where they make no sense."""
    counts = {"ImagePositionPatient": 3, "ImageOrientationPatient": 6, "PixelSpacing": 2}
    values = {name: frame_numbers(datasets, name, n) for name, n in counts.items()}
    for name, n in counts.items():
        if values[name] is None and text(datasets[-1], name):
            raise DicomError(f"has something else as {name} where {n} finite numbers are expected")
    position, orientation, spacing = values.values()
    if position is None:
        raise DicomError("has no ImagePositionPatient: where in the patient it lies is unknown")
    if max(map(abs, position)) > FARTHEST:
        raise DicomError(f"has ImagePositionPatient {position} mm, far outside of any scanner")
    if orientation is not None:
        a, b, c, d, e, f = orientation
        if max(abs(math.hypot(a, b, c) - 1), abs(math.hypot(d, e, f) - 1), abs(a * d + b * e + c * f)) > 0.01:
            raise DicomError(f"has ImageOrientationPatient {orientation}, not two directions at right angles")
    if spacing is not None and (min(spacing) < FINEST or max(spacing) > COARSEST):
        raise DicomError(f"has PixelSpacing {spacing} mm, which no scanner makes")
    return position, orientation, spacing


def _rescale(layout: Layout, frame: tuple[np.ndarray, np.ndarray | None], datasets: list[Dataset]) -> np.ndarray:
    """Stored values as signal, more is brighter and padding is -inf; floats where the header gives scale or padding."""
    values, padded = frame
    slope = first_number(datasets, "RescaleSlope") or 1.0
    intercept = first_number(datasets, "RescaleIntercept") or 0.0
    if not 1e-9 < abs(slope) < 1e9 or abs(intercept) > 1e15:
        raise DicomError(f"has RescaleSlope {slope} and RescaleIntercept {intercept}, which are implausible")
    kind = np.result_type(values, np.float32).type  # float64 for 32 bits
    if (slope, intercept) != (1.0, 0.0):
        kind = np.float64 if abs(intercept) > 1e5 * abs(slope) else kind  # else steps of 1 would be lost
        sign = -1 if layout.inverse else 1
        values = values.astype(kind) * kind(sign * slope) + kind(sign * intercept)
    elif layout.inverse:
        values = ~values if layout.signed else values.dtype.type(2**layout.stored - 1) - values
    return values if padded is None or not padded.any() else np.where(padded, kind(-np.inf), values)


def _repair(images: list[_Image], skipped: list[Note]) -> tuple[list[_Image], list[Note]]:
    """Give images without orientation or spacing those of the series, where all its other images agree on them."""
    orientation = _common([image.orientation for image in images], SAME_TILT)
    same_size = len({image.shape for image in images}) == 1
    spacing = _common([image.spacing for image in images], SAME_SPACING) if same_size else None
    usable, repaired = [], []
    for image in images:
        values = {"ImageOrientationPatient": image.orientation, "PixelSpacing": image.spacing}
        missing = " and no ".join(name for name, value in values.items() if value is None)
        found = {"orientation": image.orientation or orientation, "spacing": image.spacing or spacing}
        if None in found.values():
            skipped.append((image.file, f"has no {missing}, and the series has none on which all its images agree"))
            continue
        if missing:
            repaired.append((image.file, f"has no {missing}: taken from the series' other images, which agree on it"))
        usable.append(dataclasses.replace(image, **found))
    return usable, repaired


def _common(values: list[list[float] | None], tolerance: float) -> list[float] | None:
    """The first value; None where there is none, or values differ by more than the tolerance."""
    given = [value for value in values if value is not None]
    return given[0] if given and np.ptp(given, axis=0).max() <= tolerance else None


def _numbers(images: list[_Image]) -> list[int] | None:
    """The instance number of each image, that of a frame counted through all files; None where one is not unique."""
    frames = {image.file: image.frames for image in images}
    before = dict(zip(frames, accumulate(frames.values(), initial=1), strict=False))
    if max(frames.values()) > 1:
        return [before[image.file] + image.frame for image in images]
    numbers = [image.number for image in images]
    return numbers if None not in numbers and len({*numbers}) == len(numbers) else None


def _without_duplicates(folder: Path, images: list[_Image], skipped: list[Note], labelled: bool) -> list[_Image]:
    """Images without those that repeat an earlier one; DicomError where `labelled` ones have the same number."""
    unique = labelled and not any(image.frames > 1 for image in images)
    first: dict[tuple, _Image] = {}
    kept = []
    for image in images:
        place = () if labelled else (*image.position, *image.shape)
        earlier = first.setdefault((image.number, image.frame, place), image)
        place, other = ((i.shape, i.position, i.orientation, i.spacing) for i in (image, earlier))
        if same := earlier is not image and place == other:
            same_uid = image.uid == earlier.uid != ""
            same = same_uid if image.pixels is None else np.array_equal(image.pixels, earlier.pixels)
        if same:
            skipped.append((image.file, f"is the same image as {earlier.file.name}"))
        elif earlier is image or not unique:
            kept.append(image)
        else:
            names = f"{earlier.file.name} and {image.file.name}"
            raise DicomError(f"series {folder}: {names} both have instance number {image.number}")
    return kept


def _affine(image: _Image) -> np.ndarray:
    """(4, 4) map of (column, row, mm along the normal, 1) to LPS mm (PS3.3, equation C.7.6.2.1-1)."""
    affine = np.eye(4)
    affine[:3, :2] = np.reshape(image.orientation, (2, 3)).T * image.spacing[::-1]
    affine[:3, 2], affine[:3, 3] = geometry.normals(affine), image.position
    return affine


def _blocks(slices: list[Slice], direction: np.ndarray) -> list[np.ndarray]:
    """Indices of the parallel slices of each block, sorted in it and among blocks along a patient direction (3,)."""
    sides = np.array([geometry.unit(image.affine[:3, :2].T) for image in slices])  # (n, 2, 3)
    normals = np.array([image.affine[:3, 2] for image in slices])
    blocks, left = [], np.arange(len(slices))
    while left.size:
        first = left[0]
        same = np.linalg.norm(np.cross(normals[left], normals[first]), axis=1) < SAME_TILT
        same &= np.abs(sides[left] @ sides[first].T).max(axis=(1, 2)) > SAME_TURN
        blocks += _by_gap(left[same], slices, direction)
        left = left[~same]
    return sorted(blocks, key=lambda block: np.mean([direction @ slices[i].centre for i in block]))


def _by_gap(members: np.ndarray, slices: list[Slice], direction: np.ndarray) -> list[np.ndarray]:
    """Parallel slices in the order of their positions along `direction`, cut where a step is far above the usual. Of
    images at one place (echoes, or a second scan) the k-th by number goes to the k-th stack: neighbours lie apart."""
    normal = slices[members[0]].affine[:3, 2]
    normal = normal if normal @ direction >= 0 else -normal
    positions = np.array([normal @ slices[i].affine[:3, 3] for i in members])
    order = positions.argsort()
    place, steps = np.empty(len(members), int), np.diff(positions[order], prepend=positions.min())
    usual = np.percentile(apart, 75) if (apart := steps[steps >= SAME_PLACE]).size else 0.0  # half are short then
    place[order] = np.cumsum(steps >= (NEARLY if usual >= 3 * NEARLY else SAME_PLACE))  # one number for one place
    order = np.lexsort(([slices[i].instance_number for i in members], place))
    members, positions, place = members[order], positions[order], place[order]
    rank = np.arange(len(members)) - np.searchsorted(place, place)  # of each image at its place
    blocks = []
    for k in range(rank.max() + 1):
        stack, steps = members[rank == k], np.diff(positions[rank == k])
        usual = np.median(steps) if len(steps) else 0.0
        blocks += np.split(stack, np.flatnonzero(steps > GAP * usual) + 1)
    return blocks
