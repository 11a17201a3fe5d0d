"""Tests of lsdc_utils.files: files that are complete or absent, and the commit of this source tree."""

from __future__ import annotations

import json
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from lsdc_utils import files


def test_a_file_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new/table.csv"
    with files.atomic(path) as temporary:
        temporary.write_text("first")
        assert temporary.suffix == ".csv" and temporary.parent == path.parent and not path.exists()
    assert path.read_text() == "first" and stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(RuntimeError), files.atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def test_json_knows_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    files.write_json(path, {"total": 0.5, "none": None})
    assert json.loads(path.read_text()) == {"total": 0.5, "none": None}
    with pytest.raises(ValueError):
        files.write_json(path, {"total": float("nan")})
    assert json.loads(path.read_text())["total"] == 0.5


def test_names_that_are_not_utf8_become_readable(tmp_path: Path) -> None:
    assert files.readable(Path("caf\udce9.dcm")) == "caf?.dcm" and files.readable(7) == "7"


def test_the_commit_is_that_of_this_tree_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", str(tree), *name, *words], capture_output=True, text=True).stdout.strip()

    tree = tmp_path / "tree"
    module = tree / "lsdc_utils/files.py"
    module.parent.mkdir(parents=True)
    shutil.copy(files.__file__, module)
    monkeypatch.setattr(files, "__file__", str(module))
    assert files.git_commit() == "unknown"
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    assert files.git_commit() == git("rev-parse", "HEAD") != ""
    module.write_text("changed")
    assert files.git_commit() == git("rev-parse", "HEAD") + " with changes"
    git("config", "filter.gone.clean", "/nowhere/python -m nbstripout")
    git("config", "filter.gone.required", "true")
    (tree / ".gitattributes").write_text("*.py filter=gone\n")
    module.write_text(git("show", "HEAD:lsdc_utils/files.py") + "\n")  # of the same size, so git asks the filter
    assert files.git_commit() == git("rev-parse", "HEAD") + ", changes unknown"
    other = tmp_path / "other"
    subprocess.run(["git", "init", "-q", other], check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))  # as in a hook of another repository
    assert files.git_commit().endswith(", changes unknown")
    monkeypatch.delenv("GIT_DIR")
    inner = tree / "vendored/lsdc_utils/files.py"  # a copy of the package within another repository
    inner.parent.mkdir(parents=True)
    inner.write_text("")
    monkeypatch.setattr(files, "__file__", str(inner))
    assert files.git_commit() == "unknown"
