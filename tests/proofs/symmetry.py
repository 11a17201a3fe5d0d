"""How far a finished run's grades depend on side and on slice numbers: `python tests/proofs/symmetry.py RUN [STUDIES]`.

Test studies of the run are graded as they are, mirrored left to right, and renumbered. Mirroring must exchange left and
right rows (the ViT at mirrored points to 1e-3, everything to 0.02); renumbering must change nothing at all.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import mirror  # noqa: E402

from lsdc_utils import blend, competition, detector, vit3d, volume  # noqa: E402
from lsdc_utils.vocabulary import GROUPS, SEVERITIES, mirrored, parse_row_id, row_id, study_row_ids  # noqa: E402


def grade(run: Path, root: Path, studies: Iterable[int]) -> dict[str, pd.DataFrame]:
    """Rows by each model and by both together of test studies in folder `root`, as the run's step 05 grades them.

    Keys: yolo, vit3d, ensemble, points, canal, and at_points: the ViT's rows at the canal points of the study as it is.
    """
    recipe = json.loads((run / "blend.json").read_text())
    torch.set_num_threads(recipe["threads"])
    folds = recipe["folds"]
    yolos = {key: [detector.load(run / f"weights/yolo_{key}_fold{k}.pt") for k in folds] for key in GROUPS}
    vits = [vit3d.load(run / f"weights/vit3d_fold{k}.safetensors") for k in folds]
    comp, found = competition.read(root), []
    for study in studies:
        canal_as_is = None
        for version in (0, mirror.MIRRORED, mirror.RENUMBERED):
            stacks, _ = volume.read_study(comp, "test", study + version)
            rows, points, canal = detector.grade_study(yolos, study + version, stacks)
            canal_as_is = canal if version == 0 else canal_as_is
            moved = mirror.mirror_points(canal_as_is) if version == mirror.MIRRORED else canal_as_is
            there = [(study + version, stacks)]
            given = moved.assign(study_id=study + version)
            views = recipe["vit_views"]
            found.append({"yolo": rows, "points": points, "canal": canal})
            found[-1] |= {"vit3d": vit3d.predict(vits, there, canal, views)}
            found[-1] |= {"at_points": vit3d.predict(vits, there, given, views)}
            found[-1] |= {"ensemble": together(recipe, study + version, found[-1])}
    return {key: pd.concat([one[key] for one in found], ignore_index=True) for key in found[0]}


def together(recipe: dict, study_id: int, tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Both models' rows of a study blended by a run's recipe; rows that neither gives are left to the prior."""
    rows = pd.DataFrame({"row_id": study_row_ids(study_id)})
    rows[["condition", "level"]] = [parse_row_id(row)[1:] for row in rows["row_id"]]
    prior = rows.merge(pd.DataFrame(recipe["prior"]), on=["condition", "level"])[["row_id", *SEVERITIES]]
    models = {model: tables[model] for model in ("yolo", "vit3d")}
    if recipe["kind"] == "published":
        return blend.published_blend(models, prior)
    return blend.apply_blend(blend.from_json(recipe["ensemble"]), models, prior)


def differences(table: pd.DataFrame, version: int) -> pd.DataFrame:
    """Rows of studies as they are beside those of a version (0 where one lacks): row_id, difference (largest of 3)."""
    rows = table.set_index("row_id")[list(SEVERITIES)]
    parsed = [(int(study), *rest) for study, *rest in map(parse_row_id, rows.index)]
    lines = []
    for (study, condition, level), row in zip(parsed, rows.to_numpy(float), strict=True):
        if study >= mirror.MIRRORED:
            continue
        other = mirrored(condition) if version == mirror.MIRRORED else condition
        name = row_id(study + version, other, level)
        same = rows.loc[name].to_numpy(float) if name in rows.index else np.full(3, np.nan)
        lines.append((row_id(study, condition, level), condition, level, np.abs(row - same).max()))
    return pd.DataFrame(lines, columns=["row_id", "condition", "level", "difference"])


def main(run: Path, count: int) -> None:
    """Print the largest differences."""
    data = competition.data_dir(run, "")
    studies = sorted(pd.read_csv(data / mirror.SERIES_TABLE)["study_id"].unique().tolist())[:count]
    with tempfile.TemporaryDirectory() as folder:
        mirror.write_versions(data, studies, Path(folder))
        tables = grade(run, Path(folder), studies)
    for model in ("yolo", "vit3d", "at_points", "ensemble"):
        for name, version in (("mirrored", mirror.MIRRORED), ("renumbered", mirror.RENUMBERED)):
            found = differences(tables[model], version)
            worst = found.groupby("condition")["difference"].max().round(6).to_dict()
            quantiles = found["difference"].quantile([0.5, 0.9, 0.99]).round(5).tolist()
            print(f"{model} {name}: largest {found['difference'].max():.2g}, median, 90 %, 99 % {quantiles}")
            print(f"    lacking {found['difference'].isna().sum()} of {len(found)} rows; largest by condition {worst}")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
