"""The frozen models' answers to all cases: each study is drawn, graded as usual, and dropped."""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from threadpoolctl import threadpool_limits

from lsdc_utils import geometry, parallel
from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, read_study
from lsdc_utils.grading.blend import Tables
from lsdc_utils.grading.grade import Graded, Models, blend_studies, join_graded, load_models
from lsdc_utils.phantom.study import StudyPlan, make_study
from lsdc_utils.phantom.write import SERIES, Design, plan_studies
from lsdc_utils.stress import occlusion, symmetry
from lsdc_utils.stress.cases import Case
from lsdc_utils.stress.drawing import Drawing
from lsdc_utils.vit.predict import predict_studies
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, SERIES_TYPES, SEVERITIES, mirrored, parse_row_id, row_id

MODELS = ("yolo", "vit3d", "ensemble")
CENTRE_MM = (2.0, 4.0, 8.0)  # errors added to the points that the transformer is given
LOOKS = ["case", "condition", "level", "model", "weights", "share", "hit", "chance"]
MOVES = ["case", "version", "moved"]


class Answers(NamedTuple):
    """The models' answers to all cases, by the case's number."""

    rows: pd.DataFrame  # case, factor, setting, body, condition, level, model, natural probabilities
    looks: pd.DataFrame  # `LOOKS`, see `occlusion.attention`
    moves: pd.DataFrame  # `MOVES`: the largest change of a natural probability in any row of the ensemble


def answer(cases: Sequence[Case], run: Path, recipe: dict[str, Any], seed: int, workers: int, threads: int) -> Answers:
    """Grade all cases in `workers` processes of `threads` torch threads. run: its folder; recipe: the blend."""
    workers = min(workers, 2) if torch.cuda.is_available() else workers  # each holds all models
    chunks: dict[tuple, list[tuple[int, Case]]] = defaultdict(list)  # cases that a process draws one after another
    for number, case in enumerate(cases):
        chunks[case.body, case.row].append((number, case))
    torch.set_num_threads(threads)
    work, parts = partial(_answer_chunk, run.resolve() / "weights", recipe, seed), []
    begin = partial(torch.set_num_threads, threads)
    for part in parallel.each(work, list(chunks.values()), workers, few=2, begin=begin):
        parts.append(part)
        print(f"drew and graded part {len(parts)}/{len(chunks)} of {len(cases)} studies", flush=True)
    tables = (pd.concat(tables, ignore_index=True) for tables in zip(*parts, strict=True))
    return Answers(*(table.sort_values("case", kind="stable", ignore_index=True) for table in tables))


def _answer_chunk(weights: Path, recipe: dict[str, Any], seed: int, cases: Sequence[tuple[int, Case]]) -> Answers:
    times = tuple(file.stat().st_mtime_ns for file in sorted(weights.iterdir()))
    models = _models(weights, tuple(recipe["folds"]), recipe["vit_views"], tuple(recipe.get("members", ())), times)
    rows, looks, moves = [], [], []
    with threadpool_limits(1, "blas"), tempfile.TemporaryDirectory() as temporary:
        drawing = Drawing(Path(temporary) / "series")
        for number, case in cases:
            choices = {"narrowing": [case.narrowing], "bodies": [case.body], **case.choices}
            [plan] = plan_studies(Design.of(0, 1, seed, **choices))
            stacks = drawing.stacks(plan)
            study = _Study(plan, models, recipe, stacks, models.grade(plan.study_id, stacks))
            tables = [(case.factor, case.setting, study.blend(study.graded))]
            tables += study.reduced(case.body) if case.reduce else ()
            rows += [_rows(table).assign(case=number, factor=f, setting=s, body=case.body) for f, s, table in tables]
            looks += [look | {"case": number} for look in study.looks(case)] if case.occlude else ()
            changes = study.moves(Path(temporary) / str(number)) if case.transform else ()
            moves += [{"case": number, "version": version, "moved": moved} for version, moved in changes]
    others = pd.DataFrame(looks, columns=LOOKS), pd.DataFrame(moves, columns=MOVES)
    return Answers(pd.concat(rows, ignore_index=True), *others)


@lru_cache(maxsize=1)
def _models(weights: Path, folds: tuple[int, ...], views: int, members: tuple[str, ...], _: tuple[int, ...]) -> Models:
    """The frozen models, loaded once in each process; the last argument, times of their files, reloads changed ones."""
    return load_models(weights, folds, views, members=members)


def _rows(tables: Tables) -> pd.DataFrame:
    """Tables of one study by each of `MODELS` as one: condition, level, model, natural probabilities."""
    table = pd.concat([tables[model].assign(model=model) for model in MODELS], ignore_index=True)
    table[["condition", "level"]] = [parse_row_id(row)[1:] for row in table["row_id"]]
    return table[["condition", "level", "model", *SEVERITIES]]


@dataclass(frozen=True)
class _Study:
    """A phantom study as the models of a run grade it."""

    plan: StudyPlan
    models: Models
    recipe: dict[str, Any]
    stacks: list[Stack]
    graded: Graded

    def blend(self, graded: Graded) -> Tables:
        """Each blended table of the study, from its graded tables."""
        return blend_studies(self.recipe, join_graded([graded], self.models.vits), [self.plan.study_id])[0]

    def reduced(self, seed: int) -> Iterator[tuple[str, str, Tables]]:
        """The study graded without each type of series, and with crop centres beside the detected points."""
        for kind in SERIES_TYPES:
            stacks = [stack for stack in self.stacks if stack.series_type != kind]
            yield "missing series", f"no {kind}", self.blend(self.models.grade(self.plan.study_id, stacks))
        points = self.graded["points"]
        directions = geometry.unit(np.random.default_rng(seed).standard_normal((len(points), 3)))
        for error in CENTRE_MM:
            beside = points.copy()
            beside[[*"XYZ"]] += error * directions
            study = [(self.plan.study_id, self.stacks)]
            vits, views = self.models.vits, self.models.views
            rows = {name: predict_studies(of, study, beside, views) for name, of in vits.items()}
            yield "error of the centres", f"{error:g} mm", self.blend(self.graded | rows)

    def looks(self, case: Case) -> Iterator[dict[str, Any]]:
        """Where the first fold's (first) transformer and detector look for the case's row, trained and shuffled."""
        condition, level = case.row
        group = GROUPS[CONDITIONS[condition].group]
        anatomy = pd.DataFrame(make_study(None, self.plan)["anatomy"])
        here = anatomy.query("condition == @condition and level == @level and series_type == @group.series_type")
        if here.empty:
            return
        place, points = here[list("XYZ")].to_numpy(float).mean(axis=0), self.graded["points"]
        detector, vit = self.models.yolos[group.key][0], next(iter(self.models.vits.values()))[0]
        for weights in ("trained", "shuffled"):
            if weights == "shuffled":
                detector = replace(detector, model=occlusion.shuffled(detector.model, case.body))
                vit = occlusion.shuffled(vit, case.body)
            maps = {"yolo": occlusion.look_detector(detector, self.stacks, points, place)}
            maps["vit3d"] = occlusion.look_vit(vit, self.stacks, points, case.row, place)
            for model, changes in maps.items():
                named = {"condition": condition, "level": level, "model": model, "weights": weights}
                yield named | occlusion.attention(changes)

    def moves(self, folder: Path) -> list[tuple[str, float]]:
        """The largest change of a probability in the ensemble's rows by each version, whose files go to `folder`."""
        series = pd.DataFrame(make_study(folder, self.plan)["test_series_descriptions"])
        series[[*SERIES]].to_csv(folder / symmetry.SERIES_TABLE, index=False)
        symmetry.write_versions(folder, [self.plan.study_id], folder / "versions")
        comp, natural = competition.read(folder / "versions"), {}
        for version in symmetry.VERSIONS:
            study_id = symmetry.id_of(self.plan.study_id, version)
            graded = self.models.grade(study_id, read_study(comp, "test", study_id)[0])
            joined = join_graded([graded], self.models.vits)
            table = blend_studies(self.recipe, joined, [study_id])[0]["ensemble"].set_index("row_id")
            keys = [parse_row_id(row)[1:] for row in table.index]
            same = [row_id(study_id, mirrored(c) if version == "mirrored" else c, level) for c, level in keys]
            natural[version] = table.loc[same, list(SEVERITIES)].to_numpy()
        first = natural.pop("as it is")
        return [(version, float(np.abs(rows - first).max())) for version, rows in natural.items()]
