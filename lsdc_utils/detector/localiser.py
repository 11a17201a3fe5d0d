"""The localiser: a small network that finds discs of any level on whole sagittal slices of any contrast.

It tells the lumbosacral disc, which looks like no other, and a few marks; `chain` names the rest by counting from it.
Slices are seen at `SPACING`, so that neither the field of view nor the matrix matters. Coordinates are LPS mm.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from lsdc_utils import checkpoint, geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.classes import DetectorError
from lsdc_utils.vocabulary import LEVELS

SPACING = 2.0  # mm a pixel
STRIDE = 2  # pixels of a slice to one of the maps
SIDE = 160  # pixels a side of a training image
MARKS = ("l5_s1", "s1_s2", "sacrum")  # of their own: the lumbosacral disc, S1/S2, the sacrum at S2/S3
# A lumbosacral disc that is neither free nor fused, and the tip of the cord. Their scores are not read: they do not
# tell which studies have one, or where the cord ends (tests/proofs/numbering.py). `numbering` measures discs.
DOUBTS = ("transitional", "conus")
MAPS = ("disc", *MARKS, *DOUBTS, "canal")  # the middle of a disc of any level; behind it, where shown, the canal
PEAKS = ("disc", "s1_s2", "conus", "canal")  # maps whose peaks are detections
DISC_DEPTH = {"": 24.0, "s1_s2": 14.0, "sacrum": 10.0}  # mm from a canal point to the middle of its disc
SPREAD = 1.2  # pixels of a map: sigma of a target
ABOVE, BELOW = ("t12_l1", "t11_t12"), ("s1_s2", "sacrum")  # marks beyond the levels: discs, and none
REACH = 26.0  # mm off the canal in which a slice shows the bodies
CANAL_NEAR = (5.0, 9.0)  # mm off the canal's point up to which a slice shows it, and from which it does not
KEPT = 24  # detections of a slice
CALIBRATION = (1.0, 0.98)  # of the names, see `chain.calibrate`, before it is fitted


@dataclass(frozen=True)
class LocaliserConfig:
    """Channels of the network at 4, 8, 16 and 32 mm a pixel."""

    widths: tuple[int, ...] = (16, 40, 80, 112)


class Localiser(nn.Module):
    """Slices (n, 1, h, w) from 0 to 1, sides multiples of 16 -> logits (n, maps, h / 2, w / 2)."""

    def __init__(self, config: LocaliserConfig) -> None:
        super().__init__()
        self.config, self.calibration, self.trained = config, CALIBRATION, (True,) * len(MAPS)
        first, last, pairs = config.widths[0], config.widths[-1], list(pairwise(config.widths))
        self.stem = _block(1, first, stride=2, kernel=5)
        self.down = nn.ModuleList(nn.Sequential(_block(a, b, stride=2), _block(b, b)) for a, b in pairs)
        self.wide = nn.Sequential(_block(last, last, dilation=2), _block(last, last, dilation=3))
        self.up = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairs[::-1])
        self.join = nn.ModuleList(_block(a, a) for a, _ in pairs[::-1])
        self.head = nn.Conv2d(first, len(MAPS), 3, padding=1)
        nn.init.constant_(self.head.bias, -4.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the maps."""
        seen = [self.stem(images)]
        for down in self.down:
            seen.append(down(seen[-1]))
        x = seen.pop()
        x = x + self.wide(x)
        for up, join in zip(self.up, self.join, strict=True):
            x = join(F.interpolate(up(x), scale_factor=2.0, mode="nearest") + seen.pop())
        return self.head(x)


def _block(a: int, b: int, stride: int = 1, kernel: int = 3, dilation: int = 1) -> nn.Sequential:
    pad = dilation * (kernel // 2)
    conv = nn.Conv2d(a, b, kernel, stride, pad, dilation, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(b), nn.ReLU(inplace=True))


def coarse(stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """A sagittal series at `SPACING`: slices (n, h, w) uint8 and affines (n, 4, 4)."""
    across, down = np.median(geometry.spacing(stack.affines), axis=0)
    rows, cols = (max(round(n * mm / SPACING), 1) for n, mm in zip(stack.pixels.shape[1:], (down, across), strict=True))
    pixels = np.stack([cv2.resize(image, (cols, rows), interpolation=cv2.INTER_AREA) for image in stack.pixels])
    affines, factor = stack.affines.copy(), np.array(stack.pixels.shape[:0:-1]) / (cols, rows)
    affines[:, :3, 3] += (affines[:, :3, :2] * (factor - 1) / 2).sum(axis=2)  # centre of the first pixel
    affines[:, :3, :2] *= factor
    return pixels, affines


@dataclass(frozen=True)
class Sample:
    """A slice to learn from."""

    image: np.ndarray  # (h, w) uint8 at SPACING
    points: np.ndarray  # (k, 2) pixels: x, y of the places in `maps`
    maps: np.ndarray  # (k,) number of the map of each point
    known: np.ndarray  # (maps,) bool: whether the map is known at all
    rows: np.ndarray  # (h,) bool: rows where all discs are known


def disc_places(curve: np.ndarray, names: Sequence[str], sign: float = -1.0) -> np.ndarray:
    """Middles (n, 3) of the discs `names`, head to foot, from their canal points (n, 3), LPS mm; sign 1: the way back.

    It is `DISC_DEPTH` to the front (back), at right angles to the curve in the sagittal plane.
    """
    along = np.gradient(curve[:, 1:], axis=0) if len(curve) > 1 else np.tile([0.0, -1.0], (len(curve), 1))
    depth = np.array([DISC_DEPTH.get(name, DISC_DEPTH[""]) for name in names], dtype=float)
    back = np.column_stack([np.zeros(len(curve)), -along[:, 1], along[:, 0]])
    return curve + sign * depth[:, None] * geometry.unit(back)


def samples(stack: Stack, canal: pd.DataFrame, marks: pd.DataFrame) -> Iterator[Sample]:
    """The slices of a series that show the spine. canal: points of the study's levels (level, X, Y, Z); marks: of this
    series (mark, X, Y, Z), or none."""
    images, affines = coarse(stack)
    places = dict(zip(canal["level"], canal[[*"XYZ"]].to_numpy(float), strict=True))
    places |= dict(zip(marks["mark"], marks[[*"XYZ"]].to_numpy(float), strict=True))
    tip = np.reshape(places.get("conus", []), (-1, 3))
    order = (*ABOVE[::-1], *LEVELS, *BELOW)
    names = [name for name in order if name in places]
    curve = np.array([places[name] for name in names])
    middles = disc_places(curve, names)
    discs, number = ~np.isin(names, BELOW), np.array([order.index(name) for name in names])
    single = {name: names.index(name) for name in MARKS if name in places}
    if "transitional" in places:
        single["transitional"] = int(np.linalg.norm(curve - places["transitional"], axis=1).argmin())
    for index in np.flatnonzero(np.abs(geometry.plane_distances(affines, curve.mean(axis=0)[None])[:, 0]) <= REACH):
        behind, within = (geometry.to_pixels(affines[index], points) for points in (curve, middles))
        if (np.diff(within[:, 1]) <= 0).any():  # a slice on its head, or labels out of order
            continue
        line = np.arange(images.shape[1])
        which = np.interp(line, within[:, 1], number)
        steps = np.polyfit(within[:, 1], number, 1)[0] * (line - np.clip(line, within[0, 1], within[-1, 1]))
        which = np.rint(which + steps)
        rows = np.isin(which, number) | ((which > number[discs].max()) & ("l5_s1" in places))
        points = {"disc": within[discs], **{name: within[[k]] for name, k in single.items()}}
        for name, at in (("conus", geometry.to_pixels(affines[index], tip)), ("canal", behind[discs])):
            points[name] = at[np.abs(at[:, 2]) <= CANAL_NEAR[0]]
        sees = not CANAL_NEAR[0] < np.abs(behind[discs, 2]).mean() < CANAL_NEAR[1]
        known = [True, *(name in places for name in MARKS), len(marks) > 0, len(tip) > 0 and sees, sees]
        of_map = np.repeat([MAPS.index(name) for name in points], [len(part) for part in points.values()])
        yield Sample(images[index], np.concatenate([*points.values()])[:, :2], of_map, np.array(known), rows)


def augmented(
    sample: Sample, rng: np.random.Generator, frames: float = 1.0, greys: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A sample in a random frame and contrast: image (SIDE, SIDE) from 0 to 1, maps and their weights, float32.

    frames: factor of all changes of the frame, 0 for none; greys: whether contrast and noise change.
    """
    size, turn = np.exp(frames * rng.uniform(-0.4, 0.4)), frames * np.deg2rad(rng.uniform(-12, 12))
    turned = size * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle = sample.points[sample.maps == 0].mean(axis=0)
    shift = SIDE / 2 + frames * rng.uniform(-32, 32, 2) - turned @ middle
    matrix = np.column_stack([turned, shift])
    image = cv2.warpAffine(sample.image, matrix, (SIDE, SIDE), flags=cv2.INTER_LINEAR)
    layers = np.repeat(np.stack([sample.rows, np.full(len(sample.rows), True)], -1)[:, None], sample.image.shape[1], 1)
    layers = cv2.warpAffine(layers.astype(np.uint8), matrix, (SIDE, SIDE), flags=cv2.INTER_NEAREST)
    rows, shown = np.moveaxis(layers, -1, 0)
    rows |= 1 - shown
    if rng.random() < 0.3 * frames:  # a narrower field of view
        (top, left), (bottom, right) = rng.integers(0, SIDE // 4, 2), SIDE - rng.integers(0, SIDE // 4, 2)
        inside = np.zeros_like(shown)
        inside[top:bottom, left:right] = 1
        shown, image = shown & inside, image * inside
    points = sample.points @ turned.T + shift
    target, grid = np.zeros((len(MAPS), SIDE // STRIDE, SIDE // STRIDE), np.float32), np.arange(SIDE // STRIDE)
    at = np.rint(points).astype(int)
    seen = ((at >= 0) & (at < SIDE)).all(axis=1)
    seen[seen] = shown[at[seen, 1], at[seen, 0]] > 0  # what the image does not show is nowhere
    for number, place in zip(sample.maps[seen], (points[seen] + 0.5) / STRIDE - 0.5, strict=True):
        across, down = np.exp(-0.5 * ((grid - place[:, None]) / SPREAD) ** 2)
        np.maximum(target[number], np.outer(down, across), out=target[number])
    weight = np.broadcast_to(sample.known[:, None, None], target.shape).astype(np.float32).copy()
    weight[[MAPS.index("disc"), MAPS.index("canal")]] *= rows[STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]
    return _recoloured(image, rng) if greys else image.astype(np.float32) / 255, target, weight


def _recoloured(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Other greys: half of the images get any curve of grey, order included, the others a rising one."""
    knots = rng.uniform(0, 1, 9)
    if rng.random() < 0.5:
        curve = np.interp(np.arange(256), np.linspace(0, 255, 9), knots)
        curve[:8] *= np.linspace(0, 1, 8)  # air stays dark
    else:
        rising = np.concatenate([[0], np.cumsum(knots)]) / knots.sum()
        curve = np.interp(np.arange(256), np.linspace(0, 255, 10), rising)
    image = curve.astype(np.float32)[image]
    field = cv2.resize(rng.uniform(0.55, 1.45, (3, 3)).astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    image = image * field
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.3, 1.2))
    noise = rng.standard_normal(image.shape, dtype=np.float32)
    if rng.random() < 0.5:
        noise = cv2.GaussianBlur(noise, (0, 0), 0.8) * 2
    return np.clip(image + noise * rng.uniform(0, 0.08), 0, 1.5)


def loss(logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of maps, focal: each pixel counts by the square of its error."""
    share = logits.sigmoid()
    each = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * (share - target).detach() ** 2
    return (each * weight * (1 + 9 * target)).sum() / weight.sum() * 100


@torch.inference_mode()
def detect_discs(network: Localiser, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Detections of a sagittal series: LPS points (n, k, 3) and scores (n, k, maps), 0 where a slice has fewer."""
    images, affines = coarse(stack)
    images = np.pad(images, ((0, 0), *((0, -side % 16) for side in images.shape[1:])))
    device = next(network.parameters()).device
    maps = network(torch.from_numpy(images)[:, None].to(device).float() / 255).sigmoid()
    maps = maps * torch.tensor(network.trained, device=device)[:, None, None]
    found = maps[:, [MAPS.index(name) for name in PEAKS]].amax(dim=1, keepdim=True)
    width = found.shape[3]
    peaks = torch.where(F.max_pool2d(found, 3, 1, 1) == found, found, 0).flatten(1)
    strength, index = peaks.topk(min(KEPT, peaks.shape[1]), dim=1)
    around = F.max_pool2d(maps, 3, 1, 1).flatten(2)
    scores = around.gather(2, index[:, None].expand(-1, len(MAPS), -1)).transpose(1, 2) * (strength > 0)[..., None]
    # A peak lies at the mean of its 3 x 3 pixels, by squared score.
    near = F.unfold(F.pad(found, (1, 1, 1, 1)), 3).gather(2, index[:, None].expand(-1, 9, -1)) ** 2
    near = (near / near.sum(dim=1, keepdim=True).clamp(min=1e-12)).reshape(len(images), 3, 3, -1)
    step = torch.arange(-1.0, 2.0, device=device)
    x = index % width + (near.sum(dim=1) * step[:, None]).sum(dim=1)
    y = index // width + (near.sum(dim=2) * step[:, None]).sum(dim=1)
    pixels = (torch.stack([x, y], dim=2).cpu().numpy() + 0.5) * STRIDE - 0.5
    return geometry.to_patient(affines[:, None], pixels), scores.cpu().numpy()


def save_localiser(network: Localiser, path: str | Path, fold: int, about: dict) -> None:
    """Write the weights as safetensors and beside them a .json that says what they are and, by `about`, how they came
    to be."""
    about = {
        "model": "localiser",
        "fold": fold,
        "config": asdict(network.config),
        "calibration": list(network.calibration),
        "maps": list(MAPS),
        "trained": list(network.trained),  # whether a map had labels or marks to learn from
        **about,
    }
    checkpoint.save_weights(network, path, about)


def load_localiser(path: str | Path) -> Localiser:
    """The network that `save_localiser` wrote; ValueError if weights and JSON do not belong together."""
    about = checkpoint.described(Path(path))
    if about["maps"] != list(MAPS):
        raise DetectorError(f"{path} finds other marks than this version of lsdc_utils")
    network = Localiser(LocaliserConfig(tuple(about["config"]["widths"])))
    network.load_state_dict(load_file(path))
    network.calibration, network.trained = tuple(about["calibration"]), tuple(about["trained"])
    return network.eval().to("cuda" if torch.cuda.is_available() else "cpu")
