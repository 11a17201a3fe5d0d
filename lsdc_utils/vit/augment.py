"""Augmentation: shifted and turned squares, other contrast and brightness, series left out.

All is drawn by one generator a study, so a batch is the same whenever and wherever it is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.inputs import Seen, cut_views
from lsdc_utils.vit.model import KINDS, VitConfig
from lsdc_utils.vocabulary import COLUMNS, LEVELS, SERIES_TYPES


@dataclass(frozen=True)
class Augmentation:
    """How strongly training varies what it shows."""

    jitter: tuple[float, float, float] = (2.3, 1.6, 1.6)  # mm, sd of a level's shift to the left, posterior and head
    rotation: float = 0.08  # radians, sd of the turn of a slot's slices in their plane
    scale: float = 0.06  # sd of the logarithm of their size
    intensity: float = 0.15  # sd of contrast and of brightness, a series
    drop_series: float = 0.05  # share of series blanked


def augment(
    inputs: np.ndarray,
    labels: np.ndarray,
    config: VitConfig,
    strength: Augmentation,
    rngs: Sequence[np.random.Generator],
    device: torch.device | str = "cpu",
) -> tuple[Seen, np.ndarray, np.ndarray]:
    """A training batch of records and labels (B, 25): what the network sees, the labels, and for each study the order
    (B, 25) in which columns are taken, which stays as it is. rngs: one for each study."""
    series, slots = zip(*((draw_series(strength, rng), _draw_slots(strength, rng)) for rng in rngs), strict=True)
    gain, gamma, kept = (
        np.stack(values)[:, KINDS].repeat(config.slices, axis=1) for values in zip(*series, strict=True)
    )
    shifts, turns = (np.stack(values) for values in zip(*slots, strict=True))
    images, places = cut_views(inputs, config, shifts, turns, device)
    images = vary(images.transpose(1, 2), gain, gamma).transpose(1, 2)
    blank = torch.from_numpy(~kept).to(device)[:, None].expand_as(places)
    return (images, places.masked_fill(blank, math.nan)), labels, np.tile(np.arange(len(COLUMNS)), (len(inputs), 1))


def draw_series(strength: Augmentation, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each series type of a study its gain, its gamma and whether it is kept."""
    gain, gamma = np.exp(rng.normal(0, strength.intensity, (2, len(SERIES_TYPES))))
    return gain, gamma, rng.random(len(SERIES_TYPES)) >= strength.drop_series


def _draw_slots(strength: Augmentation, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Shifts (5, 3) of a study's levels in mm, and turns (5, slots, 2) in radians and relative size."""
    rng.random()  # not used; so a seed trains the same weights as in earlier versions
    shifts = rng.normal(0, 1, (len(LEVELS), 3)).clip(-2.5, 2.5) * strength.jitter
    slots = (len(LEVELS), len(SLOTS))
    turns = np.stack([rng.normal(0, strength.rotation, slots), np.exp(rng.normal(0, strength.scale, slots))], axis=-1)
    return shifts, turns


def vary(images: torch.Tensor, gain: np.ndarray, gamma: np.ndarray) -> torch.Tensor:
    """Grey values (n, k, a, b, c) raised to `gamma` (n, k) as shares of 255, times `gain` (n, k)."""
    gain, gamma = (torch.from_numpy(x).float().to(images.device)[:, :, None, None, None] for x in (gain, gamma))
    return (images / 255).clamp(min=1e-6).pow(gamma) * gain * 255
