"""What the network sees of a study: squares and their centres, labels as arrays, and shifted views."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from lsdc_utils.data.stacks import Stack
from lsdc_utils.vit import crops
from lsdc_utils.vit.model import VitConfig
from lsdc_utils.vocabulary import AXIAL, COLUMNS, LEVELS, MISSING, SERIES_TYPES, SPINAL_CANAL

AXES = ("left", "posterior", "head")  # of a level's frame
VIEW_STEP = 1.5  # mm that a view at prediction is shifted
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Seen = tuple[torch.Tensor, ...]  # what the network is called with


def study_input(stacks: list[Stack], points: pd.DataFrame, config: VitConfig) -> np.ndarray | None:
    """A record of one study, the squares of `level_cuts` slot by slot: `images` uint8 (5, slots * n, h, w) with margin,
    `places` float32 (5, slots * n) in mm, NaN where there is no slice. None without a series or a canal point."""
    if not stacks or points.empty:
        return None
    side, shape = config.size + 2 * config.margin, (len(LEVELS), len(crops.SLOTS) * config.slices)
    record = np.zeros((), dtype=[("images", np.uint8, (*shape, side, side)), ("places", np.float32, shape)])
    record["places"] = np.nan
    for level, slots in enumerate(crops.level_cuts(stacks, points, side, config.spacing, config.slices)):
        for slot, cuts in enumerate(slots):
            for k, cut in enumerate(cuts, start=slot * config.slices):
                record["images"][level, k], record["places"][level, k] = cut.sample(side), cut.place
    return record


def seen_studies(
    studies: Iterable[tuple[int, list[Stack]]], points: pd.DataFrame, config: VitConfig, see: Callable = study_input
) -> Iterator[tuple[int, np.ndarray]]:
    """Id and input by `see` of each study (id, stacks) that can be seen, read one by one; points: those of all."""
    by_study = dict(list(points.groupby("study_id")))
    for study_id, stacks in studies:
        seen = see(stacks, by_study.get(study_id, points.iloc[:0]), config)
        if seen is not None:
            yield int(study_id), seen


def study_inputs(
    studies: Iterable[tuple[int, list[Stack]]], points: pd.DataFrame, config: VitConfig, see: Callable = study_input
) -> tuple[list[int], np.ndarray]:
    """Ids (n,) and inputs (n, ...) of `seen_studies`; ValueError where there are none."""
    pairs = list(seen_studies(studies, points, config, see))
    if not pairs:
        raise ValueError("no study has a readable series and a canal point, so there is nothing to show the network")
    return [study for study, _ in pairs], np.stack([seen for _, seen in pairs])


def label_matrix(labels: pd.DataFrame, study_ids: Iterable[int]) -> np.ndarray:
    """Severities int8 (n, 25) in COLUMNS order from the label table, -1 where a study has no label."""
    column = (labels["condition"] + "_" + labels["level"]).rename("column")
    table = labels.set_index(["study_id", column])["severity"].unstack()
    return np.array(table.reindex(index=list(study_ids), columns=list(COLUMNS)).fillna(MISSING), dtype=np.int8)


def crop_centres(labels: pd.DataFrame, detected: Iterable[pd.DataFrame] = ()) -> pd.DataFrame:
    """Canal points to cut training crops round: study_id, level, X, Y, Z (LPS mm), confidence.

    A study in one of the tables `detected` takes its points from there. These are out of fold, so training meets the
    errors that prediction will meet. Every other study takes the label table's points.
    """
    tables, columns = list(detected), ["study_id", "level", "X", "Y", "Z", "confidence"]
    clicked = labels[(labels["condition"] == SPINAL_CANAL) & labels["X"].notna()].assign(confidence=1.0)
    for table in tables:
        clicked = clicked[~clicked["study_id"].isin(table["study_id"])]
    return pd.concat([table[columns] for table in (*tables, clicked)], ignore_index=True)


def centre_errors(labels: pd.DataFrame, detected: pd.DataFrame) -> pd.DataFrame:
    """For each study and level in both tables: study_id, level, and mm to the left, to posterior and to the head along
    the canal, from the point that a crop is cut round (`detected`: canal points) to the readers' (label table)."""
    clicked, rows = crop_centres(labels), []
    for study, points in clicked[clicked["study_id"].isin(detected["study_id"])].groupby("study_id"):
        centres, frames = crops.level_frames(detected[detected["study_id"] == study])
        level = points["level"].map(LEVELS.index).to_numpy()
        off = np.einsum("nij,nj->ni", frames[level], points[["X", "Y", "Z"]].to_numpy() - centres[level])
        rows += [(study, LEVELS[k], *mm) for k, mm in zip(level, off, strict=True)]
    return pd.DataFrame(rows, columns=["study_id", "level", *AXES])


def cut_views(inputs: np.ndarray, config: VitConfig, shifts: np.ndarray, turns: np.ndarray | None = None) -> Seen:
    """Images (B, 5, slots * n, h, w) cut from records with margin, and places, of levels moved by `shifts` (B, 5, 3).

    shifts: mm to the left, to posterior and to the head: in the plane the square moves, across it the places of the
    slices do. turns: (B, 5, slots, 2) radians and relative sizes of the squares of a slot's slices.
    """
    shape = (*inputs["places"].shape[:2], len(crops.SLOTS), config.slices)
    turns = np.broadcast_to((0.0, 1.0), (*shape[:3], 2)) if turns is None else turns
    across, down, through = np.einsum("sac,blc->abls", crops.SLOT_AXES, shifts)
    images = torch.from_numpy(inputs["images"]).to(DEVICE).float()
    stored = images.shape[-1]
    angle, size = turns[..., 0], turns[..., 1] * config.size / stored
    cosine, sine, to_share = np.cos(angle) * size, np.sin(angle) * size, 2 / (stored * config.spacing)
    theta = np.stack([cosine, -sine, across * to_share, sine, cosine, down * to_share], axis=-1)
    theta = torch.from_numpy(np.repeat(theta.reshape(-1, 2, 3), config.slices, axis=0)).float().to(DEVICE)
    grid = F.affine_grid(theta, (len(theta), 1, config.size, config.size), align_corners=False)
    squares = F.grid_sample(images.reshape(-1, 1, stored, stored), grid, align_corners=False)
    places = (inputs["places"].reshape(shape) - through[..., None]).reshape(inputs["places"].shape)
    squares = squares.reshape(*images.shape[:3], config.size, config.size)
    return squares, torch.from_numpy(places).float().to(DEVICE)


def prediction_views(inputs: np.ndarray, config: VitConfig, count: int) -> Iterator[tuple[Seen, list[int]]]:
    """The first `count` views of a batch for test-time augmentation, each with the order of its 25 columns: the middle,
    then shifted by `VIEW_STEP` mm to either side, back and forth, up and down."""
    steps = [np.zeros(3), *(sign * VIEW_STEP * axis for axis in np.eye(3) for sign in (1, -1))]
    for shift in steps[:count]:
        moved = np.broadcast_to(shift, (len(inputs), len(LEVELS), 3))
        yield cut_views(inputs, config, moved), list(range(len(COLUMNS)))


def shown_slices(
    seen: Seen, study: int, level: int, config: VitConfig
) -> Iterator[tuple[str, np.ndarray, float, tuple]]:
    """For each series type the square of a level's left half that is nearest to where its slot looks, as the network
    sees it: series type, image (blank if there is none), the slice's place in mm, and the image's extent for imshow, mm
    from the level's point. Sagittal images have the head at the top, axial ones anterior."""
    images, places = (part[study, level].cpu().numpy() for part in seen)
    for kind in SERIES_TYPES:
        slot = [of_slot for of_slot, _ in crops.SLOTS].index(kind)  # the left side's
        off = np.abs(places.reshape(-1, config.slices)[slot] - crops.AIMS[slot])
        nearest = slot * config.slices + int(np.argsort(off)[0])  # a missing slice is sorted last
        image = images[nearest] * np.isfinite(places[nearest])
        across, down = crops.AXIAL_MIDDLE if kind == AXIAL else crops.SAGITTAL_MIDDLE
        half = config.size * config.spacing / 2
        extent = (across - half, across + half, down + half, down - half)
        if kind != AXIAL:  # its rows lead to the head
            image, extent = image[::-1], (*extent[:2], down - half, down + half)
        yield kind, image, float(places[nearest]), extent
