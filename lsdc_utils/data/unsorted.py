"""Studies in a folder of DICOM files that no table describes: files grouped into series, each with its type. They are
grouped by StudyInstanceUID, SeriesInstanceUID and folder; in the competition's layout by its folders. A series that is
not sagittal T1, sagittal T2/STIR or axial T2 by its headers is skipped, and a finding gives the reason."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from lsdc_utils import vocabulary as words
from lsdc_utils.data.parts import contrast_in, divide, far_from_others, files_of, middle_height
from lsdc_utils.data.series_types import SHORT, UNKNOWN_CONTRAST, named_contrast, plane_of, regions
from lsdc_utils.data.tables import number_of
from lsdc_utils.dicom import DicomError, Frames, NotDicomError, Tags, read_all_tags
from lsdc_utils.files import readable
from lsdc_utils.parallel import each

SUFFIXES = (".dcm", ".dicom", ".ima")  # a file with one of these names should be DICOM
FEW_FILES = 2000  # below this, starting processes takes longer than reading
TO_USE_IT = (  # for a series of unknown contrast
    "skipped; to use it, name T1 or T2 in SeriesDescription, or list it in {split}_series_descriptions.csv "
    "(competition layout)"
)


@dataclass
class Discovered:
    """What `find` returns; files as in `Competition`, findings with the columns FINDINGS, None for an unknown id."""

    series: list[dict[str, Any]] = field(default_factory=list)  # study_id, series_id, series_type, split
    files: dict[tuple[int, int], tuple[Path | Frames, ...]] = field(default_factory=dict)
    findings: list[tuple[int | None, int | None, str, str, str]] = field(default_factory=list)


@dataclass
class _Series:
    """Images or frames that belong together: a whole series, or the part of one that is read on its own."""

    split: str
    study: tuple[str, ...]  # ("folder", number), ("uid", UID), ("uid", UID, patient) or ("", folder)
    series: str  # unique in the study
    images: list[Tags]
    reason: str = ""  # why it is skipped
    series_type: str | None = None
    study_id: int = 0
    series_id: int = 0
    findings: list[tuple[str, str, str]] = field(default_factory=list)  # rule, value, action


def find(
    root: str | Path, places: Sequence[tuple[str, Path]] = (), workers: int = 1, names: Collection[int] = ()
) -> Discovered:
    """Look for studies in `places` (split, folder under `root`); by default in `root`, as test studies but for `names`.

    names: ids in tables, see `number_of`. In <root>/<split>_images folders <study>/<series>/ are the ids if they are
    plain numbers or in `names`, and each folder there or in `root` that is in `names`, with images of one patient, is a
    study. Otherwise an id is the UID's number (a series UID may begin with its study's and a dot) or hash.
    """
    root, result, unopened = Path(root), Discovered(), []
    files = [(split, file) for split, place in places or [("test", root)] for file in walk(place, unopened)]
    for error in unopened:
        value = f"{_name(root, Path(error.filename))}: cannot be opened ({error.strerror})"
        result.findings.append((None, None, "files_skipped", value, "skipped"))
    images, others = [], defaultdict(list)  # headers with their split; folder -> files, why unusable ('': not DICOM)
    headers = each(_read_header, [file for _, file in files], workers, FEW_FILES, chunk=64)
    for n, ((split, file), header) in enumerate(zip(files, headers, strict=True), 1):
        if isinstance(header, list):
            images += [(split, tags) for tags in header]
        else:
            others[file.parent].append((file, header))
        if n % 5000 == 0:
            print(f"{n} of {len(files)} headers read", flush=True)
    counts = Counter(file.parent for _, file in files)
    series = [part for group in _group(root, images, names) for part in _split(group, root)]
    for part in series:
        if not part.reason:
            _set_type(part)
    _leave_out_far(series)
    _set_ids(series)
    for part in series:
        part.split = "train" if not places and part.study_id in names else part.split
    _collect(root, series, others, counts, result)
    return result


def walk(top: Path, unopened: list[OSError]) -> Iterator[Path]:
    """Files at any depth in a fixed order, not hidden ones and DICOMDIRs; folders that do not open go to `unopened`."""
    seen = set()
    for folder, inner, names in os.walk(top, followlinks=True, onerror=unopened.append):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            inner.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        for name in sorted(names, key=lambda name: (len(name), name)):
            if not name.startswith(".") and name.upper() != "DICOMDIR":
                yield Path(folder, name)


def _read_header(file: Path) -> list[Tags] | str:
    """The headers of a file's images; the reason if it is DICOM but cannot be read, '' if it is not DICOM."""
    named_dicom = file.suffix.lower() in SUFFIXES
    try:
        images = read_all_tags(file)
    except DicomError as error:
        return str(error) if named_dicom or not isinstance(error, NotDicomError) else ""
    if images[0].study_uid or images[0].series_uid or images[0].rows:
        return images
    return "has an empty header" if named_dicom else ""  # any file may start like a DICOM file by chance


def _group(root: Path, images: list[tuple[str, Tags]], names: Collection[int]) -> list[_Series]:
    """Images by study and series, in a fixed order."""
    patients, contents = defaultdict(set), defaultdict(set)
    for split, tags in images:
        if tags.patient:
            patients[tags.study_uid].add(tags.patient)
            patients[_place(root, split, tags)[:1]].add(tags.patient)
        contents[tags.file.parent].add((tags.series_uid, tags.description, plane_of(tags)))
    groups: dict[tuple[str, tuple[str, ...], str], list[Tags]] = defaultdict(list)
    for split, tags in images:
        folder, place = tags.file.parent, _place(root, split, tags)
        inside = folder.is_relative_to(root / f"{split}_images")
        ids = [part for part in place if (n := number_of(part)) in names or (inside and str(n) == part)]
        if inside and len(place) == len(ids) == 2:
            groups[split, ("folder", place[0]), place[1]].append(tags)
            continue
        if place and number_of(place[0]) in names and len(patients[place[:1]]) < 2:
            study = ("folder", place[0])
        elif not tags.study_uid:  # a study's folder holds either several series or a folder for each
            alone = len(contents[folder]) == 1 and folder != root and folder.parent != root
            study = ("", str((folder.parent if alone else folder).relative_to(root)))
        elif len(patients[tags.study_uid]) > 1:
            study = ("uid", tags.study_uid, tags.patient)
        else:
            study = ("uid", tags.study_uid)
        series = tags.series_uid or f"{folder.relative_to(root)} {tags.description} {plane_of(tags)}"
        groups[split, study, series].append(tags)
    return [_Series(*key, groups[key]) for key in sorted(groups)]


def _place(root: Path, split: str, tags: Tags) -> tuple[str, ...]:
    """The names of the folders of an image below <root>/<split>_images, or below `root`."""
    folder, base = tags.file.parent, root / f"{split}_images"
    return folder.relative_to(base if folder.is_relative_to(base) else root).parts


def _split(group: _Series, root: Path) -> list[_Series]:
    """The parts of a series that are read on their own: skipped images, echoes, planes, repeated instance numbers."""
    part = partial(_Series, group.split, group.study, group.series)
    distinct: dict[tuple, Tags] = {}  # without copies, which have the identity and the geometry of an earlier image
    for tags in group.images:
        place = tags.position, tags.orientation, tags.rows, tags.columns, tags.frames, tags.frame
        scan = tags.description, tags.echo_time, tags.repetition_time, tags.image_type  # real SOPInstanceUIDs collide
        distinct.setdefault((tags.sop_uid or str(tags.file), tags.instance_number, place, scan), tags)
    divided = divide(list(distinct.values()))
    parts = [part(images, reason) for images, reason in divided if reason]
    for images in [images for images, reason in divided if not reason]:
        numbers = sorted(n for n, times in Counter(map(_instance, images)).items() if n is not None and times > 1)
        single = all(tags.frames == 1 for tags in images)  # frames have no numbers of their own
        single &= len({*map(_instance, images)}) > 1  # one number for all tells nothing
        several = [part(some) for some in (_by_number(images) if numbers and single else [images])]
        if len(several) > 1:
            names = [_name(root, tags.file) for tags in images if _instance(tags) == numbers[0]]
            value = f"{len(numbers)} numbers, e.g. {numbers[0]}: {' and '.join(names[:2])}"
            several[0].findings.append(("instance_number_repeated", value, f"read as {len(several)} series"))
        parts += several
    if n_copies := len(group.images) - len(distinct):
        kept = {tags.file for tags in distinct.values()}
        name = next(_name(root, tags.file) for tags in group.images if tags.file not in kept)
        parts[0].findings.append(("file_repeated", f"{n_copies} copies of images, e.g. {name}", "used once"))
    return parts


def _by_number(images: list[Tags]) -> list[list[Tags]]:
    """Images by folder, then the k-th image of an instance number in the k-th part."""
    parts = defaultdict(list)
    times: Counter[tuple[Path, int | None]] = Counter()
    for tags in sorted(images, key=lambda tags: tags.acquisition_number or 0):
        folder, number = tags.file.parent, _instance(tags)
        parts[folder, times[folder, number] if number is not None else 0].append(tags)
        times[folder, number] += 1
    return [parts[key] for key in sorted(parts)]


def _instance(tags: Tags) -> int | None:
    """The instance number that `dicom.read_series` gives an image: its own, otherwise the number in its file's name."""
    stem = tags.file.stem
    return tags.instance_number if tags.instance_number is not None else int(stem) if stem.isdecimal() else None


def _set_type(part: _Series) -> None:
    planes = Counter(plane_of(tags) for tags in part.images if tags.orientation)
    plane = planes.most_common(1)[0][0] if planes else ""
    contrast, unknown = contrast_in(part.images)
    if not planes:
        part.reason = "no orientation in any header"
    elif plane == "coronal":
        part.reason = "coronal"
    elif plane == "axial" and contrast == words.T1:
        part.reason = "axial T1"
    elif contrast is None:
        part.reason = unknown
    else:
        part.series_type = words.AXIAL if plane == "axial" else contrast
        if (named := named_contrast(part.images[0])) not in (None, contrast):
            value = f"{SHORT[contrast]} by its times, described as {SHORT[named]}"
            part.findings.append(("contrast_differs", value, "typed by its times"))
        if len(named := regions(part.images[0])) > 1:
            value = f"names several parts of the body: {', '.join(named)}"
            part.findings.append(("region_unclear", value, "used as a lumbar series"))


def _leave_out_far(series: list[_Series]) -> None:
    """Skip series whose middle lies far from that of most other usable series of their study."""
    heights: dict[tuple, dict[int, float]] = defaultdict(dict)
    for n, part in enumerate(series):
        if not part.reason and (height := middle_height(part.images)) is not None:
            heights[part.split, part.study][n] = height
    for study in heights.values():
        for n, distance in far_from_others(study).items():
            place = "above" if distance > 0 else "below"
            series[n].reason = f"its middle lies {abs(distance):.0f} mm {place} that of the study's other series"


def _free_id(wish: int | None, names: tuple[str, ...], taken: set[int]) -> int:
    """`wish` if it is given and free, otherwise a 48-bit hash of `names`; added to `taken`."""
    number, tries = wish, 0
    while number is None or number in taken:
        text = "\0".join((*names, str(tries)) if tries else names)
        number = int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=6).digest())
        tries += 1
    taken.add(number)
    return number


def _set_ids(series: list[_Series]) -> None:
    """Set study_id and series_id. If two claim one id, the first in order keeps it and the other gets a hash."""
    studies: dict[tuple[str, tuple[str, ...]], int] = {}
    taken: dict[int | None, set[int]] = defaultdict(set)  # ids of studies (None), and of each study's series
    for part in series:
        kind, name = part.study[:2]
        key = part.split, part.study
        if key not in studies:
            wish = number_of(name) if kind else None
            studies[key] = wish if kind == "folder" else _free_id(wish, part.study, taken[None])
            taken[None].add(studies[key])
        part.study_id = studies[key]
    for part in sorted(series, key=lambda part: bool(part.reason)):  # skipped parts come last and take no id
        number = part.series.removeprefix(f"{part.study[1]}.")
        wish = number_of(number if number.isdecimal() else part.series)
        part.series_id = _free_id(wish, (*part.study, part.series), taken[part.study_id])


def _name(root: Path, file: Path) -> str:
    return readable(file.relative_to(root))


def _collect(root: Path, series: list[_Series], others: dict, counts: Counter, result: Discovered) -> None:
    """Add the series with their files, and the findings about series, studies and other files."""
    owners = defaultdict(set)
    for part in series:
        ids = part.study_id, part.series_id
        for tags in part.images:
            owners[tags.file.parent].add(ids)
        result.findings += [(*ids, *finding) for finding in part.findings]
        files = tuple(files_of(part.images))
        if part.reason:
            count = len(part.images)
            value = f"{_name(root, part.images[0].file)}: {count} image{'s' * (count > 1)}, {part.reason}"
            action = TO_USE_IT.format(split=part.split) if part.reason == UNKNOWN_CONTRAST else "skipped"
            result.findings.append((*ids, "series_skipped", value, action))
            continue
        result.series.append(dict(study_id=ids[0], series_id=ids[1], series_type=part.series_type, split=part.split))
        own = root / f"{part.split}_images" / str(ids[0]) / str(ids[1])
        if {getattr(file, "parent", None) for file in files} != {own} or counts[own] != len(files):
            result.files[ids] = files
    used = {part.study_id for part in series if not part.reason}
    for study_id, study in sorted({(part.study_id, part.study) for part in series}):
        if study_id not in used:
            result.findings.append((study_id, None, "study_without_series", "no usable series", "study left out"))
        if len(study) == 3:
            value = "several patients have its StudyInstanceUID"
            result.findings.append((study_id, None, "study_uid_shared", value, "split by patient"))
    for folder, files in others.items():
        ids = owners[folder]
        study_id = next(iter(ids))[0] if len({study_id for study_id, _ in ids}) == 1 else None
        series_id = next(iter(ids))[1] if len(ids) == 1 else None
        if skipped := [_name(root, file) for file, reason in files if not (reason and ids)]:
            value = f"{len(skipped)} of {counts[folder]} files are not DICOM images, e.g. {skipped[0]}"
            result.findings.append((study_id, None, "files_skipped", value, "skipped"))
        reasons = [f"{_name(root, file)}: {reason}" for file, reason in files if reason and ids]
        result.findings += [(study_id, series_id, "file_unusable", reason, "file left out") for reason in reasons]
