"""Scoring models on a labelled folder: which labels count, the numbers, the overlap with training, no names."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import dicom_files
import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import copy_project
from data_folders import write_tables
from nbclient import NotebookClient
from private import SECRETS, WORDS, leaks, plant

from lsdc_utils import metric, phantom
from lsdc_utils.data import cohort, competition
from lsdc_utils.data.tables import number_of
from lsdc_utils.files import write_json, write_table
from lsdc_utils.grading import evaluation, run_tables
from lsdc_utils.pipeline import commands, graph, labelled
from lsdc_utils.pipeline.arguments import READY, UsageError
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVELS, SEVERITIES, T2, study_row_ids

COMMITTED = Path(__file__).resolve().parents[2] / "outputs" / READY
NAMES = [*WORDS, "zqperson 19530817", "zqhospital", "zqperson_1", "zqlabels"]
SHARES = {"normal_mild": 0.7, "moderate": 0.2, "severe": 0.1}
PRIOR = [{"condition": condition, "level": level, **SHARES} for condition in CONDITIONS for level in LEVELS]
MODELS = ("yolo", "vit3d", "ensemble")


# ---- which studies have a label ------------------------------------------------------------------------------------


def test_labels_are_those_of_both_splits_or_of_a_table(tmp_path: Path) -> None:
    tables = write_tables(tmp_path, n_train=3, n_test=2)
    with pytest.raises(UsageError, match=r"solution\.csv: there is no grade; give a table"):
        (tmp_path / "train.csv").rename(tmp_path / "later.csv")
        labelled.find(tmp_path, None, 1)
    (tmp_path / "later.csv").rename(tmp_path / "train.csv")
    found = labelled.find(tmp_path, None, 1)
    assert found.labels["study_id"].unique().tolist() == [101, 102, 103] and len(found.labels) == 75
    assert len(found.points) == 75
    rows = study_row_ids(501)[:4]
    pd.DataFrame({"row_id": rows, "severity": [0, 1, 2, None]}).to_csv(tmp_path / "solution.csv", index=False)
    found = labelled.find(tmp_path, None, 1)
    assert found.labels.set_index("row_id")["severity"][rows[:3]].tolist() == [0, 1, 2] and len(found.labels) == 78
    given = tmp_path / "given.csv"
    lines = [
        "Row_ID;Severity",
        f"{rows[0]};Severe",
        f"{study_row_ids(102)[3]};Moderate",
        f"{study_row_ids(999)[0]};Normal",
    ]
    given.write_text("\n".join(lines))
    found = labelled.find(tmp_path, given, 1)
    assert found.labels[["study_id", "severity"]].sort_values("study_id").to_numpy().tolist() == [
        [102, 1],
        [501, 2],
    ] and found.lost == [999]
    assert set(found.points["study_id"]) == {102}
    assert tables["train"].shape == (3, 26)  # nothing was written
    given.write_text("row_id,severity\n" + f"{study_row_ids(999)[0]},0")
    with pytest.raises(
        UsageError, match=r"given\.csv: no graded study has images: grades are of 999 \.\.\., images of 101"
    ):
        labelled.find(tmp_path, given, 1)
    given.write_text("row_id,severity\n" + f"{study_row_ids(101)[0]},")
    with pytest.raises(UsageError, match=r"given\.csv: there is no grade; give a table"):
        labelled.find(tmp_path, given, 1)


UIDS = [f"1.2.3.4.5.{number}" for number in (1, 2, 3)]  # of two studies of ann and one of bob


def write_people(root: Path, folders: tuple[str, str, str]) -> None:
    """A series for each of `UIDS`, in these folders."""
    for folder, uid, patient in zip(folders, UIDS, ("ann", "ann", "bob"), strict=True):
        tags = {"Modality": "MR", "SeriesDescription": "T2", "StudyInstanceUID": uid, "PatientID": patient}
        tags |= {"SeriesInstanceUID": f"{uid}.7", "orientation": dicom_files.SAGITTAL}
        dicom_files.write_stack(root / folder, [(4.0 * k, 0.0, 0.0) for k in range(6)], **tags)


def test_a_patient_is_known_by_a_column_of_the_labels_or_by_headers(tmp_path: Path) -> None:
    write_people(tmp_path / "images", ("a", "b", "c"))
    given, column = tmp_path / "given.csv", COLUMNS[0]
    given.write_text("row_id,severity\n" + "".join(f"{uid}_{column},0\n" for uid in UIDS))
    studies = [number_of(uid) for uid in UIDS]

    def patients() -> list[int]:
        return labelled.find(tmp_path / "images", given, 1).people.set_index("study_id")["patient"][studies].tolist()

    one, two, three = patients()
    assert one == two != three
    lines = [f"{uid},Mild,{patient}\n" for uid, patient in zip(UIDS, ("x", "y", "x"), strict=True)]
    given.write_text(f"StudyID;{column};Patient-ID\n".replace(";", ",") + "".join(lines))
    one, two, three = patients()
    assert one == three != two
    findings = labelled.find(tmp_path / "images", given, 1).comp.findings
    assert not findings["value"].str.contains("not read").any()
    given.write_text(given.read_text() + f"{UIDS[0]},Mild,y\n")
    with pytest.raises(competition.CompetitionError, match=r"given\.csv: a study has lines with different .*patient"):
        patients()


@pytest.mark.parametrize("folders", [("a", "b", "c"), ("ann/a", "ann/b", "bob/c")])
def test_patients_in_place_of_studies_are_refused(tmp_path: Path, folders: tuple[str, str, str]) -> None:
    """Whether their folders have other names, or theirs, so that two studies would be taken for one."""
    write_people(tmp_path / "images", folders)
    given = tmp_path / "given.csv"
    given.write_text("row_id,severity\n" + "".join(f"{who}_{COLUMNS[0]},0\n" for who in ("bob", "ann")))
    name, ids = ("bob", UIDS[2:]) if folders[0] == "a" else ("ann", UIDS[:2])
    with pytest.raises(UsageError) as caught:
        labelled.find(tmp_path / "images", given, 1)
    said = f"study_id holds PatientIDs, e.g. {name}: write the ids of studies there ({', '.join(ids)} ...)"
    assert said in str(caught.value) and "a column patient_id" in str(caught.value)
    if folders[0] == "ann/a":  # of bob there is one study, which his folder names
        given.write_text(f"row_id,severity\nbob_{COLUMNS[0]},0\n")
        assert labelled.find(tmp_path / "images", given, 1).comp.series["study_id"].eq(number_of("bob")).sum() == 1


def test_a_stopped_evaluation_leaves_no_earlier_result_beside_new_tables(tmp_path: Path, monkeypatch) -> None:
    """What is graded by then are the studies with a label of a condition that the models were trained for, and only
    their people count."""
    graded, counted = [], []

    def stopped(found: labelled.Labelled, *_: object) -> None:
        graded.extend(found.labels["row_id"])
        counted.extend(found.people["patient"])
        raise SystemExit(130)

    monkeypatch.setattr(labelled, "grade", stopped)
    monkeypatch.setattr(labelled, "read_recipe", lambda _: {"conditions": ["nfn", "ss"]})
    (tmp_path / "report").mkdir()
    (tmp_path / "evaluation.json").write_text("{}")
    rows = pd.DataFrame({"row_id": [*study_row_ids(1), *study_row_ids(2)[:5]], "study_id": [1] * 25 + [2] * 5})
    people = pd.DataFrame({"study_id": [1, 2], "patient": ["a", "b"]})
    found = labelled.Labelled(None, rows, rows, people, [])
    with pytest.raises(SystemExit):
        labelled.evaluate(found, tmp_path, tmp_path, "demo", ([], ""), 1, "")
    assert list(tmp_path.iterdir()) == [] and graded == study_row_ids(1)[5:] and counted == ["a"]
    monkeypatch.setattr(labelled, "read_recipe", lambda _: {"conditions": ["scs"]})
    with pytest.raises(UsageError, match="every label is of a condition"):
        found = labelled.Labelled(None, rows[5:25], rows, people, [])
        labelled.evaluate(found, tmp_path, tmp_path, "demo", ([], ""), 1, "")


# ---- a folder with a patient's names, graded at random --------------------------------------------------------------


def write_models(run: Path) -> None:
    """The folder of a run that graded, without its weights."""
    (run / "weights").mkdir(parents=True)
    for name in run_tables.weight_files([0]):
        (run / name).write_text("")
        (run / name).with_suffix(".json").write_text(json.dumps({"config": {"box_mm": 14.6}, "studies": [1, 2]}))
    recipe = {"format": run_tables.FORMAT, "kind": "fitted", "folds": [0], "vit_views": 7, "threads": 1, "prior": PRIOR}
    (run / "blend.json").write_text(json.dumps(recipe))
    (run / "data.json").write_text(json.dumps({"kind": "folder", "data_dir": "../data"}))


def grade_at_random(planned: labelled.Run) -> int:
    """What 05 leaves of the studies of each shard, without models."""
    for step in planned.steps:
        folder, rng = Path(step.given["out_dir"]) / "predictions", np.random.default_rng(1)
        comp = competition.read_listed(planned.parameters["data_dir"], step.given["studies_table"])
        rows = pd.DataFrame({"row_id": comp.sample_rows})
        points = []
        for study in comp.series["study_id"].unique():
            stacks, findings = labelled.predict.read_study(comp, "test", study)
            stack = next(stack for stack in stacks if stack.series_type == T2)
            middle = stack.affines[len(stack.pixels) // 2] @ [stack.shapes[0][1] / 2, stack.shapes[0][0] / 2, 0, 1]
            points.append((study, "l4_l5", "", *middle[:3], 0.9, 0.9, "scs"))
        folder.mkdir(parents=True)
        for name in (*MODELS, "raw_yolo", "raw_vit3d"):
            natural = pd.DataFrame(rng.dirichlet([3, 1, 1], len(rows)), columns=list(SEVERITIES))
            rows.join(natural).to_parquet(folder / f"{name}_test.parquet")
        rows.assign(source="yolo+vit3d", own_series=True).to_parquet(folder / "sources_test.parquet")
        columns = ["study_id", "level", "side", *"XYZ", "confidence", "level_confidence", "condition"]
        pd.DataFrame(points, columns=columns).to_parquet(folder / "points_test.parquet")
        pd.DataFrame({"study_id": []}).to_parquet(folder / "slices_test.parquet")
        findings.astype({"study_id": "Int64", "series_id": "Int64"}).to_parquet(folder / "findings_test.parquet")
    return 0


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three studies of two patients in folders and files with their names, with labels; a run that saw one of them."""
    base = tmp_path_factory.mktemp("clinic")
    plant(phantom.write_phantom(base / "phantom", 0, 3, seed=8, workers=2))
    root = base / f"Zqperson {SECRETS['PatientBirthDate']}"
    for number, file in enumerate(sorted((base / "phantom").rglob("*.dcm"))):
        target = root / "Zqhospital of Nowhere" / SECRETS["PatientName"] / file.parts[-2] / f"zqperson_{number}.dcm"
        target.parent.mkdir(parents=True, exist_ok=True)
        os.link(file, target)
    comp = competition.read(root)
    studies = sorted(comp.series["study_id"].unique().tolist())
    people = pd.DataFrame({"study_id": studies, "patient": ["a", "a", "b"], "sex": ["F", "F", "M"]})
    people.to_csv(root / "patients.csv", index=False)
    rows = pd.DataFrame({"row_id": [row for study in studies for row in study_row_ids(study)]})
    rows = rows.assign(severity=np.random.default_rng(2).integers(0, 3, len(rows)))
    rows.drop(index=[5, 6]).to_csv(base / "zqlabels.csv", index=False)
    write_models(base / "run")
    (base / "run" / cohort.TRAINED_ON).write_text(json.dumps(cohort.fingerprints(comp, studies[:1])))
    return base


@pytest.fixture(scope="module")
def results(clinic: Path) -> tuple[Path, dict]:
    """The folder of results of an evaluation with an overlap, and what it returned."""
    root = next(clinic.glob("Zqperson*"))
    found = labelled.find(root, clinic / "zqlabels.csv", 1)
    with pytest.raises(UsageError, match=r"trained on 1 of these 3 studies and on the patients of 1 more, .*--allow"):
        labelled.check_overlap(found, clinic / "run", False, 1)
    overlap = labelled.check_overlap(found, clinic / "run", True, 1)
    out = clinic / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labelled, "work", grade_at_random)
        return out, labelled.evaluate(found, clinic / "run", out, "run", overlap, 1, "again")


def test_the_numbers_are_those_of_the_tables(results: tuple[Path, dict]) -> None:
    out, numbers = results
    block, solution = numbers["test"], pd.read_csv(out / "solution.csv")
    assert (block["n_studies"], block["n_patients"], len(solution)) == (3, 2, 73)
    tables = {name: pd.read_parquet(out / f"predictions/{name}_test.parquet") for name in MODELS}
    for name, table in tables.items():
        assert block["scores"][name] == pytest.approx(metric.score(solution, metric.weight_table(table)))
    prior = metric.row_keys(solution["row_id"]).merge(pd.DataFrame(PRIOR), on=["condition", "level"])
    assert block["scores"]["prior"] == pytest.approx(metric.score(solution, metric.weight_table(prior)))
    assert block["interval"] == {} and any("few patients (2): no intervals" in note for note in numbers["notes"])
    assert [line["trait"] for line in numbers["subgroups"] if line["value"] in ("F", "M")] == ["sex", "sex"]
    assert all(line["ensemble"] is None for line in numbers["subgroups"])  # counted, not scored
    counts = [sum(map(sum, table)) for table in numbers["confusion"].values()]
    assert sum(counts) == 73 and numbers["localisation"] == []
    worst = pd.DataFrame(numbers["worst_studies"])
    assert worst["loss"].is_monotonic_decreasing and len(worst) == 3
    assert set(numbers["calibration"]["all rows"]) == {"prior", *MODELS}
    assert all(ends == [None, None] for ends in numbers["calibration_interval"].values())
    assert any("0.2, 0.5" in note for note in numbers["notes"])  # this run kept no cut-offs


def test_an_overlap_is_on_every_page_and_number(results: tuple[Path, dict]) -> None:
    out, numbers = results
    words = "rained on 1 of these 3 studies and on the patients of 1 more: the scores are too good"
    assert words in numbers["grade_basis"] and words in numbers["overlap"] and numbers["trained_on"] == 2
    assert pd.read_parquet(out / "tables/studies.parquet")["trained_on"].tolist() == [True, True, False]
    assert pd.read_csv(out / "grades.csv")["grade_basis"].str.contains(words).all()
    pages = sorted((out / "report").glob("*.html"))
    assert len(pages) == 5  # the evaluation, the studies, and three of these
    assert all(words in page.read_text() for page in pages)
    notebook = json.loads((out / "notebooks/evaluate.ipynb").read_text())
    shown = ["".join(o["data"]["text/html"]) for c in notebook["cells"] for o in c.get("outputs", []) if "data" in o
             and "text/html" in o["data"]]  # fmt: skip
    assert len(shown) >= 7 and all(words in table for table in shown)
    index = (out / "report/index.html").read_text()
    assert "Evaluation on a labelled folder" in index and 'href="studies.html"' in index and "http:" not in index


def test_nothing_names_the_folder_or_a_patient(results: tuple[Path, dict], clinic: Path) -> None:
    out, _ = results
    root = next(clinic.glob("Zqperson*"))
    assert not (out / "work").exists() and not (out / "logs").exists()
    assert leaks(out, [*NAMES, root.name.lower(), str(clinic).lower(), clinic.name.lower()]) == []


# ---- intervals ----------------------------------------------------------------------------------------------------


def test_calibration_and_distances_have_intervals_over_patients(tmp_path: Path) -> None:
    """Of 24 studies of 12 patients, in both of whose studies every point is off by the patient's own distance."""
    rng, studies = np.random.default_rng(3), [str(100 + number) for number in range(24)]
    rows = metric.row_keys(row for study in studies for row in study_row_ids(study))
    natural = pd.DataFrame(rng.dirichlet([3, 1, 1], len(rows)), columns=list(SEVERITIES))
    rows["severity"] = (rng.random(len(rows))[:, None] > natural.to_numpy().cumsum(axis=1)).sum(axis=1)
    for name in ("prior", *MODELS):
        write_table(tmp_path / f"predictions/{name}_test.parquet", rows[["row_id"]].join(natural))
    places = rows[rows["condition"] == "spinal_canal_stenosis"].astype({"study_id": int}).assign(X=0.0, Y=0.0, Z=0.0)
    off = places["study_id"] % 12 + 1.0  # mm
    points = places.assign(condition="scs", Y=off, confidence=0.9, level_confidence=0.9)
    write_table(tmp_path / "predictions/points_test.parquet", points.drop(columns=["row_id", "severity", "group"]))
    write_table(tmp_path / "tables/labels.parquet", places)
    people = pd.DataFrame({"study_id": map(int, studies)}).assign(**dict.fromkeys(cohort.TRAITS, ""), trained_on=False)
    people["patient"] = people["study_id"] % 12
    write_table(tmp_path / "tables/studies.parquet", people)
    write_table(tmp_path / "solution.csv", rows[["row_id", "severity"]])
    about = {"models": "demo", "grade_basis": "phantom_only", "trained_on": 0, "cut_offs": {}, "overlap": ""}
    write_json(tmp_path / "about.json", about | {"studies_without_images": [7, 8, 9, 10]})
    graph.execute(tmp_path, graph.Step("evaluate", "evaluate", {"evaluation_dir": "."}, cwd=tmp_path), {})
    numbers = json.loads((tmp_path / "evaluation.json").read_text())
    [line] = numbers["localisation"]
    medians = [np.median(rng.choice(12, 12) + 1.0) for rng in map(np.random.default_rng, range(1000))]
    assert line["median_mm"] == 6.5 and line["points"] == 120 and line["found low"] == line["found high"] == 1.0
    assert [line["median_mm low"], line["median_mm high"]] == pytest.approx(np.quantile(medians, [0.025, 0.975]), abs=1)
    assert "points low" not in line and any("intervals are rough" in note for note in numbers["notes"])
    judged = rows.join(natural).assign(patient=rows["study_id"].astype(int) % 12)
    ends = evaluation.intervals(judged, lambda sample: evaluation.calibration({"ensemble": sample}))
    error = numbers["calibration"]["all rows"]["ensemble"]
    reflected = [max(0, 2 * error - end.loc["ensemble", "all rows"]) for end in reversed(ends)]
    assert numbers["calibration_interval"]["all rows"] == pytest.approx(reflected) and 0 < reflected[1] < 2 * error
    assert all(len(ends) == 2 for ends in numbers["test"]["interval"]["ensemble"].values())
    assert "Not scored, without images: 4 labelled studies (7, 8, 9 ...)." in numbers["notes"]


# ---- the overlap ----------------------------------------------------------------------------------------------------


def test_where_nothing_was_recorded_it_is_said_unless_the_models_saw_no_patient(clinic: Path, tmp_path: Path) -> None:
    found = labelled.find(next(clinic.glob("Zqperson*")), clinic / "zqlabels.csv", 1)
    write_models(tmp_path)
    known, words = labelled.check_overlap(found, tmp_path, False, 1)
    assert known == [] and "overlap not checked" in words
    assert labelled.check_overlap(found, COMMITTED, False, 1) == ([], "")
    recorded = [{"salt": "1", "hashes": ["0" * 16]}]
    (tmp_path / cohort.TRAINED_ON).write_text(json.dumps(recorded))
    assert labelled.check_overlap(found, tmp_path, False, 1) == ([], "")


# ---- the whole way --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_form_of_the_start_page_scores_the_committed_models(tmp_path: Path) -> None:
    """A phantom's test study, checked, graded and scored by its cells: the score of the rows, and distances in mm."""
    project = copy_project(tmp_path / "project")
    (project / "outputs").mkdir()
    (project / "outputs" / READY).symlink_to(COMMITTED)
    root = phantom.write_phantom(project / "clinic", 0, 1, seed=31)
    notebook = nbformat.read(project / "notebooks/start.ipynb", as_version=4)
    [cell] = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ())]
    cell.source += '\nmy_folder = "../clinic"'
    NotebookClient(notebook, resources={"metadata": {"path": project / "notebooks"}}, timeout=1200).execute()
    [form] = [cell for cell in notebook.cells if "def run_all" in cell.source]
    said, out = "".join(output["text"] for output in form.outputs), project / "outputs/evaluation/clinic"
    assert "usable for: " in said and "test: 1 study," in said, said
    grades = pd.read_csv(project / "outputs/predict/clinic/grades.csv")
    assert f"grades: {project}/outputs/predict/clinic/grades.csv" in said and len(grades) == 25
    assert "ensemble" in said and f"report: {out}/report/index.html" in said and said.endswith("done\n"), said
    numbers, solution = json.loads((out / "evaluation.json").read_text()), pd.read_csv(root / "solution.csv")
    assert "Weighted log loss, 1 labelled study; lower is better" in said
    submission = metric.weight_table(pd.read_parquet(out / "predictions/ensemble_test.parquet"))
    assert numbers["test"]["scores"]["ensemble"] == pytest.approx(metric.score(solution, submission), abs=1e-9)
    assert len(numbers["localisation"]) == 5 and all(line["median_mm"] < 10 for line in numbers["localisation"])
    assert numbers["grade_basis"] == "phantom_only" and numbers["overlap"] == ""
    labels, points = pd.read_parquet(out / "tables/labels.parquet"), pd.read_csv(root / "solution_coordinates.csv")
    assert labels["X"].notna().sum() > 0.9 * len(points)


def test_usage_errors_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(commands, "OUTPUTS", tmp_path / "outputs")
    write_tables(tmp_path / "data")
    for words, message in (
        (["--run", "nothing"], "no such run"),
        (["--run", "x.zip"], "no such file"),
        (["--run", str(READY), "--out", str(tmp_path / "data/out")], "give another folder"),
    ):
        assert commands.main(["evaluate", str(tmp_path / "data"), *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_an_empty_series_folder_names_no_patient(tmp_path: Path) -> None:
    series = pd.DataFrame({"split": ["test"], "study_id": [1], "series_id": [2]})
    comp = SimpleNamespace(series=series, names={}, source=lambda *_: tmp_path)
    assert labelled._check_ids(comp, [1], "given.csv") is None
