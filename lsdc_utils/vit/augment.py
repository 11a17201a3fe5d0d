"""Augmentation: shifted and turned squares, other contrast and brightness, series left out."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.inputs import Seen, cut_views
from lsdc_utils.vit.model import KINDS, VitConfig
from lsdc_utils.vocabulary import AXIAL, COLUMNS, LEVELS, SERIES_TYPES


@dataclass(frozen=True)
class Augmentation:
    """How strongly training varies what it shows."""

    # mm, sd of the shift of each of `SLOTS` to the side, to posterior and to the head; the demo's
    jitter: tuple[tuple[float, float, float], ...] = ((2.0, 1.6, 1.5), *[(2.6, 2.1, 2.4)] * 2, *[(1.5, 1.6, 3.0)] * 2)
    rotation: float = 0.08  # radians, sd of the turn of a slot's slices in their plane
    scale: float = 0.06  # sd of the logarithm of their size
    intensity: float = 0.15  # sd of contrast and of brightness, a series
    drop_series: float = 0.05  # share of series blanked


def augment(
    inputs: np.ndarray, labels: np.ndarray, config: VitConfig, strength: Augmentation, rngs: list[np.random.Generator]
) -> tuple[Seen, np.ndarray, np.ndarray]:
    """A training batch of records and labels (B, 25): what the network sees, the labels, and for each study the order
    (B, 25) in which columns are taken, which stays as it is. rngs: one a study, so that a batch can be drawn again."""
    series, shifts, turns = [], [], []
    slots, jitter = (len(LEVELS), len(SLOTS)), np.array(strength.jitter)
    # Slots hang on the level's canal point, axial ones by their height alone, so they share what it is off.
    shared = np.minimum(jitter, jitter[0]) * [[kind != AXIAL, kind != AXIAL, True] for kind, _ in SLOTS]
    for rng in rngs:
        series.append(draw_series(strength, rng))
        common, own = rng.normal(0, 1, (len(LEVELS), 1, 3)), rng.normal(0, 1, (*slots, 3))
        shifts.append(common.clip(-2.5, 2.5) * shared + own.clip(-2.5, 2.5) * np.sqrt(jitter**2 - shared**2))
        angles = rng.normal(0, strength.rotation, slots)
        turns.append(np.stack([angles, np.exp(rng.normal(0, strength.scale, slots))], axis=-1))
    gain, gamma, kept = (np.stack(drawn)[:, KINDS].repeat(config.slices, axis=1) for drawn in zip(*series, strict=True))
    images, places = cut_views(inputs, config, np.stack(shifts), np.stack(turns))
    images = vary(images.transpose(1, 2), gain, gamma).transpose(1, 2)
    blank = torch.from_numpy(~kept).to(places.device)[:, None].expand_as(places)
    return (images, places.masked_fill(blank, math.nan)), labels, np.tile(np.arange(len(COLUMNS)), (len(inputs), 1))


def draw_series(strength: Augmentation, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each series type of a study its gain, its gamma and whether it is kept."""
    gain, gamma = np.exp(rng.normal(0, strength.intensity, (2, len(SERIES_TYPES))))
    return gain, gamma, rng.random(len(SERIES_TYPES)) >= strength.drop_series


def vary(images: torch.Tensor, gain: np.ndarray, gamma: np.ndarray) -> torch.Tensor:
    """Grey values (n, k, a, b, c) raised to `gamma` (n, k) as shares of 255, times `gain` (n, k)."""
    gain, gamma = (torch.from_numpy(x).float().to(images.device)[:, :, None, None, None] for x in (gain, gamma))
    return (images / 255).clamp(min=1e-6).pow(gamma) * gain * 255
