"""Conversion between patient millimetres and pixels.

Coordinates are LPS millimetres: x grows to the patient's left, y to posterior, z to the head. An affine (4, 4) of a
slice maps (x = column, y = row, ., 1) to them, 0 at the centre of the first pixel (DICOM PS3.3, C.7.6.2.1.1); its third
column is not used. Slices that lean, or whose rows and columns are not quite at right angles, are handled exactly.
"""

from collections.abc import Sequence

import numpy as np


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., 3) of length 1."""
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def normals(affines: np.ndarray) -> np.ndarray:
    """Unit normals (..., 3) of slices with affines (..., 4, 4): columns cross rows."""
    return unit(np.cross(affines[..., :3, 0], affines[..., :3, 1]))


def spacing(affines: np.ndarray) -> np.ndarray:
    """Millimetres (..., 2) from one pixel to the next along x (columns) and along y (rows)."""
    return np.linalg.norm(affines[..., :3, :2], axis=-2)


def to_pixels(affines: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Column, row and signed mm off the plane (..., 3) of patient points (..., 3) in slices with these affines."""
    axes = np.concatenate([affines[..., :3, :2], normals(affines)[..., None]], axis=-1)
    return (np.linalg.inv(axes) @ (points - affines[..., :3, 3])[..., None])[..., 0]


def to_patient(affines: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Patient points (..., 3) of pixels (..., 2), column and row, in slices with affines (..., 4, 4), broadcast."""
    return (affines[..., :3, :2] @ pixels[..., None])[..., 0] + affines[..., :3, 3]


def plane_distances(affines: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Signed distances (n, m) in mm of points (m, 3) from the planes of n slices with affines (n, 4, 4)."""
    return np.einsum("nmi,ni->nm", points[None] - affines[:, None, :3, 3], normals(affines))


def image_distances(affines: np.ndarray, shapes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Distances (n, m) in mm, never negative, of points (m, 3) from n images with affines (n, 4, 4) and shapes (n, 2),
    rows and columns. A point beside an image is that much farther: tilted planes cross far from their images."""
    local = to_pixels(affines[:, None], points)
    last = np.asarray(shapes)[:, None, ::-1] - 1.0
    beside = np.maximum(np.maximum(-local[..., :2], local[..., :2] - last), 0.0) * spacing(affines)[:, None]
    return np.hypot(local[..., 2], np.linalg.norm(beside, axis=-1))


def plane_of(normal: Sequence[float]) -> str:
    """sagittal, coronal or axial: the anatomical plane of images with this normal (3,), by its largest component."""
    x, y, z = map(abs, normal)
    return "sagittal" if x >= max(y, z) else "coronal" if y >= z else "axial"
