"""What a detector is shown of a series: a window round the spine, with neighbouring slices as channels."""

import cv2
import numpy as np
import pandas as pd
from PIL import Image

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import axial_levels
from lsdc_utils.detector.classes import DetectorConfig
from lsdc_utils.vocabulary import LEVELS

CANAL_REACH = 12.0  # mm off the canal's points up to which it is looked for,
FORAMEN_REACH = (6.0, 30.0)  # and between which foramina lie


def wanted(stack: Stack, config: DetectorConfig, canal: pd.DataFrame) -> np.ndarray:
    """Slices (n,) bool that may show the condition at some level, by geometry and the study's canal points alone."""
    if config.condition == "ss":
        return axial_levels(stack, canal) >= 0
    off = np.abs(geometry.plane_distances(stack.affines, canal[[*"XYZ"]].to_numpy(dtype=float)))
    low, high = FORAMEN_REACH if config.condition == "nfn" else (0.0, CANAL_REACH)
    return ((off >= low) & (off <= high)).any(axis=1)


def windows(stack: Stack, config: DetectorConfig, canal: pd.DataFrame | None) -> np.ndarray:
    """Left, top, width and height in whole pixels (n, 4) of what is shown of each slice; it may reach beyond the image.

    Its size is in mm, its middle that of the study's canal points (level, X, Y, Z), for foramina moved to these; in
    axial slices the canal where the slice cuts it.
    """
    if config.window is None:
        return np.column_stack([np.zeros_like(stack.shapes), stack.shapes[:, ::-1]])
    points = canal[[*"XYZ"]].to_numpy(dtype=float, copy=True)
    if config.condition == "nfn":
        points[:, 1:] -= np.array(config.canal_from_foramina)[[LEVELS.index(level) for level in canal["level"]]]
    aims = np.tile((points.min(axis=0) + points.max(axis=0)) / 2, (len(stack.affines), 1))
    if config.condition == "ss":
        off = geometry.plane_distances(stack.affines, points)
        order = off.argsort(axis=1)
        aims = [[np.interp(0, d[o], points[o, k]) for k in range(3)] for d, o in zip(off, order, strict=True)]
    middle = geometry.to_pixels(stack.affines, np.array(aims))[:, :2] + 0.5
    size = np.maximum(np.rint(np.array(config.window[::-1]) / geometry.spacing(stack.affines)), 1)
    return np.concatenate([np.rint(middle - size / 2), size], axis=1).astype(int)


def shown(stack: Stack, config: DetectorConfig, canal: pd.DataFrame | None) -> np.ndarray:
    """The window of every slice at the network's size: (n, rows, cols) uint8; black beyond the image."""
    rows, cols = config.size
    result = np.empty((len(stack.pixels), rows, cols), dtype=np.uint8)
    every = windows(stack, config, canal).tolist()
    for target, image, shape, (x, y, width, height) in zip(result, stack.pixels, stack.shapes, every, strict=True):
        part = np.asarray(Image.fromarray(image[: shape[0], : shape[1]]).crop((x, y, x + width, y + height)))
        # Averaging keeps fine lines when an image shrinks; linear when it grows.
        method = cv2.INTER_AREA if width > cols else cv2.INTER_LINEAR
        target[:] = cv2.resize(part, (cols, rows), interpolation=method)
    return result


def network_inputs(stack: Stack, config: DetectorConfig, canal: pd.DataFrame | None) -> np.ndarray:
    """What the network is shown of every slice: (n, 3, rows, cols) uint8. `canal`: the study's points.

    Its window between those of its neighbours by position, inside a block only. Of foramina they run from medial to
    lateral, seen from the middle of the canal points, or of the series without them: both sides look alike.
    """
    images, index = shown(stack, config, canal), np.arange(len(stack.pixels))
    if not config.neighbours:
        return np.repeat(images[:, None], 3, axis=1)
    before, behind = np.maximum(index - 1, 0), np.minimum(index + 1, len(index) - 1)
    before, behind = (np.where(stack.blocks[k] == stack.blocks, k, index) for k in (before, behind))
    if config.condition == "nfn":
        points = stack.affines[:, :3, 3] if canal is None or canal.empty else canal[[*"XYZ"]].to_numpy(dtype=float)
        off = np.abs(geometry.plane_distances(stack.affines, points.mean(axis=0)[None])[:, 0])
        inward = off[before] > off[behind]
        before, behind = np.where(inward, behind, before), np.where(inward, before, behind)
    return np.stack([images[before], images, images[behind]], axis=1)
