"""Prediction by a trained detector: patient points and class scores of the one-to-one head. Coordinates are LPS mm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import axial_levels
from lsdc_utils.detector.classes import (
    Detector,
    DetectorConfig,
    class_table,
)
from lsdc_utils.detector.images import (
    near_middle,
    network_inputs,
    strip_window,
)
from lsdc_utils.vocabulary import GROUPS

GREY = 114  # of 255: what ultralytics fills borders with, in training and so in prediction too
KEPT = 24  # detections kept a slice and view: five levels with room for doubles
FORAMEN_REACH = (6.0, 30.0)  # mm off the canal at which foramina lie


@dataclass(frozen=True)
class Detections:
    """All detections of one study by one detector; m of them, each with the score of every class."""

    points: np.ndarray  # (m, 3) LPS mm
    scores: np.ndarray  # (m, classes)
    levels: np.ndarray  # (m,) number of the level that its axial slice shows by the canal points; -1: none, not axial


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
        images = network_inputs(stack, config, canal)[wanted]
        for scale, flip in config.views:
            centres, scores = forward(detector, images, scale, flip)
            points = patient_points(stack, wanted, centres, config)
            levels = np.repeat(shown[wanted], points.shape[1])
            parts.append((points.reshape(-1, 3), scores.reshape(-1, scores.shape[2]), levels))
    if not parts:
        return Detections(np.empty((0, 3)), np.empty((0, len(class_table(config)))), np.empty(0, dtype=int))
    return Detections(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def _wanted(stack: Stack, config: DetectorConfig, canal: pd.DataFrame | None) -> np.ndarray:
    """Slices (n,) bool on which the condition can be seen, told from geometry and the canal points alone."""
    if config.condition == "scs" and not config.everywhere:
        return near_middle(stack)
    if config.everywhere or canal is None or canal.empty:
        return np.ones(len(stack.pixels), dtype=bool)
    if config.condition == "ss":
        return axial_levels(stack, canal) >= 0
    nearest = np.abs(geometry.plane_distances(stack.affines, canal[["X", "Y", "Z"]].to_numpy(dtype=float))).min(axis=1)
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


def _other_side(config: DetectorConfig) -> np.ndarray:
    """For each class the class of the other side in a flipped image; only axial images show side in their plane."""
    table = class_table(config)
    order = np.arange(len(table))
    if config.condition != "ss" or table["condition"].isna().any():
        return order
    return order.reshape(2, -1)[::-1].ravel()


def patient_points(stack: Stack, wanted: np.ndarray, centres: np.ndarray, config: DetectorConfig) -> np.ndarray:
    """Patient points (n, k, 3) of centres (n, k, 2), which are fractions of the strips of slices `wanted` (n,)."""
    windows = np.array([strip_window(shape, config) for shape in stack.shapes[wanted]], dtype=float)
    pixels = windows[:, None, :2] + centres * windows[:, None, 2:] - 0.5
    return geometry.to_patient(stack.affines[wanted][:, None], pixels)
