"""Data sets of the detectors: where boxes are, which slices carry them, and what files show."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from toy_spine import canal_labels, canal_points, config, toy_study, write_dataset

from lsdc_utils.data import checks, competition
from lsdc_utils.data.folds import training_labels
from lsdc_utils.data.stacks import convert_studies, load_study
from lsdc_utils.detector import dataset
from lsdc_utils.detector.classes import DetectorError
from lsdc_utils.detector.dataset import Dataset, _box, label_boxes
from lsdc_utils.detector.detections import patient_points
from lsdc_utils.detector.images import network_inputs, shown, windows
from lsdc_utils.phantom import write_phantom
from lsdc_utils.vocabulary import GROUPS


@pytest.mark.parametrize("condition", GROUPS)
def test_boxes_lie_where_the_reader_clicked(condition):
    stack, labels = toy_study(condition)
    settings = config(condition)
    boxes = label_boxes(stack, labels, settings, 0.0, canal_points())
    assert set(boxes["row_id"]) == set(labels["row_id"]) and not boxes["copied"].any()
    assert (boxes["class_id"] == boxes["severity"]).all()
    both = boxes.merge(labels, on="row_id")
    centres, index = both[["x_x", "y_x"]].to_numpy()[:, None], both["slice"].to_numpy()
    back = patient_points(stack.affines[index], windows(stack, settings, canal_points())[index], centres)[:, 0]
    np.testing.assert_allclose(back, both[["X", "Y", "Z"]], atol=0.01)
    edge = boxes[["x", "y"]].to_numpy() + np.array([[0.5], [-0.5]])[:, None] * boxes[["width", "height"]].to_numpy()
    assert edge.min() >= 0 and edge.max() <= 1


@pytest.mark.parametrize("condition", GROUPS)
def test_clicks_on_images_that_are_stored_mirrored_are_boxed_where_the_upright_stack_shows_them(condition):
    stack, labels = toy_study(condition)
    stored = labels.assign(x=stack.pixels.shape[2] - 1 - labels["x"])  # as the reader saw the file
    boxes = [label_boxes(stack, clicks, config(condition), 6.0, canal_points()) for clicks in (labels, stored)]
    pd.testing.assert_frame_equal(*boxes)


def test_neighbouring_slices_carry_the_box_too():
    stack, labels = toy_study("nfn")
    boxes = label_boxes(stack, labels, config("nfn"), 6.0, canal_points())
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
        boxes = label_boxes(series, labels.assign(x=48.0, y=48.0), settings, 0.0, canal_points())
        window = windows(series, settings, canal_points())[0, 2:]
        side = boxes[["width", "height"]].to_numpy() * window * np.linalg.norm(series.affines[0, :3, :2], axis=0)
        np.testing.assert_allclose(side[~boxes["clipped"]], settings.box_mm)


def test_both_recesses_are_boxed_on_every_slice_of_a_level():
    stack, labels = toy_study("ss")
    apart = labels["condition"].str.startswith("left") & (labels["level"] == "l3_l4")
    index = np.flatnonzero(stack.instance_numbers == labels.loc[apart, "instance_number"].item())[0]
    labels.loc[apart, "instance_number"] = stack.instance_numbers[index + 1]
    labels.loc[apart, "Z"] = stack.affines[index + 1, 2, 3]
    boxes = label_boxes(stack, labels, config("ss"), 6.5, canal_points())
    level = boxes[boxes["row_id"].str.contains("l3_l4")]
    assert set(level["slice"]) == {index - 1, index, index + 1, index + 2}
    assert (level.groupby("slice").size() == 2).all()


def test_between_two_levels_the_nearer_label_speaks():
    stack, labels = toy_study("ss")
    boxes = label_boxes(stack, labels, config("ss"), 40.0, canal_points())
    per_slice = boxes.assign(side=boxes["row_id"].str.contains("left")).groupby(["slice", "side"]).size()
    assert per_slice.max() == 1 and len(per_slice) == 2 * len(stack.pixels)


def test_a_margin_beyond_the_copies_is_not_used(tmp_path):
    stack, labels = toy_study("scs")
    labels = labels[labels["level"] == "l3_l4"]  # clicked at x = 0, slices 5 mm apart
    x = dict(zip(range(len(stack.pixels)), stack.affines[:, 0, 3].round(), strict=True))
    for margin, free in ((3.0, {-10: 0, 10: 0}), (5.0, {})):  # farther slices are not looked at
        images, boxes, _ = write_dataset([stack], labels, tmp_path / str(margin), config("scs"), 6.0, margin, 99)
        by_x = images.assign(x=images["slice"].map(x)).set_index("x")["boxes"].to_dict()
        assert by_x == {-5: 1, 0: 1, 5: 1} | free
    weight = images.set_index("slice")["weight"]
    clicked = boxes.loc[~boxes["copied"], "slice"].item()
    assert weight[clicked] == 1 and weight[clicked + 1] == pytest.approx(np.exp(-0.5 * (5 / 4) ** 2))


def test_labels_without_a_box_are_counted_with_their_reason(tmp_path, monkeypatch):
    stack, labels = toy_study("scs")
    labels.loc[0, "severity"] = -1
    labels.loc[1, "instance_number"] = 9999
    labels.loc[2, ["series_id", "instance_number"]] = -1
    labels.loc[3, "Y"] += 100.0
    monkeypatch.setattr(dataset, "readers_canal", lambda *_: canal_points())  # a window that this point does not move
    images, boxes, skipped = write_dataset([stack], labels, tmp_path / "scs", config("scs"), 0.0, 4.0, 1)
    reasons = skipped.set_index("row_id")["reason"].to_dict()
    expected = [
        "no severity",
        "its slice is not in the series",
        "no coordinate",
        "outside the window, or no canal point to place that",
    ]
    assert [reasons[row] for row in labels["row_id"][:4]] == expected
    assert boxes["row_id"].tolist() == [labels["row_id"][4]]
    assert images["boxes"].tolist() in ([1, 0], [0, 1]) and images["worst"].min() == -1


def test_a_box_over_the_edge_is_clipped():
    place = _box((10.0, 50.0), (8, 0, 96, 96), np.eye(4), config("scs"))
    assert place is not None and place[-1] and place[0] - place[2] / 2 == pytest.approx(0)
    assert place[0] + place[2] / 2 == pytest.approx((10.5 - 8 + 7) / 96)  # half the box beside the point
    assert _box((7.0, 50.0), (8, 0, 96, 96), np.eye(4), config("scs")) is None


def test_files_show_the_slices_before_at_and_behind(tmp_path):
    stack, labels = toy_study("ss")
    settings, labels = config("ss"), pd.concat([labels, canal_labels()])
    images, _, _ = write_dataset([stack], labels, tmp_path / "ss", settings, 5.0, 4.0, 0)
    inputs = network_inputs(stack, settings, canal_points())
    line = images.iloc[2]
    picture = cv2.imread(str(tmp_path / "ss" / line["file"]))[..., ::-1]  # OpenCV reads blue, green, red
    np.testing.assert_array_equal(picture.transpose(2, 0, 1), inputs[line["slice"]])
    split = np.array([0] * 10 + [1] * (len(stack.pixels) - 10))
    apart = network_inputs(replace(stack, blocks=split), settings, canal_points())
    np.testing.assert_array_equal(apart[10, 0], apart[10, 1])  # no neighbour from another block


def test_a_window_keeps_its_size_in_mm_round_the_spine_and_is_black_beyond_the_image():
    stack, _ = toy_study("scs")
    settings, canal = config("scs"), canal_points()
    for scale in ((1.0, 1.0), (0.5, 0.8)):  # other pixels
        series = replace(stack, affines=stack.affines * [[*scale, 1, 1]])
        moved = canal.assign(Y=canal["Y"] * scale[0], Z=canal["Z"] * scale[1])
        for left, top, width, height in windows(series, settings, moved):
            np.testing.assert_allclose([height * 2.7 * scale[1], width * 2.7 * scale[0]], settings.window, atol=1.4)
            middle = series.affines[0] @ [left + width / 2 - 0.5, top + height / 2 - 0.5, 0, 1]
            np.testing.assert_allclose(middle[1:3], [26 * scale[0], 0], atol=1.4)
    far = windows(stack, settings, canal.assign(Z=canal["Z"] - 60))
    black = shown(stack, settings, canal.assign(Z=canal["Z"] - 60))
    below = (far[0, 1] + far[0, 3] - stack.pixels.shape[1]) / far[0, 3]  # share of the window below the image
    rows = round(below * settings.size[0])
    assert rows > 10 and not black[:, 1 - rows :].any() and black[:, : -rows - 2].any(axis=(1, 2)).all()
    assert not shown(stack, settings, canal.assign(Z=900.0)).any()  # nothing of it in the image
    whole = config("scs", window=None)
    assert (windows(stack, whole, None) == [0, 0, 96, 96]).all()


def test_an_axial_window_follows_the_canal_and_a_foraminal_one_lies_off_the_canal_points():
    stack, _ = toy_study("ss")
    places = windows(stack, config("ss"), canal_points(shift=5.0))
    middle = places[:, :2] + places[:, 2:] / 2 - 0.5
    at = np.einsum("nij,nj->ni", stack.affines, np.c_[middle, np.zeros(len(middle)), np.ones(len(middle))])
    inside = np.abs(at[:, 2]) <= 70
    expected = 26 - 3 * at[:, 2] / 35  # the toy spine leans by 3 mm a level
    np.testing.assert_allclose(at[inside, 1], expected[inside], atol=1.1)
    np.testing.assert_allclose(at[:, 0], 5, atol=1.1)
    stack, _ = toy_study("nfn")
    there, off = (windows(stack, config("nfn", canal_from_foramina=((y, z),) * 5), canal_points()) for y, z in
                  ((0.0, 0.0), (10.8, -16.2)))  # fmt: skip
    np.testing.assert_allclose(off - there, np.tile([-4, -6, 0, 0], (len(there), 1)), atol=1)  # pixels of 2.7 mm


def test_without_canal_points_windows_lie_round_the_recesses_and_without_these_there_is_no_image(tmp_path):
    stack, labels = toy_study("ss")
    dataset, one_side = (
        Dataset(tmp_path / "d", config("ss"), 5.0, 4.0, 0),
        labels[labels["condition"].str.startswith("l")],
    )
    assert dataset.add(stack, one_side)[1] == [] and not (tmp_path / "d").exists()
    assert len(dataset.add(stack, labels)[1]) == 5  # a slice of each level


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A data folder of three studies, of which one has an unreadable T1, and its label table."""
    root = write_phantom(tmp_path_factory.mktemp("data") / "p", 3, 0, 9, second_axial=0.5, step=1.5)
    table = pd.read_csv(root / "train_series_descriptions.csv")
    lost = table[table["series_description"] == "Sagittal T1"].iloc[0]
    for file in (root / f"train_images/{lost['study_id']}/{lost['series_id']}").iterdir():
        file.write_bytes(b"no image")
    comp = competition.read(root)
    return comp, checks.label_table(comp).assign(train_on=True)


def contents(root: Path) -> dict[str, bytes]:
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def write_sets(comp, labels, root: Path, workers: int) -> dict[str, tuple]:
    """The three data sets as 02 writes them: images by the process that converts a series."""
    sets = {key: Dataset(root / "yolo" / key, config(key), 6.0, 2.0, 2) for key in GROUPS}
    use = {
        study: [partial(one.add, labels=rows) for one in sets.values()] for study, rows in labels.groupby("study_id")
    }
    converted = convert_studies(comp, "train", sorted(use), root / "slices", workers, use)
    parts = [part for _, written in converted for part in written]
    return {key: one.finish(labels, parts) for key, one in sets.items()}


def test_data_sets_are_the_same_for_any_number_of_processes_and_for_saved_stacks(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr("lsdc_utils.data.stacks.FEW_STUDIES", 2)
    comp, labels = labelled
    tables = write_sets(comp, labels, tmp_path / "one", 1)
    write_sets(comp, labels, tmp_path / "two", 2)
    one = contents(tmp_path / "one")
    assert one == contents(tmp_path / "two")
    stacks = [stack for study in labels["study_id"].unique() for stack in load_study(tmp_path / "one/slices", study)]
    for key, written in tables.items():
        again = write_dataset(stacks, labels, tmp_path / "again" / key, config(key), 6.0, 2.0, 2)
        for table, other in zip(written, again, strict=True):
            pd.testing.assert_frame_equal(table, other)
        assert written[0]["file"].is_unique and written[0]["study_id"].is_monotonic_increasing
        assert sorted(written[0]["file"]) == sorted(
            f"images/{p.name}" for p in (tmp_path / f"one/yolo/{key}/images").iterdir()
        )
        assert json.loads(one[f"yolo/{key}/config.json"])["condition"] == key
    assert {name: one[f"yolo/{name}"] for name in contents(tmp_path / "again")} == contents(tmp_path / "again")
    lost = labels["study_id"].min()  # whose T1 cannot be read
    assert set(tables["nfn"][0]["study_id"]) == set(labels["study_id"]) - {lost}
    assert tables["nfn"][2]["row_id"].str.startswith(f"{lost}_").sum() == 10


def test_what_is_not_trained_on_has_no_box_and_is_no_background(tmp_path):
    stack, labels = toy_study("scs")
    every = write_dataset([stack], labels, tmp_path / "every", config("scs"), 0.0, 0.0, 9)
    labels["train_on"] = labels["level"] != "l4_l5"
    dataset = Dataset(tmp_path / "some", config("scs"), 0.0, 0.0, 9)
    images, boxes, skipped = dataset.finish(labels, [dataset.add(stack, training_labels(labels))])
    left = labels["row_id"][labels["level"] == "l4_l5"]
    assert set(every[1]["row_id"]) - set(boxes["row_id"]) == set(left)
    assert dict(skipped.to_numpy()) == dict.fromkeys(left, "not trained on")
    assert set(images["slice"]) <= set(every[0]["slice"])
    assert len(dataset.add(stack, labels.assign(severity=-1))[1]) == 0  # a condition that is left out as a whole


def test_a_wrong_canal_point_that_is_not_trained_on_moves_no_window(tmp_path):
    stack, labels = toy_study("nfn")
    canal = canal_labels()
    wrong = canal.assign(train_on=False, Y=canal["Y"] + 40.0)
    parts = {}
    for name, rows in (("none", canal.iloc[:0]), ("right", canal), ("wrong", wrong)):
        dataset = Dataset(tmp_path / name, config("nfn"), 0.0, 0.0, 0)
        parts[name] = dataset.add(stack, pd.concat([labels, rows], ignore_index=True))[2]
    pd.testing.assert_frame_equal(parts["wrong"], parts["none"])
    trusted = dataset.add(stack, pd.concat([labels, wrong.assign(train_on=True)], ignore_index=True))[2]
    assert np.abs(trusted["x"].to_numpy() - parts["right"]["x"].to_numpy()).min() > 0.2  # such points do


def test_a_data_set_that_was_not_finished_has_no_config(tmp_path, monkeypatch):
    stack, labels = toy_study("scs")
    dataset = Dataset(tmp_path / "d", config("scs"), 0.0, 0.0, 0)
    part = dataset.add(stack, labels)
    assert list((tmp_path / "d/images").iterdir())
    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        dataset.finish(labels, [part])
    assert not (tmp_path / "d/config.json").exists()


def test_no_box_at_all_is_an_error_and_a_full_disk_too(tmp_path, monkeypatch):
    stack, labels = toy_study("scs")
    with pytest.raises(DetectorError, match="no box for detector scs: no label lies on a series"):
        write_dataset([stack], labels.assign(series_id=7), tmp_path / "d", config("scs"), 0.0, 0.0, 0)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_dataset([stack], labels, tmp_path / "d", config("scs"), 0.0, 0.0, 0)
