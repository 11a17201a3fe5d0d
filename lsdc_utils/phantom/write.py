"""The phantom's data folder: studies written in parallel, the competition's tables, and the answers beside them.

    train.csv                        study_id and the 25 columns in words, empty where a label is missing
    train_label_coordinates.csv      study_id, series_id, instance_number, condition, level, x, y
    train_series_descriptions.csv    study_id, series_id, series_description
    test_series_descriptions.csv     the same for the test studies
    sample_submission.csv            row_id, normal_mild, moderate, severe: every row of every test study
    train_images/<study>/<series>/<instance>.dcm, test_images/...

and the answers, which nothing may open before predictions are made:

    solution.csv                row_id, severity (0, 1, 2): the test labels, rows without a label are absent
    solution_coordinates.csv    study_id, series_id, instance_number, condition, level, x, y: true points, test studies
    latents.csv                 row_id, split, narrowing (0 to 1), measure (mm or mm2 on the body as built), unit
    oracle.csv                  row_id, split, normal_mild, moderate, severe: natural probabilities given the latents
    anatomy.csv                 study_id, split, series_id, series_type, condition, level, side, X, Y, Z: where each
                                series sees the middle of each of the 25 places (LPS mm), as far as its slices reach
    discs.csv                   study_id, split, series_id, series_type, level, X, Y, Z, normal_x, normal_y, normal_z:
                                where each series sees the middle of each disc, and the unit normal of its plane
    spines.csv                  study_id, split, ordinary, transitional, slip_mm, slip_level, scoliosis_mm, stir,
                                tilted_blocks: ordinary is a spine without transitional vertebra and slip
    wrong_labels.csv            row_id, severity, meant: training labels that differ from what their reader meant
    phantom.json                the arguments and the fingerprint

Files with a column `split` hold both splits, `wrong_labels.csv` training studies only, the others test studies only. A
patient moves a little between series, so each series has its own coordinates of the same place.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from threadpoolctl import threadpool_limits

from lsdc_utils import geometry, parallel, vocabulary
from lsdc_utils.files import write_json
from lsdc_utils.phantom.labels import Grades, draw_grades, grade
from lsdc_utils.phantom.scanner import Protocol
from lsdc_utils.phantom.study import COLUMN_KEYS, SERIES_PER_STUDY, Dirt, Study, StudyPlan, make_study
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVEL_NAMES, LEVELS, MISSING, SEVERITIES, SEVERITY_NAMES

SPLITS = ("train", "test")
LARGEST_ID = 4_294_967_295  # ids of the real studies and series fill 32 bits
COORDINATES = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]
Pair = tuple[StudyPlan, Study]


@dataclass(frozen=True)
class Design:
    """All that decides a phantom's bytes: the arguments of `write_phantom`."""

    n_train: int
    n_test: int
    seed: int
    dirt: Dirt
    protocol: Protocol
    images: bool = True
    narrowing: list[list[float]] | None = None
    bodies: list[int] | None = None
    slip: bool | None = None
    transitional: bool | None = None

    @staticmethod
    def of(n_train: int, n_test: int, seed: int, **choices: Any) -> Design:
        """The design for arguments of `write_phantom`; ValueError where they make no sense."""
        n = n_train + n_test
        if min(n_train, n_test) < 0 or n == 0:
            raise ValueError(f"a phantom of {n_train} + {n_test} studies cannot be written")
        for name in ("narrowing", "bodies"):
            rows = choices.pop(name, None)
            if rows is not None and len(rows) != n:
                raise ValueError(f"phantom: {name} has {len(rows)} entries for {n} studies")
            choices[name] = None if rows is None else np.asarray(rows).tolist()
        dirt = Dirt(**{name: choices.pop(name) for name in Dirt.__dataclass_fields__ if name in choices})
        protocol = Protocol(**{name: choices.pop(name) for name in Protocol.__dataclass_fields__ if name in choices})
        return Design(n_train, n_test, seed, dirt, protocol, **choices)

    def draw(self) -> list[Grades]:
        """The grades of training and of test studies: drawn, or those of the given narrowings."""
        seeds, counts = ([self.seed, 0], [self.seed, 1]), (self.n_train, self.n_test)
        if self.narrowing is None:
            return [draw_grades(n, seed) for n, seed in zip(counts, seeds, strict=True)]
        parts = np.split(np.array(self.narrowing, float).reshape(-1, len(COLUMNS)), [self.n_train])
        return [grade(part, seed) for part, seed in zip(parts, seeds, strict=True)]


def write_phantom(root: str | Path, n_train: int, n_test: int, seed: int, *, workers: int = 1, **choices: Any) -> Path:
    """Write a phantom of n_train + n_test studies to the new folder `root` and return it.

    choices, by name:

    - `images=False` writes the same tables without images.
    - Rates of `Dirt`, e.g. `tilted_blocks=0`.
    - Factors of `Protocol`, e.g. `noise=2` for twice the usual noise, `stir=1` for STIR only.
    - `slip`, `transitional`: True or False force or forbid a slipped or a transitional vertebra in every spine.
    - `narrowing`: (n_train + n_test, 25) numbers in [0, 1] in the order of COLUMNS, instead of drawn ones.
    - `bodies`: (n_train + n_test,) integers. Studies of a split with the same number are one patient, imaged in the
      same way with the same noise: only their narrowings and ids differ.

    Arguments you omit do not change the result of a seed, and `workers` (processes) never does. The folder appears
    whole: it is built beside its place and moved there. ValueError where `root` exists or an argument makes no sense.
    """
    root, design = Path(root), Design.of(n_train, n_test, seed, **choices)
    if root.exists():
        raise ValueError(f"{root} exists already: choose a new folder for the phantom, or use that one")
    root.parent.mkdir(parents=True, exist_ok=True)
    building = _new_folder(root)
    try:
        grades = design.draw()
        plans = _plan_studies(design, grades)
        building.mkdir()
        for split in SPLITS if design.images else ():
            (building / f"{split}_images").mkdir()
        studies = list(_make_studies(plans, building if design.images else None, workers))
        _write_tables(building, list(zip(plans, studies, strict=True)), grades)
        record = asdict(design) | {"fingerprint": fingerprint(n_train, n_test, seed, **choices)}
        write_json(building / "phantom.json", record)
        _move_into_place(building, root)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return root


def fingerprint(n_train: int, n_test: int, seed: int, **choices: Any) -> str:
    """Twelve hexadecimal digits that identify a phantom: a hash of the arguments of `write_phantom` and of the source
    that uses them."""
    design = asdict(Design.of(n_train, n_test, seed, **choices))
    digest = hashlib.sha256(json.dumps(design, sort_keys=True).encode())
    sources = [file for file in resources.files(__package__).iterdir() if file.name.endswith((".py", ".json"))]
    for file in [Path(vocabulary.__file__), Path(geometry.__file__), *sorted(sources, key=lambda file: file.name)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _new_folder(root: Path) -> Path:
    """Where this process builds the phantom; removes what killed processes of this machine left behind."""
    prefix = f".writing-{root.name}-{socket.gethostname()}-"
    for left in root.parent.glob(f"{prefix}*"):
        if not psutil.pid_exists(int(left.name.removeprefix(prefix))):
            shutil.rmtree(left, ignore_errors=True)
    return root.parent / f"{prefix}{os.getpid()}"


def _plan_studies(design: Design, grades: list[Grades]) -> list[StudyPlan]:
    """Plans of the training studies, then of the test studies; ids carry no information, sorted within a split."""
    counts, seed = [design.n_train, design.n_test], design.seed
    bodies = [*range(design.n_train), *range(design.n_test)] if design.bodies is None else design.bodies
    rng = np.random.default_rng([seed, 2])
    ids = 1_000_000 + rng.choice(LARGEST_ID - 1_000_000, sum(counts) * (1 + SERIES_PER_STUDY), replace=False)
    study_ids, series_ids = ids[: sum(counts)], ids[sum(counts) :].reshape(-1, SERIES_PER_STUDY)
    plans = []
    for k, (split, n, drawn) in enumerate(zip(SPLITS, counts, grades, strict=True)):
        own = slice(len(plans), len(plans) + n)
        for i, (study_id, series) in enumerate(zip(np.sort(study_ids[own]), series_ids[own], strict=True)):
            plan = StudyPlan(
                split=split,
                study_id=int(study_id),
                series_ids=tuple(map(int, series)),
                narrowing=drawn.narrowing[i],
                labels=drawn.labels[i],
                seed=(seed, k, bodies[len(plans)]),
                dirt=design.dirt,
                protocol=design.protocol,
                slip=design.slip,
                transitional=design.transitional,
            )
            plans.append(plan)
    return plans


def _make_studies(plans: list[StudyPlan], root: Path | None, workers: int) -> Iterator[Study]:
    """The studies in order, made by `workers` processes with one thread of linear algebra each; prints progress."""
    with threadpool_limits(1):
        studies = parallel.each(partial(_make_study, root=root), plans, workers, few=2, chunk=4, begin=_use_one_thread)
        for i, study in enumerate(studies, 1):
            if i % max(20, len(plans) // 10) == 0 or i == len(plans):
                print(f"phantom: study {i}/{len(plans)}", flush=True)
            yield study


def _use_one_thread() -> None:
    """Start of a worker. In this module, so that the libraries are loaded by then: a limit set earlier misses them."""
    threadpool_limits(1)


def _make_study(plan: StudyPlan, root: Path | None) -> Study:
    return make_study(plan, None if root is None else root / f"{plan.split}_images")


def _write_tables(root: Path, pairs: list[Pair], grades: list[Grades]) -> None:
    train, test = ([pair for pair in pairs if pair[0].split == split] for split in SPLITS)
    for split, part in zip(SPLITS, (train, test), strict=True):
        rows = [{"study_id": plan.study_id} | row for plan, study in part for row in study.series]
        columns = ["study_id", "series_id", "series_description"]
        _csv(pd.DataFrame(rows, columns=columns), root / f"{split}_series_descriptions.csv")
    _csv(_wide_labels(train), root / "train.csv")
    clicked = [(plan.study_id, row) for plan, study in train for row in study.clicked]
    true = [(plan.study_id, row) for plan, study in test for row in study.true]
    _csv(_points(clicked), root / "train_label_coordinates.csv")
    _csv(_points(true), root / "solution_coordinates.csv")
    rows = pd.DataFrame({"row_id": _row_ids(test)})
    _csv(rows.assign(**dict.fromkeys(SEVERITIES, 1 / 3)), root / "sample_submission.csv")
    severity = np.ravel([study.labels for _, study in test]).astype(int)
    _csv(rows.assign(severity=severity)[severity != MISSING], root / "solution.csv")
    meant = [(plan.study_id, study.labels, *item) for plan, study in train for item in study.meant.items()]
    wrong = [(f"{study_id}_{COLUMNS[column]}", given[column], own) for study_id, given, column, own in meant]
    _csv(pd.DataFrame(wrong, columns=["row_id", "severity", "meant"]), root / "wrong_labels.csv")
    _write_latents(root, pairs, grades)
    _write_anatomy(root, pairs)


def _write_latents(root: Path, pairs: list[Pair], grades: list[Grades]) -> None:
    """The narrowing behind each label, its size on the body, and the oracle's probabilities."""
    splits = np.repeat([plan.split for plan, _ in pairs], len(COLUMNS))
    rows = pd.DataFrame({"row_id": _row_ids(pairs), "split": splits})
    measures = np.round(np.ravel([study.measures for _, study in pairs]), 4)
    narrowing = np.concatenate([part.narrowing for part in grades]).ravel()
    units = ["mm" if CONDITIONS[condition].group == "ss" else "mm2" for condition, _ in COLUMN_KEYS] * len(pairs)
    _csv(rows.assign(narrowing=narrowing, measure=measures, unit=units), root / "latents.csv")
    oracle = np.concatenate([part.oracle for part in grades]).reshape(-1, 3).round(9)
    _csv(rows.assign(**dict(zip(SEVERITIES, oracle.T, strict=True))), root / "oracle.csv")


def _write_anatomy(root: Path, pairs: list[Pair]) -> None:
    """What bodies and motion make true, whatever dirt was added to the labels."""
    owners = [({"study_id": plan.study_id, "split": plan.split}, study) for plan, study in pairs]
    points = pd.DataFrame([owner | row for owner, study in owners for row in study.anatomy])
    keys = [COLUMN_KEYS[column] for column in points["column"]]
    points["condition"], points["level"] = zip(*keys, strict=True)
    points["side"] = [CONDITIONS[condition].side or "" for condition, _ in keys]
    columns = ["study_id", "split", "series_id", "series_type", "condition", "level", "side", *"XYZ"]
    _csv(points[columns], root / "anatomy.csv")
    _csv(pd.DataFrame([owner | row for owner, study in owners for row in study.discs]), root / "discs.csv")
    _csv(pd.DataFrame([owner | study.spine for owner, study in owners]), root / "spines.csv")


def _wide_labels(pairs: list[Pair]) -> pd.DataFrame:
    words = np.array([*SEVERITY_NAMES, ""], dtype=object)  # the last for MISSING, -1
    labels = np.array([study.labels for _, study in pairs], dtype=int).reshape(-1, len(COLUMNS))
    table = pd.DataFrame(words[labels], columns=list(COLUMNS))
    table.insert(0, "study_id", [plan.study_id for plan, _ in pairs])
    return table


def _points(rows: list[tuple[int, dict]]) -> pd.DataFrame:
    keys = [COLUMN_KEYS[row["column"]] for _, row in rows]
    table = pd.DataFrame([{"study_id": study_id} | row for study_id, row in rows], columns=[*COORDINATES, "column"])
    table["condition"] = [CONDITIONS[condition].title for condition, _ in keys]
    table["level"] = [LEVEL_NAMES[LEVELS.index(level)] for _, level in keys]
    return table[COORDINATES]


def _row_ids(pairs: list[Pair]) -> list[str]:
    return [row for plan, _ in pairs for row in vocabulary.study_row_ids(plan.study_id)]


def _csv(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, lineterminator="\n")


def _move_into_place(building: Path, root: Path) -> None:
    """Rename the finished folder; if another process has just written the same phantom, keep that one."""
    try:
        building.rename(root)
    except OSError:
        ours, theirs = building / "phantom.json", root / "phantom.json"
        if not theirs.is_file() or theirs.read_bytes() != ours.read_bytes():
            raise
