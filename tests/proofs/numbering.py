"""How well transitional vertebrae are found: `python tests/proofs/numbering.py CACHE [--models DIR] [--studies N]`.

Phantom studies that no model was trained on, all with and all without a transitional vertebra, are named by the
localiser of DIR (by default the ready-made one). Printed: how many get the finding `numbering_uncertain`, the area
under the ROC curve of the height of S1/S2 and of the localiser's map `transitional`, and how near the tip of the cord
is found. CACHE keeps the phantoms. Takes about five minutes of processor time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lsdc_utils.checkpoint import start_weights  # noqa: E402
from lsdc_utils.data import competition  # noqa: E402
from lsdc_utils.data.stacks import read_study  # noqa: E402
from lsdc_utils.detector.localiser import MAPS, load_localiser  # noqa: E402
from lsdc_utils.detector.numbering import DOUBTFUL, remnant  # noqa: E402
from lsdc_utils.detector.spine import canal_points, find_discs, name_discs  # noqa: E402
from lsdc_utils.metric import auc  # noqa: E402
from lsdc_utils.phantom import write_phantom  # noqa: E402

SEEDS = {"ordinary": 912, "transitional": 911}  # not those by which DOUBTFUL was chosen, nor the ready-made models'
NEAR = 12.0  # mm off a disc in which the localiser's map counts


def measure(folder: Path, models: Path) -> pd.DataFrame:
    """A line for each study: height, its finding, the disc of the remnant, the map's score, mm off the cord's tip."""
    network, comp, lines = load_localiser(start_weights(models, "localiser")), competition.read(folder), []
    marks = pd.read_csv(folder / "train_marks.csv")
    for study, own in marks.groupby("study_id"):
        seen = find_discs(network, stacks := read_study(comp, "train", study)[0])
        middles, x = name_discs(seen)[1][-2:], canal_points([seen], study)["X"].median()
        height, places = remnant(stacks, x, middles), own.groupby("mark")[[*"YZ"]].mean()
        has = "transitional" in places.index
        lower = has and np.hypot(*(places.loc["transitional"] - places.loc["s1_s2"])) < 5
        score = dict(zip(MAPS, seen.scores.T, strict=True))
        near = (np.linalg.norm(seen.points[:, None, 1:] - middles, axis=2) < NEAR).any(axis=1)
        lines.append({
            "study_id": study, "height": height, "finding": DOUBTFUL[0] < height < DOUBTFUL[1],
            "remnant": ("L5/S1", "S1/S2")[int(lower)] if has else "none",
            "map": score["transitional"][near].max(initial=0),
            "cord": abs(seen.points[score["conus"].argmax(), 2] - places.loc["conus", "Z"]),
        })  # fmt: skip
    return pd.DataFrame(lines)


def main(cache: Path, models: Path, studies: int) -> None:
    """Draw what CACHE lacks, measure and print."""
    torch.set_num_threads(1)
    tables = []
    for name, seed in SEEDS.items():
        folder = cache / f"{name}-{seed}-{studies}"
        if not folder.is_dir():
            write_phantom(folder, studies, 0, seed, workers=2, transitional=name == "transitional")
        tables.append(measure(folder, models).assign(drawn=name))
    table = pd.concat(tables, ignore_index=True)
    counts = table.groupby(["drawn", "remnant"])["finding"].agg(["sum", "size"])
    counts.columns = ["With the finding", "Studies"]
    print(counts.rename_axis(["Drawn", "Low disc at"]).to_csv(sep="\t"))
    drawn, low = (table["drawn"] == "transitional").to_numpy(), (table["remnant"] == "S1/S2").to_numpy()
    found = table["finding"].to_numpy()
    measures = {"Sensitivity": found[drawn].mean(), "Sensitivity, disc at S1/S2": found[low].mean()}
    measures["Specificity"] = 1 - found[~drawn].mean()
    for name, words in (("height", "height in the pixels"), ("map", "the localiser's map")):
        area = auc(low[low | ~drawn], table[name].fillna(0)[low | ~drawn].to_numpy())
        measures[f"Area under the ROC curve, disc at S1/S2: {words}"] = area
    measures["Tip of the cord within 10 mm"] = (table["cord"] <= 10).mean()
    print(pd.Series(measures, name="Share").rename_axis("Measure").to_csv(sep="\t", float_format="%.2f"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--models", type=Path, default=ROOT / "outputs/pretrained")
    parser.add_argument("--studies", type=int, default=100, help="of each kind")
    main(**vars(parser.parse_args()))
