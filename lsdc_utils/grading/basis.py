"""What graded rows rest on: the data that the models of a run were trained on."""

import json
from pathlib import Path

PHANTOM_ONLY = "phantom_only"  # basis of models that were trained on synthetic images alone
KINDS = {"kaggle": "the RSNA 2024 data set", "folder": "a data folder"}  # of data.json, in words


def training_studies(run_dir: str | Path) -> int:
    """Number of studies that any detector of a run was trained on; 0 where its weights do not list them."""
    lists = (json.loads(file.read_text()).get("studies") for file in Path(run_dir).glob("weights/yolo_*.json"))
    return len(set().union(*(studies for studies in lists if isinstance(studies, list))))


def grade_basis(run_dir: str | Path) -> str:
    """`PHANTOM_ONLY`, or 'trained on <n> studies of <data>': of a run, or of the models that `pack` made from one."""
    files = [Path(run_dir, name) for name in ("provenance.json", "data.json")]
    about = next((json.loads(file.read_text()) for file in files if file.is_file()), {})
    data = about.get("data", about)
    if data.get("kind") == "phantom":
        return PHANTOM_ONLY
    count = data.get("studies") or training_studies(run_dir) or "an unknown number of"
    return f"trained on {count} studies of {KINDS.get(data.get('kind'), 'unknown data')}"


def basis_words(basis: str) -> str:
    """The sentence about a `grade_basis` that stands on pages and in the terminal, and one on what follows a '; '."""
    basis, _, mark = basis.partition("; ")
    meaning = " (the models were trained on synthetic images alone, never on a patient's)"
    return f"Grade basis: {basis}{meaning if basis == PHANTOM_ONLY else ''}.{mark and f' {mark[0].upper()}{mark[1:]}.'}"
