"""Figures: letters and scale follow the geometry, colours stay apart for colour-blind readers."""

import itertools

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
from matplotlib import colors
from matplotlib import pyplot as plt

from lsdc_utils import figures, geometry
from lsdc_utils.vocabulary import GROUPS, MISSING

# x grows to the patient's back, y to the feet: a sagittal slice seen from the patient's left, .5 mm by .8 mm
SAGITTAL = np.array([[0, 0, 4, -10], [0.5, 0, 0, -100], [0, -0.8, 0, 120], [0, 0, 0, 1]], float)
AXIAL = np.array([[0.6, 0, 0, -90], [0, 0.6, 0, -80], [0, 0, 4, 5], [0, 0, 0, 1]], float)
# Linear RGB as seen without green and without red cones (Machado, Oliveira and Fernandes 2009, severity 1).
DEUTAN = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
PROTAN = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])


@pytest.fixture
def ax():
    with plt.rc_context():
        figures.use_style()
        figure, ax = plt.subplots(figsize=(4, 4))
        yield ax
        figure.canvas.draw()  # everything drawn must also render
        plt.close(figure)


def test_letters_follow_the_affine():
    assert figures.edge_letters(SAGITTAL) == {"left": "A", "right": "P", "top": "H", "bottom": "F"}
    assert figures.edge_letters(AXIAL) == {"left": "R", "right": "L", "top": "A", "bottom": "P"}


def test_a_tilted_slice_names_the_second_direction():
    tilt = np.radians(35)
    affine = AXIAL.copy()
    affine[:3, 1] = 0.6 * np.array([0, np.cos(tilt), -np.sin(tilt)])
    assert figures.edge_letters(affine)["bottom"] == "PF"
    assert figures.edge_letters(affine)["top"] == "AH"


def test_patient_points_land_on_their_pixels():
    patient = (SAGITTAL @ [30, 40, 0, 1])[:3] + np.array([7, 0, 0])
    x, y, off = geometry.to_pixels(SAGITTAL, patient)
    assert (x, y) == pytest.approx((30, 40)) and abs(off) == pytest.approx(7)


def test_slice_has_true_proportions_scale_and_letters(ax):
    figures.show_slice(ax, np.arange(100 * 80, dtype=np.uint16).reshape(100, 80), SAGITTAL, title="a slice")
    assert ax.get_aspect() == pytest.approx(0.8 / 0.5)
    texts = [text.get_text() for text in ax.texts]
    assert texts == ["A", "P", "H", "F", "10 mm"]
    (start, end) = ax.lines[0].get_xdata()
    assert (end - start) * 80 * 0.5 == pytest.approx(10)


def test_points_in_pixels_and_in_patient_space_are_drawn_alike(ax):
    points = np.array([[10.0, 20.0], [30.0, 40.0]])
    patient = np.column_stack([points, np.zeros(2), np.ones(2)]) @ AXIAL.T
    boxes = np.column_stack([points - 4, points + 4])
    for given in (points, patient[:, :3]):
        severities = pd.Series([2, MISSING], index=[7, 3])  # rows of a table, whose index must not matter
        figures.show_slice(ax, np.zeros((64, 64), np.uint8), AXIAL, given, severities=severities, boxes=boxes)
    drawn = [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_marker()) for line in ax.lines if len(line.get_xdata()) == 1
    ]
    assert drawn[:2] == [(10, 20, "^"), (30, 40, "x")]
    np.testing.assert_allclose([d[:2] for d in drawn[2:]], points)
    assert len(ax.patches) == 4
    figures.show_slice(ax, np.zeros((64, 64), np.uint8), AXIAL, np.zeros((0, 2)))  # nothing found
    figures.show_slice(ax, np.zeros((64, 64), np.uint8), AXIAL, points[:1])
    assert ax.lines[-2].get_marker() == figures.PLAIN_MARKER


def test_legend_names_every_severity(ax):
    figures.severity_legend(ax, missing=True, loc="upper right")
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    assert names == ["Normal/Mild", "Moderate", "Severe", "no label"]


@pytest.mark.parametrize("palette", ["SEVERITY_COLOURS", "MODEL_COLOURS", "GROUP_COLOURS"])
@pytest.mark.parametrize("eye", [np.eye(3), DEUTAN, PROTAN], ids=["normal", "deutan", "protan"])
def test_colours_stay_apart(palette, eye):
    colours = list(getattr(figures, palette).values())
    seen = [_lab(eye, colour) for colour in colours]
    for (a, left), (b, right) in itertools.combinations(zip(colours, seen, strict=True), 2):
        assert np.linalg.norm(left - right) > 15, f"{a} and {b} look alike"


def test_groups_are_the_vocabulary_s():
    assert set(figures.GROUP_COLOURS) == set(GROUPS)


def _lab(eye: np.ndarray, colour: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a colour as the eye sees it; `eye` (3, 3) acts on linear RGB."""
    rgb = np.array(colors.to_rgb(colour))
    linear = np.clip(eye @ np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92), 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    f = xyz / np.array([0.9505, 1, 1.089])
    f = np.where(f > 0.008856, np.cbrt(f), 7.787 * f + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_confusion_counts_labels_by_row_and_grades_by_column(ax):
    figures.show_confusion(ax, np.array([0, 0, 2, 2, 2]), np.array([0, 1, 2, 2, 0]), "canal")
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    assert texts[0, 0] == "1\n50%" and texts[1, 0] == "1\n50%"  # label normal: one graded normal, one moderate
    assert texts[2, 2] == "2\n67%" and texts[0, 2] == "1\n33%"
    assert texts[1, 1] == "0\n0%"


def test_reliability_of_calibrated_rows_lies_on_the_diagonal(ax):
    rng = np.random.default_rng(0)
    natural = rng.dirichlet([2, 1, 1], size=20000)
    severity = (rng.random(len(natural))[:, None] > natural.cumsum(axis=1)).sum(axis=1)
    figures.show_reliability(ax, natural, severity, "calibrated")
    for line in ax.lines[1:]:
        assert len(line.get_xdata()) == 8
        np.testing.assert_allclose(line.get_xdata(), line.get_ydata(), atol=0.03)
    figures.show_reliability(ax, np.full((4, 3), 1 / 3), np.array([0, 1, 2, 2]), "one bin")
    assert [len(line.get_xdata()) for line in ax.lines[-3:]] == [1, 1, 1]


def test_confusion_counts_labels_against_grades_and_takes_no_rows() -> None:
    ax = plt.figure().add_subplot()
    figures.show_confusion(ax, np.array([0, 0, 2]), np.array([0, 1, 2]), "some")
    assert [text.get_text().split()[0] for text in ax.texts] == ["1", "1", "0", "0", "0", "0", "0", "0", "1"]
    ax = plt.figure().add_subplot()
    figures.show_confusion(ax, np.array([], dtype=int), np.array([], dtype=int), "none")
    assert {text.get_text().split()[0] for text in ax.texts} == {"0"}
