"""Tests of lsdc_utils.pipeline.steps that need no run: what a step depends on besides its input files."""

from __future__ import annotations

from pathlib import Path

import pytest

from lsdc_utils.pipeline import steps
from lsdc_utils.pipeline.runner import load_parameters


@pytest.mark.parametrize("key", ["exclude_csv", "points_csv", "folds_csv"])
def test_another_content_of_a_given_table_re_runs_the_steps_that_read_it(tmp_path: Path, key: str) -> None:
    file, parameters = tmp_path / "given.csv", load_parameters("demo")

    def tracked(notebook: str, value: Path | str) -> str:
        return steps.tracked_parameters(steps.Step(notebook, notebook), parameters | {key: str(value)})

    file.write_text("study_id\n1\n")
    nothing, first = tracked("02_convert_labels", ""), tracked("02_convert_labels", file)
    moved = file.rename(tmp_path / "moved.csv")
    assert tracked("02_convert_labels", moved) == first != nothing
    moved.write_text("study_id\n2\n")
    assert tracked("02_convert_labels", moved) != first
    assert tracked("00_get_data", moved) == tracked("00_get_data", "")  # reads none of them
