"""One study of the phantom: its series, what is wrong with them, true anatomy, clicks, and its DICOM files."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from lsdc_utils import geometry
from lsdc_utils.phantom.body import Body
from lsdc_utils.phantom.files import write_slice
from lsdc_utils.phantom.scanner import USUAL, Acquisition, Protocol, plan_series, render
from lsdc_utils.vocabulary import (
    AXIAL,
    COLUMNS,
    CONDITIONS,
    GROUPS,
    LEVELS,
    MISSING,
    PLANES,
    SERIES_TYPES,
    T1,
    T2,
    mirrored,
)

CLICK_SD = 1.4  # mm in each direction of the image, so that a reader's point lies about 2 mm off
CLICK_OFF_SLICE = 0.22  # share of points clicked on a slice beside the nearest; at one level to the same side
SERIES_PER_STUDY = len(SERIES_TYPES) + 1  # at most: the axial series may come twice
NORMAL = ("normal_x", "normal_y", "normal_z")  # columns of a unit vector
COLUMN_KEYS = [(condition, level) for condition in CONDITIONS for level in LEVELS]  # of each of COLUMNS


@dataclass(frozen=True)
class Dirt:
    """How often each thing is wrong; the defaults are the rates of the real training set. 0 switches a kind off.

    Where a series is missing, or its slices do not reach a level, nobody could grade: those labels are missing too.
    Rates that no public table tells (`tilted_blocks`, `non_square`, `far_numbers`) are our assumption.
    """

    series_missing: float = 3 / 1975  # share of studies that lack a sagittal series, T1 twice as often as T2/STIR
    second_axial: float = 335 / 1975  # share of studies with two axial series
    axial_split: float = 182 / 335  # share of those whose points lie in both: one series above, one below
    short_stack: float = 164 / 1975  # share of studies whose axial slices begin below L1/L2, every other below L2/L3
    label_missing: float = 35 / 48803  # share of labels that are lost though a reader clicked their point
    point_missing: float = 117 / 9870  # share of canal labels whose point is missing
    sides_swapped: float = 29 / 1975  # share of studies in which some left and right subarticular points changed places
    axial_reversed: float = 0.12  # share of axial series numbered from foot to head
    sagittal_reversed: float = 0.36  # share of sagittal series numbered from the patient's left to right
    far_numbers: float = 0.02  # share of series whose instance numbers begin far from 1
    number_gaps: float = 5 / 974  # share of series with gaps in their instance numbers
    non_square: float = 0.1  # share of series with more rows than columns or the other way round
    tilted_blocks: float = 0.25  # share of studies whose axial slices come in a block a level, each tilted to its disc
    colliding_uids: float = 1.0  # share of studies whose SOPInstanceUIDs are the same in each series
    frames_differ: float = 1.0  # share of studies with a FrameOfReferenceUID a series, though patient space is one
    # From here on: what the competition's data do not have. Shares of studies, dealt in turn by `spoil`, one a study.
    study_not_in_tables: float = 0.0  # on disk alone
    study_without_series: float = 0.0  # in train.csv alone
    study_without_labels: float = 0.0  # not in train.csv, without points
    study_repeated: float = 0.0  # twice in train.csv
    series_repeated: float = 0.0  # its first series comes twice in the table of series
    series_type_unknown: float = 0.0  # a series more, described as Localizer
    plane_differs: float = 0.0  # a second axial series, described as Sagittal T1
    grade_unknown: float = 0.0  # a word in train.csv that is no grade
    point_repeated: float = 0.0  # two points for one label
    point_on_unknown_series: float = 0.0  # on a series that is nowhere
    point_on_other_series_type: float = 0.0  # a canal's point on the sagittal T1 series, at its place in the patient
    point_on_missing_instance: float = 0.0  # on an instance number that no image has
    point_outside_image: float = 0.0  # right of the last column
    foramina_swapped: float = 0.0  # left and right foraminal points of two levels changed places
    one_side_twice: float = 0.0  # left subarticular point of a level beside the right one
    levels_out_of_order: float = 0.0  # points of two neighbouring levels of one condition changed places
    level_points_apart: float = 0.0  # the lowest canal point 40 mm too low
    study_not_on_disk: float = 0.0  # in the tables alone
    series_not_on_disk: float = 0.0  # one of its series is in the tables alone
    localiser: float = 0.0  # a series more, in no table: three slices, one a series
    spacing_outlier: float = 0.0  # a second axial series, pixels ten times as wide or steps of 60 mm
    contrast_differs: float = 0.0  # headers call the T1 series T2 and the T2 series T1
    files_broken: float = 0.0  # five files, each useless in another way
    tags_missing: float = 0.0  # orientation of one slice and pixel spacing of another
    series_unusable: float = 0.0  # no file of one series is an image
    shapes_mixed: float = 0.0  # one slice has fewer rows
    # Tossed, not dealt, beside any of the above, since a reader sees no difference: shares of series, then of studies.
    uncompressed: float = 0.0  # implicit, explicit, big endian or deflated
    monochrome1: float = 0.0  # bright is less
    rescaled: float = 0.0  # a slope and an intercept
    signed: float = 0.0  # numbers below 0
    high_bits: float = 0.0  # something above the 12 bits stored
    headers_silent: float = 0.0  # no SeriesDescription
    # Slips of the pen: no validator can see them.
    label_wrong: float = 0.0  # share of training labels replaced by one of the two other grades

    def __post_init__(self) -> None:
        for item in fields(self):
            if not 0 <= getattr(self, item.name) <= 1:
                raise ValueError(f"phantom: {item.name} is a share from 0 to 1, not {getattr(self, item.name)}")

    def tossed(self) -> dict[str, float]:
        """Rates of the real kinds, which are tossed for each study and series."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.default}


@dataclass(frozen=True)
class StudyPlan:
    """All that decides a study's bytes: ids, narrowing and labels (25,), and the seed of its random streams."""

    split: str  # train or test
    study_id: int
    series_ids: tuple[int, ...]  # as many as a study may have
    narrowing: np.ndarray
    labels: np.ndarray
    seed: tuple[int, ...]
    dirt: Dirt
    spoilt: tuple[str, int] | None = None  # the kind of dirt that `spoil` adds, and how many studies had it before
    protocol: Protocol = USUAL
    slip: bool | None = None  # forced, forbidden, or as it falls
    transitional: bool | None = None


@dataclass(frozen=True)
class Series:
    """One series: where its slices lie, how they are numbered, and what is graded on them."""

    series_id: int
    acquisition: Acquisition
    numbers: np.ndarray  # (n,) instance number of each slice, in the acquisition's order
    columns: np.ndarray  # (25,) bool: the columns that a reader grades on this series


@dataclass
class Study:
    """What a study adds to the tables: labels (25,) with -1 where missing, rows of series, clicked and true points.

    `anatomy` and `discs` hold what lies where in the patient as each series sees it, `spine` what kind of spine it is.
    """

    labels: np.ndarray
    measures: np.ndarray  # (25,) mm or mm2 on the body as built
    series: list[dict] = field(default_factory=list)
    clicked: list[dict] = field(default_factory=list)
    true: list[dict] = field(default_factory=list)
    anatomy: list[dict] = field(default_factory=list)
    discs: list[dict] = field(default_factory=list)
    spine: dict = field(default_factory=dict)
    parts: list[Series] = field(default_factory=list)
    label_rows: int = 1  # in train.csv
    meant: dict[int, int] = field(default_factory=dict)  # the reader's grade of each column that has a wrong one
    planted: list[dict] = field(default_factory=list)  # series_id, rule, value: what a validator must find

    def plant(self, rule: str, series_id: int | None = None, value: object = "") -> None:
        """Note something wrong: of the series where one is named, else of the study."""
        self.planted.append({"series_id": series_id, "rule": rule, "value": str(value)})


def make_study(plan: StudyPlan, images: Path | None) -> Study:
    """Draw a study and, where `images` is a folder, write <images>/<study>/<series>/<instance>.dcm into it.

    Body, dirt, series, clicks and noise have a random stream each, so that a kind of dirt changes nothing but itself.
    """
    body_rng, dirt_rng, series_rng, click_rng, image_rng = (np.random.default_rng([*plan.seed, k]) for k in range(5))
    rates = plan.dirt.tossed()
    tosses = dirt_rng.random((1 + SERIES_PER_STUDY, len(rates)))  # a row for the study, then one a series
    happens = [dict(zip(rates, toss < list(rates.values()), strict=True)) for toss in tosses]
    body = Body.draw(body_rng, plan.narrowing, plan.slip, plan.transitional)
    series = _plan_study(plan, body, happens, dirt_rng, series_rng)
    seen = np.any([s.columns for s in series], axis=0)
    kept = dirt_rng.random(len(COLUMNS)) >= plan.dirt.label_missing
    study = Study(np.where(seen & kept, plan.labels, MISSING), body.measures(), parts=series)
    _mistake(study, plan)
    study.spine = _spine(body, series)
    for one in series:
        study.series.append({"series_id": one.series_id, "series_description": one.acquisition.series_type})
        _describe(study, one, body)
        _click(study, one, body, click_rng)
    _spoil_points(study, plan.dirt, happens[0]["sides_swapped"], dirt_rng)
    if images is not None:
        for k, one in enumerate(series, 1):
            uids = (1 if happens[0]["colliding_uids"] else k, k if happens[0]["frames_differ"] else 1)
            folder = images / str(plan.study_id) / str(one.series_id)
            _write_series(folder, plan.study_id, one, uids, render(body, one.acquisition, image_rng))
    return study


def _plan_study(
    plan: StudyPlan, body: Body, happens: list[dict], dirt_rng: np.random.Generator, rng: np.random.Generator
) -> list[Series]:
    """The series of a study; `happens`: which kinds of dirt befall the study (first) and each of its series."""
    which, first, cut = dirt_rng.integers(3), 1 + dirt_rng.integers(2), dirt_rng.random()
    lacking = (T1, T1, T2)[which] if happens[0]["series_missing"] else None
    stacks = _axial_stacks(first if happens[0]["short_stack"] else 0, happens[0], cut)
    wanted = [(t, range(5), range(5)) for t in (T1, T2) if t != lacking] + [(AXIAL, *stack) for stack in stacks]
    series = []
    for series_id, dirt, (series_type, covered, graded) in zip(plan.series_ids, happens[1:], wanted, strict=False):
        tilted, square = bool(happens[0]["tilted_blocks"]), not dirt["non_square"]
        acquisition = plan_series(
            rng, body, series_type, levels=tuple(covered), tilted=tilted, square=square, protocol=plan.protocol
        )
        numbers = _instance_numbers(len(acquisition.affines), PLANES[series_type], dirt, dirt_rng)
        group = next(key for key, g in GROUPS.items() if g.series_type == series_type)
        columns = [CONDITIONS[c].group == group and LEVELS.index(level) in graded for c, level in COLUMN_KEYS]
        series.append(Series(series_id, acquisition, numbers, np.array(columns)))
    return series


def _axial_stacks(first: int, dirt: dict[str, bool], cut: float) -> list[tuple[range, range]]:
    """Levels covered and levels graded of each axial series; `first` is the uppermost level that is reached."""
    everything = range(first, 5)
    if not dirt["second_axial"]:
        return [(everything, everything)]
    if not dirt["axial_split"]:  # the same levels twice; readers clicked in the first
        return [(everything, everything), (everything, range(0))]
    below = first + 1 + int(cut * (4 - first))
    return [(range(first, below),) * 2, (range(below, 5),) * 2]


def _instance_numbers(n: int, plane: str, dirt: dict[str, bool], rng: np.random.Generator) -> np.ndarray:
    """Instance number (n,) of each slice; slices come from right to left (sagittal) or from head to foot (axial)."""
    numbers = np.arange(1, n + 1)
    start, holes = rng.integers(100, 5000), (rng.random(3) * (n - 1)).astype(int)
    if dirt["number_gaps"]:
        for hole in holes:
            numbers[hole + 1 :] += 1
    if dirt["far_numbers"]:
        numbers = numbers + start
    return numbers[::-1] if dirt[f"{plane}_reversed"] else numbers


def _spine(body: Body, series: list[Series]) -> dict:
    """What kind of spine and of pictures a study has: that by which results may be told apart."""
    traits, images = body.traits, [one.acquisition for one in series]
    return {
        "ordinary": not traits["transitional"] and not traits["slip"],
        "transitional": traits["transitional"],
        "slip_mm": traits["slip"],
        "slip_level": LEVELS[traits["slip_level"]] if traits["slip"] else "",
        "scoliosis_mm": round(abs(traits["scoliosis"]), 3),
        "stir": any(one.sequence == "stir" for one in images),
        "tilted_blocks": any(one.blocks.max() > 0 for one in images),
    }


def _describe(study: Study, series: Series, body: Body) -> None:
    """Add where a series sees the 25 places and the five discs, as far as its slices reach: LPS mm."""
    acquisition = series.acquisition
    own = {"series_id": series.series_id, "series_type": acquisition.series_type}
    for column, point in enumerate(acquisition.to_scanner(body.points())):
        if _is_inside(acquisition, point):
            study.anatomy.append(own | {"column": column} | _place(point))
    middles, normals = body.disc_planes()
    turned = (normals @ acquisition.motion[:3, :3].T).round(6).tolist()
    for level, point, normal in zip(LEVELS, acquisition.to_scanner(middles), turned, strict=True):
        if _is_inside(acquisition, point):
            study.discs.append(own | {"level": level} | _place(point) | dict(zip(NORMAL, normal, strict=True)))


def _is_inside(acquisition: Acquisition, point: np.ndarray) -> bool:
    """Whether the slice nearest to a point (3,) shows it and is no farther than one step away."""
    x, y, away = geometry.to_pixels(acquisition.affines, point).T
    near = np.argmin(np.abs(away))
    in_image = 0 <= x[near] <= acquisition.cols - 1 and 0 <= y[near] <= acquisition.rows - 1
    return bool(in_image and abs(away[near]) <= acquisition.step)


def _place(point: np.ndarray) -> dict[str, float]:
    """A point (3,) as columns of a table."""
    return dict(zip("XYZ", point.round(3).tolist(), strict=True))


def _click(study: Study, series: Series, body: Body, rng: np.random.Generator) -> None:
    """Add the true and the clicked point of each column graded on a series; a point outside its images is left out."""
    acquisition = series.acquisition
    affines, rows, columns = acquisition.affines, acquisition.rows, acquisition.cols
    seen = acquisition.to_scanner(body.points())
    direction = rng.choice([-1, 1], len(LEVELS))
    for column in np.flatnonzero(series.columns):
        beside, toss = rng.normal(0, CLICK_SD, 2), rng.random()
        x, y, away = geometry.to_pixels(affines, seen[column]).T
        true = int(np.argmin(np.abs(away)))
        clicked = true
        if toss < CLICK_OFF_SLICE:
            other = true + direction[column % len(LEVELS)]
            if 0 <= other < len(affines) and acquisition.blocks[other] == acquisition.blocks[true]:
                clicked = other
        spacing = geometry.spacing(affines[clicked])
        spots = {"true": (true, x[true], y[true]), "clicked": (clicked, *([x[clicked], y[clicked]] + beside / spacing))}
        for name, (k, px, py) in spots.items():
            if 0 <= px <= columns - 1 and 0 <= py <= rows - 1:
                row = {"series_id": series.series_id, "instance_number": int(series.numbers[k]), "column": int(column)}
                getattr(study, name).append(row | {"x": round(float(px), 3), "y": round(float(py), 3)})


def _mistake(study: Study, plan: StudyPlan) -> None:
    """Replace some training labels by another grade, and keep what the reader meant."""
    rng = np.random.default_rng([*plan.seed, 6])
    tosses, other = rng.random(len(COLUMNS)), rng.integers(1, 3, len(COLUMNS))
    wrong = (tosses < plan.dirt.label_wrong) & (study.labels != MISSING) & (plan.split == "train")
    study.meant = {int(column): int(study.labels[column]) for column in np.flatnonzero(wrong)}
    study.labels = np.where(wrong, (study.labels + other) % 3, study.labels)


def _spoil_points(study: Study, dirt: Dirt, swap: bool, rng: np.random.Generator) -> None:
    """Lose some canal points, and where `swap` let most left and right subarticular points change places."""
    lost = rng.random(len(LEVELS)) < dirt.point_missing
    swapped = swap & (rng.random(len(LEVELS)) < 0.8)
    kept = []
    for row in study.clicked:
        condition, level = COLUMN_KEYS[row["column"]]
        group, k = CONDITIONS[condition].group, LEVELS.index(level)
        if group == "ss" and swapped[k]:
            row["column"] = COLUMN_KEYS.index((mirrored(condition), level))
            study.plant("point_on_wrong_side", row["series_id"], COLUMNS[row["column"]])
        if group != "scs" or not lost[k]:
            kept.append(row)
    study.clicked = kept


def _write_series(folder: Path, study_id: int, series: Series, uids: tuple[int, int], pixels: np.ndarray) -> None:
    """Write the slices (n, rows, cols) of a series; `uids`: its part in SOPInstanceUID and in FrameOfReferenceUID."""
    folder.mkdir(parents=True)
    acquisition = series.acquisition
    header = {
        "ContentDate": "20240503",
        "ContentTime": "120000",
        "SeriesDescription": "T1" if acquisition.series_type == T1 else "T2",
        "PatientID": str(study_id),
        "SliceThickness": f"{acquisition.thickness:.3g}",
        "SpacingBetweenSlices": f"{acquisition.step:.4g}",
        "StudyInstanceUID": str(study_id),
        "SeriesInstanceUID": f"{study_id}.{series.series_id}",
        "FrameOfReferenceUID": f"{study_id}.{uids[1]}",
    }
    for image, affine, number in zip(pixels, acquisition.affines, series.numbers, strict=True):
        own = {
            "SOPInstanceUID": f"{study_id}.{uids[0]}.{number}",
            "InstanceNumber": int(number),
            "SliceLocation": f"{geometry.normals(affine) @ affine[:3, 3]:.4f}",
        }
        write_slice(folder / f"{number}.dcm", image, affine, header | own)
