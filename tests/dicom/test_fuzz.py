"""The reader on several hundred corrupt files; tests/fuzz/run.py reads any number of them."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

from run import report, run


def test_corrupt_files_raise_only_dicom_errors() -> None:
    result = run(files=500, processes=1)
    assert not result["failures"], report(result)
    outcomes = result["outcomes"]
    assert sum(outcomes.values()) == 4 * 500
    # Some files are too broken to read, and some still give pixels.
    assert outcomes["pixels: read"] > 50 and outcomes["pixels: DicomError"] > 250
