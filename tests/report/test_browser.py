"""The report in a browser without a network: everything loads, sliders, filters and sorting work."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_run import write_run

from lsdc_utils import figures
from lsdc_utils.report import pages, pictures
from lsdc_utils.report.run import Run

SAMPLE = Path(__file__).resolve().parents[2] / "outputs" / "sample"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
NARROW, WIDE = {"width": 390, "height": 844}, {"width": 1600, "height": 1000}
LOAD_ALL = """() => Promise.all([...document.images].map(async (image) => {
    image.loading = "eager";
    await image.decode().catch(() => {});
    return image.naturalWidth ? null : image.alt;
})).then((failed) => failed.filter((alt) => alt !== null))"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The report of a made-up run."""
    figures.use_style()
    run = Run(write_run(tmp_path_factory.mktemp("outputs") / "made-up", n_studies=12))
    return pages.write_report(run, pictures.run_pictures(run), whole_studies=3).parent


@pytest.fixture(scope="module")
def browser() -> Iterator:
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser to open the report with: none of {', '.join(BROWSERS)} is on PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=path)
        yield launched
        launched.close()


def opened(browser, file: Path, viewport: dict, scheme: str = "light"):
    """A page, and the list of its complaints: messages in the console, errors of scripts, requests."""
    context = browser.new_context(viewport=viewport, color_scheme=scheme, offline=True)
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    asked = ("data:", file.as_uri())
    page.on("request", lambda request: request.url.startswith(asked) or complaints.append(request.url))
    page.goto(file.as_uri())
    return page, complaints


def whole_study(folder: Path) -> Path:
    """A study that is shown with all its slices."""
    return next(file for file in sorted(folder.glob("study_*.html")) if 'type="range"' in file.read_text())


def assert_loads(browser, file: Path, viewport: dict, scheme: str) -> None:
    """No complaint, every image there, no scrolling to the side, links that lead somewhere."""
    page, complaints = opened(browser, file, viewport, scheme)
    assert page.evaluate(LOAD_ALL) == [], file.name
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"], file.name
    for address in page.eval_on_selector_all("a[href]", "links => links.map((link) => link.getAttribute('href'))"):
        name, _, anchor = address.partition("#")
        if not re.match(r"https?://", address):
            assert file.with_name(name).is_file() if name else page.locator(f'[id="{anchor}"]').count(), address
    assert complaints == [], file.name
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [NARROW, WIDE], ids=["narrow", "wide"])
def test_pages_load_without_complaint(browser, folder, viewport, scheme):
    names = ["index.html", "studies.html", "03_train_yolo_scs_fold0.html", "limits.html", "claim.html"]
    for file in [*(folder / name for name in names), whole_study(folder), folder / "study_1.html"]:
        assert_loads(browser, file, viewport, scheme)


@pytest.mark.parametrize("step", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_every_page_of_the_sample_loads(browser, step):
    files, studies = sorted(SAMPLE.glob("*.html")), sorted(SAMPLE.glob("study_*.html"))
    assert len(files) > 100 and len(studies) > 100
    for file in sorted({*files} - {*studies}) + studies[::step]:
        page, complaints = opened(browser, file, NARROW)
        assert page.locator("main h1").count() == 1 and complaints == [], file.name
        page.context.close()
    for file in (SAMPLE / "index.html", SAMPLE / "studies.html", whole_study(SAMPLE)):
        assert_loads(browser, file, NARROW, "light")


def test_sentences_of_the_summary_are_apart(browser, folder):
    page, _ = opened(browser, folder / "index.html", WIDE)
    text = page.locator("main").inner_text()
    assert "Each graded study has a page: studies. See also" in text and not re.findall(r"[a-z]\.[A-Z]\w+", text)
    page.context.close()


def test_a_slider_scrolls_its_series_and_marks_go(browser, folder):
    page, complaints = opened(browser, whole_study(folder), WIDE)
    viewer = page.locator(".viewer").first
    slider, count = viewer.locator("input"), viewer.locator(".film").count()
    assert count == 7 and viewer.locator(".film:visible").count() == 1
    slider.fill("2")
    assert viewer.locator("output").inner_text() == "2 of 7"
    assert viewer.locator(".film:visible img").get_attribute("alt").startswith("Sagittal T1, slice 2 of 7")
    slider.press("ArrowRight")
    assert viewer.locator(".film:visible img").get_attribute("alt").startswith("Sagittal T1, slice 3 of 7")
    link = page.locator("a[data-slice]").first
    link.click()
    asked = page.locator(link.get_attribute("href"))
    assert asked.locator("output").inner_text() == f"{int(link.get_attribute('data-slice')) + 1} of 7"
    assert page.locator(".viewers .marks use:visible").count() > 0
    page.locator("#marks").uncheck()
    assert page.locator(".viewers .marks use:visible").count() == 0
    assert complaints == []
    page.context.close()


def test_the_overview_filters_and_sorts(browser, folder):
    page, complaints = opened(browser, folder / "studies.html", WIDE)
    lines = page.locator("#studies tbody tr")
    rows = lines.evaluate_all("lines => lines.map((line) => line.dataset.rows)")
    assert lines.count() == 12 and all(len(row.split()) == 25 for row in rows)
    page.select_option("#group", "scs")
    page.select_option("#grade", "2")
    page.fill("#least", "60")
    expected = sum(any(re.fullmatch(r"scs2(6\d|7\d|8\d|9\d|100)", cell) for cell in row.split()) for row in rows)
    assert 0 < expected < 12
    assert page.locator("#studies tbody tr:visible").count() == expected
    assert page.locator("#count").inner_text() == f"{expected} of 12 studies"
    page.click("button[type=reset]")
    page.get_by_text("12 of 12 studies").wait_for()  # the form is empty only after its event
    assert page.locator("#studies tbody tr:visible").count() == 12
    page.get_by_role("button", name="Least sure").click()
    assert page.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    column = page.locator("#studies thead th").all_inner_texts().index("Least sure")
    sure = [float(cell) for cell in lines.evaluate_all(f"l => l.map((line) => line.cells[{column}].dataset.sort)")]
    assert sure == sorted(sure, reverse=True) and len(set(sure)) > 1
    assert complaints == []
    page.context.close()
