"""Lint: notebooks that open, read and run alike, and profiles that only name what notebooks declare."""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import ROOT
from nbclient import NotebookClient

from lsdc_utils import metric
from lsdc_utils.pipeline import graph
from lsdc_utils.pipeline.commands import NBSTRIPOUT_KEYS
from lsdc_utils.pipeline.parameters import load_parameters
from lsdc_utils.vocabulary import study_row_ids

START, EVALUATE = (ROOT / "notebooks" / f"{name}.ipynb" for name in ("start", "evaluate"))
NOTEBOOKS = [ROOT / "notebooks" / f"{name}.ipynb" for name in graph.NOTEBOOK_ORDER]
PROFILES = ("demo", "smoke", "kaggle", "original", "original-full", "pretrained")
each_notebook = pytest.mark.parametrize("file", [*NOTEBOOKS, EVALUATE], ids=lambda file: file.stem)


def read(file: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(file, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    return notebook


def code_cells(file: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in read(file).cells if cell.cell_type == "code"]


def parameters_source(file: Path) -> str:
    (cell,) = [cell for cell in code_cells(file) if "parameters" in cell.metadata.get("tags", ())]
    return cell.source


def test_the_notebooks_are_those_of_the_pipeline() -> None:
    assert sorted((ROOT / "notebooks").glob("*.ipynb")) == sorted([*NOTEBOOKS, START, EVALUATE])


def test_the_start_page_leads_to_every_notebook_and_lists_the_runs(tmp_path: Path) -> None:
    notebook = read(START)
    links = re.findall(r"\]\((\w+\.ipynb)\)", notebook.cells[0].source)
    assert links == [file.name for file in NOTEBOOKS]
    assert parameters_source(START).startswith("outputs_dir: str")
    scores = {"oof": {"scores": {"ensemble": {"total": 0.4321}}}, "test": None}
    for folder, expected in ((tmp_path / "none", "none yet"), (tmp_path / "some", ">0.432<")):
        (folder / "notebooks").mkdir(parents=True)
        for name in ("one", "pretrained"):  # the latter is not a run
            (folder / "outputs" / name).mkdir(parents=True)
            if folder.name == "some" or name == "pretrained":
                (folder / f"outputs/{name}/scores.json").write_text(json.dumps(scores))
        done = NotebookClient(copy.deepcopy(notebook), resources={"metadata": {"path": folder / "notebooks"}}).execute()
        shown = str(done.cells[-1].outputs)
        assert expected in shown and "pretrained" not in shown


@each_notebook
def test_a_notebook_has_the_common_shape(file: Path) -> None:
    notebook = read(file)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    assert "What this shows" in "\n".join(cell.source for cell in notebook.cells[-4:])
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


@each_notebook
def test_parameters_are_one_cell_typed_and_commented(file: Path) -> None:
    source = parameters_source(file)
    for node in ast.parse(source).body:
        assert isinstance(node, ast.AnnAssign)
        assert re.search(r"  # \S", "\n".join(source.splitlines()[node.lineno - 1 : node.end_lineno])), node.target.id
    assert ("evaluation_dir" if file == EVALUATE else "run_dir") in graph.declared(file.stem)


@each_notebook
def test_no_outputs_are_stored(file: Path) -> None:
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(file))
    command = [sys.executable, "-m", "nbstripout", "--verify", "--keep-id", "--extra-keys", NBSTRIPOUT_KEYS, file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@each_notebook
def test_code_is_plain_and_imports_once(file: Path) -> None:
    importing = []
    for cell in code_cells(file):
        tree = ast.parse(cell.source)  # no magics, no !pip
        nodes = list(ast.walk(tree))
        assert not [node for node in nodes if isinstance(node, ast.ClassDef)]
        assert not re.search(r"sys\.exit|\.cuda\(\)", cell.source)
        importing += [cell.id] if any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body) else []
    assert len(importing) == 1


@each_notebook
def test_no_absolute_paths(file: Path) -> None:
    for cell in read(file).cells:
        assert not re.search(r"(?<![\w./])/(home|root|work|tmp|mnt|Users|content)/", cell.source), cell.source
        if cell.cell_type == "code":
            nodes = list(ast.walk(ast.parse(cell.source)))
            inside = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values[1:]}
            strings = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in inside]
            assert not [text for text in strings if isinstance(text, str) and re.match(r"(/|~|[A-Za-z]:\\)\w", text)]


@pytest.mark.parametrize("name", [name for name in graph.NOTEBOOK_ORDER if name != "08_report"])
def test_a_change_in_the_report_trains_nothing(name: str) -> None:
    cells = [source for source, _ in graph.code_cells(name)]
    used = {path.relative_to(ROOT / "lsdc_utils").parts[0] for cell in cells for path in graph.module_files(cell)}
    assert "vocabulary.py" in used
    assert not used & {"report", "pipeline"}


def test_profile_demo_is_what_the_notebooks_say() -> None:
    demo = yaml.safe_load((ROOT / "notebooks/profiles/demo.yml").read_text())
    defaults: dict[str, object] = {}
    for name in graph.NOTEBOOK_ORDER:
        for key, value in graph.declared(name).items():
            assert defaults.setdefault(key, value) == value, f"{name}: {key} has another default elsewhere"
    for key in graph.STEP_PARAMETERS:
        del defaults[key]
    assert demo == defaults
    assert {key: type(value) for key, value in demo.items()} == {key: type(value) for key, value in defaults.items()}


def test_no_profile_is_left_out() -> None:
    assert sorted(file.stem for file in (ROOT / "notebooks/profiles").glob("*.yml")) == sorted(PROFILES)


@pytest.mark.parametrize("profile", PROFILES[1:])
def test_a_profile_lists_what_differs_from_demo(profile: str) -> None:
    demo, parameters = load_parameters("demo"), load_parameters(profile)
    listed = yaml.safe_load((ROOT / f"notebooks/profiles/{profile}.yml").read_text())
    assert listed
    assert not [key for key in listed if parameters[key] == demo[key]]


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff_is_content_with_code_and_notebooks(command: list[str]) -> None:
    folders = ["lsdc_utils", "tests", "notebooks"]
    done = subprocess.run([sys.executable, "-m", "ruff", *command, *folders], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def evaluation_cells(folder: Path, words: tuple[str, ...]) -> tuple[list[str], dict]:
    """The cells of 06 with these words, and the names that its first cells define: its imports and stand-ins for what
    it reads, of 24 out-of-fold studies and of test studies without anatomy."""
    file, names = ROOT / "notebooks/06_evaluation.ipynb", {}
    sources = [cell.source for cell in code_cells(file)]
    exec(sources[1], names)
    studies = [str(number) for number in range(24)]
    rows = metric.row_keys(row for study in studies for row in study_row_ids(study)).assign(severity=0)
    points = rows[rows["group"] == "scs"].assign(condition="scs", confidence=0.9, X=0.0, Y=0.0, Z=0.0)
    points = points[["study_id", "condition", "level", "side", "confidence", *"XYZ"]].astype({"study_id": int})
    judged = rows.assign(weight=1.0, loss=1.0)
    names |= {"run": folder, "root": folder, "shown": "oof", "blocks": ["oof", "test"], "groups": ["scs", "nfn", "ss"]}
    names |= {
        "names": {"oof": "out of fold", "test": "test"},
        "show": lambda table, *_: names.setdefault("table", table),
    }
    names |= {"graded": dict.fromkeys(("oof", "test"), rows), "points": dict.fromkeys(("oof", "test"), points)}
    names |= {"oof_labels": rows.assign(X=0.0, Y=0.0, Z=0.0), "answers": lambda _: None, "slices_test": rows[:0]}
    names |= {
        "judged": {"oof": {"prior": judged, "ensemble": judged}},
        "missing_series": lambda _: dict.fromkeys(range(24)),
    }
    return [source for source in sources if any(word in source for word in words)], names


def test_06_locates_the_test_studies_only_where_their_anatomy_is_known(tmp_path: Path) -> None:
    cells, names = evaluation_cells(tmp_path, ("def locate(", "located = pd.concat"))
    for cell in cells:
        exec(cell.partition("fig, ax")[0], names)
    located = pd.read_csv(tmp_path / "localisation.csv")
    assert set(located["split"]) == {"oof"} and located["found"].max() == 1.0


@pytest.mark.parametrize(("per_patient", "counted"), [(1, 24), (2, 12), (3, 8)])
def test_06_draws_patients_for_subgroups_and_gives_no_interval_to_few(
    per_patient: int, counted: int, tmp_path: Path
) -> None:
    (cell,), names = evaluation_cells(tmp_path, ("def traits(",))
    people = pd.Series({str(number): number // per_patient for number in range(24)})
    names["patients"] = {"oof": people if per_patient > 1 else None}
    exec(cell, names)
    table = names["table"]
    assert table["studies" if per_patient == 1 else "patients"].eq(counted).all()
    assert table["95 %"].eq("" if counted < 10 else "1.00 to 1.00").all()


def test_the_proof_in_jupyterlab_looks_for_cells_that_there_are() -> None:
    proof = ast.parse((ROOT / "tests/proofs/lab.py").read_text())
    calls = [node for node in ast.walk(proof) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    named = [call.args[0] for call in calls if call.func.attr in ("cell", "run_all", "change") and call.args]
    texts = {node.value for node in named if isinstance(node, ast.Constant)}
    code = "\n".join(cell.source for name in (*NOTEBOOKS, ROOT / "notebooks/start.ipynb") for cell in code_cells(name))
    assert len(texts) >= 7 and [text for text in texts if text not in code] == []
