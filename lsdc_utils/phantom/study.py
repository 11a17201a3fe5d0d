"""One study of the phantom: its series and their flaws, true places, clicked points, and DICOM files."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from lsdc_utils import geometry, vocabulary
from lsdc_utils.phantom import labels
from lsdc_utils.phantom.body import Body, draw_bow
from lsdc_utils.phantom.contrast import Visit
from lsdc_utils.phantom.files import write_slice
from lsdc_utils.phantom.scanner import Acquisition, Protocol, plan_series, render
from lsdc_utils.vocabulary import AXIAL, COLUMNS, CONDITIONS, LEVELS, MISSING, SEVERITIES, T1, T2

CLICK_SD = 1.4  # mm in each direction of the image, so that a reader's point lies about 2 mm off
CLICK_OFF_SLICE = 0.22  # share of points clicked on a slice beside the nearest; at one level to the same side
SERIES_PER_STUDY = len(vocabulary.SERIES_TYPES) + 1  # at most: the axial series may come twice
NORMAL = ("normal_x", "normal_y", "normal_z")  # columns of a unit vector
COLUMN_KEYS = [(condition, level) for condition in CONDITIONS for level in LEVELS]  # of each of COLUMNS
WORDS = (*vocabulary.SEVERITY_NAMES, "")  # of grades 0, 1, 2 and MISSING, -1

Row = dict[str, Any]  # of a table, by column


def _rate(default: float, meaning: str) -> float:
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class Dirt:
    """How often each flaw occurs, by default as in the real training set (`tilted_blocks`, `non_square`,
    `levels_cut` and `far_numbers`: assumed). Where a series is missing or does not reach a level, labels are
    missing too."""

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
    non_square: float = _rate(0.135, "series whose images are not square")
    tilted_blocks: float = _rate(0.25, "studies with an axial block for each level, tilted to its disc")
    colliding_uids: float = _rate(1.0, "studies whose series share their SOPInstanceUIDs")
    frames_differ: float = _rate(1.0, "studies with one FrameOfReferenceUID per series, though patient space is one")
    levels_cut: float = _rate(0.06, "studies whose sagittal images may miss upper levels, in a narrow field")
    label_wrong: float = _rate(0.0, "training labels replaced by one of the two other grades; no check can see them")

    def __post_init__(self) -> None:
        for item in fields(self):
            if not 0 <= getattr(self, item.name) <= 1:
                raise ValueError(f"phantom: {item.name} is a share from 0 to 1, not {getattr(self, item.name)}")


KINDS = [item.name for item in fields(Dirt) if item.name != "label_wrong"]


@dataclass(frozen=True)
class StudyPlan:
    """All that decides a study's bytes: ids, narrowing and what a reader made of it (25,), the seed of its streams."""

    split: str  # train or test
    study_id: int
    series_ids: list[int]  # as many as a study may have
    narrowing: np.ndarray
    labels: np.ndarray
    own: np.ndarray  # grades without gross errors
    gross: np.ndarray  # kinds of gross error
    seed: tuple[int, ...]
    dirt: Dirt
    protocol: Protocol
    slip: bool | None  # forced, forbidden, or drawn
    transitional: bool | None
    scoliosis: float  # mm; 0: the usual small one


@dataclass(frozen=True)
class Series:
    """One series: where its slices lie, how they are numbered, and what is graded on them."""

    series_id: int
    acquisition: Acquisition
    numbers: np.ndarray  # (n,) instance number of each slice, in the acquisition's order
    columns: np.ndarray  # (25,) bool: the columns that a reader grades on this series


def make_study(root: Path | None, plan: StudyPlan) -> dict[str, list[Row]]:
    """The rows of a study in each of `write.TABLES`; images go to `root`. Each part has a random stream of its own."""
    body, series, flaws, dirt_rng = _begin(plan)
    click_rng, image_rng = (np.random.default_rng([*plan.seed, k]) for k in (3, 4))
    seen = np.any([part.columns for part in series], axis=0)
    kept = dirt_rng.random(len(COLUMNS)) >= plan.dirt.label_missing
    keys = {"study_id": plan.study_id, "split": plan.split}
    rows: dict[str, list[Row]] = defaultdict(list, spines=[keys | _spine(body, series)])
    _add_labels(rows, plan, body, np.where(seen & kept, plan.labels, MISSING))
    lost = dirt_rng.random(len(LEVELS)) < plan.dirt.point_missing
    swapped = flaws[0]["sides_swapped"] & (dirt_rng.random(len(LEVELS)) < 0.8)
    points = {"train": "train_label_coordinates", "test": "solution_coordinates"}[plan.split]
    for number, part in enumerate(series, 1):
        own = keys | {"series_id": part.series_id, "series_type": part.acquisition.series_type}
        rows[f"{plan.split}_series_descriptions"].append(own | {"series_description": own["series_type"]})
        for name, place in _places(part.acquisition, body, plan.split):
            rows[name].append(own | place)
        rows[points] += [own | point for point in _points(plan.split, part, body, click_rng, lost, swapped)]
        if root is not None:
            uids = (1 if flaws[0]["colliding_uids"] else number, number if flaws[0]["frames_differ"] else 1)
            folder = root / f"{plan.split}_images" / str(plan.study_id) / str(part.series_id)
            write_series(folder, plan.study_id, part, uids, render(body, part.acquisition, image_rng))
    return rows


def image_study(plan: StudyPlan, see: Callable | None = None) -> Iterator[tuple[Series, np.ndarray]]:
    """The series of a study with their pixels (n, rows, cols), drawn one by one; see: as `render` takes it."""
    (body, series, *_), rng = _begin(plan), np.random.default_rng([*plan.seed, 4])
    for part in series:
        yield part, render(body, part.acquisition, rng, see)


def _begin(plan: StudyPlan) -> tuple[Body, list[Series], list[dict], np.random.Generator]:
    """Body and series of a study, flaws of the study (first) and of each series, and the stream of further flaws."""
    body_rng, dirt_rng, series_rng = (np.random.default_rng([*plan.seed, k]) for k in range(3))
    rates = [getattr(plan.dirt, kind) for kind in KINDS]
    draws = dirt_rng.random((1 + SERIES_PER_STUDY, len(KINDS))) < rates  # a row for the study, then one per series
    flaws = [dict(zip(KINDS, row, strict=True)) for row in draws]
    traits_rng = np.random.default_rng([*plan.seed, 7])
    traits = draw_bow(traits_rng, plan.scoliosis) if plan.scoliosis else {}
    if plan.protocol.population == "steep":  # the sacrum tilts by 20 to 28 degrees more than usual
        traits = traits | {"pelvis": -traits_rng.uniform(20, 28)}
    body = Body.draw(body_rng, plan.narrowing, plan.slip, plan.transitional, traits)
    return body, _plan_study(plan, body, flaws, dirt_rng, series_rng), flaws, dirt_rng


def _plan_study(
    plan: StudyPlan, body: Body, flaws: list[dict], dirt_rng: np.random.Generator, rng: np.random.Generator
) -> list[Series]:
    """The series of a study; `flaws`: the kinds of dirt of the study (first) and of each of its series."""
    which, uppermost, cut = dirt_rng.integers(3), 1 + dirt_rng.integers(2), dirt_rng.random()
    visit = Visit.draw(np.random.default_rng([*plan.seed, 8]), flaws[0]["levels_cut"])
    lacking = (T1, T1, T2)[which] if flaws[0]["series_missing"] else None
    first = uppermost if flaws[0]["short_stack"] else 0
    covered, below = range(first, 5), first + 1 + int(cut * (4 - first))
    stacks = [(covered, covered)]  # levels covered and levels graded of each axial series
    if flaws[0]["second_axial"] and flaws[0]["axial_split"]:
        stacks = [(range(first, below),) * 2, (range(below, 5),) * 2]
    elif flaws[0]["second_axial"]:  # the same levels twice; readers clicked in the first
        stacks.append((covered, range(0)))
    wanted = [(t, range(5), range(5)) for t in (T1, T2) if t != lacking] + [(AXIAL, *stack) for stack in stacks]
    series = []
    for series_id, own, (series_type, covered, graded) in zip(plan.series_ids, flaws[1:], wanted, strict=False):
        tilted, square = bool(flaws[0]["tilted_blocks"]), not own["non_square"]
        acquisition = plan_series(rng, body, series_type, tuple(covered), tilted, square, plan.protocol, visit)
        n = len(acquisition.affines)
        numbers = np.arange(1, n + 1)
        start, holes = dirt_rng.integers(100, 5000), (dirt_rng.random(3) * (n - 1)).astype(int)
        for hole in holes if own["number_gaps"] else ():
            numbers[hole + 1 :] += 1
        numbers += start * own["far_numbers"]
        numbers = numbers[::-1] if own[f"{vocabulary.PLANES[series_type]}_reversed"] else numbers
        read_here = [c.name for c in CONDITIONS.values() if vocabulary.GROUPS[c.group].series_type == series_type]
        columns = [condition in read_here and LEVELS.index(level) in graded for condition, level in COLUMN_KEYS]
        shown = [_sees(acquisition, point, np.inf) for point in acquisition.to_scanner(body.points())]
        series.append(Series(series_id, acquisition, numbers, np.array(columns) & shown))
    return series


def _add_labels(rows: dict[str, list[Row]], plan: StudyPlan, body: Body, given: np.ndarray) -> None:
    """Add labels `given` (25,) and what is behind them. In training, some become another grade."""
    rng = np.random.default_rng([*plan.seed, 6])
    draws, shift = rng.random(len(COLUMNS)), rng.integers(1, 3, len(COLUMNS))
    wrong = (draws < plan.dirt.label_wrong) & (given != MISSING)
    final = np.where(wrong, (given + shift) % 3, given)
    narrowing, measures = plan.narrowing.tolist(), body.measures().round(4).tolist()
    gross = np.where(given == MISSING, "", plan.gross).tolist()
    natural = labels.oracle(plan.narrowing).round(9).tolist()
    for i, row_id in enumerate(vocabulary.study_row_ids(plan.study_id)):
        own, unit = {"row_id": row_id, "split": plan.split}, "mm" if labels.COLUMN_GROUPS[i] == "ss" else "mm2"
        latent = {"narrowing": narrowing[i], "measure": measures[i], "unit": unit}
        rows["latents"].append(own | latent | {"own_grade": plan.own[i], "gross": gross[i]})
        rows["oracle"].append(own | dict(zip(SEVERITIES, natural[i], strict=True)))
        rows["sample_submission"].append({"row_id": row_id} | dict.fromkeys(SEVERITIES, 1 / 3))
        if given[i] != MISSING:
            rows["solution"].append({"row_id": row_id, "severity": given[i]})
        if wrong[i]:
            rows["wrong_labels"].append({"row_id": row_id, "severity": final[i], "meant": given[i]})
    words = [WORDS[grade] for grade in final]
    rows["train"].append({"study_id": plan.study_id} | dict(zip(COLUMNS, words, strict=True)))
    for name in ("train", "wrong_labels") if plan.split == "test" else ("sample_submission", "solution"):
        rows.pop(name, None)


def _spine(body: Body, series: list[Series]) -> Row:
    """What kind of spine and images a study has, to report results by."""
    traits, images = body.traits, [part.acquisition for part in series]
    return {
        "ordinary": not traits["transitional"] and not traits["slip"],
        "transitional": traits["transitional"],
        "slip_mm": traits["slip"],
        "slip_level": LEVELS[traits["slip_level"]] if traits["slip"] else "",
        "scoliosis_mm": round(abs(traits["scoliosis"]), 3),
        "stir": any(image.sequence in ("stir", "t2fs") for image in images),
        "tilted_blocks": any(image.blocks.max() > 1 for image in images),
    }


def _places(acquisition: Acquisition, body: Body, split: str) -> Iterator[tuple[str, Row]]:
    """Where a series sees the 25 places, the five discs and, in training, the marks (LPS mm), as table and row: none
    beyond its slices, but marks, which tell what an image does not show."""
    middles, normals = body.disc_planes()
    turned = (normals @ acquisition.motion[:3, :3].T).round(6).tolist()
    keys = [("anatomy", {"condition": c, "level": v, "side": CONDITIONS[c].side or ""}) for c, v in COLUMN_KEYS]
    keys += [("discs", {"level": v} | dict(zip(NORMAL, n, strict=True))) for v, n in zip(LEVELS, turned, strict=True)]
    places = [body.points(), middles]
    if split == "train":
        marks = body.marks()
        keys += [("train_marks", {"mark": mark}) for mark in marks]
        places.append(np.array(list(marks.values())))
    for (name, row), point in zip(keys, acquisition.to_scanner(np.concatenate(places)), strict=True):
        if name == "train_marks" or _sees(acquisition, point, acquisition.step):
            yield name, row | dict(zip("XYZ", point.round(3).tolist(), strict=True))


def _sees(acquisition: Acquisition, point: np.ndarray, reach: float) -> bool:
    """Whether a point (3,), LPS mm, lies in the image of the nearest slice, `reach` mm away at most."""
    x, y, away = geometry.to_pixels(acquisition.affines, point).T
    near = np.argmin(np.abs(away))
    return _in_image(acquisition, x[near], y[near]) and bool(abs(away[near]) <= reach)


def _in_image(acquisition: Acquisition, x: float, y: float) -> bool:
    return 0 <= x <= acquisition.cols - 1 and 0 <= y <= acquisition.rows - 1


def _points(
    split: str, series: Series, body: Body, rng: np.random.Generator, lost: np.ndarray, swapped: np.ndarray
) -> Iterator[Row]:
    """The points of a series: clicked in training, true in test studies, none outside the images. lost: levels (5,)
    without canal point; swapped: with exchanged subarticular points."""
    acquisition, clicked = series.acquisition, split == "train"
    affines, blocks = acquisition.affines, acquisition.blocks
    seen, direction = acquisition.to_scanner(body.points()), rng.choice([-1, 1], len(LEVELS))
    for column in np.flatnonzero(series.columns):
        error, draw = rng.normal(0, CLICK_SD, 2), rng.random()
        condition, level = COLUMN_KEYS[column]
        k, group = LEVELS.index(level), CONDITIONS[condition].group
        x, y, away = geometry.to_pixels(affines, seen[column]).T
        near = int(np.argmin(np.abs(away)))
        if clicked:
            beside = near + direction[k]
            if draw < CLICK_OFF_SLICE and 0 <= beside < len(affines) and blocks[beside] == blocks[near]:
                near = beside
            off = error / geometry.spacing(affines[near])
            x, y = x + off[0], y + off[1]
            condition = vocabulary.mirrored(condition) if group == "ss" and swapped[k] else condition
        if _in_image(acquisition, x[near], y[near]) and not (clicked and group == "scs" and lost[k]):
            yield {
                "instance_number": int(series.numbers[near]),
                "condition": CONDITIONS[condition].title,
                "level": vocabulary.LEVEL_NAMES[k],
                "x": round(float(x[near]), 3),
                "y": round(float(y[near]), 3),
            }


def write_series(folder: Path, study_id: int, series: Series, uids: tuple[int, int], pixels: np.ndarray) -> None:
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
