"""Folds of a label table: cut so that they are alike, or read from a published table."""

from pathlib import Path

import numpy as np
import pandas as pd

from lsdc_utils import vocabulary as words
from lsdc_utils.data.competition import CompetitionError, read_required_table


def make_folds(labels: pd.DataFrame, n_splits: int, seed: int) -> pd.DataFrame:
    """Cut the studies of a label table into folds: study_id, fold (0 .. n_splits - 1), whatever the order of its rows.
    Studies of one patient (column `patient`, if there is one) are in the same fold.

    Folds are alike in any-severe canal and in the counts of moderate and severe grades of each condition group: the
    most diseased patients come first and go where least of what they have is. CompetitionError if they are too few.
    """
    people = labels.groupby("study_id")["patient" if "patient" in labels else "study_id"].first()
    group = labels.condition.map(words.GROUP_OF)
    counts = pd.crosstab(labels.study_id.map(people), [group, labels.severity])
    counts = counts.reindex(columns=pd.MultiIndex.from_product([words.GROUPS, (1, 2)]), fill_value=0).astype(float)
    if not 2 <= n_splits <= len(counts):
        who = "the studies" if len(counts) == len(people) else "the studies of the patients"
        raise CompetitionError(f"cannot cut {who} ({len(counts)}) into {n_splits} folds")
    counts["any_severe", ""] = (counts["scs", 2] > 0).astype(float)
    share = (counts / counts.sum().clip(lower=1)).to_numpy()  # each patient's share of the total of each trait
    order = np.random.default_rng(seed).permutation(len(share))
    order = order[np.argsort(-share[order].sum(axis=1), kind="stable")]
    fold = np.zeros(len(share), dtype="int64")
    held = np.zeros((n_splits, share.shape[1]))
    for start in range(0, len(order), n_splits):
        free = list(range(n_splits))
        for i in order[start : start + n_splits]:
            fold[i] = min(free, key=lambda k: (held[k] @ share[i], held[k].sum()))
            held[fold[i]] += share[i]
            free.remove(fold[i])
    return people.map(dict(zip(counts.index, fold, strict=True))).astype("int64").rename("fold").reset_index()


def training_labels(labels: pd.DataFrame) -> pd.DataFrame:
    """The label table as a training sees it: rows that are not trained on (column `train_on`) have no grade, and
    studies without any other row are left out. Out of fold these rows are graded and scored like all others."""
    graded = labels.assign(severity=labels["severity"].where(labels["train_on"], words.MISSING))
    return graded[labels.groupby("study_id")["train_on"].transform("any")]


def hold_out(labels: pd.DataFrame, fold: int, inner: int, n_inner: int, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The label table (with fold) of the studies to train on (`training_labels`), and of those held out: a fold, or, if
    `inner` is not negative, one of `n_inner` parts of the other folds' studies; the fold is in neither table then."""
    held = labels["fold"] == fold
    if inner >= 0:
        labels = labels[~held]
        held = labels["study_id"].map(make_folds(labels, n_inner, seed).set_index("study_id")["fold"]) == inner
    return training_labels(labels[~held]), labels[held]


def read_folds(file: str | Path) -> pd.DataFrame:
    """study_id and fold from a csv with these columns, one or more lines per study; CompetitionError if they differ."""
    folds = read_required_table(Path(file), ["study_id", "fold"], ["study_id", "fold"]).drop_duplicates()
    if (twice := folds.study_id[folds.study_id.duplicated()]).any():
        raise CompetitionError(f"{file}: study {twice.iloc[0]} is in more than one fold")
    return folds.reset_index(drop=True)
