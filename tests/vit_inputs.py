"""Small networks and inputs that the tests of the transformer share, and the training loop of notebook 04."""

from __future__ import annotations

import linecache
from pathlib import Path
from typing import Any

import nbformat
import numpy as np

from lsdc_utils.vit.augment import Augmentation
from lsdc_utils.vit.crops import SLOTS
from lsdc_utils.vit.model import VitConfig
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVELS, parse_row_id

SMALL = VitConfig(size=8, spacing=(2.0, 2.0, 2.0), margin=1, slices=2, channels=(8, 16), width=32, heads=2)

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "04_train_vit3d.ipynb"
LOOP = ("batches", "loss", "optimizer", "loop", "epochs", "resume", "fit")  # cells from the batches to the weights
Studies = tuple[np.ndarray, np.ndarray]  # inputs, and labels (n, 25)


def train(
    folder: Path,
    studies: Studies,
    config: VitConfig = SMALL,
    held_out: Studies | None = None,
    change: tuple[str, str] = ("", ""),
    strength: Augmentation | None = None,
    targets: np.ndarray | None = None,
    **parameters: Any,
) -> dict[str, Any]:
    """Run the cells of notebook 04 that train a network on studies; the names that they leave, such as model, curves.

    change: a text in these cells and what it becomes. strength: of the augmentation. targets: (n, 25, 3), if not the
    labels. parameters: of the notebook.
    """
    cells = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
    names = run_cells(folder, "config", **{"vit_batch": 4, **parameters})
    names["config"] = config
    (inputs, truth), (held_inputs, held_truth) = studies, held_out or studies
    names |= {"strength": strength or names["Augmentation"](), "inputs": inputs, "truth": truth}
    names["targets"] = names["target_matrix"](truth) if targets is None else targets
    names |= {"held_inputs": held_inputs, "held_truth": held_truth, "train_ids": range(len(inputs))}
    assert any(change[0] in cells[cell] for cell in ("model", *LOOP))
    for cell in ("model", *LOOP):
        _run(cells[cell].replace(*change) if change[0] else cells[cell], names)
    return names


def run_cells(folder: Path, *cells: str, **parameters: Any) -> dict[str, Any]:
    """Run the imports of notebook 04 and some of its cells with these parameters; the names that they leave."""
    code = {cell.id: cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells}
    names: dict[str, Any] = {}
    _run(code["parameters"], names)
    names |= {"run_dir": str(folder), **parameters}
    for cell in ("imports", *cells):
        _run(code[cell], names)
    return names


def _run(source: str, names: dict[str, Any]) -> None:
    """Run a cell as a kernel does, which keeps its text where `inspect` finds it."""
    file = f"<cell {hash(source)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    exec(compile(source, file, "exec"), names)


def records(images: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What `study_inputs` gives for images (n, 5, slots * k, h, w) and places (n, 5, slots * k)."""
    kinds = [("images", np.uint8, images.shape[1:]), ("places", np.float32, places.shape[1:])]
    result = np.zeros(len(images), dtype=kinds)
    result["images"], result["places"] = images, places
    return result


def draw_inputs(n: int, rng: np.random.Generator, config: VitConfig = SMALL) -> np.ndarray:
    """Squares of noise, their slices 4 mm apart about where each slot looks."""
    side, count = config.size + 2 * config.margin, len(config.slots)
    images = rng.integers(20, 60, (n, 5, count, side, side)).astype(np.uint8)
    places = np.concatenate([np.tile(4.0 * np.arange(k) - 1.0, len(SLOTS)) for _, k in config.scales])
    return records(images, np.broadcast_to(places, (n, 5, count)))


def draw_studies(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs of n studies with a bright square on one series a condition group, and labels (n, 25).

    The more severe, the smaller the square.
    """
    rng = np.random.default_rng(seed)
    labels = rng.choice(3, (n, len(COLUMNS)), p=[0.6, 0.25, 0.15]).astype(np.int8)
    inputs = draw_inputs(n, rng)
    slots = {("scs", None): 0, ("nfn", "left"): 1, ("nfn", "right"): 2, ("ss", "left"): 3, ("ss", "right"): 4}
    for column, name in enumerate(COLUMNS):
        _, condition, level = parse_row_id(f"1_{name}")
        slot = slots[CONDITIONS[condition].group, CONDITIONS[condition].side]
        for study in range(n):
            edge = (6, 4, 2)[labels[study, column]]
            target = inputs["images"][study, LEVELS.index(level), SMALL.slices * slot : SMALL.slices * (slot + 1)]
            target[:, 2 : 2 + edge, 2 : 2 + edge] = 200
    return inputs, labels
