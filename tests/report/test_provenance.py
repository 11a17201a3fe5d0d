"""What it takes to repeat a run is written beside it, and names neither machine nor user."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import pytest
import torch

from lsdc_utils.report.run import write_provenance


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A folder with what provenance is told from."""
    run = tmp_path / "outputs" / "some"
    for folder in (run / "tables", run / "weights", tmp_path / "outputs" / "data" / "phantom-1"):
        folder.mkdir(parents=True)
    (run / "data.json").write_text('{"data_dir": "../data/phantom-1", "kind": "phantom"}')
    (run / "parameters.yml").write_text("seed: 52\nfolds: [0]\n")
    (run / "tables/series.parquet").write_bytes(b"series")
    (run / "weights/vit3d_fold0.json").write_text('{"sha256": "abc", "git_commit": "d", "fold": 0}')
    (tmp_path / "outputs/data/phantom-1/train.csv").write_text("study_id\n1\n")
    return run


def test_a_run_can_be_repeated_from_it(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "zquser")
    found = write_provenance(run)
    assert json.loads((run / "provenance.json").read_text()) == found
    assert found["parameters"] == {"seed": 52, "folds": [0]}
    assert found["weights"] == {"vit3d_fold0": {"sha256": "abc", "git_commit": "d"}}
    assert (found["data"]["kind"], found["data"]["folder"]) == ("phantom", "phantom-1")
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert len(found["versions"]) > 100
    assert found["machine"]["cores"] >= 1 and found["machine"]["memory_gib"] > 0.1
    told = json.dumps({key: value for key, value in found.items() if key != "versions"})
    assert socket.gethostname() not in told and str(run.parents[1]) not in told
    assert getpass.getuser() == "zquser" and "zquser" not in told


def test_another_table_is_another_fingerprint(run: Path) -> None:
    first = write_provenance(run)["data"]["fingerprint"]
    assert write_provenance(run)["data"]["fingerprint"] == first
    (run.parent / "data/phantom-1/train.csv").write_text("study_id\n2\n")
    assert write_provenance(run)["data"]["fingerprint"] != first
