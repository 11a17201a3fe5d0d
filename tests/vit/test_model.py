"""The 3D vision transformer: its ordinal head, its loss, its symmetry, and that it learns."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from spines import mirror_study, noisy_study, spine
from vit_inputs import SMALL, draw_inputs, draw_studies, records

from lsdc_utils import metric
from lsdc_utils.detector.classes import CANAL_FROM_FORAMINA
from lsdc_utils.published.vit import MIRROR
from lsdc_utils.vit import model as vit_model
from lsdc_utils.vit import predict
from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.inputs import AXES, Seen, centre_errors, crop_centres, cut_views, label_matrix, prediction_views
from lsdc_utils.vit.loss import row_losses, row_weights, target_matrix
from lsdc_utils.vit.model import COLUMN_GROUP, HEADS, POOLINGS, OrdinalHead, Vit3d, VitConfig, load_vit, save_vit
from lsdc_utils.vit.predict import predict_studies, prediction_rows, probabilities
from lsdc_utils.vocabulary import COLUMNS, LEVELS, SEVERITIES, study_row_ids


def exchanged(inputs: np.ndarray, config: VitConfig = SMALL) -> np.ndarray:
    """The same inputs of the mirrored studies."""
    result, order, first = inputs.copy(), [], 0
    for _, k in config.scales:
        order += [first + np.arange(slot * k, (slot + 1) * k) for slot in (0, 2, 1, 4, 3)]
        first += len(SLOTS) * k
    order = np.concatenate(order)
    result["images"], result["places"] = inputs["images"][:, :, order], inputs["places"][:, :, order]
    result["places"][:, :, config.slots == 0] *= -1  # T2 lies to the left, all else outwards or to the head
    return result


def seen(inputs: np.ndarray, config: VitConfig = SMALL) -> Seen:
    return next(prediction_views(inputs, config, 1))[0]


def test_cumulative_link_gives_probabilities_in_order():
    torch.manual_seed(0)
    model = Vit3d(SMALL)
    labels = np.repeat([[0] * 25, [1] * 25, [2] * 25], [70, 20, 10], axis=0).astype(np.int8)
    model.head.start_at_prior(labels)
    volumes = seen(draw_inputs(2, np.random.default_rng(0)))
    start = model(*volumes).exp()
    expected = (np.array([140, 40, 20]) + 0.5) / 201.5  # both sides pooled
    np.testing.assert_allclose(start[0, -1].detach(), expected, atol=1e-5)
    torch.nn.init.normal_(model.head.linear.weight, std=2)
    torch.nn.init.normal_(model.head.linear.bias, std=2)
    found = model(*volumes).exp()
    assert torch.allclose(found.sum(-1), torch.ones(2, 25), atol=1e-5)
    halves = torch.randn(20, 5, 2, 3, SMALL.width)
    order = model.head.latents(halves)[:, 5, 0].argsort()  # same thresholds: a higher latent is never less severe
    graded = model.head(halves)[order, 5]
    assert (graded[:, 2].diff() >= 0).all() and (graded[:, 0].diff() <= 0).all()


@pytest.mark.parametrize("head", HEADS)
def test_cut_offs_are_the_log_odds_at_the_prior(head):
    labels = np.repeat([[0] * 25, [1] * 25, [2] * 25], [70, 20, 10], axis=0).astype(np.int8)
    part = HEADS[head](SMALL)
    part.start_at_prior(labels)
    np.testing.assert_allclose(part.cut_offs()[20], np.log([140.5 / 61.0, 181.0 / 20.5]), atol=1e-5)  # both sides
    assert part.cut_offs().shape == (25, 2)


def test_loss_is_the_score_of_the_three_groups():
    rng = np.random.default_rng(0)
    labels = rng.choice([-1, 0, 1, 2], (30, 25), p=[0.1, 0.6, 0.2, 0.1]).astype(np.int8)
    natural = rng.dirichlet([2, 1, 1], (30, 25))
    weights = row_weights(target_matrix(labels))
    found = row_losses(torch.from_numpy(natural).log(), torch.from_numpy(weights)).sum(1).mean().item()
    rows = prediction_rows(range(30), natural)
    solution = pd.DataFrame({"row_id": rows["row_id"], "severity": labels.ravel()})
    parts = metric.score(solution[solution["severity"] >= 0], metric.weight_table(rows))
    assert found == pytest.approx(np.mean([parts[name] for name in metric.GROUP_PARTS]), abs=1e-6)
    alone = np.where(np.array(COLUMN_GROUP) == "nfn", labels, -1).astype(np.int8)  # no other group has a label
    weights = torch.from_numpy(row_weights(target_matrix(alone)))
    losses = row_losses(torch.from_numpy(natural).log(), weights)
    assert losses.sum(1).mean().item() == pytest.approx(parts["foraminal"], abs=1e-6)
    assert (row_weights(target_matrix(np.full((2, 25), -1, np.int8))) == 0).all()


def test_label_matrix_follows_the_columns_and_keeps_studies_with_gaps():
    rows = [
        {"study_id": 3, "condition": "spinal_canal_stenosis", "level": "l5_s1", "severity": 2},
        {"study_id": 3, "condition": "right_subarticular_stenosis", "level": "l1_l2", "severity": -1},
    ]
    found = label_matrix(pd.DataFrame(rows), [9, 3])
    assert (found[0] == -1).all() and found[1, COLUMNS.index("spinal_canal_stenosis_l5_s1")] == 2
    assert (found == 2).sum() == 1


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("part", [{}, {"pooling": "gru"}, {"wider": ((2.0, 1), (3.0, 3))}])
def test_exchanged_sides_exchange_left_and_right_columns(head, part):
    """A mirrored study gives the same squares with the sides exchanged: mirror symmetry by construction."""
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, head=head, **part)
    model = Vit3d(config).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    inputs = draw_inputs(2, np.random.default_rng(0), config)
    inputs["places"][0, 3, 2:5] = np.nan
    found, turned = model(*seen(inputs, config)), model(*seen(exchanged(inputs, config), config))
    assert torch.allclose(found.exp().sum(-1), torch.ones(2, 25), atol=1e-5)
    torch.testing.assert_close(turned, found[:, list(MIRROR)], atol=1e-5, rtol=1e-4)


def test_a_place_is_graded_by_the_slices_that_show_it_and_by_others_only_without_them():
    torch.manual_seed(0)
    model, k = Vit3d(SMALL).eval(), SMALL.slices
    torch.nn.init.normal_(model.head.linear.weight)
    inputs, level = draw_inputs(1, np.random.default_rng(0)), 2
    rows = [n for n, name in enumerate(COLUMNS) if name == "left_neural_foraminal_narrowing_l3_l4"]

    def moved(lacking: bool, slots: list[int], levels: list[int]) -> float:
        """How far the foramen's row moves where these slots of these levels show something else."""
        before = inputs.copy()
        if lacking:
            before["places"][:, level, k : 2 * k] = np.nan  # left T1
        after = before.copy()
        for slot in slots:
            after["images"][:, levels, slot * k : (slot + 1) * k, :4] = 250
        return (model(*seen(after))[:, rows] - model(*seen(before))[:, rows]).abs().max().item()

    others = [other for other in range(5) if other != level]
    assert moved(False, [1], [level]) > 1e-3
    assert moved(False, [0, 2, 3, 4], [level]) < 1e-6 and moved(False, [0, 1, 2, 3, 4], others) < 1e-6
    assert moved(True, [0], [level]) > 1e-3 and moved(True, [3], [level]) > 1e-3
    assert moved(True, [2, 4], [level]) < 1e-6  # the other side's


@pytest.mark.parametrize("part", [{"pooling": "gru"}, {"wider": ((2.0, 1),)}])
def test_members_of_other_parts_keep_conditions_apart_and_come_back_from_their_files(tmp_path, part):
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL, **part)
    model = Vit3d(config).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    inputs = draw_inputs(1, np.random.default_rng(0), config)
    before = model(*seen(inputs, config))
    for kind, moving in ((1, "left_neural"), (4, "right_subarticular")):
        after = inputs.copy()
        after["images"][:, :, config.slots == kind, :4] = 250
        change = (model(*seen(after, config)) - before).abs().amax(dim=(0, 2)).detach().numpy()
        shown = {"left_neural": ("left_neural",), "right_subarticular": ("right_subarticular", "spinal")}[moving]
        moves = np.array([name.startswith(shown) for name in COLUMNS])
        assert (change[moves] > 1e-4).all() and (change[~moves] < 1e-6).all()
    save_vit(model, tmp_path / "vit3d-a_fold0.safetensors", 0, {})
    again = load_vit(tmp_path / "vit3d-a_fold0.safetensors")
    assert type(again.slice_blocks) is POOLINGS[config.pooling]
    torch.testing.assert_close(again(*seen(inputs, config)), before)


def test_a_gru_reads_far_slices_first_and_passes_over_missing_ones():
    torch.manual_seed(0)
    part = POOLINGS["gru"](dataclasses.replace(SMALL, pooling="gru"))
    tokens, there = torch.randn(1, 6, SMALL.width), torch.ones(1, 6, dtype=bool)
    there[0, 3] = False
    whole = part(tokens, there)
    changed = tokens.clone()
    changed[0, 3] = 9.0
    torch.testing.assert_close(part(changed, there), whole)
    swapped = tokens[:, [1, 0, 2, 3, 4, 5]]  # the two slices of T2
    assert (part(swapped, there) - whole).abs().max() > 1e-3  # their order counts


def test_order_of_slices_and_what_lies_in_missing_ones_change_nothing():
    torch.manual_seed(0)
    model = Vit3d(SMALL).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    inputs = draw_inputs(2, np.random.default_rng(0))
    inputs["places"][:, :, 3] = np.nan
    expected = model(*seen(inputs))
    other = inputs.copy()
    other["images"][:, :, 3] = 255
    for part in ("images", "places"):
        other[part][:, :, [0, 1]] = other[part][:, :, [1, 0]]
    torch.testing.assert_close(model(*seen(other)), expected, atol=1e-5, rtol=1e-4)
    assert torch.isfinite(model(*seen(records(inputs["images"], np.full((2, 5, 10), np.nan))))).all()


class NormEncoder(torch.nn.Module):
    """An encoder that keeps statistics of what it sees."""

    num_features = 6

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(1, self.num_features, 3), torch.nn.BatchNorm2d(self.num_features)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(images)).mean(dim=(2, 3))


def test_the_encoder_sees_no_blank_slices():
    def statistics(images, places):
        torch.manual_seed(0)
        model = Vit3d(SMALL, encoder=NormEncoder()).train()
        loss = model(images, places).sum()
        loss.backward()
        assert all(value.isfinite().all() for value in model.state_dict().values()) and loss.isfinite()
        return model.encoder.norm.running_mean, model.encoder.norm.running_var

    inputs = draw_inputs(2, np.random.default_rng(0))
    lacking, k = inputs.copy(), SMALL.slices
    lacking["images"][1, :, k:], lacking["places"][1, :, k:] = 0, np.nan
    alone, (images, places) = seen(inputs), seen(lacking)
    only = places.clone()
    only[1] = np.nan  # a whole study without a slice
    found, expected = statistics(images, only), statistics(alone[0][:1], alone[1][:1])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    changed = statistics(images, places)
    assert not torch.allclose(changed[0], expected[0])  # the second study's T2 slices are seen
    blank = statistics(images, torch.full_like(places, np.nan))
    torch.testing.assert_close(blank[0], torch.zeros(6))


def test_a_cut_moves_squares_and_places_as_the_level_moves():
    config = dataclasses.replace(SMALL, size=8, margin=4)
    inputs = draw_inputs(1, np.random.default_rng(0), config)
    inputs["images"][:, :, :, 8, 10] = 255  # row 8, column 10 of 16
    shift = np.tile([2.0, 4.0, -2.0], (1, 5, len(SLOTS), 1))  # mm to the left, posterior, head: pixels are 2 mm
    shift[0, 1, 3:] = 0  # the axial slots of one level
    images, places = cut_views(inputs, config, shift)
    np.testing.assert_array_equal(places[0, 1, 6:], inputs["places"][0, 1, 6:])
    assert images[0, 1, 6].argmax().item() == (8 - 4) * 8 + 10 - 4
    for slot, (kind, side) in enumerate(SLOTS):
        out = -1 if side == "right" else 1
        across, down, through = (out, 2, -2.0) if kind == "Axial T2" else (2, -1, 2.0 * out)
        k = slot * config.slices
        assert images[0, 0, k].argmax().item() == (8 - 4 - down) * 8 + 10 - 4 - across
        np.testing.assert_allclose(places[0, 0, k], inputs["places"][0, 0, k] - through, rtol=1e-6)


def beside(points: pd.DataFrame, outwards: float, condition: str = "ss") -> pd.DataFrame:
    """Points on either side of canal points."""
    points = points.assign(condition=condition)
    sides = [points.assign(side=side, X=points["X"] + sign * outwards) for side, sign in (("left", 1), ("right", -1))]
    return pd.concat(sides, ignore_index=True)


def named(points: pd.DataFrame, base: str) -> pd.DataFrame:
    """Points as rows of a label table."""
    return points.assign(condition=points["side"].map(lambda side: "_".join(filter(None, (side, base)))))


def test_errors_of_detected_points_are_measured_for_each_slot_along_the_canal():
    rng, detected, labels = np.random.default_rng(0), [], []
    for study in range(60):
        canal = spine().assign(study_id=study)
        labels += [named(canal, "spinal_canal_stenosis"), named(beside(canal, 9.0), "subarticular_stenosis")]
        labels.append(named(beside(canal, 18.0), "neural_foraminal_narrowing"))
        foramina = beside(canal, 18.0, "nfn")
        foramina[["Y", "Z"]] += rng.normal(0, (1.0, 0.4))
        moved, recesses = canal.copy(), beside(canal, 9.0)
        moved[["X", "Y", "Z"]] += rng.normal(0, (2.0, 1.0, 3.0))  # all levels of a study alike
        recesses[["X", "Y"]] += rng.normal(0, (0.5, 0.2))
        detected += [moved, recesses, foramina]
    labels, detected = pd.concat(labels), pd.concat([*detected, spine().assign(study_id=99)])
    errors = centre_errors(labels, detected)
    assert len(errors) == 60 * 25 and list(errors.columns) == ["study_id", "level", "series_type", "side", *AXES]
    spread = errors.groupby("series_type")[list(AXES)].std()
    np.testing.assert_allclose(spread.loc["Sagittal T2/STIR"], [2.0, 1.0, 3.0], rtol=0.3)
    np.testing.assert_allclose(spread.loc["Sagittal T1"][["posterior", "head"]], [1.0, 0.4], rtol=0.3)
    np.testing.assert_allclose(spread.loc["Axial T2"], [0.5, 0.2, 3.0], rtol=0.3)
    middles = errors.groupby(["series_type", "side"])["outwards"].median()
    assert abs(middles["Sagittal T1", "left"] + middles["Sagittal T1", "right"]) < 0.2  # 18 mm is usual
    assert centre_errors(labels, detected.iloc[:0]).empty
    assert centre_errors(labels, detected[detected["side"] != ""]).empty  # nothing is cut without a canal point


def test_weights_come_back_and_strangers_are_refused(tmp_path):
    model = Vit3d(SMALL)
    torch.nn.init.normal_(model.head.linear.weight)
    path = tmp_path / "vit3d_fold0.safetensors"
    save_vit(model, path, 0, {"epochs": 3})
    volumes, _ = draw_studies(2, seed=0)
    expected = probabilities([model], volumes, n_views=3)
    np.testing.assert_array_equal(probabilities([load_vit(path)], volumes, n_views=3), expected)
    assert np.allclose(expected.sum(-1), 1) and list(SEVERITIES) == list(prediction_rows([1], expected[:1]))[1:]
    path.write_bytes(path.read_bytes()[:-4] + b"abcd")
    with pytest.raises(ValueError, match="sha256"):
        load_vit(path)


class Placed(Vit3d):
    """A network that keeps the names of the devices to which it was moved."""

    def to(self, device: torch.device) -> Placed:
        self.device = device
        return self


def test_several_devices_share_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [Placed(SMALL) for _ in range(3)]
    for model in models:
        torch.nn.init.normal_(model.head.linear.weight)
    volumes, _ = draw_studies(2, seed=0)
    together = probabilities(models, volumes, n_views=2)
    each = [probabilities([model], volumes, n_views=2) for model in models]
    np.testing.assert_allclose(together, np.mean(each, axis=0), atol=1e-7)
    devices = [torch.device("cpu", 0), torch.device("cpu", 1)]  # which torch takes for the same place
    monkeypatch.setattr(predict, "DEVICES", devices)
    np.testing.assert_array_equal(probabilities(models, volumes, n_views=2), together)
    assert [model.device for model in models] == [*devices, devices[0]]


class SteepHead(OrdinalHead):
    """A part of one's own."""

    def latents(self, halves: torch.Tensor) -> torch.Tensor:
        return 3 * super().latents(halves)


def test_a_part_of_ones_own_is_saved_and_loaded_once_the_package_has_it(tmp_path, monkeypatch):
    model = Vit3d(SMALL, head=SteepHead(SMALL))
    torch.nn.init.normal_(model.head.linear.weight)
    path = tmp_path / "vit3d_fold0.safetensors"
    save_vit(model, path, 0, {})
    with pytest.raises(ValueError, match=r"head SteepHead.*lsdc_utils/vit/model\.py"):
        load_vit(path)
    monkeypatch.setattr(vit_model, "SteepHead", SteepHead, raising=False)
    volumes, _ = draw_studies(2, seed=0)
    np.testing.assert_array_equal(probabilities([load_vit(path)], volumes), probabilities([model], volumes))


def test_weights_of_earlier_versions_and_other_methods_are_refused(tmp_path):
    path = tmp_path / "vit3d_fold0.safetensors"
    save_vit(Vit3d(SMALL), path, 0, {})
    about = json.loads(path.with_suffix(".json").read_text())
    for network in ("StudyVit", None):
        path.with_suffix(".json").write_text(json.dumps(about | {"network": network}))
        with pytest.raises(ValueError, match="not a Vit3d"):
            load_vit(path)


def test_detected_points_take_the_place_of_clicked_ones():
    place, clicked = {"level": "l1_l2", "X": 1.0, "Y": 2.0, "Z": 3.0}, (("", "scs"), ("left", "ss"), ("left", "nfn"))
    labels = pd.DataFrame(
        [
            {"study_id": study, "condition": condition, "fold": fold, **place}
            for study, fold in ((1, 0), (2, 1), (3, 1))
            for condition in ("spinal_canal_stenosis", "left_subarticular_stenosis", "left_neural_foraminal_narrowing")
        ]
    )
    detected = {"study_id": 2, "side": "", "condition": "scs", **place, "X": 9.0, "confidence": 0.4, "more": 1}
    found = crop_centres(labels, {1: pd.DataFrame([detected])})  # study 3 was not found: it has no clicked points
    expected = [(2, "", 9.0, 0.4, "scs"), *((1, side, 1.0, 1.0, key) for side, key in clicked)]
    columns = ["study_id", "side", "X", "confidence", "condition"]
    assert [*found[columns].itertuples(index=False, name=None)] == expected
    assert crop_centres(labels)["side"].tolist() == ["", "left", "left"] * 3


def test_the_canal_is_expected_behind_the_foramina_of_a_study_without_canal_points():
    sides = [("left", 18.0), ("right", -16.0)]
    labels = pd.DataFrame(
        [
            {"study_id": 1, "condition": f"{side}_neural_foraminal_narrowing", "level": level, "X": x, "Y": 5.0, "Z": z}
            for side, x in sides
            for level, z in zip(LEVELS, (60.0, 30.0, 0.0, -30.0, -60.0), strict=True)
        ]
    ).assign(fold=0)
    canal = crop_centres(labels).query("condition == 'scs'").set_index("level")
    assert canal["side"].eq("").all() and canal["X"].eq(1.0).all() and len(canal) == len(LEVELS)
    way = canal.loc[list(LEVELS), ["Y", "Z"]].to_numpy() - [[5.0, z] for z in (60.0, 30.0, 0.0, -30.0, -60.0)]
    np.testing.assert_allclose(way, CANAL_FROM_FORAMINA)


def test_predict_exchanges_sides_of_a_mirrored_study_and_leaves_out_what_it_cannot_see():
    stacks = noisy_study()
    torch.manual_seed(0)
    model = Vit3d(SMALL)
    torch.nn.init.normal_(model.head.linear.weight)
    points = pd.concat([spine(x=3.9).assign(study_id=study) for study in (7, 9)])
    rows = predict_studies([model], [(7, stacks), (8, stacks), (9, [])], points, n_views=3)
    mirrored = predict_studies([model], [(7, [mirror_study(s) for s in stacks])], points.assign(X=-points["X"]), 3)
    assert rows["row_id"].tolist() == study_row_ids(7) == mirrored["row_id"].tolist()
    natural, turned = rows[list(SEVERITIES)].to_numpy(), mirrored[list(SEVERITIES)].to_numpy()
    assert np.abs(natural[5:10] - natural[10:15]).max() > 0.01
    np.testing.assert_allclose(turned[list(MIRROR)], natural, atol=1e-3)
    assert predict_studies([model], [(8, stacks)], points).empty
