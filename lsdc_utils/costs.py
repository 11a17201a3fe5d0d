"""What the trainings of a run will cost, told before it starts: `python -m lsdc_utils.costs PARAMETERS`.

A few steps of each training are timed on the device that it will run on, with the networks, sizes and batches of the
parameters and with images of noise; steps are counted from the number of studies. Not counted are reading, conversion,
the loading of images, prediction and the blend.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from lsdc_utils import detector, sources, vit3d, vit_training, volume
from lsdc_utils.phantom import labels
from lsdc_utils.vocabulary import COLUMNS, GROUPS, LEVELS

IMAGES = {"nfn": 9.0, "scs": 5.9, "ss": 12.7}  # that an epoch draws of a study, as `training_images` counts them
STEPS = 3  # that are timed, after one that is not


def estimate(parameters: dict[str, Any], studies: int) -> pd.DataFrame:
    """A row a training: what, count (of such trainings), steps of each, seconds a step, hours of each, and gpu_gib, the
    GPU's memory at most (0 on CPUs)."""
    device, folds = vit3d.choose_device(), len(parameters["folds"])
    torch.set_num_threads(parameters["threads"])
    trained = studies * (1 - 1 / parameters["n_splits"])
    lines = []
    for key in GROUPS:
        images, batch = trained * IMAGES[key], parameters["yolo_batch"]
        seconds, memory = _time_detector(parameters, key, device)
        lines.append((f"detector {key}", folds, images / batch * parameters["yolo_epochs"][key], seconds, memory))
    seconds, memory = _time_vit(parameters, device)
    steps = trained / parameters["vit_batch"] * parameters["vit_epochs"]
    lines.append(("3D ViT", folds, steps, seconds, memory))
    table = pd.DataFrame(lines, columns=["what", "count", "steps", "seconds", "gpu_gib"])
    return table.assign(hours=table["steps"] * table["seconds"] / 3600)


def _time_detector(parameters: dict[str, Any], key: str, device: torch.device) -> tuple[float, float]:
    """Seconds a step, and GiB, of a detector's training: loss and gradients; ultralytics' trainer adds its own."""
    detector.quiet_ultralytics(Path(tempfile.gettempdir()) / f"lsdc_utils_{os.getuid()}")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    classes = 3 if key == "ss" and parameters["yolo_classes"] == "seen" else 15
    kind = Path(parameters["yolo_model"]).with_suffix(".yaml").name
    model = DetectionModel(kind, nc=classes, verbose=False).to(device, memory_format=torch.channels_last).train()
    model.args = get_cfg(overrides=parameters["yolo_gains"])
    # A CPU takes minutes for what a GPU does in a second: an eighth of the batch is timed there.
    share = 1 if device.type == "cuda" else 8
    count = max(1, parameters["yolo_batch"] // share)
    images = torch.rand(count, 3, *parameters["yolo_size"][key], device=device)
    boxes = {"cls": torch.zeros(count, 1), "bboxes": torch.full((count, 4), 0.5), "batch_idx": torch.arange(count)}
    batch = {"img": images.contiguous(memory_format=torch.channels_last), **boxes}

    def step() -> None:
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            loss = model.loss(batch)[0].sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    seconds, memory = _timed(step, device)
    return seconds * parameters["yolo_batch"] / count, memory


def _timed(step: Callable[[], None], device: torch.device) -> tuple[float, float]:
    """Mean seconds of a call, and GiB of the GPU's memory at most."""
    on_gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    step()
    wait()
    began = time.monotonic()
    for _ in range(STEPS):
        step()
    wait()
    return (time.monotonic() - began) / STEPS, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0


def _time_vit(parameters: dict[str, Any], device: torch.device) -> tuple[float, float]:
    """Seconds a step, and GiB, of the transformer's training, by its own code."""
    named = {name: f"vit_{name}" for name in vit3d.VitConfig.__dataclass_fields__}
    config = vit3d.VitConfig(**{name: parameters[key] for name, key in named.items() if key in parameters})
    count, rng = STEPS * parameters["vit_batch"], np.random.default_rng(0)
    if config.input == "study_grid":
        inputs = rng.integers(0, 256, (count, 3, *[config.size] * 3), dtype=np.uint8)
    else:
        side, slices = config.size + 2 * config.margin, len(volume.SLOTS) * config.slices
        shapes = {"images": (len(LEVELS), slices, side, side), "places": (len(LEVELS), slices)}
        kinds = [("images", np.uint8, shapes["images"]), ("places", np.float32, shapes["places"])]
        inputs = np.zeros(count, dtype=kinds)
        inputs["images"] = rng.integers(0, 256, (count, *shapes["images"]), dtype=np.uint8)
    truth = rng.integers(0, 3, (count, len(COLUMNS)))
    training = vit_training.Training(epochs=2, batch=parameters["vit_batch"], threads=parameters["threads"])
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
        _, curves = vit_training.fit(inputs, truth, config, training, work)
    memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return float(curves["seconds"].iloc[-1]) / STEPS, memory


def told(table: pd.DataFrame, gpus: int) -> str:
    """The estimate for people: each training, and the hours of all on so many GPUs (0: one after the other on CPUs)."""
    name = torch.cuda.get_device_name() if gpus else "the CPU"
    lines = [f"Estimated from {STEPS} steps of each training on {name} (other work and loading of images not counted):"]
    for row in table.itertuples():
        memory = f", {row.gpu_gib:.1f} GiB of GPU memory" if row.gpu_gib else ""
        lines.append(
            f"  {row.what:14} {row.count} x {row.hours:7.1f} h  ({row.steps:,.0f} steps of {row.seconds:.2f} s{memory})"
        )
    hours = float((table["count"] * table["hours"]).sum())
    spread = f", {hours / gpus:.0f} h on the {gpus} GPUs here" if gpus > 1 else ""
    return "\n".join([*lines, f"  in all {hours:.0f} h, one after the other{spread}"])


def count_studies(data_dir: str) -> int:
    """Training studies of a data folder, or of Kaggle's mount; where there is none yet, those of the real data set."""
    try:
        table = sources.find_data(data_dir)[0] / "train.csv"
    except sources.DataNotFound:
        return labels.real_facts()["studies"]
    return len(pd.read_csv(table, usecols=["study_id"])) if table.is_file() else 0


def main() -> None:
    """Print the estimate for a file of parameters."""
    parameters = yaml.safe_load(Path(sys.argv[1]).read_text())
    studies = count_studies(parameters["data_dir"])
    print(told(estimate(parameters, studies), torch.cuda.device_count()))


if __name__ == "__main__":
    main()
