"""The published detectors: their classes, their data set, and how their detections are made and read."""

from dataclasses import replace

import cv2
import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import ROOT
from toy_spine import canal_labels, config, ideal, toy_labels, toy_points, toy_stack, toy_study, write_dataset

from lsdc_utils.detector.classes import Detector, DetectorError
from lsdc_utils.detector.dataset import training_images
from lsdc_utils.detector.detections import Detections
from lsdc_utils.detector.levels import FLOOR, evidence_tables, grade_study
from lsdc_utils.detector.training import load_detector, quiet_ultralytics, save_detector, train_detector
from lsdc_utils.grading import localisation
from lsdc_utils.published import detector as published
from lsdc_utils.vocabulary import GROUPS, SEVERITIES


@pytest.mark.parametrize(("method", "validated"), [(True, True), (True, False), (False, True)])
def test_the_notebook_prints_the_precision_beside_the_published_one(method, validated, tmp_path, capsys, monkeypatch):
    quiet_ultralytics(tmp_path)
    from ultralytics.utils.metrics import DetMetrics

    history = pd.DataFrame({"epoch": [1, 2], "box_loss": [2.0, 1.0]})
    if validated:  # as the trainer names them
        history = history.assign(**{name: [0.1, 0.25] for name in DetMetrics().keys if "mAP" in name})
    monkeypatch.setattr(plt, "show", plt.close)
    names = {"source": None, "history": history, "published_method": method, "held_out": range(7)}
    names |= {"condition": "scs", "name": "yolo_scs_fold0", "plt": plt, "published_detector": published}
    cells = nbformat.read(ROOT / "notebooks/03_train_yolo.ipynb", as_version=4).cells
    (curves,) = [cell.source for cell in cells if "MAP50" in cell.source]
    exec(curves, names)
    line = "yolo_scs_fold0: mAP50 0.250 on 7 held-out images, published: 0.558\n"
    assert capsys.readouterr().out == (line if method and validated else "")
    assert published.MAP50 == {"nfn": 0.472, "scs": 0.558, "ss": 0.416}


def untrained(key: str, tmp_path, views=((1.0, False),)) -> Detector:
    quiet_ultralytics(tmp_path)
    from ultralytics.nn.tasks import DetectionModel

    settings = config(key, window=None, neighbours=False, views=views)
    torch.manual_seed(1)
    names = published.class_table(settings)["name"]
    model = DetectionModel("yolov10n.yaml", nc=len(names), verbose=False).eval()
    model.names = dict(enumerate(names))
    return Detector(model, settings, 0, {})


def test_numbers_of_classes():
    assert {key: len(published.class_table(config(key))) for key in GROUPS} == {"nfn": 30, "scs": 15, "ss": 30}


@pytest.mark.parametrize("condition", GROUPS)
def test_the_data_set_holds_clicked_slices_of_complete_studies(condition, tmp_path):
    toys = [toy_study(condition, number) for number in (1, 2, 3)]
    labels = pd.concat([labels for _, labels in toys], ignore_index=True)
    canal = [canal_labels(number) for number in (1, 2, 3)] if condition == "ss" else []
    labels.loc[labels["study_id"].eq(2) & labels["level"].eq("l1_l2"), "severity"] = -1
    settings = config(condition, window=None, neighbours=False)
    write_dataset([stack for stack, _ in toys], pd.concat([labels, *canal]), tmp_path / "02", settings, 6.0, 2.0, 1)
    data, scheme = published.prepare(tmp_path / "02", tmp_path / "published", settings, labels)
    images, boxes = pd.read_csv(data / "images.csv"), pd.read_csv(data / "boxes.csv")
    assert set(images["study_id"]) == {1, 3} and (images["boxes"] > 0).all() and (images["weight"] == 1).all()
    assert set(boxes["row_id"]) == set(labels.loc[labels["study_id"] != 2, "row_id"])
    names = yaml.safe_load((data / "data.yaml").read_text())["names"]
    table = scheme.class_table(settings)
    assert list(names.values()) == list(table["name"])
    for box in boxes.itertuples():
        label = labels.set_index("row_id").loc[box.row_id]
        expected = (label["condition"], label["level"], label["severity"])
        assert tuple(table.loc[box.class_id, ["condition", "level", "severity"]]) == expected
    for image in images.itertuples():
        assert cv2.imread(str(data / image.file)) is not None
        lines = (data / image.file.replace("images", "labels")).with_suffix(".txt").read_text().splitlines()
        assert len(lines) == image.boxes


@pytest.mark.parametrize("condition", GROUPS)
def test_perfect_detections_give_perfect_rows_and_points(condition):
    rng = np.random.default_rng(3)
    severities = {key: int(rng.integers(3)) for key in toy_points(condition)}
    labels = toy_labels(toy_stack(condition, severities), condition, severities)
    detections, settings = ideal(condition, severities, published.class_table(config(condition)))
    rows, points = evidence_tables(published.level_evidence([detections], 1, [settings])[0], settings.power)
    both = rows.merge(labels, on="row_id")
    assert len(both) == len(labels) == len(rows)
    assert (both[list(SEVERITIES)].to_numpy().argmax(axis=1) == both["severity"]).all()
    assert localisation.point_errors(points, labels)["distance"].max() < 4


def test_a_class_never_seen_gets_the_published_floor():
    scores = np.zeros((1, 30))
    scores[0, 2] = 0.5
    detections = Detections(np.zeros((1, 3)), scores, np.array([-1]), np.array([0]))
    rows = evidence_tables(published.level_evidence([detections], 1, [config("ss")])[0], 1.0)[0].set_index("row_id")
    first = rows.loc["1_left_subarticular_stenosis_l1_l2"].to_numpy(float)
    np.testing.assert_allclose(first, np.array([FLOOR, FLOOR, 0.5]) / (0.5 + 2 * FLOOR))
    np.testing.assert_allclose(rows.iloc[1].to_numpy(float), 1 / 3)


@pytest.mark.parametrize("condition", GROUPS)
def test_a_flipped_view_mirrors_places_and_keeps_classes(condition, tmp_path):
    stack, _ = toy_study(condition)
    mirrored = replace(stack, pixels=np.ascontiguousarray(stack.pixels[:, :, ::-1]))
    plain = published.detect(untrained(condition, tmp_path), [mirrored])
    flipped = published.detect(untrained(condition, tmp_path, ((1.0, True),)), [stack])
    np.testing.assert_allclose(flipped.scores, plain.scores, atol=1e-6)
    middle = stack.affines[0, :3, 3] + stack.affines[0, :3, 0] * (stack.pixels.shape[2] - 1) / 2
    along = stack.affines[0, :3, 0] / np.linalg.norm(stack.affines[0, :3, 0])
    np.testing.assert_allclose((flipped.points - middle) @ along, -((plain.points - middle) @ along), atol=1e-3)


def test_published_detectors_are_trained_saved_loaded_and_grade_a_study(tmp_path):
    stack, labels = toy_study("scs")
    settings = config("scs", window=None, neighbours=False)
    write_dataset([stack], labels, tmp_path / "02", settings, 0.0, 0.0, 0)
    data, scheme = published.prepare(tmp_path / "02", tmp_path / "data", settings, labels)
    shown = training_images(pd.read_csv(data / "images.csv"), [1], (1, 1, 1))
    training = {"model": "yolov10n.yaml", "epochs": 1, "batch": 4, "seed": 1, "close_mosaic": 0}
    model, _ = train_detector(data, shown, settings, training, tmp_path / "work")
    save_detector(Detector(model, settings, 0, {}), tmp_path / "yolo_scs_fold0.pt")
    for key in ("nfn", "ss"):
        save_detector(untrained(key, tmp_path), tmp_path / f"yolo_{key}_fold0.pt")
    detectors = published.load_detectors(tmp_path, [0])
    assert {key: len(of_key) for key, of_key in detectors.items()} == dict.fromkeys(GROUPS, 1)
    rows, points = grade_study([], detectors, 1, [stack, toy_study("ss")[0], toy_study("nfn")[0]], scheme)
    assert len(rows) == len(points) == 25 and (points["condition"] == "scs").sum() == 5
    assert not grade_study([], detectors, 1, [], scheme)[0].size
    with pytest.raises(DetectorError, match="published classes"):
        load_detector(tmp_path / "yolo_ss_fold0.pt")
