"""A bundle that grades Kaggle's hidden studies offline: a data set of models, package and wheels, and notebook 05."""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from packaging.utils import canonicalize_name, parse_wheel_filename

from lsdc_utils.downloads import COMPETITION
from lsdc_utils.files import write_json
from lsdc_utils.grading.run_tables import read_recipe
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import NOTEBOOKS, ROOT
from lsdc_utils.pipeline.pack import pack_run, unpack
from lsdc_utils.pipeline.predict import grading_parameters

WHEELS = Path(__file__).with_name("kaggle_wheels.txt")  # those that the image lacks
PYTHON = "3.12.13"  # of Kaggle's image
GRADES = NOTEBOOKS / "05_ensemble_inference.ipynb"
USER = "KAGGLE_USER"  # until the user gives a name
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 16, -1)] + ["manylinux2014_x86_64"]  # Ubuntu 22.04
BEGIN = """\
import os
import subprocess
import sys
from pathlib import Path

kaggle = Path(os.environ.setdefault("LSDC_KAGGLE", "/kaggle"))  # a rehearsal has its own
bundles = [path.parent for place in ("*", "datasets/*/*") for path in kaggle.glob(f"input/{place}/lsdc_utils")]
assert len(bundles) == 1, f"attach one data set of kaggle-bundle; there are {len(bundles)} in {kaggle / 'input'}"
bundle = bundles[0]
wheels = [str(file) for file in sorted((bundle / "wheels").iterdir())]
subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", *wheels], check=True)
sys.path.insert(0, str(bundle))

from lsdc_utils.downloads import find_data

data, _ = find_data()
"""
# Parameters whose values are known on Kaggle alone.
PLACES = {"run_dir": 'str(bundle / "models")', "data_dir": "str(data)", "out_dir": 'str(kaggle / "working")'}


def user_here() -> str:
    """The Kaggle user whose credentials are on this machine."""
    file = Path(os.path.expanduser("~/.kaggle/kaggle.json"))
    return json.loads(file.read_text()).get("username", USER) if file.is_file() else USER


def write_bundle(run: Path, out: Path, user: str, python: str = PYTHON) -> list[str]:
    """Write `out`/dataset and `out`/notebook of the finished run in folder `run`; return the wheels' names. python: the
    version that wheels are for. RunError or UsageError if the run is not finished or a wheel cannot be had."""
    name = re.sub(r"[^a-z0-9]+", "-", f"lsdc-{run.name.lower()}").strip("-")
    dataset, notebook = out / "dataset", out / "notebook"
    (dataset / "wheels").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        pack_run(run, Path(temporary) / "models.zip")  # first: an unfinished run replaces no bundle
        models = unpack(Path(temporary) / "models.zip", Path(temporary))
        (dataset / "dataset-metadata.json").unlink(missing_ok=True)
        for part in ("models", "lsdc_utils"):
            shutil.rmtree(dataset / part, ignore_errors=True)
        models.rename(dataset / "models")
    shutil.copytree(ROOT / "lsdc_utils", dataset / "lsdc_utils", ignore=shutil.ignore_patterns("__pycache__"))
    fetch(read_wheels(), dataset / "wheels", python)
    notebook.mkdir(exist_ok=True)
    nbformat.write(inference_notebook(read_recipe(run)), notebook / f"{name}.ipynb")
    settings = {"language": "python", "kernel_type": "notebook", "is_private": True}
    # Without its name an older GPU is given, for which the image's torch has no code.
    machine = {"machine_shape": "NvidiaTeslaT4", "enable_gpu": True, "enable_internet": False}
    names = {"id": f"{user}/{name}-inference", "title": f"{name}-inference", "code_file": f"{name}.ipynb"}
    sources = {"dataset_sources": [f"{user}/{name}"], "competition_sources": [COMPETITION], "kernel_sources": []}
    write_json(notebook / "kernel-metadata.json", names | settings | machine | sources)
    about = {"title": name, "id": f"{user}/{name}", "licenses": [{"name": "other"}]}
    write_json(dataset / "dataset-metadata.json", about)  # last: Kaggle's command line refuses a folder without it
    return sorted(file.name for file in (dataset / "wheels").iterdir())


def inference_notebook(recipe: dict[str, Any]) -> nbformat.NotebookNode:
    """05 with a first cell that installs the bundle, and with the parameters that `predict` would set."""
    notebook = nbformat.read(GRADES, as_version=4)
    values = PLACES | {name: repr(value) for name, value in grading_parameters(recipe).items()}
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    for name, value in values.items():
        line = re.compile(rf"^({name}: \w+ = ).*?(  # .*)$", re.MULTILINE)
        cell.source = line.sub(lambda match, value=value: match[1] + value + match[2], cell.source)
    notebook.cells.insert(1, nbformat.v4.new_code_cell(BEGIN, id="kaggle-begin"))
    return notebook


def read_wheels() -> dict[str, str]:
    """What the bundle brings, as requirements.txt has it: name -> version."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    versions = {canonicalize_name(name): version for name, version in pins.items()}
    return {name: versions[name] for name in re.findall(r"^([\w.-]+)$", WHEELS.read_text(), re.MULTILINE)}


def fetch(wanted: dict[str, str], folder: Path, python: str) -> None:
    """Let `folder` hold just these wheels; those already there are kept. UsageError if one cannot be downloaded."""
    there = set()
    for file in folder.glob("*.whl"):
        name, number, *_ = parse_wheel_filename(file.name)
        if wanted.get(name) == str(number):
            there.add(name)
        else:
            file.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--only-binary=:all:", "--no-deps", "--dest", folder]
    command += ["--python-version", python, "--implementation", "cp"]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    for name in wanted.keys() - there:
        done = subprocess.run([*command, f"{name}=={wanted[name]}"], capture_output=True, text=True)
        if done.returncode:
            tail = "\n".join(f"      {line}" for line in done.stderr.strip().splitlines()[-15:])
            remedy = f"this needs the network once. Or put it into {folder} by hand. pip's last lines:\n{tail}"
            raise UsageError(f"cannot download the wheel of {name} {wanted[name]} for Python {python}; {remedy}")
