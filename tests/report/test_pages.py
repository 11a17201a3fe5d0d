"""The report of a made-up run: what it says, that it needs no network and no trust in its data; the README's result."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from report_run import HOSTILE, write_run

from lsdc_utils import figures, report
from lsdc_utils.files import git_commit
from lsdc_utils.report import __main__ as readme
from lsdc_utils.report import pages
from lsdc_utils.report.run import ROOT


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("outputs") / "made-up")


@pytest.fixture(scope="module")
def index(run_dir) -> Path:
    figures.use_style()
    run = report.read_run(run_dir)
    return report.write_report(run, report.run_pictures(run))


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, file: Path):
        super().__init__()
        self.tags, self.text, self.styles, self._hidden = [], "", "", 0
        self.feed(file.read_text())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._hidden += tag == "style"

    def handle_endtag(self, tag):
        self._hidden -= tag == "style"

    def handle_data(self, data):
        if self._hidden:
            self.styles += data
        else:
            self.text += data

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


# ---- pages ---------------------------------------------------------------------------------------------------------


CHAPTERS = ["00_get_data", "03_train_yolo_scs_fold0"]


def assert_scripts_are_ours(html: str) -> None:
    """A page's scripts are those beside the templates, and its policy names them by their hash."""
    ours = {file.read_text() for file in pages.TEMPLATES.glob("*.js")}
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    policy = re.search(r"default-src 'none'[^\"]*", html)[0]
    assert set(scripts) <= ours
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests and html.count("<script") == len(scripts)


def test_every_page_stands_alone(index):
    files = sorted(index.parent.glob("*.html"))
    studies = sorted(f"study_{k}" for k in range(1, 25))
    assert [file.stem for file in files] == [*CHAPTERS, "claim", "index", "limits", "studies", *studies]
    for file in files:
        page = Page(file)
        assert not page.all("iframe") and not page.all("link"), file.name
        assert_scripts_are_ours(file.read_text())
        assert all(image["src"].startswith("data:image/") for image in page.all("img")), file.name
        assert all(image["alt"] for image in page.all("img")), file.name
        assert "default-src 'none'" in str(page.all("meta"))
        assert not re.search(r"url\(|@import", page.styles), file.name
        assert {key for _, given in page.tags for key, text in given.items() if "//" in (text or "")} <= {"src", "href"}
        assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
        assert "Not for clinical use" in page.text
        for address in (link["href"] for link in page.all("a")):
            name, _, anchor = address.partition("#")
            if address.endswith(".pdf"):
                assert file.with_name(address).read_bytes().startswith(b"%PDF"), address
            elif not address.startswith("https://example.org"):
                target = Page(file.with_name(name)) if name else page
                assert not anchor or anchor in [attributes.get("id") for _, attributes in target.tags], address


def test_experiments_are_shown_as_far_as_they_were_made(index, run_dir):
    text = re.sub(r"\s+", " ", Page(index).text)
    assert "What each ingredient is worth" in text and "+0.021 (-0.004 to +0.050)" in text
    assert "nothing: the run itself 0.500" in text
    assert "What more training studies are worth" in text and "0.400 0.300 to 0.500 0.60" in text
    assert "What wrong labels cost" not in text
    noise = {"labels": ["as read", "with wrong labels"], "total": [0.4, 0.5], "skill": [0.8, 0.7]}
    noise |= {"better_by": [0.1, None], "low": [0.05, None], "high": [0.15, None]}
    noise |= {name: [None, 0.6] for name in ("precision", "recall", "precision_at_half")}
    noise |= {"planted": [None, 200.0], "listed": [None, 180.0]}
    [table] = report.experiment_tables({"noise": pd.DataFrame(noise)}).values()
    assert table.loc["As read"].tolist() == ["0.400", "0.80", "+0.100 (+0.050 to +0.150)", *"–––––"]
    assert table.loc["With wrong labels"].tolist() == ["0.500", "0.70", "–", "200", "180", "0.60", "0.60", "0.60"]
    pictures = {picture.name: picture for picture in report.run_pictures(report.read_run(run_dir))}
    assert pictures["curve"].alt == "Out of fold: 40 0.900, 320 0.400; Test: 40 0.900, 320 0.400"


def test_text_from_data_stays_text(index):
    for file in index.parent.glob("*.html"):
        page = Page(file)
        assert "<script>alert" not in file.read_text()
        if file.stem in ("index", *CHAPTERS):
            assert HOSTILE in page.text, file.name  # shown as it is, not lost
        assert len(page.all("main")) == 1 and file.read_text().count("</main>") == 1


def test_code_and_long_prints_are_folded(index):
    html = (index.parent / "03_train_yolo_scs_fold0.html").read_text()
    assert "<summary>Printed (20 lines)</summary>" in html
    assert "<summary>Parameters and their defaults</summary>" in html
    page = Page(index.parent / "03_train_yolo_scs_fold0.html")
    assert "<int 42>" in page.text and "ValueError: <b>bad</b>" in page.text and "a < b" in page.text
    assert "#T_" in html  # the colours of a table made by pandas' Styler stay
    assert [image["alt"] for image in page.all("img")] == ["Figure of the section: What is shown"]
    assert "3 min 07 s" in page.text


def test_pages_lead_from_one_to_the_next(index):
    page = Page(index.parent / "00_get_data.html")
    turns = {link["rel"]: link["href"] for link in page.all("a") if "rel" in link and link["rel"] in ("prev", "next")}
    assert turns == {"prev": "studies.html", "next": "03_train_yolo_scs_fold0.html"}
    page = Page(index.parent / "study_2.html")
    turns = {link["rel"]: link["href"] for link in page.all("a") if "rel" in link and link["rel"] in ("prev", "next")}
    assert turns == {"prev": "study_1.html", "next": "study_3.html"}
    page = Page(index.parent / "00_get_data.html")
    assert "Chapter 03_train_yolo_scs_fold0 & more (scs, fold 0)" in page.text
    assert {"href": "#What-is-shown"} in page.all("a")


def test_summary_shows_scores_cost_and_origin(index, run_dir):
    text = Page(index).text
    scores = json.loads((run_dir / "scores.json").read_text())
    for model in scores["oof"]["scores"]:
        assert f"{scores['oof']['scores'][model]['total']:.3f}" in text
    for words in ("Out of fold, 24 studies", "Test, 24 studies", "Skill", "Oracle", "12 s", "812 MiB", "phantom-0a1b"):
        assert words in text
    assert all(words in text for words in ("Where the levels were found", "96.2%", "97.5%", "Axial slices", "90.0%"))
    assert git_commit()[:12] in text and "torch 2." in text and "fold4" not in text
    assert "3D ViT: no better than counting labels" in text
    assert len(Page(index).all("img")) == 7


def test_pages_that_are_not_made_any_more_go(index, run_dir):
    old = [index.parent / name for name in ("03_train_yolo_ss_fold9.html", "study_99.html", "other.pdf")]
    for file in old:
        file.write_text("old")
    report.write_report(report.read_run(run_dir), [])
    assert not any(file.exists() for file in old)


def test_real_data_show_the_out_of_fold_score_alone(tmp_path):
    folder = write_run(tmp_path / "real", labelled_test=False, n_studies=6)
    scores = json.loads((folder / "scores.json").read_text())
    scores["oof"]["skill"] = None
    del scores["oof"]["scores"]["oracle"], scores["oof"]["interval"]["oracle"]
    scores["oof"]["scores"]["vit3d"]["foraminal"] = scores["oof"]["scores"]["vit3d"]["total"] = None
    scores["oof"]["interval"]["vit3d"]["total"] = [None, None]
    (folder / "scores.json").write_text(json.dumps(scores))
    for file in ("data.json", "parameters.yml", "tables/findings.csv", "tables/labels.parquet"):
        (folder / file).unlink()  # what a run by hand may lack
    for file in (folder / "logs").iterdir():
        file.unlink()
    run = report.read_run(folder)
    page = Page(report.write_report(run, report.run_pictures(run)))
    assert "The test studies of this data have no labels, so the out-of-fold score is the result." in page.text
    assert "skill is" not in page.text and "Oracle" not in page.text and "Not recorded" in page.text
    assert "–" in report.score_table(run.scores).loc["3D ViT"].tolist()


def test_a_run_without_scores_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scores\.json"):
        report.read_run(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (187, "3 min 07 s"), (7620, "2 h 07 min"), (np.nan, "–")]
)
def test_durations_read_well(seconds, text):
    assert pages.duration(seconds) == text


# ---- the README ----------------------------------------------------------------------------------------------------


def test_the_readme_takes_its_numbers_from_a_run(index, run_dir, tmp_path):
    file = tmp_path / "README.md"
    place = "<!-- scores {0} -->\nold\n<!-- end -->\n<!-- picture {0} {1} -->\n<!-- end -->\n"
    kinds = ("localisation", "experiments", "stress")
    place += "".join(f"<!-- {kind} {{0}} -->\n<!-- end -->\n" for kind in kinds)
    file.write_text(f"before\n{place.format('made-up', 'example')}{place.format('other', 'totals')}after\n")
    readme.update_readme(report.read_run(run_dir), file)
    text = file.read_text()
    assert text.startswith("before\n<!-- scores made-up -->\nOut of fold, on 24 studies, the ensemble scores")
    assert "Out of fold:\n\n| Points | Within 5 mm |" in text
    assert "| Spinal canal stenosis | 96.2% | 100.0% | 97.5% | 2 | – |" in text
    assert "| 320 | 0.400 | 0.300 to 0.500 | 0.60 | 0.400 |" in text
    assert "rises 0.71 times as steeply as the oracle's; while one place narrows, another row's" in text
    assert "| as usual | 0.500 | 0.75 | 0.60 to 0.90 | – |" in text and "| +0.12 (-0.01 to +0.20) |" in text
    assert "| Ensemble | 0." in text and "(docs/made-up-example.png)" in text and "Run `made-up`, 20" in text
    assert text.endswith(f"{place.format('other', 'totals')}after\n")
    assert {file.name for file in (tmp_path / "docs").iterdir()} == {"made-up.json", "made-up-example.png"}
    assert readme.fill(text, "made-up", json.loads((tmp_path / "docs/made-up.json").read_text())) == text
    readme.update_readme(dataclasses.replace(report.read_run(run_dir), experiments={}), file)
    assert file.read_text() == text  # experiments that were not made again stay
    file.write_text(place.format("other", "totals"))
    with pytest.raises(ValueError, match="no place such as <!-- scores made-up -->"):
        readme.update_readme(report.read_run(run_dir), file)


def test_the_readme_s_numbers_are_those_of_the_runs_it_names():
    text = (ROOT / "README.md").read_text()
    places = list(readme.PLACE.finditer(text))
    assert {(place[2], place[3]) for place in places} >= {("scores", "demo"), ("picture", "demo")}
    for place in places:
        record = ROOT / f"docs/{place[3]}.json"
        if record.is_file():
            filled = readme.fill(place[0], place[3], json.loads(record.read_text()))
            assert filled == place[0], f"run python -m lsdc_utils.report readme --run {place[3]}"
        else:
            assert not re.search(r"\d\.\d", place[5]), f"README.md shows numbers of {place[3]}, which has no record"


def test_the_readme_points_to_what_is_there():
    text = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert (ROOT / target).exists(), f"README.md points to {target}"
