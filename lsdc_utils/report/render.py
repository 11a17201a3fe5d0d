"""Templates, styles and images of the report's pages."""

from __future__ import annotations

import base64
import io
import math
import re
from functools import cache
from pathlib import Path

import jinja2
import pandas as pd
from PIL import Image
from pygments.formatters import HtmlFormatter

from lsdc_utils import figures
from lsdc_utils.report.run import model_name, number, value
from lsdc_utils.vocabulary import MISSING

TEMPLATES = Path(__file__).with_name("templates")
WARNING = "Not for clinical use: research software, not a medical device."


@cache
def environment() -> jinja2.Environment:
    """The templates; values are escaped in HTML pages unless the template says that they are HTML."""
    escape = jinja2.select_autoescape(enabled_extensions=("html.j2",))
    options = {"autoescape": escape, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    made = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), **options)
    made.filters.update(table=html_table, markdown=markdown_table, duration=duration)
    made.globals.update(value=value, number=number, model_name=model_name)
    return made


@cache
def style_sheet(kind: str) -> str:
    """The style of a page: what all pages share, and that of `text`, `code` (light and dark) or `study` pages."""
    colours = "".join(f"--g{k}: {colour}; " for k, colour in figures.SEVERITY_COLOURS.items() if k != MISSING)
    parts = [f":root {{ {colours}}}", *((TEMPLATES / f"{name}.css").read_text() for name in ("style", kind))]
    if kind == "code":
        light, dark = (HtmlFormatter(style=name).get_style_defs(".highlight") for name in ("default", "github-dark"))
        parts += [light, f"@media (prefers-color-scheme: dark) {{ {dark} }}"]
    return re.sub(r"\s+", " ", re.sub(r"/\*.*?\*/", "", " ".join(parts), flags=re.S))


def html_table(table: pd.DataFrame) -> str:
    """A table as HTML, its text escaped; column groups span their columns."""
    html = table.rename_axis(index=None).to_html(escape=True, border=0, classes="numbers", na_rep="–")
    return html.replace("<th></th>", "<td></td>").replace("<th>", '<th scope="row">').replace(' valign="top"', "")


def markdown_table(table: pd.DataFrame) -> str:
    """A table of text as Markdown; a column group stands before each of its columns."""
    head = [table.index.name or "", *(name if isinstance(name, str) else ": ".join(name) for name in table.columns)]
    lines = [head, ["---", *["---:"] * len(table.columns)], *table.reset_index().to_numpy().tolist()]
    return "\n".join("| " + " | ".join(re.sub(r"([|<>`*_])", r"\\\1", cell) for cell in line) + " |" for line in lines)


def duration(seconds: float) -> str:
    """Seconds as 42 s, 3 min 05 s or 2 h 07 min; a dash for NaN."""
    if not math.isfinite(seconds):
        return "–"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def avif(image: Image.Image, quality: int = 48, largest: int = 4096) -> str:
    """An image as the address of an embedded AVIF image, scaled down to `largest` pixels a side."""
    image = image.convert("RGB")
    image.thumbnail((largest, largest))
    content = io.BytesIO()
    image.save(content, "AVIF", quality=quality)
    return f"data:image/avif;base64,{base64.b64encode(content.getvalue()).decode()}"
