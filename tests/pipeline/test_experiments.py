"""Copies of a run, and the tables of what was tried on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from lsdc_utils import metric
from lsdc_utils.pipeline import arguments, commands, experiments
from lsdc_utils.pipeline.experiments import ABLATIONS, SCORES, ablation_table, copy_run, curve_table, refined_table
from lsdc_utils.pipeline.parameters import changed, load_parameters
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVELS, row_id


def write_run(folder: Path, sharpness: float, studies: range = range(1, 31), groups: tuple = tuple(GROUPS)) -> Path:
    """A run whose ensemble is right with odds of exp(sharpness), with what the tables are made from."""
    rng = np.random.default_rng(5)
    labels = pd.DataFrame(
        [(row_id(s, c, level), s, c, level, s % 2) for s in studies for c in CONDITIONS for level in LEVELS],
        columns=["row_id", "study_id", "condition", "level", "fold"],
    )
    labels["severity"] = rng.choice([-1, 0, 1, 2], size=len(labels), p=[0.05, 0.65, 0.2, 0.1])
    labels = metric.only_groups(labels, groups)
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
    others = ["evaluation.json", "evaluation/x/about.json", "exports/7/sr.dcm", "kaggle/dataset/x.json", "demo.zip",
              "provenance.json", "localisation.csv", "suspect_labels.csv", "stress/numbers.json",
              "notebooks/06_evaluation.ipynb", "logs/08_report.log"]  # fmt: skip
    for name in (*others, "notebooks/05_ensemble_inference.ipynb"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("of the run")
    copy_run(base, tmp_path / "demo-x")
    assert not [name for name in others if (tmp_path / "demo-x" / name).exists()]
    assert (tmp_path / "demo-x/notebooks/05_ensemble_inference.ipynb").is_file()
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


def test_of_a_run_with_one_condition_the_mean_of_its_groups_is_compared(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, k, groups=("nfn",)) for name, k in (("demo", 2), ("worse", 1))]
    table = ablation_table(folders[0], {folders[1]: "half of it"}).set_index("name")
    assert table["total"].isna().all() and table["mean_of_groups"].equals(table["foraminal"])
    assert table.loc["worse", "worse_by"] == pytest.approx(np.diff(table["foraminal"]).item())
    curve = curve_table({30: folders[0]})
    assert curve["low"].item() < curve["mean_of_groups"].item() < curve["high"].item()


def test_the_increase_is_resampled_by_patient(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, k) for name, k in (("demo", 2), ("worse", 1))]
    alone = ablation_table(folders[0], {folders[1]: ""}).set_index("name").loc["worse"]
    for folder in folders:
        labels = pd.read_parquet(folder / "tables/labels.parquet")
        labels.assign(patient=labels["study_id"] // 3).to_parquet(folder / "tables/labels.parquet")
    pairs = ablation_table(folders[0], {folders[1]: ""}).set_index("name").loc["worse"]
    assert pairs["worse_by"] == alone["worse_by"] and (pairs["low"], pairs["high"]) != (alone["low"], alone["high"])
    assert np.isfinite(pairs[["low", "high"]].astype(float)).all()


def test_runs_on_other_studies_are_not_compared(tmp_path: Path) -> None:
    base, other = write_run(tmp_path / "demo", 2.0), write_run(tmp_path / "other", 2.0, range(2, 32))
    with pytest.raises(ValueError, match=r"other.*different studies"):
        ablation_table(base, {other: ""})


def test_the_curve_lists_runs_by_size_and_block(tmp_path: Path) -> None:
    runs = {80: write_run(tmp_path / "b", 2.0), 40: write_run(tmp_path / "a", 1.0)}
    table = curve_table(runs)
    assert table[["n_train", "block"]].to_numpy().tolist() == [[40, "oof"], [80, "oof"]]
    assert table["total"].is_monotonic_decreasing and (table["low"] < table["high"]).all()


def test_what_refinement_adds_has_a_paired_interval_in_each_block_with_labels(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, sharpness) for name, sharpness in (("demo", 1.0), ("demo-refined", 2.0))]
    labels = pd.read_parquet(runs[0] / "tables/labels.parquet")
    (tmp_path / "data").mkdir()
    metric.solution_of(labels).to_csv(tmp_path / "data/solution.csv", index=False)
    for run in runs:
        rows = pd.read_parquet(run / "predictions/ensemble_oof.parquet")
        (run / "data.json").write_text(json.dumps({"data_dir": "../data"}))
        known = {"conditions": ["nfn", "scs", "ss"]} if run == runs[1] else {}  # older code wrote none
        (run / "blend.json").write_text(json.dumps(known))
        block = metric.score_block(metric.solution_of(labels), {"vit3d": rows, "ensemble": rows})
        (run / "scores.json").write_text(json.dumps({"oof": block, "test": block}))
        for name in ("vit3d_oof", "vit3d_test", "ensemble_test"):
            rows.to_parquet(run / f"predictions/{name}.parquet")
    table = refined_table(*runs)
    assert table[["block", "model"]].to_numpy().tolist() == [
        ["oof", "vit3d"], ["oof", "ensemble"], ["test", "vit3d"], ["test", "ensemble"]
    ]  # fmt: skip
    np.testing.assert_allclose(table["added"], table["refined"] - table["unrefined"], atol=1e-9)
    assert (
        (table["low"] < table["added"]).all() and (table["added"] < table["high"]).all() and (table["high"] < 0).all()
    )
    for run in runs:
        scores = json.loads((run / "scores.json").read_text())
        (run / "scores.json").write_text(json.dumps(scores | {"test": None}))
    assert refined_table(*runs)["block"].tolist() == ["oof", "oof"]


def test_a_run_is_refined_once_as_a_copy_that_softens_labels(tmp_path: Path, monkeypatch, capsys) -> None:
    base, started = write_run(tmp_path / "demo", 1.0), []
    monkeypatch.setattr(experiments, "work", lambda run: started.append(run) or 7 * (run.folder != base))
    assert experiments.run_refined(base, 2) == 7
    first, run = started
    assert first.folder == base and first.until == SCORES  # what is compared is by the same code
    assert run.folder == tmp_path / "demo-refined" and run.until is None
    assert run.resume == "./run_all.sh refine --run demo" and (run.folder / "submission.csv").is_file()
    changes = {key: value for key, value in run.parameters.items() if value != load_parameters("demo")[key]}
    assert changes == {"vit_soften": 0.5, "blend_of": "demo"}
    (base / "parameters.yml").write_text(yaml.safe_dump(run.parameters))
    with pytest.raises(experiments.UsageError, match="--run demo: its labels are softened already"):
        experiments.run_refined(base, 2)


def test_a_run_is_brought_up_to_date_before_its_ablations_are_copied(tmp_path: Path, monkeypatch) -> None:
    base, started = write_run(tmp_path / "demo", 1.0), []
    (base / "parameters.yml").write_text(yaml.safe_dump(load_parameters("demo")))

    def renew(run) -> int:
        started.append(run.folder.name)
        (base / "submission.csv").write_text("by the present code")
        return 7 * (run.folder != base)

    monkeypatch.setattr(experiments, "work", renew)
    name = next(iter(yaml.safe_load(ABLATIONS.read_text())))
    assert experiments.run_ablations(base, [name], 1) == 7 and started == ["demo", f"demo-{name}"]
    assert (tmp_path / f"demo-{name}/submission.csv").read_text() == "by the present code"


def test_a_run_by_older_code_is_repeated_with_the_demo_s_other_parameters(tmp_path: Path, monkeypatch) -> None:
    base, started = write_run(tmp_path / "demo", 1.0), []
    older = load_parameters("demo", ["vit_epochs=9"]) | {"no_more": 1}
    del older["vit_slice_epochs"]
    (base / "parameters.yml").write_text(yaml.safe_dump(older))
    monkeypatch.setattr(experiments, "work", lambda run: started.append(run) or 0)
    assert experiments.run_curve(base, [160], 1) == 0
    first, report = started
    assert first.parameters == report.parameters == load_parameters("demo", ["vit_epochs=9"])
    assert report.until is None and report.resume == "./run_all.sh curve 160 --run demo"  # not a run of a profile
    (base / "parameters.yml").write_text(yaml.safe_dump(older | {"blend_of": "first"}))
    with pytest.raises(experiments.UsageError, match="its blend is of other rows; repeat --run first"):
        experiments.run_curve(base, [40], 1)


def test_every_ablation_changes_parameters_that_there_are() -> None:
    parameters = load_parameters("demo")
    ablations = yaml.safe_load(ABLATIONS.read_text())
    assert len(ablations) >= 8
    for name, ablation in ablations.items():
        assert changed(parameters, ablation["change"]) != parameters, f"{name} removes nothing"
        assert ablation["without"] and name.replace("_", "").isalnum()


@pytest.mark.parametrize("command", ["ablate", "curve", "refine"])
def test_experiments_need_a_finished_run(command: str, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        commands.main([command, "--run", "never"])
    assert ended.value.code == 2
    assert "no such finished run" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["ablate", "curve", "refine"])
def test_experiments_do_not_repeat_ready_made_models_or_a_run_without_parameters(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for module in (commands, arguments):
        monkeypatch.setattr(module, "OUTPUTS", tmp_path)
    write_run(tmp_path / arguments.READY, 1.0)
    (write_run(tmp_path / "by_hand", 1.0) / "parameters.yml").unlink()
    for name in (arguments.READY, "by_hand"):
        assert commands.main([command, "--run", name]) == 2
        said = capsys.readouterr().err
        assert said == f"run_all.sh: --run {name}: was not made here by ./run_all.sh, and so cannot be repeated\n"
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["by_hand", arguments.READY]
