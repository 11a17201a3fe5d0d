"""What it takes to repeat a run: code, parameters, versions, data and machine, as `outputs/<run>/provenance.json`."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml

from lsdc_utils.files import git_commit, write_json
from lsdc_utils.parallel import usable_cores
from lsdc_utils.report.run import Run

PACKAGES = ("torch", "torchvision", "ultralytics", "timm", "numpy", "pandas", "pydicom", "snakemake", "papermill")
SEEDS = ("phantom_seed", "seed", "n_splits", "folds")


def write_provenance(run: str | Path) -> dict[str, Any]:
    """Write and return the provenance of the run in folder `run`, which has its data, tables and weights.

    Time (UTC), commit ('with changes' if the working tree is dirty), parameters, versions of all installed
    distributions, fingerprint of the data, sha256 and commit of each weights file, and the machine. Except for paths
    among the parameters, nothing names the machine or its user.
    """
    run = Path(run)
    parameters, data = run / "parameters.yml", run / "data.json"
    weights = {file.stem: json.loads(file.read_text()) for file in sorted((run / "weights").glob("*.json"))}
    content = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git_commit(),
        "parameters": yaml.safe_load(parameters.read_text()) if parameters.is_file() else {},
        "data": fingerprint_of(run, json.loads(data.read_text())) if data.is_file() else {},
        "weights": {name: {key: each[key] for key in ("sha256", "git_commit")} for name, each in weights.items()},
        "machine": machine(),
        "versions": dict(sorted((package.name, package.version) for package in metadata.distributions())),
    }
    write_json(run / "provenance.json", content)
    return content


def fingerprint_of(run: Path, data: dict[str, str]) -> dict[str, str]:
    """Kind and name of a run's data folder, and a hash of its tables and of the headers that were read.

    Pixels are left out: a phantom's follow from its name, those of the real data are the competition's.
    """
    folder = (run / data["data_dir"]).resolve()
    digest = hashlib.sha256()
    for file in (*sorted(folder.glob("*.csv")), run / "tables" / "series.parquet"):
        if file.is_file():
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return {"kind": data["kind"], "folder": folder.name, "fingerprint": digest.hexdigest()}


def machine() -> dict[str, Any]:
    """Processor, usable cores, memory (GiB), GPUs, system and Python of this machine."""
    cpu = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.*)$", cpu.read_text() if cpu.is_file() else "", re.MULTILINE)
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        "system": platform.system(),
        "python": platform.python_version(),
    }


def provenance(run: Run) -> dict[str, str]:
    """The origin of a run as label -> text, from its provenance.json; FileNotFoundError where it has no report yet."""
    content = json.loads((run.folder / "provenance.json").read_text())
    seeds = [f"{key} {run.parameters[key]}" for key in SEEDS if key in run.parameters]
    head, *changes = content["commit"].split(" ", 1)
    machine, data = content["machine"], content["data"]
    gpus = "".join(f", {name}" for name in machine["gpus"])
    return {
        "Made": content["made"],
        "Commit": " ".join([head[:12], *changes]),
        "Data": f"{data['kind']} ({data['folder']}), tables {data['fingerprint'][:12]}" if data else "unknown",
        "Seeds and folds": ", ".join(seeds) or "not recorded",
        "Versions": ", ".join(f"{name} {content['versions'].get(name, '?')}" for name in PACKAGES),
        "Machine": f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpus}; "
        f"{machine['system']}, Python {machine['python']}",
    }
