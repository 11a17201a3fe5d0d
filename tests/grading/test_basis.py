"""What grades rest on, told from a run's records alone."""

from __future__ import annotations

import json
from pathlib import Path

from lsdc_utils.grading.basis import PHANTOM_ONLY, basis_words, grade_basis


def write(folder: Path, name: str, content: dict) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def test_the_basis_is_told_by_the_best_record_that_is_there(tmp_path: Path) -> None:
    assert grade_basis(tmp_path) == "trained on an unknown number of studies of unknown data"
    for fold, studies in enumerate(([1, 2, 3], [3, 4])):
        write(tmp_path, f"weights/yolo_scs_fold{fold}.json", {"studies": studies})
    assert grade_basis(tmp_path) == "trained on 4 studies of unknown data"
    write(tmp_path, "data.json", {"kind": "folder", "data_dir": "/hospital/Some^Name"})
    assert grade_basis(tmp_path) == "trained on 4 studies of a data folder"  # not named: a name may be a patient's
    write(tmp_path, "provenance.json", {"data": {"kind": "kaggle", "studies": 1975}})  # of an earlier start
    assert grade_basis(tmp_path) == "trained on 4 studies of a data folder"
    write(tmp_path, "data.json", {"kind": "phantom"})
    assert grade_basis(tmp_path) == PHANTOM_ONLY == "phantom_only"
    (tmp_path / "data.json").unlink()
    assert grade_basis(tmp_path) == "trained on 1975 studies of the RSNA 2024 data set"
    write(tmp_path, "provenance.json", {"data": {"kind": "phantom", "studies": 160}})
    assert grade_basis(tmp_path) == PHANTOM_ONLY


def test_folds_of_an_earlier_start_do_not_count(tmp_path: Path) -> None:
    write(tmp_path, "data.json", {"kind": "folder"})
    for fold, studies in enumerate(([1, 2, 3], [3, 4])):
        write(tmp_path, f"weights/yolo_scs_fold{fold}.json", {"studies": studies})
    write(tmp_path, "weights/localiser_fold1.json", {"basis": PHANTOM_ONLY})
    assert grade_basis(tmp_path) == "trained on 4 studies of a data folder; localiser: phantom_only"
    write(tmp_path, "blend.json", {"folds": [0]})
    assert grade_basis(tmp_path) == "trained on 3 studies of a data folder"


def test_packed_weights_count_their_studies_without_naming_them(tmp_path: Path) -> None:
    write(tmp_path, "weights/yolo_scs_fold0.json", {"studies": 80})
    assert grade_basis(tmp_path) == "trained on an unknown number of studies of unknown data"


def test_the_words_explain_a_phantom_alone() -> None:
    assert "synthetic images alone" in basis_words(PHANTOM_ONLY)
    assert basis_words("trained on 3 studies of x") == "Grade basis: trained on 3 studies of x."


def test_models_that_were_taken_keep_their_basis(tmp_path: Path) -> None:
    write(tmp_path, "data.json", {"kind": "folder"})
    write(tmp_path, "weights/vit3d_fold0.json", {"studies": [1, 2]})
    for name in ("localiser", "yolo_nfn"):
        write(tmp_path, f"weights/{name}_fold0.json", {"basis": PHANTOM_ONLY, "taken_from": "pretrained"})
    basis = grade_basis(tmp_path)
    assert basis == "trained on 2 studies of a data folder; localiser and detectors: phantom_only"
    assert basis_words(basis) == (
        "Grade basis: trained on 2 studies of a data folder. Localiser and detectors: phantom_only (the models were "
        "trained on synthetic images alone, never on a patient's)."
    )
