"""Checkpoints: all of a state comes back; damaged ones and those of other trainings are ignored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from lsdc_utils import checkpoint
from lsdc_utils.checkpoint import Checkpoint, fingerprint, restore_optimizer


def a_state() -> dict:
    weights = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    return {
        "model": {"a.weight": weights, "also": weights},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 1)}],
        },
        "nothing": None,
        "empty": {},
        "history": [{"epoch": 1, "loss": 1 / 3}],
    }


def test_a_state_comes_back_as_it_was(tmp_path):
    kept = Checkpoint(tmp_path / "work", "k")
    assert kept.load() is None
    kept.save(a_state())
    loaded = kept.load()
    assert loaded["model"]["a.weight"].equal(a_state()["model"]["a.weight"])
    assert loaded["model"]["also"].equal(a_state()["model"]["also"])
    assert loaded["optimizer"]["state"][0]["step"] == 3
    assert loaded["optimizer"]["param_groups"] == [{"lr": 0.1 + 0.2, "betas": [0.9, 1]}]
    assert {key: loaded[key] for key in ("nothing", "empty", "history")} == {
        key: a_state()[key] for key in ("nothing", "empty", "history")
    }
    assert [file.name for file in (tmp_path / "work").iterdir()] == ["checkpoint.safetensors"]


def test_a_checkpoint_of_another_training_is_ignored(tmp_path):
    Checkpoint(tmp_path, "one").save(a_state())
    assert Checkpoint(tmp_path, "other").load() is None


@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_a_damaged_checkpoint_is_reported_and_ignored(tmp_path, capsys, size):
    kept = Checkpoint(tmp_path, "k")
    kept.save(a_state())
    kept.file.write_bytes(kept.file.read_bytes()[:size])
    assert kept.load() is None
    assert "checkpoint.safetensors cannot be read" in capsys.readouterr().out


def test_a_state_that_cannot_be_written_leaves_the_last_state(tmp_path, monkeypatch):
    kept = Checkpoint(tmp_path, "k")
    kept.save({"epoch": 1})

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", no_space)
    with pytest.raises(OSError, match="No space left"):
        kept.save({"epoch": 2})
    assert kept.load() == {"epoch": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_writing_costs_a_small_share_of_a_long_training(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: clock[0])

    def train(epochs, epoch_seconds, save_seconds):
        kept, saved = Checkpoint(tmp_path / str(save_seconds), "k", clock[0]), []

        def write(*_):
            clock[0] += save_seconds
            saved.append(epoch)

        monkeypatch.setattr(checkpoint, "save_file", write)
        for epoch in range(1, epochs + 1):
            clock[0] += epoch_seconds
            kept.keep({"epoch": epoch}, last=epoch == epochs)
        return saved

    assert train(12, 0.5, 0.1) == list(range(1, 13))  # short ones keep every epoch
    saved = train(1500, 60.0, 2.0)
    assert saved[0] == 1 and saved[-1] == 1500 and 1500 not in saved[:-1]
    assert max(np.diff(saved)) <= 4  # a checkpoint every 200 seconds
    assert 2.0 * len(saved) <= 10 + 0.011 * 1500 * 60
    assert train(20, 1.0, 30.0) == [1, 20]  # a slow disk: at first, and at the end


def test_fingerprints_differ_where_anything_differs():
    kinds = [("images", np.uint8, (2, 2)), ("places", np.float32, (2,))]
    records = np.zeros(3, dtype=kinds)
    others = records.copy()
    others["places"][2, 1] = 1
    named = [
        fingerprint({"a": 1}, records),
        fingerprint({"a": 1}, others),
        fingerprint({"a": 2}, records),
        fingerprint(b"ab", b"c"),
        fingerprint(b"a", b"bc"),
        fingerprint(np.zeros(4, np.float32)),
        fingerprint(np.zeros(2, np.float64)),
    ]
    assert len(set(named)) == len(named)
    assert fingerprint({"a": 1}, records.copy()) == named[0]


def test_an_optimiser_resumes_in_the_layout_of_its_parameters():
    weight = torch.nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    state = optimizer.state_dict()
    flat = {0: {name: value.contiguous() for name, value in state["state"][0].items()}}
    other = torch.optim.AdamW([weight], lr=0.3)
    restore_optimizer(other, {"state": flat, "param_groups": state["param_groups"]})
    assert other.param_groups[0]["lr"] == 0.1
    restored = other.state[weight]["exp_avg"]
    assert restored.equal(optimizer.state[weight]["exp_avg"])
    assert restored.stride() == weight.stride()


def test_weights_of_another_run_are_copied_with_where_they_come_from(tmp_path: Path) -> None:
    file, target = tmp_path / "models/weights/yolo_nfn_fold3.pt", tmp_path / "run/weights/yolo_nfn_fold0.pt"
    for folder in (file.parent, target.parent):
        folder.mkdir(parents=True)
    file.write_bytes(b"weights")
    file.with_suffix(".json").write_text(json.dumps({"fold": 3, "sha256": "x", "studies": [1, 2], "config": {}}))
    about = checkpoint.take_weights(file, target, 0, "phantom_only")
    assert target.read_bytes() == b"weights" and json.loads(target.with_suffix(".json").read_text()) == about
    assert about == {"fold": 0, "sha256": "x", "config": {}, "taken_from": "models", "basis": "phantom_only"}
    assert checkpoint.points_source(tmp_path / "outputs/x", "") == tmp_path / "outputs/pretrained"
    assert checkpoint.points_source(tmp_path / "outputs/x", "/models") == Path("/models")


def test_a_start_is_the_same_fold_else_that_of_the_least_number(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    for fold in (10, 2):
        file = tmp_path / f"weights/vit3d_fold{fold}.safetensors"
        file.write_bytes(b"weights")
        file.with_suffix(".json").write_text(json.dumps({"sha256": checkpoint.sha256(file)}))
    assert checkpoint.start_weights(tmp_path, "vit3d").name == "vit3d_fold2.safetensors"
    assert (
        checkpoint.start_weights(tmp_path, "vit3d", 10).name == "vit3d_fold10.safetensors"
    )  # its own, if there is one
    assert checkpoint.start_weights(tmp_path, "vit3d", 1).name == "vit3d_fold2.safetensors"
