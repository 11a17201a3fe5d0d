"""Augmentation: moved, turned, bent and blurred squares, other contrast, holes, series left out, mixed studies."""

import math
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torchvision.transforms.functional import gaussian_blur

from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.inputs import Seen, cut_views
from lsdc_utils.vit.loss import target_grades
from lsdc_utils.vit.model import KINDS, VitConfig
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVELS, SERIES_TYPES, SIDES, T1, T2

WARP_GRID = 4  # a side: points whose shifts a warp interpolates


@dataclass(frozen=True)
class Augmentation:
    """How strongly training varies what it shows; what is 0 is not drawn."""

    # mm, sd of the shift of each of `SLOTS` to the side, to posterior and to the head; the demo's
    jitter: tuple[tuple[float, float, float], ...] = ((2.0, 1.6, 1.5), *[(2.0, 1.6, 1.9)] * 2, *[(1.5, 1.6, 3.0)] * 2)
    rotation: float = 0.08  # radians, sd of the turn of a slot's slices in their plane
    scale: float = 0.06  # sd of the logarithm of their size
    intensity: float = 0.2  # sd of contrast and of brightness, a series
    drop_series: float = 0.1  # share of series blanked
    recombine: float = 0.4  # share of levels whose right half is another study's
    cut_off: float = 0.0  # sd beyond which turns, sizes and warps are cut off; 0: none, and no check of the margin
    warp: float = 0.0  # pixels, sd of the shifts of a grid of points that bends a slot's slices
    blur: float = 0.0  # pixels, largest sd of a Gaussian, a series
    noise: float = 0.0  # share of 255, largest sd of white noise, a series
    single: bool = False  # whether one slice of each slot is shown, drawn at random
    holes: float = 0.0  # share of slots with a rectangle of an eighth to a half of the side, painted with the mean
    mixup: float = 0.0  # both parameters of the beta distribution of shares by which two studies are mixed

    def bounded(self, rng: np.random.Generator, sd: float, shape: tuple[int, ...]) -> np.ndarray:
        """Normal numbers of deviation `sd`, cut off at `cut_off`."""
        limit = sd * self.cut_off or math.inf
        return rng.normal(0, sd, shape).clip(-limit, limit)

    def alone(self) -> dict[str, "Augmentation"]:
        """Each kind that is set, by its name, without the others; not `recombine`, which leaves left halves alone."""
        none = {name: 0.0 for name in asdict(self)} | {"jitter": ((0.0,) * 3,) * len(SLOTS), "cut_off": self.cut_off}
        kinds = {name: value for name, value in asdict(self).items() if np.any(np.not_equal(value, none[name]))}
        kinds.pop("recombine", None)
        return {name: Augmentation(**none | {name: value}) for name, value in kinds.items()}


def check_margin(config: VitConfig, strength: Augmentation) -> None:
    """ValueError if squares turned, enlarged and bent up to `cut_off` reach beyond the margin, which is black."""
    angle, size = min(strength.rotation * strength.cut_off, math.pi / 4), math.exp(strength.scale * strength.cut_off)
    reach = config.size / 2 * ((math.cos(angle) + math.sin(angle)) * size - 1) + strength.warp * strength.cut_off
    if strength.cut_off and config.margin < reach:
        turned = f"turns of {math.degrees(angle):.0f} degrees and sizes of {size - 1:.0%} reach beyond the squares"
        raise ValueError(f"vit_margin is {config.margin} pixels and {turned}: set {math.ceil(reach)}, or less turn")


def augment(
    inputs: np.ndarray, targets: np.ndarray, config: VitConfig, strength: Augmentation, rngs: list[np.random.Generator]
) -> tuple[Seen, np.ndarray]:
    """A training batch of records and targets (B, 25, 3): what the network sees, and its targets. rngs: one a study, so
    that a batch can be drawn again."""
    check_margin(config, strength)
    series, shifts, turns = [], [], []
    slots, jitter = (len(LEVELS), len(SLOTS)), np.array(strength.jitter)
    # Axial slots lie as high as the level's canal point, so they share what it is off.
    shared = np.minimum(jitter, jitter[0]) * [[kind == T2, kind == T2, kind != T1] for kind, _ in SLOTS]
    for rng in rngs:
        series.append(draw_series(strength, rng))
        common, own = rng.normal(0, 1, (len(LEVELS), 1, 3)), rng.normal(0, 1, (*slots, 3))
        shifts.append(common.clip(-2.5, 2.5) * shared + own.clip(-2.5, 2.5) * np.sqrt(jitter**2 - shared**2))
        angles = strength.bounded(rng, strength.rotation, slots)
        turns.append(np.stack([angles, np.exp(strength.bounded(rng, strength.scale, slots))], axis=-1))
    exchanged = np.array([rng.random(len(LEVELS)) < strength.recombine for rng in rngs])
    bends = (*slots, 2, WARP_GRID, WARP_GRID)
    warps = np.stack([strength.bounded(rng, strength.warp, bends) for rng in rngs]) if strength.warp else None
    inputs, targets = recombined(inputs, targets, exchanged, config.slots)
    kinds = np.take(KINDS, config.slots)
    gain, gamma, kept = (np.stack(drawn)[:, kinds] for drawn in zip(*series, strict=True))
    images, places = cut_views(inputs, config, np.stack(shifts), np.stack(turns), warps)
    for place, rng in zip(places, rngs if strength.single else (), strict=False):
        show_single(place, config.slots, rng)
    images = vary(images.transpose(1, 2), gain, gamma).transpose(1, 2)
    for image, rng in zip(images, rngs, strict=True):
        disturb(image, strength, config.slots, rng)
    blank = torch.from_numpy(~kept).to(places.device)[:, None].expand_as(places)
    seen = images, places.masked_fill(blank, math.nan)
    for k, condition in enumerate(CONDITIONS.values()):  # an exchanged half whose own series is gone: T2 is another's
        if condition.side == SIDES[1]:
            own = config.slots == SLOTS.index((GROUPS[condition.group].series_type, condition.side))
            blind = exchanged & seen[1][..., own].isnan().all(dim=-1).cpu().numpy()
            targets[:, k * len(LEVELS) : (k + 1) * len(LEVELS)][blind] = 0
    if strength.mixup:
        shares = np.array([rng.beta(strength.mixup, strength.mixup) for rng in rngs])
        seen, targets = mixed(seen, targets, np.maximum(shares, 1 - shares), config.head == "ordinal")
    return seen, targets


def recombined(
    inputs: np.ndarray, targets: np.ndarray, exchanged: np.ndarray, slots: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Records and targets of a batch; where `exchanged` (B, 5), a level's right half comes from the next study of the
    batch, so that one side tells nothing of the other. slots (n,): of a level's images.

    T2, which shows both halves, stays, and the canal has a label only where both studies have the same grade.
    """
    inputs, right = inputs.copy(), np.array([side == SIDES[1] for _, side in SLOTS])[slots]
    for name in inputs.dtype.names:
        own, other = inputs[name], np.roll(inputs[name], -1, axis=0)
        takes = (exchanged[..., None] & right).reshape(*exchanged.shape, -1, *[1] * (own.ndim - 3))
        inputs[name] = np.where(takes, other, own)
    other, takes = np.roll(targets, -1, axis=0), np.tile(exchanged, len(CONDITIONS))
    side_of = np.repeat([c.side or "" for c in CONDITIONS.values()], len(LEVELS))
    result = np.where((takes & (side_of == SIDES[1]))[..., None], other, targets)
    result[takes & (side_of == "") & (target_grades(targets) != target_grades(other))] = 0
    return inputs, result


def mixed(seen: Seen, targets: np.ndarray, shares: np.ndarray, ordered: bool) -> tuple[Seen, np.ndarray]:
    """What is seen of a batch, and its targets, mixed with the next study: `shares` (B,), .5 to 1, of a study's own
    (mixup; Zhang et al., ICLR 2018). A slice that either study lacks stays as it is.

    A missing label leaves out its part. ordered: rows whose grades lie more than one apart get no label, since their
    mixture is not a grade between.
    """
    (images, places), own = seen, torch.from_numpy(shares).to(seen[0])[:, None, None]
    moved = own * places + (1 - own) * places.roll(-1, 0)
    both, own = ~moved.isnan(), own[..., None, None]
    images = torch.where(both[..., None, None], own * images + (1 - own) * images.roll(-1, 0), images)
    other, own = np.roll(targets, -1, axis=0), shares[:, None, None].astype(np.float32)
    result, grades, others = own * targets + (1 - own) * other, target_grades(targets), target_grades(other)
    far = (np.minimum(grades, others) == 0) & (np.maximum(grades, others) == 2) & (shares < 1)[:, None]
    result[far & ordered] = 0
    return (images, torch.where(both, moved, places)), result


def disturb(image: torch.Tensor, strength: Augmentation, slots: np.ndarray, rng: np.random.Generator) -> None:
    """Blur a study's squares (5, n, h, w), add noise and paint holes, in place. Images of one of `slots` (n,) share the
    place of a hole."""
    size, kinds = image.shape[-1], np.take(KINDS, slots)
    if strength.blur:
        radius = min(math.ceil(3 * strength.blur), size - 1)
        for kind, sd in enumerate(rng.uniform(1e-3, strength.blur, len(SERIES_TYPES))):
            image[:, kinds == kind] = gaussian_blur(image[:, kinds == kind], 2 * radius + 1, float(sd))
    if strength.noise:
        drawn = torch.Generator(image.device).manual_seed(int(rng.integers(2**62)))
        sd = torch.from_numpy(255 * rng.uniform(0, strength.noise, len(SERIES_TYPES))[kinds, None, None]).to(image)
        image += sd * torch.randn(image.shape, generator=drawn, device=image.device)
    for level, slot in np.argwhere(rng.random((len(LEVELS), len(SLOTS))) < strength.holes) if strength.holes else ():
        sides = rng.integers(max(size // 8, 1), size // 2 + 1, 2)
        starts = rng.integers(size - sides + 1)
        rows, cols = map(slice, starts, starts + sides)
        own = torch.from_numpy(np.flatnonzero(slots == slot))
        image[level, own, rows, cols] = image[level, own].mean(dim=(1, 2), keepdim=True)


def show_single(places: torch.Tensor, slots: np.ndarray, rng: np.random.Generator) -> None:
    """Leave, of a study's places (5, n), one of each slot's, drawn at random, in place. slots (n,)."""
    for level, slot in np.ndindex(len(LEVELS), len(SLOTS)):
        there = np.flatnonzero((slots == slot) & ~places[level].isnan().cpu().numpy())
        places[level, there[there != rng.choice(there)] if len(there) else there] = math.nan


def draw_series(strength: Augmentation, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each series type of a study its gain, its gamma and whether it is kept."""
    gain, gamma = np.exp(rng.normal(0, strength.intensity, (2, len(SERIES_TYPES))))
    return gain, gamma, rng.random(len(SERIES_TYPES)) >= strength.drop_series


def vary(images: torch.Tensor, gain: np.ndarray, gamma: np.ndarray) -> torch.Tensor:
    """Grey values (n, k, a, b, c) raised to `gamma` (n, k) as shares of 255, times `gain` (n, k)."""
    gain, gamma = (torch.from_numpy(x).float().to(images.device)[:, :, None, None, None] for x in (gain, gamma))
    return (images / 255).clamp(min=1e-6).pow(gamma) * gain * 255
