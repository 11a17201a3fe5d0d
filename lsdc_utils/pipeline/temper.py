"""The blend of the ready-made models, fitted also on phantom populations that training does not draw, so that it hedges
where scanner, prevalence or readers are new."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import metric
from lsdc_utils.data import competition
from lsdc_utils.grading import blend, grade
from lsdc_utils.grading.blend import Tables
from lsdc_utils.phantom import labels, write_phantom
from lsdc_utils.vocabulary import COLUMNS, MISSING, row_id

STUDIES, SEED = 40, 9001  # of each population; phantoms of training have other seeds
USUAL = "usual"  # as training draws them; the others it does not
POPULATIONS = {  # name -> arguments of `write_phantom`, factor of all narrowings, how much higher readers' cut-offs are
    USUAL: ({}, 1.0, 0.0),
    "scanner": ({"noise": 2.0, "pixel": 1.3, "field": 2.0, "stir": 1.0}, 1.0, 0.0),
    "prevalence": ({}, 0.6, 0.0),
    "strict readers": ({}, 1.0, -0.06),
    "lenient readers": ({}, 1.0, 0.06),
    "contrast": ({"population": "grey"}, 1.0, 0.0),
}
Part = tuple[Tables, pd.DataFrame]  # of a population: the models' rows, and labels (row_id, study_id, severity)


def temper_run(run: Path, recipe: dict[str, Any], workers: int) -> tuple[dict[str, Any], pd.DataFrame]:
    """`temper` with the models of a run, which grade `STUDIES` new studies of each of `POPULATIONS`."""
    weights, parts = run / "weights", {}
    models = grade.load_models(weights, recipe["folds"], recipe["vit_views"], members=recipe["members"])
    for number, (name, (choices, factor, higher)) in enumerate(POPULATIONS.items()):
        narrowing = factor * labels.draw_grades(STUDIES, [SEED, number]).narrowing
        print(f"population {name}: {STUDIES} studies are drawn and graded", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            options = {"narrowing": narrowing, "workers": workers, **choices}
            comp = competition.read(write_phantom(Path(folder) / "phantom", STUDIES, 0, SEED + number, **options))
            graded = grade.grade_studies(models, comp, "train", sorted(comp.labels["study_id"].unique()))
            read = read_again(comp, higher, SEED + number)
        parts[name] = {model: graded[model] for model in grade.models_in(recipe)}, read
    return temper(recipe, parts)


def read_again(comp: competition.Competition, higher: float, seed: int) -> pd.DataFrame:
    """The labels of a phantom with their row_id, by readers whose cut-offs lie so much `higher`; missing ones stay."""
    names = [row_id(*key) for key in comp.labels[["study_id", "condition", "level"]].itertuples(index=False)]
    read = comp.labels.assign(row_id=names)
    if higher:
        rows = grade.rows_of(sorted(read["study_id"].unique()))["row_id"]
        seen = pd.read_csv(comp.root / "latents.csv", index_col="row_id")["narrowing"][rows] - higher
        told = labels.grade(seen.to_numpy().reshape(-1, len(COLUMNS)), seed).labels
        own = read["row_id"].map(pd.Series(told.ravel(), index=rows))
        read["severity"] = np.where(read["severity"] == MISSING, MISSING, own)
    return read


def temper(recipe: dict[str, Any], parts: dict[str, Part]) -> tuple[dict[str, Any], pd.DataFrame]:
    """The recipe with blends fitted on all populations, and a row for each but the usual one: population, studies, and
    the official total of `prior`, and of the ensemble with numbers fitted on the usual population or, `tempered`, on
    all others. Where these are not better on the population that is worst against the prior, the recipe has those of
    the usual population: a blend hedges for what it does not know."""
    rows, usual = [], _fitted(recipe, {USUAL: parts[USUAL]})
    for name, (tables, read) in parts.items():
        if name == USUAL:
            continue
        others, prior = _fitted(recipe, {key: parts[key] for key in parts if key != name}), _prior(recipe, read)
        blends = {USUAL: usual["ensemble"], "tempered": others["ensemble"]}
        natural = {"prior": prior} | {key: blend.apply_blend(of, tables, prior) for key, of in blends.items()}
        weighted = {key: metric.weight_table(table) for key, table in natural.items()}
        totals = {key: metric.score(metric.solution_of(read), table)["total"] for key, table in weighted.items()}
        rows.append({"population": name, "studies": read["study_id"].nunique(), **totals})
    table = pd.DataFrame(rows)
    worst = table[["tempered", USUAL]].div(table["prior"], axis=0).max()
    if worst["tempered"] >= worst[USUAL]:
        return usual | {"tempered_on": [USUAL]}, table
    return _fitted(recipe, parts) | {"tempered_on": list(parts)}, table


def _fitted(recipe: dict[str, Any], parts: dict[str, Part]) -> dict[str, Any]:
    """The recipe with all numbers of its blends fitted on these populations together."""
    read = pd.concat([part[1] for part in parts.values()], ignore_index=True)
    tables = {model: pd.concat([part[0][model] for part in parts.values()]) for model in grade.models_in(recipe)}
    inputs = {name: {key: tables[key] for key in of} for name, of in grade.blends_of(tables).items()}
    prior = _prior(recipe, read)
    return recipe | {name: blend.fit_blend(of, prior, read) for name, of in inputs.items()} | {"without": {}}


def _prior(recipe: dict[str, Any], read: pd.DataFrame) -> pd.DataFrame:
    return grade.prior_of(recipe, grade.rows_of(read["study_id"].unique()))
