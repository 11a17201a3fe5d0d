"""What lies at a point of the body: tissues in layers, each covering part of those before it.

Functions take points in spine coordinates (u left, v back, s up, mm) and yield `(index, cover, tissue)`: which points,
the share of each that the tissue covers (edges are `soft` mm wide: partial volume), and its name. Numbers are mm.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lsdc_utils.phantom.body import AXIS, FIRST, RECESS, ROOTS_AREA, STEP, WAVES, Array, Body, foramen_half_width

Layer = tuple[Array | slice, Array, str]  # indices of the points, share of each that is covered, tissue
ALL = slice(None)


def unit(x: Array) -> Array:
    """Clip to [0, 1]."""
    return np.minimum(np.maximum(x, 0), 1)


def least(*depths: Array | float) -> Array:
    """Depth under the surface of what several shapes have in common."""
    return functools.reduce(np.minimum, depths)


@dataclass(frozen=True)
class Points:
    """Flat arrays of points with their place in the tables along the spine; `index`: into the points first given."""

    body: Body
    u: Array
    v: Array
    s: Array
    out: Array  # |u|
    place: Array  # index into the tables
    soft: float  # mm over which edges are spread
    index: Array | slice

    @staticmethod
    def of(body: Body, u: Array, v: Array, s: Array, soft: float) -> "Points":
        """Points from spine coordinates."""
        place = unit((s - AXIS[0].item()) / (STEP * (AXIS.size - 1))) * (AXIS.size - 1) + 0.5
        return Points(body, u, v, s, np.abs(u), place.astype(np.int32), soft, ALL)

    def pick(self, mask: Array) -> "Points":
        """The points where `mask` holds."""
        i = np.flatnonzero(mask)
        parts = (a[i] for a in (self.u, self.v, self.s, self.out, self.place))
        return Points(self.body, *parts, self.soft, i if self.index is ALL else self.index[i])

    def table(self, name: str) -> Array:
        """The value of a table at each point; of a sided table, that of the point's side."""
        values = self.body.tables[name]
        return values[self.place] if values.ndim == 1 else values[(self.u < 0).astype(np.int32), self.place]

    def cover(self, depth: Array) -> Array:
        """Share of each pixel inside a shape, from its depth (mm) under the shape's surface."""
        return unit(depth * (1 / self.soft) + 0.5)

    def layer(self, depth: Array, tissue: str, share: float | Array = 1.0) -> Layer:
        """A layer over all these points."""
        return self.index, self.cover(depth) * share, tissue

    def bone(self, depth: Array, rim: float = 0.9) -> Iterator[Layer]:
        """A rim of cortex round marrow."""
        yield self.layer(depth, "cortex")
        yield self.layer(depth - rim, "marrow", 0.9)


def texture(body: Body, affine: Array, rows: int, cols: int) -> tuple[Array, Array]:
    """Coarse and fine texture (rows, cols), sd about 1, in a plane (affine (4, 4), LPS mm): sums of plane waves."""
    fields = []
    for waves in (body.waves[:WAVES], body.waves[WAVES:]):
        down = np.arange(rows)[:, None] * (waves[:, :3] @ affine[:3, 1]) + waves[:, :3] @ affine[:3, 3] + waves[:, 3]
        along = np.arange(cols)[:, None] * (waves[:, :3] @ affine[:3, 0])
        left = np.concatenate([np.cos(down), -np.sin(down)], 1).astype(np.float32)
        right = np.concatenate([np.cos(along), np.sin(along)], 1).astype(np.float32)
        fields.append(left @ right.T * np.float32(np.sqrt(2 / len(waves))))
    return fields[0], fields[1]


def paint_around(points: Points, skin: Array, coarse: Array, fine: Array) -> Iterator[Layer]:
    """Belly, vessels, muscles, fat and air on a ground of fat; skin: depth of the points under the skin of the back."""
    p, traits = points, points.body.traits
    front = p.v + traits["front"] - 0.004 * p.u**2 + 2 * coarse
    loops = unit(0.12 * (np.hypot(0.7 * p.u, p.v + 17) - 21 - 1.5 * fine))
    yield ALL, unit(1 - 0.15 * p.v) * unit(0.7 * coarse + 0.9) * loops, "bowel"
    low = np.minimum(unit(0.85 - p.s * 0.008) + 0.35, 1.2)
    psoas = np.sqrt(((p.out - 38) / (15 * low + 1)) ** 2 + ((p.v + 13) / (19 * low + 2)) ** 2)
    yield p.layer((1 - psoas) * 14 + fine * 0.4, "muscle")
    fat = p.table("fat")  # of the back, over its fascia
    square = ((p.out - 62) / 15) ** 2 + ((p.v - 1) / 10) ** 2  # quadratus lumborum
    yield p.layer((1 - np.sqrt(square)) * 10, "muscle")
    x2, y2 = np.minimum(((p.out - 31) / 33) ** 2, 1.25), np.minimum(((p.v - 32) / 31) ** 2, 1.25)
    depth = least((1 - np.sqrt(x2 + y2 - 0.8 * x2 * y2)) * 30, skin - fat - 1.5)  # of the erector spinae
    yield p.layer(depth, "muscle")
    deep = 0.3 * unit(1 - 0.04 * p.v) + 0.5 * unit(-0.02 * p.s - 0.1)
    streaks = unit((0.7 * fine + 0.5 * coarse - 1.5 + traits["muscle_fat"] + deep) * 0.6)
    septum = 0.55 * unit(1 - np.abs(p.out - 27 - 3 * coarse) * 0.5) * unit(p.v * 0.1 - 1)
    yield ALL, p.cover(depth - 1) * np.maximum(streaks, septum) * 0.8, "fat"
    yield p.layer(least(1.0 - np.abs(skin - fat), 85 - p.out), "ligament", 0.8)
    yield p.layer(2.0 - skin, "muscle", 0.8)  # skin itself
    fork = unit((p.s + 40) * 0.125)
    below = np.maximum(-40 - p.s, 0)
    ahead = p.v + p.table("depth") + 10 - 0.3 * below
    for side, radius, flat in ((0.6, 8.0, 1.0), (-1.0, 8.5, 1.35)):  # aorta and vena cava, forking at L4
        u0 = 12 * side * fork + (side / abs(side)) * (1 - fork) * (9 + 0.35 * below)
        distance = np.hypot((p.u - u0) / flat**0.5, ahead * flat**0.5)
        yield p.layer(radius * traits["vessel"] * (0.75 + 0.25 * fork) - distance, "vessel")
    yield p.layer(14 + coarse * 2 - front, "fat")
    yield p.layer(np.maximum(-skin, -front), "air")


def paint(points: Points) -> Iterator[Layer]:
    """The spine; what it leaves uncovered stays as it is."""
    for part in (_column, _arch, _canal, _sac, _recess, _foramen):
        yield from part(points)


def _column(points: Points) -> Iterator[Layer]:
    """Vertebral bodies with cortex and marrow, discs with ring and nucleus."""
    p = points.pick((points.out < 34) & (points.v < 4) & (points.v > -48))
    half_depth, wide, t = p.table("depth") / 2, p.table("half_width"), p.table("disc_t")
    x2, y = np.minimum((p.u / wide) ** 2, 1.25), p.v / half_depth + 1
    y2 = np.minimum(y * y, 1.25)
    radius = np.sqrt(x2 + y2 - (0.65 + 0.15 * np.sign(y)) * x2 * y2)  # squarer behind than in front
    radius += np.maximum(p.out / wide - 1.1, 0) + np.maximum(np.abs(y) - 1.1, 0)
    inside = (1 - radius) * np.minimum(half_depth, wide) * 0.92
    half = p.table("disc_half") * (1.12 - 0.42 * np.minimum(radius, 1.1) ** 2) * (1 - 0.14 * y * p.table("lumbar"))
    in_disc = half - np.abs(t)
    yield p.layer(inside, "cortex")
    yield p.layer(least(inside - 0.9, -0.8 - in_disc), "marrow")
    marrow = p.pick(inside > 0.5)  # endplate change and haemangiomas affect no grade
    for place, kind in p.body.traits["endplate"]:
        off = np.abs(marrow.s - p.body.discs[place].item())
        plate = marrow.table("disc_half") + 0.8
        depth = plate + 9 + 0.25 * marrow.v - off
        near = (depth > -1) & (off > plate)
        yield marrow.pick(near).index, unit(depth[near] * 0.25) * 0.8, kind
    for u0, v0, s0, size in p.body.traits["haemangioma"]:
        q = marrow.pick(np.abs(marrow.s - s0) < size + 1)
        distance = np.sqrt((q.u - u0) ** 2 + (q.v - v0) ** 2 + (q.s - s0) ** 2)
        yield q.layer(least(size - distance, 12 - np.abs(q.table("vertebra_t"))), "haemangioma", 0.9)
    vein = p.pick((p.out < 6) & (p.v > -14))
    depth = 1.3 - np.abs(vein.table("vertebra_t")) + 0.09 * vein.v
    yield vein.layer(least(depth, 4 - vein.out), "fluid", 0.5)
    near = in_disc > -p.soft
    d = p.pick(near)
    in_disc, inside, radius, t = (a[near] for a in (in_disc, inside, radius, t))
    yield d.layer(least(in_disc, inside + 1.0), "disc")
    core = least((0.62 - radius) * 14, in_disc - 1.1)
    cleft = 1 - 0.35 * unit(1 - np.abs(t) / 0.9)
    yield d.index, unit(core * 0.4 + 0.5) * d.table("hydration") * cleft, "nucleus"


def _arch(points: Points) -> Iterator[Layer]:
    """Pedicles, transverse processes, laminae, spinous processes, facet joints, wings of the sacrum."""
    p = points.pick((points.v > -8) & (points.v < 60) & (points.out < 48))
    t = p.table("pedicle_t")
    q = p.pick((np.abs(t) < 9) & (p.out < 30) & (p.v < 16))
    thick = unit((40 - q.s) / 110) * 3.5 + 4.0  # half a pedicle's width grows downwards
    across = thick - np.abs(q.out - (q.table("canal_w") + thick - 0.5))
    front = np.maximum(q.v + 5, 0.9 * q.table("half_width") - q.out)  # joined to the body, not jutting out beside it
    yield from q.bone(least(6.8 - np.abs(q.table("pedicle_t")), across, 13 - q.v, front))
    q = p.pick((np.abs(p.v - 10) < 4.5) & (np.abs(t) < 7))
    yield from q.bone(least(4 - np.abs(q.table("pedicle_t") + 1), 3 - np.abs(q.v - 10), 40 - q.out), 0.8)
    yield from _laminae(p)
    yield from _facets(p)
    down = p.body.discs[FIRST + 4].item() - 5
    wing = points.pick((points.s < down + 3) & (points.v > -18) & (points.v < 20) & (points.out < 56))
    below = down - wing.s
    sheet = least(52 - 0.35 * below - wing.out, below - 0.12 * wing.out, 15 - 0.007 * wing.out**2 - wing.v, wing.v + 16)
    hole = np.hypot(wing.out - 20, 0.6 * wing.table("disc_t")) - 4
    yield from wing.bone(least(sheet, hole, np.maximum(wing.out - 21, wing.v - 3)))


def _laminae(p: Points) -> Iterator[Layer]:
    """Roof of the canal, sloping backwards as it descends, the spinous process behind it, fat between the processes."""
    q = p.pick((p.out < 16) & (p.v > 8) & (p.v < 32))
    t = q.table("vertebra_t") + 3.0
    front = q.table("canal_d") - 0.45 * q.out - 0.18 * t
    yield from q.bone(least(q.v - front, front + 6.0 - q.v, 9.5 - np.abs(t)), 0.8)
    q = p.pick((p.out < 6) & (p.v > 16))
    behind = q.v - q.table("canal_d")
    length = 13 + 14 * q.table("lumbar")
    t = q.table("vertebra_t") + 6 + 0.2 * behind
    tip = (np.maximum(behind - length + 6, 0) / 6) ** 2
    tall = 5.6 + 0.1 * behind - 4 * tip
    between = least(2.5 - q.out, behind - 3, length + 2 - behind)
    strands = 0.62 + 0.16 * np.cos(0.4 * behind + 0.04 * q.s) * np.cos(0.9 * t + 0.2 * behind)
    yield q.index, q.cover(between) * strands, "fat"
    yield from q.bone(least(tall - np.abs(t), 3.2 + 0.05 * behind - q.out, behind - 2, length - behind), 0.8)


def _facets(p: Points) -> Iterator[Layer]:
    """Articular pillars; at each disc the joint between the lower process behind and the upper process in front."""
    q = p.pick((np.abs(p.out - 16) < 13) & (np.abs(p.v - 15) < 12) & (p.table("lumbar") > 0.02))
    t = q.table("disc_t") - 2
    joint = unit(1.5 - np.abs(t) / 9)
    a, b = q.out - q.table("canal_w") - 3.6, q.v - 15.5
    across, along = 0.77 * a - 0.64 * b, 0.64 * a + 0.77 * b  # across the cleft, to the front and outwards; along it
    radius = np.sqrt((along / (4.6 + 3.2 * joint)) ** 2 + (across / (3.8 + 3.2 * joint)) ** 2)
    depth = least((1 - radius) * (4.2 + 3 * joint), q.v - 8.6)
    yield from q.bone(depth, 1.0)
    cleft = np.abs(across + 0.25 - 0.03 * along**2)
    open_joint = unit(joint * 8 - 6) * (depth > 0)
    fluid = q.table("facet_fluid")
    yield q.layer(fluid + 1.0 - cleft, "cortex", open_joint)
    yield q.layer(fluid - cleft, "fluid", open_joint * 0.9)


def _canal(points: Points) -> Iterator[Layer]:
    """Epidural fat, and the ligamentum flavum that lines the roof between two laminae."""
    p = points.pick((points.out < 15) & (points.v > -1) & (points.v < 23))
    lumbar, t = p.table("lumbar"), p.table("disc_t")
    roof = p.table("canal_d") + 1.2 * lumbar - 0.48 * p.out - 0.1 * np.abs(t)
    depth = least(roof - p.v, p.v - 0.3, p.table("canal_w") - p.out)
    yield p.layer(depth, "fat")
    window = unit((11.5 - np.abs(t + 1)) * 0.5) * lumbar
    thick = 3.4 - np.maximum(0.9 - 0.5 * p.out, 0)
    yield p.layer(least(depth, thick - (roof - p.v)), "ligament", window)
    at_disc = unit((8.0 - np.abs(t)) * 0.5) * lumbar
    yield p.layer(least(depth, p.out - 6.5, 14 - p.v), "ligament", at_disc)


def _sac(points: Points) -> Iterator[Layer]:
    """Dural sac in its envelope: what the envelope lost is disc in front and ligament behind; cord and roots within."""
    p = points.pick((points.out < 11) & (points.v > -1) & (points.v < 19))
    wide, deep = np.maximum(p.table("sac_a0"), 0.5), np.maximum(p.table("sac_b0"), 0.5)
    w = p.v - p.table("sac_v")
    around = np.sqrt((p.u / wide) ** 2 + (w / deep) ** 2)
    near = around < 1.5
    q, w = p.pick(near), w[near]
    there = unit((deep[near] - 0.6) * 4)
    canal, envelope = q.table("canal"), q.cover((1 - around[near]) * deep[near])
    roof = q.table("canal_d") - 1.2 - 0.4 * q.out
    rest = q.cover(least(6.2 - q.out, q.v - 0.2, roof - q.v)) * unit(canal * 2.5)  # fat round it
    lost = np.maximum(envelope * unit(canal * 6), rest) * there
    front = q.cover(-w)
    yield q.index, lost * front, "disc"
    yield q.index, lost * (1 - front), "ligament"
    a, b = np.maximum(q.table("sac_a"), 0.5), np.maximum(q.table("sac_b"), 0.5)
    inside = (1 - np.sqrt((q.u / a) ** 2 + (w / b) ** 2)) * b
    yield q.layer(inside + 0.6, "ligament", there)  # dura
    yield q.layer(inside, "csf", there)
    for u0, w0, s0, size in q.body.traits["voids"]:
        off = np.sqrt((q.u - u0) ** 2 + (w - w0) ** 2 + (0.3 * (q.s - s0)) ** 2)
        yield q.index, unit(1.2 - off / size * 2) * q.cover(inside - 1) * (np.abs(q.table("disc_t")) > 10) * 0.6, "void"
    cord = q.table("cord")  # above its tip; below it roots
    depth = (1 - np.sqrt((q.u / (5.2 * cord + 0.01)) ** 2 + ((w - 0.5) / (4.0 * cord + 0.01)) ** 2)) * 4 * cord
    yield q.layer(least(depth, inside), "cord", unit(cord * 20))
    share = unit(ROOTS_AREA * unit(1.2 - cord * 1.2) / (np.pi * a * b))
    behind = (w / b - 1 + 2 * share + 0.12 * np.abs(q.u / a)) * b  # roots fill the sac from the back, by their share
    fill = np.maximum(unit(behind / 2.2 + 0.5), 0.3)  # and a few float elsewhere
    strands = 0.6 + 0.25 * np.cos(2.3 * q.u + 0.05 * q.s) * np.cos(1.9 * w + 0.07 * q.s + 1)
    crowded = unit((share - 0.3) * 2.2)
    yield q.index, q.cover(inside) * fill * np.maximum(strands, crowded) * (1 - 0.8 * unit(cord * 2)), "root"


def _recess(points: Points) -> Iterator[Layer]:
    """Lateral recess at a disc: fat round the traversing root, closed by disc from the front and facet from behind."""
    p = points.pick((points.out > 5) & (points.out < 16) & (points.v > -1) & (points.v < 9))
    p = p.pick(p.table("recess_open") > 0)
    u0, v0, a0, b0 = RECESS
    is_open, b, n = p.table("recess_open"), p.table("recess_b"), p.table("recess_n")
    x, y = (p.out - u0) / a0, p.v - v0
    yield p.layer((1 - np.sqrt(x**2 + (y / (b0 + 0.6)) ** 2)) * b0, "ligament", is_open)
    yield p.layer((1 - np.sqrt(x**2 + (y / b) ** 2)) * b, "fat", is_open)
    tall = np.minimum(1.9, 0.85 * b)
    wide = np.minimum(3.6 / tall, 2.6)  # a root that is squeezed spreads
    off = p.out - (u0 - 0.6 - 0.14 * p.table("disc_t") - 0.9 * n)
    yield p.layer((1 - np.sqrt((off / wide) ** 2 + (y / tall) ** 2)) * tall, "root", is_open)


def _foramen(points: Points) -> Iterator[Layer]:
    """Foramen: fat in the shape of a drop, the exiting root high in it; what it loses becomes disc and ligament."""
    p = points.pick((points.out > 13) & (points.out < 27) & (points.v > -5) & (points.v < 13))
    t = p.table("foramen_t")
    p = p.pick((t > -8) & (t < 18))
    t, n = p.table("foramen_t"), p.table("foramen_n")
    across = p.v - (3.6 - 0.25 * (p.out - 18))
    length = least(p.out - 14.0, 24.5 - p.out)
    envelope = least(foramen_half_width(t, np.zeros_like(t)) - np.abs(across) + 0.4, length)
    yield p.layer(envelope, "ligament")
    yield p.layer(least(envelope, -across - 2.5), "disc", unit(6.5 - np.abs(t)))
    half = foramen_half_width(t, n)
    yield p.layer(least(half - np.abs(across), length), "fat", unit(half * 20))
    squeeze = np.minimum(2.5, 0.8 * foramen_half_width(np.full_like(n, 10.0), n))
    off = t - (10.6 - 0.3 * (p.out - 18))
    root = (1 - np.sqrt((across / squeeze) ** 2 + (off / 2.8) ** 2)) * squeeze
    yield p.layer(least(root, length + 1), "root")
