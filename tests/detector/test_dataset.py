"""Data sets of the detectors: where boxes are, which slices carry them, and what files show."""

from dataclasses import replace

import cv2
import numpy as np
import pytest
from toy_spine import config, toy_study, write_dataset

from lsdc_utils.detector.dataset import _box, label_boxes
from lsdc_utils.detector.detections import patient_points
from lsdc_utils.detector.images import slice_channels, strip_window, strips
from lsdc_utils.vocabulary import GROUPS


@pytest.mark.parametrize("condition", GROUPS)
def test_boxes_lie_where_the_reader_clicked(condition):
    stack, labels = toy_study(condition)
    settings = config(condition)
    boxes = label_boxes(stack, labels, settings, copy_mm=0.0)
    assert set(boxes["row_id"]) == set(labels["row_id"]) and not boxes["copied"].any()
    both = boxes.merge(labels, on="row_id")
    centres = both[["x_x", "y_x"]].to_numpy()[:, None]
    back = patient_points(stack, both["slice"].to_numpy(), centres, settings)[:, 0]
    np.testing.assert_allclose(back, both[["X", "Y", "Z"]], atol=0.01)
    edge = boxes[["x", "y"]].to_numpy() + np.array([[0.5], [-0.5]])[:, None] * boxes[["width", "height"]].to_numpy()
    assert edge.min() >= 0 and edge.max() <= 1


def test_neighbouring_slices_carry_the_box_too():
    stack, labels = toy_study("nfn")
    boxes = label_boxes(stack, labels, config("nfn"), copy_mm=6.0)
    assert boxes["copied"].sum() >= len(labels)
    assert not boxes.duplicated(["slice", "row_id"]).any()
    assert (boxes["off"] <= 6).all() and (boxes.loc[~boxes["copied"], "off"] == 0).all()
    assert (boxes.loc[boxes["copied"], "off"] > 2).all()  # slices are 5 mm apart


@pytest.mark.parametrize("condition", GROUPS)
def test_a_box_has_the_same_side_in_mm_at_every_spacing(condition):
    stack, labels = toy_study(condition)
    settings = config(condition)
    finer = replace(stack, affines=stack.affines * [[0.5, 0.7, 1, 1]])
    for series in (stack, finer):
        boxes = label_boxes(series, labels.assign(x=48.0, y=48.0), settings, copy_mm=0.0)
        window = strip_window(series.shapes[0], settings)[2:]
        side = boxes[["width", "height"]].to_numpy() * window * np.linalg.norm(series.affines[0, :3, :2], axis=0)
        np.testing.assert_allclose(side[~boxes["clipped"]], settings.box_mm)


def test_both_recesses_are_boxed_on_every_slice_of_a_level():
    stack, labels = toy_study("ss")
    apart = labels["condition"].str.startswith("left") & (labels["level"] == "l3_l4")
    index = np.flatnonzero(stack.instance_numbers == labels.loc[apart, "instance_number"].item())[0]
    labels.loc[apart, "instance_number"] = stack.instance_numbers[index + 1]
    labels.loc[apart, "Z"] = stack.affines[index + 1, 2, 3]
    boxes = label_boxes(stack, labels, config("ss"), copy_mm=6.5)
    level = boxes[boxes["row_id"].str.contains("l3_l4")]
    assert set(level["slice"]) == {index - 1, index, index + 1, index + 2}
    assert (level.groupby("slice").size() == 2).all()


def test_between_two_levels_the_nearer_label_speaks():
    stack, labels = toy_study("ss")
    boxes = label_boxes(stack, labels, config("ss"), copy_mm=40.0)
    per_slice = boxes.assign(side=boxes["row_id"].str.contains("left")).groupby(["slice", "side"]).size()
    assert per_slice.max() == 1 and len(per_slice) == 2 * len(stack.pixels)


def test_a_margin_beyond_the_copies_is_not_used(tmp_path):
    stack, labels = toy_study("scs")
    labels = labels[labels["level"] == "l3_l4"]  # clicked at x = 0, slices 5 mm apart
    images, boxes, _ = write_dataset([stack], labels, tmp_path / "d", config("scs"), 6.0, 5.0, 99)
    x = dict(zip(range(len(stack.pixels)), stack.affines[:, 0, 3].round(), strict=True))
    by_x = images.assign(x=images["slice"].map(x)).set_index("x")["boxes"].to_dict()
    assert by_x == {-15: 0, -5: 1, 0: 1, 5: 1, 15: 0}
    weight = images.set_index("slice")["weight"]
    clicked = boxes.loc[~boxes["copied"], "slice"].item()
    assert weight[clicked] == 1 and weight[clicked + 1] == pytest.approx(np.exp(-0.5 * (5 / 4) ** 2))


def test_labels_without_a_box_are_counted_with_their_reason(tmp_path):
    stack, labels = toy_study("scs")
    labels.loc[0, "severity"] = -1
    labels.loc[1, "instance_number"] = 9999
    labels.loc[2, ["series_id", "instance_number"]] = -1
    labels.loc[3, ["x", "y"]] = [-40.0, 5.0]
    images, boxes, skipped = write_dataset([stack], labels, tmp_path / "scs", config("scs"), 0.0, 4.0, 1)
    reasons = skipped.set_index("row_id")["reason"].to_dict()
    expected = ["no severity", "its slice is not in the series", "no coordinate", "outside the strip"]
    assert [reasons[row] for row in labels["row_id"][:4]] == expected
    assert boxes["row_id"].tolist() == [labels["row_id"][4]]
    assert images["boxes"].tolist() in ([1, 0], [0, 1]) and images["worst"].min() == -1


def test_a_box_over_the_edge_is_clipped():
    place = _box((0.0, 50.0), (96, 96), np.eye(4), config("scs", strip=(0.0, 1.0, 0.0, 1.0)))
    assert place is not None and place[-1] and place[0] - place[2] / 2 == pytest.approx(0)


def test_files_show_the_slices_before_at_and_behind(tmp_path):
    stack, labels = toy_study("ss")
    settings = config("ss")
    images, _, _ = write_dataset([stack], labels, tmp_path / "ss", settings, 5.0, 4.0, 0)
    inputs = slice_channels(strips(stack, settings), stack.blocks, settings)
    line = images.iloc[2]
    picture = cv2.imread(str(tmp_path / "ss" / line["file"]))[..., ::-1]  # OpenCV reads blue, green, red
    np.testing.assert_array_equal(picture.transpose(2, 0, 1), inputs[line["slice"]])
    split = np.array([0] * 10 + [1] * (len(stack.pixels) - 10))
    apart = slice_channels(strips(stack, settings), split, settings)
    np.testing.assert_array_equal(apart[10, 0], apart[10, 1])  # no neighbour from another block
