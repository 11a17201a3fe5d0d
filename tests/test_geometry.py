"""Tests of lsdc_utils.geometry: patient millimetres and pixels."""

from __future__ import annotations

import numpy as np
import pytest

from lsdc_utils import geometry


def affine(columns: tuple, rows: tuple, corner: tuple = (0.0, 0.0, 0.0), spacing: tuple = (0.75, 0.5)) -> np.ndarray:
    """(4, 4) affine of a slice whose columns and rows grow in these directions; spacing is along x, then along y."""
    matrix = np.eye(4)
    matrix[:3, 0] = spacing[0] * np.array(columns) / np.linalg.norm(columns)
    matrix[:3, 1] = spacing[1] * np.array(rows) / np.linalg.norm(rows)
    matrix[:3, 2], matrix[:3, 3] = 0.0, corner  # the third column is not used
    return matrix


SLICES = {
    "axial": affine((1, 0, 0), (0, 1, 0), (-10, -20, 30)),
    "sagittal": affine((0, 1, 0), (0, 0, -1), (5, -20, 30)),
    "tilted": affine((1, 0, 0), (0, 0.9, -0.4), (-80, -90, 12.5)),
    "tilted twice": affine((0.97, 0.2, 0.1), (-0.2, 0.9, -0.4), (3, 4, 5)),
    "mirrored": affine((-1, 0, 0), (0, 1, 0), (10, -20, 30)),
    "not quite at right angles": affine((1, 0.006, 0), (0.004, 1, 0.003), (1, 2, 3)),
}
AFFINES = np.stack(list(SLICES.values()))


@pytest.mark.parametrize("matrix", SLICES.values(), ids=SLICES)
def test_pixels_and_patient_points_are_inverse(matrix: np.ndarray) -> None:
    pixels = np.random.default_rng(0).uniform(-50, 600, (40, 2))
    points = geometry.to_patient(matrix, pixels)
    assert geometry.to_pixels(matrix, points) == pytest.approx(np.c_[pixels, np.zeros(40)], abs=1e-9)
    off = np.linspace(-30, 30, 40)
    aside = points + off[:, None] * geometry.normals(matrix)
    assert geometry.to_pixels(matrix, aside) == pytest.approx(np.c_[pixels, off], abs=1e-9)
    assert geometry.spacing(matrix) == pytest.approx((0.75, 0.5))


def test_a_pixel_lies_where_dicom_says() -> None:
    assert geometry.to_patient(SLICES["axial"], np.array([4.0, 2.0])).tolist() == [-10 + 4 * 0.75, -20 + 2 * 0.5, 30]
    assert geometry.to_patient(SLICES["sagittal"], np.array([4, 2])).tolist() == [5, -20 + 4 * 0.75, 30 - 2 * 0.5]
    assert geometry.to_patient(SLICES["mirrored"], np.array([4, 2])).tolist() == [10 - 4 * 0.75, -20 + 2 * 0.5, 30]


def test_distances_are_positive_on_the_side_of_the_normal() -> None:
    points = np.array([[0.0, 0.0, 37.0], [0.0, 0.0, 28.0]])
    axial, mirrored = SLICES["axial"], SLICES["mirrored"]
    assert geometry.normals(axial).tolist() == [0, 0, 1] and geometry.normals(mirrored).tolist() == [0, 0, -1]
    assert geometry.plane_distances(np.stack([axial, mirrored]), points).tolist() == [[7, -2], [-7, 2]]
    assert geometry.to_pixels(axial, points)[:, 2].tolist() == [7, -2]


def test_affines_and_points_broadcast() -> None:
    points = np.random.default_rng(1).normal(0, 40, (7, 3))
    table = geometry.to_pixels(AFFINES[:, None], points)  # (slices, points, 3)
    for n, matrix in enumerate(AFFINES):
        for m, point in enumerate(points):
            assert table[n, m] == pytest.approx(geometry.to_pixels(matrix, point))
    assert geometry.plane_distances(AFFINES, points) == pytest.approx(table[..., 2])
    each = geometry.to_patient(AFFINES, np.arange(12.0).reshape(6, 2))  # a pixel for each slice
    assert each[2] == pytest.approx(geometry.to_patient(AFFINES[2], np.array([4.0, 5.0])))
    assert geometry.normals(AFFINES).shape == (6, 3) and geometry.spacing(AFFINES[:, None]).shape == (6, 1, 2)
    assert np.linalg.norm(geometry.unit(points), axis=1) == pytest.approx(np.ones(7))


def test_a_point_beside_an_image_is_that_much_farther() -> None:
    matrix, shape = SLICES["axial"][None], np.array([[101, 201]])  # 100 x 0.5 mm along y, 200 x 0.75 mm along x
    inside, off = geometry.to_patient(matrix[0], np.array([50.0, 50.0])), np.array([0.0, 0.0, -4.0])
    left = geometry.to_patient(matrix[0], np.array([-4.0, 50.0]))  # 3 mm outside
    below = geometry.to_patient(matrix[0], np.array([204.0, 108.0]))  # 3 mm and 4 mm outside
    points = np.array([inside, inside + off, left, left + off, below])
    assert geometry.image_distances(matrix, shape, points)[0] == pytest.approx([0, 4, 3, 5, 5])


def test_the_nearest_image_of_crossing_planes() -> None:
    upper = affine((1, 0, 0), (0, 0.9, -0.4), (0, 0, 60))
    lower = affine((1, 0, 0), (0, 0.9, 0.4), (0, 0, 0))  # their planes cross behind the images
    affines, shapes = np.stack([upper, lower]), np.array([[80, 80], [80, 80]])
    for n, matrix in enumerate(affines):
        middle = geometry.to_patient(matrix, np.array([40.0, 40.0]))
        assert geometry.image_distances(affines, shapes, middle[None])[:, 0].argmin() == n
    beyond = geometry.to_patient(upper, np.array([40.0, 120.0]))  # in the plane, 20 mm outside the image
    assert geometry.image_distances(affines, shapes, beyond[None])[0] == pytest.approx([41 * 0.5])


@pytest.mark.parametrize(
    ("normal", "plane"),
    [
        ((1, 0, 0), "sagittal"),
        ((-0.8, 0.5, 0.3), "sagittal"),
        ((0.2, -0.9, 0.4), "coronal"),
        ((0.1, 0.5, -0.86), "axial"),
    ],
)
def test_plane_of_a_normal(normal: tuple, plane: str) -> None:
    assert geometry.plane_of(normal) == plane
