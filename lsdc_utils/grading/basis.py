"""What graded rows rest on: the data that the models of a run were trained on."""

import json
from pathlib import Path

PHANTOM_ONLY = "phantom_only"  # basis of models that were trained on synthetic images alone
TAKEN = {"localiser": "localiser", "yolo": "detectors"}  # models that may be taken from another run, in words
KINDS = {"kaggle": "the RSNA 2024 data set", "folder": "a data folder"}  # of data.json, in words


def _abouts(run: Path) -> dict[str, dict]:
    """What stands beside each of the weights, by name; of blend.json's folds, if known: others are of old starts."""
    recipe = json.loads((run / "blend.json").read_text()) if (run / "blend.json").is_file() else {}
    files = (file for fold in recipe.get("folds", ["*"]) for file in sorted(run.glob(f"weights/*_fold{fold}.json")))
    return {file.stem: json.loads(file.read_text()) for file in files}


def training_studies(run_dir: str | Path) -> int:
    """Number of studies that any detector or transformer of a run was trained on; 0 where none lists them."""
    lists = (about.get("studies") for name, about in _abouts(Path(run_dir)).items() if name[0] in "vy")
    return len(set().union(*(studies for studies in lists if isinstance(studies, list))))


def grade_basis(run_dir: str | Path) -> str:
    """`PHANTOM_ONLY`, or 'trained on <n> studies of <data>', of a run or packed models; then that of taken models."""
    files = [Path(run_dir, name) for name in ("data.json", "provenance.json")]  # packed models have the second alone
    about = next((json.loads(file.read_text()) for file in files if file.is_file()), {})
    data = about.get("data", about)
    if data.get("kind") == "phantom":
        return PHANTOM_ONLY
    count = data.get("studies") or training_studies(run_dir) or "an unknown number of"
    taken = {name.split("_")[0]: own["basis"] for name, own in _abouts(Path(run_dir)).items() if "basis" in own}
    lent = [f"{' and '.join(TAKEN[name] for name in taken)}: {' or '.join({*taken.values()})}"] if taken else []
    return "; ".join([f"trained on {count} studies of {KINDS.get(data.get('kind'), 'unknown data')}", *lent])


def basis_words(basis: str) -> str:
    """The sentences about a `grade_basis` that stand on pages and in the terminal, one for each part between '; '."""
    meaning = " (the models were trained on synthetic images alone, never on a patient's)"
    first, *others = (f"{part}{meaning if PHANTOM_ONLY in part else ''}." for part in basis.split("; "))
    return " ".join([f"Grade basis: {first}", *(f"{part[0].upper()}{part[1:]}" for part in others)])
