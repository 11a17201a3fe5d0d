"""Executed notebooks as chapters: nbconvert's HTML with code folded, cleaned of everything that is not plain HTML."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path

import bleach
import nbformat
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor
from PIL import Image
from traitlets.config import Config

from lsdc_utils.report.render import TEMPLATES, avif
from lsdc_utils.report.run import Run

# What a notebook may put on a page; anything else is shown as text.
TAGS = set(
    """a b blockquote br caption code dd del div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img kbd li ol p pre
    s small span strong sub sup table tbody td tfoot th thead tr ul""".split()  # noqa: SIM905
)
ATTRIBUTES = {"class", "id", "title", "alt", "colspan", "rowspan", "scope"}
STYLER_RULES = re.compile(r"(?:\s*#T_[\w#., :-]+\{[\w\s#.,:;%()-]*\})*\s*")  # what pandas' Styler writes for a table
PLAIN_CODE = re.compile(r'<span class="(?:n|p|w)">([^<]*)</span>')  # names, brackets, blanks: half the size of code


@dataclass(frozen=True)
class Chapter:
    """One executed notebook as a page of the report."""

    page: str  # file name in the report's folder
    step: str  # e.g. 03_train_yolo_scs_fold0
    title: str
    body: str  # HTML, cleaned
    sections: list[tuple[str, str]]  # anchor and title of its second-level headings


def read_chapters(run: Run) -> list[Chapter]:
    """The run's executed notebooks in order of running, except the report's, which is still running."""
    files = [file for file in (run.folder / "notebooks").glob("*.ipynb") if run.asks_for(file.stem)]
    files = [file for file in files if not file.stem.endswith("_report")]
    return [read_chapter(file) for file in sorted(files, key=lambda file: file.name.replace("phantom", "00_phantom"))]


def read_chapter(file: Path) -> Chapter:
    """Convert one executed notebook."""
    notebook = nbformat.read(file, as_version=4)
    _describe_images(notebook)
    config = Config({"HTMLExporter": {name: "" for name in ("mathjax_url", "require_js_url", "jquery_url")}})
    exporter = HTMLExporter(config=config, template_name="chapter", extra_template_basedirs=[str(TEMPLATES)])
    exporter.register_filter("cleaned", cleaned)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)  # each printed line is its own output
    body = PLAIN_CODE.sub(r"\1", exporter.from_notebook_node(notebook)[0])
    heading = re.search(r"<h1[^>]*>(.*?)</h1>", body, re.S)
    title = Markup(heading[1]).striptags() if heading else file.stem
    training = re.search(r"_(?:(nfn|scs|ss)_)?fold(\d+)$", file.stem)
    if training:
        title += f" ({', '.join(filter(None, (training[1], f'fold {training[2]}')))})"
    headings = re.findall(r'<h2[^>]* id="([^"]+)"[^>]*>(.*?)</h2>', body, re.S)
    sections = [(anchor, Markup(text).striptags()) for anchor, text in headings]
    return Chapter(f"{file.stem}.html", file.stem, title, body, sections)


def _describe_images(notebook: nbformat.NotebookNode) -> None:
    """Make each figure an AVIF image; one without a text alternative gets the heading of its section."""
    section = "of this notebook"
    for cell in notebook.cells:
        headings = re.findall(r"^#+ +(.+)$", cell.source, re.M) if cell.cell_type == "markdown" else []
        section = f"of the section: {headings[-1]}" if headings else section
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                png = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"])))
                alt = output.metadata.get("image/png", {}).get("alt") or f"Figure {section}"
                output.metadata.update(address=avif(png), alt=alt)


def cleaned(html: str) -> str:
    """HTML of a notebook; tags that are not in `TAGS` and images that are not embedded become text.

    Style sheets are removed, except those that pandas' Styler writes for its own table.
    """
    styles = [css for css in re.findall(r"<style[^>]*>(.*?)</style>", html, re.S) if STYLER_RULES.fullmatch(css)]
    bare = re.sub(r"<style[^>]*>.*?</style>", "", html, flags=re.S)
    bare = re.sub(r'<a class="anchor-link"[^>]*>.*?</a>', "", bare)
    bare = re.sub(r"""<img\b(?![^>]*\bsrc=["']data:image/)""", "&lt;img", bare)
    safe = bleach.clean(bare, tags=TAGS, attributes=_allowed, protocols={"http", "https", "data"})
    return "".join(f"<style>{css}</style>" for css in styles) + safe


def _allowed(tag: str, attribute: str, text: str) -> bool:
    """Whether an attribute of a tag may stay: only images may have data addresses."""
    if (tag, attribute) == ("img", "src"):
        return text.startswith("data:image/")
    if (tag, attribute) == ("a", "href"):
        return not text.startswith("data:")
    return attribute in ATTRIBUTES
