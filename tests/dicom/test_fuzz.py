"""The reader on several hundred spoilt files; tests/fuzz/run.py reads any number of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

from run import report, run


def test_spoilt_files_give_nothing_but_reasons() -> None:
    result = run(files=500, processes=1)
    assert not result["failures"], report(result)
    outcomes = result["outcomes"]
    assert sum(outcomes.values()) == 4 * 500
    # Neither are the files left unharmed, nor are they so broken that no pixels are ever decoded.
    assert outcomes["pixels: read"] > 50 and outcomes["pixels: DicomError"] > 250
