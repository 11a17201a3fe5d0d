"""Augmentation: shifted and turned squares, other contrast, series left out, right halves of levels exchanged."""

import math
from dataclasses import dataclass

import numpy as np
import torch

from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.inputs import Seen, cut_views
from lsdc_utils.vit.model import KINDS, VitConfig
from lsdc_utils.vocabulary import CONDITIONS, LEVELS, MISSING, SERIES_TYPES, SIDES, T1, T2


@dataclass(frozen=True)
class Augmentation:
    """How strongly training varies what it shows."""

    # mm, sd of the shift of each of `SLOTS` to the side, to posterior and to the head; the demo's
    jitter: tuple[tuple[float, float, float], ...] = ((2.0, 1.6, 1.5), *[(2.0, 1.6, 1.9)] * 2, *[(1.5, 1.6, 3.0)] * 2)
    rotation: float = 0.08  # radians, sd of the turn of a slot's slices in their plane
    scale: float = 0.06  # sd of the logarithm of their size
    intensity: float = 0.2  # sd of contrast and of brightness, a series
    drop_series: float = 0.1  # share of series blanked
    recombine: float = 0.4  # share of levels whose right half is another study's


def augment(
    inputs: np.ndarray, labels: np.ndarray, config: VitConfig, strength: Augmentation, rngs: list[np.random.Generator]
) -> tuple[Seen, np.ndarray]:
    """A training batch of records and labels (B, 25): what the network sees, and its labels. rngs: one a study, so that
    a batch can be drawn again."""
    series, shifts, turns = [], [], []
    slots, jitter = (len(LEVELS), len(SLOTS)), np.array(strength.jitter)
    # Axial slots lie as high as the level's canal point, so they share what it is off.
    shared = np.minimum(jitter, jitter[0]) * [[kind == T2, kind == T2, kind != T1] for kind, _ in SLOTS]
    for rng in rngs:
        series.append(draw_series(strength, rng))
        common, own = rng.normal(0, 1, (len(LEVELS), 1, 3)), rng.normal(0, 1, (*slots, 3))
        shifts.append(common.clip(-2.5, 2.5) * shared + own.clip(-2.5, 2.5) * np.sqrt(jitter**2 - shared**2))
        angles = rng.normal(0, strength.rotation, slots)
        turns.append(np.stack([angles, np.exp(rng.normal(0, strength.scale, slots))], axis=-1))
    exchanged = np.array([rng.random(len(LEVELS)) < strength.recombine for rng in rngs])
    inputs, labels = recombined(inputs, labels, exchanged)
    gain, gamma, kept = (np.stack(drawn)[:, KINDS].repeat(config.slices, axis=1) for drawn in zip(*series, strict=True))
    images, places = cut_views(inputs, config, np.stack(shifts), np.stack(turns))
    images = vary(images.transpose(1, 2), gain, gamma).transpose(1, 2)
    blank = torch.from_numpy(~kept).to(places.device)[:, None].expand_as(places)
    return (images, places.masked_fill(blank, math.nan)), labels


def recombined(inputs: np.ndarray, labels: np.ndarray, exchanged: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Records and labels of a batch; where `exchanged` (B, 5), a level's right half comes from the next study of the
    batch, so that one side tells nothing of the other.

    T2, which shows both halves, stays, and the canal has a label only where both studies have the same.
    """
    inputs, k = inputs.copy(), inputs["places"].shape[2] // len(SLOTS)
    right = np.repeat([side == SIDES[1] for _, side in SLOTS], k)
    for name in inputs.dtype.names:
        own, other = inputs[name], np.roll(inputs[name], -1, axis=0)
        takes = (exchanged[..., None] & right).reshape(*exchanged.shape, -1, *[1] * (own.ndim - 3))
        inputs[name] = np.where(takes, other, own)
    other, takes = np.roll(labels, -1, axis=0), np.tile(exchanged, len(CONDITIONS))
    side_of = np.repeat([c.side or "" for c in CONDITIONS.values()], len(LEVELS))
    mixed = np.where(takes & (side_of == SIDES[1]), other, labels)
    mixed[takes & (side_of == "") & (labels != other)] = MISSING
    return inputs, mixed


def draw_series(strength: Augmentation, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each series type of a study its gain, its gamma and whether it is kept."""
    gain, gamma = np.exp(rng.normal(0, strength.intensity, (2, len(SERIES_TYPES))))
    return gain, gamma, rng.random(len(SERIES_TYPES)) >= strength.drop_series


def vary(images: torch.Tensor, gain: np.ndarray, gamma: np.ndarray) -> torch.Tensor:
    """Grey values (n, k, a, b, c) raised to `gamma` (n, k) as shares of 255, times `gain` (n, k)."""
    gain, gamma = (torch.from_numpy(x).float().to(images.device)[:, :, None, None, None] for x in (gain, gamma))
    return (images / 255).clamp(min=1e-6).pow(gamma) * gain * 255
