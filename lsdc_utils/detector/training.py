"""Training of a detector by ultralytics' trainer, resumable from the last completed epoch, and its weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from lsdc_utils.checkpoint import Checkpoint, fingerprint, restore_optimizer
from lsdc_utils.detector.classes import (
    Detector,
    DetectorConfig,
    DetectorError,
    class_table,
    config_from,
)
from lsdc_utils.files import atomic, git_commit, write_json


def quiet_ultralytics(folder: str | Path) -> None:
    """Keep ultralytics off the network and out of the home directory; its settings and font go to `folder`.

    It reads these variables when it is first imported, so nothing in this package imports it before this has run.
    """
    if "ultralytics" in sys.modules:
        return
    os.environ.update(
        YOLO_CONFIG_DIR=str(Path(folder).resolve()),
        YOLO_OFFLINE="True",
        YOLO_AUTOINSTALL="False",
        YOLO_VERBOSE="False",  # progress is printed by us, a line an epoch
        ULTRALYTICS_SAFE_LOAD="1",  # weights are unpickled through an allow-list only
    )
    import matplotlib

    # Even offline it asks the network for this font, unless one lies here.
    font = Path(folder) / "Ultralytics" / "Arial.ttf"
    font.parent.mkdir(parents=True, exist_ok=True)
    with atomic(font) as temporary:
        shutil.copyfile(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", temporary)
    from ultralytics import settings

    settings.update({"sync": False})


@dataclass(frozen=True)
class DetectorTraining:
    """How a detector is trained."""

    model: str  # a yaml name: from scratch; a path to a .pt: from those weights
    epochs: int
    batch: int  # images
    rate: float  # highest learning rate of AdamW
    seed: int
    threads: int  # of torch; another number gives slightly other weights
    options: dict[str, Any]  # augmentation and loss gains, in ultralytics' names


class WeightedSampler(torch.utils.data.Sampler):
    """Each epoch every image about `weight` times, in a new order: the weight, rounded up or down by chance.

    Its order is a matter of seed and `epoch`, which whoever trains counts up.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.weights = np.asarray(weights, dtype=float)
        self.seed, self.epoch = seed, 0

    def __len__(self) -> int:
        return max(int(np.floor(self.weights.sum() + 1e-6)), 1)

    def __iter__(self) -> Iterable[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.weights))
        ends = np.cumsum(self.weights[order])
        drawn = np.searchsorted(ends, (np.arange(len(self)) + rng.random()) * ends[-1] / len(self), side="right")
        return iter(rng.permutation(order[np.minimum(drawn, len(order) - 1)]).tolist())


def train_detector(
    folder: str | Path,
    shown: pd.DataFrame,
    config: DetectorConfig,
    training: DetectorTraining,
    work: str | Path,
    held_out: Sequence[str] = (),
) -> tuple[torch.nn.Module, pd.DataFrame]:
    """Train YOLO by ultralytics' trainer on images of the data set in `folder`; return the EMA model and its history.

    `shown`: file and weight of each image, as `training_images` gives them.
    `held_out`: images to validate on after each epoch (none: no validation, which costs as much as training here).
    `work`: a folder for ultralytics' files and for the checkpoint of the last whole epoch, from which the same training
    goes on when it is begun again; `checkpoint.forget` it once the weights are saved. The weights of the last epoch are
    returned: nothing is chosen on held-out images. history: epoch, seconds, lr, loss parts and, if validated, mAP.
    """
    if not training.model.endswith(".yaml") and not Path(training.model).is_file():  # which ultralytics would look for
        raise DetectorError(f"yolo_model: pretrained weights {training.model} are not there (looked from {Path.cwd()})")
    folder = Path(folder).resolve()
    checkpoint = Checkpoint(Path(work).resolve(), _training_key(folder, shown, config, training, held_out))
    work = checkpoint.folder / "ultralytics"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    quiet_ultralytics(work / "config")
    from ultralytics.engine import trainer as engine
    from ultralytics.models.yolo.detect import DetectionTrainer

    engine.check_amp = lambda _: True  # asked on GPUs only; its own answer needs a network from the internet
    data = _data_file(folder, work, list(shown["file"]), held_out, config)
    weights = dict(zip(shown["file"].map(lambda file: Path(file).name), shown["weight"], strict=True))
    sampler = WeightedSampler(list(weights.values()), training.seed)
    trainer = DetectionTrainer(overrides=_overrides(training, config, data, len(sampler), bool(held_out)))
    _sample_by(trainer, sampler, weights)
    kept = checkpoint.load()
    history: list[dict[str, float]] = kept["history"] if kept else []
    box = pd.read_csv(folder / "boxes.csv")[["width", "height"]].median().to_numpy() * config.size[::-1]
    trainer.add_callback("on_train_start", lambda t: _begin(t, training, config, len(shown), box, kept))
    trainer.add_callback("on_train_epoch_start", lambda t: _begin_epoch(t, sampler, training))
    trainer.add_callback("on_fit_epoch_end", lambda t: _end_epoch(t, history, checkpoint))
    trainer.save_model = lambda: False  # we keep the last epoch's EMA ourselves
    trainer.final_eval = lambda: None
    if not held_out:
        trainer.validate = lambda: ({}, 0.0)
    with contextlib.suppress(_Trained):
        trainer.train()
    shutil.rmtree(work)
    model = trainer.ema.ema.eval().cpu().to(memory_format=torch.contiguous_format)
    return model, pd.DataFrame(history)


def _training_key(
    folder: Path, shown: pd.DataFrame, config: DetectorConfig, training: DetectorTraining, held_out: Sequence[str]
) -> str:
    """Fingerprint of a training: settings, images as they lie on disk, versions and this module."""
    files = [folder / "boxes.csv", *(folder / file for file in shown["file"])]
    if not training.model.endswith(".yaml"):
        files.append(Path(training.model))
    stats = [(file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    about = [asdict(training), asdict(config), list(shown["file"]), stats, list(held_out)]
    versions = [torch.__version__, version("ultralytics"), torch.cuda.is_available()]
    return fingerprint(about, shown["weight"].to_numpy(), versions, Path(__file__).read_bytes())


class _Trained(Exception):
    """The checkpoint holds the last epoch: there is nothing left to train."""


def _overrides(
    training: DetectorTraining, config: DetectorConfig, data: Path, images: int, validate: bool
) -> dict[str, Any]:
    """Settings for ultralytics: what its defaults would switch on, off, or guess is named here."""
    batch = min(training.batch, images)
    return {
        "task": "detect", "mode": "train", "model": training.model, "data": str(data), "project": str(data.parent),
        "name": "train", "exist_ok": True, "device": "0" if torch.cuda.is_available() else "cpu",
        "amp": torch.cuda.is_available(), "workers": training.threads, "seed": training.seed,
        "deterministic": torch.cuda.is_available(),  # as our operations on CPU are; asking costs an import of seconds
                "imgsz": max(config.size), "rect": config.size[0] != config.size[1], "epochs": training.epochs,
        "batch": batch, "nbs": batch, "optimizer": "AdamW", "lr0": training.rate, "lrf": 0.05, "cos_lr": True,
        "warmup_epochs": min(1.0, training.epochs / 10), "warmup_bias_lr": 0.0, "weight_decay": 5e-4,
        "close_mosaic": 0, "hsv_h": 0.0, "hsv_s": 0.0, "val": validate, "plots": False, "save": False,
        **training.options,
    }  # fmt: skip


def _sample_by(trainer: Any, sampler: WeightedSampler, weights: dict[str, float]) -> None:
    """Let the trainer draw its images by `sampler`; ultralytics knows no weights, and has the images in an order of its
    own. weights: of each image, by its file's name."""
    build = trainer.get_dataloader

    def get_dataloader(path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """ultralytics' loader, that of training with our sampler."""
        loader = build(path, batch_size=batch_size, rank=rank, mode=mode)
        if mode != "train":
            return loader
        dataset, workers = loader.dataset, loader.num_workers
        sampler.weights = np.array([weights[Path(file).name] for file in dataset.im_files])
        # New workers each epoch: what they draw is then a matter of its seed, not of the epochs before.
        return torch.utils.data.DataLoader(
            dataset, batch_size, sampler=sampler, collate_fn=dataset.collate_fn, num_workers=workers,
            pin_memory=loader.pin_memory, worker_init_fn=loader.worker_init_fn, generator=torch.Generator(),
        )  # fmt: skip

    trainer.get_dataloader = get_dataloader


def _begin(
    trainer: Any,
    training: DetectorTraining,
    config: DetectorConfig,
    images: int,
    box: np.ndarray,
    kept: dict[str, Any] | None,
) -> None:
    """What has to be set once ultralytics has set itself up. box: usual width and height in input pixels; kept: the
    state after the last whole epoch of this training, which then goes on."""
    torch.set_num_threads(training.threads)  # which ultralytics changes, and their number changes the weights
    got = len(trainer.train_loader.dataset)
    if got != images:  # it drops what it calls corrupt with a warning only
        raise DetectorError(f"detector {config.condition}: ultralytics took {got} of {images} training images")
    if training.model.endswith(".yaml"):
        _start_boxes((trainer.model, trainer.ema.ema), box)
        _quicken_norms(trainer.model)
    # Faster, on CPU too, where ultralytics would do neither; the averaged weights as the others, or copying is slow.
    for model in (trainer.model, trainer.ema.ema):
        model.to(memory_format=torch.channels_last)
    for group in trainer.optimizer.param_groups:
        group.update(fused=True, foreach=False)
    if kept:
        _restore(trainer, kept)


def _begin_epoch(trainer: Any, sampler: WeightedSampler, training: DetectorTraining) -> None:
    """Let an epoch depend on its number and the weights alone, so that it is the same after a stop.

    DetectorError where ultralytics has halved the batch, since it did not fit into the GPU's memory.
    """
    if trainer.batch_size < (asked := min(training.batch, len(sampler))):
        raise DetectorError(f"a batch of {asked} images is too large for this GPU; try yolo_batch={trainer.batch_size}")
    here = int(np.random.SeedSequence([training.seed, trainer.epoch]).generate_state(1)[0])
    random.seed(here)
    np.random.seed(here)
    torch.manual_seed(here)
    trainer.train_loader.generator.manual_seed(here)
    sampler.epoch = trainer.epoch


def _end_epoch(trainer: Any, history: list[dict[str, float]], checkpoint: Checkpoint) -> None:
    """Tell about an epoch and keep where the training stands.

    ultralytics' own checkpoint halves the precision of weights and optimiser and knows of no random state; a training
    that goes on from it ends elsewhere.
    """
    history.append(_tell_epoch(trainer))
    _assert_finite(trainer, history[-1])
    checkpoint.save(
        {
            "model": trainer.model.state_dict(),
            "ema": trainer.ema.ema.state_dict(),
            "ema_updates": trainer.ema.updates,
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "history": history,
        }
    )


def _assert_finite(trainer: Any, line: dict[str, float]) -> None:
    """DetectorError where an epoch's losses, the weights or what batch norms follow are no numbers any more: none of it
    comes back by itself."""
    values = [value for model in (trainer.model, trainer.ema.ema) for value in model.state_dict().values()]
    bad = [name for name, value in line.items() if name.endswith("loss") and not np.isfinite(value)]
    if bad or not all(value.isfinite().all() for value in values):
        what = " and ".join(bad) or "a weight"
        raise DetectorError(f"epoch {line['epoch']}: {what} is no number; try a lower learning rate (yolo_rate)")


def _restore(trainer: Any, kept: dict[str, Any]) -> None:
    """Set a trainer, already set up, to where `_end_epoch` left it; `_Trained` where that was the end."""
    trainer.model.load_state_dict(kept["model"])
    trainer.ema.ema.load_state_dict(kept["ema"])
    trainer.ema.updates = kept["ema_updates"]
    restore_optimizer(trainer.optimizer, kept["optimizer"])
    trainer.scaler.load_state_dict(kept["scaler"])
    trainer.start_epoch = len(kept["history"])
    trainer.scheduler.last_epoch = trainer.start_epoch - 1
    trainer.model.criterion = trainer.model.init_criterion()
    for _ in range(trainer.start_epoch):  # the weights of its two heads change with the epochs
        trainer.model.criterion.update()
    print(f"goes on after epoch {trainer.start_epoch}/{trainer.epochs}", flush=True)
    if trainer.start_epoch >= trainer.epochs:
        raise _Trained


def _data_file(folder: Path, work: Path, files: Sequence[str], held_out: Sequence[str], config: DetectorConfig) -> Path:
    """The data.yaml of one job. Links give each job its own labels.cache, so that jobs side by side don't share one."""
    for name in ("images", "labels"):
        (work / name).symlink_to(folder / name, target_is_directory=True)
    for name, lines in (("train", files), ("val", held_out or files[:1])):
        (work / f"{name}.txt").write_text("\n".join(str(work / line) for line in lines) + "\n")
    names = dict(enumerate(class_table(config)["name"]))
    path = work / "data.yaml"
    path.write_text(yaml.safe_dump({"path": str(work), "train": "train.txt", "val": "val.txt", "names": names}))
    return path


def _start_boxes(models: Iterable[torch.nn.Module], box: np.ndarray) -> None:
    """Let untrained networks begin with boxes of the known size, `box`: width and height in pixels.

    A new YOLO head predicts boxes of 15 strides. Against a box of 10 pixels its overlap is under .01, and the assigner
    takes that to the sixth power: nothing is assigned, nothing learnt, for many epochs. So the distance bins start out
    at half a box: the two bins around it share the weight such that their mean is right.
    """
    half = 0.5 * np.tile(box, 2)  # left, top, right, bottom
    for head in (model.model[-1] for model in models):
        for heads in (head.cv2, head.one2one_cv2):
            for layer, stride in zip(heads, head.stride.tolist(), strict=True):
                bins = np.full((4, head.reg_max), 1e-3)
                for side, distance in enumerate(half / stride):
                    low = min(int(distance), head.reg_max - 2)
                    bins[side, low : low + 2] += [1 - (distance - low), distance - low]
                layer[-1].bias.data.copy_(torch.from_numpy(np.log(bins).ravel()))


def _quicken_norms(model: torch.nn.Module) -> None:
    """Batch norms follow with torch's momentum of 0.1, not ultralytics' 0.03.

    After a hundred steps the slower averages are still those of an untrained network, and prediction, which uses them,
    finds nothing that training has learnt.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1


def _tell_epoch(trainer: Any) -> dict[str, float]:
    """Print a line and return the epoch's figures."""
    line = {
        "epoch": trainer.epoch + 1,
        "seconds": trainer.epoch_time,
        "lr": trainer.optimizer.param_groups[0]["lr"],
        **{name: float(value) for name, value in trainer.tloss.items()},
        **{name: float(value) for name, value in trainer.metrics.items() if trainer.args.val and "mAP" in name},
    }
    parts = " ".join(f"{name.removesuffix('_loss')} {line[name]:.3f}" for name in trainer.tloss)
    print(f"epoch {line['epoch']}/{trainer.epochs} loss {parts} ({line['seconds']:.1f} s)", flush=True)
    return line


def save_detector(detector: Detector, path: str | Path) -> None:
    """Write weights that ultralytics' YOLO(path) opens too, and <path>.json beside them; both atomically."""
    path = Path(path)
    detector.model.args = {"task": "detect", "imgsz": max(detector.config.size)}  # the trainer's name its folders
    with atomic(path) as temporary, temporary.open("wb") as file:  # a path's name would be among the bytes
        torch.save({"model": detector.model.half(), "date": None, "train_args": {}}, file)
    detector.model.float()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    names = list(class_table(detector.config)["name"])
    about = {
        "config": asdict(detector.config),
        "fold": detector.fold,
        "classes": names,
        **detector.about,
        "versions": {name: version(name) for name in ("torch", "ultralytics", "numpy")},
        "git_commit": git_commit(),
        "sha256": digest,
    }
    write_json(path.with_suffix(".json"), about)


def save_power(path: str | Path, power: float) -> None:
    """Write the power by which the findings of saved weights are read into the json beside them."""
    path = Path(path).with_suffix(".json")
    about = json.loads(path.read_text())
    about["config"]["power"] = power
    write_json(path, about)


def load_detector(path: str | Path) -> Detector:
    """Read a detector that `save_detector` wrote; DetectorError where weights and json do not belong together."""
    path = Path(path)
    about = json.loads(path.with_suffix(".json").read_text())
    if hashlib.sha256(path.read_bytes()).hexdigest() != about["sha256"]:
        raise DetectorError(f"{path} is not the file that {path.with_suffix('.json').name} describes (sha256 differs)")
    quiet_ultralytics(Path(tempfile.gettempdir()) / f"lsdc_utils_{os.getuid()}")
    from ultralytics.nn.tasks import torch_safe_load

    model = torch_safe_load(str(path), safe_only=True)[0]["model"].float().eval()
    model.model[-1].end2end = True  # the head that needs no suppression of doubles, named since the default changed
    model = model.fuse(verbose=False).to("cuda" if torch.cuda.is_available() else "cpu")
    model = model.to(memory_format=torch.channels_last)
    config = config_from(about["config"])
    if about["classes"] != list(class_table(config)["name"]):
        raise DetectorError(f"{path}: its classes are not those of scheme {config.scheme!r} in this version")
    return Detector(model, config, about["fold"], about)
