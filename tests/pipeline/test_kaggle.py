"""What goes to Kaggle: a notebook that needs no network, wheels of what the image lacks, nothing that is private."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import kaggle_image
import pandas as pd
import pytest
from conftest import ROOT, run_all

from lsdc_utils import downloads
from lsdc_utils.pipeline import graph, kaggle

RECIPE = {"conditions": ["nfn", "ss"], "folds": [0, 3], "members": [], "kind": "fitted", "vit_views": 2, "threads": 4}


def placed(folder: Path, wheels: dict[str, str]) -> list[str]:
    """Stand-in wheels in a folder; their names."""
    folder.mkdir(parents=True)
    names = [f"{name.replace('-', '_')}-{version}-py3-none-any.whl" for name, version in wheels.items()]
    for name in names:
        (folder / name).write_bytes(b"stand-in")
    return sorted(names)


@pytest.fixture
def image() -> dict[str, str]:
    return kaggle_image.read_image()


# ---- the bundle ----------------------------------------------------------------------------------------------------


def test_the_command_writes_what_kaggles_own_takes(smoke_project: Path, tmp_path: Path) -> None:
    wheels = placed(tmp_path / "out/dataset/wheels", kaggle.read_wheels())
    (tmp_path / "out/dataset/wheels/timm-0.1-py3-none-any.whl").write_bytes(b"of an earlier bundle")
    asked = ["kaggle-bundle", "--run", "demo", "--out", str(tmp_path / "out")]
    for _ in range(2):
        done = run_all(smoke_project, *asked, HOME=str(tmp_path), PIP_NO_INDEX="1")
        assert done.returncode == 0, done.stderr
    assert f"kaggle datasets create -p {tmp_path}/out/dataset --dir-mode zip" in done.stdout
    assert kaggle.USER in done.stdout and "--user" in done.stdout
    dataset, notebook = tmp_path / "out/dataset", tmp_path / "out/notebook"
    assert sorted(file.name for file in (dataset / "wheels").iterdir()) == wheels
    assert {file.name for file in dataset.iterdir()} == {"models", "lsdc_utils", "wheels", "dataset-metadata.json"}
    run = smoke_project / "outputs/demo"
    for file in [*run.glob("weights/*.pt"), *run.glob("weights/*.safetensors"), run / "blend.json"]:
        assert (dataset / "models" / file.relative_to(run)).read_bytes() == file.read_bytes()
    assert not list(dataset.rglob("__pycache__"))
    about = json.loads((notebook / "kernel-metadata.json").read_text())
    assert (about["enable_internet"], about["enable_gpu"], about["is_private"]) == (False, True, True)
    assert about["machine_shape"] == "NvidiaTeslaT4"
    assert about["id"] == f"{kaggle.USER}/lsdc-demo-inference" and about["title"] == "lsdc-demo-inference"
    assert about["competition_sources"] == [downloads.COMPETITION]
    assert about["dataset_sources"] == [json.loads((dataset / "dataset-metadata.json").read_text())["id"]]
    assert (notebook / about["code_file"]).is_file()
    series = pd.concat(pd.read_parquet(file) for file in (run / "tables").glob("series.parquet"))
    words = [str(smoke_project), str(tmp_path), *series["study_id"].astype(str).unique()]
    for file in (path for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md", ".yml", ".ipynb")):
        assert not [word for word in words if word in file.read_text()], file


def test_the_user_is_the_one_whose_credentials_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kaggle.user_here() == kaggle.USER
    (tmp_path / ".kaggle").mkdir()
    (tmp_path / ".kaggle/kaggle.json").write_text('{"username": "me", "key": "secret"}')
    assert kaggle.user_here() == "me"


def test_the_notebook_is_05_with_its_parameters_set() -> None:
    notebook = kaggle.inference_notebook(RECIPE)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    own = [source for source, _ in graph.code_cells("05_ensemble_inference")]
    assert [cell.source for cell in cells[2:]] == own[1:]
    assert "--no-index" in cells[0].source and "shell" not in cells[0].source
    assert cells[1].metadata.tags == ["parameters"]
    values = {node.target.id: node.value for node in ast.parse(cells[1].source).body}
    assert list(values) == list(graph.declared("05_ensemble_inference"))
    given = {"conditions": ["nfn", "ss"], "fit_blend": False, "folds": [0, 3], "vit_views": 2, "threads": 4}
    assert {name: ast.literal_eval(values[name]) for name in given} == given
    assert {name: ast.unparse(values[name]) for name in kaggle.PLACES} == {
        name: value.replace('"', "'") for name, value in kaggle.PLACES.items()
    }
    assert re.findall(r"/kaggle", "\n".join(cell.source for cell in cells)) == [
        "/kaggle"
    ]  # one place to point elsewhere


@pytest.mark.parametrize(
    ("dataset", "competition"), [("lsdc-demo", ""), ("datasets/me/lsdc-demo", "competitions/")], ids=["old", "new"]
)
def test_its_first_cell_finds_bundle_and_data(tmp_path: Path, dataset: str, competition: str) -> None:
    bundle, data = tmp_path / "input" / dataset, tmp_path / f"input/{competition}{downloads.COMPETITION}"
    placed(bundle / "wheels", {"stand-in": "1"})
    (bundle / "lsdc_utils").symlink_to(ROOT / "lsdc_utils")
    data.mkdir(parents=True)
    first = f"import subprocess\nsubprocess.run = lambda *a, **k: print(a[0][1:])\n{kaggle.BEGIN}\nprint(bundle, data)"
    environment = {"LSDC_KAGGLE": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", first], env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{bundle} {data}", done.stderr
    assert "--no-deps" in done.stdout and f"{bundle}/wheels/stand_in-1-py3-none-any.whl" in done.stdout
    (bundle / "lsdc_utils").unlink()
    done = subprocess.run([sys.executable, "-c", first], env=environment, capture_output=True, text=True)
    assert "attach one data set" in done.stderr


# ---- wheels --------------------------------------------------------------------------------------------------------


class Asked(dict):
    """An image that remembers what it was asked for."""

    def __init__(self, *known: dict) -> None:
        super().__init__(*known)
        self.asked = set()

    def get(self, name: str, default: str | None = None) -> str | None:
        self.asked.add(name)
        return super().get(name, default)


def test_the_bundle_brings_what_the_image_lacks() -> None:
    assert kaggle.read_wheels() == kaggle_image.wheels(), (
        "renew it: python tests/kaggle_image.py > .../kaggle_wheels.txt"
    )
    assert kaggle_image.read_image()["python"] == kaggle.PYTHON


def test_the_list_of_the_image_holds_what_matters_and_no_more(image: dict[str, str]) -> None:
    remembered = Asked(image)
    missing = kaggle_image.lacking(remembered, image["python"], kaggle_image.roots())
    assert {"ultralytics", "timm", "pydicom", "pylibjpeg-libjpeg", "opencv-python"} <= set(missing)
    assert not set(missing) & kaggle_image.NEVER
    assert set(image) - remembered.asked <= {"python", "opencv-contrib-python", "opencv-python-headless"}
    assert not remembered.asked - set(image) - set(missing)
    header = [line for line in kaggle_image.IMAGE.read_text().splitlines() if line.startswith("#")]
    assert re.search(r"20\d\d", header[0])


def test_what_the_image_has_in_a_version_that_will_not_do_is_brought(image: dict[str, str]) -> None:
    python, wanted = image["python"], ["ultralytics"]
    assert "psutil" not in kaggle_image.lacking(image, python, wanted)
    assert "psutil" in kaggle_image.lacking(image | {"psutil": "5.0.0"}, python, wanted)
    with pytest.raises(kaggle_image.MissingError, match=r"torch.*1\.0\.0"):
        kaggle_image.lacking(image | {"torch": "1.0.0"}, python, wanted)


def test_a_wheel_that_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (kept,) = placed(tmp_path / "wheels", {"kept": "1.0"})
    (tmp_path / "wheels/kept-0.9-py3-none-any.whl").write_bytes(b"old")
    with pytest.raises(kaggle.UsageError, match=r"no-such-one 2\.0 for Python 3\.12\.13.* network"):
        kaggle.fetch({"kept": "1.0", "no-such-one": "2.0"}, tmp_path / "wheels", "3.12.13")
    assert [file.name for file in (tmp_path / "wheels").iterdir()] == [kept]


# ---- the rehearsal -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_notebook_grades_as_predict_does_on_what_the_image_has(smoke_project: Path) -> None:
    command = [sys.executable, str(ROOT / "tests/proofs/kaggle.py"), str(smoke_project / "outputs/demo"), "3"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "75 rows, 25 a study" in done.stdout and "untested: Python" in done.stdout
