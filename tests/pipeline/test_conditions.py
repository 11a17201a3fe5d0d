"""A folder with sagittal T1 and foraminal labels alone goes to a scored report, with its points and without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT, copy_project, run_all
from one_group import write_one_group

from lsdc_utils.metric import MEAN
from lsdc_utils.vocabulary import FORAMINAL

SMALL = ("--profile", "smoke", "--cores", "2", "localiser_batches=20")


def check_run(run: Path) -> pd.DataFrame:
    """What both runs have in common; returns the findings of their trainings."""
    scores = json.loads((run / "scores.json").read_text())
    for block in scores.values():
        assert block["groups"] == ["nfn"]
        for parts in block["scores"].values():
            assert parts["total"] is None is parts["any_severe"] and parts[MEAN] == parts["foraminal"] > 0
    sources = pd.read_parquet(run / "predictions/sources_test.parquet")
    foraminal = sources["row_id"].str.contains(FORAMINAL)
    assert (sources.loc[~foraminal, "source"] == "prior").all() and (sources.loc[foraminal, "source"] != "prior").any()
    findings = pd.read_parquet(run / "predictions/findings_test.parquet")
    assert (findings["rule"] == "condition_not_trained").sum() == 1
    assert sorted(file.name for file in (run / "weights").glob("yolo*.pt")) == [
        "yolo_nfn_fold0.pt",
        "yolo_nfn_fold1.pt",
    ]
    page = (run / "report/index.html").read_text()
    assert "mean of groups (foraminal)" in page and "Mean of groups" in page
    assert "Not trained: spinal, subarticular" in (run / "report/limits.html").read_text()
    return pd.read_csv(run / "tables/training_findings.csv")


@pytest.mark.slow
def test_a_folder_of_one_series_type_and_one_condition_is_trained_and_scored(tmp_path: Path) -> None:
    project, data = copy_project(tmp_path / "project"), write_one_group(tmp_path / "data", 8, 2)
    shutil.copytree(ROOT / "outputs/pretrained", project / "outputs/pretrained")
    done = run_all(project, *SMALL, "--run", "own", "--data", str(data), timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no stress tests" in done.stdout and "mean of groups" in done.stdout
    assert check_run(project / "outputs/own").empty
    predicted = run_all(project, "predict", str(data / "test_images"), "--run", "own", "--no-pages")
    assert predicted.returncode == 0, predicted.stdout + predicted.stderr
    grades = pd.read_csv(project / "outputs/own/predict/test_images/grades.csv")
    assert (grades.loc[~grades["condition"].str.contains(FORAMINAL), "source"] == "prior").all() and len(grades) == 50
    packed = run_all(project, "pack", "--run", "own")
    assert packed.returncode == 0, packed.stdout + packed.stderr

    (data / "train_label_coordinates.csv").unlink()
    done = run_all(project, *SMALL, "--run", "bare", "--data", str(data), timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    run = project / "outputs/bare"
    taken = check_run(run)
    assert taken["value"].iloc[0] == "localiser and yolo" and set(taken["rule"][1:]) <= {"levels_uncertain"}
    for name in ("localiser", "yolo_nfn"):
        about = json.loads((run / f"weights/{name}_fold1.json").read_text())
        assert (about["taken_from"], about["basis"], about["fold"]) == ("pretrained", "phantom_only", 1)
    trained = json.loads((run / "weights/vit3d_fold0.json").read_text())["studies"]
    assert trained and not set(trained) & set(taken["study_id"])
