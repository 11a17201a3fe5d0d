"""The estimate of a run's trainings: what it counts, and that it is told before a run on real data starts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, run_all

from lsdc_utils.pipeline import costs
from lsdc_utils.pipeline.runner import load_parameters


@pytest.fixture(scope="module")
def smoke() -> dict:
    return load_parameters("smoke")


def test_steps_are_counted_from_the_studies_and_hours_from_timed_steps(smoke: dict) -> None:
    table = costs.estimate(smoke | {"vit_epochs": 4}, 1000).set_index("what")
    assert table.loc["detector ss", "steps"] == 500 * costs.IMAGES["ss"] / smoke["yolo_batch"]
    assert table.loc["3D ViT", "steps"] == 500 / smoke["vit_batch"] * 4
    assert (table["count"] == 2).all() and (table[["seconds", "tflop", "gib"]] > 0).all(axis=None)
    assert np.allclose(table["hours"] * 3600, table["steps"] * table["seconds"])
    table = table.reset_index()
    shown = costs.shown(table)
    assert shown.loc["3D ViT", ["How many", "Steps of each"]].tolist() == ["2", "1,000"]
    said = costs.told(table, 0)
    assert "machine's CPU" in said and f"in all {(table['count'] * table['hours']).sum():,.0f} h" in said


def test_on_a_gpu_what_a_training_does_once_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def train(steps: int) -> None:
        now[0] += 7 + 2 * steps

    monkeypatch.setattr(costs.time, "monotonic", lambda: now[0])
    measured = {
        "is_available": True,
        "synchronize": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 2**32,
    }
    for name, value in measured.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert costs._measured(train, 1, 0) == costs.Step(seconds=2, tflop=0, gib=4)


def test_hours_told_without_a_gpu_are_at_the_rate_that_one_was_measured_at() -> None:
    table = pd.DataFrame(json.loads((ROOT / "docs/kaggle.json").read_text())["costs"])
    seconds, work = table["count"] * table["hours"] * 3600, table["count"] * table["steps"] * table["tflop"]
    assert work.sum() / seconds.sum() == pytest.approx(costs.RATE, rel=0.05)


def test_operations_are_those_of_the_network(smoke: dict) -> None:
    small, large = (
        costs.measure_detector(smoke | {"yolo_size": {"scs": size}}, "scs") for size in ([64, 64], [128, 64])
    )
    assert large.tflop == pytest.approx(2 * small.tflop, rel=0.01)  # convolutions alone
    assert 0 < large.gib - small.gib < small.gib  # the weights stay
    forwards = 8.4e-3 * (64 * 64) / (640 * 640) * smoke["yolo_batch"]  # TFLOP, by ultralytics' count at 640 x 640
    assert small.tflop == pytest.approx(3 * forwards, rel=0.35)  # gradients take twice as many


def test_a_grid_can_be_timed(smoke: dict) -> None:
    grid = {"vit_input": "study_grid", "vit_size": 16, "vit_patch": 8}
    assert costs.measure_vit(smoke | grid).seconds > 0


def test_images_of_a_study_are_what_a_run_draws(smoke_project: Path) -> None:
    run = smoke_project / "outputs/demo"
    for key, expected in costs.IMAGES.items():
        logs = [file.read_text() for file in run.glob(f"logs/03_train_yolo_{key}_fold*.log")]
        drawn = [pd.Series(log).str.extract(r"(\d+) of \d+ images an epoch, (\d+) studies").astype(int) for log in logs]
        found = sum(table[0].iloc[0] for table in drawn) / sum(table[1].iloc[0] for table in drawn)
        assert found == pytest.approx(expected, rel=0.4), key


def test_a_run_on_real_data_tells_its_hours_before_it_starts(smoke_project: Path, smoke_copy: Path) -> None:
    run = smoke_copy / "outputs/demo"
    data = (run / json.loads((run / "data.json").read_text())["data_dir"]).resolve()
    asked = ["--profile", "smoke", "--run", "real", "phantom=false", "--data", str(data), "--until", "00"]
    done = run_all(smoke_copy, *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.index("Estimated from steps") < done.stdout.index("00_get_data")
    assert "Estimated" not in run_all(smoke_project, "--profile", "smoke", "--run", "demo").stdout
