"""The detectors: YOLO data sets, training, our own prediction, and from boxes to level points and severity rows.

Two class schemes. `sided` is the published one: a class for each condition, side, level and severity (30 for nfn, 15
for scs, 30 for ss). `seen` asks for no more than an image shows: level and severity on sagittal series (15), severity
alone on axial ones (3). Sides then come from patient coordinates and axial levels from the canal points of the scs
detector, so the same picture is never asked to be two classes.

Everything is in patient millimetres (LPS) once a detection has left its image.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
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

from lsdc_utils.files import atomic, git_commit, write_json
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
AXIAL_REACH = 7.0  # mm off a level's point up to which an axial slice shows that level
RECESS_REACH = 25.0  # mm from a level's canal point within which its recesses lie
# mm to posterior and to the head from the middle of a level's two foramen points to its canal point, from head to foot:
# medians over the labels of 160 phantom studies, whose spread is 2.4 and 2.2 mm.
CANAL_FROM_FORAMINA = np.array([[2.4, -9.9], [2.6, -9.7], [3.0, -9.5], [5.6, -8.2], [8.7, -6.3]])


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
    box_side: float  # side of a box as a fraction of the image's sides
    # How it predicts, out of fold and on test studies alike:
    views: tuple[tuple[float, bool], ...] = ((1.0, False),)  # scale, and whether flipped left to right
    exchange: bool = True  # a flipped axial image shows the other side: change the classes' sides back
    everywhere: bool = False  # look at all slices, not only where the condition can be

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


def _class_of(config: Config) -> dict[tuple[str, str, int], int]:
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


def channels(images: np.ndarray, blocks: np.ndarray, config: Config) -> np.ndarray:
    """Network inputs (n, 3, rows, cols) from strips (n, rows, cols): neighbours by position, inside a block only."""
    index = np.arange(len(images))
    if not config.neighbours:
        return np.repeat(images[:, None], 3, axis=1)
    before, behind = np.maximum(index - 1, 0), np.minimum(index + 1, len(images) - 1)
    before = np.where(blocks[before] == blocks, before, index)
    behind = np.where(blocks[behind] == blocks, behind, index)
    return np.stack([images[before], images, images[behind]], axis=1)


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
    `copy_mm` > 0, on the slices of its block up to that far along the normal, since those show the same lesion.
    Returns boxes (slice, row_id, class_id, severity, x, y, width, height as fractions of the strip, clipped to it,
    copied) and skipped (row_id, reason).
    """
    numbers = _class_of(config)
    found, skipped = [], []
    for label in labels.itertuples():
        here = np.flatnonzero(stack.instance_numbers == label.instance_number)
        reason = _unusable(label, len(here))
        if reason:
            skipped.append((label.row_id, reason))
            continue
        before = len(found)
        point = np.array([label.X, label.Y, label.Z])
        off = np.abs(plane_distances(stack, point[None])[:, 0])
        near = (stack.blocks == stack.blocks[here[0]]) & (off <= copy_mm)
        near[here[0]] = True
        for index in np.flatnonzero(near):
            xy = (label.x, label.y) if index == here[0] else to_pixels(stack.affines[index], point)
            place = _box(xy, stack.shapes[index], config)
            if place:
                number = numbers[label.condition, label.level, label.severity]
                copied = index != here[0]
                found.append((index, label.row_id, number, label.severity, *place, copied, off[index] * copied))
        if len(found) == before:
            skipped.append((label.row_id, "outside the strip"))
    names = ["slice", "row_id", "class_id", "severity", "x", "y", "width", "height", "clipped", "copied", "off"]
    table = pd.DataFrame(found, columns=names)
    if config.scheme == "seen" and config.condition == "ss":
        # A slice between two levels shows one lesion a side: the nearer label speaks for it.
        side = table["row_id"].str.extract(f"({'|'.join(SIDES)})", expand=False)
        order = table.assign(side=side).sort_values(["slice", "off"], kind="stable")
        table = order.drop_duplicates(["slice", "side"]).drop(columns="side")
    return table.drop(columns="off"), pd.DataFrame(skipped, columns=["row_id", "reason"])


def _unusable(label: Any, slices: int) -> str:
    """Why a label gives no box, or ''."""
    if label.severity < 0:
        return "no severity"
    if slices != 1:
        return "its slice is not in the series"
    if not np.isfinite([label.X, label.Y, label.Z, label.x, label.y]).all():
        return "no position"
    return ""


def _box(xy: Sequence[float], shape: Sequence[int], config: Config) -> tuple | None:
    """Box round pixel `xy` as x, y, width, height in fractions of the strip, clipped to it, and whether it was clipped.

    None where the point itself is outside: ultralytics drops a whole image for one box that leaves it.
    """
    left, top, width, height = strip_window(shape, config)
    centre = np.array([(xy[0] + 0.5 - left) / width, (xy[1] + 0.5 - top) / height])  # pixel 0 ends at 0.5
    half = 0.5 * config.box_side * np.array([shape[1] / width, shape[0] / height])
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
    background: int,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Write images, labels and data.yaml of one detector in YOLO's format; return its images, boxes, skipped labels.

    `stacks` may hold any series: those of the condition's type are used. `background` slices without a box are added
    from each series that has boxes. images: file, study_id, series_id, slice, boxes, worst (severity, -1 without a
    box). The tables are also written, as images.csv, boxes.csv and skipped.csv.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    mine = labels[labels["condition"].map({c.name: c.group for c in CONDITIONS.values()}) == config.condition]
    images, found, skipped = [], [], []
    for stack in stacks:
        here = mine[mine["series_id"] == stack.series_id]
        if stack.series_type != GROUPS[config.condition].series_type or here.empty:
            continue
        table, left_out = boxes(stack, here, config, copy_mm)
        images += _write_images(stack, table, folder, config, background if len(table) else 0)
        found.append(table.assign(study_id=stack.study_id, series_id=stack.series_id))
        skipped.append(left_out)
    found, skipped = (pd.concat(tables, ignore_index=True) if tables else pd.DataFrame() for tables in (found, skipped))
    if found.empty:
        raise DetectorError(f"no box for detector {config.condition}: no label lies on a series that could be read")
    skipped = pd.concat([skipped, _never_met(mine, found, skipped)], ignore_index=True)
    images = pd.DataFrame(images, columns=["file", "study_id", "series_id", "slice", "boxes", "worst"])
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


def _write_images(stack: Stack, table: pd.DataFrame, folder: Path, config: Config, background: int) -> list[tuple]:
    """Write the slices that have boxes and `background` others of a series; return their lines of images.csv."""
    inputs = channels(strips(stack, config), stack.blocks, config)
    used = np.unique(table["slice"].to_numpy(dtype=int))
    lines = []
    for index in np.union1d(used, _background(stack, used, background)).astype(int):
        mine = table[table["slice"] == index]
        name = f"{stack.study_id}_{stack.series_id}_{index:03d}"
        # OpenCV writes and ultralytics turns the order of channels round: the file shows them as the network sees them.
        cv2.imwrite(str(folder / "images" / f"{name}.png"), inputs[index].transpose(1, 2, 0)[..., ::-1])
        text = [f"{b.class_id} {b.x:.6f} {b.y:.6f} {b.width:.6f} {b.height:.6f}" for b in mine.itertuples(index=False)]
        (folder / "labels" / f"{name}.txt").write_text("\n".join(text) + "\n" * bool(text))
        worst = int(mine["severity"].max()) if len(mine) else -1
        lines.append((f"images/{name}.png", stack.study_id, stack.series_id, index, len(mine), worst))
    return lines


def _background(stack: Stack, used: np.ndarray, count: int) -> np.ndarray:
    """`count` slices that are not next to a slice with a box, spread evenly over those that prediction looks at."""
    free = np.ones(len(stack.pixels), dtype=bool)
    for shift in (-1, 0, 1):
        free[np.clip(used + shift, 0, len(free) - 1)] = False
    free &= _wide_canal(stack)
    index = np.flatnonzero(free)
    return index[np.linspace(0, len(index) - 1, min(count, len(index))).round().astype(int)]


def _wide_canal(stack: Stack) -> np.ndarray:
    """Slices (n,) bool of a sagittal series within `CANAL_REACH` of its middle; all of any other series."""
    x = stack.affines[:, 0, 3]
    sagittal = np.abs(normals(stack)[:, 0]).min() > 0.7
    return np.abs(x - (x.min() + x.max()) / 2) <= CANAL_REACH if sagittal else np.ones(len(x), dtype=bool)


def training_list(images: pd.DataFrame, studies: Iterable[int], repeats: Sequence[int]) -> list[str]:
    """Files of these studies' images, each repeats[worst severity] times; background once."""
    mine = images[images["study_id"].isin(set(studies))]
    return [
        file for file, worst in zip(mine["file"], mine["worst"], strict=True) for _ in range(repeats[max(worst, 0)])
    ]


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


def train(
    folder: str | Path,
    files: Sequence[str],
    config: Config,
    training: Training,
    work: str | Path,
    held_out: Sequence[str] = (),
) -> tuple[torch.nn.Module, pd.DataFrame]:
    """Train YOLO by ultralytics' trainer on `files` of the data set in `folder`; return the EMA model and its history.

    `held_out`: images to validate on after each epoch (none: no validation, which costs as much as training here).
    `work`: a folder for ultralytics' files, removed at the end. The weights of the last epoch are returned: nothing is
    chosen on held-out images. history: epoch, seconds, lr, loss parts and, if validated, mAP.
    """
    if not training.model.endswith(".yaml") and not Path(training.model).is_file():
        raise DetectorError(
            f"pretrained weights {training.model!r} are not there (looked from {Path.cwd()}). Nothing is downloaded: "
            "get the file from the releases of ultralytics' assets, and give its path as yolo_model"
        )
    work, folder = Path(work).resolve(), Path(folder).resolve()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    quiet_ultralytics(work / "config")
    from ultralytics.engine import trainer as engine
    from ultralytics.models.yolo.detect import DetectionTrainer

    engine.check_amp = lambda _: True  # asked on GPUs only; its own answer needs a network from the internet
    data = _data_file(folder, work, files, held_out, config)
    trainer = DetectionTrainer(overrides=_overrides(training, config, data, len(files), bool(held_out)))
    history: list[dict[str, float]] = []
    trainer.add_callback("on_train_start", lambda t: _begin(t, training, config, len(files)))
    trainer.add_callback("on_fit_epoch_end", lambda t: history.append(_tell_epoch(t, history)))
    trainer.save_model = lambda: False  # we keep the last epoch's EMA ourselves
    trainer.final_eval = lambda: None
    if not held_out:
        trainer.validate = lambda: ({}, 0.0)
    trainer.train()
    shutil.rmtree(work)
    model = trainer.ema.ema.eval().cpu().to(memory_format=torch.contiguous_format)
    return model, pd.DataFrame(history).drop(columns="started")


def _overrides(training: Training, config: Config, data: Path, images: int, validate: bool) -> dict[str, Any]:
    """Settings for ultralytics: what its defaults would switch on, off, or guess is named here."""
    batch = min(training.batch, images)
    return {
        "task": "detect", "mode": "train", "model": training.model, "data": str(data), "project": str(data.parent),
        "name": "train", "exist_ok": True, "device": "0" if torch.cuda.is_available() else "cpu",
        "amp": torch.cuda.is_available(), "workers": training.threads, "seed": training.seed, "deterministic": True,
        "imgsz": max(config.size), "rect": config.size[0] != config.size[1], "epochs": training.epochs,
        "batch": batch, "nbs": batch, "optimizer": "AdamW", "lr0": training.rate, "lrf": 0.05, "cos_lr": True,
        "warmup_epochs": min(1.0, training.epochs / 10), "warmup_bias_lr": 0.0, "weight_decay": 5e-4,
        "close_mosaic": 0, "hsv_h": 0.0, "hsv_s": 0.0, "val": validate, "plots": False, "save": False,
        **training.options,
    }  # fmt: skip


def _begin(trainer: Any, training: Training, config: Config, images: int) -> None:
    """What has to be set once ultralytics has set itself up."""
    torch.set_num_threads(training.threads)  # which ultralytics changes, and their number changes the weights
    got = len(trainer.train_loader.dataset)
    if got != images:  # it drops what it calls corrupt with a warning only
        raise DetectorError(f"detector {config.condition}: ultralytics took {got} of {images} training images")
    if training.model.endswith(".yaml"):
        _start_boxes((trainer.model, trainer.ema.ema), config)
        _quicken_norms(trainer.model)
    # A fifth faster, on CPU too, where ultralytics would not do it.
    trainer.model.to(memory_format=torch.channels_last)


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


def _start_boxes(models: Iterable[torch.nn.Module], config: Config) -> None:
    """Let untrained networks begin with boxes of the known size.

    A new YOLO head predicts boxes of 15 strides. Against a box of 10 pixels its overlap is under .01, and the assigner
    takes that to the sixth power: nothing is assigned, nothing learnt, for many epochs. So the distance bins start out
    at half a box: the two bins around it share the weight such that their mean is right.
    """
    left, right, top, bottom = config.strip
    rows, cols = config.size
    half = (
        0.5 * config.box_side * np.array([cols / (right - left), rows / (bottom - top)] * 2)
    )  # left, top, right, bottom
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


def _tell_epoch(trainer: Any, history: list[dict[str, float]]) -> dict[str, float]:
    """Print a line and return the epoch's figures; `started` is the wall clock at its end."""
    now = time.time()
    line = {
        "epoch": trainer.epoch + 1,
        "seconds": now - (history[-1]["started"] if history else trainer.train_time_start),
        "lr": trainer.optimizer.param_groups[0]["lr"],
        **{name: float(value) for name, value in trainer.tloss.items()},
        **{name: float(value) for name, value in trainer.metrics.items() if trainer.args.val and "mAP" in name},
        "started": now,
    }
    parts = " ".join(f"{name.removesuffix('_loss')} {line[name]:.3f}" for name in trainer.tloss)
    print(f"epoch {line['epoch']}/{trainer.epochs} loss {parts} ({line['seconds']:.1f} s)", flush=True)
    return line


# ---------------------------------------------------------------- weights


def save(detector: Detector, path: str | Path) -> None:
    """Write weights that ultralytics' YOLO(path) opens too, and <path>.json beside them; both atomically."""
    path = Path(path)
    with atomic(path) as temporary:
        torch.save({"model": detector.model.half(), "date": None, "train_args": {}}, temporary)
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
        inputs = channels(strips(stack, config), stack.blocks, config)[wanted]
        for scale, flip in config.views:
            centres, scores = _forward(detector, inputs, scale, flip)
            points = _to_patient(stack, wanted, centres, config)
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
def _forward(detector: Detector, inputs: np.ndarray, scale: float, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """The best `KEPT` detections of inputs (n, 3, rows, cols): centres (n, k, 2) in strip shares, scores (n, k, C)."""
    device = next(detector.model.parameters()).device
    head = detector.model.model[-1]
    rows, cols = detector.config.size
    found = []
    for part in np.array_split(inputs, max(len(inputs) // 64, 1)):
        images = torch.from_numpy(part).to(device).float() / 255
        images = images.flip(3) if flip else images
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
    if flip:
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


def _to_patient(stack: Stack, wanted: np.ndarray, centres: np.ndarray, config: Config) -> np.ndarray:
    """Patient points (n, k, 3) of centres (n, k, 2), which are fractions of the strips of slices `wanted` (n,)."""
    windows = np.array([strip_window(shape, config) for shape in stack.shapes[wanted]], dtype=float)
    pixels = windows[:, None, :2] + centres * windows[:, None, 2:] - 0.5
    affines = stack.affines[wanted]
    return np.einsum("nij,nkj->nki", affines[:, :3, :2], pixels) + affines[:, None, :3, 3]


# ---------------------------------------------------------------- from detections to levels and rows


def decode(
    detections: Detections, study_id: int, config: Config, canal: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows (row_id, three natural probabilities) and points (study_id, level, side, X, Y, Z, confidence) of a study.

    side is left, right, or '' for the canal; X, Y, Z are LPS mm.

    A row or point is there only where there is evidence. `canal`: the study's points by the scs detector.
    """
    if config.scheme == "sided":
        return _decode_sided(detections, study_id, config)
    canal = None if canal is None or canal.empty else canal.set_index("level")[["X", "Y", "Z"]].astype(float)
    find = {"scs": _find_canal, "nfn": _find_foramina, "ss": _find_recesses}[config.condition]
    rows, points = [], []
    for side, level, point, confidence, scores in find(detections, canal) if len(detections.scores) else []:
        condition = "_".join(filter(None, (side, GROUPS[config.condition].base)))
        rows.append((row_id(study_id, condition, level), *_normalised(scores)))
        points.append((study_id, level, side or "", *point, confidence))
    return _tables(rows, points)


def _tables(rows: list[tuple], points: list[tuple]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The two tables of `decode`, with their columns even where they are empty."""
    names = ["study_id", "level", "side", "X", "Y", "Z", "confidence"]
    numbers = dict.fromkeys([*"XYZ", "confidence"], float) | {"study_id": "int64"}  # of empty tables too
    predicted = pd.DataFrame(rows, columns=["row_id", *SEVERITIES]).astype(dict.fromkeys(SEVERITIES, float))
    return predicted, pd.DataFrame(points, columns=names).astype(numbers)


def _normalised(scores: np.ndarray) -> np.ndarray:
    """Scores (3,) floored and scaled to sum 1."""
    scores = np.maximum(np.asarray(scores, dtype=float), FLOOR)
    return scores / scores.sum()


def _decode_sided(detections: Detections, study_id: int, config: Config) -> tuple[pd.DataFrame, pd.DataFrame]:
    """As published: the highest confidence of each class over all slices and views, normalised over severities."""
    if not len(detections.scores):
        return _tables([], [])
    table = classes(config)
    rows, points = [], []
    best = detections.scores.max(axis=0)
    for (condition, level), numbers in table.groupby(["condition", "level"], sort=False).groups.items():
        rows.append((row_id(study_id, condition, level), *_normalised(best[numbers])))
        place = detections.points[detections.scores[:, numbers].max(axis=1).argmax()]
        points.append((study_id, level, CONDITIONS[condition].side or "", *place, best[numbers].max()))
    return _tables(rows, points)


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


def _level_scores(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Severity scores (3,) of a level: geometric mean of its detections' scores (k, 3), weighted by evidence squared.

    Measured out of fold on the phantom, this ordered severe canals better than the highest scores (area under the
    curve .94 against .90) and was never worse.
    """
    share = weights**2 / (weights**2).sum()
    return np.exp(share @ np.log(np.maximum(scores, 1e-6)))


def _sagittal_levels(detections: Detections, index: np.ndarray, expected: pd.DataFrame | None) -> list[tuple]:
    """(level, point, confidence, severity scores) of the five levels from detections `index` on sagittal slices."""
    points, scores = detections.points[index], detections.scores[index].reshape(len(index), len(LEVELS), 3)
    evidence = scores.sum(axis=2)
    found = []
    for number, chosen in enumerate(assign_levels(points, evidence, expected)):
        apart = np.linalg.norm(points[:, 1:] - points[chosen, 1:], axis=1)
        weight = evidence[:, number] * np.exp(-0.5 * (apart / SAME_PLACE) ** 2)
        place = (weight[:, None] * points).sum(axis=0) / weight.sum()
        near = np.flatnonzero(np.linalg.norm(points[:, 1:] - place[1:], axis=1) <= NEAR)
        if not len(near) or evidence[near, number].max() < 1e-3:
            continue
        level_scores = _level_scores(evidence[near, number], scores[near, number])
        found.append((LEVELS[number], place, float(scores[near, number].max()), level_scores))
    return found


def _find_canal(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    return [(None, *found) for found in _sagittal_levels(detections, np.arange(len(detections.scores)), None)]


def _find_foramina(detections: Detections, canal: pd.DataFrame | None) -> list[tuple]:
    """Left and right by patient x: more to the left than the canal at that height, or than the slices' middle."""
    x, z = detections.points[:, 0], detections.points[:, 2]
    if canal is None:
        middle = np.full(len(x), (x.min() + x.max()) / 2)
    else:
        line = canal.sort_values("Z")
        middle = np.interp(z, line["Z"], line["X"])
    found = []
    for side, mine in zip(SIDES, (x > middle, x <= middle), strict=True):
        index = np.flatnonzero(mine)
        found += [(side, *level) for level in _sagittal_levels(detections, index, canal)] if len(index) else []
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
                weight = scores.sum(axis=1)
                place = (weight[:, None] ** 2 * points[index]).sum(axis=0) / (weight**2).sum()
                found.append((side, level, place, float(scores.max()), _level_scores(weight, scores)))
    return found


def grade(
    detectors: Sequence[Detector],
    studies: Iterable[tuple[int, Sequence[Stack]]],
    canal: pd.DataFrame | None = None,
    tell: Callable[[str], None] = print,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Rows and points of studies by detectors of one condition, averaged over them (the folds, for test studies).

    `studies` gives (study id, stacks); `canal` the scs points of any number of studies, as this function returned
    them. Where only some detectors have evidence, the mean is over those; points are weighted by confidence.
    """
    rows, points = [], []
    for number, (study_id, stacks) in enumerate(studies, start=1):
        here = None if canal is None else canal[canal["study_id"] == study_id]
        for detector in detectors:
            seen = detect(detector, stacks, here)
            found = decode(seen, study_id, detector.config, here)
            rows.append(found[0])
            points.append(found[1])
        if number % 20 == 0:
            tell(f"{detectors[0].config.condition}: {number} studies graded")
    if not rows:
        return _tables([], [])
    return _mean_rows(pd.concat(rows, ignore_index=True)), _mean_points(pd.concat(points, ignore_index=True))


def grade_study(
    detectors: dict[str, Sequence[Detector]], study_id: int, stacks: Sequence[Stack]
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Rows and points (with their condition group) of one study by the detectors of all groups, and its canal points.

    The canal's detector goes first: its points tell the others side and level. Where it finds nothing, as without a
    sagittal T2, the canal points come from the foramina.
    """
    rows, points = {}, {}
    rows["scs"], points["scs"] = grade(detectors["scs"], [(study_id, stacks)])
    rows["nfn"], points["nfn"] = grade(detectors["nfn"], [(study_id, stacks)], points["scs"])
    canal = study_canal(points["scs"], points["nfn"])
    rows["ss"], points["ss"] = grade(detectors["ss"], [(study_id, stacks)], canal)
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


# ---------------------------------------------------------------- what was found, against labels


def point_errors(points: pd.DataFrame, labels: pd.DataFrame) -> pd.DataFrame:
    """Labels with a position beside the detected points: row_id, condition, level, side, severity, found, distances.

    distance: in mm in space; in_plane: in the plane of the series (sagittal: y and z, axial: x and y).
    """
    known = labels.dropna(subset=["X", "Y", "Z"])
    known = known.assign(side=known["condition"].map({c.name: c.side or "" for c in CONDITIONS.values()}))
    both = known.merge(points, on=["study_id", "level", "side"], how="left", suffixes=("", "_found"))
    off = np.abs(both[["X_found", "Y_found", "Z_found"]].to_numpy(float) - both[["X", "Y", "Z"]].to_numpy(float))
    axial = both["condition"].map({c.name: c.group == "ss" for c in CONDITIONS.values()}).to_numpy()
    in_plane = np.where(axial, np.hypot(off[:, 0], off[:, 1]), np.hypot(off[:, 1], off[:, 2]))
    names = ["row_id", "study_id", "condition", "level", "side", "severity", "confidence"]
    return both[names].assign(distance=np.linalg.norm(off, axis=1), in_plane=in_plane)


def localisation(errors: pd.DataFrame) -> pd.DataFrame:
    """Share of label points found, and found within 5 and 10 mm of the reader's point, by condition."""

    def line(group: pd.DataFrame) -> pd.Series:
        """The shares of one condition."""
        near = {f"within_{mm}_mm": (group["distance"] <= mm).mean() for mm in (5, 10)}
        plane = {f"in_plane_within_{mm}_mm": (group["in_plane"] <= mm).mean() for mm in (5, 10)}
        found = group["distance"].notna()
        return pd.Series(
            {"points": len(group), "found": found.mean(), "median_mm": group["distance"].median(), **near, **plane}
        )

    return errors.groupby("condition").apply(line, include_groups=False).reset_index()
