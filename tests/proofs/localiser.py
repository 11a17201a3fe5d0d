"""What random frames, random greys and varied spines bring: `python tests/proofs/localiser.py [--out DIR]`.

Localisers of one seed are trained for half the demo's batches on a small phantom: as they are, with slices in their own
frame, with the images' own greys, and on a phantom of spines that are alike. Each names the levels of phantoms that no
training draws. A level is right if the true canal point nearest to it in the sagittal plane is its own. Takes about
twenty minutes of processor time; --out keeps the localisers.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lsdc_utils.data import competition  # noqa: E402
from lsdc_utils.data.stacks import read_study  # noqa: E402
from lsdc_utils.detector import localiser, spine  # noqa: E402
from lsdc_utils.phantom import body, write_phantom  # noqa: E402
from lsdc_utils.vocabulary import PLANES, SPINAL_CANAL, T2  # noqa: E402

SEED, TRAIN, FAR, BATCHES, BATCH, RATE = 11, 100, 30, 1000, 16, 0.003
POPULATIONS = ("narrow", "grey", "steep")  # which training never draws
ALIKE = {"size": 1.0, "lordosis": 1.0, "pelvis": 0.0, "lumbar": 5, "transitional": False, "slip": 0.0, "scoliosis": 0.0}
LOCALISERS = {  # name -> the phantom it learns from, arguments of `augmented`
    "as it is": ("varied", {}),
    "own frames": ("varied", {"frames": 0.0}),
    "own greys": ("varied", {"greys": False}),
    "spines alike": ("alike", {}),
}


def write_alike(folder: Path) -> None:
    """Write the training phantom with one size, curve and number of vertebrae, and no collapsed disc."""
    drawn = body._draw_traits

    def alike(rng: np.random.Generator) -> dict[str, Any]:
        return drawn(rng) | ALIKE | {"collapsed": np.zeros(5, bool)}

    body._draw_traits = alike
    try:
        write_phantom(folder, TRAIN, 0, SEED)  # in this process
    finally:
        body._draw_traits = drawn


def studies(folder: Path, split: str) -> dict[int, list]:
    """The sagittal stacks of each study."""
    comp = competition.read(folder)
    ids = sorted(comp.series.loc[comp.series["split"] == split, "study_id"].unique())
    stacks = {study: read_study(comp, split, study)[0] for study in ids}
    return {study: [one for one in own if PLANES[one.series_type] == "sagittal"] for study, own in stacks.items()}


def canal_of(folder: Path) -> pd.DataFrame:
    """True canal points of each series."""
    anatomy = pd.read_csv(folder / "anatomy.csv")
    return anatomy[anatomy["condition"] == SPINAL_CANAL]


def training_slices(folder: Path) -> list[list[localiser.Sample]]:
    """The slices of each study to learn from."""
    canal, marks = canal_of(folder), pd.read_csv(folder / "train_marks.csv")
    slices = []
    for stacks in studies(folder, "train").values():
        own = [(stack, canal[canal["series_id"] == stack.series_id]) for stack in stacks]
        parts = (localiser.samples(stack, points, marks[marks["series_id"] == stack.series_id])
                 for stack, points in own if len(points) > 1)  # fmt: skip
        slices.append([sample for part in parts for sample in part])
    return [own for own in slices if own]


def train(slices: list[list[localiser.Sample]], **settings: Any) -> localiser.Localiser:
    """A localiser, trained as in notebook 03, from true points."""
    torch.manual_seed(SEED)
    network = localiser.Localiser(localiser.LocaliserConfig()).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=BATCHES, pct_start=0.1)
    for step in range(BATCHES):
        rng = np.random.default_rng([SEED, step])
        chosen = [slices[study] for study in rng.integers(len(slices), size=BATCH)]
        drawn = [localiser.augmented(own[rng.integers(len(own))], rng, **settings) for own in chosen]
        images, maps, weights = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
        loss = localiser.loss(network(images[:, None].contiguous(memory_format=torch.channels_last)), maps, weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def judge(network: localiser.Localiser, stacks: dict[int, list], canal: pd.DataFrame) -> pd.DataFrame:
    """A line for each true level of the studies: study_id, right."""
    lines = []
    for study, own in stacks.items():
        own = sorted(own, key=lambda stack: stack.series_type == T2)  # the points are those of T2, if there is one
        truth = canal[canal["series_id"] == own[-1].series_id].set_index("level")[["Y", "Z"]]
        found = spine.canal_points([spine.find_discs(network, own)], study).set_index("level")[["Y", "Z"]]
        for level, place in found.reindex(truth.index).iterrows():
            off = np.linalg.norm(truth - place, axis=1)
            right = np.isfinite(off).all() and truth.index[off.argmin()] == level
            lines.append((study, right))
    return pd.DataFrame(lines, columns=["study_id", "right"])


def main(out: Path | None) -> pd.DataFrame:
    """Draw, train, judge and print."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_phantom(root / "varied", TRAIN, 0, SEED, workers=2)
        write_alike(root / "alike")
        slices = {name: training_slices(root / name) for name in ("varied", "alike")}
        for name in POPULATIONS:
            write_phantom(root / name, 0, FAR, SEED + 1, workers=2, population=name)
        far = {name: (studies(root / name, "test"), canal_of(root / name)) for name in POPULATIONS}
        for name, (learnt, settings) in LOCALISERS.items():
            network = train(slices[learnt], **settings)
            if out:
                out.mkdir(parents=True, exist_ok=True)
                localiser.save_localiser(network, out / f"{name.replace(' ', '_')}.safetensors", 0, {"seed": SEED})
            row = {"localiser": name}
            for population, (stacks, canal) in far.items():
                judged = judge(network, stacks, canal)
                row |= {f"{population}: levels": judged["right"].mean()}
                row |= {f"{population}: studies": judged.groupby("study_id")["right"].all().mean()}
            rows.append(row)
            print(pd.DataFrame([row]).round(3).to_string(index=False), flush=True)
    table = pd.DataFrame(rows)
    print(f"\n{table.round(3).to_string(index=False)}")
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="keep the localisers in this folder")
    main(parser.parse_args().out)
