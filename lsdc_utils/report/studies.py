"""What the page of a study shows: slices as small images with marks, and which studies are shown with all slices.

Images are AVIF inside the page. The page draws the marks over them, in millimetres of the slice, so that the marks stay
sharp and can be hidden.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lsdc_utils import figures, geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.grading.marks import REACH, distances, row_words, worst_slice
from lsdc_utils.metric import WEIGHTS, weight_rows
from lsdc_utils.vocabulary import GROUPS, LEVEL_NAMES, LEVELS, MISSING, SERIES_TYPES, SEVERITIES

# Columns of a study's table: as on films, the patient's left is at the viewer's right.
GRID = (
    "right_subarticular_stenosis",
    "right_neural_foraminal_narrowing",
    "spinal_canal_stenosis",
    "left_neural_foraminal_narrowing",
    "left_subarticular_stenosis",
)
KEY_WIDTH = 80.0  # mm of a slice shown around a point
LARGEST = 384  # pixels of a side of an image; larger ones are scaled down
QUALITY = {"key": 46, "series": 38}  # of AVIF; a slice of 192 x 192 pixels takes about 3 kB


@dataclass(frozen=True)
class Film:
    """One slice, or a part of one, as a page shows it."""

    address: str  # data:image/avif;base64,...
    width: float  # mm
    height: float  # mm
    letters: dict[str, str]  # orientation at the left, right, top and bottom edge
    scale_mm: int  # length of the scale bar
    alt: str
    marks: list[dict[str, Any]]  # points of rows: x, y (mm from the upper left corner), grade, words, box_mm (0: none)


@dataclass(frozen=True)
class Viewer:
    """A series to scroll through; `first` is the slice shown at the start."""

    key: str  # id on the page
    title: str
    films: list[Film]
    first: int


def page_of(study_id: int) -> str:
    """File name of a study's page in the report's folder."""
    return f"study_{study_id}.html"


def show_study(
    rows: pd.DataFrame, stacks: Sequence[Stack], boxes_mm: dict[str, float], whole: bool
) -> tuple[dict[str, tuple[Film, str, int]], list[Viewer]]:
    """A study's images: key slices of the rows graded moderate or severe, and if `whole` its series to scroll.

    rows: the study's rows of `read_graded`; boxes_mm: side of the detectors' boxes by group (nfn, scs, ss). Key slices
    are row id -> slice, key of its viewer, number of the slice in it. They are nearest to the detected point; a row
    without a point near any slice has none.
    """
    series = [stack for kind in SERIES_TYPES for stack in stacks if stack.series_type == kind]
    keys = {}
    for row in rows[rows["grade"] > 0].dropna(subset=["X"]).itertuples():
        own = [k for k, stack in enumerate(series) if stack.series_type == GROUPS[row.group].series_type]
        place = worst_slice([series[k] for k in own], rows[rows["row_id"] == row.row_id])
        if place:
            _, n, k = place
            keys[row.row_id] = (_key_film(series[own[k]], n, row, boxes_mm), f"series{own[k]}", n)
    viewers = [_viewer(f"series{k}", stack, rows, boxes_mm) for k, stack in enumerate(series)] if whole else []
    return keys, viewers


def _key_film(stack: Stack, n: int, row: Any, boxes_mm: dict[str, float]) -> Film:
    """The part of a slice around the point of one row."""
    affine = stack.affines[n]
    middle = geometry.to_pixels(affine, np.array([row.X, row.Y, row.Z]))[:2]
    reach = KEY_WIDTH / 2 / geometry.spacing(affine)
    x0, y0 = np.maximum(np.floor(middle - reach), 0).astype(int)
    x1, y1 = np.minimum(np.ceil(middle + reach) + 1, stack.shapes[n][::-1]).astype(int)
    return _film(stack, n, (x0, y0, x1, y1), [row], boxes_mm, "key")


def _viewer(key: str, stack: Stack, rows: pd.DataFrame, boxes_mm: dict[str, float]) -> Viewer:
    """All slices of a series; on each the points within `REACH` of rows that are graded on this type of series."""
    graded_here = rows["group"].map({key: group.series_type for key, group in GROUPS.items()}) == stack.series_type
    own = rows[graded_here].dropna(subset=["X"])
    off, lines, films = distances(stack, own), list(own.itertuples()), []
    for n, (height, width) in enumerate(stack.shapes.tolist()):
        near = [line for line, distance in zip(lines, off[n], strict=True) if distance <= REACH]
        films.append(_film(stack, n, (0, 0, width, height), near, boxes_mm, "series"))
    place = worst_slice([stack], own)
    title = f"{stack.series_type} (series {stack.series_id})"
    return Viewer(key, title, films, place[1] if place else len(films) // 2)


def _film(
    stack: Stack, n: int, part: tuple[int, int, int, int], near: list, boxes_mm: dict[str, float], kind: str
) -> Film:
    """Slice n cut to `part` (x0, y0, x1, y1 in pixels), with marks at the points of the rows `near` it."""
    x0, y0, x1, y1 = part
    affine, marks = stack.affines[n], []
    step = geometry.spacing(affine)
    width, height = (step * (x1 - x0, y1 - y0)).tolist()
    for row in near:
        x, y = (geometry.to_pixels(affine, np.array([row.X, row.Y, row.Z]))[:2] + 0.5 - (x0, y0)) * step
        mark = {"x": round(float(x), 1), "y": round(float(y), 1), "grade": int(row.grade), "words": row_words(row)}
        marks.append(mark | {"box_mm": boxes_mm.get(row.group, 0.0)})
    alt = f"{stack.series_type}, slice {n + 1} of {len(stack.pixels)}"
    alt += f"; marked: {'; '.join(mark['words'] for mark in marks)}" if marks else ""
    address = avif(Image.fromarray(stack.pixels[n, y0:y1, x0:x1]), QUALITY[kind], LARGEST)
    letters, scale = figures.edge_letters(affine), figures.scale_length(width)
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
    """Studies that are shown with all their slices, with the reason: the largest losses, the surest, a random draw.

    Without any label, the least sure replace those with the largest losses.
    """
    sure = rows.groupby("study_id")["confidence"].mean()
    losses = study_losses(rows)
    worst, reason = (losses, "among the largest losses") if len(losses) else (-sure, "among the least sure")
    chosen = dict.fromkeys(worst.nlargest(-(-count // 3)).index.tolist(), reason)
    for study in sure[~sure.index.isin(list(chosen))].nlargest(count // 3).index.tolist():
        chosen[study] = "among the surest"
    left = sorted(set(sure.index) - set(chosen))
    drawn = np.random.default_rng(seed).permutation(left)[: max(count - len(chosen), 0)]
    return chosen | dict.fromkeys(drawn.tolist(), "drawn at random")


def overview(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A dict for each study: its page, the worst row of each condition, counts, confidence, agreement and loss.

    `cells` are (grade, confidence, level) in the order of `GRID`; `rows` is what the page's filters read: condition
    group, grade and confidence in per cent of each row.
    """
    losses, lines = study_losses(rows), []
    for study, of_study in rows.groupby("study_id", sort=True):
        worst = of_study.sort_values(["grade", "confidence"]).groupby("condition").last().loc[list(GRID)]
        known = of_study[of_study["severity"] != MISSING]
        levels = [LEVEL_NAMES[LEVELS.index(level)] for level in worst["level"]]
        line = {"study_id": int(study), "page": page_of(study), "loss": losses.get(study)}
        line["cells"] = list(zip(worst["grade"].tolist(), worst["confidence"].tolist(), levels, strict=True))
        line["moderate"], line["severe"] = ((of_study["grade"] == k).sum() for k in (1, 2))
        line["lowest"] = float(of_study["confidence"].min())
        line["agreed"], line["known"] = (known["grade"] == known["severity"]).sum(), len(known)
        line["rows"] = " ".join(f"{row.group}{row.grade}{100 * row.confidence:.0f}" for row in of_study.itertuples())
        lines.append(line)
    return lines
