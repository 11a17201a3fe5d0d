"""The report of a made-up run: its content, that it works offline, and that text from data stays text."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

matplotlib.use("Agg")

from report_run import HOSTILE, make_notebook, write_run

from lsdc_utils import figures
from lsdc_utils.files import git_commit
from lsdc_utils.report import __main__ as commands
from lsdc_utils.report import card, pages, pictures
from lsdc_utils.report import run as tables
from lsdc_utils.report.chapters import read_chapters


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("outputs") / "made-up")


@pytest.fixture(scope="module")
def index(run_dir) -> Path:
    figures.use_style()
    run = tables.Run(run_dir)
    return pages.write_report(run, pictures.run_pictures(run))


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


CHAPTERS = ["00_get_data", "phantom", "01_eda", "03_train_yolo_scs_fold0"]  # in order of running


def assert_scripts_are_ours(html: str) -> None:
    """A page's scripts are those beside the templates, and its policy names them by their hash."""
    ours = {file.read_text() for file in card.TEMPLATES.glob("*.js")}
    scripts = re.findall(r"<script>(.*?)</script>", html, re.S)
    policy = re.search(r"default-src 'none'[^\"]*", html)[0]
    assert set(scripts) <= ours
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert re.findall(r"'sha256-([^']+)'", policy) == digests and html.count("<script") == len(scripts)


def test_every_page_stands_alone(index):
    files = sorted(index.parent.glob("*.html"))
    studies = sorted(f"study_{k}" for k in range(1, 25))
    assert sorted(file.stem for file in files) == sorted([*CHAPTERS, "claim", "index", "limits", "studies", *studies])
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


def test_experiments_are_shown(index, run_dir):
    text = re.sub(r"\s+", " ", Page(index).text)
    assert "Ablations" in text and "0.500 0.021 -0.004 0.050" in text
    assert "nothing (the run itself) 0.500" in text
    assert "Learning curve" in text and "320, test 0.400 0.600 0.300 0.500" in text
    shown = {picture.name: picture for picture in pictures.run_pictures(tables.Run(run_dir))}
    assert shown["curve"].alt == "Out of fold: 40 0.900, 320 0.400; Test: 40 0.900, 320 0.400"
    assert "slope is 0.71 of the oracle's (spinal 0.80)." in shown["doses"].caption
    (run_dir / "experiments").rename(run_dir / "elsewhere")
    assert tables.Run(run_dir).experiments == {}
    (run_dir / "elsewhere").rename(run_dir / "experiments")


def test_agreement_and_calibration_come_from_the_evaluation(index, run_dir):
    table = tables.evaluation_table(tables.Run(run_dir).evaluation)
    assert table.loc["Out of fold: spinal"].tolist() == ["0.61", "0.66", "–"]
    assert table.loc["Out of fold: all rows"].tolist() == ["–", "–", "0.012"]
    assert tables.evaluation_table({}).empty and "Agreement and calibration" in Page(index).text


def test_levels_that_may_be_named_wrong_are_marked_on_the_studys_page(tmp_path):
    run_dir = write_run(tmp_path / "made-up", n_studies=3)
    file = run_dir / "predictions/points_oof.parquet"
    points = pd.read_parquet(file)
    first = points["study_id"].min()
    points.assign(level_confidence=np.where(points["study_id"] == first, 0.6, 0.9)).to_parquet(file)
    index = pages.write_report(tables.Run(run_dir), [])
    marked = {page.stem for page in index.parent.glob("study_*.html") if "may be named wrong" in page.read_text()}
    assert marked == {f"study_{first}"}
    assert "their confidence is 60 %" in (index.parent / f"study_{first}.html").read_text()


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
    assert turns == {"prev": "studies.html", "next": "phantom.html"}
    page = Page(index.parent / "study_2.html")
    turns = {link["rel"]: link["href"] for link in page.all("a") if "rel" in link and link["rel"] in ("prev", "next")}
    assert turns == {"prev": "study_1.html", "next": "study_3.html"}
    contents = [link["href"] for link in page.all("a") if link["href"].removesuffix(".html") in CHAPTERS]
    assert contents[: len(CHAPTERS)] == [f"{name}.html" for name in CHAPTERS]
    page = Page(index.parent / "00_get_data.html")
    assert "Chapter 03_train_yolo_scs_fold0 & more (scs, fold 0)" in page.text
    assert {"href": "#What-is-shown"} in page.all("a")


def test_summary_shows_scores_cost_and_origin(index, run_dir):
    text = Page(index).text
    scores = json.loads((run_dir / "scores.json").read_text())
    for model in scores["oof"]["scores"]:
        assert f"{scores['oof']['scores'][model]['total']:.3f}" in text
    for words in ("Out of fold, 24 studies", "Test, 24 studies", "Skill", "Oracle", "12 s", "812", "phantom-0a1b"):
        assert words in text
    assert all(words in text for words in ("Localisation", "96.2", "97.5", "axial slices", "90.0"))
    assert git_commit()[:12] in text and "torch 2." in text and "fold4" not in text
    assert "3D ViT: no better than the label-frequency baseline" in text
    assert len(Page(index).all("img")) == 7


def test_other_runs_have_one_column_of_scores_and_say_which_conditions_it_is_of(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("all-of-them", "foramina")]
    scores = json.loads((runs[1] / "scores.json").read_text())
    for block in scores.values():
        block["groups"] = ["nfn"]
        block["scores"]["ensemble"]["mean_of_groups"] = block["skill"]["ensemble"]["mean_of_groups"] = 0.25
        block["interval"]["ensemble"]["mean_of_groups"] = [0.2, 0.3]
    (runs[1] / "scores.json").write_text(json.dumps(scores))
    (tmp_path / "pretrained").mkdir()  # ready-made models beside them, which are no run: they name no data
    (tmp_path / "pretrained/scores.json").write_text((runs[0] / "scores.json").read_text())
    table = tables.other_runs(tables.Run(runs[1]))
    assert "pretrained" not in table.index
    columns = [(name, key) for name in ("Out of fold", "Test") for key in ("Score", "Skill", "95 % interval")]
    assert list(table.columns) == [("", "Data"), ("", "Conditions"), *columns]
    assert table["", "Conditions"].to_dict() == {"foramina": "nfn", "all-of-them": "all"}
    total = json.loads((runs[0] / "scores.json").read_text())["test"]["scores"]["ensemble"]["total"]
    assert table["Test", "Score"].tolist() == ["0.250", f"{total:.3f}"]
    assert table["Test", "95 % interval"].iloc[0] == "0.200 to 0.300"


def test_experiments_of_some_conditions_show_the_mean_of_their_groups(tmp_path):
    folder = write_run(tmp_path / "foramina")
    for name in ("ablation", "curve"):
        table = pd.read_csv(folder / f"experiments/{name}.csv").assign(total=np.nan, mean_of_groups=0.25)
        table.to_csv(folder / f"experiments/{name}.csv", index=False)
    run = tables.Run(folder)
    shown = tables.experiment_tables(run.experiments).values()
    assert all(table["Score"].eq("0.250").all() for table in shown) and len(shown) == 2
    assert "320 0.250" in pictures.plot_curve(run.experiments["curve"], run.scores).alt


def test_steps_that_are_no_longer_part_of_a_run_are_not_shown(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "changed")
    own, before = yaml.safe_load((folder / "parameters.yml").read_text()), tables.Run(folder)
    assert before.stress and len(before.doses) and before.asks_for("07_stress_tests")
    assert all(map(before.asks_for, ("04_train_vit3d_fold0", "03_train_yolo_scs_fold0", "05_ensemble_inference")))
    now = {"stress_bodies": 0, "vit_members": [{"name": "a"}], "folds": [0]}
    (folder / "parameters.yml").write_text(yaml.safe_dump(own | now))
    (folder / "blend.json").write_text('{"conditions": ["nfn"]}')
    run = tables.Run(folder)
    assert not run.stress and run.doses.empty and run.settings.empty and "07_stress_tests" not in run.steps.index
    asked = [
        "00_get_data",
        "03_train_localiser_fold0",
        "03_train_yolo_nfn_fold0",
        "04_train_vit3d-a_fold0",
        "08_report",
    ]
    left = ["07_stress_tests", "03_train_localiser_fold1", "03_train_yolo_scs_fold0", "04_train_vit3d_fold0",
            "04_train_vit3d-b_fold0", "04_train_vit3d-a_fold1_inner0", "05_x-Copy1-Copy2_fold3"]  # fmt: skip
    assert all(map(run.asks_for, asked)) and not any(map(run.asks_for, left))


def test_an_adapted_run_is_not_said_to_be_of_the_phantom(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("demo", "own")]
    assert "synthetic" in card.sentences(tables.Run(runs[1]), "about")[0]
    (runs[1] / "blend.json").write_text(json.dumps({"adapted": {"run": "demo"}}))
    run = tables.Run(runs[1])
    assert "synthetic" not in " ".join([*card.sentences(run, "about"), *card.limits(run)["Data"]])
    assert tables.other_runs(tables.Run(runs[0]))["", "Data"].to_dict() == {"demo": "the same", "own": "a folder"}


def test_labelled_and_missing_rows_are_counted_among_the_same(tmp_path):
    folder = write_run(tmp_path / "foramina")
    (folder / "blend.json").write_text(json.dumps({"conditions": ["nfn"]}))
    rows = pd.read_parquet(folder / "predictions/ensemble_oof.parquet")
    rows[rows["row_id"].str.split("_").str[0].astype(int) <= 12].to_parquet(folder / "predictions/ensemble_oof.parquet")
    run = tables.Run(folder)
    [line] = [line for line in card.limits(run)["Labels"] if "graded out of fold" in line]
    labelled, missing = map(int, re.search(r"of (\d+) labelled .* (\d+) more have no label", line).groups())
    assert labelled + missing == 12 * 10 and missing > 0


def test_pages_that_are_not_made_any_more_go(index, run_dir):
    old = [index.parent / name for name in ("03_train_yolo_ss_fold9.html", "study_99.html", "other.pdf")]
    for file in old:
        file.write_text("old")
    pages.write_report(tables.Run(run_dir), [])
    assert not any(file.exists() for file in old)


def test_chapters_of_inner_trainings_say_so_and_go_with_their_fold(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "parameters.yml").write_text("folds: [1]")
    (tmp_path / "scores.json").write_text("{}")
    for step in ("vit3d-a_fold1", "vit3d_fold0_inner0", "vit3d_fold1", "vit3d_fold1_inner0"):
        nbformat.write(make_notebook(step), tmp_path / f"notebooks/04_train_{step}.ipynb")
    titles = [chapter["page"][1] for chapter in read_chapters(tables.Run(tmp_path))]
    assert [title.partition(" & more ")[2] for title in titles] == ["(a, fold 1)", "(fold 1)", "(fold 1, inner 0)"]


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
    run = tables.Run(folder)
    page = Page(pages.write_report(run, pictures.run_pictures(run)))
    assert "The test studies of this data have no labels, so the out-of-fold score is the result." in page.text
    assert "skill is" not in page.text and "Oracle" not in page.text and "Not recorded" in page.text
    assert "–" in tables.score_table(run.scores).loc["3D ViT"].tolist()


def test_a_run_without_scores_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"scores\.json"):
        tables.Run(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (187, "3 min 07 s"), (7620, "2 h 07 min"), (np.nan, "–")]
)
def test_durations_read_well(seconds, text):
    assert card.duration(seconds) == text


def test_sentences_on_stress_tests_are_computed(run_dir):
    run = tables.Run(run_dir)
    slope = "In the stress tests, the ensemble's dose-response slope is 0.71 of the oracle's"
    assert card.sentences(run, "stress") == [
        f"{slope}, the mean over conditions and two events (moderate or worse, severe).",
        "Narrowing one location moves another row's probability of moderate or worse by up to 0.23.",
        "Mirroring, renumbering and rescaling (which rounds pixel values) change no probability by more than 0.0007.",
    ]
    run.stress = {}
    assert card.sentences(run, "stress") == []


def test_the_model_card_has_scores_limits_and_licence(index, run_dir):
    run = tables.Run(run_dir)
    text = card.model_card(run)
    assert (
        "| Ensemble | 0." in text
        and "Run `made-up`, 20" in text
        and "no third-party material" in text
        and "slope is 0.71" in text
    )
    for words in ("Data:\n\n- The studies are synthetic", "the weakest part is", "Not for clinical use"):
        assert words in text


def test_evidence_is_a_line_for_each_block_and_group():
    own = {
        "foraminal": {"pairs": 143, "yolo": 0.804, "oracle": 0.902},
        "spinal": {"pairs": 0, "yolo": None, "oracle": None},
    }
    table = tables.evidence_table({"own_evidence": {"test": own}})
    assert table.loc["Test: foraminal"].tolist() == ["143", "0.80", "0.90"] and table.columns[2] == "Oracle"
    assert table.loc["Test: spinal", "pairs"] == "0" and tables.evidence_table({}).empty


def test_results_go_between_their_markers(index, run_dir, tmp_path):
    (tmp_path / "docs").mkdir()
    names = ("table", "scores", "localisation", "stress", "experiments")
    places = "".join(f"<!-- {name} made-up -->\nstale\n<!-- end -->\n" for name in names)
    other = "<!-- scores other -->\nkept\n<!-- end -->\n"
    for file in ("README.md", "docs/results.md"):
        (tmp_path / file).write_text(f"before\n{places}{other}after\n")
    commands.write_results(tables.Run(run_dir), tmp_path)
    text = (tmp_path / "docs/results.md").read_text()
    assert text.startswith("before\n<!-- table made-up -->\n| Model |") and text.endswith(f"{other}after\n")
    assert "stale" not in text and "| Out of fold: spinal canal stenosis | 96.2 |" in text
    assert "slope is 0.71" in text and "0.123" in text and "| 320, test | 0.400 |" in text
    assert json.loads((tmp_path / "docs/made-up.json").read_text())["stress"]["slope"] == 0.71
    assert {file.name for file in (tmp_path / "docs").glob("*.png")} == {"made-up-example.png", "made-up-doses.png"}
    commands.write_results(tables.Run(run_dir), tmp_path)
    assert (tmp_path / "docs/results.md").read_text() == text


def test_a_group_of_columns_is_named_once_in_markdown() -> None:
    columns = [("Out of fold", "Score"), ("Out of fold", "Skill"), ("Test", "Score"), ("Test", "Skill")]
    table = pd.DataFrame([["1", "2", "3", "4|"]], ["a_b"], pd.MultiIndex.from_tuples(columns)).rename_axis("Model")
    head, _, line = card.markdown_table(table).splitlines()
    assert head == "| Model | Out of fold: Score | Skill | Test: Score | Skill |"
    assert line == r"| a\_b | 1 | 2 | 3 | 4\| |"
    plain = table.droplevel(0, axis=1)
    assert card.markdown_table(plain).splitlines()[0] == "| Model | Score | Skill | Score | Skill |"
