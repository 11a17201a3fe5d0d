"""What grades the hidden studies on Kaggle: a dataset of models, package and wheels, and the notebook 05 that uses it.

The notebook runs on Kaggle's image without a network, so wheels of whatever the image lacks lie in the dataset. What
the image has is listed in kaggle_image.txt.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path
from typing import Any

import nbformat
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from lsdc_utils.downloads import COMPETITION
from lsdc_utils.files import write_json
from lsdc_utils.pipeline.pack import pack_run, unpack
from lsdc_utils.pipeline.pins import PIN, imported
from lsdc_utils.pipeline.predict import graded_by, read_recipe
from lsdc_utils.pipeline.steps import NOTEBOOKS, ROOT, module_files

IMAGE = Path(__file__).with_name("kaggle_image.txt")
GRADES = NOTEBOOKS / "05_ensemble_inference.ipynb"
USER = "KAGGLE_USER"  # stands for a name that nobody gave
NEVER = {"torch", "torchvision", "numpy"}  # all else on the image was built for the ones that are there
EXACT = {"timm", "opencv-python"}  # ours: timm's layers may change; OpenCV 4 samples images otherwise (1e-5 in a row)
UNNAMED = ("pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pyjpegls", "pyarrow", "torchvision")  # by no import
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 16, -1)] + ["manylinux2014_x86_64"]  # Ubuntu 22.04
BEGIN = """\
import os
import subprocess
import sys
from pathlib import Path

kaggle = Path(os.environ.setdefault("LSDC_KAGGLE", "/kaggle"))  # a rehearsal has its own
found = [path.parent for place in ("*", "datasets/*/*") for path in kaggle.glob(f"input/{place}/lsdc_utils")]
assert len(found) == 1, f"attach one dataset of kaggle-bundle; there are {len(found)} in {kaggle / 'input'}"
bundle = found[0]
wheels = [str(file) for file in sorted((bundle / "wheels").iterdir())]
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels], check=True)
sys.path.insert(0, str(bundle))

from lsdc_utils.sources import find_data

data, _ = find_data()
"""
PLACES = {  # parameters whose values are known on Kaggle alone
    "run_dir": 'str(bundle / "models")',
    "data_dir": "str(data)",
    "out_dir": 'str(kaggle / "working")',
}


class BundleError(RuntimeError):
    """A bundle that cannot be made; the message says what is missing."""


def user_here() -> str:
    """The name on Kaggle of whoever has its credentials on this machine."""
    file = Path.home() / ".kaggle" / "kaggle.json"
    return json.loads(file.read_text()).get("username", USER) if file.is_file() else USER


def write_bundle(run: Path, out: Path, user: str, python: str = "") -> list[str]:
    """Write `out`/dataset and `out`/notebook of the finished run in folder `run`; return the wheels' names.

    python: version that wheels are for; Kaggle's by default. PackError where the run lacks something, BundleError where
    a wheel cannot be had. Metadata come last: without them Kaggle's command line takes no folder.
    """
    name = re.sub(r"[^a-z0-9]+", "-", f"lsdc-{run.name.lower()}").strip("-")
    dataset, notebook = out / "dataset", out / "notebook"
    (dataset / "dataset-metadata.json").unlink(missing_ok=True)
    for part in ("models", "lsdc_utils"):
        shutil.rmtree(dataset / part, ignore_errors=True)
    (dataset / "wheels").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        pack_run(run, Path(temporary) / "models.zip")
        unpack(Path(temporary) / "models.zip", Path(temporary)).rename(dataset / "models")
    shutil.copytree(ROOT / "lsdc_utils", dataset / "lsdc_utils", ignore=shutil.ignore_patterns("__pycache__"))
    image = read_image()
    python = python or image["python"]
    fetch(lacking(image, python, roots()), dataset / "wheels", python)
    notebook.mkdir(exist_ok=True)
    nbformat.write(inference_notebook(read_recipe(run)), notebook / f"{name}.ipynb")
    write_json(notebook / "kernel-metadata.json", kernel_metadata(user, name))
    licence = {"licenses": [{"name": "other"}]}
    write_json(dataset / "dataset-metadata.json", {"title": name, "id": f"{user}/{name}", **licence})
    return sorted(file.name for file in (dataset / "wheels").iterdir())


def kernel_metadata(user: str, name: str) -> dict[str, Any]:
    """What Kaggle wants to know of the notebook: private, on a GPU, without a network."""
    return {
        "id": f"{user}/{name}-inference",
        "title": f"{name}-inference",
        "code_file": f"{name}.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "machine_shape": "NvidiaTeslaT4",  # else an older GPU, for which the image's torch has no code
        "enable_internet": False,
        "dataset_sources": [f"{user}/{name}"],
        "competition_sources": [COMPETITION],
        "kernel_sources": [],
    }


def inference_notebook(recipe: dict[str, Any]) -> nbformat.NotebookNode:
    """05 with a cell before it that makes ready what the bundle brings, and the parameters that `predict` would set."""
    notebook = nbformat.read(GRADES, as_version=4)
    values = PLACES | {name: repr(value) for name, value in graded_by(recipe).items()}
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in values.items():
        line = re.compile(rf"^({name}: \w+ = ).*?(  # .*)$", re.MULTILINE)
        cell.source = line.sub(lambda found, value=value: found[1] + value + found[2], cell.source)
    notebook.cells.insert(1, nbformat.v4.new_code_cell(BEGIN, id="kaggle-begin"))
    return notebook


# ---- wheels of what the image lacks --------------------------------------------------------------------------------


def read_image() -> dict[str, str]:
    """What Kaggle's image has, as far as it matters here: name -> version, Python's own among them."""
    return {canonicalize_name(name): found for name, found in PIN.findall(IMAGE.read_text())}


def roots() -> set[str]:
    """The distributions that 05 and the modules that it uses import, or load by name."""
    cells = [cell.source for cell in nbformat.read(GRADES, as_version=4).cells if cell.cell_type == "code"]
    files = set().union(*map(module_files, cells))
    names = set().union(*map(imported, [*cells, *(file.read_text() for file in files if file.suffix == ".py")]))
    provides = packages_distributions()
    return {*UNNAMED, *(one for name in names for one in provides[name])}


def lacking(image: dict[str, str], python: str, wanted: Iterable[str]) -> dict[str, str]:
    """What `wanted` distributions need, they among it, and an image lacks, has in another version than is required, or
    than EXACT asks for: name -> version here. What the image has brings its own requirements."""
    environment = default_environment() | {"python_version": ".".join(python.split(".")[:2]), "extra": ""}
    waiting, found = [Requirement(name) for name in wanted], {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        there = image.get(name)
        if name in found or (there and there == version(name)):
            continue
        if there and name not in EXACT and requirement.specifier.contains(there):
            continue
        if there and name in NEVER:
            raise BundleError(f"{requirement} is needed, and Kaggle's image has {there}, which nothing here replaces")
        found[name] = version(name)
        needed = [Requirement(text) for text in requires(name) or ()]
        waiting += [one for one in needed if one.marker is None or one.marker.evaluate(environment)]
    return found


def fetch(wanted: dict[str, str], folder: Path, python: str) -> None:
    """Let `folder` hold wheels of just these distributions; those that are there are kept. BundleError where one cannot
    be had: this step alone needs a network."""
    there = {}
    for file in folder.glob("*.whl"):
        name, found, *_ = parse_wheel_filename(file.name)
        if wanted.get(name) == str(found):
            there[name] = file
        else:
            file.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps", "--dest", folder]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    for name in wanted.keys() - there.keys():
        done = subprocess.run([*command, f"{name}=={wanted[name]}"], capture_output=True, text=True)
        if done.returncode:
            raise BundleError(
                f"the wheel of {name} {wanted[name]} for Python {python} cannot be fetched, for which a network is "
                f"needed once, or put into {folder} by hand: {done.stderr.strip()}"
            )
