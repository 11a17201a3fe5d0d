"""README and docs: short enough to be read, no dead links, parameters and files that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing
    assert targets or page.parent.name == "docs"  # the README leads to all others


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_parameters_in_examples_exist(page: Path) -> None:
    parameters = yaml.safe_load((ROOT / "notebooks/profiles/demo.yml").read_text())
    blocks = re.findall(r"^ *```\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL)
    calls = [line.partition("#")[0] for block in blocks for line in block.splitlines() if "run_all.sh" in line]
    named = re.findall(r"(?<!\S)([a-z]\w*)=", " ".join(calls))
    assert set(named) <= set(parameters)


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "docs/results.md"], ids=lambda page: page.name)
def test_tables_of_results_name_their_run_and_commit(page: Path) -> None:
    tables = re.findall(r"<!-- (?:table|scores) \w+ -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL)
    assert tables
    for table in tables:
        assert re.search(r"[Rr]un `\w+`.* commit [0-9a-f]{12}", table)
