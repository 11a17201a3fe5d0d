"""The second classifier: a factorised 3D vision transformer of timm's blocks, graded by an ordinal head.

`level_slices`: for each of five levels and two sides squares of the nearest slices of each series, as they were taken.
An encoder makes a token of each slice, blocks attend over the slices of a half level, then over the ten halves of a
study. The right side is mirrored onto the left; a half is graded for canal, foramen and recess, and the canal's latent
is the mean of its two halves. `study_grid`, the published way: the whole study resampled to one grid, 25 latents from
one token, left and right learnt from mirrored studies with exchanged labels.

The head is a cumulative link: P(severity > k) = sigmoid(latent - threshold_k) (McCullagh 1980, Regression Models for
Ordinal Data), or a softmax, for comparison. It gives natural probabilities.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import Block
from torch import nn
from torch.nn import functional as F

from lsdc_utils.files import atomic, git_commit, write_json
from lsdc_utils.vit.crops import FORAMEN, LATERAL, SLOTS
from lsdc_utils.vocabulary import (
    COLUMNS,
    CONDITIONS,
    LEVELS,
    SERIES_TYPES,
    SEVERITIES,
    SIDES,
    T1,
    T2,
    mirrored,
)

INPUTS = ("level_slices", "study_grid")
HEADS = ("ordinal", "softmax")
HALF_OUTPUTS = ("scs", "nfn", "ss")  # what one half level is graded for
COLUMN_GROUP = tuple(CONDITIONS[c].group for c in CONDITIONS for _ in LEVELS)  # of each of the 25 columns
MIRROR = tuple(COLUMNS.index(f"{mirrored(c)}_{level}") for c in CONDITIONS for level in LEVELS)
KINDS = [SERIES_TYPES.index(kind) for kind, _ in SLOTS]  # series of each slot
SLOTS_OF_SIDE = [[k for k, (_, side) in enumerate(SLOTS) if side in ("", mine)] for mine in SIDES]
NODES = np.arange(-12.0, 13.0, 4.0)  # mm: places between which what a slice means is interpolated


@dataclass(frozen=True)
class VitConfig:
    """What the network sees and how large it is."""

    input: str = "level_slices"  # or study_grid
    size: int = 16  # pixels a side of the square of a slice, or voxels a side of the grid
    spacing: float = 1.75  # mm a pixel; unused by study_grid
    margin: int = 4  # pixels kept all round, to cut shifted and turned squares from; unused by study_grid
    slices: int = 5  # of a series, a level and a side; unused by study_grid
    encoder: str = "vit"  # of a slice: vit, a small one from scratch, or the name of a model of timm's
    stem: int = 32  # channels of the stride-2 convolution before the patches (vit)
    patch: int = 2  # a side, in pixels after the stem (vit), or in voxels of a grid
    width: int = 96  # of a token
    depth: int = 1  # blocks over the patches of a slice (vit) or of a grid
    heads: int = 4
    readout: int = 8  # numbers that each patch hands to the readout, which keeps their places apart
    mix: int = 1  # blocks over the slices of a half level
    context: int = 1  # blocks over the ten half levels of a study
    head: str = "ordinal"  # or softmax

    def __post_init__(self) -> None:
        if self.input not in INPUTS:
            raise ValueError(f"input {self.input!r} is none of {INPUTS}")
        if self.head not in HEADS:
            raise ValueError(f"head {self.head!r} is none of {HEADS}")
        if self.encoder == "vit" and self.size % self.step:
            raise ValueError(f"size {self.size} is not a multiple of {self.step}, the pixels of a patch")

    @property
    def step(self) -> int:
        """Pixels or voxels from one patch to the next."""
        return self.patch if self.input == "study_grid" else 2 * self.patch


class Vit3d(nn.Module):
    """What `study_input` gives of B studies -> natural log-probabilities (B, 25, 3) in COLUMNS order."""

    def __init__(self, config: VitConfig, encoder_weights: str = ""):
        super().__init__()
        self.config = config
        halves = config.input == "level_slices"
        self.features = LevelSlices(config, encoder_weights) if halves else StudyGrid(config)
        ordinal = config.head == "ordinal"
        outputs = len(HALF_OUTPUTS) if halves else len(COLUMNS)
        self.head = nn.Linear(config.width, outputs * (1 if ordinal else len(SEVERITIES)))
        # Per column, one for both sides. Ordinal: the first threshold, and the logarithm of the step to the second;
        # softmax: the logits of the prior.
        rows = len(HALF_OUTPUTS) * len(LEVELS) if halves else len(COLUMNS)
        self.thresholds = nn.Parameter(torch.zeros(rows, 2 if ordinal else len(SEVERITIES)))
        nn.init.zeros_(self.head.weight)  # so that training begins at the prior
        nn.init.zeros_(self.head.bias)

    def forward(self, images: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """Natural log-probabilities (B, 25, 3); images and places as `latents` takes them."""
        latents = self.latents(images, places).float()
        thresholds = self.thresholds[self._threshold_of_column()]
        if self.config.head == "softmax":
            return F.log_softmax(latents + thresholds, dim=-1)
        latents, (first, step) = latents.squeeze(-1), thresholds.unbind(-1)
        above = F.logsigmoid(latents - first), F.logsigmoid(latents - first - step.exp())
        below = F.logsigmoid(first - latents), F.logsigmoid(first + step.exp() - latents)
        # log P(moderate) = log(s(a) - s(b)) = log s(a) + log s(-b) + log(1 - exp(b - a)), for a > b
        middle = above[0] + below[1] + torch.log(-torch.expm1(-step.exp()))
        return torch.stack([below[0], middle, above[1]], dim=-1)

    def latents(self, images: torch.Tensor, places: torch.Tensor | None = None) -> torch.Tensor:
        """The latent severities (B, 25, 1), or logits (B, 25, 3), of level slices with places or of grids."""
        if self.config.input == "study_grid":
            return self.head(self.features(images)).unflatten(-1, (len(COLUMNS), -1))
        halves = self.head(self.features(images, places)).unflatten(-1, (len(HALF_OUTPUTS), -1))
        columns = []  # of (B, levels, sides, outputs, 1 or 3)
        for condition in CONDITIONS.values():
            output = halves[:, :, :, HALF_OUTPUTS.index(condition.group)]
            columns.append(output.mean(2) if condition.side is None else output[:, :, SIDES.index(condition.side)])
        return torch.cat(columns, dim=1)

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
        ordinal = np.stack([first, np.log(second - first)], axis=1)
        self.thresholds.copy_(torch.from_numpy(ordinal if self.config.head == "ordinal" else np.log(share)))


class LevelSlices(nn.Module):
    """Slices (B, 5, slots * n, h, w) of grey values 0..255 and their places (B, 5, slots * n) in mm, NaN where there is
    none -> one vector (B, 5, 2, width) for each half level."""

    def __init__(self, config: VitConfig, encoder_weights: str = ""):
        super().__init__()
        self.count, width = config.slices, config.width
        self.encoder = _encoder(config, encoder_weights)
        features = self.encoder.num_features
        self.read = nn.Parameter(torch.randn(len(SERIES_TYPES), features, width) / math.sqrt(features))
        # What a slice shows depends on where it lies, so a token is read by a matrix of its place, interpolated between
        # nodes in mm: a resampling between slices, but of features. Attention does not learn it from few studies.
        shape = (len(SERIES_TYPES), len(NODES), width, width)
        self.place = nn.Parameter(torch.randn(shape) / math.sqrt(width) + 0.5 * torch.eye(width))
        self.place_bias = nn.Parameter(torch.zeros(len(SERIES_TYPES), len(NODES), width))
        self.mix = _blocks(config, config.mix)
        self.level = nn.Parameter(torch.zeros(len(LEVELS), 1, width))
        self.context = _blocks(config, config.context)
        self.register_buffer("nodes", torch.from_numpy(NODES).float(), persistent=False)

    def forward(self, images: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Vectors (B, 5, 2, width) of the half levels, each joined by what the other nine tell it."""
        n = len(images)
        there = ~places.isnan()
        slots = (n, len(LEVELS), len(SLOTS), self.count)
        seen = normalise(images.reshape(*slots, *images.shape[3:]), there.reshape(slots))
        encoded = self.encoder(seen.reshape(-1, 1, *images.shape[3:])).reshape(*slots, -1)
        there, places = there.reshape(slots), places.nan_to_num().reshape(slots)
        sides = []
        for side, mine in enumerate(SLOTS_OF_SIDE):
            tokens = [self._token(encoded[:, :, k], _outwards(places[:, :, k], k, side), KINDS[k]) for k in mine]
            sides.append((torch.cat(tokens, dim=2), there[:, :, mine].flatten(2)))
        tokens, there = (torch.stack(parts, dim=2) for parts in zip(*sides, strict=True))  # (B, 5, 2, slices, ...)
        halves = self._pool(tokens.flatten(0, 2), there.flatten(0, 2)).reshape(n, len(LEVELS), len(SIDES), -1)
        context = (halves + self.level).flatten(1, 2)
        for block in self.context:
            context = block(context)
        return halves + context.reshape(halves.shape) if len(self.context) else halves

    def _token(self, encoded: torch.Tensor, places: torch.Tensor, kind: int) -> torch.Tensor:
        """Tokens (..., width) of encoded slices (..., features) of one series type at places (...) in mm."""
        step = self.nodes[1] - self.nodes[0]
        places = places.clamp(self.nodes[0], self.nodes[-1])
        share = (1 - (places[..., None] - self.nodes).abs() / step).clamp(min=0)  # (..., nodes), sums to 1
        read = torch.einsum("...f,ftw->...tw", encoded @ self.read[kind], self.place[kind].transpose(0, 1))
        return ((read + self.place_bias[kind]) * share[..., None]).sum(dim=-2)

    def _pool(self, tokens: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
        """One vector (N, width) of tokens (N, slices, width): their sum, and what blocks add that attend over them."""
        pooled = (tokens * there[..., None]).sum(dim=1, keepdim=True) / math.sqrt(self.count)
        tokens = torch.cat([pooled, tokens], dim=1)
        there = torch.cat([torch.ones_like(there[:, :1]), there], dim=1)
        unseen = torch.zeros_like(there, dtype=tokens.dtype).masked_fill(~there, -1e4)[:, None, None]
        for block in self.mix:
            tokens = block(tokens, attn_mask=unseen)
        return tokens[:, 0]


def _outwards(places: torch.Tensor, slot: int, side: int) -> torch.Tensor:
    """Places in mm as a side sees them: from where its slot looks, and T2, which both sides share, outwards."""
    kind, _ = SLOTS[slot]
    if kind == T2:
        return places * float(LATERAL[side])
    return places - FORAMEN if kind == T1 else places


class SliceVit(nn.Module):
    """A small vision transformer: slices (N, 1, h, w) -> features (N, num_features)."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.patch = config.patch
        tokens = (config.size // config.step) ** 2
        self.num_features = tokens * config.readout
        self.stem = nn.Sequential(nn.Conv2d(1, config.stem, 3, stride=2, padding=1), nn.GELU())
        self.embed = nn.Sequential(nn.Linear(config.stem * config.patch**2, config.width), nn.LayerNorm(config.width))
        self.position = nn.Parameter(torch.randn(1, tokens, config.width) * 0.02)
        self.blocks = nn.Sequential(*_blocks(config, config.depth))
        # A square is aligned to the spine, so a patch's place tells what it shows. Averaging would lose the place, and
        # a few hundred studies are too few to learn it again through attention (measured: nothing was learnt).
        self.readout = nn.Sequential(nn.LayerNorm(config.width), nn.Linear(config.width, config.readout), nn.Flatten(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (N, num_features) of slices (N, 1, h, w) that `normalise` has scaled."""
        tokens = _patches(self.stem(images), self.patch)
        return self.readout(self.blocks(self.embed(tokens) + self.position))


class StudyGrid(nn.Module):
    """Grids (B, 3, l, p, h) of grey values 0..255 -> one vector (B, width)."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.patch = config.patch
        tokens = (config.size // config.step) ** 3
        pixels = len(SERIES_TYPES) * config.patch**3
        self.embed = nn.Sequential(nn.Linear(pixels, config.width), nn.LayerNorm(config.width))
        self.position = nn.Parameter(torch.randn(1, tokens, config.width) * 0.02)
        self.blocks = nn.Sequential(*_blocks(config, config.depth))
        self.readout = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.readout),
            nn.Flatten(1),
            nn.Linear(tokens * config.readout, config.width),
        )

    def forward(self, grids: torch.Tensor) -> torch.Tensor:
        """Vectors (B, width) of grids (B, 3, l, p, h)."""
        tokens = self.embed(_patches(normalise(grids), self.patch)) + self.position
        return self.readout(self.blocks(tokens))


def _patches(values: torch.Tensor, patch: int) -> torch.Tensor:
    """Values (N, channels, ...) of two or three axes as patches (N, patches, channels * pixels of a patch)."""
    axes = values.ndim - 2
    split = [k for size in values.shape[2:] for k in (size // patch, patch)]
    order = [0, *range(2, 2 * axes + 2, 2), 1, *range(3, 2 * axes + 3, 2)]
    return values.reshape(*values.shape[:2], *split).permute(order).flatten(axes + 1).flatten(1, axes)


def _encoder(config: VitConfig, weights: str) -> nn.Module:
    """The encoder of a slice: ours, or a model of timm's, which begins with the weights in a file if one is given."""
    if config.encoder == "vit":
        return SliceVit(config)
    if weights and not Path(weights).is_file():
        raise FileNotFoundError(f"vit_encoder_weights: {weights} are not there (looked from {Path.cwd()})")
    size = {"img_size": config.size} if timm.get_pretrained_cfg(config.encoder).fixed_input_size else {}
    file = {"file": weights, "custom_load": weights.endswith(".npz")}
    return timm.create_model(
        config.encoder,
        pretrained=bool(weights),
        pretrained_cfg_overlay=file if weights else None,
        in_chans=1,
        num_classes=0,
        **size,
    )


def _blocks(config: VitConfig, depth: int) -> nn.ModuleList:
    # Layer scale: a block begins as a small correction to what the readout already sees.
    return nn.ModuleList(
        Block(config.width, config.heads, mlp_ratio=4, qkv_bias=True, init_values=0.1) for _ in range(depth)
    )


def normalise(images: torch.Tensor, there: torch.Tensor | None = None) -> torch.Tensor:
    """Grey values 0..255 (..., n, h, w) with mean 0 and deviation about 1 over the last three axes: over the slices of
    a slot that are `there` (..., n), or over a grid.

    Windows and coils differ from scanner to scanner; 8 grey levels keep a series that shows nothing from growing.
    """
    values, axes = images.float(), (-3, -2, -1)
    weight = torch.ones(()) if there is None else there[..., None, None].float()
    weight = weight.to(values.device).expand_as(values)
    total = weight.sum(dim=axes, keepdim=True).clamp(min=1)
    mean = (values * weight).sum(dim=axes, keepdim=True) / total
    variance = ((values - mean).square() * weight).sum(dim=axes, keepdim=True) / total
    return (values - mean) * weight / (variance.sqrt() + 8)


def save_vit(model: Vit3d, path: str | Path, fold: int, training: dict[str, Any]) -> None:
    """Write <path>.safetensors and beside it a .json that says what they are and how they came to be (`training`)."""
    path = Path(path)
    with atomic(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, temporary)
    about = {
        "model": "vit3d",
        "fold": fold,
        "config": dataclasses.asdict(model.config),
        "training": training,
        "columns": list(COLUMNS),
        "severities": list(SEVERITIES),
        "versions": {name: version(name) for name in ("torch", "timm", "numpy", "safetensors")},
        "git_commit": git_commit(),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    write_json(path.with_suffix(".json"), about)


def load_vit(path: str | Path) -> Vit3d:
    """The network whose weights `save_vit` wrote; ValueError where the file is not the one that its .json describes."""
    path = Path(path)
    about = json.loads(path.with_suffix(".json").read_text())
    if hashlib.sha256(path.read_bytes()).hexdigest() != about["sha256"]:
        raise ValueError(f"{path} is not the file that {path.with_suffix('.json').name} describes (sha256 differs)")
    if about["columns"] != list(COLUMNS) or about["severities"] != list(SEVERITIES):
        raise ValueError(f"{path} grades other columns or severities than this version of lsdc_utils")
    model = Vit3d(VitConfig(**about["config"]))
    model.load_state_dict(load_file(path))
    return model.eval()
