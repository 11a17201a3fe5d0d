"""How long reading, conversion, crops and grids take, as multiples of decoding the same files.

The floor is pydicom.dcmread and pixel_array of every file of a study, by pylibjpeg-rle. It and the contenders run in
turn on one thread, and the least processor time of each counts, so that other work on the machine disturbs little. All
read the same three RLE series of 512 x 512 from the file cache. Two processes are compared with one by the clock on
the wall, converting links to that study: the machine must be idle for that, and have two cores.

Where the time goes (46 slices; floor 1.2 ms a slice, of which the RLE decoder itself 0.8): read_series calls the
decoder directly and so saves more of pydicom's copies than the geometry costs; windowing is a look-up table (0.08 ms a
slice) and percentiles of every 16th pixel; a grid or squares sample only the slices that they meet, averaged down to
about their voxels before (0.1 ms a slice). Squares round levels are cut from single slices, five of a series, a level
and a side. The grid of the published method is a plain resampling, without an aim.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import pandas as pd
import pydicom
from pydicom.pixels import pixel_array
from studies import fastest, write_studies

from lsdc_utils import dicom
from lsdc_utils.data import competition
from lsdc_utils.data.stacks import FEW_STUDIES, Stack, convert_studies, read_study
from lsdc_utils.published.grid import study_grid
from lsdc_utils.vit.inputs import study_input
from lsdc_utils.vit.model import VitConfig

KAGGLE = VitConfig(size=128, spacing=0.5, margin=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15, help="rounds in which every contender runs once")
    parser.add_argument("--studies", type=int, default=60, help="studies converted by one and by two processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        points = write_studies(root, options.studies)
        comp = competition.read(root)
        compare_with_floor(root, comp, points[points["study_id"] == 1], options.repeats)
        compare_processes(root, comp, options.studies)


def compare_with_floor(root: Path, comp: competition.Competition, points: pd.DataFrame, repeats: int) -> None:
    """Print the least time of each contender, and its ratio to the floor beside the aim."""
    files = sorted((root / "test_images/1").rglob("*.dcm"))
    series = sorted((root / "test_images/1").iterdir())

    def stacks() -> list[Stack]:
        return read_study(comp, "test", 1)[0]

    contenders = {
        "floor: dcmread + pixel_array": (None, lambda: [pixel_array(pydicom.dcmread(file)) for file in files]),
        "headers alone": (None, lambda: [dicom.read_series(one, pixels=False) for one in series]),
        "read_series": (1.3, lambda: [dicom.read_series(one) for one in series]),
        "conversion: read, window, write": (3.0, lambda: list(convert_studies(comp, "test", [1], root / "slices"))),
        "3 x 64^3 grid": (None, lambda: study_grid(stacks(), 64)),
        "125 squares, demo": (1.5, lambda: study_input(stacks(), points, VitConfig())),
        "125 squares, kaggle": (None, lambda: study_input(stacks(), points, KAGGLE)),
    }
    found = fastest({name: run for name, (_, run) in contenders.items()}, repeats)
    floor = next(iter(found.values()))
    size = sum(file.stat().st_size for file in files) / (len(files) * 512 * 512 * 2)
    print(
        f"one study: {len(files)} slices of 512 x 512, compressed to {size:.2f}; least of {repeats} rounds, one thread"
    )
    for name, (aim, _) in contenders.items():
        told = f"aim {aim} x: {'met' if found[name] <= aim * floor else 'MISSED'}" if aim else ""
        print(f"  {name:32s} {found[name] * 1e3:7.1f} ms  {found[name] / floor:5.2f} x  {told}", flush=True)


def compare_processes(root: Path, comp: competition.Competition, count: int) -> None:
    """Print how much faster two processes convert studies than one, once they have started.

    What was written is removed at once, or the disk would be measured: a study is 12 MB.
    """
    warm, least = FEW_STUDIES, {}
    for workers in (1, 2, 1, 2, 1, 2):
        for number, _ in enumerate(convert_studies(comp, "test", range(1, count + 1), root / "slices", workers), 1):
            shutil.rmtree(root / f"slices/{number}")
            if number == warm:
                start = time.perf_counter()
        least[workers] = min(least.get(workers, 1e9), (time.perf_counter() - start) / (count - warm))
    one, two = least[1] * 1e3, least[2] * 1e3
    print(f"conversion of {count - warm} studies: {one:.0f} ms each by one process, {two:.0f} by two")
    print(f"  {one / two:.2f} x as fast, aim 1.7 x: {'met' if one / two >= 1.7 else 'MISSED'}", flush=True)


if __name__ == "__main__":
    main()
