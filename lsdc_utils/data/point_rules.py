"""Rules of where label points lie in the patient: on their side of the canal, levels in order and near each other."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np
import pandas as pd

from lsdc_utils import vocabulary as words
from lsdc_utils.data.competition import KEY

MARGIN = 3.0  # mm beyond the canal that a point may lie on the other side: readers and patients move
LEAN = 0.15  # mm more per mm of height to the nearest place where the canal is known: spines lean
MIDDLE_MARGIN = 8.0  # mm, if the canal is only known to be near the middle of the sagittal slices
HALF_PAIR = 4.0  # mm from each of two points to their midpoint; closer pairs do not locate the canal
CANAL_REACH = 20.0  # mm of height over which a known place of the canal counts
LEVEL_APART = 25.0  # mm of height: points of one level lie within 16 on three series, levels 25 to 40 apart


class _Point(NamedTuple):
    """Where a label's point lies in the patient, LPS mm."""

    series_id: int
    x: float
    z: float


_Points = dict[tuple[str, str], _Point]  # of one study, by condition and level


def judge(places: pd.DataFrame, middles: dict[int, float]) -> list[str]:
    """The rule that each point breaks, '' if none; the first of side, order of levels, distance of levels.

    places: study_id, series_id, condition, level, X, Y, Z (LPS mm), at most one row per label. middles: patient x of
    the middle of a study's sagittal slices, used if nothing else locates the canal.
    """
    broken = {}
    for study, part in places.groupby("study_id"):
        rows = zip(part.condition, part.level, part.series_id, part.X, part.Z, strict=True)
        points = {(condition, level): _Point(*place) for condition, level, *place in rows}
        rules = (
            dict.fromkeys(_apart(points), "level_points_apart")
            | dict.fromkeys(_out_of_order(points), "levels_out_of_order")
            | _wrong_sides(points, middles.get(study))
        )
        broken |= {(study, *label): rule for label, rule in rules.items()}
    return [broken.get(label, "") for label in places[KEY].itertuples(index=False, name=None)]


def _wrong_sides(points: _Points, middle: float | None) -> dict[tuple[str, str], str]:
    """Points of one study on the wrong side of the canal -> rule.

    The canal is located by its own points and by the midpoints of other left and right pairs. A pair whose left point
    lies to the right of its right one is wrong by itself.
    """
    pairs: dict[tuple[str, str], dict[str, _Point]] = defaultdict(dict)
    canal = []  # (group, level), z, x
    for (condition, level), point in points.items():
        group, side = words.CONDITIONS[condition].group, words.CONDITIONS[condition].side
        if side is None:
            canal.append(((group, level), point.z, point.x))
        else:
            pairs[group, level][side] = point
    for key, pair in pairs.items():
        if len(pair) == 2 and abs(pair["left"].x - pair["right"].x) > 2 * HALF_PAIR:
            canal.append((key, *(sum(getattr(point, axis) for point in pair.values()) / 2 for axis in "zx")))
    rules = {}
    for (group, level), pair in pairs.items():
        known = [(z, x) for key, z, x in canal if key != (group, level)]
        z = sum(point.z for point in pair.values()) / len(pair)
        rule, sides = _judge_pair(pair, *_canal_x(known, z, middle))
        conditions = {c.side: c.name for c in words.CONDITIONS.values() if c.group == group}
        rules |= {(conditions[side], level): rule for side in sides}
    return rules


def _canal_x(known: list[tuple[float, float]], z: float, middle: float | None) -> tuple[float | None, float]:
    """Patient x of the canal at height z (None if unknown), and how far a point may lie beyond it; mm.

    known: (z, x) of points in the canal. The result is their median, weighted by nearness in height: a single point
    clicked on the neighbouring slice, 4 mm off, does not move it.
    """
    if not known:
        return middle, MIDDLE_MARGIN
    heights, xs = np.array(sorted(known, key=lambda point: point[1])).T
    off = (heights - z) / CANAL_REACH
    share = np.cumsum(np.exp(-(off**2 - (off**2).min()) / 2))
    low, high = np.searchsorted(share, share[-1] * np.array([0.5 - 1e-9, 0.5 + 1e-9]))
    return float(xs[low] + xs[high]) / 2, MARGIN + LEAN * CANAL_REACH * float(np.abs(off).min())


def _judge_pair(pair: dict[str, _Point], canal: float | None, margin: float) -> tuple[str, tuple[str, ...]]:
    """The rule that the points of one condition group and level break, and the sides that break it."""
    to_left = {side: point.x - canal if canal is not None else 0.0 for side, point in pair.items()}
    if len(pair) == 1:
        ((side, off),) = to_left.items()
        wrong = off < -margin if side == "left" else off > margin
        return "point_on_wrong_side", (side,) if wrong else ()
    if min(to_left.values()) > margin:
        return "one_side_twice", ("right",)
    if max(to_left.values()) < -margin:
        return "one_side_twice", ("left",)
    swapped = pair["left"].x - pair["right"].x < -2 * MARGIN
    return "point_on_wrong_side", words.SIDES if swapped else ()


def _out_of_order(points: _Points) -> set[tuple[str, str]]:
    """The points of one study without which the levels of each condition follow each other from head to foot.

    The point that contradicts most others is removed first; of two that only contradict each other, both are.
    """
    removed = set()
    for condition in words.CONDITIONS:
        heights = {level: points[condition, level].z for level in words.LEVELS if (condition, level) in points}
        while wrong := Counter(
            level
            for upper in heights
            for lower in heights
            if words.LEVELS.index(upper) < words.LEVELS.index(lower) and heights[upper] <= heights[lower]
            for level in (upper, lower)
        ):
            worst = [level for level, count in wrong.items() if count == max(wrong.values())]
            removed |= {(condition, level) for level in worst}
            heights = {level: z for level, z in heights.items() if level not in worst}
    return removed


def _apart(points: _Points) -> set[tuple[str, str]]:
    """The points of one study that lie far in height from their level on most of at least two other witnesses.

    A witness is another series, by its nearest point of the level, or the point of the other side.
    """
    apart = set()
    for (condition, level), point in points.items():
        distances = defaultdict(list)
        for other_condition in words.CONDITIONS:
            other = points.get((other_condition, level))
            if other is not None and other_condition != condition:
                witness = other_condition if other.series_id == point.series_id else other.series_id
                distances[witness].append(abs(other.z - point.z))
        far = [min(mm) > LEVEL_APART for mm in distances.values()]
        if len(far) >= 2 and sum(far) > len(far) / 2:
            apart.add((condition, level))
    return apart
