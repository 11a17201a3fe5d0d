"""Robustness, measured: `python tests/proofs/robust.py [NAME ...]` runs the checks of `CHECKS`, or some of them, one
command each, on the committed tree, and writes what came of them to docs/robust.csv and docs/guarantees.md.

A check that passed on this commit is not run again, so that a stopped proof resumes. Takes two hours or more on two
cores. `python tests/proofs/robust.py pair` alone is the one check that lives here: two runs at once in one folder.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parent))

from chain import ROOT, committed, fill, timed

TABLE, PAGE = ROOT / "docs/robust.csv", ROOT / "docs/guarantees.md"
PYTEST = "python -m pytest -p no:cacheprovider"
CHECKS = {  # name -> what is done, its command, and a pattern of its last words, which are the outcome
    "files": ("20,000 corrupt DICOM files are read", "python tests/fuzz/run.py 20000", r"(?s)slowest call.*"),
    "kills": ("runs are killed 20 times and resume", f"{PYTEST} tests/test_faults.py -k killed", r"\d+ passed.*"),
    "disks": ("disks that are too small", f"{PYTEST} tests/test_faults.py -k full_disk", r"\d+ passed.*"),
    "memory": ("memory that is too short", f"{PYTEST} tests/test_faults.py -k short_memory", r"\d+ passed.*"),
    "order": ("one step at a time", f"{PYTEST} tests/test_faults.py -k one_step", r"\d+ passed.*"),
    "names": ("names planted in headers", f"{PYTEST} tests/test_private.py -k 'not offline'", r"\d+ passed.*"),
    "network": ("no network", f"{PYTEST} tests/test_private.py -k 'offline or connection'", r"\d+ passed.*"),
    "weights": ("weights and files that would run code", f"{PYTEST} tests/test_safety.py", r"\d+ passed.*"),
    "pair": ("two runs at once in one folder", "python tests/proofs/robust.py pair --here", r"both .*"),
}


def pair() -> int:
    """Two smoke runs at once in a clone whose phantom is not drawn yet; the exit status."""
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(project)], check=True)
        (project / ".venv").symlink_to(sys.prefix)
        names = ("one", "other")
        command = ["./run_all.sh", "--profile", "smoke", "--cores", "1", "--run"]
        running = [subprocess.Popen([*command, name], cwd=project, stdout=subprocess.DEVNULL) for name in names]
        status = [process.wait() for process in running]
        files = [project / "outputs" / name / "submission.csv" for name in names]
        alike = not any(status) and files[0].read_bytes() == files[1].read_bytes()
        print(f"both ended with {status}; their submissions are {'the same bytes' if alike else 'not alike'}")
        return int(not alike)


def run(name: str, commit: str) -> dict:
    """Run a check; its line of the table."""
    what, command, words = CHECKS[name]
    log = ROOT / f"outputs/robust/{name}.txt"
    cost, told = timed(command, log), log.read_text().strip()
    outcome = " ".join("".join(re.findall(words, told)[:1] or [told[-600:]]).split())
    return {"check": name, "what": what, "command": command, "outcome": outcome, "commit": commit} | cost


def write(lines: dict[str, dict]) -> None:
    """Write the list, in the order of `CHECKS`, and its table in the page."""
    table = pd.DataFrame([lines[name] for name in CHECKS if name in lines])
    table.to_csv(TABLE, index=False)
    rows = [f"| {line['what']} | {outcome_of(line)} | {line['minutes']:g} | {line['commit']} |"
            for line in table.to_dict("records")]  # fmt: skip
    head = ["| Check | Outcome | Minutes | Commit |", "|---|---|---:|---|"]
    fill("robust", "\n".join([*head, *rows]), PAGE)


def outcome_of(line: dict) -> str:
    """The outcome as the page shows it."""
    return ("" if line["status"] == 0 else "**failed:** ") + str(line["outcome"]).replace("|", "/")[:300]


def main() -> int:
    """Run the checks that were asked for; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CHECKS)}; default: all")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.here:
        return pair()
    if unknown := set(asked.names) - set(CHECKS):
        parser.error(f"no such check: {', '.join(sorted(unknown))}")

    commit = committed(parser, "lsdc_utils", "notebooks", "tests", "run_all.sh")
    known = pd.read_csv(TABLE).to_dict("records") if TABLE.is_file() else []
    lines = {line["check"]: line for line in known}
    for name in asked.names or CHECKS:
        if (old := lines.get(name)) and old["commit"] == commit and old["status"] == 0:
            continue
        lines[name] = run(name, commit)
        print(*lines[name].values(), sep=" | ", flush=True)
        write(lines)
    failed = [name for name, line in lines.items() if line["status"] != 0]
    if failed:
        print("FAILED:", *failed)
    return int(len(failed) > 0)


if __name__ == "__main__":
    sys.exit(main())
