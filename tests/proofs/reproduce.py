"""Everything made again: `python tests/proofs/reproduce.py [STEP ...]` runs the chain of `STEPS`, or some of its steps,
in this folder, and keeps the list of what was made by which commands, on which commit, in docs/figures.csv.

The list also holds a hash of the code that decides each step's result, as the pipeline has one for each notebook. A
step whose code has not changed is not run again, and each command resumes where it was stopped, so the chain may be
stopped at any time and goes on in another clone. `--list` runs nothing: it writes the list to docs/development.md, and
says which figures are older than their code. All of it takes a night on two cores. Tables of several trainings go to
docs/results.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from chain import ROOT, committed, timed  # noqa: E402

from lsdc_utils import metric  # noqa: E402
from lsdc_utils.pipeline import graph  # noqa: E402
from lsdc_utils.pipeline.arguments import OUTPUTS  # noqa: E402
from lsdc_utils.pipeline.experiments import ABLATIONS  # noqa: E402
from lsdc_utils.report.card import markdown_table  # noqa: E402

TABLE, PAGE, CACHE = ROOT / "docs/figures.csv", ROOT / "docs/results.md", "outputs/reproduce"
LIST = ROOT / "docs/development.md"
SEEDS = (53, 54)  # of folds and training, beside the demo's 52
RUNS = ("demo", *(f"demo-seed{seed}" for seed in SEEDS))
DECIDING = [name for name in graph.NOTEBOOK_ORDER if name not in ("phantom", "08_report")]  # a run's numbers


@dataclass(frozen=True)
class Step:
    """Commands, and the figures that they make."""

    makes: str
    commands: tuple[str, ...]
    after: tuple[str, ...] = ()  # steps whose results it reads
    leaves: str = ""  # what must be there for a step after it


STEPS = {
    "demo": Step("scores and stress tests of the demo", ("./run_all.sh",), leaves="outputs/demo/scores.json"),
    "pages": Step(
        "README, results and sample: tables and pictures of the demo",
        tuple(f"python -m lsdc_utils.report {what} --run demo" for what in ("results", "sample")),
        after=("demo",),
    ),
    "seeds": Step(
        "the demo with two more seeds of folds and training",
        tuple(f"./run_all.sh --run demo-seed{n} --until 06_evaluation seed={n} stress_bodies=0" for n in SEEDS),
        leaves=f"outputs/{RUNS[-1]}/scores.json",
    ),
    "doses": Step("slope and leak of twelve bodies", ("python tests/proofs/doses.py outputs/demo",), after=("demo",)),
    "pretrained": Step(
        "the ready-made models and their card",
        ("./run_all.sh --profile pretrained --run pretrained-run", "./run_all.sh pack --ready --run pretrained-run"),
        leaves="outputs/pretrained",
    ),
    "scans": Step(
        "levels on real scans (their folder, SPIDER, is a download)",
        ("python tests/proofs/spider.py SPIDER --run demo", "python tests/proofs/spider.py SPIDER"),
        after=("demo", "pretrained"),
    ),
    "numbering": Step(
        "transitional vertebrae", (f"python tests/proofs/numbering.py {CACHE}/numbering",), after=("pretrained",)
    ),
    "localiser": Step("what frames, greys and varied spines bring", ("python tests/proofs/localiser.py",)),
    "t1": Step("sagittal T1 alone", (f"python tests/proofs/one_group.py {CACHE}/t1",)),
    "adapt": Step("adaptation", (f"python tests/proofs/adapt.py {CACHE}/adapt --train",), after=("demo",)),
    "original": Step(
        "the published method",
        ("./run_all.sh --profile original --run original", "python -m lsdc_utils.report results --run original"),
    ),
    "refine": Step("refinement", ("./run_all.sh refine --run demo",), after=("demo",)),
    "ablations": Step("ablations", tuple(f"./run_all.sh ablate --run {run}" for run in RUNS), after=("demo", "seeds")),
    "curve": Step("learning curve", ("./run_all.sh curve --run demo",), after=("demo",)),
}


def code_of(name: str) -> str:
    """Hash of what decides a step's result: its commands, the notebooks and profiles or the script that they run, with
    all that these import, and the same of the steps whose results it reads."""
    step, parts = STEPS[name], [code_of(other) for other in STEPS[name].after]
    for command in step.commands:
        words = command.split()
        parts.append(command)
        if words[0] == "./run_all.sh":
            profile = words[words.index("--profile") + 1] if "--profile" in words else "demo"
            files = {ROOT / f"notebooks/profiles/{which}.yml" for which in ("demo", profile)}  # the demo's names all
            files |= {ABLATIONS} if "ablate" in words else set()
            parts += [json.dumps(yaml.safe_load(file.read_text()), sort_keys=True) for file in sorted(files)]
            parts += map(graph.source_hash, DECIDING)
            if words[1:] and not words[1].startswith("-"):  # a command, such as pack, has code of its own
                parts.append(graph.code_hash("import lsdc_utils.pipeline.commands"))
        elif words[1] == "-m":
            parts += [graph.code_hash(f"import {words[2]}.__main__"), graph.source_hash("08_report")]
        else:
            parts.append(graph.code_hash((ROOT / words[1]).read_text()))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def known_steps() -> dict[str, dict[str, str]]:
    """The lines of the list, by step."""
    if not TABLE.is_file():
        return {}
    return {line["step"]: line for line in pd.read_csv(TABLE, dtype=str, keep_default_na=False).to_dict("records")}


def is_current(name: str) -> bool:
    """Whether the step's figures were made by the code at hand."""
    line = known_steps().get(name)
    return line is not None and line["code"] == code_of(name)


def figures_list() -> str:
    """Each figure with its commit, and whether the code that decides it has changed since, as Markdown."""
    known, rows = known_steps(), {}
    for name, step in STEPS.items():
        line = known.get(name, {"commit": "–", "date": "–"})
        state = "yes" if is_current(name) else "older" if name in known else "never made"
        rows[name] = {"Makes": step.makes, "Commit": line["commit"], "Date": line["date"], "By the code at hand": state}
    return markdown_table(pd.DataFrame(rows).T.rename_axis("Step"))


def blocks_of(run: str) -> dict[str, dict]:
    """The blocks of a run's scores.json."""
    return json.loads((OUTPUTS / run / "scores.json").read_text())


def commit_of(run: str) -> str:
    """The commit that a run's weights name, since a run that ends before its report has no provenance."""
    return json.loads((OUTPUTS / run / "weights/localiser_fold0.json").read_text())["git_commit"][:12]


def seeds_table() -> str:
    """Score and skill of the ensemble of each training of the demo, their mean and range, as Markdown."""
    rows, runs = {}, [run for run in RUNS if (OUTPUTS / run / "scores.json").is_file()]
    for run in runs:
        parts = {name: blocks_of(run)[key] for key, name in (("oof", "Out of fold"), ("test", "Test"))}
        rows[run] = {f"{name}: {what}": part[key]["ensemble"]["total"] for name, part in parts.items()
                     for what, key in (("score", "scores"), ("skill", "skill"))}  # fmt: skip
    table = pd.DataFrame(rows).T
    shown = table.map("{:.3f}".format)
    shown.loc["mean"] = table.mean().map("{:.3f}".format)
    shown.loc["range"] = [f"{low:.3f} to {high:.3f}" for low, high in zip(table.min(), table.max(), strict=True)]
    commits = sorted({commit_of(run) for run in runs})
    told = f"Run `demo` and other seeds ({len(runs) - 1}) on the same phantom, commit {', '.join(commits)}."
    return f"{markdown_table(shown.rename_axis('Run'))}\n\n{told}"


def ablation_table() -> str:
    """What the mean of three trainings loses without each part, out of fold, with the paired 95 % interval over
    studies, as Markdown."""
    rows = {}
    for name in (
        name
        for name in yaml.safe_load(ABLATIONS.read_text())
        if all((OUTPUTS / f"{run}-{name}/scores.json").is_file() for run in RUNS)
    ):
        drawn, scores = [], []
        for run in RUNS:
            labels = pd.read_parquet(OUTPUTS / run / "tables/labels.parquet")
            tables = {key: pd.read_parquet(OUTPUTS / folder / "predictions/ensemble_oof.parquet")
                      for key, folder in (("with", run), ("without", f"{run}-{name}"))}  # fmt: skip
            losses = {key: metric.study_losses(metric.solution_of(labels), metric.weight_table(table))
                      for key, table in tables.items()}  # fmt: skip
            samples = metric.resampled_scores(losses)  # the same draws of studies for every seed
            drawn.append((samples["without"] - samples["with"])[:, -1])
            scores.append(losses["without"].score()["total"] - losses["with"].score()["total"])
        [(low, high)] = metric.interval(np.mean(drawn, axis=0)[:, None])
        rows[name] = {"Worse by": f"{np.mean(scores):+.3f}", "95 % interval": f"{low:+.3f} to {high:+.3f}",
                      "Each seed": ", ".join(f"{score:+.3f}" for score in scores)}  # fmt: skip
    commits = sorted({commit_of(run) for run in RUNS})
    told = f"Run `demo` and two more seeds, each with and without the part, commit {', '.join(commits)}."
    return f"{markdown_table(pd.DataFrame(rows).T.rename_axis('Without'))}\n\n{told}"


def fill(name: str, text: str, page: Path) -> None:
    """Write a table between its markers in a page."""
    head, marker, rest = page.read_text().partition(f"<!-- table {name} -->\n")
    assert marker, f"{page} has no place for the table {name}"
    page.write_text(f"{head}{marker}{text}\n{rest[rest.index('<!-- end -->') :]}")


def run_step(name: str, commit: str) -> bool:
    """Run a step's commands, until one fails; write its line of the list, if all ended well, which is returned."""
    line = {"step": name, "makes": STEPS[name].makes, "command": "; ".join(STEPS[name].commands), "commit": commit,
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "code": code_of(name)}  # fmt: skip
    measured = []
    for number, command in enumerate(STEPS[name].commands):
        measured.append(timed(command, ROOT / CACHE / f"logs/{name}{number}.txt"))
        print(name, command, *measured[-1].values(), sep=" | ", flush=True)
        if measured[-1].pop("status"):
            return False
    line |= pd.DataFrame(measured).sum().round(1).to_dict()
    tables = {"seeds": seeds_table, "ablations": ablation_table}
    if name in tables:
        fill(name, tables[name](), PAGE)
    known = known_steps() | {name: line}
    pd.DataFrame([known[step] for step in STEPS if step in known]).to_csv(TABLE, index=False)
    return True


def due(names: list[str]) -> list[str]:
    """Of these steps those whose code has changed or that were never made, each behind the steps that it needs."""
    steps: dict[str, None] = {}

    def add(name: str) -> None:
        for other in STEPS[name].after:
            if not is_current(other) or not (ROOT / STEPS[other].leaves).exists():
                add(other)
        steps[name] = None

    for name in names:
        if not is_current(name):
            add(name)
    return list(steps)


def main() -> int:
    """Run the steps that were asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; default: all but scans")
    parser.add_argument("--list", action="store_true", help="run nothing; write the list to docs/development.md")
    asked = parser.parse_args()
    if unknown := set(asked.steps) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")

    failed: set[str] = set()
    if not asked.list:
        commit = committed(parser, "lsdc_utils", "notebooks", "run_all.sh", "tests/proofs")
        for name in due(asked.steps or [name for name in STEPS if name != "scans"]):
            if failed.intersection(STEPS[name].after):
                print(f"{name}: not run, since a step that it needs has failed", flush=True)
                failed.add(name)
            elif not run_step(name, commit):
                failed.add(name)
    fill("figures", figures_list(), LIST)
    print(figures_list())
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
