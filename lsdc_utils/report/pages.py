"""The pages of a report: plain HTML and CSS with embedded images, from the templates beside this file.

A content security policy in each page keeps the browser from loading anything and from running any script except the
page's own few lines, which it names by their hash. Text from data and notebooks is escaped or cleaned. A report opens
from disk and can be passed on."""

import base64
import hashlib
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from lsdc_utils import figures
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.chain import SURE
from lsdc_utils.files import atomic
from lsdc_utils.grading.basis import basis_words, grade_basis
from lsdc_utils.grading.marks import SHORT_NAMES
from lsdc_utils.grading.run_tables import SOURCE_NAMES, read_graded, study_reader
from lsdc_utils.report import run as tables
from lsdc_utils.report import studies
from lsdc_utils.report.card import TEMPLATES, environment, limits, sentences
from lsdc_utils.report.chapters import read_chapter, read_chapters
from lsdc_utils.report.pictures import Picture
from lsdc_utils.vocabulary import GROUPS, LEVEL_NAMES, LEVELS, MISSING, SEVERITY_NAMES

PRINTED = ("totals", "parts", "grades", "reliability")  # figures that are also written as vector PDF
MOST_WHOLE = 20  # studies of a prediction that are shown with all slices, about 0.5 MB each
WORST = 12  # studies of an evaluation that have a page
Page = tuple[str, str]  # file name and title
Findings = dict[int, list[tuple[str, str]]]  # rule and value by study
INDEX, OVERVIEW = ("index.html", "Summary"), ("studies.html", "Studies")
LIMITS, CLAIM = ("limits.html", "Limitations"), ("claim.html", "CLAIM checklist")
NAMES = {  # words of the task, for the templates of studies
    "severities": [name.capitalize() for name in SEVERITY_NAMES],
    "conditions": {name: SHORT_NAMES[name] for name in studies.GRID},
    "levels": dict(zip(LEVELS, LEVEL_NAMES, strict=True)),
    "groups": {key: group.score for key, group in GROUPS.items()},
    "sources": SOURCE_NAMES,
}


def write_report(run: tables.Run, pictures: list[Picture], whole_studies: int = 8, seed: int = 0) -> Path:
    """Write report/index.html, everything it links to and the run's provenance.json; returns the index. There is a page
    for each executed notebook and each graded study (`whole_studies` of them, some drawn by `seed`, with all slices).
    Pages of an earlier report that no longer belong to it are deleted."""
    folder, chapters = run.folder / "report", read_chapters(run)
    tables.write_provenance(run.folder)
    graded = [name for name in tables.BLOCK_NAMES if (run.folder / f"predictions/sources_{name}.parquet").is_file()]
    if run.scores.get("test") and "test" in graded:  # training studies are only part of the scores then
        graded = ["test"]
    rows = pd.concat([read_graded(run.folder, name) for name in graded], ignore_index=True)
    pages = [INDEX, *([OVERVIEW] if len(rows) else ()), *(chapter["page"] for chapter in chapters), LIMITS, CLAIM]
    frame = {"run": run, "pages": pages, "facts": tables.provenance(run), "kind": run.data.get("kind", "")}
    frame["basis"] = basis_words(grade_basis(run.folder))
    write = partial(_write_page, folder, frame)
    readers = {block: study_reader(run.folder, block) for block in rows["block"].unique()}
    whole = studies.choose_studies(rows, whole_studies, seed)
    read, weights = (lambda study, block: readers[block](study)), run.folder / "weights"
    written = _write_studies(write, rows, read, weights, whole) if len(rows) else []
    for chapter in chapters:
        seconds = run.steps["seconds"].get(chapter["step"])
        written.append(write("chapter.html.j2", styles="code", seconds=seconds, **chapter))
    written += [write("limits.html.j2", LIMITS, limits=limits(run)), write("claim.html.j2", CLAIM)]
    for picture in pictures:
        if picture.name in PRINTED:
            written.append(folder / f"{picture.name}.pdf")
            picture.figure.savefig(written[-1], metadata={"CreationDate": None})
    for file in {*folder.glob("*.html"), *folder.glob("*.pdf")} - {*written, folder / "index.html"}:
        file.unlink()
    shown = {"pictures": pictures, "printed": PRINTED, "chapters": chapters}
    shown |= {"about": sentences(run, "about")[0], "summary": sentences(run, "summary") + sentences(run, "stress")}
    return write("index.html.j2", INDEX, **shown)  # last: when it exists, what it links to exists


def _write_page(
    folder: Path, frame: dict, template: str, page: Page, script="", styles="text", around=(), **context: Any
) -> Path:
    """Render a page; returns its file. styles: kind of `style_sheet`; around: linked pages (default: the frame's)."""
    chain = [None, *(around or frame["pages"]), None]
    place = chain.index(page)
    text = (TEMPLATES / script).read_text() if script else ""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    own = {"page": page, "css": style_sheet(styles), "script": text, "digest": digest}
    own |= {"sections": [], "before": chain[place - 1], "after": chain[place + 1]}
    html = environment().get_template(template).render({**frame, **own, **context})
    with atomic(folder / page[0]) as temporary:
        temporary.write_text(html, encoding="utf-8")
    return folder / page[0]


@cache
def style_sheet(kind: str) -> str:
    """The style of a page: what all pages share, and that of `text`, `code` or `study` pages."""
    colours = "".join(f"--g{k}: {colour}; " for k, colour in figures.SEVERITY_COLOURS.items() if k != MISSING)
    parts = [f":root {{ {colours}}}", *((TEMPLATES / f"{name}.css").read_text() for name in ("style", kind))]
    css = re.sub(r"/\*.*?\*/", "", " ".join(parts), flags=re.S)
    return re.sub(r"\s*([{};,])\s*", r"\1", re.sub(r"\s+", " ", css))  # every page carries it


def _write_studies(
    write: partial, graded: pd.DataFrame, read: Callable[[int, str], list[Stack]], weights: Path, whole: dict[int, str],
    first: Page = OVERVIEW, findings: Findings | None = None,
) -> list[Path]:  # fmt: skip
    """The page of each study and their overview, `first`; returns the files. read: stacks of a study and block."""
    lines, files = studies.overview(graded), []
    trained = {key: sorted(weights.glob(f"yolo_{key}_fold*.json")) for key in GROUPS}
    boxes = {key: tables.read_file(some[0])["config"]["box_mm"] for key, some in trained.items() if some}
    chain = [first, *((line["page"], f"Study {line['study_id']}") for line in lines)]
    for page, line, (study, rows) in zip(chain[1:], lines, graded.groupby("study_id", sort=True), strict=True):
        keys, viewers = studies.show_study(rows, read(study, rows["block"].iloc[0]), boxes, study in whole)
        context = {"line": line, "reason": whole.get(study, ""), "keys": keys, "viewers": viewers}
        context |= {"rows": rows.to_dict("records"), "script": "study.js" if viewers else "", "sure": SURE}
        context["findings"] = (findings or {}).get(study, [])
        files.append(write("study.html.j2", page, styles="study", around=chain, **NAMES, **context))
    labelled, blocks = any(line["known"] for line in lines), list(graded["block"].unique())
    context = {"lines": lines, "whole": whole, "blocks": blocks, "labelled": labelled}
    return [*files, write("studies.html.j2", first, script="studies.js", styles="study", **NAMES, **context)]


def write_study_pages(
    folder: Path, name: str, rows: pd.DataFrame, read: Callable[[int], list[Stack]], weights: Path, basis: str,
    findings: Findings, notebook: Path | None = None,
) -> Path:  # fmt: skip
    """Write `folder`/index.html and a page for each graded study of a prediction; returns the index.

    name: of the models; rows: as `read_graded` gives them; read: the stacks of a study. The least sure studies, at most
    `MOST_WHOLE`, are shown with all slices. Older pages are deleted. With an executed notebook, the index is that, and
    pages are those of the studies with the largest losses."""
    if notebook:
        rows = rows[rows["study_id"].isin(studies.study_losses(rows).nlargest(WORST).index)]
    first = OVERVIEW if notebook else ("index.html", "Studies")
    pages = [("index.html", "Evaluation"), first] if notebook else [first]
    frame = {"run": SimpleNamespace(name=name), "pages": pages, "kind": "prediction", "basis": basis_words(basis)}
    whole = rows.groupby("study_id")["confidence"].mean().nsmallest(MOST_WHOLE).index.tolist()
    few = "among the largest losses" if notebook else "few studies: all are shown whole"
    whole = dict.fromkeys(whole, "among the least sure" if rows["study_id"].nunique() > MOST_WHOLE else few)
    write = partial(_write_page, folder, frame)
    written = _write_studies(write, rows, lambda study, _: read(study), weights, whole, first, findings)
    if notebook:
        chapter = read_chapter(notebook) | {"page": pages[0]}
        written.append(write("chapter.html.j2", styles="code", seconds=None, **chapter))
    for file in {*folder.glob("*.html")} - {*written}:
        file.unlink()
    return written[-1]
