"""Studies found in a folder of DICOM files that no table describes: grouped, told apart, their series types told.

Files are grouped by StudyInstanceUID, then by SeriesInstanceUID, then by folder where these lie; in the competition's
layout by the numbers of the folders. The type of a series follows from the normal of its images and from its contrast:
echo, repetition and inversion time, else the words of its description, else the image. What is no sagittal T1,
sagittal T2/STIR or axial T2 is passed over, with the reason as a finding.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from lsdc_utils import dicom, geometry
from lsdc_utils import vocabulary as words
from lsdc_utils.dicom.headers import DicomError, Tags, read_tags
from lsdc_utils.files import readable
from lsdc_utils.parallel import each

SUFFIXES = (".dcm", ".dicom", ".ima")  # of files that claim to be DICOM
PROGRESS = 5000  # files between two lines of progress
FEW_FILES = 2000  # so many headers are read sooner than processes start
STACK = 5  # images; fewer of a plane beside another plane are a localiser's

# Reasons to pass an image over, by words of its description (lower case, blanks between words) ...
DESCRIBED = {
    "localiser": r"\b(loc|locali[sz]er\w*|scouts?|aahscout|survey|planning|pilot|3 ?pl|3 ?planes?|three planes?)\b",
    "diffusion": r"\b(dwi|diff|diffusion|adc|tracew?|dti|b ?\d{3,4})\b",
    "projection or reformat": r"\b(mip|minip|mpr|reformat\w*|proj\w*|curved)\b",
    "myelogram": r"\bmyelo\w*",
    "subtraction": r"\b(sub|subtr\w*)\b",
    "angiography": r"\b(mra|mrv|tof|angio\w*)\b",
    "calibration": r"\b(calib\w*|cal|asset|shim\w*|b1 ?map|field ?map)\b",
    "perfusion or susceptibility": r"\b(swi|perf\w*|dce|dsc|asl)\b",
    "T2*": r"t2\*|t2 ?star|\b(medic|merge|m ?ffe)\b",
    "other part of the spine": r"^(?!.*(lumb|\bls\b|\bl ?sp|lws|\bl5)).*\b(cervical|thoracic|[ct] ?spine|hws|bws)\b",
}
# ... and by words of its image type.
TYPED = {
    "localiser": {"LOCALIZER"},
    "projection or reformat": {"MPR", "CSA MPR", "MIP", "MINIP", "PROJECTION IMAGE", "REFORMATTED", "CPR", "VOLREN"},
    "subtraction": {"SUBTRACTION", "SUB", "SUBTRACT"},
    "diffusion": {"ADC", "TRACEW", "DIFFUSION", "FA", "EADC"},
    "phase image": {"P", "PHASE", "PHASE MAP"},
    "fat image": {"FAT", "F"},
    "screen capture": {"SCREEN SAVE", "SCREENSAVE"},
}
T1_WORDS = r"t1(?!\d)|\bt 1 ?w"
T2_WORDS = r"t2(?!\d)|\bt 2 ?w|stir|tirm|spair"


@dataclass
class Found:
    """What `find` finds. Findings have the columns of `competition.FINDINGS`; an id that is not known is None."""

    series: list[dict[str, Any]] = field(default_factory=list)  # study_id, series_id, series_type, split
    files: dict[tuple[int, int], tuple[Path, ...]] = field(default_factory=dict)  # of series without their own folder
    findings: list[tuple[int | None, int | None, str, str, str]] = field(default_factory=list)


@dataclass
class _Series:
    """Images that belong together: one series, or the part of one that is to be read on its own."""

    split: str
    study: tuple[str, ...]  # what tells its study from others
    series: str  # what tells it from others of the study
    images: list[Tags]
    study_id: int = 0
    series_id: int = 0
    kind: str | None = None  # T1 or T2 of vocabulary's series types, whatever the plane
    reason: str = ""  # why it is passed over
    notes: list[tuple[str, str, str]] = field(default_factory=list)  # rule, value, action


@dataclass
class _Folder:
    """What lies in one folder besides images that can be used."""

    n_files: int = 0
    foreign: list[Path] = field(default_factory=list)  # no DICOM files
    broken: list[tuple[Path, str]] = field(default_factory=list)  # DICOM files that cannot be read, with the reason


def find(root: str | Path, places: Sequence[tuple[str, Path]] = (), workers: int = 1) -> Found:
    """Look for studies in `places`, each a split and a folder under `root`; without them in `root`, split test.

    A place may be <root>/<split>_images or what is in it: there, a series in <study>/<series>/, both numbers, has these
    as ids. Elsewhere an id is the UID where it is a bare number (that of a series may follow its study's and a dot, as
    in the competition's files), else 48 bits of its hash: no UID comes into a table. Every header is read once, by
    `workers` processes.
    """
    root = Path(root)
    images: list[tuple[str, Tags]] = []
    folders: dict[Path, _Folder] = defaultdict(_Folder)
    closed: list[OSError] = []
    listed = [(split, file) for split, place in places or [("test", root)] for file in _walk(place, closed)]
    answers = each(_look, [file for _, file in listed], workers, FEW_FILES, chunk=64)
    for n, ((split, file), answer) in enumerate(zip(listed, answers, strict=True), 1):
        folder = folders[file.parent]
        folder.n_files += 1
        if isinstance(answer, Tags):
            images.append((split, answer))
        elif answer:
            folder.broken.append((file, answer))
        else:
            folder.foreign.append(file)
        if n % PROGRESS == 0:
            print(f"{n} of {len(listed)} files looked at", flush=True)
    found = Found()
    for error in closed:
        value = f"{_name(root, Path(error.filename))}: cannot be opened ({error.strerror})"
        found.findings.append((None, None, "files_passed_over", value, "passed over"))
    series = [part for group in _group(root, images) for part in _split(group, root)]
    _tell_types(series, workers)
    _number(series)
    _collect(root, series, folders, found)
    _tell_rest(root, series, folders, found)
    return found


# ---- files ---------------------------------------------------------------------------------------------------------


def _walk(top: Path, closed: list[OSError]) -> Iterator[Path]:
    """Files at any depth in a fixed order, hidden ones and DICOMDIRs left out; links are followed, but never twice.

    Folders that cannot be opened are added to `closed`.
    """
    seen = set()
    for folder, inner, names in os.walk(top, followlinks=True, onerror=closed.append):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names, key=lambda name: (len(name), name)):
            if not name.startswith(".") and name.upper() != "DICOMDIR":
                yield Path(folder, name)


def _look(file: Path) -> Tags | str:
    """The header of a file; a reason in words where it is a DICOM file that cannot be read, '' where it is none."""
    claims = file.suffix.lower() in SUFFIXES
    try:
        tags = read_tags(file)
    except DicomError as error:
        foreign = str(error) in ("is not a DICOM file", "is empty", "is no file")
        return "" if foreign and not claims else str(error)
    if tags.study_uid or tags.series_uid or tags.rows:
        return tags
    return "has an empty header" if claims else ""  # may start like a DICOM file by chance


# ---- which images belong together ----------------------------------------------------------------------------------


def _group(root: Path, images: list[tuple[str, Tags]]) -> list[_Series]:
    """Images by study and series, in a fixed order."""
    patients = defaultdict(set)
    contents = defaultdict(set)
    for _, tags in images:
        if tags.patient:
            patients[tags.study_uid].add(tags.patient)
        contents[tags.file.parent].add((tags.series_uid, tags.description, _plane(tags)))
    groups: dict[tuple[str, tuple[str, ...], str], list[Tags]] = defaultdict(list)
    for split, tags in images:
        inside = _inside(root / f"{split}_images", tags.file)
        if len(inside) == 3 and all(part.isdecimal() and int(part) < 2**63 for part in inside[:2]):
            study, series = ("folder", inside[0]), inside[1]
        else:
            folder = tags.file.parent
            if not tags.study_uid:  # the folder of a study holds several series, or a folder for each
                lone = len(contents[folder]) == 1 and folder != root and folder.parent != root
                study = ("", str((folder.parent if lone else folder).relative_to(root)))
            elif len(patients[tags.study_uid]) > 1:
                study = ("uid", tags.study_uid, tags.patient)
            else:
                study = ("uid", tags.study_uid)
            series = tags.series_uid or f"{folder.relative_to(root)} {tags.description} {_plane(tags)}"
        groups[split, study, series].append(tags)
    return [_Series(*key, groups[key]) for key in sorted(groups)]


def _inside(base: Path, file: Path) -> tuple[str, ...]:
    return file.relative_to(base).parts if file.is_relative_to(base) else ()


def _split(group: _Series, root: Path) -> list[_Series]:
    """The parts of a series that are to be read on their own: what is passed over, echoes, planes, repeated numbers."""

    def part(images: list[Tags], reason: str = "") -> _Series:
        """Some images of the group as a series of their own."""
        return _Series(group.split, group.study, group.series, images, reason=reason)

    reasons = defaultdict(list)
    distinct = _distinct(group.images)
    for tags in distinct:
        reasons[_why_not(tags)].append(tags)
    parts = [part(images, reason) for reason, images in sorted(reasons.items()) if reason]
    for images in _by_content(reasons[""]) if reasons[""] else ():
        several = [part(some) for some in _by_number(images)]
        if numbers := len(several) > 1 and _repeats(images):
            names = [_name(root, tags.file) for tags in images if _instance(tags) == numbers[0]]
            value = f"{len(numbers)} numbers, e.g. {numbers[0]}: {' and '.join(names[:2])}"
            several[0].notes.append(("instance_number_repeated", value, f"read as {len(several)} series"))
        parts += several
    if copies := len(group.images) - len(distinct):
        kept = {tags.file for tags in distinct}
        name = next(_name(root, tags.file) for tags in group.images if tags.file not in kept)
        parts[0].notes.append(("file_repeated", f"{copies} copies of images, e.g. {name}", "used once"))
    return parts


def _distinct(images: list[Tags]) -> list[Tags]:
    """The images without copies: those with the identity and the geometry of an earlier one."""
    kept: dict[tuple, Tags] = {}
    for tags in images:
        place = tags.position, tags.orientation, tags.rows, tags.columns, tags.frames
        scan = tags.description, tags.echo_time, tags.repetition_time  # identities collide in the wild
        kept.setdefault((tags.sop_uid or str(tags.file), tags.instance_number, place, scan), tags)
    return list(kept.values())


def _by_content(images: list[Tags]) -> list[list[Tags]]:
    """Images by description, by echo where there are two, and by plane where there is a stack of each."""
    times = [tags.echo_time for tags in images if tags.echo_time]
    echoes = len(times) == len(images) and max(times) > 1.5 * min(times)
    planes = Counter(map(_plane, images))
    stacks = min(planes.values()) >= STACK and "sagittal" in planes  # a tilted axial block may be nearest to coronal
    parts = defaultdict(list)
    for tags in images:
        key = tags.description, tags.echo_time if echoes else 0.0, _plane(tags) if stacks else ""
        parts[key].append(tags)
    return [parts[key] for key in sorted(parts)]


def _by_number(images: list[Tags]) -> list[list[Tags]]:
    """Images in parts in which no instance number comes twice: the folders, where that is enough, else the k-th of a
    number goes to the k-th part. Frames of multi-frame files have no numbers of their own."""
    if any(tags.frames > 1 for tags in images) or not _repeats(images):
        return [images]
    folders = defaultdict(list)
    for tags in images:
        folders[tags.file.parent].append(tags)
    parts = []
    for folder in folders.values():
        times: Counter[int | None] = Counter()
        turns = defaultdict(list)
        for tags in sorted(folder, key=lambda tags: tags.acquisition_number or 0):
            number = _instance(tags)
            turns[times[number] if number is not None else 0].append(tags)
            times[number] += 1
        parts += turns.values()
    return parts


def _instance(tags: Tags) -> int | None:
    """The instance number that the reader will give an image: its own, or the one that its file is named by."""
    stem = tags.file.stem
    return tags.instance_number if tags.instance_number is not None else int(stem) if stem.isdecimal() else None


def _repeats(images: list[Tags]) -> list[int]:
    """Instance numbers that more than one image has."""
    return sorted(n for n, times in Counter(map(_instance, images)).items() if n is not None and times > 1)


# ---- what a series is ----------------------------------------------------------------------------------------------


SHORT = {words.T1: "T1", words.T2: "T2"}


def _plane(tags: Tags) -> str:
    """sagittal, coronal or axial, by the patient's axis nearest to the normal; empty where the header is silent."""
    if tags.orientation is None:
        return ""
    return geometry.plane_of(np.cross(tags.orientation[:3], tags.orientation[3:]))


def _described(tags: Tags) -> str:
    return re.sub(r"[^a-z0-9*]+", " ", tags.description.lower()).strip()


def _why_not(tags: Tags) -> str:
    """Why an image is none to grade, as its own header says it; empty where it says nothing against it."""
    if tags.modality not in ("", "MR"):
        return "modality other than MR"
    if not tags.rows and not tags.has_pixels:
        return "no images"
    for reason, marks in TYPED.items():
        if marks.intersection(tags.image_type[2:] or ()) or ("LOCALIZER" in tags.image_type and reason == "localiser"):
            return reason
    text = _described(tags)
    return next((reason for reason, pattern in DESCRIBED.items() if re.search(pattern, text)), "")


def _gradient_echo(tags: Tags) -> bool:
    return bool({"GR", "GRADIENT"} & {*tags.sequence}) and "SE" not in tags.sequence  # GRADIENT: of enhanced images


def _by_times(tags: Tags) -> str | None:
    """T1 or T2 where echo, repetition and inversion time (ms) leave no doubt; the limits are those of spin echoes."""
    echo, repetition, inversion = tags.echo_time, tags.repetition_time, tags.inversion_time
    if _gradient_echo(tags):
        return None
    if inversion and 80 <= inversion <= 300:  # nulls fat: STIR
        return words.T2
    if inversion and inversion >= 400 and echo and echo < 40 and inversion < 1500:  # a T1 FLAIR
        return words.T1
    if echo and echo >= 60 and not (repetition and repetition < 1200):
        return words.T2
    if echo and echo < 40 and repetition and repetition < 1200:
        return words.T1
    return None


def named_contrast(tags: Tags) -> str | None:
    """T1 or T2 where the description, or the contrast of an enhanced image, names one of them."""
    text = " ".join([_described(tags), *(word.lower() for word in tags.sequence if word in ("T1", "T2", "STIR"))])
    named = [kind for kind, pattern in ((words.T1, T1_WORDS), (words.T2, T2_WORDS)) if re.search(pattern, text)]
    return named[0] if len(named) == 1 else None


def _tell_types(series: list[_Series], workers: int) -> None:
    """Set kind, or the reason to pass over, of each series, by its header, else by the image."""
    silent = []
    for one in series:
        if one.reason:
            continue
        first = one.images[0]
        planes = Counter(_plane(tags) for tags in one.images if tags.orientation)
        if not planes:
            one.reason = "no orientation in any header"
        elif len(planes) > 1 and "sagittal" in planes and min(planes.values()) < STACK:
            one.reason = "few images in several planes, as of a localiser"
        elif planes.most_common(1)[0][0] == "coronal":
            one.reason = "coronal"
        else:
            told, named = _by_times(first), named_contrast(first)
            one.kind = told or named
            if told and named and told != named:
                one.notes.append(
                    ("contrast_differs", f"{SHORT[told]} by its times, described as {SHORT[named]}", "times trusted")
                )
            if one.kind is None:
                one.reason = _unclear(first)
                silent += [] if one.reason else [one]
    sources = [tuple(tags.file for tags in one.images) for one in silent]
    for one, kind in zip(silent, each(contrast, sources, workers, workers + 1), strict=True):
        one.kind = kind
        one.reason = "" if kind else "neither header nor image tells T1 from T2"
    for one in series:
        if one.kind == words.T1 and _plane_of(one) == "axial":
            one.reason = "axial T1"


def _plane_of(one: _Series) -> str:
    return Counter(_plane(tags) for tags in one.images if tags.orientation).most_common(1)[0][0]


def _unclear(tags: Tags) -> str:
    """Why a header that names neither T1 nor T2 is not to be decided by the image; empty where it is."""
    if _gradient_echo(tags):
        return "gradient echo that names neither T1 nor T2"
    proton = re.search(r"\b(pd|pdw|proton)\b", _described(tags))
    short = tags.echo_time and tags.echo_time < 60 and (tags.repetition_time or 0) >= 1500
    return "proton density" if proton or (short and "IR" not in tags.sequence and not tags.inversion_time) else ""


# ---- contrast from the image ---------------------------------------------------------------------------------------

GRID = 2.0  # mm between the points at which images are compared
BESIDE = 16.0  # mm to either side of the canal: facets, pedicles, foramina
MIDLINE = 9.0  # mm about the middle of the images in which the canal is looked for
WIDEST = 1000.0  # mm of an image; on the grid of points a wider one could fill the memory
NOISE = 0.05  # of the brightest tissue: what is not much brighter is air
# How bright the canal must stand out at most for T1, at least for T2 (`_brightness`). 38 rendered phantoms of each kind
# gave -.31 to .66 and 1.02 to 2.1 (STIR 2.6 and more) on sagittal series, a real sagittal T2 2.1. Axial ones
# overlap: T2 .55 to 2.1, T1 -.63 to .54 but for one of 1.13, a narrow canal; there a doubt passes the series over.
SEEN = 0.2  # of the dark path on T1, where 22 rendered phantoms gave .38 and more
SURE = {"sagittal": (0.70, 0.95), "axial": (0.30, 0.80)}


def contrast(files: Sequence[Path]) -> str | None:
    """T1 or T2 by the images of a series, sagittal or axial; None where they leave a doubt or cannot be read.

    The spinal fluid is bright on T2 and STIR and dark on T1, against what lies beside it at the same height and depth:
    fat under the skin, muscle and the fall of a coil's sensitivity from back to front are alike there and cancel.
    """
    try:
        series = dicom.read_series(files)
        if max(max(np.multiply(image.spacing, image.shape[::-1])) for image in series.slices) > WIDEST:
            return None
        planes, places, reach = _upright(series)
    except (DicomError, ValueError):
        return None
    if series.plane not in SURE or min(planes.shape) == 0 or np.ptp(places) < 2 * BESIDE:
        return None
    below, above = SURE[series.plane]
    found, dark = _brightness(planes, places, reach)
    return words.T2 if found >= above else words.T1 if found <= below and dark >= SEEN else None


def _brightness(planes: np.ndarray, places: np.ndarray, reach: int) -> tuple[float, float]:
    """How much brighter than its sides the brightest path down the spine is, against how much darker the darkest.

    A sum of mean log-ratios: to the brighter side (darker side, for the dark path) and to the mean of both. Takes what
    `_upright` gives. Returns also how dark the darkest is, which images of nothing do not show.
    NaN both where no plane lies near the middle.
    """
    noise = max(NOISE * float(np.percentile(planes, 98)), 1e-6)
    paths = []
    for k in np.flatnonzero(np.abs(places - (places.min() + places.max()) / 2) <= MIDLINE):
        beside = np.stack([planes[np.argmin(np.abs(places - places[k] - side))] for side in (-BESIDE, BESIDE)])
        tissue = beside.min(axis=0) > 1.5 * noise
        canal, low, mean, high = (
            np.log(values + noise)
            for values in (planes[k], beside.min(axis=0), beside.mean(axis=0), beside.max(axis=0))
        )
        ratios = canal - high, low - canal, canal - mean, mean - canal
        paths.append([_best_path(np.where(tissue, np.clip(ratio, -1, 1.5), -0.3), reach) for ratio in ratios])
    if not paths:
        return np.nan, np.nan
    best = np.max(paths, axis=0)
    return float(np.dot((3, -2, 1, -1), best)), float(best[1])


def _upright(series: dicom.Series) -> tuple[np.ndarray, np.ndarray, int]:
    """A series as sagittal planes (n, rows from head to foot, columns from front to back or the reverse), smoothed.

    Also the places (n,) of the planes in mm across the patient, and by how many columns a path may move from one row to
    the next: rows are GRID apart in a sagittal series, and a slice each in an axial one.
    """
    sagittal = series.plane == "sagittal"
    images = []
    for pixels, image in zip(series.pixels or (), series.slices, strict=True):
        across, down = np.array(image.spacing) / GRID
        coarse = ndimage.gaussian_filter(pixels.astype(np.float32), (0.4 / down, 0.4 / across))
        coarse = ndimage.zoom(coarse, (down, across), order=1)
        upright = abs(image.affine[1 if sagittal else 0, 0]) > abs(image.affine[1 if sagittal else 0, 1])
        images.append(coarse if upright else coarse.T)
    rows, columns = np.min([image.shape for image in images], axis=0)
    planes = np.stack([image[:rows, :columns] for image in images])
    if sagittal:
        planes = planes[:, int(0.15 * rows) : int(0.85 * rows)]  # head and foot end are dim
        return (
            ndimage.gaussian_filter(planes, (0, 5 / GRID, 3 / GRID)),
            np.array([image.centre[0] for image in series.slices]),
            1,
        )
    planes = ndimage.gaussian_filter(planes, (0.6, 3 / GRID, 4 / GRID)).transpose(2, 0, 1)
    return planes, (np.arange(columns) - columns / 2) * GRID, 3


def _best_path(values: np.ndarray, reach: int) -> float:
    """Mean of `values` (rows, columns) along the best path from the first row to the last, `reach` columns a row."""
    best = values[0]
    for row in values[1:]:
        best = ndimage.maximum_filter1d(best, 2 * reach + 1, mode="constant", cval=-np.inf) + row
    return float(best.max()) / len(values)


# ---- numbers and findings ------------------------------------------------------------------------------------------


def _bare(uid: str) -> int | None:
    """A UID that is a plain number which fits a table's column."""
    return int(uid) if uid.isascii() and uid.isdecimal() and not uid.startswith("0") and int(uid) < 2**63 else None


def _hashed(*told: object) -> int:
    """A number of 48 bits: two of 10,000 studies collide with a probability of less than one in a million."""
    return int.from_bytes(hashlib.blake2b("\0".join(map(str, told)).encode(errors="replace"), digest_size=6).digest())


def _number(series: list[_Series]) -> None:
    """Give studies and series their ids; where two claim one, the first in order has it and the other a hash."""
    studies: dict[tuple[str, tuple[str, ...]], int] = {}
    taken: set[int] = set()
    for one in series:
        key = (one.split, one.study)
        if key not in studies:
            wish = _bare(one.study[1]) if one.study[0] else None
            if one.study[0] == "folder":
                wish = int(one.study[1])
            tries = [wish] if wish is not None else []
            tries += [_hashed(*one.study), *(_hashed(*one.study, one.split, k) for k in range(9))]
            free = tries[0] if one.study[0] == "folder" else next(number for number in tries if number not in taken)
            studies[key] = free
            taken.add(free)
        one.study_id = studies[key]
    given: set[tuple[int, int]] = set()
    # Parts that are used come first, so that what is passed over takes no id from them.
    for one in sorted(series, key=lambda one: bool(one.reason)):
        wish = int(one.series) if one.study[0] == "folder" else _bare(one.series)
        if wish is None and one.study[0] == "uid":
            wish = _bare(one.series.removeprefix(f"{one.study[1]}."))
        tries = [wish] if wish is not None else []
        tries += [_hashed(*one.study, one.series), *(_hashed(*one.study, one.series, k) for k in range(999))]
        one.series_id = next(number for number in tries if (one.study_id, number) not in given)
        given.add((one.study_id, one.series_id))


def _name(root: Path, file: Path) -> str:
    """A file or folder as findings call it."""
    return readable(file.relative_to(root))


def _collect(root: Path, series: list[_Series], folders: dict[Path, _Folder], found: Found) -> None:
    """Add series, their files, and what was found about them."""
    for one in series:
        ids = one.study_id, one.series_id
        found.findings += [(*ids, *note) for note in one.notes]
        files = tuple(tags.file for tags in one.images)
        if one.reason:
            value = f"{_name(root, files[0])}: {len(files)} file{'s' * (len(files) > 1)}, {one.reason}"
            found.findings.append((*ids, "series_passed_over", value, "passed over"))
            continue
        kind = words.AXIAL if _plane_of(one) == "axial" else one.kind
        found.series.append({"study_id": ids[0], "series_id": ids[1], "series_type": kind, "split": one.split})
        own = root / f"{one.split}_images" / str(ids[0]) / str(ids[1])
        if {file.parent for file in files} != {own} or folders[own].n_files != len(files):
            found.files[ids] = files


def _tell_rest(root: Path, series: list[_Series], folders: dict[Path, _Folder], found: Found) -> None:
    """Findings about files that are no images, and studies that are told apart or have nothing to grade."""
    owners = defaultdict(set)
    for one in series:
        for tags in one.images:
            owners[tags.file.parent].add((one.study_id, one.series_id))
    for place, folder in folders.items():
        owner = owners[place]
        study = next(iter(owner))[0] if len({ids[0] for ids in owner}) == 1 else None
        rest = folder.foreign + ([] if owner else [file for file, _ in folder.broken])
        if rest:
            value = f"{len(rest)} of {folder.n_files} files are no DICOM images, e.g. {_name(root, rest[0])}"
            found.findings.append((study, None, "files_passed_over", value, "passed over"))
        for file, reason in folder.broken if owner else ():
            lone = next(iter(owner))[1] if len(owner) == 1 else None
            found.findings.append((study, lone, "file_unusable", f"{_name(root, file)}: {reason}", "file left out"))
    used = {one.study_id for one in series if not one.reason}
    for study_id, study in sorted({(one.study_id, one.study) for one in series}):
        if study_id not in used:
            found.findings.append((study_id, None, "study_without_series", "no series can be graded", "study left out"))
        if len(study) == 3:
            value = "several patients have its StudyInstanceUID"
            found.findings.append((study_id, None, "study_uid_shared", value, "told apart by patient"))
