"""Profile smoke, run end to end once by the command that a user types; then its outputs, and what would run again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import run_all
from nbclient import NotebookClient

from lsdc_utils import metric
from lsdc_utils.data import competition
from lsdc_utils.pipeline import graph
from lsdc_utils.vocabulary import GROUP_OF, GROUPS, LEVELS, MISSING, SEVERITIES, parse_row_id, study_row_ids

ANSWERS = ("solution.csv", "solution_coordinates.csv", "latents.csv", "oracle.csv")
ANSWERS += ("anatomy.csv", "discs.csv", "spines.csv", "wrong_labels.csv")
AGAIN = ("--profile", "smoke", "--run", "demo")


@pytest.fixture(scope="module")
def run(smoke_project: Path) -> Path:
    return smoke_project / "outputs" / "demo"


@pytest.fixture(scope="module")
def data(run: Path) -> Path:
    return (run / json.loads((run / "data.json").read_text())["data_dir"]).resolve()


@pytest.fixture(scope="module")
def parameters(run: Path) -> dict:
    return yaml.safe_load((run / "parameters.yml").read_text())


def would_run(project: Path) -> list[str]:
    done = run_all(project, "--dry-run", *AGAIN)
    assert done.returncode == 0, done.stdout + done.stderr
    return re.findall(r"^would run (\w+):", done.stdout, re.MULTILINE)


def assert_natural_rows(table: pd.DataFrame) -> None:
    """Rows as DESIGN has them: known row ids, once each, three finite probabilities that sum to 1."""
    assert list(table.columns) == ["row_id", *SEVERITIES]
    assert table.row_id.is_unique
    for row in table.row_id:
        parse_row_id(row)
    values = table[list(SEVERITIES)].to_numpy()
    assert np.isfinite(values).all()
    assert (values >= 0).all()
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-5)


# ---- what the run left ---------------------------------------------------------------------------------------------


def test_every_step_ran_and_the_end_is_scores_and_report(smoke_project: Path, parameters: dict) -> None:
    output = (smoke_project / "first_run.txt").read_text()
    assert output.count(" done in ") == len(graph.all_steps(parameters))
    assert "Weighted log loss" in output
    report, took = output.rstrip().splitlines()[-2:]
    assert report.endswith("outputs/demo/report/index.html") and re.fullmatch(r"the run took \d+:\d\d", took)


def test_executed_notebooks_have_no_error_and_show_figures(run: Path, parameters: dict) -> None:
    for step in graph.all_steps(parameters):
        notebook = nbformat.read(run / "notebooks" / f"{step.name}.ipynb", as_version=4)
        assert graph.all_ran(notebook), step.name
        outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
        assert any("image/png" in output.get("data", {}) for output in outputs), f"{step.name} shows no figure"
        assert any("What this shows" in cell.source for cell in notebook.cells), step.name


def test_each_step_has_its_log_time_and_memory(run: Path, parameters: dict) -> None:
    for step in graph.all_steps(parameters):
        assert (run / "logs" / f"{step.name}.log").read_text().strip(), f"{step.name} printed nothing while it ran"
        cost = pd.read_csv(run / "logs" / f"{step.name}.tsv", sep="\t")
        assert (cost[["s", "max_rss"]] > 0).all(axis=None)


def test_labels_folds_and_series_cover_the_training_studies(run: Path, data: Path, parameters: dict) -> None:
    train = pd.read_csv(data / "train.csv")
    labels = pd.read_parquet(run / "tables/labels.parquet")
    assert set(labels.study_id) == set(train.study_id)
    assert set(labels.row_id) == {row for study in train.study_id for row in study_row_ids(study)}
    assert labels.row_id.is_unique
    assert set(labels.severity) <= {MISSING, 0, 1, 2}
    assert (labels.groupby("study_id").fold.nunique() == 1).all()
    assert set(labels.fold) == set(range(parameters["n_splits"]))
    series = pd.read_parquet(run / "tables/series.parquet")
    assert set(series.split) == {"train", "test"}
    assert set(train.study_id) <= set(series.study_id)


def test_out_of_fold_rows_are_of_studies_that_the_model_had_not_seen(run: Path, parameters: dict) -> None:
    labels = pd.read_parquet(run / "tables/labels.parquet")
    rows_of = {fold: set(rows) for fold, rows in labels.groupby("fold").row_id}
    for fold in parameters["folds"]:
        for model in ("yolo_nfn", "yolo_scs", "yolo_ss", "vit3d"):
            table = pd.read_parquet(run / f"predictions/{model}_fold{fold}_oof.parquet")
            assert_natural_rows(table)
            assert set(table.row_id) <= rows_of[fold]
            key = model.removeprefix("yolo_")
            if key in GROUPS:
                assert all(GROUPS[key].base in row for row in table.row_id)
    ensemble = pd.read_parquet(run / "predictions/ensemble_oof.parquet")
    assert_natural_rows(ensemble)
    assert set(ensemble.row_id) == set().union(*(rows_of[fold] for fold in parameters["folds"]))


def test_level_points_lie_in_the_patient(run: Path, parameters: dict) -> None:
    for key in GROUPS:
        for fold in parameters["folds"]:
            points = pd.read_parquet(run / f"predictions/points_{key}_fold{fold}_oof.parquet")
            assert {"study_id", "level", "side", "X", "Y", "Z", "confidence"} <= set(points.columns)
            assert set(points.level) <= set(LEVELS)
            assert np.isfinite(points[["X", "Y", "Z"]].to_numpy(dtype=float)).all()
            assert points.confidence.between(0, 1).all()


def test_weights_carry_their_checksum_and_fold(run: Path, parameters: dict) -> None:
    blended = json.loads((run / "blend.json").read_text())["weights"]
    assert len(blended) == 5 * len(parameters["folds"])
    for fold in parameters["folds"]:
        for name in (
            *(f"yolo_{key}_fold{fold}.pt" for key in GROUPS),
            *(f"{name}_fold{fold}.safetensors" for name in ("localiser", "vit3d")),
        ):
            file = run / "weights" / name
            about = json.loads(file.with_suffix(".json").read_text())
            assert about["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() == blended[file.stem]
            assert about["fold"] == fold


def test_the_submission_has_every_row_of_the_sample_and_sums_to_one(run: Path, data: Path) -> None:
    submission = pd.read_csv(run / "submission.csv")
    sample = pd.read_csv(data / "sample_submission.csv")
    assert list(submission.columns) == list(sample.columns)
    assert list(submission.row_id) == list(sample.row_id)
    studies = pd.read_csv(data / "test_series_descriptions.csv").study_id.unique()
    assert set(submission.row_id) == {row for study in studies for row in study_row_ids(study)}
    values = submission[list(SEVERITIES)].to_numpy()
    assert (values > 0).all()
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-6)
    for model in ("ensemble", "yolo", "vit3d"):
        assert_natural_rows(pd.read_parquet(run / f"predictions/{model}_test.parquet"))


def test_scores_are_finite_and_of_every_model(run: Path, data: Path) -> None:
    scores = json.loads((run / "scores.json").read_text())
    assert set(scores) == {"oof", "test"}
    studies = {"oof": pd.read_csv(data / "train.csv"), "test": pd.read_csv(data / "test_series_descriptions.csv")}
    for part, table in studies.items():
        block = scores[part]
        assert 0 < block["n_studies"] <= table.study_id.nunique()
        assert set(block) == {"n_studies", "scores", "skill", "interval"}
        assert {"prior", "yolo", "vit3d", "ensemble"} <= set(block["scores"])
        for model, parts in block["scores"].items():
            assert set(parts) == {"spinal", "foraminal", "subarticular", "any_severe", "total"}
            assert all(np.isfinite(value) and value > 0 for value in parts.values()), (part, model)
    assert "oracle" in scores["test"]["scores"]
    assert scores["test"]["skill"]["prior"]["total"] == pytest.approx(0)


def test_the_report_opens_without_a_network(run: Path) -> None:
    pages = sorted((run / "report").glob("*.html"))
    assert run / "report" / "index.html" in pages
    for page in pages:
        text = page.read_text()
        assert not re.findall(r"""(?:<script[^>]*src|<link[^>]*href|<img[^>]*src)=["'](?:https?:)?//[^"']+""", text), (
            page
        )
    index = (run / "report" / "index.html").read_text()
    assert "ot for clinical use" in index
    assert index.count("data:image/") >= 2


def test_each_test_study_has_its_page_and_its_exports(run: Path, data: Path) -> None:
    studies = sorted(path.name for path in (data / "test_images").iterdir())
    assert len(studies) == 3
    assert sorted(path.name for path in (run / "report").glob("study_*.html")) == [f"study_{s}.html" for s in studies]
    assert sum('type="range"' in path.read_text() for path in (run / "report").glob("study_*.html")) == 2
    assert sorted(path.name for path in (run / "exports").iterdir()) == studies
    for study in studies:
        assert len(pd.read_csv(run / "exports" / study / "grades.csv")) == 25
    natural = pd.read_parquet(run / "predictions/ensemble_test.parquet").set_index("row_id")
    table = pd.read_csv(run / "exports" / studies[0] / "grades.csv").set_index("row_id")
    np.testing.assert_allclose(table[list(SEVERITIES)], natural.loc[table.index, list(SEVERITIES)], atol=1e-6)


def test_export_writes_one_study_to_a_given_folder(smoke_project: Path, run: Path, tmp_path: Path) -> None:
    study = next((run / "exports").iterdir()).name
    done = run_all(smoke_project, "export", "--run", "demo", study, "--out", str(tmp_path / "out"))
    assert done.returncode == 0 and "1 study exported" in done.stdout, done.stderr
    assert [path.name for path in (tmp_path / "out").iterdir()] == [study]
    for arguments in (["--run", "none"], ["--run", "demo", "7"]):
        done = run_all(smoke_project, "export", *arguments)
        assert done.returncode == 2 and arguments[-1] in done.stderr, done.stderr


def test_no_half_written_file_is_left(run: Path) -> None:
    assert not [path for path in run.rglob(".writing-*") if ".snakemake" not in path.parts]
    assert not list((run / "logs").glob("*.ipynb"))


@pytest.mark.slow
def test_every_notebook_runs_by_hand(smoke_copy: Path, parameters: dict) -> None:
    """From the first cell to the last in a fresh kernel, with nothing but other values in its cell of parameters."""
    for name in graph.NOTEBOOK_ORDER:
        notebook = nbformat.read(smoke_copy / f"notebooks/{name}.ipynb", as_version=4)
        [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
        own = [key for key in graph.declared(name) if key in parameters]
        cell.source += "\n" + "\n".join(f"{key} = {parameters[key]!r}" for key in own)
        environment = {**os.environ, "PYTHONPATH": str(smoke_copy)}
        environment.pop("JUPYTER_PATH", None)
        client = NotebookClient(notebook, resources={"metadata": {"path": smoke_copy / "notebooks"}})
        client.execute(env=environment)
        assert graph.all_ran(client.nb), name
        live = [key for cell in client.nb.cells for out in cell.get("outputs", []) for key in out.get("data", {})]
        viewers = sum(key == "application/vnd.jupyter.widget-view+json" for key in live)
        assert viewers == (name in ("01_eda", "05_ensemble_inference")), name


# ---- what runs again -----------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(smoke_project: Path) -> None:
    done = run_all(smoke_project, *AGAIN)
    assert "nothing to do" in done.stdout


def test_executed_and_saved_notebooks_run_nothing(smoke_copy: Path, run: Path) -> None:
    for name in graph.NOTEBOOK_ORDER:
        source = nbformat.read(smoke_copy / f"notebooks/{name}.ipynb", as_version=4)
        executed = nbformat.read(next(iter(sorted((run / "notebooks").glob(f"{name}*.ipynb")))), as_version=4)
        ran = {cell.id: cell for cell in executed.cells}
        for cell in source.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = ran[cell.id].outputs, ran[cell.id].execution_count
        nbformat.write(source, smoke_copy / f"notebooks/{name}.ipynb")
    # One is executed for good, as a reader would: it writes its tables again, with the same bytes.
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "nbconvert",
        "--to",
        "notebook",
        "--execute",
        "--inplace",
        "01_eda.ipynb",
    ]
    environment = {**os.environ, "PYTHONPATH": str(smoke_copy), "JUPYTER_PREFER_ENV_PATH": "1"}
    before = (smoke_copy / "outputs/demo/tables/series.parquet").stat().st_mtime
    subprocess.run(command, cwd=smoke_copy / "notebooks", env=environment, check=True, capture_output=True)
    assert (smoke_copy / "outputs/demo/tables/series.parquet").stat().st_mtime > before
    assert would_run(smoke_copy) == []


def test_a_change_in_the_report_runs_08_alone(smoke_copy: Path) -> None:
    with (smoke_copy / "lsdc_utils/report/pages.py").open("a") as module:
        module.write("\nNEW = 1\n")
    assert would_run(smoke_copy) == ["08_report"]


def test_a_change_in_a_model_trains_it_alone(smoke_copy: Path, parameters: dict) -> None:
    with (smoke_copy / "lsdc_utils/vit/model.py").open("a") as module:
        module.write("\nNEW = 1\n")
    trained = [f"04_train_vit3d_fold{fold}" for fold in parameters["folds"]]
    assert would_run(smoke_copy) == [*trained, "05_ensemble_inference", "06_evaluation", "07_stress_tests", "08_report"]


@pytest.mark.slow
def test_what_is_not_trained_on_is_graded_and_scored_all_the_same(smoke_copy: Path, tmp_path: Path) -> None:
    """One study of each fold is on the list, and of another one the foramina; fold 0 is trained again."""
    project, run = smoke_copy, smoke_copy / "outputs/demo"
    labels = pd.read_parquet(run / "tables/labels.parquet")
    whole, foramina = (labels.groupby("fold").study_id.unique().str[k].tolist() for k in (0, 1))
    lines = [(study, "", "", "", "") for study in whole] + [(study, "", "foraminal", "", "") for study in foramina]
    pd.DataFrame(lines, columns=competition.EXCLUDE).to_csv(tmp_path / "list.csv", index=False)
    given = [f"not_trained_csv={tmp_path / 'list.csv'}", "folds=0", "--until", "06"]
    done = run_all(project, "--profile", "smoke", "--run", "demo", *given)
    assert done.returncode == 0, done.stdout + done.stderr
    after = pd.read_parquet(run / "tables/labels.parquet")
    pd.testing.assert_frame_equal(after.drop(columns="train_on"), labels.drop(columns="train_on"))
    nfn = after.condition.map(GROUP_OF) == "nfn"
    assert (after.train_on == ~(after.study_id.isin(whole) | (after.study_id.isin(foramina) & nfn))).all()
    others = set(labels.study_id[labels.fold != 0])
    for model in ("localiser", "yolo_nfn", "yolo_scs", "yolo_ss", "vit3d"):
        trained = set(json.loads((run / f"weights/{model}_fold0.json").read_text())["studies"])
        assert trained.isdisjoint(whole), model
        assert trained <= others, model
        assert (foramina[1] in trained) == (model != "yolo_nfn"), model
    own = labels[labels.fold == 0]
    assert set(pd.read_parquet(run / "predictions/ensemble_oof.parquet").row_id) == set(own.row_id)
    scores = json.loads((run / "scores.json").read_text())["oof"]
    without = json.loads((run / "evaluation.json").read_text())["without_not_trained"]
    graded = own[own.severity >= 0].study_id.unique()
    assert scores["n_studies"] == len(graded) and without["n_studies"] == len(set(graded) - {whole[0]})
    table = pd.read_parquet(run / "predictions/ensemble_oof.parquet")
    solution = metric.solution_of(own[own.row_id.isin(after.row_id[after.train_on])])
    expected = metric.score(solution, metric.weight_table(table))
    assert without["scores"]["ensemble"] == pytest.approx(expected)
    assert expected["foraminal"] != pytest.approx(scores["scores"]["ensemble"]["foraminal"])


def test_the_submission_knows_no_answers(smoke_copy: Path, run: Path, data: Path) -> None:
    """With every answer file gone the last model step gives the same bytes, and no test score."""
    copied = smoke_copy / "outputs/data" / data.name
    for name in ANSWERS:
        (copied / name).unlink()
    done = run_all(smoke_copy, *AGAIN, "--force", "05", "--until", "05")
    assert done.returncode == 0, done.stderr
    assert "1 steps run" in done.stdout
    assert (smoke_copy / "outputs/demo/submission.csv").read_bytes() == (run / "submission.csv").read_bytes()
    scores = json.loads((smoke_copy / "outputs/demo/scores.json").read_text())
    assert scores["test"] is None
    assert scores["oof"]["scores"]["ensemble"]["total"] > 0
