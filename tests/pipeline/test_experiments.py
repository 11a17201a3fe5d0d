"""Copies of a run, and the tables of what was tried on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from lsdc_utils import metric
from lsdc_utils.pipeline import runner
from lsdc_utils.pipeline.experiments import Ablation, ablation_table, begin, curve_table, noise_table, read_ablations
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


def add_test_studies(folder: Path) -> Path:
    """Let the run have graded its own training studies as test studies too."""
    (folder / "data").mkdir()
    (folder / "data.json").write_text(json.dumps({"data_dir": "data", "kind": "phantom"}))
    labels = pd.read_parquet(folder / "tables/labels.parquet")
    metric.solution_of(labels).to_csv(folder / "data/solution.csv", index=False)
    (folder / "predictions/ensemble_test.parquet").write_bytes(
        (folder / "predictions/ensemble_oof.parquet").read_bytes()
    )
    block = json.loads((folder / "scores.json").read_text())["oof"]
    (folder / "scores.json").write_text(json.dumps({"oof": block, "test": block}))
    return folder


def test_a_copy_keeps_what_snakemake_knows_files_by(tmp_path: Path) -> None:
    base = write_run(tmp_path / "demo", 1.0)
    begin(base, tmp_path / "demo-x")
    copied = tmp_path / "demo-x/tables/labels.parquet"
    assert copied.stat().st_mtime_ns == (base / "tables/labels.parquet").stat().st_mtime_ns
    assert (tmp_path / "demo-x/.snakemake/metadata/one").is_file() and (tmp_path / "demo-x/submission.csv").is_file()
    assert not (tmp_path / "demo-x/report").exists()
    copied.write_text("changed")  # which is not undone, and does not reach the run
    begin(base, tmp_path / "demo-x")
    assert copied.read_text() == "changed"
    assert len(pd.read_parquet(base / "tables/labels.parquet"))


def test_what_an_ingredient_is_worth_is_told_with_a_paired_interval(tmp_path: Path) -> None:
    base, worse = write_run(tmp_path / "demo", 2.0), write_run(tmp_path / "worse", 1.0)
    same = write_run(tmp_path / "same", 2.0)
    tried = [(Ablation("worse", "half of it", {}), worse), (Ablation("same", "nothing", {}), same)]
    table = ablation_table(base, tried).set_index("name")
    assert table.loc["worse", "low"] > 0 and table.loc["worse", "without"] == "half of it"
    assert table.loc["worse", "low"] < table.loc["worse", "worse_by"] < table.loc["worse", "high"]
    assert table.loc["same", ["worse_by", "low", "high"]].tolist() == [0, 0, 0]
    assert (
        table.loc["demo", "total"]
        == json.loads((base / "scores.json").read_text())["oof"]["scores"]["ensemble"]["total"]
    )


def test_runs_on_other_studies_are_not_compared(tmp_path: Path) -> None:
    base, other = write_run(tmp_path / "demo", 2.0), write_run(tmp_path / "other", 2.0, range(2, 32))
    with pytest.raises(ValueError, match=r"other.*other studies"):
        ablation_table(base, [(Ablation("other", "", {}), other)])


def test_the_curve_lists_runs_by_size_and_block(tmp_path: Path) -> None:
    runs = [(80, write_run(tmp_path / "b", 2.0)), (40, write_run(tmp_path / "a", 1.0))]
    table = curve_table(runs)
    assert table[["n_train", "block"]].to_numpy().tolist() == [[40, "oof"], [80, "oof"]]
    assert table["total"].is_monotonic_decreasing and (table["low"] < table["high"]).all()


def test_what_wrong_labels_cost_is_told_against_the_run_that_learnt_from_them(tmp_path: Path) -> None:
    suspects = {"planted": 40, "listed": 50, "precision": 0.6, "recall": 0.75, "precision_at_half": 0.7}
    runs = {"demo": 2.0, "wrong": 1.0, "left_out": 1.5}
    base, wrong, left_out = (add_test_studies(write_run(tmp_path / name, sharp)) for name, sharp in runs.items())
    scores = json.loads((wrong / "scores.json").read_text())
    scores["oof"]["suspects"] = suspects
    (wrong / "scores.json").write_text(json.dumps(scores))
    table = noise_table(base, wrong, left_out)
    assert table["labels"].tolist() == ["as read", "with wrong labels", "with wrong labels, suspects kept out"]
    assert table["better_by"].isna().tolist() == [False, True, False]
    assert table.loc[0, "better_by"] > table.loc[2, "better_by"] > 0
    assert (table["low"] <= table["better_by"])[[0, 2]].all() and (table["better_by"] <= table["high"])[[0, 2]].all()
    assert table.loc[1, list(suspects)].to_dict() == suspects and table.loc[0, list(suspects)].isna().all()


def test_every_ablation_changes_parameters_that_there_are() -> None:
    parameters = runner.load_parameters("demo")
    ablations = read_ablations()
    assert len({ablation.name for ablation in ablations}) == len(ablations) >= 8
    for ablation in ablations:
        changed = runner._changed(parameters, ablation.change)
        assert changed != parameters, f"{ablation.name} takes nothing away"
        assert ablation.without and ablation.name.replace("_", "").isalnum()


def test_an_ablation_may_change_one_condition_alone() -> None:
    parameters = {"epochs": {"nfn": 1, "scs": 2, "ss": 3}, "rate": 0.5}
    assert runner._changed(parameters, {"epochs": {"scs": 9}})["epochs"] == {"nfn": 1, "scs": 9, "ss": 3}
    with pytest.raises(runner.UsageError, match="unknown parameter 'speed'"):
        runner._changed(parameters, {"speed": 1})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablate", "--run", "never"], "no such finished run"),
        (["curve", "--run", "never"], "no such finished run"),
        (["noise", "--run", "never"], "no such finished run"),
        (["noise", "1.5"], "expected a share of labels between 0 and 1"),
    ],
)
def test_experiments_need_a_finished_run(arguments: list[str], message: str, capsys) -> None:
    assert runner.main(arguments) == 2
    assert message in capsys.readouterr().err
