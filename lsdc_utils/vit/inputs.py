"""What the network sees of a study: squares and their centres, labels as arrays, and shifted views."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from lsdc_utils.data.stacks import Stack
from lsdc_utils.vit.crops import AXIAL_MIDDLE, FORAMEN, LATERAL, SAGITTAL_MIDDLE, SLOTS, level_frames, level_slices
from lsdc_utils.vit.model import VitConfig
from lsdc_utils.vocabulary import AXIAL, COLUMNS, CONDITIONS, LEVELS, MISSING, SERIES_TYPES, SIDES, T1

AXES = ("left", "posterior", "head")  # of a level's frame
VIEW_STEP = 1.5  # mm that a view at prediction is shifted
Seen = tuple[torch.Tensor, ...]  # what the network is called with


def study_input(stacks: list[Stack], points: pd.DataFrame, config: VitConfig) -> np.ndarray | None:
    """A record of one study: `images` uint8 (5, slots * n, h, w) with margin, `places` float32 (5, slots * n) in mm.

    points: the study's canal points (level, X, Y, Z in LPS mm, maybe confidence). None without a series or a point.
    """
    if not stacks or points.empty:
        return None
    side = config.size + 2 * config.margin
    images, places = level_slices(stacks, points, side, config.spacing, config.slices)
    record = np.zeros((), dtype=[("images", np.uint8, images.shape), ("places", np.float32, places.shape)])
    record["images"], record["places"] = images, places
    return record


def study_inputs(
    studies: Iterable[tuple[int, list[Stack]]],
    points: pd.DataFrame,
    config: VitConfig,
    see: Callable[..., np.ndarray | None] = study_input,
) -> tuple[list[int], np.ndarray]:
    """Ids (n,) and inputs (n, ...) by `see` of the studies that can be seen, read one by one; points: of all."""
    by_study = dict(list(points.groupby("study_id")))
    ids, inputs = [], []
    for study_id, stacks in studies:
        seen = see(stacks, by_study.get(study_id, points.iloc[:0]), config)
        if seen is not None:
            ids.append(int(study_id))
            inputs.append(seen)
    if not inputs:
        raise ValueError("no study has a readable series and a canal point, so there is nothing to show the network")
    return ids, np.stack(inputs)


def label_matrix(labels: pd.DataFrame, study_ids: Iterable[int]) -> np.ndarray:
    """Severities int8 (n, 25) in COLUMNS order from the tidy label table, -1 where a study has no label."""
    column = labels["condition"] + "_" + labels["level"]
    table = labels.assign(column=column).pivot(index="study_id", columns="column", values="severity")
    return np.array(table.reindex(index=list(study_ids), columns=list(COLUMNS)).fillna(MISSING), dtype=np.int8)


# ---- centres ---------------------------------------------------------------------------------------------------------


def crop_centres(labels: pd.DataFrame, detected: Iterable[pd.DataFrame] = ()) -> pd.DataFrame:
    """Canal points to cut training crops round: study_id, level, X, Y, Z (LPS mm), confidence.

    A study in one of the tables `detected` takes its points from there. These are out of fold, so training meets the
    errors that prediction will meet. Every other study takes the label table's points.
    """
    columns = ["study_id", "level", "X", "Y", "Z", "confidence"]
    tables = [table[columns] for table in detected]
    known = {study for table in tables for study in table["study_id"]}
    clicked = _clicked(labels)
    clicked = clicked[~clicked["study_id"].isin(known)].assign(confidence=1.0)[columns]
    return pd.concat([*tables, clicked], ignore_index=True)


def centre_errors(labels: pd.DataFrame, detected: pd.DataFrame) -> pd.DataFrame:
    """Distances of the readers' canal points from the levels' points that crops are cut round: study_id, level, and mm
    to the left, to posterior and to the head along the canal.

    labels: the label table; detected: canal points of studies. Rows are studies and levels that both have.
    """
    clicked, rows = dict(list(_clicked(labels).groupby("study_id"))), []
    for study, points in detected.groupby("study_id"):
        if study not in clicked:
            continue
        centres, frames = level_frames(points)
        level = clicked[study]["level"].map(LEVELS.index).to_numpy()
        off = np.einsum("nij,nj->ni", frames[level], clicked[study][["X", "Y", "Z"]].to_numpy() - centres[level])
        rows += [(study, LEVELS[k], *mm) for k, mm in zip(level, off, strict=True)]
    return pd.DataFrame(rows, columns=["study_id", "level", *AXES])


def error_spread(errors: pd.DataFrame) -> np.ndarray:
    """Robust standard deviation (3,) of `centre_errors` in mm, NaN where there are none: 1.4826 times the median
    distance, which ignores the few points that were set a level off."""
    return 1.4826 * errors[list(AXES)].astype(float).abs().median().to_numpy()


def _clicked(labels: pd.DataFrame) -> pd.DataFrame:
    """Rows of the label table that have a canal point."""
    return labels[(labels["condition"].map(lambda c: CONDITIONS[c].group) == "scs") & labels["X"].notna()]


# ---- views -----------------------------------------------------------------------------------------------------------


def cut_views(
    inputs: np.ndarray,
    config: VitConfig,
    shifts: np.ndarray,
    turns: np.ndarray | None = None,
    device: torch.device | str = "cpu",
) -> Seen:
    """Images (B, 5, slots * n, h, w) cut from records with margin, and places, of levels moved by `shifts` (B, 5, 3).

    shifts: mm to the left, to posterior and to the head: in the plane the square moves, across it the places of the
    slices do. turns: (B, 5, slots, 2) radians and relative sizes of the squares of a slot's slices.
    """
    shape = (*inputs["places"].shape[:2], len(SLOTS), config.slices)
    turns = np.broadcast_to((0.0, 1.0), (*shape[:3], 2)) if turns is None else turns
    across, down, through = (np.empty(shape[:3]) for _ in range(3))
    for slot, (kind, side) in enumerate(SLOTS):
        left, posterior, head = np.moveaxis(shifts, -1, 0)
        outward = left * (LATERAL[SIDES.index(side)] if side else 1.0)
        moved = (outward, posterior, head) if kind == AXIAL else (posterior, head, outward)
        across[..., slot], down[..., slot], through[..., slot] = moved
    images = torch.from_numpy(inputs["images"]).to(device).float()
    stored = images.shape[-1]
    angle, size = turns[..., 0], turns[..., 1] * config.size / stored
    cosine, sine, to_share = np.cos(angle) * size, np.sin(angle) * size, 2 / (stored * config.spacing)
    theta = np.stack([cosine, -sine, across * to_share, sine, cosine, down * to_share], axis=-1)
    theta = torch.from_numpy(np.repeat(theta.reshape(-1, 2, 3), config.slices, axis=0)).float().to(device)
    grid = F.affine_grid(theta, (len(theta), 1, config.size, config.size), align_corners=False)
    squares = F.grid_sample(images.reshape(-1, 1, stored, stored), grid, align_corners=False)
    places = (inputs["places"].reshape(shape) - through[..., None]).reshape(inputs["places"].shape)
    squares = squares.reshape(*images.shape[:3], config.size, config.size)
    return squares, torch.from_numpy(places).float().to(device)


def prediction_views(
    inputs: np.ndarray, config: VitConfig, count: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Seen, list[int]]]:
    """The first `count` views of a batch for test-time augmentation, each with the order of its 25 columns: the middle,
    then shifted by `VIEW_STEP` mm to either side, back and forth, up and down."""
    steps = [np.zeros(3), *(sign * VIEW_STEP * axis for axis in np.eye(3) for sign in (1, -1))]
    for shift in steps[:count]:
        moved = np.broadcast_to(shift, (len(inputs), len(LEVELS), 3))
        yield cut_views(inputs, config, moved, device=device), list(range(len(COLUMNS)))


def shown_slices(
    seen: Seen, study: int, level: int, config: VitConfig
) -> Iterator[tuple[str, np.ndarray, float, tuple]]:
    """For each series type one square of a study in a batch, as the network sees it: the slice of the left half of a
    level that lies nearest to where its slot looks, blank where there is none.

    Gives the series type, image, the slice's place in mm and the image's extent in mm from the level's point, first row
    first: sagittal squares go to posterior and to the head, axial ones outwards and to posterior.
    """
    images, places = (part[study, level].cpu().numpy() for part in seen)
    for kind in SERIES_TYPES:
        first = config.slices * next(k for k, (slot, side) in enumerate(SLOTS) if slot == kind and side != SIDES[1])
        off = np.abs(places[first : first + config.slices] - (FORAMEN if kind == T1 else 0.0))
        nearest = first + int(np.argsort(off)[0])  # a missing slice is sorted last
        across, down = AXIAL_MIDDLE if kind == AXIAL else SAGITTAL_MIDDLE
        half = config.size * config.spacing / 2
        extent = (across - half, across + half, down + half, down - half)
        yield kind, images[nearest] * np.isfinite(places[nearest]), float(places[nearest]), extent
