"""The pins cover what is imported, and conda, pip and the build machine use the same."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import kaggle_image
import yaml
from conftest import ROOT

TOOLS = {  # asked for by name and imported nowhere
    "pylibjpeg": "decodes for pydicom",
    "pylibjpeg-libjpeg": "decodes for pydicom",
    "pylibjpeg-openjpeg": "decodes for pydicom",
    "pyjpegls": "decodes for pydicom",
    "jupyterlab": "started by ./run_all.sh lab",
    "ipykernel": "runs the notebooks",
    "nbstripout": "git's filter for notebooks",
    "pyarrow": "Parquet for pandas",
    "tqdm": "bars of ultralytics' training",
    "ruff": "the linter",
    "snakemake": "started by the runner",
    "pytest-xdist": "lets ./run_all.sh test use several processes",
    "snakemake-executor-plugin-slurm": "loaded by snakemake for --slurm",
}


def normalised(name: str) -> str:
    """A distribution's name in the spelling that all others share."""
    return re.sub(r"[-_.]+", "-", name).lower()


def asked_for() -> set[str]:
    """The pins that the project asks for by name, those above the second comment of requirements.txt."""
    part = (ROOT / "requirements.txt").read_text().split("\n\n")[0]
    return {normalised(name) for name in re.findall(r"^([\w.-]+)==", part, re.MULTILINE)}


def imported() -> Iterator[tuple[str, str]]:
    """Top-level name of each import that is neither Python's own nor ours, and where it stands."""
    ours = {file.stem for file in (ROOT / "tests").rglob("*")}
    texts = {file: file.read_text() for folder in ("lsdc_utils", "tests") for file in (ROOT / folder).rglob("*.py")}
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
        texts[file] = "\n".join("".join(cell["source"]) for cell in cells)
    for file, text in texts.items():
        for name in kaggle_image.imported(text) - ours:
            yield name, str(file.relative_to(ROOT))


def test_what_is_imported_is_asked_for_and_what_is_asked_for_is_used() -> None:
    asked, provides, used = asked_for(), packages_distributions(), set()
    of_proofs = set(re.findall(r"^([\w.-]+)==", (ROOT / "requirements-proofs.txt").read_text(), re.MULTILINE))
    for name, file in imported():
        if name in of_proofs:  # need not be installed
            assert "/proofs/" in file, f"{file} imports {name}, which only the proofs may need"
            continue
        distributions = {normalised(distribution) for distribution in provides.get(name, [])}
        assert distributions & asked, f"{file} imports {name}, which no pin of the first part provides"
        used |= distributions
    assert asked - used == set(TOOLS)


def test_conda_users_get_the_same_pins() -> None:
    wanted = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert {"pip": ["-r requirements.txt"]} in wanted or {"pip": ["--requirement requirements.txt"]} in wanted


def test_a_build_machine_calls_the_commands_of_the_readme() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    steps = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert "./run_all.sh" in steps and ".ci/run" in steps
    assert (ROOT / ".ci/run").read_text().rstrip().endswith("./run_all.sh test")
    assert workflow["permissions"] == {"contents": "read"}
