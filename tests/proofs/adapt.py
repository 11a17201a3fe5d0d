"""Adaptation to another population, measured: `python tests/proofs/adapt.py CACHE [--run NAME] [--test N] [--train]`.

The models of a run grade new phantom studies: of the population that it was trained on, and of a second one, where a
severe narrowing is 1.5 times as frequent, the reader is more lenient, and the scanner has other fields, contrast,
pixels and noise. The blend is fitted to 20, 50 and 100 of the first 100 studies of a population, five draws each (100:
all of them), and scored on the others. CACHE keeps what is graded, in blocks, so that the proof resumes.

--train: the run's models are also trained further, as by `adapt --train`, on the first draw of 50 studies of the second
population, and models like them from scratch. Both are runs in outputs/, scored on the same test studies.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.optimize import brentq
from scipy.special import ndtr, ndtri

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from chain import MISSED  # noqa: E402

from lsdc_utils import metric  # noqa: E402
from lsdc_utils.data import competition  # noqa: E402
from lsdc_utils.files import atomic, sha256  # noqa: E402
from lsdc_utils.grading import adapt, grade  # noqa: E402
from lsdc_utils.grading.run_tables import read_recipe  # noqa: E402
from lsdc_utils.phantom import labels, write_phantom  # noqa: E402
from lsdc_utils.pipeline import adapt as training  # noqa: E402
from lsdc_utils.pipeline import labelled  # noqa: E402
from lsdc_utils.pipeline.arguments import OUTPUTS  # noqa: E402
from lsdc_utils.pipeline.graph import read_parameters  # noqa: E402
from lsdc_utils.pipeline.parameters import resolve_conditions  # noqa: E402
from lsdc_utils.pipeline.run import Run, locked, work  # noqa: E402
from lsdc_utils.vocabulary import MISSING, row_id  # noqa: E402

BLOCK = 20  # studies that are drawn, graded and forgotten together
SCANNER = {"stir": 1.0, "population": "close", "pixel": 1.3, "noise": 2.0}
SEVERE, LENIENT = 1.5, 0.06  # factor of severe narrowing's prevalence; added to the reader's cut-offs
SEEDS = {"first": 77_000, "second": 78_000}  # of the first block; training draws neither
LABELLED, SIZES, DRAWS = 100, (20, 50, 100), 5
TRAINED = 50  # studies of --train
OWN = ("epochs", "batches", "rate", "lr")  # last words of parameters that further training has its own of
BETTER, WORSE = 0.05, -0.005  # bars: gain at 50 studies of the second population, and of any draw


def narrowing_of(name: str, seed: int) -> np.ndarray:
    """Narrowings (BLOCK, 25) of a population; of the second, shifted so that severe is `SEVERE` times as frequent."""
    drawn = labels.draw_grades(BLOCK, [seed, 0]).narrowing
    if name == "first":
        return drawn
    drawn_many = labels.draw_grades(4000, [1, 0]).narrowing
    many, shifted = (ndtri(narrowings.clip(1e-6, 1 - 1e-6)) for narrowings in (drawn_many, drawn))
    for group in metric.GROUPS:
        columns = group == labels.COLUMN_GROUPS

        def excess(shift: float, columns: np.ndarray = columns) -> float:
            severe = labels.oracle(ndtr(many + shift))[:, columns, 2].mean()
            return severe / labels.oracle(ndtr(many))[:, columns, 2].mean() - SEVERE

        shifted[:, columns] += brentq(excess, 0, 1, xtol=1e-4)
    return ndtr(shifted).round(6)


def drawn_block(name: str, seed: int, folder: Path) -> tuple[competition.Competition, pd.DataFrame]:
    """A block's studies, and their labels (row_id, study_id, condition, level, severity)."""
    narrowing, lenient = narrowing_of(name, seed), LENIENT * (name == "second")
    choices = SCANNER if name == "second" else {}
    comp = competition.read(write_phantom(folder / "phantom", BLOCK, 0, seed, narrowing=narrowing, **choices))
    studies = sorted(comp.labels["study_id"].unique())
    read = comp.labels.assign(
        row_id=[row_id(*key) for key in comp.labels[["study_id", "condition", "level"]].to_numpy()]
    )
    own = labels.grade(narrowing - lenient, [seed, 0]).labels  # the same as with cut-offs that much higher
    rows = grade.rows_of(studies)["row_id"]
    told = pd.Series(own.ravel(), index=rows)
    read["severity"] = np.where(read["severity"] == MISSING, MISSING, read["row_id"].map(told))
    return comp, read


def population(
    models: grade.Models | None, cache: Path, name: str, first: int, blocks: int
) -> tuple[dict, pd.DataFrame]:
    """Graded tables and labels of `blocks` blocks, from the cache as far as they are there."""
    parts = []
    for seed in range(first, first + blocks):
        files = {kind: cache / f"{name}-{seed}-{kind}.parquet" for kind in ("yolo", "vit3d", "series", "labels")}
        if not all(file.is_file() for file in files.values()):
            with tempfile.TemporaryDirectory() as folder:
                comp, read = drawn_block(name, seed, Path(folder))
                graded = grade.grade_studies(models, comp, "train", sorted(read["study_id"].unique()))
            for kind, file in files.items():
                with atomic(file) as temporary:
                    (read if kind == "labels" else graded[kind]).to_parquet(temporary, index=False)
            print(f"{name}: block {seed - first + 1}/{blocks}", flush=True)
        parts.append({kind: pd.read_parquet(file) for kind, file in files.items()})
    joined = {kind: pd.concat([part[kind] for part in parts], ignore_index=True) for kind in parts[0]}
    return joined, joined.pop("labels").astype({"study_id": str})


def measure(recipe: dict, given: dict, read: pd.DataFrame) -> pd.DataFrame:
    """A line for each draw: studies, total of the run's own blend (none) and of the adapted one on the test studies,
    what this gains, and what a blend fitted on the test studies themselves would gain (most)."""
    models = {model: given[model] for model in grade.models_in(recipe)}
    test, lines = read["study_id"].unique()[LABELLED:], []
    none = total(recipe, given, read, test)
    for size in SIZES:
        for draw in range(DRAWS if size < LABELLED else 1):
            rows = read[read["study_id"].isin(chosen(read, size, draw)) & (read["severity"] != MISSING)]
            fitted = adapt.fit_recipe(recipe, models, rows)
            changed = "+".join(fitted["adapted"]["changed"]) or "nothing"
            line = {"studies": size, "changed": changed, "none": none, "adapted": total(fitted, given, read, test)}
            lines.append(line)
    known = read[read["study_id"].isin(test) & (read["severity"] != MISSING)]
    most = none - total(adapt.fit_recipe(recipe, models, known), given, read, test)
    table = pd.DataFrame(lines)
    return table.assign(gain=table["none"] - table["adapted"], most=most)


def chosen(read: pd.DataFrame, size: int, draw: int) -> np.ndarray:
    """A draw of `size` of the labelled studies, by id."""
    return np.random.default_rng([size, draw]).permutation(read["study_id"].unique()[:LABELLED])[:size]


def total(recipe: dict, given: dict, read: pd.DataFrame, studies: Collection[str]) -> float:
    """The total of a recipe's ensemble on some of the graded studies."""
    tables, _ = grade.blend_studies(recipe, given, studies)
    rows = read[read["study_id"].isin(studies) & (read["severity"] != MISSING)]
    return metric.score(metric.solution_of(rows), metric.weight_table(tables["ensemble"]))["total"]


def training_folder(folder: Path, studies: Collection[str]) -> Path:
    """The second population's `studies` in the competition's layout, with points and its reader's labels."""
    tables: dict[str, list[pd.DataFrame]] = {}
    first = SEEDS["second"]
    for seed in range(first, first + LABELLED // BLOCK) if not (folder / "train.csv").is_file() else ():
        with tempfile.TemporaryDirectory() as temporary:
            comp, read = drawn_block("second", seed, Path(temporary))
            names = ("train_series_descriptions", "train_label_coordinates")
            parts = {name: pd.read_csv(comp.root / f"{name}.csv") for name in names}
            severity = read["severity"].where(read["severity"] != MISSING).astype("Int64")
            for name, table in (parts | {"train": read[["study_id", "row_id"]].assign(severity=severity)}).items():
                tables.setdefault(name, []).append(table[table["study_id"].astype(str).isin(studies)])
            for study in tables["train"][-1]["study_id"].unique().astype(str):
                shutil.copytree(comp.root / "train_images" / study, folder / "train_images" / study, dirs_exist_ok=True)
        print(f"training folder: block {seed - first + 1}/{LABELLED // BLOCK}", flush=True)
    for name, parts in tables.items():  # train.csv is the last
        pd.concat(parts).drop(columns="study_id" if name == "train" else []).to_csv(folder / f"{name}.csv", index=False)
    return folder


def train(run: Path, cache: Path, read: pd.DataFrame, test: int) -> pd.DataFrame:
    """A line for each way to train: its total on the test studies."""
    folder = training_folder(cache / "trained_on", chosen(read, TRAINED, 0))
    found = labelled.find(folder, None, 1)
    training.check(found, run, 1)
    further, own = training.training_parameters(found, run), read_parameters(run)
    resolve_conditions(further)
    scratch = further | {key: value for key, value in own.items() if key.rpartition("_")[2] in OWN}
    scratch |= {"start_from": "", "points_from": ""}
    lines = []
    for name, parameters in (("trained further", further), ("trained from scratch", scratch)):
        place = OUTPUTS / f"{run.name}-{name.replace(' ', '-')}"  # where the notebooks look for a run
        with locked(place):
            if work(Run(place, parameters, "the proof again", 1, until="05_ensemble_inference")):
                raise SystemExit(f"{name}: training failed")
        recipe = read_recipe(place)
        models = grade.load_models(place / "weights", recipe["folds"], recipe["vit_views"])
        graded = cache / sha256(place / "blend.json")[:12]
        graded.mkdir(exist_ok=True)
        given, seen = population(models, graded, "second", SEEDS["second"] + LABELLED // BLOCK, test // BLOCK)
        lines.append({"way": name, "total": total(recipe, given, seen, seen["study_id"].unique())})
        print(pd.DataFrame(lines).round(4).to_string(index=False), flush=True)
    return pd.DataFrame(lines)


def main() -> int:
    """Print the tables and whether the bars hold; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("--run", default="demo")
    parser.add_argument("--test", type=int, default=400, help="test studies of each population")
    parser.add_argument("--train", action="store_true", help="train on the second population too, which takes hours")
    asked = parser.parse_args()
    recipe = read_recipe(OUTPUTS / asked.run)
    torch.set_num_threads(recipe["threads"])  # more would wait for each other
    cache = asked.cache / sha256(OUTPUTS / asked.run / "blend.json")[:12]  # graded by other models, it is another one
    cache.mkdir(parents=True, exist_ok=True)
    models = grade.load_models(OUTPUTS / asked.run / "weights", recipe["folds"], recipe["vit_views"])
    lines, parts = [], ()
    for name, first in SEEDS.items():
        parts = population(models, cache, name, first, (LABELLED + asked.test) // BLOCK)
        lines.append(measure(recipe, *parts).assign(population=name))
    table = pd.concat(lines, ignore_index=True)
    print(table.round(4).to_string(index=False))
    shown = table.groupby(["population", "studies"]).agg(
        **{"Run's own blend": ("none", "first"), "Mean gain": ("gain", "mean"), "Smallest gain": ("gain", "min"),
           "Fitted on the test studies": ("most", "first")}
    )  # fmt: skip
    print(shown.rename_axis(["Population", "Labelled studies"]).to_csv(sep="\t", float_format="%.3f"))
    at_50 = table.loc[(table["population"] == "second") & (table["studies"] == 50), "gain"].mean()
    bars = {
        f"gain at 50 studies of the second population {at_50:.3f}, bar {BETTER}": at_50 >= BETTER,
        f"worst gain of all draws {table['gain'].min():.4f}, bar {WORSE}": table["gain"].min() >= WORSE,
    }
    for bar, holds in bars.items():
        print(f"{'holds' if holds else 'MISSED'}: {bar}")
    if asked.train:
        [drawn] = table[(table["population"] == "second") & (table["studies"] == TRAINED)][:1].to_dict("records")
        known = {"the run as it is": drawn["none"], "its blend adapted": drawn["adapted"]}
        ways = pd.DataFrame(known.items(), columns=["way", "total"])
        ways = pd.concat([ways, train(OUTPUTS / asked.run, cache, parts[1], asked.test)], ignore_index=True)
        print(f"second population, one draw of {TRAINED} studies; gain over the run's own blend")
        ways = ways.assign(gain=drawn["none"] - ways["total"]).set_axis(["Way", "Score", "Gain"], axis=1)
        print(ways.to_csv(sep="\t", index=False, float_format="%.3f"))
    return 0 if all(bars.values()) else MISSED


if __name__ == "__main__":
    sys.exit(main())
