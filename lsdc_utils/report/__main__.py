"""Copy a finished run into the repository: `python -m lsdc_utils.report sample --run demo`, or `... results`.
`sample` copies the report to outputs/sample/ and takes pictures of three of its pages for docs/. `results` writes the
tables between markers such as `<!-- scores demo -->` and `<!-- end -->` in README.md and docs/results.md, the two
figures that they show, and docs/<run>.json with the numbers."""

import argparse
import shutil
from pathlib import Path

from lsdc_utils import figures
from lsdc_utils.files import atomic, write_json
from lsdc_utils.report import run as tables
from lsdc_utils.report.card import markdown_table, score_lines, sentences
from lsdc_utils.report.pictures import plot_doses, plot_example

ROOT = Path(__file__).resolve().parents[2]


def write_sample(run: tables.Run, root: Path) -> None:
    """Copy a run's report and step table to outputs/sample/ of `root`, and pictures of it to docs/; needs a browser."""
    from playwright.sync_api import sync_playwright  # a package of the tests

    sample = root / "outputs/sample"
    shutil.rmtree(sample, ignore_errors=True)
    shutil.copytree(run.folder / "report", sample)
    shutil.copy(run.folder / "logs/steps.csv", sample)
    study = max(sample.glob("study_*.html"), key=lambda file: file.stat().st_size)  # one with all slices
    with sync_playwright() as playwright:
        path = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=path)
        page = browser.new_page(viewport={"width": 1440, "height": 1080}, color_scheme="light")
        for name, file in (("summary", "index.html"), ("study", study.name), ("studies", "studies.html")):
            page.goto((sample / file).as_uri())
            page.screenshot(path=root / f"docs/sample-{name}.png")
        browser.close()


def write_results(run: tables.Run, root: Path) -> None:
    """Fill the run's markers in README.md and docs/results.md of `root`; write its numbers and figures to docs/."""
    experiments = tables.experiment_tables(run.experiments)
    settings = markdown_table(tables.settings_table(run.settings))
    content = {
        "table": score_lines(run).partition("\n\n")[2],  # without the sentences
        "scores": score_lines(run),
        "localisation": markdown_table(tables.localisation_table(run.localisation)),
        "evidence": markdown_table(tables.evidence_table(run.evaluation)),
        "stress": f"{' '.join(sentences(run, 'stress'))}\n\n{settings}",
        "experiments": "\n\n".join(f"{name}:\n\n{markdown_table(table)}" for name, table in experiments.items()),
    }
    for file in (root / "README.md", root / "docs/results.md"):
        text = file.read_text()
        for name, block in content.items():
            head, marker, rest = text.partition(f"<!-- {name} {run.name} -->\n")
            text = f"{head}{marker}{block}\n{rest[rest.index('<!-- end -->') :]}" if marker else text
        with atomic(file) as temporary:
            temporary.write_text(text)
    for picture in (plot_example(run), plot_doses(run)):
        if picture:
            picture.figure.savefig(root / f"docs/{run.name}-{picture.name}.png")
    numbers = {"scores": run.scores, "evaluation": run.evaluation, "stress": run.stress}
    write_json(root / f"docs/{run.name}.json", {"facts": tables.provenance(run)} | numbers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lsdc_utils.report", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["sample", "results"])
    parser.add_argument("--run", default="demo", help="name of a run in outputs/ (default: demo)")
    asked = parser.parse_args()
    figures.use_style()
    write = write_sample if asked.command == "sample" else write_results
    write(tables.Run(ROOT / "outputs" / asked.run), ROOT)
    print(f"{asked.command} of run {asked.run} written")
