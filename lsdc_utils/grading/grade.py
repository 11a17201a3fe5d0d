"""Studies graded by the frozen models of a run: from stacks to each model's rows, and from these to the ensemble's.
`published.grade` has the same functions for the published method."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from lsdc_utils import metric
from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, read_study
from lsdc_utils.detector.canal import axial_slices
from lsdc_utils.detector.chain import SURE
from lsdc_utils.detector.classes import Detector
from lsdc_utils.detector.levels import CONFIDENCES, Scheme, grade_study
from lsdc_utils.detector.localiser import Localiser, load_localiser
from lsdc_utils.detector.numbering import DOUBTFUL
from lsdc_utils.detector.training import load_detector
from lsdc_utils.grading import blend
from lsdc_utils.grading.blend import Tables
from lsdc_utils.vit.model import load_vit
from lsdc_utils.vit.predict import predict_studies
from lsdc_utils.vocabulary import GROUP_OF, GROUPS, SEVERITIES, study_row_ids, transformers

COLUMNS_OF = {  # of the tables that a study's grading gives besides those of the transformers, where it gives none
    "yolo": ["row_id", *SEVERITIES],
    "points": ["study_id", "level", "side", "X", "Y", "Z", *CONFIDENCES, "condition"],
    "findings": competition.FINDINGS,
    "series": ["study_id", "series_type"],
    "slices": ["study_id"],
}
Graded = dict[str, pd.DataFrame]  # tables by the keys of COLUMNS_OF and the names of transformers


@dataclass(frozen=True)
class Models:
    """The frozen models of some folds: localisers, detectors by group, transformers, and how these predict."""

    localisers: list[Localiser]
    yolos: dict[str, list[Detector]]
    vits: dict[str, list[Any]]  # of each of `transformers`, of one kind, such as Vit3d
    views: int  # that a transformer averages
    predict: Callable[..., pd.DataFrame] = predict_studies
    scheme: Scheme = field(default_factory=Scheme)  # of the detectors

    def grade(self, study_id: int, stacks: Sequence[Stack], findings: pd.DataFrame | None = None) -> Graded:
        """One study's tables, graded from the series that it has; `findings` are those of its files."""
        rows, points = grade_study(self.localisers, self.yolos, study_id, stacks, self.scheme)
        study = [(study_id, list(stacks))]
        looked = {name: self.predict(vits, study, points, self.views) for name, vits in self.vits.items()}
        types = sorted({stack.series_type for stack in stacks})
        looked = {name: metric.rows_of_groups(table, self.yolos) for name, table in looked.items()}
        doubts = [*_doubts(study_id, types, rows, points, self.yolos), *_absent(study_id, [rows, *looked.values()])]
        doubts = pd.DataFrame(doubts, columns=COLUMNS_OF["findings"])
        return {
            "yolo": rows,
            **looked,
            "points": points,
            "findings": doubts if findings is None else pd.concat([findings, doubts], ignore_index=True),
            "series": pd.DataFrame({"study_id": study_id, "series_type": types}),
            "slices": axial_slices(stacks, points[points["condition"] == "scs"]),
        }


def _doubts(
    study_id: int, types: Sequence[str], rows: pd.DataFrame, points: pd.DataFrame, keys: Iterable[str]
) -> Iterator[tuple]:
    """Findings: readable series on which the detectors of groups `keys` found nothing; levels maybe named wrong."""
    for group in map(GROUPS.get, keys):
        if group.series_type in types and not rows["row_id"].str.contains(group.base).any():
            value = f"the {group.score} detector found nothing on {group.series_type}, although its images can be read"
            yield study_id, None, "nothing_detected", value, "these rows without the detector, or by the prior"
    if (sure := points["level_confidence"].min()) < SURE:
        yield study_id, None, "levels_uncertain", f"{sure:.2f}", "graded; check the levels on its page"
    if DOUBTFUL[0] < (height := points.get("s1_s2", pd.Series(dtype=float)).max()) < DOUBTFUL[1]:
        value = f"numbering uncertain (transitional): S1/S2 looks {height:.0%} as high as its distance from L5/S1"
        yield study_id, None, "numbering_uncertain", value, "graded as counted from below; check the levels on its page"


def _absent(study_id: int, tables: Iterable[pd.DataFrame]) -> Iterator[tuple]:
    """A finding of the places that no model graded, in groups of which one graded others."""
    places = rows_of([study_id])
    graded = places["row_id"].isin({row for table in tables for row in table["row_id"]})
    lost = places[~graded & places["group"].isin(places["group"][graded])]
    if len(lost):
        levels = ", ".join(sorted(lost["level"].unique())).upper().replace("_", "/")
        yield study_id, None, "place_not_shown", f"{len(lost)} places are on no image: {levels}", "rows by the prior"


def blends_of(models: Iterable[str]) -> dict[str, list[str]]:
    """Blended table -> models in it, where `models` are yolo and `transformers`: each model alone, all transformers
    together, and all models."""
    models = list(models)
    return {model: [model] for model in models} | {"vit3d": models[1:], "ensemble": models}


def models_in(recipe: dict[str, Any]) -> list[str]:
    """The models whose rows a recipe (blend.json) blends."""
    return ["yolo", *transformers(recipe.get("members", ()))]


def load_models(
    weights: str | Path, folds: Iterable[int], views: int,
    conditions: Collection[str] = GROUPS, members: Iterable[str] = (),
) -> Models:  # fmt: skip
    """The models of these folds and conditions in a folder; errors as `load_detector` and `load_vit` raise them."""
    weights, folds = Path(weights), list(folds)
    yolos = {key: [load_detector(weights / f"yolo_{key}_fold{fold}.pt") for fold in folds] for key in conditions}
    localisers = [load_localiser(weights / f"localiser_fold{fold}.safetensors") for fold in folds]
    names = {name: [weights / f"{name}_fold{fold}.safetensors" for fold in folds] for name in transformers(members)}
    return Models(localisers, yolos, {name: [*map(load_vit, files)] for name, files in names.items()}, views)


def join_graded(graded: Sequence[Graded], vits: Iterable[str] = ("vit3d",)) -> Graded:
    """The tables of many studies as one each; vits: the transformers that graded them."""
    joined = {}
    for kind, columns in (dict.fromkeys(vits, COLUMNS_OF["yolo"]) | COLUMNS_OF).items():
        tables = [study[kind] for study in graded if len(study[kind])]
        joined[kind] = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=columns)
    return joined


def grade_studies(models: Models, comp: competition.Competition, split: str, studies: Sequence[int]) -> Graded:
    """Grade studies of a data folder, each once, and print progress."""
    graded = []
    for number, study_id in enumerate(studies, 1):
        graded.append(models.grade(study_id, *read_study(comp, split, study_id)))
        if number % 10 == 0 or number == len(studies):
            print(f"graded study {number}/{len(studies)}", flush=True)
    return join_graded(graded, models.vits)


def rows_of(studies: Iterable[int]) -> pd.DataFrame:
    """Every row of these studies, with the columns of `metric.row_keys`."""
    return metric.row_keys(row for study in studies for row in study_row_ids(study))


def prior_of(recipe: dict[str, Any], rows: pd.DataFrame) -> pd.DataFrame:
    """The prior of a recipe (blend.json) for rows of `rows_of`: row_id and natural probabilities."""
    return rows.merge(pd.DataFrame(recipe["prior"]), on=["condition", "level"])[["row_id", *SEVERITIES]]


def without_own_series(rows: pd.DataFrame, series: pd.DataFrame) -> set[str]:
    """Ids of rows whose study lacks the series that readers grade them on; series: study_id, series_type."""
    existing = set(zip(series["study_id"].astype(str), series["series_type"], strict=True))
    keys = zip(rows["row_id"], rows["study_id"], rows["condition"], strict=True)
    return {row for row, study, name in keys if (study, GROUPS[GROUP_OF[name]].series_type) not in existing}


def fit_blends(given: Tables, prior: pd.DataFrame, labels: pd.DataFrame) -> dict[str, Any]:
    """What a recipe holds of the blend: its kind, and numbers for each of `blends_of`, fitted on out-of-fold rows; for
    each of several transformers also those of the blends `without` it."""
    inputs = {name: {model: given[model] for model in models} for name, models in blends_of(given).items()}
    recipe = {"kind": "fitted"} | {name: blend.choose_blend(of, prior, labels) for name, of in inputs.items()}
    vits = list(given)[1:]
    for name in vits if len(vits) > 1 else ():
        parts = {"vit3d": [vit for vit in vits if vit != name], "ensemble": [model for model in given if model != name]}
        freely = {part: [key for key, mixture in recipe[part].items() if mixture["kept"] == "fitted"] for part in parts}
        tables = {part: {model: given[model] for model in models} for part, models in parts.items()}
        numbers = {part: blend.fit_blend(tables[part], prior, labels, freely[part]) for part in parts}
        recipe.setdefault("without", {})[name.removeprefix("vit3d-")] = numbers
    return recipe


def blend_rows(
    recipe: dict[str, Any], given: Tables, prior: pd.DataFrame, unseen: Collection[str],
    labels: Any = None, fitted_on: Tables | None = None,
) -> tuple[Tables, pd.Series]:  # fmt: skip
    """The rows of `prior` by each of `blends_of`, and the sources of the ensemble's rows: by the recipe's numbers, or
    with labels (row_id, study_id, severity), by numbers fitted on other studies (in `fitted_on` if not in `given`)."""
    tables = {}
    for name, models in blends_of(given).items():
        if labels is None:
            tables[name] = blend.apply_blend(recipe[name], given, prior)
            continue
        freely = [key for key, mixture in recipe[name].items() if mixture["kept"] == "fitted"]
        inputs = {model: (fitted_on or given)[model] for model in models}
        tables[name] = blend.cross_fitted(given, prior, labels, freely, inputs)
    return blend.finish(tables, given, prior, unseen)


def blend_studies(recipe: dict[str, Any], graded: Graded, studies: Iterable[int]) -> tuple[Tables, pd.Series]:
    """Every row of graded studies by each of `blends_of`, and the sources of the ensemble's rows."""
    rows = rows_of(studies)
    given = {model: graded[model] for model in models_in(recipe)}
    return blend_rows(recipe, given, prior_of(recipe, rows), without_own_series(rows, graded["series"]))
