"""The phantom's data folder: studies written in parallel, the competition's tables, and the answers beside them.

    train.csv                        study_id and the 25 columns in words, empty where a label is missing
    train_label_coordinates.csv      study_id, series_id, instance_number, condition, level, x, y
    train_series_descriptions.csv    study_id, series_id, series_description
    test_series_descriptions.csv     the same for the test studies
    sample_submission.csv            row_id, normal_mild, moderate, severe: every row of every test study
    train_images/<study>/<series>/<instance>.dcm, test_images/...

and what the competition keeps to itself, to be opened when predictions are made and no earlier:

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
    wrong_labels.csv            row_id, severity, meant: training labels that are not what their reader meant
    planted.csv                 study_id, series_id or nothing, rule, value: what a validator must find, line by line
    phantom.json                the arguments and the fingerprint

`latents.csv`, `oracle.csv`, `anatomy.csv`, `discs.csv` and `spines.csv` tell of both splits, with the split named,
`wrong_labels.csv` of training alone and the others of test alone. A patient moves a little between series, so that each
sees the anatomy at a place of its own.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from numpy.typing import ArrayLike
from threadpoolctl import threadpool_limits

from lsdc_utils import vocabulary
from lsdc_utils.files import write_json
from lsdc_utils.phantom.labels import Grades, draw_grades, grade
from lsdc_utils.phantom.scanner import Protocol
from lsdc_utils.phantom.spoil import deal, quieted, spoil
from lsdc_utils.phantom.study import COLUMN_KEYS, SERIES_PER_STUDY, Dirt, Study, StudyPlan, make_study
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVEL_NAMES, LEVELS, MISSING, SEVERITIES, SEVERITY_NAMES

SPLITS = ("train", "test")
LARGEST_ID = 4_294_967_295  # ids of the real studies and series fill 32 bits
COORDINATES = ["study_id", "series_id", "instance_number", "condition", "level", "x", "y"]


@dataclass(frozen=True)
class Design:
    """All that decides a phantom's bytes, as `write_phantom` takes it."""

    n_train: int
    n_test: int
    seed: int
    images: bool
    narrowing: list[list[float]] | None
    bodies: list[int] | None
    slip: bool | None
    transitional: bool | None
    dirt: Dirt
    protocol: Protocol

    @staticmethod
    def of(
        n_train: int,
        n_test: int,
        seed: int,
        images: bool = True,
        narrowing: ArrayLike | None = None,
        bodies: ArrayLike | None = None,
        slip: bool | None = None,
        transitional: bool | None = None,
        **switches: float,
    ) -> Design:
        """What the arguments of `write_phantom` ask for; ValueError where that makes no sense."""
        if min(n_train, n_test) < 0 or n_train + n_test == 0:
            raise ValueError(f"a phantom of {n_train} + {n_test} studies cannot be written")
        for name, given in (("narrowing", narrowing), ("bodies", bodies)):
            if given is not None and len(np.asarray(given)) != n_train + n_test:
                raise ValueError(f"phantom: {name} has {len(np.asarray(given))} entries for {n_train + n_test} studies")
        taken = {name: switches.pop(name) for name in Protocol.__dataclass_fields__ if name in switches}
        tables = (None if given is None else np.asarray(given).tolist() for given in (narrowing, bodies))
        made = (*tables, slip, transitional, Dirt(**switches), Protocol(**taken))
        return Design(n_train, n_test, seed, images, *made)

    def draw(self) -> list[Grades]:
        """The grades of training and test studies: drawn, or those of the narrowings given."""
        seeds, counts = ([self.seed, 0], [self.seed, 1]), (self.n_train, self.n_test)
        if self.narrowing is None:
            return [draw_grades(n, seed) for n, seed in zip(counts, seeds, strict=True)]
        given = np.split(np.array(self.narrowing, float).reshape(-1, len(COLUMNS)), [self.n_train])
        return [grade(mine, seed) for mine, seed in zip(given, seeds, strict=True)]


def write_phantom(root: str | Path, n_train: int, n_test: int, seed: int, *, workers: int = 1, **choices: Any) -> Path:
    """Write a phantom of n_train + n_test studies to the new folder `root` and return it.

    choices, by name:

    - `images=False` writes the same tables without a picture.
    - Rates that differ from the real ones, as in `Dirt`, e.g. `tilted_blocks=0`.
    - How series are taken, as in `Protocol`: e.g. `noise=2` is twice the usual noise, `stir=1` only STIR.
    - `slip`, `transitional`: True or False force or forbid a slipped or a transitional vertebra in every spine.
    - `narrowing`: (n_train + n_test, 25) numbers in [0, 1] in the order of COLUMNS, instead of drawn ones.
    - `bodies`: (n_train + n_test,) numbers; studies of a split with the same number are one patient, imaged in the same
      way with the same noise, so that only their narrowings and their ids differ.

    Whatever is not named stays as it is with the same seed. The same arguments give the same bytes whatever `workers`
    is. The folder appears whole: it is built beside its place and moved there. ValueError where `root` exists or an
    argument makes no sense.
    """
    root, design = Path(root), Design.of(n_train, n_test, seed, **choices)
    if root.exists():
        raise ValueError(f"{root} is there already: give the phantom a new folder, or use that one")
    root.parent.mkdir(parents=True, exist_ok=True)
    mine = f".writing-{root.name}-{socket.gethostname()}-"
    for left in root.parent.glob(f"{mine}*"):  # by a process that was killed
        if not psutil.pid_exists(int(left.name.removeprefix(mine))):
            shutil.rmtree(left, ignore_errors=True)
    building = root.parent / f"{mine}{os.getpid()}"
    try:
        grades = design.draw()
        plans = _plan_studies(design, grades)
        building.mkdir()
        for split in SPLITS if design.images else ():
            (building / f"{split}_images").mkdir()
        studies = list(_make_studies(plans, building if design.images else None, workers))
        _write_tables(building, plans, studies, grades)
        write_json(
            building / "phantom.json", asdict(design) | {"fingerprint": fingerprint(n_train, n_test, seed, **choices)}
        )
        _move_into_place(building, root)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return root


def fingerprint(n_train: int, n_test: int, seed: int, **choices: Any) -> str:
    """Twelve hexadecimal digits that tell phantoms apart: a hash of the arguments of `write_phantom` and of the source
    that uses them."""
    design = asdict(Design.of(n_train, n_test, seed, **choices))
    told = hashlib.sha256(json.dumps(design, sort_keys=True).encode())
    sources = [file for file in resources.files(__package__).iterdir() if file.name.endswith((".py", ".json"))]
    for file in [Path(vocabulary.__file__), *sorted(sources, key=lambda file: file.name)]:
        told.update(file.read_bytes())
    return told.hexdigest()[:12]


def _plan_studies(design: Design, grades: list[Grades]) -> list[StudyPlan]:
    """Plans of the training studies, then of the test studies; ids mean nothing and are sorted within a split."""
    counts, seed, dirt = [design.n_train, design.n_test], design.seed, design.dirt
    bodies = [*range(design.n_train), *range(design.n_test)] if design.bodies is None else design.bodies
    rng = np.random.default_rng([seed, 2])
    ids = 1_000_000 + rng.choice(LARGEST_ID - 1_000_000, sum(counts) * (1 + SERIES_PER_STUDY), replace=False)
    study_ids, series_ids = ids[: sum(counts)], ids[sum(counts) :].reshape(-1, SERIES_PER_STUDY)
    plans = []
    for k, (split, n, drawn) in enumerate(zip(SPLITS, counts, grades, strict=True)):
        mine = slice(len(plans), len(plans) + n)
        spoilt = deal(n, split, dirt, [seed, 5, k])
        for i, (study_id, series) in enumerate(zip(np.sort(study_ids[mine]), series_ids[mine], strict=True)):
            plans.append(
                StudyPlan(
                    split=split,
                    study_id=int(study_id),
                    series_ids=tuple(map(int, series)),
                    narrowing=drawn.narrowing[i],
                    labels=drawn.labels[i],
                    seed=(seed, k, bodies[len(plans)]),
                    dirt=quieted(dirt, spoilt[i][0]) if spoilt[i] else dirt,
                    spoilt=spoilt[i],
                    protocol=design.protocol,
                    slip=design.slip,
                    transitional=design.transitional,
                )
            )
    return plans


def _make_studies(plans: list[StudyPlan], root: Path | None, workers: int) -> Iterator[Study]:
    """Make the studies in order, in `workers` processes of one thread each, and say how far it is."""
    make = partial(_make_one, root=root)
    if workers <= 1:
        with threadpool_limits(1):
            yield from _counted(map(make, plans), len(plans))
        return
    # Spawned, not forked: a notebook's kernel has threads that a forked process would inherit in any state.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_one_thread) as pool:
        yield from _counted(pool.map(make, plans, chunksize=4), len(plans))


def _one_thread() -> None:
    """Keep a worker's linear algebra to one thread. A function of this module, so that a new process has loaded the
    libraries by the time it runs: a limit set before would pass them by, and their threads wait by spinning."""
    threadpool_limits(1)


def _make_one(plan: StudyPlan, root: Path | None) -> Study:
    images = None if root is None else root / f"{plan.split}_images"
    study = make_study(plan, images)
    spoil(plan, study, images)
    return study


def _counted(studies: Iterator[Study], n: int) -> Iterator[Study]:
    for i, study in enumerate(studies, 1):
        if i % max(20, n // 10) == 0 or i == n:
            print(f"phantom: study {i}/{n}", flush=True)
        yield study


def _write_tables(root: Path, plans: list[StudyPlan], studies: list[Study], grades: list[Grades]) -> None:
    pairs = list(zip(plans, studies, strict=True))
    by_split = {split: [pair for pair in pairs if pair[0].split == split] for split in SPLITS}
    for split, mine in by_split.items():
        rows = [{"study_id": plan.study_id} | row for plan, study in mine for row in study.series]
        columns = ["study_id", "series_id", "series_description"]
        _csv(pd.DataFrame(rows, columns=columns), root / f"{split}_series_descriptions.csv")
    _csv(_wide_labels(by_split["train"]), root / "train.csv")
    clicked = [(plan.study_id, row) for plan, study in by_split["train"] for row in study.clicked]
    true = [(plan.study_id, row) for plan, study in by_split["test"] for row in study.true]
    _csv(_points(clicked), root / "train_label_coordinates.csv")
    _csv(_points(true), root / "solution_coordinates.csv")
    test = _row_ids([plan for plan, _ in by_split["test"]])
    _csv(pd.DataFrame({"row_id": test} | dict.fromkeys(SEVERITIES, 1 / 3)), root / "sample_submission.csv")
    severity = np.ravel([study.labels for _, study in by_split["test"]]).astype(int)
    solution = pd.DataFrame({"row_id": test, "severity": severity})
    _csv(solution[severity != MISSING], root / "solution.csv")
    wrong = [
        (vocabulary.row_id(plan.study_id, *COLUMN_KEYS[column]), study.labels[column], meant)
        for plan, study in by_split["train"]
        for column, meant in study.meant.items()
    ]
    _csv(pd.DataFrame(wrong, columns=["row_id", "severity", "meant"]), root / "wrong_labels.csv")
    planted = [{"study_id": plan.study_id} | row for plan, study in pairs for row in study.planted]
    planted = pd.DataFrame(planted, columns=["study_id", "series_id", "rule", "value"])
    _csv(planted.astype({"series_id": "Int64"}), root / "planted.csv")
    told = pd.DataFrame({"row_id": _row_ids(plans), "split": np.repeat([plan.split for plan in plans], len(COLUMNS))})
    measures = np.round(np.ravel([study.measures for study in studies]), 4)
    narrowing = np.concatenate([g.narrowing for g in grades]).ravel()
    units = ["mm" if CONDITIONS[condition].group == "ss" else "mm2" for condition, _ in COLUMN_KEYS] * len(plans)
    _csv(told.assign(narrowing=narrowing, measure=measures, unit=units), root / "latents.csv")
    oracle = np.concatenate([g.oracle for g in grades]).reshape(-1, 3).round(9)
    _csv(told.assign(**dict(zip(SEVERITIES, oracle.T, strict=True))), root / "oracle.csv")
    _write_anatomy(root, pairs)


def _write_anatomy(root: Path, pairs: list[tuple[StudyPlan, Study]]) -> None:
    """What the bodies and the patients' motion make true, whatever was lost or spoilt afterwards."""
    owners = [({"study_id": plan.study_id, "split": plan.split}, study) for plan, study in pairs]
    points = pd.DataFrame([owner | row for owner, study in owners for row in study.anatomy])
    keys = [COLUMN_KEYS[column] for column in points["column"]]
    points["condition"], points["level"] = zip(*keys, strict=True)
    points["side"] = [CONDITIONS[condition].side or "" for condition, _ in keys]
    _csv(
        points[["study_id", "split", "series_id", "series_type", "condition", "level", "side", *"XYZ"]],
        root / "anatomy.csv",
    )
    _csv(pd.DataFrame([owner | row for owner, study in owners for row in study.discs]), root / "discs.csv")
    _csv(pd.DataFrame([owner | study.spine for owner, study in owners]), root / "spines.csv")


def _wide_labels(pairs: list[tuple[StudyPlan, Study]]) -> pd.DataFrame:
    pairs = [pair for pair in pairs for _ in range(pair[1].label_rows)]
    words = np.array([*SEVERITY_NAMES, "Mild", ""], dtype=object)  # a word that is no grade; the last for MISSING, -1
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


def _row_ids(plans: list[StudyPlan]) -> list[str]:
    return [row for plan in plans for row in vocabulary.study_row_ids(plan.study_id)]


def _csv(table: pd.DataFrame, path: Path) -> None:
    table.to_csv(path, index=False, lineterminator="\n")


def _move_into_place(building: Path, root: Path) -> None:
    """Rename the finished folder; where another process was quicker with the same phantom, its folder stays."""
    try:
        building.rename(root)
    except OSError:
        mine, theirs = building / "phantom.json", root / "phantom.json"
        if not theirs.is_file() or theirs.read_bytes() != mine.read_bytes():
            raise
