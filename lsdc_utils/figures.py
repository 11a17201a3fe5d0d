"""One look for every figure: fonts, colours that colour-blind readers tell apart, slices with scale and orientation.

The colours are Okabe and Ito's (https://jfly.uni-koeln.de/color/) or close to them. Colour never stands alone:
severities also have a marker each. Figures keep their white ground, so that they read the same on a light and on a
dark page.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from lsdc_utils import geometry
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, MISSING, SEVERITY_NAMES

# By class as tables hold it: 0, 1, 2, and -1 for a missing label (so these are dicts: a tuple's [-1] would be severe).
SEVERITY_COLOURS = {0: "#4C9BD6", 1: "#F5B32A", 2: "#CC3311", MISSING: "#ABABAB"}
SEVERITY_MARKERS = {0: "o", 1: "s", 2: "^", MISSING: "x"}

MODEL_COLOURS = {
    "prior": "#B5B5B5",
    "yolo": "#E69F00",
    "vit3d": "#0072B2",
    "ensemble": "#1A1A1A",
    "ensemble_calibrated": "#56B4E9",
    "oracle": "#009E73",
}
GROUP_COLOURS = {"nfn": "#CC79A7", "scs": "#0072B2", "ss": "#E69F00"}  # keys of vocabulary.GROUPS

PLAIN_COLOUR, PLAIN_MARKER = "#4DE8E0", "+"  # of points and boxes without a severity, to be seen on a slice

_SCALE_LENGTHS = (5, 10, 20, 50, 100)  # mm
_DIRECTIONS = (("L", "R"), ("P", "A"), ("H", "F"))  # where +x, -x, +y, -y, +z, -z of LPS point to


def use_style() -> None:
    """Set matplotlib's defaults: text of 11 points, 110 dots an inch, light grid, grey images, PDF text as text."""
    mpl.rcParams.update(
        {
            "figure.figsize": (9.0, 4.5),
            "figure.dpi": 110,
            "figure.facecolor": "white",
            "figure.constrained_layout.use": True,
            "font.family": "DejaVu Sans",
            "font.size": 11,
            "axes.titlesize": 12,
            "axes.labelsize": 11,
            "xtick.labelsize": 10,
            "ytick.labelsize": 10,
            "legend.fontsize": 10,
            "legend.frameon": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#E2E2E2",
            "grid.linewidth": 0.8,
            "lines.linewidth": 1.8,
            "image.cmap": "gray",
            "axes.prop_cycle": cycler(
                color=["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#1A1A1A"]
            ),
            "pdf.fonttype": 42,
            "svg.fonttype": "none",
        }
    )


def edge_letters(affine: np.ndarray) -> dict[str, str]:
    """Letters at the `left`, `right`, `top` and `bottom` edge of an image: A, P, H, F, L, R (PS3.3 C.7.6.1.1.1).

    `affine` (4, 4) maps (x = column, y = row, 0, 1) to LPS mm. A second letter follows where the axis leans by 30
    degrees or more towards it.
    """
    letters = {}
    for column, (back, forth) in enumerate((("left", "right"), ("top", "bottom"))):
        axis = geometry.unit(np.asarray(affine, float)[:3, column])
        order = [k for k in np.argsort(-np.abs(axis)) if abs(axis[k]) >= 0.5]
        letters[forth] = "".join(_DIRECTIONS[k][int(axis[k] < 0)] for k in order)
        letters[back] = "".join(_DIRECTIONS[k][int(axis[k] > 0)] for k in order)
    return letters


def scale_length(width: float) -> int:
    """Length in mm of the scale bar of an image `width` mm wide: a round one, at most three tenths of the width."""
    return max([mm for mm in _SCALE_LENGTHS if mm <= 0.3 * width], default=_SCALE_LENGTHS[0])


def show_slice(
    ax: Axes,
    pixels: np.ndarray,
    affine: np.ndarray,
    points: np.ndarray | None = None,
    severities: Sequence[int] | None = None,
    boxes: np.ndarray | None = None,
    window: tuple[float, float] | None = None,
    title: str = "",
) -> None:
    """Draw one slice in its true proportions, with a millimetre scale, orientation letters, and what was found on it.

    pixels (rows, cols); affine (4, 4): (x = column, y = row, 0, 1) to LPS mm; points (n, 2) as x, y in pixels or (n, 3)
    in LPS mm; boxes (n, 4) as x0, y0, x1, y1 in pixels; severities (n,) gives colour and marker to points and boxes
    (without it all are drawn plain); window: darkest and brightest value (default: 0 to 255 for 8 bits, else
    percentiles .5 and 99.5).
    """
    pixels = np.asarray(pixels)
    if window is None:
        window = (0, 255) if pixels.dtype == np.uint8 else tuple(np.percentile(pixels, (0.5, 99.5)))
    step_x, step_y = geometry.spacing(affine)
    ax.imshow(pixels, cmap="gray", vmin=window[0], vmax=window[1], aspect=step_y / step_x, interpolation="bilinear")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    ax.set_title(title)
    rows, cols = pixels.shape
    severities = None if severities is None else np.asarray(severities)  # by place, whatever a Series' index says
    for k, point in enumerate(() if points is None else np.atleast_2d(points)):
        x, y = geometry.to_pixels(affine, point)[:2] if len(point) == 3 else point
        colour, marker = _mark(severities, k)
        edge = {"markeredgewidth": 1.8} if marker in "x+" else {"markeredgecolor": "white", "markeredgewidth": 0.8}
        ax.plot(x, y, marker, color=colour, markersize=7, **edge)
    for k, (x0, y0, x1, y1) in enumerate(() if boxes is None else np.atleast_2d(boxes)):
        colour, _ = _mark(severities, k)
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.6))
    ax.set(xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5))
    _annotate(ax, affine, cols)


def _mark(severities: Sequence[int] | None, k: int) -> tuple[str, str]:
    """Colour and marker of the k-th thing on a slice."""
    if severities is None:
        return PLAIN_COLOUR, PLAIN_MARKER
    return SEVERITY_COLOURS[int(severities[k])], SEVERITY_MARKERS[int(severities[k])]


def _annotate(ax: Axes, affine: np.ndarray, cols: int) -> None:
    """Orientation letters at the four edges, a scale bar near the lower left corner of a slice `cols` pixels wide."""
    text = {
        "color": "white",
        "fontsize": 10,
        "transform": ax.transAxes,
        "bbox": {"fc": "#000000A0", "ec": "none", "pad": 1},
    }
    letters = edge_letters(affine)
    ax.text(0.015, 0.5, letters["left"], ha="left", va="center", **text)
    ax.text(0.985, 0.5, letters["right"], ha="right", va="center", **text)
    ax.text(0.5, 0.985, letters["top"], ha="center", va="top", **text)
    ax.text(0.5, 0.015, letters["bottom"], ha="center", va="bottom", **text)
    width = cols * geometry.spacing(affine)[0]
    length = scale_length(width)
    ax.plot([0.03, 0.03 + length / width], [0.03, 0.03], color="white", linewidth=3, transform=ax.transAxes)
    ax.text(0.03, 0.045, f"{length} mm", ha="left", va="bottom", **text)


def severity_legend(place: Axes | Figure, missing: bool = False, **options) -> None:
    """Put a legend of the severities on axes or a figure; `missing` adds rows without a label; options of `legend`."""
    names = {**dict(enumerate(SEVERITY_NAMES)), **({MISSING: "no label"} if missing else {})}
    handles = [
        Line2D(
            [], [], linestyle="none", marker=SEVERITY_MARKERS[k], color=SEVERITY_COLOURS[k], markersize=8, label=name
        )
        for k, name in names.items()
    ]
    place.legend(handles=handles, **{"frameon": True, **options})  # framed: it often lies on a dark slice


def show_confusion(ax: Axes, severity: np.ndarray, grade: np.ndarray, title: str) -> None:
    """Draw labels (n,) against grades (n,), both 0, 1, 2: counts, and shares of the label's row."""
    counts = np.zeros((3, 3), int)
    np.add.at(counts, (np.asarray(severity, int), np.asarray(grade, int)), 1)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for place, share in np.ndenumerate(shares):
        text = f"{counts[place]}\n{share:.0%}"
        ax.text(*place[::-1], text, ha="center", va="center", color="white" if share > 0.55 else "black")
    ax.set_xticks(range(3), SEVERITY_NAMES, fontsize=9)
    ax.set_yticks(range(3), SEVERITY_NAMES, fontsize=9, rotation=90, va="center")
    ax.set(title=title, xlabel="Most probable grade", ylabel="Label")
    ax.grid(False)


def show_reliability(ax: Axes, natural: np.ndarray, severity: np.ndarray, title: str, bins: int = 8) -> None:
    """Draw how often each severity occurs among rows (n, 3) of like natural probability; labels (n,).

    Bins hold about the same number of rows; points on the dashed line are calibrated.
    """
    ax.plot([0, 1], [0, 1], color="#777777", linewidth=1, linestyle="--")
    for k, name in enumerate(SEVERITY_NAMES):
        edges = np.unique(np.quantile(natural[:, k], np.linspace(0, 1, bins + 1)))
        bin_of = np.clip(np.searchsorted(edges, natural[:, k], side="right") - 1, 0, max(len(edges) - 2, 0))
        n = np.bincount(bin_of)
        means = np.bincount(bin_of, natural[:, k])[n > 0] / n[n > 0]
        shares = np.bincount(bin_of, severity == k)[n > 0] / n[n > 0]
        ax.plot(means, shares, marker=SEVERITY_MARKERS[k], color=SEVERITY_COLOURS[k], label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), title=title, xlabel="Natural probability", ylabel="Share of labels")


DOSE_LINES = {
    "oracle": ("oracle", "--"),
    "yolo": ("detectors", ":"),
    "vit3d": ("3D ViT", "-."),
    "ensemble": ("ensemble", "-"),
}


def show_doses(figure: Figure, found: pd.DataFrame) -> None:
    """Draw responses to a narrowing, as `stress.responses` gives them: a panel a condition group, the mean over bodies
    and sides of each model's P(severe) and P(moderate or worse), the shares of readers who say so, and the cut-offs."""
    groups = found["condition"].map(lambda name: CONDITIONS[name].group)
    for ax, (key, group) in zip(figure.subplots(1, len(GROUPS), sharey=True), GROUPS.items(), strict=True):
        mine = found[groups == key]
        for event, severity in (("moderate", 1), ("severe", 2)):
            colour, marker = SEVERITY_COLOURS[severity], SEVERITY_MARKERS[severity]
            curves = mine.pivot_table(index="dose", columns="model", values=event)
            for model, (_, line) in DOSE_LINES.items():
                ax.plot(curves.index, curves[model], line, color=colour)
            ax.plot(curves.index, curves["readers"], marker, color=colour, markersize=5, alpha=0.6)
            ax.axvline(mine[f"{event}_from"].iloc[0], color="#606060", linewidth=0.8, linestyle="--")
        ax.set(title=group.score, xlabel="narrowing (0 open, 1 closed)", ylim=(-0.02, 1.02))
    figure.axes[0].set_ylabel("probability")
    handles = [Line2D([], [], color="#404040", linestyle=line, label=name) for name, line in DOSE_LINES.values()]
    for severity, name in ((1, "moderate or worse"), (2, "severe")):
        style = {"color": SEVERITY_COLOURS[severity], "marker": SEVERITY_MARKERS[severity]}
        handles.append(Line2D([], [], label=f"{name} (marks: readers)", **style))
    figure.legend(handles=handles, loc="outside lower center", ncols=6)
    figure.suptitle("One place narrowed step by step, all else the same")
