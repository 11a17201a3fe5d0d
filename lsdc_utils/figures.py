"""The style of all figures: fonts, a colour-blind safe palette, and slices with a scale bar and orientation letters.

The colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/) or close to them. Colour is never the only
cue: each severity also has its own marker. Figures have a white background on light and dark pages alike.
"""

import itertools
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from lsdc_utils import geometry
from lsdc_utils.vocabulary import MISSING, SEVERITY_NAMES

# Keys are classes: 0, 1, 2, and -1 for a missing label. They are dicts because a tuple's [-1] would be severe.
SEVERITY_COLOURS = {0: "#4C9BD6", 1: "#F5B32A", 2: "#CC3311", MISSING: "#ABABAB"}
SEVERITY_MARKERS = {0: "o", 1: "s", 2: "^", MISSING: "x"}

MODEL_COLOURS = {"prior": "#B5B5B5", "yolo": "#E69F00", "vit3d": "#0072B2", "ensemble": "#1A1A1A", "oracle": "#009E73"}
GROUP_COLOURS = {"nfn": "#CC79A7", "scs": "#0072B2", "ss": "#E69F00"}  # keys of vocabulary.GROUPS
PLAIN_COLOUR, PLAIN_MARKER = "#4DE8E0", "+"  # of points and boxes without a severity
_SCALE_LENGTHS = (5, 10, 20, 50, 100)  # mm
_DIRECTIONS = (("L", "R"), ("P", "A"), ("H", "F"))  # where +x, -x, +y, -y, +z, -z of LPS point to


def model_colour(model: str) -> str:
    """The colour of a model; members of the transformers' blend share a paler one."""
    return MODEL_COLOURS.get(model, "#85B8DB")


def use_style() -> None:
    """Set matplotlib's defaults: text of 11 points, 110 dots an inch, light grid, grey images, PDF text as text."""
    colours = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#1A1A1A"]
    mpl.rc("figure", figsize=(9.0, 4.5), dpi=110, facecolor="white")
    mpl.rc("figure.constrained_layout", use=True)
    mpl.rc("font", family="DejaVu Sans", size=11)
    mpl.rc("axes", titlesize=12, labelsize=11, grid=True, axisbelow=True, prop_cycle=mpl.cycler(color=colours))
    mpl.rc("axes.spines", top=False, right=False)
    mpl.rc(("xtick", "ytick"), labelsize=10)
    mpl.rc("legend", fontsize=10, frameon=False)
    mpl.rc("grid", color="#E2E2E2", linewidth=0.8)
    mpl.rc("lines", linewidth=1.8)
    mpl.rc("image", cmap="gray")
    mpl.rc("pdf", fonttype=42)
    mpl.rc("svg", hashsalt="lsdc_utils")  # the same bytes each time


def edge_letters(affine: np.ndarray) -> dict[str, str]:
    """Letters at the `left`, `right`, `top` and `bottom` edge of an image: A, P, H, F, L, R (PS3.3 C.7.6.1.1.1).

    `affine` (4, 4) maps (x = column, y = row, 0, 1) to LPS mm. An axis that leans 30 degrees or more has two letters.
    """
    letters = {}
    for column, (back, forth) in enumerate((("left", "right"), ("top", "bottom"))):
        axis = geometry.unit(np.asarray(affine, float)[:3, column])
        order = [k for k in np.argsort(-np.abs(axis)) if abs(axis[k]) >= 0.5]
        letters[forth] = "".join(_DIRECTIONS[k][int(axis[k] < 0)] for k in order)
        letters[back] = "".join(_DIRECTIONS[k][int(axis[k] > 0)] for k in order)
    return letters


def scale_length(width: float) -> int:
    """Length in mm of the scale bar of an image `width` mm wide: a round number, at most 0.3 of the width."""
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
    """Draw one slice in its true proportions, with scale bar, orientation letters, points and boxes.

    pixels (rows, cols); affine (4, 4): (x = column, y = row, 0, 1) to LPS mm; points (n, 2) as x, y in pixels or (n, 3)
    in LPS mm; boxes (n, 4) as x0, y0, x1, y1 in pixels; severities (n,) set colour and marker of points and boxes
    (default: one plain colour); window: darkest and brightest value (default: 0 to 255 for 8 bits, else percentiles
    0.5 and 99.5).
    """
    if window is None:
        window = (0, 255) if pixels.dtype == np.uint8 else tuple(np.percentile(pixels, (0.5, 99.5)))
    step_x, step_y = geometry.spacing(affine)
    ax.imshow(pixels, cmap="gray", vmin=window[0], vmax=window[1], aspect=step_y / step_x, interpolation="bilinear")
    rows, cols = pixels.shape
    points, boxes = (() if given is None else np.atleast_2d(given) for given in (points, boxes))
    styles = itertools.repeat((PLAIN_COLOUR, PLAIN_MARKER))
    if severities is not None:
        styles = [(SEVERITY_COLOURS[k], SEVERITY_MARKERS[k]) for k in severities]
    for point, (colour, marker) in zip(points, styles, strict=False):
        x, y = geometry.to_pixels(affine, point)[:2] if len(point) == 3 else point
        edge = {"markeredgewidth": 1.8} if marker in "x+" else {"markeredgecolor": "white", "markeredgewidth": 0.8}
        ax.plot(x, y, marker, color=colour, markersize=7, **edge)
    for (x0, y0, x1, y1), (colour, _) in zip(boxes, styles, strict=False):
        ax.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=1.6))
    ax.set(xticks=[], yticks=[], xlim=(-0.5, cols - 0.5), ylim=(rows - 0.5, -0.5), title=title)
    ax.grid(False)
    box = {"fc": "#000000A0", "ec": "none", "pad": 1}
    text = {"color": "white", "fontsize": 10, "transform": ax.transAxes, "bbox": box}
    places = {"left": (0.015, 0.5), "right": (0.985, 0.5), "top": (0.5, 0.985), "bottom": (0.5, 0.015)}
    letters, width = edge_letters(affine), cols * step_x
    for edge, place in places.items():
        ha, va = (edge, "center") if edge in ("left", "right") else ("center", edge)
        ax.text(*place, letters[edge], ha=ha, va=va, **text)
    length = scale_length(width)
    ax.plot([0.03, 0.03 + length / width], [0.03, 0.03], color="white", linewidth=3, transform=ax.transAxes)
    ax.text(0.03, 0.045, f"{length} mm", ha="left", va="bottom", **text)


def severity_legend(place: Axes | Figure, missing: bool = False, **options) -> None:
    """Put a legend of the severities on axes or a figure; `missing` adds rows without a label; options of `legend`."""
    names = dict(enumerate(SEVERITY_NAMES)) | ({MISSING: "no label"} if missing else {})
    styles = [{"label": names[k], "marker": SEVERITY_MARKERS[k], "color": SEVERITY_COLOURS[k]} for k in names]
    handles = [Line2D([], [], linestyle="none", markersize=8, **style) for style in styles]
    place.legend(handles=handles, **{"frameon": True, **options})  # a frame: it often lies on a dark slice


def show_confusion(ax: Axes, severity: np.ndarray, grade: np.ndarray, title: str) -> None:
    """Draw labels (n,) against grades (n,), both 0, 1, 2: counts, and shares of the label's row."""
    counts = np.histogram2d(severity, grade, bins=[np.arange(4) - 0.5] * 2)[0].astype(int)  # also of no rows
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for place, share in np.ndenumerate(shares):
        text = f"{counts[place]}\n{share:.0%}"
        ax.text(*place[::-1], text, ha="center", va="center", color="white" if share > 0.55 else "black")
    ax.set_xticks(range(3), SEVERITY_NAMES, fontsize=9)
    ax.set_yticks(range(3), SEVERITY_NAMES, fontsize=9, rotation=90, va="center")
    ax.set(title=title, xlabel="Most probable grade", ylabel="Label")
    ax.grid(False)


def show_reliability(ax: Axes, natural: np.ndarray, severity: np.ndarray, title: str) -> None:
    """Draw the share of each severity among rows (n, 3) of similar natural probability; labels (n,).

    Eight bins hold about the same number of rows. On the dashed line, probabilities are calibrated.
    """
    from sklearn.calibration import calibration_curve  # here, since importing it takes a second

    ax.plot([0, 1], [0, 1], color="#777777", linewidth=1, linestyle="--")
    for k, name in enumerate(SEVERITY_NAMES):
        shares, means = calibration_curve(severity == k, natural[:, k], n_bins=8, strategy="quantile")
        ax.plot(means, shares, marker=SEVERITY_MARKERS[k], color=SEVERITY_COLOURS[k], label=name)
    ax.set(xlim=(0, 1), ylim=(0, 1), title=title, xlabel="Natural probability", ylabel="Share of labels")
