"""A run in prose: what it is, its result and limitations, and the model card that goes with its weights. The text is in
templates (templates/*.j2, one sentence a line); this module computes the numbers in it."""

import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from lsdc_utils.grading.basis import basis_words, grade_basis
from lsdc_utils.metric import GROUP_PARTS, rows_of_groups
from lsdc_utils.report import run as tables
from lsdc_utils.report.run import BLOCK_NAMES, PART_NAMES, Run, blocks, number, provenance
from lsdc_utils.vocabulary import GROUPS, MISSING

TEMPLATES = Path(__file__).with_name("templates")
WARNING = "Not for clinical use: research software, not a medical device."


@cache
def environment() -> jinja2.Environment:
    """The templates; values are escaped in HTML pages unless the template says that they are HTML."""
    escape = jinja2.select_autoescape(enabled_extensions=("html.j2",))
    options = {"autoescape": escape, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    made = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), **options)
    made.filters.update(table=html_table, markdown=markdown_table, duration=duration)
    made.globals.update(tables=tables, value=tables.value, number=tables.number, warning=WARNING)
    return made


def html_table(table: pd.DataFrame) -> str:
    """A table as HTML, its text escaped; column groups span their columns."""
    html = table.rename_axis(index=None).to_html(border=0, classes="numbers", na_rep="–")
    return html.replace("<th></th>", "<td></td>").replace("<th>", '<th scope="row">').replace(' valign="top"', "")


def markdown_table(table: pd.DataFrame) -> str:
    """A table of text as Markdown; a column group stands before the first of its columns."""
    names = [(name,) if isinstance(name, str) else name for name in table.columns]
    pairs = zip([("",), *names], names, strict=False)
    head = [table.index.name or "", *(": ".join(own[-1:] if own[:-1] == before[:-1] else own) for before, own in pairs)]
    lines = [head, ["---", *["---:"] * len(table.columns)], *table.reset_index().to_numpy().tolist()]
    return "\n".join("| " + " | ".join(re.sub(r"([|<>`*_])", r"\\\1", cell) for cell in line) + " |" for line in lines)


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s or 2 h 07 min; a dash for NaN."""
    if math.isnan(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def sentences(run: Run, name: str, **numbers: Any) -> list[str]:
    """The sentences of a template, e.g. `about` (what was graded), `summary` (the result) or `stress` (of 07)."""
    context = {"run": run, "blocks": blocks(run.scores), "names": BLOCK_NAMES}
    context["kind"] = "folder" if "adapted" in run.recipe else run.data.get("kind", "")  # of what was graded
    text = environment().get_template(f"{name}.j2").render(context | numbers)
    return [line for line in text.splitlines() if line]


def limits(run: Run) -> dict[str, list[str]]:
    """What the results of this run do not show: sentences by heading."""
    labelled, labels, weakest = tables.labelled_rows(run), {}, {}
    if len(labelled):
        parts = labelled["group"].map(lambda key: PART_NAMES[GROUPS[key].score])
        severe = labelled["severity"].eq(2).groupby(parts).sum().to_dict()
        asked = rows_of_groups(run.labels[run.labels["row_id"].isin(run.rows["row_id"])], run.conditions)
        labels = {"rows": len(labelled), "missing": (asked["severity"] == MISSING).sum(), "severe": severe}
    for name, block in blocks(run.scores).items():  # the part in which the ensemble is weakest
        kind = "skill" if block.get("skill") else "scores"
        parts = pd.Series(block[kind]["ensemble"], dtype=float)[list(GROUP_PARTS)].dropna()
        if len(parts):
            part = parts.idxmin() if kind == "skill" else parts.idxmax()
            weakest[name] = (PART_NAMES[part].lower(), kind.removesuffix("s"), parts[part])
    text = "\n".join(sentences(run, "limits", labels=labels, weakest=weakest))
    sections = text.removeprefix("## ").split("\n## ")
    return {heading: lines for heading, *lines in map(str.splitlines, sections)}


def score_lines(run: Run) -> str:
    """The result as Markdown: sentences, the score table, and the origin of the numbers."""
    context = {"facts": provenance(run), "summary": sentences(run, "summary")}
    return environment().get_template("scores.md.j2").render(run=run, **context).strip()


def model_card(run: Run, measured: dict[str, pd.DataFrame] | None = None, digests: dict[str, str] | None = None) -> str:
    """What a user of a run's weights must know, as Markdown: data, scores, use, limitations, licence. Of ready-made
    models also what was `measured` (tables `real` and `tempering`); digests: sha256 by file."""
    shown = {}
    for key, table in (measured or {}).items():
        texts = table.map(lambda x: number(x) if isinstance(x, float) else str(x))
        shown[key] = markdown_table(texts.set_index(table.columns[0]))
    context = {"about": sentences(run, "about")[0], "scores": score_lines(run), "limits": limits(run)}
    context |= {"stress": sentences(run, "stress"), "facts": provenance(run), "kind": run.data.get("kind", "")}
    context |= {"measured": shown, "digests": digests or {}, "basis": basis_words(grade_basis(run.folder))}
    return environment().get_template("card.md.j2").render(run=run, **context)
