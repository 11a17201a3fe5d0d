"""Rehearse a submission to Kaggle with a finished run: `python tests/proofs/kaggle.py outputs/RUN [STUDIES]`.

The bundle's notebook grades a phantom's test studies offline, in an environment of only what Kaggle's image has;
only its working folder, that environment, home and temporary files can be written. The submission must have all rows of
the sample and agree with `predict`. Making the environment needs the network.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from datetime import datetime
from importlib.metadata import distribution, version
from pathlib import Path

import numpy as np
import pandas as pd
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kaggle_image  # noqa: E402
from conftest import run_all  # noqa: E402

from lsdc_utils import phantom  # noqa: E402
from lsdc_utils.downloads import COMPETITION  # noqa: E402
from lsdc_utils.pipeline import kaggle  # noqa: E402
from lsdc_utils.vocabulary import COLUMNS, SEVERITIES  # noqa: E402

HIDDEN = 716  # studies that the hidden test set is taken to have
HOURS = 9  # that a notebook may run
JUPYTER = ["ipykernel==6.17.1", "jupyter_client==7.4.9", "nbclient==0.10.4", "nbformat==5.10.4", "traitlets==5.7.1"]
LINKED = ("torch", "torchvision")  # too big to install: links to this environment's
GRADING = "c05-06"  # the cell that grades
EXECUTE = """\
import sys, nbclient, nbformat
notebook = nbformat.read(sys.argv[1], 4)
nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[2])
"""
ALONE = """\
ip link set lo up
for folder in "$1" "$2" "$3" "$4"; do mount --bind "$folder" "$folder"; done
mount -o remount,bind,ro /
if touch "$1/../input/written" 2>/dev/null; then echo "the input can be written"; exit 1; fi
cd "$1"
shift 4
exec "$@"
"""


def make_image(folder: Path) -> Path:
    """An environment with what Kaggle's image has of what the notebook needs, and Jupyter's kernel; its Python."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    image = {name: found for name, found in kaggle_image.read_image().items() if name not in ("python", *LINKED)}
    install = [python, "-m", "pip", "install", "--quiet", "--only-binary=:all:"]
    timm = f"timm=={image.pop('timm')}"  # which would bring a torch
    subprocess.run([*install, *JUPYTER, *(f"{name}=={found}" for name, found in image.items())], check=True)
    subprocess.run([*install, "--no-deps", timm], check=True)
    listed = subprocess.run([python, "-m", "pip", "list", "--format=json"], capture_output=True, check=True).stdout
    there = {canonicalize_name(entry["name"]): entry["version"] for entry in json.loads(listed)}
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in kaggle_image.lacking(there, sys.version.split()[0], LINKED):
        package = distribution(name)
        for top in {Path(file).parts[0] for file in package.files or () if ".." not in Path(file).parts}:
            if not (packages / top).exists():
                (packages / top).symlink_to(package.locate_file(top))
    return python


def lay_out(root: Path, bundle: Path, studies: int) -> Path:
    """Put a bundle's dataset and a phantom's test studies where Kaggle has them under `root`; the competition's folder.

    Of the training studies there are tables and no images, of the test studies no answers.
    """
    data = phantom.write_phantom(root / "input" / "competitions" / COMPETITION, 4, studies, seed=7, workers=2)
    shutil.rmtree(data / "train_images")
    for file in data.glob("*.csv"):
        if not file.name.startswith(("train", "test", "sample")):
            file.unlink()
    (root / "input" / "datasets" / "someone").mkdir(parents=True)
    (bundle / "dataset").rename(root / "input" / "datasets" / "someone" / "lsdc")
    (root / "working").mkdir()
    return data


def execute(python: Path, notebook: Path, root: Path) -> dict:
    """Execute a bundle's notebook alone; the notebook as executed."""
    home, temporary = root.parent / "home", root.parent / "tmp"
    home.mkdir()
    temporary.mkdir()
    writable = [root / "working", python.parents[1], home, temporary]
    environment = {"PATH": f"{python.parent}:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, "TMPDIR": temporary}
    command = ["unshare", "--user", "--map-root-user", "--net", "--mount", "bash", "-euc", ALONE, "alone", *writable]
    command += [python, "-c", EXECUTE, notebook, temporary / "executed.ipynb"]
    variables = {name: str(value) for name, value in (environment | {"LSDC_KAGGLE": root}).items()}
    done = subprocess.run(list(map(str, command)), env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((temporary / "executed.ipynb").read_text())


def seconds(notebook: dict) -> dict[str, float]:
    """Seconds that each code cell took, by its id."""
    times = {}
    for cell in (cell for cell in notebook["cells"] if "execution" in cell["metadata"]):
        begun, done = (
            datetime.fromisoformat(cell["metadata"]["execution"][name].replace("Z", "+00:00"))
            for name in ("iopub.execute_input", "shell.execute_reply")
        )
        times[cell["id"]] = (done - begun).total_seconds()
    return times


def check(submission: pd.DataFrame, data: Path, predicted: Path) -> float:
    """The largest difference of a submission from that of `predict`; AssertionError if it is not a submission."""
    sample = pd.read_csv(data / "sample_submission.csv")
    assert list(submission["row_id"]) == list(sample["row_id"]), "other rows than the sample's"
    values = submission.set_index("row_id")[list(SEVERITIES)]
    assert np.isfinite(values.to_numpy()).all()
    np.testing.assert_allclose(values.sum(axis=1), 1, atol=1e-6)
    expected = pd.read_csv(predicted / "submission.csv").set_index("row_id").loc[values.index, list(SEVERITIES)]
    return float(np.abs(values - expected).to_numpy().max())


def main(run: Path, studies: int) -> None:
    """Rehearse, and print the result and its assumptions."""
    with tempfile.TemporaryDirectory() as temporary:
        root, bundle = Path(temporary) / "kaggle", Path(temporary) / "bundle"
        wheels = kaggle.write_bundle(run, bundle, "someone", sys.version.split()[0])
        data = lay_out(root, bundle, studies)
        python = make_image(Path(temporary) / "image")
        (notebook,) = (bundle / "notebook").glob("*.ipynb")
        times = seconds(execute(python, notebook, root))
        done = run_all(run.parents[1], "predict", str(data), "--run", run.name, "--out", f"{temporary}/predicted")
        assert done.returncode == 0, done.stdout + done.stderr
        submission = pd.read_csv(root / "working" / "submission.csv")
        difference = check(submission, data, Path(temporary) / "predicted")
        home = sorted(
            str(file.relative_to(root.parent)) for file in (root.parent / "home").rglob("*") if file.is_file()
        )
    each = times[GRADING] / studies
    around = sum(times.values()) - times[GRADING]
    image = kaggle_image.read_image()
    other = [f"{name} {version(name)} (the image: {image[name]})" for name in LINKED]
    print(f"{len(submission)} rows, {len(COLUMNS)} a study; largest difference from predict: {difference:.1e}")
    print(f"wheels: {', '.join(wheels)}")
    print(f"written in the home folder: {', '.join(home) or 'nothing'}")
    print(f"untested: Python {image['python']} (here {sys.version.split()[0]}), {', '.join(other)}, a GPU")
    model = next(line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line)
    hours = (each * HIDDEN + around) / 3600
    print(f"{each:.1f} s a study and {around:.0f} s around them, by these models on {os.cpu_count()} cores of {model};")
    print(f"{HIDDEN} studies would take {hours:.1f} of {HOURS} hours")
    assert difference <= 1e-6


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 6)
