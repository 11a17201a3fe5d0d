"""Files that are complete or absent: written under a temporary name, then renamed."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path in the folder of `path`, which is created; it replaces `path` unless the with-body raises."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays, since writers such as pandas and numpy choose a format by it.
    handle, name = tempfile.mkstemp(prefix=".writing-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o644)  # mkstemp's 600 would keep a colleague from reading a shared run
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def readable(text: object) -> str:
    """Text that tables can hold: bytes of a file's name that are not UTF-8 become question marks."""
    return str(text).encode(errors="replace").decode()


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; NaN and infinity are an error, since JSON has none."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def git_commit() -> str:
    """The commit of this source tree, marked 'with changes' if files differ from it; `unknown` if the tree is not a
    git checkout of its own, such as an archive unpacked within another repository."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) != root:
            return "unknown"
        changes = " with changes" if git("status", "--porcelain", "-uno") else ""
        return git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
