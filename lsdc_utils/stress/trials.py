"""What only a phantom can show: one thing changed at a time, and what the frozen models of a run make of it.

A `Case` is one study of the phantom, drawn for the purpose: it is written as DICOM, read, graded as any study is, and
removed again. Studies with the same `body` are one patient, imaged in the same way with the same noise, so that rows
differ by what was changed alone. Nothing here is fitted, and no test study of a run is used.

Answers of all cases are one table: case (its number), setting, the row's condition and level, model, and its natural
probabilities. Truth is the oracle's: a label is a reader's, so scores are means over `READERS` simulated readers.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from lsdc_utils import metric, parallel
from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, read_study
from lsdc_utils.detector.canal import study_canal
from lsdc_utils.detector.classes import Detector
from lsdc_utils.grading.blend import Tables
from lsdc_utils.grading.grade import (
    BLENDS,
    READ_ON,
    Graded,
    Models,
    blend_studies,
    join_graded,
    load_models,
    prior_of,
    rows_of,
)
from lsdc_utils.phantom import labels, write_phantom
from lsdc_utils.stress import occlusion, versions
from lsdc_utils.vit.predict import predict_studies
from lsdc_utils.vocabulary import (
    COLUMNS,
    CONDITIONS,
    GROUPS,
    LEVELS,
    SERIES_TYPES,
    SEVERITIES,
    mirrored,
    parse_row_id,
    row_id,
)

USUAL = "as usual"  # the setting in which nothing is changed
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {  # what breaks it: factor -> setting -> arguments of write_phantom
    "motion between series": {"4.5 mm, 3 degrees": {"motion": 3.0}, "9 mm, 6 degrees": {"motion": 6.0}},
    "slice thickness": {"1.5 times": {"step": 1.5}, "2 times": {"step": 2.0}},
    "pixel size": {"1.25 times": {"pixel": 1.25}, "1.45 times": {"pixel": 1.45}},
    "noise": {"2 times": {"noise": 2.0}, "4 times": {"noise": 4.0}},
    "bias field": {"3 times": {"field": 3.0}, "6 times": {"field": 6.0}},
    "contrast": {"T2 alone": {"stir": 0.0}, "STIR alone": {"stir": 1.0}},
    "spine": {"transitional": {"transitional": True}, "slipped": {"slip": True}},
}
CENTRE_MM = (2.0, 4.0, 8.0)  # errors of the detected canal points that the transformer is given
DOSE_LEVELS = ("l4_l5", "l3_l4", "l5_s1")  # narrowed, body by body in turn
CONTROLLED = {"series_missing": 0.0, "second_axial": 0.0, "short_stack": 0.0}  # dirt that would hide what is swept
READERS = 50  # simulated
CHUNK = 5  # cases that a process takes at a time
MODELS = tuple(BLENDS)


@dataclass(frozen=True)
class Case:
    """One study: whose body, with which narrowings (25,), drawn how; and what else is asked of it."""

    factor: str
    setting: str
    body: int
    narrowing: np.ndarray
    choices: dict[str, Any] = field(default_factory=dict)  # of write_phantom
    row: tuple[str, str] = ("", "")  # condition and level that a dose is given to
    look: bool = False  # where do the models look for that row?
    lacking: bool = False  # grade it without each series, and with errors of its centres, too
    change: bool = False  # grade its versions that must not change a grade, too


@dataclass(frozen=True)
class Frozen:
    """The frozen models of a run, as far as grading needs them."""

    weights: Path
    recipe: dict[str, Any]  # blend.json


# ---- the cases -----------------------------------------------------------------------------------------------------


def dose_cases(bodies: int, doses: Sequence[float], seed: int) -> list[Case]:
    """One narrowing swept over `doses`, for each condition on each of some bodies; all else stays."""
    background = labels.draw_grades(bodies, [seed, 1]).narrowing if bodies else np.empty((0, len(COLUMNS)))
    cases = []
    for body, condition in ((body, condition) for body in range(bodies) for condition in CONDITIONS):
        level = DOSE_LEVELS[body % len(DOSE_LEVELS)]
        for dose in doses:
            narrowing = background[body].copy()
            narrowing[COLUMNS.index(f"{condition}_{level}")] = dose
            look = dose == max(doses)
            cases.append(Case("dose", f"{dose:g}", body, narrowing, CONTROLLED, (condition, level), look=look))
    return cases


def setting_cases(studies: int, changed: int, seed: int) -> list[Case]:
    """The same fresh studies as usual and in each of `SETTINGS`; the first `changed` ones also in other versions."""
    drawn = labels.draw_grades(studies, [seed, 2]).narrowing if studies else ()
    bodies = [(10_000 + number, narrowing) for number, narrowing in enumerate(drawn)]  # none is a body of a dose
    cases = [
        Case(USUAL, USUAL, body, narrowing, CONTROLLED, lacking=True, change=number < changed)
        for number, (body, narrowing) in enumerate(bodies)
    ]
    for factor, settings in SETTINGS.items():
        for setting, choices in settings.items():
            cases += [Case(factor, setting, body, narrowing, CONTROLLED | choices) for body, narrowing in bodies]
    return cases


# ---- answers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """What the models say of all cases.

    rows: case, factor, setting, body, condition, level, model, natural probabilities. looks: case, condition, level,
    model, weights (trained or shuffled), share, hit, chance (`occlusion.attention`). moves: case, version, and the
    largest change of a natural probability in any row of the ensemble.
    """

    rows: pd.DataFrame
    looks: pd.DataFrame
    moves: pd.DataFrame


def answer(cases: Sequence[Case], run: Frozen, seed: int, workers: int, threads: int) -> Answers:
    """Draw and grade all cases, in `workers` processes of `threads`, and say how far it is.

    Of processes that share a GPU there are two at most: each holds all models of the run.
    """
    workers = min(workers, 2) if torch.cuda.is_available() else workers
    chunks = [range(start, min(start + CHUNK, len(cases))) for start in range(0, len(cases), CHUNK)]
    work = partial(_answer_chunk, run, seed)
    given = [[(number, cases[number]) for number in chunk] for chunk in chunks]
    torch.set_num_threads(threads)
    found: list[Answers] = []
    for chunk, part in zip(
        chunks, parallel.each(work, given, workers, few=2, begin=partial(torch.set_num_threads, threads)), strict=True
    ):
        found.append(part)
        if len(found) % 5 == 0 or chunk.stop == len(cases):
            print(f"drew and graded case {chunk.stop}/{len(cases)}", flush=True)
    tables = {name: [getattr(part, name) for part in found] for name in ("rows", "looks", "moves")}
    return Answers(**{name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()})


def _answer_chunk(run: Frozen, seed: int, cases: Sequence[tuple[int, Case]]) -> Answers:
    models = _models(run.weights, tuple(run.recipe["folds"]), run.recipe["vit_views"], _times(run.weights))
    rows, looks, moves = [], [], []
    for number, case in cases:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "phantom"
            with contextlib.redirect_stdout(io.StringIO()):  # how far a phantom of one study is
                write_phantom(folder, 0, 1, seed, narrowing=[case.narrowing], bodies=[case.body], **case.choices)
            comp = competition.read(folder)
            study_id = int(comp.series["study_id"].iloc[0])
            stacks, _ = read_study(comp, "test", study_id)
            graded = models.grade(study_id, stacks)
            as_is, _ = blend_studies(run.recipe, join_graded([graded]), [study_id])
            answers = [(case.factor, case.setting, as_is)]
            if case.lacking:
                answers += _lacking(models, run.recipe, study_id, stacks, graded, case.body)
            rows += [_rows(tables).assign(case=number, factor=f, setting=s, body=case.body) for f, s, tables in answers]
            if case.look:
                looks += [look | {"case": number} for look in _looks(models, case, comp, stacks, graded["points"])]
            if case.change:
                moved = _moves(models, run.recipe, folder, Path(temporary) / "versions", study_id)
                moves += [{"case": number, "version": version, "moved": by} for version, by in moved]
    columns = ["case", "condition", "level", "model", "weights", "share", "hit", "chance"]
    return Answers(
        pd.concat(rows, ignore_index=True),
        pd.DataFrame(looks, columns=columns),
        pd.DataFrame(moves, columns=["case", "version", "moved"]),
    )


@functools.lru_cache(maxsize=1)
def _models(weights: Path, folds: tuple[int, ...], views: int, _: tuple[int, ...]) -> Models:
    """The frozen models, loaded once in each process; anew where a file of theirs was written since."""
    return load_models(weights, folds, views)


def _times(weights: Path) -> tuple[int, ...]:
    return tuple(file.stat().st_mtime_ns for file in sorted(weights.iterdir()))


def _rows(tables: Tables) -> pd.DataFrame:
    """Tables of one study by each of `MODELS` as one: condition, level, model, natural probabilities."""
    parts = []
    for model in MODELS:
        keys = [parse_row_id(row)[1:] for row in tables[model]["row_id"]]
        table = pd.DataFrame(keys, columns=["condition", "level"]).assign(model=model)
        parts.append(table.assign(**{name: tables[model][name].to_numpy() for name in SEVERITIES}))
    return pd.concat(parts, ignore_index=True)


def _lacking(
    models: Models,
    recipe: dict[str, Any],
    study_id: int,
    stacks: list[Stack],
    graded: Graded,
    seed: int,
) -> Iterator[tuple[str, str, Tables]]:
    """A study graded without each type of series, and with canal points that lie beside where they were found."""
    for kind in SERIES_TYPES:
        without = models.grade(study_id, [stack for stack in stacks if stack.series_type != kind])
        yield "missing series", f"no {kind}", blend_studies(recipe, join_graded([without]), [study_id])[0]
    canal = _canal(graded["points"])
    way = np.random.default_rng(seed).standard_normal((len(canal), 3))
    way /= np.linalg.norm(way, axis=1, keepdims=True)
    for error in CENTRE_MM:
        beside = canal.assign(**dict(zip("XYZ", (canal[list("XYZ")].to_numpy() + error * way).T, strict=True)))
        seen = predict_studies(models.vits, [(study_id, stacks)], beside, models.views)
        tables = blend_studies(recipe, join_graded([graded | {"vit3d": seen}]), [study_id])[0]
        yield "error of the centres", f"{error:g} mm", tables


def _canal(points: pd.DataFrame) -> pd.DataFrame:
    """The canal points among those of all detectors, as the transformer takes them."""
    of = {key: points[points["condition"] == key].drop(columns="condition") for key in ("scs", "nfn")}
    return study_canal(of["scs"], of["nfn"])


def _looks(
    models: Models,
    case: Case,
    comp: competition.Competition,
    stacks: list[Stack],
    points: pd.DataFrame,
) -> Iterator[dict[str, Any]]:
    """Where the first fold's transformer and detector look for the case's row, trained and with shuffled weights."""
    condition, level = case.row
    group = CONDITIONS[condition].group
    anatomy = pd.read_csv(comp.root / "anatomy.csv")
    mine = (anatomy["condition"] == condition) & (anatomy["level"] == level)
    mine &= anatomy["series_type"] == READ_ON[condition]
    if not mine.any():
        return
    place, canal = anatomy.loc[mine, list("XYZ")].to_numpy(float).mean(axis=0), _canal(points)
    network, vit = models.yolos[group][0], models.vits[0]
    for weights, one, other in (
        ("trained", network.model, vit),
        ("shuffled", occlusion.shuffled(network.model, case.body), occlusion.shuffled(vit, case.body)),
    ):
        yolo = Detector(one, network.config, network.fold, network.about)
        maps = {"yolo": occlusion.look_detector(yolo, stacks, canal, case.row, place)}
        maps["vit3d"] = occlusion.look_vit(other, stacks, canal, case.row, place)
        for model, changes in maps.items():
            named = {"condition": condition, "level": level, "model": model, "weights": weights}
            yield named | occlusion.attention(changes)


def _moves(models: Models, recipe: dict[str, Any], data: Path, folder: Path, study_id: int) -> list[tuple[str, float]]:
    """The largest change of a natural probability in the ensemble's rows, for each version of a study."""
    versions.write_versions(data, [study_id], folder)
    comp, natural = competition.read(folder), {}
    for version in versions.VERSIONS:
        own = versions.id_of(study_id, version)
        graded = models.grade(own, read_study(comp, "test", own)[0])
        table = blend_studies(recipe, join_graded([graded]), [own])[0]["ensemble"].set_index("row_id")
        keys = [parse_row_id(row)[1:] for row in table.index]
        back = [row_id(own, mirrored(c) if version == "mirrored" else c, level) for c, level in keys]
        natural[version] = table.loc[back, list(SEVERITIES)].to_numpy()
    first = natural.pop("as it is")
    return [(version, float(np.abs(rows - first).max())) for version, rows in natural.items()]


# ---- what they say -------------------------------------------------------------------------------------------------


def responses(cases: Sequence[Case], rows: pd.DataFrame) -> pd.DataFrame:
    """Dose and response: case, body, condition, level, dose, model (those of `MODELS`, oracle, readers), the natural
    probabilities `severe` and `moderate` (or worse) of the narrowed row, and an error-free reader's cut-offs for them,
    `severe_from` and `moderate_from`."""
    lines = []
    for number, case in enumerate(cases):
        if case.factor != "dose":
            continue
        column = COLUMNS.index("_".join(case.row))
        at = {"case": number, "body": case.body, "condition": case.row[0], "level": case.row[1]}
        at["dose"] = float(case.narrowing[column])
        at["moderate_from"], at["severe_from"] = labels.CUTS[CONDITIONS[case.row[0]].group]
        oracle = labels.oracle(case.narrowing[None])[0, column]
        many = np.repeat(case.narrowing[None], READERS, axis=0)
        read = labels.read(many, np.random.default_rng([case.body, column]))[:, column]
        shares = [(read == severity).mean() for severity in range(3)]
        mine = rows[(rows["case"] == number) & (rows["condition"] == case.row[0]) & (rows["level"] == case.row[1])]
        of_model = {one.model: [getattr(one, name) for name in SEVERITIES] for one in mine.itertuples()}
        for model, natural in {**of_model, "oracle": oracle, "readers": shares}.items():
            lines.append(at | {"model": model, "moderate": natural[1] + natural[2], "severe": natural[2]})
    return pd.DataFrame(lines)


def slopes(found: pd.DataFrame) -> pd.DataFrame:
    """The rise of each response at its threshold, by condition and event: model's slope, the oracle's, and their ratio.

    A slope is the rise for each unit of narrowing from the second dose below the error-free reader's cut-off to the
    second above it, as far as there are such; of the mean over bodies.
    """
    lines = []
    for (condition, model), mine in found.groupby(["condition", "model"], sort=False):
        for event in ("moderate", "severe"):
            cut = mine[f"{event}_from"].iloc[0]
            curve = mine.groupby("dose")[event].mean()
            above = int(np.searchsorted(curve.index, cut))
            low, high = curve.index[max(above - 2, 0)], curve.index[min(above + 1, len(curve) - 1)]
            slope = (curve[high] - curve[low]) / (high - low)
            lines.append({"condition": condition, "event": event, "model": model, "slope": slope})
    table = pd.DataFrame(lines).pivot_table(index=["condition", "event"], columns="model", values="slope", sort=False)
    return table.assign(ratio=table["ensemble"] / table["oracle"])


def by_group(ratio: pd.Series) -> str:
    """The mean ratio of slopes of each condition group in words, e.g. spinal 0.77, foraminal 0.53; of `slopes`."""
    groups = ratio.groupby([CONDITIONS[condition].group for condition, _ in ratio.index], sort=False).mean()
    return ", ".join(f"{GROUPS[key].score} {value:.2f}" for key, value in groups.items())


def leaks(cases: Sequence[Case], rows: pd.DataFrame, model: str = "ensemble") -> pd.DataFrame:
    """The range over all doses of the probability of moderate or worse of every row that is not narrowed: condition
    and level narrowed, body, row (condition and level), leak."""
    lines = []
    mine = rows[(rows["factor"] == "dose") & (rows["model"] == model)]
    mine = mine.assign(chance=mine["moderate"] + mine["severe"], swept=[cases[number].row for number in mine["case"]])
    for (swept, body), one in mine.groupby(["swept", "body"], sort=False):
        span = one.groupby(["condition", "level"])["chance"].agg(np.ptp)
        lines += [
            {"narrowed": "_".join(swept), "body": body, "row": "_".join(row), "leak": leak}
            for row, leak in span.items()
            if row != swept
        ]
    return pd.DataFrame(lines)


def scores_by_setting(cases: Sequence[Case], rows: pd.DataFrame, recipe: dict[str, Any]) -> pd.DataFrame:
    """How each setting is graded: factor, setting, studies, score and skill of the ensemble with its 95 % interval over
    studies, and lost: the skill that is lost against `USUAL`, on the same bodies, with low and high.

    Scores are means over `READERS` readers of each body.
    """
    usual = {case.body: case for case in cases if case.factor == USUAL}
    truth = np.stack([case.narrowing for case in usual.values()])
    bodies, known = list(usual), {"oracle": labels.oracle(truth), "prior": _prior(recipe, len(usual))}
    read = [labels.read(truth, np.random.default_rng([7, reader])) for reader in range(READERS)]
    losses = {name: _mean_losses(bodies, read, table) for name, table in known.items()}
    mine = rows[(rows["model"] == "ensemble") & (rows["factor"] != "dose")]
    for key, one in mine.groupby(["factor", "setting"], sort=False):
        by_body = one.set_index(["body", "condition", "level"])[list(SEVERITIES)]
        order = [(body, condition, level) for body in bodies for condition in CONDITIONS for level in LEVELS]
        losses[key] = _mean_losses(bodies, read, by_body.loc[order].to_numpy().reshape(len(bodies), -1, 3))
    drawn = metric.resampled_scores(losses)
    whole = {name: one.resampled(np.ones((1, len(bodies)))) for name, one in losses.items()}
    skills = {k: _skill(drawn, k) for k in losses if isinstance(k, tuple)}
    lines = []
    for (factor, setting), skill in skills.items():
        own, first = (float(_skill(whole, key)[0]) for key in ((factor, setting), (USUAL, USUAL)))
        [(low, high)] = metric.interval(skill[:, None])
        [(least, most)] = metric.interval((skills[USUAL, USUAL] - skill)[:, None])
        lines.append(
            (factor, setting, len(bodies), whole[factor, setting][0, -1], own, low, high, first - own, least, most)
        )
    names = ["factor", "setting", "studies", "score", "skill", "low", "high", "lost", "lost_low", "lost_high"]
    return pd.DataFrame(lines, columns=names)


def _skill(scores: dict[Any, np.ndarray], key: tuple[str, str]) -> np.ndarray:
    prior, model, oracle = (scores[name][:, -1] for name in ("prior", key, "oracle"))
    return (prior - model) / (prior - oracle)


def _prior(recipe: dict[str, Any], studies: int) -> np.ndarray:
    """The recipe's prior (studies, 25, 3)."""
    rows = rows_of(range(1, studies + 1))
    return prior_of(recipe, rows)[list(SEVERITIES)].to_numpy().reshape(studies, len(COLUMNS), 3)


def _mean_losses(bodies: Iterable[int], read: Sequence[np.ndarray], natural: np.ndarray) -> metric.StudyLosses:
    """What each study adds to the score of natural probabilities (n, 25, 3), as a mean over readers' labels (n, 25)."""
    names, weighted = rows_of(bodies)[["row_id"]], metric.weight_rows(natural.reshape(-1, 3))
    each = [metric.Scorer(names.assign(severity=labels_of.ravel())).losses(weighted) for labels_of in read]
    summed = (np.mean([getattr(one, name) for one in each], axis=0) for name in ("losses", "weights"))
    return metric.StudyLosses(each[0].studies, *summed)


def numbers(
    ratio: pd.DataFrame, leak: pd.DataFrame, looks: pd.DataFrame, moves: pd.DataFrame
) -> dict[str, float | None]:
    """The four numbers of `scores.json`: slope, the mean ratio of the ensemble's slopes to the oracle's; leak, the
    largest; looked, the trained transformer's mean share of change within `occlusion.NEAR`; moved, the largest change
    by what must change nothing. None where nothing tells."""
    trained = looks[(looks["weights"] == "trained") & (looks["model"] == "vit3d")]
    found = {
        "slope": ratio["ratio"].mean(),
        "leak": leak["leak"].max(),
        "looked": trained["share"].mean(),
        "moved": moves["moved"].max(),
    }
    return {name: float(value) if np.isfinite(value) else None for name, value in found.items()}


def data_sheet(settings: pd.DataFrame) -> pd.DataFrame:
    """The ensemble in each setting of the stress tests, as text: score, skill with its interval, and the skill lost."""
    intervals = [f"{low:.2f} to {high:.2f}" for low, high in zip(settings["low"], settings["high"], strict=True)]
    lost = list(settings[["lost", "lost_low", "lost_high"]].itertuples(index=False, name=None))
    columns = {
        "Score": [f"{score:.3f}" for score in settings["score"]],
        "Skill": [f"{skill:.2f}" for skill in settings["skill"]],
        "95 % interval": intervals,
        "Skill lost": ["–", *("{:+.2f} ({:+.2f} to {:+.2f})".format(*values) for values in lost[1:])],
    }
    both = zip(settings["factor"], settings["setting"], strict=True)
    names = [setting if setting == factor else f"{factor}: {setting}" for factor, setting in both]
    return pd.DataFrame(columns, index=pd.Index(names, name=f"{settings['studies'].iloc[0]} fresh studies"))
