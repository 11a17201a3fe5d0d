"""An interactive viewer of studies in a notebook: series, slice, window, points and boxes; a still picture in a run.
Marks are rows of a table as `grading.marks` describes them, with one more column: words (what the row says)."""

import functools
import html
import os
from collections.abc import Callable
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.core.pylabtools import print_figure
from IPython.display import display
from matplotlib.figure import Figure

from lsdc_utils import figures, geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.grading.marks import REACH, distances, draw_still, worst_slice
from lsdc_utils.vocabulary import GROUPS, SERIES_TYPES

RUN_MARK = "LSDC_RUN"  # set in the environment of every process of ./run_all.sh
Reader = Callable[[int], list[Stack]]
Boxes = dict[str, float]  # side in mm by group


class Viewer:
    """The controls of one viewer and the image that they change; `box` is all of it, to be displayed. read: gives the
    stacks of a study by its id; rows: the marks."""

    def __init__(self, read: Reader, rows: pd.DataFrame, boxes_mm: Boxes | None = None):
        self.read, self.rows, self.boxes_mm = functools.lru_cache(4)(read), rows, boxes_mm or {}
        self.stacks: list[Stack] = []
        wide, as_drawn = widgets.Layout(width="26em"), widgets.Layout(width="36em", height="max-content")
        self.study = widgets.Dropdown(options=sorted(rows["study_id"].unique().tolist()), description="Study")
        self.series = widgets.Dropdown(options=[], description="Series", layout=wide)
        self.slice = widgets.IntSlider(min=1, max=1, description="Slice", layout=wide)
        self.window = widgets.IntRangeSlider(min=0, max=255, value=(0, 255), description="Window", layout=wide)
        self.points = widgets.Checkbox(value=True, description="points")
        self.boxes = widgets.Checkbox(value=True, description="boxes")
        self.image, self.text = widgets.Image(format="png", layout=as_drawn), widgets.HTML()
        self.study.observe(self._open_study, "value")
        self.series.observe(self._to_worst_slice, "value")
        self._open_study()
        controls = {name: getattr(self, name) for name in ("study", "series", "slice", "window", "points", "boxes")}
        drawn = widgets.interactive_output(self.draw, controls)  # on every change; shows what goes wrong
        self.box = widgets.HBox([widgets.VBox([*controls.values(), self.text]), widgets.VBox([self.image, drawn])])

    def _open_study(self, _: Any = None) -> None:
        """Read the chosen study and offer its series."""
        stacks = [] if self.study.value is None else self.read(self.study.value)
        self.stacks = sorted(stacks, key=lambda stack: SERIES_TYPES.index(stack.series_type))
        names = [(f"{stack.series_type} ({stack.series_id})", k) for k, stack in enumerate(self.stacks)]
        self.series.options = names
        self.series.value = 0 if names else None  # which new options leave as it was
        self._to_worst_slice()

    def _to_worst_slice(self, _: Any = None) -> None:
        """Go to the slice of the chosen series on which its worst mark lies."""
        if self.series.value is not None:
            stack = self.stacks[self.series.value]
            self.slice.max = len(stack.pixels)
            worst = worst_slice([stack], self._marks(stack))
            self.slice.value = 1 + (worst[1] if worst else len(stack.pixels) // 2)

    def _marks(self, stack: Stack) -> pd.DataFrame:
        """Rows of the study with a point, of the groups that are graded on this type of series."""
        groups = [key for key, group in GROUPS.items() if group.series_type == stack.series_type]
        rows = self.rows[(self.rows["study_id"] == stack.study_id) & self.rows["group"].isin(groups)]
        return rows.dropna(subset=["X"])

    def draw(self, study: int, series: int | None, slice: int, window: tuple, points: bool, boxes: bool) -> None:
        """Draw a slice with its marks, and list the study's rows, those on the slice in bold."""
        if series is None:
            self.image.value, self.text.value = b"", "This study has no series that can be read."
            return
        stack, k = self.stacks[series], slice - 1
        affine, (height, width), marks = stack.affines[k], stack.shapes[k], self._marks(stack)
        near = marks[distances(stack, marks)[k] <= REACH]
        places = near[list("XYZ")].to_numpy(float)
        middles = geometry.to_pixels(affine, places)[:, :2]
        sides = near["group"].map(self.boxes_mm).fillna(0.0).to_numpy(float)[:, None] / geometry.spacing(affine)
        squares = np.hstack([middles - sides / 2, middles + sides / 2]) if boxes and len(near) else None
        drawn = {"severities": near["grade"].to_numpy(), "boxes": squares, "window": window}
        drawn["title"] = f"{stack.series_type}, slice {slice} of {len(stack.pixels)}"
        figure, pixels = Figure(figsize=(6, 6), layout="constrained"), stack.pixels[k, :height, :width]
        figures.show_slice(figure.add_subplot(), pixels, affine, places if points and len(near) else None, **drawn)
        self.image.value = print_figure(figure, bbox_inches=None)
        words = self.rows.loc[self.rows["study_id"] == study, "words"].map(lambda words: html.escape(str(words)))
        lines = "<br>".join(f"<b>{text}</b>" if k in near.index else text for k, text in words.items())
        self.text.value = f'<div style="line-height: 1.35">{lines}</div>'  # all rows beside the image


def show(read: Reader, rows: pd.DataFrame, still: Figure | None = None, boxes_mm: Boxes | None = None) -> Viewer | None:
    """Display a viewer of the studies in `rows` and return it; in a run of the pipeline only the picture `still`, which
    a page made from the notebook shows (default: of the study with most severe marks)."""
    if rows.empty:
        print("no study to look at")
        return None
    if still is None:
        worst = rows["grade"].eq(2).groupby(rows["study_id"]).sum().idxmax()
        still = draw_still(read(int(worst)), rows[rows["study_id"] == worst], f"Study {worst}")
    viewer = None if os.environ.get(RUN_MARK) else Viewer(read, rows, boxes_mm)
    live = viewer.box._repr_mimebundle_() if viewer else {}
    words = f"Studies shown: {rows['study_id'].nunique()}; in JupyterLab their slices can be scrolled."
    bundle = live | {"image/png": print_figure(still, bbox_inches=None, base64=True), "text/plain": words}
    display(bundle, raw=True, metadata={"image/png": {"alt": still.get_suptitle() or words}})
    return viewer
