"""A run fitted to the population of a labelled folder: its blend alone, or by further training."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import metric
from lsdc_utils.data import cohort, competition
from lsdc_utils.files import atomic_folder, git_commit, write_json, write_table
from lsdc_utils.grading import adapt, grade
from lsdc_utils.grading.run_tables import read_recipe
from lsdc_utils.pipeline import labelled
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import read_parameters
from lsdc_utils.pipeline.parameters import load_parameters
from lsdc_utils.vocabulary import groups_of

FEWEST, THAWED = 20, 100  # labelled patients: to adapt; labelled studies: to train more than the transformer's head
SHORTER, GENTLER = 3, 10  # further training takes this share of a training's steps, and of its learning rates
FOLDS = 5  # of it at most, with few studies
OTHERS = ("exclude_csv", "points_csv", "not_trained_csv", "folds_csv", "weights_dir", "out_dir", "studies_table",
          "fit_blend", "workers", "blend_of", "vit_soften")  # fmt: skip


def check(found: labelled.Labelled, trained: Path, cores: int) -> None:
    """UsageError where patients are too few, or the models in folder `trained` know some of them or have no blend."""
    if (count := labelled.trained_for(found, trained).people["patient"].nunique()) < FEWEST:
        raise UsageError(f"adapt needs {FEWEST} or more patients with labels and images; {found.comp.root} has {count}")
    if read_recipe(trained)["kind"] != "fitted":
        raise UsageError(f"the run in {trained} is by the published method, which has no blend to adapt")
    if not (trained / "provenance.json").is_file():
        raise UsageError(f"the run in {trained} lacks provenance.json: run it to its report")
    labelled.check_overlap(found, trained, False, cores)


def training_parameters(found: labelled.Labelled, trained: Path) -> dict[str, Any]:
    """Parameters of a run that trains the models of the run in folder `trained` further, on the folder of `found`: with
    few studies the transformer without its encoder, at places that the run's localiser and detectors find."""
    folder, parameters = found.comp.root, load_parameters("demo")
    few = found.labels["study_id"].nunique() < THAWED
    needed = ("train.csv", *(() if few else ("train_label_coordinates.csv",)))
    if lacking := [name for name in needed if not (folder / name).is_file()]:
        raise UsageError(f"--train needs the competition's layout: {folder} lacks {lacking[0]}")
    parameters |= {k: v for k, v in read_parameters(trained).items() if k in parameters and k not in OTHERS}
    graded = competition.graded_groups(competition.read_labels(folder))
    parameters["conditions"] = [key for key in groups_of(parameters["conditions"]) if key in graded]
    parameters |= {key: max(1, parameters[key] // SHORTER) for key in ("vit_epochs", "localiser_batches")}
    parameters |= {key: parameters[key] / GENTLER for key in ("vit_lr", "localiser_rate")}
    parameters["yolo_rate"] = {key: rate / GENTLER for key, rate in parameters["yolo_rate"].items()}
    parameters["yolo_epochs"] = {key: max(1, epochs // SHORTER) for key, epochs in parameters["yolo_epochs"].items()}
    start, count = str(trained.resolve()), min(parameters["n_splits"], FOLDS)
    parameters |= dict.fromkeys(("example_study", "pretrain_phantom", "vit_slice_epochs"), 0)
    parameters |= {"data_dir": str(folder), "start_from": start, "points_from": start if few else ""}
    if few:  # points of other models are needed in every fold
        parameters |= {"n_splits": count, "folds": list(range(count)), "vit_encoder_rate": 0.0}
    elif not parameters["vit_encoder_rate"]:  # of a run that was itself trained further, on few studies
        parameters["vit_encoder_rate"] = load_parameters("demo")["vit_encoder_rate"]
    return parameters


def adapt_run(found: labelled.Labelled, trained: Path, out: Path, cores: int, resume: str) -> dict[str, Any]:
    """Write a run to `out`: the models of the run in folder `trained`, with a blend for the studies of `found`, whose
    cross-fitted rows are the out-of-fold rows. Returns `adapted` of its recipe, with the official score and its parts
    `before` and `after`. Nothing in `out` names the studies' folder. Errors as of `labelled.grade`."""
    found = labelled.trained_for(found, trained)
    recipe, labels = read_recipe(trained), found.labels
    labelled.grade(found, trained, out / "work", cores, resume)
    tables = out / "work/predictions"
    given = {model: pd.read_parquet(tables / f"raw_{model}_test.parquet") for model in grade.models_in(recipe)}
    patients = found.people.set_index(found.people["study_id"].astype(str))["patient"]
    labels = labels.assign(patient=labels["study_id"].astype(str).map(patients))
    order = np.random.default_rng(0).permutation(labels["patient"].unique())
    labels["fold"] = labels["patient"].map({patient: k % adapt.PARTS for k, patient in enumerate(order)})
    new = adapt.fit_recipe(recipe, given, labels)
    sources = pd.read_parquet(tables / "sources_test.parquet")
    graded = adapt.cross_fitted(recipe, given, labels, set(sources.loc[~sources["own_series"], "row_id"]))
    solution, own = metric.solution_of(labels), pd.read_parquet(tables / "ensemble_test.parquet")
    for name, table in (("before", own), ("after", graded["ensemble"])):
        new["adapted"][name] = metric.without_nan(metric.study_losses(solution, metric.weight_table(table)).score())
    for name, table in graded.items():
        write_table(out / f"predictions/{name}_oof.parquet", table)
    write_table(out / "tables/labels.parquet", labels)
    for file in (trained / name for name in ("parameters.yml", "data.json") if (trained / name).is_file()):
        shutil.copyfile(file, out / file.name)
    known = cohort.fingerprints(found.comp, sorted(found.people["study_id"]), cores)
    write_json(out / cohort.TRAINED_ON, cohort.trained_on(trained) + known)
    about = {"adapted": new["adapted"] | {"run": trained.name, "commit": git_commit()}}
    write_json(out / "provenance.json", json.loads((trained / "provenance.json").read_text()) | about)
    write_json(out / "blend.json", new)
    with atomic_folder(out / "weights") as copy:
        shutil.copytree(trained / "weights", copy, dirs_exist_ok=True)
    scores = metric.score_block(solution, {"prior": metric.prior_out_of_fold(labels), **graded}, patients)
    shutil.rmtree(out / "work")
    write_json(out / "scores.json", {"oof": scores, "test": None})  # last: with it the run is finished
    return new["adapted"]
