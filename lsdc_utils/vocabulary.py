"""The vocabulary of the task: conditions, levels, severities, series types, condition groups, row ids.

Orders matter here. `COLUMNS` is the order of the competition's `train.csv`; `SEVERITIES` is the order of the severity
classes 0, 1, 2 and of the three probability columns of every prediction table.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

SEVERITIES = ("normal_mild", "moderate", "severe")  # class 0, 1, 2
SEVERITY_NAMES = ("Normal/Mild", "Moderate", "Severe")  # as train.csv spells them
SEVERITY_WEIGHTS = (1.0, 2.0, 4.0)  # of a row in the official score, by its label
MISSING = -1  # severity of a row without a label

LEVELS = ("l1_l2", "l2_l3", "l3_l4", "l4_l5", "l5_s1")  # from head to foot
LEVEL_NAMES = ("L1/L2", "L2/L3", "L3/L4", "L4/L5", "L5/S1")

SIDES = ("left", "right")  # the patient's

T1 = "Sagittal T1"
T2 = "Sagittal T2/STIR"
AXIAL = "Axial T2"
SERIES_TYPES = (T1, T2, AXIAL)
PLANES = {T1: "sagittal", T2: "sagittal", AXIAL: "axial"}  # series type -> anatomical plane

SPINAL_CANAL = "spinal_canal_stenosis"
FORAMINAL = "neural_foraminal_narrowing"
SUBARTICULAR = "subarticular_stenosis"


@dataclass(frozen=True)
class Condition:
    """One of the five conditions that are graded at each level."""

    name: str  # as in row ids, e.g. left_neural_foraminal_narrowing
    title: str  # as in train_label_coordinates.csv, e.g. Left Neural Foraminal Narrowing
    group: str  # nfn, scs or ss
    side: str | None  # left, right, or None for the canal


@dataclass(frozen=True)
class Group:
    """A condition without its side: what one detector is trained for and what the score averages over."""

    key: str  # nfn, scs, ss: names of detectors and of their files
    score: str  # foraminal, spinal, subarticular: names of the parts of the score
    series_type: str  # the series on which readers grade it
    base: str  # condition without side


GROUPS = {
    "nfn": Group("nfn", "foraminal", T1, FORAMINAL),
    "scs": Group("scs", "spinal", T2, SPINAL_CANAL),
    "ss": Group("ss", "subarticular", AXIAL, SUBARTICULAR),
}


CONDITIONS = {
    name: Condition(name, name.replace("_", " ").title(), key, side)
    for key, sides in (("scs", (None,)), ("nfn", SIDES), ("ss", SIDES))
    for side in sides
    for name in ["_".join(filter(None, (side, GROUPS[key].base)))]
}
GROUP_OF = {name: condition.group for name, condition in CONDITIONS.items()}  # condition -> key of GROUPS
COLUMNS = tuple(f"{condition}_{level}" for condition in CONDITIONS for level in LEVELS)  # the 25 of train.csv


def groups_of(asked: Collection[str], graded: Collection[str] = GROUPS) -> list[str]:
    """The keys of GROUPS that `asked` names (all: those that are `graded`); ValueError for a wrong or ungraded one."""
    if not asked or set(asked) - {"all", *GROUPS}:
        raise ValueError(f"conditions={','.join(asked)}: expected all, or some of {', '.join(GROUPS)}")
    keys = [key for key in GROUPS if key in (graded if "all" in asked else asked)]
    if lacking := [GROUPS[key].score for key in keys if key not in graded]:
        raise ValueError(f"conditions={','.join(asked)}: no study has a grade for {', '.join(lacking)} stenosis")
    return keys


def row_id(study_id: int | str, condition: str, level: str) -> str:
    """Name of one row of the submission, e.g. `4003253_left_subarticular_stenosis_l4_l5`."""
    return f"{study_id}_{condition}_{level}"


def parse_row_id(row: str) -> tuple[str, str, str]:
    """Study id, condition and level of a row id; ValueError for any other string."""
    study, _, column = row.partition("_")
    for condition in CONDITIONS:
        level = column.removeprefix(f"{condition}_")
        if study and column != level and level in LEVELS:
            return study, condition, level
    raise ValueError(f"{row!r} is not a row id: expected <study_id>_<condition>_<level>, e.g. 1_{COLUMNS[0]}")


def study_row_ids(study_id: int | str) -> list[str]:
    """The 25 row ids of a study, in the order of `COLUMNS`."""
    return [f"{study_id}_{column}" for column in COLUMNS]


def transformers(members: Iterable[str]) -> list[str]:
    """The names of a run's transformers: one for each member of their blend, or of the only one."""
    return [f"vit3d-{name}" for name in members] or ["vit3d"]


def mirrored(condition: str) -> str:
    """The condition on the other side of the body; the canal is its own mirror image."""
    side = CONDITIONS[condition].side
    return condition.replace(side, SIDES[1 - SIDES.index(side)], 1) if side else condition
