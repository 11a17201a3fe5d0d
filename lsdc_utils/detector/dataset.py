"""Data sets of the detectors in YOLO's format: boxes of labels, their copies on neighbouring slices, images."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import yaml

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import readers_canal, recess_canal
from lsdc_utils.detector.classes import DetectorConfig, DetectorError, class_table
from lsdc_utils.detector.images import network_inputs, wanted, windows
from lsdc_utils.files import write_json
from lsdc_utils.vocabulary import GROUP_OF, GROUPS, SIDES

COPY_FALL = 2 / 3  # of the reach of copies: the sigma by which a copy's weight falls with its distance
BOXES = ["slice", "row_id", "class_id", "severity", "x", "y", "width", "height", "clipped", "copied", "off"]
POSITION = ["X", "Y", "Z", "x", "y"]
IMAGES = ["file", "study_id", "series_id", "slice", "boxes", "worst", "weight"]
# 264 kB at 640 x 352, where OpenCV's defaults give 357; takes .7 ms more to write. Lossless WebP: 194 kB, 80 ms more.
PNG = [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_PAETH]
PNG += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]


def label_boxes(
    stack: Stack, labels: pd.DataFrame, config: DetectorConfig, copy_mm: float, canal: pd.DataFrame
) -> pd.DataFrame:
    """Boxes of a series' labels, given as rows of the label table; canal: the study's points, round which windows lie.

    A box stands on the slice that the reader clicked and, where `copy_mm` > 0, on the slices of its block up to that
    far along the normal, since those show the same lesion. Both recesses of a level have a box on every slice that
    either of them has one on. Returns slice, row_id, class_id, severity, x, y, width, height as fractions of the
    window, clipped to it, copied, off: mm from the clicked slice.
    """
    places, pairs, boxes = windows(stack, config, canal), config.condition == "ss", []
    clicks = [click for click in _clicks(stack, labels) if click[0].severity >= 0]
    for label, own, off in clicks:
        near = off <= copy_mm
        for other, _, others_off in clicks if pairs else ():
            near |= (other.level == label.level) & (others_off <= copy_mm) & np.isfinite(off)
        point = np.array([label.X, label.Y, label.Z])
        for index in np.flatnonzero(near):
            xy = geometry.to_pixels(stack.affines[index], point)[:2]  # a stack is upright, its files need not be
            if place := _box(xy, places[index], stack.affines[index], config):
                boxes.append((index, label.row_id, label.severity, label.severity, *place, index != own, off[index]))
    table = pd.DataFrame(boxes, columns=BOXES)
    if pairs:
        # A slice between two levels shows one lesion per side: the nearer label speaks for it.
        side = table["row_id"].str.extract(f"({'|'.join(SIDES)})", expand=False)
        order = table.assign(side=side).sort_values(["slice", "off"], kind="stable")
        return order.drop_duplicates(["slice", "side"]).drop(columns="side")
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


def _box(xy: Sequence[float], window: Sequence[int], affine: np.ndarray, config: DetectorConfig) -> tuple | None:
    """Box round pixel `xy` as x, y, width, height in fractions of a window, clipped to it, and whether it was clipped;
    None if the point itself is outside: ultralytics drops a whole image for one box that leaves it."""
    left, top, width, height = window
    centre = np.array([(xy[0] + 0.5 - left) / width, (xy[1] + 0.5 - top) / height])  # pixel 0 ends at 0.5
    half = 0.5 * config.box_mm / geometry.spacing(affine) / np.array([width, height])
    if (centre < 0).any() or (centre > 1).any():
        return None
    low, high = np.clip(centre - half, 0, 1), np.clip(centre + half, 0, 1)
    clipped = bool((low > centre - half + 1e-9).any() or (high < centre + half - 1e-9).any())
    return (*((low + high) / 2), *(high - low), clipped)


@dataclass(frozen=True)
class Dataset:
    """The data set of one detector in YOLO's format: `add` writes the images of a series, in any process, and `finish`
    the rest. A slice without a box is left out if a label lies up to `margin_mm` beyond its copies: what it shows is
    not known."""

    folder: Path  # a data set is whole if it has a config.json, which is written last
    config: DetectorConfig
    copy_mm: float  # slices this close to a clicked one show the same lesion
    margin_mm: float
    background: int  # slices beyond that, added from each series with boxes

    def add(self, stack: Stack, labels: pd.DataFrame) -> tuple | None:
        """What `finish` needs of a series; None if it has no labels of this detector. labels: of its study."""
        groups, condition = labels["condition"].map(GROUP_OF), self.config.condition
        here = labels[(groups == condition) & (labels["series_id"] == stack.series_id)]
        if stack.series_type != GROUPS[condition].series_type or here.empty:
            return None
        trusted = labels[labels["train_on"]]  # other rows do not tell where to look
        canal = readers_canal(trusted, self.config.canal_from_foramina)
        canal = recess_canal(trusted) if canal.empty else canal
        if canal.empty:  # nothing tells where to look
            return condition, [], pd.DataFrame(), stack.series_id, stack.instance_numbers
        table = label_boxes(stack, here, self.config, self.copy_mm, canal)
        table = table.assign(weight=np.exp(-0.5 * (table["off"] / max(self.copy_mm * COPY_FALL, 1e-6)) ** 2))
        free = wanted(stack, self.config, canal)  # the slices that prediction looks at, without those near a label
        for _, _, off in _clicks(stack, here):
            free &= off > self.copy_mm + self.margin_mm
        free[table["slice"].to_numpy(dtype=int)] = False
        free, count = np.flatnonzero(free), self.background if len(table) else 0
        free = free[np.linspace(0, len(free) - 1, min(count, len(free))).round().astype(int)]  # spread evenly
        inputs, lines = network_inputs(stack, self.config, canal), []
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        for index in np.union1d(table["slice"].to_numpy(dtype=int), free).astype(int):
            shown, file = table[table["slice"] == index], f"images/{stack.study_id}_{stack.series_id}_{index:03d}.png"
            # OpenCV writes and ultralytics turns the channels' order round: files show them as the network sees them.
            content = cv2.imencode(".png", inputs[index].transpose(1, 2, 0)[..., ::-1], PNG)[1]
            (self.folder / file).write_bytes(content)  # an error where the disk is full, unlike OpenCV's own writing
            worst, weight = (int(shown["severity"].max()), shown["weight"].mean()) if len(shown) else (-1, 1.0)
            lines.append((file, stack.study_id, stack.series_id, index, len(shown), worst, weight))
        boxes = table.assign(study_id=stack.study_id, series_id=stack.series_id)
        return condition, lines, boxes, stack.series_id, stack.instance_numbers

    def finish(
        self, labels: pd.DataFrame, parts: Iterable[tuple | None]
    ) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """Write labels, data.yaml and tables: images, boxes, skipped labels, which are returned.

        labels: of all studies, with `train_on`. parts: all that `add` of any data set returned, in the order of the
        rows. images: file, study_id, series_id, slice, boxes, worst (severity, -1 without a box), weight (1 at the
        click, less far off).
        """
        condition = self.config.condition
        parts = [part[1:] for part in parts if part and part[0] == condition]
        boxes = [boxes for _, boxes, _, _ in parts if len(boxes)]
        if not boxes:
            raise DetectorError(f"no box for detector {condition}: no label lies on a series that could be read")
        images = pd.DataFrame([line for lines, *_ in parts for line in lines], columns=IMAGES)
        boxes, numbers = pd.concat(boxes, ignore_index=True), {series: numbers for *_, series, numbers in parts}
        own = labels["condition"].map(GROUP_OF) == condition
        lost = labels[own & ~labels["row_id"].isin(boxes["row_id"])]
        places = zip(lost["series_id"], lost["instance_number"], strict=True)
        counts = np.array([(numbers.get(series, np.empty(0)) == i).sum() for series, i in places], dtype=int)
        reasons = {
            "not trained on": ~lost["train_on"],
            "no severity": lost["severity"] < 0,
            "no coordinate": lost["series_id"].isna() | (lost["series_id"] <= 0),
            "its series has another type or could not be read": ~lost["series_id"].isin(list(numbers)),
            "its slice is not in the series": counts != 1,
            "no position": ~np.isfinite(lost[POSITION].astype(float)).all(axis=1),
        }
        reason = np.select(list(reasons.values()), list(reasons), "outside the window, or no canal point to place that")
        skipped = pd.DataFrame({"row_id": lost["row_id"], "reason": reason})
        write_labels(self.folder, images, boxes, class_table(self.config)["name"])
        write_json(self.folder / "config.json", asdict(self.config))
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


def training_images(images: pd.DataFrame, studies: Iterable[int], repeats: Sequence[int]) -> pd.DataFrame:
    """Images of these studies: file, and how often each is shown in an epoch, its weight times repeats[worst]."""
    own = images[images["study_id"].isin(set(studies))]
    times = np.array(repeats, dtype=float)[own["worst"].clip(lower=0).to_numpy()]
    return pd.DataFrame({"file": own["file"], "weight": own["weight"] * times})
