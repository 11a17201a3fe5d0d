"""The benchmark of trainings takes every network that a profile names, and counts their operations."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
from conftest import ROOT

SCRIPT = """
import sys
sys.path.insert(0, "tests/benchmarks")
import bench_training as bench
bench.DEVICE = bench.torch.device("meta")
parameters = bench.load_parameters("demo", ["n_splits=5", "folds=0,1,2"])
parameters["vit_members"] = [{"name": "first"}, {"name": "second", "vit_epochs": 2, "vit_width": 192}]
bench.pd.DataFrame(bench.rows(parameters, 44.0)).to_csv(sys.stdout, index=False)
"""


def test_each_network_that_a_profile_names_is_counted(tmp_path) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (tmp_path / "table.csv").write_text(done.stdout[done.stdout.index("network,") :])
    table = pd.read_csv(tmp_path / "table.csv", index_col="network")
    first, second = "3D ViT first", "3D ViT second"
    assert list(table.index) == ["detector nfn", "detector scs", "detector ss", "localiser", first, second]
    assert (table["trainings"] == 3).all() and (table["GFLOP"] > 0.1).all()
    studies = 1975 * 4 / 5
    assert table["steps"][first] == studies / 2 * 20 and table["steps"][second] == studies / 2 * 2
    assert table["steps"]["localiser"] == 1800
    assert table["GFLOP"][second] > table["GFLOP"][first]
    hours = table["trainings"] * table["steps"] * table["TFLOP a step"] / 44 / 3600
    assert (hours / table["hours"]).round(6).eq(1).all()
