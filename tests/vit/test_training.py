"""Training of the 3D vision transformer: that it learns, repeats, goes on after a stop, and can be shared."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import timm
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from safetensors.torch import save_file
from vit_inputs import GRID, SMALL, draw_inputs, draw_studies

from lsdc_utils.checkpoint import Checkpoint
from lsdc_utils.vit import training as vit_training
from lsdc_utils.vit.inputs import prediction_views
from lsdc_utils.vit.loss import row_losses, row_weights
from lsdc_utils.vit.model import MIRROR, load_vit, save_vit
from lsdc_utils.vit.predict import probabilities
from lsdc_utils.vocabulary import COLUMNS


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_model_of_timm_encodes_slices_and_begins_with_weights_in_a_file(tmp_path, name):
    path = tmp_path / "encoder.safetensors"
    pretrained = timm.create_model(name, num_classes=7)
    save_file(pretrained.state_dict(), path)
    config = dataclasses.replace(SMALL, size=32, encoder=name)
    training = vit_training.Training(epochs=1, batch=2, encoder_weights=str(path), encoder_rate=0.1)
    inputs = draw_inputs(2, np.random.default_rng(0), config)
    model, _ = vit_training.fit(
        inputs, np.zeros((2, 25), np.int8), config, dataclasses.replace(training, lr=0.0), tmp_path
    )
    found = model.features.encoder.state_dict()
    same = [key for key, value in pretrained.state_dict().items() if key in found and found[key].shape == value.shape]
    assert len(same) > 5 and all(torch.allclose(found[key], pretrained.state_dict()[key]) for key in same)
    save_vit(model, tmp_path / "vit3d_fold0.safetensors", 0, dataclasses.asdict(training))
    path.unlink()
    again = load_vit(tmp_path / "vit3d_fold0.safetensors")
    np.testing.assert_array_equal(probabilities([again], inputs), probabilities([model], inputs))
    with pytest.raises(FileNotFoundError, match=r"vit_encoder_weights.*encoder\.safetensors"):
        vit_training.fit(inputs, np.zeros((2, 25), np.int8), config, training, tmp_path)


def test_mirrored_grids_carry_exchanged_labels():
    rng = np.random.default_rng(0)
    rngs = [np.random.default_rng([0, study]) for study in range(16)]
    volumes = rng.integers(0, 255, (16, 3, 16, 16, 16)).astype(np.uint8)
    labels = np.tile(np.arange(25), (16, 1))
    plain = dataclasses.replace(vit_training.Training(), intensity=0.0, drop_series=0.0)
    (values,), truth, order = vit_training.augment(volumes, labels, GRID, plain, rngs)
    turned = truth[:, 5] != 5
    assert 0 < turned.sum() < 16 and (truth == order).all()
    assert [COLUMNS[k] for k in truth[turned][0][[0, 5, 24]]] == [
        "spinal_canal_stenosis_l1_l2",
        "right_neural_foraminal_narrowing_l1_l2",
        "left_subarticular_stenosis_l5_s1",
    ]
    for study in range(16):
        expected = volumes[study, :, ::-1] if turned[study] else volumes[study]
        np.testing.assert_allclose(values[study].numpy(), expected, rtol=1e-5, atol=1e-3)
    (_, same), (_, mirrored) = prediction_views(volumes, GRID, 2)
    assert same == list(range(25)) and mirrored == list(MIRROR)


def test_training_learns_and_is_reproducible(tmp_path):
    training = vit_training.Training(epochs=10, batch=4, lr=2e-3, ema=0.9, weight_decay=0.5)
    train, test = draw_studies(48, seed=1), draw_studies(24, seed=2)
    train[1][::7, 3:9] = -1
    model, curves = vit_training.fit(*train, SMALL, training, tmp_path / "one", held_out=test)
    counts = np.stack([(train[1] == k).sum(0) for k in range(3)], axis=1) + 0.5
    prior = torch.from_numpy(counts / counts.sum(1, keepdims=True)).log().expand(24, 25, 3)
    losses = row_losses(prior, torch.from_numpy(test[1])).numpy()
    prior_loss = (losses * row_weights(test[1])).sum(1).mean()
    assert curves["held_out_loss"].iloc[-1] < 0.6 * prior_loss
    again, _ = vit_training.fit(*train, SMALL, training, tmp_path / "other")
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_grid_network_fits_a_step(tmp_path):
    rng = np.random.default_rng(0)
    volumes = rng.integers(0, 255, (4, 3, 16, 16, 16)).astype(np.uint8)
    labels = rng.choice(3, (4, 25)).astype(np.int8)
    model, _ = vit_training.fit(volumes, labels, GRID, vit_training.Training(epochs=1, batch=2), tmp_path)
    found = probabilities([model], volumes, views_count=2)
    mirrored = probabilities([model], volumes[:, :, ::-1], views_count=2)
    np.testing.assert_allclose(found, mirrored[:, list(MIRROR)], atol=1e-6)


def assert_same(one: torch.nn.Module, other: torch.nn.Module, **tolerance: float) -> None:
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], **{"rtol": 0, "atol": 0, **tolerance})


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_stopped_training_ends_like_an_undisturbed_one(tmp_path, monkeypatch, capsys, stopped_after):
    training = vit_training.Training(epochs=3, batch=4)
    studies = draw_studies(10, seed=1)
    whole, curves = vit_training.fit(*studies, SMALL, training, tmp_path / "whole")
    save = Checkpoint.save

    def save_and_stop(self, state):
        save(self, state)
        if len(state["curves"]) == stopped_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", save_and_stop)
        vit_training.fit(*studies, SMALL, training, tmp_path / "stopped")
    capsys.readouterr()
    resumed, again = vit_training.fit(*studies, SMALL, training, tmp_path / "stopped")
    assert capsys.readouterr().out.count("/3 loss") == 3 - stopped_after  # no epoch is trained twice
    assert_same(whole, resumed)
    assert curves["loss"].tolist() == again["loss"].tolist()
    other, _ = vit_training.fit(*studies, SMALL, dataclasses.replace(training, seed=1), tmp_path / "stopped")
    assert capsys.readouterr().out.count("/3 loss") == 3  # another training takes nothing of this one
    assert any(not a.equal(b) for a, b in zip(other.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize(("studies", "batch"), [(16, 4), (5, 1)])  # of one study a process has no share
def test_two_processes_train_as_one_does(tmp_path, monkeypatch, studies, batch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # on CPUs, also where there is a GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    training = vit_training.Training(epochs=3, batch=batch)
    data, held_out = draw_studies(studies, seed=1), draw_studies(4, seed=2)
    data[1][::3, 2:7] = -1  # the weights that a process sees differ
    alone, curves = vit_training.fit(*data, SMALL, training, tmp_path / "alone", held_out)
    shared, both = vit_training.fit(*data, SMALL, training, tmp_path / "shared", held_out, processes=2)
    np.testing.assert_allclose(both["loss"], curves["loss"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(both["held_out_loss"], curves["held_out_loss"], rtol=0, atol=1e-4)
    assert_same(alone, shared, atol=1e-4)


def test_a_process_that_fails_fails_the_training(tmp_path):
    training = vit_training.Training(epochs=1, batch=4, encoder_weights="nowhere.safetensors")
    config = dataclasses.replace(SMALL, size=32, encoder="test_vit")
    with pytest.raises(RuntimeError, match="2 processes"):
        vit_training.fit(*draw_studies(4, seed=1), config, training, tmp_path, processes=2)


def in_16_bits() -> Fabric:
    """What a GPU trains with, on the CPU: its scaler begins so high that gradients overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=MixedPrecision("16-mixed", "cpu", scaler))
    fabric.launch()
    return fabric


def test_gradients_that_overflow_in_16_bits_cost_a_step_and_no_more(tmp_path, monkeypatch):
    training, studies = vit_training.Training(epochs=12, batch=4, lr=2e-3, ema=0.9), draw_studies(16, seed=1)
    monkeypatch.setattr(vit_training, "_fabric", in_16_bits)
    model, curves = vit_training.fit(*studies, SMALL, training, tmp_path)
    assert all(value.isfinite().all() for value in model.state_dict().values())
    assert curves["loss"].iloc[:3].std() < 0.1 * curves["loss"].iloc[0]  # nothing moved yet but the augmentation
    assert curves["loss"].iloc[-1] < 0.9 * curves["loss"].iloc[0]


def test_a_loss_that_is_no_number_stops_a_training(tmp_path, monkeypatch):
    losses = vit_training.row_losses
    monkeypatch.setattr(vit_training, "row_losses", lambda *args: losses(*args) * math.nan)
    monkeypatch.setattr(vit_training, "_fabric", in_16_bits)
    with pytest.raises(FloatingPointError, match="epoch 1: the loss is nan"):
        vit_training.fit(*draw_studies(4, seed=1), SMALL, vit_training.Training(epochs=2), tmp_path)


def test_a_training_alone_does_not_ask_the_slurm_job_around_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "8")  # e.g. of `sbatch --ntasks=8 --wrap ./run_all.sh`
    monkeypatch.setenv("SLURM_JOB_NAME", "run")
    _, curves = vit_training.fit(*draw_studies(2, seed=1), SMALL, vit_training.Training(epochs=1), tmp_path)
    assert len(curves) == 1


def test_more_processes_than_gpus_are_told_before_any_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"2 processes .* need a GPU each; there are 1"):
        vit_training.fit(*draw_studies(4, seed=1), SMALL, vit_training.Training(), tmp_path, processes=2)
