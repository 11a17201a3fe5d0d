"""A folder of sagittal T1 and foraminal labels alone, at the demo's size: `python tests/proofs/one_group.py DIR`.

Phantom studies, as many as the demo's and of another seed, keep four slices of their sagittal T1, and labels and points
of the foramina. `./run_all.sh --run t1-alone --data DIR` trains on them to the report. Takes some 40 minutes of
processor time, and resumes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]

from one_group import write_one_group  # noqa: E402

from lsdc_utils.pipeline.parameters import load_parameters  # noqa: E402

RUN, SEED = "t1-alone", 101


def main() -> int:
    """Write the folder if it is not there, and run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder, demo = parser.parse_args().folder, load_parameters("demo")
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)  # of a stopped proof
        write_one_group(part, demo["n_train"], demo["n_test"], SEED).rename(folder)
    return subprocess.run(["./run_all.sh", "--run", RUN, "--data", str(folder.resolve())], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
