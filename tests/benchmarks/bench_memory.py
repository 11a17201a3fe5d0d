"""Peak memory of conversion and of prediction at 20 and at 200 studies: it should be the same.

Each case runs in its own process. Reported is the highest resident memory of that process; for two workers, of all its
processes together (VmHWM of /proc/<pid>/status; pages that processes share count in each). Conversion is
convert_studies of three series of 512 x 512. Prediction is the loop by which 05 grades studies, with untrained networks
of small input, so that only tables and pixels of studies could pile up; series are 192 x 192.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd
import psutil
from studies import write_studies

from lsdc_utils.data import competition
from lsdc_utils.data.stacks import convert_studies, read_study
from lsdc_utils.vocabulary import GROUPS

COUNTS = (20, 200)
MOST = 1.05  # peak at 200 studies over peak at 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", nargs=3, metavar=("CASE", "FOLDER", "STUDIES"), help="run one case in this process")
    options = parser.parse_args()
    if options.child:
        case, folder, count = options.child
        print(CASES[case](Path(folder), int(count)))
        return
    for case in CASES:
        peaks = [measure(case, count) for count in COUNTS]
        verdict = "met" if peaks[1] <= MOST * peaks[0] else "MISSED"
        sizes = ", ".join(f"{peak:.0f} MiB at {count} studies" for peak, count in zip(peaks, COUNTS, strict=True))
        print(f"{case}: {sizes}: {peaks[1] / peaks[0]:.2f} x, aim {MOST} x: {verdict}", flush=True)


def measure(case: str, count: int) -> float:
    """Peak memory in MiB of a case with `count` studies, run in its own process."""
    with tempfile.TemporaryDirectory() as folder:
        points = write_studies(Path(folder), count, side=192 if case == "prediction" else 512)
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
    from lsdc_utils.vit.model import Vit3d, VitConfig
    from lsdc_utils.vit.predict import predict_studies

    torch.set_num_threads(1)
    comp, points = competition.read(root), pd.read_csv(root / "points.csv")
    detectors = {}
    for key in GROUPS:
        config = DetectorConfig(key, (0.2, 0.8, 0.1, 0.9), (64, 64), True, 0.05)
        model = DetectionModel("yolov10n.yaml", nc=len(class_table(config)), verbose=False).eval()
        detectors[key] = [Detector(model, config, 0, {})]
    vits = [Vit3d(VitConfig()).eval()]
    graded = []
    for study in range(1, count + 1):
        stacks, _ = read_study(comp, "test", study)
        rows, _, _ = grade_study(detectors, study, stacks)
        graded.append((rows, predict_studies(vits, [(study, stacks)], points, n_views=1)))
    return peak()


def peak(pid: int | str = "self") -> float:
    """Peak resident memory of a process in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


CASES = {
    "conversion, one process": convert,
    "conversion, two processes": lambda root, count: convert(root, count, workers=2),
    "prediction": predict,
}

if __name__ == "__main__":
    main()
