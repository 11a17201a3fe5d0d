"""The folder of a made-up run, as the steps before the report leave it: small, with texts that try to break a page."""

import base64
import io
import json
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import yaml
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from lsdc_utils import metric
from lsdc_utils.data.stacks import Stack, save_stack
from lsdc_utils.vocabulary import AXIAL, CONDITIONS, GROUPS, LEVELS, SERIES_TYPES, SEVERITIES, SIDES, T1, T2, row_id

HOSTILE = "<script>alert('boo')</script><img src=http://example.org/x.png onerror=alert(1)>"
# (column, row, 0, 1) to LPS mm of the middle slice; the last column moves by 4 mm a slice.
SAGITTAL = np.array([[0, 0, 1, 0], [2, 0, 0, -64], [0, -2, 0, 64], [0, 0, 0, 1]], float)
AXIAL_SLICE = np.array([[2, 0, 0, -64], [0, 2, 0, -64], [0, 0, 1, 0], [0, 0, 0, 1]], float)


def write_run(folder: Path, labelled_test: bool = True, n_studies: int = 24) -> Path:
    """A run's folder as the steps before the report leave it, with names and texts that try to break a page."""
    rng = np.random.default_rng(5)
    labels, tables = make_rows(rng, n_studies)
    scores = {"oof": metric.score_block(metric.solution_of(labels), tables), "test": None}
    if labelled_test:
        scores["test"] = scores["oof"]
    for name in ("tables", "predictions", "logs", "notebooks"):
        (folder / name).mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps(scores))
    kappa = {"linear": {"ensemble": 0.61, "two readers": 0.66}, "quadratic": {"ensemble": 0.7}}
    evaluation = {"kappa": {"oof": {"spinal": kappa}}, "calibration": {"oof": {"all rows": {"ensemble": 0.0123}}}}
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    (folder / "data.json").write_text(json.dumps({"data_dir": "../data/phantom-0a1b", "kind": "phantom"}))
    (folder / "parameters.yml").write_text(yaml.safe_dump({"seed": 52, "folds": [0], "note": HOSTILE}))
    labels.to_parquet(folder / "tables/labels.parquet")
    for model in ("yolo", "vit3d", "ensemble"):
        tables[model].to_parquet(folder / f"predictions/{model}_oof.parquet")
    sources = labels[["row_id"]].assign(source="yolo+vit3d", own_series=True)
    sources.loc[sources.index % 25 == 7, "source"] = "vit3d"
    sources.loc[sources.index % 25 == 8, ["source", "own_series"]] = "prior", False
    sources.to_parquet(folder / "predictions/sources_oof.parquet")
    finding = {"study": 1, "series": 11, "rule": f"bad {HOSTILE}", "value": "", "action": "left out"}
    pd.DataFrame([finding, finding]).to_csv(folder / "tables/findings.csv", index=False)
    lines = ["oof,all,spinal_canal_stenosis,0.9625,0.975,1.0,2,", "oof,ordinary,spinal_canal_stenosis,1,1,1,0,"]
    names = "split,spines,condition,within_5_mm,in_plane_within_5_mm,within_10_mm,sides_exchanged,level_right"
    (folder / "localisation.csv").write_text("\n".join([names, *lines, "oof,all,axial slices,,,,,0.9"]) + "\n")
    write_experiments(folder)
    write_stress(folder)
    write_images(folder, labels)
    for step, seconds in {
        "00_get_data": 12.3,
        "phantom": 5,
        "01_eda": 3,
        "03_train_yolo_scs_fold0": 187,
        "03_train_yolo_scs_fold4": 9,
    }.items():
        (folder / f"logs/{step}.tsv").write_text(f"s\th:m:s\tmax_rss\tmean_load\n{seconds}\t0:00\t812.5\t97\n")
        nbformat.write(make_notebook(step), folder / f"notebooks/{step}.ipynb")
    return folder


def write_stress(folder: Path) -> None:
    """The tables of the stress tests that a report shows."""
    (folder / "stress").mkdir()
    numbers = {"slope": 0.71, "leak": 0.234, "looked": None, "moved": 6.21e-4}
    numbers["slope_by_group"] = {"spinal": 0.8, "foraminal": None}
    (folder / "stress/numbers.json").write_text(json.dumps(numbers))
    cuts = {"moderate_from": 0.5, "severe_from": 0.7}
    doses = [
        {"case": 0, "body": 0, "condition": c, "level": "l4_l5", "dose": d, "model": m, "moderate": d, "severe": d / 2}
        for c in CONDITIONS
        for d in (0.0, 0.5, 1.0)
        for m in ("oracle", "yolo", "vit3d", "ensemble", "readers")
    ]
    pd.DataFrame(doses).assign(**cuts).to_csv(folder / "stress/doses.csv", index=False)
    line = {"studies": 4, "score": 0.5, "skill": 0.75, "low": 0.6, "high": 0.9}
    settings = [
        {"factor": "as usual", "setting": "as usual", **line, "lost": 0.0, "lost_low": 0.0, "lost_high": 0.0},
        {"factor": "noise", "setting": HOSTILE, **line, "lost": 0.123, "lost_low": -0.01, "lost_high": 0.2},
    ]
    pd.DataFrame(settings).to_csv(folder / "stress/settings.csv", index=False)


def write_experiments(folder: Path) -> None:
    """The tables of a run's ablations and learning curve."""
    (folder / "experiments").mkdir()
    parts = dict.fromkeys(metric.PARTS, 0.5)
    change = {"worse_by": 0.0213, "low": -0.004, "high": 0.05}
    lines = [{"name": "made-up", "without": ""} | parts, {"name": "x", "without": HOSTILE} | parts | change]
    pd.DataFrame(lines).assign(commit="c0ffee0123" * 4).to_csv(folder / "experiments/ablation.csv", index=False)
    curve = [
        {"n_train": n, "block": block, "total": total, "skill": 1 - total, "low": total - 0.1, "high": total + 0.1}
        for n, total in ((40, 0.9), (320, 0.4))
        for block in ("oof", "test")
    ]
    pd.DataFrame(curve).assign(commit="c0ffee0123" * 4).to_csv(folder / "experiments/curve.csv", index=False)


def make_rows(rng: np.random.Generator, n_studies: int) -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    """Labels as tables/labels.parquet has them, and prediction tables of all models."""
    names = [(s, c, level) for s in range(1, n_studies + 1) for c in CONDITIONS for level in LEVELS]
    labels = pd.DataFrame(names, columns=["study_id", "condition", "level"])
    labels["row_id"] = [row_id(*name) for name in names]
    natural = rng.dirichlet([3, 1, 0.8], len(labels))
    labels["severity"] = [rng.choice([-1, 0, 1, 2], p=[0.02, *(0.98 * row)]) for row in natural]
    labels["fold"] = labels["study_id"] % 2
    tables = {"prior": metric.prior_out_of_fold(labels)}
    for model, trust in {"yolo": 0.3, "vit3d": 0.0, "ensemble": 0.7, "oracle": 1}.items():
        mixed = trust * natural + (1 - trust) * rng.dirichlet([3, 1, 0.8], len(labels))
        tables[model] = labels[["row_id"]].join(pd.DataFrame(mixed, columns=list(SEVERITIES)))
    return labels, tables


def write_images(folder: Path, labels: pd.DataFrame) -> None:
    """A stack of each series type for every study, and the points that the detectors found."""
    rng = np.random.default_rng(1)
    affines = {T1: SAGITTAL, T2: SAGITTAL, AXIAL: AXIAL_SLICE}
    for study in labels["study_id"].unique():
        for k, series_type in enumerate(SERIES_TYPES):
            moved = np.repeat(affines[series_type][None], 7, axis=0)
            moved[:, :3, 3] += 12 * np.arange(-3, 4)[:, None] * affines[series_type][:3, 2]
            pixels = rng.integers(0, 120, (7, 64, 64)).astype(np.uint8)
            shapes, numbers = np.full((7, 2), 64, np.int32), np.arange(1, 8, dtype=np.int32)
            stack = Stack(study, 10 * study + k, series_type, pixels, shapes, moved, numbers, np.zeros(7, np.int32))
            save_stack(stack, folder / f"slices/{study}/{10 * study + k}.npz")
    points = []
    for key in GROUPS:
        sides = [None] if key == "scs" else list(SIDES)
        places = [(s, level, side) for s in labels["study_id"].unique() for level in LEVELS for side in sides]
        table = pd.DataFrame(places, columns=["study_id", "level", "side"])
        table["X"] = table["side"].map({"left": 10.0, "right": -10.0}).fillna(0.0).astype(float)
        table["Y"], table["Z"] = 5.0, [40.0 - 20 * LEVELS.index(level) for level in table["level"]]
        table["confidence"], table["level_confidence"] = 0.5, 0.6
        points.append(table.assign(condition=key))
    pd.concat(points).to_parquet(folder / "predictions/points_oof.parquet")
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights/yolo_scs_fold0.json").write_text(
        json.dumps({"config": {"box_mm": 14.6}, "sha256": "1f", "git_commit": "c0"})
    )


def make_notebook(step: str) -> nbformat.NotebookNode:
    """An executed notebook with an output of every kind that the report knows, and some that it must not show."""
    picture = io.BytesIO()
    Figure(figsize=(1, 1)).savefig(picture, format="png")
    png = base64.b64encode(picture.getvalue()).decode()
    table = pd.DataFrame({"name": ["plain", HOSTILE], "share": [0.25, 0.5]})
    outputs = [
        *(new_output("stream", name="stdout", text=f"epoch {k}/20 {HOSTILE}\n") for k in range(20)),
        new_output("stream", name="stderr", text="a warning\n"),
        new_output("display_data", data={"image/png": png, "text/plain": "<Figure>"}),
        new_output("display_data", data={"text/html": table.to_html(), "text/plain": "a table"}),
        new_output("display_data", data={"text/html": table.style.background_gradient().to_html()}),
        new_output("display_data", data={"text/html": f"</main><style>@import 'http://x';</style>{HOSTILE}"}),
        new_output("display_data", data={"text/markdown": f"**Result** 0.5 {HOSTILE}"}),
        new_output("display_data", data={"application/javascript": "alert('boo')", "text/plain": "js"}),
        new_output("execute_result", data={"text/plain": "<int 42>"}, execution_count=1),
        new_output("error", ename="ValueError", evalue="x", traceback=["ValueError: \x1b[31m<b>bad</b>\x1b[0m"]),
    ]
    parameters = new_code_cell("fold: int = 0  # which", metadata={"tags": ["parameters"]})
    cells = [
        new_markdown_cell(f"# Chapter {step} & more\n\nA question about `a < b` & an answer."),
        parameters,
        new_markdown_cell("## What is shown\n\nText with [a link](https://example.org)."),
        new_code_cell("print('<b>')  # code", outputs=outputs, execution_count=1),
    ]
    return new_notebook(cells=cells)
