"""Commands of a proof that runs several: each is timed, and belongs to a commit."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MISSED = 3  # exit status of a proof that ended with all its tables, but with a bar missed
sys.path.insert(0, str(ROOT))

from lsdc_utils.files import atomic  # noqa: E402


def committed(parser: argparse.ArgumentParser, *paths: str) -> str:
    """The commit of the tree; the parser's error where files below `paths` differ from it."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    if changed := git("status", "--porcelain", "--", *paths):
        parser.error(f"there are changes that are not committed:\n{changed}")
    return git("rev-parse", "--short=12", "HEAD")


def fill(name: str, text: str, page: Path) -> None:
    """Write a table between its markers in a page."""
    head, marker, rest = page.read_text().partition(f"<!-- table {name} -->\n")
    assert marker, f"{page} has no place for the table {name}"
    with atomic(page) as temporary:
        temporary.write_text(f"{head}{marker}{text}\n{rest[rest.index('<!-- end -->') :]}")


def timed(command: str, log: Path) -> dict[str, float]:
    """Run a command in the tree, with this Python first on PATH; what it prints goes to `log`. Its exit status, minutes
    and minutes of processor time."""
    began, before = time.time(), os.times()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        words = shlex.split(command)
        status = subprocess.run(words, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"status": status, "minutes": round((time.time() - began) / 60, 1), "cpu_minutes": round(cpu / 60, 1)}
