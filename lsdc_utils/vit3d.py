"""The second classifier: a 3D vision transformer of timm's blocks, with an ordinal head for the 25 columns.

Two inputs, one class. `level_crops`: ten half crops a study (five levels, two sides, the right mirrored onto the left),
each graded for canal, foramen and recess; the canal's latent is the mean of its two halves. `study_grid`: the whole
study as one grid, 25 latents from one token, left and right learnt from mirrored studies with exchanged labels.

The head is a cumulative link: P(severity > k) = sigmoid(latent - threshold_k) (McCullagh 1980, Regression Models for
Ordinal Data). It gives natural probabilities; the loss weighs them by 1, 2, 4 as the score does.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn import functional as F

from lsdc_utils import volume
from lsdc_utils.files import atomic, git_commit, write_json
from lsdc_utils.vocabulary import (
    COLUMNS,
    CONDITIONS,
    GROUPS,
    LEVELS,
    MISSING,
    SERIES_TYPES,
    SEVERITIES,
    SEVERITY_WEIGHTS,
    SIDES,
    mirrored,
    study_row_ids,
)

INPUTS = ("level_crops", "study_grid")
HALF_OUTPUTS = ("scs", "nfn", "ss")  # what one half crop is graded for
COLUMN_GROUP = tuple(CONDITIONS[c].group for c in CONDITIONS for _ in LEVELS)  # of each of the 25 columns
MIRROR = tuple(COLUMNS.index(f"{mirrored(c)}_{level}") for c in CONDITIONS for level in LEVELS)


@dataclass(frozen=True)
class VitConfig:
    """What the network sees and how large it is; axes of a volume go outwards (or left), to posterior, to the head."""

    input: str = "level_crops"  # or study_grid
    size: tuple[int, int, int] = (16, 16, 16)  # voxels the network sees
    spacing: tuple[float, float, float] = (1.75, 1.5, 1.75)  # mm a voxel; unused by study_grid
    offset: tuple[float, float, float] = (10.0, -1.0, 5.0)  # mm from the level's centre to the crop's middle
    margin: int = 2  # voxels kept all round, to cut off-centre crops from
    stem: int = 32  # channels of the stride-2 convolution before the patches; 0: none
    patch: tuple[int, int, int] = (2, 2, 2)  # voxels of a patch, after the stem
    width: int = 128  # of a token
    depth: int = 1  # blocks over the patches of one volume
    heads: int = 4
    readout: int = 32  # numbers that each token hands to the readout, which keeps the tokens' places apart
    context: int = 1  # blocks over the ten half crops of a study; a grid has none

    def __post_init__(self) -> None:
        for name in ("size", "spacing", "offset", "patch"):  # lists where they come from JSON or YAML
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.input not in INPUTS:
            raise ValueError(f"input {self.input!r} is none of {INPUTS}")
        step = [p * (2 if self.stem else 1) for p in self.patch]
        if any(n % s for n, s in zip(self.size, step, strict=True)):
            raise ValueError(f"size {self.size} is not a multiple of {tuple(step)}, the voxels of a token")


@dataclass(frozen=True)
class Training:
    """How a network is fitted. Nothing is chosen on held-out studies: the last epoch's averaged weights count."""

    epochs: int = 24
    batch: int = 2  # studies
    lr: float = 1e-3
    weight_decay: float = 0.5
    warmup: float = 0.1  # share of the steps
    ema: float = 0.98  # decay of the averaged weights a step
    jitter: float = 1.7  # mm, sd of the shift of a half crop along each axis, up to the margin
    intensity: float = 0.15  # sd of contrast and of brightness, a series
    drop_series: float = 0.05  # share of series blanked
    seed: int = 52
    threads: int = 1


class Vit3d(nn.Module):
    """Volumes (B, ...) uint8 as `make_input` gives them -> natural log-probabilities (B, 25, 3) in COLUMNS order."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        channels = config.stem or len(SERIES_TYPES)
        stride = 2 if config.stem else 1
        self.stem = (
            nn.Sequential(nn.Conv3d(len(SERIES_TYPES), config.stem, 3, stride=2, padding=1), nn.GELU())
            if config.stem
            else nn.Identity()
        )
        tokens = math.prod(n // (p * stride) for n, p in zip(config.size, config.patch, strict=True))
        self.embed = nn.Sequential(
            nn.Linear(channels * math.prod(config.patch), config.width), nn.LayerNorm(config.width)
        )
        self.position = nn.Parameter(torch.randn(1, tokens, config.width) * 0.02)
        self.blocks = nn.Sequential(*_blocks(config, config.depth))
        # A crop is aligned to the spine, so a token's place tells what it shows. Averaging tokens would lose the place,
        # and a few hundred studies are too few to learn it again through attention (measured: nothing was learnt).
        self.readout = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.readout),
            nn.Flatten(1),
            nn.Linear(tokens * config.readout, config.width),
        )
        halves = config.input == "level_crops"
        context = config.context if halves else 0
        self.level = nn.Parameter(torch.zeros(len(LEVELS), 1, config.width)) if context else None
        self.context = nn.Sequential(*_blocks(config, context)) if context else None
        self.head = nn.Linear(config.width, len(HALF_OUTPUTS) if halves else len(COLUMNS))
        # Per column: the first threshold, and the logarithm of the step to the second. One for both sides of a half.
        self.thresholds = nn.Parameter(torch.zeros(len(HALF_OUTPUTS) * len(LEVELS) if halves else len(COLUMNS), 2))
        nn.init.zeros_(self.head.weight)  # so that training begins at the prior
        nn.init.zeros_(self.head.bias)

    def forward(self, volumes: torch.Tensor) -> torch.Tensor:
        latents = self.latents(volumes).float()
        first, step = self.thresholds[self._threshold_of_column()].unbind(-1)
        above = F.logsigmoid(latents - first), F.logsigmoid(latents - first - step.exp())
        below = F.logsigmoid(first - latents), F.logsigmoid(first + step.exp() - latents)
        # log P(moderate) = log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - exp(b - a)), for a > b
        middle = above[0] + below[1] + torch.log(-torch.expm1(-step.exp()))
        return torch.stack([below[0], middle, above[1]], dim=-1)

    def latents(self, volumes: torch.Tensor) -> torch.Tensor:
        """The 25 latent severities (B, 25) of volumes (B, 5, 2, 3, ...) or (B, 3, ...)."""
        if self.config.input == "study_grid":
            return self.head(self.features(volumes))
        n = len(volumes)
        features = self.features(volumes.flatten(0, 2)).reshape(n, len(LEVELS), len(SIDES), -1)
        if self.context is not None:
            tokens = (features + self.level).flatten(1, 2)
            features = features + self.context(tokens).reshape(features.shape)
        halves = self.head(features)  # (B, levels, sides, outputs)
        columns = []
        for condition in CONDITIONS.values():
            output = halves[..., HALF_OUTPUTS.index(condition.group)]
            columns.append(output.mean(2) if condition.side is None else output[:, :, SIDES.index(condition.side)])
        return torch.cat(columns, dim=1)

    def features(self, volumes: torch.Tensor) -> torch.Tensor:
        """One vector (N, width) for each volume (N, 3, l, p, h) of grey values 0..255."""
        values = self.stem(normalise(volumes))
        n, channels, *size = values.shape
        patch = self.config.patch
        counts = [s // p for s, p in zip(size, patch, strict=True)]
        split = [k for pair in zip(counts, patch, strict=True) for k in pair]
        tokens = values.reshape(n, channels, *split).permute(0, 2, 4, 6, 1, 3, 5, 7)
        tokens = self.embed(tokens.reshape(n, math.prod(counts), -1)) + self.position
        return self.readout(self.blocks(tokens))

    def _threshold_of_column(self) -> list[int]:
        if self.config.input == "study_grid":
            return list(range(len(COLUMNS)))
        return [
            HALF_OUTPUTS.index(condition.group) * len(LEVELS) + level
            for condition in CONDITIONS.values()
            for level in range(len(LEVELS))
        ]

    @torch.no_grad()
    def start_at_prior(self, labels: np.ndarray) -> None:
        """Set the thresholds so that a latent of 0 means what counting `labels` (n, 25) gives, plus half a count."""
        counts = np.stack([(labels == k).sum(0) for k in range(len(SEVERITIES))], axis=1)
        pooled = np.zeros((len(self.thresholds), len(SEVERITIES)))
        np.add.at(pooled, self._threshold_of_column(), counts)
        share = (pooled + 0.5) / (pooled + 0.5).sum(1, keepdims=True)
        first = np.log(share[:, 0] / (1 - share[:, 0]))
        second = np.log((1 - share[:, 2]) / share[:, 2])
        values = np.stack([first, np.log(second - first)], axis=1)
        self.thresholds.copy_(torch.from_numpy(values).to(self.thresholds))


def _blocks(config: VitConfig, depth: int) -> list[Block]:
    # Layer scale: a block begins as a small correction to what the readout already sees.
    return [Block(config.width, config.heads, mlp_ratio=4, qkv_bias=True, init_values=0.1) for _ in range(depth)]


def normalise(volumes: torch.Tensor) -> torch.Tensor:
    """Grey values 0..255 (N, 3, l, p, h) as float32 with mean 0 and deviation about 1 in each series of each volume.

    Windows and coils differ from scanner to scanner; 8 grey levels keep a series that shows nothing from growing.
    """
    values = volumes.float()
    mean = values.mean(dim=(2, 3, 4), keepdim=True)
    return (values - mean) / (values.std(dim=(2, 3, 4), keepdim=True) + 8)


# ---- inputs and labels ---------------------------------------------------------------------------------------------


def make_input(stacks: list[volume.Stack], points: pd.DataFrame, config: VitConfig) -> np.ndarray | None:
    """What the network sees of one study, uint8: (5, 2, 3, l, p, h) crops with their margin, or a (3, l, p, h) grid.

    points: the study's canal points (level, X, Y, Z in LPS mm, maybe confidence), not used by `study_grid`. None where
    the study cannot be seen: no series, or no point.
    """
    if not stacks or (config.input == "level_crops" and points.empty):
        return None
    if config.input == "study_grid":
        return volume.study_grid(stacks, config.size[0])
    return volume.level_crops(stacks, points, config.size, config.spacing, config.offset, config.margin)


def canal_points(labels: pd.DataFrame, detected: Iterable[pd.DataFrame] = ()) -> pd.DataFrame:
    """Canal points to cut training crops round: study_id, level, X, Y, Z (LPS mm), confidence.

    A study that a table of `detected` holds takes its points from there, where they are out of fold, so that training
    meets the errors that prediction will meet; every other study takes the label table's points.
    """
    columns = ["study_id", "level", "X", "Y", "Z", "confidence"]
    clicked = labels[(labels["condition"].map(lambda c: CONDITIONS[c].group) == "scs") & labels["X"].notna()]
    found = [table[columns] for table in detected]
    known = {study for table in found for study in table["study_id"]}
    clicked = clicked[~clicked["study_id"].isin(known)].assign(confidence=1.0)[columns]
    return pd.concat([*found, clicked], ignore_index=True)


def make_inputs(
    studies: Iterable[tuple[int, list[volume.Stack]]], points: pd.DataFrame, config: VitConfig
) -> tuple[list[int], np.ndarray]:
    """Ids (n,) and inputs (n, ...) of the studies that can be seen, read one by one. `points`: those of all studies."""
    by_study = dict(list(points.groupby("study_id")))
    ids, inputs = [], []
    for study_id, stacks in studies:
        seen = make_input(stacks, by_study.get(study_id, points.iloc[:0]), config)
        if seen is not None:
            ids.append(int(study_id))
            inputs.append(seen)
    if not inputs:
        raise ValueError("no study with a readable series and a canal point: nothing to show the network")
    return ids, np.stack(inputs)


def label_matrix(labels: pd.DataFrame, study_ids: Iterable[int]) -> np.ndarray:
    """Severities int8 (n, 25) in COLUMNS order from the tidy label table, -1 where a study has no label."""
    column = labels["condition"] + "_" + labels["level"]
    table = labels.assign(column=column).pivot(index="study_id", columns="column", values="severity")
    return np.array(table.reindex(index=list(study_ids), columns=list(COLUMNS)).fillna(MISSING), dtype=np.int8)


def row_weights(labels: np.ndarray) -> np.ndarray:
    """Weight float32 (n, 25) of every row such that mean over studies of (weight * loss).sum(1) is the official score's
    mean over its three groups of rows: 1, 2, 4 by the label, normalised in each group; 0 where the label is missing.
    """
    weights = np.where(labels == MISSING, 0.0, np.array(SEVERITY_WEIGHTS)[labels])
    for group in GROUPS:
        mine = [name == group for name in COLUMN_GROUP]
        weights[:, mine] *= len(labels) / max(weights[:, mine].sum(), 1e-9) / len(GROUPS)
    return weights.astype(np.float32)


def row_losses(log_natural: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy (B, 25) of the weighted rows w_k p_k / sum that the score asks for; missing labels give a number
    that their weight of 0 removes."""
    weighted = F.log_softmax(log_natural + torch.tensor(SEVERITY_WEIGHTS, device=log_natural.device).log(), dim=-1)
    return -weighted.gather(-1, labels.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)


def planes(seen: np.ndarray, config: VitConfig) -> Iterator[tuple[str, np.ndarray, tuple, tuple[str, str]]]:
    """For each series type one plane of a volume (3, l, p, h) to look at: its name, image, extent and axis labels.

    Half crops: T1 where the foramen lies, T2 at the midline, axial at the level of the disc, extent in mm from the
    level's centre. Grids: the middle planes, in voxels. Images are to be drawn with origin "lower".
    """
    halves = config.input == "level_crops"
    spacing, offset = (config.spacing, config.offset) if halves else ((1.0,) * 3, tuple(n / 2 for n in config.size))
    places = [(np.arange(n) - (n - 1) / 2) * d + o for n, d, o in zip(config.size, spacing, offset, strict=True)]
    edges = [(p[0] - d / 2, p[-1] + d / 2) for p, d in zip(places, spacing, strict=True)]
    foramen, midline, disc = (16.0, 0.0, 0.0) if halves else offset  # mm outwards, mm outwards, mm to the head
    unit, outward = ("mm", "outwards") if halves else ("voxels", "to the left")
    cuts = ((0, foramen), (0, midline), (2, disc))
    for volume_of, kind, (axis, place) in zip(seen, SERIES_TYPES, cuts, strict=True):
        image = volume_of.take(np.abs(places[axis] - place).argmin(), axis)  # (p, h) or (l, p)
        across, up = (1, 2) if axis == 0 else (0, 1)
        extent = (*edges[across], *edges[up]) if axis == 0 else (*edges[across], *edges[up][::-1])
        names = [(outward, "to posterior", "to the head")[k] + f" ({unit})" for k in (across, up)]
        yield kind, image.T if axis == 0 else image.T[::-1], extent, tuple(names)


# ---- augmentation and views ----------------------------------------------------------------------------------------


def cut(volumes: np.ndarray, config: VitConfig, shifts: np.ndarray) -> np.ndarray:
    """Half crops (B, 5, 2, 3, ...) with margin cut to `config.size`, `shifts` (B, 5, 2, 3) voxels off the middle."""
    start = shifts + config.margin
    result = np.empty((*volumes.shape[:4], *config.size), dtype=volumes.dtype)
    for index in np.ndindex(volumes.shape[:3]):
        window = tuple(slice(a, a + n) for a, n in zip(start[index], config.size, strict=True))
        result[index] = volumes[index][:, *window]
    return result


def augment(
    volumes: np.ndarray, labels: np.ndarray, config: VitConfig, training: Training, rng: np.random.Generator
) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """A training batch: shifted centres, or mirrored studies; contrast and brightness; now and then a series blanked.

    Returns float32 volumes, and for each study the order (B, 25) in which its columns and weights are to be taken:
    for a mirrored study left and right are exchanged.
    """
    n = len(volumes)
    order = np.tile(np.arange(len(COLUMNS)), (n, 1))
    if config.input == "level_crops":
        shifts = rng.normal(0, training.jitter / np.array(config.spacing), (*volumes.shape[:3], 3))
        volumes = cut(volumes, config, np.rint(shifts).astype(int).clip(-config.margin, config.margin))
    else:
        turned = rng.random(n) < 0.5
        volumes = np.where(turned[:, None, None, None, None], volumes[:, :, ::-1], volumes)
        order[turned] = MIRROR
    series = volumes.ndim - 4  # axis of the three series
    shape = [n if axis == 0 else len(SERIES_TYPES) if axis == series else 1 for axis in range(volumes.ndim)]
    gain, gamma = np.exp(rng.normal(0, training.intensity, (2, *shape)))
    kept = rng.random(shape) >= training.drop_series
    values = torch.from_numpy(volumes.astype(np.float32) / 255)
    values = values.pow(torch.from_numpy(gamma).float()) * torch.from_numpy(gain * kept * 255).float()
    return values, np.take_along_axis(labels, order, axis=1), order


def views(volumes: np.ndarray, config: VitConfig, count: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """The first `count` views of a batch for test-time augmentation, each with the order of its 25 columns.

    Half crops: the middle, then a voxel inwards and outwards, to the front and back, up and down. Grids: as it is, then
    mirrored with the columns of left and right exchanged.
    """
    same = list(range(len(COLUMNS)))
    if config.input == "study_grid":
        yield from ((volumes, same), (volumes[:, :, ::-1], list(MIRROR)))[:count]
        return
    steps = [(0, 0, 0), *(tuple(sign * k for k in axis) for axis in np.eye(3, dtype=int).tolist() for sign in (1, -1))]
    for shift in steps[:count]:
        yield cut(volumes, config, np.broadcast_to(np.array(shift), (*volumes.shape[:3], 3))), same


# ---- fitting -------------------------------------------------------------------------------------------------------


def choose_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(
    inputs: np.ndarray,
    labels: np.ndarray,
    config: VitConfig,
    training: Training,
    held_out: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[Vit3d, pd.DataFrame]:
    """Train on inputs (n, ...) uint8 and labels (n, 25); gives the averaged weights of the last epoch, and curves.

    held_out: inputs and labels that are looked at a few times for the curves, and never used to choose anything.
    The curves hold epoch, loss (the score's mean over its three groups of rows), held_out_loss (NaN where not looked),
    seconds. Prints one line an epoch. The same seed and threads give the same weights on the same CPU.
    """
    torch.set_num_threads(training.threads)
    torch.manual_seed(training.seed)
    device = choose_device()
    model = Vit3d(config)
    model.start_at_prior(labels)
    model.to(device)
    averaged = ModelEmaV3(model, decay=training.ema, use_warmup=True, warmup_power=0.8)
    optimizer = _optimizer(model, training)
    steps = math.ceil(len(inputs) / training.batch) * training.epochs
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _speed(step, steps, training.warmup))
    scaler = torch.amp.GradScaler(enabled=device.type == "cuda")
    weights = row_weights(labels)
    look = max(1, training.epochs // 5)
    curves = []
    for epoch in range(1, training.epochs + 1):
        began = time.monotonic()
        rng = np.random.default_rng([training.seed, epoch])
        total = 0.0
        model.train()
        for batch in np.array_split(rng.permutation(len(inputs)), steps // training.epochs):
            volumes, truth, order = augment(inputs[batch], labels[batch], config, training, rng)
            weight = torch.from_numpy(np.take_along_axis(weights[batch], order, axis=1)).to(device)
            with torch.autocast(device.type, dtype=torch.float16, enabled=device.type == "cuda"):
                answer = model(volumes.to(device))
            loss = (row_losses(answer, torch.from_numpy(truth).to(device)) * weight).sum(1).mean()
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            scheduler.step()
            averaged.update(model)
            total += float(loss.detach()) * len(batch)
        seen = math.nan
        if held_out is not None and (epoch % look == 0 or epoch == training.epochs):
            seen = loss_of(averaged.module, *held_out, training.batch)
        curves.append((epoch, total / len(inputs), seen, time.monotonic() - began))
        told = "" if math.isnan(seen) else f" held out {seen:.3f}"
        print(f"epoch {epoch}/{training.epochs} loss {curves[-1][1]:.3f}{told} ({curves[-1][3]:.1f} s)", flush=True)
    return averaged.module.eval(), pd.DataFrame(curves, columns=["epoch", "loss", "held_out_loss", "seconds"])


def _optimizer(model: Vit3d, training: Training) -> torch.optim.AdamW:
    """AdamW without decay of biases, norms, places and thresholds; thresholds move faster, since they are log-odds."""
    named = dict(model.named_parameters())
    thresholds = [named.pop("thresholds")]
    plain = [named.pop(name) for name in list(named) if named[name].ndim < 2 or name in ("position", "level")]
    groups = [
        {"params": list(named.values()), "weight_decay": training.weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": thresholds, "weight_decay": 0.0, "lr": training.lr * 10},
    ]
    return torch.optim.AdamW(groups, lr=training.lr, betas=(0.9, 0.98))


def _speed(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate: a linear rise over `warmup` of the steps, then half a cosine down to 0."""
    rise = max(1, round(steps * warmup))
    return (step + 1) / rise if step < rise else 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ---- predicting ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def probabilities(models: list[Vit3d], inputs: np.ndarray, views_count: int = 1, batch: int = 8) -> np.ndarray:
    """Natural probabilities float64 (n, 25, 3) of inputs (n, ...): the mean over models of one config and views."""
    device = choose_device()
    total = np.zeros((len(inputs), len(COLUMNS), len(SEVERITIES)))
    models = [model.to(device).eval() for model in models]
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        seen = list(views(part, models[0].config, views_count))
        for volumes, order in seen:
            volumes = torch.from_numpy(np.ascontiguousarray(volumes)).to(device)
            for model in models:
                found = model(volumes).exp().cpu().numpy()[:, order]
                total[start : start + batch] += found / (len(models) * len(seen))
    return total / total.sum(-1, keepdims=True)


def loss_of(model: Vit3d, inputs: np.ndarray, labels: np.ndarray, batch: int = 8) -> float:
    """The score's mean over its three groups of rows, of one view; missing labels do not count."""
    found = torch.from_numpy(probabilities([model], inputs, batch=batch)).log()
    losses = row_losses(found, torch.from_numpy(labels)).numpy()
    return float((losses * row_weights(labels)).sum(1).mean())


def to_rows(study_ids: Iterable[int], natural: np.ndarray) -> pd.DataFrame:
    """Probabilities (n, 25, 3) as a prediction table: row_id, normal_mild, moderate, severe."""
    rows = pd.DataFrame(natural.reshape(-1, len(SEVERITIES)), columns=list(SEVERITIES))
    rows.insert(0, "row_id", [row for study in study_ids for row in study_row_ids(study)])
    return rows


def predict(
    models: list[Vit3d],
    studies: Iterable[tuple[int, list[volume.Stack]]],
    points: pd.DataFrame,
    views_count: int = 1,
    batch: int = 8,
) -> pd.DataFrame:
    """The prediction table of studies (id, stacks), 25 rows each, by the mean of `models`, which share one config.

    points: canal points of all studies (study_id, level, X, Y, Z, maybe confidence). A study without a point or without
    a series has no rows. Studies are read, cut and let go one by one.
    """
    by_study = dict(list(points.groupby("study_id")))
    ids, found = [], []
    for study_id, stacks in studies:
        seen = make_input(stacks, by_study.get(study_id, points.iloc[:0]), models[0].config)
        if seen is not None:
            ids.append(int(study_id))
            found.append(probabilities(models, seen[None], views_count, batch))
    return to_rows(ids, np.concatenate(found) if found else np.zeros((0, len(COLUMNS), len(SEVERITIES))))


# ---- weights -------------------------------------------------------------------------------------------------------


def save(model: Vit3d, path: str | Path, fold: int, training: Training) -> None:
    """Write <path>.safetensors and beside it a .json that says what they are and how they came to be."""
    path = Path(path)
    with atomic(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, temporary)
    about = {
        "model": "vit3d",
        "fold": fold,
        "config": dataclasses.asdict(model.config),
        "training": dataclasses.asdict(training),
        "columns": list(COLUMNS),
        "severities": list(SEVERITIES),
        "versions": {name: version(name) for name in ("torch", "timm", "numpy", "safetensors")},
        "git_commit": git_commit(),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    write_json(path.with_suffix(".json"), about)


def load(path: str | Path) -> Vit3d:
    """The network whose weights `save` wrote; ValueError where the file is not the one that its .json describes."""
    path = Path(path)
    about = json.loads(path.with_suffix(".json").read_text())
    if hashlib.sha256(path.read_bytes()).hexdigest() != about["sha256"]:
        raise ValueError(f"{path} is not the file that {path.with_suffix('.json').name} describes (sha256 differs)")
    if about["columns"] != list(COLUMNS) or about["severities"] != list(SEVERITIES):
        raise ValueError(f"{path} grades other columns or severities than this version of lsdc_utils")
    model = Vit3d(VitConfig(**about["config"]))
    model.load_state_dict(load_file(path))
    return model.eval()
