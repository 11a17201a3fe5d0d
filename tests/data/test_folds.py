"""Folds: alike, reproducible, or read from a published table."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from data_folders import write_tables

from lsdc_utils import vocabulary as words
from lsdc_utils.data import competition
from lsdc_utils.data.competition import CompetitionError
from lsdc_utils.data.folds import make_folds, read_folds


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


def test_published_folds(tmp_path: Path) -> None:
    file = tmp_path / "folds.csv"
    pd.DataFrame({"study_id": [1, 1, 2], "fold": [0, 0, 1], "other": "x"}).to_csv(file, index=False)
    assert read_folds(file).to_dict("list") == {"study_id": [1, 2], "fold": [0, 1]}
    pd.DataFrame({"study_id": [1, 1], "fold": [0, 1]}).to_csv(file, index=False)
    with pytest.raises(CompetitionError, match="study 1 is in more than one fold"):
        read_folds(file)
    with pytest.raises(CompetitionError, match="no such file"):
        read_folds(tmp_path / "none.csv")
