"""A lumbar spine as a continuous function of place: shapes in millimetres, disease driven by 25 narrowing latents.

Every point of the patient (LPS mm) is first expressed along the spine: `s` runs up the posterior wall of the vertebral
bodies (0 at the disc L3/L4), `v` is the distance behind that wall, `u` the distance to the left of the midline. Sizes,
discs and narrowing are tables over `s`; lordosis, scoliosis and slips only change the curve.

A narrowing n in [0, 1] sets one size, by the same function at every level and in every body, in an envelope of its own:

- canal: area of the dural sac in the plane of the disc, 170 (1 - 0.45 n)^2 mm2. Below 100 mm2 a canal counts as
  narrow, below about 75 mm2 as severely narrow (Schonstrom et al., Spine 1985; Ullrich et al., Radiology 1980). The
  roots keep their own 52 mm2, so CSF disappears where Schizas et al. (Spine 2010) see grades C and D.
- foramen: area in its sagittal plane, 138 mm2 when open; it loses up to 0.35 of its height, from below, and up to
  0.6 of its width (40 to 160 mm2 in Hasegawa et al., Spine 1995; order of loss as graded by Lee et al., AJR 2010).
- recess: distance from disc to facet, 6 (1 - 0.7 n) mm; 5 mm and more is normal, 3 mm and less is stenosis
  (Ciric et al., J Neurosurg 1980; Mikhael et al., Radiology 1981).

Levels are named from below: L5/S1 is the lowest disc with at least half the height of the one above it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from lsdc_utils.vocabulary import COLUMNS, LEVELS

Array = np.ndarray

STEP = 0.25  # mm between entries of the tables along the spine
AXIS = np.arange(-150, 200, STEP)  # s of the entries
DISC_NAMES = ("T9", "T10", "T11", "T12", *LEVELS, "S1", "S2", "S3", "S4")  # a disc by the vertebra above it
FIRST = DISC_NAMES.index(LEVELS[0])
SPACING = np.array([26.0, 27.0, 29.0, 31.5, 33.5, 33.5, 33.0, 29.5, 28.0, 23.0, 19.0, 16.0])  # disc to disc, downwards
TILT = np.array([9.0, 11.0, 12.0, 12.5, 12.5, 10.0, 3.0, -7.0, -20.0, -38.0, -46.0, -30.0, -10.0])  # degrees at discs
DISC_HALF = np.array([2.4, 2.6, 3.0, 3.5, 4.2, 4.7, 5.0, 5.2, 4.6, 0.9, 0.5, 0.4, 0.3])  # half a disc's height
HALF_WIDTH = np.array([17.0, 18.0, 19.0, 20.0, 21.5, 22.5, 23.5, 24.5, 25.5, 22.0, 16.0, 12.0, 9.0])  # bodies, at discs
DEPTH = np.array([27.0, 28.0, 29.0, 30.0, 31.0, 32.0, 33.0, 33.5, 32.0, 19.0, 12.0, 9.0, 7.0])  # front to back

SAC = (7.6, 7.1)  # half axes of the open sac at a disc: to the side, front to back
SAC_SHRINK = 0.45
ROOTS_AREA = 52.0  # mm2 of cauda equina in a cross-section
FORAMEN = (15.5, -4.5, 5.0)  # top and bottom above the disc's middle, greatest half width
FORAMEN_HEIGHT_LOSS, FORAMEN_WIDTH_LOSS = 0.35, 0.6
RECESS = (9.9, 4.2, 3.3, 3.0)  # centre u and v, half axes u and v
RECESS_SHRINK = 0.7
SLIP = -6.0  # mm of a vertebra that is made to slip, forwards
WAVES = 20  # of the coarse and of the fine texture


@dataclass(frozen=True)
class Body:
    """One patient as built. `tables` hold, over `AXIS`, the sizes along the spine; sided ones have shape (2, n)."""

    narrowing: Array  # (25,) in the order of vocabulary.COLUMNS
    discs: Array  # (13,) s of the middles of the discs in DISC_NAMES
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
        levels = self.discs[FIRST : FIRST + 5]
        up = np.repeat([0.0, 9.0, 9.0, 0.0, 0.0], 5)
        u = np.repeat([0.0, 18.0, -18.0, RECESS[0], -RECESS[0]], 5)
        canal = np.interp(levels, AXIS, self.tables["sac_v"]) - 1.5
        v = np.concatenate([canal, [2.5] * 10, [RECESS[1]] * 10])
        return self.to_patient(u, v, np.tile(levels, 5) + up)

    def disc_planes(self) -> tuple[Array, Array]:
        """Middles (5, 3) of the graded discs in LPS mm, and unit normals (5, 3) of their planes, to the head."""
        levels = self.discs[FIRST : FIRST + 5]
        _, _, up = _frame(np.interp(levels, AXIS, self.tilt), np.interp(levels, AXIS, self.lean))
        return self.to_patient(0.0, -np.interp(levels, AXIS, self.tables["depth"]) / 2, levels), up

    def measures(self) -> Array:
        """Sizes as built, (25,) in the order of COLUMNS: sac area mm2, foramen area mm2, recess depth mm."""
        index = np.rint((self.discs[FIRST : FIRST + 5] - AXIS[0]) / STEP).astype(int)
        canal = np.pi * self.tables["sac_a"][index] * self.tables["sac_b"][index]
        t = np.linspace(FORAMEN[1], FORAMEN[0], 200)
        foramen = [2 * np.trapezoid(foramen_half_width(t, narrowing), t) for narrowing in self.narrowing[5:15]]
        recess = 2 * self.tables["recess_b"][:, index].ravel()
        return np.concatenate([canal, foramen, recess])

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
    hydration = rng.normal([0.7, 0.66, 0.6, 0.5, 0.48], 0.16) + rng.normal(0, 0.2)
    return {
        "size": rng.normal(1, 0.055),
        "canal": np.clip(rng.normal(1, 0.07), 0.84, 1.2).item(),  # of the sac between discs; a small open one is normal
        "lordosis": rng.normal(1, 0.2),
        "pelvis": rng.normal(0, 3),  # degrees added to every tilt
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
        "facet_fluid": rng.uniform(0.2, 1.0, (2, 13)),  # half width of a joint's cleft, mm
        "endplate": [
            (rng.integers(FIRST, FIRST + 5).item(), rng.choice(["oedema", "fat"]).item())
            for _ in range(rng.poisson(0.6))
        ],
        "haemangioma": [rng.uniform([-10, -24, -70, 3], [10, -8, 100, 7]).tolist() for _ in range(rng.poisson(0.3))],
        "voids": [rng.uniform([-3, -4, 5, 3], [3, 2, 130, 9]).tolist() for _ in range(rng.poisson(1.5))],
        "vessel": rng.normal(1, 0.1),
    }


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


def _curve(discs: Array, traits: dict[str, Any]) -> tuple[Array, Array, Array]:
    """The posterior wall's curve: places (n, 3), tilt and lean (n,)."""
    degrees = TILT * traits["lordosis"] + (1 - traits["lordosis"]) * 2 + traits["pelvis"]
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


def _bump(t: Array, flat: float, reach: float) -> Array:
    """1 within `flat` mm of 0, falling smoothly to 0 at `reach` mm."""
    x = np.clip((np.abs(t) - flat) / (reach - flat), 0, 1)
    return 1 - x * x * (3 - 2 * x)


def _tables(rng: np.random.Generator, discs: Array, narrowing: Array, traits: dict[str, Any]) -> dict[str, Array]:
    """All sizes along the spine, over AXIS, float32; `layers` draws from them."""
    order = discs[::-1]
    near = discs.size - 1 - np.clip(np.searchsorted((order[1:] + order[:-1]) / 2, AXIS), 0, discs.size - 1)
    size = traits["size"]
    level_size = rng.normal(1, 0.025, discs.size)
    half = DISC_HALF * size * np.clip(rng.normal(0.95, 0.14, discs.size), 0.55, 1.2)
    if traits["transitional"]:
        half[FIRST + 5] = 0.45 * half[FIRST + 4]  # below half the height of the last full disc: a remnant, not counted
    t = AXIS - discs[near]

    def along(values: ArrayLike) -> Array:
        return np.interp(AXIS, order, np.asarray(values, float)[::-1])

    above = np.where(t >= 0, near - 1, near).clip(0, discs.size - 2)  # a vertebra lies between discs above, above + 1
    middle = (discs[above] + discs[above + 1]) / 2
    tall = discs[above] - discs[above + 1]
    out: dict[str, Array] = {
        "disc_t": t,
        "disc_half": half[near],
        "vertebra_t": AXIS - middle,
        "pedicle_t": AXIS - (middle + 0.165 * tall),
        "half_width": along(HALF_WIDTH * size * level_size) * (1 - 0.09 * np.cos(np.pi * (AXIS - middle) / tall) ** 2),
        "fat": traits["fat"] * along(np.interp(np.arange(13), [0, 4, 8, 12], [0.6, 0.8, 1.3, 1.5])),
        "depth": along(DEPTH * size * level_size) * (1 - 0.06 * np.cos(np.pi * (AXIS - middle) / tall) ** 2),
        "lumbar": np.interp(AXIS, [discs[FIRST + 4] - 14, discs[FIRST + 4] - 6], [0.0, 1.0]),
        "canal_w": along(np.interp(np.arange(13), [0, 3, 8, 10, 12], [9.5, 11, 13.5, 11, 6]) * level_size),
        "canal_d": along(np.interp(np.arange(13), [0, 3, 8, 10, 12], [17, 18.5, 18.5, 12, 6])),
        "hydration": np.concatenate([[0.7] * 4, traits["hydration"], [0.15] * 4])[near],
    }
    out |= _narrow_tables(discs, narrowing, traits, along)
    out["facet_fluid"] = traits["facet_fluid"][:, near]
    out["cord"] = np.clip((AXIS - (discs[FIRST] + traits["conus"])) / 22, 0, 1) ** 0.6
    return {name: np.ascontiguousarray(values, np.float32) for name, values in out.items()}


def _narrow_tables(discs: Array, narrowing: Array, traits: dict[str, Any], along: Callable) -> dict[str, Array]:
    """Tables of the sac, the recesses and the foramina: what the 25 narrowings change."""
    levels = discs[FIRST : FIRST + 5]
    taper = along([0.95, 0.95, 0.95, 1, 1, 1, 1, 1, 1, 0.8, 0.5, 0.15, 0.0])  # the sac ends at S2
    is_level = sum(_bump(AXIS - d, 4, 11) for d in levels)
    size = is_level + (1 - is_level) * traits["canal"]
    canal = sum(n * _bump(AXIS - d, 3.5, 9.5) for n, d in zip(narrowing[:5], levels, strict=True))
    scale = 1 - SAC_SHRINK * canal
    wide, deep = SAC[0] * taper * size * (1 + 0.12 * (1 - is_level)), SAC[1] * taper * size
    sides = narrowing[5:].reshape(2, 2, 5)  # foramen, recess; left, right; level
    index = np.abs(AXIS[:, None] - levels).argmin(1)
    recess = sides[1][:, index] * _bump(AXIS - levels[index], 3.5, 9.5)
    gap = np.abs(AXIS[:, None] - (levels + 5.5)).argmin(1)
    return {
        "sac_a0": wide,
        "sac_b0": deep,
        "sac_v": along([8.1] * 7 + [8.5, 10.3, 7.0, 5.0, 3.5, 3.0]),  # its middle; fat lies in front of it at L5/S1
        "sac_a": wide * scale**0.7,
        "sac_b": deep * scale**1.3,
        "canal": canal,
        "recess_n": recess,
        "recess_b": RECESS[3] * (1 - RECESS_SHRINK * recess),
        "recess_open": np.broadcast_to(_bump(AXIS - levels[index], 6.5, 11), recess.shape),
        "foramen_n": sides[0][:, gap],
        "foramen_t": AXIS - levels[gap],
    }


def foramen_half_width(t: Array, narrowing: Array) -> Array:
    """Half the width (mm, front to back) of a foramen `t` mm above its disc's middle: a drop, wide above; 0 outside."""
    top, bottom, widest = FORAMEN
    low = bottom + FORAMEN_HEIGHT_LOSS * (top - bottom) * narrowing
    place = (t - low) / (top - low)
    inside = np.clip(place * (1 - place), 0, None)
    shape = 2 * np.sqrt(inside) * (0.62 + 0.38 * np.clip(place * 1.5, 0, 1))
    return widest * shape * (1 - FORAMEN_WIDTH_LOSS * narrowing * np.clip(1.15 - 0.3 * place, 0, 1))
