"""Cost of a training step of each network: operations, images or studies per second, and memory.

Sizes are those of a profile (`bench_training.py PROFILE`, demo by default). Inputs are noise. On a GPU a step has the
profile's batch and runs in 16 bits; on a CPU it has one image or study and runs on one thread. Of the detector of the
canal, also the speed of a whole training as a share of that of its steps alone, at the profile's batch.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
import studies  # noqa: F401 - puts the repository on the path and sets one thread
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from lsdc_utils.detector.classes import DetectorConfig, class_table
from lsdc_utils.detector.dataset import write_labels
from lsdc_utils.detector.training import quiet_ultralytics, train_detector
from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.model import Vit3d, VitConfig
from lsdc_utils.vocabulary import GROUPS, LEVELS

PROFILES = Path(__file__).resolve().parents[2] / "notebooks" / "profiles"
STEPS = 8  # of which the fastest counts
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def detector_step(parameters: dict[str, Any], key: str, count: int) -> tuple[torch.nn.Module, Callable]:
    """A detector, and its loss on a batch of `count` images with five boxes each."""
    quiet_ultralytics(Path(tempfile.gettempdir()) / "lsdc_bench")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    from lsdc_utils.detector.trainer import lean

    size = tuple(parameters["yolo_size"][key])
    classes = len(class_table(DetectorConfig(key, None, size, True, 14.0)))
    kind = yaml_model_load(Path(parameters["yolo_model"]).with_suffix(".yaml").name)
    kind = lean(kind, parameters["yolo_width"][key]) if parameters["yolo_width"][key] else kind
    model = DetectionModel(kind, nc=classes, verbose=False).to(DEVICE, memory_format=torch.channels_last).train()
    model.args = get_cfg(overrides=parameters["yolo_gains"])
    images = torch.rand(count, 3, *size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    boxes = torch.tensor([[0.5, 0.15 + 0.17 * level, 0.12, 0.07] for level in range(len(LEVELS))])
    batch = {"img": images, "cls": torch.zeros(count * len(LEVELS), 1), "bboxes": boxes.repeat(count, 1)}
    batch["batch_idx"] = torch.arange(count).repeat_interleave(len(LEVELS))
    return model, lambda: model.loss(batch)[0].sum()


def vit_step(parameters: dict[str, Any], count: int) -> tuple[torch.nn.Module, Callable]:
    """The 3D vision transformer, and the sum of its outputs for `count` studies."""
    named = {name: parameters.get(f"vit_{name}") for name in VitConfig.__dataclass_fields__}
    config = VitConfig(**{name: value for name, value in named.items() if value is not None})
    model = Vit3d(config).to(DEVICE).train()
    slices = len(SLOTS) * config.slices
    images = torch.rand(count, len(LEVELS), slices, config.size, config.size, device=DEVICE) * 255
    places = torch.zeros(count, len(LEVELS), slices, device=DEVICE)
    return model, lambda: model(images, places).sum()


def measure(
    model: torch.nn.Module, loss: Callable[[], torch.Tensor], count: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """GFLOP per image or study (forward and backward), their number per second, and GiB of GPU memory."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE.type, enabled=DEVICE.type == "cuda"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False) as counter:
        step()
    seconds = []
    for _ in range(STEPS):
        start = clock()
        step()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    memory = torch.cuda.max_memory_allocated() / 2**30 if DEVICE.type == "cuda" else float("nan")
    return {"GFLOP": counter.get_total_flops() / count / 1e9, "per second": count / min(seconds), "GiB": memory}


def training_share(parameters: dict[str, Any], epochs: int = 4, images: int = 240) -> tuple[float, float]:
    """Images per second of processor time (on a GPU: of time) of a training of the canal's detector, and their ratio to
    its steps alone."""
    clock, seconds = time.perf_counter if DEVICE.type == "cuda" else time.process_time, []
    size, batch, rng = tuple(parameters["yolo_size"]["scs"]), parameters["yolo_batch"], np.random.default_rng(0)
    config, count = DetectorConfig("scs", None, size, True, 14.0), len(LEVELS)
    slices, levels = np.repeat(np.arange(images), count), np.tile(np.arange(count), images)
    boxes = pd.DataFrame({"study_id": 1, "series_id": 1, "slice": slices, "class_id": levels % 3, "x": 0.5})
    boxes = boxes.assign(y=0.15 + 0.17 * levels, width=0.12, height=0.07)
    shown = pd.DataFrame({"study_id": 1, "series_id": 1, "slice": range(images), "weight": 1.0})
    shown["file"] = [f"images/{number:03d}.png" for number in range(images)]
    settings = {"model": parameters["yolo_model"], "width": parameters["yolo_width"]["scs"], "seed": 0, "batch": batch}
    settings |= {"optimizer": "AdamW", "mosaic": 0.0, "close_mosaic": 0, **parameters["yolo_gains"]}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        for file in shown["file"]:
            image = cv2.GaussianBlur(rng.integers(0, 256, (*size, 3), dtype=np.uint8), (0, 0), 2)
            (folder / file).write_bytes(cv2.imencode(".png", image)[1])
        write_labels(folder, shown, boxes, class_table(config)["name"])
        for length in (1, 1 + epochs):
            start = clock()
            train_detector(folder, shown, config, settings | {"epochs": length}, folder / f"work{length}")
            seconds.append(clock() - start)
    model, loss = detector_step(parameters, "scs", batch)
    whole = epochs * images / (seconds[1] - seconds[0])
    return whole, whole / measure(model, loss, batch, clock)["per second"]


def rows(parameters: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The measurements of each network."""
    on_gpu = DEVICE.type == "cuda"
    for key in GROUPS:
        count = parameters["yolo_batch"] if on_gpu else 1
        yield {"network": f"detector {key}", "unit": "image", **measure(*detector_step(parameters, key, count), count)}
    count = parameters["vit_batch"] if on_gpu else 1
    yield {"network": "3D ViT", "unit": "study", **measure(*vit_step(parameters, count), count)}


def main() -> None:
    """Print the table."""
    profile = sys.argv[1] if len(sys.argv) > 1 else "demo"
    parameters = yaml.safe_load((PROFILES / "demo.yml").read_text())
    parameters |= yaml.safe_load((PROFILES / f"{profile}.yml").read_text())
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU, one thread"
    print(f"Training steps of profile {profile} on {device}:")
    print(pd.DataFrame(rows(parameters)).dropna(axis=1).to_string(index=False, float_format="%.2f"))
    for width in {0.0, parameters["yolo_width"]["scs"]}:
        speed, share = training_share(parameters | {"yolo_width": {"scs": width}})
        verdict = f"aim 0.80: {'met' if share >= 0.8 else 'MISSED'}" if not width else f"lean, of width {width:g}"
        print(f"training of {parameters['yolo_model']} ({verdict}): {speed:.1f} images/s, {share:.2f} of its steps")


if __name__ == "__main__":
    main()
