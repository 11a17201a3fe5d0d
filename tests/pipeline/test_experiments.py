"""Copies of a run, and the tables of what was tried on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from lsdc_utils import metric
from lsdc_utils.pipeline import commands
from lsdc_utils.pipeline.experiments import ABLATIONS, ablation_table, copy_run, curve_table
from lsdc_utils.pipeline.parameters import changed, load_parameters
from lsdc_utils.vocabulary import CONDITIONS, LEVELS, row_id


def write_run(folder: Path, sharpness: float, studies: range = range(1, 31)) -> Path:
    """A run whose ensemble is right with odds of exp(sharpness), with what the tables are made from."""
    rng = np.random.default_rng(5)
    labels = pd.DataFrame(
        [(row_id(s, c, level), s, c, level, s % 2) for s in studies for c in CONDITIONS for level in LEVELS],
        columns=["row_id", "study_id", "condition", "level", "fold"],
    )
    labels["severity"] = rng.choice([-1, 0, 1, 2], size=len(labels), p=[0.05, 0.65, 0.2, 0.1])
    natural = np.exp(sharpness * np.eye(3)[np.maximum(labels["severity"], 0)])
    rows = pd.DataFrame(natural / natural.sum(axis=1, keepdims=True), columns=metric.PROBABILITIES)
    rows.insert(0, "row_id", labels["row_id"])
    for name in ("tables", "predictions", "report", ".snakemake/metadata"):
        (folder / name).mkdir(parents=True)
    labels.to_parquet(folder / "tables/labels.parquet")
    rows.to_parquet(folder / "predictions/ensemble_oof.parquet")
    (folder / "report/index.html").write_text("a page")
    (folder / ".snakemake/metadata/one").write_text("{}")
    (folder / "submission.csv").write_text("row_id\n")
    (folder / "parameters.yml").write_text(yaml.safe_dump({"folds": [0, 1]}))
    block = metric.score_block(metric.solution_of(labels), {"ensemble": rows})
    (folder / "scores.json").write_text(json.dumps({"oof": block, "test": None}))
    return folder


def test_a_copy_keeps_what_snakemake_knows_files_by(tmp_path: Path) -> None:
    base = write_run(tmp_path / "demo", 1.0)
    copy_run(base, tmp_path / "demo-x")
    copied = tmp_path / "demo-x/tables/labels.parquet"
    assert copied.stat().st_mtime_ns == (base / "tables/labels.parquet").stat().st_mtime_ns
    assert (tmp_path / "demo-x/.snakemake/metadata/one").is_file() and (tmp_path / "demo-x/submission.csv").is_file()
    assert not (tmp_path / "demo-x/report").exists()
    copied.write_text("changed")  # which is not undone, and does not reach the run
    copy_run(base, tmp_path / "demo-x")
    assert copied.read_text() == "changed"
    assert len(pd.read_parquet(base / "tables/labels.parquet"))


def test_the_increase_of_an_ablation_has_a_paired_interval(tmp_path: Path) -> None:
    base, worse = write_run(tmp_path / "demo", 2.0), write_run(tmp_path / "worse", 1.0)
    same = write_run(tmp_path / "same", 2.0)
    table = ablation_table(base, {worse: "half of it", same: "nothing"}).set_index("name")
    assert table.loc["worse", "low"] > 0 and table.loc["worse", "without"] == "half of it"
    assert table.loc["worse", "low"] < table.loc["worse", "worse_by"] < table.loc["worse", "high"]
    assert table.loc["same", ["worse_by", "low", "high"]].tolist() == [0, 0, 0]
    assert (
        table.loc["demo", "total"]
        == json.loads((base / "scores.json").read_text())["oof"]["scores"]["ensemble"]["total"]
    )


def test_runs_on_other_studies_are_not_compared(tmp_path: Path) -> None:
    base, other = write_run(tmp_path / "demo", 2.0), write_run(tmp_path / "other", 2.0, range(2, 32))
    with pytest.raises(ValueError, match=r"other.*different studies"):
        ablation_table(base, {other: ""})


def test_the_curve_lists_runs_by_size_and_block(tmp_path: Path) -> None:
    runs = {80: write_run(tmp_path / "b", 2.0), 40: write_run(tmp_path / "a", 1.0)}
    table = curve_table(runs)
    assert table[["n_train", "block"]].to_numpy().tolist() == [[40, "oof"], [80, "oof"]]
    assert table["total"].is_monotonic_decreasing and (table["low"] < table["high"]).all()


def test_every_ablation_changes_parameters_that_there_are() -> None:
    parameters = load_parameters("demo")
    ablations = yaml.safe_load(ABLATIONS.read_text())
    assert len(ablations) >= 8
    for name, ablation in ablations.items():
        assert changed(parameters, ablation["change"]) != parameters, f"{name} removes nothing"
        assert ablation["without"] and name.replace("_", "").isalnum()


@pytest.mark.parametrize("command", ["ablate", "curve"])
def test_experiments_need_a_finished_run(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main([command, "--run", "never"])
    assert ended.value.code == 2
    assert "no such finished run" in capsys.readouterr().err
