"""Three series of one body: where slices are planned, and what a scanner makes of the tissues that lie there."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline

from lsdc_utils.phantom.body import AXIS, FIRST, Array, Body
from lsdc_utils.phantom.layers import Layer, Points, paint, paint_around, texture
from lsdc_utils.vocabulary import PLANES, T1, T2

SEQUENCES = ("t1", "t2", "stir")
SIGNAL = {  # of each tissue, as a share of the brightest: T1, T2, STIR
    "air": (0.0, 0.0, 0.0),
    "fat": (1.0, 0.72, 0.10),
    "muscle": (0.30, 0.18, 0.28),
    "marrow": (0.55, 0.42, 0.18),
    "cortex": (0.08, 0.06, 0.05),
    "disc": (0.30, 0.12, 0.12),
    "nucleus": (0.34, 0.82, 0.85),
    "csf": (0.16, 0.95, 1.0),
    "void": (0.16, 0.1, 0.1),
    "cord": (0.36, 0.42, 0.42),
    "root": (0.33, 0.33, 0.34),
    "ligament": (0.14, 0.10, 0.10),
    "vessel": (0.06, 0.05, 0.05),
    "bowel": (0.36, 0.25, 0.35),
    "fluid": (0.22, 0.90, 0.95),
    "oedema": (0.30, 0.62, 0.55),
    "haemangioma": (0.85, 0.75, 0.35),
}
Blocks = tuple[float, list[tuple[Array, Array, Array]]]  # step; middle, axes and offsets of slices of each block
SUBSAMPLES = {"sagittal": 3, "axial": 2}  # through a slice, in the spine


@dataclass(frozen=True)
class Protocol:
    """How series are taken: factors against the usual scan, except `stir`."""

    motion: float = 1.0  # of the patient between series, usually about 1.5 mm and 1 degree
    step: float = 1.0  # distance and thickness of slices
    pixel: float = 1.0  # side of a pixel
    noise: float = 1.0
    field: float = 1.0  # unevenness of the coil's field
    gain: float = 1.0  # of the receiver: stored values per unit of signal
    stir: float = 0.25  # share of the sagittal T2/STIR series that are STIR


USUAL = Protocol()


@dataclass(frozen=True)
class Acquisition:
    """A planned series; slices run from the patient's right to left (sagittal) or from head to foot (axial)."""

    series_type: str
    affines: Array  # (n, 4, 4) from (column, row, 0, 1) of a slice to LPS mm
    rows: int
    cols: int
    spacing: float  # mm between pixels
    step: float  # mm between neighbouring slices of a block
    thickness: float  # mm
    sequence: str  # t1, t2 or stir
    motion: Array  # (4, 4): from the body as built to the patient's place during this series
    blocks: Array  # (n,) which parallel stack each slice belongs to
    protocol: Protocol = USUAL

    def to_scanner(self, points: Array) -> Array:
        """Where this series sees points of the body (..., 3), LPS mm."""
        return points @ self.motion[:3, :3].T + self.motion[:3, 3]


def plan_series(
    rng: np.random.Generator,
    body: Body,
    series_type: str,
    levels: tuple[int, ...] = (0, 1, 2, 3, 4),
    tilted: bool = False,
    square: bool = True,
    protocol: Protocol = USUAL,
) -> Acquisition:
    """Plan a series. levels: which axial slices cover. tilted: an axial block along each disc, else one parallel stack.
    square: as many rows as columns. A protocol changes only what it names."""
    rows = cols = int(rng.choice([160, 176, 192, 208, 224], p=[0.3, 0.25, 0.2, 0.15, 0.1]))
    if not square:
        rows, cols = (rows, cols - 24) if rng.random() < 0.7 else (rows - 24, cols)
    rows, cols = round(rows / protocol.pixel), round(cols / protocol.pixel)
    is_axial = PLANES[series_type] == "axial"
    mean, sd, low, high = (205, 9, 185, 230) if is_axial else (290, 14, 262, 325)  # mm of the longer side
    spacing = float(np.clip(rng.normal(mean, sd), low, high)) / max(rows, cols)
    if is_axial:
        step, stacks = (_plan_tilted if tilted else _plan_parallel)(rng, body, levels, protocol.step)
    else:  # the canal behind the middle of the image, where real label points lie
        shift = np.array([0, -0.058 * cols * spacing, 0.026 * rows * spacing])
        step, stacks = _plan_sagittal(rng, body, shift, protocol.step)
    affines = np.concatenate([_stack(*stack, (rows, cols), spacing) for stack in stacks])
    blocks = np.repeat(np.arange(len(stacks)), [len(offsets) for _, _, offsets in stacks])
    is_stir = rng.random() < protocol.stir and series_type == T2
    sequence = "t1" if series_type == T1 else "stir" if is_stir else "t2"
    motion = np.eye(4)  # of the body about the middle of the lumbar spine
    motion[:3, :3] = _rotation(np.deg2rad(rng.normal(0, 1.0 / np.sqrt(3), 3)) * protocol.motion)
    motion[:3, 3] = rng.normal(0, 1.5 / np.sqrt(3), 3) * protocol.motion
    return Acquisition(series_type, affines, rows, cols, spacing, step, 0.9 * step, sequence, motion, blocks, protocol)


def _rotation(angles: Array) -> Array:
    """Rotation (3, 3) about x, then y, then z by angles in radians."""
    cx, cy, cz = np.cos(angles)
    sx, sy, sz = np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _stack(middle: Array, axes: Array, offsets: Array, size: tuple[int, int], spacing: float) -> Array:
    """Affines (n, 4, 4) of slices centred at `middle` + offset * normal; axes (3, 3): column, row, normal."""
    affines = np.tile(np.eye(4), (len(offsets), 1, 1))
    affines[:, :3, :3] = (axes * [[spacing], [spacing], [1.0]]).T
    corner = middle - spacing * (axes[0] * (size[1] - 1) + axes[1] * (size[0] - 1)) / 2
    affines[:, :3, 3] = corner + offsets[:, None] * axes[2]
    return affines


def _plan_sagittal(rng: np.random.Generator, body: Body, shift: Array, wider: float) -> Blocks:
    """13 or 14 slices, fewer where steps are `wider`, more in a bowed spine."""
    step = float(rng.choice([4.0, 4.3, 4.5]))
    n = round((14 if step == 4.0 else 13) / wider)
    step *= wider
    aside, back, up = rng.normal(0, [1.5, 14, 14])
    middle = body.points()[:5].mean(0) + (shift + np.array([aside, 0, 0])) + np.array([0, back, up])
    if body.traits["bow"]:  # more slices, so that all foramina are seen
        n = max(n, round(2 * (np.abs(body.points()[5:15, 0] - middle[0]).max() + 4) / step + 0.5))
    turn = _rotation(np.deg2rad([0, rng.normal(0, 1.2), rng.normal(0, 1.2)]))
    axes = np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]]) @ turn.T
    return step, [(middle, axes, (np.arange(n) - (n - 1) / 2) * step)]


def _plan_parallel(rng: np.random.Generator, body: Body, levels: tuple[int, ...], wider: float) -> Blocks:
    """One axial stack from above the first of the levels to below the last."""
    step = float(rng.choice([5.0, 5.5, 6.0])) * wider
    axes = _axial_axes(np.deg2rad(rng.normal(-1, 3)))
    points = body.points()[list(levels)]
    middle = body.points()[:5].mean(0) + np.array([rng.normal(0, 4.5), rng.normal(-5, 6.5), 0])
    depth = (points - middle) @ axes[2]
    return step, [(middle, axes, np.arange(depth[0] - rng.uniform(5, 11), depth[-1] + rng.uniform(6, 12), step))]


def _plan_tilted(rng: np.random.Generator, body: Body, levels: tuple[int, ...], wider: float) -> Blocks:
    """Four axial slices (fewer where steps are `wider`) along each disc, tilted with it."""
    step, blocks, n = float(rng.choice([3.5, 4.0])) * wider, [], max(2, round(4 / wider))
    shift = np.array([rng.normal(0, 4.5), rng.normal(-5, 6.5), 0])
    for k in levels:
        axes = _axial_axes(np.interp(body.discs[FIRST + k], AXIS, body.tilt) + np.deg2rad(rng.normal(0, 2)))
        middle = body.points()[k] + shift + axes[2] * rng.normal(0, 0.8)
        blocks.append((middle, axes, (np.arange(n) - (n - 1) / 2) * step))
    return step, blocks


def _axial_axes(tilt: float) -> Array:
    """Column to the left, row to the back, normal to the foot, of a slice across a spine tilted by `tilt` radians."""
    back = np.array([0, np.cos(tilt), -np.sin(tilt)])
    return np.array([[1.0, 0, 0], back, [0, -np.sin(tilt), -np.cos(tilt)]])


def render(body: Body, acquisition: Acquisition, rng: np.random.Generator) -> Array:
    """Image the body: uint16 (n, rows, cols), 12 bits, with fall-off, uneven field, saturation band, noise, scale."""
    image = expose(body, acquisition)
    rows, cols = image.shape[1:]
    row, col = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, cols)[None]
    back = acquisition.affines[0, 1, 0] * np.arange(cols) + acquisition.affines[0, 1, 1] * np.arange(rows)[:, None]
    back = back - back.mean() + 20
    falloff = np.exp(np.clip(back, -140, 75) / rng.uniform(160, 320))
    a = rng.normal(0, 0.06, 5) * acquisition.protocol.field
    field = falloff * np.exp(a[0] * row + a[1] * col + a[2] * row * col + a[3] * row**2 + a[4] * col**2)
    if rng.random() < 0.6:
        edge = rng.uniform(-75, -60) + 20
        field = field * (1 - 0.75 * np.clip((edge - back) / 12, 0, 1))
    sigma = rng.uniform(0.035, 0.055) * acquisition.protocol.noise
    value = image * field.astype(np.float32)
    real = value + sigma * rng.standard_normal(image.shape, np.float32)
    other = sigma * rng.standard_normal(image.shape, np.float32)
    scale = np.exp(rng.uniform(np.log(400), np.log(2600))) * acquisition.protocol.gain
    return np.clip(np.rint(np.sqrt(real**2 + other**2) * np.float32(scale)), 0, 4095).astype(np.uint16)


def expose(body: Body, acquisition: Acquisition) -> Array:
    """Signal (n, rows, cols) before coil and noise, 1 at most; in the spine a mean over the slice's thickness."""
    sequence = SEQUENCES.index(acquisition.sequence)
    signal = {tissue: np.float32(levels[sequence]) for tissue, levels in SIGNAL.items()}
    n, soft = SUBSAMPLES[PLANES[acquisition.series_type]], acquisition.spacing
    parts = ((np.arange(n) + 0.5) / n - 0.5) * acquisition.thickness
    images = np.empty((len(acquisition.affines), acquisition.rows, acquisition.cols), np.float32)
    for i, block in enumerate(acquisition.blocks):
        k = i - int(np.argmax(acquisition.blocks == block))  # slice of the block
        if k == 0:
            lattice = _Lattice(body, acquisition, acquisition.affines[acquisition.blocks == block])
        depth, plane = k * acquisition.step, lattice.affine.copy()
        u, v, s, skin = lattice.at(depth)
        plane[:3, 3] += depth * plane[:3, 2]
        coarse, fine = texture(body, plane, *u.shape)
        around = Points.of(body, *(a.ravel() for a in (u, v, s)), soft)
        image = np.full(u.size, signal["fat"])
        _compose(image, paint_around(around, *(a.ravel() for a in (skin, coarse, fine))), signal)
        images[i] = (image * (1 + 0.08 * fine.ravel())).reshape(u.shape)
        spine = (np.abs(u) < np.where(s < body.discs[FIRST + 4].item(), 54, 41)) & (v > -42) & (v < 50)
        if spine.any():
            box = tuple(slice(np.argmax(a), a.size - np.argmax(a[::-1])) for a in (spine.any(1), spine.any(0)))
            u, v, s = np.stack([lattice.at(depth + part, box)[:3] for part in parts], 1)
            value = np.tile(images[i][box].ravel(), n)
            _compose(value, paint(Points.of(body, *(a.ravel() for a in (u, v, s)), soft)), signal)
            images[i][box] = value.reshape(u.shape).mean(0)
    return images


class _Lattice:
    """Spine coordinates and depth under the skin on a coarse lattice of a block's slices, refined by cubic splines."""

    def __init__(self, body: Body, acquisition: Acquisition, affines: Array) -> None:
        """The lattice of parallel slices with affines (n, 4, 4), which reaches half a thickness beyond them."""
        self.affine = np.linalg.inv(acquisition.motion) @ affines[0]  # of the first slice; column 3: step to the next
        reach, margin = (len(affines) - 1) * acquisition.step, acquisition.thickness / 2
        knots = np.linspace(-margin, reach + margin, max(4, round((reach + 2 * margin) / 10)))
        (rows, self.down), (cols, self.along) = _spline(acquisition.rows), _spline(acquisition.cols)
        places = np.stack(np.broadcast_arrays(cols, rows[:, None], knots[:, None, None], 1.0), -1)
        points = (places @ self.affine.T)[..., :3]
        self.values = np.stack([*body.to_spine(points), body.skin_depth(points)])  # (4, through, down, along)
        self.through = CubicSpline(knots, np.eye(len(knots)))  # depth in mm from the first slice -> weights

    def at(self, depth: float, box: tuple[slice, slice] = (slice(None), slice(None))) -> Array:
        """u, v, s, skin depth (4, rows, cols) in the plane `depth` mm from the first slice, or a box of it; float32."""
        flat = np.tensordot(self.through(depth), self.values, (0, 1)).astype(np.float32)
        return self.down[box[0]] @ flat @ self.along[box[1]].T


def _spline(n: int) -> tuple[Array, Array]:
    """Knots along n pixels, and the matrix (n, knots) that interpolates between them by a cubic spline."""
    knots = np.linspace(0, n - 1, max(4, round(n / 9)))
    return knots, CubicSpline(knots, np.eye(len(knots)))(np.arange(n)).astype(np.float32)


def _compose(value: Array, layers: Iterator[Layer], signal: dict[str, np.float32]) -> None:
    """Lay tissues over `value` (n,), in place."""
    for index, cover, tissue in layers:
        below = value[index]
        value[index] = below + cover * (signal[tissue] - below)
