"""What the page of a study shows: slices as small images with marks, and which studies are shown with all slices.
Images are AVIF inside the page, which draws the marks over them in mm of the slice: these stay sharp."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from lsdc_utils import figures, geometry, vocabulary
from lsdc_utils.data.stacks import Stack
from lsdc_utils.grading.evaluation import judge
from lsdc_utils.grading.marks import REACH, distances, row_words, worst_slice
from lsdc_utils.report.pictures import avif
from lsdc_utils.vocabulary import FORAMINAL, GROUPS, LEVEL_NAMES, LEVELS, MISSING, SPINAL_CANAL, SUBARTICULAR

# Columns of a study's table: as on films, the patient's left is at the viewer's right.
GRID = (f"right_{SUBARTICULAR}", f"right_{FORAMINAL}", SPINAL_CANAL, f"left_{FORAMINAL}", f"left_{SUBARTICULAR}")
KEY_WIDTH = 80.0  # mm of a slice shown around a point
LARGEST = 384  # pixels of a side of an image; larger ones are scaled down
KEY_QUALITY, SERIES_QUALITY = 40, 33  # of AVIF; a slice of 192 x 192 pixels takes about 3 kB


def show_study(
    rows: pd.DataFrame, stacks: Sequence[Stack], boxes_mm: dict[str, float], whole: bool
) -> tuple[dict[str, tuple[dict, str, int]], list[dict]]:
    """A study's images: key slices of the rows graded moderate or severe, and if `whole` its series to scroll.

    rows: the study's rows of `read_graded`; boxes_mm: side of the detectors' boxes by group. Key slices, those nearest
    to the detected point, are row id -> slice (a dict as film.html.j2 draws it), key of its viewer, number of the slice
    in it. A viewer: key, title, films (its slices), first (the slice shown at the start)."""
    series = [stack for kind in vocabulary.SERIES_TYPES for stack in stacks if stack.series_type == kind]
    rows = rows.assign(box_mm=rows["group"].map(boxes_mm).fillna(0)).dropna(subset=["X"])
    keys, viewers = {}, []
    for row in rows[rows["grade"] > 0].itertuples():
        own = [k for k, stack in enumerate(series) if stack.series_type == GROUPS[row.group].series_type]
        if place := worst_slice([series[k] for k in own], rows[rows["row_id"] == row.row_id]):
            n, number = place[1], own[place[2]]
            affine, size = series[number].affines[n], series[number].shapes[n][::-1]
            middle = geometry.to_pixels(affine, np.array([row.X, row.Y, row.Z]))[:2]
            reach = KEY_WIDTH / 2 / geometry.spacing(affine)
            start = np.maximum(np.floor(middle - reach), 0).astype(int)
            stop = np.minimum(np.ceil(middle + reach) + 1, size).astype(int)
            keys[row.row_id] = _film(series[number], n, start, stop, [row], KEY_QUALITY), f"series{number}", n
    for number, stack in enumerate(series if whole else ()):
        own = rows[rows["group"].map(lambda key: GROUPS[key].series_type) == stack.series_type]
        near, start = [list(own[off <= REACH].itertuples()) for off in distances(stack, own)], np.zeros(2, int)
        films = [_film(stack, n, start, stack.shapes[n][::-1], near[n], SERIES_QUALITY) for n in range(len(near))]
        viewer = {"key": f"series{number}", "title": f"{stack.series_type} (series {stack.series_id})", "films": films}
        place = worst_slice([stack], own)
        viewers.append(viewer | {"first": place[1] if place else len(films) // 2})
    return keys, viewers


def _film(stack: Stack, n: int, start: np.ndarray, stop: np.ndarray, rows: list, quality: int) -> dict[str, Any]:
    """Slice n from pixel `start` to before `stop` (x, y), with marks at the points of rows; lengths in mm."""
    affine, marks = stack.affines[n], []
    step = geometry.spacing(affine)
    width, height = (step * (stop - start)).round(1).tolist()
    for row in rows:
        place = (geometry.to_pixels(affine, np.array([row.X, row.Y, row.Z]))[:2] + 0.5 - start) * step
        x, y = place.round(1).tolist()
        marks.append({"x": x, "y": y, "grade": row.grade, "words": row_words(row), "box_mm": row.box_mm})
    alt = f"{stack.series_type}, slice {n + 1} of {len(stack.pixels)}"
    alt += f"; marked: {'; '.join(mark['words'] for mark in marks)}" if marks else ""
    image = Image.fromarray(stack.pixels[n, start[1] : stop[1], start[0] : stop[0]])
    film = {"address": avif(image, quality, LARGEST), "alt": alt, "width": width, "height": height, "marks": marks}
    return film | {"letters": figures.edge_letters(affine), "scale_mm": figures.scale_length(width)}


def study_losses(rows: pd.DataFrame) -> pd.Series:
    """Weighted log loss of each study's labelled rows, by study id; empty where nothing is labelled."""
    known = rows[rows["severity"] != MISSING]
    sums = judge(known, known).astype({"study_id": int}).groupby("study_id")[["loss", "weight"]].sum()
    return sums["loss"] / sums["weight"]


def choose_studies(rows: pd.DataFrame, count: int, seed: int) -> dict[int, str]:
    """Studies that are shown with all their slices, with the reason: the largest losses, the surest, a random draw.
    Without any label, the least sure replace those with the largest losses."""
    sure, losses = rows.groupby("study_id")["confidence"].mean(), study_losses(rows)
    worst, reason = (losses, "among the largest losses") if len(losses) else (-sure, "among the least sure")
    chosen = dict.fromkeys(worst.nlargest(-(-count // 3)).index.tolist(), reason)
    chosen |= dict.fromkeys(sure.drop(list(chosen)).nlargest(count // 3).index.tolist(), "among the surest")
    drawn = np.random.default_rng(seed).permutation(sure.index.difference(list(chosen)))
    return chosen | dict.fromkeys(drawn[: max(count - len(chosen), 0)].tolist(), "drawn at random")


def overview(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A dict for each study: page, counts, confidence, agreement, loss, `cells` (grade, confidence, level of the worst
    row of each condition of `GRID`; where all are normal or mild, of the least sure one), and `rows` (group, grade and
    confidence in per cent of each row, for filters)."""
    losses, lines = study_losses(rows), []
    for study, of_study in rows.groupby("study_id"):
        sure = of_study["confidence"].where(of_study["grade"] > 0, -of_study["confidence"])
        worst = of_study.loc[(of_study["grade"] + sure).groupby(of_study["condition"]).idxmax()]
        worst = worst.set_index("condition").loc[list(GRID)]
        levels = worst["level"].map(dict(zip(LEVELS, LEVEL_NAMES, strict=True)))
        known = of_study[of_study["severity"] != MISSING]
        line = {"study_id": study, "page": f"study_{study}.html", "loss": losses.get(study), "known": len(known)}
        line["cells"] = list(zip(worst["grade"], worst["confidence"], levels, strict=True))
        line["moderate"], line["severe"] = ((of_study["grade"] == k).sum() for k in (1, 2))
        line["lowest"], line["agreed"] = of_study["confidence"].min(), (known["grade"] == known["severity"]).sum()
        line["rows"] = " ".join(f"{row.group}{row.grade}{100 * row.confidence:.0f}" for row in of_study.itertuples())
        lines.append(line)
    return lines
