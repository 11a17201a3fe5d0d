"""What a detector is shown of a series: the strip round the spine, with neighbouring slices as channels."""

from collections.abc import Sequence

import cv2
import numpy as np
import pandas as pd

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.classes import DetectorConfig

CANAL_REACH = 16.0  # mm to either side of the middle of a sagittal series in which the canal is looked for


def strip_window(shape: Sequence[int], config: DetectorConfig) -> tuple[int, int, int, int]:
    """Left, top, width and height in whole pixels of the strip in an image of `shape` (rows, columns)."""
    left, right, top, bottom = config.strip
    x, y = round(left * shape[1]), round(top * shape[0])
    return x, y, max(round(right * shape[1]) - x, 1), max(round(bottom * shape[0]) - y, 1)


def strips(stack: Stack, config: DetectorConfig) -> np.ndarray:
    """The strip of every slice at the network's size: (n, rows, cols) uint8."""
    rows, cols = config.size
    result = np.empty((len(stack.pixels), rows, cols), dtype=np.uint8)
    for target, image, shape in zip(result, stack.pixels, stack.shapes, strict=True):
        x, y, width, height = strip_window(shape, config)
        # Averaging keeps fine lines when an image shrinks; linear when it grows.
        method = cv2.INTER_AREA if width > cols else cv2.INTER_LINEAR
        target[:] = cv2.resize(image[y : y + height, x : x + width], (cols, rows), interpolation=method)
    return result


def slice_channels(
    images: np.ndarray, blocks: np.ndarray, config: DetectorConfig, lateral: np.ndarray | None = None
) -> np.ndarray:
    """Network inputs (n, 3, rows, cols) from strips (n, rows, cols): neighbours by position, inside a block only.

    lateral: mm of each slice off the midline. If given, channels run from medial to lateral, so that both sides of
    the patient look alike.
    """
    if not config.neighbours:
        return np.repeat(images[:, None], 3, axis=1)
    index = np.arange(len(images))
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
    return np.abs(geometry.plane_distances(stack.affines, middle[None])[:, 0])


def network_inputs(stack: Stack, config: DetectorConfig, canal: pd.DataFrame | None) -> np.ndarray:
    """What the network is shown of every slice: (n, 3, rows, cols) uint8. `canal`: the study's points, or none."""
    lateral = off_midline(stack, canal) if config.condition == "nfn" else None
    return slice_channels(strips(stack, config), stack.blocks, config, lateral)


def near_middle(stack: Stack) -> np.ndarray:
    """Slices (n,) bool of a sagittal series within `CANAL_REACH` of its middle; all slices of any other series."""
    x = stack.affines[:, 0, 3]
    sagittal = np.abs(geometry.normals(stack.affines)[:, 0]).min() > 0.7
    return np.abs(x - (x.min() + x.max()) / 2) <= CANAL_REACH if sagittal else np.ones(len(x), dtype=bool)
