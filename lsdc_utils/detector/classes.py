"""What a detector is shown and what its classes mean: severity, and nothing that its image does not show.

Left and right follow from patient coordinates, and the level from the named canal points of the localiser, so that no
picture is asked to be in two classes, and no place in an image means a level.
"""

from dataclasses import dataclass
from typing import Any

import pandas as pd

from lsdc_utils.vocabulary import GROUPS, SEVERITIES

# medians over the labels of 160 phantom studies, whose spread is 2.4 and 2.2 mm, from head to foot
CANAL_FROM_FORAMINA = ((2.4, -9.9), (2.6, -9.7), (3.0, -9.5), (5.6, -8.2), (8.7, -6.3))


class DetectorError(ValueError):
    """Settings, labels or weights that a detector cannot work with; the message says which and why."""


@dataclass(frozen=True)
class DetectorConfig:
    """What a detector is shown and how it predicts; kept beside its weights."""

    condition: str  # nfn, scs or ss
    window: tuple[float, float] | None  # mm down and across: round the spine, or in axial slices the canal; None: all
    size: tuple[int, int]  # rows and columns of the network's input, multiples of 32
    neighbours: bool  # channels are the slices before, at and behind; else the same slice three times
    box_mm: float  # side of a box
    # Prediction, the same for out-of-fold and test studies:
    views: tuple[tuple[float, bool], ...] = ((1.0, False),)  # scale, and whether the patient is mirrored
    power: float = 2.0  # of the evidence, see `LevelEvidence`; fitted on out-of-fold studies
    # mm to posterior and to the head from the middle of a level's two foramen points to its canal point, see
    # `canal.canal_from_foramina`, which measures them in the label table
    canal_from_foramina: tuple[tuple[float, float], ...] = CANAL_FROM_FORAMINA

    def __post_init__(self) -> None:
        if self.condition not in GROUPS:
            raise DetectorError(f"there is no detector for condition {self.condition!r}: use one of {list(GROUPS)}")
        if any(side % 32 or side <= 0 for side in self.size):
            raise DetectorError(f"size {self.size} of detector {self.condition}: both must be multiples of 32")
        if self.window is not None and not (len(self.window) == 2 and min(self.window) > 0):
            raise DetectorError(f"window {self.window} of detector {self.condition}: need mm down and across, or none")


def config_from(values: dict[str, Any]) -> DetectorConfig:
    """A config from JSON or from a notebook's parameters, where tuples are lists."""
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if "canal_from_foramina" in tuples:
        tuples["canal_from_foramina"] = tuple(map(tuple, tuples["canal_from_foramina"]))
    tuples["window"] = tuples["window"] or None
    tuples["views"] = tuple((float(scale), bool(flip)) for scale, flip in tuples.get("views", [(1.0, False)]))
    return DetectorConfig(**tuples)


def class_table(config: DetectorConfig) -> pd.DataFrame:
    """The classes in their order: name, severity 0 to 2."""
    base = GROUPS[config.condition].base
    return pd.DataFrame([(f"{base}_{name}", k) for k, name in enumerate(SEVERITIES)], columns=["name", "severity"])


@dataclass
class Detector:
    """A trained network with its config; `about` is what the JSON file beside the weights holds."""

    model: Any  # a torch.nn.Module; processes that write data sets need not import torch
    config: DetectorConfig
    fold: int
    about: dict[str, Any]
