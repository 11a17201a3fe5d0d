"""Grading by frozen models: every row of every study, whatever is there of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from lsdc_utils import geometry, metric
from lsdc_utils.data import checks, competition
from lsdc_utils.data.stacks import Stack, read_study
from lsdc_utils.grading import blend, grade
from lsdc_utils.grading.grade import (
    COLUMNS_OF,
    blend_studies,
    grade_studies,
    join_graded,
    load_models,
    prior_of,
    rows_of,
    without_own_series,
)
from lsdc_utils.phantom import write_phantom
from lsdc_utils.vocabulary import AXIAL, CONDITIONS, LEVELS, SERIES_TYPES, SEVERITIES, T1, T2

PRIOR = [0.7, 0.2, 0.1]
PRIORS = [{"condition": c, "level": v, **dict(zip(SEVERITIES, PRIOR, strict=True))} for c in CONDITIONS for v in LEVELS]
MIXTURE = {"weights": {"yolo": 0.5, "vit3d": 0.5}, "bias": [0.0, 0.0], "gain": [], "kept": "simple"}
ALONE = {name: {**MIXTURE, "weights": {name: 1.0}} for name in ("yolo", "vit3d")}
FITTED = {
    "format": 3,
    "kind": "fitted",
    "prior": PRIORS,
    "ensemble": dict.fromkeys(("nfn", "scs", "ss"), MIXTURE),
    **{name: dict.fromkeys(("nfn", "scs", "ss"), mixture) for name, mixture in ALONE.items()},
}


def test_rows_and_their_prior_are_the_studies_and_the_recipe_s():
    rows = rows_of([3, 1])
    assert len(rows) == 50 and rows["study_id"].tolist() == ["3"] * 25 + ["1"] * 25
    prior = prior_of(FITTED, rows)
    assert prior["row_id"].tolist() == rows["row_id"].tolist() and np.allclose(prior[list(SEVERITIES)], PRIOR)
    assert len(rows_of([])) == len(prior_of(FITTED, rows_of([]))) == 0


def test_rows_without_the_series_that_they_are_read_on():
    rows = rows_of([1, 2])
    there = pd.DataFrame({"study_id": [1, 1, 2], "series_type": [T2, AXIAL, T1]})
    lacking = without_own_series(rows, there)
    expected = {f"1_{c.name}_{v}" for c in CONDITIONS.values() if c.group == "nfn" for v in LEVELS}
    expected |= {f"2_{c.name}_{v}" for c in CONDITIONS.values() if c.group != "nfn" for v in LEVELS}
    assert lacking == expected
    assert without_own_series(rows, there.iloc[:0]) == set(rows["row_id"])


def test_a_study_that_nothing_graded_has_the_prior():
    tables, sources = blend_studies(FITTED, join_graded([]), [7])
    assert set(tables) == {"yolo", "vit3d", "ensemble"} and (sources == "prior").all()
    for table in tables.values():
        assert len(table) == 25
        assert np.allclose(table[list(SEVERITIES)], PRIOR)


def test_tables_of_studies_are_joined_and_keep_their_columns():
    row = {"row_id": "1_spinal_canal_stenosis_l1_l2", **dict(zip(SEVERITIES, PRIOR, strict=True))}
    expected = {"vit3d": COLUMNS_OF["yolo"]} | COLUMNS_OF
    empty = {kind: pd.DataFrame(columns=columns) for kind, columns in expected.items()}
    joined = join_graded([empty, empty | {"yolo": pd.DataFrame([row])}])
    assert joined["yolo"].to_dict("records") == [row]
    assert {kind: list(table.columns) for kind, table in joined.items()} == expected


def test_series_on_which_nothing_was_found_and_unsure_levels_are_findings(monkeypatch):
    """Images that can be read must not end as rows by the prior without a word."""
    point = {"study_id": 7, "level": "l1_l2", "side": "", "X": 0.0, "Y": 0.0, "Z": 0.0, "confidence": 0.4}
    points = pd.DataFrame([point | {"level_confidence": sure, "condition": "scs"} for sure in (0.9, 0.79)])
    canal = [(f"7_spinal_canal_stenosis_{level}", *PRIOR) for level in LEVELS]
    of_canal = pd.DataFrame(canal, columns=COLUMNS_OF["yolo"])
    stacks = [SimpleNamespace(series_type=kind) for kind in (T1, T2)]
    monkeypatch.setattr(grade, "axial_slices", lambda stacks, canal: pd.DataFrame(columns=COLUMNS_OF["slices"]))
    models = grade.Models([], {"nfn": [], "scs": []}, {"vit3d": []}, 1, lambda *asked: of_canal)
    for found, rows, expected in (
        (points.iloc[:1], of_canal, [("nothing_detected", T1)]),
        (points, of_canal, [("nothing_detected", T1), ("levels_uncertain", "0.79")]),
        (points.iloc[:1], of_canal.iloc[:0], [("nothing_detected", T1), ("nothing_detected", T2)]),
        (points.iloc[:1].assign(s1_s2=0.1), of_canal, [("nothing_detected", T1)]),
        (points.iloc[:1].assign(s1_s2=np.nan), of_canal, [("nothing_detected", T1)]),
        (
            points.iloc[:1].assign(s1_s2=0.22),
            of_canal,
            [("nothing_detected", T1), ("numbering_uncertain", "(transitional): S1/S2 looks 22%")],
        ),
    ):
        monkeypatch.setattr(grade, "grade_study", lambda *asked, answer=(rows, found): answer)
        findings = models.grade(7, stacks)["findings"]
        assert set(findings["study_id"]) == {7} and set(findings["rule"]) <= set(checks.RULES)
        assert findings["rule"].tolist() == [rule for rule, _ in expected]
        assert all(part in value for value, (_, part) in zip(findings["value"], expected, strict=True))


@pytest.fixture(scope="module")
def run(smoke_project: Path) -> Path:
    return smoke_project / "outputs/demo"


def test_a_run_s_test_studies_are_graded_here_as_its_tables_say(run: Path):
    recipe = json.loads((run / "blend.json").read_text())
    models = load_models(run / "weights", recipe["folds"], recipe["vit_views"])
    comp = competition.read((run / json.loads((run / "data.json").read_text())["data_dir"]).resolve())
    study = int(comp.series.loc[comp.series["split"] == "test", "study_id"].min())
    graded = grade_studies(models, comp, "test", [study])
    tables, sources = blend_studies(recipe, graded, [study])
    known = pd.read_parquet(run / "predictions/ensemble_test.parquet").set_index("row_id")
    mine = tables["ensemble"].set_index("row_id")
    assert np.allclose(mine[list(SEVERITIES)], known.loc[mine.index, list(SEVERITIES)], atol=1e-6)
    assert set(graded["series"]["series_type"]) == set(SERIES_TYPES) and set(sources) <= {"yolo+vit3d", "vit3d"}


def test_places_that_no_image_shows_have_the_prior_and_a_finding(tmp_path: Path):
    """Black squares are no evidence: without them a model would give every patient the same, as if it had seen him."""
    ready = ROOT / "outputs/pretrained"  # which find the levels
    recipe = json.loads((ready / "blend.json").read_text())
    models = load_models(ready / "weights", recipe["folds"], 1)
    comp = competition.read(write_phantom(tmp_path / "phantom", 0, 1, seed=5, short_stack=0.0))
    [study] = comp.series["study_id"].unique().tolist()
    stacks, _ = read_study(comp, "test", study)
    canal = (whole := models.grade(study, stacks))["points"].query("condition == 'scs'").set_index("level")
    assert "place_not_shown" not in set(whole["findings"]["rule"])
    below = canal["Z"]["l2_l3"] + 0.45 * (canal["Z"]["l1_l2"] - canal["Z"]["l2_l3"])
    part = models.grade(study, cut_above(stacks, below))
    tables, sources = blend_studies(recipe, join_graded([part]), [study])
    level = [row for row in sources.index if row.endswith("l1_l2")]
    assert (sources[level] == "prior").all() and (sources.drop(level) != "prior").all()
    prior = grade.prior_of(recipe, grade.rows_of([study])).set_index("row_id").loc[level]
    for table in tables.values():
        np.testing.assert_allclose(table.set_index("row_id").loc[level], prior)
    [finding] = part["findings"][part["findings"]["rule"] == "place_not_shown"].itertuples()
    assert finding.value == "5 places are on no image: L1/L2" and finding.rule in checks.RULES


def cut_above(stacks: list[Stack], height: float) -> list[Stack]:
    """A study's stacks without the sagittal rows and the axial slices that lie above a height."""
    left = []
    for stack in stacks:
        if stack.series_type == AXIAL:
            kept = geometry.to_patient(stack.affines, (stack.shapes[:, ::-1] - 1) / 2)[:, 2] < height
            arrays = {key: value[kept] for key, value in vars(stack).items() if np.ndim(value)}
            left.append(replace(stack, **arrays))
            continue
        rows = np.arange(stack.shapes[0, 0])
        first = int((geometry.to_patient(stack.affines[0], np.column_stack([0 * rows, rows]))[:, 2] >= height).sum())
        affines = stack.affines.copy()
        affines[:, :3, 3] += first * affines[:, :3, 1]
        pixels = np.ascontiguousarray(stack.pixels[:, first:])
        left.append(replace(stack, pixels=pixels, shapes=stack.shapes - [first, 0], affines=affines))
    return left


def test_members_are_blended_together_and_left_out_one_by_one():
    rng = np.random.default_rng(0)
    rows = grade.rows_of(range(1, 101))
    logits = rng.normal(size=(len(rows), 3)) + np.array([1.0, 0, -0.5])
    natural = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    severity = (rng.random(len(rows))[:, None] > natural.cumsum(axis=1)).sum(axis=1)
    labels = rows[["row_id", "study_id", "condition", "level"]].assign(severity=severity, fold=0)

    def told(noise: float) -> pd.DataFrame:
        seen = np.exp(logits + noise * rng.normal(size=logits.shape))
        return rows[["row_id"]].assign(**dict(zip(SEVERITIES, (seen / seen.sum(axis=1, keepdims=True)).T, strict=True)))

    given = {"yolo": told(2.0)[5:], "vit3d-a": told(1.0)[:-5], "vit3d-b": told(1.0)[:-5]}
    prior = metric.prior(labels, pool_sides=True)
    prior = rows.merge(prior, on=["condition", "level"])[["row_id", *SEVERITIES]]
    recipe = {"members": ["a", "b"]} | grade.fit_blends(given, prior, labels)
    assert grade.models_in(recipe) == list(given)
    assert list(recipe["ensemble"]["scs"]["weights"]) == list(given) and set(recipe["without"]) == {"a", "b"}
    others = {"yolo", "vit3d-a"}
    assert {key: set(recipe["without"]["b"][key]["ss"]["weights"]) for key in recipe["without"]["b"]} == {
        "vit3d": others - {"yolo"}, "ensemble": others,
    }  # fmt: skip
    tables, sources = grade.blend_rows(recipe, given, prior, unseen=rows["row_id"][-5:])
    assert list(tables) == ["yolo", "vit3d-a", "vit3d-b", "vit3d", "ensemble"]
    assert list(sources.unique()) == ["vit3d", "yolo+vit3d", "yolo"]
    pd.testing.assert_frame_equal(tables["ensemble"][-5:], tables["yolo"][-5:])  # unseen, and of one kind alone
    pd.testing.assert_frame_equal(tables["vit3d-a"][-5:].reset_index(drop=True), prior[-5:].reset_index(drop=True))
    solution = metric.solution_of(labels)
    total = {name: metric.score(solution, metric.weight_table(table))["total"] for name, table in tables.items()}
    assert total["ensemble"] < total["vit3d"] < min(total[name] for name in given) - 0.01
    mean = blend.fit_blend({name: given[name] for name in ("yolo", "vit3d-a", "vit3d-b")}, prior, labels, only=())
    assert mean["ss"]["weights"] == {"yolo": 0.0, "vit3d-a": 0.5, "vit3d-b": 0.5}  # of the better kind
