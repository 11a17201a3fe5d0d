"""Points of the body with their place in its tables, and layers of tissue over them.

Functions take points in spine coordinates (u left, v back, s up, mm) and yield `(index, cover, tissue)`: which points,
the share of each that the tissue covers (edges are `soft` mm wide: partial volume), and its name. Numbers are mm.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lsdc_utils.phantom.body import AXIS, STEP, Array, Body

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
