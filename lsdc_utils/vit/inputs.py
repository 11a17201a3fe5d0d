"""What the network sees of a study: squares and their centres, labels as arrays, and shifted views."""

import fcntl
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from lsdc_utils.checkpoint import fingerprint
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import readers_canal
from lsdc_utils.detector.classes import CANAL_FROM_FORAMINA
from lsdc_utils.files import atomic
from lsdc_utils.vit import crops
from lsdc_utils.vit.model import KINDS, VitConfig
from lsdc_utils.vocabulary import AXIAL, COLUMNS, CONDITIONS, GROUPS, LEVELS, MISSING, SERIES_TYPES, SIDES, T2

AXES = ("outwards", "posterior", "head")  # of a level's frame
VIEW_MOVES = (1.5, 1.5, 1.5, 0.09, 0.06)  # of views at prediction: mm along each axis, radians, logarithm of the size
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
Seen = tuple[torch.Tensor, ...]  # what the network is called with
Studies = Iterable[tuple[int, list[Stack]]]  # ids and stacks


def study_input(stacks: list[Stack], points: pd.DataFrame, config: VitConfig) -> np.ndarray | None:
    """A record of one study, the squares of `cuts`: `images` uint8 (5, n, h, w) with margin, `places` float32 (5, n) in
    mm, NaN where there is no slice; n as the config's `slots`. None without a series or a canal point."""
    if not stacks or not (points["side"] == "").any():
        return None
    side, shape = config.size + 2 * config.margin, (len(LEVELS), len(config.slots))
    record = np.zeros((), dtype=[("images", np.uint8, (*shape, side, side)), ("places", np.float32, shape)])
    record["places"] = np.nan
    for level, k, cut in cuts(stacks, points, config):
        record["images"][level, k], record["places"][level, k] = cut.sample(side), cut.place
    return record


def cuts(stacks: list[Stack], points: pd.DataFrame, config: VitConfig) -> Iterator[tuple[int, int, crops.Cut]]:
    """The squares of `level_cuts` at each of the config's scales: level, number among a level's images, and square."""
    side, first = config.size + 2 * config.margin, 0
    for spacing, slices in config.scales:
        for level, slot, k, cut in crops.level_cuts(stacks, points, side, spacing, slices):
            yield level, first + slot * slices + k, cut
        first += len(crops.SLOTS) * slices


def seen_studies(
    studies: Studies, points: pd.DataFrame, config: VitConfig, see: Callable = study_input
) -> Iterator[tuple[int, np.ndarray]]:
    """Id and input by `see` of each study (id, stacks) that can be seen, read one by one; points: those of all."""
    by_study = dict(list(points.groupby("study_id")))
    for study_id, stacks in studies:
        seen = see(stacks, by_study.get(study_id, points.iloc[:0]), config)
        if seen is not None:
            yield int(study_id), seen


def study_inputs(
    studies: Studies, points: pd.DataFrame, config: VitConfig, file: Path, count: int, see: Callable = study_input
) -> tuple[list[int], np.ndarray]:
    """Ids (n,) and inputs (n, ...) of `seen_studies`; ValueError where there are none. count: of `studies`, at least.

    The first process that asks writes them to `file` (.npy), study by study; others wait for it. They are mapped
    read-only, so that memory does not grow with them.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        if not file.is_file():
            with atomic(file) as temporary:
                stored = None
                for k, (study_id, seen) in enumerate(seen_studies(studies, points, config, see)):
                    if stored is None:
                        dtype = [("study", np.int64), ("seen", seen.dtype, seen.shape)]
                        stored = np.lib.format.open_memmap(temporary, "w+", dtype, (count,))
                        stored["study"] = MISSING
                    stored[k] = study_id, seen
                if stored is None:
                    raise ValueError("no study has a readable series and a canal point to show the network")
                stored.flush()
    stored = np.load(file, mmap_mode="r")
    ids = stored["study"][stored["study"] != MISSING]
    return ids.tolist(), np.asarray(stored["seen"][: len(ids)])


def crops_name(config: VitConfig, points: pd.DataFrame, slices: Path, see: Callable) -> str:
    """The name of a file for `study_inputs`, which other squares, points, code or files in folder `slices` change."""
    files = [(str(file), file.stat().st_mtime_ns) for file in sorted(slices.glob("*/*"))]
    squares = [getattr(config, name) for name in ("size", "spacing", "margin", "slices", "wider")]
    code = [inspect.getsource(part) for part in (inspect.getmodule(see), inspect.getmodule(study_inputs), crops)]
    return f"{fingerprint(squares, points.to_csv(), files, code)}.npy"


@dataclass(frozen=True)
class Rows:
    """Rows of an array that stays on disk, in an order; those that an index takes are read."""

    stored: np.ndarray  # (n, ...)
    order: np.ndarray  # (k,)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        return self.stored[self.order[rows]]


def label_matrix(labels: pd.DataFrame, study_ids: Iterable[int]) -> np.ndarray:
    """Severities int8 (n, 25) in COLUMNS order from the label table, -1 where a study has no label."""
    column = (labels["condition"] + "_" + labels["level"]).rename("column")
    table = labels.set_index(["study_id", column])["severity"].unstack()
    return np.array(table.reindex(index=list(study_ids), columns=list(COLUMNS)).fillna(MISSING), dtype=np.int8)


def crop_centres(labels: pd.DataFrame, detected: Mapping[int, pd.DataFrame] | None = None) -> pd.DataFrame:
    """Points to cut crops about: study_id, level, side, X, Y, Z (LPS mm), confidence, condition (of GROUPS).

    Studies of the folds in `detected` have that fold's points, out of fold, as at prediction, or none. All others have
    those of the label table; without any of the canal, those that its foramina let expect.
    """
    columns = ["study_id", "level", "side", *"XYZ", "confidence", "condition"]
    labels = labels[~labels["fold"].isin(detected := detected or {})]
    clicked = labels[labels["X"].notna()]
    named = [CONDITIONS[name] for name in clicked["condition"]]
    clicked = clicked.assign(side=[c.side or "" for c in named], condition=[c.group for c in named], confidence=1.0)
    canal = readers_canal(labels, CANAL_FROM_FORAMINA).assign(side="", condition="scs", confidence=1.0)
    others = ~canal["study_id"].isin(clicked.loc[clicked["condition"] == "scs", "study_id"])
    clicked = pd.concat([clicked, canal[others]]) if others.any() else clicked
    return pd.concat([table[columns] for table in (*detected.values(), clicked)], ignore_index=True)


def centre_errors(labels: pd.DataFrame, detected: pd.DataFrame) -> pd.DataFrame:
    """For each point of a label table how far it lies from where crops about `detected` points look: study_id, level,
    series_type, side, and mm outwards (T2: to the left), to posterior and to the head along the canal."""
    rows, clicked = [], labels[labels["X"].notna()]
    slots = {name: (GROUPS[c.group].series_type, c.side or "") for name, c in CONDITIONS.items()}
    for study, points in detected.groupby("study_id"):
        own = clicked[clicked["study_id"] == study]
        if own.empty or not (points["side"] == "").any():
            continue
        centres, frames = crops.level_frames(points)
        middles = crops.slot_centres(points, centres, frames)
        for condition, level, *place in own[["condition", "level", "X", "Y", "Z"]].itertuples(index=False):
            k, slot = LEVELS.index(level), crops.SLOTS.index(slots[condition])
            out, *rest = frames[k] @ (place - middles[k, slot])
            rows.append((study, level, *slots[condition], out * (-1 if slots[condition][1] == SIDES[1] else 1), *rest))
    return pd.DataFrame(rows, columns=["study_id", "level", "series_type", "side", *AXES])


def cut_views(
    inputs: np.ndarray, config: VitConfig, shifts: np.ndarray,
    turns: np.ndarray | None = None, warps: np.ndarray | None = None,
) -> Seen:  # fmt: skip
    """Images (B, 5, n, h, w) cut from records with margin, and places, of slots moved by `shifts`.

    shifts: (B, 5, slots, 3) mm to the left, to posterior and to the head: in the plane the square moves, across it the
    places of the slices do. turns: (B, 5, slots, 2) radians and relative sizes of the squares of a slot's slices.
    warps: (B, 5, slots, 2, g, g) pixels, across and down, by which a grid of points bends squares, smooth between.
    """
    shape, slots = (*inputs["places"].shape[:2], len(crops.SLOTS)), config.slots
    turns = np.broadcast_to((0.0, 1.0), (*shape, 2)) if turns is None else turns
    across, down, through = np.einsum("sac,blsc->abls", crops.SLOT_AXES, shifts)
    images = torch.from_numpy(inputs["images"]).to(DEVICE).float()
    stored = images.shape[-1]
    pixel = np.concatenate([np.take(mm, KINDS).repeat(slices) for mm, slices in config.scales])  # mm (n,)
    angle, size = turns[..., slots, 0], turns[..., slots, 1] * config.size / stored
    cosine, sine, to_share = np.cos(angle) * size, np.sin(angle) * size, 2 / (stored * pixel)
    theta = [cosine, -sine, across[..., slots] * to_share, sine, cosine, down[..., slots] * to_share]
    theta = torch.from_numpy(np.stack(theta, axis=-1).reshape(-1, 2, 3)).float().to(DEVICE)
    grid = F.affine_grid(theta, (len(theta), 1, config.size, config.size), align_corners=False)
    if warps is not None:
        points = torch.from_numpy(warps[:, :, slots].reshape(-1, *warps.shape[3:])).float().to(DEVICE)
        bent = F.interpolate(points, size=(config.size, config.size), mode="bicubic", align_corners=True)
        grid = grid + bent.permute(0, 2, 3, 1) * 2 / stored
    squares = F.grid_sample(images.reshape(-1, 1, stored, stored), grid, align_corners=False)
    places = inputs["places"] - through[..., slots]
    squares = squares.reshape(*images.shape[:3], config.size, config.size)
    return squares, torch.from_numpy(places).float().to(DEVICE)


def prediction_views(inputs: np.ndarray, config: VitConfig, count: int) -> Iterator[tuple[Seen, list[int]]]:
    """The first `count` views of a batch for test-time augmentation, each with the order of its 25 columns: the middle,
    then by `VIEW_MOVES` to either side, back and forth, up and down, turned both ways, larger and smaller. A mirrored
    patient would not be another view, since right halves are mirrored."""
    moves = [np.zeros(5), *(sign * move for move in np.diag(VIEW_MOVES) for sign in (1, -1))]
    for move in moves[:count]:
        slots = np.broadcast_to(np.append(move[:4], np.exp(move[4])), (len(inputs), len(LEVELS), len(crops.SLOTS), 5))
        yield cut_views(inputs, config, slots[..., :3], slots[..., 3:]), list(range(len(COLUMNS)))


def shown_slices(
    seen: Seen, study: int, level: int, config: VitConfig
) -> Iterator[tuple[str, np.ndarray, float, tuple]]:
    """For each series type the square of a level's left half that is nearest to where its slot looks, as the network
    sees it: series type, image (blank if there is none), the slice's place in mm, and the image's extent for imshow, mm
    from the canal's point, the foramen or the recess. Sagittal images have the head at the top, axial ones anterior."""
    images, places = (part[study, level].cpu().numpy() for part in seen)
    for kind in SERIES_TYPES:
        slot = [of_slot for of_slot, _ in crops.SLOTS].index(kind)  # the left side's
        off = np.abs(places[slot * config.slices : (slot + 1) * config.slices])  # at the first scale
        nearest = slot * config.slices + int(np.argsort(off)[0])  # a missing slice is sorted last
        image = images[nearest] * np.isfinite(places[nearest])
        across, down = crops.CANAL_MIDDLE if kind == T2 else (0.0, 0.0)
        half = config.size * config.spacing[SERIES_TYPES.index(kind)] / 2
        extent = (across - half, across + half, down + half, down - half)
        if kind != AXIAL:  # its rows lead to the head
            image, extent = image[::-1], (*extent[:2], down - half, down + half)
        yield kind, image, float(places[nearest]), extent
