"""The blend of the ready-made models hedges on populations that training did not draw."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lsdc_utils import phantom
from lsdc_utils.data import competition
from lsdc_utils.grading import grade
from lsdc_utils.pipeline import temper
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVELS, MISSING, SEVERITIES, parse_row_id

BLENDS = grade.blends_of(["yolo", "vit3d"])

PRIOR = dict(zip(SEVERITIES, (0.7, 0.2, 0.1), strict=True))
EQUAL = {"weights": {"yolo": 0.5, "vit3d": 0.5}, "bias": [0.0, 0.0], "gain": [], "kept": "simple"}


def recipe_of() -> dict:
    blends = {name: dict.fromkeys(("nfn", "scs", "ss"), EQUAL) for name in BLENDS}
    for name in ("yolo", "vit3d"):
        blends[name] = dict.fromkeys(("nfn", "scs", "ss"), EQUAL | {"weights": {name: 1.0}})
    prior = [{"condition": c, "level": v, **PRIOR} for c in CONDITIONS for v in LEVELS]
    return {"format": 3, "kind": "fitted", "folds": [0], "vit_views": 1, "threads": 1, "prior": prior, **blends}


def population(first: int, n: int = 60) -> temper.Part:
    """Labels drawn from a known probability, which both models claim far too surely."""
    rng = np.random.default_rng(first)
    rows = [f"{first + study}_{column}" for study in range(n) for column in COLUMNS]
    logit = rng.normal(size=(len(rows), 1)) * [[-1.0, 0.3, 1.0]] + [[1.5, 0, -0.5]]
    natural = np.exp(logit) / np.exp(logit).sum(axis=1, keepdims=True)
    labels = pd.DataFrame([parse_row_id(row) for row in rows], columns=["study_id", "condition", "level"])
    labels["severity"] = (rng.random(len(rows))[:, None] > natural.cumsum(axis=1)).sum(axis=1)
    sure = natural**4 / (natural**4).sum(axis=1, keepdims=True)
    table = pd.DataFrame(sure, columns=list(SEVERITIES)).assign(row_id=rows)
    return {"yolo": table, "vit3d": table}, labels.assign(row_id=rows)


def test_blends_are_fitted_where_training_never_was_and_judged_on_another_population() -> None:
    recipe, parts = recipe_of(), {name: population(1000 * k) for k, name in enumerate(("usual", *"abc"), start=1)}
    tables, read = parts["usual"]  # where models are right to be sure
    sure = tables["yolo"][list(SEVERITIES)].to_numpy()
    drawn = (np.random.default_rng(0).random(len(read))[:, None] > sure.cumsum(axis=1)).sum(axis=1)
    parts["usual"] = tables, read.assign(severity=drawn)
    tempered, table = temper.temper(recipe, parts)
    assert list(table["population"]) == ["a", "b", "c"] and (table["studies"] == 60).all()
    assert (table["tempered"] < table["usual"] - 0.02).all() and (table["tempered"] < table["prior"]).all()
    for name in BLENDS:
        for mixture in tempered[name].values():
            assert 0.1 < sum(mixture["weights"].values()) < 0.9  # p^4: a quarter undoes it in three of four populations
    assert tempered["tempered_on"] == ["usual", "a", "b", "c"]
    kept = ("format", "kind", "folds", "vit_views", "threads", "prior")
    assert {key: tempered[key] for key in kept} == {key: recipe[key] for key in kept}


@pytest.mark.parametrize("name", temper.POPULATIONS)
def test_every_population_can_be_drawn(name: str) -> None:
    choices, factor, higher = temper.POPULATIONS[name]
    usual = phantom.fingerprint(2, 0, temper.SEED)
    same = factor == 1 and not higher and phantom.fingerprint(2, 0, temper.SEED, **choices) == usual
    assert same == (name == temper.USUAL)
    assert 0 < factor <= 1


def test_other_readers_grade_the_same_narrowings_by_other_cut_offs(tmp_path) -> None:
    comp = competition.read(phantom.write_phantom(tmp_path / "phantom", 60, 0, 7, images=False, label_missing=0.1))
    own, strict, lenient = (temper.read_again(comp, higher, 3) for higher in (0.0, -0.06, 0.06))
    pd.testing.assert_frame_equal(own.drop(columns="row_id"), comp.labels)
    gone = own["severity"] == MISSING
    assert gone.any() and all((table["severity"] == MISSING).equals(gone) for table in (strict, lenient))
    narrowing = own["row_id"].map(pd.read_csv(comp.root / "latents.csv", index_col="row_id")["narrowing"])
    for table, order in ((strict, 1), (lenient, -1)):
        assert order * (table["severity"] - own["severity"])[~gone].mean() > 0.03
        assert table["severity"][~gone].corr(narrowing[~gone], method="spearman") > 0.5  # each row has its own


def test_a_blend_that_is_no_better_where_it_is_worst_is_that_of_the_usual_population() -> None:
    recipe, parts = recipe_of(), {name: population(1000 * k) for k, name in enumerate(("usual", "a"), start=1)}
    tables, read = parts["a"]  # where models are right to be sure
    sure = tables["yolo"][list(SEVERITIES)].to_numpy()
    drawn = (np.random.default_rng(1).random(len(read))[:, None] > sure.cumsum(axis=1)).sum(axis=1)
    parts["a"], unknowable = (tables, read.assign(severity=drawn)), {}
    for name, first in (("b", 9000), ("c", 12000)):
        tables, read = population(first)
        unknowable[name] = tables, read.assign(severity=np.random.default_rng(first).integers(0, 3, len(read)))
    tempered, table = temper.temper(recipe, parts | {"b": unknowable["b"]})
    by_name = table.set_index("population")
    assert by_name["tempered"]["a"] > by_name["usual"]["a"] + 0.05  # the price, where one is at home
    worst = by_name.div(by_name["prior"], axis=0).max()
    assert worst["tempered"] > worst["usual"] and tempered["tempered_on"] == ["usual"]  # b is as a is not
    hedged = temper.temper(recipe, parts | unknowable)[0]
    assert hedged["tempered_on"] == ["usual", "a", "b", "c"]  # with c it is known that b may come
    surer, hedging = (sum(of["ensemble"]["scs"]["weights"].values()) for of in (tempered, hedged))
    assert hedging < surer
