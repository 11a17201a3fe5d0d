"""Pages of HTML and CSS, images embedded, from the templates beside this file.

A content security policy in each page forbids the browser to load anything and to run any script but the page's own few
lines, named by their hash; whatever comes from data or notebooks is escaped or cleaned. So a report may be opened from
disk and passed on. `templates/page.html.j2` frames every page.
"""

from __future__ import annotations

import base64
import hashlib
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
from nbconvert import HTMLExporter
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor
from PIL import Image
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

from lsdc_utils import figures
from lsdc_utils.files import atomic
from lsdc_utils.grading.marks import SHORT_NAMES
from lsdc_utils.grading.run_tables import SOURCE_NAMES, read_graded, study_reader
from lsdc_utils.report import studies
from lsdc_utils.report.pictures import Picture
from lsdc_utils.report.provenance import write_provenance
from lsdc_utils.report.run import (
    BLOCK_NAMES,
    Run,
    about,
    blocks,
    box_sizes,
    experiment_tables,
    limits,
    localisation_tables,
    other_runs,
    parts_table,
    provenance,
    score_table,
    summary,
)
from lsdc_utils.vocabulary import GROUPS, LEVEL_NAMES, LEVELS, MISSING, SEVERITY_NAMES

TEMPLATES = Path(__file__).with_name("templates")
FIGURE_QUALITY = 48  # of notebooks' figures, as AVIF
PRINTED = ("totals", "parts", "grades", "reliability")  # figures that the report has as vector PDF too
WARNING = "Not for clinical use: research software, not a medical device."
OVERVIEW = ("studies.html", "Studies")
GRADE_NAMES = [name.capitalize() for name in SEVERITY_NAMES]  # Normal/mild, Moderate, Severe
# What a notebook may put on a page; everything else is shown as text.
TAGS = set(
    """a b blockquote br caption code dd del div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img kbd li ol p pre
    s small span strong sub sup table tbody td tfoot th thead tr ul""".split()  # noqa: SIM905
)
ATTRIBUTES = {"class", "id", "title", "alt", "colspan", "rowspan", "scope"}
UNCOLOURED = re.compile(r'<span class="(?:n|p|w)">([^<]*)</span>')  # names, brackets and blanks: the text's colour
STYLER_RULES = re.compile(r"(?:\s*#T_[\w#., :-]+\{[\w\s#.,:;%()-]*\})*\s*")  # what pandas' Styler writes for a table


@dataclass(frozen=True)
class Chapter:
    """One executed notebook as a page of the report."""

    page: str  # file name in the report's folder
    step: str  # e.g. 03_train_yolo_scs_fold0
    title: str
    body: str  # HTML, cleaned
    sections: list[tuple[str, str]]  # anchor and title of its second-level headings


def write_report(run: Run, pictures: list[Picture], whole_studies: int = 8, seed: int = 0) -> Path:
    """Write report/index.html with all that it leads to; returns the index.

    A page for each executed notebook and each graded study (`whole_studies` of them, some drawn by `seed`, with all
    their slices), one of limits and one of the checklist for reports on imaging models, and the main figures as PDF;
    beside it the run's provenance.json. Pages of an earlier report that are not made any more go.
    """
    folder = run.folder / "report"
    write_provenance(run.folder)
    chapters, facts, graded = read_chapters(run), provenance(run), graded_studies(run)
    pages = [("index.html", "Summary"), *([OVERVIEW] if len(graded) else [])]
    pages += [(chapter.page, chapter.title) for chapter in chapters]
    pages += [("limits.html", "Limits"), ("claim.html", "CLAIM checklist")]
    frame = {"run": run, "pages": pages, "warning": WARNING, "facts": facts, "kind": run.data.get("kind", "")}
    made = set(_write_studies(folder, frame, graded, whole_studies, seed)) if len(graded) else set()
    seconds = dict(zip(run.steps["step"], run.steps["seconds"], strict=True))
    for chapter in chapters:
        more = {"sections": chapter.sections, "chapter": chapter, "seconds": seconds.get(chapter.step)}
        _write_page(folder, frame, "chapter.html.j2", (chapter.page, chapter.title), styles="code", **more)
    for name in ("limits", "claim"):
        title = next(page for page in pages if page[0] == f"{name}.html")
        _write_page(folder, frame, f"{name}.html.j2", title, limits=limits(run))
    printed = [write_pdf(picture, folder) for picture in pictures if picture.name in PRINTED]
    for file in {*folder.glob("*.html"), *folder.glob("*.pdf")} - {folder / page for page, _ in pages} - made:
        if file not in printed:
            file.unlink()  # of a fold, a notebook or a study that the run no longer has
    return _write_index(folder, frame, pictures, chapters)


def _write_index(folder: Path, frame: dict[str, Any], pictures: list[Picture], chapters: list[Chapter]) -> Path:
    """The summary, which is written last: where it is there, so is everything that it leads to."""
    run = frame["run"]
    context = {
        "about": about(run),
        "summary": summary(run.scores),
        "scores": score_table(run.scores),
        "parts": [(BLOCK_NAMES[name].lower(), parts_table(block)) for name, block in blocks(run.scores).items()],
        "others": other_runs(run),
        "localisation": localisation_tables(run.localisation),
        "experiments": experiment_tables(run.experiments),
        "pictures": [(picture, embedded(picture)) for picture in pictures],
        "printed": PRINTED,
        "steps": run.steps[[run.asks_for(step) for step in run.steps["step"]]],
        "findings": count_findings(run.findings),
        "chapters": chapters,
    }
    return _write_page(folder, frame, "index.html.j2", ("index.html", "Summary"), **context)


def _write_page(
    folder: Path,
    frame: dict[str, Any],
    template: str,
    page: tuple[str, str],
    script: str = "",
    styles: str = "text",
    around: tuple | None = None,
    **context: Any,
) -> Path:
    """Render a page (file name, title) with links to those `around` it: before and after among the frame's pages.

    script: name of the script that the page has; styles: what of the style sheet it needs (`style_sheet`).
    """
    before, after = around or _neighbours(frame["pages"], page)
    text = (TEMPLATES / script).read_text() if script else ""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    own = {"page": page, "css": style_sheet(styles), "script": text, "digest": digest}
    own |= {"sections": [], "before": before, "after": after}
    html = environment().get_template(template).render(**{**frame, **own, **context})
    with atomic(folder / page[0]) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return folder / page[0]


def _neighbours(pages: list[tuple[str, str]], page: tuple[str, str]) -> tuple:
    """The pages before and after one; None where there is none."""
    k = pages.index(page)
    return pages[k - 1] if k else None, pages[k + 1] if k + 1 < len(pages) else None


def write_pdf(picture: Picture, folder: Path) -> Path:
    """A figure as <name>.pdf in the folder, for print; the same bytes for the same figure."""
    file = folder / f"{picture.name}.pdf"
    with atomic(file) as temporary:
        picture.figure.savefig(temporary, format="pdf", metadata={"CreationDate": None})
    return file


# ---- studies -------------------------------------------------------------------------------------------------------


def graded_studies(run: Run) -> pd.DataFrame:
    """Rows of the studies that get a page (`graded.read_graded`): the scored test studies, else all graded ones."""
    there = [name for name in BLOCK_NAMES if (run.folder / f"predictions/sources_{name}.parquet").is_file()]
    if run.scores.get("test") and "test" in there:
        there = ["test"]
    tables = [table for name in there if len(table := read_graded(run.folder, name))]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _write_studies(folder: Path, frame: dict[str, Any], graded: pd.DataFrame, count: int, seed: int) -> list[Path]:
    """The page of each study and their overview; returns the files of the studies."""
    run = frame["run"]
    whole, losses = studies.choose_studies(graded, count, seed), studies.study_losses(graded)
    readers = {block: study_reader(run.folder, block) for block in graded["block"].unique()}
    lines = studies.overview(graded)
    chain = [OVERVIEW, *((line["page"], f"Study {line['study_id']}") for line in lines), None]
    found = studies.read_pages(graded, lambda block, study: readers[block](study), box_sizes(run), whole)
    for k, study in enumerate(found, start=1):
        more = {"loss": losses.get(study.study_id), "reason": whole.get(study.study_id, "")}
        _write_study(folder, frame, study, (chain[k - 1], chain[k], chain[k + 1]), **more)
    heads = ["Study", *(SHORT_NAMES[name] for name in studies.GRID), "Moderate", "Severe", "Least sure"]
    context = {
        "lines": lines,
        "whole": {study: (studies.page_of(study), reason) for study, reason in whole.items()},
        "blocks": graded["block"].unique().tolist(),
        "heads": heads + (["Agreement", "Loss"] if len(losses) else []),
        "labelled": bool(len(losses)),
        "groups": {key: group.score for key, group in GROUPS.items()},
        "severities": GRADE_NAMES,
    }
    _write_page(folder, frame, "studies.html.j2", OVERVIEW, script="studies.js", styles="study", **context)
    return [folder / line["page"] for line in lines]


def _write_study(folder: Path, frame: dict[str, Any], study: studies.StudyPage, chain: tuple, **more: Any) -> None:
    """The page of one study; `chain` is the page before, its own, and the one after."""
    before, own, after = chain
    rows, known = list(study.rows.itertuples()), study.rows[study.rows["severity"] != MISSING]
    context = {
        "study": study,
        "block": study.rows["block"].iloc[0],
        "all": [row._asdict() for row in rows],
        "rows": {(row.level, row.condition): row for row in rows},
        "findings": sorted((row for row in rows if row.grade), key=lambda row: (-row.grade, -row.confidence)),
        "known": len(known),
        "agreed": int((known["grade"] == known["severity"]).sum()),
        "grid": studies.GRID,
        "short": SHORT_NAMES,
        "titles": dict(zip(LEVELS, LEVEL_NAMES, strict=True)),
        "severities": GRADE_NAMES,
        "sources": SOURCE_NAMES,
    }
    script = "study.js" if study.viewers else ""
    around = (before, after)
    _write_page(folder, frame, "study.html.j2", own, script=script, styles="study", around=around, **context, **more)


# ---- how a page looks ----------------------------------------------------------------------------------------------


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
def style_sheet(kind: str) -> str:
    """The style of a page: what all need, and what `text`, `code` (light and dark) or `study` pages need besides."""
    colours = "".join(f"--g{k}: {colour}; " for k, colour in figures.SEVERITY_COLOURS.items() if k != MISSING)
    own = [f":root {{ {colours}}}", *((TEMPLATES / f"{name}.css").read_text() for name in ("style", kind))]
    if kind == "code":
        light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
        own += [light, f"@media (prefers-color-scheme: dark) {{ {dark} }}"]
    return re.sub(r"\s+", " ", re.sub(r"/\*.*?\*/", "", " ".join(own), flags=re.S))


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


def embedded(picture: Picture) -> str:
    """The address of an embedded image: SVG with text as outlines (no font needed), or AVIF where it shows slices."""
    content = io.BytesIO()
    if picture.slices:
        picture.figure.savefig(content, format="png", dpi=150)
        return studies.avif(Image.open(content), FIGURE_QUALITY)
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "report"}):
        picture.figure.savefig(content, format="svg", metadata={"Date": None})
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
    body = UNCOLOURED.sub(r"\1", body)  # half of what code takes
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
            if "image/png" in output.get("data", {}):
                png = base64.b64decode(output.data["image/png"])
                output.metadata["address"] = studies.avif(Image.open(io.BytesIO(png)), FIGURE_QUALITY)


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
