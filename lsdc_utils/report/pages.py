"""Pages of HTML and CSS, images embedded and no script, from the templates beside this file.

A content security policy in each page forbids the browser to load anything, and whatever comes from data or notebooks
is escaped or cleaned, so a report may be opened from disk and passed on. `templates/page.html.j2` frames every page.
"""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import dataclass
from functools import cache
from html import unescape
from pathlib import Path
from typing import Any

import bleach
import jinja2
import matplotlib as mpl
import nbformat
import pandas as pd
from matplotlib.figure import Figure
from nbconvert import HTMLExporter
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from lsdc_utils.files import atomic, write_json
from lsdc_utils.report.pictures import Picture
from lsdc_utils.report.run import (
    BLOCK_NAMES,
    Run,
    blocks,
    experiment_tables,
    localisation_tables,
    parts_table,
    provenance,
    score_table,
    summary,
)

TEMPLATES = Path(__file__).with_name("templates")
WARNING = "Not for clinical use: research software, not a medical device."
# What a notebook may put on a page; everything else is shown as text.
TAGS = set(
    """a b blockquote br caption code dd del div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img kbd li ol p pre
    s small span strong sub sup table tbody td tfoot th thead tr ul""".split()  # noqa: SIM905
)
ATTRIBUTES = {"class", "id", "title", "alt", "colspan", "rowspan", "scope"}
STYLER_RULES = re.compile(r"(?:\s*#T_[\w#., :-]+\{[\w\s#.,:;%()-]*\})*\s*")  # what pandas' Styler writes for a table


@dataclass(frozen=True)
class Chapter:
    """One executed notebook as a page of the report."""

    page: str  # file name in the report's folder
    step: str  # e.g. 03_train_yolo_scs_fold0
    title: str
    body: str  # HTML, cleaned
    sections: list[tuple[str, str]]  # anchor and title of its second-level headings


def write_report(run: Run, pictures: list[Picture]) -> Path:
    """Write report/index.html, a page for each executed notebook and provenance.json; returns the index."""
    folder = run.folder / "report"
    chapters, facts = read_chapters(run), provenance(run)
    pages = [("index.html", "Summary"), *((chapter.page, chapter.title) for chapter in chapters)]
    seconds = dict(zip(run.steps["step"], run.steps["seconds"], strict=True))
    for k, chapter in enumerate(chapters, start=1):
        more = {"sections": chapter.sections, "chapter": chapter, "seconds": seconds.get(chapter.step)}
        _write_page(folder, "chapter.html.j2", pages, k, run=run, **more)
    write_json(folder / "provenance.json", facts)
    for file in set(folder.glob("*.html")) - {folder / page for page, _ in pages}:
        file.unlink()  # of a fold or a notebook that the run no longer has
    context = {
        "summary": summary(run.scores),
        "scores": score_table(run.scores),
        "parts": [(BLOCK_NAMES[name].lower(), parts_table(block)) for name, block in blocks(run.scores).items()],
        "localisation": localisation_tables(run.localisation),
        "experiments": experiment_tables(run.experiments),
        "pictures": [(picture, embedded(picture.figure)) for picture in pictures],
        "steps": run.steps[[run.asks_for(step) for step in run.steps["step"]]],
        "findings": count_findings(run.findings),
        "facts": facts,
        "chapters": chapters,
    }
    return _write_page(folder, "index.html.j2", pages, 0, run=run, sections=[], **context)


def _write_page(folder: Path, template: str, pages: list[tuple[str, str]], k: int, **context: Any) -> Path:
    """Render the k-th of `pages` (file name, title), with links to the pages before and after it."""
    around = {"before": pages[k - 1] if k else None, "after": pages[k + 1] if k + 1 < len(pages) else None}
    frame = {"pages": pages, "page": pages[k], "warning": WARNING, "css": style_sheet(), **around}
    html = environment().get_template(template).render(**frame, **context)
    with atomic(folder / pages[k][0]) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return folder / pages[k][0]


@cache
def environment() -> jinja2.Environment:
    """The templates; whatever they are given is escaped unless a template says that it is HTML."""
    loader = jinja2.FileSystemLoader(TEMPLATES)
    made = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters.update(table=html_table, duration=duration, amount=amount)
    return made


@cache
def style_sheet() -> str:
    """The style of every page, with the colours of code for light and for dark."""
    light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
    return f"{(TEMPLATES / 'style.css').read_text()}\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def html_table(table: pd.DataFrame) -> str:
    """A table as HTML with its text escaped; column groups span their columns."""
    html = table.rename_axis(index=None).to_html(escape=True, border=0, classes="numbers", na_rep="–")
    return html.replace("<th></th>", "<td></td>").replace("<th>", '<th scope="row">').replace(' valign="top"', "")


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s or 2 h 07 min; a dash where they are not known."""
    if not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} min {whole % 60:02d} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    )


def amount(found: float, pattern: str) -> str:
    """A number in a pattern such as `%.0f MiB`; a dash where it is not known."""
    return pattern % found if math.isfinite(found) else "–"


def count_findings(findings: pd.DataFrame) -> list[tuple[str, str, int]]:
    """What was wrong with the data, most frequent first: rule, what was done, how often."""
    if findings.empty:
        return []
    counts = findings.groupby(["rule", "action"]).size().sort_values(ascending=False, kind="stable")
    return [(rule, action, int(count)) for (rule, action), count in counts.items()]


def embedded(figure: Figure) -> str:
    """A figure as the address of an embedded SVG image, text as outlines so that no font is needed."""
    content = io.BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        figure.savefig(content, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


# ---- notebooks as chapters -----------------------------------------------------------------------------------------


def read_chapters(run: Run) -> list[Chapter]:
    """The run's executed notebooks in their order; the report's own is still running when this is called."""
    files = sorted((run.folder / "notebooks").glob("*.ipynb"))
    return [read_chapter(file) for file in files if run.asks_for(file.stem) and not file.stem.endswith("_report")]


def read_chapter(file: Path) -> Chapter:
    """Convert an executed notebook: code folded away, long prints folded, output cleaned of what is not plain HTML."""
    notebook = nbformat.read(file, as_version=4)
    _describe_images(notebook)
    config = Config({"HTMLExporter": {name: "" for name in ("mathjax_url", "require_js_url", "jquery_url")}})
    exporter = HTMLExporter(config=config, template_name="chapter", extra_template_basedirs=[str(TEMPLATES)])
    exporter.register_filter("cleaned", cleaned)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)  # a line printed is an output of its own
    body, _ = exporter.from_notebook_node(notebook)
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", body, re.S)
    title = _plain(heading[1]) if heading else file.stem
    training = re.search(r"_(?:(nfn|scs|ss)_)?fold(\d+)$", file.stem)
    if training:
        title += f" ({', '.join(filter(None, (training[1], f'fold {training[2]}')))})"
    headings = re.findall(r'<h2[^>]* id="([^"]+)"[^>]*>(.*?)</h2>', body, re.S)
    return Chapter(f"{file.stem}.html", file.stem, title, body, [(anchor, _plain(text)) for anchor, text in headings])


def _describe_images(notebook: nbformat.NotebookNode) -> None:
    """Give each figure without a description one that says where it belongs: the section that it stands in."""
    section = "of this notebook"
    for cell in notebook.cells:
        headings = re.findall(r"^#+ +(.+)$", cell.source, re.M) if cell.cell_type == "markdown" else []
        section = f"of the section: {headings[-1]}" if headings else section
        for output in cell.get("outputs", []):
            if "data" in output:
                given = output.metadata.get("image/png", {}).get("alt")
                output.metadata.setdefault("alt", given or f"Figure {section}")


def cleaned(html: str) -> str:
    """HTML of a notebook, where what is not on the list of harmless tags becomes text, as images not embedded do.

    Style sheets go, except those that pandas' Styler writes for its own table.
    """
    styles = [css for css in re.findall(r"<style[^>]*>(.*?)</style>", html, re.S) if STYLER_RULES.fullmatch(css)]
    bare = re.sub(r"<style[^>]*>.*?</style>", "", html, flags=re.S)
    bare = re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", bare)
    bare = re.sub(r"""<img\b(?![^>]*\bsrc=["']data:image/)""", "&lt;img", bare)
    safe = bleach.clean(bare, tags=TAGS, attributes=_may_stay, protocols={"http", "https", "data"})
    return "".join(f"<style>{css}</style>" for css in styles) + safe


def _may_stay(tag: str, attribute: str, text: str) -> bool:
    """Whether an attribute of a tag may stay: images come from data addresses, links never do."""
    if (tag, attribute) == ("img", "src"):
        return text.startswith("data:image/")
    if (tag, attribute) == ("a", "href"):
        return not text.startswith("data:")
    return attribute in ATTRIBUTES


def _plain(html: str) -> str:
    """The text of a piece of HTML."""
    return unescape(re.sub(r"<[^>]+>", "", html)).strip()
