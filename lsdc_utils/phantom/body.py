"""A lumbar spine as a continuous function of place: shapes in millimetres, disease driven by 25 narrowing latents.

Every point of the patient (LPS mm) is first expressed along the spine: `s` runs up the posterior wall of the vertebral
bodies (0 at the disc L3/L4), `v` is the distance behind that wall, `u` the distance to the left of the midline. Sizes,
discs and narrowing are tables over `s`; lordosis, scoliosis and slips only change the curve.

A narrowing n in [0, 1] sets one size, by the same function at every level and in every body, in an envelope of its own
(see `causes` for the shapes that have these sizes):

- canal: area of the dural sac in the plane of the disc, 170 (1 - 0.45 n)^2 mm2. Below 100 mm2 a canal counts as
  narrow, below about 75 mm2 as severely narrow (Schonstrom et al., Spine 1985; Ullrich et al., Radiology 1980). The
  roots keep their own 52 mm2, so CSF disappears where Schizas et al. (Spine 2010) see grades C and D.
- foramen: area in its sagittal plane, 138 mm2 when open; it loses up to 0.35 of its height, from below, and up to
  0.6 of its width (40 to 160 mm2 in Hasegawa et al., Spine 1995; order of loss as graded by Lee et al., AJR 2010).
- recess: distance from disc to facet, 6 (1 - 0.7 n) mm; 5 mm and more is normal, 3 mm and less is stenosis
  (Ciric et al., J Neurosurg 1980; Mikhael et al., Radiology 1981).

Levels are named from below: L5/S1 is the lowest disc with at least half the height of the one above it. One patient in
ten has four or six lumbar vertebrae (transitional and numeric variants: 4 to 30 %; Konin and Walz, AJNR 2010).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lsdc_utils.phantom import causes
from lsdc_utils.phantom.causes import RECESS, SAC
from lsdc_utils.vocabulary import COLUMNS, LEVELS

Array = np.ndarray

STEP = 0.25  # mm between entries of the tables along the spine
AXIS = np.arange(-180, 280, STEP)  # s of the entries
DISC_NAMES = ("T6", "T7", "T8", "T9", "T10", "T11", "T12", *LEVELS, "S1", "S2", "S3", "S4")  # by the vertebra above it
FIRST = DISC_NAMES.index(LEVELS[0])
LAST = FIRST + 4  # the disc L5/S1
BETWEEN = (0.35, 0.65)  # of the height of the disc above: a lumbosacral disc that is neither free nor fused
MARKS = {"t11_t12": "T11", "t12_l1": "T12", "s1_s2": "S1", "sacrum": "S2"}  # discs that are not graded
# Sizes of an adult, from T6/T7 to S4/S5; vertebrae and discs after Gilad and Nissan (Spine 1986), canal after Panjabi
# et al. (Spine 1992), curve after Vialle et al. (JBJS Am 2005): 43 degrees from L1 to L5; sacral slope sd 8.
SPACING = np.array([24.0, 24.5, 25.0, 26.0, 27.0, 29.0, 31.5, 33.5, 33.5, 33.0, 29.5, 28.0, 23.0, 19.0, 16.0])
TILT = np.array([-4, 1, 5, 9.0, 11.0, 12.0, 12.5, 12.5, 10.0, 3.0, -7.0, -20.0, -38.0, -46.0, -30.0, -10.0])  # degrees
DISC_HALF = np.array([2.1, 2.2, 2.3, 2.4, 2.6, 3.0, 3.5, 4.2, 4.7, 5.0, 5.2, 4.6, 0.9, 0.5, 0.4, 0.3])  # of heights
HALF_WIDTH = np.array([15, 15.5, 16.2, 17, 18, 19, 20, 21.5, 22.5, 23.5, 24.5, 25.5, 22, 16, 12, 9])  # of bodies
DEPTH = np.array([24.0, 25.0, 26.0, 27.0, 28.0, 29.0, 30.0, 31.0, 32.0, 33.0, 33.5, 32.0, 19.0, 12.0, 9.0, 7.0])
FORAMEN_OUT = np.linspace(15.5, 20.5, 5)  # mm off the middle: between pedicles (Zindrick et al., Spine 1987)
RECESS_OUT = np.linspace(6.3, 8.5, 5)

ROOTS_AREA = 52.0  # mm2 of cauda equina in a cross-section
SLIP = -6.0  # mm of a vertebra that is made to slip, forwards
WAVES = 20  # of the coarse and of the fine texture


@dataclass(frozen=True)
class Body:
    """One patient as built. `tables` hold, over `AXIS`, the sizes along the spine; sided ones have shape (2, n)."""

    narrowing: Array  # (25,) in the order of vocabulary.COLUMNS
    discs: Array  # (16,) s of the middles of the discs in DISC_NAMES
    centre: Array  # (n, 3) the curve in LPS mm
    tilt: Array  # (n,) radians, forwards-backwards
    lean: Array  # (n,) radians, to the side
    tables: dict[str, Array]
    waves: Array  # (2 WAVES, 4) wave vectors (1/mm) and phases of the texture, coarse ones first
    traits: dict[str, Any]

    @staticmethod
    def draw(
        rng: np.random.Generator, narrowing: ArrayLike, slip: bool | None = None, transitional: bool | None = None,
        bow: dict[str, float] | None = None,
    ) -> "Body":  # fmt: skip
        """A patient with 25 narrowings in [0, 1]; True and False force and forbid a slip or a transitional vertebra."""
        narrowing = np.asarray(narrowing, float)
        if narrowing.shape != (len(COLUMNS),) or not ((narrowing >= 0) & (narrowing <= 1)).all():
            raise ValueError(f"narrowing must be {len(COLUMNS)} numbers in [0, 1], got {narrowing}")
        traits = _draw_traits(rng) | (bow or {})
        if slip is not None:
            traits["slip"] = (traits["slip"] or SLIP) if slip else 0.0
        if transitional is not None:
            traits["transitional"] = transitional
        spacing = SPACING * traits["size"] * rng.normal(1, 0.025, SPACING.size)
        spacing *= np.interp(_pattern(traits)[:-1], np.arange(SPACING.size), SPACING) / SPACING
        discs = -np.concatenate([[0], np.cumsum(spacing)])
        discs -= discs[DISC_NAMES.index("l3_l4")]
        centre, tilt, lean = _curve(discs, traits)
        tables = _tables(rng, discs, narrowing, traits)
        tables["skin"] = 0.7 * _smooth(centre[:, 1], 50) + traits["back"] + 1.25 * tables["fat"]
        scales = np.repeat([[0.14, 0.14, 0.08], [0.55, 0.55, 0.22]], WAVES, axis=0)  # 1/mm: streaks run along the body
        waves = np.column_stack([rng.normal(0, 1, scales.shape) * scales, rng.uniform(0, 6.28, len(scales))])
        return Body(narrowing, discs, centre, tilt, lean, tables, waves, traits)

    def points(self) -> Array:
        """The true place of each of COLUMNS: (25, 3) LPS mm."""
        levels, recess, foramen = self.discs[FIRST : LAST + 1], self.traits["recess_u"], self.traits["foramen_u"]
        up = np.repeat([0.0, 9.0, 9.0, 0.0, 0.0], 5)
        u = np.concatenate([np.zeros(5), foramen[0], -foramen[1], recess[0], -recess[1]])
        canal = np.interp(levels, AXIS, self.tables["sac_v"]) - 1.5
        v = np.concatenate([canal, [2.5] * 10, [RECESS[0]] * 10])
        return self.to_patient(u, v, np.tile(levels, 5) + up)

    def marks(self) -> dict[str, Array]:
        """Canal points (3,) LPS mm at discs that are not graded: T11/T12, T12/L1, S1/S2, and S2/S3 as the sacrum's; at
        the tip of the cord; and at the lumbosacral disc that is neither free nor fused, if there is one."""
        s = dict(zip(MARKS, self.discs[[DISC_NAMES.index(name) for name in MARKS.values()]], strict=True))
        s["conus"] = _conus(self.discs, self.traits)
        half = np.interp(self.discs, AXIS, self.tables["disc_half"])
        for k in (LAST, LAST + 1):
            if BETWEEN[0] <= half[k] / half[k - 1] <= BETWEEN[1]:
                s["transitional"] = self.discs[k]
        places = np.array(list(s.values()))
        back = np.interp(places, AXIS, self.tables["sac_v"]) - 1.5
        return dict(zip(s, self.to_patient(0.0, back, places), strict=True))

    def disc_planes(self) -> tuple[Array, Array]:
        """Middles (5, 3) of the graded discs in LPS mm, and unit normals (5, 3) of their planes, to the head."""
        levels = self.discs[FIRST : FIRST + 5]
        _, _, up = _frame(np.interp(levels, AXIS, self.tilt), np.interp(levels, AXIS, self.lean))
        return self.to_patient(0.0, -np.interp(levels, AXIS, self.tables["depth"]) / 2, levels), up

    def measures(self) -> Array:
        """Sizes that shapes are built to have, (25,) as COLUMNS: sac area mm2, foramen area mm2, recess depth mm."""
        canal = causes.SAC_AREA * (1 - causes.SAC_SHRINK * self.narrowing[:5]) ** 2
        recess = 2 * RECESS[2] * (1 - causes.RECESS_SHRINK * self.narrowing[15:])
        return np.concatenate([canal, causes.foramen_area(self.narrowing[5:15]), recess])

    def skin_depth(self, points: Array) -> Array:
        """Depth (mm) of LPS points (..., 3) under the skin of the back; negative outside."""
        skin = np.interp(points[..., 2], self.centre[:, 2], self.tables["skin"])
        return skin - 0.0022 * (points[..., 0] - self.centre[0, 0]) ** 2 - points[..., 1]

    def to_patient(self, u: ArrayLike, v: ArrayLike, s: ArrayLike) -> Array:
        """Spine coordinates to LPS mm, shape (..., 3)."""
        u, v, s = np.broadcast_arrays(*(np.asarray(a, float) for a in (u, v, s)))
        left, back, _ = _frame(np.interp(s, AXIS, self.tilt), np.interp(s, AXIS, self.lean))
        centre = np.stack([np.interp(s, AXIS, c) for c in self.centre.T], -1)
        u, v = self._turned(u, v, s, 1)
        return centre + u[..., None] * left + v[..., None] * back

    def to_spine(self, points: Array) -> tuple[Array, Array, Array]:
        """LPS mm (..., 3) to u, v, s; Newton steps on the condition that the point lies in the curve's normal plane."""
        s = points[..., 2].astype(float)
        bends = np.gradient(self.tilt, STEP), np.gradient(self.lean, STEP) * bool(self.traits["bow"])
        for _ in range(10):
            place = np.clip((s - AXIS[0]) / STEP, 0, AXIS.size - 2)
            low = place.astype(int)
            part = place - low
            tilt, lean, curl, sway = (a[low] + part * (a[low + 1] - a[low]) for a in (self.tilt, self.lean, *bends))
            centre = self.centre[low] + part[..., None] * (self.centre[low + 1] - self.centre[low])
            left, back, up = _frame(tilt, lean)
            off = points - centre
            u, v = (off * left).sum(-1), (off * back).sum(-1)
            s = s + np.clip((off * up).sum(-1) / np.maximum(1 - curl * v - sway * u, 0.4), -40, 40)
            s = np.clip(s, AXIS[0], AXIS[-1])
        return *self._turned(u, v, s, -1), s

    def _turned(self, u: Array, v: Array, s: Array, sign: int) -> tuple[Array, Array]:
        """u and v from the vertebrae's axes to the curve's (sign 1) or back (-1); muscles turn less, skin does not."""
        angle = sign * self.traits["turn"] * np.interp(s, AXIS, self.centre[:, 0]) * _bump(np.hypot(u, v), 50, 130)
        return u * np.cos(angle) - v * np.sin(angle), u * np.sin(angle) + v * np.cos(angle)


def draw_bow(rng: np.random.Generator, size: float) -> dict[str, float]:
    """Traits for `Body.draw`: one bow to the side, a sine of 250 to 400 mm whose apex lies `size` mm off the straight
    line; vertebrae turn to the convex side by up to a third of the Cobb angle."""
    wave, phase, share = rng.uniform([250, 0, 0], [400, 2 * np.pi, 1 / 3]).tolist()
    turn = share * 2 * np.arcsin(2 * np.pi * size / wave).item() / size
    return {"bow": size, "scoliosis": size, "scoliosis_phase": phase, "scoliosis_wave": wave, "turn": turn}


def _draw_traits(rng: np.random.Generator) -> dict[str, Any]:
    """What varies between patients without affecting any grade."""
    slip, transitional = rng.random() < 0.12, rng.random() < 0.08
    size = np.clip(rng.normal(1, 0.09), 0.78, 1.25).item()
    hydration = rng.normal([0.7, 0.66, 0.6, 0.5, 0.48], 0.16) + rng.normal(0, 0.2)
    return {
        "size": size,
        "canal": np.clip(rng.normal(1, 0.07), 0.84, 1.2).item(),  # of the sac between discs; a small open one is normal
        "lordosis": np.clip(rng.normal(1, 0.35), 0.3, 1.65 * min(size, 1)).item(),
        "pelvis": np.clip(rng.normal(0, 8), -18, 18).item(),  # degrees added to the tilt of the sacrum, fewer above
        "lumbar": rng.choice([4, 5, 6], p=[0.05, 0.9, 0.05]).item(),  # vertebrae
        "remnant": rng.uniform(0.35, 0.65),  # heights' ratio in a transitional vertebra: see `_disc_halves`
        "collapsed": rng.random(5) < 0.06,  # discs that lost 60 % of their height without narrowing anything
        "wedge": rng.normal([0.14, 0], [0.1, 0.06], (5, 2)),  # of a half height: more in front, more to the left
        "rough": np.column_stack([rng.gamma(2, 0.09, 5), rng.uniform(0, 6.28, (5, 3))]),  # mm, phases of endplates
        "schmorl": [  # disc, side, u, v, radius of a node; in 9 to 19 % of patients (Hamanishi et al., Spine 1994)
            rng.uniform([FIRST - 2, -1, -9, -24, 3], [LAST, 1, 9, -9, 6]).tolist() for _ in range(rng.poisson(0.2))
        ],
        "lip": rng.gamma(1.2, 0.9, 16),  # mm of osteophytes round the front of a disc
        "foramen_u": np.clip(FORAMEN_OUT + rng.normal(0, 1.5, 5) + [[0.5], [-0.5]] * rng.normal(0, 1, 5), 13, 24),
        "recess_u": np.clip(RECESS_OUT + rng.normal(0, 0.5, 5) + rng.normal(0, 0.4, (2, 5)), 5.5, 9.5),
        "lobes": rng.uniform(-0.04, 0.16, 5),  # of the sac: oval, triangle, trefoil
        "aside": rng.normal(0, 2.2, 5),  # mm to the left: the middle of a protrusion
        "roots": _draw_roots(rng),
        "spread": rng.uniform(5, 13, 5),  # mm: half its width
        "joint_turn": np.linspace(0.5, 0.85, 16) + rng.normal(0, 0.1, 16) + rng.normal(0, 0.09, (2, 16)),  # radians
        "joint_size": rng.normal(1, 0.07, (2, 16)),
        "scoliosis": np.clip(rng.normal(0, 2.8), -6, 6).item(),  # mm to the side
        "scoliosis_phase": rng.uniform(0, 6.28),
        **{"scoliosis_wave": 170.0, "bow": 0.0, "turn": 0.0},  # mm, mm, radians a mm: see `draw_bow`
        "slip": rng.choice([-8.0, -6.0, -4.5, 4.0]).item() if slip else 0.0,  # mm of the upper vertebra; forwards < 0
        "slip_level": rng.choice([2, 3, 4], p=[0.2, 0.5, 0.3]).item(),
        "transitional": bool(transitional),
        "conus": rng.normal(8, 9),  # mm of the cord's tip above the disc L1/L2
        "hydration": np.clip(hydration, 0.02, 1),
        "back": rng.normal(52, 4),  # mm from the bodies to the fascia of the back
        "fat": rng.uniform(6, 28),  # mm under the skin of the back
        "front": rng.normal(135, 18),  # mm from the bodies to the skin of the belly
        "muscle_fat": rng.uniform(0.0, 1.0),
        "facet_fluid": 0.1 + rng.gamma(1.5, 0.1, (2, 16)),  # half width of a joint's cleft, mm
        "endplate": [
            (rng.integers(FIRST, FIRST + 5).item(), rng.choice(["oedema", "fat"]).item(), rng.uniform(4, 11))
            for _ in range(rng.poisson(0.8))
        ],
        "haemangioma": [rng.uniform([-10, -24, -70, 3], [10, -8, 100, 7]).tolist() for _ in range(rng.poisson(0.3))],
        "voids": [rng.uniform([-3, -4, 5, 3], [3, 2, 130, 9]).tolist() for _ in range(rng.poisson(1.5))],
        "vessel": rng.normal(1, 0.1),
    }


def _draw_roots(rng: np.random.Generator) -> list[tuple[float, ...]]:
    """Twenty strands of the cauda equina: place in a unit disc, mostly behind; phase and period (mm) of their waves."""
    angle, away = rng.uniform(-0.5, 3.64, 20), 0.85 * np.sqrt(rng.random(20))
    waves = rng.uniform([0, 8], [6.28, 22], (20, 2))
    return np.column_stack([away * np.cos(angle), away * np.sin(angle), waves]).tolist()


def _frame(tilt: Array, lean: Array) -> tuple[Array, Array, Array]:
    """Unit vectors to the left, to the back and up the spine; tilt and lean in radians."""
    up = np.stack([np.sin(lean), np.cos(lean) * np.sin(tilt), np.cos(lean) * np.cos(tilt)], -1)
    back = np.stack([np.zeros_like(tilt), np.cos(tilt), -np.sin(tilt)], -1)
    return np.cross(back, up), back, up


def _smooth(values: Array, width: float) -> Array:
    """Running mean over `width` mm, twice, of a table over AXIS."""
    n = 2 * round(width / STEP / 2) + 1
    for _ in range(2):
        total = np.cumsum(np.concatenate([[0], np.pad(values, n // 2, mode="edge")]))
        values = (total[n:] - total[:-n]) / n
    return values


def _pattern(traits: dict[str, Any]) -> Array:
    """Places (16,) of discs in the usual spine's tables. Levels are named from below: with six (four) lumbar vertebrae
    the disc called T12/L1 (L2/L3) looks like the usual L1/L2."""
    k = np.arange(len(DISC_NAMES))
    return np.where(k < LAST, np.maximum(LAST - (LAST - k) * 4 / (traits["lumbar"] - 1), 0), k)


def _curve(discs: Array, traits: dict[str, Any]) -> tuple[Array, Array, Array]:
    """The posterior wall's curve: places (n, 3), tilt and lean (n,)."""
    sacral = np.interp(np.arange(16), [FIRST - 1, LAST + 1], [0.15, 1]) * traits["pelvis"]
    tilts = np.interp(_pattern(traits), np.arange(16), TILT)
    degrees = np.maximum(tilts * traits["lordosis"] + (1 - traits["lordosis"]) * 2 + sacral, -72)
    tilt = _smooth(np.interp(AXIS, discs[::-1], np.deg2rad(degrees)[::-1]), 14)
    wave = 2 * np.pi / traits["scoliosis_wave"]
    side = traits["scoliosis"] * np.sin(wave * AXIS + traits["scoliosis_phase"])
    lean = traits["scoliosis"] * wave * np.cos(wave * AXIS + traits["scoliosis_phase"])
    # Along a spine that hardly leans a millimetre is taken for one upwards.
    lean, rise = (np.arcsin(lean), np.sqrt(1 - lean**2)) if traits["bow"] else (lean, 1.0)
    slip = traits["slip"] * (discs[FIRST + traits["slip_level"]] < AXIS)
    back = np.cumsum(np.sin(tilt) * rise) * STEP + _smooth(slip, 4)
    up = np.cumsum(np.cos(tilt) * rise) * STEP
    zero = np.argmin(np.abs(AXIS))
    return np.column_stack([side, back - back[zero], up - up[zero]]), tilt, lean


def _conus(discs: Array, traits: dict[str, Any]) -> float:
    """Height (mm along the spine) of the cord's tip, from the disc below the first lumbar vertebra."""
    return float(discs[LAST - traits["lumbar"] + 1] + traits["conus"])


def _bump(t: Array, flat: float, reach: float) -> Array:
    """1 within `flat` mm of 0, falling smoothly to 0 at `reach` mm."""
    x = np.clip((np.abs(t) - flat) / (reach - flat), 0, 1)
    return 1 - x * x * (3 - 2 * x)


def _disc_halves(rng: np.random.Generator, traits: dict[str, Any], lost: Array) -> Array:
    """Half the heights (16,) mm of discs; `lost` (5,): the part of graded discs' heights that a narrowing took.

    L5/S1 keeps more than half the height of L4/L5, S1/S2 has less than half of L5/S1: so levels are named. A
    transitional vertebra leaves a disc between: S1/S2 of 0.35 to 0.48, or L5/S1 of 0.52 to 0.65 of the disc above."""
    half = np.interp(_pattern(traits), np.arange(16), DISC_HALF) * traits["size"]
    half *= np.clip(rng.normal(0.95, 0.14, half.size), 0.55, 1.2)
    half[FIRST : LAST + 1] *= np.minimum(1 - lost, np.where(traits["collapsed"], 0.4, 1.0))
    half[LAST] = max(half[LAST], 0.53 * half[LAST - 1])
    remnant = traits["remnant"] if traits["transitional"] else 0.0
    if remnant > 0.5:
        half[LAST] = max(remnant, 0.52) * half[LAST - 1]
    wanted = min(remnant, 0.48) * half[LAST]
    half[LAST + 1] = wanted if 0 < remnant <= 0.5 else min(half[LAST + 1], 0.33 * half[LAST])
    return half


def _tables(rng: np.random.Generator, discs: Array, narrowing: Array, traits: dict[str, Any]) -> dict[str, Array]:
    """All sizes along the spine, over AXIS, float32; `layers` draws from them."""
    order, count, size = discs[::-1], np.arange(16), traits["size"]
    near = discs.size - 1 - np.clip(np.searchsorted((order[1:] + order[:-1]) / 2, AXIS), 0, discs.size - 1)
    dealt = causes.deal_causes(rng, narrowing, traits["slip_level"] if traits["slip"] else None)
    half = _disc_halves(rng, traits, 0.5 * dealt["height"])
    level_size = rng.normal(1, 0.025, discs.size)
    t = AXIS - discs[near]

    def along(values: ArrayLike, sizes: ArrayLike = 1.0) -> Array:
        values = np.interp(_pattern(traits), count, np.asarray(values, float)) * sizes
        return np.interp(AXIS, order, values[::-1])

    def graded(values: Array, usual: float) -> Array:
        """Values (..., 5) of the graded discs, at the others `usual`, by the nearest disc."""
        rest = [(0, 0)] * (values.ndim - 1) + [(FIRST, 15 - LAST)]
        return np.pad(values, rest, constant_values=usual)[..., near]

    above = np.where(t >= 0, near - 1, near).clip(0, discs.size - 2)  # a vertebra lies between discs above, above + 1
    middle = (discs[above] + discs[above + 1]) / 2
    tall = discs[above] - discs[above + 1]
    waist = np.cos(np.pi * (AXIS - middle) / tall) ** 2
    lip = traits["lip"][near] * np.exp(-(np.maximum(np.abs(t) - half[near], 0) / 2.2)) * (near <= LAST)
    out: dict[str, Array] = {
        "disc_t": t,
        "disc_half": half[near],
        "vertebra_t": AXIS - middle,
        "pedicle_t": AXIS - (middle + 0.165 * tall),
        "half_width": along(HALF_WIDTH, size * level_size) * (1 - 0.09 * waist) + 0.4 * lip,
        "fat": traits["fat"] * along(np.interp(count, [3, 7, 11, 15], [0.6, 0.8, 1.3, 1.5])),
        "depth": along(DEPTH, size * level_size) * (1 - 0.06 * waist) + lip,
        "lumbar": np.interp(AXIS, [discs[LAST] - 14, discs[LAST] - 6], [0.0, 1.0]),
        "canal_w": along(np.interp(count, [3, 6, 11, 13, 15], [9.5, 11, 13.5, 11, 6]), level_size),
        "canal_d": along(np.interp(count, [3, 6, 11, 13, 15], [18.5, 20.5, 21, 12.5, 6])),
        "hydration": graded(traits["hydration"] * (1 - 0.6 * dealt["height"]), 0.4) * (near <= LAST + 1),
        "bulge": graded(0.4 + 2.5 * dealt["bulge"], 0.2),
        "wedge": graded(traits["wedge"][:, 0], 0.0),
        "wedge_u": graded(traits["wedge"][:, 1], 0.0),
        "rough": graded(traits["rough"][:, 0], 0.15) * np.minimum(half[near] / 4, 1),
        **{f"phase{k}": graded(traits["rough"][:, k], 1.0 + k) for k in (1, 2, 3)},
        "joint_size": traits["joint_size"][:, near] * (1 + 0.5 * graded(dealt["facet"], 0.0)),
        "joint_turn": traits["joint_turn"][:, near],
        "facet_fluid": traits["facet_fluid"][:, near],
    }
    taper = along([0.95] * 6 + [1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.15, 0.0])  # the sac ends at S2
    v = along([8.6] * 11 + [9.2, 7.5, 5.5, 3.5, 3.0])  # of its middle; fat lies in front of it at L5/S1
    out |= _narrow_tables(discs[FIRST : LAST + 1], narrowing, traits, dealt, (taper, v))
    out["cord"] = np.clip((AXIS - _conus(discs, traits)) / 22, 0, 1) ** 0.6
    return {name: np.ascontiguousarray(values, np.float32) for name, values in out.items()}


def _narrow_tables(
    levels: Array, narrowing: Array, traits: dict[str, Any], dealt: dict[str, Array], sac: tuple[Array, Array]
) -> dict[str, Array]:
    """Tables of the sac, the recesses and the foramina: what the 25 narrowings change. sac: its share of the usual
    size, and the place of its middle behind the vertebrae (mm)."""
    is_level = sum(_bump(AXIS - d, 4, 11) for d in levels)
    size = is_level + (1 - is_level) * traits["canal"] * sac[0]
    index = np.abs(AXIS[:, None] - levels).argmin(1)
    close = _bump(AXIS - levels[index], 3.5, 9.5)
    here = np.rint((levels - AXIS[0]) / STEP).astype(int)
    out = {
        "sac_a": SAC[0] * size * (1 + 0.04 * (1 - is_level)),
        "sac_b": SAC[1] * size,
        "sac_v": sac[1],
        "sac_lobes": np.interp(AXIS, levels[::-1], traits["lobes"][::-1]) * is_level,
        "sac_aside": traits["aside"][index],
        "sac_spread": traits["spread"][index],
    }
    sizes = {name: values[here] for name, values in out.items()}
    pushes = causes.sac_pushes(dealt["canal"], narrowing[:5], sizes, traits["recess_u"])[:, index] * close
    sides = narrowing[5:].reshape(2, 2, 5)  # foramen, recess; left, right; level
    recess = sides[1][:, index] * close
    shares = dealt["recess"] / np.maximum(sides[1], 1e-6)[..., None]  # facet, bulge, root
    above = zip(np.maximum(narrowing[:5] - 0.5, 0) * 2, levels, strict=True)
    gap = np.abs(AXIS[:, None] - (levels + 5.5)).argmin(1)
    walls = causes.foramen_pushes(dealt["foramen"].reshape(10, 4), narrowing[5:15]).reshape(3, 2, 5)[..., gap]
    return out | {
        "sac_area": causes.SAC_AREA * size * size * (1 - causes.SAC_SHRINK * narrowing[:5][index] * close) ** 2,
        "redundant": np.max([loops * _bump(AXIS - d - 20, 6, 22) for loops, d in above], axis=0),
        "push_front": pushes[0],
        "push_back": pushes[1],
        "push_side": pushes[2:],
        "canal": narrowing[:5][index] * close,
        "canal_fat": dealt["canal"][index, causes.CANAL_CAUSES.index("fat")]
        / np.maximum(narrowing[:5], 0.05)[index]
        * close,
        "recess_n": recess,
        "recess_b": RECESS[2] * (1 - causes.RECESS_SHRINK * recess),
        "recess_u": traits["recess_u"][:, index],
        "recess_v": RECESS[0] + RECESS[2] * causes.RECESS_SHRINK * recess * (shares[..., 1] - shares[..., 0])[:, index],
        "recess_aside": (shares[..., 2] * sides[1])[:, index] * close,
        "recess_open": np.broadcast_to(_bump(AXIS - levels[index], 6.5, 11), recess.shape),
        "foramen_n": sides[0][:, gap],
        "foramen_t": AXIS - levels[gap],
        "foramen_u": traits["foramen_u"][:, gap],
        "foramen_floor": walls[0],
        "foramen_front": walls[1],
        "foramen_back": walls[2],
    }
