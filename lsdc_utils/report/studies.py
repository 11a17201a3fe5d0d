"""What the pages of single studies show: grades as text, slices as small images with marks, and studies worth a look.

Images are AVIF inside the page; what is marked on them is drawn over them by the page, in millimetres of the slice, so
that the marks stay sharp and can be switched off.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from PIL import Image

from lsdc_utils import figures, geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.grading.marks import REACH, distances, row_words, worst_slice
from lsdc_utils.metric import WEIGHTS, weight_rows
from lsdc_utils.vocabulary import (
    GROUPS,
    LEVEL_NAMES,
    LEVELS,
    MISSING,
    SERIES_TYPES,
    SEVERITIES,
)

# As on films, where the patient's left lies at the viewer's right.
GRID = (
    "right_subarticular_stenosis",
    "right_neural_foraminal_narrowing",
    "spinal_canal_stenosis",
    "left_neural_foraminal_narrowing",
    "left_subarticular_stenosis",
)
KEY_WIDTH = 80.0  # mm of a slice that is shown round a finding
LARGEST = 384  # pixels of a side of an image; more is scaled down
QUALITY = {"key": 46, "series": 38}  # of AVIF; a slice of 192 x 192 pixels takes about 3 kB


@dataclass(frozen=True)
class Mark:
    """A point of a row on a slice: its place in mm from the image's upper left corner, its grade and its words."""

    x: float
    y: float
    grade: int
    words: str
    box_mm: float  # side of the box round it; 0: none


@dataclass(frozen=True)
class Film:
    """One slice, or a part of one, as a page shows it."""

    address: str  # data:image/avif;base64,...
    width: float  # mm
    height: float  # mm
    letters: dict[str, str]  # orientation at the left, right, top and bottom edge
    scale_mm: int  # length of the scale bar
    alt: str
    marks: list[Mark] = field(default_factory=list)


@dataclass(frozen=True)
class Viewer:
    """A series to scroll through; `first` is the slice that is shown until somebody does."""

    key: str  # id on the page
    title: str
    films: list[Film]
    first: int


@dataclass(frozen=True)
class StudyPage:
    """What is known of one study, ready for its page."""

    study_id: int
    rows: pd.DataFrame  # its lines of `graded.read_graded`
    keys: dict[str, tuple[Film, str, int]]  # row id -> key slice, the viewer's id and the slice's number in it
    viewers: list[Viewer]

    @property
    def page(self) -> str:
        """File name in the report's folder."""
        return page_of(self.study_id)


def page_of(study_id: int) -> str:
    """File name of a study's page in the report's folder."""
    return f"study_{study_id}.html"


def show_study(rows: pd.DataFrame, stacks: list[Stack], boxes_mm: dict[str, float], whole: bool) -> StudyPage:
    """A study's page: a key slice for each finding that has one, and the series to scroll where it is `whole`.

    rows: the study's lines of `graded.read_graded`; boxes_mm: side of the detectors' boxes by group (nfn, scs, ss).
    Findings are rows that are graded moderate or severe; the key slice is the one nearest to the detected point.
    """
    series = [stack for kind in SERIES_TYPES for stack in stacks if stack.series_type == kind]
    keys = {}
    for row in rows[rows["grade"] > 0].dropna(subset=["X"]).itertuples():
        own = [k for k, stack in enumerate(series) if stack.series_type == GROUPS[row.group].series_type]
        found = worst_slice([series[k] for k in own], rows[rows["row_id"] == row.row_id])
        if found:
            _, n, place = found
            keys[row.row_id] = (_key_film(series[own[place]], n, row, boxes_mm), f"series{own[place]}", n)
    viewers = [_viewer(f"series{k}", stack, rows, boxes_mm) for k, stack in enumerate(series)] if whole else []
    return StudyPage(int(rows["study_id"].iloc[0]), rows, keys, viewers)


def _key_film(stack: Stack, n: int, row, boxes_mm: dict[str, float]) -> Film:
    """The part of a slice round the point of one row."""
    place = np.array([row.X, row.Y, row.Z])
    middle = geometry.to_pixels(stack.affines[n], place)[:2]
    reach = KEY_WIDTH / 2 / geometry.spacing(stack.affines[n])
    x0, y0 = np.maximum(np.floor(middle - reach), 0).astype(int)
    x1, y1 = np.minimum(np.ceil(middle + reach) + 1, stack.shapes[n][::-1]).astype(int)
    words = row_words(row)
    alt = f"{stack.series_type}, slice {n + 1} of {len(stack.pixels)}, round {words}"
    return _film(stack, n, (x0, y0, x1, y1), [(row, words)], boxes_mm, alt, QUALITY["key"])


def _viewer(key: str, stack: Stack, rows: pd.DataFrame, boxes_mm: dict[str, float]) -> Viewer:
    """All slices of a series, each with the points of rows that are graded on its type and lie near its plane."""
    own = [row for row in rows.itertuples() if GROUPS[row.group].series_type == stack.series_type and row.X == row.X]
    off = distances(stack, pd.DataFrame(own, columns=["Index", *rows.columns]))
    films = []
    for n, (rows_px, cols_px) in enumerate(stack.shapes):
        near = [(own[m], row_words(own[m])) for m in np.flatnonzero(off[n] <= REACH)]
        alt = f"{stack.series_type}, slice {n + 1} of {len(stack.pixels)}"
        alt += f"; marked: {'; '.join(words for _, words in near)}" if near else ""
        films.append(_film(stack, n, (0, 0, int(cols_px), int(rows_px)), near, boxes_mm, alt, QUALITY["series"]))
    worst = max(range(len(own)), key=lambda m: (own[m].grade, own[m].confidence), default=None)
    first = len(films) // 2 if worst is None else int(off[:, worst].argmin())
    same = f" (series {stack.series_id})"
    return Viewer(key, stack.series_type + same, films, first)


def _film(
    stack: Stack, n: int, part: tuple, near: Iterable[tuple], boxes_mm: dict[str, float], alt: str, quality: int
) -> Film:
    """Slice n cut to `part` (x0, y0, x1, y1 in pixels), with marks at the points of the rows `near` it."""
    x0, y0, x1, y1 = part
    affine = stack.affines[n]
    step = geometry.spacing(affine)
    width, height = (step * (x1 - x0, y1 - y0)).tolist()
    marks = []
    for row, words in near:
        x, y = (geometry.to_pixels(affine, np.array([row.X, row.Y, row.Z]))[:2] + 0.5 - (x0, y0)) * step
        marks.append(Mark(round(float(x), 1), round(float(y), 1), int(row.grade), words, boxes_mm.get(row.group, 0.0)))
    image = Image.fromarray(stack.pixels[n, y0:y1, x0:x1])
    address, letters, scale = avif(image, quality, LARGEST), figures.edge_letters(affine), figures.scale_length(width)
    return Film(address, round(width, 1), round(height, 1), letters, scale, alt, marks)


def avif(image: Image.Image, quality: int, largest: int = 4096) -> str:
    """An image as the address of an embedded AVIF image, scaled down to `largest` pixels a side."""
    image = image.convert("RGB")
    image.thumbnail((largest, largest))
    content = io.BytesIO()
    image.save(content, "AVIF", quality=quality)
    return f"data:image/avif;base64,{base64.b64encode(content.getvalue()).decode()}"


# ---- which studies -------------------------------------------------------------------------------------------------


def study_losses(rows: pd.DataFrame) -> pd.Series:
    """Weighted log loss of each study's labelled rows, by study id; empty where nothing is labelled."""
    known = rows[rows["severity"] != MISSING]
    weight = WEIGHTS[known["severity"]]
    chance = weight_rows(known[list(SEVERITIES)].to_numpy())[np.arange(len(known)), known["severity"]]
    parts = pd.DataFrame({"loss": -np.log(np.maximum(chance, 1e-15)) * weight, "weight": weight})
    sums = parts.groupby(known["study_id"].to_numpy()).sum()
    return sums["loss"] / sums["weight"]


def choose_studies(rows: pd.DataFrame, count: int, seed: int) -> dict[int, str]:
    """Studies whose series are shown whole, with the reason: the worst, the surest, and some drawn by `seed`.

    The worst have the largest loss; where no label is known, the least sure take their place.
    """
    sure = rows.groupby("study_id")["confidence"].mean()
    losses = study_losses(rows)
    worst, reason = (losses, "among the largest losses") if len(losses) else (-sure, "among the least sure")
    chosen = dict.fromkeys(worst.nlargest(-(-count // 3)).index.tolist(), reason)
    for study in sure[~sure.index.isin(list(chosen))].nlargest(count // 3).index.tolist():
        chosen[study] = "among the surest"
    left = sorted(set(sure.index) - set(chosen))
    drawn = np.random.default_rng(seed).permutation(left)[: max(count - len(chosen), 0)]
    return chosen | dict.fromkeys(drawn.tolist(), "drawn by lot")


def overview(rows: pd.DataFrame) -> list[dict]:
    """A line a study: id, block, worst row of each condition, findings, mean and lowest confidence, agreement, loss."""
    losses = study_losses(rows)
    return [_line(int(study), mine, losses.get(study)) for study, mine in rows.groupby("study_id", sort=True)]


def _line(study_id: int, mine: pd.DataFrame, loss: float | None) -> dict:
    """One study of the overview; cells are (grade, confidence, level) of the worst row of each condition of GRID."""
    worst = mine.sort_values(["grade", "confidence"]).groupby("condition").last()
    known = mine[mine["severity"] != MISSING]
    cells = [
        (int(row.grade), float(row.confidence), LEVEL_NAMES[LEVELS.index(row.level)])
        for row in worst.loc[list(GRID)].itertuples()
    ]
    return {
        "study_id": study_id,
        "page": page_of(study_id),
        "block": mine["block"].iloc[0],
        "cells": cells,
        "moderate": int((mine["grade"] == 1).sum()),
        "severe": int((mine["grade"] == 2).sum()),
        "lowest": float(mine["confidence"].min()),
        "agree": f"{(known['grade'] == known['severity']).sum()}/{len(known)}" if len(known) else "",
        "agreement": float((known["grade"] == known["severity"]).mean()) if len(known) else -1.0,
        "loss": loss,
        # For the filters: condition group, grade and confidence in per cent of each row.
        "rows": " ".join(f"{row.group}{row.grade}{row.confidence:.0%}"[:-1] for row in mine.itertuples()),
    }


def read_pages(
    rows: pd.DataFrame,
    read: Callable[[str, int], list[Stack]],
    boxes_mm: dict[str, float],
    whole: Iterable[int],
) -> Iterator[StudyPage]:
    """The page of each study, one after the other; `read` gives a study's stacks by block and id."""
    whole = set(whole)
    for study_id, mine in rows.groupby("study_id", sort=True):
        yield show_study(mine, read(mine["block"].iloc[0], int(study_id)), boxes_mm, study_id in whole)
