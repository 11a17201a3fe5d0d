"""The phantom's data folder: studies written in parallel, the competition's tables, and the answers beside them.

Images lie in train_images/<study>/<series>/<instance>.dcm and test_images/..., arguments in phantom.json.
"""

import hashlib
import json
import os
import shutil
import socket
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
from lsdc_utils.phantom import labels
from lsdc_utils.phantom.scanner import Protocol
from lsdc_utils.phantom.study import NORMAL, SERIES_PER_STUDY, Dirt, StudyPlan, make_study
from lsdc_utils.vocabulary import COLUMNS, SEVERITIES

LARGEST_ID = 4_294_967_295  # ids of the real studies and series fill 32 bits
POINTS = ("study_id", "series_id", "instance_number", "condition", "level", "x", "y")
SERIES = ("study_id", "series_id", "series_description")
SEEN = ("study_id", "split", "series_id", "series_type")  # a patient moves a little between series
TABLES = {  # name -> columns; those with a column `split` hold both splits
    "train": ("study_id", *COLUMNS),  # grades in words, empty where a label is missing
    "train_label_coordinates": POINTS,
    "train_series_descriptions": SERIES,
    "train_marks": ("study_id", *SEEN[2:], "mark", *"XYZ"),  # in the canal, see `Body.marks`; otherwise as anatomy
    "test_series_descriptions": SERIES,
    "sample_submission": ("row_id", *SEVERITIES),  # every row of every test study
    # The answers, which nothing may open before predictions are made:
    "solution": ("row_id", "severity"),  # test labels 0, 1, 2; rows without a label are absent
    "solution_coordinates": POINTS,  # true points of the test studies
    # narrowing 0 to 1; measure on the body as built; grade before a gross error; its kind, empty where there is none
    "latents": ("row_id", "split", "narrowing", "measure", "unit", "own_grade", "gross"),
    "oracle": ("row_id", "split", *SEVERITIES),  # natural probabilities given the study's narrowings
    # Where each series sees the 25 places, and the discs' middles and unit normals: LPS mm, as far as its slices reach
    "anatomy": (*SEEN, "condition", "level", "side", *"XYZ"),
    "discs": (*SEEN, "level", *"XYZ", *NORMAL),
    "spines": (*SEEN[:2], "ordinary", "transitional", "slip_mm", "slip_level", "scoliosis_mm", "stir", "tilted_blocks"),
    "wrong_labels": ("row_id", "severity", "meant"),  # training labels that differ from what their reader meant
}


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
    scoliosis: float = 0.0

    @staticmethod
    def of(n_train: int, n_test: int, seed: int, **choices: Any) -> "Design":
        """The design for arguments of `write_phantom`; ValueError where they make no sense."""
        n = n_train + n_test
        if min(n_train, n_test) < 0 or n == 0:
            raise ValueError(f"a phantom of {n_train} + {n_test} studies cannot be written")
        for name in ("narrowing", "bodies"):
            rows = choices.pop(name, None)
            if rows is not None and len(rows) != n:
                raise ValueError(f"phantom: {name} has {len(rows)} entries for {n} studies")
            choices[name] = None if rows is None else np.asarray(rows).tolist()
        choices["scoliosis"] = bow = float(choices.get("scoliosis", 0))
        if not 0 <= bow <= 30:  # a Cobb angle of up to 98 degrees
            raise ValueError(f"phantom: scoliosis is a bow of 0 to 30 mm, not {bow}")
        dirt = Dirt(**{name: choices.pop(name) for name in Dirt.__dataclass_fields__ if name in choices})
        protocol = Protocol(**{name: choices.pop(name) for name in Protocol.__dataclass_fields__ if name in choices})
        return Design(n_train, n_test, seed, dirt, protocol, **choices)


def write_phantom(root: str | Path, n_train: int, n_test: int, seed: int, *, workers: int = 1, **choices: Any) -> Path:
    """Write a phantom of n_train + n_test studies to the new folder `root` and return it.

    choices, by name:

    - `images=False`: no images. Rates of `Dirt`, e.g. `tilted_blocks=0`. Factors of `Protocol`, e.g. `noise=2`.
    - `scale="realistic"`: pixels of 0.4 to 0.7 mm. `population`: one of `POPULATIONS`, which training never draws.
    - `slip`, `transitional`: True or False force or forbid a slipped or a transitional vertebra in every spine.
    - `scoliosis`: mm from a straight line to the apex of every spine's one bow, as `draw_bow` gives it.
    - `narrowing`: (n_train + n_test, 25) numbers in [0, 1] in the order of COLUMNS, instead of drawn ones.
    - `bodies`: (n_train + n_test,) integers; studies of a split with the same one differ in narrowings and ids alone.

    Arguments you omit do not change the result of a seed; `workers` (processes) changes no byte. The folder appears
    whole. ValueError where `root` exists or an argument makes no sense.
    """
    root, design = Path(root), Design.of(n_train, n_test, seed, **choices)
    if root.exists():
        raise ValueError(f"{root} exists already: choose a new folder for the phantom, or use that one")
    root.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".writing-{root.name}-{socket.gethostname()}-"
    for left in root.parent.glob(f"{prefix}*"):  # what killed processes of this machine left behind
        if not psutil.pid_exists(int(left.name.removeprefix(prefix))):
            shutil.rmtree(left, ignore_errors=True)
    building = root.parent / f"{prefix}{os.getpid()}"
    record = asdict(design) | {"fingerprint": fingerprint(n_train, n_test, seed, **choices)}
    try:
        plans = plan_studies(design)
        building.mkdir()
        for split in ("train", "test") if design.images else ():
            (building / f"{split}_images").mkdir()
        studies = _make_studies(plans, building if design.images else None, workers)
        for name, columns in TABLES.items():
            table = pd.DataFrame([row for study in studies for row in study.get(name, ())], columns=columns)
            table.to_csv(building / f"{name}.csv", index=False, lineterminator="\n")
        write_json(building / "phantom.json", record)
        try:
            building.rename(root)
        except OSError:  # another process may just have written the same phantom: keep that one
            theirs = root / "phantom.json"
            if not theirs.is_file() or theirs.read_bytes() != (building / theirs.name).read_bytes():
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return root


def fingerprint(n_train: int, n_test: int, seed: int, **choices: Any) -> str:
    """Twelve hexadecimal digits that identify a phantom: a hash of arguments of `write_phantom` and of the source."""
    design = asdict(Design.of(n_train, n_test, seed, **choices))
    digest = hashlib.sha256(json.dumps(design, sort_keys=True).encode())
    sources = [file for file in resources.files(__package__).iterdir() if file.name.endswith((".py", ".json"))]
    for file in [Path(vocabulary.__file__), Path(geometry.__file__), *sorted(sources, key=lambda file: file.name)]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def plan_studies(design: Design) -> list[StudyPlan]:
    """Plans of the training studies, then of the test studies; ids carry no information, sorted within a split."""
    counts, seed = (design.n_train, design.n_test), design.seed
    total = sum(counts)
    bodies = [*range(design.n_train), *range(design.n_test)] if design.bodies is None else design.bodies
    rng, least = np.random.default_rng([seed, 2]), 1_000_000
    ids = least + rng.choice(LARGEST_ID - least, total * (1 + SERIES_PER_STUDY), replace=False)
    series_ids = ids[total:].reshape(total, SERIES_PER_STUDY).tolist()
    common = (design.dirt, design.protocol, design.slip, design.transitional, design.scoliosis)
    plans = []
    for k, (split, n) in enumerate(zip(("train", "test"), counts, strict=True)):
        first = len(plans)
        if design.narrowing is None:
            grades = labels.draw_grades(n, [seed, k])
        else:
            given = np.array(design.narrowing[first : first + n], float).reshape(-1, len(COLUMNS))
            grades = labels.grade(given, [seed, k])
        for i, study_id in enumerate(np.sort(ids[first : first + n]).tolist()):
            drawn = (grades.narrowing[i], grades.labels[i], grades.own[i], grades.gross[i])
            streams = (seed, k, bodies[first + i])
            plans.append(StudyPlan(split, study_id, series_ids[first + i], *drawn, streams, *common))
    return plans


def _make_studies(plans: list[StudyPlan], root: Path | None, workers: int) -> list[dict[str, list[dict]]]:
    """What `make_study` returns for each plan, in `workers` processes with one thread of linear algebra each."""
    studies = []
    with threadpool_limits(1):
        for study in parallel.each(partial(make_study, root), plans, workers, few=2, chunk=4, begin=_use_one_thread):
            studies.append(study)
            if len(studies) % max(20, len(plans) // 10) == 0 or len(studies) == len(plans):
                print(f"phantom: study {len(studies)}/{len(plans)}", flush=True)
    return studies


def _use_one_thread() -> None:
    """Start of a worker. In this module, so that the libraries are loaded by then: a limit set earlier misses them."""
    threadpool_limits(1)
