"""Where a training starts and ends: its own last epochs, or the weights of another run; weights with a .json."""

import hashlib
import json
import shutil
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lsdc_utils.files import atomic, git_commit, sha256, write_json

FREE, SHARE = 10.0, 0.01  # seconds that writing may take, so that short trainings keep every epoch, and of longer ones


def fingerprint(*parts: Any) -> str:
    """A short name for everything that a training depends on: arrays, bytes, and whatever JSON can hold."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype}{part.shape}".encode())
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        elif not isinstance(part, bytes):
            part = json.dumps(part, sort_keys=True).encode()
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:20]


def save_weights(network: torch.nn.Module, path: str | Path, about: dict[str, Any], *packages: str) -> None:
    """Write a network's weights as safetensors, and what `describe` writes beside them."""
    with atomic(path) as temporary:
        save_file({name: value.cpu().contiguous() for name, value in network.state_dict().items()}, temporary)
    describe(Path(path), about, "torch", "numpy", "safetensors", *packages)


def describe(path: Path, about: dict[str, Any], *packages: str) -> None:
    """Write the .json beside weights: `about`, versions of packages, the commit and the checksum of the weights."""
    versions = {name: version(name) for name in packages}
    about = {**about, "versions": versions, "git_commit": git_commit(), "sha256": sha256(path)}
    write_json(path.with_suffix(".json"), about)


def described(path: Path) -> dict[str, Any]:
    """What the .json beside weights says; ValueError if they are not the file that it describes."""
    about = json.loads(path.with_suffix(".json").read_text())
    if sha256(path) != about["sha256"]:
        raise ValueError(f"{path} is not the file that {path.stem}.json describes (sha256 differs)")
    return about


def start_weights(folder: str | Path, name: str, fold: int = -1) -> Path:
    """The weights of a model (`yolo_scs`, `vit3d`, ...) in the folder of another run or of packed models: of this fold,
    else its first. ValueError if there are none, or if they are not the file that the .json beside them describes."""
    first, own = (lambda file: (len(file.stem), file.name)), f"{name}_fold{fold}"
    files = sorted(sorted(Path(folder).glob(f"weights/{name}_fold*"), key=first), key=lambda file: file.stem != own)
    for file in (file for file in files if file.suffix in (".pt", ".safetensors")):
        described(file)
        return file
    raise ValueError(f"{folder} has no weights of {name}")


def points_source(run_dir: str | Path, points_from: str) -> Path:
    """The folder of the models that a run takes its points from: the ready-made ones beside it, unless it names one."""
    return Path(points_from or Path(run_dir).parent / "pretrained")


def take_weights(file: Path, target: Path, fold: int, basis: str) -> dict[str, Any]:
    """Copy a model of another run as that of a fold; returns what the .json beside it says: also from which run
    (`taken_from`) and on what that was trained (`basis`, see `grading.basis`), instead of its studies."""
    about = json.loads(file.with_suffix(".json").read_text())
    about |= {"fold": fold, "taken_from": file.parents[1].name, "basis": basis}
    about.pop("studies", None)
    with atomic(target) as temporary:
        shutil.copyfile(file, temporary)
    write_json(target.with_suffix(".json"), about)
    return about


@dataclass
class Checkpoint:
    """The file of one training in a folder of its own: tensors as safetensors, all else as JSON in the header.
    `key`: the training's `fingerprint`; the state of another training is ignored."""

    folder: Path
    key: str
    began: float = field(default_factory=time.monotonic)
    spent: float = 0.0  # seconds of all saves

    @property
    def file(self) -> Path:
        """Path of the file."""
        return self.folder / "checkpoint.safetensors"

    def keep(self, state: dict[str, Any], last: bool) -> None:
        """Save after the `last` epoch, and whenever the time spent on saving is within `FREE` and `SHARE`."""
        if last or self.spent <= FREE + SHARE * (time.monotonic() - self.began):
            self.save(state)

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state`: tensors, numbers, texts and None in nested dicts (keys: text or whole numbers) and lists."""
        start, tensors = time.monotonic(), {}
        header = {"key": self.key, "state": json.dumps(_split(state, tensors))}
        with atomic(self.file) as temporary:
            save_file(tensors, temporary, header)
        self.spent += time.monotonic() - start

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None if there is none of this training, or the file is damaged."""
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "pt") as file:
                header = file.metadata() or {}
                if header.get("key") != self.key:  # of other settings, data or code
                    return None
                return _join(json.loads(header["state"]), file)
        except (SafetensorError, OSError) as error:
            print(f"{self.file} cannot be read ({error}): the training starts from the beginning", flush=True)
            return None


def _split(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors`; a dict becomes a list of pairs, so that whole numbers stay."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _split(item, tensors)] for key, item in value.items()]}
    return [_split(item, tensors) for item in value] if isinstance(value, list | tuple) else value


def _join(value: Any, file: Any) -> Any:
    """What `_split` took apart, with the tensors of an open file; tuples become lists."""
    if isinstance(value, list):
        return [_join(item, file) for item in value]
    if isinstance(value, dict):
        tensor = value.get("tensor")
        return file.get_tensor(tensor) if tensor else {key: _join(item, file) for key, item in value["dict"]}
    return value


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser its state back, each tensor in the memory layout of its parameter, as fused steps expect."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
