"""Speed of reading, conversion and level crops, as multiples of decoding the same files.

The baseline is pydicom.dcmread and pixel_array of every file of a study, by pylibjpeg-rle. It and the contenders run
in turn on one thread; the least processor time of each counts, since other work on the machine only adds to it. All
read the same three RLE series of 512 x 512 from the file cache. Two processes are compared with one by the clock on
the wall, on links to that study: this needs an idle machine with two cores.

Where the time goes: read_series calls the RLE decoder directly, which saves more of pydicom's copies than the geometry
costs. Level crops are cut from stacks that were read before.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
from pydicom.pixels import pixel_array
from studies import fastest, write_studies

from lsdc_utils import dicom
from lsdc_utils.data import competition
from lsdc_utils.data.stacks import FEW_STUDIES, convert_studies, read_study
from lsdc_utils.vit.inputs import study_input
from lsdc_utils.vit.model import VitConfig

KAGGLE = VitConfig(size=96, spacing=(0.4, 0.53, 0.33), slices=7, margin=38, wider=((2.0, 2),))  # of that profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="rounds in which every contender runs once")
    parser.add_argument("--studies", type=int, default=60, help="studies that one and two processes convert")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        points = write_studies(root, options.studies)
        comp = competition.read(root)
        compare_with_baseline(root, comp, points[points["study_id"] == 1], options.repeats)
        compare_processes(root, comp, options.studies)


def compare_with_baseline(root: Path, comp: competition.Competition, points: pd.DataFrame, repeats: int) -> None:
    """Print the least time of each contender, and its ratio to the baseline beside the aim."""
    files = sorted((root / "test_images/1").rglob("*.dcm"))
    series = sorted((root / "test_images/1").iterdir())

    stacks = read_study(comp, "test", 1)[0]
    contenders = {
        "baseline: dcmread + pixel_array": (None, lambda: [pixel_array(pydicom.dcmread(file)) for file in files]),
        "headers alone": (None, lambda: [dicom.read_series(folder, pixels=False) for folder in series]),
        "read_series": (1.3, lambda: [dicom.read_series(folder) for folder in series]),
        "conversion: read, window, write": (3.0, lambda: list(convert_studies(comp, "test", [1], root / "slices"))),
        "75 level crops, demo": (0.5, lambda: study_input(stacks, points, VitConfig())),
        "225 level crops, kaggle": (None, lambda: study_input(stacks, points, KAGGLE)),
    }
    seconds = fastest({name: run for name, (_, run) in contenders.items()}, repeats)
    baseline = next(iter(seconds.values()))
    size = sum(file.stat().st_size for file in files) / (len(files) * 512 * 512 * 2)
    print(
        f"one study: {len(files)} slices of 512 x 512, compressed to {size:.2f}; least of {repeats} rounds, one thread"
    )
    for name, (aim, _) in contenders.items():
        ratio = seconds[name] / baseline
        verdict = f"aim {aim} x: {'met' if ratio <= aim else 'MISSED'}" if aim else ""
        print(f"  {name:32s} {seconds[name] * 1e3:7.1f} ms  {ratio:5.2f} x  {verdict}", flush=True)


def compare_processes(root: Path, comp: competition.Competition, count: int) -> None:
    """Print how much faster two processes convert studies than one, once they have started.

    Converted studies, 12 MB each, are deleted at once, so that the disk is not measured.
    """
    warm, seconds = FEW_STUDIES, {}
    for workers in (1, 2, 1, 2, 1, 2):
        for number, _ in enumerate(convert_studies(comp, "test", range(1, count + 1), root / "slices", workers), 1):
            shutil.rmtree(root / f"slices/{number}")
            if number == warm:
                start = time.perf_counter()
        seconds[workers] = min(seconds.get(workers, np.inf), (time.perf_counter() - start) / (count - warm))
    gain = seconds[1] / seconds[2]
    times = f"{seconds[1] * 1e3:.0f} ms each by one process, {seconds[2] * 1e3:.0f} ms by two"
    print(f"conversion of {count - warm} studies: {times}")
    print(f"  {gain:.2f} x as fast, aim 1.7 x: {'met' if gain >= 1.7 else 'MISSED'}", flush=True)


if __name__ == "__main__":
    main()
