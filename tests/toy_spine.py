"""Toy studies for the tests of the detectors: a spine of bright balls, its labels, and what a perfect detector sees."""

from __future__ import annotations

import numpy as np
import pandas as pd

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.classes import DetectorConfig, class_table
from lsdc_utils.detector.dataset import Dataset
from lsdc_utils.detector.detections import Detections
from lsdc_utils.detector.localiser import MAPS, disc_places
from lsdc_utils.detector.spine import CANAL_COLUMNS, Discs
from lsdc_utils.vocabulary import AXIAL, CONDITIONS, GROUPS, LEVELS, SPINAL_CANAL, T1, T2, row_id

SIZES = {"nfn": (64, 32), "scs": (64, 32), "ss": (32, 32)}
WINDOWS = {"nfn": (256.0, 128.0), "scs": (256.0, 128.0), "ss": (96.0, 96.0)}
BESIDE = ((0.0, 0.0),) * len(LEVELS)  # the toy spine has its foramina at the height of the canal points
LATERAL = {"nfn": 18.0, "scs": 0.0, "ss": 12.0}  # mm off the midline


def write_dataset(stacks, labels, folder, *settings) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Write the data set of these stacks; settings: those of `Dataset`."""
    dataset, labels = Dataset(folder, *settings), labels.assign(train_on=True)
    parts = [dataset.add(stack, labels[labels["study_id"] == stack.study_id]) for stack in stacks]
    return dataset.finish(labels, parts)


def config(condition: str, **values) -> DetectorConfig:
    settings = dict(window=WINDOWS[condition], size=SIZES[condition], neighbours=True, box_mm=14.0)
    return DetectorConfig(condition, **(settings | {"canal_from_foramina": BESIDE} | values))


def level_centre(level: str, shift: float = 0.0) -> np.ndarray:
    """Where the toy spine has its canal at a level, LPS mm."""
    number = LEVELS.index(level)
    return np.array([shift, 20 + 3 * number, 70 - 35.0 * number])


def toy_points(condition: str, shift: float = 0.0) -> dict[tuple[str, str], np.ndarray]:
    """(condition, level) -> true point."""
    names = [c for c in CONDITIONS.values() if c.group == condition]
    sign = {"left": 1, "right": -1, None: 0}
    return {
        (c.name, level): level_centre(level, shift) + np.array([sign[c.side] * LATERAL[condition], 0, 0])
        for c in names
        for level in LEVELS
    }


def toy_stack(condition: str, severities: dict, study_id: int = 1, seed: int = 0) -> Stack:
    """A series with a bright ball at each point whose radius grows with severity, on noise."""
    rng = np.random.default_rng(seed)
    axial = condition == "ss"
    size, spacing = 96, 2.0 if axial else 2.7
    places = np.arange(84, -84, -6.0) if axial else np.arange(-30, 31, 5.0)
    affines = np.zeros((len(places), 4, 4))
    affines[:, 3, 3] = 1
    affines[:, :3, 0] = [spacing, 0, 0] if axial else [0, spacing, 0]
    affines[:, :3, 1] = [0, spacing, 0] if axial else [0, 0, -spacing]
    half = spacing * (size - 1) / 2
    affines[:, :3, 3] = [(-half, 30 - half, z) for z in places] if axial else [(x, 30 - half, half) for x in places]
    index = np.stack(np.meshgrid(np.arange(size), np.arange(size), [0], [1]), -1).reshape(-1, 4)
    pixels = np.empty((len(places), size, size), dtype=np.uint8)
    for target, affine in zip(pixels, affines, strict=True):
        grid = (index @ affine.T)[:, :3].reshape(size, size, 3)
        image = rng.normal(60, 10, (size, size))
        for key, point in toy_points(condition).items():
            off = np.linalg.norm(grid - point, axis=2)
            image += 150 * np.exp(-0.5 * (off / (3 + 2 * severities[key])) ** 2)
        target[:] = image.clip(0, 255)
    n = len(places)
    kind = {"nfn": T1, "scs": T2, "ss": AXIAL}[condition]
    shapes = np.full((n, 2), size, dtype=np.int32)
    series_id = study_id * 10 + list(GROUPS).index(condition)
    numbers = np.arange(7, 7 + n, dtype=np.int32)
    return Stack(study_id, series_id, kind, pixels, shapes, affines, numbers, np.zeros(n, dtype=np.int32))


def toy_labels(stack: Stack, condition: str, severities: dict) -> pd.DataFrame:
    """The label table's rows of one toy series: each point clicked on the nearest slice."""
    lines = []
    for (name, level), point in toy_points(condition).items():
        index = int(np.abs(geometry.plane_distances(stack.affines, point[None])[:, 0]).argmin())
        x, y, _ = geometry.to_pixels(stack.affines[index], point)
        clicked = stack.affines[index] @ [x, y, 0, 1]
        number = stack.instance_numbers[index]
        row = row_id(stack.study_id, name, level)
        lines.append(
            (row, stack.study_id, name, level, severities[name, level], stack.series_id, number, x, y, *clicked[:3])
        )
    names = ["row_id", "study_id", "condition", "level", "severity", "series_id", "instance_number"]
    return pd.DataFrame(lines, columns=[*names, "x", "y", "X", "Y", "Z"]).assign(train_on=True)


def toy_study(condition: str, study_id: int = 1) -> tuple[Stack, pd.DataFrame]:
    rng = np.random.default_rng(study_id)
    severities = {key: int(rng.integers(3)) for key in toy_points(condition)}
    stack = toy_stack(condition, severities, study_id, seed=study_id)
    return stack, toy_labels(stack, condition, severities)


def canal_labels(study_id: int = 1) -> pd.DataFrame:
    """The label table's rows of a toy study's canal, clicked on another series than `toy_study` gives."""
    table = canal_points(study_id)[["study_id", "level", *"XYZ"]].assign(condition=SPINAL_CANAL, severity=0)
    rows = [row_id(study_id, SPINAL_CANAL, level) for level in LEVELS]
    return table.assign(row_id=rows, series_id=study_id * 10 + 9, instance_number=1, x=48.0, y=48.0, train_on=True)


def ideal(condition: str, severities: dict, table: pd.DataFrame | None = None) -> tuple[Detections, DetectorConfig]:
    """What a perfect detector would say of a toy study: each true point twice, half a millimetre off, and clutter.

    table: the classes; those of the detector's own scheme, which tell severities alone, if None.
    """
    settings = config(condition)
    table = class_table(settings) if table is None else table
    rng = np.random.default_rng(0)
    points, scores, levels = [], [], []
    for (name, level), point in toy_points(condition).items():
        for _ in range(2):
            fits = table["severity"] == severities[name, level]
            for column, value in (("level", level), ("condition", name)):
                fits &= (table[column] == value) if column in table else True
            points.append(point + rng.normal(0, 0.5, 3))
            scores.append(np.where(fits, 0.8, 0.01))
            levels.append(LEVELS.index(level))
    for _ in range(30):  # clutter in front of the spine
        points.append(rng.uniform([-30, -80, -90], [30, -40, 90]))
        scores.append(np.full(len(table), 0.02))
        levels.append(int(rng.integers(5)))
    return Detections(np.array(points), np.array(scores), np.array(levels), np.array(levels)), settings


def no_detections(settings: DetectorConfig) -> Detections:
    none = np.empty(0, int)
    return Detections(np.empty((0, 3)), np.empty((0, len(class_table(settings)))), none, none)


def canal_points(study_id: int = 1, shift: float = 0.0) -> pd.DataFrame:
    lines = [(study_id, level, "", *level_centre(level, shift), 0.9, 0.95) for level in LEVELS]
    return pd.DataFrame(lines, columns=list(CANAL_COLUMNS))


def foramen_points(study_id: int = 1) -> pd.DataFrame:
    lines = [
        (study_id, level, CONDITIONS[name].side, *point, 0.8, 0.95)
        for (name, level), point in toy_points("nfn").items()
    ]
    return pd.DataFrame(lines, columns=list(CANAL_COLUMNS))


def discs(
    centres: dict[str, np.ndarray],
    seed: int = 0,
    series: tuple[str, ...] = (T1, T2),
    slices: int = 11,
    clutter=2,
    **scores,
) -> Discs:
    """What a localiser sees on sagittal slices 4 mm apart: every disc on each slice half a millimetre off, by the score
    of the map `disc`, the canal behind it where the slice shows that, and clutter in front.

    centres: canal points, from head to foot (name -> LPS mm). A disc whose name is a map has that map's score too.
    scores: those of maps on the discs that they are for, by default .9.
    """
    rng, points, table, on_t2 = np.random.default_rng(seed), [], [], []
    curve = np.array(list(centres.values())).reshape(-1, 3)
    middles = disc_places(curve, list(centres)) if len(curve) else curve

    def see(place: np.ndarray, x: float, **values: float) -> None:
        points.append(place * (0, 1, 1) + (x + place[0], 0, 0) + rng.normal(0, 0.5, 3) * (0, 1, 1))
        table.append([values.get(name, 0.02) for name in MAPS])

    for kind in series:
        for x in 4.0 * (np.arange(slices) - (slices - 1) / 2):
            for name, canal, middle in zip(centres, curve, middles, strict=True):
                own = {name: scores.get(name, 0.9)} if name in MAPS else {}
                see(middle, x, disc=scores.get("disc", 0.9) if name != "s1_s2" else 0.1, **own)
                if abs(x) <= 5 and name != "s1_s2":
                    see(canal, x, canal=scores.get("canal", 0.9))
            for _ in range(clutter):
                see(np.array([0, rng.uniform(-90, -60), rng.uniform(-90, 90)]), x)
            on_t2 += [kind == T2] * (len(points) - len(on_t2))
    table = np.array(table).reshape(-1, len(MAPS))
    return Discs(np.array(points).reshape(-1, 3), table, np.array(on_t2, dtype=bool), slices * len(series))
