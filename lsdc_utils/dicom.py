"""The one place that opens DICOM files: a folder becomes a `Series`, and pixels get their place in the patient.

Only positions and orientations are trusted. Instance numbers run either way, have gaps, and start anywhere; slice
thickness says nothing about the distance of slices. Coordinates are the patient's, LPS, in mm: x grows to the left,
y to the back, z to the head. Pixel coordinates are x = column and y = row, 0 at the centre of the first pixel
(DICOM PS3.3, C.7.6.2.1.1).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import FileDataset
from pydicom.pixels import pixel_array

from lsdc_utils.headers import DicomError, Tags, read_tags

__all__ = ["DicomError", "Series", "Slice", "Tags", "read_series", "read_tags"]

ORDER = {  # plane -> patient direction in which its slices are sorted
    "sagittal": (1.0, 0.0, 0.0),  # from the patient's right to the left
    "coronal": (0.0, 1.0, 0.0),  # from front to back
    "axial": (0.0, 0.0, -1.0),  # from head to foot
}
SAME_TILT = 0.01  # direction cosines of one block differ by less, i.e. by about half a degree
GAP = 3.0  # a step of more than this many usual steps ends a block: nothing was imaged in between


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
        return float(np.linalg.norm(self.affine[:3, 0])), float(np.linalg.norm(self.affine[:3, 1]))

    @property
    def centre(self) -> np.ndarray:
        """Place of the image's middle in LPS mm, (3,)."""
        rows, columns = self.shape
        return (self.affine @ ((columns - 1) / 2, (rows - 1) / 2, 0.0, 1.0))[:3]

    @property
    def position(self) -> float:
        """Distance in mm of the plane from the patient's origin, along its normal."""
        return float(self.affine[:3, 2] @ self.affine[:3, 3])


@dataclass(frozen=True)
class Series:
    """The images of one folder, by block and within it along the normal: sagittal from the patient's right to the left,
    coronal from front to back, axial from head to foot. Blocks follow each other in the same direction."""

    folder: Path
    slices: tuple[Slice, ...]
    pixels: list[np.ndarray] | None  # one (rows, columns) array a slice; None where only headers were read
    skipped: tuple[tuple[Path, str], ...]  # files left out, with the reason
    plane: str  # sagittal, coronal or axial: of most slices

    def to_patient(self, instance_number: int, x: float, y: float) -> tuple[float, float, float]:
        """Place (X, Y, Z) in LPS mm of column x, row y of an instance; DicomError where there is no such instance."""
        for image in self.slices:
            if image.instance_number == instance_number:
                place = image.affine @ (x, y, 0.0, 1.0)
                return float(place[0]), float(place[1]), float(place[2])
        raise DicomError(f"series {self.folder}: no readable instance with number {instance_number}")

    def to_pixel(self, x: float, y: float, z: float) -> tuple[int, float, float, float]:
        """The slice nearest to the patient point (x, y, z) in mm: its index in `slices`, the column and the row there,
        and the distance of the point from the plane in mm, never negative.

        Planes of tilted blocks cross each other far from what they image, so a point that lies outside an image
        counts as that much farther away.
        """
        affines = np.stack([image.affine for image in self.slices])
        limits = np.array([image.shape[::-1] for image in self.slices]) - 1.0  # last x and y
        local = np.linalg.solve(affines, np.array([x, y, z, 1.0])[:, None])[..., 0]  # (n, 4): x, y, mm off the plane, 1
        outside = np.maximum(np.maximum(-local[:, :2], local[:, :2] - limits), 0.0)
        outside *= np.linalg.norm(affines[:, :3, :2], axis=1)  # pixels to mm
        nearest = int(np.argmin(np.hypot(local[:, 2], np.linalg.norm(outside, axis=1))))
        column, row, off = local[nearest, :3]
        return nearest, float(column), float(row), float(abs(off))

    def steps(self) -> np.ndarray:
        """Distances in mm between neighbouring slices of one block, from positions; (number of slices - blocks,)."""
        pairs = zip(self.slices, self.slices[1:], strict=False)
        return np.array([abs(b.position - a.position) for a, b in pairs if a.block == b.block])


def read_series(source: str | Path | Sequence[Path], pixels: bool = True) -> Series:
    """Read the files of one series, its images sorted by where they lie (`Series` says how).

    source: the folder that holds the series and nothing else, or its files, wherever they lie.
    pixels: False reads the headers alone, some times faster; `Series.pixels` is None then.
    Pixels come rescaled where the header says so (float32) and as stored otherwise; MONOCHROME1 is inverted, so that
    more signal is always a higher value. A file that cannot be used is left out and listed in `skipped`.
    Raises DicomError where no file can be used, or where two have the same instance number, since a label that names
    its slice by that number would be ambiguous.
    """
    folder, files = _files(source)
    images: list[tuple[Slice, np.ndarray | None]] = []
    skipped = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom warns of odd values in headers by the thousand
        for file in files:
            try:
                images.append(_read_file(file, pixels))
            except Exception as error:  # a broken file raises anything, from KeyError to RecursionError
                skipped.append((file, str(error) if isinstance(error, DicomError) else _reason(error)))
    if not images:
        reasons = "; ".join(f"{file.name}: {reason}" for file, reason in skipped[:3]) or "the folder is empty"
        raise DicomError(f"series {folder}: no file can be used ({reasons})")
    slices = [image for image, _ in images]
    _check_numbers(folder, slices)
    plane = _plane(slices)
    order = [(i, block) for block, members in enumerate(_blocks(slices, np.array(ORDER[plane]))) for i in members]
    ordered = tuple(dataclasses.replace(slices[i], block=block) for i, block in order)
    return Series(folder, ordered, [images[i][1] for i, _ in order] if pixels else None, tuple(skipped), plane)


def _files(source: str | Path | Sequence[Path]) -> tuple[Path, list[Path]]:
    """The folder of a series and its files, 2.dcm before 10.dcm; hidden files of a folder are no images."""
    if not isinstance(source, str | Path):
        files = [Path(file) for file in source]
        if not files:
            raise DicomError("a series of no files")
        return files[0].parent, files
    folder = Path(source)
    if not folder.is_dir():
        raise DicomError(f"series {folder}: there is no such folder")
    files = [file for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
    return folder, sorted(files, key=lambda file: (len(file.stem), file.name))


def _reason(error: Exception) -> str:
    """One short line about an error that another library raised."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _read_file(file: Path, pixels: bool) -> tuple[Slice, np.ndarray | None]:
    """One file as a Slice (block not known yet) and its pixels; any exception where it cannot be used."""
    if not pixels:
        return _slice(file, pydicom.dcmread(file, stop_before_pixels=True)), None
    dataset = pydicom.dcmread(file)
    return _slice(file, dataset), _decode(dataset)


def _slice(file: Path, dataset: FileDataset) -> Slice:
    """Geometry of one single-frame image from its header; DicomError with what is missing or makes no sense."""
    if int(dataset.get("NumberOfFrames") or 1) != 1:
        raise DicomError(f"holds {dataset.NumberOfFrames} frames")
    if int(dataset.get("SamplesPerPixel") or 1) != 1:
        raise DicomError("is a colour image")
    number = dataset.get("InstanceNumber")
    if number is None and not file.stem.isdigit():
        raise DicomError("has no InstanceNumber, and its name is no number either")
    rows, columns = int(_numbers(dataset, "Rows", 1)[0]), int(_numbers(dataset, "Columns", 1)[0])
    if rows < 1 or columns < 1:
        raise DicomError(f"has an image of {rows} x {columns} pixels")
    affine = _affine(
        _numbers(dataset, "ImagePositionPatient", 3),
        _numbers(dataset, "ImageOrientationPatient", 6),
        _numbers(dataset, "PixelSpacing", 2),
    )
    return Slice(file, 0, int(file.stem if number is None else number), affine, (rows, columns), 0)


def _numbers(dataset: FileDataset, name: str, n: int) -> list[float]:
    """The n finite numbers of a tag; DicomError where it does not hold them."""
    try:
        value = dataset[name].value
        numbers = [float(part) for part in value] if n > 1 else [float(value)]
    except (KeyError, TypeError, ValueError):
        raise DicomError(f"has no {name}, or one that is not made of numbers") from None
    if len(numbers) != n or not all(map(math.isfinite, numbers)):
        raise DicomError(f"has {name} {numbers} where {n} finite numbers are expected")
    return numbers


def _affine(position: list[float], orientation: list[float], spacing: list[float]) -> np.ndarray:
    """(4, 4) map of (column, row, mm along the normal, 1) to LPS mm (PS3.3, equation C.7.6.2.1-1).

    `orientation` is the direction of growing columns, then that of growing rows; `spacing` is the distance of rows,
    then that of columns.
    """
    (a, b, c), (d, e, f) = orientation[:3], orientation[3:]
    if abs(math.hypot(a, b, c) - 1) > 0.01 or abs(math.hypot(d, e, f) - 1) > 0.01 or abs(a * d + b * e + c * f) > 0.01:
        raise DicomError(f"has ImageOrientationPatient {orientation}, not two directions at right angles")
    if min(spacing) <= 0:
        raise DicomError(f"has PixelSpacing {spacing}")
    normal = b * f - c * e, c * d - a * f, a * e - b * d
    length = math.hypot(*normal)
    along_y, along_x = spacing
    rows = zip((a, b, c), (d, e, f), normal, position, strict=True)
    return np.array([[x * along_x, y * along_y, n / length, p] for x, y, n, p in rows] + [[0.0, 0.0, 0.0, 1.0]])


def _decode(dataset: FileDataset) -> np.ndarray:
    """Pixels of a single-frame grey image, (rows, columns): unused high bits cleared, bright is more, rescaled."""
    values = pixel_array(dataset, raw=True)  # takes the fastest decoder installed, pylibjpeg-rle for RLE
    unused = dataset.BitsAllocated - dataset.BitsStored
    if unused > 0:
        values = (values << unused) >> unused  # an arithmetic shift for signed numbers, so that their sign is kept
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        values = ~values if dataset.PixelRepresentation else values.dtype.type(2**dataset.BitsStored - 1) - values
    slope, intercept = float(dataset.get("RescaleSlope") or 1), float(dataset.get("RescaleIntercept") or 0)
    if (slope, intercept) != (1.0, 0.0):
        values = values.astype(np.float32) * np.float32(slope) + np.float32(intercept)
    return values


def _check_numbers(folder: Path, slices: Iterable[Slice]) -> None:
    """DicomError where two files have the same instance number."""
    first: dict[int, Path] = {}
    for image in slices:
        if image.instance_number in first:
            names = f"{first[image.instance_number].name} and {image.file.name}"
            raise DicomError(f"series {folder}: {names} both have instance number {image.instance_number}")
        first[image.instance_number] = image.file


def _plane(slices: list[Slice]) -> str:
    """The anatomical plane of most slices, by the patient's axis that is nearest to their normals."""
    axis = np.abs([image.affine[:3, 2] for image in slices]).argmax(axis=1)
    return ("sagittal", "coronal", "axial")[np.bincount(axis, minlength=3).argmax()]


def _blocks(slices: list[Slice], direction: np.ndarray) -> list[list[int]]:
    """Indices of the slices of each block, sorted within the block and among blocks along a patient direction (3,)."""
    blocks = [part for members in _by_tilt(slices) for part in _by_gap(members, slices, direction)]
    return sorted(blocks, key=lambda part: np.mean([direction @ slices[i].centre for i in part]))


def _by_tilt(slices: list[Slice]) -> list[list[int]]:
    """Indices grouped by orientation: columns and rows of a group run in the same directions."""
    groups: list[tuple[np.ndarray, list[int]]] = []
    for i, image in enumerate(slices):
        turn = image.affine[:3, :2] / image.spacing
        for first, members in groups:
            if np.abs(first - turn).max() < SAME_TILT:
                members.append(i)
                break
        else:
            groups.append((turn, [i]))
    return [members for _, members in groups]


def _by_gap(members: list[int], slices: list[Slice], direction: np.ndarray) -> list[list[int]]:
    """Parallel slices in the order of their positions along `direction`, cut where a step is far above the usual."""
    normal = slices[members[0]].affine[:3, 2]
    normal = normal if normal @ direction >= 0 else -normal
    place = {i: normal @ slices[i].affine[:3, 3] for i in members}
    members = sorted(members, key=lambda i: (round(place[i], 3), slices[i].instance_number))  # same place: by number
    steps = np.diff([place[i] for i in members])
    moved = steps[steps > 0.01]
    if not len(moved):
        return [members]
    cuts = np.flatnonzero(steps > GAP * np.median(moved)) + 1
    return [part.tolist() for part in np.split(np.array(members), cuts)]
