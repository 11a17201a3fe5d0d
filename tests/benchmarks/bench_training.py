"""Speed of the detectors' trainer, as a share of what its network alone needs: forward, loss, backward and step."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import studies  # noqa: F401 - puts the repository on the path and sets one thread
import torch

from lsdc_utils.detector.classes import DetectorConfig
from lsdc_utils.detector.training import DetectorTraining, train_detector

SIZE = (160, 96)  # rows and columns, as the canal's detector has them in profile demo
IMAGES, BATCH, EPOCHS = 96, 16, 4
CONFIG = DetectorConfig("scs", "seen", (0.3, 0.8, 0.1, 0.92), SIZE, True, 14.6)
OPTIONS = {"mosaic": 0.0, "fliplr": 0.0, "bgr": 0.5, "translate": 0.05, "scale": 0.1, "hsv_v": 0.3, "cls": 2.0}


def write_images(folder: Path) -> pd.DataFrame:
    """A data set of noise with five boxes an image; returns file and weight of each."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for number in range(IMAGES):
        cv2.imwrite(str(folder / f"images/{number}.png"), rng.integers(0, 255, (*SIZE, 3)).astype(np.uint8))
        lines = [f"{3 * level + rng.integers(3)} .5 {0.15 + 0.17 * level:.3f} .12 .07" for level in range(5)]
        (folder / f"labels/{number}.txt").write_text("\n".join(lines) + "\n")
    pd.DataFrame({"width": [0.12], "height": [0.07]}).to_csv(folder / "boxes.csv", index=False)
    return pd.DataFrame({"file": [f"images/{number}.png" for number in range(IMAGES)], "weight": 1.0})


def trainer_speed(folder: Path, shown: pd.DataFrame) -> float:
    """Images a second of the trainer's epochs but the first."""
    training = DetectorTraining("yolov10n.yaml", EPOCHS, BATCH, 0.002, seed=1, threads=1, options=OPTIONS)
    _, history = train_detector(folder, shown, CONFIG, training, folder / "work")
    return IMAGES / history["seconds"][1:].min()


def bare_speed() -> float:
    """Images a second of forward, loss, backward and step of the same network on batches of the same kind."""
    from ultralytics.cfg import DEFAULT_CFG_DICT
    from ultralytics.nn.tasks import DetectionModel

    torch.set_num_threads(1)
    model = DetectionModel("yolov10n.yaml", nc=15, verbose=False).train().to(memory_format=torch.channels_last)
    model.args = SimpleNamespace(**DEFAULT_CFG_DICT)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    boxes = torch.tensor([[0.5, 0.15 + 0.17 * level, 0.12, 0.07] for level in range(5)])
    batch = {
        "img": torch.rand(BATCH, 3, *SIZE),
        "batch_idx": torch.arange(BATCH).repeat_interleave(5).float(),
        "cls": torch.arange(0, 15, 3).repeat(BATCH).float()[:, None],
        "bboxes": boxes.repeat(BATCH, 1),
    }
    best = np.inf
    for _ in range(4 * IMAGES // BATCH):
        start = time.perf_counter()
        loss, _ = model(batch)
        loss.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        best = min(best, time.perf_counter() - start)
    return BATCH / best


def main() -> None:
    """Print the ratio, both measured in this run."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        trained = trainer_speed(data, write_images(data))
    bare = bare_speed()
    print(f"one thread, {SIZE[0]} x {SIZE[1]} pixels: trainer {trained:.0f} images/s, bare steps {bare:.0f} images/s")
    print(f"ratio {trained / bare:.2f}")


if __name__ == "__main__":
    main()
