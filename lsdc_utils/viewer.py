"""A study to look through in a notebook: series, slice, window, points and boxes; a still picture where nobody clicks.

Marks are rows of a table: study_id, group (nfn, scs, ss), level, X, Y, Z (LPS mm, NaN where there is no point), grade
(0, 1, 2, or -1 without a label), confidence (the surest of the worst is shown first) and words (what the row says).
"""

from __future__ import annotations

import base64
import functools
import html
import io
import os
from collections.abc import Callable

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lsdc_utils import figures, geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVEL_NAMES, LEVELS, SERIES_TYPES, SEVERITY_NAMES, Group

REACH = 6.0  # mm off a slice that a point may lie to be drawn on it
RUN_MARK = "LSDC_RUN"  # in the environment of every process of ./run_all.sh: there nobody clicks

SHORT_NAMES = {
    name: f"{condition.side.capitalize()} {GROUPS[condition.group].score}" if condition.side else "Spinal canal"
    for name, condition in CONDITIONS.items()
}

Reader = Callable[[int], list[Stack]]


def row_words(row) -> str:
    """A row of `graded.read_graded` in words, e.g. `L4/L5 left foraminal: severe 72 %`."""
    name = SHORT_NAMES[row.condition]
    level = LEVEL_NAMES[LEVELS.index(row.level)]
    return f"{level} {name[0].lower()}{name[1:]}: {SEVERITY_NAMES[row.grade].lower()} {row.confidence:.0%}"


class Viewer:
    """The controls of one viewer and the image that they change.

    read: gives the stacks of a study by its id; rows: the marks; boxes_mm: side of the boxes by group.
    """

    def __init__(self, read: Reader, rows: pd.DataFrame, boxes_mm: dict[str, float] | None = None):
        self.read, self.rows, self.boxes_mm = functools.lru_cache(4)(read), rows, boxes_mm or {}
        self.stacks: list[Stack] = []
        choice, wide = widgets.Dropdown, widgets.Layout(width="26em")
        self.study = choice(options=sorted(rows["study_id"].unique().tolist()), description="Study")
        self.series = choice(options=[], description="Series", layout=wide)
        self.slice = widgets.IntSlider(min=1, max=1, description="Slice", layout=wide)
        self.window = widgets.IntRangeSlider(min=0, max=255, value=(0, 255), description="Window", layout=wide)
        self.points = widgets.Checkbox(value=True, description="points")
        self.boxes = widgets.Checkbox(value=True, description="boxes")
        as_drawn = widgets.Layout(width="36em", height="max-content", align_self="flex-start")  # a box would stretch it
        self.image, self.text = widgets.Image(format="png", layout=as_drawn), widgets.HTML()
        self.study.observe(lambda _: self._open(), "value")
        self.series.observe(lambda _: self._turn(), "value")
        for control in (self.slice, self.window, self.points, self.boxes):
            control.observe(lambda _: self.draw(), "value")
        self._open()

    @property
    def box(self) -> widgets.Widget:
        """All of it, to be displayed."""
        controls = [self.study, self.series, self.slice, self.window, self.points, self.boxes]
        return widgets.HBox([widgets.VBox([*controls, self.text]), self.image])

    def _open(self) -> None:
        """Read the study that was chosen and show its first series."""
        found = [] if self.study.value is None else self.read(self.study.value)
        self.stacks = sorted(found, key=lambda stack: SERIES_TYPES.index(stack.series_type))
        names = [(f"{stack.series_type} ({stack.series_id})", k) for k, stack in enumerate(self.stacks)]
        self.series.options = names
        self.series.value = 0 if names else None  # which new options leave as it was
        if not names:
            self.image.value, self.text.value = b"", "This study has no series that can be read."
        self._turn()

    def _turn(self) -> None:
        """Go to the slice of the chosen series on which its worst mark lies."""
        if self.series.value is None:
            return
        stack = self.stacks[self.series.value]
        mine = self._marks(stack)
        self.slice.max = len(stack.pixels)
        found = worst_slice([stack], mine)
        self.slice.value = 1 + (found[1] if found else len(stack.pixels) // 2)
        self.draw()

    def _marks(self, stack: Stack) -> pd.DataFrame:
        """Rows of the study with a point, of the groups that are graded on this type of series."""
        groups = [key for key, group in GROUPS.items() if group.series_type == stack.series_type]
        mine = self.rows[(self.rows["study_id"] == self.study.value) & self.rows["group"].isin(groups)]
        return mine.dropna(subset=["X"])

    def draw(self) -> None:
        """Draw the chosen slice with what is marked on it, and tell the study's rows."""
        if self.series.value is None:
            return
        stack, k = self.stacks[self.series.value], self.slice.value - 1
        mine = self._marks(stack)
        near = mine[distances(stack, mine)[k] <= REACH]
        places, grades = near[list("XYZ")].to_numpy(float), near["grade"].to_numpy()
        boxes = None
        if self.boxes.value and len(near):
            half = near["group"].map(self.boxes_mm).fillna(0.0).to_numpy(float)[:, None] / 2
            middle, half = (
                geometry.to_pixels(stack.affines[k], places)[:, :2],
                half / geometry.spacing(stack.affines[k]),
            )
            boxes = np.hstack([middle - half, middle + half])
        figure = Figure(figsize=(6, 6), layout="constrained")
        rows, cols = stack.shapes[k]
        figures.show_slice(
            figure.add_subplot(),
            stack.pixels[k, :rows, :cols],
            stack.affines[k],
            places if self.points.value and len(near) else None,
            boxes=boxes,
            severities=grades,
            window=self.window.value,
            title=f"{stack.series_type}, slice {k + 1} of {len(stack.pixels)}",
        )
        self.image.value = png(figure)
        self.text.value = self._told(near.index)

    def _told(self, near: pd.Index) -> str:
        """The rows of the study as a list, those on the slice in bold."""
        mine = self.rows[self.rows["study_id"] == self.study.value]
        lines = [(index, html.escape(str(words))) for index, words in mine["words"].items()]
        return "<br>".join(f"<b>{words}</b>" if index in near else words for index, words in lines)


def show(
    read: Reader, rows: pd.DataFrame, still: Figure | None = None, boxes_mm: dict[str, float] | None = None
) -> Viewer | None:
    """Display a viewer of the studies in `rows`, or what it would begin with, where nobody is there to click.

    still: the picture to show then; default: of the study with most severe marks a slice of each type of series. Both
    go out together, so that a page made from the notebook has the picture. Returns the viewer, None in a run.
    """
    if rows.empty:
        print("no study to look at")
        return None
    if still is None:
        worst = rows["grade"].eq(2).groupby(rows["study_id"]).sum().idxmax()
        still = draw_still(read(int(worst)), rows[rows["study_id"] == worst], f"Study {worst}")
    alone = bool(os.environ.get(RUN_MARK))
    viewer = None if alone else Viewer(read, rows, boxes_mm)
    live = {} if alone else viewer.box._repr_mimebundle_()
    words = f"Slices of {rows['study_id'].nunique()} studies; in JupyterLab they can be scrolled."
    bundle = live | {"image/png": base64.b64encode(png(still)).decode(), "text/plain": words}
    display(bundle, raw=True, metadata={"image/png": {"alt": still.get_suptitle() or words}})
    return viewer


def png(figure: Figure) -> bytes:
    """A figure as PNG, whatever backend the notebook has."""
    content = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(content, format="png")
    return content.getvalue()


# ---- still pictures ------------------------------------------------------------------------------------------------


def draw_still(stacks: list[Stack], rows: pd.DataFrame, title: str = "") -> Figure:
    """One slice of each type of series: where the worst of the marks lies."""
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    for ax, group in zip(figure.subplots(1, len(GROUPS)), GROUPS.values(), strict=True):
        mine = rows[rows["group"] == group.key].dropna(subset=["X"])
        show_worst(ax, [stack for stack in stacks if stack.series_type == group.series_type], mine, group)
    figures.severity_legend(figure, frameon=False, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    return figure


def distances(stack: Stack, rows: pd.DataFrame) -> np.ndarray:
    """Distance in mm of each row's point from each slice: (slices, rows); outside an image it is that much farther."""
    places = rows[list("XYZ")].to_numpy(float).reshape(-1, 3)
    return geometry.image_distances(stack.affines, stack.shapes, places)


def worst_slice(stacks: list[Stack], rows: pd.DataFrame) -> tuple[int, int, int] | None:
    """Of the worst row that lies on any slice: its place among `rows`, the slice's number, the number of its stack."""
    off = [distances(stack, rows) for stack in stacks] if len(rows) else []
    nearest = np.array([one.min(axis=0) for one in off]) if off else np.empty((0, 0))
    reached = np.flatnonzero((nearest <= REACH).any(axis=0)) if nearest.size else []
    if not len(reached):
        return None
    worst = max(reached, key=lambda n: (rows["grade"].iloc[n], rows["confidence"].iloc[n]))
    stack = int(nearest[:, worst].argmin())
    return int(worst), int(off[stack][:, worst].argmin()), stack


def show_worst(ax: Axes, stacks: list[Stack], rows: pd.DataFrame, group: Group) -> None:
    """Draw the slice of `stacks` nearest to the worst of `rows` on any slice, with the points beside it."""
    found = worst_slice(stacks, rows)
    if found is None:
        ax.set_axis_off()
        ax.set_title(f"{group.series_type}: nothing found")
        return
    worst, k, number = found
    stack = stacks[number]
    near = rows[distances(stack, rows)[k] <= REACH]
    height, width = stack.shapes[k]
    title = f"{group.series_type}, at {LEVEL_NAMES[LEVELS.index(rows['level'].iloc[worst])]}"
    places = near[list("XYZ")].to_numpy(float)
    figures.show_slice(ax, stack.pixels[k, :height, :width], stack.affines[k], places, near["grade"], title=title)
