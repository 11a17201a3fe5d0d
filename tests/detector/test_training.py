"""Training of detectors: settings, weighted images, resuming, and weights that are saved and loaded."""

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from toy_spine import canal_points, config, toy_study, write_dataset

from lsdc_utils.checkpoint import Checkpoint
from lsdc_utils.detector.classes import Detector, DetectorError
from lsdc_utils.detector.dataset import training_images
from lsdc_utils.detector.detections import detect
from lsdc_utils.detector.levels import grade_condition
from lsdc_utils.detector.training import (
    augmented_batch,
    check_settings,
    load_detector,
    quiet_ultralytics,
    save_detector,
    train_detector,
)


@pytest.fixture(scope="module", autouse=True)
def quiet(tmp_path_factory):
    """ultralytics is quiet before it is imported by `detector.trainer`."""
    quiet_ultralytics(tmp_path_factory.mktemp("ultralytics"))


SETTINGS = {"model": "yolov10n.yaml", "batch": 8, "seed": 1, "optimizer": "AdamW", "lr0": 0.002, "lrf": 0.05}
SETTINGS |= {"cos_lr": True, "warmup_epochs": 0.1, "warmup_bias_lr": 0.0, "close_mosaic": 0, "mosaic": 0.0}
SETTINGS |= {"fliplr": 0.0, "cls": 2.0, "box": 4.0, "scale": 0.1, "translate": 0.05}
SETTINGS |= {"box_start": True, "quick_norms": True}


def test_each_epoch_shows_images_by_their_weights():
    images = pd.DataFrame({"file": list("abc"), "study_id": 1, "worst": [2, 0, -1], "weight": [1.0, 0.6, 1.0]})
    shown = training_images(images, [1], (1, 2, 3))
    assert shown["weight"].tolist() == [3.0, 0.6, 1.0] and training_images(images, [2], (1, 2, 3)).empty
    from lsdc_utils.detector.trainer import WeightedSampler

    sampler = WeightedSampler(np.array([3.0, 0.6, 1.4]), seed=0)
    counts = []
    for sampler.epoch in range(400):
        counts.append(np.bincount(list(sampler), minlength=3))
    counts = np.array(counts)
    assert (counts.sum(axis=1) == len(sampler)).all() and len(sampler) == 5
    assert (counts[:, 0] == 3).all() and set(counts[:, 1]) == {0, 1} and set(counts[:, 2]) == {1, 2}
    np.testing.assert_allclose(counts.mean(axis=0), [3, 0.6, 1.4], atol=0.1)


def write_toy(folder, studies=range(1, 5)):
    """A data set of some toy studies; the number and weight of each image."""
    toys = [toy_study("scs", number) for number in studies]
    stacks, labels = [stack for stack, _ in toys], pd.concat([labels for _, labels in toys])
    images, _, _ = write_dataset(stacks, labels, folder, config("scs"), 5.0, 4.0, 1)
    return training_images(images, studies, (1, 1, 2))


def train_toy(data, files, work, epochs=1, **others):
    settings = SETTINGS | {"epochs": epochs} | others
    model, history = train_detector(data, files, config("scs"), settings, work)
    return Detector(model, config("scs"), 0, {"note": "toy"}), history


def assert_same_weights(one, other):
    for name, value in one.model.state_dict().items():
        assert value.equal(other.model.state_dict()[name]), name


def test_training_saving_and_grading(tmp_path, capsys):
    files = write_toy(tmp_path / "data")
    trained, history = train_toy(tmp_path / "data", files, tmp_path / "work")
    assert len(history) == 1 and np.isfinite(history["cls_loss"]).all()
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["checkpoint.safetensors"]
    printed = capsys.readouterr()
    assert "epoch 1/1" in printed.out and "Caching" not in printed.out + printed.err
    assert_same_weights(trained, train_toy(tmp_path / "data", files, tmp_path / "again")[0])  # same seed, same weights
    path = tmp_path / "weights" / "yolo_scs_fold0.pt"
    save_detector(trained, path)
    loaded = load_detector(path)
    assert loaded.config == trained.config and loaded.about["note"] == "toy"
    assert str(tmp_path).encode() not in path.read_bytes()
    save_detector(train_toy(tmp_path / "data", files, tmp_path / "elsewhere")[0], tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == path.read_bytes()
    stack, _ = toy_study("scs", 9)
    canal = canal_points(9)
    seen = detect(loaded, [stack], canal)
    assert seen.scores.shape[1] == 3 and np.isfinite(seen.points).all() and seen.scores.max() > 1e-4
    rows, points = grade_condition([loaded, loaded], 9, [stack], canal)
    assert rows["row_id"].is_unique and set(rows["row_id"].str.split("_").str[0]) <= {"9"}
    assert len(points) == len(rows)
    for _, table in (grade_condition([loaded], 9, [stack], canal), grade_condition([loaded], 10, [], canal)):
        assert set(table[["X", "Y", "Z", "confidence"]].dtypes) == {np.dtype(float)}  # of empty tables too
    save_detector(replace(trained, config=replace(trained.config, power=4.0)), path)
    assert load_detector(path).config.power == 4.0 and (tmp_path / "again.pt").read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match="sha256"):
        load_detector(path)


@pytest.mark.parametrize("stopped_after", [2, 4])
def test_a_stopped_training_ends_with_the_weights_of_an_undisturbed_one(tmp_path, monkeypatch, capsys, stopped_after):
    data, files = tmp_path / "data", write_toy(tmp_path / "data")
    whole, history = train_toy(data, files, tmp_path / "whole", epochs=4, mosaic=0.5)
    assert capsys.readouterr().out.count("min left") == 1  # by the first epoch
    save = Checkpoint.save

    def save_and_stop(self, state):
        save(self, state)
        if len(state["history"]) == stopped_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", save_and_stop)
        train_toy(data, files, tmp_path / "stopped", epochs=4, mosaic=0.5)
    capsys.readouterr()
    resumed, again = train_toy(data, files, tmp_path / "stopped", epochs=4, mosaic=0.5)
    assert capsys.readouterr().out.count("/4 loss") == 4 - stopped_after  # no epoch is trained twice
    assert_same_weights(whole, resumed)
    for name in ("epoch", "lr", "cls_loss", "box_loss"):
        assert history[name].tolist() == again[name].tolist()
    image = data / files["file"].iloc[0]
    image.touch()
    train_toy(data, files, tmp_path / "stopped", epochs=4, mosaic=0.5)
    assert capsys.readouterr().out.count("/4 loss") == 0  # a new time is not another image
    cv2.imwrite(str(image), 255 - cv2.imread(str(image)))
    train_toy(data, files, tmp_path / "stopped", epochs=4, mosaic=0.5)
    assert capsys.readouterr().out.count("/4 loss") == 4  # other images, another training


def test_weights_belong_to_the_images_that_ultralytics_has_in_another_order(tmp_path, monkeypatch):
    files = write_toy(tmp_path / "data", [9, 10, 100])
    assert sorted(files["file"]) != files["file"].tolist()
    files["weight"] = np.linspace(0.5, 2, len(files))
    from lsdc_utils.detector.trainer import DetectorTrainer

    end, by_name = DetectorTrainer.end_epoch, {}

    def look(trainer):
        end(trainer)
        names = [Path(file).name for file in trainer.train_loader.dataset.im_files]
        by_name.update(zip(names, trainer.sampler.weights, strict=True))

    monkeypatch.setattr(DetectorTrainer, "end_epoch", look)
    train_toy(tmp_path / "data", files, tmp_path / "work")
    assert by_name == {Path(file).name: weight for file, weight in files[["file", "weight"]].itertuples(index=False)}


def test_a_batch_too_large_for_the_gpu_is_not_halved_silently(tmp_path, monkeypatch):
    from ultralytics.nn.tasks import DetectionModel

    files = write_toy(tmp_path / "data")

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DetectionModel, "loss", full)
    with pytest.raises(DetectorError, match="a batch of 8 images is too large for this GPU; try yolo_batch=4"):
        train_toy(tmp_path / "data", files, tmp_path / "work")


def test_a_training_that_breaks_resumes_from_before(tmp_path, monkeypatch, capsys):
    from lsdc_utils.detector.trainer import DetectorTrainer

    files, begin = write_toy(tmp_path / "data"), DetectorTrainer.begin_epoch

    def poison(trainer):
        begin(trainer)
        if trainer.epoch == 1:
            for module in trainer.ema.ema.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean[0] = np.inf

    with monkeypatch.context() as patch:
        patch.setattr(DetectorTrainer, "begin_epoch", poison)
        with pytest.raises(DetectorError, match="epoch 2: a weight is not finite; try a lower learning rate"):
            train_toy(tmp_path / "data", files, tmp_path / "work", epochs=3)
    train_toy(tmp_path / "data", files, tmp_path / "work", epochs=3)
    assert "resumes after epoch 1/3" in capsys.readouterr().out


def test_settings_are_checked_by_name(tmp_path):
    assert check_settings(SETTINGS | {"epochs": 1, "freeze": 3})["freeze"] == 3
    for wrong, message in (
        ({"lr": 0.1, "hsv_x": 1.0}, "hsv_x, lr: no such setting"),
        ({"imgsz": 640}, "imgsz: set by train_detector"),
        ({"model": "nowhere/yolov10x.pt"}, r"yolo_model.*nowhere/yolov10x\.pt"),
    ):
        with pytest.raises(DetectorError, match=message):
            train_toy(tmp_path, pd.DataFrame({"file": ["images/a.png"], "weight": 1.0}), tmp_path / "work", **wrong)
    with pytest.raises(DetectorError, match="epochs: must be given"):
        check_settings(SETTINGS)
    assert not (tmp_path / "work").exists()


def test_mosaics_can_be_closed_before_the_end(tmp_path, capsys):
    train_toy(tmp_path / "data", write_toy(tmp_path / "data"), tmp_path / "w", epochs=2, mosaic=1.0, close_mosaic=1)
    assert "epoch 2/2" in capsys.readouterr().out


def test_a_batch_is_shown_as_augmented(tmp_path):
    files = write_toy(tmp_path / "data")
    plain = {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "scale": 0.0, "translate": 0.0, "epochs": 1}
    images, boxes = augmented_batch(tmp_path / "data", files, config("scs"), SETTINGS | plain, count=4)
    assert images.shape == (4, 64, 32, 3) and images.dtype == np.uint8
    assert set(boxes["image"]) <= set(range(4)) and boxes["class_id"].between(0, 2).all()
    files = [cv2.imread(str(file))[..., ::-1] for file in (tmp_path / "data/images").glob("*.png")]
    assert all(any(np.array_equal(image, file) for file in files) for image in images)
    moved, _ = augmented_batch(tmp_path / "data", write_toy(tmp_path / "b"), config("scs"), SETTINGS | {"epochs": 1}, 4)
    assert not all(any(np.array_equal(image, file) for file in files) for image in moved)


def test_exchanged_halves_carry_their_pixels_and_boxes(tmp_path):
    from lsdc_utils.detector.trainer import exchange_halves

    files = write_toy(tmp_path / "data")
    plain = {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0, "scale": 0.0, "translate": 0.0, "epochs": 1}
    images, _ = augmented_batch(tmp_path / "data", files, config("scs"), SETTINGS | plain | {"exchange": 1.0}, count=8)
    whole = [cv2.imread(str(file))[..., ::-1] for file in (tmp_path / "data/images").glob("*.png")]
    for image in images:
        assert any(np.array_equal(image[:, :16], one[:, :16]) for one in whole)
        assert any(np.array_equal(image[:, 16:], one[:, 16:]) for one in whole)
    assert not all(any(np.array_equal(image, one) for one in whole) for image in images)

    x = np.array([[0.2, 0.8], [0.3, 0.7]])  # of the boxes of two images; class 10 k + number
    boxes = [np.column_stack([x[k], [0.5] * 2, [0.1] * 2, [0.1] * 2]).astype(np.float32) for k in range(2)]

    class Two:
        def __len__(self):
            return 2

        def get_image_and_label(self, k):
            from ultralytics.utils.instance import Instances

            own = Instances(boxes[k].copy(), np.zeros((0, 1000, 2), np.float32), bbox_format="xywh", normalized=True)
            return {"img": np.full((4, 6, 3), k), "instances": own, "cls": np.array([[10 * k], [10 * k + 1]])}

    exchange_halves(two := Two(), 1.0)
    drawn = [two.get_image_and_label(0) for _ in range(30)]
    mixed = next(one for one in drawn if one["img"][0, -1, 0] == 1)
    assert mixed["img"][:, :, 0].tolist() == [[0, 0, 0, 1, 1, 1]] * 4
    np.testing.assert_allclose(mixed["instances"].bboxes[:, 0], [0.2, 0.7])
    assert mixed["cls"].ravel().tolist() == [0, 11]
    exchange_halves(never := Two(), 0.0)
    assert (never.get_image_and_label(1)["img"] == 1).all()


def test_a_lean_network_has_a_head_for_small_boxes_and_others_start_from_it(tmp_path):
    files, path = write_toy(tmp_path / "data"), tmp_path / "yolo_scs_fold0.pt"
    trained, _ = train_toy(tmp_path / "data", files, tmp_path / "work", width=0.125)
    head = trained.model.model[-1]
    assert head.stride.tolist() == [8, 16] and head.reg_max == 4
    assert sum(value.numel() for value in trained.model.parameters()) < 0.7e6  # of yolov10n's 2.7e6
    save_detector(trained, path)
    canal, (stack, _) = canal_points(9), toy_study("scs", 9)
    seen = detect(load_detector(path), [stack], canal)
    assert seen.scores.shape[1] == 3 and np.isfinite(seen.points).all() and len(seen.points)
    start = {"model": str(path), "box_start": False, "quick_norms": False, "lr0": 1e-12}
    again, _ = train_toy(tmp_path / "data", files, tmp_path / "again", **start)
    for (name, value), other in zip(trained.model.named_parameters(), again.model.parameters(), strict=True):
        np.testing.assert_allclose(other.detach(), value.detach(), atol=2e-3, rtol=1e-2, err_msg=name)


@pytest.mark.parametrize("width", [None, 0.125])
def test_untrained_networks_begin_with_boxes_of_the_known_size(width):
    from ultralytics.nn.tasks import DetectionModel, yaml_model_load

    from lsdc_utils.detector.trainer import lean, quicken_norms, start_boxes

    torch.manual_seed(0)
    architecture = yaml_model_load("yolov10n.yaml")
    model = DetectionModel(lean(architecture, width) if width else architecture, nc=3, verbose=False).eval()
    expected = np.array([7.0, 5.0])
    start_boxes([model], expected)
    quicken_norms(model)
    with torch.inference_mode():
        corners = model.model[-1]._get_decode_boxes(model(torch.zeros(1, 3, 96, 64))[1]["one2one"])[0]
    width, height = corners[2:].median(dim=1).values.numpy()  # without suppression asked for: x, y, width, height
    assert abs(width - expected[0]) < 3 and abs(height - expected[1]) < 3
