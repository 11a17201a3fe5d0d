"""Files and folders that are complete or absent: written under a temporary name, then renamed."""

import contextlib
import hashlib
import json
import os
import shutil
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


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`; it replaces `path` unless the with-body raises."""
    temporary = path.with_name(f".writing-{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_studies(number: int, kind: str = "") -> str:
    """A number of studies in words, e.g. 1 study, 3 labelled studies."""
    return f"{number} {kind}{' ' if kind else ''}stud{'y' if number == 1 else 'ies'}"


def readable(text: object) -> str:
    """Text that tables can hold: bytes of a file's name that are not UTF-8 become question marks."""
    return str(text).encode(errors="replace").decode()


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON, atomically; NaN and infinity are an error, since JSON has none."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")


def write_table(path: str | Path, table: Any, **options: Any) -> None:
    """Write a table as Parquet or CSV (`options` of pandas), without its index, atomically."""
    with atomic(path) as temporary:
        write = table.to_parquet if temporary.suffix == ".parquet" else table.to_csv
        write(temporary, index=False, **options)


def git_commit() -> str:
    """The commit of this source tree, marked 'with changes' if files differ from it, 'changes unknown' if git cannot
    tell; `unknown` if the tree is not a git checkout of its own, such as an archive unpacked in another repository."""
    root = Path(__file__).resolve().parents[1]
    # Variables of git name another repository, e.g. in a hook. In a container a checkout belongs to another user.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    git = ["git", "-C", root, "-c", f"safe.directory={root}", "--no-optional-locks"]
    asked = (["rev-parse", "--show-toplevel"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
    with contextlib.suppress(OSError):  # there is no git
        top, head, status = (subprocess.run([*git, *words], capture_output=True, env=environment) for words in asked)
        if head.returncode == 0 and Path(os.fsdecode(top.stdout).removesuffix("\n")) == root:
            # git cannot tell, e.g., where it needs a filter whose program is gone.
            changes = ", changes unknown" if status.returncode else " with changes" * bool(status.stdout)
            return head.stdout.decode().strip() + changes
    return "unknown"
