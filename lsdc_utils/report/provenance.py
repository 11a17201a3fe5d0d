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


def write_provenance(run: str | Path) -> dict[str, Any]:
    """Write and return the provenance of the run in folder `run`, which has its data, tables and weights.

    made: UTC; commit: of this code, with a word where files differ from it; parameters; versions: of every installed
    distribution; data: kind, folder's name, and a fingerprint of its tables; weights: sha256 and commit of each file;
    machine: processor, cores, memory, GPUs, system and Python. But for paths among the parameters, nothing names the
    machine or its user.
    """
    run = Path(run)
    parameters, data = run / "parameters.yml", run / "data.json"
    weights = {file.stem: json.loads(file.read_text()) for file in sorted((run / "weights").glob("*.json"))}
    found = {
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": git_commit(),
        "parameters": yaml.safe_load(parameters.read_text()) if parameters.is_file() else {},
        "data": fingerprint_of(run, json.loads(data.read_text())) if data.is_file() else {},
        "weights": {name: {key: one[key] for key in ("sha256", "git_commit")} for name, one in weights.items()},
        "machine": machine(),
        "versions": dict(sorted((one.name, one.version) for one in metadata.distributions())),
    }
    write_json(run / "provenance.json", found)
    return found


def fingerprint_of(run: Path, data: dict[str, str]) -> dict[str, str]:
    """Kind and name of a run's data folder, and a hash of its tables and of what was read of its headers.

    Pixels are not read for it: a phantom's follow from its name, those of real data are Kaggle's.
    """
    folder = (run / data["data_dir"]).resolve()
    digest = hashlib.sha256()
    for file in (*sorted(folder.glob("*.csv")), run / "tables" / "series.parquet"):
        if file.is_file():
            digest.update(f"{file.name}\0".encode() + file.read_bytes())
    return {"kind": data["kind"], "folder": folder.name, "fingerprint": digest.hexdigest()}


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, memory (GiB), GPUs, system and Python of this machine."""
    names = re.findall(r"^model name\s*: (.*)$", _text("/proc/cpuinfo"), re.MULTILINE)
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())],
        "system": platform.system(),
        "python": platform.python_version(),
    }


def _text(path: str) -> str:
    """What a file holds; nothing where it is not there."""
    file = Path(path)
    return file.read_text() if file.is_file() else ""
