"""What the trainings of a run will cost, told before it starts: `python -m lsdc_utils.pipeline.costs PARAMETERS`.

A few steps of each training are timed on the device at hand, with the networks, sizes and batches of the parameters and
with images of noise; how many there are follows from the number of studies. Their floating-point operations are counted
as well, so that a machine without a GPU tells what one would have to do.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from lsdc_utils import downloads
from lsdc_utils.detector.training import quiet_ultralytics
from lsdc_utils.files import atomic
from lsdc_utils.phantom import labels
from lsdc_utils.vit import training as vit_training
from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.model import Vit3d, VitConfig
from lsdc_utils.vit.predict import choose_device
from lsdc_utils.vocabulary import COLUMNS, GROUPS, LEVELS

IMAGES = {"nfn": 9.0, "scs": 5.9, "ss": 12.7}  # that an epoch draws of a study, as `training_images` counts them
STEPS = 8  # that are timed on a GPU
RATE = 50  # TFLOP/s that these steps take on an NVIDIA H200, for machines without a GPU; most GPUs sustain less


@dataclass(frozen=True)
class Step:
    """What one step of a training costs."""

    seconds: float  # on the device at hand
    tflop: float  # 10^12 operations of its convolutions and matrix products, forwards and backwards
    gib: float  # of the GPU's memory: measured on a GPU, else what is kept for the gradients in 16 bits, and optimiser


def estimate(parameters: dict[str, Any], studies: int) -> pd.DataFrame:
    """A row a training: what, count (of such trainings), steps of each, the fields of `Step`, hours of each, device."""
    torch.set_num_threads(parameters["threads"])
    trained = studies * (1 - 1 / parameters["n_splits"])
    lines = []
    for key in GROUPS:
        steps = trained * IMAGES[key] / parameters["yolo_batch"] * parameters["yolo_epochs"][key]
        lines.append({"what": f"detector {key}", "steps": steps, **asdict(measure_detector(parameters, key))})
    steps = trained / parameters["vit_batch"] * parameters["vit_epochs"]
    lines.append({"what": "3D ViT", "steps": steps, **asdict(measure_vit(parameters))})
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "this machine's CPU"
    table = pd.DataFrame(lines).assign(count=len(parameters["folds"]), device=device)
    return table.assign(hours=table["steps"] * table["seconds"] / 3600)


def measure_detector(parameters: dict[str, Any], key: str) -> Step:
    """A detector's step: loss and gradients; ultralytics' trainer adds its own time."""
    quiet_ultralytics(Path(tempfile.gettempdir()) / f"lsdc_utils_{os.getuid()}")
    from ultralytics.cfg import get_cfg
    from ultralytics.nn.tasks import DetectionModel

    device = choose_device()
    classes = 3 if key == "ss" and parameters["yolo_classes"] == "seen" else 15
    kind = Path(parameters["yolo_model"]).with_suffix(".yaml").name
    model = DetectionModel(kind, nc=classes, verbose=False).to(device, memory_format=torch.channels_last).train()
    model.args = get_cfg(overrides=parameters["yolo_gains"])
    count = parameters["yolo_batch"] if device.type == "cuda" else 1
    images = torch.rand(count, 3, *parameters["yolo_size"][key], device=device)
    boxes = {"cls": torch.zeros(count, 1), "bboxes": torch.full((count, 4), 0.5), "batch_idx": torch.arange(count)}
    batch = {"img": images.contiguous(memory_format=torch.channels_last), **boxes}

    def train(steps: int) -> None:
        """Loss and gradients of one batch, again and again."""
        for _ in range(steps):
            with torch.autocast(device.type, enabled=device.type == "cuda"):
                loss = model.loss(batch)[0].sum()
            loss.backward()
            model.zero_grad(set_to_none=True)

    return _measured(train, parameters["yolo_batch"] / count, sum(one.numel() for one in model.parameters()))


def measure_vit(parameters: dict[str, Any]) -> Step:
    """A step of the transformer's training, by its own code."""
    named = {name: f"vit_{name}" for name in VitConfig.__dataclass_fields__}
    config = VitConfig(**{name: parameters[key] for name, key in named.items() if key in parameters})
    count, rng = parameters["vit_batch"] if torch.cuda.is_available() else 1, np.random.default_rng(0)
    if config.input == "study_grid":
        inputs = rng.integers(0, 256, (count, 3, *[config.size] * 3), dtype=np.uint8)
    else:
        side, slices = config.size + 2 * config.margin, len(SLOTS) * config.slices
        images = rng.integers(0, 256, (count, len(LEVELS), slices, side, side), dtype=np.uint8)
        places = (len(LEVELS), slices)
        inputs = np.zeros(count, dtype=[("images", np.uint8, images.shape[1:]), ("places", np.float32, places)])
        inputs["images"] = images
    truth = rng.integers(0, 3, (count, len(COLUMNS)))
    training = vit_training.Training(epochs=1, batch=count, threads=parameters["threads"])

    def train(steps: int) -> None:
        """A training of one epoch."""
        studies = np.arange(count * steps) % count
        with tempfile.TemporaryDirectory() as work, contextlib.redirect_stdout(io.StringIO()):
            vit_training.fit(inputs[studies], truth[studies], config, training, work)

    return _measured(train, parameters["vit_batch"] / count, sum(one.numel() for one in Vit3d(config).parameters()))


def _measured(train: Callable[[int], None], scale: float, weights: int) -> Step:
    """What a step costs whose batch is 1 / `scale` of the training's, of a network with so many weights.

    train: takes so many steps. On a GPU the operations of one are counted, then some more are timed, by what they take
    longer than a single one: what a training does once does not count. A CPU takes minutes for what a GPU does in a
    second: there one image or study is counted and timed at once.
    """
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        """Note how large the storage of a tensor is that the gradients need."""
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        seconds = _seconds(train, 1)
    tflop = counter.get_total_flops() * scale / 1e12
    if not torch.cuda.is_available():
        return Step(seconds * scale, tflop, (sum(kept.values()) / 2 * scale + 16 * weights) / 2**30)
    torch.cuda.reset_peak_memory_stats()
    once = _seconds(train, 1)
    return Step((_seconds(train, 1 + STEPS) - once) / STEPS, tflop, torch.cuda.max_memory_allocated() / 2**30)


def _seconds(train: Callable[[int], None], steps: int) -> float:
    """What so many steps take, on a GPU with all that was asked of it before done."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    began = time.monotonic()
    train(steps)
    if on_gpu:
        torch.cuda.synchronize()
    return time.monotonic() - began


def told(table: pd.DataFrame, gpus: int) -> str:
    """The estimate for people: each training, and the hours of all on so many GPUs (0: one after the other on CPUs)."""
    lines = [f"Estimated from steps of each training on {table['device'].iloc[0]}:"]
    lines += [
        f"  {row.what:14} {row.count} x {row.hours:8.1f} h  ({row.steps:,.0f} steps of {row.seconds:.2f} s, "
        f"{row.tflop:.2f} TFLOP and {row.gib:.1f} GiB of GPU memory)"
        for row in table.itertuples()
    ]
    hours = float((table["count"] * table["hours"]).sum())
    work = float((table["count"] * table["steps"] * table["tflop"]).sum())
    spread = f", {hours / gpus:.0f} h on the {gpus} GPUs here" if gpus > 1 else ""
    lines.append(f"  in all {hours:,.0f} h, one after the other{spread}; {work / 1e6:.3g} EFLOP, which is ")
    lines[-1] += f"{work / RATE / 3600:,.1f} h of a GPU that sustains {RATE} TFLOP/s, as an NVIDIA H200 did"
    return "\n".join([*lines, "  not counted: reading and conversion, loading of images, prediction, blend, report"])


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """An estimate as text, a row a training."""
    columns = {
        "How many": table["count"].map("{:d}".format),
        "Steps of each": table["steps"].map("{:,.0f}".format),
        "TFLOP a step": table["tflop"].map("{:.2f}".format),
        "Seconds a step": table["seconds"].map("{:.2f}".format),
        "Memory (GiB)": table["gib"].map("{:.1f}".format),
        "Hours of all": (table["count"] * table["hours"]).map("{:.1f}".format),
    }
    return pd.DataFrame(columns).set_axis(pd.Index(table["what"], name="Training"))


def count_studies(data_dir: str) -> int:
    """Training studies of a data folder, or of Kaggle's mount; where there is none yet, those of the real data set."""
    try:
        table = downloads.find_data(data_dir)[0] / "train.csv"
    except downloads.DataNotFound:
        return labels.real_facts()["studies"]
    return len(pd.read_csv(table, usecols=["study_id"])) if table.is_file() else 0


def main() -> None:
    """Print the estimate for a file of parameters, and keep it beside that file, as costs.csv."""
    file = Path(sys.argv[1])
    parameters = yaml.safe_load(file.read_text())
    table = estimate(parameters, count_studies(parameters["data_dir"]))
    with atomic(file.with_name("costs.csv")) as temporary:
        table.to_csv(temporary, index=False)
    print(told(table, torch.cuda.device_count()))


if __name__ == "__main__":
    main()
