"""The detectors: YOLO data sets, training, our own prediction, and from boxes to level points and severity rows.

Two class schemes. `sided` is the published one: a class for each condition, side, level and severity (30 for nfn, 15
for scs, 30 for ss). `seen` asks for no more than an image shows: level and severity on sagittal series (15), severity
alone on axial ones (3). Sides then come from patient coordinates and axial levels from the canal points of the scs
detector, so the same picture is never asked to be two classes.

Everything is in patient millimetres (LPS) once a detection has left its image.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import torch
import yaml
from scipy.optimize import minimize_scalar

from lsdc_utils.checkpoint import Checkpoint, fingerprint, restore_optimizer
from lsdc_utils.files import atomic, git_commit, write_json
from lsdc_utils.metric import WEIGHTS
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVELS, SEVERITIES, SIDES, row_id
from lsdc_utils.volume import Stack

SCHEMES = ("seen", "sided")
GREY = 114  # of 255: what ultralytics fills borders with, in training and so in prediction too
FLOOR = 1e-7  # score of a class that no detection has, as published
KEPT = 24  # detections kept a slice and view: five levels with room for doubles
LEVEL_STEP = (35.0, 9.0)  # mm between the centres of neighbouring lumbar discs, mean and spread
SAME_PLACE = 4.0  # mm: spread of the kernel by which detections support each other
NEAR = 8.0  # mm: detections this close to a level's point speak for it
CANAL_REACH = 16.0  # mm to either side of the middle of a sagittal series in which the canal is looked for
FORAMEN_REACH = (6.0, 30.0)  # mm off the canal at which foramina lie
FORAMEN_SPREAD = 6.0  # mm: how far a foramen may lie from where the canal's points let it be expected, one sigma
AXIAL_REACH = 7.0  # mm off a level's point up to which an axial slice shows that level
RECESS_REACH = 25.0  # mm from a level's canal point within which its recesses lie
# mm to posterior and to the head from the middle of a level's two foramen points to its canal point, from head to foot:
# medians over the labels of 160 phantom studies, whose spread is 2.4 and 2.2 mm.
CANAL_FROM_FORAMINA = np.array([[2.4, -9.9], [2.6, -9.7], [3.0, -9.5], [5.6, -8.2], [8.7, -6.3]])
COPY_FALL = 2 / 3  # of the reach of copies: the sigma by which a copy's weight falls with its distance
POWERS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # of evidence, among which `fit_power` chooses


class DetectorError(ValueError):
    """Settings, labels or weights that a detector cannot work with; the message says which and why."""


@dataclass(frozen=True)
class Config:
    """What a detector sees and what its classes mean; kept beside its weights."""

    condition: str  # nfn, scs or ss
    scheme: str  # 'seen' or 'sided'
    strip: tuple[float, float, float, float]  # left, right, top, bottom as fractions of the image
    size: tuple[int, int]  # rows and columns of the network's input, multiples of 32
    neighbours: bool  # channels are the slices before, at and behind; else the same slice thrice
    box_mm: float  # side of a box
    # How it predicts, out of fold and on test studies alike:
    views: tuple[tuple[float, bool], ...] = ((1.0, False),)  # scale, and whether flipped left to right
    exchange: bool = True  # a flipped axial image shows the other side: change the classes' sides back
    everywhere: bool = False  # look at all slices, not only where the condition can be
    power: float = 2.0  # of evidence, see `Finding`; fitted on out-of-fold findings

    def __post_init__(self) -> None:
        if self.condition not in GROUPS or self.scheme not in SCHEMES:
            raise DetectorError(f"no detector for condition {self.condition!r} with scheme {self.scheme!r}")
        if any(side % 32 or side <= 0 for side in self.size):
            raise DetectorError(f"size {self.size} of detector {self.condition}: both must be multiples of 32")
        left, right, top, bottom = self.strip
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise DetectorError(
                f"strip {self.strip} of detector {self.condition}: need 0 <= left < right <= 1 and so on"
            )
        if self.condition == "nfn" and self.scheme == "seen" and any(flip for _, flip in self.views):
            raise DetectorError("detector nfn sees left and right alike: a flipped view would be the view itself")


def config_from(values: dict[str, Any]) -> Config:
    """A config from JSON or a notebook's parameters, where tuples are lists."""
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    tuples["views"] = tuple((float(scale), bool(flip)) for scale, flip in tuples.get("views", [(1.0, False)]))
    return Config(**tuples)


@dataclass
class Detector:
    """A trained network with its config; `about` is what the json beside the weights holds."""

    model: torch.nn.Module
    config: Config
    fold: int
    about: dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """What the detections of one study say of one level, or one side of it.

    A row is read off it by a config's `power`: log p is the mean of the detections' log scores, weighted by their
    evidence to that power. Its temperature is a matter of the blend.
    """

    row_id: str
    study_id: int
    level: str
    side: str  # left, right, or '' for the canal
    point: np.ndarray  # (3,) LPS mm
    confidence: float
    evidence: np.ndarray  # (k,) sum of scores of each detection
    scores: np.ndarray  # (k, 3) by severity


@dataclass(frozen=True)
class Detections:
    """All detections of one study by one detector; m of them, each with the score of every class."""

    points: np.ndarray  # (m, 3) LPS mm
    scores: np.ndarray  # (m, classes)
    levels: np.ndarray  # (m,) number of the level that its axial slice shows by the canal points; -1: none, not axial


# ---------------------------------------------------------------- classes


def classes(config: Config) -> pd.DataFrame:
    """One row a class in its order: name, condition (None where a class has no side), level (or None), severity 0-2."""
    group = GROUPS[config.condition]
    if config.scheme == "sided" or config.condition == "scs":
        conditions = [c.name for c in CONDITIONS.values() if c.group == group.key]
    else:
        conditions = [None]
    levels = [None] if config.scheme == "seen" and config.condition == "ss" else LEVELS
    rows = [
        ("_".join(filter(None, (c or group.base, level, name))), c, level, severity)
        for c in conditions
        for level in levels
        for severity, name in enumerate(SEVERITIES)
    ]
    return pd.DataFrame(rows, columns=["name", "condition", "level", "severity"])


def class_of(config: Config) -> dict[tuple[str, str, int], int]:
    """(condition, level, severity) of a label -> class number."""
    table = classes(config)
    found = {}
    for condition in (c.name for c in CONDITIONS.values() if c.group == config.condition):
        for level in LEVELS:
            fits = table["condition"].isin([None, condition]) & table["level"].isin([None, level])
            for number, severity in table.loc[fits, "severity"].items():
                found[condition, level, severity] = number
    return found


# ---------------------------------------------------------------- images


def strip_window(shape: Sequence[int], config: Config) -> tuple[int, int, int, int]:
    """Left, top, width and height in whole pixels of the strip in an image of `shape` (rows, columns)."""
    left, right, top, bottom = config.strip
    x, y = round(left * shape[1]), round(top * shape[0])
    return x, y, max(round(right * shape[1]) - x, 1), max(round(bottom * shape[0]) - y, 1)


def strips(stack: Stack, config: Config) -> np.ndarray:
    """The strip of every slice at the network's size: (n, rows, cols) uint8."""
    rows, cols = config.size
    result = np.empty((len(stack.pixels), rows, cols), dtype=np.uint8)
    for target, image, shape in zip(result, stack.pixels, stack.shapes, strict=True):
        x, y, width, height = strip_window(shape, config)
        # Averaging keeps fine lines when an image shrinks; linear when it grows.
        method = cv2.INTER_AREA if width > cols else cv2.INTER_LINEAR
        target[:] = cv2.resize(image[y : y + height, x : x + width], (cols, rows), interpolation=method)
    return result


def channels(images: np.ndarray, blocks: np.ndarray, config: Config, lateral: np.ndarray | None = None) -> np.ndarray:
    """Network inputs (n, 3, rows, cols) from strips (n, rows, cols): neighbours by position, inside a block only.

    lateral: mm of each slice off the midline. Where given, channels run from medial to lateral, so that both sides of
    the patient look alike.
    """
    index = np.arange(len(images))
    if not config.neighbours:
        return np.repeat(images[:, None], 3, axis=1)
    before, behind = np.maximum(index - 1, 0), np.minimum(index + 1, len(images) - 1)
    before = np.where(blocks[before] == blocks, before, index)
    behind = np.where(blocks[behind] == blocks, behind, index)
    if lateral is not None:
        inward = lateral[before] > lateral[behind]
        before, behind = np.where(inward, behind, before), np.where(inward, before, behind)
    return np.stack([images[before], images, images[behind]], axis=1)


def off_midline(stack: Stack, canal: pd.DataFrame | None) -> np.ndarray:
    """Distance (n,) in mm of every slice from the middle of the study's canal points, or of the series without them."""
    if canal is None or canal.empty:
        middle = stack.affines[:, :3, 3].min(axis=0) / 2 + stack.affines[:, :3, 3].max(axis=0) / 2
    else:
        middle = canal[["X", "Y", "Z"]].to_numpy(dtype=float).mean(axis=0)
    return np.abs(plane_distances(stack, middle[None])[:, 0])


def inputs(stack: Stack, config: Config, canal: pd.DataFrame | None) -> np.ndarray:
    """What the network is shown of every slice: (n, 3, rows, cols) uint8. `canal`: the study's points, or none."""
    sided = config.condition == "nfn" and config.scheme == "seen"
    lateral = off_midline(stack, canal) if sided else None
    return channels(strips(stack, config), stack.blocks, config, lateral)


def normals(stack: Stack) -> np.ndarray:
    """Unit normal (n, 3) of every slice."""
    normal = np.cross(stack.affines[:, :3, 0], stack.affines[:, :3, 1])
    return normal / np.linalg.norm(normal, axis=1, keepdims=True)


def plane_distances(stack: Stack, points: np.ndarray) -> np.ndarray:
    """Signed distance in mm of points (m, 3) from the plane of every slice: (n, m)."""
    return np.einsum("nmi,ni->nm", points[None] - stack.affines[:, None, :3, 3], normals(stack))


def axial_levels(stack: Stack, canal: pd.DataFrame) -> np.ndarray:
    """The level that each slice of an axial series shows: (n,) numbers in LEVELS, or -1.

    It is the level whose canal point (canal: level, X, Y, Z of one study) lies nearest to the slice's plane, if that is
    within `AXIAL_REACH`. This is the one place where axial slices get their level.
    """
    if canal.empty:
        return np.full(len(stack.pixels), -1)
    distances = np.abs(plane_distances(stack, canal[["X", "Y", "Z"]].to_numpy(dtype=float)))
    numbers = np.array([LEVELS.index(level) for level in canal["level"]])
    return np.where(distances.min(axis=1) <= AXIAL_REACH, numbers[distances.argmin(axis=1)], -1)


def to_pixels(affine: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Column and row of a patient point projected onto the slice with this affine."""
    axes = affine[:3, :2]
    return (point - affine[:3, 3]) @ (axes / (axes**2).sum(axis=0))


# ---------------------------------------------------------------- data sets


def boxes(stack: Stack, labels: pd.DataFrame, config: Config, copy_mm: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Boxes of a series' labels, and the labels that gave none.

    `labels` are rows of the label table on this series. A box stands on the slice that the reader clicked and, where
    `copy_mm` > 0, on the slices of its block up to that far along the normal, since those show the same lesion. In
    scheme 'seen' both recesses of a level have a box on every slice that either of them has one on.
    Returns boxes (slice, row_id, class_id, severity, x, y, width, height as fractions of the strip, clipped to it,
    copied, off: mm from the clicked slice) and skipped (row_id, reason).
    """
    numbers = class_of(config)
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
            xy = (label.x, label.y) if index == own else to_pixels(stack.affines[index], point)
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
    off = np.abs(plane_distances(stack, np.array([[label.X, label.Y, label.Z]]))[:, 0])
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


def _box(xy: Sequence[float], shape: Sequence[int], affine: np.ndarray, config: Config) -> tuple | None:
    """Box round pixel `xy` as x, y, width, height in fractions of the strip, clipped to it, and whether it was clipped.

    None where the point itself is outside: ultralytics drops a whole image for one box that leaves it.
    """
    left, top, width, height = strip_window(shape, config)
    centre = np.array([(xy[0] + 0.5 - left) / width, (xy[1] + 0.5 - top) / height])  # pixel 0 ends at 0.5
    spacing = np.linalg.norm(affine[:3, :2], axis=0)  # mm from column to column, from row to row
    half = 0.5 * config.box_mm / spacing / np.array([width, height])
    if (centre < 0).any() or (centre > 1).any():
        return None
    low, high = np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
    clipped = bool((low > centre - half + 1e-9).any() or (high < centre + half - 1e-9).any())
    return (*((low + high) / 2), *(high - low), clipped)


def write_dataset(
    stacks: Iterable[Stack],
    labels: pd.DataFrame,
    folder: str | Path,
    config: Config,
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
        table, left_out = boxes(stack, here, config, copy_mm)
        unknown = in_margin(stack, here, copy_mm + margin_mm)
        table = table.assign(weight=np.exp(-0.5 * (table["off"] / max(copy_mm * COPY_FALL, 1e-6)) ** 2))
        free = _background(stack, table["slice"].to_numpy(dtype=int), unknown, background if len(table) else 0)
        shown = inputs(stack, config, canal[canal["study_id"] == stack.study_id])
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
    names = dict(enumerate(classes(config)["name"]))
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
    free = _wide_canal(stack) & ~unknown
    free[used] = False
    index = np.flatnonzero(free)
    return index[np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int)]


def _wide_canal(stack: Stack) -> np.ndarray:
    """Slices (n,) bool of a sagittal series within `CANAL_REACH` of its middle; all of any other series."""
    x = stack.affines[:, 0, 3]
    sagittal = np.abs(normals(stack)[:, 0]).min() > 0.7
    return np.abs(x - (x.min() + x.max()) / 2) <= CANAL_REACH if sagittal else np.ones(len(x), dtype=bool)


def training_images(images: pd.DataFrame, studies: Iterable[int], repeats: Sequence[int]) -> pd.DataFrame:
    """Images of these studies: file, and how often each is shown in an epoch, its weight times repeats[worst]."""
    mine = images[images["study_id"].isin(set(studies))]
    times = np.array(repeats, dtype=float)[mine["worst"].clip(lower=0).to_numpy()]
    return pd.DataFrame({"file": mine["file"], "weight": mine["weight"] * times})


# ---------------------------------------------------------------- training


def quiet_ultralytics(folder: str | Path) -> None:
    """Keep ultralytics off the network and out of the home directory; its settings and font go to `folder`.

    It reads these variables when it is first imported, so nothing in this package imports it before this has run.
    """
    if "ultralytics" in sys.modules:
        return
    os.environ.update(
        YOLO_CONFIG_DIR=str(Path(folder).resolve()),
        YOLO_OFFLINE="True",
        YOLO_AUTOINSTALL="False",
        YOLO_VERBOSE="False",  # progress is printed by us, a line an epoch
        ULTRALYTICS_SAFE_LOAD="1",  # weights are unpickled through an allow-list only
    )
    import matplotlib

    # Even offline it asks the network for this font, unless one lies here.
    font = Path(folder) / "Ultralytics" / "Arial.ttf"
    font.parent.mkdir(parents=True, exist_ok=True)
    with atomic(font) as temporary:
        shutil.copyfile(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", temporary)
    from ultralytics import settings

    settings.update({"sync": False})


@dataclass(frozen=True)
class Training:
    """How a detector is trained."""

    model: str  # a yaml name: from scratch; a path to a .pt: from those weights
    epochs: int
    batch: int  # images
    rate: float  # highest learning rate of AdamW
    seed: int
    threads: int  # of torch; another number gives slightly other weights
    options: dict[str, Any]  # augmentation and loss gains, in ultralytics' names


class WeightedSampler(torch.utils.data.Sampler):
    """Each epoch every image about `weight` times, in a new order: the weight, rounded up or down by chance.

    Its order is a matter of seed and `epoch`, which whoever trains counts up.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.weights = np.asarray(weights, dtype=float)
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return max(int(np.floor(self.weights.sum() + 1e-6)), 1)

    def __iter__(self) -> Iterable[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.weights))
        ends = np.cumsum(self.weights[order])
        drawn = np.searchsorted(ends, (np.arange(len(self)) + rng.random()) * ends[-1] / len(self), side="right")
        return iter(rng.permutation(order[np.minimum(drawn, len(order) - 1)]).tolist())


def train(
    folder: str | Path,
    shown: pd.DataFrame,
    config: Config,
    training: Training,
    work: str | Path,
    held_out: Sequence[str] = (),
) -> tuple[torch.nn.Module, pd.DataFrame]:
    """Train YOLO by ultralytics' trainer on images of the data set in `folder`; return the EMA model and its history.

    `shown`: file and weight of each image, as `training_images` gives them.
    `held_out`: images to validate on after each epoch (none: no validation, which costs as much as training here).
    `work`: a folder for ultralytics' files and for the checkpoint of the last whole epoch, from which the same training
    goes on when it is begun again; `checkpoint.forget` it once the weights are saved. The weights of the last epoch are
    returned: nothing is chosen on held-out images. history: epoch, seconds, lr, loss parts and, if validated, mAP.
    """
    if not training.model.endswith(".yaml") and not Path(training.model).is_file():  # which ultralytics would look for
        raise DetectorError(f"yolo_model: pretrained weights {training.model} are not there (looked from {Path.cwd()})")
    folder = Path(folder).resolve()
    checkpoint = Checkpoint(Path(work).resolve(), _training_key(folder, shown, config, training, held_out))
    work = checkpoint.folder / "ultralytics"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    quiet_ultralytics(work / "config")
    from ultralytics.engine import trainer as engine
    from ultralytics.models.yolo.detect import DetectionTrainer

    engine.check_amp = lambda _: True  # asked on GPUs only; its own answer needs a network from the internet
    data = _data_file(folder, work, list(shown["file"]), held_out, config)
    weights = dict(zip(shown["file"].map(lambda file: Path(file).name), shown["weight"], strict=True))
    sampler = WeightedSampler(list(weights.values()), training.seed)
    trainer = DetectionTrainer(overrides=_overrides(training, config, data, len(sampler), bool(held_out)))
    _sample_by(trainer, sampler, weights)
    kept = checkpoint.load()
    history: list[dict[str, float]] = kept["history"] if kept else []
    box = pd.read_csv(folder / "boxes.csv")[["width", "height"]].median().to_numpy() * config.size[::-1]
    trainer.add_callback("on_train_start", lambda t: _begin(t, training, config, len(shown), box, kept))
    trainer.add_callback("on_train_epoch_start", lambda t: _begin_epoch(t, sampler, training))
    trainer.add_callback("on_fit_epoch_end", lambda t: _end_epoch(t, history, checkpoint))
    trainer.save_model = lambda: False  # we keep the last epoch's EMA ourselves
    trainer.final_eval = lambda: None
    if not held_out:
        trainer.validate = lambda: ({}, 0.0)
    with contextlib.suppress(_Trained):
        trainer.train()
    shutil.rmtree(work)
    model = trainer.ema.ema.eval().cpu().to(memory_format=torch.contiguous_format)
    return model, pd.DataFrame(history)


def _training_key(
    folder: Path, shown: pd.DataFrame, config: Config, training: Training, held_out: Sequence[str]
) -> str:
    """Fingerprint of a training: settings, images as they lie on disk, versions and this module."""
    files = [folder / "boxes.csv", *(folder / file for file in shown["file"])]
    if not training.model.endswith(".yaml"):
        files.append(Path(training.model))
    stats = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    about = [asdict(training), asdict(config), list(shown["file"]), stats, list(held_out)]
    versions = [torch.__version__, version("ultralytics"), torch.cuda.is_available()]
    return fingerprint(about, shown["weight"].to_numpy(), versions, Path(__file__).read_bytes())


class _Trained(Exception):
    """The checkpoint holds the last epoch: there is nothing left to train."""


def _overrides(training: Training, config: Config, data: Path, images: int, validate: bool) -> dict[str, Any]:
    """Settings for ultralytics: what its defaults would switch on, off, or guess is named here."""
    batch = min(training.batch, images)
    return {
        "task": "detect", "mode": "train", "model": training.model, "data": str(data), "project": str(data.parent),
        "name": "train", "exist_ok": True, "device": "0" if torch.cuda.is_available() else "cpu",
        "amp": torch.cuda.is_available(), "workers": training.threads, "seed": training.seed,
        "deterministic": torch.cuda.is_available(),  # as our operations on CPU are; asking costs an import of seconds
                "imgsz": max(config.size), "rect": config.size[0] != config.size[1], "epochs": training.epochs,
        "batch": batch, "nbs": batch, "optimizer": "AdamW", "lr0": training.rate, "lrf": 0.05, "cos_lr": True,
        "warmup_epochs": min(1.0, training.epochs / 10), "warmup_bias_lr": 0.0, "weight_decay": 5e-4,
        "close_mosaic": 0, "hsv_h": 0.0, "hsv_s": 0.0, "val": validate, "plots": False, "save": False,
        **training.options,
    }  # fmt: skip


def _sample_by(trainer: Any, sampler: WeightedSampler, weights: dict[str, float]) -> None:
    """Let the trainer draw its images by `sampler`; ultralytics knows no weights, and has the images in an order of its
    own. weights: of each image, by its file's name."""
    build = trainer.get_dataloader

    def get_dataloader(path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """ultralytics' loader, that of training with our sampler."""
        loader = build(path, batch_size=batch_size, rank=rank, mode=mode)
        if mode != "train":
            return loader
        dataset, workers = loader.dataset, loader.num_workers
        sampler.weights = np.array([weights[Path(file).name] for file in dataset.im_files])
        # New workers each epoch: what they draw is then a matter of its seed, not of the epochs before.
        return torch.utils.data.DataLoader(
            dataset, batch_size, sampler=sampler, collate_fn=dataset.collate_fn, num_workers=workers,
            pin_memory=loader.pin_memory, worker_init_fn=loader.worker_init_fn, generator=torch.Generator(),
        )  # fmt: skip

    trainer.get_dataloader = get_dataloader


def _begin(
    trainer: Any, training: Training, config: Config, images: int, box: np.ndarray, kept: dict[str, Any] | None
) -> None:
    """What has to be set once ultralytics has set itself up. box: usual width and height in input pixels; kept: the
    state after the last whole epoch of this training, which then goes on."""
    torch.set_num_threads(training.threads)  # which ultralytics changes, and their number changes the weights
    got = len(trainer.train_loader.dataset)
    if got != images:  # it drops what it calls corrupt with a warning only
        raise DetectorError(f"detector {config.condition}: ultralytics took {got} of {images} training images")
    if training.model.endswith(".yaml"):
        _start_boxes((trainer.model, trainer.ema.ema), box)
        _quicken_norms(trainer.model)
    # Faster, on CPU too, where ultralytics would do neither; the averaged weights as the others, or copying is slow.
    for model in (trainer.model, trainer.ema.ema):
        model.to(memory_format=torch.channels_last)
    for group in trainer.optimizer.param_groups:
        group.update(fused=True, foreach=False)
    if kept:
        _restore(trainer, kept)


def _begin_epoch(trainer: Any, sampler: WeightedSampler, training: Training) -> None:
    """Let an epoch depend on its number and the weights alone, so that it is the same after a stop.

    DetectorError where ultralytics has halved the batch, since it did not fit into the GPU's memory.
    """
    if trainer.batch_size < (asked := min(training.batch, len(sampler))):
        raise DetectorError(f"a batch of {asked} images is too large for this GPU; try yolo_batch={trainer.batch_size}")
    here = int(np.random.SeedSequence([training.seed, trainer.epoch]).generate_state(1)[0])
    random.seed(here)
    np.random.seed(here)
    torch.manual_seed(here)
    trainer.train_loader.generator.manual_seed(here)
    sampler.epoch = trainer.epoch


def _end_epoch(trainer: Any, history: list[dict[str, float]], checkpoint: Checkpoint) -> None:
    """Tell about an epoch and keep where the training stands.

    ultralytics' own checkpoint halves the precision of weights and optimiser and knows of no random state; a training
    that goes on from it ends elsewhere.
    """
    history.append(_tell_epoch(trainer))
    _assert_finite(trainer, history[-1])
    checkpoint.save(
        {
            "model": trainer.model.state_dict(),
            "ema": trainer.ema.ema.state_dict(),
            "ema_updates": trainer.ema.updates,
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "history": history,
        }
    )


def _assert_finite(trainer: Any, line: dict[str, float]) -> None:
    """DetectorError where an epoch's losses, the weights or what batch norms follow are no numbers any more: none of it
    comes back by itself."""
    values = [value for model in (trainer.model, trainer.ema.ema) for value in model.state_dict().values()]
    bad = [name for name, value in line.items() if name.endswith("loss") and not np.isfinite(value)]
    if bad or not all(value.isfinite().all() for value in values):
        what = " and ".join(bad) or "a weight"
        raise DetectorError(f"epoch {line['epoch']}: {what} is no number; try a lower learning rate (yolo_rate)")


def _restore(trainer: Any, kept: dict[str, Any]) -> None:
    """Set a trainer, already set up, to where `_end_epoch` left it; `_Trained` where that was the end."""
    trainer.model.load_state_dict(kept["model"])
    trainer.ema.ema.load_state_dict(kept["ema"])
    trainer.ema.updates = kept["ema_updates"]
    restore_optimizer(trainer.optimizer, kept["optimizer"])
    trainer.scaler.load_state_dict(kept["scaler"])
    trainer.start_epoch = len(kept["history"])
    trainer.scheduler.last_epoch = trainer.start_epoch - 1
    trainer.model.criterion = trainer.model.init_criterion()
    for _ in range(trainer.start_epoch):  # the weights of its two heads change with the epochs
        trainer.model.criterion.update()
    print(f"goes on after epoch {trainer.start_epoch}/{trainer.epochs}", flush=True)
    if trainer.start_epoch >= trainer.epochs:
        raise _Trained


def _data_file(folder: Path, work: Path, files: Sequence[str], held_out: Sequence[str], config: Config) -> Path:
    """The data.yaml of one job. Links give each job its own labels.cache, so that jobs side by side don't share one."""
    for name in ("images", "labels"):
        (work / name).symlink_to(folder / name, target_is_directory=True)
    for name, lines in (("train", files), ("val", held_out or files[:1])):
        (work / f"{name}.txt").write_text("\n".join(str(work / line) for line in lines) + "\n")
    names = dict(enumerate(classes(config)["name"]))
    path = work / "data.yaml"
    path.write_text(yaml.safe_dump({"path": str(work), "train": "train.txt", "val": "val.txt", "names": names}))
    return path


def _start_boxes(models: Iterable[torch.nn.Module], box: np.ndarray) -> None:
    """Let untrained networks begin with boxes of the known size, `box`: width and height in pixels.

    A new YOLO head predicts boxes of 15 strides. Against a box of 10 pixels its overlap is under .01, and the assigner
    takes that to the sixth power: nothing is assigned, nothing learnt, for many epochs. So the distance bins start out
    at half a box: the two bins around it share the weight such that their mean is right.
    """
    half = 0.5 * np.tile(box, 2)  # left, top, right, bottom
    for head in (model.model[-1] for model in models):
        for heads in (head.cv2, head.one2one_cv2):
            for layer, stride in zip(heads, head.stride.tolist(), strict=True):
                bins = np.full((4, head.reg_max), 1e-3)
                for side, distance in enumerate(half / stride):
                    low = min(int(distance), head.reg_max - 2)
                    bins[side, low : low + 2] += [1 - (distance - low), distance - low]
                layer[-1].bias.data.copy_(torch.from_numpy(np.log(bins).ravel()))


def _quicken_norms(model: torch.nn.Module) -> None:
    """Batch norms follow with torch's momentum of 0.1, not ultralytics' 0.03.

    After a hundred steps the slower averages are still those of an untrained network, and prediction, which uses them,
    finds nothing that training has learnt.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1


def _tell_epoch(trainer: Any) -> dict[str, float]:
    """Print a line and return the epoch's figures."""
    line = {
        "epoch": trainer.epoch + 1,
        "seconds": trainer.epoch_time,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        **{name: float(value) for name, value in trainer.tloss.items()},
        **{name: float(value) for name, value in trainer.metrics.items() if trainer.args.val and "mAP" in name},
    }
    parts = " ".join(f"{name.removesuffix('_loss')} {line[name]:.3f}" for name in trainer.tloss)
    print(f"epoch {line['epoch']}/{trainer.epochs} loss {parts} ({line['seconds']:.1f} s)", flush=True)
    return line


# ---------------------------------------------------------------- weights


def save(detector: Detector, path: str | Path) -> None:
    """Write weights that ultralytics' YOLO(path) opens too, and <path>.json beside them; both atomically."""
    path = Path(path)
    detector.model.args = {"task": "detect", "imgsz": max(detector.config.size)}  # the trainer's name its folders
    with atomic(path) as temporary, temporary.open("wb") as file:  # a path's name would be among the bytes
        torch.save({"model": detector.model.half(), "date": None, "train_args": {}}, file)
    detector.model.float()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    names = list(classes(detector.config)["name"])
    about = {
        "config": asdict(detector.config),
        "fold": detector.fold,
        "classes": names,
        **detector.about,
        "versions": {name: version(name) for name in ("torch", "ultralytics", "numpy")},
        "git_commit": git_commit(),
        "sha256": digest,
    }
    write_json(path.with_suffix(".json"), about)


def save_power(path: str | Path, power: float) -> None:
    """Write the power by which the findings of saved weights are read into the json beside them."""
    path = Path(path).with_suffix(".json")
    about = json.loads(path.read_text())
    about["config"]["power"] = power
    write_json(path, about)


def load(path: str | Path) -> Detector:
    """Read a detector that `save` wrote; DetectorError where weights and json do not belong together."""
    path = Path(path)
    about = json.loads(path.with_suffix(".json").read_text())
    if hashlib.sha256(path.read_bytes()).hexdigest() != about["sha256"]:
        raise DetectorError(f"{path} is not the file that {path.with_suffix('.json').name} describes (sha256 differs)")
    quiet_ultralytics(Path(tempfile.gettempdir()) / f"lsdc_utils_{os.getuid()}")
    from ultralytics.nn.tasks import torch_safe_load

    model = torch_safe_load(str(path), safe_only=True)[0]["model"].float().eval()
    model.model[-1].end2end = True  # the head that needs no suppression of doubles, named since the default changed
    model = model.fuse(verbose=False).to("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(memory_format=torch.channels_last)
    config = config_from(about["config"])
    if about["classes"] != list(classes(config)["name"]):
        raise DetectorError(f"{path}: its classes are not those of scheme {config.scheme!r} in this version")
    return Detector(model, config, about["fold"], about)


# ---------------------------------------------------------------- prediction


def detect(
    detector: Detector,
    stacks: Sequence[Stack],
    canal: pd.DataFrame | None = None,
) -> Detections:
    """Detections of one study: patient points and the full class-score vectors of the one-to-one head.

    `canal`: points of the scs detector for this study, by which 'seen' foramina and recesses are looked for; None or
    empty where there are none. Slices and views are those of the detector's config.
    """
    config = detector.config
    group, parts = GROUPS[config.condition], []
    for stack in (s for s in stacks if s.series_type == group.series_type):
        wanted = np.flatnonzero(_wanted(stack, config, canal))
        if not len(wanted):
            continue
        by_canal = canal is not None and config.condition == "ss"
        shown = axial_levels(stack, canal) if by_canal else np.full(len(stack.pixels), -1)
        images = inputs(stack, config, canal)[wanted]
        for scale, flip in config.views:
            centres, scores = forward(detector, images, scale, flip)
            points = to_patient(stack, wanted, centres, config)
            levels = np.repeat(shown[wanted], points.shape[1])
            parts.append((points.reshape(-1, 3), scores.reshape(-1, scores.shape[2]), levels))
    if not parts:
        return Detections(np.empty((0, 3)), np.empty((0, len(classes(config)))), np.empty(0, dtype=int))
    return Detections(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _wanted(stack: Stack, config: Config, canal: pd.DataFrame | None) -> np.ndarray:
    """Slices (n,) bool on which the condition can be seen, told from geometry and the canal points alone."""
    if config.condition == "scs" and not config.everywhere:
        return _wide_canal(stack)
    if config.everywhere or canal is None or canal.empty:
        return np.ones(len(stack.pixels), dtype=bool)
    if config.condition == "ss":
        return axial_levels(stack, canal) >= 0
    nearest = np.abs(plane_distances(stack, canal[["X", "Y", "Z"]].to_numpy(dtype=float))).min(axis=1)
    return (nearest >= FORAMEN_REACH[0]) & (nearest <= FORAMEN_REACH[1])


@torch.inference_mode()
def forward(detector: Detector, views: np.ndarray, scale: float, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """The best `KEPT` detections of inputs (n, 3, rows, cols): centres (n, k, 2) in strip shares, scores (n, k, C).

    A flipped view is the mirrored patient: axial images change columns, sagittal ones the order of their slices. As
    published, in scheme 'sided', columns change on sagittal images too.
    """
    columns = detector.config.condition == "ss" or detector.config.scheme == "sided"
    device = next(detector.model.parameters()).device
    head = detector.model.model[-1]
    rows, cols = detector.config.size
    found = []
    for part in np.array_split(views, max(math.ceil(len(views) / 64), 1)):
        images = torch.from_numpy(part).to(device).float() / 255
        images = images.flip(3 if columns else 1) if flip else images
        if scale != 1:
            images = _scaled(images, scale)
        raw = detector.model(images)[1]["one2one"]
        centres = (head._get_decode_boxes(raw)[:, :4]).transpose(1, 2)
        centres = (centres[..., :2] + centres[..., 2:]) / 2 / scale  # the one-to-one head gives corners
        scores = raw["scores"].sigmoid().transpose(1, 2)
        best = scores.amax(dim=2).topk(min(KEPT, scores.shape[1]), dim=1).indices[..., None]
        centres, scores = (
            centres.gather(1, best.expand(-1, -1, 2)),
            scores.gather(1, best.expand(-1, -1, scores.shape[2])),
        )
        found.append((centres.cpu().numpy() / np.array([cols, rows]), scores.cpu().numpy()))
    centres, scores = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    if flip and columns:
        centres[..., 0] = 1 - centres[..., 0]
        if detector.config.exchange:
            scores = scores[..., _other_side(detector.config)]
    return centres, scores


def _scaled(images: torch.Tensor, scale: float) -> torch.Tensor:
    """Images resized by `scale` and filled with grey, right and below, to multiples of 32."""
    size = [round(side * scale) for side in images.shape[2:]]
    images = torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
    pad = (0, -size[1] % 32, 0, -size[0] % 32)
    return torch.nn.functional.pad(images, pad, value=GREY / 255)


def _other_side(config: Config) -> np.ndarray:
    """For each class the class of the other side in a flipped image; only axial images show side in their plane."""
    table = classes(config)
    order = np.arange(len(table))
    if config.condition != "ss" or table["condition"].isna().any():
        return order
    return order.reshape(2, -1)[::-1].ravel()


def to_patient(stack: Stack, wanted: np.ndarray, centres: np.ndarray, config: Config) -> np.ndarray:
    """Patient points (n, k, 3) of centres (n, k, 2), which are fractions of the strips of slices `wanted` (n,)."""
    windows = np.array([strip_window(shape, config) for shape in stack.shapes[wanted]], dtype=float)
    pixels = windows[:, None, :2] + centres * windows[:, None, 2:] - 0.5
    affines = stack.affines[wanted]
    return np.einsum("nij,nkj->nki", affines[:, :3, :2], pixels) + affines[:, None, :3, 3]


# ---------------------------------------------------------------- from detections to levels and rows


def findings(detections: Detections, study_id: int, config: Config, canal: pd.DataFrame | None = None) -> list[Finding]:
    """What a study's detections say of each level; nothing of levels without evidence. `canal`: the study's points."""
    if not len(detections.scores):
        return []
    if config.scheme == "sided":
        return _find_sided(detections, study_id, config)
    canal = None if canal is None or canal.empty else canal.set_index("level")[["X", "Y", "Z"]].astype(float)
    find = {"scs": _find_canal, "nfn": _find_foramina, "ss": _find_recesses}[config.condition]
    found = []
    for side, level, point, evidence, scores in find(detections, canal):
        condition = "_".join(filter(None, (side, GROUPS[config.condition].base)))
        name = row_id(study_id, condition, level)
        found.append(Finding(name, study_id, level, side or "", point, float(scores.max()), evidence, scores))
    return found


def _find_sided(detections: Detections, study_id: int, config: Config) -> list[Finding]:
    """As published: the highest confidence of each class over all slices and views."""
    table = classes(config)
    found = []
    best = detections.scores.max(axis=0)
    for (condition, level), numbers in table.groupby(["condition", "level"], sort=False).groups.items():
        place = detections.points[detections.scores[:, numbers].max(axis=1).argmax()]
        name, side = row_id(study_id, condition, level), CONDITIONS[condition].side or ""
        scores = best[numbers][None]
        found.append(Finding(name, study_id, level, side, place, float(scores.max()), scores.sum(axis=1), scores))
    return found


def tables(found: Sequence[Finding], power: float) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows (row_id, three natural probabilities) and points (study_id, level, side, X, Y, Z, confidence) of findings.

    side is left, right, or '' for the canal; X, Y, Z are LPS mm.
    """
    names = ["study_id", "level", "side", "X", "Y", "Z", "confidence"]
    kinds = dict.fromkeys([*"XYZ", "confidence"], float) | {"study_id": "int64", "level": "str", "side": "str"}
    points = pd.DataFrame([(f.study_id, f.level, f.side, *f.point, f.confidence) for f in found], columns=names)
    rows = pd.DataFrame(read(found, power), columns=SEVERITIES, dtype=float)
    rows.insert(0, "row_id", pd.Series([f.row_id for f in found], dtype="str"))
    return rows, points.astype(kinds)  # of empty tables too


def read(found: Sequence[Finding], power: float) -> np.ndarray:
    """Natural probabilities (n, 3) of findings: their detections' geometric mean, weighted by evidence to a power."""
    logits = np.empty((len(found), len(SEVERITIES)))
    for target, one in zip(logits, found, strict=True):
        weight = (one.evidence / max(one.evidence.max(), FLOOR)) ** power if len(one.evidence) > 1 else np.ones(1)
        target[:] = weight @ np.log(np.maximum(one.scores, FLOOR)) / weight.sum()
    rows = np.exp(logits - logits.max(axis=1, keepdims=True))
    return rows / rows.sum(axis=1, keepdims=True)


def fit_power(found: Sequence[Finding], labels: pd.DataFrame) -> float:
    """The power, of `POWERS`, whose rows have the least official log loss against labels (row_id, severity) at their
    own best temperature; that of `Config` where there is only one severity."""
    severity = labels[labels["severity"] >= 0].set_index("row_id")["severity"]
    found = [one for one in found if one.row_id in severity.index]
    truth = severity.loc[[one.row_id for one in found]].to_numpy(dtype=int)
    if len(np.unique(truth)) < 2:
        return Config.power
    weight = WEIGHTS[truth] / WEIGHTS[truth].sum()

    def loss(temperature: float, logs: np.ndarray) -> float:
        """Weighted log loss of the weighted rows."""
        logits = temperature * logs + np.log(WEIGHTS)
        logits -= logits.max(axis=1, keepdims=True)
        return -weight @ (logits[np.arange(len(truth)), truth] - np.log(np.exp(logits).sum(axis=1)))

    def least(power: float) -> float:
        """The loss at the best temperature."""
        logs = np.log(np.maximum(read(found, power), FLOOR))
        return minimize_scalar(loss, bounds=(0.05, 5), args=(logs,), method="bounded").fun

    return min(POWERS, key=least)


def cross_read(found: Sequence[Finding], labels: pd.DataFrame, seed: int, parts: int = 5) -> np.ndarray:
    """Natural probabilities (n, 3) of findings, each study's read by a power fitted to studies of the other parts."""
    studies = np.array(sorted({one.study_id for one in found}))
    part_of = dict(zip(studies, np.random.default_rng(seed).permutation(len(studies)) % parts, strict=True))
    part = np.array([part_of[one.study_id] for one in found])
    rows = np.empty((len(found), len(SEVERITIES)))
    for number in np.unique(part):
        power = fit_power([one for one, p in zip(found, part, strict=True) if p != number], labels)
        rows[part == number] = read([one for one, p in zip(found, part, strict=True) if p == number], power)
    return rows


def assign_levels(points: np.ndarray, evidence: np.ndarray, expected: pd.DataFrame | None = None) -> np.ndarray:
    """One candidate for each of the five levels, chosen together: (5,) indices into points (m, 3).

    evidence (m, 5): how much each detection speaks for each level. Detections close to each other in the sagittal
    plane support each other; going down the spine, neighbours lie `LEVEL_STEP` apart. `expected`: canal points (index
    level) that pull each level to its height. Solved exactly by dynamic programming.
    """
    # The strongest few of each level are enough to choose from.
    few = np.unique(np.argsort(-evidence, axis=0, kind="stable")[:40])
    plane = points[:, 1:]
    apart = np.linalg.norm(plane[few, None] - plane[None], axis=2)
    support = np.exp(-0.5 * (apart / SAME_PLACE) ** 2) @ evidence
    gain = np.log(support + 1e-3)
    if expected is not None:
        for number, level in enumerate(LEVELS):
            if level in expected.index:
                gain[:, number] -= 0.5 * ((points[few, 2] - expected.loc[level, "Z"] - 5) / 10) ** 2
    steps = np.linalg.norm(plane[few, None] - plane[None, few], axis=2)
    move = -0.5 * ((steps - LEVEL_STEP[0]) / LEVEL_STEP[1]) ** 2
    move[points[few, None, 2] - points[None, few, 2] < 8] = -50  # the next level lies below
    total, back = gain[:, 0], []
    for number in range(1, len(LEVELS)):
        through = total[:, None] + move
        back.append(through.argmax(axis=0))
        total = through.max(axis=0) + gain[:, number]
    chosen = [int(total.argmax())]
    for step in reversed(back):
        chosen.append(int(step[chosen[-1]]))
    return few[np.array(chosen[::-1])]


def _sagittal_levels(detections: Detections, index: np.ndarray, expected: pd.DataFrame | None) -> list[tuple]:
    """(level, point, evidence, severity scores) of the five levels from detections `index` on sagittal slices.

    `expected`: points (index level) where the canal lets each level be; where they are five, they name the levels.
    """
    points, scores = detections.points[index], detections.scores[index].reshape(len(index), len(LEVELS), 3)
    evidence = scores.sum(axis=2)
    if expected is not None and len(expected) == len(LEVELS):
        chosen = nearby_levels(points, evidence, expected)
    else:
        chosen = assign_levels(points, evidence, expected)
    found = []
    for number, centre in enumerate(points[chosen]):
        apart = np.linalg.norm(points[:, 1:] - centre[1:], axis=1)
        weight = evidence[:, number] * np.exp(-0.5 * (apart / SAME_PLACE) ** 2)
        place = (weight[:, None] * points).sum(axis=0) / weight.sum()
        near = np.flatnonzero(np.linalg.norm(points[:, 1:] - place[1:], axis=1) <= NEAR)
        if len(near) and evidence[near, number].max() >= 1e-3:
            found.append((LEVELS[number], place, evidence[near, number], scores[near, number]))
    return found


def nearby_levels(points: np.ndarray, evidence: np.ndarray, expected: pd.DataFrame) -> np.ndarray:
    """For each level the detection that speaks for it most, near where it is `expected`: (5,) indices into points."""
    plane = points[:, 1:]
    apart = np.linalg.norm(plane[:, None] - plane[None], axis=2)
    support = np.exp(-0.5 * (apart / SAME_PLACE) ** 2) @ evidence
    off = np.linalg.norm(plane[:, None] - expected.loc[list(LEVELS), ["Y", "Z"]].to_numpy()[None], axis=2)
    return (np.log(support + 1e-3) - 0.5 * (off / FORAMEN_SPREAD) ** 2).argmax(axis=0)


def _find_canal(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    return [(None, *found) for found in _sagittal_levels(detections, np.arange(len(detections.scores)), None)]


def _find_foramina(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    """Left and right by patient x: more to the left than the canal at that height, or than the slices' middle."""
    x, z = detections.points[:, 0], detections.points[:, 2]
    if canal is None:
        middle, expected = np.full(len(x), (x.min() + x.max()) / 2), None
    else:
        line = canal.sort_values("Z")
        middle = np.interp(z, line["Z"], line["X"])
        expected = canal.copy()
        expected[["Y", "Z"]] -= CANAL_FROM_FORAMINA[[LEVELS.index(level) for level in canal.index]]
    found = []
    for side, mine in zip(SIDES, (x > middle, x < middle), strict=True):
        index = np.flatnonzero(mine)
        found += [(side, *level) for level in _sagittal_levels(detections, index, expected)] if len(index) else []
    return found


def _find_recesses(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    """Level by the detection's slice, side by patient x against its canal point; nothing without canal points."""
    if canal is None:
        return []
    points, found = detections.points, []
    for level, centre in zip(canal.index, canal.to_numpy(), strict=True):
        here = detections.levels == LEVELS.index(level)
        here &= np.linalg.norm(points - centre, axis=1) <= RECESS_REACH
        for side, sign in zip(SIDES, (1, -1), strict=True):
            index = np.flatnonzero(here & (sign * (points[:, 0] - centre[0]) > 0))
            if len(index):
                scores = detections.scores[index]
                evidence = scores.sum(axis=1)
                place = (evidence[:, None] ** 2 * points[index]).sum(axis=0) / (evidence**2).sum()
                found.append((side, level, place, evidence, scores))
    return found


def find(
    detector: Detector,
    studies: Iterable[tuple[int, Sequence[Stack]]],
    canal: pd.DataFrame | None = None,
    tell: Callable[[str], None] = print,
) -> list[Finding]:
    """Findings of one detector in studies, given as (study id, stacks). `canal`: points of any number of studies."""
    found = []
    for number, (study_id, stacks) in enumerate(studies, start=1):
        here = None if canal is None else canal[canal["study_id"] == study_id]
        found += findings(detect(detector, stacks, here), study_id, detector.config, here)
        if number % 20 == 0:
            tell(f"{detector.config.condition}: {number} studies looked at")
    return found


def grade(
    detectors: Sequence[Detector], study_id: int, stacks: Sequence[Stack], canal: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and points of a study by detectors of one condition, averaged over them (the folds, for test studies).

    `canal`: the study's canal points. Where only some detectors have evidence, the mean is over those; points are
    weighted by confidence.
    """
    each = [tables(find(one, [(study_id, stacks)], canal), one.config.power) for one in detectors]
    rows, points = (pd.concat(parts, ignore_index=True) for parts in zip(*each, strict=True))
    return _mean_rows(rows), _mean_points(points)


def grade_study(
    detectors: dict[str, Sequence[Detector]], study_id: int, stacks: Sequence[Stack]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows and points (with their condition group) of one study by the detectors of all groups, and its canal points.

    The canal's detector goes first: its points tell the others side and level. Where it finds nothing, as without a
    sagittal T2, the canal points come from the foramina.
    """
    rows, points = {}, {}
    rows["scs"], points["scs"] = grade(detectors["scs"], study_id, stacks)
    rows["nfn"], points["nfn"] = grade(detectors["nfn"], study_id, stacks, points["scs"])
    canal = study_canal(points["scs"], points["nfn"])
    rows["ss"], points["ss"] = grade(detectors["ss"], study_id, stacks, canal)
    named = [table.assign(condition=key) for key, table in points.items()]
    return pd.concat(rows.values(), ignore_index=True), pd.concat(named, ignore_index=True), canal


def study_canal(scs: pd.DataFrame, nfn: pd.DataFrame) -> pd.DataFrame:
    """Canal points of studies: those of the canal's detector, or where it found none, those from the foramina.

    scs, nfn: points of any number of studies, as `grade` returns them; so is the result, which both out-of-fold and
    test studies are graded by.
    """
    return pd.concat([scs, canal_from_foramina(nfn[~nfn["study_id"].isin(scs["study_id"])])], ignore_index=True)


def canal_from_foramina(points: pd.DataFrame) -> pd.DataFrame:
    """Canal points of studies from their foramen points, at levels where both sides were found; columns as there."""
    both = points.groupby(["study_id", "level"]).filter(lambda level: set(level["side"]) == set(SIDES))
    middle = both.groupby(["study_id", "level"], as_index=False)[["X", "Y", "Z", "confidence"]].mean()
    middle[["Y", "Z"]] += CANAL_FROM_FORAMINA[[LEVELS.index(level) for level in middle["level"]]]
    return middle.assign(side="")[points.columns]


def _mean_rows(rows: pd.DataFrame) -> pd.DataFrame:
    return rows.groupby("row_id", sort=False, as_index=False)[list(SEVERITIES)].mean()


def _mean_points(points: pd.DataFrame) -> pd.DataFrame:
    """Confidence-weighted mean of each study's points of one level and side."""
    weighted = points.assign(**{axis: points[axis] * points["confidence"] for axis in "XYZ"}, n=1)
    keys = ["study_id", "level", "side"]
    mean = weighted.groupby(keys, sort=False, dropna=False)[["X", "Y", "Z", "confidence", "n"]].sum().reset_index()
    mean[["X", "Y", "Z"]] = mean[["X", "Y", "Z"]].div(mean["confidence"], axis=0)
    return mean.assign(confidence=mean["confidence"] / mean["n"]).drop(columns="n")
