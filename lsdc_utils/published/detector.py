"""The published detectors: a class for each condition, side, level and severity (30, 15 and 30 classes).

They look at every slice, also flipped, without changing sides; a row is the highest confidence of each class.
"""

import itertools
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.classes import Detector, DetectorConfig, DetectorError
from lsdc_utils.detector.dataset import write_labels
from lsdc_utils.detector.detections import Detections, forward, join_detections, patient_points
from lsdc_utils.detector.images import network_inputs, windows
from lsdc_utils.detector.levels import LevelEvidence, Scheme
from lsdc_utils.detector.training import load_detector
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVELS, SEVERITIES, parse_row_id, row_id

# The mean average precision (overlap .5) that was published for them: YOLOv10x, 384 pixels, 100 epochs, one fold.
MAP50 = {"nfn": 0.472, "scs": 0.558, "ss": 0.416}


def class_table(config: DetectorConfig) -> pd.DataFrame:
    """The classes in their order: name, condition, level, severity 0 to 2."""
    conditions = [condition.name for condition in CONDITIONS.values() if condition.group == config.condition]
    keys = itertools.product(conditions, LEVELS, enumerate(SEVERITIES))
    rows = [(f"{condition}_{level}_{name}", condition, level, severity) for condition, level, (severity, name) in keys]
    return pd.DataFrame(rows, columns=["name", "condition", "level", "severity"])


def prepare(data: Path, folder: Path, config: DetectorConfig, labels: pd.DataFrame) -> tuple[Path, Scheme]:
    """Write 02's data set in folder `data` with the published classes into `folder`; return that and the detectors'
    scheme. Kept are images with boxes that readers clicked, in studies with all 25 labels (by the label table)."""
    if config.window:
        raise DetectorError("the published detectors see whole images: set yolo_window_mm to [] for each condition")
    complete = labels.groupby("study_id")["severity"].min() >= 0
    table = class_table(config).reset_index().set_index(["condition", "level", "severity"])["index"]
    boxes = pd.read_csv(data / "boxes.csv")
    boxes = boxes[~boxes["copied"] & boxes["study_id"].map(complete)]
    keys = [(*parse_row_id(row)[1:], severity) for row, severity in boxes[["row_id", "severity"]].to_numpy()]
    boxes = boxes.assign(class_id=[table[key] for key in keys])
    slices = ["study_id", "series_id", "slice"]
    counts = boxes.groupby(slices).agg(boxes=("severity", "size"), worst=("severity", "max")).reset_index()
    images = pd.read_csv(data / "images.csv").drop(columns=["boxes", "worst"]).merge(counts, on=slices)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "images").symlink_to((data / "images").resolve(), target_is_directory=True)
    write_labels(folder, images.assign(weight=1.0), boxes, class_table(config)["name"])
    return folder, SCHEME


def detect(detector: Detector, stacks: Sequence[Stack], canal: pd.DataFrame | None = None) -> Detections:
    """Detections of one study on all slices of its series; `canal` is not used."""
    config, parts = detector.config, []
    for stack in (s for s in stacks if s.series_type == GROUPS[config.condition].series_type):
        images, every = network_inputs(stack, config, None), np.arange(len(stack.pixels))
        for scale, flip in config.views:
            shown = np.ascontiguousarray(images[..., ::-1]) if flip else images
            centres, scores = forward(detector, shown, scale, False)
            if flip:
                centres[..., 0] = 1 - centres[..., 0]
            points = patient_points(stack.affines, windows(stack, config, None), centres)
            parts.append((points, scores, np.full(len(every), -1), every))
    return join_detections(parts, len(class_table(config)))


def level_evidence(
    seen: Sequence[Detections], study_id: int, configs: Sequence[DetectorConfig], canal: pd.DataFrame | None = None
) -> list[list[LevelEvidence]]:
    """As `levels.level_evidence`: the highest confidence of each class; `canal` is not used."""
    result = [[] for _ in seen]
    for found, own, config in zip(result, seen, configs, strict=True):
        places = class_table(config).groupby(["condition", "level"], sort=False).groups if len(own.scores) else {}
        for (condition, level), numbers in places.items():
            place = own.points[own.scores[:, numbers].max(axis=1).argmax()]
            row, side = row_id(study_id, condition, level), CONDITIONS[condition].side or ""
            best = own.scores[:, numbers].max(axis=0)[None]
            found.append(LevelEvidence(row, study_id, level, side, place, best))
    return result


SCHEME = Scheme(class_table, detect, level_evidence)


def load_detectors(weights: str | Path, folds: Iterable[int]) -> dict[str, list[Detector]]:
    """The published detectors of these folds in a folder of weights, by condition group, for `levels.grade_study`."""
    weights, folds = Path(weights), list(folds)
    return {key: [load_detector(weights / f"yolo_{key}_fold{k}.pt", class_table) for k in folds] for key in GROUPS}
