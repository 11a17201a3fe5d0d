"""Small stacks and spines that several tests share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from lsdc_utils.data.stacks import Stack
from lsdc_utils.vit.crops import SPINE_Y, SPINE_Z
from lsdc_utils.vocabulary import AXIAL, LEVELS, T1, T2


def ramp(points: np.ndarray) -> np.ndarray:
    """A grey value that is linear in patient space, so that linear interpolation must return it exactly."""
    return 100 + np.asarray(points) @ np.array([0.7, -0.5, 0.4])


def make_affines(n, spacing, step, columns, rows, centre, size):
    """Affines (n, 4, 4) of parallel slices whose middle lies at `centre`."""
    columns, rows = np.asarray(columns, float), np.asarray(rows, float)
    normal = np.cross(columns, rows)
    affines = np.tile(np.eye(4), (n, 1, 1))
    for i in range(n):
        affines[i, :3, 0], affines[i, :3, 1], affines[i, :3, 2] = columns * spacing, rows * spacing, normal
        middle = np.asarray(centre, float) + normal * step * (i - (n - 1) / 2)
        affines[i, :3, 3] = middle - (columns * (size[1] - 1) + rows * (size[0] - 1)) * spacing / 2
    return affines


def make_stack(function, affines, size, series_type=T2, blocks=None, series_id=1, study_id=7):
    """A stack whose pixels are `function` of their patient coordinates."""
    rows, cols = np.meshgrid(np.arange(size[0]), np.arange(size[1]), indexing="ij")
    pixel = np.stack([cols, rows, np.zeros(size), np.ones(size)], axis=-1)
    points = np.einsum("nij,rcj->nrci", affines, pixel)[..., :3]
    n = len(affines)
    return Stack(
        study_id=study_id,
        series_id=series_id,
        series_type=series_type,
        pixels=np.clip(np.rint(function(points)), 0, 255).astype(np.uint8),
        shapes=np.tile(np.array(size, np.int32), (n, 1)),
        affines=affines,
        instance_numbers=np.arange(1, n + 1, dtype=np.int32),
        blocks=np.zeros(n, np.int32) if blocks is None else blocks,
    )


SAGITTAL = {"columns": (0, 1, 0), "rows": (0, 0, -1)}  # columns to posterior, rows to the feet


AXIAL_PLANE = {"columns": (1, 0, 0), "rows": (0, 1, 0)}


def spine(n_missing=0, tilt=0.0, x=3.0):
    """Canal points of one study, leaning by `tilt` mm a mm in the coronal plane, the last `n_missing` levels absent."""
    z = SPINE_Z - 40
    table = {"study_id": 7, "level": LEVELS, "side": "", "X": x + tilt * z, "Y": SPINE_Y + 30, "Z": z}
    return pd.DataFrame(table | {"confidence": 1.0, "condition": "scs"}).iloc[: len(LEVELS) - n_missing]


def mirror_study(stack):
    """The same study mirrored in space (x -> -x): pixels stay, geometry turns round."""
    return replace(stack, affines=np.diag([-1.0, 1, 1, 1]) @ stack.affines)


def noisy_study(n_axial=40):
    """A study of noise: three series of 2 mm pixels."""
    rng, stacks = np.random.default_rng(0), []
    for kind, plane, step in ((T1, SAGITTAL, 4.5), (T2, SAGITTAL, 4.5), (AXIAL, AXIAL_PLANE, 4.0)):
        n = 15 if plane is SAGITTAL else n_axial
        affines = make_affines(n, 2.0, step, centre=(3.3, 30, -40.7), size=(96, 96), **plane)
        stack = make_stack(lambda p: p[..., 0] * 0, affines, (96, 96), kind)
        stacks.append(replace(stack, pixels=rng.integers(0, 255, stack.pixels.shape).astype(np.uint8)))
    return stacks
