"""What a detector is shown and what its classes mean: level and severity on sagittal series, severity on axial ones.

A class says no more than its image shows. Left and right follow from patient coordinates, and the level of an axial
slice from the canal points of the `scs` detector, so that no picture is asked to be in two classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from lsdc_utils.vocabulary import CONDITIONS, GROUPS, LEVELS, SEVERITIES

# medians over the labels of 160 phantom studies, whose spread is 2.4 and 2.2 mm, from head to foot
CANAL_FROM_FORAMINA = ((2.4, -9.9), (2.6, -9.7), (3.0, -9.5), (5.6, -8.2), (8.7, -6.3))


class DetectorError(ValueError):
    """Settings, labels or weights that a detector cannot work with; the message says which and why."""


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is shown and how it predicts; kept beside its weights."""

    condition: str  # nfn, scs or ss
    strip: tuple[float, float, float, float]  # left, right, top, bottom as fractions of the image
    size: tuple[int, int]  # rows and columns of the network's input, multiples of 32
    neighbours: bool  # channels are the slices before, at and behind; else the same slice three times
    box_mm: float  # side of a box
    # Prediction, the same for out-of-fold and test studies:
    views: tuple[tuple[float, bool], ...] = ((1.0, False),)  # scale, and whether the patient is mirrored
    power: float = 2.0  # of the evidence, see `LevelEvidence`; fitted on out-of-fold studies
    calibration: tuple[float, float] = (1.0, 0.98)  # of the chosen levels, see `chain.calibrate`; fitted likewise
    # mm to posterior and to the head from the middle of a level's two foramen points to its canal point, see
    # `canal.canal_from_foramina`, which measures them in the label table
    canal_from_foramina: tuple[tuple[float, float], ...] = CANAL_FROM_FORAMINA

    def __post_init__(self) -> None:
        if self.condition not in GROUPS:
            raise DetectorError(f"there is no detector for condition {self.condition!r}: use one of {list(GROUPS)}")
        if any(side % 32 or side <= 0 for side in self.size):
            raise DetectorError(f"size {self.size} of detector {self.condition}: both must be multiples of 32")
        left, right, top, bottom = self.strip
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            limits = "need 0 <= left < right <= 1 and 0 <= top < bottom <= 1"
            raise DetectorError(f"strip {self.strip} of detector {self.condition}: {limits}")


def config_from(values: dict[str, Any]) -> DetectorConfig:
    """A config from JSON or from a notebook's parameters, where tuples are lists."""
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if "canal_from_foramina" in tuples:
        tuples["canal_from_foramina"] = tuple(map(tuple, tuples["canal_from_foramina"]))
    tuples["views"] = tuple((float(scale), bool(flip)) for scale, flip in tuples.get("views", [(1.0, False)]))
    return DetectorConfig(**tuples)


def class_table(config: DetectorConfig) -> pd.DataFrame:
    """The classes in their order: name, level (None on axial series), severity 0 to 2."""
    levels = [None] if config.condition == "ss" else LEVELS
    rows = [
        ("_".join(filter(None, (GROUPS[config.condition].base, level, name))), level, severity)
        for level in levels
        for severity, name in enumerate(SEVERITIES)
    ]
    return pd.DataFrame(rows, columns=["name", "level", "severity"])


def class_numbers(config: DetectorConfig) -> dict[tuple[str, str, int], int]:
    """(condition, level, severity) of a label -> class number."""
    return {
        (condition.name, level, row.severity): row.Index
        for condition in CONDITIONS.values()
        if condition.group == config.condition
        for row in class_table(config).itertuples()
        for level in LEVELS
        if row.level in (None, level)
    }


@dataclass(frozen=True)
class Scheme:
    """What the classes of a detector mean, and how its detections are made and read.

    None stands for this folder's own functions, `detections.detect` and `levels.level_evidence`.
    """

    class_table: Callable[[DetectorConfig], pd.DataFrame] = class_table
    detect: Callable | None = None
    level_evidence: Callable | None = None


@dataclass
class Detector:
    """A trained network with its config; `about` is what the JSON file beside the weights holds."""

    model: Any  # a torch.nn.Module; processes that write data sets need not import torch
    config: DetectorConfig
    fold: int
    about: dict[str, Any]
    scheme: Scheme = field(default_factory=Scheme)
