"""The one place that opens DICOM files: a folder becomes a `Series`, and pixels get their place in the patient.

Only positions and orientations are trusted. Instance numbers run either way, have gaps, and start anywhere; slice
thickness says nothing about the distance of slices. Coordinates are the patient's, LPS, in mm: x grows to the left,
y to the back, z to the head. Pixel coordinates are x = column and y = row, 0 at the centre of the first pixel
(DICOM PS3.3, C.7.6.2.1.1).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from lsdc_utils import geometry
from lsdc_utils.dicom.headers import DicomError, find, frame_groups, opened, text, whole
from lsdc_utils.dicom.pixels import decode, locate, read_layout

ORDER = {  # plane -> patient direction in which its slices are sorted
    "sagittal": (1.0, 0.0, 0.0),  # from the patient's right to the left
    "coronal": (0.0, 1.0, 0.0),  # from front to back
    "axial": (0.0, 0.0, -1.0),  # from head to foot
}
SAME_TILT = 0.01  # direction cosines of one block differ by less, i.e. by about half a degree
SAME_SPACING = 1e-3  # mm; likewise
SAME_PLACE = 0.01  # mm along the normal; slices are at least 0.3 mm apart
FARTHEST = 1e4  # mm from the scanner's origin
FINEST, COARSEST = 0.01, 50.0  # mm of a pixel
MAX_SERIES = 1 << 28  # pixels of a series; 200 slices of 512 x 512 have a fifth
GAP = 3.0  # a step of more than this many usual steps ends a block: nothing was imaged in between

Note = tuple[Path, str]  # a file, and what there is to say about it


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
        x, y = geometry.spacing(self.affine)
        return float(x), float(y)

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
    skipped: tuple[Note, ...]  # files left out, with the reason
    plane: str  # sagittal, coronal or axial: of most slices
    repaired: tuple[Note, ...] = ()  # files used although their header lacks something, with what was done

    def to_patient(self, instance_number: int, x: float, y: float) -> tuple[float, float, float]:
        """Place (X, Y, Z) in LPS mm of column x, row y of an instance; DicomError where there is no such instance."""
        for image in self.slices:
            if image.instance_number == instance_number:
                place = geometry.to_patient(image.affine, np.array([x, y]))
                return float(place[0]), float(place[1]), float(place[2])
        raise DicomError(f"series {self.folder}: no readable instance with number {instance_number}")

    def to_pixel(self, x: float, y: float, z: float) -> tuple[int, float, float, float]:
        """The slice nearest to the patient point (x, y, z) in mm: its index in `slices`, the column and the row there,
        and the distance of the point from the plane in mm, never negative.

        Planes of tilted blocks cross each other far from what they image, so a point that lies outside an image
        counts as that much farther away.
        """
        affines, point = np.stack([image.affine for image in self.slices]), np.array([x, y, z])
        shapes = np.array([image.shape for image in self.slices])
        nearest = int(geometry.image_distances(affines, shapes, point[None])[:, 0].argmin())
        column, row, off = geometry.to_pixels(affines[nearest], point)
        return nearest, float(column), float(row), float(abs(off))

    def steps(self) -> np.ndarray:
        """Distances in mm between neighbouring slices of one block, from positions; (number of slices - blocks,)."""
        pairs = zip(self.slices, self.slices[1:], strict=False)
        return np.array([abs(b.position - a.position) for a, b in pairs if a.block == b.block])


def read_series(source: str | Path | Sequence[Path], pixels: bool = True) -> Series:
    """Read the files of one series, its images sorted by where they lie (`Series` says how).

    source: the folder that holds the series and nothing else, or its files, wherever they lie.
    pixels: False reads the headers alone, some times faster; `Series.pixels` is None then. Files without their pixels
    are found out all the same, by the lengths in them.
    Pixels come rescaled where the header says so (float32) and as stored otherwise; MONOCHROME1 is inverted, so that
    more signal is always a higher value. A file that cannot be used is left out and listed in `skipped`, as is one that
    is the same image as another; a file that lacks an orientation or a spacing on which all others agree is given
    theirs and listed in `repaired`. Where a file has several frames, the images of the series are numbered 1, 2, ...
    Raises DicomError where no file can be used, or where two images have the same instance number, since a label that
    names its slice by that number would be ambiguous.
    """
    folder, files = _files(source)
    drafts, skipped = _read_files(folder, files, pixels)
    drafts, repaired = _repair(drafts, skipped)
    drafts = _without_duplicates(folder, drafts, skipped)
    if not drafts:
        reasons = "; ".join(f"{file.name}: {reason}" for file, reason in skipped[:3]) or "the folder is empty"
        raise DicomError(f"series {folder}: no file can be used ({reasons})")
    slices, images = _slices(drafts), [image for draft in drafts for image in draft.pixels]
    plane = _plane(slices)
    order = [(i, block) for block, members in enumerate(_blocks(slices, np.array(ORDER[plane]))) for i in members]
    ordered = tuple(dataclasses.replace(slices[i], block=block) for i, block in order)
    return Series(
        folder, ordered, [images[i] for i, _ in order] if pixels else None, tuple(skipped), plane, tuple(repaired)
    )


def _files(source: str | Path | Sequence[Path]) -> tuple[Path, list[Path]]:
    """The folder of a series and its files, 2.dcm before 10.dcm; hidden files of a folder are no images."""
    if not isinstance(source, str | Path):
        files = [Path(file) for file in source]
        if not files:
            raise DicomError("a series of no files")
        return files[0].parent, files
    folder = Path(source)
    if not os.path.isdir(folder):  # where pathlib's raises for a folder that is closed
        raise DicomError(f"series {folder}: there is no such folder")
    try:
        files = [file for file in folder.iterdir() if not file.name.startswith(".") and not os.path.isdir(file)]
    except OSError as error:
        raise DicomError(f"series {folder}: cannot be opened ({error.strerror or error})") from None
    return folder, sorted(files, key=lambda file: (len(file.stem), file.name))


@dataclass(frozen=True)
class _Frame:
    """What a header says of the place of an image; None where it is silent."""

    position: list[float]
    orientation: list[float] | None
    spacing: list[float] | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class _Draft:
    """One file, before it is seen together with the others."""

    file: Path
    number: int  # of the instance
    uid: str  # SOPInstanceUID
    frames: list[_Frame]
    pixels: list[np.ndarray]  # one a frame; empty where only headers are read


def _read_file(file: Path, pixels: bool) -> _Draft:
    """One file's frames and, if asked for, their pixels; DicomError where it cannot be used."""
    with opened(file, pixels) as header:
        dataset = header.dataset
        layout = read_layout(header)
        places = locate(header, layout)
        groups = [frame_groups(dataset, k) for k in range(layout.frames)]
        frames = [_frame(place, (layout.rows, layout.columns)) for place in groups]
        images = []
        for fragments, place in zip(places, groups, strict=True) if pixels else ():
            images.append(_rescale(decode(header, layout, fragments), place))
        return _Draft(file, _instance_number(file, dataset), text(dataset, "SOPInstanceUID"), frames, images)


def _read_files(folder: Path, files: list[Path], pixels: bool) -> tuple[list[_Draft], list[Note]]:
    """What can be read of the files, and the others with the reason; DicomError where memory would not hold it."""
    drafts, skipped = [], []
    room = MAX_SERIES
    for file in files:
        try:
            draft = _read_file(file, pixels)
        except DicomError as error:
            skipped.append((file, str(error)))
            continue
        drafts.append(draft)
        room -= sum(image.size for image in draft.pixels)
        if room < 0:
            raise DicomError(f"series {folder}: holds more pixels than any of a spine; is it several series in one?")
    return drafts, skipped


def _instance_number(file: Path, dataset: Dataset) -> int:
    """The instance number of a file, or else the number that is its name."""
    number = whole(dataset, "InstanceNumber")
    if number is None and file.stem.isdecimal():
        number = int(file.stem)
    if number is None:
        raise DicomError("has no InstanceNumber, and its name is no number either: labels cannot name it")
    if abs(number) >= 2**31:
        raise DicomError(f"has InstanceNumber {number}, which no scanner gives")
    return number


def _frame(places: list[Dataset], shape: tuple[int, int]) -> _Frame:
    """Geometry of one frame, from its functional groups or the header; DicomError where it makes no sense."""
    position = _value(places, "ImagePositionPatient", 3)
    orientation = _value(places, "ImageOrientationPatient", 6)
    spacing = _value(places, "PixelSpacing", 2)
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
    return _Frame(position, orientation, spacing, shape)


def _value(places: list[Dataset], name: str, n: int) -> list[float] | None:
    """The n numbers of a tag; None where it is missing or empty, DicomError where it holds something else."""
    values = find(places, name, n)
    if values is None and text(places[-1], name):
        raise DicomError(f"has something else as {name} where {n} finite numbers are expected")
    return values


def _rescale(values: np.ndarray, places: list[Dataset]) -> np.ndarray:
    """Stored values as signal, in float32 where the header gives a slope or an intercept, and untouched otherwise."""
    slope, intercept = find(places, "RescaleSlope"), find(places, "RescaleIntercept")
    slope, intercept = (slope[0] or 1.0) if slope else 1.0, intercept[0] if intercept else 0.0
    if (slope, intercept) == (1.0, 0.0):
        return values
    if not 1e-9 < abs(slope) < 1e9 or abs(intercept) > 1e15:
        raise DicomError(f"has RescaleSlope {slope} and RescaleIntercept {intercept}, which cannot be meant")
    return values.astype(np.float32) * np.float32(slope) + np.float32(intercept)


def _repair(drafts: list[_Draft], skipped: list[Note]) -> tuple[list[_Draft], list[Note]]:
    """Give frames without orientation or spacing those of the series, where all its other frames agree on them.

    A spacing tells nothing of images of another size.
    """
    alike = len({f.shape for d in drafts for f in d.frames}) == 1
    common = {
        "ImageOrientationPatient": _common([f.orientation for d in drafts for f in d.frames], SAME_TILT),
        "PixelSpacing": _common([f.spacing for d in drafts for f in d.frames if alike], SAME_SPACING),
    }
    usable, repaired = [], []
    for draft in drafts:
        lacks = {"ImageOrientationPatient"} if any(f.orientation is None for f in draft.frames) else set()
        lacks |= {"PixelSpacing"} if any(f.spacing is None for f in draft.frames) else set()
        names = " and no ".join(sorted(lacks))
        if any(common[name] is None for name in lacks):
            skipped.append((draft.file, f"has no {names}, and the series has none on which all its images agree"))
            continue
        if lacks:
            repaired.append((draft.file, f"has no {names}: taken from the series' other images, which agree on it"))
            orientation, spacing = common.values()
            frames = [
                dataclasses.replace(f, orientation=f.orientation or orientation, spacing=f.spacing or spacing)
                for f in draft.frames
            ]
            draft = dataclasses.replace(draft, frames=frames)
        usable.append(draft)
    return usable, repaired


def _common(values: list[list[float] | None], tolerance: float) -> list[float] | None:
    """The value that all have who have one; None where none has, or they differ by more than the tolerance."""
    given = [value for value in values if value is not None]
    if not given or np.ptp(given, axis=0).max() > tolerance:
        return None
    return given[0]


def _without_duplicates(folder: Path, drafts: list[_Draft], skipped: list[Note]) -> list[_Draft]:
    """Leave out files that are the same image as an earlier one; DicomError where others have the same number."""
    several = any(len(draft.frames) > 1 for draft in drafts)  # their images are numbered anew
    first: dict[int, _Draft] = {}
    kept = []
    for draft in drafts:
        other = first.setdefault(draft.number, draft)
        if other is not draft and _same(other, draft):
            skipped.append((draft.file, f"is the same image as {other.file.name}"))
            continue
        if other is not draft and not several:
            names = f"{other.file.name} and {draft.file.name}"
            raise DicomError(f"series {folder}: {names} both have instance number {draft.number}")
        kept.append(draft)
    return kept


def _same(one: _Draft, other: _Draft) -> bool:
    """Whether two files hold the same images at the same place; without pixels, by the identifier of the image."""
    if one.frames != other.frames or len(one.pixels) != len(other.pixels):
        return False
    if not one.pixels:
        return one.uid == other.uid != ""
    return all(map(np.array_equal, one.pixels, other.pixels))


def _slices(drafts: list[_Draft]) -> list[Slice]:
    """The images of all files; numbered 1, 2, ... where a file has several frames. Blocks are not known yet."""
    several = any(len(draft.frames) > 1 for draft in drafts)
    slices = []
    for draft in drafts:
        for k, frame in enumerate(draft.frames):
            number = len(slices) + 1 if several else draft.number
            affine = _affine(frame.position, frame.orientation, frame.spacing)
            slices.append(Slice(draft.file, k, number, affine, frame.shape, 0))
    return slices


def _affine(position: list[float], orientation: list[float], spacing: list[float]) -> np.ndarray:
    """(4, 4) map of (column, row, mm along the normal, 1) to LPS mm (PS3.3, equation C.7.6.2.1-1).

    `orientation` is the direction of growing columns, then that of growing rows; `spacing` is the distance of rows,
    then that of columns.
    """
    affine = np.eye(4)
    affine[:3, :2] = np.reshape(orientation, (2, 3)).T * spacing[::-1]
    affine[:3, 2], affine[:3, 3] = geometry.normals(affine), position
    return affine


def _plane(slices: list[Slice]) -> str:
    """The anatomical plane of most slices."""
    planes = [geometry.plane_of(image.affine[:3, 2]) for image in slices]
    return max(ORDER, key=planes.count)


def _blocks(slices: list[Slice], direction: np.ndarray) -> list[list[int]]:
    """Indices of the slices of each block, sorted within the block and among blocks along a patient direction (3,)."""
    blocks = [part for members in _by_tilt(slices) for part in _by_gap(members, slices, direction)]
    return sorted(blocks, key=lambda part: np.mean([direction @ slices[i].centre for i in part]))


def _by_tilt(slices: list[Slice]) -> list[list[int]]:
    """Indices grouped by orientation: columns and rows of a group run in the same directions."""
    turns = np.array([image.affine[:3, :2] / image.spacing for image in slices])
    groups, left = [], np.arange(len(slices))
    while left.size:
        same = np.abs(turns[left] - turns[left[0]]).max(axis=(1, 2)) < SAME_TILT
        groups.append(left[same].tolist())
        left = left[~same]
    return groups


def _by_gap(members: list[int], slices: list[Slice], direction: np.ndarray) -> list[list[int]]:
    """Parallel slices in the order of their positions along `direction`, cut where a step is far above the usual.

    Of several images at one place (echoes, or a series scanned twice) the k-th by number goes to the k-th stack, so
    that neighbours in a block always lie apart.
    """
    normal = slices[members[0]].affine[:3, 2]
    normal = normal if normal @ direction >= 0 else -normal
    place = {i: float(normal @ slices[i].affine[:3, 3]) for i in members}
    stacks: list[list[int]] = []
    for group in _by_place(sorted(members, key=place.__getitem__), place):
        for k, i in enumerate(sorted(group, key=lambda i: slices[i].instance_number)):
            if k == len(stacks):
                stacks.append([])
            stacks[k].append(i)
    return [part for stack in stacks for part in _cut(stack, place)]


def _by_place(members: list[int], place: dict[int, float]) -> list[list[int]]:
    """Sorted slices, those together that lie less than SAME_PLACE after the first of them."""
    groups = [[members[0]]]
    for i in members[1:]:
        if place[i] - place[groups[-1][0]] < SAME_PLACE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _cut(stack: list[int], place: dict[int, float]) -> list[list[int]]:
    """A sorted stack, cut at steps of more than GAP usual ones."""
    if len(stack) < 2:
        return [stack]
    steps = np.diff([place[i] for i in stack])
    cuts = np.flatnonzero(steps > GAP * np.median(steps)) + 1
    return [part.tolist() for part in np.split(np.array(stack), cuts)]
