"""What a detector sees and what its classes mean.

Two class schemes. `sided` is the published one: a class for each condition, side, level and severity (30 for nfn, 15
for scs, 30 for ss). `seen` asks for no more than an image shows: level and severity on sagittal series (15), severity
alone on axial ones (3). Sides then come from patient coordinates and axial levels from the canal points of the scs
detector, so the same picture is never asked to be two classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch

from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVELS, SEVERITIES

SCHEMES = ("seen", "sided")


class DetectorError(ValueError):
    """Settings, labels or weights that a detector cannot work with; the message says which and why."""


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector sees and what its classes mean; kept beside its weights."""

    condition: str  # nfn, scs or ss
    scheme: str  # 'seen' or 'sided'
    strip: tuple[float, float, float, float]  # left, right, top, bottom as fractions of the image
    size: tuple[int, int]  # rows and columns of the network's input, multiples of 32
    neighbours: bool  # channels are the slices before, at and behind; else the same slice thrice
    box_mm: float  # side of a box
    # How it predicts, out of fold and on test studies alike:
    views: tuple[tuple[float, bool], ...] = ((1.0, False),)  # scale, and whether flipped left to right
    exchange: bool = True  # a flipped axial image shows the other side: change the classes' sides back
    everywhere: bool = False  # look at all slices, not only where the condition can be
    power: float = 2.0  # of evidence, see `LevelEvidence`; fitted on out-of-fold findings

    def __post_init__(self) -> None:
        if self.condition not in GROUPS or self.scheme not in SCHEMES:
            raise DetectorError(f"no detector for condition {self.condition!r} with scheme {self.scheme!r}")
        if any(side % 32 or side <= 0 for side in self.size):
            raise DetectorError(f"size {self.size} of detector {self.condition}: both must be multiples of 32")
        left, right, top, bottom = self.strip
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise DetectorError(
                f"strip {self.strip} of detector {self.condition}: need 0 <= left < right <= 1 and so on"
            )
        if self.condition == "nfn" and self.scheme == "seen" and any(flip for _, flip in self.views):
            raise DetectorError("detector nfn sees left and right alike: a flipped view would be the view itself")


def config_from(values: dict[str, Any]) -> DetectorConfig:
    """A config from JSON or a notebook's parameters, where tuples are lists."""
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    tuples["views"] = tuple((float(scale), bool(flip)) for scale, flip in tuples.get("views", [(1.0, False)]))
    return DetectorConfig(**tuples)


@dataclass
class Detector:
    """A trained network with its config; `about` is what the json beside the weights holds."""

    model: torch.nn.Module
    config: DetectorConfig
    fold: int
    about: dict[str, Any]


def class_table(config: DetectorConfig) -> pd.DataFrame:
    """One row a class in its order: name, condition (None where a class has no side), level (or None), severity 0-2."""
    group = GROUPS[config.condition]
    if config.scheme == "sided" or config.condition == "scs":
        conditions = [c.name for c in CONDITIONS.values() if c.group == group.key]
    else:
        conditions = [None]
    levels = [None] if config.scheme == "seen" and config.condition == "ss" else LEVELS
    rows = [
        ("_".join(filter(None, (c or group.base, level, name))), c, level, severity)
        for c in conditions
        for level in levels
        for severity, name in enumerate(SEVERITIES)
    ]
    return pd.DataFrame(rows, columns=["name", "condition", "level", "severity"])


def class_numbers(config: DetectorConfig) -> dict[tuple[str, str, int], int]:
    """(condition, level, severity) of a label -> class number."""
    table = class_table(config)
    found = {}
    for condition in (c.name for c in CONDITIONS.values() if c.group == config.condition):
        for level in LEVELS:
            fits = table["condition"].isin([None, condition]) & table["level"].isin([None, level])
            for number, severity in table.loc[fits, "severity"].items():
                found[condition, level, severity] = number
    return found
