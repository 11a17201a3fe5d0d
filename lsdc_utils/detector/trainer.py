"""ultralytics' trainer, made repeatable: weighted images, and an exact resume after the last epoch that was saved.

Importing this module imports ultralytics, so `training.quiet_ultralytics` must have run before.
"""

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.data import base
from ultralytics.data.build import seed_worker
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import yaml_model_load
from ultralytics.utils import torch_utils
from ultralytics.utils.instance import Instances

from lsdc_utils.checkpoint import Checkpoint, restore_optimizer
from lsdc_utils.detector.classes import DetectorError

base.LOCAL_RANK = 1  # without the progress of "Caching images" in logs
torch_utils.unset_deterministic = lambda: None  # undoes what nothing here has set, and imports a compiler for seconds


@dataclass(eq=False)
class WeightedSampler(torch.utils.data.Sampler):
    """Each epoch every image about `weight` times, in a new order: the weight, rounded up or down by chance. The order
    depends on seed and `epoch` alone; the trainer sets `epoch`."""

    weights: np.ndarray  # (n,) float
    seed: int
    epoch: int = 0

    def __len__(self) -> int:
        return max(int(np.floor(self.weights.sum() + 1e-6)), 1)

    def __iter__(self) -> Iterable[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.weights))
        ends = np.cumsum(self.weights[order])
        drawn = np.searchsorted(ends, (np.arange(len(self)) + rng.random()) * ends[-1] / len(self), side="right")
        return iter(rng.permutation(order[np.minimum(drawn, len(order) - 1)]).tolist())


class Finished(Exception):
    """The checkpoint holds the last epoch: there is nothing left to train."""


class DetectorTrainer(DetectionTrainer):
    """Trains on images drawn by weight, keeps a checkpoint of its last epochs, and returns the last epoch's weights.

    weights: of each image, by its file's name. tricks: see `training.TRICKS`. box: usual width and height in input
    pixels. ultralytics' own checkpoint halves the precision of weights and optimiser and keeps no random state, so a
    training that resumes from it ends with other weights.
    """

    def __init__(
        self, overrides: dict[str, Any], weights: dict[str, float], tricks: dict[str, bool], box: np.ndarray,
        threads: int, checkpoint: Checkpoint,
    ) -> None:  # fmt: skip
        super().__init__(overrides=overrides)
        self.image_weights, self.tricks, self.box, self.threads = weights, tricks, box, threads
        self.checkpoint, self.full_batch = checkpoint, self.args.batch
        self.history: list[dict[str, float]] = []
        # Nothing: `end_epoch` keeps the state, and nothing is chosen on held-out images.
        self.save_model = self.final_eval = lambda: False
        self.add_callback("on_train_epoch_start", DetectorTrainer.begin_epoch)
        self.add_callback("on_fit_epoch_end", DetectorTrainer.end_epoch)

    def get_model(self, cfg: Any = None, weights: torch.nn.Module | None = None, verbose: bool = True) -> Any:
        """The network: from scratch by its yaml, of another width if the settings say so."""
        width = weights is None and self.tricks["width"]
        return super().get_model(lean(yaml_model_load(cfg), width) if width else cfg, weights, verbose)

    def get_dataloader(self, dataset_path: str, batch_size: int = 16, rank: int = 0, mode: str = "train") -> Any:
        """ultralytics' loader, for training with our sampler; DetectorError if ultralytics dropped images."""
        if mode != "train":
            self.args.cache = None  # held-out images are looked at once, or never
            return super().get_dataloader(dataset_path, batch_size, rank, mode)
        dataset = self.build_dataset(dataset_path, mode, batch_size)
        if len(dataset) != len(self.image_weights):  # it drops what it calls corrupt with a warning only
            raise DetectorError(f"ultralytics took {len(dataset)} of {len(self.image_weights)} training images")
        if self.tricks["exchange"]:
            exchange_halves(dataset, self.tricks["exchange"])
        # ultralytics has the images in an order of its own.
        shown = np.array([self.image_weights[Path(file).name] for file in dataset.im_files])
        self.sampler = WeightedSampler(shown, self.args.seed)
        # New workers each epoch, so that what they draw depends on its seed alone.
        loader = torch.utils.data.DataLoader(
            dataset, batch_size, sampler=self.sampler, collate_fn=dataset.collate_fn, num_workers=self.args.workers,
            pin_memory=self.device.type == "cuda", worker_init_fn=seed_worker, generator=torch.Generator(),
        )  # fmt: skip
        loader.reset = lambda: None  # which ultralytics calls when it switches mosaics off
        return loader

    def resume_training(self, ckpt: Any) -> None:
        """What has to be set once ultralytics has set itself up; then resume after the last epoch that was saved."""
        torch.set_num_threads(self.threads)  # which ultralytics changes, and their number changes the weights
        if self.tricks["box_start"]:
            start_boxes((self.model, self.ema.ema), self.box)
        if self.tricks["quick_norms"]:
            quicken_norms(self.model)
        # Both are faster on CPUs too, where ultralytics does neither. The averaged weights need the same layout.
        for model in (self.model, self.ema.ema):
            model.to(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group.update(fused=True, foreach=False)
        if self.device.type == "cuda":  # the setting amp=True would run a check that needs the network
            self.amp, self.scaler = True, torch.amp.GradScaler("cuda")
        if state := self.checkpoint.load():
            self._restore(state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.ema.ema.load_state_dict(state["ema"])
        self.ema.updates = state["ema_updates"]
        restore_optimizer(self.optimizer, state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]
        self.start_epoch = len(self.history)
        self.model.criterion = self.model.init_criterion()
        for _ in range(self.start_epoch):  # the weights of its two heads change with the epochs
            self.model.criterion.update()
        print(f"resumes after epoch {self.start_epoch}/{self.epochs}", flush=True)
        if self.start_epoch >= self.epochs:
            raise Finished

    def begin_epoch(self) -> None:
        """Seed an epoch by its number, so that it is the same after a stop; DetectorError if ultralytics has halved the
        batch because it did not fit into the GPU's memory."""
        if self.batch_size < self.full_batch:
            what = f"a batch of {self.full_batch} images is too large for this GPU"
            raise DetectorError(f"{what}; try yolo_batch={self.batch_size}")
        seed = int(np.random.SeedSequence([self.args.seed, self.epoch]).generate_state(1)[0])
        torch_utils.init_seeds(seed, self.args.deterministic)
        self.train_loader.generator.manual_seed(seed)
        self.sampler.epoch = self.epoch

    def end_epoch(self) -> None:
        """Print and keep an epoch's figures, save the state if due; DetectorError if a loss or weight is not finite."""
        metrics = self.metrics.items() if self.args.val else ()
        line = {
            "epoch": self.epoch + 1,
            "seconds": self.epoch_time,
            "lr": self.optimizer.param_groups[0]["lr"],
            **{name: float(value) for name, value in self.tloss.items()},
            **{name: float(value) for name, value in metrics if "mAP" in name},
        }
        parts = " ".join(f"{name.removesuffix('_loss')} {line[name]:.3f}" for name in self.tloss)
        left = self.epochs - line["epoch"] if self.epoch == self.start_epoch else 0
        time_left = f", about {np.ceil(left * self.epoch_time / 60):.0f} min left" if left else ""
        print(f"epoch {line['epoch']}/{self.epochs} loss {parts} ({self.epoch_time:.1f} s{time_left})", flush=True)
        models = {"model": self.model.state_dict(), "ema": self.ema.ema.state_dict()}
        bad = [name for name in self.tloss if not np.isfinite(line[name])]
        if bad or not all(value.isfinite().all() for model in models.values() for value in model.values()):
            what = " and ".join(bad) or "a weight"
            raise DetectorError(f"epoch {line['epoch']}: {what} is not finite; try a lower learning rate (yolo_rate)")
        self.history.append(line)
        others = {"ema_updates": self.ema.updates, "history": self.history}
        states = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        self.checkpoint.keep({**models, **states, **others}, last=self.stop)

    def validate(self) -> tuple[dict[str, float], float]:
        """ultralytics' validation if it was asked for; it would also validate after the last epoch."""
        return super().validate() if self.args.val else ({}, 0.0)


def exchange_halves(dataset: Any, share: float) -> None:
    """Let a share of the images have the right half of another image with its boxes, so that in training one half tells
    nothing of the other."""
    own = dataset.get_image_and_label

    def joined(index: int) -> dict[str, Any]:
        """An image and its boxes as ultralytics wants them."""
        first = own(index)
        if random.random() >= share:  # of the worker's generator, which ultralytics seeds
            return first
        second = own(random.randrange(len(dataset)))
        middle, kept = first["img"].shape[1] // 2, []
        for part, on_right in ((first, False), (second, True)):
            part["instances"].convert_bbox("xywh")
            kept.append((part, (part["instances"].bboxes[:, 0] >= 0.5) == on_right))
        image = np.concatenate([first["img"][:, :middle], second["img"][:, middle:]], axis=1)
        boxes = Instances.concatenate([part["instances"][keep] for part, keep in kept])
        classes = np.concatenate([part["cls"][keep] for part, keep in kept])
        return first | {"img": image, "instances": boxes, "cls": classes}

    dataset.get_image_and_label = joined


def lean(architecture: dict[str, Any], width: float) -> dict[str, Any]:
    """ultralytics' yaml of a YOLOv10 with another `width`, a share of its channels, and a head for boxes of 10 pixels:
    without the last of its levels, whose stride of 32 is never assigned to one, and with 4 distance bins of 16."""
    head, scale = architecture["head"], architecture["scale"]
    (depth, _, most), sources = architecture["scales"][scale], head[-1][0][:-1]
    layers = head[: sources[-1] + 1 - len(architecture["backbone"])]
    layers.append([sources, 1, "Detect", ["nc"]])  # the class of v10's, with numbers of bins
    return architecture | {"scales": {scale: [depth, width, most]}, "head": layers, "end2end": True, "reg_max": 4}


def start_boxes(models: Iterable[torch.nn.Module], box: np.ndarray) -> None:
    """Let untrained networks start with boxes of the known size, `box`: width and height in pixels.

    A new YOLO head predicts boxes of 15 strides. Against a box of 10 pixels its overlap is under .01, and the assigner
    takes that to the sixth power: nothing is assigned or learnt for many epochs. So the distance bins start at half
    a box: the two bins around it share the weight such that their mean is right.
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


def quicken_norms(model: torch.nn.Module) -> None:
    """Batch norms use torch's momentum of 0.1, not ultralytics' 0.03, whose averages are still those of an untrained
    network after a hundred steps: prediction, which uses them, then finds nothing that training has learnt."""
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.1
