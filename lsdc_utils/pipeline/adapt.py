"""A run fitted to the population of a labelled folder: its blend alone, or by further training."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lsdc_utils import metric
from lsdc_utils.data import cohort
from lsdc_utils.files import git_commit, write_json
from lsdc_utils.grading import adapt, grade
from lsdc_utils.grading.run_tables import read_recipe, weight_files
from lsdc_utils.pipeline import labelled
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import read_parameters
from lsdc_utils.pipeline.labelled import Labelled, save
from lsdc_utils.pipeline.parameters import load_parameters

FEWEST = 20  # labelled studies
THAWED = 100  # labelled studies from which on the transformer's encoder is trained too
SHORTER = 3  # a training from a run's weights takes this share of its epochs
OWN = ("exclude_csv", "points_csv", "folds_csv", "weights_dir", "out_dir", "studies_table", "fit_blend", "workers")


def check(found: Labelled, trained: Path, cores: int) -> int:
    """The number of labelled studies; UsageError where they are too few or the run in `trained` knows some of them."""
    if (count := found.labels["study_id"].nunique()) < FEWEST:
        raise UsageError(f"{found.comp.root} has {count} labelled studies with images; adapt needs {FEWEST} or more")
    labelled.check_overlap(found, trained, False, cores)
    return count


def training_parameters(trained: Path, folder: Path, studies: int) -> dict[str, Any]:
    """Parameters of a run that goes on training the models of the run in `trained` on a data folder."""
    if missing := [name for name in ("train", "train_label_coordinates") if not (folder / f"{name}.csv").is_file()]:
        raise UsageError(f"--train needs the competition's tables: {folder} lacks {missing[0]}.csv")
    known = load_parameters("demo")
    theirs = {key: value for key, value in read_parameters(trained).items() if key in known and key not in OWN}
    parameters = known | theirs | {"data_dir": str(folder), "start_from": str(trained.resolve()), "example_study": 0}
    parameters |= {key: max(1, parameters[key] // SHORTER) for key in ("vit_epochs", "localiser_batches")}
    parameters["yolo_epochs"] = {key: max(1, n // SHORTER) for key, n in parameters["yolo_epochs"].items()}
    return parameters | ({"vit_encoder_rate": 0.0} if studies < THAWED else {})


def adapt_run(found: Labelled, trained: Path, out: Path, cores: int, resume: str) -> dict[str, Any]:
    """Write a run to `out` with the models of the run in `trained` and a blend for the studies of `found`; returns its
    recipe with `scores`, those of the studies, each graded by numbers that were fitted on others.

    Nothing in `out` names the folder of the studies. Errors as of `check` and `labelled.grade`.
    """
    recipe = read_recipe(trained)
    if recipe["kind"] != "fitted":
        raise UsageError(f"the run in {trained} has no blend that could be adapted: it is by the published method")
    check(found, trained, cores)
    graded = labelled.grade(found, trained, out / "work", cores, resume)
    read = {
        name: pd.read_parquet(graded.tables / f"{name}_test.parquet") for name in ("raw_yolo", "raw_vit3d", "points")
    }
    labels, series = found.labels.astype({"study_id": str}), found.comp.series
    studies = np.random.default_rng(0).permutation(sorted(labels["study_id"].unique()))
    labels["fold"] = labels["study_id"].map({study: k % adapt.PARTS for k, study in enumerate(studies)})
    given = {model: read[f"raw_{model}"] for model in grade.BLENDS["ensemble"]}
    new, tables, sources = adapt.adapt_recipe(recipe, given, series, labels)
    for name in weight_files(recipe["folds"]):
        for file in (name, str(Path(name).with_suffix(".json"))):
            (out / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(trained / file, out / file)
    for name in ("parameters.yml", "data.json"):
        if (trained / name).is_file():
            shutil.copyfile(trained / name, out / name)
    unseen = grade.without_own_series(grade.rows_of(sorted(studies)), series)
    own = ~sources.index.isin(unseen)
    tables["sources"] = pd.DataFrame({"row_id": sources.index, "source": sources.to_numpy(), "own_series": own})
    for name, table in (tables | {"points": read["points"]}).items():
        save(table, out / f"predictions/{name}_oof.parquet")
    save(labels.astype({"study_id": int}), out / "tables/labels.parquet")
    known = cohort.fingerprints(found.comp, sorted(map(int, studies)), cores)
    write_json(out / cohort.TRAINED_ON, cohort.trained_on(trained) + known)
    about = {"run": trained.name, "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), "commit": git_commit()}
    provenance = json.loads((trained / "provenance.json").read_text()) | {"adapted": about | new["adapted"]}
    write_json(out / "provenance.json", provenance)
    write_json(out / "blend.json", new)
    rows = {"prior": metric.prior_out_of_fold(labels), **{name: tables[name] for name in grade.BLENDS}}
    scores = {"oof": metric.score_block(metric.solution_of(labels), rows), "test": None}
    write_json(out / "scores.json", scores)  # last: with it the run is finished
    shutil.rmtree(out / "work")
    return new | {"scores": scores}
