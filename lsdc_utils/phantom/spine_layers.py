"""The spine in layers of tissue: vertebrae, discs, arches and joints, canal, sac, recesses and foramina; mm."""

from collections.abc import Iterator

import numpy as np

from lsdc_utils.phantom.body import LAST, ROOTS_AREA, Array
from lsdc_utils.phantom.causes import RECESS, RIM, foramen_half_width, foramen_walls, front_profile, sac_walls
from lsdc_utils.phantom.points import Layer, Points, least, unit


def paint(points: Points) -> Iterator[Layer]:
    """The spine; what it leaves uncovered stays as it is."""
    for part in (_column, _arch, _canal, _sac, _recess, _foramen):
        yield from part(points)


def _column(points: Points) -> Iterator[Layer]:
    """Vertebral bodies with cortex and marrow, discs with ring and nucleus."""
    p = points.pick((points.out < 36) & (points.v < 4) & (points.v > -50))
    half_depth, wide, t = p.table("depth") / 2, p.table("half_width"), p.table("disc_t")
    x, y = p.u / wide, p.v / half_depth + 1
    x2, y2 = np.minimum(x * x, 1.25), np.minimum(y * y, 1.25)
    radius = np.sqrt(x2 + y2 - (0.62 + 0.18 * np.sign(y)) * x2 * y2)  # squarer behind than in front
    radius += np.maximum(np.abs(x) - 1.1, 0) + np.maximum(np.abs(y) - 1.1, 0)
    inside = (1 - radius) * np.minimum(half_depth, wide) * 0.92
    half = p.table("disc_half") * (1.12 - 0.42 * np.minimum(radius, 1.1) ** 2)
    half *= 1 - y * p.table("wedge") * p.table("lumbar") + x * p.table("wedge_u")
    edge = 0.33 * np.sign(t)  # the two endplates of a disc are rough in their own ways
    uneven = np.cos(0.42 * p.v + p.table("phase1") + edge) + np.cos(0.37 * p.u + p.table("phase2") + edge)
    uneven += np.cos(0.9 * p.v + 0.7 * p.u + p.table("phase3") - 2 * edge)
    in_disc = half + uneven * p.table("rough") - np.abs(t)
    in_disc = _with_schmorl_nodes(p, in_disc, t)
    yield p.layer(inside, "cortex")
    yield p.layer(least(inside - 0.9, -0.8 - in_disc), "marrow")
    yield from _marrow_changes(p.pick(inside > 0.5))
    near = in_disc > -p.soft
    d = p.pick(near)
    in_disc, inside, x, y, t = (a[near] for a in (in_disc, inside, x, y, t))
    bulge = 0.4 + d.table("bulge") * unit(-0.25 * d.v)  # behind, the places of the canal show it
    yield d.layer(least(in_disc, inside + bulge), "disc")
    wet = d.table("hydration")
    radius = np.sqrt(x * x + (y - 0.12) ** 2) + 0.08 * np.cos(3 * x + d.table("phase1"))
    core = least((0.42 + 0.24 * unit(wet + 0.2) - radius) * 14, in_disc - 1.1)
    cleft = 1 - 0.35 * unit(1 - np.abs(t) / 0.9)
    yield d.index, unit(core * 0.3 + 0.5) * wet * cleft, "nucleus"


def _with_schmorl_nodes(p: Points, in_disc: Array, t: Array) -> Array:
    """Depth in the discs, with what sank into the vertebrae."""
    for place, side, u0, v0, size in p.body.traits["schmorl"]:
        near = np.flatnonzero((np.abs(p.s - p.body.discs[int(place)].item()) < 16) & (np.abs(p.u - u0) < size + 1))
        q = p.table("disc_half")[near] + 0.5
        away = np.sqrt(
            (p.u[near] - u0) ** 2 + (p.v[near] - v0) ** 2 + (1.3 * ((t[near] if side > 0 else -t[near]) - q)) ** 2
        )
        in_disc[near] = np.maximum(in_disc[near], size - away)
    return in_disc


def _marrow_changes(marrow: Points) -> Iterator[Layer]:
    """Modic changes along endplates, haemangiomas, basivertebral veins; none affects a grade."""
    for place, kind, reach in marrow.body.traits["endplate"]:
        off = np.abs(marrow.s - marrow.body.discs[place].item())
        plate = marrow.table("disc_half") + 0.8
        depth = plate + reach + 0.25 * marrow.v - off
        near = (depth > -1) & (off > plate)
        yield marrow.pick(near).index, unit(depth[near] * 0.25) * 0.8, kind
    for u0, v0, s0, size in marrow.body.traits["haemangioma"]:
        q = marrow.pick(np.abs(marrow.s - s0) < size + 1)
        distance = np.sqrt((q.u - u0) ** 2 + (q.v - v0) ** 2 + (q.s - s0) ** 2)
        yield q.layer(least(size - distance, 12 - np.abs(q.table("vertebra_t"))), "haemangioma", 0.9)
    vein = marrow.pick((marrow.out < 6) & (marrow.v > -14))
    depth = 1.3 - np.abs(vein.table("vertebra_t")) + 0.09 * vein.v
    yield vein.layer(least(depth, 4 - vein.out), "fluid", 0.5)


def _arch(points: Points) -> Iterator[Layer]:
    """Pedicles, transverse processes, laminae, spinous processes, facet joints, wings of the sacrum."""
    p = points.pick((points.v > -8) & (points.v < 66) & (points.out < 48))
    t, down = p.table("pedicle_t"), p.body.discs[LAST].item() - 5
    q = p.pick((np.abs(t) < 9) & (p.s > down) & (p.out < 30) & (p.v < 16))
    thick = unit((40 - q.s) / 110) * 3.5 + 4.0  # half a pedicle's width grows downwards
    oval = np.hypot(q.table("pedicle_t") / 7.2, (q.out - q.table("canal_w") - thick + 0.5) / (thick + 0.2))
    front = np.maximum(q.v + 5, 0.9 * q.table("half_width") - q.out)  # joined to the body, not jutting out beside it
    yield from q.bone(least((1 - oval) * thick, 13 - q.v, front))
    q = p.pick(
        (np.abs(p.v - 12) < 7) & (np.abs(t) < 7) & (p.s > down)
    )  # transverse processes, thinner and further back outwards
    oval = np.hypot((q.table("pedicle_t") + 1) / 5, (q.v - 6.5 - 0.2 * q.out) / 3.6)
    yield from q.bone(least((1 - oval) * 3.6 - unit(0.04 * q.out - 0.8), 40 - q.out), 0.8)
    yield from _laminae(p)
    yield from _facets(p)
    wing = points.pick((points.s < down + 3) & (points.v > -18) & (points.v < 20) & (points.out < 56))
    below = down - wing.s
    sheet = least(52 - 0.35 * below - wing.out, below - 0.12 * wing.out, 15 - 0.007 * wing.out**2 - wing.v, wing.v + 16)
    hole = np.hypot(wing.out - 20, 0.6 * wing.table("disc_t")) - 4
    yield from wing.bone(least(sheet, hole, np.maximum(wing.out - 21, wing.v - 3)))


def _laminae(p: Points) -> Iterator[Layer]:
    """Roof of the canal, sloping backwards as it descends; spinous processes, and ligaments and fat between them."""
    q = p.pick((p.out < 17) & (p.v > 8) & (p.v < 34))
    t = q.table("vertebra_t") + 3.0
    front = q.table("canal_d") - 0.5 * q.out - 0.18 * t
    yield from q.bone(least(q.v - front, front + 6.0 - q.v, 9.5 - np.abs(t)), 0.8)
    q = p.pick((p.out < 7) & (p.v > 16))
    behind = q.v - q.table("canal_d")
    length = 13 + 14 * q.table("lumbar")
    t = q.table("vertebra_t") + 6 + 0.2 * behind
    tip = (np.maximum(behind - length + 6, 0) / 6) ** 2
    tall = 6.2 + 0.16 * behind - 5 * tip
    between = least(2.8 - q.out, behind - 3, length + 1 - behind)
    strands = 0.26 + 0.2 * np.cos(0.9 * behind + 0.5 * t) * np.cos(0.35 * t + 1)
    yield q.layer(between, "muscle")
    yield q.index, q.cover(between) * strands, "fat"
    yield q.layer(least(1.1 - np.abs(behind - length - 1.5), 3 - q.out), "ligament", 0.9)  # supraspinous
    yield from q.bone(least(tall - np.abs(t), 3.0 + 0.09 * behind - q.out, behind - 2, length - behind), 0.9)


def _facets(p: Points) -> Iterator[Layer]:
    """At each disc a C-shaped joint, more oblique further down, between the lower process of the vertebra above and
    the upper one of the vertebra below; 25 to 50 degrees off the midline (Panjabi et al., Spine 1993)."""
    q = p.pick((np.abs(p.out - 17) < 14) & (np.abs(p.v - 16) < 14) & (p.table("lumbar") > 0.02))
    t, size = q.table("disc_t") - 2, q.table("joint_size")
    joint = unit(1.5 - np.abs(t) / 9)
    a, b, turn = q.out - q.table("canal_w") - 3.8, q.v - 16.0, q.table("joint_turn")
    c, s = np.cos(turn), np.sin(turn)
    across, along = c * a - s * b, s * a + c * b  # to the front and outwards; along the cleft, to the back and outwards
    bent = across - 0.045 * along**2 + 0.5
    long, wide = (4.8 + 3.4 * joint) * size, (3.0 + 2.2 * joint) * size
    knobs = 1 + 0.13 * np.cos(0.7 * along + 0.5 * t + q.table("phase1")) * joint
    radius = np.sqrt((along / long) ** 2 + (bent / (wide * knobs)) ** 2)
    depth = least((1 - radius) * wide, q.v - 8.8)
    yield from q.bone(depth, 1.0)
    open_joint = unit(joint * 8 - 6) * (depth > 0)
    cleft, fluid = np.abs(bent), q.table("facet_fluid")
    yield q.layer(fluid + 1.0 - cleft, "cortex", open_joint)
    yield q.layer(least(fluid - cleft, long - 1.5 - np.abs(along)), "fluid", open_joint * 0.8)


def _canal(points: Points) -> Iterator[Layer]:
    """Epidural fat, a triangle behind the sac, and the V of the ligamentum flavum between two laminae."""
    p = points.pick((points.out < 15) & (points.v > -1) & (points.v < 25))
    lumbar, t = p.table("lumbar"), p.table("disc_t")
    roof = p.table("canal_d") + 1.2 * lumbar - 0.62 * p.out - 0.1 * np.abs(t) - 0.1 * np.maximum(p.out - 7, 0) ** 2
    depth = least(roof - p.v, p.v - 0.3, p.table("canal_w") - p.out)
    yield p.layer(depth, "fat")
    window = unit((11.5 - np.abs(t + 1)) * 0.5) * lumbar
    thick = 3.2 - np.maximum(1.6 - 0.9 * p.out, 0)
    yield p.layer(least(depth, thick - (roof - p.v)), "ligament", window)
    at_disc = unit((8.0 - np.abs(t)) * 0.5) * lumbar
    yield p.layer(least(depth, p.out - 6.5 - 0.2 * p.v, 14 - p.v), "ligament", at_disc * 0.5)


def _sac(points: Points) -> Iterator[Layer]:
    """Dural sac in its envelope: what causes took from it is disc in front, ligament behind, or fat; cord and roots."""
    p = points.pick((points.out < 13) & (points.v > -1) & (points.v < 20))
    if not p.out.size:
        return
    w = p.v - p.table("sac_v")
    near = np.hypot(p.u / np.maximum(p.table("sac_a"), 0.5), w / np.maximum(p.table("sac_b"), 0.5)) < 1.5
    q, w = p.pick(near), w[near]
    envelope, ahead, behind, beside = sac_walls(q.u, w, lambda name: np.maximum(q.table(name), 0.5) if name in (
        "sac_a", "sac_b") else q.table(name))  # fmt: skip
    pushed = ahead - q.table("push_front") * front_profile(q.u, q.table)
    inside = least(envelope, pushed, behind - q.table("push_back"), beside - q.table("push_side"))
    there = unit((q.table("sac_b") - 0.6) * 4)
    canal = q.table("canal")
    gap = q.cover(least(6.2 - q.out, q.v - 0.2, -w)) * unit(canal * 2.5)  # between sac and vertebrae
    yield q.index, np.maximum(q.cover(envelope), gap) * there, "ligament"
    disc = np.maximum(q.cover(least(envelope, -pushed)), gap) * unit(8 - np.abs(q.table("disc_t")))
    yield q.index, disc * there, "disc"
    yield q.index, q.cover(envelope) * there * unit(1.5 * q.table("canal_fat")), "fat"
    yield q.layer(inside + 0.5, "ligament", there)  # dura
    yield q.layer(inside, "csf", there)
    for u0, w0, s0, size in q.body.traits["voids"]:
        off = np.sqrt((q.u - u0) ** 2 + (w - w0) ** 2 + (0.3 * (q.s - s0)) ** 2)
        yield q.index, unit(1.2 - off / size * 2) * q.cover(inside - 1) * (np.abs(q.table("disc_t")) > 10) * 0.6, "void"
    yield from _nerves(q, w, inside)


def _nerves(q: Points, w: Array, inside: Array) -> Iterator[Layer]:
    """Cord above its tip; below it the cauda equina: wavy strands that crowd where the sac is narrow and lie in loops
    above a stenosis (redundant roots; Suzuki et al., Spine 1989)."""
    cord = q.table("cord")
    depth = (1 - np.sqrt((q.u / (5.2 * cord + 0.01)) ** 2 + ((w - 0.5) / (4.0 * cord + 0.01)) ** 2)) * 4 * cord
    yield q.layer(least(depth, inside), "cord", unit(cord * 20))
    near = (inside > -0.5) & (cord < 1)
    q, w, inside, cord = q.pick(near), w[near], inside[near], cord[near]
    if not w.size:
        return
    front, back = q.table("push_front"), q.table("push_back")
    wide, deep = q.table("sac_a"), np.maximum(q.table("sac_b") - (front + back) / 2, 0.5)
    narrow, loops = q.table("canal"), q.table("redundant")
    x, y = (q.u / np.maximum(wide - 0.5 * q.table("push_side"), 0.5), (w - (front - back) / 2) / deep)
    x0, y0, phase, period = np.array(q.body.traits["roots"], np.float32).T[..., None]
    wave = np.sin(q.s / period + phase)  # (20, n)
    dx, dy = x - x0 - (0.05 + 0.3 * loops) * wave, y - y0 * (1 - 0.5 * narrow) - 0.3 * loops * wave
    bare = ((dx * wide) ** 2 + (dy * deep) ** 2).min(0)
    strands = q.cover(0.95 - np.sqrt(bare))
    crowded = unit((ROOTS_AREA / np.maximum(q.table("sac_area"), 1.0) - 0.38) * 2.6) * q.table("lumbar")
    cover = np.maximum(strands * 0.85, crowded) * q.cover(inside) * (1 - 0.8 * unit(cord * 2))
    yield q.index, cover, "root"


def _recess(points: Points) -> Iterator[Layer]:
    """Lateral recess at a disc: fat round the traversing root, closed by disc from the front and facet from behind."""
    p = points.pick((points.out > 2.5) & (points.out < 13) & (points.v > -1) & (points.v < 8))
    p = p.pick(p.table("recess_open") > 0)
    _, a0, b0 = RECESS
    is_open, b = p.table("recess_open"), p.table("recess_b")
    x = (p.out - p.table("recess_u")) / a0
    y0, y = p.v - RECESS[0], p.v - p.table("recess_v")
    yield p.layer((1 - np.sqrt(x**2 + (y0 / (b0 + RIM)) ** 2)) * b0, "ligament", is_open)
    yield p.layer((1 - np.sqrt(x**2 + (y / b) ** 2)) * b, "fat", is_open)
    tall = np.minimum(1.5, 0.85 * b)
    wide = np.minimum(2.4 / tall, 1.9)  # a root that is squeezed spreads
    off = x * a0 + 0.3 + 0.14 * p.table("disc_t") + 1.2 * p.table("recess_aside")
    yield p.layer((1 - np.sqrt((off / wide) ** 2 + (y / tall) ** 2)) * tall, "root", is_open)


def _foramen(points: Points) -> Iterator[Layer]:
    """Foramen: a keyhole of fat, the exiting root high in it, vessels beside it; what it loses is disc and ligament."""
    p = points.pick((points.out > 7) & (points.out < 30) & (points.v > -5) & (points.v < 13))
    t = p.table("foramen_t")
    p = p.pick((t > -8) & (t < 18))
    off = p.out - p.table("foramen_u")
    p, off = p.pick(np.abs(off) < 6), off[np.abs(off) < 6]
    t, n = p.table("foramen_t"), p.table("foramen_n")
    x = p.v - (3.6 - 0.25 * off)
    length = least(off + 4.5, 4.5 - off, p.out - p.table("recess_u") - 3.0)
    envelope, floor, front, back = foramen_walls(x, t)
    envelope = envelope - 0.11 * off**2  # fat outside is muscles' and vessels' again
    pushed = front - p.table("foramen_front")
    inside = least(envelope, floor - p.table("foramen_floor"), pushed, back - p.table("foramen_back"))
    yield p.layer(least(envelope + 0.4, length), "ligament")
    yield p.layer(least(envelope, -pushed, length), "disc", unit(6.5 - np.abs(t)))
    fade = 0.55 + 0.45 * unit(1.5 - 0.3 * np.abs(off))
    yield p.layer(least(inside, length), "fat", fade)
    high = 10.4 - 0.3 * off
    aside = (p.table("foramen_front") / 2.6 - p.table("foramen_back") / 1.6) / 2
    squeeze = np.minimum(2.5, 0.8 * foramen_half_width(np.full_like(n, 10.0), n))
    root = (1 - np.sqrt(((x - aside) / squeeze) ** 2 + ((t - high) / 2.8) ** 2)) * squeeze
    yield p.layer(least(root, inside + 0.3, length + 1), "root")
    for dx, dt in ((2.2, -3.2), (-2.3, -1.0), (0.4, -6.0)):
        spot = 0.8 - np.hypot(x - aside - dx, t - high - dt)
        yield p.layer(least(spot, inside, length), "vessel", 0.6)
