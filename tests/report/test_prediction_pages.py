"""Tables and pages of a graded folder, whose names and headers are a patient's."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from private import SECRETS, WORDS, leaks, plant

from lsdc_utils import phantom
from lsdc_utils.data import competition
from lsdc_utils.grading import run_tables
from lsdc_utils.pipeline import predict
from lsdc_utils.vocabulary import SEVERITIES, T2, study_row_ids

NAMES = [*WORDS, *(part.lower() for part in ("Zqperson 19530817", "Zqhospital", "zqperson_1", "zqreport"))]


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, tuple[str, int, int]]:
    """A folder of two studies in folders and files with a patient's name, graded at random; its summary."""
    base = tmp_path_factory.mktemp("clinic")
    plant(phantom.write_phantom(base / "phantom", 0, 2, seed=8, workers=2))
    root = base / f"Zqperson {SECRETS['PatientBirthDate']}"
    for number, file in enumerate(sorted((base / "phantom").rglob("*.dcm"))):
        target = root / "Zqhospital of Nowhere" / SECRETS["PatientName"] / file.parts[-2] / f"zqperson_{number}.dcm"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, target)
    target.unlink()
    target.write_bytes(file.read_bytes()[:3000])  # cut off: a finding that names the file
    (root / "Zqhospital of Nowhere" / "zqreport.pdf").write_text("no image")
    run, out = base / "run", base / "out"
    (run / "weights").mkdir(parents=True)
    for name in run_tables.weight_files([0]):
        (run / name).write_text("")
        (run / name).with_suffix(".json").write_text(json.dumps({"config": {"box_mm": 14.6}}))
    recipe = dict.fromkeys(run_tables.RECIPE_KEYS, "") | {"format": run_tables.FORMAT, "folds": [0]}
    (run / "blend.json").write_text(json.dumps(recipe | {"vit_views": 7, "threads": 1}))
    parameters = predict.prepare(root, run, out, cores=1)
    shard = out / "shards" / "shard000"
    write_shard(shard, competition.read_listed(root, out / "tables/shard000.parquet"))
    summary = predict.collect(parameters, "phantom_only")
    predict.write_pages(parameters, "pretrained", "phantom_only")
    return root, out, summary


def test_findings_of_long_ids_reach_their_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, told = 20251130000123457, {}
    lines = [f"{study},,levels_uncertain,0.40,graded", ",,file_unusable,a.dcm,left out"]  # the second has no study
    (tmp_path / "findings.csv").write_text("\n".join(["study_id,series_id,rule,value,action", *lines]))
    monkeypatch.setattr(predict, "listed_studies", lambda _: None)
    monkeypatch.setattr(predict, "read_graded", lambda *_: pd.DataFrame({"row_id": []}))
    monkeypatch.setattr("lsdc_utils.report.pages.write_study_pages", lambda *given: told.update(given[6]))
    predict.write_pages({"predict_dir": tmp_path, "weights_dir": tmp_path}, "a", "phantom_only", tmp_path)
    assert told == {study: [("levels_uncertain", "0.40")]}


def write_shard(shard: Path, comp: competition.Competition) -> None:
    """What 05 leaves of the studies: rows at random, a point in an image, a doubt about a study."""
    (shard / "predictions").mkdir(parents=True)
    studies, rng = sorted(comp.series["study_id"].unique()), np.random.default_rng(1)
    rows = pd.DataFrame({"row_id": [row for study in studies for row in study_row_ids(study)]})
    natural = rows.join(pd.DataFrame(rng.dirichlet([1, 1, 1], len(rows)), columns=list(SEVERITIES)))
    points, kinds = [], {"study_id": "Int64", "series_id": "Int64"}
    doubt = [(studies[0], pd.NA, "levels_uncertain", "0.40", "graded; check the levels on its page")]
    findings = [pd.DataFrame(doubt, columns=competition.FINDINGS).astype(kinds)]
    for study in studies:
        stacks, problems = predict.read_study(comp, "test", study)
        findings.append(problems.astype(kinds))
        stack = next(stack for stack in stacks if stack.series_type == T2)
        middle = stack.affines[len(stack.pixels) // 2] @ [stack.shapes[0][1] / 2, stack.shapes[0][0] / 2, 0, 1]
        points.append((study, "l4_l5", "", *middle[:3], 0.9, 0.4 if study == studies[0] else 0.9, "scs"))
    names = ["study_id", "level", "side", *"XYZ", "confidence", "level_confidence", "condition"]
    for name, table in {
        **dict.fromkeys(("ensemble", "yolo", "vit3d"), natural),
        "sources": rows.assign(source="yolo+vit3d", own_series=True),
        "points": pd.DataFrame(points, columns=names),
        "findings": pd.concat(findings),
    }.items():
        table.to_parquet(shard / f"predictions/{name}_test.parquet")


def test_every_row_says_what_it_rests_on(graded: tuple) -> None:
    grades = pd.read_csv(graded[1] / "grades.csv")
    assert len(grades) == 50 and set(grades["grade_basis"]) == {"phantom_only"}
    summary, studies, uncertain = graded[2]
    assert (studies, uncertain) == (2, 1)
    assert "phantom_only" in summary and "synthetic images alone" in summary
    pages = sorted((graded[1] / "pages").glob("*.html"))
    assert [page.name for page in pages] == ["index.html", *sorted(f"study_{s}.html" for s in set(grades["study_id"]))]
    for page in pages:
        assert "phantom_only" in page.read_text() and "synthetic images alone" in page.read_text()


def test_no_table_and_no_page_names_a_patient_or_a_folder(graded: tuple, tmp_path: Path) -> None:
    root, out, _ = graded
    findings = pd.read_csv(out / "findings.csv")
    assert {"files_skipped", "file_unusable"} <= set(findings["rule"])
    assert findings["value"].str.contains("[name]", regex=False).sum() >= 2
    for file in (*out.glob("*.csv"), *out.glob("pages/*")):
        os.link(file, tmp_path / file.name)
    assert len(list(tmp_path.iterdir())) == 6
    assert leaks(tmp_path, [*NAMES, str(root).lower(), str(root.parent).lower(), root.name.lower()]) == []


def test_a_page_shows_slices_warnings_and_findings(graded: tuple) -> None:
    grades = pd.read_csv(graded[1] / "grades.csv")
    unsure, sure = (grades.loc[grades["level_confidence"] == value, "study_id"].iloc[0] for value in (0.4, 0.9))
    page = (graded[1] / f"pages/study_{unsure}.html").read_text()
    assert "their confidence is 40 %" in page and page.count("data:image/avif") > 20
    assert "may be named wrong" not in (graded[1] / f"pages/study_{sure}.html").read_text()
    assert any("file_unusable" in file.read_text() for file in (graded[1] / "pages").glob("study_*.html"))
    assert "test studies" not in (graded[1] / "pages/index.html").read_text()


def test_names_are_cut_out_whole_and_numbers_stay(tmp_path: Path) -> None:
    for name in ("Ann Lee/IM0001", "Ann/12.dcm", "a.b+c/scan*.ima"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    texts = ["Ann Lee/IM0001: broken", "Annual Ann/12.dcm", "scan*.ima of 3", f"in {tmp_path}", "nothing"]
    expected = ["[name]/[name]: broken", "Annual [name]/12.dcm", "[name] of 3", "in [name]", "nothing"]
    assert list(predict.without_names(pd.Series(texts), tmp_path)) == expected
    (tmp_path / "empty").mkdir()
    assert list(predict.without_names(pd.Series(texts[1:2]), tmp_path / "empty")) == texts[1:2]
