"""One study of the phantom: its series and their flaws, true places, clicked points, and DICOM files."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from lsdc_utils import geometry, vocabulary
from lsdc_utils.phantom.body import Body
from lsdc_utils.phantom.files import write_slice
from lsdc_utils.phantom.scanner import USUAL, Acquisition, Protocol, plan_series, render
from lsdc_utils.vocabulary import AXIAL, COLUMNS, CONDITIONS, GROUPS, LEVELS, MISSING, PLANES, SERIES_TYPES, T1, T2

CLICK_SD = 1.4  # mm in each direction of the image, so that a reader's point lies about 2 mm off
CLICK_OFF_SLICE = 0.22  # share of points clicked on a slice beside the nearest; at one level to the same side
SERIES_PER_STUDY = len(SERIES_TYPES) + 1  # at most: the axial series may come twice
NORMAL = ("normal_x", "normal_y", "normal_z")  # columns of a unit vector
COLUMN_KEYS = [(condition, level) for condition in CONDITIONS for level in LEVELS]  # of each of COLUMNS


def _rate(default: float, meaning: str) -> float:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Dirt:
    """How often each flaw occurs; the defaults are the rates of the real training set. 0 switches a kind off.

    Where a series is missing, or its slices do not reach a level, nobody could grade: those labels are missing too.
    No public table gives `tilted_blocks`, `non_square` and `far_numbers`: these rates are assumptions.
    """

    series_missing: float = _rate(3 / 1975, "studies without one sagittal series; T1 twice as often as T2/STIR")
    second_axial: float = _rate(335 / 1975, "studies with two axial series")
    axial_split: float = _rate(182 / 335, "of those: points in both, one series covers the upper levels, one the lower")
    short_stack: float = _rate(164 / 1975, "studies whose axial slices start below L1/L2, or every other below L2/L3")
    label_missing: float = _rate(35 / 48803, "labels that are lost although a reader clicked their point")
    point_missing: float = _rate(117 / 9870, "canal labels without a point")
    sides_swapped: float = _rate(29 / 1975, "studies with left and right subarticular points swapped at some levels")
    axial_reversed: float = _rate(0.12, "axial series numbered from foot to head")
    sagittal_reversed: float = _rate(0.36, "sagittal series numbered from the patient's left to right")
    far_numbers: float = _rate(0.02, "series whose instance numbers start far from 1")
    number_gaps: float = _rate(5 / 974, "series with gaps in their instance numbers")
    non_square: float = _rate(0.1, "series whose images are not square")
    tilted_blocks: float = _rate(0.25, "studies with an axial block for each level, tilted to its disc")
    colliding_uids: float = _rate(1.0, "studies whose series share their SOPInstanceUIDs")
    frames_differ: float = _rate(1.0, "studies with one FrameOfReferenceUID per series, though patient space is one")
    label_wrong: float = _rate(0.0, "training labels replaced by one of the two other grades; no check can see them")

    def __post_init__(self) -> None:
        for item in fields(self):
            if not 0 <= getattr(self, item.name) <= 1:
                raise ValueError(f"phantom: {item.name} is a share from 0 to 1, not {getattr(self, item.name)}")


KINDS = [item.name for item in fields(Dirt) if item.name != "label_wrong"]


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
    protocol: Protocol = USUAL
    slip: bool | None = None  # forced, forbidden, or drawn
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

    `anatomy` and `discs`: places in the patient as each series sees them. `spine`: what kind of spine it is.
    """

    labels: np.ndarray
    measures: np.ndarray  # (25,) mm or mm2 on the body as built
    series: list[dict] = field(default_factory=list)
    clicked: list[dict] = field(default_factory=list)
    true: list[dict] = field(default_factory=list)
    anatomy: list[dict] = field(default_factory=list)
    discs: list[dict] = field(default_factory=list)
    spine: dict = field(default_factory=dict)
    meant: dict[int, int] = field(default_factory=dict)  # the reader's grade of each column with a wrong label


def make_study(plan: StudyPlan, images: Path | None) -> Study:
    """Draw a study and, where `images` is a folder, write <images>/<study>/<series>/<instance>.dcm into it.

    Body, dirt, series, clicks and noise each have their own random stream, so a kind of dirt changes only itself.
    """
    body_rng, dirt_rng, series_rng, click_rng, image_rng = (np.random.default_rng([*plan.seed, k]) for k in range(5))
    rates = [getattr(plan.dirt, kind) for kind in KINDS]
    draws = dirt_rng.random((1 + SERIES_PER_STUDY, len(KINDS))) < rates  # a row for the study, then one per series
    flaws = [dict(zip(KINDS, row, strict=True)) for row in draws]
    body = Body.draw(body_rng, plan.narrowing, plan.slip, plan.transitional)
    series = _plan_study(plan, body, flaws, dirt_rng, series_rng)
    seen = np.any([part.columns for part in series], axis=0)
    kept = dirt_rng.random(len(COLUMNS)) >= plan.dirt.label_missing
    study = Study(np.where(seen & kept, plan.labels, MISSING), body.measures(), spine=_spine(body, series))
    _set_wrong_labels(study, plan)
    for part in series:
        study.series.append({"series_id": part.series_id, "series_description": part.acquisition.series_type})
        _locate(study, part, body)
        _click(study, part, body, click_rng)
    _lose_and_swap_points(study, plan.dirt, flaws[0]["sides_swapped"], dirt_rng)
    for number, part in enumerate(series if images is not None else (), 1):
        uids = (1 if flaws[0]["colliding_uids"] else number, number if flaws[0]["frames_differ"] else 1)
        folder = images / str(plan.study_id) / str(part.series_id)
        _write_series(folder, plan.study_id, part, uids, render(body, part.acquisition, image_rng))
    return study


def _plan_study(
    plan: StudyPlan, body: Body, flaws: list[dict], dirt_rng: np.random.Generator, rng: np.random.Generator
) -> list[Series]:
    """The series of a study; `flaws`: the kinds of dirt of the study (first) and of each of its series."""
    which, first, cut = dirt_rng.integers(3), 1 + dirt_rng.integers(2), dirt_rng.random()
    lacking = (T1, T1, T2)[which] if flaws[0]["series_missing"] else None
    stacks = _axial_stacks(first if flaws[0]["short_stack"] else 0, flaws[0], cut)
    wanted = [(t, range(5), range(5)) for t in (T1, T2) if t != lacking] + [(AXIAL, *stack) for stack in stacks]
    series = []
    for series_id, own, (series_type, covered, graded) in zip(plan.series_ids, flaws[1:], wanted, strict=False):
        tilted, square = bool(flaws[0]["tilted_blocks"]), not own["non_square"]
        acquisition = plan_series(rng, body, series_type, tuple(covered), tilted, square, plan.protocol)
        numbers = _instance_numbers(len(acquisition.affines), PLANES[series_type], own, dirt_rng)
        read_here = [name for name, c in CONDITIONS.items() if GROUPS[c.group].series_type == series_type]
        columns = [condition in read_here and LEVELS.index(level) in graded for condition, level in COLUMN_KEYS]
        series.append(Series(series_id, acquisition, numbers, np.array(columns)))
    return series


def _axial_stacks(first: int, flaws: dict[str, bool], cut: float) -> list[tuple[range, range]]:
    """Levels covered and levels graded of each axial series; `first` is the uppermost level that is covered."""
    everything = range(first, 5)
    if not flaws["second_axial"]:
        return [(everything, everything)]
    if not flaws["axial_split"]:  # the same levels twice; readers clicked in the first
        return [(everything, everything), (everything, range(0))]
    below = first + 1 + int(cut * (4 - first))
    return [(range(first, below),) * 2, (range(below, 5),) * 2]


def _instance_numbers(n: int, plane: str, flaws: dict[str, bool], rng: np.random.Generator) -> np.ndarray:
    """Instance number (n,) of each slice; slices run from right to left (sagittal) or from head to foot (axial)."""
    numbers = np.arange(1, n + 1)
    start, holes = rng.integers(100, 5000), (rng.random(3) * (n - 1)).astype(int)
    if flaws["number_gaps"]:
        for hole in holes:
            numbers[hole + 1 :] += 1
    if flaws["far_numbers"]:
        numbers = numbers + start
    return numbers[::-1] if flaws[f"{plane}_reversed"] else numbers


def _spine(body: Body, series: list[Series]) -> dict:
    """What kind of spine and images a study has, to report results by."""
    traits, images = body.traits, [part.acquisition for part in series]
    return {
        "ordinary": not traits["transitional"] and not traits["slip"],
        "transitional": traits["transitional"],
        "slip_mm": traits["slip"],
        "slip_level": LEVELS[traits["slip_level"]] if traits["slip"] else "",
        "scoliosis_mm": round(abs(traits["scoliosis"]), 3),
        "stir": any(image.sequence == "stir" for image in images),
        "tilted_blocks": any(image.blocks.max() > 0 for image in images),
    }


def _locate(study: Study, series: Series, body: Body) -> None:
    """Add where a series sees the 25 places and the five discs (LPS mm); places beyond its slices are left out."""
    acquisition = series.acquisition
    own = {"series_id": series.series_id, "series_type": acquisition.series_type}
    for column, point in enumerate(acquisition.to_scanner(body.points())):
        if _is_inside(acquisition, point):
            study.anatomy.append(own | {"column": column} | _xyz(point))
    middles, normals = body.disc_planes()
    turned = (normals @ acquisition.motion[:3, :3].T).round(6).tolist()
    for level, point, normal in zip(LEVELS, acquisition.to_scanner(middles), turned, strict=True):
        if _is_inside(acquisition, point):
            study.discs.append(own | {"level": level} | _xyz(point) | dict(zip(NORMAL, normal, strict=True)))


def _is_inside(acquisition: Acquisition, point: np.ndarray) -> bool:
    """Whether the slice nearest to a point (3,) shows it and is at most one step away."""
    x, y, away = geometry.to_pixels(acquisition.affines, point).T
    near = np.argmin(np.abs(away))
    in_image = 0 <= x[near] <= acquisition.cols - 1 and 0 <= y[near] <= acquisition.rows - 1
    return bool(in_image and abs(away[near]) <= acquisition.step)


def _xyz(point: np.ndarray) -> dict[str, float]:
    return dict(zip("XYZ", point.round(3).tolist(), strict=True))


def _click(study: Study, series: Series, body: Body, rng: np.random.Generator) -> None:
    """Add the true and the clicked point of each column graded on a series; a point outside its images is left out."""
    acquisition = series.acquisition
    affines = acquisition.affines
    seen = acquisition.to_scanner(body.points())
    direction = rng.choice([-1, 1], len(LEVELS))
    for column in np.flatnonzero(series.columns):
        error, draw = rng.normal(0, CLICK_SD, 2), rng.random()
        x, y, away = geometry.to_pixels(affines, seen[column]).T
        clicked = true = int(np.argmin(np.abs(away)))
        if draw < CLICK_OFF_SLICE:
            other = true + direction[column % len(LEVELS)]
            if 0 <= other < len(affines) and acquisition.blocks[other] == acquisition.blocks[true]:
                clicked = other
        off = error / geometry.spacing(affines[clicked])
        for rows, k, (px, py) in (
            (study.true, true, (x[true], y[true])),
            (study.clicked, clicked, (x[clicked] + off[0], y[clicked] + off[1])),
        ):
            if 0 <= px <= acquisition.cols - 1 and 0 <= py <= acquisition.rows - 1:
                row = {"series_id": series.series_id, "instance_number": int(series.numbers[k]), "column": int(column)}
                rows.append(row | {"x": round(float(px), 3), "y": round(float(py), 3)})


def _set_wrong_labels(study: Study, plan: StudyPlan) -> None:
    """Replace some training labels by another grade, and keep what the reader meant."""
    rng = np.random.default_rng([*plan.seed, 6])
    draws, shift = rng.random(len(COLUMNS)), rng.integers(1, 3, len(COLUMNS))
    wrong = (draws < plan.dirt.label_wrong) & (study.labels != MISSING) & (plan.split == "train")
    study.meant = {int(column): int(study.labels[column]) for column in np.flatnonzero(wrong)}
    study.labels = np.where(wrong, (study.labels + shift) % 3, study.labels)


def _lose_and_swap_points(study: Study, dirt: Dirt, swap: bool, rng: np.random.Generator) -> None:
    """Lose some canal points; with `swap`, left and right subarticular points of most levels change places."""
    lost = rng.random(len(LEVELS)) < dirt.point_missing
    swapped = swap & (rng.random(len(LEVELS)) < 0.8)
    kept = []
    for row in study.clicked:
        condition, level = COLUMN_KEYS[row["column"]]
        group, k = CONDITIONS[condition].group, LEVELS.index(level)
        if group == "ss" and swapped[k]:
            row["column"] = COLUMN_KEYS.index((vocabulary.mirrored(condition), level))
        if group != "scs" or not lost[k]:
            kept.append(row)
    study.clicked = kept


def _write_series(folder: Path, study_id: int, series: Series, uids: tuple[int, int], pixels: np.ndarray) -> None:
    """Write the slices (n, rows, cols) of a series; `uids`: its part of SOPInstanceUID and of FrameOfReferenceUID."""
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
