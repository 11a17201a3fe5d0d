"""A run: its folder and lock, its processes, and the one call of Snakemake."""

import contextlib
import csv
import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from lsdc_utils.costs import step_table, write_step_table
from lsdc_utils.files import atomic
from lsdc_utils.pipeline.arguments import OUTPUTS, UsageError
from lsdc_utils.pipeline.graph import NOTEBOOK_ORDER, NOTEBOOKS, ROOT, Step, all_steps, phantom_run, select_steps
from lsdc_utils.pipeline.parameters import PROFILES, load_parameters
from lsdc_utils.pipeline.progress import Progress, failure, follow, last_lines, shown

RUN_MARK = "LSDC_RUN"  # environment variable of every process of a run: its folder


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    folder: Path  # outputs/<run>
    parameters: dict[str, Any]
    resume: str  # the command that resumes this run
    cores: int
    until: str | None = None
    force: Sequence[str] = ()
    snakefile: str = "Snakefile"  # in notebooks/
    slurm: bool = False  # each step a job of the cluster

    @property
    def steps(self) -> list[Step]:
        """All steps of the run, in the order of the notebooks."""
        return all_steps(self.parameters)

    def reaches(self, notebook: str) -> bool:
        """Whether the steps that are asked for end with this notebook or a later one."""
        asked = select_steps(self.steps, self.until) if self.until else self.steps
        return max(map(NOTEBOOK_ORDER.index, (step.notebook for step in asked))) >= NOTEBOOK_ORDER.index(notebook)


def visible_gpus() -> list[str]:
    """Indices or UUIDs of the GPUs that jobs may use; none without an NVIDIA driver."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:  # as CUDA reads it: up to the first word that is no device
        words = map(str.strip, os.environ["CUDA_VISIBLE_DEVICES"].split(","))
        return list(itertools.takewhile(re.compile(r"\d+$|(GPU|MIG)-").match, words))
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Living processes of the run in `folder`, including kernels in sessions of their own."""
    processes = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(RUN_MARK) == str(folder):
                processes.append(process)
    return processes


def end_processes(folder: Path) -> None:
    """End what is left of the run in `folder`, e.g. after its runner was killed: a step would continue to write."""
    while left := processes_of(folder):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def cancel_jobs(folder: Path) -> None:
    """Cancel the SLURM jobs that the run in `folder` last had, and wait up to a minute for their end."""
    log = folder / "logs" / "snakemake.log"
    submitted = re.search(rb"^SLURM run ID: (\S+)$", log.read_bytes(), re.MULTILINE) if log.is_file() else None
    if submitted is None or shutil.which("scancel") is None:  # e.g. copied from a cluster
        return
    subprocess.run(["scancel", "--name", submitted[1]])
    for _ in range(60):
        listed = subprocess.run(["squeue", "--noheader", "--name", submitted[1]], capture_output=True)
        if not listed.stdout:
            return
        time.sleep(1)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the run's folder until the process ends; UsageError if another has it. A new one that stays empty goes."""
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{shown(folder)} is locked by another run_all.sh") from error
        end_processes(folder)
        cancel_jobs(folder)
        left = (file for depth in ("", "*/", "*/*/") for file in folder.glob(f"{depth}.writing-*"))  # of a killed one
        for file in filter(Path.is_file, left):
            file.unlink()
        try:
            yield
        finally:
            files = (file.relative_to(folder).parts for file in folder.rglob("*") if file.is_file())
            if new and all({".lock", "models"} & {*parts} for parts in files):  # refused; models are an archive's
                shutil.rmtree(folder)


def snakemake_command(run: Run, config: Path, gpus: int) -> list[str]:
    """The one call of Snakemake; targets are executed notebooks, so that its counts are counts of steps."""
    targets = select_steps(run.steps, run.until) if run.until else run.steps
    command = [sys.executable, "-m", "snakemake", "--snakefile", NOTEBOOKS / run.snakefile, "--directory", run.folder]
    command += ["--configfile", config, "--cores", run.cores, "--scheduler", "greedy"]
    if run.slurm:  # the cluster decides what runs side by side
        command += ["--workflow-profile", PROFILES / "slurm", "--slurm-logdir", run.folder / "logs" / "slurm"]
    else:
        command += ["--resources", f"gpu={gpus}", f"mem_mb={psutil.virtual_memory().total // 2**20}"]
    command += ["--rerun-incomplete", "--rerun-triggers", "mtime", "params", "input", "--nolock", "--nocolor"]
    command += ["--max-checksum-file-size", 2**50]  # a file rewritten with the same bytes re-runs nothing
    if run.snakefile == "predict.smk" or run.parameters["allow_missing_members"]:
        command += ["--keep-going"]  # other shards, or trainings, do not wait for one that fails
    forced = [step for name in run.force for step in select_steps(run.steps, name)]
    record = run.folder / "data.json"
    if record.is_file() and not (run.folder / json.loads(record.read_text())["data_dir"]).is_dir():
        forced.append(run.steps[0])  # the data that 00 recorded are gone
    if forced:
        command += ["--forcerun", *(f"notebooks/{step.name}.ipynb" for step in forced)]
    return [str(word) for word in [*command, "--", *(f"notebooks/{step.name}.ipynb" for step in targets)]]


def child_environment(run: Run, gpus: list[str]) -> dict[str, str]:
    """Environment of Snakemake and of all that it starts."""
    devices = {"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {}
    environment = {"PYTHONPATH": str(ROOT), **os.environ, RUN_MARK: str(run.folder), **devices}
    if run.slurm:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # SLURM sets it for each job
    return environment


def first_run(run: Run) -> Run | None:
    """The run on phantom studies in which the transformers of this one are trained first, if it has to do with any."""
    first = phantom_run(run.parameters)
    if not (first and run.reaches("04_train_vit3d")):
        return None
    folder, parameters = run.folder.with_name(first[0]), first[1]
    return replace(run, folder=folder, parameters=parameters, until="04_fold0", force=())


def dry_run(run: Run) -> int:
    """Print which steps would run and why, and change nothing."""
    if first := first_run(run):
        print(f"first {shown(first.folder)}, on phantom studies:")
        if status := dry_run(first):
            return status
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "parameters.yml"
        config.write_text(yaml.safe_dump(run.parameters))
        planned = replace(run, folder=run.folder if run.folder.is_dir() else Path(temporary))
        command = snakemake_command(planned, config, 0)
        command.insert(command.index("--directory"), "--dry-run")
        done = subprocess.run(command, env=child_environment(planned, []), capture_output=True)
    output, progress = (done.stdout + done.stderr).decode(errors="replace"), Progress()
    if done.returncode:
        print(output, file=sys.stderr)
        return done.returncode
    for line in output.splitlines():
        progress.read(line)
    for step in run.steps:
        if step.name in progress.reasons:
            many = re.compile(r"(?<=: )([^,;]+), ([^;]+)")  # files; of a long list the first is enough
            why = many.sub(lambda found: f"{found[1]} and {found[2].count(',') + 1} more", progress.reasons[step.name])
            print(f"would run {step.name}: {why}")
    print(f"{len(progress.reasons)} of {len(run.steps)} steps would run")
    return 0


def past_shares(run: Run) -> dict[str, float]:
    """Step -> share_s of its last run here, else in the sample if this is a demo too, of any seeds and conditions."""
    own = step_table(run.folder)["share_s"].dropna().to_dict()
    demo, sample = load_parameters("demo"), OUTPUTS / "sample" / "steps.csv"
    like = demo.keys() - {"seed", "phantom_seed", "conditions"}
    if not sample.is_file() or any(run.parameters.get(key) != demo[key] for key in like):
        return own
    with sample.open() as file:
        lines = {line["step"]: float(line["share_s"]) for line in csv.DictReader(file) if line["share_s"]}
    return lines | own


def without_failed(run: Run, failed: list[str]) -> Run | None:
    """The run without the members whose trainings failed, if it allows that, no other step failed, and one is left."""
    names = {step.given.get("member") for step in run.steps if step.name in failed}
    left = [member for member in run.parameters["vit_members"] if member["name"] not in names]
    if not (run.parameters["allow_missing_members"] and names and all(names) and left):
        return None
    missing = sorted(names.union(run.parameters["missing_members"]))
    return replace(run, force=(), parameters=run.parameters | {"vit_members": left, "missing_members": missing})


def work(run: Run) -> int:
    """Let Snakemake run what is not up to date in a locked folder, and print what happens; the exit status. What comes
    in a `first_run` is done as soon as the run's own data are found usable. UsageError where `adapt` made the run."""
    kept = run.folder / "blend.json"
    if run.snakefile == "Snakefile" and kept.is_file() and '"adapted"' in kept.read_text():
        raise UsageError(f"{shown(run.folder)} was made by adapt and would be replaced: name another run, or delete it")
    if first := first_run(run):
        if status := work(replace(run, until="02_convert_labels", force=())):
            return status
        with locked(first.folder):
            if status := work(first):
                return status
            shutil.rmtree(first.folder / "work", ignore_errors=True)  # crops that 05 would delete
    gpus = [] if run.slurm else visible_gpus()
    config, output = run.folder / "parameters.yml", run.folder / "logs" / "snakemake.log"
    output.parent.mkdir(exist_ok=True)
    with atomic(config) as temporary:
        temporary.write_text(yaml.safe_dump(run.parameters, sort_keys=False))
    place = "jobs on SLURM" if run.slurm else f"{run.cores} cores, {len(gpus)} GPUs"
    print(f"{shown(run.folder)}: {place}; logs: {shown(output.parent)}/<step>.log")
    past = past_shares(run)
    try:
        with output.open("w") as log:
            command = snakemake_command(run, config, len(gpus))
            process = subprocess.Popen(command, env=child_environment(run, gpus), stdout=log, stderr=log, cwd=ROOT)
        progress = follow(output.parent, process, output, past)
    except KeyboardInterrupt:
        print(f"\nstopped; finished steps are kept. Resume with:\n  {run.resume}", file=sys.stderr)
        return 130
    finally:
        numbers = (signal.SIGINT, signal.SIGTERM)  # ignored, so that cleaning up is not cut short
        handlers = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        end_processes(run.folder)
        cancel_jobs(run.folder)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if process.returncode == 0:
        write_step_table(run.folder)
        print(f"{len(progress.spans)} steps run" if progress.spans else "nothing to do: every step is up to date")
        return 0
    lines = [failure(output.parent, step) for step in run.steps if step.name in progress.failed]
    if without := without_failed(run, progress.failed):
        lines.append(f"\ncontinues without the transformer {', '.join(without.parameters['missing_members'])}")
        print(*lines, sep="\n", file=sys.stderr)
        return work(without)
    lines = lines or [f"\nSnakemake stopped; last lines of {shown(output)}:", *last_lines(output, 15)]
    print(*lines, f"\nResume with:\n  {run.resume}", sep="\n", file=sys.stderr)
    return process.returncode if process.returncode > 0 else 1
