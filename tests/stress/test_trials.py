"""Stress tests: cases that differ by one thing, what is read off answers, and their numbers in a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lsdc_utils.phantom import labels
from lsdc_utils.stress import trials
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVELS, SEVERITIES

DOSES = np.linspace(0, 1, 11).round(2)
RECIPE = {"prior": [{"condition": c, "level": v, "normal_mild": 0.7, "moderate": 0.2, "severe": 0.1}
                    for c in CONDITIONS for v in LEVELS]}  # fmt: skip


def answered(cases: list[trials.Case], natural) -> pd.DataFrame:
    """Rows of all cases as models would give them whose probabilities (25, 3) are `natural` of a case."""
    keys = [(condition, level) for condition in CONDITIONS for level in LEVELS]
    tables = []
    for number, case in enumerate(cases):
        table = pd.DataFrame(keys, columns=["condition", "level"]).assign(case=number, factor=case.factor)
        table = table.assign(setting=case.setting, body=case.body)
        table[list(SEVERITIES)] = natural(case)
        tables += [table.assign(model=model) for model in trials.MODELS]
    return pd.concat(tables, ignore_index=True)


def oracle(case: trials.Case) -> np.ndarray:
    return labels.oracle(case.narrowing[None])[0]


def test_a_dose_changes_one_narrowing_of_one_body():
    cases = trials.dose_cases(2, DOSES, 3)
    assert len(cases) == 2 * len(CONDITIONS) * len(DOSES)
    for body in (0, 1):
        mine = [case for case in cases if case.body == body]
        level = trials.DOSE_LEVELS[body]
        for condition in CONDITIONS:
            swept = np.array([case.narrowing for case in mine if case.row == (condition, level)])
            changed = np.flatnonzero(np.ptp(swept, axis=0))
            assert [COLUMNS[column] for column in changed] == [f"{condition}_{level}"]
            assert np.array_equal(swept[:, changed[0]], DOSES)
    assert [case.narrowing[COLUMNS.index("_".join(case.row))] for case in cases if case.look] == [1.0] * 10


def test_settings_are_the_same_patients_and_nothing_else_is():
    cases = trials.setting_cases(3, 2, 3)
    usual = {case.body: case.narrowing for case in cases if case.factor == trials.USUAL}
    assert len(usual) == 3 and sum(case.change for case in cases) == 2
    for factor, settings in trials.SETTINGS.items():
        for setting in settings:
            mine = {case.body: case.narrowing for case in cases if (case.factor, case.setting) == (factor, setting)}
            assert mine.keys() == usual.keys() and all(np.array_equal(mine[b], usual[b]) for b in usual)
    assert not usual.keys() & {case.body for case in trials.dose_cases(5, [0, 1], 3)}


def test_an_answer_that_is_the_oracle_rises_like_it_and_leaks_nothing():
    cases = trials.dose_cases(1, DOSES, 3)
    rows = answered(cases, oracle)
    responses = trials.responses(cases, rows)
    assert np.allclose(trials.slopes(responses)["ratio"], 1)
    assert trials.leaks(cases, rows)["leak"].max() == 0
    read = responses.pivot_table(index=["condition", "dose"], columns="model", values="severe")
    assert (read["oracle"] - read["readers"]).abs().max() < 0.35  # of 50 readers
    assert (read["oracle"] - read["readers"]).abs().mean() < 0.05


def test_an_answer_that_moves_other_rows_leaks():
    cases = trials.dose_cases(1, DOSES, 3)

    def leaky(case: trials.Case) -> np.ndarray:
        """The canal at L1/L2 follows whatever is narrowed, and the narrowed row answers half as steeply."""
        natural = oracle(case)
        column = COLUMNS.index("_".join(case.row))
        natural[column] = (natural[column] + 1 / 3) / 2
        chance = 0.3 * case.narrowing[column]
        natural[0] = 1 - chance, chance, 0
        return natural

    rows = answered(cases, leaky)
    worst = trials.leaks(cases, rows).nlargest(1, "leak").iloc[0]
    assert (worst["row"], round(worst["leak"], 6)) == (COLUMNS[0], 0.3)
    assert np.allclose(trials.slopes(trials.responses(cases, rows))["ratio"], 0.5)


def test_scores_by_setting_are_of_many_readers_and_tell_what_is_lost():
    cases = trials.setting_cases(6, 0, 3)
    flat = np.tile([0.7, 0.2, 0.1], (25, 1))
    rows = answered(cases, lambda case: flat if case.setting == "4 times" else oracle(case))
    found = trials.scores_by_setting(cases, rows, RECIPE).set_index(["factor", "setting"])
    assert found.loc[(trials.USUAL, trials.USUAL), ["skill", "lost"]].tolist() == [1.0, 0.0]
    worse = found.loc[("noise", "4 times")]
    assert worse["skill"] == pytest.approx(0) and worse["lost"] == pytest.approx(1)
    assert worse["lost_low"] == pytest.approx(1) and (found["studies"] == 6).all()


# ---- in a finished run -----------------------------------------------------------------------------------------------


def test_a_run_ends_with_the_four_numbers(smoke_project: Path):
    run = smoke_project / "outputs/demo"
    numbers = json.loads((run / "stress/numbers.json").read_text())
    assert list(numbers) == ["slope", "leak", "looked", "moved"]
    moves, leaks = pd.read_csv(run / "stress/moves.csv"), pd.read_csv(run / "stress/leaks.csv")
    assert numbers["moved"] == pytest.approx(moves["moved"].max(), abs=1e-6) and numbers["moved"] < 0.02
    assert set(moves["version"]) == {"mirrored", "renumbered", "rescaled", "renamed"}
    assert numbers["leak"] == pytest.approx(leaks["leak"].max(), abs=1e-6)
    settings = pd.read_csv(run / "stress/settings.csv")
    assert set(trials.SETTINGS) | {trials.USUAL, "missing series", "error of the centres"} == set(settings["factor"])
    doses = pd.read_csv(run / "stress/doses.csv")
    assert doses.groupby(["body", "condition", "model"])["dose"].nunique().eq(3).all()
    assert "Under stress tests" in (run / "report/index.html").read_text()
    assert (run / "report/07_stress_tests.html").is_file()
