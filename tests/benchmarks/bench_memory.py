"""Peak memory of conversion, of prediction and of the transformer's training at few and at many studies: it should be
the same.

Each case runs in its own process. Reported is the highest resident memory of that process; for two workers, of all its
processes together (VmHWM of /proc/<pid>/status; pages that processes share count in each). Conversion is
convert_studies of three series of 512 x 512. Prediction is the loop by which 05 grades studies, with untrained networks
of small input, so that only tables and pixels of studies could pile up; series are 192 x 192. Training is what 04 does:
squares of all studies, stored as large as at full size (1.1 MiB a study), are cut from such series into a file, and one
epoch is trained on them by the notebook's cells. Its peak is that of its own memory (RssAnon), since pages of a mapped
file can be given back at any time.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
from studies import write_studies

from lsdc_utils.data import competition
from lsdc_utils.data.stacks import convert_studies, read_study
from lsdc_utils.vocabulary import GROUPS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the cells of notebook 04


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=3, metavar=("CASE", "FOLDER", "STUDIES"), help="run one case in this process")
    parser.add_argument("cases", nargs="*", help="which cases; none: all")
    options = parser.parse_args()
    if options.child:
        case, folder, count = options.child
        print(CASES[case].run(Path(folder), int(count)))
        return
    for case in options.cases or CASES:
        counts, most = CASES[case].counts, CASES[case].most
        peaks = [measure(case, count) for count in counts]
        verdict = "met" if peaks[1] <= most * peaks[0] else "MISSED"
        sizes = ", ".join(f"{peak:.0f} MiB at {count} studies" for peak, count in zip(peaks, counts, strict=True))
        print(f"{case}: {sizes}: {peaks[1] / peaks[0]:.2f} x, aim {most} x: {verdict}", flush=True)


def measure(case: str, count: int) -> float:
    """Peak memory in MiB of a case with `count` studies, run in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        points = write_studies(Path(folder), count, side=CASES[case].side)
        points.assign(side="", confidence=1.0).to_csv(Path(folder) / "points.csv", index=False)
        command = [sys.executable, __file__, "--child", case, folder, str(count)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def convert(root: Path, count: int, workers: int = 1) -> float:
    """Convert the studies; peak memory in MiB."""
    comp = competition.read(root)
    sizes = [0.0]
    for number, _ in enumerate(convert_studies(comp, "test", range(1, count + 1), root / "slices", workers), 1):
        for file in (root / "slices").glob("*/[0-9]*.npz"):
            file.unlink()  # 200 studies would fill 2.4 GB of disk
        if workers > 1 and number == count:  # while the processes live
            sizes = [peak(child.pid) for child in psutil.Process().children(recursive=True)]
    return peak() + sum(sizes)


def predict(root: Path, count: int) -> float:
    """Grade the studies by untrained networks; peak memory in MiB."""
    import torch
    from ultralytics.nn.tasks import DetectionModel

    from lsdc_utils.detector.classes import Detector, DetectorConfig, class_table
    from lsdc_utils.detector.levels import grade_study
    from lsdc_utils.detector.localiser import Localiser, LocaliserConfig
    from lsdc_utils.vit.model import Vit3d, VitConfig
    from lsdc_utils.vit.predict import predict_studies

    torch.set_num_threads(1)
    comp, points = competition.read(root), pd.read_csv(root / "points.csv", keep_default_na=False)
    detectors = {}
    for key in GROUPS:
        config = DetectorConfig(key, (200.0, 200.0), (64, 64), True, 14.0)
        model = DetectionModel("yolov10n.yaml", nc=len(class_table(config)), verbose=False).eval()
        detectors[key] = [Detector(model, config, 0, {})]
    localisers, vits = [Localiser(LocaliserConfig()).eval()], [Vit3d(VitConfig()).eval()]
    graded = []
    for study in range(1, count + 1):
        stacks, _ = read_study(comp, "test", study)
        rows, _ = grade_study(localisers, detectors, study, stacks)
        graded.append((rows, predict_studies(vits, [(study, stacks)], points, n_views=1)))
    return peak()


def train(root: Path, count: int) -> float:
    """Cut the squares of the studies, a quarter of them held out, and train one epoch; peak of RssAnon in MiB."""
    from vit_inputs import train as run_cells

    from lsdc_utils.vit.inputs import study_inputs
    from lsdc_utils.vit.model import VitConfig
    from lsdc_utils.vocabulary import COLUMNS

    comp, canal = competition.read(root), pd.read_csv(root / "points.csv", keep_default_na=False)
    sides = [canal.assign(side=side, X=canal["X"] + sign * 8) for side, sign in (("left", 1), ("right", -1))]
    points, config, studies = pd.concat([canal, *sides], ignore_index=True), VitConfig(margin=40), []
    done, highest = threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.02):
            highest[0] = max(highest[0], peak(field="RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    for name, ids in (("training", range(1, count + 1)), ("held_out", range(1, count // 4 + 1))):
        read = ((study, read_study(comp, "test", study)[0]) for study in ids)
        _, inputs = study_inputs(read, points, config, root / f"{name}.npy", len(ids))
        studies.append((inputs, np.random.default_rng(0).choice(3, (len(inputs), len(COLUMNS))).astype(np.int8)))
    run_cells(root, studies[0], config, held_out=studies[1], vit_epochs=1, vit_batch=2)
    done.set()
    watcher.join()
    return highest[0]


def peak(pid: int | str = "self", field: str = "VmHWM") -> float:
    """Peak resident memory of a process in MiB, or another field of its status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024


class Case(NamedTuple):
    """A case: what runs, pixels a side of its series, how many studies, and the second peak over the first at most."""

    run: Callable[[Path, int], float]
    side: int = 512
    counts: tuple[int, int] = (20, 200)
    most: float = 1.05


CASES = {
    "conversion, one process": Case(convert),
    "conversion, two processes": Case(lambda root, count: convert(root, count, workers=2)),
    "prediction": Case(predict, side=192),
    "training of the transformer": Case(train, side=192, counts=(20, 400), most=1.15),
}

if __name__ == "__main__":
    main()
