"""What narrows a canal, foramen or recess: causes dealt out to narrowings, and shapes cut to the size each prescribes.

The 25 narrowings come first; causes only share them out, so they tell nothing about a grade beyond its size. Each shape
starts as an open envelope. Causes push walls into it, and their common scale is solved so that what stays open has the
prescribed area, whatever the shape of the envelope and the mix of causes:

- canal: bulge or protrusion from the front, ligament as a V from behind, facets from the sides, fat from all round; a
  sac from oval to triangle to trefoil (Schonstrom et al., Spine 1985; Schizas et al., Spine 2010).
- foramen: loss of height, facet from behind, bulge low in front, slip (Lee et al., AJR 2010; Jenis and An, Spine 2000).
- recess: bulge in front, facet behind, a root pushed aside (Ciric et al., J Neurosurg 1980).
"""

from collections.abc import Callable

import numpy as np

Array = np.ndarray

SAC = (8.4, 7.7)  # half axes of the sac's envelope at a disc: to the side, front to back
SAC_AREA, SAC_SHRINK = 170.0, 0.45  # mm2 of the open sac; share of its scale lost at most
FORAMEN = (15.5, -4.5, 5.0)  # top and bottom above the disc's middle, greatest half width
FORAMEN_HEIGHT_LOSS, FORAMEN_WIDTH_LOSS = 0.35, 0.6
RECESS = (3.4, 2.5, 3.0)  # its middle behind the vertebrae, half axes to the side and front to back
RECESS_SHRINK = 0.7
RIM = 0.35  # mm of ligament in front of and behind a recess
CANAL_CAUSES = ("protrusion", "facets", "ligament", "fat", "bulge", "slip")  # local ones first
FORAMEN_CAUSES = ("height", "facet", "bulge", "slip")
RECESS_CAUSES = ("facet", "bulge", "root")
FLOOR = 0.04  # of each wall's share, so that every wall gives way a little


def deal_causes(rng: np.random.Generator, narrowing: Array, slip: int | None) -> dict[str, Array]:
    """Causes of 25 narrowings: canal (5, 6), foramen (2, 5, 4), recess (2, 5, 3) in the order of *_CAUSES; each place's
    add up to its narrowing. Shared by the places of a level: bulge (5,), facet (2, 5), height (5,), slip (5,), each at
    most what the least narrowed place it touches has left. slip: the level of a slipped vertebra."""
    canal, (foramen, recess) = narrowing[:5].copy(), narrowing[5:].reshape(2, 2, 5).copy()
    share = rng.beta(0.8, 1.2, (5, 5))
    mixes = (rng.dirichlet(a, n) for a, n in (([1, 0.7, 1, 0.25], 5), ([1, 0.8, 0.8], 10), ([1, 1, 0.5], 10)))
    canal_mix, foramen_mix, recess_mix = mixes
    bulge = share[0] * np.minimum(canal, np.minimum(foramen, recess).min(0))
    canal, foramen, recess = canal - bulge, foramen - bulge, recess - bulge
    both = foramen.min(0)
    facet = share[1:3] * np.minimum(canal, np.minimum(foramen, recess))
    canal, foramen, recess = canal - facet.mean(0), foramen - facet, recess - facet
    slipped = share[3] * np.minimum(canal, foramen.min(0)) * (np.arange(5) == (-1 if slip is None else slip))
    canal, foramen = canal - slipped, foramen - slipped
    height = share[4] * np.maximum(both - facet.max(0) - slipped, 0)
    foramen = foramen - height
    by_canal = np.column_stack([canal[:, None] * canal_mix, bulge, slipped])
    by_canal[:, 1] += facet.mean(0)
    by_foramen = np.concatenate([foramen[..., None] * foramen_mix.reshape(2, 5, 3), np.zeros((2, 5, 1))], -1)
    by_foramen += np.stack(np.broadcast_arrays(height, facet, bulge, slipped), -1)
    by_recess = recess[..., None] * recess_mix.reshape(2, 5, 3)
    by_recess[..., :2] += np.stack(np.broadcast_arrays(facet, bulge), -1)
    shared = {"bulge": bulge, "facet": facet, "height": height, "slip": slipped}
    return {"canal": by_canal, "foramen": by_foramen, "recess": by_recess} | shared


def sac_walls(u: Array, w: Array, table: Callable[[str], Array]) -> tuple[Array, Array, Array, Array]:
    """Depth (mm) of points under the walls of the open sac: envelope, front, back, and side of the point; u to the
    left, w behind the sac's middle; table(name): sizes at the points. A front wall gives way most at `sac_aside`."""
    wide, deep = table("sac_a"), table("sac_b")
    x, y = u / wide, w / deep
    around = np.sqrt(x * x + y * y) + np.float32(1e-6)
    c = y / around
    lobes = 1 + table("sac_lobes") * c * (4 * c * c - 3)  # three: behind and to both sides in front
    return (
        (1 - around / lobes) * np.minimum(wide, deep),
        w + deep,
        1.25 * deep - w - 0.55 * np.abs(u),
        1.12 * wide - np.abs(u) - 0.3 * w,
    )


def front_profile(u: Array, table: Callable[[str], Array]) -> Array:
    """How far a push on the front wall reaches at u: 1 at the height of a protrusion, less beside it."""
    return 1 / (1 + ((u - table("sac_aside")) / table("sac_spread")) ** 2)


def sac_pushes(causes: Array, narrowing: Array, sizes: dict[str, Array], recesses: Array) -> Array:
    """How far (mm) the walls of five sacs give way at their discs, (4, 5): front, back, left, right.

    causes: (5, 6) in the order of CANAL_CAUSES. sizes: `sac_walls`' sizes at the discs and `sac_v`, (5,) each;
    recesses: (2, 5) mm off the middle. Cells within a recess's envelope are not the sac's."""
    cell = 0.12
    u, v = (a.ravel() for a in np.meshgrid(np.arange(-11, 11, cell), np.arange(-0.5, 19, cell)))
    protrusion, facets, ligament, fat, bulge, slip = causes.T
    front, back = protrusion + bulge + 0.6 * slip + 0.5 * fat, ligament + 0.6 * slip + 0.5 * fat
    shares = np.stack([front + FLOOR, back + FLOOR, *[0.8 * facets + 0.3 * fat + FLOOR] * 2])
    shares /= shares.sum(0)
    area = SAC_AREA * (1 - SAC_SHRINK * narrowing) ** 2
    out = np.empty((4, 5))
    for k in range(5):
        here = {name: values[k] for name, values in sizes.items()}
        depth, ahead, behind, beside = sac_walls(u, v - here["sac_v"], here.__getitem__)
        beyond = np.minimum(((np.abs(u) - np.where(u > 0, *recesses[:, k])) / RECESS[1]) ** 2, 9.0)
        allowed = (depth > 0) & (beyond + ((v - RECESS[0]) / (RECESS[2] + RIM)) ** 2 > 1)
        side = np.where(u > 0, shares[2, k], shares[3, k])
        ahead = ahead / (shares[0, k] * front_profile(u, here.__getitem__))
        scale = np.minimum(np.minimum(ahead, behind / shares[1, k]), beside / side)[allowed]
        out[:, k] = shares[:, k] * _cut(scale, area[k] / cell**2)
    return out


def _cut(scale: Array, cells: float) -> float:
    """The scale above which `cells` of the entries lie."""
    n = scale.size - 1 - round(min(cells, scale.size - 1))
    return max(np.partition(scale, n)[n].item(), 0.0)


def foramen_half_width(t: Array, narrowing: Array) -> Array:
    """Half the width (mm, front to back) of a drop, wide above, `t` mm above its disc's middle; 0 outside it. Its area
    is the law for foramina; open (narrowing 0) it is also their shape."""
    top, bottom, widest = FORAMEN
    low = bottom + FORAMEN_HEIGHT_LOSS * (top - bottom) * narrowing
    place = (t - low) / (top - low)
    inside = np.clip(place * (1 - place), 0, None)
    shape = 2 * np.sqrt(inside) * (0.62 + 0.38 * np.clip(place * 1.5, 0, 1))
    return widest * shape * (1 - FORAMEN_WIDTH_LOSS * narrowing * np.clip(1.15 - 0.3 * place, 0, 1))


def foramen_area(narrowing: Array) -> Array:
    """Area (mm2) of foramina with this narrowing (n,)."""
    t = np.linspace(FORAMEN[1], FORAMEN[0], 200)
    return 2 * np.trapezoid(foramen_half_width(t, np.asarray(narrowing)[:, None]), t)


def foramen_walls(x: Array, t: Array) -> tuple[Array, Array, Array, Array]:
    """Depth (mm) under the walls of an open foramen: envelope (half a keyhole's width less |x|), then from floor, front
    and back as these give way: the front by the bulge of a disc, low; the back by a facet, in the middle."""
    half = 1.04 * foramen_half_width(t, np.zeros_like(t)) + 0.1
    floor = t - FORAMEN[1]
    low, middle = np.maximum(t - 2, 0) / 6, (t - 4) / 8
    return half - np.abs(x), floor, (x + FORAMEN[2]) * (1 + low**2), (FORAMEN[2] - x) * (1 + middle**2)


def foramen_pushes(causes: Array, narrowing: Array) -> Array:
    """How far (mm) floor, front and back of foramina give way, (3, n); causes (n, 4) in the order of FORAMEN_CAUSES."""
    cell = 0.1
    x, t = (a.ravel() for a in np.meshgrid(np.arange(-6, 6, cell), np.arange(-5, 16, cell)))
    depth, *walls = foramen_walls(x, t)
    walls = [wall[depth > 0] for wall in walls]
    height, facet, bulge, slip = causes.T
    shares = np.stack([1.6 * height + 0.6 * slip, bulge + 0.4 * slip, facet]) + FLOOR
    shares /= shares.sum(0)
    cells = foramen_area(narrowing) / cell**2
    scales = [
        _cut(np.min([wall / c for wall, c in zip(walls, share, strict=True)], axis=0), n)
        for share, n in zip(shares.T, cells, strict=True)
    ]
    return shares * scales
