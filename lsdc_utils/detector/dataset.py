"""Data sets of the detectors in YOLO's format: boxes of labels, their copies on neighbouring slices, images."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import yaml

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import study_canal
from lsdc_utils.detector.classes import (
    DetectorConfig,
    DetectorError,
    class_numbers,
    class_table,
)
from lsdc_utils.detector.images import (
    near_middle,
    network_inputs,
    strip_window,
)
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, SIDES

COPY_FALL = 2 / 3  # of the reach of copies: the sigma by which a copy's weight falls with its distance


def label_boxes(
    stack: Stack, labels: pd.DataFrame, config: DetectorConfig, copy_mm: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Boxes of a series' labels, and the labels that gave none.

    `labels` are rows of the label table on this series. A box stands on the slice that the reader clicked and, where
    `copy_mm` > 0, on the slices of its block up to that far along the normal, since those show the same lesion. In
    scheme 'seen' both recesses of a level have a box on every slice that either of them has one on.
    Returns boxes (slice, row_id, class_id, severity, x, y, width, height as fractions of the strip, clipped to it,
    copied, off: mm from the clicked slice) and skipped (row_id, reason).
    """
    numbers = class_numbers(config)
    found, skipped, clicked = [], [], []
    for label in labels.itertuples():
        here = np.flatnonzero(stack.instance_numbers == label.instance_number)
        reason = _unusable(label, len(here))
        if reason:
            skipped.append((label.row_id, reason))
        else:
            clicked.append((label, here[0], slice_offsets(stack, label, here[0])))
    pairs = config.scheme == "seen" and config.condition == "ss"
    for label, own, off in clicked:
        near = off <= copy_mm
        for other, _, others_off in clicked if pairs else ():
            near |= (other.level == label.level) & (others_off <= copy_mm) & np.isfinite(off)
        before = len(found)
        for index in np.flatnonzero(near):
            point = np.array([label.X, label.Y, label.Z])
            xy = (label.x, label.y) if index == own else geometry.to_pixels(stack.affines[index], point)[:2]
            place = _box(xy, stack.shapes[index], stack.affines[index], config)
            if place:
                number = numbers[label.condition, label.level, label.severity]
                found.append((index, label.row_id, number, label.severity, *place, index != own, off[index]))
        if len(found) == before:
            skipped.append((label.row_id, "outside the strip"))
    names = ["slice", "row_id", "class_id", "severity", "x", "y", "width", "height", "clipped", "copied", "off"]
    table = pd.DataFrame(found, columns=names)
    if pairs:
        # A slice between two levels shows one lesion a side: the nearer label speaks for it.
        side = table["row_id"].str.extract(f"({'|'.join(SIDES)})", expand=False)
        order = table.assign(side=side).sort_values(["slice", "off"], kind="stable")
        table = order.drop_duplicates(["slice", "side"]).drop(columns="side")
    return table, pd.DataFrame(skipped, columns=["row_id", "reason"])


def slice_offsets(stack: Stack, label: Any, own: int) -> np.ndarray:
    """Distance (n,) in mm along the normal of every slice from a label's point on slice `own`; inf in other blocks."""
    off = np.abs(geometry.plane_distances(stack.affines, np.array([[label.X, label.Y, label.Z]]))[:, 0])
    off[own] = 0
    return np.where(stack.blocks == stack.blocks[own], off, np.inf)


def _unusable(label: Any, slices: int) -> str:
    """Why a label gives no box, or ''."""
    if label.severity < 0:
        return "no severity"
    if slices != 1:
        return "its slice is not in the series"
    if not np.isfinite([label.X, label.Y, label.Z, label.x, label.y]).all():
        return "no position"
    return ""


def _box(xy: Sequence[float], shape: Sequence[int], affine: np.ndarray, config: DetectorConfig) -> tuple | None:
    """Box round pixel `xy` as x, y, width, height in fractions of the strip, clipped to it, and whether it was clipped.

    None where the point itself is outside: ultralytics drops a whole image for one box that leaves it.
    """
    left, top, width, height = strip_window(shape, config)
    centre = np.array([(xy[0] + 0.5 - left) / width, (xy[1] + 0.5 - top) / height])  # pixel 0 ends at 0.5
    half = 0.5 * config.box_mm / geometry.spacing(affine) / np.array([width, height])
    if (centre < 0).any() or (centre > 1).any():
        return None
    low, high = np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
    clipped = bool((low > centre - half + 1e-9).any() or (high < centre + half - 1e-9).any())
    return (*((low + high) / 2), *(high - low), clipped)


def write_dataset(
    stacks: Iterable[Stack],
    labels: pd.DataFrame,
    folder: str | Path,
    config: DetectorConfig,
    copy_mm: float,
    margin_mm: float,
    background: int,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Write images, labels and data.yaml of one detector in YOLO's format; return its images, boxes, skipped labels.

    `stacks` may hold any series: those of the condition's type are used. A slice without a box is left out where
    a label lies up to `margin_mm` beyond its copies: what it shows is not known. `background` slices beyond that are
    added from each series that has boxes. images: file, study_id, series_id, slice, boxes, worst (severity, -1 without
    a box), weight (mean over the boxes of a normal curve of their distance from the click, 1 at the click).
    The tables are also written, as images.csv, boxes.csv and skipped.csv.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    mine = labels[labels["condition"].map({c.name: c.group for c in CONDITIONS.values()}) == config.condition]
    canal = study_canal(_label_points(labels, "scs"), _label_points(labels, "nfn"))
    images, found, skipped = [], [], []
    for stack in stacks:
        here = mine[mine["series_id"] == stack.series_id]
        if stack.series_type != GROUPS[config.condition].series_type or here.empty:
            continue
        table, left_out = label_boxes(stack, here, config, copy_mm)
        unknown = in_margin(stack, here, copy_mm + margin_mm)
        table = table.assign(weight=np.exp(-0.5 * (table["off"] / max(copy_mm * COPY_FALL, 1e-6)) ** 2))
        free = _background(stack, table["slice"].to_numpy(dtype=int), unknown, background if len(table) else 0)
        shown = network_inputs(stack, config, canal[canal["study_id"] == stack.study_id])
        images += _write_images(stack, table, shown, free, folder)
        found.append(table.assign(study_id=stack.study_id, series_id=stack.series_id))
        skipped.append(left_out)
    found, skipped = (pd.concat(tables, ignore_index=True) if tables else pd.DataFrame() for tables in (found, skipped))
    if found.empty:
        raise DetectorError(f"no box for detector {config.condition}: no label lies on a series that could be read")
    skipped = pd.concat([skipped, _never_met(mine, found, skipped)], ignore_index=True)
    images = pd.DataFrame(images, columns=["file", "study_id", "series_id", "slice", "boxes", "worst", "weight"])
    for name, table in (("images", images), ("boxes", found), ("skipped", skipped)):
        table.to_csv(folder / f"{name}.csv", index=False)
    names = dict(enumerate(class_table(config)["name"]))
    (folder / "data.yaml").write_text(yaml.safe_dump({"path": ".", "train": "images", "val": "images", "names": names}))
    return images, found, skipped


def _never_met(labels: pd.DataFrame, found: pd.DataFrame, skipped: pd.DataFrame) -> pd.DataFrame:
    """Labels whose series did not come by, with the reason."""
    rest = labels[~labels["row_id"].isin(found["row_id"]) & ~labels["row_id"].isin(skipped.get("row_id", []))]
    reason = np.select(
        [rest["severity"] < 0, rest["series_id"].isna() | (rest["series_id"] <= 0)],
        ["no severity", "no coordinate"],
        "its series has another type or could not be read",
    )
    return pd.DataFrame({"row_id": rest["row_id"], "reason": reason})


def _label_points(labels: pd.DataFrame, group: str) -> pd.DataFrame:
    """The readers' points of a condition group, in the columns of detected ones."""
    side = {c.name: c.side or "" for c in CONDITIONS.values() if c.group == group}
    mine = labels[labels["condition"].isin(list(side))].dropna(subset=["X", "Y", "Z"])
    mine = mine.assign(side=mine["condition"].map(side), confidence=1.0)
    return mine[["study_id", "level", "side", "X", "Y", "Z", "confidence"]]


def in_margin(stack: Stack, labels: pd.DataFrame, reach: float) -> np.ndarray:
    """Slices (n,) bool from which some label's point lies up to `reach` mm along the normal."""
    found = np.zeros(len(stack.pixels), dtype=bool)
    for label in labels.itertuples():
        here = np.flatnonzero(stack.instance_numbers == label.instance_number)
        if len(here) == 1 and np.isfinite([label.X, label.Y, label.Z]).all():
            found |= slice_offsets(stack, label, here[0]) <= reach
    return found


def _write_images(stack: Stack, table: pd.DataFrame, shown: np.ndarray, free: np.ndarray, folder: Path) -> list[tuple]:
    """Write the slices of a series with boxes in `table`, and the `free` ones; return their lines of images.csv."""
    lines = []
    for index in np.union1d(table["slice"].to_numpy(dtype=int), free).astype(int):
        mine = table[table["slice"] == index]
        name = f"{stack.study_id}_{stack.series_id}_{index:03d}"
        # OpenCV writes and ultralytics turns the order of channels round: the file shows them as the network sees them.
        cv2.imwrite(str(folder / "images" / f"{name}.png"), shown[index].transpose(1, 2, 0)[..., ::-1])
        text = [f"{b.class_id} {b.x:.6f} {b.y:.6f} {b.width:.6f} {b.height:.6f}" for b in mine.itertuples(index=False)]
        (folder / "labels" / f"{name}.txt").write_text("\n".join(text) + "\n" * bool(text))
        worst, weight = (int(mine["severity"].max()), mine["weight"].mean()) if len(mine) else (-1, 1.0)
        lines.append((f"images/{name}.png", stack.study_id, stack.series_id, index, len(mine), worst, weight))
    return lines


def _background(stack: Stack, used: np.ndarray, unknown: np.ndarray, count: int) -> np.ndarray:
    """`count` slices without a box or a label in their margin, spread evenly over those that prediction looks at."""
    free = near_middle(stack) & ~unknown
    free[used] = False
    index = np.flatnonzero(free)
    return index[np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int)]


def training_images(images: pd.DataFrame, studies: Iterable[int], repeats: Sequence[int]) -> pd.DataFrame:
    """Images of these studies: file, and how often each is shown in an epoch, its weight times repeats[worst]."""
    mine = images[images["study_id"].isin(set(studies))]
    times = np.array(repeats, dtype=float)[mine["worst"].clip(lower=0).to_numpy()]
    return pd.DataFrame({"file": mine["file"], "weight": mine["weight"] * times})
