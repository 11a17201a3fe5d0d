"""What is refused: in the words of the step that would refuse it, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import data_folders
import pytest
from conftest import ROOT

from lsdc_utils.data.competition import CompetitionError
from lsdc_utils.export.studies import ExportError, export_studies
from lsdc_utils.files import count_studies, write_json
from lsdc_utils.pipeline import adapt, arguments, commands, labelled
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.run import locked


def test_weights_that_are_not_there_are_missed_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data_folders.write_tables(tmp_path / "data")
    monkeypatch.setenv("LSDC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(commands, "OUTPUTS", tmp_path / "outputs")
    monkeypatch.setattr(commands, "finish", lambda *_: 7)
    asked = ["--profile", "kaggle", "--data", str(tmp_path / "data"), "vit_members=[{name: a, weights: a.safetensors}]"]
    said = "there are no pretrained weights"
    for more, missing in (([], " yolov10m.pt, a.safetensors."), (["--until", "03"], " yolov10m.pt.")):
        assert commands.main([*asked, *more]) == 2
        error = capsys.readouterr().err
        assert f"{said}{missing}" in error and "fetch_weights=true" in error and error.count("\n") == 1
    assert not (tmp_path / "outputs").exists()
    for more in (["fetch_weights=true"], ["--until", "02_convert_labels"]):
        assert commands.main([*asked, *more]) == 7
    (tmp_path / "cache").mkdir()
    for name in ("yolov10m.pt", "a.safetensors"):
        (tmp_path / "cache" / name).touch()
    assert commands.main(asked) == 7


def test_a_dry_run_refuses_what_02_would_in_its_words(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data_folders.write_tables(tmp_path, n_train=1)
    assert commands.main(["--dry-run", "--data", str(tmp_path), "--run", "never"]) == 2
    cells = json.loads((ROOT / "notebooks/02_convert_labels.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][:3]
    names = {}
    exec(code[0], names)
    names |= {"run_dir": str(arguments.OUTPUTS / "never"), "data_dir": str(tmp_path)}
    exec(code[1], names)
    with pytest.raises(CompetitionError) as caught:
        exec(code[2], names)
    assert capsys.readouterr().err == f"run_all.sh: {caught.value}\n"
    assert "cannot train: only one study has a grade" in str(caught.value)


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    for folder in (old, new):
        with pytest.raises(UsageError), locked(folder):
            raise UsageError
    assert old.is_dir() and not new.exists()
    with pytest.raises(UsageError), locked(new):
        (new / "models").mkdir()
        (new / "models/weights.bin").write_text("of an archive")
        raise UsageError
    assert not new.exists()
    with pytest.raises(KeyboardInterrupt), locked(new):
        (new / "shards").mkdir()
        (new / "shards/graded.csv").write_text("kept")
        raise KeyboardInterrupt
    assert (new / "shards/graded.csv").is_file()


def test_an_evaluation_that_is_refused_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data_folders.write_tables(tmp_path / "data", n_train=1)
    (tmp_path / "data/train.csv").unlink()
    assert commands.main(["evaluate", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no grade" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "name", "own"),
    [("predict", "grades.csv", "tables/listed.json"), ("predict", "pages/index.html", "tables/listed.json"),
     ("evaluate", "report/letter.txt", "about.json"), ("evaluate", "work/thesis.txt", "work/tables/x.parquet"),
     ("evaluate", "logs/1.txt", "about.json"), ("evaluate", "evaluation.json", "work/models/x/blend.json")],
)  # fmt: skip
def test_a_folder_whose_files_another_wrote_is_no_place_for_results(
    command: str, name: str, own: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """And where the command wrote them itself, they stay until the data are found usable."""
    out = tmp_path / "out"
    for folder in (tmp_path / "data", (out / name).parent):
        folder.mkdir(parents=True)
    (out / name).write_text("kept")
    assert commands.main([command, str(tmp_path / "data"), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert f"which holds another {name.split('/')[0]}: give another folder" in said and (out / name).is_file()
    write_json(out / own, {"data_dir": str(tmp_path / "data"), "digest": "of older data", "n_shards": 1})
    assert commands.main([command, str(tmp_path / "data"), "--out", str(out)]) == 2
    assert "the folder holds no files" in capsys.readouterr().err and (out / name).is_file()


@pytest.mark.parametrize("value", ["", "[]"])
def test_conditions_without_a_value_ask_for_one(value: str, capsys: pytest.CaptureFixture) -> None:
    assert commands.main(["--dry-run", f"conditions={value}"]) == 2
    said = "run_all.sh: conditions= has no value; write conditions=all, or some of nfn, scs, ss\n"
    assert capsys.readouterr().err == said


def test_labels_of_another_table_cannot_train_further(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "labels.csv").write_text("row_id,severity\n")
    models = ROOT / "outputs/pretrained"
    monkeypatch.setattr(commands, "OUTPUTS", tmp_path)
    asked = ["adapt", str(tmp_path), "--run", str(models), "--out", "new", "--train", "--labels"]
    assert commands.main([*asked, str(tmp_path / "labels.csv")]) == 2
    assert "--labels cannot be used with --train, which reads train.csv" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_one_study_is_not_plural() -> None:
    assert [count_studies(n, "labelled") for n in (1, 2)] == ["1 labelled study", "2 labelled studies"]
    assert [count_studies(n) for n in (0, 1)] == ["0 studies", "1 study"]


def test_adapt_prints_three_digits_and_an_adapted_run_has_nothing_to_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    parts = {"spinal": 0.1, "foraminal": 0.2, "subarticular": None, "any_severe": None, "total": None}
    before = parts | {"mean_of_groups": 0.6123456}
    block = {"n_studies": 1, "scores": {"ensemble": before}, "skill": None, "groups": ["scs", "nfn"]}
    for module in (arguments, commands):
        monkeypatch.setattr(module, "OUTPUTS", tmp_path)
    for run in ("demo", "own"):
        write_json(tmp_path / run / "scores.json", {"oof": block, "test": None})
    write_json(tmp_path / "own/data.json", {"kind": "phantom"})
    monkeypatch.setattr(labelled, "find", lambda *_: None)
    monkeypatch.setattr(adapt, "check", lambda *_: None)
    monkeypatch.setattr(adapt, "adapt_run", lambda *_: {"before": before, "changed": ["nfn", "ss"]})
    assert commands.main(["adapt", str(tmp_path), "--run", "demo", "--out", "own"]) == 0
    said = capsys.readouterr().out
    assert "ensemble by the run's own blend: 0.612; kept as it is: spinal\n" in said
    assert "1 training study, out of fold;" in said
    monkeypatch.setattr("lsdc_utils.export.studies.read_recipe", lambda _: {"adapted": {}})
    with pytest.raises(ExportError, match=r"own has no grades to export: it was adapted and keeps no study;"):
        export_studies(tmp_path / "own")
