"""Tables of several trainings: means, ranges and paired intervals, between their markers; which figures are older than
their code."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from report_run import make_rows

from lsdc_utils import metric
from lsdc_utils.pipeline import graph
from lsdc_utils.vocabulary import SEVERITIES

sys.path.append(str(ROOT / "tests/proofs"))
import reproduce

RUNS = ("demo", *(f"demo-seed{seed}" for seed in reproduce.SEEDS))
PART = "one_crop_view"


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three runs on the same labels, and each without a part: always worse by more doubt, the third seed most."""
    labels, tables = make_rows(np.random.default_rng(1), 24)
    solution, known = metric.solution_of(labels), tables["ensemble"]
    for number, run in enumerate(RUNS):
        for folder, doubt in ((run, 0.1 * number), (f"{run}-{PART}", 0.1 * number + 0.05 * (number + 1))):
            own = known.copy()
            own[list(SEVERITIES)] = (1 - doubt) * known[list(SEVERITIES)] + doubt / 3
            (tmp_path / folder / "predictions").mkdir(parents=True)
            (tmp_path / folder / "tables").mkdir()
            own.to_parquet(tmp_path / folder / "predictions/ensemble_oof.parquet")
            labels.to_parquet(tmp_path / folder / "tables/labels.parquet")
            block = metric.score_block(solution, {"prior": tables["prior"], "ensemble": own, "oracle": known})
            (tmp_path / folder / "scores.json").write_text(json.dumps({"oof": block, "test": block}))
    monkeypatch.setattr(reproduce, "OUTPUTS", tmp_path)
    monkeypatch.setattr(reproduce, "TRAININGS", tmp_path / "trainings.csv")
    reproduce.TRAININGS.write_text("run,without,commit,oof_score,oof_skill,test_score,test_skill,worse,low,high\n")
    return tmp_path


def totals(outputs: Path, ending: str = "") -> list[float]:
    blocks = [json.loads((outputs / f"{run}{ending}/scores.json").read_text())["oof"] for run in RUNS]
    return [block["scores"]["ensemble"]["total"] for block in blocks]


def cells(table: str, first: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_mean_and_range_of_trainings(outputs: Path) -> None:
    for run in reversed(RUNS):  # in goes of their own, in any order
        reproduce.keep([reproduce.training(run, f"commit of {run}")])
    table, scores = reproduce.seeds_table(), totals(outputs)
    assert cells(table, "mean")[0] == f"{np.mean(scores):.3f}" and cells(table, "mean")[0] == cells(table, "mean")[2]
    assert cells(table, "range")[0] == f"{min(scores):.3f} to {max(scores):.3f}" and scores == sorted(scores)
    assert cells(table, "demo-seed53")[0] == f"{scores[1]:.3f}" and cells(table, "demo-seed53")[-1][-6:] == "seed53"
    assert float(cells(table, "demo")[1]) == 1.0  # the first is the oracle
    both = f"{np.mean(scores):.3f} ({min(scores):.3f} to {max(scores):.3f})"
    told = f"The ensemble, mean and range of 3 seeds: out of fold {both}, test {both}. Commits commit of demo,"
    assert reproduce.trainings_sentence().startswith(told)


def test_what_a_part_is_worth_is_paired_by_study_over_all_trainings(outputs: Path) -> None:
    assert reproduce.ablation_table() == "Not made with the present code."
    for run in RUNS:
        reproduce.keep([reproduce.training(run, "0123456789ab")])
        reproduce.keep([reproduce.training(run, "old", PART)])
        reproduce.keep([reproduce.training(run, "0123456789ab", PART)])  # instead of the old one
    removed = r"test-time augmentation of the transformer (shifted views): one\_crop\_view"
    worse, interval, each, commit = cells(reproduce.ablation_table(), removed)
    differences = np.subtract(totals(outputs, f"-{PART}"), totals(outputs))
    assert worse == f"{differences.mean():+.3f}" and each == ", ".join(f"{value:+.3f}" for value in differences)
    assert commit == "0123456789ab" and len(reproduce.known_trainings()) == 6
    low, high = map(float, interval.split(" to "))
    assert low <= differences.mean() <= high
    score = json.loads((outputs / "demo/scores.json").read_text())["oof"]["interval"]["ensemble"]["total"]
    assert high - low < 0.5 * (score[1] - score[0])  # differences vary less than scores


def test_shares_of_the_bodies_stay_under_their_heading() -> None:
    shares = [f"{number / 10:.2f} (0.10 to 0.90)" for number in range(15)]
    rows = {model: shares[5 * k : 5 * k + 5] for k, model in enumerate(("yolo", "vit3d", "ensemble"))}
    printed = pd.DataFrame(rows, index=["spinal", "foraminal", "subarticular", "median", "leak"]).T.to_string()
    table = reproduce.doses_table(f"drew and graded part 1/1\n{printed}", "0123456789ab")
    assert table.splitlines()[0].startswith("| Model | Slope, spinal | Slope, foraminal | Slope, subarticular | Median")
    assert cells(table, "Ensemble") == rows["ensemble"] and cells(table, "YOLOv10 detectors") == rows["yolo"]


def test_tables_that_a_proof_prints_are_found_between_its_other_lines() -> None:
    printed = (
        "  0:30  [1/2] done | block 1\n\nWay\tScore\nas it is\t0.5\nadapted_\t\n\nholds: gain, aim 0\nWay\tGain\na\t1\n"
    )
    first, second = reproduce.printed_tables(printed)
    assert first.splitlines()[0] == "| Way | Score |" and cells(first, "as it is") == ["0.5"]
    assert cells(first, r"adapted\_") == [""] and cells(second, "a") == ["1"] and len(second.splitlines()) == 3


def test_tables_of_refinement_and_curve_keep_signs_and_blocks(outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {
        "block": "test",
        "model": "vit3d",
        "unrefined": 0.5,
        "refined": 0.52,
        "added": 0.02,
        "low": -0.01,
        "high": 0.05,
    }
    monkeypatch.setattr(reproduce, "refined_table", lambda *_: pd.DataFrame([line]))
    assert cells(reproduce.refinement_table(), "Test: 3D ViT") == ["0.500", "0.520", "+0.020", "-0.010 to +0.050"]
    known = {"low": 0.4, "high": 0.7}
    scores = ((80, "oof", 0.6), (80, "test", 0.55), (160, "oof", 0.5), (160, "test", 0.45))
    lines = [{"n_train": n, "block": block, "total": score, "skill": 0.5, **known} for n, block, score in scores]
    (outputs / "demo/experiments").mkdir()
    pd.DataFrame(lines).to_csv(outputs / "demo/experiments/curve.csv", index=False)
    table = reproduce.curve_table()
    assert table.splitlines()[0].split(" | ")[1::3] == ["Out of fold: score", "Test: score"]
    assert cells(table, "160") == ["0.500", "0.50", "0.400 to 0.700", "0.450", "0.50", "0.400 to 0.700"]


def test_each_table_of_a_step_has_its_place_in_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = "".join(page.read_text() for page in reproduce.PAGES)
    for name in (
        "refinement_table",
        "curve_table",
        "trainings_sentence",
        "seeds_table",
        "ablation_table",
        "details_table",
        "Run",
        "score_lines",
    ):
        monkeypatch.setattr(reproduce, name, lambda *_: "")
    for name, step in reproduce.STEPS.items():
        tables = step.prints or (() if name == "doses" else reproduce.tables_of(name, "commit"))
        assert all(pages.count(f"<!-- table {table} -->") == 1 for table in tables), name


def test_a_table_goes_between_its_markers(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table seeds -->\nold\n<!-- end -->\nafter\n")
    reproduce.fill("seeds", "new", page)
    assert page.read_text() == "before\n<!-- table seeds -->\nnew\n<!-- end -->\nafter\n"
    with pytest.raises(AssertionError, match="no place for the table other"):
        reproduce.fill("other", "new", page)


def test_the_docs_say_which_figures_are_older_than_their_code() -> None:
    listed = re.search(r"<!-- table figures -->\n(.*?)<!-- end -->", reproduce.LIST.read_text(), re.DOTALL)[1]
    assert listed == reproduce.figures_list() + "\n", "run: python tests/proofs/reproduce.py --list"
    assert set(reproduce.known_steps()) <= set(reproduce.STEPS)


@pytest.fixture
def listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A list in which every step was made by the code at hand, and no run that is left of them."""
    monkeypatch.setattr(reproduce, "TABLE", tmp_path / "figures.csv")
    lines = [{"step": name, "commit": "0" * 12, "date": "2026-01-01", "code": reproduce.code_of(name)}
             for name in reproduce.STEPS]  # fmt: skip
    pd.DataFrame(lines).to_csv(reproduce.TABLE, index=False)
    monkeypatch.setattr(reproduce, "ROOT", tmp_path)
    monkeypatch.setattr(reproduce, "code_of", {line["step"]: line["code"] for line in lines}.__getitem__)
    return tmp_path


def set_line(name: str, **values: object) -> None:
    """Change a step's line of the list."""
    table = pd.read_csv(reproduce.TABLE, dtype=str, keep_default_na=False).set_index("step")
    for column, value in values.items():
        table.loc[name, column] = str(value)
    table.reset_index().to_csv(reproduce.TABLE, index=False)


def test_only_what_is_older_is_made_again_behind_what_it_needs(listed: Path) -> None:
    assert reproduce.due(list(reproduce.STEPS)) == []
    set_line("numbering", code="another")
    set_line("localiser", code="another")
    assert reproduce.due(list(reproduce.STEPS)) == ["pretrained", "numbering", "localiser"]  # no models are there
    (listed / "outputs/pretrained").mkdir(parents=True)
    assert reproduce.due(list(reproduce.STEPS)) == ["numbering", "localiser"]
    assert reproduce.due(["localiser", "seed53"]) == ["localiser"]
    states = [line.split("|")[-2].strip() for line in reproduce.figures_list().splitlines()[2:]]
    assert states == ["older" if name in ("numbering", "localiser") else "yes" for name in reproduce.STEPS]


@pytest.mark.parametrize(
    ("notebook", "older"), [("07_stress_tests", "demo pages seed53 doses"), ("08_report", "pages original")]
)
def test_a_changed_notebook_makes_older_what_it_decides(
    notebook: str, older: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: reproduce.code_of(name) for name in reproduce.STEPS}
    known = graph.source_hash
    monkeypatch.setattr(graph, "source_hash", lambda name: known(name) + "changed" * (name == notebook))
    changed = {name for name, code in before.items() if reproduce.code_of(name) != code}
    assert changed >= set(older.split()) and not changed & {"localiser", "operations"}
    assert ("demo" in changed) == ("t1" in changed) == (notebook == "07_stress_tests")


def test_a_changed_command_makes_older_what_it_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: reproduce.code_of(name) for name in reproduce.STEPS}
    known = graph.code_hash
    monkeypatch.setattr(graph, "code_hash", lambda *code: known(*code) + "changed" * ("pipeline.commands" in code[0]))
    changed = {name for name, code in before.items() if reproduce.code_of(name) != code}
    ablations = {name for name in reproduce.STEPS if name.startswith("ablations")}
    assert changed == {"pretrained", "scans", "numbering", "refine", "curve", "members", *ablations}


def test_a_step_that_failed_stays_due_and_what_needs_it_is_not_run(
    listed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran: list[str] = []

    def timed(command: str, log: Path) -> dict[str, float]:
        ran.append(command)
        status = 1 if command == "./run_all.sh" else reproduce.MISSED if "one_group" in command else 0
        return {"status": status, "minutes": 1.5, "cpu_minutes": 2.0}

    for name in ("demo", "pages", "t1", "original", "seed53"):
        set_line(name, code="another")
    for name, stand_in in (("timed", timed), ("committed", lambda *_: "1" * 12), ("fill", lambda *_: None),
                           ("training", lambda *_: {}), ("keep", lambda *_: None),
                           ("tables_of", lambda *_: {})):  # fmt: skip
        monkeypatch.setattr(reproduce, name, stand_in)
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "demo", "pages", "seed53", "t1", "original"])
    assert reproduce.main() == 1
    assert ran == [
        command for name in ("demo", "seed53", "t1", "original") for command in reproduce.STEPS[name].commands
    ]
    assert "pages: not run, since a step that it needs has failed" in capsys.readouterr().out
    lines = reproduce.known_steps()
    assert {name: lines[name]["commit"] for name in ("demo", "pages")} == {"demo": "0" * 12, "pages": "0" * 12}
    assert (lines["t1"]["minutes"], lines["original"]["minutes"]) == ("1.5", "3.0")
    assert reproduce.due(list(reproduce.STEPS)) == ["demo", "pages"]
