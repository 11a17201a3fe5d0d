"""Folds: alike, reproducible, or read from a published table."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from data_folders import write_tables

from lsdc_utils import vocabulary as words
from lsdc_utils.data import competition
from lsdc_utils.data.competition import CompetitionError
from lsdc_utils.data.folds import hold_out, make_folds, read_folds, training_labels


def test_folds_are_alike_and_the_same_again(tmp_path: Path) -> None:
    write_tables(tmp_path, n_train=101)
    labels = competition.read(tmp_path).labels
    folds = make_folds(labels, 4, seed=52)
    assert folds.study_id.tolist() == sorted(labels.study_id.unique())
    assert folds.fold.value_counts().between(25, 26).all()
    shuffled = labels.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(folds, make_folds(shuffled, 4, seed=52))
    assert not folds.fold.equals(make_folds(labels, 4, seed=53).fold)
    joined = labels.merge(folds, on="study_id").assign(
        group=lambda t: t.condition.map({c.name: c.group for c in words.CONDITIONS.values()})
    )
    severe = joined[joined.severity == 2].groupby(["group", "fold"]).size().unstack()
    assert (severe.max(axis=1) - severe.min(axis=1)).max() <= 4
    spinal = joined[(joined.group == "scs") & (joined.severity == 2)]
    any_severe = spinal.groupby("fold").study_id.nunique()
    assert any_severe.max() - any_severe.min() <= 3
    with pytest.raises(CompetitionError, match="into 102 folds"):
        make_folds(labels, 102, seed=52)


def test_studies_of_a_patient_are_in_one_fold_and_folds_stay_alike(tmp_path: Path) -> None:
    write_tables(tmp_path, n_train=60)
    labels = competition.read(tmp_path).labels
    studies = sorted(labels.study_id.unique())
    each_own = labels.assign(patient=labels.study_id.map(dict(zip(studies, range(60), strict=True))))
    pd.testing.assert_frame_equal(make_folds(each_own, 3, seed=52), make_folds(labels, 3, seed=52))
    pairs = labels.assign(patient=labels.study_id.map({study: k % 30 for k, study in enumerate(studies)}))
    folds = make_folds(pairs, 3, seed=52).set_index("study_id").fold
    assert folds.index.tolist() == studies
    assert folds[studies[:30]].tolist() == folds[studies[30:]].tolist()
    assert folds.value_counts().tolist() == [20, 20, 20]
    inner = [set(hold_out(pairs.assign(fold=1, train_on=True), 0, k, 2, seed=1)[1].patient) for k in (0, 1)]
    assert inner[0] and inner[1] and not inner[0] & inner[1]
    with pytest.raises(CompetitionError, match=r"studies of the patients \(30\) into 31 folds"):
        make_folds(pairs, 31, seed=52)


def test_published_folds(tmp_path: Path) -> None:
    file = tmp_path / "folds.csv"
    pd.DataFrame({"study_id": [1, 1, 2], "fold": [0, 0, 1], "other": "x"}).to_csv(file, index=False)
    assert read_folds(file).to_dict("list") == {"study_id": [1, 2], "fold": [0, 1]}
    pd.DataFrame({"study_id": [1, 1], "fold": [0, 1]}).to_csv(file, index=False)
    with pytest.raises(CompetitionError, match="study 1 is in more than one fold"):
        read_folds(file)
    with pytest.raises(CompetitionError, match="no such file"):
        read_folds(tmp_path / "none.csv")


def test_rows_that_are_not_trained_on_have_no_grade_in_training_and_keep_it_held_out(tmp_path: Path) -> None:
    write_tables(tmp_path, n_train=12)
    labels = competition.read(tmp_path).labels
    labels = labels.merge(make_folds(labels, 3, seed=52), on="study_id")
    first, (second, third) = labels.study_id[labels.fold == 0].iloc[0], labels.study_id[labels.fold == 1].unique()[:2]
    foramina = labels.condition.map(words.GROUP_OF) == "nfn"
    labels["train_on"] = ~labels.study_id.isin([first, second]) & ~((labels.study_id == third) & foramina)
    assert set(labels.study_id) - set(training_labels(labels).study_id) == {first, second}
    train, held = hold_out(labels, 0, inner=-1, n_inner=2, seed=1)
    pd.testing.assert_frame_equal(held, labels[labels.fold == 0])  # the first study too, with its grades
    assert set(train.study_id) == set(labels.study_id[labels.fold != 0]) - {second}
    own = train[train.study_id == third]
    assert (own.severity[foramina] == words.MISSING).all()
    assert (own.severity[~foramina] == labels.loc[own.index, "severity"][~foramina]).all()
    parts = [hold_out(labels, 0, inner=k, n_inner=2, seed=1) for k in (0, 1)]
    assert all(second not in set(train.study_id) for train, _ in parts)
    assert sum(second in set(held.study_id) for _, held in parts) == 1


def test_02_keeps_a_patient_in_one_fold(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_tables(tmp_path / "data", n_train=8)
    studies = sorted(competition.read(tmp_path / "data").labels.study_id.unique().tolist())
    patients = pd.DataFrame({"study_id": studies, "patient": [k // 2 for k in range(8)]})
    patients.to_csv(tmp_path / "data/patients.csv", index=False)
    cells = json.loads((ROOT / "notebooks/02_convert_labels.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][:4]
    names = {}
    exec(code[0], names)
    names |= {"run_dir": str(tmp_path / "run"), "data_dir": str(tmp_path / "data")}
    names["points_from"] = str(ROOT / "outputs/pretrained")  # these studies have no images
    exec("\n".join(code[1:]), names)
    fold_of = names["labels"].groupby("study_id")["fold"].first()
    assert fold_of[studies[::2]].tolist() == fold_of[studies[1::2]].tolist() and set(fold_of) == {0, 1}
    assert "8 studies of 4 patients\n" in capsys.readouterr().out
    names |= {"folds_csv": str(tmp_path / "folds.csv")}
    for folds, fault in (
        ([0, 1] * 4, f"4 patients are in several folds, e.g. studies {studies[0]}, {studies[1]};"),
        ([0, 0, 1, 1, 2, 2, 3, 3], "fold 2: with n_splits=2, folds are 0 to 1, and each has a study"),
        ([0] * 8, "fold 1: with n_splits=2"),
    ):
        pd.DataFrame({"study_id": studies, "fold": folds}).to_csv(tmp_path / "folds.csv", index=False)
        with pytest.raises(competition.CompetitionError, match=f"folds.csv: {fault}"):
            exec("\n".join(code[1:]), names)
