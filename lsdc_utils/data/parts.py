"""The images of a series, files or frames, divided into parts that can be read as one stack, or as blocks of one kind.
Images of another kind (fat, phase, another echo, a map), plane, size or tilt never join a stack."""

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Mapping

import numpy as np

from lsdc_utils import geometry
from lsdc_utils import vocabulary as words
from lsdc_utils.data.series_types import contrast_of, skip_reason
from lsdc_utils.dicom import DicomError, Frames, Source, Tags, read_all_tags, series_files

Part = tuple[list[Tags], str]  # images, and why they are not used; '' if they are

STACK = 5  # images; fewer in one plane beside another plane are a localiser
FEW = 5  # strangers: this many times fewer than the series' other images, or less
OTHER_ECHO = 1.5  # ratio of the longest to the shortest echo time of a series with several echoes
SAME_ECHO = 1.05  # ratio of times of one echo
SAME_SPACING = 0.02  # of the spacing
SAME_PLANE = np.cos(np.deg2rad(20))  # of the normals of a sagittal stack
STATION = 100.0  # mm from the middle of a sagittal image to the next higher one of another station
FAR = 150.0  # mm between the middles of series of different parts of the spine; stations lie 200 to 300 mm apart
PREFERRED = ({"IN_PHASE", "IP", "INPHASE", "IN PHASE", "IN"}, {"WATER", "W"})  # of a Dixon series, after unnamed ones


def select(source: Source, series_type: str) -> tuple[Source, list[tuple]]:
    """What of a series is read as `series_type`, and (file, reason) of what is left out; DicomError if nothing is."""
    folder, files = series_files(source)
    images, unread = [], []
    for part in files:
        try:
            tags = read_all_tags(part.file)
            images += [one for one in tags if not part.frames or one.frame in (*part.frames, None)]
        except DicomError:  # which read_series reports
            unread.append(part)
    parts = divide(images, listed=True) if images else []
    if len(parts) < 2:
        return source, []
    usable = [part for part, reason in parts if not reason]
    if not usable:
        raise DicomError(f"series {folder}: {'; '.join(sorted({reason for _, reason in parts}))}")
    contrast = words.T1 if series_type == words.T1 else words.T2

    def fit(part: list[Tags]) -> tuple:
        """What makes a part the wanted one, most important first."""
        height = middle_height(part) or 0.0
        return _lying(part[0]) == words.PLANES[series_type], contrast_in(part)[0] == contrast, -height, len(part)

    best = max(usable, key=fit)
    notes = []
    for part, reason in parts:
        if part is not best:
            others = f", as are {len(part) - 1} other images" if len(part) > 1 else ""
            notes.append((part[0].file, f"{reason or 'of another plane, contrast or station than its series'}{others}"))
    return [*files_of(best), *unread], notes


def files_of(images: Iterable[Tags]) -> list:
    """The images' files, as `Frames` where only some of a file's frames are meant."""
    frames: dict = defaultdict(list)
    for tags in images:
        frames[tags.file, tags.frames].append(tags.frame)
    whole = {file for (file, count), chosen in frames.items() if chosen == [None] or len(chosen) == count}
    return [file if file in whole else Frames(file, tuple(chosen)) for (file, _), chosen in frames.items()]


def contrast_in(images: list[Tags]) -> tuple[str | None, str]:
    """Contrast of most of the images, as in `contrast_of`."""
    return Counter(map(contrast_of, images)).most_common(1)[0][0]


def divide(images: list[Tags], listed: bool = False) -> list[Part]:
    """The parts of a series, by description unless a table lists the series, which then counts for more than it."""
    by_reason: dict[str, list[Tags]] = defaultdict(list)
    for tags in images:
        by_reason[skip_reason(tags, described=not listed)].append(tags)
    if listed and len(by_reason) == 1:
        by_reason = {"": images}
    described: dict[str, list[Tags]] = defaultdict(list)
    for tags in by_reason.pop("", []):
        described["" if listed else tags.description].append(tags)
    parts = [(some, reason) for reason, some in sorted(by_reason.items())]
    for name in sorted(described):
        parts += _by_plane(described[name], listed)
    return parts


def _lying(tags: Tags) -> str:
    """The plane of an image; '' without orientation."""
    return lying(_normal(tags.orientation)) if tags.orientation else ""


def lying(normal: np.ndarray) -> str:
    """The plane of an image with this normal (3,); an axial block may be tilted by up to 50 degrees."""
    plane = geometry.plane_of(normal)
    return "axial" if plane == "coronal" and abs(normal[2]) >= 0.64 else plane


def _normal(orientation: tuple[float, ...]) -> np.ndarray:
    return geometry.unit(np.cross(orientation[:3], orientation[3:]))


def _by_plane(images: list[Tags], listed: bool) -> list[Part]:
    planes: dict[str, list[Tags]] = defaultdict(list)
    for tags in images:
        planes[_lying(tags)].append(tags)
    unplaced = planes.pop("", [])
    if not planes:
        return [(images, "no orientation in any header")]
    main = max(planes, key=lambda plane: len(planes[plane]))
    few = {plane for plane in planes if FEW * len(planes[plane]) <= len(planes[main])}
    parts = [(planes.pop(plane), "lying across the other images of its series") for plane in sorted(few)]
    small = len(planes) > 1 and min(map(len, planes.values())) < STACK
    if not listed and (small or {"sagittal", "coronal"} <= planes.keys()):
        return [(images, "images in several planes, as of a localiser")]
    planes[main] += unplaced  # read_series may know what they lack
    for plane in sorted(planes):
        stations = _by_height(planes[plane]) if plane == "sagittal" else [planes[plane]]
        most = max(map(len, stations))
        for station in stations:
            if FEW * len(station) <= most:
                parts.append((station, "lying far above or below the other images of its series"))
                continue
            for part, reason in _by_kind(station):
                parts += [(part, reason)] if reason else _without_strangers(part, plane)
    return parts


def _by_height(images: list[Tags]) -> list[list[Tags]]:
    """The stations of a series of the whole spine, the lowest first; images of unknown height are in that."""
    heights = [middle_height([tags]) for tags in images]
    lowest = min((height for height in heights if height is not None), default=0.0)
    heights = np.array([lowest if height is None else height for height in heights])
    order = heights.argsort(kind="stable")
    cuts = np.flatnonzero(np.diff(heights[order]) > STATION) + 1
    return [[images[n] for n in sorted(part)] for part in np.split(order, cuts)]


def _by_kind(images: list[Tags]) -> list[Part]:
    """Parts by echo, original or derived, and, of images at the same place, by image type; one of each contrast."""
    times = sorted({tags.echo_time or 0.0 for tags in images})
    twice = max(Counter((tags.position, tags.orientation) for tags in images if tags.position).values(), default=1) > 1
    several = twice or (times[0] > 0 and times[-1] > OTHER_ECHO * times[0])
    echo, first = {}, 0.0  # time -> first time of its echo, 0 where there are not several
    for time in times:
        first = 0.0 if not several else first if time <= SAME_ECHO * first else time
        echo[time] = first
    kinds: dict[tuple, list[Tags]] = defaultdict(list)
    mixed = {words.T1, words.T2} <= {contrast_of(tags)[0] for tags in images}
    for tags in images:
        contrast = contrast_of(tags)[0] or "" if mixed else ""
        derived = "DERIVED" in tags.image_type[:1]
        kinds[derived, echo[tags.echo_time or 0.0], tags.image_type if twice else (), contrast].append(tags)
    most = max(map(len, kinds.values()))

    def rank(key: tuple) -> tuple:
        """The order in which kinds are preferred, smallest first."""
        derived, time, kind, _ = key
        dixon = next((n for n, names in enumerate(PREFERRED, 1) if names & {*kind}), 0)
        wanted = 100 if contrast_in(kinds[key])[0] == words.T2 else 10  # ms
        return 2 * len(kinds[key]) < most, dixon, derived, abs(time - wanted), -len(kind), kind  # corrections add words

    parts, used = [], {}
    for key in sorted(kinds, key=rank):
        first, contrast = used.setdefault(contrast_in(kinds[key])[0], key), contrast_in(kinds[key])[0]
        if FEW * len(kinds[key]) <= most:
            parts.append((kinds[key], "of another echo or image type than the other images of its series"))
        elif first != key and contrast:
            name = "\\".join(first[2]) if first[2] != key[2] else f"echo time {first[1]:g} ms"
            parts.append((kinds[key], f"another kind of the images that are used ({name})"))
        else:
            parts.append((kinds[key], ""))
    return parts


def _without_strangers(images: list[Tags], plane: str) -> list[Part]:
    """The images, and apart from them a few of another size or spacing or, in a sagittal stack, of another tilt."""
    size = Counter((tags.rows, tags.columns) for tags in images).most_common(1)[0][0]
    usual = Counter(tags.spacing for tags in images if tags.spacing).most_common(1)
    tilt = Counter(tags.orientation for tags in images if tags.orientation).most_common(1)

    def fits(tags: Tags) -> bool:
        """Whether an image has the usual size and spacing."""
        pairs = zip(tags.spacing, usual[0][0], strict=True) if tags.spacing else ()
        return (tags.rows, tags.columns) == size and all(abs(mm - than) <= SAME_SPACING * than for mm, than in pairs)

    tilts = {tags.orientation for tags in images if fits(tags)} | {None}
    odd = [tags for tags in images if not fits(tags)]
    if plane == "sagittal":
        turned = {o for o in tilts if o and abs(_normal(o) @ _normal(tilt[0][0])) < SAME_PLANE}
        odd += [tags for tags in images if fits(tags) and tags.orientation in turned]
    else:  # an axial block of its own tilt may have a size of its own
        odd = [tags for tags in odd if tags.orientation in tilts]
    enough = 3 * len(odd) <= len(images) - len(odd) if plane == "sagittal" else len(odd) <= min(2, len(images) // FEW)
    if not odd or not enough:
        return [(images, "")]
    usual = [tags for tags in images if tags not in odd]
    return [(usual, ""), (odd, "of another size, pixel spacing or tilt than the other images of its series")]


def middle_height(images: Iterable[Tags]) -> float | None:
    """Median z in mm of the middles of the images; None if no header says where they lie."""
    heights = [
        tags.position[2]
        + tags.orientation[2] * tags.spacing[1] * (tags.columns - 1) / 2
        + tags.orientation[5] * tags.spacing[0] * (tags.rows - 1) / 2
        for tags in images
        if tags.position and tags.orientation and tags.spacing and tags.rows and tags.columns
    ]
    return float(np.median(heights)) if heights else None


def far_from_others(heights: Mapping[Hashable, float]) -> dict[Hashable, float]:
    """Series that lie `FAR` from where most series of their study lie, of equally many the lowest, and how far: mm,
    positive above. heights: series -> z in mm of its middle."""
    near = {key: [other for other in heights.values() if abs(other - z) <= FAR] for key, z in heights.items()}
    place = np.median(near[min(near, key=lambda key: (-len(near[key]), heights[key]))]) if near else 0.0
    return {key: z - place for key, z in heights.items() if abs(z - place) > FAR}
