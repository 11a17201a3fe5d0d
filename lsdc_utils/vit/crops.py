"""Squares round each level, cut in the plane of each slice; LPS mm.

Nothing is resampled between slices. Slice thickness and instance numbers are never used.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pandas as pd

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack, coarsen
from lsdc_utils.vocabulary import AXIAL, LEVELS, SERIES_TYPES, SIDES, T1, T2

# Where the canal points of an average spine lie, mm to posterior and to the head of L3/L4: the competition's label
# points (mean x over width and y over height of the image) on a usual field of view of 280 mm.
SPINE_Y = np.array([10.0, 4.0, 0.0, 1.0, 9.0])
SPINE_Z = np.array([64.0, 32.0, 0.0, -31.0, -56.0])
SPINE_SLOPE = np.tan(np.deg2rad([11.0, 8.0, 2.0, -9.0, -26.0]))  # mm to posterior a mm up: usual tilts of the discs
LATERAL = np.array([1.0, -1.0])  # x direction that leads outwards, for each of vocabulary.SIDES
# Which slices show a level: at the canal, at either foramen, at the disc; axial images are seen from each side.
SLOTS = ((T2, ""), (T1, SIDES[0]), (T1, SIDES[1]), (AXIAL, SIDES[0]), (AXIAL, SIDES[1]))
# For each slot the columns and rows of its squares and the way outwards (axial: up), in a level's frame.
SLOT_AXES = np.array([np.eye(3)[[0, 1, 2] if kind == AXIAL else [1, 2, 0]] for kind, _ in SLOTS])
SLOT_AXES[:, :, 0] *= np.array([[LATERAL[SIDES.index(side)] if side else 1.0] for _, side in SLOTS])
SLICE_REACH = 14.0  # mm from where a slot looks that a slice may lie: three steps
SHOWS = 8.0  # mm from there within which a slice must lie for its series to show the place at all: two steps
SAME_SLICE = 1.0  # mm between slices that show the same
CANAL_MIDDLE = (-1.0, 4.0)  # mm to posterior and to the head from a level's point to the middle of its square
# mm outwards, to posterior and to the head from a level's point to its recess and foramen, if no point tells more:
# means over training studies of the demo.
RECESS = np.tile([8.0, -3.0, 0.0], (len(LEVELS), 1))
FORAMEN = np.linspace((15.5, -3.4, 8.6), (20.5, -3.4, 11.4), len(LEVELS))
BOWS = {1.5: 0.8, 6.0: 0.12, 15.0: 0.08}  # mm that spines bow sideways: share; one in ten old ones by 4 to 12
WAVES = np.array([180.0, 250.0, 320.0, 400.0])  # mm, lengths of a bow
LEAN, ANYWHERE = 0.06, 100.0  # spread of a spine's slope, and mm of its place
POINT_ERROR, WILD_ERROR = 1.2, 8.0  # mm, spread of a point that is right, and what a wild one adds to it
WILD_SHARE = 0.05  # of points that are as sure as the study's best
# mm about `RECESS` and `FORAMEN`: of a study, its turn (50 mm up), a level, the two sides against each other.
SPREADS = {"ss": (4.0, 2.5, 1.5, 1.5), "nfn": (2.5, 1.5, 1.5, 1.5)}


def level_frames(points: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Centres (5, 3) of a study's levels in the canal, and frames (5, 3, 3): unit vectors to the left, to posterior and
    to the head along the canal.

    points: of one study: level, side, X, Y, Z, confidence; used are the canal's, whose side is ''; ValueError for none.
    Missing levels follow the shape of an average spine. X is smoothed along the spine, because a point clicked on the
    neighbouring slice is 4 mm off the midline.
    """
    canal = points[points["side"] == ""].groupby("level")[[*"XYZ", "confidence"]].mean().reindex(list(LEVELS))
    *places, confidence = canal.to_numpy(dtype=float).T
    order, known = np.arange(len(LEVELS)), np.isfinite(places).all(axis=0)
    if not known.any():
        raise ValueError(f"no canal point for study {points['study_id'].iloc[0] if len(points) else '(none given)'}")
    average = np.stack([np.zeros(len(LEVELS)), SPINE_Y, SPINE_Z])
    offset = np.where(known, places - average, np.nan)  # (3, levels)
    centres = average + [np.interp(order, order[known], axis[known]) for axis in offset]
    middle, height = np.nanmedian(offset, axis=1), centres[2] - centres[2].mean()
    height = np.append(height, height + 1)  # a mm higher, for the slope
    bow = np.cos(2 * np.pi * (height - height[:, None])[..., None] / WAVES).mean(axis=-1) / 2
    spreads = ANYWHERE**2 + LEAN**2 * np.outer(height, height) + np.square(list(BOWS))[:, None, None] * bow
    shares = np.array(list(BOWS.values()))
    smooth = (_robust_means(axis[:, None], confidence, spreads, shares)[0] for axis in (offset.T - middle).T[:2])
    x, y = (axis.reshape(2, -1) for axis in smooth)
    centres[0] = middle[0] + x[0]
    head = geometry.unit(np.stack([x[1] - x[0], SPINE_SLOPE + y[1] - y[0], np.ones(len(LEVELS))], axis=1))
    left = geometry.unit(np.array([1.0, 0, 0]) - head * head[:, :1])
    return centres.T, np.stack([left, np.cross(head, left), head], axis=1)


def slot_centres(points: pd.DataFrame, centres: np.ndarray, frames: np.ndarray) -> np.ndarray:
    """LPS mm (5, slots, 3) about which the squares of each slot lie: on T2 the level's centre, on T1 its foramen, on
    axial slices its recess.

    points, centres, frames: of `level_frames`; the points of condition nfn are foramina, of ss recesses.
    """
    recesses = _side_points(points, "ss", RECESS, [0, 1], centres, frames)
    foramina = _side_points(points, "nfn", FORAMEN, [1, 2], centres, frames)
    of_kind = {T2: np.stack([centres] * 2, axis=1), T1: foramina, AXIAL: recesses}
    return np.stack([of_kind[kind][:, SIDES.index(side or SIDES[0])] for kind, side in SLOTS], axis=1)


def _side_points(
    points: pd.DataFrame, condition: str, usual: np.ndarray, axes: list[int], centres: np.ndarray, frames: np.ndarray
) -> np.ndarray:
    """LPS mm (5, 2, 3) of a condition's places at each level and side: `usual` (5, 3) mm off the centre, moved along
    two axes of the level's frame to the detected points.

    One without a point, or with a wild one, lies where the study's others let it be expected, since series differ by
    some mm.
    """
    found = points[points["condition"] == condition].groupby(["level", "side"])[[*"XYZ", "confidence"]].mean()
    found = found.reindex(pd.MultiIndex.from_product([LEVELS, SIDES])).to_numpy(dtype=float)
    usual = usual[:, None] * np.stack([[out, 1.0, 1.0] for out in LATERAL])
    off = np.einsum("lij,lsj->lsi", frames, found[:, :3].reshape(-1, 2, 3) - centres[:, None]) - usual
    height, out = np.repeat((centres[:, 2] - centres[:, 2].mean()) / 50, 2), np.tile(LATERAL, len(LEVELS))
    study, turn, level, half = np.square(SPREADS[condition])
    spread = study + turn * np.outer(height, height) + half * np.outer(out, out)
    spread += level * np.kron(np.eye(len(LEVELS)), np.ones((2, 2)))
    means, wild = _robust_means(off.reshape(-1, 3)[:, axes], found[:, 3], spread[None], np.ones(1))
    expected = np.zeros_like(off)
    expected[..., axes] = means.reshape(*off.shape[:2], 2)
    expected[..., axes] += (1 - wild.reshape(-1, 2, 1)) * np.nan_to_num(off - expected)[..., axes]
    return centres[:, None] + np.einsum("lsi,lij->lsj", usual + expected, frames)


def _robust_means(
    values: np.ndarray, confidence: np.ndarray, spreads: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means (p, k) at places, of which the first n have `values` (n, k), NaN where unknown, and `confidence` (n,); and
    the probability (n,) that a value is wild, 1 where unknown. spreads: covariances (q, p, p) about 0, of shares (q,).

    The mean over normal distributions, one for each covariance and each choice of wild values, at most a third, by how
    well they explain the values. So what values share is followed, and one that is far off is not.
    """
    known = np.flatnonzero(np.isfinite(values).all(axis=1))
    values, sure, is_wild = values[known], confidence[known], np.ones(len(values))
    wild = np.array([odd for odd in itertools.product((0, 1), repeat=len(known)) if 3 * sum(odd) <= len(known)])
    share = np.clip(WILD_SHARE * sure.max(initial=0) / np.maximum(sure, 1e-9), WILD_SHARE, 0.5)
    noise = (POINT_ERROR**2 + wild * WILD_ERROR**2)[:, None] * np.eye(len(known))
    solved = np.linalg.solve(own := spreads[:, None, known[:, None], known] + noise, values)  # (q, choices, n, k)
    fit = -0.5 * ((values * solved).sum(axis=(2, 3)) + values.shape[1] * np.linalg.slogdet(own)[1])
    fit += np.log(np.where(wild, share, 1 - share)).sum(axis=1) + np.log(shares)[:, None]
    weight = np.exp(fit - fit.max())
    weight /= weight.sum()
    is_wild[known] = weight.sum(axis=0) @ wild
    return np.einsum("qm,qpn,qmnk->pk", weight, spreads[:, :, known], solved, optimize=True), is_wild


@dataclass(frozen=True)
class Cut:
    """A square in the plane of one slice: pixel (row r, column c) is the patient point origin + c columns + r rows."""

    image: np.ndarray  # (rows, cols) uint8: the slice
    affine: np.ndarray  # (4, 4): (column, row, 0, 1) of the slice -> mm
    origin: np.ndarray  # (3,)
    columns: np.ndarray  # (3,) mm a pixel
    rows: np.ndarray  # (3,) mm a pixel
    place: float  # of the slice, mm from where its slot looks: outwards (T2: to the left) or, if axial, to the head

    def sample(self, size: int) -> np.ndarray:
        """Its grey values uint8 (size, size), bilinear in the slice; 0 outside."""
        corners = self.origin + np.stack([self.columns, self.rows, 0 * self.rows])
        matrix = geometry.to_pixels(self.affine, corners)[:, :2].T
        matrix[:, :2] -= matrix[:, 2:]
        return cv2.warpAffine(self.image, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def level_cuts(
    stacks: list[Stack], points: pd.DataFrame, size: int, spacings: Sequence[float], count: int
) -> Iterator[tuple[int, int, int, Cut]]:
    """For each of five levels and each of `SLOTS` the squares of the `count` slices nearest to where a slot looks, from
    whichever series of the type holds them, or fewer: the numbers of level, slot and square, and the square.

    points: study_id, level, side, X, Y, Z, confidence, condition (of GROUPS). Squares have `size` pixels a side, of as
    many mm as `spacings` tells for each of SERIES_TYPES. Columns lead to posterior and rows to the head; in axial
    slices columns lead outwards, so right halves are mirrored onto left ones, rows to posterior.
    """
    slices, spacing_of = {kind: [] for kind in SERIES_TYPES}, dict(zip(SERIES_TYPES, spacings, strict=True))
    for stack in (coarsen(stack, spacing_of[stack.series_type]) for stack in stacks):
        for image, affine, (rows, cols) in zip(stack.pixels, stack.affines, stack.shapes, strict=True):
            slices[stack.series_type].append((image[:rows, :cols], affine, geometry.normals(affine)))
    centres, frames = level_frames(points)
    anchors = slot_centres(points, centres, frames)
    for level, slot in np.ndindex(anchors.shape[:2]):
        kind, axes, anchor = SLOTS[slot][0], SLOT_AXES[slot] @ frames[level], anchors[level, slot]
        spacing, offset = spacing_of[kind], CANAL_MIDDLE if kind == T2 else (0.0, 0.0)
        across, down, _ = axes
        nearest = _nearest(slices[kind], anchor, SLOT_AXES[slot][2], count)
        for k, (place, image, affine, normal) in enumerate(nearest):
            columns = geometry.unit(across - normal * (normal @ across))
            rows = down - normal * (normal @ down)
            rows = geometry.unit(rows - columns * (columns @ rows))
            middle = anchor + normal * place + columns * offset[0] + rows * offset[1]
            origin = middle - (columns + rows) * (size - 1) / 2 * spacing
            yield level, slot, k, Cut(image, affine, origin, columns * spacing, rows * spacing, place)


def _nearest(slices: list[tuple], anchor: np.ndarray, outwards: np.ndarray, count: int) -> list[tuple]:
    """Place (mm outwards of `anchor`), image, affine and normal outwards of the slices nearest to it, at most
    `SLICE_REACH` from it; of a repeated slice only the first. Those that show what lies at the anchor come first; none,
    where no slice does."""
    placed = []
    for image, affine, normal in slices:
        normal = normal if normal @ outwards > 0 else -normal
        place = float(normal @ (affine[:3, 3] - anchor))
        if abs(place) <= SLICE_REACH:
            column, row, _ = geometry.to_pixels(affine, anchor)
            shown = 0 <= column < image.shape[1] and 0 <= row < image.shape[0]
            placed.append((place, image, affine, normal, shown))
    if not any(shown and abs(place) <= SHOWS for place, *_, shown in placed):
        return []
    chosen: list[tuple] = []
    for *candidate, _ in sorted(placed, key=lambda member: (not member[4], abs(member[0]))):
        if len(chosen) < count and all(abs(candidate[0] - other[0]) >= SAME_SLICE for other in chosen):
            chosen.append(tuple(candidate))
    return sorted(chosen, key=lambda member: abs(member[0]))
