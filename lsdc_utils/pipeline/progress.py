"""What a person sees of a run: steps as Snakemake reports them, the cell and log of a failure, the scores."""

import contextlib
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lsdc_utils.costs import shares
from lsdc_utils.pipeline.graph import Step, has_error

PARTS = ("spinal", "foraminal", "subarticular", "any_severe", "total")
PAPERMILL_TAGS = {"injected-parameters", "papermill-error-cell-tag"}  # of cells that papermill adds
TITLES = {"test": "test studies", "oof": "training studies, out of fold"}  # blocks of scores.json


@dataclass
class Progress:
    """State of a run, read from Snakemake's messages line by line."""

    past: dict[str, float] = field(default_factory=dict)  # step -> its share_s in an earlier run (see costs)
    total: int = 0
    planned: dict[str, int] = field(default_factory=dict)  # rule -> its jobs
    rules: dict[str, str] = field(default_factory=dict)  # step -> its rule, of steps that have started
    running: dict[str, float] = field(default_factory=dict)  # step -> its start, seconds since the epoch
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)  # finished step -> its start and end
    reasons: dict[str, str] = field(default_factory=dict)  # step -> why it runs
    failed: list[str] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)  # Snakemake's job id -> step
    block: dict[str, str] = field(default_factory=dict)  # the paragraph being read

    def read(self, line: str) -> str | None:
        """Read one line; return what a person should see of it, if anything."""
        if match := re.match(r"(\w+) +(\d+)$", line):
            self.total = int(match[2])  # which is the last line of this table
            self.planned |= {match[1]: self.total} if match[1] != "total" else {}
        elif match := re.match(r"(?:local)?(rule) (\w+):$|(Error) in rule \w+", line):
            self.block = {"kind": match[1] or match[3], "rule": match[2]}
        elif match := re.match(r"Finished jobid: (\d+)", line):
            step = self.jobs[match[1]]
            began, ended = self.spans[step] = self.running.pop(step), time.time()
            return f"[{len(self.spans)}/{self.total}] {step} done in {clock(ended - began)}{self.left()}"
        elif match := re.match(r"    (log|jobid|reason|message): (.*)$", line):
            self.block[match[1]] = match[2]
            last = {"rule": "reason", "Error": "log"}  # the field that is printed after all that is needed
            if match[1] != last.get(self.block.get("kind")):
                return None
            step = re.search(r"logs/(\S+)\.log", self.block["log"])[1]
            if match[1] == "log":
                self.running.pop(step, None)
                self.failed.append(step)
                reason = self.block.get("message", "None")  # of a cluster, e.g. that its time ran out
                return f"{step} failed" if reason == "None" else f"{step} failed: {reason}"
            self.jobs[self.block["jobid"]] = step
            self.failed = [other for other in self.failed if other != step]  # it is tried again
            self.reasons[step] = self.block["reason"]
            self.running[step], self.rules[step] = time.time(), self.block["rule"]
            return f"[{len(self.spans) + len(self.running)}/{self.total}] {step}"
        return None

    def left(self) -> str:
        """Time that the run is expected to take still, as text; empty in its first minute and where nothing tells. A
        step is expected to take its share of the past run, times the median ratio of this run to that; else as long as
        the finished ones of its rule; else, once half of all steps are done, as long as these."""
        now = time.time()
        spans = self.spans | {step: (began, now) for step, began in self.running.items()}
        if not self.spans or now - min(began for began, _ in spans.values()) < 60:
            return ""
        taken, left = shares(spans), 0.0
        done = {step: taken[step] for step in self.spans}
        known = [step for step in taken if step in self.past and (step in done or taken[step] > self.past[step])]
        ratio = statistics.median([1.0, *(taken[step] / self.past[step] for step in known)])
        expected = {step: ratio * share for step, share in self.past.items()} | done
        for rule, jobs in self.planned.items():
            own = [share for step, share in expected.items() if rule == self.rules.get(step) or rule in step]
            own = own or [*done.values()] * (2 * len(done) >= self.total)
            if not own:
                return ""
            started = [step for step in taken if self.rules[step] == rule]
            usual = statistics.fmean(own)
            left += usual * jobs - sum(usual if step in done else min(taken[step], usual) for step in started)
        return f" | about {max(round(left / 60), 1)} min left"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def shown(path: Path) -> str:
    """A path as a person at the prompt would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../..") else relative


def last_lines(log: Path, n: int = 1) -> list[str]:
    """The last `n` lines of a log that are not empty; of a line that a progress bar overwrote, its last state."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)  # colours
    lines = [[part for part in line.split("\r") if part.strip()] for line in text.split("\n")]
    return [parts[-1].rstrip() for parts in lines if parts][-n:]


def follow(logs: Path, process: subprocess.Popen, output: Path, past: dict[str, float]) -> Progress:
    """Print each step's start and end until Snakemake ends, and a line on the running steps with their logs' last line:
    redrawn every second on a terminal, else printed every 30 seconds. past: as in Progress."""
    progress, began, printed, rest = Progress(past), time.time(), time.time(), ""
    terminal, running = sys.stdout.isatty(), True
    with output.open(errors="replace") as messages:
        while running:
            running = process.poll() is None  # before reading, so that the last lines are read too
            *lines, rest = (rest + messages.read()).split("\n")  # the last line may be incomplete
            for message in filter(None, map(progress.read, lines)):
                print(f"{chr(13) + chr(27) + '[K' if terminal else ''}{clock(time.time() - began):>8}  {message}")
            steps = [f"{step}: {' '.join(last_lines(logs / f'{step}.log'))}" for step in progress.running]
            done = f"[{len(progress.spans)}/{progress.total}] done{progress.left()}"
            status = f"{clock(time.time() - began)}  {' | '.join([done, *steps])}"
            if terminal:
                print(f"\r\033[K{status[: shutil.get_terminal_size().columns - 1]}", end="")
            elif time.time() - printed > 30 and steps:
                printed = time.time()
                print(f"  {status}")
            sys.stdout.flush()
            if running:
                time.sleep(1.0 if terminal else 0.3)
    print("\r\033[K" if terminal else "", end="")
    return progress


def failure(logs: Path, step: Step) -> str:
    """What is needed to repair a failed step: notebook, cell, log, the log's last lines."""
    executed, log = logs / f"{step.name}.ipynb", logs / f"{step.name}.log"
    lines = [f"\n{step.name} failed", f"  notebook: notebooks/{step.notebook}.ipynb"]
    if executed.is_file():
        import nbformat

        lines += [f"  as executed: {shown(executed)}"]
        cells = []
        with contextlib.suppress(ValueError, nbformat.ValidationError):  # half written, e.g. on a full disk
            cells = nbformat.read(executed, as_version=4).cells
        own = [cell for cell in cells if not PAPERMILL_TAGS & set(cell.metadata.get("tags", ()))]
        code = [cell for cell in own if cell.cell_type == "code"]
        started = [cell for cell in code if cell.metadata.get("papermill", {}).get("start_time")]
        for cell in (list(filter(has_error, started)) or started[-1:])[:1]:
            lines += [f"  failing cell: number {own.index(cell) + 1}"]
            lines += [f"      {line}" for line in cell.source.splitlines()]
    lines += [f"  last lines of {shown(log)}:"]
    return "\n".join(lines + [f"      {line}" for line in last_lines(log, 15)])


def score_table(scores: dict[str, Any]) -> str:
    """The blocks of scores.json as text, test first. Where groups are absent, the mean of the others is the total."""
    lines = []
    for name, studies in TITLES.items():
        if not (block := scores.get(name)):
            continue
        studies = studies if block["n_studies"] != 1 else studies.replace("studies", "study")
        lines += ["", f"Weighted log loss, {block['n_studies']} {studies}; lower is better"]
        skills, last = block.get("skill") or {}, "mean_of_groups" if "groups" in block else "total"
        shown = (*PARTS[:-1], last)
        titles = [part.replace("_", " ") for part in shown] + (["skill"] if skills else [])
        lines += [f"  {'':22}" + "".join(f"{title:>16}" for title in titles)]
        for model, parts in block["scores"].items():
            values = [parts[part] for part in shown] + ([skills[model][last]] if model in skills else [])
            lines += [f"  {model:22}" + "".join(f"{'-' if v is None else f'{v:.3f}':>16}" for v in values)]
        low, high = block.get("interval", {}).get("ensemble", {}).get(last) or (None, None)
        if low is not None:
            lines += [f"  ensemble, {last.replace('_', ' ')}: 95 % interval {low:.3f} to {high:.3f}"]
    return "\n".join(lines)
