"""Stress tests: cases that differ by one thing, what is read off answers, and their numbers in a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lsdc_utils import metric
from lsdc_utils.phantom import labels
from lsdc_utils.stress.answers import MODELS
from lsdc_utils.stress.cases import DOSE_LEVELS, SETTINGS, USUAL, Case, dose_cases, setting_cases
from lsdc_utils.stress.responses import key_numbers, leaks, responses, scores_by_setting, slopes
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, GROUPS, LEVELS, SEVERITIES

DOSES = np.linspace(0, 1, 11).round(2)
RECIPE = {"prior": [{"condition": c, "level": v, "normal_mild": 0.7, "moderate": 0.2, "severe": 0.1}
                    for c in CONDITIONS for v in LEVELS]}  # fmt: skip


def answered(cases: list[Case], natural) -> pd.DataFrame:
    """Rows of all cases as models would give them whose probabilities (25, 3) are `natural` of a case."""
    keys = [(condition, level) for condition in CONDITIONS for level in LEVELS]
    tables = []
    for number, case in enumerate(cases):
        table = pd.DataFrame(keys, columns=["condition", "level"]).assign(case=number, factor=case.factor)
        table = table.assign(setting=case.setting, body=case.body)
        table[list(SEVERITIES)] = natural(case)
        tables += [table.assign(model=model) for model in MODELS]
    return pd.concat(tables, ignore_index=True)


def oracle(case: Case) -> np.ndarray:
    return labels.oracle(case.narrowing[None])[0]


def test_a_dose_changes_one_narrowing_of_one_body():
    cases = dose_cases(2, DOSES, 3)
    assert len(cases) == 2 * len(CONDITIONS) * len(DOSES)
    for body in (0, 1):
        mine = [case for case in cases if case.body == body]
        level = DOSE_LEVELS[body]
        for condition in CONDITIONS:
            swept = np.array([case.narrowing for case in mine if case.row == (condition, level)])
            changed = np.flatnonzero(np.ptp(swept, axis=0))
            assert [COLUMNS[column] for column in changed] == [f"{condition}_{level}"]
            assert np.array_equal(swept[:, changed[0]], DOSES)
    assert [case.narrowing[COLUMNS.index("_".join(case.row))] for case in cases if case.occlude] == [1.0] * 10


def test_settings_are_the_same_patients_and_nothing_else_is():
    cases = setting_cases(3, 2, 3)
    usual = {case.body: case.narrowing for case in cases if case.factor == USUAL}
    assert len(usual) == 3 and sum(case.transform for case in cases) == 2
    for factor, settings in SETTINGS.items():
        for setting in settings:
            mine = {case.body: case.narrowing for case in cases if (case.factor, case.setting) == (factor, setting)}
            assert mine.keys() == usual.keys() and all(np.array_equal(mine[b], usual[b]) for b in usual)
    assert not usual.keys() & {case.body for case in dose_cases(5, [0, 1], 3)}


def test_an_answer_that_is_the_oracle_rises_like_it_and_leaks_nothing():
    cases = dose_cases(1, DOSES, 3)
    rows = answered(cases, oracle)
    curves = responses(cases, rows)
    assert np.allclose(slopes(curves)["ratio"], 1)
    assert 0 < leaks(cases, rows)["leak"].max() < labels.GROSS  # a label is rarely that of a neighbour
    read = curves.pivot_table(index=["condition", "dose"], columns="model", values="severe")
    assert (read["oracle"] - read["readers"]).abs().max() < 0.35  # of 50 readers
    assert (read["oracle"] - read["readers"]).abs().mean() < 0.05


def test_an_answer_that_moves_other_rows_leaks():
    cases = dose_cases(1, DOSES, 3)

    def leaky(case: Case) -> np.ndarray:
        """The canal at L1/L2 follows whatever is narrowed, and the narrowed row answers half as steeply."""
        natural = oracle(case)
        column = COLUMNS.index("_".join(case.row))
        natural[column] = (natural[column] + 1 / 3) / 2
        chance = 0.3 * case.narrowing[column]
        natural[0] = 1 - chance, chance, 0
        return natural

    rows = answered(cases, leaky)
    worst = leaks(cases, rows).nlargest(1, "leak").iloc[0]
    assert (worst["row"], round(worst["leak"], 6)) == (COLUMNS[0], 0.3)
    assert np.allclose(slopes(responses(cases, rows))["ratio"], 0.5)


def test_scores_by_setting_are_of_many_readers_and_tell_what_is_lost():
    cases = setting_cases(metric.FEWEST, 0, 3)
    flat = np.tile([0.7, 0.2, 0.1], (25, 1))
    rows = answered(cases, lambda case: flat if case.setting == "4 times" else oracle(case))
    scores = scores_by_setting(cases, rows, RECIPE).set_index(["factor", "setting"])
    assert scores.loc[(USUAL, USUAL), ["skill", "lost"]].tolist() == [1.0, 0.0]
    worse = scores.loc[("noise", "4 times")]
    assert worse["skill"] == pytest.approx(0) and worse["lost"] == pytest.approx(1)
    assert worse["lost_low"] == pytest.approx(1) and (scores["studies"] == metric.FEWEST).all()


# ---- in a finished run -----------------------------------------------------------------------------------------------


def test_a_run_ends_with_its_key_numbers(smoke_project: Path):
    run = smoke_project / "outputs/demo"
    numbers = json.loads((run / "stress/numbers.json").read_text())
    assert list(numbers) == ["slope", "slope_by_group", "leak", "looked", "moved", "bodies"]
    assert set(numbers["slope_by_group"]) == {group.score for group in GROUPS.values()}
    tables = {
        name: pd.read_csv(run / f"stress/{name}.csv") for name in ("doses", "leaks", "looks", "settings", "moves")
    }
    assert numbers["moved"] == pytest.approx(tables["moves"]["moved"].max(), abs=1e-6)
    assert set(tables["moves"]["version"]) == {"mirrored", "renumbered", "rescaled", "renamed"}
    assert numbers["leak"] == pytest.approx(tables["leaks"]["leak"].max(), abs=1e-6)
    factors = {*SETTINGS, USUAL, "missing series", "error of the centres"}
    assert factors == set(tables["settings"]["factor"])
    assert tables["doses"].groupby(["body", "condition", "model"])["dose"].nunique().eq(3).all()
    repeated = key_numbers(tables["doses"], tables["leaks"], tables["looks"], tables["moves"])
    assert repeated["slope"] == pytest.approx(numbers["slope"], abs=1e-3)
    assert (run / "report/07_stress_tests.html").is_file()
