"""The state of a training after each epoch, from which a stopped training resumes."""

import hashlib
import json
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lsdc_utils.files import atomic


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


@dataclass(frozen=True)
class Checkpoint:
    """The file of one training in a folder of its own, replaced as a whole after each epoch.

    `key` is the training's `fingerprint`; the state of another training is ignored. Loading executes no code: torch
    reads weights only.
    """

    folder: Path
    key: str

    @property
    def file(self) -> Path:
        """Path of the file."""
        return self.folder / "checkpoint.pt"

    def save(self, state: dict[str, Any]) -> None:
        """Keep `state`: tensors, numbers, texts and None in nested dicts and lists."""
        with atomic(self.file) as temporary:
            torch.save({"key": self.key, "state": state}, temporary)

    def load(self) -> dict[str, Any] | None:
        """The state that was saved last, on the CPU; None if there is none of this training, or the file is damaged."""
        if not self.file.is_file():
            return None
        try:
            saved = torch.load(self.file, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, OSError, EOFError) as error:
            print(f"{self.file} cannot be read ({error}): the training starts from the beginning", flush=True)
            return None
        return saved["state"] if saved["key"] == self.key else None  # another key: other settings, data or code


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Give an optimiser its state back, each tensor in the memory layout of its parameter, as fused steps expect."""
    optimizer.load_state_dict(state)
    for parameter, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                values[name] = torch.empty_like(parameter).copy_(value)
