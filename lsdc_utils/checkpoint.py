"""Where a training stands, kept after each epoch: a training that was killed goes on from its last whole epoch."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lsdc_utils.files import atomic


def fingerprint(*parts: Any) -> str:
    """One short name for all that a training depends on: arrays, bytes, and anything that JSON can say."""
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


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training in a folder of its own, replaced as a whole after each epoch.

    It is no pickle: tensors as safetensors, everything else as JSON in its header. `key` is the training's
    `fingerprint`; what another training left is not taken for this one's.
    """

    folder: Path
    key: str

    @property
    def file(self) -> Path:
        """Where it lies."""
        return self.folder / "checkpoint.safetensors"

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state`: tensors, numbers, texts and None in dicts (keys text or whole numbers) and lists, nested."""
        tensors: dict[str, torch.Tensor] = {}
        header = {"key": self.key, "state": json.dumps(_split(state, tensors))}
        with atomic(self.file) as temporary:
            save_file(tensors, temporary, header)

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last; None where there is none of this training, or none that can be read."""
        if not self.file.is_file():
            return None
        try:
            with safe_open(self.file, "pt") as file:
                header = file.metadata() or {}
                if header.get("key") != self.key:  # of other settings, data or code
                    return None
                return _join(json.loads(header["state"]), {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            print(f"{self.file} cannot be read ({error}): this training begins anew", flush=True)
            return None


def _split(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors`; a dict becomes a list of pairs, so that whole numbers stay."""
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _split(one, tensors)] for key, one in value.items()]}
    if isinstance(value, list | tuple):
        return [_split(one, tensors) for one in value]
    return value


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What `_split` took apart, tuples as lists."""
    if isinstance(value, list):
        return [_join(one, tensors) for one in value]
    if isinstance(value, dict):
        return tensors[value["tensor"]] if "tensor" in value else {k: _join(v, tensors) for k, v in value["dict"]}
    return value


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser its state back, each tensor laid out in memory as its parameter, as fused steps expect."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)


def forget(folder: str | Path) -> None:
    """Remove the folder of a training whose weights are saved."""
    shutil.rmtree(folder, ignore_errors=True)
