"""Where a model looks: how much its answer changes when a small ball of the patient is hidden, place by place.

A ball is painted over with its slice's mean grey, on a cubic lattice round a place for a transformer and on a square
one in the nearest slice for a detector. Measured: the share of the change of log odds within `NEAR` of it (Zeiler
and Fergus, ECCV 2014), and whether the largest lies there (Zhang et al., IJCV 2018); the baseline is `shuffled`.
"""

import copy
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.classes import Detector
from lsdc_utils.detector.detections import forward, patient_points
from lsdc_utils.detector.images import network_inputs, windows
from lsdc_utils.vit.inputs import cuts, study_input
from lsdc_utils.vit.model import Vit3d, VitConfig
from lsdc_utils.vit.predict import probabilities
from lsdc_utils.vocabulary import COLUMNS, GROUPS, LEVELS

BALL = 6.0  # mm, radius
LATTICE = 10.0  # mm from ball to ball
NEAR = 10.0  # mm from the place that count as there
REACH = {"vit3d": 20.0, "yolo": 40.0}  # mm from the place to the last ball along each axis
EVIDENCE = 12.0  # mm from the place: detections that count as its evidence
FLOOR = 1e-6  # of probabilities and scores before a logarithm
NOTHING = pd.DataFrame({"off": np.empty(0), "change": np.empty(0)})  # of a study that a model cannot grade


def shuffled(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy of a network with the numbers of each of its tensors in random order."""
    mixed, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in mixed.parameters():
            flat = parameter.detach().reshape(-1)
            parameter.copy_(flat[torch.randperm(flat.numel(), generator=generator)].reshape(parameter.shape))
    return mixed


def lattice(place: np.ndarray, axes: np.ndarray, reach: float) -> np.ndarray:
    """Centres (m, 3) of balls: `LATTICE` mm apart along unit vectors (k, 3), as far as `reach` from a place (3,)."""
    steps = np.arange(-reach, reach + 1e-6, LATTICE)
    grid = np.stack(np.meshgrid(*[steps] * len(axes), indexing="ij"), -1).reshape(-1, len(axes))
    return place + grid @ axes


def hidden(images: np.ndarray, places: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Images uint8 (..., rows, cols) of pixels at places (..., rows, cols, 3) without the ball at a centre (3,)."""
    inside = ((places - centre) ** 2).sum(axis=-1) <= BALL**2
    grey = images.mean(axis=(-2, -1), keepdims=True).round().astype(images.dtype)
    return np.where(inside, grey, images)


def look_vit(
    model: Vit3d, stacks: list[Stack], points: pd.DataFrame, row: tuple[str, str], place: np.ndarray
) -> pd.DataFrame:
    """How hiding each ball round a place (3,) changes a transformer's answer for a row: off (mm from it), change.
    Empty where the study cannot be graded. points: its detected canal points and recesses."""
    record = study_input(stacks, points, model.config)
    if record is None:
        return NOTHING
    centres, places = lattice(place, np.eye(3), REACH["vit3d"]), _pixel_places(stacks, points, model.config)
    inputs = np.repeat(record[None], 1 + len(centres), axis=0)
    inputs["places"][:, [level != row[1] for level in LEVELS]] = np.nan  # levels are graded apart from each other
    for images, centre in zip(inputs["images"][1:], centres, strict=True):
        images[:] = hidden(images, places, centre)
    return _changes(centres - place, probabilities([model], inputs, batch=16)[:, COLUMNS.index("_".join(row))])


def _pixel_places(stacks: list[Stack], points: pd.DataFrame, config: VitConfig) -> np.ndarray:
    """LPS mm (5, n, h, w, 3) of every pixel of what `study_input` gives, NaN where there is no slice."""
    side = config.size + 2 * config.margin
    places = np.full((len(LEVELS), len(config.slots), side, side, 3), np.nan)
    steps = np.arange(side)[:, None]
    for level, k, cut in cuts(stacks, points, config):
        places[level, k] = cut.origin + steps * cut.columns + (steps * cut.rows)[:, None]
    return places


def look_detector(network: Detector, stacks: Sequence[Stack], points: pd.DataFrame, place: np.ndarray) -> pd.DataFrame:
    """As `look_vit`, for a detector's scores near the place, on the slice nearest to it; `off` in its plane."""
    config = network.config
    of_type = [stack for stack in stacks if stack.series_type == GROUPS[config.condition].series_type]
    off = [geometry.plane_distances(stack.affines, place[None])[:, 0] for stack in of_type]
    canal = points[points["side"] == ""]
    if not of_type or canal.empty:
        return NOTHING
    closest = int(np.argmin([np.abs(distances).min() for distances in off]))
    stack, k = of_type[closest], int(np.abs(off[closest]).argmin())
    middle = place - geometry.normals(stack.affines[k]) * off[closest][k]
    centres = lattice(middle, geometry.unit(stack.affines[k, :3, :2].T), REACH["yolo"])
    rows, cols = config.size
    shares = np.stack(np.meshgrid((np.arange(cols) + 0.5) / cols, (np.arange(rows) + 0.5) / rows), -1)
    where = stack.affines[[k]], windows(stack, config, canal)[[k]]
    places = patient_points(*where, shares.reshape(1, -1, 2)).reshape(rows, cols, 3)
    image = network_inputs(stack, config, canal)[k]
    images = np.stack([image, *(hidden(image, places, centre) for centre in centres)])
    spots, scores = forward(network, images, 1.0, False)
    points = patient_points(*where, spots)
    near = np.linalg.norm(points - middle, axis=-1) <= EVIDENCE  # (1 + m, detections)
    return _changes(centres - middle, (scores * near[..., None]).sum(axis=1))


def attention(changes: pd.DataFrame) -> dict[str, float]:
    """Of changes: `share` within `NEAR`, `hit` (is the largest there?), `chance` (share of balls there); or NaN."""
    near, total = (changes["off"] <= NEAR + 1e-3).to_numpy(), changes["change"].sum()
    if not total:
        return {"share": np.nan, "hit": np.nan, "chance": np.nan}
    share = changes.loc[near, "change"].sum() / total
    return {"share": float(share), "hit": float(near[changes["change"].argmax()]), "chance": float(near.mean())}


def _changes(offsets: np.ndarray, numbers: np.ndarray) -> pd.DataFrame:
    """`off` (mm) of balls at offsets (m, 3), `change` of log odds from scores (1 + m, 3), the unchanged image first."""
    odds = np.log((numbers[:, 1:].sum(axis=1) + FLOOR) / (numbers[:, 0] + FLOOR))
    return pd.DataFrame({"off": np.linalg.norm(offsets, axis=1), "change": np.abs(odds[1:] - odds[0])})
