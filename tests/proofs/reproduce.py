"""Everything made again: `python tests/proofs/reproduce.py [STEP ...]` runs the chain of `STEPS`, or some of its steps,
in this folder, and keeps the list of what was made by which commands, on which commit, in docs/figures.csv.

The list also holds a hash of the code that decides each step's result, as the pipeline has one for each notebook. A
step whose code has not changed is not run again, and each command resumes where it was stopped, so the chain may be
stopped at any time and goes on in another clone. `--list` runs nothing: it writes the list to docs/development.md, and
says which figures are older than their code. All of it takes two nights on two cores. Scores of several trainings are
kept in docs/trainings.csv, so that these need not be run in one go. Tables go to docs/results.md and docs/real-data.md.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

from chain import MISSED, ROOT, committed, fill, timed  # noqa: E402

from lsdc_utils import metric  # noqa: E402
from lsdc_utils.data.competition import data_dir  # noqa: E402
from lsdc_utils.grading.evaluation import difference, judge  # noqa: E402
from lsdc_utils.pipeline import graph  # noqa: E402
from lsdc_utils.pipeline.arguments import OUTPUTS  # noqa: E402
from lsdc_utils.pipeline.experiments import ABLATIONS, refined_table  # noqa: E402
from lsdc_utils.report.card import markdown_table, score_lines  # noqa: E402
from lsdc_utils.report.run import BLOCK_NAMES, MODEL_NAMES, Run  # noqa: E402
from lsdc_utils.stress.answers import MODELS  # noqa: E402
from lsdc_utils.stress.responses import slopes  # noqa: E402
from lsdc_utils.vocabulary import GROUP_OF, GROUPS  # noqa: E402

TABLE, CACHE = ROOT / "docs/figures.csv", "outputs/reproduce"
PAGES = (ROOT / "README.md", ROOT / "docs/results.md", ROOT / "docs/real-data.md")
LIST = ROOT / "docs/development.md"
TRAININGS = ROOT / "docs/trainings.csv"
SEEDS = (53, 54)  # of folds and training, beside the demo's 52
DECIDING = [name for name in graph.NOTEBOOK_ORDER if name not in ("phantom", "08_report")]  # a run's numbers


@dataclass(frozen=True)
class Step:
    """Commands, and the figures that they make."""

    makes: str
    commands: tuple[str, ...]
    after: tuple[str, ...] = ()  # steps whose results it reads
    leaves: str = ""  # what must be there for a step after it
    prints: tuple[str, ...] = ()  # tables of the docs that the last command prints, tab-separated
    trains: str = ""  # the training of the demo whose scores, or whose ablations', it adds to the list of trainings


STEPS = {
    "demo": Step(
        "scores and stress tests of the demo", ("./run_all.sh",), leaves="outputs/demo/scores.json", trains="demo"
    ),
    "pages": Step(
        "README, results and sample: tables and pictures of the demo",
        tuple(f"python -m lsdc_utils.report {what} --run demo" for what in ("results", "sample")),
        after=("demo",),
    ),
    **{
        f"seed{seed}": Step(
            f"the demo with seed {seed} of folds and training",
            (f"./run_all.sh --run demo-seed{seed} --until 06_evaluation seed={seed} stress_bodies=0",),
            leaves=f"outputs/demo-seed{seed}/scores.json",
            trains=f"demo-seed{seed}",
        )
        for seed in SEEDS
    },
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
        "transitional vertebrae",
        (f"python tests/proofs/numbering.py {CACHE}/numbering",),
        after=("pretrained",),
        prints=("numbering", "numbering measures"),
    ),
    "localiser": Step("ablations of the localiser", ("python tests/proofs/localiser.py",)),
    "t1": Step("sagittal T1 alone", (f"python tests/proofs/one_group.py {CACHE}/t1",)),
    "adapt": Step(
        "adaptation",
        (f"python tests/proofs/adapt.py {CACHE}/adapt --train",),
        after=("demo",),
        prints=("adaptation", "further training"),
    ),
    "original": Step(
        "the published method",
        ("./run_all.sh --profile original --run original", "python -m lsdc_utils.report results --run original"),
    ),
    "refine": Step("refinement", ("./run_all.sh refine --run demo",), after=("demo",)),
    "ablations": Step("ablations", ("./run_all.sh ablate --run demo",), after=("demo",), trains="demo"),
    **{
        f"ablations{seed}": Step(
            f"ablations with seed {seed}",
            (f"./run_all.sh ablate --run demo-seed{seed}",),
            after=(f"seed{seed}",),
            trains=f"demo-seed{seed}",
        )
        for seed in SEEDS
    },
    "curve": Step("learning curve", ("./run_all.sh curve --run demo",), after=("demo",)),
    "members": Step(
        "blend of members; augmentation",
        ("python tests/proofs/members.py 112 111 113 114 115 --also strong mixup coarse slices",),
        after=("pretrained",),
        prints=("members", "augmentation"),
    ),
    "rehearsal": Step("time, memory and disk of the real data set", ("python tests/proofs/rehearsal.py",)),
    "operations": Step(
        "operations of training on the real data set", ("python tests/benchmarks/bench_training.py kaggle --count",)
    ),
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
            parts.append(graph.code_hash(script := (ROOT / words[1]).read_text()))
            if "run_all" in script or "pipeline.run" in script:  # it executes notebooks
                parts += map(graph.source_hash, DECIDING)
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


def training(run: str, commit: str, without: str = "") -> dict[str, object]:
    """A line of the list of trainings: the ensemble's scores of a run, or of one of its ablations; for this also by how
    much it is worse out of fold, with the paired 95 % interval over studies."""
    folders = {"with": OUTPUTS / run, "without": OUTPUTS / f"{run}-{without}"}
    own = folders["without" if without else "with"]
    blocks = json.loads((own / "scores.json").read_text())
    line: dict[str, object] = {"run": run, "without": without, "commit": commit}
    for part in ("oof", "test"):
        line[f"{part}_score"] = blocks[part]["scores"]["ensemble"]["total"]
        line[f"{part}_skill"] = blocks[part]["skill"]["ensemble"]["total"]
    if without:
        solution = metric.solution_of(pd.read_parquet(folders["with"] / "tables/labels.parquet"))
        tables = {key: pd.read_parquet(of / "predictions/ensemble_oof.parquet") for key, of in folders.items()}
        line |= zip(("worse", "low", "high"), difference(solution, tables, "without", "with")["total"], strict=True)
    return line


def keep(lines: list[dict[str, object]]) -> None:
    """Put trainings into their list, instead of earlier ones of the same run and part."""
    table = pd.concat([known_trainings(), pd.DataFrame(lines)]).drop_duplicates(["run", "without"], keep="last")
    table.sort_values(["without", "run"]).to_csv(TRAININGS, index=False, float_format="%.4f")


def known_trainings() -> pd.DataFrame:
    """The list of trainings: run, without ("": the run itself), commit, and the columns of `training`."""
    return pd.read_csv(TRAININGS, keep_default_na=False, na_values={"worse": "", "low": "", "high": ""})


def seeds_table() -> str:
    """Score and skill of the ensemble of each training of the demo, their mean and range, as Markdown."""
    runs = known_trainings().query("without == ''").set_index("run")
    table = runs[["oof_score", "oof_skill", "test_score", "test_skill"]].astype(float)
    table.columns = [f"{part}: {what}" for part in ("Out of fold", "Test") for what in ("score", "skill")]
    shown = table.map("{:.3f}".format)
    shown.loc["mean"] = table.mean().map("{:.3f}".format)
    shown.loc["range"] = [f"{low:.3f} to {high:.3f}" for low, high in zip(table.min(), table.max(), strict=True)]
    shown["Commit"] = runs["commit"].reindex(shown.index, fill_value="")
    return markdown_table(shown.rename_axis("Run"))


def trainings_sentence() -> str:
    """Mean and range of the ensemble's score over the trainings of the demo."""
    runs = known_trainings().query("without == ''")
    words = {
        name: f"{scores.mean():.3f} ({scores.min():.3f} to {scores.max():.3f})"
        for name in ("oof", "test")
        for scores in [runs[f"{name}_score"].astype(float)]
    }
    commits = ", ".join(sorted(set(runs["commit"])))
    shown = f"out of fold {words['oof']}, test {words['test']}"
    return f"The ensemble, mean and range of {len(runs)} seeds: {shown}. Commits {commits}."


def ablation_table() -> str:
    """What the ensemble loses out of fold without each part: the mean of the trainings, and of their paired 95 %
    intervals over the same studies, which is at least as wide as the interval of their mean, as Markdown."""
    lines = known_trainings().query("without != ''")
    if lines.empty:
        return "Not made with the present code."
    rows, parts = {}, yaml.safe_load(ABLATIONS.read_text())
    for name, known in lines.groupby("without", sort=False):
        worse, low, high = known[["worse", "low", "high"]].astype(float).mean()
        rows[f"{parts[name]['without']}: {name}"] = {
            "Worse by": f"{worse:+.3f}",
            "95 % interval": f"{low:+.3f} to {high:+.3f}",
            "Each training": ", ".join(map("{:+.3f}".format, known["worse"].astype(float))),
            "Commit": ", ".join(sorted(set(known["commit"]))),
        }
    return markdown_table(pd.DataFrame(rows).T.rename_axis("Without"))


def details_table() -> str:
    """By condition group, of the demo's ensemble: the weights of its blend, the slope for either event as a share of
    the oracle's, and how many severe test rows have at least a probability, as Markdown."""
    run, lines = OUTPUTS / "demo", {}
    weights = json.loads((run / "blend.json").read_text())["ensemble"]
    curves, solution = slopes(pd.read_csv(run / "stress/doses.csv")), pd.read_csv(data_dir(run) / "solution.csv")
    share = (curves["ensemble"] / curves["oracle"]).rename("share").reset_index()
    rows = judge(pd.read_parquet(run / "predictions/ensemble_test.parquet"), solution)
    for key, group in GROUPS.items():
        severe = rows.loc[(rows["group"] == key) & (rows["severity"] == 2), "severe"]
        own = share[share["condition"].map(GROUP_OF) == key].groupby("event")["share"].mean()
        line = {f"Weight, {name}": f"{weights[key]['weights'][model]:.2f}"
                for model, name in (("yolo", "detectors"), ("vit3d", "3D ViT"))}  # fmt: skip
        line |= {f"Slope, {words}": f"{own[event]:.2f}"
                 for event, words in (("moderate", "moderate or worse"), ("severe", "severe"))}  # fmt: skip
        line |= {f"Severe found at {least} (%)": f"{100 * (severe >= least).mean():.0f}" for least in (0.2, 0.5)}
        lines[group.score] = line | {"Severe rows": str(len(severe))}
    commit = known_trainings().query("run == 'demo' and without == ''")["commit"].item()
    told = f"Run `demo`, three bodies and the test studies, commit {commit}."
    return f"{markdown_table(pd.DataFrame(lines).T.rename_axis('Group'))}\n\n{told}"


def doses_table(printed: str, commit: str) -> str:
    """What tests/proofs/doses.py printed last, as Markdown."""
    (_, *given), *rows = (re.split(r"\s{2,}", line) for line in printed.splitlines()[-1 - len(MODELS) :])
    titles = {"median": "Median slope", "leak": "Leak, 95th percentile"}
    heads = [titles.get(name, f"Slope, {name}") for name in given]
    shown = pd.DataFrame({MODEL_NAMES[model]: dict(zip(heads, shares, strict=True)) for model, *shares in rows})
    return f"{markdown_table(shown.T.rename_axis('Model'))}\n\nRun `demo`, twelve bodies, commit {commit}."


def refinement_table() -> str:
    """What refinement adds to the demo's scores, with paired 95 % intervals, as Markdown."""
    lines = refined_table(OUTPUTS / "demo", OUTPUTS / "demo-refined").to_dict("records")
    rows = {
        f"{BLOCK_NAMES[line['block']]}: {MODEL_NAMES[line['model']]}": {
            "Unrefined": f"{line['unrefined']:.3f}", "Refined": f"{line['refined']:.3f}",
            "Refinement adds": f"{line['added']:+.3f}", "95 % interval": f"{line['low']:+.3f} to {line['high']:+.3f}",
        } for line in lines
    }  # fmt: skip
    return markdown_table(pd.DataFrame(rows).T.rename_axis("Model"))


def curve_table() -> str:
    """The ensemble's score, skill and 95 % interval by the number of training studies, as Markdown."""
    rows: dict[str, dict[str, str]] = {}
    for line in pd.read_csv(OUTPUTS / "demo/experiments/curve.csv").to_dict("records"):
        block, row = BLOCK_NAMES[line["block"]], rows.setdefault(str(line["n_train"]), {})
        row |= {f"{block}: score": f"{line['total']:.3f}", f"{block}: skill": f"{line['skill']:.2f}"}
        row[f"{block}: 95 % interval"] = f"{line['low']:.3f} to {line['high']:.3f}"
    return markdown_table(pd.DataFrame(rows).T.rename_axis("Training studies"))


def printed_tables(text: str) -> list[str]:
    """The tab-separated tables in what a command printed, as Markdown; between two there is at least an empty line."""
    found = [list(lines) for has, lines in itertools.groupby(text.splitlines(), lambda line: "\t" in line) if has]
    rows = ([line.split("\t") for line in lines] for lines in found)
    return [markdown_table(pd.DataFrame(own, columns=head).set_index(head[0])) for head, *own in rows]


def tables_of(name: str, commit: str) -> dict[str, str]:
    """What a step that has ended says in the docs, by the name in the markers."""
    last = ROOT / f"{CACHE}/logs/{name}{len(STEPS[name].commands) - 1}.txt"
    if STEPS[name].trains:
        return {"trainings": trainings_sentence(), "seeds": seeds_table(), "ablations": ablation_table()}
    if name == "pages":
        return {"details": details_table()}
    if name == "doses":
        return {"doses": doses_table(last.read_text().strip(), commit)}
    made = {"t1": lambda: score_lines(Run(OUTPUTS / "t1-alone")), "refine": refinement_table, "curve": curve_table}
    tables = {name: made[name]()} if name in made else {}
    if STEPS[name].prints:
        tables = dict(zip(STEPS[name].prints, printed_tables(last.read_text()), strict=True))
    return {table: f"{text}\n\nCommit {commit}." for table, text in tables.items()}


def run_step(name: str, commit: str) -> bool:
    """Run a step's commands, until one fails; write its line of the list, if all ended well, which is returned."""
    line = {"step": name, "makes": STEPS[name].makes, "command": "; ".join(STEPS[name].commands), "commit": commit,
            "date": time.strftime("%Y-%m-%d", time.gmtime()), "code": code_of(name)}  # fmt: skip
    measured, run = [], STEPS[name].trains
    for number, command in enumerate(STEPS[name].commands):
        measured.append(timed(command, ROOT / CACHE / f"logs/{name}{number}.txt"))
        print(name, command, *measured[-1].values(), sep=" | ", flush=True)
        if measured[-1].pop("status") not in (0, MISSED):  # a missed bar stands in the docs as well
            return False
    line |= pd.DataFrame(measured).sum().round(1).to_dict()
    if run:
        parts = yaml.safe_load(ABLATIONS.read_text()) if name.startswith("ablations") else [""]
        keep([training(run, commit, without) for without in parts])
    for table, text in tables_of(name, commit).items():
        fill(table, text, next(page for page in PAGES if f"<!-- table {table} -->" in page.read_text()))
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
