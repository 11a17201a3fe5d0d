"""Detectors: classes, boxes, data sets, weights, and what becomes of detections in patient space."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from lsdc_utils import geometry, metric
from lsdc_utils.checkpoint import Checkpoint
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.canal import AXIAL_REACH, CANAL_FROM_FORAMINA, axial_levels, canal_from_foramina, study_canal
from lsdc_utils.detector.classes import SCHEMES, Detector, DetectorConfig, DetectorError, class_table
from lsdc_utils.detector.dataset import _box, label_boxes, training_images, write_dataset
from lsdc_utils.detector.detections import Detections, _other_side, detect, patient_points
from lsdc_utils.detector.images import (
    network_inputs,
    off_midline,
    slice_channels,
    strip_window,
    strips,
)
from lsdc_utils.detector.levels import (
    FLOOR,
    LevelEvidence,
    assign_levels,
    cross_read,
    evidence_tables,
    fit_power,
    grade_condition,
    grade_study,
    level_evidence,
    read_severities,
)
from lsdc_utils.detector.training import (
    DetectorTraining,
    WeightedSampler,
    _begin_epoch,
    _quicken_norms,
    _start_boxes,
    load_detector,
    quiet_ultralytics,
    save_detector,
    save_power,
    train_detector,
)
from lsdc_utils.grading import localisation
from lsdc_utils.vocabulary import AXIAL, CONDITIONS, GROUPS, LEVELS, SEVERITIES, T1, T2, row_id

SIZES = {"nfn": (64, 32), "scs": (64, 32), "ss": (32, 32)}
STRIPS = {"nfn": (0.2, 0.8, 0.0, 1.0), "scs": (0.2, 0.8, 0.0, 1.0), "ss": (0.25, 0.75, 0.25, 0.75)}
LATERAL = {"nfn": 18.0, "scs": 0.0, "ss": 12.0}  # mm off the midline


def config(condition: str, scheme: str = "seen", **values) -> DetectorConfig:
    settings = dict(strip=STRIPS[condition], size=SIZES[condition], neighbours=True, box_mm=14.0)
    return DetectorConfig(condition, scheme, **(settings | values))


def level_centre(level: str, shift: float = 0.0) -> np.ndarray:
    """Where the toy spine has its canal at a level, LPS mm."""
    number = LEVELS.index(level)
    return np.array([shift, 20 + 3 * number, 70 - 35.0 * number])


def toy_points(condition: str, shift: float = 0.0) -> dict[tuple[str, str], np.ndarray]:
    """(condition, level) -> true point."""
    names = [c for c in CONDITIONS.values() if c.group == condition]
    sign = {"left": 1, "right": -1, None: 0}
    return {
        (c.name, level): level_centre(level, shift) + np.array([sign[c.side] * LATERAL[condition], 0, 0])
        for c in names
        for level in LEVELS
    }


def toy_stack(condition: str, severities: dict, study_id: int = 1, seed: int = 0) -> Stack:
    """A series with a bright ball at each point whose radius grows with severity, on noise."""
    rng = np.random.default_rng(seed)
    axial = condition == "ss"
    size, spacing = 96, 2.0 if axial else 2.7
    places = np.arange(84, -84, -6.0) if axial else np.arange(-30, 31, 5.0)
    affines = np.zeros((len(places), 4, 4))
    affines[:, 3, 3] = 1
    affines[:, :3, 0] = [spacing, 0, 0] if axial else [0, spacing, 0]
    affines[:, :3, 1] = [0, spacing, 0] if axial else [0, 0, -spacing]
    half = spacing * (size - 1) / 2
    affines[:, :3, 3] = [(-half, 30 - half, z) for z in places] if axial else [(x, 30 - half, half) for x in places]
    index = np.stack(np.meshgrid(np.arange(size), np.arange(size), [0], [1]), -1).reshape(-1, 4)
    pixels = np.empty((len(places), size, size), dtype=np.uint8)
    for target, affine in zip(pixels, affines, strict=True):
        grid = (index @ affine.T)[:, :3].reshape(size, size, 3)
        image = rng.normal(60, 10, (size, size))
        for key, point in toy_points(condition).items():
            off = np.linalg.norm(grid - point, axis=2)
            image += 150 * np.exp(-0.5 * (off / (3 + 2 * severities[key])) ** 2)
        target[:] = image.clip(0, 255)
    n = len(places)
    kind = {"nfn": T1, "scs": T2, "ss": AXIAL}[condition]
    shapes = np.full((n, 2), size, dtype=np.int32)
    series_id = study_id * 10 + list(GROUPS).index(condition)
    numbers = np.arange(7, 7 + n, dtype=np.int32)
    return Stack(study_id, series_id, kind, pixels, shapes, affines, numbers, np.zeros(n, dtype=np.int32))


def toy_labels(stack: Stack, condition: str, severities: dict) -> pd.DataFrame:
    """The label table's rows of one toy series: each point clicked on the nearest slice."""
    lines = []
    for (name, level), point in toy_points(condition).items():
        index = int(np.abs(geometry.plane_distances(stack.affines, point[None])[:, 0]).argmin())
        x, y, _ = geometry.to_pixels(stack.affines[index], point)
        clicked = stack.affines[index] @ [x, y, 0, 1]
        number = stack.instance_numbers[index]
        row = row_id(stack.study_id, name, level)
        lines.append(
            (row, stack.study_id, name, level, severities[name, level], stack.series_id, number, x, y, *clicked[:3])
        )
    names = ["row_id", "study_id", "condition", "level", "severity", "series_id", "instance_number"]
    return pd.DataFrame(lines, columns=[*names, "x", "y", "X", "Y", "Z"])


def toy_study(condition: str, study_id: int = 1) -> tuple[Stack, pd.DataFrame]:
    rng = np.random.default_rng(study_id)
    severities = {key: int(rng.integers(3)) for key in toy_points(condition)}
    stack = toy_stack(condition, severities, study_id, seed=study_id)
    return stack, toy_labels(stack, condition, severities)


def ideal(condition: str, severities: dict, scheme: str = "seen") -> tuple[Detections, DetectorConfig]:
    """What a perfect detector would say of a toy study: each true point twice, half a millimetre off, and clutter."""
    settings = config(condition, scheme)
    table = class_table(settings)
    rng = np.random.default_rng(0)
    points, scores, levels = [], [], []
    for (name, level), point in toy_points(condition).items():
        for _ in range(2):
            score = np.full(len(table), 0.01)
            fits = table["condition"].isin([None, name]) & table["level"].isin([None, level])
            score[fits & (table["severity"] == severities[name, level])] = 0.8
            points.append(point + rng.normal(0, 0.5, 3))
            scores.append(score)
            levels.append(LEVELS.index(level))
    for _ in range(30):  # clutter in front of the spine
        points.append(rng.uniform([-30, -80, -90], [30, -40, 90]))
        scores.append(np.full(len(table), 0.02))
        levels.append(int(rng.integers(5)))
    return Detections(np.array(points), np.array(scores), np.array(levels)), settings


def no_detections(settings: DetectorConfig) -> Detections:
    return Detections(np.empty((0, 3)), np.empty((0, len(class_table(settings)))), np.empty(0, int))


def canal_points(study_id: int = 1, shift: float = 0.0) -> pd.DataFrame:
    lines = [(study_id, level, "", *level_centre(level, shift), 0.9) for level in LEVELS]
    return pd.DataFrame(lines, columns=["study_id", "level", "side", "X", "Y", "Z", "confidence"])


def foramen_points(study_id: int = 1) -> pd.DataFrame:
    lines = [
        (study_id, level, CONDITIONS[name].side, *point, 0.8) for (name, level), point in toy_points("nfn").items()
    ]
    return pd.DataFrame(lines, columns=["study_id", "level", "side", "X", "Y", "Z", "confidence"])


@pytest.mark.parametrize(
    ("scheme", "counts"), [("sided", {"nfn": 30, "scs": 15, "ss": 30}), ("seen", {"nfn": 15, "scs": 15, "ss": 3})]
)
def test_numbers_of_classes(scheme, counts):
    assert {key: len(class_table(config(key, scheme))) for key in GROUPS} == counts


def test_settings_that_cannot_work_are_refused():
    for wrong in (
        {"size": (60, 32)},
        {"strip": (0.5, 0.2, 0.0, 1.0)},
        {"scheme": "both"},
        {"condition": "nfn", "views": ((1.0, True),)},
    ):
        with pytest.raises(DetectorError):
            DetectorConfig(
                **{"condition": "scs", **dict(scheme="seen", strip=(0, 1, 0, 1), size=(32, 32)), **wrong},
                neighbours=True,
                box_mm=14.0,
            )


@pytest.mark.parametrize("condition", GROUPS)
def test_boxes_lie_where_the_reader_clicked(condition):
    stack, labels = toy_study(condition)
    settings = config(condition)
    found, skipped = label_boxes(stack, labels, settings, copy_mm=0.0)
    assert skipped.empty and set(found["row_id"]) == set(labels["row_id"]) and not found["copied"].any()
    both = found.merge(labels, on="row_id")
    centres = both[["x_x", "y_x"]].to_numpy()[:, None]
    back = patient_points(stack, both["slice"].to_numpy(), centres, settings)[:, 0]
    np.testing.assert_allclose(back, both[["X", "Y", "Z"]], atol=0.01)
    edge = found[["x", "y"]].to_numpy() + np.array([[0.5], [-0.5]])[:, None] * found[["width", "height"]].to_numpy()
    assert edge.min() >= 0 and edge.max() <= 1


def test_neighbouring_slices_carry_the_box_too():
    stack, labels = toy_study("nfn")
    found, _ = label_boxes(stack, labels, config("nfn"), copy_mm=6.0)
    assert found["copied"].sum() >= len(labels)
    assert not found.duplicated(["slice", "row_id"]).any()
    assert (found["off"] <= 6).all() and (found.loc[~found["copied"], "off"] == 0).all()
    assert (found.loc[found["copied"], "off"] > 2).all()  # slices are 5 mm apart


@pytest.mark.parametrize("condition", GROUPS)
def test_a_box_has_the_same_side_in_mm_at_every_spacing(condition):
    stack, labels = toy_study(condition)
    settings = config(condition)
    finer = replace(stack, affines=stack.affines * [[0.5, 0.7, 1, 1]])
    for one in (stack, finer):
        found, _ = label_boxes(one, labels.assign(x=48.0, y=48.0), settings, copy_mm=0.0)
        window = strip_window(one.shapes[0], settings)[2:]
        side = found[["width", "height"]].to_numpy() * window * np.linalg.norm(one.affines[0, :3, :2], axis=0)
        np.testing.assert_allclose(side[~found["clipped"]], settings.box_mm)


def test_both_recesses_are_boxed_on_every_slice_of_a_level():
    stack, labels = toy_study("ss")
    apart = labels["condition"].str.startswith("left") & (labels["level"] == "l3_l4")
    index = np.flatnonzero(stack.instance_numbers == labels.loc[apart, "instance_number"].item())[0]
    labels.loc[apart, "instance_number"] = stack.instance_numbers[index + 1]
    labels.loc[apart, "Z"] = stack.affines[index + 1, 2, 3]
    found, _ = label_boxes(stack, labels, config("ss"), copy_mm=6.5)
    mine = found[found["row_id"].str.contains("l3_l4")]
    assert set(mine["slice"]) == {index - 1, index, index + 1, index + 2}
    assert (mine.groupby("slice").size() == 2).all()


def test_a_margin_beyond_the_copies_is_not_used(tmp_path):
    stack, labels = toy_study("scs")
    labels = labels[labels["level"] == "l3_l4"]  # clicked at x = 0, slices 5 mm apart
    images, found, _ = write_dataset([stack], labels, tmp_path / "d", config("scs"), 6.0, 5.0, 99)
    x = dict(zip(range(len(stack.pixels)), stack.affines[:, 0, 3].round(), strict=True))
    by_x = images.assign(x=images["slice"].map(x)).set_index("x")["boxes"].to_dict()
    assert by_x == {-15: 0, -5: 1, 0: 1, 5: 1, 15: 0}
    weight = images.set_index("slice")["weight"]
    clicked = found.loc[~found["copied"], "slice"].item()
    assert weight[clicked] == 1 and weight[clicked + 1] == pytest.approx(np.exp(-0.5 * (5 / 4) ** 2))


def test_each_epoch_shows_images_by_their_weights():
    images = pd.DataFrame({"file": list("abc"), "study_id": 1, "worst": [2, 0, -1], "weight": [1.0, 0.6, 1.0]})
    shown = training_images(images, [1], (1, 2, 3))
    assert shown["weight"].tolist() == [3.0, 0.6, 1.0] and training_images(images, [2], (1, 2, 3)).empty
    sampler = WeightedSampler(np.array([3.0, 0.6, 1.4]), seed=0)
    counts = []
    for sampler.epoch in range(400):
        counts.append(np.bincount(list(sampler), minlength=3))
    counts = np.array(counts)
    assert (counts.sum(axis=1) == len(sampler)).all() and len(sampler) == 5
    assert (counts[:, 0] == 3).all() and set(counts[:, 1]) == {0, 1} and set(counts[:, 2]) == {1, 2}
    np.testing.assert_allclose(counts.mean(axis=0), [3, 0.6, 1.4], atol=0.1)


def mirror(stack: Stack) -> Stack:
    """The mirrored patient: x changes sign. Axial images change columns, sagittal series the order of slices."""
    affines, pixels = stack.affines.copy(), stack.pixels
    if stack.series_type == AXIAL:
        pixels = pixels[:, :, ::-1]
        last = stack.affines[:, :3, 3] + stack.affines[:, :3, 0] * (pixels.shape[2] - 1)
        affines[:, :3, 3] = last * [-1, 1, 1]
    else:
        affines[:, 0, 3] *= -1
        affines, pixels = affines[::-1], pixels[::-1]
    return replace(stack, pixels=np.ascontiguousarray(pixels), affines=affines)


def test_channels_run_from_medial_to_lateral():
    stack, _ = toy_study("nfn")
    settings = config("nfn")
    for canal, other in ((None, None), (canal_points(shift=3), canal_points(shift=-3))):
        seen, mirrored = network_inputs(stack, settings, canal), network_inputs(mirror(stack), settings, other)
        off = off_midline(stack, canal)
        aside = off > 3  # the middle slice has no lateral neighbour
        np.testing.assert_array_equal(seen[aside], mirrored[::-1][aside])
        plain = strips(stack, settings)
        left, right = np.flatnonzero(stack.affines[:, 0, 3] == 20)[0], np.flatnonzero(stack.affines[:, 0, 3] == -20)[0]
        np.testing.assert_array_equal(seen[left], plain[[left - 1, left, left + 1]])
        np.testing.assert_array_equal(seen[right], plain[[right + 1, right, right - 1]])


@pytest.mark.parametrize("condition", GROUPS)
def test_a_mirrored_patient_is_found_mirrored(condition, tmp_path):
    """With flipped views, an untrained network too finds in the mirrored patient what it finds in the patient."""
    quiet_ultralytics(tmp_path)
    from ultralytics.nn.tasks import DetectionModel

    settings = config(condition, views=((1.0, False),) if condition == "nfn" else ((1.0, False), (1.0, True)))
    torch.manual_seed(1)
    model = DetectionModel("yolov10n.yaml", nc=len(class_table(settings)), verbose=False).eval()
    stack, _ = toy_study(condition)
    there = Detector(model, settings, 0, {})
    seen = detect(there, [stack], canal_points(shift=2.0))
    mirrored = detect(there, [mirror(stack)], canal_points(shift=-2.0))
    assert len(seen.scores) == len(mirrored.scores) > 0

    def ordered(points: np.ndarray) -> np.ndarray:
        """Places in an order that does not depend on that of slices and views."""
        return points[np.lexsort(points.round(2).T)]

    np.testing.assert_allclose(ordered(seen.points * [-1, 1, 1]), ordered(mirrored.points), atol=0.02)
    np.testing.assert_allclose(np.sort(seen.scores, axis=0), np.sort(mirrored.scores, axis=0), atol=1e-5)


def noisy_findings(studies: int, seed: int = 0) -> tuple[list[LevelEvidence], pd.DataFrame]:
    """Findings whose strongest detection tells the severity and whose weak ones do not, and their labels."""
    rng = np.random.default_rng(seed)
    found, labels = [], []
    for study in range(1, studies + 1):
        for level in LEVELS:
            severity = int(rng.choice(3, p=[0.6, 0.25, 0.15]))
            scores = rng.uniform(0.01, 0.1, (6, 3))
            scores[0] = 0.1
            scores[0, severity if rng.random() < 0.9 else 0] = 0.7
            row = row_id(study, "spinal_canal_stenosis", level)
            found.append(LevelEvidence(row, study, level, "", np.zeros(3), 0.7, scores.sum(axis=1), scores))
            labels.append((row, severity))
    return found, pd.DataFrame(labels, columns=["row_id", "severity"])


def loss_of(rows: np.ndarray, labels: pd.DataFrame) -> float:
    weighted = metric.weight_rows(rows)
    truth = labels["severity"].to_numpy()
    return np.average(-np.log(weighted[np.arange(len(truth)), truth]), weights=metric.WEIGHTS[truth])


def test_findings_are_read_by_the_power_that_fits():
    found, labels = noisy_findings(60)
    power = fit_power(found, labels)
    assert power >= 2  # weak detections say nothing here
    fresh, truth = noisy_findings(60, seed=1)
    assert loss_of(read_severities(fresh, power), truth) < loss_of(read_severities(fresh, 0.0), truth)
    np.testing.assert_allclose(read_severities(fresh, power).sum(axis=1), 1)
    assert fit_power(found[:0], labels) == DetectorConfig.power
    assert fit_power(found, labels.assign(severity=0)) == DetectorConfig.power


def test_no_study_takes_part_in_the_power_its_rows_are_read_by(monkeypatch):
    found, labels = noisy_findings(20)
    asked = []
    monkeypatch.setattr(
        "lsdc_utils.detector.levels.fit_power", lambda some, _: asked.append({f.study_id for f in some}) or len(asked)
    )
    rows = cross_read(found, labels, seed=3)
    everyone = {one.study_id for one in found}
    assert len(asked) == 5 and set.union(*(everyone - some for some in asked)) == everyone
    for power, some in enumerate(asked, start=1):
        mine = [number for number, one in enumerate(found) if one.study_id not in some]
        assert len(mine) == 20
        np.testing.assert_array_equal(rows[mine], read_severities([found[number] for number in mine], power))


def test_foramina_take_their_level_from_the_canal():
    """Where every detection is surest of the level below, the canal's points say otherwise."""
    severities = dict.fromkeys(toy_points("nfn"), 1)
    detections, settings = ideal("nfn", severities)
    scores = detections.scores.reshape(-1, 5, 3)
    slipped = replace(detections, scores=np.roll(scores, 1, axis=1).reshape(scores.shape[0], -1) + 0.02)
    canal = canal_points()
    canal[["Y", "Z"]] += CANAL_FROM_FORAMINA
    found = level_evidence(slipped, 1, settings, canal)
    assert len(found) == 10
    for one in found:
        assert np.abs(one.point[1:] - level_centre(one.level)[1:]).max() < 3, one.level


def test_between_two_levels_the_nearer_label_speaks():
    stack, labels = toy_study("ss")
    found, _ = label_boxes(stack, labels, config("ss"), copy_mm=40.0)
    per_slice = found.assign(side=found["row_id"].str.contains("left")).groupby(["slice", "side"]).size()
    assert per_slice.max() == 1 and len(per_slice) == 2 * len(stack.pixels)


def test_labels_without_a_box_are_counted_with_their_reason(tmp_path):
    stack, labels = toy_study("scs")
    labels.loc[0, "severity"] = -1
    labels.loc[1, "instance_number"] = 9999
    labels.loc[2, ["series_id", "instance_number"]] = -1
    labels.loc[3, ["x", "y"]] = [-40.0, 5.0]
    images, found, skipped = write_dataset([stack], labels, tmp_path / "scs", config("scs"), 0.0, 4.0, 1)
    reasons = skipped.set_index("row_id")["reason"].to_dict()
    expected = ["no severity", "its slice is not in the series", "no coordinate", "outside the strip"]
    assert [reasons[row] for row in labels["row_id"][:4]] == expected
    assert found["row_id"].tolist() == [labels["row_id"][4]]
    assert images["boxes"].tolist() in ([1, 0], [0, 1]) and images["worst"].min() == -1


def test_a_box_over_the_edge_is_clipped():
    place = _box((0.0, 50.0), (96, 96), np.eye(4), config("scs", strip=(0.0, 1.0, 0.0, 1.0)))
    assert place is not None and place[-1] and place[0] - place[2] / 2 == pytest.approx(0)


def test_files_show_the_slices_before_at_and_behind(tmp_path):
    import cv2

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


@pytest.mark.parametrize("condition", GROUPS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_perfect_detections_give_perfect_rows_and_points(condition, scheme):
    rng = np.random.default_rng(3)
    severities = {key: int(rng.integers(3)) for key in toy_points(condition)}
    stack = toy_stack(condition, severities)
    detections, settings = ideal(condition, severities, scheme)
    canal = canal_points()
    if condition == "nfn":  # as the body has it: the canal's points lie behind and below the foramina's
        canal[["Y", "Z"]] += CANAL_FROM_FORAMINA
    rows, points = evidence_tables(level_evidence(detections, 1, settings, canal), settings.power)
    labels = toy_labels(stack, condition, severities)
    both = rows.merge(labels, on="row_id")
    assert len(both) == len(labels) == len(rows)
    np.testing.assert_allclose(rows[list(SEVERITIES)].sum(axis=1), 1)
    assert (both[list(SEVERITIES)].to_numpy().argmax(axis=1) == both["severity"]).all()
    errors = localisation.point_errors(points, labels)
    assert errors["distance"].max() < 4
    assert (localisation.localisation(errors)["within_5_mm"] == 1).all()


@pytest.mark.parametrize("condition", ["nfn", "ss"])
def test_a_mirrored_study_exchanges_left_and_right(condition):
    severities = {key: int(key[0].startswith("left")) * 2 for key in toy_points(condition)}
    detections, settings = ideal(condition, severities)
    mirrored = replace(detections, points=detections.points * [-1, 1, 1])
    rows, mirror = (
        evidence_tables(level_evidence(d, 1, settings, canal_points()), settings.power)[0].set_index("row_id")
        for d in (detections, mirrored)
    )
    for row in rows.index:
        other = row.replace("left", "*").replace("right", "left").replace("*", "right")
        np.testing.assert_allclose(rows.loc[row], mirror.loc[other], atol=1e-6)


def test_levels_are_assigned_once_in_anatomical_order():
    points = np.array([level_centre(level) for level in LEVELS])
    evidence = np.full((5, 5), 0.01) + 0.8 * np.eye(5)
    evidence[2] = [0.01, 0.5, 0.45, 0.01, 0.01]  # on its own, L3/L4 would rather be L2/L3
    assert assign_levels(points, evidence).tolist() == [0, 1, 2, 3, 4]
    order = np.array([3, 0, 4, 2, 1])
    assert order[assign_levels(points[order], evidence[order])].tolist() == [0, 1, 2, 3, 4]


def test_no_evidence_no_rows():
    for condition in GROUPS:
        settings = config(condition)
        found = level_evidence(no_detections(settings), 1, settings, canal_points())
        rows, points = evidence_tables(found, settings.power)
        assert rows.empty and points.empty and list(rows) == ["row_id", *SEVERITIES]
    severities = dict.fromkeys(toy_points("ss"), 0)
    detections, settings = ideal("ss", severities)
    assert not level_evidence(detections, 1, settings, None)  # no canal points, no levels


def test_without_canal_detections_the_canal_follows_from_the_foramina(monkeypatch):
    """A study without sagittal T2: nothing for the canal, and still sides and levels for the recesses."""
    seen = {key: ideal(key, dict.fromkeys(toy_points(key), 1)) for key in ("nfn", "ss")}
    empty = config("scs"), config("scs", "sided")
    for settings in empty:
        seen["scs"] = no_detections(settings), settings
        monkeypatch.setattr(
            "lsdc_utils.detector.levels.detect", lambda found, stacks, canal: seen[found.config.condition][0]
        )
        detectors = {key: [Detector(torch.nn.Identity(), seen[key][1], 0, {})] for key in GROUPS}
        rows, points, canal = grade_study(detectors, 1, [])
        assert set(points["condition"]) == {"nfn", "ss"}
        assert not rows["row_id"].str.contains("canal").any()
        assert len(rows) == 20
        np.testing.assert_allclose(canal["X"], 0, atol=1)
        shift = canal[["Y", "Z"]].to_numpy() - [level_centre(level)[1:] for level in canal["level"]]
        np.testing.assert_allclose(shift, CANAL_FROM_FORAMINA, atol=1)
    one_side = points[(points["condition"] == "nfn") & (points["side"] == "left")].drop(columns="condition")
    assert list(canal_from_foramina(one_side)) == list(one_side)
    assert canal_from_foramina(one_side).empty
    assert canal_from_foramina(one_side.head(0)).empty


def test_only_studies_without_canal_points_take_them_from_their_foramina():
    nfn = pd.concat([foramen_points(1), foramen_points(2)])
    canal = study_canal(canal_points(1), nfn)
    assert list(canal) == list(canal_points(1)) and set(canal["side"]) == {""}
    pd.testing.assert_frame_equal(canal[canal["study_id"] == 1], canal_points(1))
    mine = canal[canal["study_id"] == 2]
    assert list(mine["level"]) == list(LEVELS)
    shift = mine[["X", "Y", "Z"]].to_numpy() - [level_centre(level) for level in LEVELS]
    np.testing.assert_allclose(shift, np.c_[np.zeros(5), CANAL_FROM_FORAMINA])
    assert study_canal(canal_points(1).head(0), foramen_points(2).head(0)).empty


def test_axial_slices_take_the_level_whose_point_is_nearest_to_their_plane():
    stack, _ = toy_study("ss")
    z = stack.affines[:, 2, 3]
    apart = np.abs(z[:, None] - [level_centre(level)[2] for level in LEVELS])
    expected = np.where(apart.min(axis=1) <= AXIAL_REACH, apart.argmin(axis=1), -1)
    assert set(expected) == {-1, 0, 1, 2, 3, 4}
    np.testing.assert_array_equal(axial_levels(stack, canal_points()), expected)
    np.testing.assert_array_equal(axial_levels(stack, canal_points().iloc[::-1]), expected)
    without = np.where(np.isin(expected, [1, 3]), -1, expected)
    np.testing.assert_array_equal(axial_levels(stack, canal_points().iloc[[0, 2, 4]]), without)
    assert (axial_levels(stack, canal_points().head(0)) == -1).all()


def test_a_class_never_seen_gets_the_published_floor():
    settings = config("ss", "sided")
    scores = np.zeros((1, 30))
    scores[0, 2] = 0.5
    detections = Detections(np.zeros((1, 3)), scores, np.array([-1]))
    rows = evidence_tables(level_evidence(detections, 1, settings), 1.0)[0].set_index("row_id")
    floor = FLOOR
    first = rows.loc["1_left_subarticular_stenosis_l1_l2"].to_numpy(float)
    np.testing.assert_allclose(first, np.array([floor, floor, 0.5]) / (0.5 + 2 * floor))
    np.testing.assert_allclose(rows.iloc[1].to_numpy(float), 1 / 3)


def test_flipped_axial_views_change_the_sides_of_sided_classes():
    table = class_table(config("ss", "sided"))
    other = _other_side(config("ss", "sided"))
    names = [name.replace("left", "*").replace("right", "left").replace("*", "right") for name in table["name"]]
    assert table["name"].iloc[other].tolist() == names
    for settings in (config("nfn", "sided"), config("ss"), config("scs")):
        assert (_other_side(settings) == np.arange(len(class_table(settings)))).all()


def write_toy(folder, studies=range(1, 5)):
    """A data set of some toy studies; the number and weight of each image."""
    toys = [toy_study("scs", number) for number in studies]
    stacks, labels = [stack for stack, _ in toys], pd.concat([labels for _, labels in toys])
    images, _, _ = write_dataset(stacks, labels, folder, config("scs"), 5.0, 4.0, 1)
    return training_images(images, studies, (1, 1, 2))


def train_toy(data, files, work, epochs=1, **options):
    options = {"mosaic": 0.0, "fliplr": 0.0, "cls": 2.0, "box": 4.0, "scale": 0.1, "translate": 0.05} | options
    training = DetectorTraining("yolov10n.yaml", epochs, 8, 0.002, seed=1, threads=1, options=options)
    model, history = train_detector(data, files, config("scs"), training, work)
    return Detector(model, config("scs"), 0, {"note": "toy"}), history


def assert_same_weights(one, other):
    for name, value in one.model.state_dict().items():
        assert value.equal(other.model.state_dict()[name]), name


def test_training_saving_and_grading(tmp_path, capsys):
    files = write_toy(tmp_path / "data")
    trained, history = train_toy(tmp_path / "data", files, tmp_path / "work")
    assert len(history) == 1 and np.isfinite(history["cls_loss"]).all()
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["checkpoint.safetensors"]
    assert "epoch 1/1" in capsys.readouterr().out
    assert_same_weights(trained, train_toy(tmp_path / "data", files, tmp_path / "again")[0])  # same seed, same weights
    path = tmp_path / "weights" / "yolo_scs_fold0.pt"
    save_detector(trained, path)
    loaded = load_detector(path)
    assert loaded.config == trained.config and loaded.about["note"] == "toy"
    assert str(tmp_path).encode() not in path.read_bytes()
    save_detector(train_toy(tmp_path / "data", files, tmp_path / "elsewhere")[0], tmp_path / "again.pt")
    assert (tmp_path / "again.pt").read_bytes() == path.read_bytes()
    stack, _ = toy_study("scs", 9)
    seen = detect(loaded, [stack])
    assert seen.scores.shape[1] == 15 and np.isfinite(seen.points).all() and seen.scores.max() > 1e-4
    rows, points = grade_condition([loaded, loaded], 9, [stack])
    assert rows["row_id"].is_unique and set(rows["row_id"].str.split("_").str[0]) <= {"9"}
    assert len(points) == len(rows)
    for _, table in (grade_condition([loaded], 9, [stack]), grade_condition([loaded], 10, [])):
        assert set(table[["X", "Y", "Z", "confidence"]].dtypes) == {np.dtype(float)}  # of empty tables too
    save_power(path, 4.0)
    assert load_detector(path).config.power == 4.0
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(DetectorError, match="sha256"):
        load_detector(path)


@pytest.mark.parametrize("stopped_after", [2, 4])
def test_a_stopped_training_ends_like_an_undisturbed_one(tmp_path, monkeypatch, capsys, stopped_after):
    data, files = tmp_path / "data", write_toy(tmp_path / "data")
    whole, history = train_toy(data, files, tmp_path / "whole", epochs=4, mosaic=0.5)
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
    (data / files["file"].iloc[0]).touch()
    train_toy(data, files, tmp_path / "stopped", epochs=4, mosaic=0.5)
    assert capsys.readouterr().out.count("/4 loss") == 4  # of other images nothing is taken


def test_weights_belong_to_the_images_that_ultralytics_has_in_another_order(tmp_path, monkeypatch):
    files = write_toy(tmp_path / "data", [9, 10, 100])
    assert sorted(files["file"]) != files["file"].tolist()
    files["weight"] = np.linspace(0.5, 2, len(files))
    begin, found = _begin_epoch, {}

    def look(trainer, sampler, training):
        begin(trainer, sampler, training)
        names = [Path(file).name for file in trainer.train_loader.dataset.im_files]
        found.update(zip(names, sampler.weights, strict=True))

    monkeypatch.setattr("lsdc_utils.detector.training._begin_epoch", look)
    train_toy(tmp_path / "data", files, tmp_path / "work")
    assert found == {Path(file).name: weight for file, weight in files[["file", "weight"]].itertuples(index=False)}


def test_a_batch_too_large_for_the_gpu_is_not_halved_silently(tmp_path, monkeypatch):
    from ultralytics.nn.tasks import DetectionModel

    files = write_toy(tmp_path / "data")

    def full(*_):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(DetectionModel, "loss", full)
    with pytest.raises(DetectorError, match="a batch of 8 images is too large for this GPU; try yolo_batch=4"):
        train_toy(tmp_path / "data", files, tmp_path / "work")


def test_a_training_that_breaks_goes_on_from_before(tmp_path, monkeypatch, capsys):
    files = write_toy(tmp_path / "data")
    begin = _begin_epoch

    def poison(trainer, *given):
        begin(trainer, *given)
        if trainer.epoch == 1:
            for module in trainer.ema.ema.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean[0] = np.inf

    with monkeypatch.context() as patch:
        patch.setattr("lsdc_utils.detector.training._begin_epoch", poison)
        with pytest.raises(DetectorError, match="epoch 2: a weight is no number; try a lower learning rate"):
            train_toy(tmp_path / "data", files, tmp_path / "work", epochs=3)
    train_toy(tmp_path / "data", files, tmp_path / "work", epochs=3)
    assert "goes on after epoch 1/3" in capsys.readouterr().out


def test_missing_pretrained_weights_are_named_and_not_looked_for(tmp_path):
    training = DetectorTraining("nowhere/yolov10x.pt", 1, 8, 0.002, seed=1, threads=1, options={})
    with pytest.raises(DetectorError, match=r"yolo_model.*nowhere/yolov10x\.pt"):
        train_detector(
            tmp_path,
            pd.DataFrame({"file": ["images/a.png"], "weight": 1.0}),
            config("scs"),
            training,
            tmp_path / "work",
        )
    assert not (tmp_path / "work").exists()


def test_untrained_networks_begin_with_boxes_of_the_known_size(tmp_path):
    quiet_ultralytics(tmp_path)
    from ultralytics.nn.tasks import DetectionModel

    torch.manual_seed(0)
    model = DetectionModel("yolov10n.yaml", nc=15, verbose=False).eval()
    expected = np.array([7.0, 5.0])
    _start_boxes([model], expected)
    _quicken_norms(model)
    with torch.inference_mode():
        corners = model.model[-1]._get_decode_boxes(model(torch.zeros(1, 3, 96, 64))[1]["one2one"])[0]
    width, height = corners[2:].median(dim=1).values.numpy()  # without suppression asked for: x, y, width, height
    assert abs(width - expected[0]) < 3 and abs(height - expected[1]) < 3


def test_tables_of_no_findings_join_with_others() -> None:
    rows, points = evidence_tables([], 2.0)
    labels = pd.DataFrame({"row_id": ["1_spinal_canal_stenosis_l1_l2"], "level": ["l1_l2"], "side": [""]})
    assert labels.merge(points, on=["level", "side"]).merge(rows, on="row_id").empty
