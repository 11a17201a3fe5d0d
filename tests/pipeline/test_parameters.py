"""KEY=VALUE and profiles: every value in the type of its default, everything else an error."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import data_folders
import pytest
import yaml

from lsdc_utils.pipeline import parameters
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import all_steps
from lsdc_utils.pipeline.parameters import changed, load_parameters, parse_override, resolve_conditions
from lsdc_utils.vocabulary import COLUMNS

DEFAULTS = yaml.safe_load(
    "{name: '007', n: 3, rate: 0.1, tta: true, folds: [0, 1], epochs: {nfn: 1, scs: 2}, views: [[1.0, 0]]}"
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("name=042", "042"),
        ("name=no", "no"),
        ("name=", ""),
        ("name=a=b", "a=b"),
        ("n=5", 5),
        ("rate=1e-3", 0.001),
        ("rate=2", 2.0),
        ("tta=false", False),
        ("folds=0", [0]),
        ("folds=1,0", [1, 0]),
        ("folds=[1]", [1]),
        ("epochs={nfn: 3, scs: 4}", {"nfn": 3, "scs": 4}),
        ("epochs={scs: 4}", {"nfn": 1, "scs": 4}),
        ("views=[[0.8, 1], [1.0, 0]]", [[0.8, 1], [1.0, 0]]),
    ],
)
def test_an_override_takes_the_type_of_the_default(text: str, value: object) -> None:
    key, parsed = parse_override(text, DEFAULTS)
    assert key == text.split("=")[0]
    assert parsed == value
    assert type(parsed) is type(value)


def test_a_dict_keeps_the_keys_that_no_override_names_and_knows_no_others() -> None:
    given = load_parameters("demo", ["vit_augment={mixup: .4}", "yolo_gains={cls: 3}"])
    default = load_parameters("demo")
    assert given["vit_augment"] == default["vit_augment"] | {"mixup": 0.4} != default["vit_augment"]
    assert given["yolo_gains"] == default["yolo_gains"] | {"cls": 3.0}
    with pytest.raises(UsageError, match=r"vit_augment: unknown key mix-up; keys are: .*mixup"):
        load_parameters("demo", ["vit_augment={mix-up: .4}"])
    with pytest.raises(UsageError, match=r"vit_augment\.mixup: 'much'"):
        load_parameters("demo", ["vit_augment={mixup: much}"])


def test_a_file_or_folder_is_looked_for_from_where_the_user_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    defaults = {"data_dir": "", "folds_csv": "", "name": "", "yolo_model": ""}
    assert parse_override("folds_csv=tables/folds.csv", defaults)[1] == str(tmp_path / "tables/folds.csv")
    assert parse_override("data_dir=/elsewhere", defaults)[1] == "/elsewhere"
    assert parse_override("data_dir=", defaults)[1] == ""
    assert parse_override("name=a/b", defaults)[1] == "a/b"
    (tmp_path / "own.pt").touch()
    assert parse_override("yolo_model=own.pt", defaults)[1] == str(tmp_path / "own.pt")
    assert parse_override("yolo_model=yolov10x.pt", defaults)[1] == "yolov10x.pt"  # the notebooks know where it may be


@pytest.mark.parametrize(
    "text",
    ["n", "m=1", "n=1.5", "n=true", "n=many", "rate=fast", "rate=true", "tta=1", "folds=a", "folds=0.5",
     "epochs={nfm: 3}", "epochs=3", "epochs={nfn: 3, scs: x}", "n=[1", "nn=3"],
)  # fmt: skip
def test_a_wrong_key_or_type_is_an_error(text: str) -> None:
    with pytest.raises(UsageError, match=re.escape(text.split("=")[0])):
        parse_override(text, DEFAULTS)


@pytest.mark.parametrize("text", ["stress_studies=0", "stress_doses=1", "vit_epochs=0", "vit_batch=-2", "n_train=1",
                                  "stress_bodies=-1", "vit_inner_folds=1"])  # fmt: skip
def test_a_number_with_which_a_later_step_would_fail_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=rf"^{text}: expected [012] or more$"):
        load_parameters("smoke", [text])
    with pytest.raises(UsageError, match=r"^vit_soften=1\.5: expected 0 to 1, "):
        load_parameters("smoke", ["vit_soften=1.5"])


@pytest.mark.parametrize(("text", "words"), [("# nothing yet\n", ""), ("vit_epochs: [1\n", "profile own: .*line 2")])
def test_a_profile_may_be_empty_and_a_broken_one_is_named(text: str, words: str, tmp_path: Path, monkeypatch) -> None:
    shutil.copyfile(parameters.PROFILES / "demo.yml", tmp_path / "demo.yml")
    (tmp_path / "own.yml").write_text(text)
    demo = load_parameters("demo")
    monkeypatch.setattr(parameters, "PROFILES", tmp_path)
    if words:
        with pytest.raises(UsageError, match=f"(?s){words}"):
            load_parameters("own")
    else:
        assert load_parameters("own") == demo


def test_a_change_may_name_some_conditions_only() -> None:
    parameters = {"epochs": {"nfn": 1, "scs": 2, "ss": 3}, "rate": 0.5}
    assert changed(parameters, {"epochs": {"scs": 9}})["epochs"] == {"nfn": 1, "scs": 9, "ss": 3}
    with pytest.raises(UsageError, match="unknown parameter 'speed'"):
        changed(parameters, {"speed": 1})


def test_original_full_is_original_at_the_published_sizes() -> None:
    original, full = load_parameters("original"), load_parameters("original-full")
    changed = {key for key in full if full[key] != original[key]}
    assert full["published_method"] and full["yolo_validate"] and full["yolo_model"] == "yolov10x.pt"
    assert set(full["yolo_epochs"].values()) == {100} and set(map(tuple, full["yolo_size"].values())) == {(384, 384)}
    assert (full["folds"], full["n_splits"], full["seed"]) == ([0], 5, 52)
    assert not {"yolo_window_mm", "yolo_mosaic", "yolo_flip", "yolo_copy_mm", "vit_size"} & changed


def test_conditions_are_those_that_the_folder_has_grades_for(tmp_path, capsys) -> None:
    tables = data_folders.write_tables(tmp_path)
    train = tables["train"]
    train[[name for name in COLUMNS if "foraminal" not in name]] = ""
    data_folders.save(tmp_path, {"train": train})
    parameters = {"data_dir": "", "conditions": ["all"], "published_method": False, "stress_bodies": 3}

    def resolved(**change: object) -> dict:
        values = parameters | change
        resolve_conditions(values)
        return values

    assert resolved()["conditions"] == ["nfn", "scs", "ss"] and resolved()["stress_bodies"] == 3
    assert resolved(conditions=["ss", "nfn"])["conditions"] == ["nfn", "ss"]
    assert "no stress tests" in capsys.readouterr().out
    alone = resolved(data_dir=str(tmp_path))
    assert alone["conditions"] == ["nfn"] and alone["stress_bodies"] == 0
    assert [step.name for step in all_steps(load_parameters("demo") | alone) if step.notebook == "03_train_yolo"] == [
        "03_train_yolo_nfn_fold0", "03_train_yolo_nfn_fold1"
    ]  # fmt: skip
    train[list(COLUMNS)] = ""
    for change, words in (
        ({"conditions": ["nnf"]}, "conditions=nnf: expected all, or some of nfn, scs, ss"),
        ({"conditions": []}, "conditions= has no value; write conditions=all, or some of nfn, scs, ss"),
        ({"conditions": ["scs"], "data_dir": str(tmp_path)}, "no study has a grade for spinal stenosis"),
        ({"conditions": ["nfn"], "published_method": True}, "all three conditions"),
    ):
        with pytest.raises(UsageError, match=words):
            resolved(**change)
    data_folders.save(tmp_path, {"train": train})
    with pytest.raises(UsageError, match="no training study has a grade"):
        resolved(data_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ("[{name: A}]", "number 1: needs a name of small letters and digits"),
        ("[{encoder: conv}]", "number 1: needs a name"),
        ("[a]", "number 1: needs a name"),
        ("[{name: a}, {name: a}]", "the name a is there twice"),
        ("[{name: a}, b]", "number 2: needs a name"),
        ("[{name: a, squares: 5}]", "a: 'int' object is not iterable"),
        ("[{name: a, layers: 3}]", "a: unknown key 'layers'; keys are: name, squares, encoder"),
        ("[{name: a, vit_views: 2}]", "a: unknown key 'vit_views'"),
        ("[{name: a, vit_soften: 0.5}]", "a: unknown key 'vit_soften'"),
        ("[{name: a, vit_inner_folds: 3}]", "a: unknown key 'vit_inner_folds'"),
        ("[{name: a, head: linear}]", "a: vit_head is 'linear'; choose one of ordinal, softmax"),
        ("[{name: a, pooling: max}]", "a: vit_pooling is 'max'; choose one of attention, gru"),
        ("[{name: a, encoder: resnet1}]", "a: timm has no encoder 'resnet1'"),
        ("[{name: a, seed: x}]", "a: seed: 'x' is str, expected int"),
        ("[{name: a, squares: [32, 32, 3]}]", "expected a list of .mm, pixels, slices"),
        ("[{name: a, squares: [[32, 32, 3], [64, 16, 3]]}]", "as many pixels as the first"),
        ("[{name: a, squares: [[32, 30, 3]]}]", "vit_size 30 is not a multiple of 8"),
        ("[{name: a, vit_augment: {turn: 1.0}}]", "vit_augment: unknown key turn"),
        ("[{name: a, vit_augment: {rotation: 0.2, cut_off: 2.5}, vit_margin: 0}]", "vit_margin is 0 pixels"),
    ],
)
def test_a_member_that_cannot_be_trained_is_refused_before_anything_runs(members: str, words: str) -> None:
    with pytest.raises(UsageError, match=f"vit_members.*{words}"):
        load_parameters("demo", [f"vit_members={members}"])


def test_other_members_take_nothing_from_those_of_the_profile() -> None:
    members = [{"name": "own", "encoder": "vit_tiny_patch16_224", "head": "softmax"}]
    assert load_parameters("kaggle", [f"vit_members={json.dumps(members)}"])["vit_members"] == members


def test_members_are_not_of_the_published_method() -> None:
    with pytest.raises(UsageError, match="published_method has one transformer"):
        load_parameters("original", ["vit_members=[{name: a}]"])
