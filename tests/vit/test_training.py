"""The training loop of notebook 04: that it learns, repeats, resumes, and starts anew where something changed."""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from nbclient import NotebookClient
from nbclient.exceptions import DeadKernelError
from safetensors.torch import load_file, save_file
from spines import noisy_study, spine
from vit_inputs import LOOP, NOTEBOOK, SMALL, draw_inputs, draw_studies, run_cells, train

from lsdc_utils.checkpoint import Checkpoint
from lsdc_utils.data.stacks import save_stack
from lsdc_utils.downloads import WeightsNotFound
from lsdc_utils.vit.augment import Augmentation, augment, recombined
from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.inputs import Rows, prediction_views, shown_slices, study_input, study_inputs
from lsdc_utils.vit.loss import row_losses, row_weights, target_grades, target_matrix
from lsdc_utils.vit.model import Vit3d, load_vit
from lsdc_utils.vit.predict import probabilities
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVELS, SERIES_TYPES, SEVERITIES, SPINAL_CANAL

SCALER = 'torch.amp.GradScaler(device.type, enabled=device.type == "cuda")'
IN_16_BITS = (SCALER, "torch.amp.GradScaler(device.type, init_scale=2.0**40)")  # so high that gradients overflow
LOSS = "    return row_losses(log_natural.float(), weight).sum()"


def assert_same(one: torch.nn.Module, other: torch.nn.Module) -> None:
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_training_learns_and_is_reproducible(tmp_path):
    options = {"vit_epochs": 10, "vit_lr": 2e-3, "vit_ema": 0.9, "vit_weight_decay": 0.5}
    studies, held_out = draw_studies(48, seed=1), draw_studies(24, seed=2)
    studies[1][::7, 3:9] = -1
    trained = train(tmp_path / "one", studies, held_out=held_out, **options)
    counts = np.stack([(studies[1] == k).sum(0) for k in range(3)], axis=1) + 0.5
    prior = torch.from_numpy(counts / counts.sum(1, keepdims=True)).log().expand(24, 25, 3)
    losses = row_losses(prior, torch.from_numpy(row_weights(target_matrix(held_out[1]))))
    assert trained["curves"]["held_out_loss"].iloc[-1] < 0.6 * losses.sum(1).mean()
    assert np.abs(trained["model"].head.cut_offs() - trained["prior_cut_offs"]).max() > 0.05
    assert_same(trained["model"], train(tmp_path / "other", studies, held_out=held_out, **options)["model"])


def test_the_first_epoch_tells_the_time_left(tmp_path, capsys):
    train(tmp_path, draw_studies(4, seed=1), vit_epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")]
    assert ["left" in line for line in lines] == [True, False, False] and lines[0].startswith("epoch 1/3 loss")


@pytest.mark.parametrize("stopped_after", [1, 3])
def test_a_stopped_training_ends_like_an_undisturbed_one(tmp_path, monkeypatch, capsys, stopped_after):
    studies, save = draw_studies(10, seed=1), Checkpoint.save
    whole = train(tmp_path / "whole", studies, vit_epochs=3)

    def save_and_stop(self, state):
        save(self, state)
        if len(state["curves"]) == stopped_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", save_and_stop)
        train(tmp_path / "stopped", studies, vit_epochs=3)
    capsys.readouterr()
    resumed = train(tmp_path / "stopped", studies, vit_epochs=3)
    assert capsys.readouterr().out.count("/3 loss") == 3 - stopped_after  # no epoch is trained twice
    assert_same(whole["model"], resumed["model"])
    assert whole["curves"]["loss"].tolist() == resumed["curves"]["loss"].tolist()


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"vit_lr": 0.002},
        {"change": (LOSS, LOSS + " * 2")},
        {"change": ("max_norm=1.0", "max_norm=2.0")},
        {"change": ("betas=(0.9, 0.98)", "betas=(0.9, 0.99)")},
        {"change": ("seconds = curves", "# a comment is a change as well\n        seconds = curves")},
        {
            "change": (
                "slice_blocks=vit.POOLINGS[config.pooling](config)",
                "slice_blocks=type('Own', (vit.SliceBlocks,), {})(config)",
            )
        },
        {"config": dataclasses.replace(SMALL, spacing=(1.5, 2.0, 2.0))},
        {"studies": draw_studies(6, seed=3)},
    ],
    ids=["seed", "parameter", "loss", "step", "optimizer", "comment", "part", "config", "data"],
)
def test_a_checkpoint_of_another_training_is_discarded(tmp_path, capsys, other):
    same = {"studies": draw_studies(6, seed=1), "vit_epochs": 2}
    train(tmp_path, **same)
    capsys.readouterr()
    train(tmp_path, **same)
    assert "resumes after epoch 2" in capsys.readouterr().out
    train(tmp_path, **same | other)
    assert capsys.readouterr().out.count("/2 loss") == 2


def test_gradients_that_overflow_in_16_bits_cost_a_step_and_no_more(tmp_path):
    options = {"vit_epochs": 16, "vit_lr": 2e-3, "vit_ema": 0.9}
    trained = train(tmp_path, draw_studies(16, seed=1), change=IN_16_BITS, **options)
    loss = trained["curves"]["loss"]
    assert all(value.isfinite().all() for value in trained["model"].state_dict().values())
    assert loss.iloc[:3].std() < 0.1 * loss.iloc[0]  # nothing moved yet but the augmentation
    assert loss.iloc[-1] < 0.9 * loss.iloc[0]


def test_a_loss_that_is_not_finite_stops_with_advice(tmp_path):
    with pytest.raises(FloatingPointError, match=r"epoch 1: the loss is nan; lower the learning rate \(vit_lr\)"):
        train(tmp_path, draw_studies(4, seed=1), change=(LOSS, LOSS + " * math.nan"))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_timm_model_encodes_slices_and_starts_from_the_weights_in_a_file(tmp_path, name):
    path = tmp_path / "encoder.safetensors"
    pretrained = timm.create_model(name, num_classes=7).state_dict()
    save_file(pretrained, path)
    config = dataclasses.replace(SMALL, size=32, encoder=name)
    studies = draw_inputs(2, np.random.default_rng(0), config), np.zeros((2, 25), np.int8)
    options = {"vit_encoder_weights": str(path), "vit_encoder_rate": 0.1, "vit_epochs": 1, "vit_lr": 0.0}
    model = train(tmp_path, studies, config, **options)["model"]
    encoder = model.encoder.model.state_dict()
    same = [key for key, value in pretrained.items() if key in encoder and encoder[key].shape == value.shape]
    assert len(same) > 5 and all(torch.allclose(encoder[key], pretrained[key]) for key in same)
    path.unlink()
    again = load_vit(tmp_path / "weights/vit3d_fold0.safetensors")
    np.testing.assert_array_equal(probabilities([again], studies[0]), probabilities([model], studies[0]))
    with pytest.raises(WeightsNotFound, match=r"encoder\.safetensors"):
        train(tmp_path, studies, config, **options)


def test_augmented_squares_move_and_a_left_out_series_is_black():
    inputs, labels = draw_studies(2, seed=0)
    rngs = [np.random.default_rng(k) for k in range(2)]
    targets = target_matrix(labels)
    seen, same = augment(inputs, targets, SMALL, Augmentation(drop_series=1.0, recombine=0), rngs)
    assert seen[1].isnan().all() and (same == targets).all()
    assert all(not image.any() for _, image, _, _ in shown_slices(seen, 0, 2, SMALL))
    still = Augmentation(jitter=((0, 0, 0),) * len(SLOTS), rotation=0, scale=0, intensity=0, drop_series=0, recombine=0)
    seen, _ = augment(inputs, targets, SMALL, still, rngs)
    for part, other in zip(seen, next(prediction_views(inputs, SMALL, 1))[0], strict=True):
        torch.testing.assert_close(part, other, atol=1e-3, rtol=1e-4)
    assert [kind for kind, *_ in shown_slices(seen, 0, 2, SMALL)] == list(SERIES_TYPES)


def test_each_slot_is_shifted_by_its_own_spread_and_shares_what_its_canal_point_is_off():
    """Places show the shift through the plane: T2 to the left, T1 outwards, axial to the head."""
    jitter = ((2.0, 1.0, 1.0), (3.0, 1.0, 1.0), (3.0, 1.0, 1.0), (1.0, 1.0, 4.0), (1.0, 1.0, 4.0))
    strength = Augmentation(jitter=jitter, rotation=0, scale=0, intensity=0, drop_series=0, recombine=0)
    inputs, labels = draw_studies(200, seed=0)
    rngs = [np.random.default_rng(k) for k in range(200)]
    _, places = augment(inputs, target_matrix(labels), SMALL, strength, rngs)[0]
    moved = (inputs["places"] - places.numpy())[:, :, :: SMALL.slices].reshape(-1, len(SLOTS))
    np.testing.assert_allclose(moved.std(axis=0), [2.0, 3.0, 3.0, 4.0, 4.0], rtol=0.1)
    share = np.corrcoef(moved.T)
    np.testing.assert_allclose(share[0], [1, 0, 0, 0, 0], atol=0.1)
    assert share[1, 2] == pytest.approx(0, abs=0.1) and share[3, 4] == pytest.approx(1 / 16, abs=0.1)


def test_right_halves_are_exchanged_with_their_labels_and_the_canal_loses_a_label_that_differs():
    inputs, labels = draw_studies(3, seed=0)
    labels[:, :5] = [[0, 1, 2, 0, 0], [0, 1, 1, 0, 0], [0, 1, 2, 2, 0]]  # the canal's columns
    exchanged = np.zeros((3, 5), bool)
    exchanged[0, 1:3] = True  # of the first study, L2/L3 and L3/L4 from the second one
    seen, targets = recombined(inputs, target_matrix(labels), exchanged, SMALL.slots)
    k = SMALL.slices
    for slot, (_, side) in enumerate(SLOTS):
        own = inputs["images"][0, :, slot * k : (slot + 1) * k].copy()
        if side == "right":
            own[1:3] = inputs["images"][1, 1:3, slot * k : (slot + 1) * k]
        np.testing.assert_array_equal(seen["images"][0, :, slot * k : (slot + 1) * k], own)
    expected = labels.copy()
    right = [n for n, c in enumerate(COLUMNS) if c.startswith("right") and c.endswith(("l2_l3", "l3_l4"))]
    expected[0, right], expected[0, 2] = labels[1, right], -1
    np.testing.assert_array_equal(target_grades(targets), expected)
    np.testing.assert_array_equal(seen[1:], inputs[1:])


def test_inputs_are_mapped_from_a_file_that_is_complete_or_absent(tmp_path):
    stacks, file = noisy_study(), tmp_path / "work/crops.npy"
    points = pd.concat([spine(x=3.9).assign(study_id=study) for study in (7, 9)])
    ids, inputs = study_inputs([(7, stacks), (8, stacks), (9, stacks)], points, SMALL, file, 3)
    assert ids == [7, 9] and inputs.shape == (2,)
    np.testing.assert_array_equal(inputs[1]["images"], study_input(stacks, spine(x=3.9), SMALL)["images"])
    assert not inputs.flags.writeable and not inputs.flags.owndata
    assert np.isfinite(probabilities([Vit3d(SMALL)], inputs)).all()

    def stops():
        yield 7, stacks
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study_inputs(stops(), points, SMALL, tmp_path / "other.npy", 3)
    with pytest.raises(ValueError, match="no study has a readable series and a canal point"):
        study_inputs([(7, [])], points, SMALL, tmp_path / "none.npy", 1)
    assert not list(tmp_path.glob("*.npy")) and not list(tmp_path.glob(".writing-*"))


def test_the_first_training_cuts_and_the_others_read_what_it_wrote(tmp_path):
    stacks, points = noisy_study(), spine(x=3.9).assign(study_id=7)
    ids, first = study_inputs([(7, stacks)], points, SMALL, tmp_path / "crops.npy", 1)

    def never():
        raise AssertionError("crops are cut again")
        yield

    again, second = study_inputs(never(), points, SMALL, tmp_path / "crops.npy", 1)
    assert again == ids == [7] and np.array_equal(first, second)
    rows = Rows(np.arange(10) * 3, np.array([4, 1, 7]))
    assert len(rows) == 3 and rows[1:].tolist() == [3, 21] and rows[np.array([2, 0])].tolist() == [21, 12]


# ---- the notebook in a kernel ----------------------------------------------------------------------------------------


@pytest.fixture
def small_run(tmp_path: Path) -> Path:
    """What 02 and 03 leave of eight studies: labels, slices and detected points."""
    run = tmp_path / "run"
    rng, labels, points = np.random.default_rng(0), [], []
    for study in range(1, 9):
        for series, stack in enumerate(noisy_study()):
            save_stack(replace(stack, study_id=study, series_id=series), run / f"slices/{study}/{series}.npz")
        canal = spine().assign(study_id=study, fold=study % 2, side="", confidence=0.5)
        points.append(canal)
        for condition in CONDITIONS:
            rows = canal.assign(condition=condition, severity=rng.choice(3, len(LEVELS)))
            rows[["X", "Y", "Z"]] += 0.5 if condition == SPINAL_CANAL else np.nan
            rows["row_id"] = [f"{study}_{condition}_{level}" for level in rows["level"]]
            labels.append(rows)
    (run / "tables").mkdir()
    (run / "predictions").mkdir()
    pd.concat(labels, ignore_index=True).assign(train_on=True).to_parquet(run / "tables/labels.parquet")
    for fold, rows in pd.concat(points).groupby("fold"):
        table = rows.drop(columns="fold")
        table.to_parquet(run / f"predictions/points_scs_fold{fold}_oof.parquet")
        for key, off in (("ss", 7.0), ("nfn", 18.0)):
            beside = table.assign(side="left", X=table["X"] + off)
            beside.to_parquet(run / f"predictions/points_{key}_fold{fold}_oof.parquet")
    return run


@pytest.mark.parametrize("folds", [[0], [0, 1]])
def test_a_first_run_of_one_fold_measures_its_shifts_on_the_held_out_studies(small_run, capsys, folds):
    found = small_run / "predictions/points_scs_fold0_oof.parquet"
    points = pd.read_parquet(found)
    points["Y"] += np.repeat([-3.0, 0.0, 0.0, 3.0], len(LEVELS))  # the spread of fold 0 is 2.2 mm, that of fold 1 none
    points.to_parquet(found)
    names = run_cells(small_run, "config", "model", "data", "errors", fold=0, folds=folds, vit_jitter=1.0)
    told, jitter = capsys.readouterr().out, names["strength"].jitter
    whose = "training studies" if 1 in folds else "held-out studies; those to train on have no detections"
    assert f"measured on 20 points of {whose}; with the demo's spread: Axial T2, Sagittal T1\n" in told
    assert jitter[0][1] == pytest.approx(0 if 1 in folds else 2.2, abs=0.3)
    assert tuple(map(tuple, jitter[1:])) == Augmentation.jitter[1:]
    trained_at = names["points"][names["points"]["study_id"].isin(names["train_labels"]["study_id"])]
    assert trained_at["confidence"].unique().tolist() == ([0.5] if 1 in folds else [1.0])  # detected, or clicked


def test_a_training_without_a_study_whose_levels_are_named_stops_in_a_sentence(small_run):
    for file in small_run.glob("predictions/points_*.parquet"):
        table = pd.read_parquet(file)
        table["level_confidence"] = np.where(table["study_id"] == 2, 0.9, 0.7)  # study 2 is of fold 0
        table.to_parquet(file)
    given = {"folds": [0, 1], "points_from": str(small_run)}
    names = run_cells(small_run, "config", "model", "data", fold=1, **given)
    assert names["train_labels"]["study_id"].unique().tolist() == [2]
    words = "fold 0: no study to train the transformer on; 0 of 4 studies have levels named with confidence 0.8 or more"
    with pytest.raises(ValueError, match=words):
        run_cells(small_run, "config", "model", "data", fold=0, **given)


def test_labels_are_softened_by_transformers_that_saw_neither_study_nor_fold(small_run):
    size = {"vit_size": 8, "vit_width": 32, "vit_margin": 2, "vit_epochs": 1, "vit_views": 1, "folds": [0, 1]}
    cells = ("config", "model", "data", "errors", "crops", "targets", *LOOP)
    answered, of_fold = {}, {2: 0, 4: 0, 6: 0, 8: 0, 1: 1, 3: 1, 5: 1, 7: 1}
    for inner in (0, 1):
        names = run_cells(small_run, *cells, "curves", "oof", fold=0, inner=inner, vit_soften=0.5, **size)
        trained, answered[inner] = set(names["train_ids"]), set(names["held_ids"])
        assert len(trained) == len(answered[inner]) == 2 and not trained & answered[inner]
        assert all(of_fold[study] == 1 for study in trained | answered[inner])
        np.testing.assert_array_equal(names["targets"], target_matrix(names["truth"]))  # by labels alone
        assert (names["points"]["confidence"] == 0.5).all()
    assert answered[0] | answered[1] == {1, 3, 5, 7}
    files = [small_run / f"predictions/vit3d_fold0_inner{inner}_oof.parquet" for inner in (0, 1)]
    rows = pd.concat(map(pd.read_parquet, files)).set_index("row_id")
    names = run_cells(small_run, *cells[:6], fold=0, vit_soften=0.5, **size)
    assert names["train_ids"] == [1, 3, 5, 7] and names["held_ids"] == [2, 4, 6, 8]
    natural = rows.loc["3_left_subarticular_stenosis_l2_l3", list(SEVERITIES)].to_numpy(float)
    place = 1, COLUMNS.index("left_subarticular_stenosis_l2_l3")
    expected = 0.5 * np.eye(3)[names["truth"][place]] + 0.5 * natural
    np.testing.assert_allclose(names["targets"][place], expected, rtol=1e-6)


def execute(
    run: Path, change: tuple[str, str] = ("", ""), last: str = "fit", before_fit: str = "", again: str = ""
) -> str:
    """Execute notebook 04 in a kernel as far as the cell `last`; what its cells print.

    change: a text in its cells and what it becomes. before_fit: a cell to execute before the cell fit. again: a cell to
    execute behind it, after which fit is executed once more.
    """
    code = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"}
    parameters = {"run_dir": str(run), "vit_size": 8, "vit_width": 32, "vit_epochs": 3, "vit_batch": 2, "vit_margin": 2}
    code["parameters"] += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    sources = []
    for name, source in code.items():
        sources += [before_fit, source] if name == "fit" else [source.replace(*change) if change[0] else source]
        if name == last:
            break
    cells = [nbformat.v4.new_code_cell(source) for source in [*sources, *([again, code["fit"]] if again else [])]]
    notebook = nbformat.v4.new_notebook(cells=cells)
    NotebookClient(notebook, kernel_name="python3", resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.outputs]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/markdown", "") for output in outputs)


KILL = """
import os
save = checkpoint.Checkpoint.save
checkpoint.Checkpoint.save = lambda self, state: (save(self, state), os._exit(9))"""


def test_the_notebook_resumes_after_a_kill_and_not_with_another_loss(small_run, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{NOTEBOOK.parents[1]}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(DeadKernelError):
        execute(small_run, before_fit=KILL)
    assert not list(small_run.glob("weights/vit3d*"))
    changed, resumed = shutil.copytree(small_run, tmp_path / "changed"), small_run / "resumed.safetensors"
    keep = f"vit.save_vit(model, {str(resumed)!r}, 0, {{}})\nshutil.rmtree(saved.folder)"
    shown = execute(small_run, again=keep)
    assert shown.count("resumes after epoch 1") == 1 and shown.count("epoch 1/3") == 1
    undisturbed = load_file(small_run / "weights/vit3d_fold0.safetensors")
    assert all(torch.equal(value, undisturbed[name]) for name, value in load_file(resumed).items())
    shown = execute(changed, change=(LOSS, LOSS + " * 2"), last="shows")
    assert "epoch 1/3" in shown and "resumes" not in shown
    assert "the label-frequency baseline scores" in shown and not (changed / "work/vit3d_fold0").exists()
    other = load_file(changed / "weights/vit3d_fold0.safetensors")
    assert not all(torch.equal(value, undisturbed[name]) for name, value in other.items())
