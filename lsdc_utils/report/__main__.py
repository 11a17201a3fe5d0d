"""What the repository shows of a run: `python -m lsdc_utils.report readme --run demo`, `... sample`, `... costs`.

readme fills the README's places between `<!-- scores demo -->` or `<!-- picture demo example -->` and the next
`<!-- end -->`, and keeps what it wrote them from in docs/, where a test compares the two. sample copies the run's
report to outputs/sample/, which is committed, and pictures three of its pages for the README. costs fills the place of
what the trainings of a run take, from the estimate that it told when it began.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

from lsdc_utils import figures
from lsdc_utils.files import atomic, write_json
from lsdc_utils.pipeline import costs
from lsdc_utils.report.markdown import markdown, record_of, score_lines, titled
from lsdc_utils.report.pictures import run_pictures
from lsdc_utils.report.run import (
    ROOT,
    Run,
    experiment_tables,
    localisation_tables,
    read_run,
    stress_sentences,
)
from lsdc_utils.stress import trials

PLACE = re.compile(
    r"(<!-- (scores|localisation|stress|experiments|picture|costs) (\S+) ?(\S*) -->\n)(.*?)(<!-- end -->)", re.S
)


def fill(text: str, run: str, record: dict[str, Any]) -> str:
    """The README with the places of `run` filled from its record; places of other runs stay."""

    def replacement(place: re.Match) -> str:
        """What a marked place of the README is to hold."""
        if place[3] != run:
            return place[0]
        if place[2] == "picture":
            content = picture_line(run, place[4], record)
        elif place[2] == "localisation":
            content = titled(localisation_tables(pd.DataFrame(record["localisation"])))
        elif place[2] == "stress":
            told = [
                *stress_sentences(record["scores"]),
                markdown(trials.data_sheet(pd.DataFrame(record["settings"]))),
            ]
            content = "\n\n".join(told)
        elif place[2] == "costs":
            table = pd.DataFrame(record["costs"])
            told = f"Steps were timed and memory measured on one {table['device'].iloc[0]}."
            content = f"{markdown(costs.shown(table))}\n\n{told}"
        elif place[2] == "experiments":
            content = titled(experiment_tables({k: pd.DataFrame(rows) for k, rows in record["experiments"].items()}))
        else:
            content = score_lines(run, record)
        return f"{place[1]}{content}\n{place[6]}"

    return PLACE.sub(replacement, text)


def picture_line(run: str, name: str, record: dict[str, Any]) -> str:
    """A picture of docs/ with its caption, as Markdown."""
    caption = record["captions"][name]
    return f"![{caption}](docs/{run}-{name}.png)\n\n*{caption}*"


def update_readme(run: Run, readme: Path = ROOT / "README.md") -> None:
    """Fill the places of a run in `readme`, with its record and the pictures asked for in docs/ beside it.

    Experiments that were not made again round the run stay; their headings tell the commit.
    ValueError where the readme has no place for the run or asks for a picture that the run lacks.
    """
    text, docs = readme.read_text(), readme.parent / "docs"
    wanted = [(place[2], place[4]) for place in PLACE.finditer(text) if place[3] == run.name]
    if not wanted:
        raise ValueError(f"{readme} has no place such as <!-- scores {run.name} --> ... <!-- end -->")
    made = {picture.name: picture for picture in run_pictures(run)}
    names = [name for kind, name in wanted if kind == "picture"]
    if not set(names) <= set(made):
        raise ValueError(f"{readme} asks for the pictures {names}; run {run.name} has {sorted(made)}")
    file = docs / f"{run.name}.json"
    record = {**record_of(run), "captions": {name: made[name].caption for name in names}}
    if file.is_file():
        record["experiments"] = json.loads(file.read_text()).get("experiments", {}) | record["experiments"]
    for name in names:
        with atomic(docs / f"{run.name}-{name}.png") as temporary:
            made[name].figure.savefig(temporary)
    write_json(file, record)
    with atomic(readme) as temporary:
        temporary.write_text(fill(text, run.name, record))


def update_costs(folder: Path, readme: Path = ROOT / "README.md") -> None:
    """Fill the README's place of what a run's trainings cost from the estimate in its folder; FileNotFoundError where
    the run was not begun on real data."""
    record = {"costs": pd.read_csv(folder / "costs.csv").to_dict("records")}
    write_json(readme.parent / "docs" / f"{folder.name}.json", record)
    with atomic(readme) as temporary:
        temporary.write_text(fill(readme.read_text(), folder.name, record))


def update_sample(run: Run, sample: Path = ROOT / "outputs" / "sample") -> None:
    """Copy a run's report to `sample`, and picture three of its pages in docs/ beside outputs/.

    FileNotFoundError where the run has no report; playwright's errors where there is no browser.
    """
    source = run.folder / "report"
    shutil.rmtree(sample, ignore_errors=True)
    shutil.copytree(source, sample)
    whole = [file for file in sorted(sample.glob("study_*.html")) if 'type="range"' in file.read_text()]
    study = max(whole, key=lambda file: file.read_text().count("<figure"))  # most findings
    for file, name in ((sample / "index.html", "summary"), (study, "study"), (sample / "studies.html", "studies")):
        photograph(file, sample.parents[1] / "docs" / f"sample-{name}.png")


def photograph(page: Path, picture: Path) -> None:
    """The top of a page as a browser shows it, as PNG."""
    from playwright.sync_api import sync_playwright  # of the tests: nothing else needs a browser

    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        shown = browser.new_page(viewport={"width": 1440, "height": 1080}, color_scheme="light")
        shown.goto(page.as_uri())
        with atomic(picture) as temporary:
            temporary.write_bytes(shown.screenshot())
        browser.close()


def main() -> None:
    """Read the command line, write README.md and docs/, or outputs/sample/ and docs/."""
    parser = argparse.ArgumentParser(prog="python -m lsdc_utils.report", description="Write a run's results.")
    parser.add_argument("command", choices=["readme", "sample", "costs"])
    parser.add_argument("--run", default="demo", help="name of a run under outputs/")
    given = parser.parse_args()
    figures.use_style()
    folder = ROOT / "outputs" / given.run
    if given.command == "costs":
        update_costs(folder)
        print(f"README.md and docs/ now show what the trainings of run {given.run} cost")
    elif given.command == "sample":
        update_sample(read_run(folder))
        print(f"outputs/sample/ and docs/ now show the report of run {given.run}")
    else:
        update_readme(read_run(folder))
        print(f"README.md and docs/ now show run {given.run}")


if __name__ == "__main__":
    main()
