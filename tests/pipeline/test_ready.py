"""The ready-made models: 16 bits on disk, small, checked before use; and trainings that start from other models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lsdc_utils import checkpoint
from lsdc_utils.data import competition
from lsdc_utils.files import sha256
from lsdc_utils.grading import grade
from lsdc_utils.grading.run_tables import read_recipe
from lsdc_utils.phantom import write_phantom
from lsdc_utils.pipeline import arguments, commands, pack, temper
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.parameters import PROFILES, check_start, parse_override, studies_seen
from lsdc_utils.vit.model import load_vit
from lsdc_utils.vocabulary import COLUMNS, GROUPS, SPINAL_CANAL, T2

COMMITTED = Path(__file__).resolve().parents[2] / "outputs/pretrained"

REAL = pd.DataFrame({"source": ["t2"], "series": [25], "right_disc": ["0.967 (0.931 to 0.992)"]})


@pytest.fixture(scope="module")
def ready(smoke_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ready-made models of the smallest run; its blend is taken as it is."""
    folder = tmp_path_factory.mktemp("ready")
    REAL.to_csv(folder / "real.csv", index=False)
    table = pd.DataFrame({"population": ["scanner"], "studies": [40], "tempered": [0.5]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(temper, "temper_run", lambda run, recipe, workers: (recipe | {"tempered_on": ["scanner"]}, table))
        with pytest.raises(UsageError, match=r"more than 25: train one fold"):
            pack.pack_ready(smoke_project / "outputs/demo", folder / "pretrained", None, 1)
        patch.setattr(pack, "READY_SIZE", 50_000_000)  # the smallest run has two folds
        pack.pack_ready(smoke_project / "outputs/demo", folder / "pretrained", folder / "real.csv", 1)
    return folder / "pretrained"


def test_weights_are_16_bits_on_disk_and_32_in_use(ready: Path, smoke_project: Path) -> None:
    file, before = (folder / "weights/vit3d_fold0.safetensors" for folder in (ready, smoke_project / "outputs/demo"))
    assert {value.dtype for value in load_file(file).values() if value.is_floating_point()} == {torch.float16}
    assert json.loads(file.with_suffix(".json").read_text())["sha256"] == sha256(file)
    for half, full in zip(load_vit(file).parameters(), load_vit(before).parameters(), strict=True):
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, full, rtol=1e-3, atol=1e-5)
    recipe = read_recipe(ready)
    models = grade.load_models(ready / "weights", recipe["folds"], recipe["vit_views"])
    assert {value.dtype for yolo in models.yolos["scs"] for value in yolo.model.parameters()} == {torch.float32}


def test_the_card_holds_what_was_measured_and_claims_no_more(ready: Path) -> None:
    card = (ready / "MODEL_CARD.md").read_text()
    for words in ("phantom_only", "0.967 (0.931 to 0.992)", "named from below", "AGPL-3.0", "Commit: ", "seed 52",
                  "| scanner | 40 | 0.500 |", sha256(ready / "weights/yolo_scs_fold0.pt")):  # fmt: skip
        assert words in card, words
    assert "validated" not in card.lower()
    pd.testing.assert_frame_equal(pd.read_csv(ready / "measured_real.csv"), REAL)


def asked(monkeypatch: pytest.MonkeyPatch, outputs: Path, *words: object) -> int:
    for module in (arguments, commands):
        monkeypatch.setattr(module, "OUTPUTS", outputs)
    return commands.main([*map(str, words)])


def test_models_that_are_absent_changed_or_of_other_code_are_refused(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "data").mkdir()
    copy, words = tmp_path / "outputs/pretrained", ("predict", tmp_path / "data", "--out", tmp_path / "out")

    def error() -> str:
        assert asked(monkeypatch, tmp_path / "outputs", *words) == 2
        text = capsys.readouterr().err
        assert text.startswith("run_all.sh: ") and text.count("\n") == 1
        return text

    assert "no ready-made models" in error()
    shutil.copytree(ready, copy)
    assert "the folder holds no files" in error()  # of the data: the models are in order
    (copy / "blend.json").write_text((copy / "blend.json").read_text() + " ")
    assert "blend.json is not the file" in error()
    shutil.copy(ready / "blend.json", copy)
    monkeypatch.setattr(grade, "load_vit", lambda file: load_vit(file.with_name("none")))
    monkeypatch.setattr(grade, "load_detector", lambda file: int("classes differ"))
    assert "cannot load the models" in error()
    (copy / "stranger.txt").write_text("")
    assert "differ in 'stranger.txt'" in error()


def test_no_structured_report_is_made_from_models_that_saw_no_patient(
    ready: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    shutil.copytree(ready, tmp_path / "pretrained")
    assert asked(monkeypatch, tmp_path, "export", "--run", "pretrained", "--out", tmp_path / "sr") == 2
    error = capsys.readouterr().err
    assert "phantom_only" in error and "no DICOM SR" in error and error.count("\n") == 1
    assert not (tmp_path / "sr").exists()


def test_the_committed_models_grade_a_study(tmp_path: Path) -> None:
    """The files in outputs/pretrained are whole, small, and name the levels of a study that no training drew."""
    pack.check_ready(COMMITTED)
    assert sum(file.stat().st_size for file in COMMITTED.rglob("*") if file.is_file()) <= pack.READY_SIZE
    recipe = read_recipe(COMMITTED)
    models = grade.load_models(COMMITTED / "weights", recipe["folds"], recipe["vit_views"])
    comp = competition.read(write_phantom(tmp_path / "phantom", 0, 1, seed=31))
    [study] = comp.series["study_id"].unique()
    graded = grade.grade_studies(models, comp, "test", [study])
    tables, sources = grade.blend_studies(recipe, graded, [study])
    assert len(tables["ensemble"]) == len(COLUMNS) and (sources != "prior").mean() > 0.8
    anatomy = pd.read_csv(tmp_path / "phantom/anatomy.csv")
    truth = anatomy[(anatomy["condition"] == SPINAL_CANAL) & (anatomy["series_type"] == T2)].set_index("level")["Z"]
    found = graded["points"].query("condition == 'scs'").set_index("level")["Z"]
    assert len(truth) >= 4 and (np.abs(found.reindex(truth.index) - truth) < 10).all()


# ---- trainings that start from other models -----------------------------------------------------------------------


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder of models as far as a start from them is checked: parameters and one file of weights."""
    folder = tmp_path / "models"
    (folder / "weights").mkdir(parents=True)
    demo = yaml.safe_load((PROFILES / "demo.yml").read_text())
    (folder / "parameters.yml").write_text(yaml.safe_dump(demo | {"phantom_seed": 2024}))
    (folder / "weights/yolo_scs_fold3.pt").write_bytes(b"weights")
    about = {"sha256": sha256(folder / "weights/yolo_scs_fold3.pt")}
    (folder / "weights/yolo_scs_fold3.json").write_text(json.dumps(about))
    return folder


def test_a_start_needs_the_same_architecture_and_other_studies(models: Path) -> None:
    demo = yaml.safe_load((PROFILES / "demo.yml").read_text()) | {"start_from": str(models)}
    check_start(demo)
    check_start(demo | {"start_from": "", "vit_head": "softmax"})
    check_start(demo | {"start_from": "", "points_from": str(models), "vit_head": "softmax"})
    check_start(demo | {"start_from": "", "points_from": str(models), "conditions": [*GROUPS]})  # the models have [all]
    check_start(demo | {"vit_epochs": 3, "yolo_batch": 4, "data_dir": "/elsewhere"})
    for change, words in (
        ({"vit_head": "softmax"}, r"another architecture: vit_head \(ordinal there, softmax here\)"),
        ({"yolo_model": "yolov10x.yaml", "vit_width": 64}, r"yolo_model .*, vit_width \(96 there, 64 here\)"),
        ({"vit_channels": [24, 48, 64, 128]}, "another architecture: vit_channels"),
        ({"vit_members": [{"name": "a", "weights": "x/one.pt"}]}, "another architecture: vit_members"),
        ({"phantom_seed": 2024}, "studies that this run holds out"),
        ({"start_from": str(models / "weights")}, "neither a run in outputs/ nor"),
        ({"pretrain_phantom": 100}, "pretrain_phantom cannot be used with start_from"),
        ({"pretrain_phantom": 100, "start_from": "", "published_method": True}, "cannot be used with published_method"),
        ({"pretrain_phantom": 9}, "pretrain_phantom=9: expected 0, or 10 to 5000"),
        ({"start_from": "", "points_from": str(models), "phantom_seed": 2024}, "points_from: .* this run holds out"),
    ):
        with pytest.raises(UsageError, match=words) as error:
            check_start(demo | change)
        assert "\n" not in str(error.value)


def test_a_start_from_models_that_began_with_others_is_judged_by_the_studies_of_both(models: Path) -> None:
    demo, second = yaml.safe_load((PROFILES / "demo.yml").read_text()), models.with_name("second")
    (second / "weights").mkdir(parents=True)
    theirs = demo | {"data_dir": "/data/clinic", "start_from": str(models)}
    (second / "parameters.yml").write_text(yaml.safe_dump(theirs))
    check_start(demo | {"start_from": str(second)})
    for change in ({"phantom_seed": 2024}, {"data_dir": "/moved/clinic"}):
        with pytest.raises(UsageError, match="studies that this run holds out"):
            check_start(demo | {"start_from": str(second)} | change)
    check_start(demo | {"points_from": str(models), "phantom": False, "phantom_seed": 2024})  # Kaggle's mount
    packed = {"start_from": "models", "data_dir": "clinic", "seen": sorted(studies_seen(theirs))}  # without places
    (second / "parameters.yml").write_text(yaml.safe_dump(demo | packed))
    check_start(demo | {"start_from": str(second)})
    with pytest.raises(UsageError, match="studies that this run holds out"):
        check_start(demo | {"start_from": str(second), "phantom_seed": 2024})
    (second / "parameters.yml").write_text(yaml.safe_dump(demo | {"data_dir": "/data/clinic", "pretrain_phantom": 100}))
    with pytest.raises(UsageError, match="studies that this run holds out"):
        check_start(demo | {"start_from": str(second), "phantom_seed": demo["phantom_seed"] + 9000})


def test_a_start_is_a_run_by_name_or_a_folder(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models.parent)
    monkeypatch.setattr("lsdc_utils.pipeline.parameters.OUTPUTS", models.parent / "outputs")
    (models.parent / "outputs/pretrained").mkdir(parents=True)
    expected = {
        "models": models,
        "pretrained": models.parent / "outputs/pretrained",
        "nowhere": models.parent / "nowhere",
    }
    for name, folder in expected.items():
        assert parse_override(f"start_from={name}", {"start_from": ""})[1] == str(folder)
    assert parse_override("start_from=", {"start_from": ""})[1] == ""


def test_the_weights_of_a_start_are_those_that_were_written(models: Path) -> None:
    file = models / "weights/yolo_scs_fold3.pt"
    assert checkpoint.start_weights(models, "yolo_scs") == file
    with pytest.raises(ValueError, match="no weights of vit3d"):
        checkpoint.start_weights(models, "vit3d")
    file.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="sha256 differs"):
        checkpoint.start_weights(models, "yolo_scs")
