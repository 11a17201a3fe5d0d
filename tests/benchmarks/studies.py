"""Shared by the benchmarks: studies of real size as DICOM files, and a clock that compares functions in turn."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # so that these scripts need no PYTHONPATH

from lsdc_utils.phantom.body import Body
from lsdc_utils.phantom.files import write_slice
from lsdc_utils.phantom.scanner import Protocol, plan_series, render
from lsdc_utils.vocabulary import AXIAL, LEVELS, SERIES_TYPES

SIDE = 512  # rows and columns

threadpool_limits(1)
cv2.setNumThreads(1)


def write_studies(root: Path, count: int, seed: int = 1, side: int = SIDE) -> pd.DataFrame:
    """Write one study of three RLE series and link it `count` times, as the test split of a data folder.

    The images are the phantom's, interpolated to `side` pixels as scanners do, so that RLE compresses them to 0.6 of
    the raw size, like real ones. Axial slices come in one tilted block a level, the slower case.
    Returns the true canal points of every study: study_id, level, X, Y, Z.
    """
    rng = np.random.default_rng(seed)
    body = Body.draw(rng, np.full(25, 0.4), slip=False, transitional=False)
    first = root / "test_images" / "1"
    rows = []
    for number, series_type in enumerate(SERIES_TYPES, 1):
        plan = plan_series(rng, body, series_type, tilted=series_type == AXIAL, square=True, protocol=Protocol(stir=0))
        images, affines = _enlarge(render(body, plan, rng), plan.affines, side)
        folder = first / str(number)
        folder.mkdir(parents=True)
        for k, (image, affine) in enumerate(zip(images, affines, strict=True), 1):
            uid = {"StudyInstanceUID": "1.2.3.1", "SeriesInstanceUID": f"1.2.3.1.{number}"}
            name = {"SOPInstanceUID": f"1.2.3.1.{number}.{k}", "SeriesDescription": series_type, "InstanceNumber": k}
            write_slice(folder / f"{k}.dcm", image, affine, {**uid, **name, "SliceThickness": "4"})
        rows += [(study, number, series_type) for study in range(1, count + 1)]
    for study in range(2, count + 1):
        first.with_name(str(study)).symlink_to(first.resolve(), target_is_directory=True)
    table = pd.DataFrame(rows, columns=["study_id", "series_id", "series_description"])
    table.to_csv(root / "test_series_descriptions.csv", index=False)
    points = pd.DataFrame(body.points()[: len(LEVELS)], columns=list("XYZ"))
    points = points.assign(level=LEVELS, side="", confidence=1.0, condition="scs")
    return pd.concat([points.assign(study_id=study) for study in range(1, count + 1)], ignore_index=True)


def _enlarge(images: np.ndarray, affines: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Square images (n, s, s) at `side` pixels, with affines that keep each one's edges where they were."""
    factor = images.shape[1] / side
    larger = np.stack(
        [cv2.resize(image.astype(np.float32), (side, side), interpolation=cv2.INTER_CUBIC) for image in images]
    )
    affines = affines.copy()
    affines[:, :3, 3] += affines[:, :3, :2].sum(axis=2) * (factor - 1) / 2
    affines[:, :3, :2] *= factor
    return np.minimum(larger, 4095), affines


def fastest(contenders: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The least processor time in seconds of each contender, the system's included; each runs once a round."""
    best = dict.fromkeys(contenders, np.inf)
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            best[name] = min(best[name], time.process_time() - start)
    return best
