"""Runs of the pipeline that are killed at a chosen moment, for tests of what they leave."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from lsdc_utils.pipeline import run as runs

KINDS = ("top", "group", "kernel")  # the runner's process alone, all of its process group, only a notebook's kernel


@dataclass(frozen=True)
class Moment:
    """`delay` seconds after a step begins, or once its first checkpoint is there, or while its second one is being
    written; of the last two, when it is done if that was missed."""

    step: str
    delay: float = 0.0
    has_checkpoint: bool = False
    in_checkpoint: bool = False


def kill_run(project: Path, arguments: list[str], run: str, moment: Moment, kind: str) -> str:
    """Start a run, kill it at a moment by SIGKILL, wait for the end of what was killed, and return what it printed.

    AssertionError if the run ends before that moment.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    output = project / "output.txt"
    with output.open("w") as out:
        command = ["bash", "run_all.sh", *arguments]
        running = subprocess.Popen(
            command, cwd=project, env=environment, stdout=out, stderr=out, start_new_session=True
        )
    begins = re.compile(rf"\] {re.escape(moment.step)}$", re.MULTILINE)
    _wait(lambda: begins.search(output.read_text()), running, output)
    folder = project / "outputs" / run
    if moment.has_checkpoint or moment.in_checkpoint:
        work = folder / "work" / re.sub(r"^\d+_train_", "", moment.step)
        ends = re.compile(rf"\] {re.escape(moment.step)} done", re.MULTILINE)
        first = work / "checkpoint.safetensors"

        def reached() -> bool:
            there = first.exists() and (moment.has_checkpoint or [*work.glob(".writing-*")])
            return bool(there or ends.search(output.read_text()))

        _wait(reached, running, output)
    else:
        time.sleep(moment.delay)
    if kind == "kernel":
        _kill_kernel(folder, running)
        running.wait(timeout=300)  # the runner reports it when the other steps have ended
    else:
        os.killpg(running.pid, signal.SIGKILL) if kind == "group" else running.kill()
        running.wait(timeout=60)
    return output.read_text()


def _wait(condition, running: subprocess.Popen, output: Path) -> None:
    """Wait until something is true; AssertionError if the run ends before."""
    while not condition():
        assert running.poll() is None, f"the run ended before it could be killed:\n{output.read_text()}"
        time.sleep(0.002)


def _kill_kernel(folder: Path, running: subprocess.Popen) -> None:
    """Kill the kernels of a run's notebooks, as soon as there is one."""
    while running.poll() is None:
        kernels = []
        for process in runs.processes_of(folder):
            with contextlib.suppress(psutil.Error):
                kernels += [process] if "ipykernel_launcher" in " ".join(process.cmdline()) else []
        for kernel in kernels:
            with contextlib.suppress(psutil.Error):
                kernel.kill()
        if kernels:
            return
        time.sleep(0.05)
