"""Marks on slices: what a row says in words, which slice shows it, and a still picture of a study.

Marks are rows of a table: study_id, condition, group (a key of GROUPS), level, X, Y, Z (LPS mm or NaN), grade (0, 1, 2,
or -1 without a label) and confidence (of two equally bad rows the surer one is shown).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lsdc_utils import figures, geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVEL_NAMES, LEVELS, SEVERITY_NAMES

REACH = 6.0  # mm off a slice that a point may lie to be drawn on it
SHORT_NAMES = {
    name: f"{condition.side.capitalize()} {GROUPS[condition.group].score}" if condition.side else "Spinal canal"
    for name, condition in CONDITIONS.items()
}


def row_words(row: Any) -> str:
    """A row of `run_tables.read_graded` (an itertuples line) in words, e.g. `L4/L5 left foraminal: severe 72 %`."""
    name, level = SHORT_NAMES[row.condition], LEVEL_NAMES[LEVELS.index(row.level)]
    return f"{level} {name[0].lower()}{name[1:]}: {SEVERITY_NAMES[row.grade].lower()} {row.confidence:.0%}"


def distances(stack: Stack, rows: pd.DataFrame) -> np.ndarray:
    """Distance in mm of each row's point from each slice: (slices, rows); outside an image it is that much farther."""
    return geometry.image_distances(stack.affines, stack.shapes, rows[list("XYZ")].to_numpy(float).reshape(-1, 3))


def worst_slice(stacks: Sequence[Stack], rows: pd.DataFrame) -> tuple[int, int, int] | None:
    """The worst row that lies on any slice: its place among `rows`, the slice's number, the number of its stack."""
    if rows.empty or not stacks:
        return None
    by_stack = [distances(stack, rows) for stack in stacks]
    nearest = np.array([distance.min(axis=0) for distance in by_stack])  # (stacks, rows)
    on_a_slice = np.flatnonzero((nearest <= REACH).any(axis=0))
    if not len(on_a_slice):
        return None
    worst = max(on_a_slice, key=lambda k: (rows["grade"].iloc[k], rows["confidence"].iloc[k]))
    stack = int(nearest[:, worst].argmin())
    return int(worst), int(by_stack[stack][:, worst].argmin()), stack


def draw_still(stacks: Sequence[Stack], rows: pd.DataFrame, title: str = "") -> Figure:
    """One slice of each type of series that there is: the one nearest to the worst mark on any slice, with the marks
    beside it."""
    types = {stack.series_type for stack in stacks}
    shown = [group for group in GROUPS.values() if group.series_type in types] or list(GROUPS.values())
    figure = Figure(figsize=(1.5 + 2.5 * len(shown), 3.9), layout="constrained")
    for ax, group in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        of_group = rows[rows["group"] == group.key].dropna(subset=["X"])
        of_type = [stack for stack in stacks if stack.series_type == group.series_type]
        if (place := worst_slice(of_type, of_group)) is None:
            ax.set_axis_off()
            ax.set_title(f"{group.series_type}: nothing found")
            continue
        worst, k, number = place
        stack = of_type[number]
        near = of_group[distances(stack, of_group)[k] <= REACH]
        (height, width), points = stack.shapes[k], near[list("XYZ")].to_numpy(float)
        name = f"{group.series_type}, at {LEVEL_NAMES[LEVELS.index(of_group['level'].iloc[worst])]}"
        figures.show_slice(ax, stack.pixels[k, :height, :width], stack.affines[k], points, near["grade"], title=name)
    figures.severity_legend(figure, frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    return figure
