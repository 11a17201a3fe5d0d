"""Training of the 3D vision transformer, in this process or shared by several, each with its share of a batch.

All that is random is drawn by seed, epoch and study, so a training is the same however many processes share it (but for
the order in which floating-point numbers are added), and goes on after a stop as if there had been none.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch import nn

from lsdc_utils.checkpoint import Checkpoint, fingerprint, restore_optimizer
from lsdc_utils.files import atomic, write_json
from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.inputs import Seen, cut_views
from lsdc_utils.vit.loss import row_losses, row_weights
from lsdc_utils.vit.model import KINDS, MIRROR, Vit3d, VitConfig
from lsdc_utils.vit.predict import loss_of
from lsdc_utils.vocabulary import COLUMNS, LEVELS, SERIES_TYPES


@dataclass(frozen=True)
class Training:
    """How a network is fitted. Nothing is chosen on held-out studies: the last epoch's averaged weights count."""

    epochs: int = 24
    batch: int = 2  # studies
    lr: float = 1e-3
    weight_decay: float = 1.5
    warmup: float = 0.1  # share of the steps
    ema: float = 0.98  # decay of the averaged weights a step
    jitter: tuple[float, float, float] = (2.3, 1.6, 1.6)  # mm, sd of a level's shift to the left, posterior and head
    rotation: float = 0.08  # radians, sd of the turn of a slot's slices in their plane
    scale: float = 0.06  # sd of the logarithm of their size
    intensity: float = 0.15  # sd of contrast and of brightness, a series
    drop_series: float = 0.05  # share of series blanked
    encoder_weights: str = ""  # file that a pretrained encoder begins with; "" = at random
    encoder_rate: float = 1.0  # learning rate of the encoder as a share of lr
    seed: int = 52
    threads: int = 1


# ---- augmentation --------------------------------------------------------------------------------------------------


def augment(
    inputs: np.ndarray,
    labels: np.ndarray,
    config: VitConfig,
    training: Training,
    rngs: Sequence[np.random.Generator],
    device: torch.device | str = "cpu",
) -> tuple[Seen, np.ndarray, np.ndarray]:
    """A training batch: shifted and turned squares, or mirrored studies; contrast and brightness; series left out.

    `rngs`: one for each study. Returns what the network sees, the labels, and for each study the order (B, 25) in which
    its columns and weights are to be taken: for a mirrored study left and right are exchanged.
    """
    drawn = zip(*(_draw(training, rng) for rng in rngs), strict=True)
    gain, gamma, kept, turned, shifts, turns = (np.stack(one) for one in drawn)
    order = np.tile(np.arange(len(COLUMNS)), (len(inputs), 1))
    if config.input == "study_grid":
        grids = np.where(turned[:, None, None, None, None], inputs[:, :, ::-1], inputs)
        order[turned] = MIRROR
        images = _vary(torch.from_numpy(grids).to(device).float(), gain * kept, gamma)
        return (images,), np.take_along_axis(labels, order, axis=1), order
    images, places = cut_views(inputs, config, shifts, turns, device)
    kinds = np.repeat(KINDS, config.slices)
    images = _vary(images.transpose(1, 2), gain[:, kinds], gamma[:, kinds]).transpose(1, 2)
    gone = torch.from_numpy(~kept[:, kinds]).to(device)[:, None].expand_as(places)
    return (images, places.masked_fill(gone, math.nan)), labels, order


def _draw(training: Training, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """What one study meets: gain, gamma and whether it is kept of each series, whether it is mirrored, shifts (5, 3) in
    mm, and turns (5, slots, 2) in radians and relative size."""
    series, slots = len(SERIES_TYPES), (len(LEVELS), len(SLOTS))
    gain, gamma = np.exp(rng.normal(0, training.intensity, (2, series)))
    kept = rng.random(series) >= training.drop_series
    turned = np.array(rng.random() < 0.5)
    shifts = rng.normal(0, 1, (len(LEVELS), 3)).clip(-2.5, 2.5) * training.jitter
    turns = np.stack([rng.normal(0, training.rotation, slots), np.exp(rng.normal(0, training.scale, slots))], axis=-1)
    return gain, gamma, kept, turned, shifts, turns


def _vary(images: torch.Tensor, gain: np.ndarray, gamma: np.ndarray) -> torch.Tensor:
    """Grey values (n, k, a, b, c) raised to `gamma` (n, k) as shares of 255, times `gain` (n, k)."""
    gain, gamma = (torch.from_numpy(x).float().to(images.device)[:, :, None, None, None] for x in (gain, gamma))
    return (images / 255).clamp(min=1e-6).pow(gamma) * gain * 255


# ---- fitting -------------------------------------------------------------------------------------------------------


def fit(
    inputs: np.ndarray,
    labels: np.ndarray,
    config: VitConfig,
    training: Training,
    work: str | Path,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
    processes: int = 1,
) -> tuple[Vit3d, pd.DataFrame]:
    """Train on inputs (n, ...) of `make_inputs` and labels (n, 25); the averaged weights of the last epoch, and curves.

    work: folder of the checkpoint, from which the same training goes on when it is begun again; `checkpoint.forget` it
    once the weights are saved. held_out: inputs and labels that are looked at a few times for the curves, and never
    used to choose anything. processes: of this machine that share every batch, one a GPU, or over gloo on CPUs.
    The curves hold epoch, loss (the score's mean over its three groups of rows), held_out_loss (NaN where not looked),
    seconds. Prints one line an epoch. The same seed and threads give the same weights on the same CPU.
    RuntimeError where one of several processes fails; ValueError where there are GPUs, but fewer than processes.
    FloatingPointError where the loss is no number any more.
    """
    gpus = torch.cuda.device_count()
    if 0 < gpus < processes:
        raise ValueError(f"{processes} processes (vit_processes) need a GPU each; there are {gpus} to be used")
    if processes == 1:
        return _fit(inputs, labels, config, training, Path(work), held_out)
    return _fit_shared(inputs, labels, config, training, Path(work), held_out, processes)


def _fit(
    inputs: np.ndarray, labels: np.ndarray, config: VitConfig, training: Training, work: Path, held_out: tuple | None
) -> tuple[Vit3d, pd.DataFrame]:
    """`fit` by this process, alone or as one of those that torchrun started."""
    torch.set_num_threads(training.threads)
    torch.manual_seed(training.seed)
    fabric = _fabric()
    network = Vit3d(config, training.encoder_weights)
    network.start_at_prior(labels)
    averaged = ModelEmaV3(network, decay=training.ema).to(fabric.device)
    model, optimizer = fabric.setup(network, _optimizer(network, training))
    batches = math.ceil(len(inputs) / training.batch)
    speed = functools.partial(_speed, steps=batches * training.epochs, warmup=training.warmup)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, speed)
    parts = {"model": network, "ema": averaged.module, "scheduler": scheduler, "precision": fabric.strategy.precision}
    checkpoint = Checkpoint(work, _training_key(inputs, labels, config, training, held_out))
    curves = _restored(checkpoint, parts, optimizer)
    weights, look = row_weights(labels), max(1, training.epochs // 5)
    scaled = fabric.strategy.precision.precision == "16-mixed"  # its scaler leaves out steps whose gradients overflow
    for epoch in range(len(curves) + 1, training.epochs + 1):
        began, total = time.monotonic(), torch.zeros((), device=fabric.device)
        order = np.random.default_rng([training.seed, epoch]).permutation(len(inputs))
        model.train()
        for batch in np.array_split(order, batches):
            loss = _share_of_loss(model, fabric, batch, epoch, inputs, labels, weights, config, training)
            optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss * (fabric.world_size / len(batch)))  # gradients are averaged over the processes
            fabric.clip_gradients(model, optimizer, max_norm=1.0, error_if_nonfinite=not scaled)
            optimizer.step()
            scheduler.step()
            averaged.update(network)
            total += loss.detach()
        line = {"epoch": epoch, "loss": float(fabric.all_reduce(total, reduce_op="sum")) / len(inputs)}
        if not math.isfinite(line["loss"]):
            raise FloatingPointError(f"epoch {epoch}: the loss is {line['loss']}; try a lower learning rate (vit_lr)")
        if fabric.is_global_zero:
            looked = held_out is not None and (epoch % look == 0 or epoch == training.epochs)
            line["held_out_loss"] = loss_of(averaged.module, *held_out, training.batch) if looked else math.nan
            curves.append(line | {"seconds": time.monotonic() - began})
            _tell(curves[-1], training.epochs)
            kept = {name: part.state_dict() for name, part in parts.items()}
            checkpoint.save({**kept, "optimizer": optimizer.state_dict(), "curves": curves})
    return averaged.module.cpu().eval(), pd.DataFrame(curves)


def _fabric() -> Any:
    """Lightning's Fabric for this process: alone on a GPU or the CPU, or one of those that torchrun started."""
    from lightning_fabric import Fabric  # two seconds, which only a training need wait
    from lightning_fabric.plugins.environments import LightningEnvironment

    warnings.filterwarnings("ignore", message=".*srun")  # where SLURM is installed; its jobs are started by Snakemake
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)  # each training would tell its precision
    here, everywhere = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"))
    on_gpu = torch.cuda.is_available()
    fabric = Fabric(
        accelerator="cuda" if on_gpu else "cpu",
        devices=here,
        num_nodes=everywhere // here,
        strategy="ddp" if everywhere > 1 else "auto",
        precision="16-mixed" if on_gpu else "32-true",
        plugins=[] if everywhere > 1 else [LightningEnvironment()],  # not what SLURM says of the job around it
    )
    fabric.launch()
    return fabric


def _share_of_loss(
    model: nn.Module,
    fabric: Any,
    batch: np.ndarray,
    epoch: int,
    inputs: np.ndarray,
    labels: np.ndarray,
    weights: np.ndarray,
    config: VitConfig,
    training: Training,
) -> torch.Tensor:
    """Weighted sum of the losses of this process's studies of a batch (numbers of studies), augmented.

    `weights` are normalised over all studies, so the sums of all processes over the batch's size are the batch's loss.
    """
    share = batch[fabric.global_rank :: fabric.world_size]
    mine = share if len(share) else batch[:1]  # without weight: every process goes along with every step
    rngs = [np.random.default_rng([training.seed, epoch, study]) for study in mine]
    seen, truth, columns = augment(inputs[mine], labels[mine], config, training, rngs, fabric.device)
    weight = np.take_along_axis(weights[mine], columns, axis=1) * np.float32(len(share) > 0)
    losses = row_losses(model(*seen), torch.from_numpy(truth).to(fabric.device))
    return (losses * torch.from_numpy(weight).to(fabric.device)).sum()


def _training_key(
    inputs: np.ndarray, labels: np.ndarray, config: VitConfig, training: Training, held_out: tuple | None
) -> str:
    """Fingerprint of a training: settings, data, versions and the modules that hold network and training."""
    versions = [torch.__version__, version("timm"), torch.cuda.is_available(), held_out is not None]
    modules = b"".join(
        Path(__file__).with_name(name).read_bytes() for name in ("inputs.py", "loss.py", "model.py", "training.py")
    )
    settings = [dataclasses.asdict(config), dataclasses.asdict(training)]
    if training.encoder_weights:
        stat = Path(training.encoder_weights).stat()
        settings.append([stat.st_size, stat.st_mtime_ns])
    return fingerprint(settings, inputs, labels, versions, modules)


def _restored(checkpoint: Checkpoint, parts: dict, optimizer: torch.optim.Optimizer) -> list[dict[str, float]]:
    """The curves of the epochs that are done already, all parts set to where they ended; none where none is done."""
    kept = checkpoint.load()
    if kept is None:
        return []
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    restore_optimizer(optimizer, kept["optimizer"])
    print(f"goes on after epoch {len(kept['curves'])}", flush=True)
    return kept["curves"]


def _tell(line: dict[str, float], epochs: int) -> None:
    """Print one line of the curves."""
    told = "" if math.isnan(line["held_out_loss"]) else f" held out {line['held_out_loss']:.3f}"
    print(f"epoch {line['epoch']}/{epochs} loss {line['loss']:.3f}{told} ({line['seconds']:.1f} s)", flush=True)


def _optimizer(model: Vit3d, training: Training) -> torch.optim.AdamW:
    """AdamW without decay of biases, norms, places and thresholds; thresholds move faster, since they are log-odds, and
    a pretrained encoder slower."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in ("position", "level", "place_bias", "thresholds")
        rate = 10.0 if name == "thresholds" else 1.0
        rate *= training.encoder_rate if name.startswith("features.encoder.") else 1.0
        groups.setdefault((rate, 0.0 if plain else training.weight_decay), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": training.lr * rate, "weight_decay": decay} for (rate, decay), p in groups.items()],
        betas=(0.9, 0.98),
    )


def _speed(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate: a linear rise over `warmup` of the steps, then half a cosine down to 0."""
    rise = max(1, round(steps * warmup))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ---- several processes ---------------------------------------------------------------------------------------------


def _fit_shared(
    inputs: np.ndarray,
    labels: np.ndarray,
    config: VitConfig,
    training: Training,
    work: Path,
    held_out: tuple | None,
    processes: int,
) -> tuple[Vit3d, pd.DataFrame]:
    """`fit` by processes that torchrun starts: they read their task from `work` and leave the weights there."""
    work.mkdir(parents=True, exist_ok=True)
    arrays = {"inputs": inputs, "labels": labels}
    if held_out is not None:
        arrays |= {"held_inputs": held_out[0], "held_labels": held_out[1]}
    for name, array in arrays.items():
        np.save(work / f"{name}.npy", array)
    task = {"config": dataclasses.asdict(config), "training": dataclasses.asdict(training), "arrays": list(arrays)}
    write_json(work / "task.json", task)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["--module", "lsdc_utils.vit.training", str(work)]
    environment = os.environ | {"OMP_NUM_THREADS": str(training.threads)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
    if process.returncode:
        raise RuntimeError(f"training by {processes} processes ended with status {process.returncode}; see above")
    model = Vit3d(config)
    model.load_state_dict(load_file(work / "trained.safetensors"))
    return model.eval(), pd.read_csv(work / "curves.csv")


def main() -> None:
    """One of the processes: `torchrun ... --module lsdc_utils.vit.training WORK`."""
    work = Path(sys.argv[1])
    task = json.loads((work / "task.json").read_text())
    inputs, labels, *held_out = (np.load(work / f"{name}.npy", mmap_mode="r") for name in task["arrays"])
    config, training = VitConfig(**task["config"]), Training(**task["training"])
    model, curves = _fit(inputs, labels, config, training, work, tuple(held_out) or None)
    if os.environ["RANK"] == "0":
        with atomic(work / "trained.safetensors") as temporary:
            save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, temporary)
        with atomic(work / "curves.csv") as temporary:
            curves.to_csv(temporary, index=False)


if __name__ == "__main__":
    main()
