"""Everything made again from one commit: `python tests/proofs/reproduce.py [STEP ...]` runs the chain of `STEPS`, or
some of its steps, in this folder, and keeps the list of what was made by which command, on which commit, in
docs/figures.csv.

A step that ended well on this commit is not run again, and each command resumes where it was stopped, so the chain may
be stopped at any time. All of it takes a night on two cores. Tables of several trainings go to docs/results.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from chain import ROOT, committed, timed  # noqa: E402

from lsdc_utils import metric  # noqa: E402
from lsdc_utils.pipeline.arguments import OUTPUTS  # noqa: E402
from lsdc_utils.pipeline.experiments import ABLATIONS  # noqa: E402
from lsdc_utils.report.card import markdown_table  # noqa: E402

TABLE, PAGE, CACHE = ROOT / "docs/figures.csv", ROOT / "docs/results.md", "outputs/reproduce"
SEEDS = (53, 54)  # of folds and training, beside the demo's 52
RUNS = ("demo", *(f"demo-seed{seed}" for seed in SEEDS))
STEPS = {  # name -> what it makes, and its commands
    "demo": ("the demo", ["./run_all.sh"]),
    "seeds": (
        "the demo with two more seeds of folds and training",
        [f"./run_all.sh --run demo-seed{seed} --until 06_evaluation seed={seed} stress_bodies=0" for seed in SEEDS],
    ),
    "doses": ("docs/results.md: slope and leak of twelve bodies", ["python tests/proofs/doses.py outputs/demo"]),
    "adapt": ("docs/results.md: adaptation", [f"python tests/proofs/adapt.py {CACHE}/adapt --train"]),
    "numbering": ("docs/results.md: transitional vertebrae", [f"python tests/proofs/numbering.py {CACHE}/numbering"]),
    "original": (
        "docs/results.md: the published method",
        ["./run_all.sh --profile original --run original", "python -m lsdc_utils.report results --run original"],
    ),
    "refine": ("docs/results.md: refinement", ["./run_all.sh refine --run demo"]),
    "ablations": ("docs/results.md: ablations", [f"./run_all.sh ablate --run {run}" for run in RUNS]),
    "curve": ("outputs/demo/experiments: learning curve", ["./run_all.sh curve --run demo"]),
    "pretrained": (
        "outputs/pretrained and its card",
        ["./run_all.sh --profile pretrained --run pretrained-run", "./run_all.sh pack --ready --run pretrained-run"],
    ),
    "pages": (
        "README.md, docs/results.md and outputs/sample: tables, figures and the rendered report of the demo",
        ["python -m lsdc_utils.report results --run demo", "python -m lsdc_utils.report sample --run demo"],
    ),
}


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


def fill(name: str, text: str) -> None:
    """Write a table between its markers in docs/results.md."""
    head, marker, rest = PAGE.read_text().partition(f"<!-- table {name} -->\n")
    assert marker, f"{PAGE} has no place for the table {name}"
    PAGE.write_text(f"{head}{marker}{text}\n{rest[rest.index('<!-- end -->') :]}")


def run_step(name: str, commit: str) -> list[dict]:
    """Run a step's commands, until one fails; their lines of the list."""
    makes, commands = STEPS[name]
    lines, date = [], time.strftime("%Y-%m-%d", time.gmtime())
    for number, command in enumerate(commands):
        line = {"step": name, "makes": makes, "command": command, "commit": commit, "date": date}
        lines.append(line | timed(command, ROOT / CACHE / f"logs/{name}{number}.txt"))
        print(*lines[-1].values(), sep=" | ", flush=True)
        if lines[-1]["status"]:
            break
    tables = {"seeds": seeds_table, "ablations": ablation_table}
    if name in tables and not lines[-1]["status"]:
        fill(name, tables[name]())
    return lines


def main() -> int:
    """Run the steps that were asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)}; default: all")
    asked = parser.parse_args().steps
    if unknown := set(asked) - set(STEPS):
        parser.error(f"no such step: {', '.join(sorted(unknown))}")

    commit = committed(parser, "lsdc_utils", "notebooks", "run_all.sh")
    known = pd.read_csv(TABLE).to_dict("records") if TABLE.is_file() else []
    failed = False
    for name in asked or STEPS:
        own = [line for line in known if line["step"] == name]
        if own and all(line["commit"] == commit and line["status"] == 0 for line in own):
            continue
        done = run_step(name, commit)
        known = [line for line in known if line["step"] != name] + done
        order = {step: number for number, step in enumerate(STEPS)}
        pd.DataFrame(sorted(known, key=lambda line: order[line["step"]])).to_csv(TABLE, index=False)
        failed |= any(line["status"] for line in done)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
