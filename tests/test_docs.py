"""README and docs: short enough to be read, no dead links, parameters and files that exist."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml
from conftest import ROOT

sys.path.append(str(ROOT / "tests/proofs"))
import reproduce

import docs

PAGES = docs.PAGES


def test_the_readme_is_read_in_three_minutes() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 9000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing
    assert targets or page.parent.name == "docs"  # the README leads to all others


def anchors_of(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_into_pages_lead_to_headings(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)", page.read_text())
    links = [(page.parent / target if target else page, anchor) for target, anchor in links if "://" not in target]
    missing = [f"{target.name}#{anchor}" for target, anchor in links if anchor not in anchors_of(target)]
    assert not missing and (links or page.name == "guarantees.md")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_parameters_in_examples_exist(page: Path) -> None:
    parameters = yaml.safe_load((ROOT / "notebooks/profiles/demo.yml").read_text())
    calls = [command for command in docs.page_commands(page) if "run_all.sh" in command]
    named = re.findall(r"(?<!\S)([a-z]\w*)=", " ".join(calls))
    assert set(named) <= set(parameters)


@pytest.mark.parametrize("page", reproduce.PAGES, ids=lambda page: page.name)
def test_tables_of_results_name_their_run_and_commit(page: Path) -> None:
    tables = re.findall(r"<!-- (?:table|scores) ([\w ]+) -->\n(.*?)<!-- end -->", page.read_text(), re.DOTALL)
    assert tables
    of_proofs = {"trainings", "t1", "refine", "curve", *(name for s in reproduce.STEPS.values() for name in s.prints)}
    for name, table in tables:
        named = re.search(r"[Rr]un `\w+`.* commit [0-9a-f]{12}", table)
        if name in of_proofs:
            named = re.search(r"\bCommits? [0-9a-f]{12}\b", table)
        if "| Commit |" in table:  # each line its own, but for what is made of several
            rows = [row for row in table.splitlines()[2:] if not row.startswith(("| mean", "| range"))]
            named = rows and all(re.search(r"\b[0-9a-f]{12} \|$", row) for row in rows)
        assert named or table == "Not made with the present code.\n"


def test_readme_results_and_sample_are_of_one_commit() -> None:
    facts = json.loads((ROOT / "docs/demo.json").read_text())["facts"]
    for page in (ROOT / "README.md", ROOT / "docs/results.md"):
        assert re.findall(r"Run `demo`, .* commit (\w+),", page.read_text()) == [facts["Commit"]]
    assert facts["Commit"] in (ROOT / "outputs/sample/index.html").read_text()


def test_the_proof_of_the_docs_knows_every_command_and_no_other(monkeypatch, tmp_path: Path) -> None:
    assert docs.differences() == []
    page = tmp_path / "page.md"
    page.write_text("```\n./run_all.sh new   # it\n```\n```text\nno command\n```\nAs `python a.py`, in `Python`.\n")
    assert docs.page_commands(page) == ["./run_all.sh new", "python a.py"]
    monkeypatch.setattr(docs, "PAGES", [page])
    wrong = docs.differences()
    assert wrong[:2] == [f"not in the tables of tests/proofs/docs.py: {c}" for c in ("./run_all.sh new", "python a.py")]
    assert "in the tables, but on no page: ./run_all.sh --help" in wrong


def test_what_the_proof_runs_is_the_command_that_the_docs_name() -> None:
    for command, (_, expected) in docs.COMMANDS.items():
        said, done = command.split(), docs.as_run(command).split()
        named = 1 if len(said) == 1 or said[1].startswith("-") else 2  # program, and command or script
        assert done[:named] == said[:named] and expected, command


@pytest.mark.parametrize("proof", sorted((ROOT / "tests/proofs").glob("*.py")), ids=lambda file: file.name)
def test_a_proof_finds_the_package_wherever_it_is_started(proof: Path) -> None:
    head, _, rest = proof.read_text().partition("sys.path")
    assert "import lsdc_utils" not in head and "from lsdc_utils" not in head
    assert rest or "lsdc_utils import" not in proof.read_text()


def test_the_list_of_outcomes_holds_no_failure_and_the_docs_quote_it() -> None:
    listed = pd.read_csv(ROOT / "docs/commands.csv", keep_default_na=False, dtype=str)
    run = listed["status"] == "0"
    assert (listed["run"] != "").equals(run) and listed.loc[~run, "status"].str.startswith("not run: ").all()
    quoted = f"{run.sum()} commands ran, {(~run).sum()} did not"
    assert quoted in " ".join((ROOT / "docs/guarantees.md").read_text().split())
