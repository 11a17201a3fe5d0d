"""Three series of one body: where slices are planned, and what a scanner makes of the tissues that lie there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import CubicSpline

from lsdc_utils.phantom.body import AXIS, FIRST, Array, Body
from lsdc_utils.phantom.layers import paint
from lsdc_utils.vocabulary import PLANES, T1, T2

SIGNAL = {  # share of the brightest tissue, by sequence
    "t1": dict(air=0, fat=1.0, muscle=0.30, marrow=0.55, cortex=0.08, disc=0.30, nucleus=0.34, csf=0.16, cord=0.36, root=0.33,
               ligament=0.15, vessel=0.06, bowel=0.36, fluid=0.22, oedema=0.30, haemangioma=0.85),
    "t2": dict(air=0, fat=0.82, muscle=0.20, marrow=0.42, cortex=0.06, disc=0.13, nucleus=0.80, csf=1.0, cord=0.42, root=0.34,
               ligament=0.11, vessel=0.05, bowel=0.34, fluid=0.85, oedema=0.62, haemangioma=0.75),
    "stir": dict(air=0, fat=0.10, muscle=0.30, marrow=0.20, cortex=0.05, disc=0.13, nucleus=0.85, csf=1.0, cord=0.45, root=0.36,
                 ligament=0.12, vessel=0.06, bowel=0.45, fluid=0.95, oedema=0.55, haemangioma=0.35),
}  # fmt: skip
STIR_SHARE = 0.25  # of the sagittal T2/STIR series
SUBSAMPLES = 3  # through a slice, in the spine


@dataclass(frozen=True)
class Acquisition:
    """A planned series. `affines` map (column, row, 0, 1) of each slice to LPS mm, slices from right to left or head to foot."""

    series_type: str
    affines: Array  # (n, 4, 4)
    rows: int
    cols: int
    spacing: float  # mm between pixels
    step: float  # mm between neighbouring slices of a block
    thickness: float  # mm
    sequence: str  # t1, t2 or stir
    motion: Array  # (4, 4): the patient's place during this series, against that of the body as built
    blocks: Array  # (n,) which parallel stack each slice belongs to

    def to_scanner(self, points: Array) -> Array:
        """Where this series sees points of the body (..., 3), LPS mm."""
        return points @ self.motion[:3, :3].T + self.motion[:3, 3]

    def to_body(self, points: Array) -> Array:
        """The inverse of `to_scanner`."""
        return (points - self.motion[:3, 3]) @ self.motion[:3, :3]


def plan_series(
    rng: np.random.Generator,
    body: Body,
    series_type: str,
    *,
    levels: tuple[int, ...] = (0, 1, 2, 3, 4),
    tilted: bool = False,
    square: bool = True,
    stir: bool | None = None,
) -> Acquisition:
    """Plan a series as a technician would.

    levels: indices of the levels that axial slices reach; tilted: axial slices in a block a level, each along its disc,
    else one parallel stack; square: as many rows as columns; stir: force or forbid STIR for the sagittal T2 series.
    """
    rows = cols = int(rng.choice([160, 176, 192, 208, 224]))
    if not square:
        rows, cols = (rows, cols - 24) if rng.random() < 0.7 else (rows - 24, cols)
    if PLANES[series_type] == "axial":
        fov = np.clip(rng.normal(188, 9), 168, 212)
        plan = _plan_blocks if tilted else _plan_parallel
        affines, step, blocks = plan(rng, body, (rows, cols), fov / max(rows, cols), levels)
    else:
        fov = np.clip(rng.normal(290, 14), 262, 325)
        affines, step, blocks = _plan_sagittal(rng, body, (rows, cols), fov / max(rows, cols))
    toss = rng.random()
    sequence = "t1" if series_type == T1 else "t2"
    if series_type == T2 and (toss < STIR_SHARE if stir is None else stir):
        sequence = "stir"
    return Acquisition(
        series_type, affines, rows, cols, fov / max(rows, cols), step, 0.9 * step, sequence, _motion(rng), blocks
    )


def _rotation(angles: Array) -> Array:
    """Rotation (3, 3) about x, then y, then z by angles in radians."""
    cx, cy, cz = np.cos(angles)
    sx, sy, sz = np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def _motion(rng: np.random.Generator) -> Array:
    """A small rigid motion about the middle of the lumbar spine: about 1.5 mm and 1 degree in all."""
    motion = np.eye(4)
    motion[:3, :3] = _rotation(np.deg2rad(rng.normal(0, 1.0 / np.sqrt(3), 3)))
    motion[:3, 3] = rng.normal(0, 1.5 / np.sqrt(3), 3)
    return motion


def _stack(middle: Array, axes: Array, size: tuple[int, int], spacing: float, offsets: Array) -> Array:
    """Affines (n, 4, 4) of slices centred at `middle` + offset along the normal; axes: rows are column, row, normal."""
    affines = np.tile(np.eye(4), (len(offsets), 1, 1))
    affines[:, :3, 0] = axes[0] * spacing
    affines[:, :3, 1] = axes[1] * spacing
    affines[:, :3, 2] = axes[2]
    corner = middle - spacing * (axes[0] * (size[1] - 1) + axes[1] * (size[0] - 1)) / 2
    affines[:, :3, 3] = corner + offsets[:, None] * axes[2]
    return affines


def _plan_sagittal(
    rng: np.random.Generator, body: Body, size: tuple[int, int], spacing: float
) -> tuple[Array, float, Array]:
    """13 or 14 slices, the canal behind the middle of the image where real label points lie: affines, step, blocks."""
    step = float(rng.choice([4.0, 4.3, 4.5]))
    n = int(rng.choice([13, 14], p=[0.7, 0.3]))
    shift = np.array([rng.normal(0, 1.5), -0.058 * size[1] * spacing, 0.0235 * size[0] * spacing])
    middle = body.points()[:5].mean(0) + shift + [0, rng.normal(0, 11), rng.normal(0, 11)]
    turn = _rotation(np.deg2rad([0, rng.normal(0, 1.2), rng.normal(0, 1.2)]))
    axes = np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]]) @ turn.T
    return _stack(middle, axes, size, spacing, (np.arange(n) - (n - 1) / 2) * step), step, np.zeros(n, int)


def _plan_parallel(
    rng: np.random.Generator, body: Body, size: tuple[int, int], spacing: float, levels: tuple[int, ...]
) -> tuple[Array, float, Array]:
    """One axial stack from above the first of the levels to below the last: affines, step, blocks."""
    step = float(rng.choice([5.0, 5.5, 6.0]))
    axes = _axial_axes(np.deg2rad(rng.normal(-1, 3)))
    points = body.points()[list(levels)]
    middle = body.points()[:5].mean(0) + [rng.normal(0, 3), rng.normal(0, 5), 0]
    depth = (points - middle) @ axes[2]
    offsets = np.arange(depth[0] - rng.uniform(5, 11), depth[-1] + rng.uniform(6, 12), step)
    return _stack(middle, axes, size, spacing, offsets), step, np.zeros(len(offsets), int)


def _plan_blocks(
    rng: np.random.Generator, body: Body, size: tuple[int, int], spacing: float, levels: tuple[int, ...]
) -> tuple[Array, float, Array]:
    """Four axial slices along each disc, tilted with it: affines, step, blocks."""
    step, affines = float(rng.choice([3.5, 4.0])), []
    shift = np.array([rng.normal(0, 3), rng.normal(0, 5), 0])
    for k in levels:
        place = body.discs[FIRST + k]
        axes = _axial_axes(np.interp(place, AXIS, body.tilt) + np.deg2rad(rng.normal(0, 2)))
        middle = body.points()[k] + shift + axes[2] * rng.normal(0, 0.8)
        affines.append(_stack(middle, axes, size, spacing, (np.arange(4) - 1.5) * step))
    return np.concatenate(affines), step, np.repeat(np.arange(len(levels)), 4)


def _axial_axes(tilt: float) -> Array:
    """Column to the left, row to the back, normal to the foot, of a slice across a spine tilted by `tilt` radians."""
    back = np.array([0, np.cos(tilt), -np.sin(tilt)])
    return np.array([[1.0, 0, 0], back, [0, -np.sin(tilt), -np.cos(tilt)]])


def render(body: Body, acquisition: Acquisition, rng: np.random.Generator) -> Array:
    """Image the body: uint16 (n, rows, cols), 12 bits."""
    image = np.empty((len(acquisition.affines), acquisition.rows, acquisition.cols), np.float32)
    for block in np.unique(acquisition.blocks):
        chosen = np.flatnonzero(acquisition.blocks == block)
        lattice = _Lattice.over(body, acquisition, acquisition.affines[chosen])
        for i in chosen:
            image[i] = _expose(body, acquisition, lattice, i - chosen[0])
    return _receive(image, acquisition, body, rng)


@dataclass(frozen=True)
class _Lattice:
    """Spine and body coordinates on a coarse lattice of a block's slices, to be refined by cubic splines.

    They are smooth, so that finding them at every pixel would be waste.
    """

    values: Array  # (6, a, b, c): u, v, s and x, y, z at knots through the stack, down the rows, along the columns
    knots: Array  # (a,) depth of knots below the first slice, mm
    down: Array  # (rows, b)
    along: Array  # (cols, c)

    @staticmethod
    def over(body: Body, acquisition: Acquisition, affines: Array) -> _Lattice:
        normal = affines[0, :3, 2]  # the direction in which slices are counted
        reach = (len(affines) - 1) * acquisition.step
        margin = acquisition.thickness / 2
        knots = np.linspace(-margin, reach + margin, max(4, round((reach + 2 * margin) / 10)))
        rows, cols = _knots(acquisition.rows), _knots(acquisition.cols)
        plane = affines[0, :3, 0] * cols[:, None] + affines[0, :3, 1] * rows[:, None, None] + affines[0, :3, 3]
        points = acquisition.to_body(knots[:, None, None, None] * normal + plane)
        values = np.stack([*body.to_spine(points), *np.moveaxis(points, -1, 0)])
        return _Lattice(
            values, knots, _weights(rows, np.arange(acquisition.rows)), _weights(cols, np.arange(acquisition.cols))
        )

    def at(self, depth: float) -> Array:
        """u, v, s, x, y, z (6, rows, cols) in the plane `depth` mm below the first slice, float32."""
        flat = np.tensordot(_weights(self.knots, np.array([depth]))[0], self.values, (0, 1)).astype(np.float32)
        return self.down @ flat @ self.along.T


def _knots(n: int) -> Array:
    return np.linspace(0, n - 1, max(4, round(n / 9)))


def _weights(knots: Array, places: Array) -> Array:
    """Matrix (places, knots) that interpolates by a cubic spline."""
    return CubicSpline(knots, np.eye(len(knots)))(places).astype(np.float32)


def _expose(body: Body, acquisition: Acquisition, lattice: _Lattice, k: int) -> Array:
    """Signal (rows, cols) of slice k of a block, before the coil: a mean over the slice's thickness."""
    signal = SIGNAL[acquisition.sequence]
    depth = k * acquisition.step
    around = surroundings(body, lattice.at(depth), signal, acquisition)
    levels = (np.arange(SUBSAMPLES) + 0.5) / SUBSAMPLES - 0.5
    total = np.zeros_like(around)
    for part in levels * acquisition.thickness:
        u, v, s = lattice.at(depth + part)[:3]
        spine = np.flatnonzero((np.abs(u) < 58) & (v > -46) & (v < 60))
        value = around.ravel()[spine]
        u, v, s = (a.ravel()[spine] for a in (u, v, s))
        for index, cover, tissue in paint(body, u, v, s, acquisition.spacing):
            value[index] += cover * (np.float32(signal[tissue]) - value[index])
        image = around.copy()
        image.ravel()[spine] = value
        total += image
    return total / SUBSAMPLES


def surroundings(body: Body, place: Array, signal: dict[str, float], acquisition: Acquisition) -> Array:
    """Signal (rows, cols) of what lies around the spine: bowel and vessels in front, muscle, fat, skin and air."""
    u, v, s, x, y, z = place
    traits = body.traits
    out = np.abs(u)
    fine, coarse = texture(body, x, y, z)
    image = signal["bowel"] + (signal["fat"] * 0.8 - signal["bowel"]) * np.clip(coarse * 0.8 + 0.45, 0, 1)

    def put(depth: Array, tissue: str, share: float = 1.0) -> None:
        nonlocal image
        image = image + np.clip(depth / acquisition.spacing + 0.5, 0, 1) * share * (signal[tissue] - image)

    half_depth = 17.0
    put(11 - np.maximum(np.hypot(out * 0.7, v + half_depth) - 18, 0), "fat", 0.85)
    low = np.clip((95 - s) / 120, 0.15, 1)
    put((1 - np.sqrt(((out - 38) / (15 * low + 2)) ** 2 + ((v + 15) / (19 * low + 3)) ** 2)) * 14, "muscle")
    back = traits["skin"] - 0.004 * out**2
    put(np.minimum(v - 3, back - v), "muscle")
    put(
        np.minimum(np.minimum(v - 5, back - v), 60 - out),
        "fat",
        np.clip(fine + coarse - 1.6 + 2 * traits["muscle_fat"], 0, 0.7),
    )
    put(v - back, "fat")
    wall = 1.0 - np.abs(v - back)
    put(wall, "cortex", 0.8)
    fork = np.clip((s + 40) / 8, 0, 1)
    for side, radius in ((0.55, 8.5), (-0.9, 9.5)):
        lateral = 12 * side * fork + np.sign(side) * (1 - fork) * (10 + 0.35 * np.clip(-40 - s, 0, 60))
        ahead = -46 + 0.25 * np.clip(-40 - s, 0, 80)
        put(radius * traits["vessel"] * (0.8 + 0.2 * fork) - np.hypot(u - lateral, v - ahead), "vessel")
    surface = body.traits["skin"] + traits["fat"] - 0.006 * x**2 - y
    put(-surface, "air")
    put(-(y + traits["front"] - 0.004 * x**2), "air")
    return (image * (1 + 0.1 * fine * (image > 0.02))).astype(np.float32)


def texture(body: Body, x: Array, y: Array, z: Array) -> tuple[Array, Array]:
    """Fine and coarse texture of the body at places in LPS mm, mean 0, sd about 1; a sum of plane waves.

    Planes are affine, so that each wave over an image is an outer product of one over rows and one over columns.
    """
    origin = np.array([x[0, 0], y[0, 0], z[0, 0]])
    down = np.array([a[-1, 0] - a[0, 0] for a in (x, y, z)]) / (x.shape[0] - 1)
    along = np.array([a[0, -1] - a[0, 0] for a in (x, y, z)]) / (x.shape[1] - 1)
    fields = []
    for waves in (body.waves[24:], body.waves[:24]):
        rows = np.arange(x.shape[0])[:, None] * (waves[:, :3] @ down) + waves[:, :3] @ origin + waves[:, 3]
        cols = np.arange(x.shape[1])[:, None] * (waves[:, :3] @ along)
        left = np.concatenate([np.cos(rows), -np.sin(rows)], 1).astype(np.float32)
        right = np.concatenate([np.cos(cols), np.sin(cols)], 1).astype(np.float32)
        fields.append(left @ right.T * np.float32(np.sqrt(2 / len(waves))))
    return fields[0], fields[1]


def _receive(image: Array, acquisition: Acquisition, body: Body, rng: np.random.Generator) -> Array:
    """What the coil and the receiver add: fall-off to the front, uneven field, saturation band, noise, scale; 12 bits."""
    n, rows, cols = image.shape
    row, col = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, cols)[None]
    back = acquisition.affines[0, 1, 0] * np.arange(cols) + acquisition.affines[0, 1, 1] * np.arange(rows)[:, None]
    back = back - back.mean() + 20
    falloff = np.exp(np.clip(back, -140, 75) / rng.uniform(130, 260))
    a = rng.normal(0, 0.06, 5)
    field = falloff * np.exp(a[0] * row + a[1] * col + a[2] * row * col + a[3] * row**2 + a[4] * col**2)
    if rng.random() < 0.6:
        edge = rng.uniform(-75, -60) + 20
        field = field * (1 - 0.75 * np.clip((edge - back) / 12, 0, 1))
    sigma = rng.uniform(0.035, 0.055)
    value = image * field.astype(np.float32)
    real = value + sigma * rng.standard_normal(image.shape, np.float32)
    other = sigma * rng.standard_normal(image.shape, np.float32)
    scale = np.exp(rng.uniform(np.log(400), np.log(2600)))
    return np.clip(np.rint(np.sqrt(real**2 + other**2) * np.float32(scale)), 0, 4095).astype(np.uint16)
