"""What lies at a point of the body: tissues in layers, each covering part of those before it (see `points`)."""

from collections.abc import Iterator

import numpy as np

from lsdc_utils.phantom.body import WAVES, Array, Body
from lsdc_utils.phantom.points import ALL, Layer, Points, least, unit
from lsdc_utils.phantom.spine_layers import paint

__all__ = ["Layer", "Points", "paint", "paint_around", "texture"]


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
    q = p.pick((np.abs(p.s - 85) < 65) & (np.abs(p.out - 54) < 34) & (np.abs(p.v + 22) < 28))
    kidney = np.sqrt(((q.out - 62 + 0.1 * q.s) / 24) ** 2 + ((q.v + 22) / 20) ** 2 + ((q.s - 85) / 55) ** 2)
    yield q.layer((1.13 - kidney + 0.05 * coarse[q.index]) * 20, "fat", 0.9)
    yield q.layer(least((1 - kidney) * 20, kidney * 20 - 8 - 2 * fine[q.index]), "bowel")
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
    ahead = p.v + 32.5 * traits["size"] + 10 - 0.3 * below
    for side, radius, flat in ((0.5, 7.5, 1.0), (-0.8, 8.0, 1.35)):  # aorta and vena cava, forking at L4
        u0 = 12 * side * fork + (side / abs(side)) * (1 - fork) * (9 + 0.35 * below)
        distance = np.hypot((p.u - u0) / flat**0.5, ahead * flat**0.5)
        yield p.layer(radius * traits["vessel"] * (0.75 + 0.25 * fork) - distance, "vessel")
    wall = front - 14 - 2 * coarse
    yield p.layer(least(wall, 9 - wall), "muscle")
    yield p.layer(-wall, "fat")
    yield p.layer(np.maximum(-skin, -front), "air")
