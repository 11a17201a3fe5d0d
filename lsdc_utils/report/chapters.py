"""Executed notebooks as chapters: nbconvert's HTML with code folded, cleaned of everything that is not plain HTML."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import bleach
import nbformat
from markupsafe import Markup
from nbconvert import HTMLExporter
from nbconvert.preprocessors.coalescestreams import CoalesceStreamsPreprocessor
from PIL import Image

from lsdc_utils.report.card import TEMPLATES
from lsdc_utils.report.pictures import avif
from lsdc_utils.report.run import Run

# What a notebook may put on a page; anything else is shown as text.
TAGS = set(
    """a b blockquote br caption code dd del div dl dt em figcaption figure h1 h2 h3 h4 h5 h6 hr i img kbd li ol p pre
    s small span strong sub sup table tbody td tfoot th thead tr ul""".split()  # noqa: SIM905
)
ATTRIBUTES = {"class", "id", "title", "alt", "colspan", "rowspan", "scope"}
STYLER_RULES = re.compile(r"(?:\s*#T_[\w#., :-]+\{[\w\s#.,:;%()-]*\})*\s*")  # what pandas' Styler writes for a table
PLAIN_CODE = re.compile(r'<span class="(?:n|p|w)">([^<]*)</span>')  # names, brackets, blanks: half the size of code


def read_chapters(run: Run) -> list[dict[str, Any]]:
    """The run's executed notebooks in order of running, without the report's: step (e.g. 03_train_yolo_scs_fold0), page
    (file name and title), body (HTML, cleaned) and sections (anchor and title of its second-level headings)."""
    files = sorted((run.folder / "notebooks").glob("*.ipynb"), key=lambda file: file.name.replace("phantom", "00_h"))
    return [read_chapter(file) for file in files if run.asks_for(file.stem) and not file.stem.endswith("_report")]


def read_chapter(file: Path) -> dict[str, Any]:
    """One executed notebook as in `read_chapters`."""
    notebook = nbformat.read(file, as_version=4)
    _describe_images(notebook)
    exporter = HTMLExporter(template_name="chapter", extra_template_basedirs=[str(TEMPLATES)])
    exporter.register_filter("cleaned", cleaned)
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)  # each printed line is its own output
    body = PLAIN_CODE.sub(r"\1", exporter.from_notebook_node(notebook)[0])
    title = Markup(re.search(r"<h1[^>]*>(.*?)</h1>", body, re.S)[1]).striptags()
    if training := re.search(r"(?:_(nfn|scs|ss)|-([a-z0-9]+))?_(fold)(\d+)(?:_(inner)(\d+))?$", file.stem):
        words = *training.group(1, 2), " ".join(training.group(3, 4)), " ".join(filter(None, training.group(5, 6)))
        title += f" ({', '.join(filter(None, words))})"
    headings = re.findall(r'<h2[^>]* id="([^"]+)"[^>]*>(.*?)</h2>', body, re.S)
    sections = [(anchor, Markup(text).striptags()) for anchor, text in headings]
    return {"step": file.stem, "page": (f"{file.stem}.html", title), "body": body, "sections": sections}


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
    """HTML of a notebook; tags that are not in `TAGS` and images that are not embedded become text. Style sheets are
    removed, except those that pandas' Styler writes for its own table."""
    styles = [css for css in re.findall(r"<style[^>]*>(.*?)</style>", html, re.S) if STYLER_RULES.fullmatch(css)]
    bare = re.sub(r'<style[^>]*>.*?</style>|<a class="anchor-link"[^>]*>.*?</a>', "", html, flags=re.S)
    bare = re.sub(r"""<img\b(?![^>]*\bsrc=["']data:image/)""", "&lt;img", bare)
    safe = bleach.clean(bare, tags=TAGS, attributes=_allowed, protocols={"http", "https", "data"})
    return "".join(f"<style>{css}</style>" for css in styles) + safe


def _allowed(tag: str, attribute: str, text: str) -> bool:
    """Whether an attribute of a tag may stay: only images may have data addresses."""
    embedded = (tag, attribute) == ("img", "src") and text.startswith("data:image/")
    link = (tag, attribute) == ("a", "href") and not text.startswith("data:")
    return embedded or link or attribute in ATTRIBUTES
