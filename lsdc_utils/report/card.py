"""A run in prose: what it is, its result and limitations, and the model card that goes with its weights.

The sentences are templates (*.j2 in templates/, one sentence a line); this module computes the numbers in them.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from lsdc_utils.metric import PARTS
from lsdc_utils.report.provenance import provenance
from lsdc_utils.report.render import WARNING, environment
from lsdc_utils.report.run import BLOCK_NAMES, PART_NAMES, Run, blocks, labelled_rows, models, score_table
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, MISSING


def sentences(run: Run, name: str, **numbers: Any) -> list[str]:
    """The sentences of a template, e.g. `about` (what was graded), `summary` (the result) or `stress` (of 07)."""
    context = {"run": run, "kind": run.data.get("kind", ""), "blocks": blocks(run.scores), "names": BLOCK_NAMES}
    text = environment().get_template(f"{name}.j2").render(context | {"models": models(run.scores)} | numbers)
    return [line for line in text.splitlines() if line]


def limits(run: Run) -> dict[str, list[str]]:
    """What the results of this run do not show: sentences by heading."""
    sections: dict[str, list[str]] = {}
    for line in sentences(run, "limits", labels=_label_counts(run), weakest=_weakest_parts(run)):
        if line.startswith("## "):
            sections[line.removeprefix("## ")] = []
        else:
            list(sections.values())[-1].append(line)
    return sections


def _label_counts(run: Run) -> dict[str, Any]:
    """Labelled rows, rows without a label, and severe labels by part of the score; {} where labels are unknown."""
    labelled = labelled_rows(run)
    if labelled.empty:
        return {}
    parts = labelled["condition"].map({name: PART_NAMES[GROUPS[c.group].score] for name, c in CONDITIONS.items()})
    severe = labelled["severity"].eq(2).groupby(parts).sum().to_dict()
    return {"rows": len(labelled), "missing": int((run.labels["severity"] == MISSING).sum()), "severe": severe}


def _weakest_parts(run: Run) -> dict[str, tuple[str, str, float]]:
    """Part in which the ensemble is weakest, `skill` or `score`, and its value, by block."""
    weakest = {}
    for name, block in blocks(run.scores).items():
        kind = "skill" if block.get("skill") else "scores"
        parts = pd.Series(block[kind]["ensemble"], dtype=float)[list(PARTS[:3])].dropna()
        if len(parts):
            part = parts.idxmin() if kind == "skill" else parts.idxmax()
            weakest[name] = (PART_NAMES[part].lower(), kind.removesuffix("s"), parts[part])
    return weakest


def score_lines(run: Run) -> str:
    """The result as Markdown: sentences, the score table, and the origin of the numbers."""
    numbers = {"facts": provenance(run), "summary": sentences(run, "summary"), "scores": score_table(run.scores)}
    return environment().get_template("scores.md.j2").render(run=run, **numbers).strip()


def model_card(run: Run) -> str:
    """What a user of a run's weights must know, as Markdown: data, scores, use, limitations, licence."""
    context = {"about": sentences(run, "about")[0], "scores": score_lines(run), "limits": limits(run)}
    context |= {"facts": provenance(run), "kind": run.data.get("kind", ""), "warning": WARNING}
    return environment().get_template("card.md.j2").render(run=run, **context)
