"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

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
    """Give a temporary path in the folder of `path` (made if need be); on success it replaces `path`."""
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
    """The commit of this source tree, with a word where files differ from it; `unknown` where it is no checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}{' with changes' if changed.stdout.strip() else ''}"
