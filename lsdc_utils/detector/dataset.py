"""Data sets of the detectors in YOLO's format: boxes of labels, their copies on neighbouring slices, images."""

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
from lsdc_utils.detector.classes import DetectorConfig, DetectorError, class_numbers, class_table
from lsdc_utils.detector.images import near_middle, network_inputs, strip_window
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, SIDES

COPY_FALL = 2 / 3  # of the reach of copies: the sigma by which a copy's weight falls with its distance
BOXES = ["slice", "row_id", "class_id", "severity", "x", "y", "width", "height", "clipped", "copied", "off"]
POSITION = ["X", "Y", "Z", "x", "y"]
IMAGES = ["file", "study_id", "series_id", "slice", "boxes", "worst", "weight"]


def label_boxes(stack: Stack, labels: pd.DataFrame, config: DetectorConfig, copy_mm: float) -> pd.DataFrame:
    """Boxes of a series' labels, given as rows of the label table.

    A box stands on the slice that the reader clicked and, where `copy_mm` > 0, on the slices of its block up to that
    far along the normal, since those show the same lesion. Both recesses of a level have a box on every slice that
    either of them has one on. Returns slice, row_id, class_id, severity, x, y, width, height as fractions of the strip,
    clipped to it, copied, off: mm from the clicked slice.
    """
    numbers, pairs, boxes = class_numbers(config), config.condition == "ss", []
    clicks = [click for click in _clicks(stack, labels) if click[0].severity >= 0]
    for label, own, off in clicks:
        near = off <= copy_mm
        for other, _, others_off in clicks if pairs else ():
            near |= (other.level == label.level) & (others_off <= copy_mm) & np.isfinite(off)
        number, point = numbers[label.condition, label.level, label.severity], np.array([label.X, label.Y, label.Z])
        for index in np.flatnonzero(near):
            xy = (label.x, label.y) if index == own else geometry.to_pixels(stack.affines[index], point)[:2]
            if place := _box(xy, stack.shapes[index], stack.affines[index], config):
                boxes.append((index, label.row_id, number, label.severity, *place, index != own, off[index]))
    table = pd.DataFrame(boxes, columns=BOXES)
    if pairs:
        # A slice between two levels shows one lesion per side: the nearer label speaks for it.
        side = table["row_id"].str.extract(f"({'|'.join(SIDES)})", expand=False)
        order = table.assign(side=side).sort_values(["slice", "off"], kind="stable")
        table = order.drop_duplicates(["slice", "side"]).drop(columns="side")
    return table


def _clicks(stack: Stack, labels: pd.DataFrame) -> list[tuple[Any, int, np.ndarray]]:
    """Each label with a position on one slice of the series: the label, that slice's index, and the distance (n,) in mm
    along the normal of every slice from its point; inf in other blocks."""
    clicks = []
    for label in labels.itertuples():
        index = np.flatnonzero(stack.instance_numbers == label.instance_number)
        if len(index) == 1 and np.isfinite([getattr(label, name) for name in POSITION]).all():
            off = np.abs(geometry.plane_distances(stack.affines, np.array([[label.X, label.Y, label.Z]]))[:, 0])
            off[index] = 0
            clicks.append((label, index[0], np.where(stack.blocks == stack.blocks[index[0]], off, np.inf)))
    return clicks


def _box(xy: Sequence[float], shape: Sequence[int], affine: np.ndarray, config: DetectorConfig) -> tuple | None:
    """Box round pixel `xy` as x, y, width, height in fractions of the strip, clipped to it, and whether it was clipped.

    None if the point itself is outside: ultralytics drops a whole image for one box that leaves it.
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

    A slice without a box is left out if a label lies up to `margin_mm` beyond its copies: what it shows is not known.
    `background` slices beyond that are added from each series with boxes. images: file, study_id, series_id, slice,
    boxes, worst (severity, -1 without a box), weight (1 at the click, falling with the distance). The tables are also
    written, as images.csv, boxes.csv and skipped.csv.
    """
    folder, group = Path(folder), GROUPS[config.condition]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    groups = labels["condition"].map({c.name: c.group for c in CONDITIONS.values()})
    own = labels[groups == group.key]
    columns = ["study_id", "level", "side", *"XYZ", "confidence"]  # of detected points
    sides = labels["condition"].map({c.name: c.side or "" for c in CONDITIONS.values()})
    points = labels.assign(side=sides, confidence=1.0)[columns]
    placed = [points[groups == key].dropna(subset=[*"XYZ"]) for key in ("scs", "nfn")]
    canal = study_canal(*placed, config.canal_from_foramina)
    images, boxes, numbers = [], [], {}
    for stack in stacks:
        here = own[own["series_id"] == stack.series_id]
        if stack.series_type != group.series_type or here.empty:
            continue
        numbers[stack.series_id] = stack.instance_numbers
        table = label_boxes(stack, here, config, copy_mm)
        table = table.assign(weight=np.exp(-0.5 * (table["off"] / max(copy_mm * COPY_FALL, 1e-6)) ** 2))
        free = near_middle(stack)  # the slices that prediction looks at, without those near a label
        for _, _, off in _clicks(stack, here):
            free &= off > copy_mm + margin_mm
        free[table["slice"].to_numpy(dtype=int)] = False
        free, count = np.flatnonzero(free), background if len(table) else 0
        free = free[np.linspace(0, len(free) - 1, min(count, len(free))).round().astype(int)]  # spread evenly
        inputs = network_inputs(stack, config, canal[canal["study_id"] == stack.study_id])
        images += _write_images(stack, table, inputs, free, folder)
        boxes += [table.assign(study_id=stack.study_id, series_id=stack.series_id)] if len(table) else []
    if not boxes:
        raise DetectorError(f"no box for detector {group.key}: no label lies on a series that could be read")
    images, boxes = pd.DataFrame(images, columns=IMAGES), pd.concat(boxes, ignore_index=True)
    skipped = _skipped(own[~own["row_id"].isin(boxes["row_id"])], numbers)
    write_labels(folder, images, boxes, class_table(config)["name"])
    skipped.to_csv(folder / "skipped.csv", index=False)
    return images, boxes, skipped


def write_labels(folder: Path, images: pd.DataFrame, boxes: pd.DataFrame, names: Iterable[str]) -> None:
    """Write what belongs to the images of a data set: images.csv, boxes.csv, a file of labels each, and data.yaml."""
    (folder / "labels").mkdir()
    of_slice = dict(list(boxes.groupby(["study_id", "series_id", "slice"])))
    for image in images.itertuples():
        own = of_slice.get((image.study_id, image.series_id, image.slice), boxes.head(0))
        text = [f"{b.class_id} {b.x:.6f} {b.y:.6f} {b.width:.6f} {b.height:.6f}\n" for b in own.itertuples()]
        (folder / "labels" / Path(image.file).with_suffix(".txt").name).write_text("".join(text))
    for name, table in (("images", images), ("boxes", boxes)):
        table.to_csv(folder / f"{name}.csv", index=False)
    data = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(names))}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))


def _skipped(labels: pd.DataFrame, numbers: dict[int, np.ndarray]) -> pd.DataFrame:
    """row_id and reason of labels without a box; numbers: the instance numbers of each series that was read."""
    series, instances = labels["series_id"], labels["instance_number"]
    counts = [(numbers.get(s, np.empty(0)) == i).sum() for s, i in zip(series, instances, strict=True)]
    reasons = {
        "no severity": labels["severity"] < 0,
        "no coordinate": series.isna() | (series <= 0),
        "its series has another type or could not be read": ~series.isin(list(numbers)),
        "its slice is not in the series": np.array(counts, dtype=int) != 1,
        "no position": ~np.isfinite(labels[POSITION].astype(float)).all(axis=1),
    }
    reason = np.select(list(reasons.values()), list(reasons), "outside the strip")
    return pd.DataFrame({"row_id": labels["row_id"], "reason": reason})


def _write_images(stack: Stack, table: pd.DataFrame, inputs: np.ndarray, free: np.ndarray, folder: Path) -> list[tuple]:
    """Write the slices of a series with boxes in `table`, and the `free` ones; return their lines of images.csv."""
    lines = []
    for index in np.union1d(table["slice"].to_numpy(dtype=int), free).astype(int):
        here = table[table["slice"] == index]
        file = f"images/{stack.study_id}_{stack.series_id}_{index:03d}.png"
        # OpenCV writes and ultralytics turns the order of channels round: the file shows them as the network sees them.
        cv2.imwrite(str(folder / file), inputs[index].transpose(1, 2, 0)[..., ::-1])
        worst, weight = (int(here["severity"].max()), here["weight"].mean()) if len(here) else (-1, 1.0)
        lines.append((file, stack.study_id, stack.series_id, index, len(here), worst, weight))
    return lines


def training_images(images: pd.DataFrame, studies: Iterable[int], repeats: Sequence[int]) -> pd.DataFrame:
    """Images of these studies: file, and how often each is shown in an epoch, its weight times repeats[worst]."""
    own = images[images["study_id"].isin(set(studies))]
    times = np.array(repeats, dtype=float)[own["worst"].clip(lower=0).to_numpy()]
    return pd.DataFrame({"file": own["file"], "weight": own["weight"] * times})
