"""Data folders that lack what the competition's have: series types, label columns, points."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from lsdc_utils.phantom import write_phantom
from lsdc_utils.vocabulary import GROUP_OF, GROUPS, T1

FEW = 4  # slices that are left of a series


def write_one_group(folder: Path, n_train: int, n_test: int, seed: int = 7) -> Path:
    """A phantom's sagittal T1 with labels of the foramina alone, `FEW` slices a series, no marks of other discs."""
    write_phantom(folder, n_train, n_test, seed)
    for split in ("train", "test"):
        table = pd.read_csv(folder / f"{split}_series_descriptions.csv")
        others = table[table["series_description"] != T1]
        for study, series in others[["study_id", "series_id"]].to_numpy():
            shutil.rmtree(folder / f"{split}_images/{study}/{series}")
        table.drop(others.index).to_csv(folder / f"{split}_series_descriptions.csv", index=False)
    train = pd.read_csv(folder / "train.csv")
    foraminal = [name for name in train if any(name.startswith(c) for c, key in GROUP_OF.items() if key == "nfn")]
    train[["study_id", *foraminal]].join(
        pd.DataFrame("", train.index, [name for name in train if name not in ("study_id", *foraminal)])
    ).to_csv(folder / "train.csv", index=False)
    points = pd.read_csv(folder / "train_label_coordinates.csv")
    points = points[points["condition"].str.contains("Foraminal")]
    sides = points["condition"].str.split().str[0]
    usual = points.groupby(["series_id", sides])["instance_number"].agg(lambda numbers: numbers.mode()[0])
    points["instance_number"] = [usual[key] for key in zip(points["series_id"], sides, strict=True)]
    points.to_csv(folder / "train_label_coordinates.csv", index=False)
    for series in (folder / "train_images").glob("*/*"):
        keep(series, usual[int(series.name)].to_numpy())
    for series in (folder / "test_images").glob("*/*"):
        keep(series, np.quantile([int(file.stem) for file in series.glob("*.dcm")], [0.2, 0.8]).round())
    for name in ("train_marks", "oracle", "anatomy", "spines", "discs", "latents", "solution_coordinates"):
        (folder / f"{name}.csv").unlink(missing_ok=True)
    solution = pd.read_csv(folder / "solution.csv")
    solution[solution["row_id"].str.contains(GROUPS["nfn"].base)].to_csv(folder / "solution.csv", index=False)
    return folder


def keep(series: Path, ends: np.ndarray) -> None:
    """Delete all but `FEW` slices of a series, evenly spread between two instance numbers."""
    kept = set(np.linspace(min(ends), max(ends), FEW).round().astype(int).tolist())
    for file in series.glob("*.dcm"):
        if int(file.stem) not in kept:
            file.unlink()
