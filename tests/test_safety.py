"""Loading weights or data never executes code: pickles (detectors) by an allow-list, no eval, no shell."""

from __future__ import annotations

import ast
import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from lsdc_utils.detector.localiser import load_localiser
from lsdc_utils.detector.training import check_settings, load_detector
from lsdc_utils.vit.model import load_vit

CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "__import__", "pickle.load", "pickle.loads", "torch.load",
         "yaml.load", "yaml.unsafe_load", "yaml.full_load", "pd.read_pickle", "pandas.read_pickle", "joblib.load",
         "shelve.open", "marshal.loads", "tempfile.mktemp"}  # fmt: skip
METHODS = {"extractall", "unpack_archive", "to_pickle"}  # of any object: archives are unpacked by checked names
WORDS = {"shell", "allow_pickle"}  # arguments that may not be anything but False


def unsafe(source: str) -> Iterator[str]:
    """'line: what' for each call in Python source that may run what it is given."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in CALLS or name.rsplit(".", 1)[-1] in METHODS:
            yield f"{node.lineno}: {name}"
        for word in node.keywords:
            if word.arg in WORDS and not (isinstance(word.value, ast.Constant) and word.value.value is False):
                yield f"{node.lineno}: {word.arg}"


def sources() -> Iterator[tuple[str, str]]:
    """Name and Python source of every module and notebook."""
    for file in sorted((ROOT / "lsdc_utils").rglob("*.py")):
        yield str(file.relative_to(ROOT)), file.read_text()
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = [cell for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == "code"]
        yield file.name, "\n".join("".join(cell["source"]) for cell in cells)


def test_no_code_runs_what_it_loads() -> None:
    calls = {name: list(unsafe(source)) for name, source in sources()}
    assert len(calls) > 50
    assert {name: lines for name, lines in calls.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    ["eval(x)", "torch.load(p)", "np.load(p, allow_pickle=True)", "subprocess.run(c, shell=True)", "yaml.load(f)",
     "zipfile.ZipFile(p).extractall()", "subprocess.run(c, shell=flag)"],
)  # fmt: skip
def test_unsafe_calls_are_found(source: str) -> None:
    assert list(unsafe(source))


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("forged", [False, True])
def test_weights_that_would_run_are_refused_before_they_do(tmp_path: Path, forged: bool) -> None:
    ran, weights = tmp_path / "ran", tmp_path / "yolo_scs_fold0.pt"
    torch.save({"model": Payload(ran)}, weights)
    about = {"config": {"condition": "scs"}, "fold": 0, "classes": [], "sha256": "0" * 64}
    if forged:
        about["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.with_suffix(".json").write_text(json.dumps(about))
    with pytest.raises((ValueError, pickle.UnpicklingError, TypeError)) as error:
        load_detector(weights)
    assert "yolo_scs_fold0.pt" in str(error.value)
    assert not ran.exists()
    torch.load(weights, weights_only=False)
    assert ran.exists()  # it would have


def test_weights_of_one_s_own_that_a_detector_starts_from_are_read_through_the_list_too(tmp_path: Path) -> None:
    ran, weights = tmp_path / "ran", tmp_path / "own.pt"
    torch.save({"model": Payload(ran)}, weights)
    check_settings({"model": str(weights), "epochs": 1, "batch": 1, "seed": 1})
    from ultralytics.nn.tasks import load_checkpoint  # which its trainer calls

    with pytest.raises(TypeError, match=r"own\.pt"):
        load_checkpoint(weights)
    assert not ran.exists()


def test_checksums_are_asked_for_before_anything_is_read(tmp_path: Path) -> None:
    for name, load in (
        ("yolo_scs_fold0.pt", load_detector),
        ("vit3d_fold0.safetensors", load_vit),
        ("localiser_fold0.safetensors", load_localiser),
    ):
        (tmp_path / name).write_bytes(b"neither a pickle nor tensors")
        (tmp_path / name).with_suffix(".json").write_text('{"sha256": "0", "config": {}}')
        with pytest.raises(ValueError, match=rf"{name} is not the file that .*\.json describes"):
            load(tmp_path / name)
