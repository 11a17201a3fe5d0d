"""The studies of the stress tests: fresh phantom studies, no test studies, with one thing changed at a time. Those with
the same `body` are one patient, imaged alike: they differ only in what was changed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lsdc_utils.phantom import labels
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS

USUAL = "as usual"  # the setting in which nothing is changed
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {  # factor -> setting -> arguments of write_phantom
    "motion between series": {"4.5 mm, 3 degrees": {"motion": 3.0}, "9 mm, 6 degrees": {"motion": 6.0}},
    "slice thickness": {"1.5 times": {"step": 1.5}, "2 times": {"step": 2.0}},
    "pixel size": {"1.25 times": {"pixel": 1.25}, "1.45 times": {"pixel": 1.45}},
    "noise": {"2 times": {"noise": 2.0}, "4 times": {"noise": 4.0}},
    "bias field": {"3 times": {"field": 3.0}, "6 times": {"field": 6.0}},
    "contrast": {"T2 alone": {"stir": 0.0}, "STIR alone": {"stir": 1.0}},
    "spine": {"transitional": {"transitional": True}, "slipped": {"slip": True}},
}
DOSE_LEVELS = ("l4_l5", "l3_l4", "l5_s1")  # narrowed, in turn from body to body
# Dirt that would hide the change.
CONTROLLED = dict.fromkeys(("series_missing", "second_axial", "short_stack", "levels_cut"), 0.0)
FIRST_SETTING_BODY = 10_000  # so that no body of a setting is one of a dose


@dataclass(frozen=True)
class Case:
    """One study: its body and narrowings (25,), how it is drawn, and what else is asked of it."""

    factor: str
    setting: str
    body: int
    narrowing: np.ndarray
    choices: dict[str, Any] = field(default_factory=dict)  # of write_phantom
    row: tuple[str, str] = ("", "")  # condition and level of a dose
    occlude: bool = False  # measure where the models look for that row
    reduce: bool = False  # also grade it without each series, and with errors of its crop centres
    transform: bool = False  # also grade its versions that must not change a grade


def dose_cases(bodies: int, doses: Sequence[float], seed: int) -> list[Case]:
    """One narrowing set to each of `doses`, for each condition on each of some bodies; all else stays the same."""
    background = labels.draw_grades(bodies, [seed, 1]).narrowing if bodies else np.empty((0, len(COLUMNS)))
    cases = []
    for body, condition in ((body, condition) for body in range(bodies) for condition in CONDITIONS):
        row = (condition, DOSE_LEVELS[body % len(DOSE_LEVELS)])
        for dose in doses:
            narrowing = background[body].copy()
            narrowing[COLUMNS.index("_".join(row))] = dose
            cases.append(Case("dose", f"{dose:g}", body, narrowing, CONTROLLED, row, occlude=dose == max(doses)))
    return cases


def setting_cases(studies: int, transformed: int, seed: int) -> list[Case]:
    """The same fresh studies as usual and in each of `SETTINGS`; the first `transformed` also in other versions."""
    narrowings = labels.draw_grades(studies, [seed, 2]).narrowing if studies else ()
    bodies, untransformed = list(enumerate(narrowings, FIRST_SETTING_BODY)), FIRST_SETTING_BODY + transformed
    cases = [Case(USUAL, USUAL, *body, CONTROLLED, reduce=True, transform=body[0] < untransformed) for body in bodies]
    for factor, settings in SETTINGS.items():
        for setting, choices in settings.items():
            cases += [Case(factor, setting, *body, CONTROLLED | choices) for body in bodies]
    return cases
