"""JupyterLab used as a person would: `python tests/proofs/lab.py RUN [--pictures DIR]`.

The finished run in folder RUN is the run `demo` of a copy of the project. In a browser: the start page lists it, and
grades and evaluates a small phantom folder; 01 and 05 run from the first cell to the last, and the sliders of their
viewers change the picture; the loss of 04 is halved in its cell, and the training runs again with it. What must then
stand on the pages is asserted. RUN is of profile smoke, e.g. outputs/smoke. Needs chromium. DIR keeps screenshots.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/proofs")]

from conftest import copy_project  # noqa: E402
from playwright.sync_api import Locator, Page, expect, sync_playwright  # noqa: E402

from docs import lab_of  # noqa: E402
from lsdc_utils import phantom  # noqa: E402

WAIT = 900_000  # ms: the longest that cells may take
FOOT = "document.querySelector('.jp-NotebookPanel:not(.lm-mod-hidden) .jp-WindowedPanel-outer')"
PIXELS = """async (image) => {
    const bytes = new Uint8Array(await (await fetch(image.src)).arrayBuffer());
    return Array.from(new Uint8Array(await crypto.subtle.digest("SHA-256", bytes))).join();
}"""


class Lab:
    """A page of JupyterLab with one notebook open, and what a person does with it."""

    def __init__(self, page: Page, address: str, pictures: Path):
        self.page, self.pictures = page, pictures
        self.base, _, self.query = address.partition("?")
        self.base = self.base.partition("/lab")[0]

    def open(self, name: str) -> None:
        """Open a notebook alone, and wait until its kernel is ready."""
        self.page.goto(f"{self.base}/lab/tree/{name}.ipynb?{self.query}&reset")
        self.name = name
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for(timeout=WAIT)
        self.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=WAIT)
        if (news := self.page.locator(".jp-toastContainer button", has_text="No")).count():
            news.first.click()
        self.page.locator(".jp-Notebook .jp-Cell").first.click()  # menus act on the notebook that has the focus

    def picture(self, what: str) -> None:
        """Keep a screenshot."""
        self.page.screenshot(path=self.pictures / f"{self.name}-{what}.png")

    def cell(self, text: str, kind: str = "Code") -> Locator:
        """The cell whose source holds a text, scrolled to; cells far away are not on the page."""
        found = self.page.locator(f".jp-{kind}Cell").filter(has=self.page.locator(".jp-InputArea", has_text=text))
        self.page.evaluate(f"{FOOT}.scrollTo(0, 0)")
        for _ in range(200):
            if found.count():
                found.first.scroll_into_view_if_needed()
                return found.first
            self.page.evaluate(f"{FOOT}.scrollBy(0, 500)")
            self.page.wait_for_timeout(100)
        raise AssertionError(f"{self.name}: no cell with {text!r}")

    def run_all(self, last: str) -> None:
        """Run all cells by the menu and wait until that with the text `last` has run; no cell may fail."""
        prompt = self.cell(last).locator(".jp-InputPrompt")
        before = prompt.inner_text()
        for _ in range(5):  # a page that is still being built may miss a click
            self.page.get_by_role("menuitem", name="Run", exact=True).click()
            self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
            with contextlib.suppress(AssertionError):
                expect(prompt).not_to_have_text(before, timeout=15_000)
                break
        else:
            raise AssertionError(f"{self.name}: its cells do not run")
        self.finished(last)

    def finished(self, last: str) -> None:
        """Wait until the cell with the text `last` has a number and the kernel rests; no cell may have failed."""
        number, began = re.compile(r"\[\d+\]:"), time.time()
        while not number.search(self.cell(last).locator(".jp-InputPrompt").inner_text()):
            assert not self.page.locator("[data-mime-type='application/vnd.jupyter.error']").count(), self.name
            assert time.time() - began < WAIT / 1000, f"{self.name}: still running"
            self.page.wait_for_timeout(1000)
        self.page.locator(".jp-Notebook-ExecutionIndicator[data-status=idle]").wait_for(timeout=WAIT)

    def change(self, text: str, edit: Callable[[str], str]) -> Locator:
        """Edit the cell whose source holds a text, as by the keyboard; the cell."""
        cell = self.cell(text)
        editor = cell.locator(".cm-content")
        editor.click()  # a cell that was out of sight gets its editor now
        expect(editor).to_contain_text(text)
        lines = editor.locator(".cm-line").all_inner_texts()
        before = "\n".join(line.rstrip("\n") for line in lines)
        after = edit(before)
        assert after != before, f"{self.name}: nothing to change in the cell with {text!r}"
        self.page.keyboard.press("Control+A")
        self.page.keyboard.insert_text(after)
        return cell

    def run_cell(self, cell: Locator) -> str:
        """Run a cell by Shift+Enter and wait until it has another number; what it shows, as text."""
        prompt, editor = cell.locator(".jp-InputPrompt"), cell.locator(".cm-content")
        before = prompt.inner_text()
        editor.click()
        self.page.keyboard.press("Shift+Enter")
        expect(prompt).not_to_have_text(before, timeout=WAIT)
        expect(prompt).to_have_text(re.compile(r"\[\d+\]:"), timeout=WAIT)
        return cell.locator(".jp-Cell-outputArea").inner_text()


def slide(lab: Lab) -> None:
    """Move the slider of a viewer by a slice: the picture and its number must change, and come back."""
    box = lab.page.locator(".jp-OutputArea-output .widget-hbox").filter(has_text="Window").first
    box.scroll_into_view_if_needed()
    image, slider = box.locator("img").first, box.locator(".widget-slider").filter(has_text="Slice")
    first, number = image.evaluate(PIXELS), slider.locator(".widget-readout").inner_text()
    lab.picture("viewer")
    slider.locator(".noUi-handle").first.focus()
    lab.page.keyboard.press("ArrowRight")
    expect(slider.locator(".widget-readout")).not_to_have_text(number)
    lab.page.wait_for_timeout(1500)
    assert image.evaluate(PIXELS) != first, f"{lab.name}: the slider moved and the picture stayed"
    lab.picture("viewer-next-slice")
    lab.page.keyboard.press("ArrowLeft")
    expect(slider.locator(".widget-readout")).to_have_text(number)
    lab.page.wait_for_timeout(1500)
    assert image.evaluate(PIXELS) == first, f"{lab.name}: the slider came back and the picture did not"


def look_at_data_and_grades(lab: Lab) -> None:
    """01 and 05 by hand, with their viewers."""
    for name, last, words in (
        ("01_eda", "worst = shares[2]", "labelled and 3 test studies"),
        ("05_ensemble_inference", "are graded: {counts", "3 test studies are graded"),
    ):
        lab.open(name)
        lab.run_all(last)
        expect(lab.cell(last)).to_contain_text(words)
        lab.picture("end")
        lab.cell("viewer.show")
        slide(lab)
        print(f"{name}: ran from the first cell to the last; its slider changes the picture", flush=True)


def halve_the_loss(lab: Lab) -> None:
    """Train by 04, halve the loss in its cell, and train again."""
    lab.open("04_train_vit3d")
    lab.run_all("shutil.rmtree(work")

    def losses() -> list[float]:
        shown = lab.cell("saved = checkpoint.Checkpoint").locator(".jp-Cell-outputArea")
        expect(shown).to_contain_text(re.compile(r"epoch (\d+)/\1 loss"))
        text = shown.text_content()  # also of what is out of sight
        return [float(number) for number in re.findall(r"epoch \d+/\d+ loss (\d+\.\d+)", text)]

    before = losses()
    lab.picture("end")
    changed = lab.change("def batch_loss", lambda text: text.replace(".sum()", ".sum() / 2"))
    lab.run_cell(changed)
    lab.picture("changed-loss")
    lab.run_cell(lab.cell("saved = checkpoint.Checkpoint"))
    after = losses()
    lab.picture("trained-again")
    assert len(after) == len(before) > 1, (before, after)
    assert 0.4 < after[0] / before[0] < 0.6, f"halved in its cell, the loss went from {before[0]} to {after[0]}"
    print(f"04: loss of the first epoch {before[0]}, halved in its cell {after[0]}", flush=True)


def grade_my_folder(lab: Lab, folder: Path) -> None:
    """The start page: lists the run; grades and evaluates a folder."""
    lab.open("start")
    lab.picture("opened")
    expect(lab.page.locator(".jp-Notebook")).to_contain_text("where to start")
    lab.run_all("lines = {}")
    expect(lab.cell("elif run_all(")).to_contain_text("no folder is named in my_folder")
    expect(lab.cell("lines = {}").locator("table")).to_contain_text("demo")
    lab.picture("runs")
    lab.change("my_folder: str", lambda text: text.replace('my_folder: str = ""', f'my_folder: str = "{folder}"'))
    lab.run_all("lines = {}")
    shown = lab.cell("elif run_all(").locator(".jp-Cell-outputArea")
    for words in ("usable for: ", "numbers: ", "report: ", "labelled studies"):
        expect(shown).to_contain_text(words)
    lab.picture("graded")
    print("start: graded and evaluated a folder", flush=True)


def main() -> None:
    """Do all of it in a copy of the project; AssertionError where a page does not hold what it must."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a finished run")
    parser.add_argument("--pictures", type=Path, help="where screenshots are kept (default: deleted)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, sync_playwright() as playwright:
        folder, pictures = Path(place), (asked.pictures or Path(place) / "pictures").resolve()
        pictures.mkdir(parents=True, exist_ok=True)
        project = copy_project(folder / "project")
        (project / "outputs").mkdir()
        shutil.copytree(asked.run, project / "outputs/demo", symlinks=True)
        for name in ("data", "pretrained"):
            (project / "outputs" / name).symlink_to(asked.run.resolve().parent / name)
        mine = phantom.write_phantom(folder / "my folder", 3, 0, 4003, workers=2)
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium") or shutil.which("google-chrome"))
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        with lab_of(project, folder / "lab.log", environment) as address:
            lab = Lab(page, address, pictures)
            grade_my_folder(lab, mine)
            look_at_data_and_grades(lab)
            halve_the_loss(lab)
        browser.close()


if __name__ == "__main__":
    main()
