"""The published 3D-ViT: the whole study squeezed into one grid, 25 latents from one token. Only studies with all 25
labels are trained on, half of them mirrored, with exchanged labels; the mirrored study is the second view at
prediction. Size, patch, width, depth, heads and readout of the config count."""

from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from lsdc_utils.data.stacks import Stack
from lsdc_utils.published.grid import study_grid
from lsdc_utils.vit import predict
from lsdc_utils.vit.augment import Augmentation, draw_series, vary
from lsdc_utils.vit.inputs import DEVICE, Seen
from lsdc_utils.vit.model import OrdinalHead, VitConfig, attention_blocks, normalise, read_weights
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVELS, SERIES_TYPES, mirrored

MIRROR = tuple(COLUMNS.index(f"{mirrored(c)}_{level}") for c in CONDITIONS for level in LEVELS)


class StudyVit(nn.Module):
    """Grids (B, 3, l, p, h) of grey values 0..255 -> natural log-probabilities (B, 25, 3) in COLUMNS order."""

    def __init__(self, config: VitConfig):
        super().__init__()
        self.config = config
        tokens = (config.size // config.patch) ** 3
        self.patches = nn.Conv3d(len(SERIES_TYPES), config.width, config.patch, stride=config.patch)
        self.norm = nn.LayerNorm(config.width)
        self.position = nn.Parameter(torch.randn(1, tokens, config.width) * 0.02)
        self.blocks = attention_blocks(config, config.depth)
        self.readout = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Linear(config.width, config.readout),
            nn.Flatten(1),
            nn.Linear(tokens * config.readout, config.width),
        )
        self.head = StudyHead(config)

    def forward(self, grids: torch.Tensor) -> torch.Tensor:
        """Log-probabilities (B, 25, 3) of grids of whole studies."""
        tokens = self.norm(self.patches(normalise(grids)).flatten(2).transpose(1, 2))
        return self.head(self.readout(self.blocks(tokens + self.position)))


class StudyHead(OrdinalHead):
    """The ordinal head with a latent and thresholds of its own for each of the 25 columns."""

    def __init__(self, config: VitConfig):
        super().__init__(config, outputs=len(COLUMNS))
        self.rows = list(range(len(COLUMNS)))
        self.thresholds = nn.Parameter(torch.zeros(len(COLUMNS), self.cuts))

    def latents(self, vectors: torch.Tensor) -> torch.Tensor:
        """Latent severities (B, 25, 1) of vectors (B, width)."""
        return self.linear(vectors)[..., None]


def classifier(config: VitConfig) -> predict.Classifier:
    """What notebook 04 trains instead of our network."""
    return predict.Classifier(partial(StudyVit, config), see, augment, mirror_views, shown_planes, complete)


def see(stacks: list[Stack], points: pd.DataFrame, config: VitConfig) -> np.ndarray | None:
    """The grid uint8 (3, l, p, h) of a study; None without a series. Points are not used."""
    return study_grid(stacks, config.size) if stacks else None


def complete(labels: pd.DataFrame) -> pd.DataFrame:
    """The label table of the studies that have all 25 labels."""
    return labels[labels.groupby("study_id")["severity"].transform("min") >= 0]


def augment(
    inputs: np.ndarray, targets: np.ndarray, config: VitConfig, strength: Augmentation, rngs: list[np.random.Generator]
) -> tuple[Seen, np.ndarray]:
    """As `vit.augment.augment`, of grids: half mirrored, columns exchanged; contrast, brightness; series left out."""
    gain, gamma, kept = (np.stack(values) for values in zip(*(draw_series(strength, rng) for rng in rngs), strict=True))
    turned = np.array([rng.random() < 0.5 for rng in rngs])
    order = np.where(turned[:, None], MIRROR, np.arange(len(COLUMNS)))
    grids = np.where(turned[:, None, None, None, None], inputs[:, :, ::-1], inputs)
    images = vary(torch.from_numpy(grids).to(DEVICE).float(), gain * kept, gamma)
    return (images,), np.take_along_axis(targets, order[..., None], axis=1)


def mirror_views(inputs: np.ndarray, config: VitConfig, count: int) -> Iterator[tuple[Seen, list[int]]]:
    """The first `count` views of grids: as they are, then mirrored with the columns of left and right exchanged."""
    for grids, order in ((inputs, range(len(COLUMNS))), (inputs[:, :, ::-1], MIRROR))[:count]:
        yield (torch.from_numpy(np.ascontiguousarray(grids)).to(DEVICE),), list(order)


def shown_planes(
    seen: Seen, study: int, level: int, config: VitConfig
) -> Iterator[tuple[str, np.ndarray, float, tuple]]:
    """As `vit.inputs.shown_slices`, of each series type the middle sagittal plane; extent in voxels, without place."""
    half = config.size / 2
    for kind, grid in zip(SERIES_TYPES, seen[0][study].cpu().numpy(), strict=True):
        yield kind, grid[config.size // 2].T[::-1], np.nan, (-half, half, -half, half)


def load_vits(weights: str | Path, folds: Iterable[int]) -> list[StudyVit]:
    """The trained networks of some folds in a folder of weights; ValueError as `vit.model.load_vit` raises it."""
    models = []
    for fold in folds:
        about, tensors = read_weights(Path(weights) / f"vit3d_fold{fold}.safetensors", StudyVit.__name__)
        models.append(StudyVit(VitConfig(**about["config"])))
        models[-1].load_state_dict(tensors)
    return [model.eval() for model in models]


predict_studies = partial(predict.predict_studies, see=see, views=mirror_views)  # at most two views
