"""Costs of steps: processor time with all descendants, shares of elapsed time, the step table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from lsdc_utils import costs

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(costs.__file__).parents[1])}
BURN = "import time\nwhile time.process_time() < 0.4: pass"


def test_processor_time_has_children_and_those_that_outlive_their_parents(tmp_path: Path) -> None:
    """A step that works .4 s, with a child of .4 s, whose own child works .4 s after the other is gone."""
    orphan = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {BURN!r}])\n{BURN}"
    code = f"""
import subprocess, sys
from pathlib import Path
from lsdc_utils.costs import measured
with measured(Path("cost.json")):
    subprocess.run([sys.executable, "-c", {orphan!r}])
    {BURN.replace(chr(10), chr(10) + "    ")}
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, check=True)
    cost = json.loads((tmp_path / "cost.json").read_text())
    assert 1.2 <= cost["cpu_s"] < 2.5
    assert cost["ended"] - cost["began"] > 0.5
    assert [path.name for path in tmp_path.iterdir()] == ["cost.json"]


def test_a_step_that_fails_leaves_no_cost(tmp_path: Path) -> None:
    (tmp_path / "cost.json").write_text("of an earlier start")
    code = "from pathlib import Path\nfrom lsdc_utils.costs import measured\nwith measured(Path('cost.json')): 1 / 0"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
    assert "ZeroDivisionError" in done.stderr
    assert not (tmp_path / "cost.json").exists()


def test_time_in_which_several_steps_run_is_shared() -> None:
    assert costs.shares({"a": (0, 10), "b": (4, 14), "c": (20, 25)}) == {"a": 7, "b": 7, "c": 5}
    assert costs.shares({}) == {}


def test_the_step_table_has_a_line_of_totals_and_gaps_where_nothing_was_measured(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for step, seconds, memory in (("01_eda", 10, 500), ("02_convert", 12, 900), ("03_train", 5, 100)):
        line = f"{seconds}\t0:00\t{memory}\t{'-' if seconds == 5 else 150}"
        (tmp_path / f"logs/{step}.tsv").write_text(f"s\th:m:s\tmax_rss\tmean_load\n{line}\n")
    costs.write_json(tmp_path / "logs/01_eda.json", {"began": 100.0, "ended": 110.0, "cpu_s": 13.5})
    costs.write_json(tmp_path / "logs/02_convert.json", {"began": 104.0, "ended": 116.0, "cpu_s": 9.25})
    costs.write_json(tmp_path / "logs/08_report.json", {"began": 1.0, "ended": 2.0, "cpu_s": 1.0})  # still running
    costs.write_step_table(tmp_path)
    table = pd.read_csv(tmp_path / "logs/steps.csv", index_col="step")
    assert list(table.index) == ["01_eda", "02_convert", "03_train", "total"]
    assert table["seconds"].tolist() == [10, 12, 5, 27]
    assert table["cpu_s"].tolist() == pytest.approx([13.5, 9.25, float("nan"), 22.75], nan_ok=True)
    assert table["share_s"].tolist() == pytest.approx([7, 9, float("nan"), 16], nan_ok=True)
    assert table["memory"].tolist() == [500, 900, 100, 900]
    assert table["load"].tolist() == pytest.approx([1.5, 1.5, float("nan"), float("nan")], nan_ok=True)
    empty = costs.step_table(tmp_path / "no_run")
    assert empty.empty and {"seconds", "cpu_s", "share_s"} <= set(empty)
