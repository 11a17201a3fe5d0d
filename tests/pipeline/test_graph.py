"""What a step depends on besides its input files, and what it holds while it runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
import pytest

from lsdc_utils.pipeline import graph
from lsdc_utils.pipeline.parameters import load_parameters


@pytest.mark.parametrize("key", ["exclude_csv", "points_csv", "folds_csv"])
def test_another_content_of_a_given_table_re_runs_the_steps_that_read_it(tmp_path: Path, key: str) -> None:
    file, parameters = tmp_path / "given.csv", load_parameters("demo")

    def tracked(notebook: str, value: Path | str) -> str:
        return graph.tracked_parameters(graph.Step(notebook, notebook), parameters | {key: str(value)})

    file.write_text("study_id\n1\n")
    nothing, first = tracked("02_convert_labels", ""), tracked("02_convert_labels", file)
    moved = file.rename(tmp_path / "moved.csv")
    assert tracked("02_convert_labels", moved) == first != nothing
    moved.write_text("study_id\n2\n")
    assert tracked("02_convert_labels", moved) != first
    assert tracked("00_get_data", moved) == tracked("00_get_data", "")  # reads none of them


def test_other_tables_of_a_data_folder_re_run_what_reads_it(tmp_path: Path) -> None:
    seen, parameters = [], load_parameters("demo") | {"data_dir": str(tmp_path)}
    for content in ("study_id\n1\n", "study_id\n2\n", "study_id\n1\n"):
        (tmp_path / "train.csv").write_text(content)
        seen.append(
            [graph.tracked_parameters(graph.Step(name, name), parameters) for name in ("00_get_data", "01_eda")]
        )
    assert seen[0] == seen[2] and all(one != other for one, other in zip(*seen[:2], strict=True))


@pytest.mark.parametrize(
    ("key", "name", "notebook"),
    [
        ("start_from", "weights/vit3d_fold0.json", "04_train_vit3d"),
        ("points_from", "weights/yolo_scs_fold0.json", "03_train_yolo"),
        ("yolo_model", "own.pt", "03_train_yolo"),
        ("vit_encoder_weights", "own.safetensors", "04_train_vit3d"),
    ],
)
def test_other_weights_to_begin_with_re_run_the_trainings(tmp_path: Path, key: str, name: str, notebook: str) -> None:
    file, step = tmp_path / name, graph.Step(notebook, notebook, {"condition": "scs", "fold": 0})
    file.parent.mkdir(exist_ok=True)
    value = tmp_path if file.suffix == ".json" else file
    seen = []
    for content in ("one", "other", "one"):
        file.write_text(content)
        seen.append(graph.tracked_parameters(step, load_parameters("demo") | {key: str(value)}))
    assert seen[0] == seen[2] != seen[1]


def test_modules_are_followed_through_packages_and_relative_imports(monkeypatch, tmp_path: Path) -> None:
    package = tmp_path / "lsdc_utils"
    (package / "deep" / "templates").mkdir(parents=True)
    for name, text in {
        "__init__.py": "",
        "a.py": "def late():\n    from .deep import inner",
        "b.py": "",
        "deep/__init__.py": "",
        "deep/inner.py": "from ..b import thing\nfrom . import other",
        "deep/other.py": "",
        "deep/templates/page.html": "<p>",
        "deep/unused.py": "",
    }.items():
        (package / name).write_text(text)
    monkeypatch.setattr(graph, "ROOT", tmp_path)
    files = {str(path.relative_to(package)) for path in graph.module_files("%matplotlib inline\nimport lsdc_utils.a")}
    assert files == {
        "__init__.py", "a.py", "b.py", "deep/__init__.py", "deep/inner.py", "deep/other.py", "deep/templates/page.html"
    }  # fmt: skip


def test_two_gpus_are_held_by_two_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-b")
    with graph.own_gpu():
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,GPU-b")
        with graph.own_gpu():
            assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b"


def test_a_figure_that_was_ended_and_is_not_there_is_found() -> None:
    picture = nbformat.v4.new_output("display_data", {"image/png": ""})
    cells = [
        ("plt.plot([1])\nplt.show()", [picture]),
        ("for name in ():\n    plt.plot([1])\n    plt.show()", []),  # there may be nothing to draw
        ("print('plt.show()')", []),
        ("plt.plot([1])\nplt.show()", []),
    ]
    cells = [nbformat.v4.new_code_cell(source, outputs=outputs) for source, outputs in cells]
    assert graph.without_figure(nbformat.v4.new_notebook(cells=cells)) == [4]


def test_localisers_are_trained_before_detectors_and_not_by_the_published_method() -> None:
    parameters = load_parameters("demo")
    names = [step.name for step in graph.all_steps(parameters)]
    localisers = [f"03_train_localiser_fold{fold}" for fold in parameters["folds"]]
    first = names.index(localisers[0])
    assert names[first : first + len(localisers)] == localisers
    assert names[first - 1] == "02_convert_labels" and names[first + len(localisers)].startswith("03_train_yolo")
    published = [step.name for step in graph.all_steps(parameters | {"published_method": True})]
    assert published == [name for name in names if name not in localisers]


def test_softened_labels_add_a_training_for_each_part_of_each_fold_before_the_folds() -> None:
    parameters = load_parameters("demo") | {"vit_soften": 0.5}
    steps = graph.select_steps(graph.all_steps(parameters), "04")
    inner = [f"04_train_vit3d_fold{fold}_inner{part}" for fold in (0, 1) for part in (0, 1)]
    assert [step.name for step in steps] == [*inner, "04_train_vit3d_fold0", "04_train_vit3d_fold1"]
    given = [graph.step_parameters(step, parameters, "demo") for step in steps]
    assert [(own["fold"], own["inner"]) for own in given] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, -1), (1, -1)]


def test_each_member_is_a_training_of_its_own_with_its_parameters() -> None:
    a = "{name: a, encoder: resnet18, seed: 3, vit_lr: 0.0002, vit_augment: {mixup: 0.4}}"
    squares = "[[48, 24, 5], [96, 24, 3]]"
    parameters = load_parameters("demo", [f"vit_members=[{a}, {{name: b2, pooling: gru, squares: {squares}}}]"])
    steps = graph.select_steps(graph.all_steps(parameters | {"vit_soften": 0.5, "vit_inner_folds": 1}), "04")
    names = [f"04_train_vit3d-{name}_fold{fold}" for name in ("a", "b2") for fold in (0, 1)]
    assert [step.name for step in steps] == [f"{name}_inner0" for name in names] + names
    a, b = (graph.step_parameters(step, parameters, "demo") for step in steps[4::2])
    usual = graph.step_parameters(graph.Step("04", "04_train_vit3d", {"fold": 0}), parameters, "demo")
    assert {key: a[key] for key in a if a[key] != usual[key]} == {
        "member": "a", "vit_encoder": "resnet18", "seed": 3, "vit_lr": 0.0002,
        "vit_augment": usual["vit_augment"] | {"mixup": 0.4},
    }  # fmt: skip
    assert {key: b[key] for key in b if b[key] != usual[key]} == {
        "member": "b2", "vit_pooling": "gru", "vit_size": 24, "vit_slices": 5, "vit_wider": [[2.0, 3]],
        "vit_spacing": [1.6, 2.0, 1.0],
    }  # fmt: skip
