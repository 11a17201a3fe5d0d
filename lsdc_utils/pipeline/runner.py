"""The command line behind run_all.sh: reads profile and arguments, starts Snakemake, and tells what goes on."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
import yaml

from lsdc_utils.files import atomic, git_commit
from lsdc_utils.parallel import usable_cores
from lsdc_utils.pipeline.steps import (
    NOTEBOOK_ORDER,
    NOTEBOOKS,
    ROOT,
    STEP_PARAMETERS,
    Step,
    all_steps,
    declared,
    read_parameters,
    stopped_at,
)

PROFILES = NOTEBOOKS / "profiles"
OUTPUTS = ROOT / "outputs"
BENCHMARKS = ROOT / "tests" / "benchmarks"
NBSTRIPOUT_KEYS = "metadata.papermill cell.metadata.papermill cell.metadata.execution"
RUN_MARK = "LSDC_RUN"  # environment variable of every process of a run: its folder
PARTS = {"spinal": "spinal", "foraminal": "foraminal", "subarticular": "subarticular", "any_severe": "any severe",
         "total": "total"}  # fmt: skip


class UsageError(ValueError):
    """What was asked for cannot be done; the message says what can."""


# ---- parameters ----------------------------------------------------------------------------------------------------


def _converted(key: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`; UsageError where it has another. A lone number makes a list of one."""
    if isinstance(default, list) and not isinstance(value, list):
        value = [value]
    if isinstance(default, float) and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML takes 1e-3 for text
            value = float(value)
    if type(value) is not type(default):
        expected = f"expected {type(default).__name__} like {default!r}"
        raise UsageError(f"{key}: {value!r} is {type(value).__name__}, {expected}")
    if isinstance(default, list) and len({type(item) for item in default}) == 1:
        return [_converted(key, item, default[0]) for item in value]
    if isinstance(default, dict):
        if set(value) != set(default):
            raise UsageError(f"{key}: has the keys {sorted(value)}, expected {sorted(default)}")
        return {name: _converted(f"{key}.{name}", value[name], default[name]) for name in default}
    return value


def parse_override(text: str, defaults: dict[str, Any]) -> tuple[str, Any]:
    """`KEY=VALUE` to key and value in the type of the default; UsageError where key or type is wrong.

    Values are YAML, except that text stays as typed (007, no) and a list may be given as 0,1. A file or folder is
    looked for from where the user stands; the notebooks run elsewhere. Weights may also be a name that they know.
    """
    key, equals, raw = text.partition("=")
    if not equals or key not in defaults:
        near = ", ".join(sorted(defaults))
        raise UsageError(f"{text!r} is no KEY=VALUE with a known key; keys are: {near}")
    if isinstance(defaults[key], str):
        path = Path(raw).expanduser()
        is_path = bool(raw) and (key == "data_dir" or key.endswith("_csv"))
        is_path |= key in ("yolo_model", "vit_encoder_weights") and path.is_file()
        return key, str(path.resolve()) if is_path else raw
    if isinstance(defaults[key], list) and not raw.startswith("["):
        raw = f"[{raw}]"
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: {raw!r} cannot be read: {error}") from error
    return key, _converted(key, value, defaults[key])


def _read_profile(name: str) -> dict[str, Any]:
    file = PROFILES / f"{name}.yml"
    if not file.is_file():
        raise UsageError(f"no profile {name!r}; there are: {', '.join(sorted(p.stem for p in PROFILES.glob('*.yml')))}")
    return yaml.safe_load(file.read_text()) or {}


def load_parameters(profile: str, overrides: list[str] = ()) -> dict[str, Any]:
    """Every parameter of a run: those of profile demo, then what `profile` changes, then KEY=VALUE."""
    parameters = _read_profile("demo")
    for key, value in (_read_profile(profile) if profile != "demo" else {}).items():
        if key not in parameters:
            raise UsageError(f"profile {profile}: unknown key {key!r}")
        parameters[key] = _converted(key, value, parameters[key])
    parameters.update(parse_override(text, parameters) for text in overrides)
    names = set().union(*(declared(notebook) for notebook in NOTEBOOK_ORDER)) - set(STEP_PARAMETERS)
    if names != set(parameters):
        raise UsageError(
            f"profile demo and the notebooks' parameters cells differ in: {sorted(names ^ set(parameters))}"
        )
    if not parameters["folds"] or not set(parameters["folds"]) <= set(range(parameters["n_splits"])):
        raise UsageError(f"folds={parameters['folds']}: expected some of 0 to {parameters['n_splits'] - 1} (n_splits)")
    return parameters


def select_steps(steps: list[Step], asked: str) -> list[Step]:
    """Steps that `asked` names: one step, or all of a notebook by name or number; UsageError where there is none."""
    found = [step for step in steps if asked in (step.name, step.notebook, step.notebook[:2])]
    if not found:
        raise UsageError(f"no step {asked!r}; steps are: {', '.join(step.name for step in steps)}")
    return found


# ---- a run and its processes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What the command line asks for."""

    folder: Path  # outputs/<run>
    parameters: dict[str, Any]
    resume: str  # the command that goes on with this run
    cores: int
    until: str | None = None
    force: tuple[str, ...] = ()
    snakefile: str = "Snakefile"  # in notebooks/
    slurm: bool = False  # each step a job of the cluster

    @property
    def steps(self) -> list[Step]:
        """All steps of the run, in the order of the notebooks."""
        return all_steps(self.parameters)


def shown(path: Path) -> str:
    """A path as a person at the prompt would type it."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("../..") else relative


def visible_gpus() -> list[str]:
    """Indices or UUIDs of the GPUs that jobs may use; none where there is no NVIDIA driver."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [device for device in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if device not in ("", "-1")]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)


def processes_of(folder: Path) -> list[psutil.Process]:
    """Living processes that belong to the run in `folder`, kernels in sessions of their own included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(RUN_MARK) == str(folder):
                found.append(process)
    return found


def end_processes(folder: Path) -> None:
    """End what is left of the run in `folder`, e.g. after its runner was killed: a step would go on and write."""
    while left := processes_of(folder):
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=5)


def cancel_jobs(folder: Path) -> None:
    """Cancel what the run in `folder` last had on a SLURM cluster, and wait for its end: a job would go on and write.

    SLURM kills what does not end by itself, usually after half a minute; a node that is gone is not waited for.
    """
    log = folder / "logs" / "snakemake.log"
    submitted = re.search(r"^SLURM run ID: (\S+)$", log.read_text(), re.MULTILINE) if log.is_file() else None
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
    """Hold the run's folder; UsageError where another runner does. The lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"the run in {shown(folder)} is being worked on by another run_all.sh") from error
        end_processes(folder)
        cancel_jobs(folder)
        for left in (*folder.glob(".writing-*"), *folder.glob("*/.writing-*")):  # by a process that was killed
            if left.is_file():
                left.unlink()
        yield


def forced_steps(run: Run) -> list[Step]:
    """Steps to run whatever their files say: those asked for, and 00 where the data that it recorded is gone."""
    forced = [step for asked in run.force for step in select_steps(run.steps, asked)]
    record = run.folder / "data.json"
    if record.is_file():
        data_dir = run.folder / json.loads(record.read_text())["data_dir"]
        if not data_dir.is_dir():
            forced.append(run.steps[0])
    return forced


def snakemake_command(run: Run, config: Path, gpus: int) -> list[str]:
    """The one call of Snakemake; targets are executed notebooks, so that its counts are counts of steps."""
    targets = select_steps(run.steps, run.until) if run.until else run.steps
    command = [sys.executable, "-m", "snakemake", "--snakefile", NOTEBOOKS / run.snakefile, "--directory", run.folder]
    command += ["--configfile", config, "--cores", run.cores, "--scheduler", "greedy"]
    if run.slurm:  # what runs side by side is for the cluster to say
        command += ["--workflow-profile", PROFILES / "slurm", "--slurm-logdir", run.folder / "logs" / "slurm"]
    else:
        command += ["--resources", f"gpu={gpus}"]
    command += ["--rerun-incomplete", "--rerun-triggers", "mtime", "params", "input", "--nolock", "--nocolor"]
    command += ["--max-checksum-file-size", 2**30]  # a file written again with the same bytes re-runs nothing
    if run.snakefile == "predict.smk":
        command += ["--keep-going"]  # a shard that fails holds up no other
    if forced := forced_steps(run):
        command += ["--forcerun", *(f"notebooks/{step.name}.ipynb" for step in forced)]
    return [str(word) for word in [*command, "--", *(f"notebooks/{step.name}.ipynb" for step in targets)]]


def child_environment(run: Run, gpus: list[str]) -> dict[str, str]:
    """Environment of Snakemake and all that it starts."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, RUN_MARK: str(run.folder)}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    if run.slurm:
        environment.pop("CUDA_VISIBLE_DEVICES", None)  # SLURM tells each job its own
    return environment


# ---- what Snakemake says -------------------------------------------------------------------------------------------


@dataclass
class Progress:
    """State of a run, as read from Snakemake's messages line by line."""

    total: int = 0
    finished: int = 0
    running: dict[str, float] = field(default_factory=dict)  # step -> its start, seconds since the epoch
    reasons: dict[str, str] = field(default_factory=dict)  # step -> why it runs
    failed: list[str] = field(default_factory=list)
    jobs: dict[str, str] = field(default_factory=dict)  # Snakemake's job id -> step
    block: dict[str, str] = field(default_factory=dict)

    def read(self, line: str) -> str | None:
        """Take in one line; return what a person should see of it, if anything."""
        if match := re.match(r"    (log|jobid|reason|message): (.*)$", line):
            return self._read_field(match[1], match[2])
        if match := re.match(r"total +(\d+)$", line):
            self.total = int(match[1])
        elif match := re.match(r"(?:local)?(rule) \w+:$|(Error) in rule \w+", line):
            self.block = {"kind": match[1] or match[2]}
        elif match := re.match(r"Finished jobid: (\d+)", line):
            return self._finish(self.jobs[match[1]])
        return None

    def _read_field(self, name: str, value: str) -> str | None:
        """One field of the paragraph on a job; the job is told about as soon as log and job id are known."""
        known = {"log", "jobid"} <= set(self.block)
        self.block[name] = value
        if not {"log", "jobid"} <= set(self.block):
            return None
        step = re.search(r"logs/(\S+)\.log", self.block["log"])[1]
        if self.block["kind"] == "Error":
            self.running.pop(step, None)
            self.failed.append(step)
            said = self.block.get("message", "None")  # by a cluster, e.g. that its time ran out
            return f"{step} failed" if said == "None" else f"{step} failed: {said}"
        self.jobs[self.block["jobid"]] = step
        self.reasons[step] = self.block.get("reason", "")
        if known:
            return None
        self.running[step] = time.time()
        return f"[{self.finished + len(self.running)}/{self.total}] {step}"

    def _finish(self, step: str) -> str:
        self.finished += 1
        return f"[{self.finished}/{self.total}] {step} done in {clock(time.time() - self.running.pop(step))}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def last_lines(log: Path, n: int = 1) -> list[str]:
    """The last `n` lines of a log with anything on them; of a line drawn over by a progress bar, what was seen last."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)  # colours
    lines = [[part for part in line.split("\r") if part.strip()] for line in text.split("\n")]
    return [parts[-1].rstrip() for parts in lines if parts][-n:]


def status(run: Run, progress: Progress, began: float) -> str:
    """One line on all running steps, each with the last line of its own log."""
    steps = [f"{step}: {' '.join(last_lines(run.folder / 'logs' / f'{step}.log'))}" for step in progress.running]
    return f"{clock(time.time() - began)}  " + " | ".join(steps)


def follow(run: Run, process: subprocess.Popen, output: Path) -> Progress:
    """Tell what goes on until Snakemake ends: each step's start and end, and a line on the running ones.

    At a terminal that line is drawn over every second; elsewhere, as in a log, it is printed every 30 seconds.
    """
    progress, began, told, rest = Progress(), time.time(), time.time(), ""
    terminal = sys.stdout.isatty()
    with output.open(errors="replace") as messages:
        while True:
            ended = process.poll() is not None  # asked before reading, so that nothing said before the end is lost
            *lines, rest = (rest + messages.read()).split("\n")  # the last line may not be whole yet
            for line in lines:
                if message := progress.read(line):
                    print(f"{chr(13) + chr(27) + '[K' if terminal else ''}{clock(time.time() - began):>8}  {message}")
            if terminal:
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\033[K{status(run, progress, began)[:width]}", end="")
            elif time.time() - told > 30 and progress.running:
                told = time.time()
                print(f"  {status(run, progress, began)}")
            sys.stdout.flush()
            if ended:
                print("\r\033[K" if terminal else "", end="")
                return progress
            time.sleep(1.0 if terminal else 0.3)


# ---- what is told at the end ---------------------------------------------------------------------------------------


def failure(run: Run, step: Step) -> str:
    """What a person needs who has to mend a failed step: notebook, cell, the log's end."""
    logs = run.folder / "logs"
    executed, log = logs / f"{step.name}.ipynb", logs / f"{step.name}.log"
    lines = [f"\n{step.name} failed", f"  notebook: notebooks/{step.notebook}.ipynb"]
    if executed.is_file():
        import nbformat

        lines += [f"  as it stopped: {shown(executed)}"]
        number, cell = stopped_at(nbformat.read(executed, as_version=4)) or (0, None)
        if cell:
            lines += [f"  failing cell: number {number}"]
            lines += [f"      {line}" for line in cell.source.splitlines()]
    lines += [f"  last lines of {shown(log)}:"]
    lines += [f"      {line}" for line in last_lines(log, 15)]
    return "\n".join(lines)


def score_table(scores: dict[str, Any]) -> str:
    """The blocks of scores.json as text: test before out of fold, or out of fold alone where test has no labels."""
    titles = {"test": "test studies", "oof": "studies, each graded by models that had not seen it (out of fold)"}
    lines = []
    for name in ("test", "oof"):
        block = scores.get(name)
        if not block:
            continue
        lines += ["", f"Weighted log loss, {block['n_studies']} {titles[name]}; lower is better"]
        skills = block.get("skill") or {}
        lines += [
            f"  {'':22}" + "".join(f"{title:>14}" for title in PARTS.values()) + ("         skill" if skills else "")
        ]
        for model, parts in block["scores"].items():
            line = f"  {model:22}" + "".join(f"{_number(parts[part]):>14}" for part in PARTS)
            lines += [line + (f"{_number(skills[model]['total']):>14}" if model in skills else "")]
        low_high = block.get("interval", {}).get("ensemble", {}).get("total")
        if low_high:
            lines += [f"  ensemble, total: 95 % interval {low_high[0]:.3f} to {low_high[1]:.3f}"]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def tell_result(run: Run) -> None:
    """Print the score table and the report's path, as far as they exist."""
    scores, report = run.folder / "scores.json", run.folder / "report" / "index.html"
    if scores.is_file():
        print(score_table(json.loads(scores.read_text())))
    if report.is_file():
        print(f"\nreport: {report}")


# ---- commands ------------------------------------------------------------------------------------------------------


def dry_run(run: Run) -> int:
    """Say which steps would run and why, and change nothing."""
    with tempfile.TemporaryDirectory() as temporary:
        config = Path(temporary) / "parameters.yml"
        config.write_text(yaml.safe_dump(run.parameters))
        folder = run.folder if run.folder.is_dir() else Path(temporary)
        planned = replace(run, folder=folder)
        command = snakemake_command(planned, config, 0)
        command.insert(command.index("--directory"), "--dry-run")
        done = subprocess.run(command, env=child_environment(planned, []), capture_output=True, text=True)
    if done.returncode:
        print(done.stdout + done.stderr, file=sys.stderr)
        return done.returncode
    progress = Progress()
    for line in (done.stdout + done.stderr).splitlines():
        progress.read(line)
    for step in run.steps:
        if step.name in progress.reasons:
            print(f"would run {step.name}: {progress.reasons[step.name]}")
    print(f"{len(progress.reasons)} of {len(run.steps)} steps would run")
    return 0


def start(run: Run) -> int:
    """Run what has to be run, tell about it and about the result."""
    with locked(run.folder):
        status = work(run)
    if status == 0:
        tell_result(run)
    return status


def tell_costs(run: Run, config: Path) -> None:
    """Say what the trainings of a run on real data will take, before the first of them."""
    if run.slurm or run.parameters.get("phantom", True) or any(run.folder.glob("weights/*.json")):
        return
    command = [sys.executable, "-m", "lsdc_utils.pipeline.costs", str(config)]
    done = subprocess.run(command, env=child_environment(run, []), capture_output=True, text=True, cwd=ROOT)
    print(done.stdout if done.returncode == 0 else f"costs could not be estimated: {done.stderr.strip()[-300:]}")


def work(run: Run) -> int:
    """Let Snakemake run what has to be run in a folder that is held, and tell about it; the exit status."""
    gpus = [] if run.slurm else visible_gpus()
    config, output = run.folder / "parameters.yml", run.folder / "logs" / "snakemake.log"
    output.parent.mkdir(exist_ok=True)
    with atomic(config) as temporary:
        temporary.write_text(yaml.safe_dump(run.parameters, sort_keys=False))
    place = "jobs of the SLURM cluster" if run.slurm else f"{run.cores} cores, {len(gpus)} GPUs"
    print(f"{shown(run.folder)}: {place}; logs: {shown(output.parent)}/<step>.log")
    tell_costs(run, config)
    try:
        with output.open("w") as log:
            command = snakemake_command(run, config, len(gpus))
            process = subprocess.Popen(command, env=child_environment(run, gpus), stdout=log, stderr=log, cwd=ROOT)
        progress = follow(run, process, output)
    except KeyboardInterrupt:
        print(f"\nstopped; what is finished is kept. Go on with:\n  {run.resume}", file=sys.stderr)
        return 130
    finally:
        kept = {one: signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)}
        end_processes(run.folder)  # whole, however often somebody asks for the end
        cancel_jobs(run.folder)
        for one, handler in kept.items():
            signal.signal(one, handler)
    if process.returncode == 0:
        print(f"{progress.finished} steps run" if progress.finished else "nothing to do: every step is up to date")
        return 0
    failed = [step for step in run.steps if step.name in progress.failed]
    told = [failure(run, step) for step in failed] or ["\nSnakemake stopped:", *last_lines(output, 15)]
    print(*told, f"\nGo on with:\n  {run.resume}", sep="\n", file=sys.stderr)
    return process.returncode if process.returncode > 0 else 1


def predict(arguments: list[str]) -> int:
    """Grade every study of a folder with the weights of a finished run."""
    made = argparse.ArgumentParser("./run_all.sh predict", description="Grade every study of a folder.")
    made.add_argument("folder", type=Path, metavar="DIR", help="in the competition's layout, or any folder of DICOM")
    made.add_argument("--run", required=True, metavar="NAME", help="a finished run, outputs/NAME, or what `pack` made")
    made.add_argument(
        "--out", type=Path, metavar="DIR", help="where grades go (default: outputs/NAME/predict/<folder>)"
    )
    made.add_argument("--cores", type=int, default=usable_cores(), help="processor cores (default: all)")
    asked = made.parse_args(arguments)
    archive = Path(asked.run) if asked.run.endswith(".zip") else None
    folder, trained = asked.folder.resolve(), OUTPUTS / (archive.stem if archive else asked.run)
    out = (asked.out or trained / "predict" / folder.name).resolve()
    if not folder.is_dir():
        raise UsageError(f"{asked.folder}: no such folder")
    if archive and not archive.is_file():
        raise UsageError(f"--run {asked.run}: no such file")
    if not archive and not trained.is_dir():
        runs = ", ".join(sorted(path.parent.name for path in OUTPUTS.glob("*/blend.json"))) or "none yet"
        raise UsageError(f"--run {asked.run}: there is no such run; finished runs: {runs}")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {asked.out}: is a file, where a folder is expected")
    if out.is_relative_to(folder):
        raise UsageError(f"grades would go to {shown(out)}, inside {asked.folder}: give another folder by --out")
    if (out / "weights").is_dir():
        raise UsageError(f"grades would go to {shown(out)}, over those of the run there: give another folder by --out")
    if asked.cores < 1:
        raise UsageError(f"--cores {asked.cores}: expected 1 or more")
    from lsdc_utils.pipeline import predict as prediction
    from lsdc_utils.pipeline.pack import PackError, unpack

    resume = ["./run_all.sh", "predict", folder, "--run", asked.run, "--out", out, "--cores", asked.cores]
    with locked(out):
        try:
            trained = unpack(archive, out / "models") if archive else trained
            parameters = prediction.prepare(folder, trained.resolve(), out, asked.cores)
        except (prediction.PredictError, PackError) as error:
            print(f"run_all.sh: {error}", file=sys.stderr)
            return 1
        run = Run(out, parameters, shlex.join(map(str, resume)), asked.cores, snakefile="predict.smk")
        status = work(run)
        if status == 0:
            print(f"\n{prediction.collect(out, parameters['n_shards'])}\n\ngrades: {out}/grades.csv")
    return status


def validate(arguments: list[str]) -> int:
    """Check a data folder: 0 where it can be used, 1 where not."""
    made = argparse.ArgumentParser("./run_all.sh validate", description="Check a data folder and print findings.")
    made.add_argument("folder", type=Path, metavar="DIR", help="in the competition's layout, or any folder of DICOM")
    made.add_argument("--out", type=Path, metavar="FILE", help="write the findings to this csv too")
    asked = made.parse_args(arguments)
    if not asked.folder.is_dir():
        raise UsageError(f"{asked.folder}: no such folder")
    from lsdc_utils.data import checks

    return checks.main(asked.folder.resolve(), asked.out)


def export(arguments: list[str]) -> int:
    """Write the grades of a finished run's studies for other systems."""
    made = argparse.ArgumentParser("./run_all.sh export", description="Write grades as CSV and DICOM SR, by study.")
    made.add_argument("studies", metavar="STUDY", type=int, nargs="*", help="study ids (default: the test studies)")
    made.add_argument("--run", default="demo", metavar="NAME", help="a finished run: outputs/NAME (default: demo)")
    made.add_argument("--out", type=Path, metavar="DIR", help="where they go (default: outputs/NAME/exports)")
    asked = made.parse_args(arguments)
    base, _ = _finished_run(asked.run)
    from lsdc_utils.export import studies
    from lsdc_utils.grading.run_tables import RunError

    out = (asked.out or base / "exports").resolve()
    try:
        written = studies.export_studies(base, asked.studies or None, out)
    except (RunError, studies.ExportError) as error:
        raise UsageError(str(error)) from error
    for line in written[written["problem"] != ""].itertuples():
        print(f"study {line.study_id}: {line.problem}", file=sys.stderr)
    count = f"{len(written)} {'study' if len(written) == 1 else 'studies'}"
    print(f"{count} exported to {shown(out)}, with {written['images_written'].sum()} key images")
    return 0


def pack(arguments: list[str]) -> int:
    """Make one archive of a finished run's models, which `predict` takes on another machine."""
    made = argparse.ArgumentParser("./run_all.sh pack", description="Make one archive of a finished run's models.")
    made.add_argument("--run", default="demo", metavar="NAME", help="a finished run: outputs/NAME (default: demo)")
    made.add_argument("--out", type=Path, metavar="FILE", help="the archive (default: outputs/NAME/NAME.zip)")
    asked = made.parse_args(arguments)
    base, _ = _finished_run(asked.run)
    from lsdc_utils.pipeline.pack import PackError, pack_run

    out = (asked.out or base / f"{asked.run}.zip").resolve()
    if out.suffix != ".zip":
        raise UsageError(f"--out {asked.out}: expected a name that ends in .zip")
    try:
        names = pack_run(base, out)
    except PackError as error:
        raise UsageError(str(error)) from error
    print(f"{shown(out)}: {len(names)} files, {out.stat().st_size / 2**20:.0f} MiB")
    return 0


def kaggle_bundle(arguments: list[str]) -> int:
    """Write what grades Kaggle's hidden studies with a finished run: a dataset and a notebook to upload."""
    made = argparse.ArgumentParser(
        "./run_all.sh kaggle-bundle",
        description="Write a dataset and a notebook that grade Kaggle's hidden studies without a network. Wheels of "
        "what Kaggle's image lacks are fetched by pip, for which a network is needed here; those there are kept.",
    )
    made.add_argument("--run", default="demo", metavar="NAME", help="a finished run: outputs/NAME (default: demo)")
    made.add_argument("--out", type=Path, metavar="DIR", help="where they go (default: outputs/NAME/kaggle)")
    made.add_argument("--user", metavar="NAME", help="your name on Kaggle (default: that of ~/.kaggle/kaggle.json)")
    asked = made.parse_args(arguments)
    base, _ = _finished_run(asked.run)
    from lsdc_utils.pipeline import kaggle
    from lsdc_utils.pipeline.pack import PackError

    out, user = (asked.out or base / "kaggle").resolve(), asked.user or kaggle.user_here()
    try:
        wheels = kaggle.write_bundle(base, out, user)
    except (PackError, kaggle.BundleError) as error:
        raise UsageError(str(error)) from error
    print(f"{shown(out)}: models, package and {len(wheels)} wheels. Upload them with\n")
    print(f"  kaggle datasets create -p {shown(out / 'dataset')} --dir-mode zip")
    print(f"  kaggle kernels push -p {shown(out / 'notebook')}")
    if user == kaggle.USER:
        print(f"\nPut your name on Kaggle for {user} in both folders' metadata, or give it by --user.")
    return 0


def bench(arguments: list[str]) -> int:
    """Run the benchmarks, or those with NAME in their names, one after the other."""
    made = argparse.ArgumentParser("./run_all.sh bench", description="Measure speed; a script prints its own ratios.")
    made.add_argument("name", metavar="NAME", nargs="?", default="", help="only scripts with this in their name")
    asked = made.parse_args(arguments)
    there = sorted(path for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text())
    scripts = [path for path in there if asked.name in path.stem]
    if not scripts:
        raise UsageError(f"no benchmark {asked.name!r}; there are: {', '.join(path.stem for path in there)}")
    failed = []
    for script in scripts:
        print(f"\n{script.stem}", flush=True)
        if subprocess.run([sys.executable, script], cwd=ROOT).returncode:
            failed.append(script.stem)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def ablate(arguments: list[str]) -> int:
    """Take ingredients away from a finished run, one at a time, and say what each is worth."""
    made = _experiment_parser("ablate", "Take ingredients away from a finished run, one at a time.")
    made.add_argument("names", metavar="NAME", nargs="*", help="only these of notebooks/ablations.yml")
    asked = made.parse_args(arguments)
    from lsdc_utils.pipeline import experiments

    base, parameters = _finished_run(asked.run)
    known = experiments.read_ablations()
    if unknown := set(asked.names) - {ablation.name for ablation in known}:
        names = ", ".join(ablation.name for ablation in known)
        raise UsageError(f"no ablation {', '.join(sorted(unknown))}; there are: {names}")
    tried = []
    for ablation in (one for one in known if not asked.names or one.name in asked.names):
        folder = base.with_name(f"{base.name}-{ablation.name}")
        experiments.begin(base, folder)
        if status := _experiment(folder, _changed(parameters, ablation.change), ["ablate", *arguments], asked.cores):
            return status
        tried.append((ablation, folder))
    return _tell_experiments(base / "ablation.csv", experiments.ablation_table(base, tried), asked.cores)


def curve(arguments: list[str]) -> int:
    """Repeat a finished run with other numbers of training studies, and say what more studies are worth."""
    made = _experiment_parser("curve", "Repeat a finished run on a phantom with other numbers of training studies.")
    made.add_argument("sizes", metavar="N", type=int, nargs="*", default=[40, 80, 160, 320], help="training studies")
    asked = made.parse_args(arguments)
    from lsdc_utils.pipeline import experiments

    base, parameters = _finished_run(asked.run, of_phantom=True)
    runs = []
    for n_train in asked.sizes:
        own = n_train == parameters["n_train"]
        folder = base if own else base.with_name(f"{base.name}-n{n_train}")
        changed = _changed(parameters, {"n_train": n_train})
        if not own and (status := _experiment(folder, changed, ["curve", *arguments], asked.cores)):
            return status
        runs.append((n_train, folder))
    return _tell_experiments(base / "curve.csv", experiments.curve_table(runs), asked.cores)


def noise(arguments: list[str]) -> int:
    """Repeat a finished run with wrong labels planted, then with those kept out of training that its models doubt."""
    made = _experiment_parser(
        "noise", "Plant wrong labels, see whether they are found, and train without the suspects."
    )
    made.add_argument(
        "share", metavar="SHARE", type=float, nargs="?", default=0.05, help="wrong labels (default: 0.05)"
    )
    asked = made.parse_args(arguments)
    if not 0 < asked.share < 1:
        raise UsageError(f"noise {asked.share}: expected a share of labels between 0 and 1")
    from lsdc_utils.pipeline import experiments

    base, parameters = _finished_run(asked.run, of_phantom=True)
    if not parameters["n_test"]:
        raise UsageError(f"--run {asked.run}: has no test studies, on which what is gained could be measured")
    wrong = base.with_name(f"{base.name}-wrong")
    left_out = base.with_name(f"{base.name}-wrong-left_out")
    changed = _changed(parameters, {"wrong_labels": asked.share})
    if status := _experiment(wrong, changed, ["noise", *arguments], asked.cores):
        return status
    experiments.begin(wrong, left_out)
    changed = _changed(changed, {"suspects_csv": str(wrong / "suspect_labels.csv")})
    if status := _experiment(left_out, changed, ["noise", *arguments], asked.cores):
        return status
    return _tell_experiments(base / "noise.csv", experiments.noise_table(base, wrong, left_out), asked.cores)


def _experiment_parser(command: str, what: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(f"./run_all.sh {command}", description=what)
    made.add_argument("--run", default="demo", metavar="NAME", help="a finished run: outputs/NAME (default: demo)")
    made.add_argument("--cores", type=int, default=usable_cores(), help="processor cores (default: all)")
    return made


def _finished_run(name: str, of_phantom: bool = False) -> tuple[Path, dict[str, Any]]:
    """Folder and parameters of a run that has its scores; UsageError where there is none of that name, or where its
    data should be a phantom's, which can be drawn otherwise, and are not."""
    base = OUTPUTS / name
    if not (base / "scores.json").is_file():
        raise UsageError(f"--run {name}: there is no such finished run; make it by ./run_all.sh --run {name}")
    parameters = read_parameters(base)
    if of_phantom and (parameters["data_dir"] or not parameters["phantom"]):
        raise UsageError(f"--run {name}: its data are given; only a phantom can be drawn otherwise")
    return base, parameters


def _changed(parameters: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """The parameters with some changed; of a value by condition, `change` may name some conditions alone."""
    changed = dict(parameters)
    for key, value in change.items():
        if key not in parameters:
            raise UsageError(f"ablation: unknown parameter {key!r}")
        old = parameters[key]
        changed[key] = _converted(key, {**old, **value} if isinstance(old, dict) else value, old)
    return changed


def _experiment(folder: Path, parameters: dict[str, Any], command: list[str], cores: int) -> int:
    """Run up to the scores; the exit status."""
    resume = shlex.join(["./run_all.sh", *command])
    with locked(folder):
        return work(Run(folder, parameters, resume, cores, until="05_ensemble_inference"))


def _tell_experiments(file: Path, table: Any, cores: int) -> int:
    """Write a table of experiments beside its run, make the run's report again, which shows it, and print it."""
    with atomic(file) as temporary:
        table.assign(commit=git_commit()).to_csv(temporary, index=False)
    base = file.parent
    with locked(base):
        if status := work(Run(base, read_parameters(base), f"./run_all.sh --run {base.name}", cores)):
            return status
    print(f"\n{table.to_string(index=False, float_format='{:.3f}'.format, na_rep='')}\n\n{shown(file)}")
    return 0


def test(arguments: list[str]) -> int:
    """Run the tests; those that take minutes each only where all are asked for."""
    made = argparse.ArgumentParser("./run_all.sh test", description="Run the tests.")
    made.add_argument("--all", action="store_true", help="the slow proofs too")
    everything = made.parse_args(arguments).all
    processes = min(usable_cores(), 4)  # each of which takes some GiB; a file's tests share one
    command = [sys.executable, "-m", "pytest", "-n", str(processes), "--dist", "loadfile"]
    command += [] if everything else ["-m", "not slow"]
    return subprocess.run(command, cwd=ROOT).returncode


def lab(arguments: list[str]) -> int:
    """Open JupyterLab in notebooks/, having set up the filter that keeps notebooks' outputs out of git."""
    argparse.ArgumentParser("./run_all.sh lab", description="Open JupyterLab.").parse_args(arguments)
    clean = shlex.join([sys.executable, "-m", "nbstripout", "--keep-id", "--extra-keys", NBSTRIPOUT_KEYS])
    for key, value in {"clean": clean, "smudge": "cat", "required": "true"}.items():
        done = subprocess.run(["git", "-C", ROOT, "config", f"filter.nbstripout.{key}", value], capture_output=True)
        if done.returncode:
            print("not a git clone: the filter for notebooks is not installed", file=sys.stderr)
            break
    return open_jupyterlab()


def open_jupyterlab() -> int:
    """JupyterLab in notebooks/, with the kernel of this environment; returns when it is closed."""
    environment = {**os.environ, "JUPYTER_PREFER_ENV_PATH": "1"}
    environment.pop("JUPYTER_PATH", None)
    start = "--LabApp.default_url=/lab/tree/start.ipynb"  # what there is to open
    command = [sys.executable, "-m", "jupyterlab", f"--notebook-dir={NOTEBOOKS}", start]
    return subprocess.run(command, env=environment).returncode


def pins(arguments: list[str]) -> int:
    """Resolve the pins of requirements.txt anew, and say what changes."""
    made = argparse.ArgumentParser("./run_all.sh pins", description="Resolve requirements.txt anew; say what changes.")
    made.add_argument("--write", action="store_true", help="write the new pins to requirements.txt")
    asked = made.parse_args(arguments)
    from lsdc_utils.pipeline.pins import PinError, renew

    try:
        print(renew(asked.write))
    except PinError as error:
        print(f"run_all.sh: pip found no versions that go together:\n{error}", file=sys.stderr)
        return 1
    return 0


COMMANDS: dict[str, tuple[Callable[[list[str]], int], str, str]] = {  # what runs it, its arguments, what it does
    "validate": (validate, "DIR", "check a data folder; print findings, exit 1 where it cannot be used"),
    "predict": (predict, "DIR --run NAME", "grade every study of a folder with a finished run, or with what pack made"),
    "export": (export, "[STUDY ...]", "write grades of a finished run as CSV and DICOM SR, a folder a study"),
    "pack": (pack, "--run NAME", "make one archive of a finished run's models, for predict on another machine"),
    "kaggle-bundle": (
        kaggle_bundle,
        "--run NAME",
        "write a dataset and a notebook that grade the hidden studies on Kaggle",
    ),
    "ablate": (ablate, "[NAME ...]", "take ingredients away from a finished run, one at a time; what each is worth"),
    "curve": (curve, "[N ...]", "repeat a finished run with N training studies each; what more of them are worth"),
    "noise": (noise, "[SHARE]", "plant wrong labels in the phantom, find them, train without the suspects"),
    "bench": (bench, "[NAME]", "measure the speed of reading, conversion, resampling and training"),
    "test": (test, "[--all]", "run the tests; --all: the slow proofs too"),
    "pins": (pins, "[--write]", "resolve the pinned versions anew and say what changes"),
    "lab": (lab, "", "open JupyterLab in the environment, with a start page of the notebooks"),
}


def command_table() -> str:
    """A line a command, for --help."""
    lines = [("[KEY=VALUE ...]", "run the pipeline, as far as it has not run yet (with the options above)")]
    lines += [(f"{name} {arguments}".strip(), what) for name, (_, arguments, what) in COMMANDS.items()]
    width = max(len(call) for call, _ in lines)
    return "\n".join(f"  {call:{width}}  {what}" for call, what in lines)


def parser() -> argparse.ArgumentParser:
    """Arguments of a run, the default command."""
    made = argparse.ArgumentParser(
        "./run_all.sh",
        description="Run the pipeline, as far as it has not run yet.",
        epilog=f"commands, each with its own --help:\n{command_table()}\n\nsteps are named by notebook "
        "(03_train_yolo), its number (03) or in full (03_train_yolo_scs_fold0)",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("overrides", metavar="KEY=VALUE", nargs="*", help="a parameter of notebooks/profiles/demo.yml, e.g. folds=0")
    add("--profile", default="demo", help="values in notebooks/profiles/PROFILE.yml (default: demo)")
    add("--data", type=Path, metavar="DIR", help="a folder in the competition's layout (default: a phantom is written)")
    add("--run", metavar="NAME", help="results go to outputs/NAME (default: the profile's name)")
    add("--cores", type=int, default=usable_cores(), help="processor cores to use (default: all)")
    add("--until", metavar="STEP", help="stop after this step")
    add("--force", metavar="STEP", action="append", default=[], help="run this step again, and what depends on it")
    how = "submit each step as a job of the SLURM cluster, as notebooks/profiles/slurm/ says"
    add("--slurm", action="store_true", help=how)
    add("--dry-run", action="store_true", help="say which steps would run and why")
    return made


def run_from(arguments: list[str]) -> tuple[Run, bool]:
    """The run that the arguments ask for, and whether only to say what it would do; UsageError where they are wrong."""
    asked = parser().parse_intermixed_args(arguments)
    parameters = load_parameters(asked.profile, asked.overrides)
    if asked.data:
        if not asked.data.is_dir():
            raise UsageError(f"--data {asked.data}: no such folder")
        parameters["data_dir"] = str(asked.data.resolve())
    name = asked.run or asked.profile
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name) or name in ("data", "sample"):
        raise UsageError(f"--run {name}: expected a plain name for a folder under outputs/, other than data and sample")
    if asked.cores < 1:
        raise UsageError(f"--cores {asked.cores}: expected 1 or more")
    resume = ["./run_all.sh", "--profile", asked.profile, "--run", name, "--cores", str(asked.cores), *asked.overrides]
    resume += ["--data", str(asked.data.resolve())] if asked.data else []
    resume += ["--until", asked.until] if asked.until else []
    resume += ["--slurm"] if asked.slurm else []
    run = Run(
        OUTPUTS / name, parameters, shlex.join(resume), asked.cores, asked.until, tuple(asked.force), slurm=asked.slurm
    )
    for step in (*run.force, *([run.until] if run.until else [])):
        select_steps(run.steps, step)
    return run, asked.dry_run


def main(arguments: list[str]) -> int:
    """Entry point; returns the exit status."""
    try:
        if arguments and arguments[0] in COMMANDS:
            return COMMANDS[arguments[0]][0](arguments[1:])
        run, only_say = run_from(arguments)
        return dry_run(run) if only_say else start(run)
    except UsageError as error:
        print(f"run_all.sh: {error}", file=sys.stderr)
        return 2


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main(sys.argv[1:]))
