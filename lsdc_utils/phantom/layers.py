"""What lies at a point of the body: tissues in layers, each covering part of those before it, from back to front.

All functions take flat arrays of points in spine coordinates (u left, v back, s up, mm) and yield `(index, cover, tissue)`:
which points, the share of each that the tissue covers (edges are `soft` mm wide, so that pixels get partial volume), and
the tissue's name. Numbers without a comment are millimetres of an adult lumbar spine.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lsdc_utils.phantom.body import AXIS, RECESS, ROOTS_AREA, STEP, Body, foramen_half_width

Array = np.ndarray
Layer = tuple[Array, Array, str]  # indices of the points, share of each that is covered, tissue

TISSUES = (
    "air", "fat", "muscle", "marrow", "cortex", "disc", "nucleus", "csf", "cord", "root", "ligament",
    "vessel", "bowel", "fluid", "oedema", "haemangioma",
)  # fmt: skip


def paint(body: Body, u: Array, v: Array, s: Array, soft: float) -> Iterator[Layer]:
    """All layers of the spine at flat arrays of points; what is not covered stays what lies around the spine."""
    place = np.clip(np.rint((s - AXIS[0]) / STEP), 0, AXIS.size - 1).astype(np.int32)
    points = Points(body, u, v, s, place, (u < 0).astype(np.int32), np.abs(u), soft)
    yield from _column(points)
    yield from _arch(points)
    yield from _canal(points)
    yield from _sac(points)
    yield from _recess(points)
    yield from _foramen(points)


class Points:
    """Points with their place in the tables; `pick` narrows to a part of them and remembers where they came from."""

    def __init__(self, body, u, v, s, place, right, out, soft, index=None):
        self.body, self.u, self.v, self.s, self.place, self.right, self.out = body, u, v, s, place, right, out
        self.soft, self.index = np.float32(soft), index

    def pick(self, mask: Array) -> Points:
        """The points where `mask` holds."""
        i = np.flatnonzero(mask)
        parts = (a[i] for a in (self.u, self.v, self.s, self.place, self.right, self.out))
        return Points(self.body, *parts, self.soft, i if self.index is None else self.index[i])

    def table(self, name: str) -> Array:
        """The value of a table at each point; of a sided table, that of the point's side."""
        values = self.body.tables[name]
        return values[self.place] if values.ndim == 1 else values.reshape(-1)[self.place + self.right * values.shape[1]]

    def cover(self, depth: Array) -> Array:
        """Share of a point's pixel inside a shape, from its depth (mm) under the shape's surface."""
        return np.clip(depth / self.soft + np.float32(0.5), 0, 1)

    def layer(self, depth: Array, tissue: str, share: float | Array = 1.0) -> Layer:
        """A layer of all these points."""
        return self.index, self.cover(depth) * np.float32(1) * share, tissue


def _column(points: Points) -> Iterator[Layer]:
    """Vertebral bodies with cortex and marrow, discs with ring and nucleus."""
    p = points.pick((points.out < 34) & (points.v < 4) & (points.v > -48))
    half_depth = p.table("depth") / 2
    wide = p.table("half_width")
    x2 = (p.u / wide) ** 2
    y = p.v / half_depth + 1
    y2 = y * y
    radius = np.sqrt(np.maximum(x2 + y2 - 0.72 * x2 * y2, 0))
    inside = (1 - radius) * np.minimum(half_depth, wide) * np.float32(0.92)
    t = p.table("disc_t")
    half = p.table("disc_half") * (1.12 - 0.42 * np.minimum(radius, 1.1) ** 2) * (1 - 0.14 * y * p.table("lumbar"))
    in_disc = half - np.abs(t)
    yield p.layer(inside, "cortex")
    yield p.layer(np.minimum(inside - 0.9, -0.8 - in_disc), "marrow")
    yield from _marrow_findings(p.pick(inside > 0.5))
    vein = p.pick((p.out < 6) & (p.v > -14))
    depth = 1.3 - np.abs(vein.table("vertebra_t")) + 0.09 * vein.v
    yield vein.layer(np.minimum(depth, 4 - vein.out), "fluid", 0.5)
    d = p.pick(in_disc > -p.soft)
    in_disc, inside, radius, t = (a[in_disc > -p.soft] for a in (in_disc, inside, radius, t))
    yield d.layer(np.minimum(in_disc, inside + 1.0), "disc")
    core = np.minimum((0.66 - radius) * 14, in_disc - 0.9)
    water = d.table("hydration")
    cleft = 1 - 0.35 * np.clip(1 - np.abs(t) / 0.9, 0, 1)
    yield d.index, np.clip(core / 2.5 + 0.5, 0, 1) * water * cleft, "nucleus"


def _marrow_findings(p: Points) -> Iterator[Layer]:
    """Endplate change and haemangiomas: they have no meaning for any grade."""
    traits = p.body.traits
    for disc, kind in traits["endplate"]:
        t = p.s - np.float32(p.body.discs[disc])
        depth = 9 + 0.25 * p.v - np.abs(t)
        q = p.pick((depth > -1) & (np.abs(t) > p.table("disc_half") + 0.8))
        if q.index.size:
            yield (
                q.index,
                np.clip((9 + 0.25 * q.v - np.abs(q.s - np.float32(p.body.discs[disc]))) / 4, 0, 1) * 0.8,
                kind,
            )
    for u0, v0, s0, size in traits["haemangioma"]:
        q = p.pick(np.abs(p.s - np.float32(s0)) < size + 1)
        distance = np.sqrt((q.u - u0) ** 2 + (q.v - v0) ** 2 + (q.s - s0) ** 2)
        yield q.layer(
            np.float32(size) - distance, "haemangioma", np.where(np.abs(q.table("vertebra_t")) < 12, 0.9, 0.0)
        )


def _slab(p: Points, depth: Array, rim: float = 0.9) -> Iterator[Layer]:
    """Bone: a rim of cortex round marrow."""
    yield p.layer(depth, "cortex")
    yield p.layer(depth - np.float32(rim), "marrow", 0.85)


def _arch(points: Points) -> Iterator[Layer]:
    """Pedicles, pillars with facet joints, laminae, spinous and transverse processes, sacral wings."""
    lumbar = points.table("lumbar")
    p = points.pick((points.v > -8) & (points.v < 62) & (points.out < 48))
    t = p.table("pedicle_t")
    canal_w, canal_d = p.table("canal_w"), p.table("canal_d")
    tv = p.table("vertebra_t")
    grow = np.interp(p.s, [p.body.discs[8] - 30, p.body.discs[5], p.body.discs[3]], [7.5, 4.6, 4.0]).astype(np.float32)
    q = p.pick((np.abs(t) < 9) & (p.out < 30) & (p.v < 16))
    if q.index.size:
        m = (np.abs(t) < 9) & (p.out < 30) & (p.v < 16)
        g = grow[m]
        across = g - np.abs(q.out - (canal_w[m] + g - 0.5))
        yield from _slab(q, np.minimum(np.minimum(7.2 - np.abs(t[m]), across), 13 - q.v))
    m = (np.abs(p.v - 13) < 4.5) & (np.abs(t) < 6)  # transverse processes
    q = p.pick(m)
    if q.index.size:
        yield from _slab(q, np.minimum(np.minimum(4 - np.abs(t[m] + 1), 3 - np.abs(q.v - 10)), 40 - q.out), 0.8)
    yield from _laminae(p, tv, canal_w, canal_d)
    yield from _facets(p, canal_w)
    wing = points.pick((lumbar < 0.5) & (points.v > -26) & (points.v < 26) & (points.out < 56))
    if wing.index.size:
        down = np.float32(wing.body.discs[8] - 5) - wing.s
        reach = 52 - 0.35 * down
        back = 15 - 0.012 * wing.out**2 * 0.6
        depth = np.minimum(np.minimum(reach - wing.out, down - 0.12 * wing.out), np.minimum(back - wing.v, wing.v + 16))
        hole = np.hypot(wing.out - 20, 0.6 * wing.table("disc_t")) - 4
        outside = np.maximum(wing.out - 21, wing.v - 3)
        yield from _slab(wing, np.minimum(np.minimum(depth, hole), outside))


def _laminae(p: Points, tv: Array, canal_w: Array, canal_d: Array) -> Iterator[Layer]:
    """Roof of the canal, sloping backwards as it descends, and the spinous process behind it."""
    m = (p.out < 16) & (p.v > 8) & (p.v < 32)
    q = p.pick(m)
    t = tv[m] + 3.0
    front = canal_d[m] - 0.45 * q.out - 0.18 * t
    yield from _slab(q, np.minimum(np.minimum(q.v - front, front + 6.0 - q.v), 9.5 - np.abs(t)), 0.8)
    m = (p.out < 6) & (p.v > 16)
    q = p.pick(m)
    behind = q.v - canal_d[m]
    size = np.where(q.table("lumbar") > 0.5, np.float32(31), np.float32(14))
    t = tv[m] + 7 + 0.14 * behind
    depth = np.minimum(
        np.minimum(8.0 + 0.1 * behind - np.abs(t), 3.4 + 0.05 * behind - q.out), np.minimum(behind - 2, size - behind)
    )
    yield from _slab(q, depth, 0.8)
    between = np.minimum(np.minimum(2.0 - q.out, behind - 3), np.minimum(size - behind, np.abs(t) - 8.8 - 0.1 * behind))
    yield q.index, q.cover(between) * 0.55, "fat"


def _facets(p: Points, canal_w: Array) -> Iterator[Layer]:
    """Articular pillars; at each disc the joint between the lower process behind and the upper process in front."""
    m = (np.abs(p.out - 16) < 13) & (np.abs(p.v - 15) < 12) & (p.table("lumbar") > 0.02)
    q = p.pick(m)
    if not q.index.size:
        return
    t = q.table("disc_t") - 2
    at_joint = np.clip(1.5 - np.abs(t) / 9, 0, 1)
    middle = canal_w[m] + 3.6
    a, b = q.out - middle, q.v - 15.5
    across, along = 0.77 * a - 0.64 * b, 0.64 * a + 0.77 * b  # across points to the front and outwards
    depth = (1 - np.sqrt((along / (4.6 + 3.2 * at_joint)) ** 2 + (across / (3.8 + 3.2 * at_joint)) ** 2)) * (
        4.2 + 3 * at_joint
    )
    depth = np.minimum(depth, q.v - 8.6)
    yield from _slab(q, depth, 1.0)
    gap = np.abs(across + 0.25 - 0.03 * along**2)
    open_joint = (at_joint > 0.75) & (depth > 0)
    yield q.index, q.cover(1.5 - gap) * open_joint, "cortex"
    yield q.index, q.cover(0.45 - gap) * open_joint * 0.9, "fluid"


def _canal(points: Points) -> Iterator[Layer]:
    """Epidural fat, and the ligamentum flavum that lines the roof between two laminae."""
    p = points.pick((points.out < 15) & (points.v > -1) & (points.v < 23))
    lumbar = p.table("lumbar")
    wide, deep = p.table("canal_w"), p.table("canal_d")
    t = p.table("disc_t")
    roof = deep + 1.2 * lumbar - (0.48 * p.out) - 0.1 * np.abs(t)
    depth = np.minimum(np.minimum(roof - p.v, p.v - 0.3), wide - p.out)
    yield p.layer(depth, "fat")
    window = np.clip((11.5 - np.abs(t + 1)) / 2, 0, 1) * lumbar
    thick = 3.4 - np.maximum(0.0, 0.9 - 0.5 * p.out)
    yield p.layer(np.minimum(depth, thick - (roof - p.v)), "ligament", window)
    at_disc = np.clip((8.0 - np.abs(t)) / 2, 0, 1) * lumbar
    side = np.minimum(np.minimum(depth, p.out - 6.5), 14 - p.v)
    yield p.layer(side, "ligament", at_disc)


def _sac(points: Points) -> Iterator[Layer]:
    """Dural sac in its envelope: what the envelope has lost is disc in front and ligament behind; cord and roots within."""
    p = points.pick((points.out < 11) & (points.v > -1) & (points.v < 18))
    wide, deep, middle = p.table("sac_a0"), p.table("sac_b0"), p.table("sac_v")
    w = p.v - middle
    around = np.sqrt((p.u / np.maximum(wide, 0.5)) ** 2 + (w / np.maximum(deep, 0.5)) ** 2)
    q = p.pick(around < 1.25)
    m = around < 1.25
    wide, deep, w, around = wide[m], deep[m], w[m], around[m]
    open_sac = np.minimum(wide, deep) > 0.6
    envelope = (1 - around) * deep
    canal = q.table("canal")
    lost = np.clip(canal * 6, 0, 1) * open_sac
    front = q.cover(-w)
    yield q.index, q.cover(envelope) * lost * front, "disc"
    yield q.index, q.cover(envelope) * lost * (1 - front), "ligament"
    a, b = np.maximum(q.table("sac_a"), 0.5), np.maximum(q.table("sac_b"), 0.5)
    inside = (1 - np.sqrt((q.u / a) ** 2 + (w / b) ** 2)) * b
    yield q.layer(inside + 0.6, "ligament", open_sac)  # dura
    yield q.layer(inside, "csf", open_sac)
    yield from _nerves(q, a, b, w, inside)


def _nerves(q: Points, a: Array, b: Array, w: Array, inside: Array) -> Iterator[Layer]:
    """Cord above its tip; below it the roots, lying at the back, and filling the sac where it is narrow."""
    cord = q.table("cord")
    depth = (1 - np.sqrt((q.u / (5.2 * cord + 0.01)) ** 2 + ((w - 0.5) / (4.0 * cord + 0.01)) ** 2)) * 4 * cord
    yield q.layer(np.minimum(depth, inside), "cord", cord > 0.05)
    share = ROOTS_AREA * np.clip(1.2 - cord * 1.2, 0, 1) / (np.pi * a * b)
    level = 1 - 2 * np.clip(share, 0, 1)  # roots lie behind this part of the sac's half depth
    fill = np.clip((w / b - level + 0.12 * np.abs(q.u / a)) * b / 2.2 + 0.5, 0, 1)
    strands = 0.72 + 0.28 * np.cos(2.3 * q.u + 0.05 * q.s) * np.cos(1.9 * w + 0.07 * q.s + 1)
    crowded = np.clip((share - 0.3) * 2.2, 0, 1)
    yield (
        q.index,
        q.cover(inside) * fill * np.maximum(strands * 0.75, crowded) * (1 - 0.8 * np.clip(cord * 2, 0, 1)),
        "root",
    )


def _recess(points: Points) -> Iterator[Layer]:
    """Lateral recess at a disc: fat round the traversing root, closed from the front by disc, from behind by the facet."""
    p = points.pick((points.out > 5) & (points.out < 16) & (points.v > -1) & (points.v < 9))
    u0, v0, a0, b0 = RECESS
    is_open = p.table("recess_open")
    p = p.pick(is_open > 0)
    is_open = is_open[is_open > 0]
    if not p.index.size:
        return
    x = (p.out - u0) / a0
    y = p.v - v0
    yield p.layer((1 - np.sqrt(x**2 + (y / (b0 + 0.6)) ** 2)) * b0, "ligament", is_open)
    b = p.table("recess_b")
    n = p.table("recess_n")
    yield p.layer((1 - np.sqrt(x**2 + (y / b) ** 2)) * b, "fat", is_open)
    t = p.table("disc_t")
    tall = np.minimum(1.9, 0.85 * b)
    wide = 3.6 / tall
    wide = np.minimum(wide, 2.6)
    off = p.out - (u0 - 0.6 - 0.14 * t - 0.9 * n)
    yield p.layer((1 - np.sqrt((off / wide) ** 2 + (y / tall) ** 2)) * tall, "root", is_open)


def _foramen(points: Points) -> Iterator[Layer]:
    """Neural foramen: fat in the shape of a drop with the exiting root high in it; what it loses becomes disc and ligament."""
    p = points.pick((points.out > 13) & (points.out < 27) & (points.v > -5) & (points.v < 13))
    t, n = p.table("foramen_t"), p.table("foramen_n")
    m = (t > -8) & (t < 18)
    p, t, n = p.pick(m), t[m], n[m]
    if not p.index.size:
        return
    across = p.v - (4.4 - 0.12 * (p.out - 18))
    length = np.minimum(p.out - 14.0, 24.5 - p.out)
    envelope = foramen_half_width(t, np.zeros_like(t)) - np.abs(across)
    yield p.layer(np.minimum(envelope + 1.0, length), "ligament")
    yield p.layer(np.minimum(np.minimum(envelope + 1, length), -across - 2.5), "disc", (np.abs(t) < 6) * 1.0)
    half = foramen_half_width(t, n)
    fat = half - np.abs(across)
    yield p.layer(np.minimum(fat, length), "fat", half > 0.05)
    squeeze = np.minimum(2.7, 0.82 * foramen_half_width(np.float32(10.0) + 0 * n, n))
    off = t - (10.6 - 0.3 * (p.out - 18))
    root = (1 - np.sqrt((across / squeeze) ** 2 + (off / 3.0) ** 2)) * squeeze
    yield p.layer(root, "root", length > -0.5)
