"""Three series of one body: where slices are planned, and what a scanner makes of the tissues that lie there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy import fft
from scipy.interpolate import CubicSpline

from lsdc_utils import geometry
from lsdc_utils.phantom.body import AXIS, FIRST, Array, Body
from lsdc_utils.phantom.contrast import Visit, draw_greys
from lsdc_utils.phantom.layers import Layer, Points, paint, paint_around, texture
from lsdc_utils.phantom.points import ALL
from lsdc_utils.vocabulary import PLANES, T1, T2

Blocks = tuple[float, list[tuple[Array, Array, Array]]]  # step; middle, axes and offsets of slices of each block
ABOVE, BELOW = 16.0, 20.0  # mm that a sagittal image shows above L1/L2 and below L5/S1
SUBSAMPLES = {"sagittal": 3, "axial": 2}  # through a slice, in the spine
POPULATIONS = ("", "narrow", "close", "grey", "steep")  # the usual one, and those that training never draws
SCALES = {"": (128, 256), "realistic": (320, 1024)}  # least and most pixels along the longer side


@dataclass(frozen=True)
class Protocol:
    """How series are taken: factors against the usual scan, except where said otherwise."""

    motion: float = 1.0  # of the patient between series, usually up to 3 mm and about 1 degree
    step: float = 1.0  # distance and thickness of slices
    pixel: float = 1.0  # side of a pixel
    noise: float = 1.0
    field: float = 1.0  # unevenness of the coil's field
    gain: float = 1.0  # of the receiver: stored values per unit of signal
    stir: float = 0.4  # share of the sagittal T2/STIR series with STIR or fat suppression (.3 to .5 is assumed)
    scale: str = ""  # "realistic": pixels of 0.4 to 0.7 mm
    population: str = ""  # sagittal fields, "narrow": 140 to 175 mm, "close": 180 to 240; "grey": greys; "steep": sacra

    def __post_init__(self) -> None:
        for name, known in (("scale", SCALES), ("population", POPULATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"phantom: {name} is one of {tuple(known)}, not {getattr(self, name)!r}")


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
    sequence: str  # one of contrast.SEQUENCES
    motion: Array  # (4, 4): from the body as built to the patient's place during this series
    blocks: Array  # (n,) which parallel stack each slice belongs to
    greys: dict[str, np.float32]  # signal of each tissue, 1 at most
    coil: float = np.inf  # mm, see Visit
    warp: float = 0.0  # share by which distances from the middle are off 140 mm away from it
    protocol: Protocol = USUAL

    def to_scanner(self, points: Array) -> Array:
        """Where this series sees points of the body (..., 3), LPS mm."""
        return points @ self.motion[:3, :3].T + self.motion[:3, 3]


def plan_series(
    rng: np.random.Generator, body: Body, series_type: str, levels: tuple[int, ...] = (0, 1, 2, 3, 4),
    tilted: bool = False, square: bool = True, protocol: Protocol = USUAL, visit: Visit | None = None,
) -> Acquisition:  # fmt: skip
    """Plan a series. levels: which axial slices cover. tilted: an axial block along each disc, else parallel stacks.
    square: as many rows as columns. visit: by default one of its own. A protocol changes only what it names."""
    contrast_rng, motion_rng, place_rng = rng.spawn(3)
    visit = visit or Visit.draw(contrast_rng)
    is_axial = PLANES[series_type] == "axial"
    rows, cols, spacing = _frame_of(place_rng, body, is_axial, square, protocol, visit)
    if is_axial:
        step, stacks = (_plan_tilted if tilted else _plan_parallel)(place_rng, body, levels, protocol.step)
    else:
        step, stacks = _plan_sagittal(place_rng, body, (rows * spacing, cols * spacing), protocol.step, visit.cut)
    affines = np.concatenate([_stack(*stack, (rows, cols), spacing) for stack in stacks])
    blocks = np.repeat(np.arange(len(stacks)), [len(offsets) for _, _, offsets in stacks])
    suppressed, kind = contrast_rng.random(2)
    sequence = "t1" if series_type == T1 else "t2"
    if suppressed < protocol.stir and series_type == T2:
        sequence = "stir" if kind < 0.7 else "t2fs"
    greys = draw_greys(contrast_rng, visit, sequence, protocol.population == "grey" and not is_axial)
    motion = np.eye(4)  # of the body about the middle of the lumbar spine
    motion[:3, :3] = _rotation(np.deg2rad(motion_rng.normal(0, 1.0 / np.sqrt(3), 3)) * protocol.motion)
    motion[:3, 3] = geometry.unit(motion_rng.normal(0, 1, 3)) * motion_rng.uniform(0, 3) * protocol.motion
    form = (rows, cols, spacing, step, step * place_rng.uniform(0.75, 1.0), sequence, motion, blocks, greys)
    return Acquisition(series_type, affines, *form, visit.coil, motion_rng.uniform(-0.03, 0.03), protocol)


def _frame_of(
    rng: np.random.Generator, body: Body, is_axial: bool, square: bool, protocol: Protocol, visit: Visit
) -> tuple[int, int, float]:
    """Rows, columns and mm a pixel. The field of view holds all levels in height unless the visit cuts them."""
    low, high = SCALES[protocol.scale]
    finest, coarsest = (0.4, 0.7) if protocol.scale else (0.9, 1.3) if is_axial else (1.15, 1.95)
    draws = rng.uniform([finest, 0.78, 0, 140, 160, -0.2], [coarsest, 0.92, 1, 175, 210, 0.2])
    pixel, share, flat, narrow, axial, stretch = draws.tolist()
    sagittal = max(visit.view * np.exp(stretch), np.ptp(body.points()[:5, 2]) + ABOVE + BELOW)
    sagittal = narrow if protocol.population == "narrow" else 40 + narrow if visit.cut else sagittal
    sagittal = np.interp(narrow, [140, 175], [180, 240]) if protocol.population == "close" else sagittal
    view = axial if is_axial else sagittal
    longer = 8 * round(np.clip(view / pixel, low, high) / 8)
    shorter = longer if square else 8 * round(longer * share / 8)
    spacing = view / longer * protocol.pixel
    longer, shorter = round(longer / protocol.pixel), round(shorter / protocol.pixel)
    wide = is_axial and flat < 0.7  # sagittal images lose columns, so that all levels stay in them
    return (shorter, longer, spacing) if wide else (longer, shorter, spacing)


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


def _plan_sagittal(rng: np.random.Generator, body: Body, size: tuple[float, float], wider: float, cut: bool) -> Blocks:
    """9 to 25 slices of an image of `size` (height, width in mm), fewer where steps are `wider`, more in a bowed spine.
    Up to 40 mm off the spine's middle, as far as L5/S1, and unless `cut` L1/L2, stay in the image."""
    points = body.points()
    middle, (height, depth) = points[:5].mean(0), size
    step, width = rng.uniform([3, 44], [6, 68])
    n, step = round(np.clip(round(width / step) + 1, 9, 25) / wider), step * wider
    highest = points[4, 2] - middle[2] - BELOW + height / 2
    lowest = -60.0 if cut else points[0, 2] - middle[2] + ABOVE - height / 2
    low, high = np.clip([min(lowest, highest), highest], -60 if cut else -40, 40)
    back = np.clip(rng.uniform(-40, 40), 45 - depth / 2, depth / 2 - 55)  # the sacrum lies farther back
    middle = middle + np.array([rng.normal(0, 1.5), back, rng.uniform(low, high)])
    reach = np.abs(points[5:15, 0] - middle[0]).max() + 3  # all foramina are seen
    n = max(n, round(2 * reach / step - 0.5))
    turn = _rotation(np.deg2rad([0, rng.normal(0, 1.2), rng.normal(0, 1.2)]))
    axes = np.array([[0, 1, 0], [0, 0, -1], [1, 0, 0]]) @ turn.T
    return step, [(middle, axes, (np.arange(n) - (n - 1) / 2) * step)]


def _axial_place(rng: np.random.Generator) -> tuple[Array, Array]:
    """How far from the canal an axial field lies (3,), and the turn (3, 3) of the patient in it."""
    aside, back, lean, turn = np.clip(rng.normal([0, -6, 0, 0], [9, 10, 1.5, 3]), -25, [25, 25, 8, 8])
    return np.array([aside, back, 0]), _rotation(np.deg2rad([0, lean, turn]))


def _plan_parallel(rng: np.random.Generator, body: Body, levels: tuple[int, ...], wider: float) -> Blocks:
    """Axial slices from above the first of the levels to below the last: one stack, or two that overlap and follow
    the tilt of their discs where one would have more than 25."""
    step = rng.uniform(4.3, 6.3) * wider
    (shift, turn), points = _axial_place(rng), body.points()
    angle, above, below, *overlap = rng.uniform([-7, 5, 6, 2, 2], [5, 11, 12, 8, 8])
    span = points[levels[0], 2] - points[levels[-1], 2] + above + below
    split, k = span / step > 25 and len(levels) > 2, len(levels) // 2 + 1
    parts = [(levels[:k], above, overlap[1]), (levels[k - 1 :], overlap[0], below)] if split else []
    blocks = []
    for part, upper, lower in parts or [(levels, above, below)]:
        tilt = np.interp(body.discs[[FIRST + k for k in part]], AXIS, body.tilt).mean() if split else 0.0
        axes = _axial_axes(tilt + np.deg2rad(angle)) @ turn.T
        middle = points[list(part)].mean(0) + shift
        depth = (points[list(part)] - middle) @ axes[2]
        blocks.append((middle, axes, np.arange(depth[0] - upper, depth[-1] + lower, step)))
    return step, blocks


def _plan_tilted(rng: np.random.Generator, body: Body, levels: tuple[int, ...], wider: float) -> Blocks:
    """Three to six axial slices (fewer where steps are `wider`) along each disc, tilted with it; blocks cross."""
    step, blocks, n = rng.uniform(3, 4.5) * wider, [], max(2, round(rng.integers(3, 7) / wider))
    shift, turn = _axial_place(rng)
    for k in levels:
        axes = _axial_axes(np.interp(body.discs[FIRST + k], AXIS, body.tilt) + np.deg2rad(rng.normal(0, 2))) @ turn.T
        middle = body.points()[k] + shift + axes[2] * rng.normal(0, 0.8)
        blocks.append((middle, axes, (np.arange(n) - (n - 1) / 2) * step))
    return step, blocks


def _axial_axes(tilt: float) -> Array:
    """Column to the left, row to the back, normal to the foot, of a slice across a spine tilted by `tilt` radians."""
    back = np.array([0, np.cos(tilt), -np.sin(tilt)])
    return np.array([[1.0, 0, 0], back, [0, -np.sin(tilt), -np.cos(tilt)]])


def render(body: Body, acquisition: Acquisition, rng: np.random.Generator, see: Callable | None = None) -> Array:
    """Image the body: uint16 (n, rows, cols), 12 bits, with the coil's uneven field, saturation band, wrap, noise.
    see: called as `expose` is, by default that function."""
    image = _wrapped(body, acquisition, rng, see or expose)
    rows, cols = image.shape[1:]
    row, col = np.linspace(-1, 1, rows)[:, None], np.linspace(-1, 1, cols)[None]
    step, start = acquisition.affines[0, 1, :2], acquisition.affines[0, 1, 3]
    back = start + step[0] * np.arange(cols) + step[1] * np.arange(rows)[:, None]  # mm behind the bodies of L3/L4
    a = rng.normal(0, [0.06, 0.06, 0.06, 0.1, 0.06]) * acquisition.protocol.field
    field = np.exp(np.clip(back, -140, 75) / acquisition.coil)
    field = field * np.exp(a[0] * row + a[1] * col + a[2] * row * col + a[3] * row**2 + a[4] * col**2)
    edge, banded = rng.uniform(-95, -65), rng.random() < 0.6
    if banded:
        field = field * (1 - 0.75 * np.clip((edge - back) / 12, 0, 1))
    sigma = np.exp(rng.uniform(np.log(0.01), np.log(0.05))) * acquisition.protocol.noise
    value = _acquire(rng, image * field.astype(np.float32), sigma)
    scale = min(np.exp(rng.uniform(np.log(400), np.log(2600))), 3800 / field.max()) * acquisition.protocol.gain
    return np.clip(np.rint(value * np.float32(scale)), 0, 4095).astype(np.uint16)


def _acquire(rng: np.random.Generator, value: Array, sigma: float) -> Array:
    """Magnitude (n, rows, cols), written over `value`, after noise of this sd and a window on k-space: zero outside,
    sharpening within. Noise is Rician, and correlated between pixels; what is finer than the acquired pixel is lost."""
    filters = []
    for size, least in zip(value.shape[1:], rng.permutation([0.6, 0.75]), strict=True):
        frequency = np.abs(fft.fftfreq(size)) * 2 / rng.uniform(least, least + 0.25)  # 1: the last that is acquired
        filters.append((np.clip((1 - frequency) / 0.25, 0, 1), frequency**2))
    (down, far), (along, wide) = filters
    sharp = rng.uniform(0, 0.7)
    keep = np.sin(np.pi / 2 * down[:, None]) * np.sin(np.pi / 2 * along) * (1 + sharp * (far[:, None] + wide))
    noise = rng.standard_normal((*value.shape, 2), np.float32).view(np.complex64)[..., 0]
    noise *= np.float32(sigma / np.sqrt((keep**2).mean()))
    keep = keep.astype(np.float32)
    for image, other in zip(value, noise, strict=True):  # one by one: a slice fits in the processor's cache
        other += image
        image[:] = np.abs(fft.ifft2(fft.fft2(other, overwrite_x=True) * keep, overwrite_x=True))
    return value


def _wrapped(body: Body, acquisition: Acquisition, rng: np.random.Generator, see: Callable) -> Array:
    """The signal; in a quarter of axial series what lies beside the field shows weakly on its other side."""
    chance, share, strength = rng.uniform([0, 0.03, 0.15], [1, 0.08, 0.6])
    if chance > 0.25 or PLANES[acquisition.series_type] != "axial":
        return see(body, acquisition)
    n, affines = round(share * acquisition.cols), acquisition.affines.copy()
    affines[:, :3, 3] -= n * affines[:, :3, 0]
    image = see(body, replace(acquisition, affines=affines, cols=acquisition.cols + 2 * n))
    image[:, :, -2 * n : -n] += np.float32(strength) * image[:, :, :n]
    image[:, :, n : 2 * n] += np.float32(strength) * image[:, :, -n:]
    return image[:, :, n:-n]


def expose(body: Body, acquisition: Acquisition, kept: list | None = None) -> Array:
    """Signal (n, rows, cols) before coil and noise, 1 at most; in the spine a mean over the slice's thickness. kept: a
    list for what `expose_again` needs of each slice: number, box of the spine, u, v, s (3, n, rows, cols), greys."""
    signal, soft = acquisition.greys, acquisition.spacing
    n = SUBSAMPLES[PLANES[acquisition.series_type]]
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
            places = np.stack([lattice.at(depth + part, box)[:3] for part in parts], 1)  # (3, n, rows, cols)
            ground = np.tile(images[i][box].ravel(), n)
            value = ground.copy()
            _compose(value, paint(Points.of(body, *places.reshape(3, -1), soft)), signal)
            images[i][box] = value.reshape(places.shape[1:]).mean(0)
            if kept is not None:
                kept.append((i, box, places, ground, value))
    return images


def expose_again(body: Body, acquisition: Acquisition, images: Array, kept: list, tables: dict[str, Array]) -> Array:
    """As `expose` gives it for a body that differs only in its tables from one with `tables`, for which it gave images
    and `kept`: drawn where the tables differ."""
    changed = np.any([(body.tables[name] != old).reshape(-1, AXIS.size).any(0) for name, old in tables.items()], axis=0)
    images = images.copy()
    for i, box, places, ground, value in kept if changed.any() else ():
        points = Points.of(body, *places.reshape(3, -1), acquisition.spacing)
        if (here := changed[points.place]).any():
            value, part = value.copy(), ground[here]
            _compose(part, paint(replace(points.pick(here), index=ALL)), acquisition.greys)
            value[here] = part
            images[i][box] = value.reshape(places.shape[1:]).mean(0)
    return images


class _Lattice:
    """Spine coordinates and depth under the skin on a coarse lattice of a block's slices, refined by cubic splines."""

    def __init__(self, body: Body, acquisition: Acquisition, affines: Array) -> None:
        """The lattice of parallel slices with affines (n, 4, 4), which reaches half a thickness beyond them."""
        self.affine = np.linalg.inv(acquisition.motion) @ affines[0]  # of the first slice; column 3: step to the next
        reach, margin = (len(affines) - 1) * acquisition.step, acquisition.thickness / 2
        knots = np.linspace(-margin, reach + margin, max(4, round((reach + 2 * margin) / 10)))
        size = acquisition.cols, acquisition.rows
        (cols, self.along), (rows, self.down) = (_spline(n, acquisition.spacing) for n in size)
        x, y = cols - (size[0] - 1) / 2, rows[:, None] - (size[1] - 1) / 2
        warp = acquisition.warp * (np.hypot(x, y) * acquisition.spacing / 140) ** 4  # gradients are not quite linear
        x, y = cols + warp * x, rows[:, None] + warp * y
        places = np.stack(np.broadcast_arrays(x, y, knots[:, None, None], 1.0), -1)
        points = (places @ self.affine.T)[..., :3]
        self.values = np.stack([*body.to_spine(points), body.skin_depth(points)])  # (4, through, down, along)
        self.through = CubicSpline(knots, np.eye(len(knots)))  # depth in mm from the first slice -> weights

    def at(self, depth: float, box: tuple[slice, slice] = (slice(None), slice(None))) -> Array:
        """u, v, s, skin depth (4, rows, cols) in the plane `depth` mm from the first slice, or a box of it; float32."""
        flat = np.tensordot(self.through(depth), self.values, (0, 1)).astype(np.float32)
        return self.down[box[0]] @ flat @ self.along[box[1]].T


def _spline(n: int, spacing: float) -> tuple[Array, Array]:
    """Knots along n pixels, 12 mm apart, and the matrix (n, knots) of cubic splines between them."""
    knots = np.linspace(0, n - 1, max(4, round(n * spacing / 12)))
    return knots, CubicSpline(knots, np.eye(len(knots)))(np.arange(n)).astype(np.float32)


def _compose(value: Array, layers: Iterator[Layer], signal: dict[str, np.float32]) -> None:
    """Lay tissues over `value` (n,), in place."""
    for index, cover, tissue in layers:
        below = value[index]
        value[index] = below + cover * (signal[tissue] - below)
