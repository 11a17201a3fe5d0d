"""Cost of training every network that a profile names: operations, throughput and memory of a step, hours of all.

`bench_training.py [PROFILE] [--count] [--tflops N]`, of profile demo by default. Inputs are noise. On a GPU a step has
the profile's batch and runs in 16 bits; on a CPU it has one item and runs on one thread. Hours are those of the steps
of all folds, for the 1,975 studies of the real data set: on a GPU as timed, on a CPU at N TFLOP/s, an estimate. Of the
detector of the canal, also the speed of a whole training as a share of that of its steps alone, at the profile's batch.
--count counts operations, computes nothing and takes seconds.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pandas as pd
import studies  # noqa: F401 - puts the repository on the path and sets one thread
import torch
from torch.utils.flop_counter import FlopCounterMode

from lsdc_utils.detector.classes import DetectorConfig, class_table
from lsdc_utils.detector.dataset import write_labels
from lsdc_utils.detector.localiser import SIDE, Localiser, LocaliserConfig
from lsdc_utils.detector.training import quiet_ultralytics, train_detector
from lsdc_utils.pipeline import graph
from lsdc_utils.pipeline.parameters import load_parameters
from lsdc_utils.vit.model import Vit3d, VitConfig
from lsdc_utils.vocabulary import GROUPS, LEVELS, SIDES

STEPS = 8  # of which the fastest counts
STUDIES = 1975  # of the real data set
IMAGES = {"nfn": 9.0, "scs": 5.9, "ss": 12.7}  # shown in an epoch for each study, see tests/proofs/rehearsal.py
H200 = 26.0  # TFLOP/s: the slowest network of docs/real-data.md on one H200
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
    if DEVICE.type == "meta":  # on which boxes cannot be assigned; the loss has no convolution
        return model, lambda: sum(part.sum() for part in tensors(model(images)))
    boxes = torch.tensor([[0.5, 0.15 + 0.17 * level, 0.12, 0.07] for level in range(len(LEVELS))])
    batch = {"img": images, "cls": torch.zeros(count * len(LEVELS), 1), "bboxes": boxes.repeat(count, 1)}
    batch["batch_idx"] = torch.arange(count).repeat_interleave(len(LEVELS))
    return model, lambda: model.loss(batch)[0].sum()


def tensors(outputs: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists and dictionaries."""
    for part in outputs.values() if isinstance(outputs, dict) else outputs:
        yield from [part] if isinstance(part, torch.Tensor) else tensors(part)


def vit_step(parameters: dict[str, Any], count: int) -> tuple[torch.nn.Module, Callable]:
    """The 3D vision transformer, and the sum of its outputs for `count` studies."""
    named = {name: parameters.get(f"vit_{name}") for name in VitConfig.__dataclass_fields__}
    config = VitConfig(**{name: value for name, value in named.items() if value is not None})
    model = Vit3d(config).to(DEVICE).train()
    slices = len(config.slots)
    images = torch.rand(count, len(LEVELS), slices, config.size, config.size, device=DEVICE) * 255
    places = torch.zeros(count, len(LEVELS), slices, device=DEVICE)
    if DEVICE.type == "meta":  # on which it is not known which slices are there: all
        return model, lambda: every_slice(model, images, places).sum()
    return model, lambda: model(images, places).sum()


def every_slice(model: Vit3d, images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """As the transformer's `forward`, of studies that lack no slice."""
    parts = []
    for scale, (seen, place) in enumerate(zip(*map(model.config.split, (images, places)), strict=True)):
        features = model.encoder(seen.flatten(0, 3)[:, None]).unflatten(0, place.shape)
        parts.append(model.reader(features, place, scale))
    tokens, present = (torch.cat(values, dim=3).flatten(0, 2) for values in zip(*parts, strict=True))
    halves = model.slice_blocks(tokens, present)
    return model.head(halves.unflatten(0, (len(images), len(LEVELS), len(SIDES))))


def localiser_step(parameters: dict[str, Any], count: int) -> tuple[torch.nn.Module, Callable]:
    """The localiser, and the sum of its outputs for `count` slices."""
    model = Localiser(LocaliserConfig(tuple(parameters["localiser_widths"]))).to(DEVICE).train()
    images = torch.rand(count, 1, SIDE, SIDE, device=DEVICE)
    return model, lambda: model(images).sum()


class Training(NamedTuple):
    """One network's training: `step` makes the network and its loss for a number of items (images, slices, studies)."""

    network: str
    step: Callable[[int], tuple[torch.nn.Module, Callable]]
    batch: int
    steps: int  # of the training of one fold


def members(parameters: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and parameters of each transformer that a profile names: of one, or of all `vit_members`."""
    for member in parameters["vit_members"] or [{"name": ""}]:
        yield f"3D ViT {member['name']}".strip(), parameters | graph.member_parameters(member, parameters)


def trainings(parameters: dict[str, Any]) -> Iterator[Training]:
    """The training of each network of one fold, at the size of the real data set."""
    count, batch = round(STUDIES * (1 - 1 / parameters["n_splits"])), parameters["yolo_batch"]
    for key in GROUPS:
        steps = math.ceil(IMAGES[key] * count / batch) * parameters["yolo_epochs"][key]
        yield Training(f"detector {key}", partial(detector_step, parameters, key), batch, steps)
    steps, batch = parameters["localiser_batches"], parameters["localiser_batch"]
    yield Training("localiser", partial(localiser_step, parameters), batch, steps)
    for name, own in members(parameters):
        steps = math.ceil(count / own["vit_batch"]) * own["vit_epochs"]
        yield Training(name, partial(vit_step, own), own["vit_batch"], steps)


def backward_flops(grad: Any, images: Any, weight: Any, *others: Any, **_: Any) -> int:
    """Operations of the backward pass of a convolution from shapes: those of the forward pass for each gradient that is
    asked for. torch's own count ignores groups in the gradient of the weights."""
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(others[-1][:2])


COUNTED = {torch.ops.aten.convolution_backward: backward_flops}


def measure(
    model: torch.nn.Module, loss: Callable[[], torch.Tensor], count: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """GFLOP per item (forward and backward), their number per second, and GiB of GPU memory; NaN where not measured."""
    if DEVICE.type == "meta":
        with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            loss().backward()
        return {"GFLOP": counter.get_total_flops() / count / 1e9, "per second": math.nan, "GiB": math.nan}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast(DEVICE.type, enabled=DEVICE.type == "cuda"):
            value = loss()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
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


def rows(parameters: dict[str, Any], tflops: float) -> Iterator[dict[str, Any]]:
    """The measurements of each network, and the hours of its trainings of all folds."""
    on_gpu, folds = DEVICE.type == "cuda", len(parameters["folds"])
    for network, step, batch, steps in trainings(parameters):
        count = batch if on_gpu else 1
        measured = measure(*step(count), count)
        tflop = measured["GFLOP"] * batch / 1e3
        seconds = batch / measured["per second"] if on_gpu else tflop / tflops
        costs = {"batch": batch, "steps": steps, "TFLOP a step": tflop, "trainings": folds}
        yield {"network": network, **measured, **costs, "hours": folds * steps * seconds / 3600}


def main() -> None:
    """Print the table."""
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("profile", nargs="?", default="demo", help="a profile of notebooks/profiles")
    parser.add_argument("--count", action="store_true", help="count operations alone")
    parser.add_argument("--tflops", type=float, default=H200, help="of the machine that hours are estimated for")
    options = parser.parse_args()
    parameters = load_parameters(options.profile)
    DEVICE = torch.device("meta") if options.count else DEVICE
    names = {"cuda": torch.cuda.get_device_name, "cpu": lambda: "CPU, one thread", "meta": lambda: "no device, counted"}
    print(f"Training steps of profile {options.profile} on {names[DEVICE.type]()}:")
    table = pd.DataFrame(rows(parameters, options.tflops))
    print(table.dropna(axis=1).to_string(index=False, float_format="%.2f"))
    basis = "as timed" if DEVICE.type == "cuda" else f"an estimate, at {options.tflops:g} TFLOP/s"
    print(f"{table['hours'].sum():.1f} hours for the steps of {len(parameters['folds'])} folds ({basis})")
    for width in () if options.count else {0.0, parameters["yolo_width"]["scs"]}:
        speed, share = training_share(parameters | {"yolo_width": {"scs": width}})
        verdict = f"aim 0.80: {'met' if share >= 0.8 else 'MISSED'}" if not width else f"lean, of width {width:g}"
        print(f"training of {parameters['yolo_model']} ({verdict}): {speed:.1f} images/s, {share:.2f} of its steps")


if __name__ == "__main__":
    main()
