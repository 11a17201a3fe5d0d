"""Prediction by a trained detector: patient points and class scores of the one-to-one head. Coordinates are LPS mm."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import axial_levels
from lsdc_utils.detector.classes import Detector, class_table
from lsdc_utils.detector.images import network_inputs, wanted, windows
from lsdc_utils.vocabulary import GROUPS

GREY = 114  # of 255: what ultralytics fills borders with, in training and so in prediction too
KEPT = 24  # detections kept from each slice and view: five levels, with room for doubles
BATCH = 64  # images predicted at once


@dataclass(frozen=True)
class Detections:
    """All detections of one study by one detector; m of them, each with the score of every class."""

    points: np.ndarray  # (m, 3) LPS mm
    scores: np.ndarray  # (m, classes)
    levels: np.ndarray  # (m,) number of the level that its axial slice shows by the canal points; -1: none, not axial
    slices: np.ndarray  # (m,) number of its slice among all of the study's series


def detect(detector: Detector, stacks: Sequence[Stack], canal: pd.DataFrame | None = None) -> Detections:
    """Detections of one study by the one-to-one head, in the views of the config. They lie near the study's canal
    points, `canal`; without these there are none."""
    config, parts, first = detector.config, [], 0
    stacks = stacks if canal is not None and len(canal) else ()
    for stack in (s for s in stacks if s.series_type == GROUPS[config.condition].series_type):
        own, first = np.arange(first, first + len(stack.pixels)), first + len(stack.pixels)
        levels = axial_levels(stack, canal) if config.condition == "ss" else np.full(len(stack.pixels), -1)
        index = np.flatnonzero(wanted(stack, config, canal))
        if not len(index):
            continue
        images, places = network_inputs(stack, config, canal)[index], windows(stack, config, canal)[index]
        for scale, flip in config.views:
            centres, scores = forward(detector, images, scale, flip)
            points = patient_points(stack.affines[index], places, centres)
            parts.append((points, scores, levels[index], own[index]))
    return join_detections(parts, len(class_table(config)))


def join_detections(parts: Sequence[tuple[np.ndarray, ...]], classes: int) -> Detections:
    """One table of the parts of a study: points (n, k, 3), scores (n, k, C), levels (n,) and slices (n,) of a view."""
    none = np.empty(0, dtype=int)
    parts = [(np.empty((0, 1, 3)), np.empty((0, 1, classes), np.float32), none, none), *parts]
    places = np.concatenate([points.reshape(-1, 3) for points, *_ in parts])
    scores = np.concatenate([scores.reshape(-1, classes) for _, scores, *_ in parts])
    of_slices = [[np.repeat(part[k], part[0].shape[1]) for part in parts] for k in (2, 3)]
    return Detections(places, scores, *map(np.concatenate, of_slices))


@torch.inference_mode()
def forward(detector: Detector, views: np.ndarray, scale: float, flip: bool) -> tuple[np.ndarray, np.ndarray]:
    """The best `KEPT` detections of inputs (n, 3, rows, cols): centres (n, k, 2), shares of a window, scores (n, k, C).

    A flipped view is the mirrored patient: axial images change columns, the canal's the order of their slices, and the
    foramina's stay as they are, since their channels run from medial to lateral on either side.
    """
    device, head = next(detector.model.parameters()).device, detector.model.model[-1]
    axis = {"ss": 3, "scs": 1}.get(detector.config.condition) if flip else None
    all_centres, all_scores = [], []
    for part in np.array_split(views, max(math.ceil(len(views) / BATCH), 1)):
        images = torch.from_numpy(part).to(device).float() / 255
        images = images.flip(axis) if axis else images
        if scale != 1:
            size = [round(side * scale) for side in images.shape[2:]]
            images = torch.nn.functional.interpolate(images, size=size, mode="bilinear", align_corners=False)
            pad = (0, -size[1] % 32, 0, -size[0] % 32)  # right and below, to multiples of 32
            images = torch.nn.functional.pad(images, pad, value=GREY / 255)
        raw = detector.model(images)[1]["one2one"]
        corners = head._get_decode_boxes(raw)[:, :4].transpose(1, 2)
        centres = (corners[..., :2] + corners[..., 2:]) / 2 / scale
        scores = raw["scores"].sigmoid().transpose(1, 2)
        best = scores.amax(dim=2).topk(min(KEPT, scores.shape[1]), dim=1).indices[..., None]
        all_centres.append(centres.gather(1, best.expand(-1, -1, 2)).cpu().numpy())
        all_scores.append(scores.gather(1, best.expand(-1, -1, scores.shape[2])).cpu().numpy())
    centres = np.concatenate(all_centres) / np.array(detector.config.size[::-1])
    if axis == 3:
        centres[..., 0] = 1 - centres[..., 0]
    return centres, np.concatenate(all_scores)


def patient_points(affines: np.ndarray, places: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """Patient points (n, k, 3) of centres (n, k, 2), fractions of the windows `places` (n, 4) of slices (n, 4, 4)."""
    pixels = places[:, None, :2] + centres * places[:, None, 2:] - 0.5
    return geometry.to_patient(affines[:, None], pixels)
