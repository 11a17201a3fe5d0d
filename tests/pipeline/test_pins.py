"""The pins: they cover what is imported, and are renewed part by part."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.metadata import packages_distributions

import pytest
import yaml
from conftest import ROOT

from lsdc_utils.pipeline import pins

TOOLS = {  # asked for by name and imported nowhere
    "torchvision": "ultralytics and timm want the one that goes with torch",
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
TEXT = """\
# What is asked for.
torch==2.0.0
Some_Thing==1.2

# What these need,
# in turn.
another==3.0
gone==1.0
"""
FOUND = {"torch": "3.1.0+cpu", "some-thing": "1.2", "Another": "3.1", "new": "0.1"}
FOUND |= {"nvidia-cublas": "13", "triton": "3", "nvidia-ml-py": "13.1"}
REPORT = {"install": [{"metadata": {"name": name, "version": version}} for name, version in FOUND.items()]}


def imported() -> Iterator[tuple[str, str]]:
    """Top-level name of each import that is neither Python's own nor ours, and where it stands."""
    ours = {file.stem for file in (ROOT / "tests").rglob("*")}
    texts = {file: file.read_text() for folder in ("lsdc_utils", "tests") for file in (ROOT / folder).rglob("*.py")}
    for file in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
        texts[file] = "\n".join("".join(cell["source"]) for cell in cells)
    for file, text in texts.items():
        for name in pins.imported(text) - ours:
            yield name, str(file.relative_to(ROOT))


def test_what_is_imported_is_asked_for_and_what_is_asked_for_is_used() -> None:
    asked = {pins.normalised(name) for name in pins.read_pins(pins.REQUIREMENTS.read_text()).asked}
    provides, used = packages_distributions(), set()
    for name, file in imported():
        mine = {pins.normalised(one) for one in provides.get(name, [])}
        assert mine & asked, f"{file} imports {name}, which no pin of the first part provides"
        used |= mine
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


def test_the_pins_are_read_and_written_back_as_they_are() -> None:
    for text in (TEXT, pins.REQUIREMENTS.read_text()):
        assert pins.rewritten(text, pins.read_pins(text)) == text


def test_renewed_pins_keep_parts_and_spellings_and_leave_a_platform_out() -> None:
    old = pins.read_pins(TEXT)
    new = pins.renewed(old, pins.versions(REPORT))
    assert new == pins.Pins(
        {"torch": "3.1.0", "Some_Thing": "1.2"}, {"another": "3.1", "new": "0.1", "nvidia-ml-py": "13.1"}
    )
    told = [line.split() for line in pins.changes(old, new)]
    assert told == [
        ["another", "3.0", "->", "3.1"],
        ["gone", "1.0", "goes"],
        ["new", "->", "0.1", "comes"],
        ["nvidia-ml-py", "->", "13.1", "comes"],
        ["torch", "2.0.0", "->", "3.1.0", "another", "major", "version"],
    ]


def test_pips_own_words_are_told(monkeypatch, tmp_path) -> None:
    (tmp_path / "requirements.txt").write_text("# a\nno-such-distribution-anywhere==1\n\n# b\nx==1\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(pins.PinError, match="no-such-distribution-anywhere"):
        pins.renew(True, tmp_path / "requirements.txt")
    assert "no-such-distribution-anywhere==1" in (tmp_path / "requirements.txt").read_text()
