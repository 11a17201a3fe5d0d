"""The figures of a run's summary, each with a caption and a text alternative."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lsdc_utils import figures
from lsdc_utils.data.stacks import load_study
from lsdc_utils.grading.marks import draw_still
from lsdc_utils.grading.run_tables import read_graded
from lsdc_utils.metric import PARTS, PROBABILITIES, calibration_error
from lsdc_utils.report.run import BLOCK_NAMES, PART_NAMES, Run, blocks, labelled_rows, model_name, models, number, value
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, SEVERITY_NAMES

BLACK = figures.MODEL_COLOURS["ensemble"]
OUTSIDE = {"loc": "outside lower center", "ncols": 3}  # of legends, so that they cover nothing


@dataclass(frozen=True)
class Picture:
    """A figure with its caption and text alternative."""

    name: str
    caption: str
    alt: str
    figure: Figure
    wide: bool = False  # takes the whole width of a page
    slices: bool = False  # shows slices: saved as AVIF rather than SVG

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a notebook shows: the figure with its text alternative, and the caption in a plain terminal."""
        content = io.BytesIO()
        self.figure.savefig(content, format="png")
        return {"image/png": content.getvalue(), "text/plain": self.caption}, {"image/png": {"alt": self.alt}}


def run_pictures(run: Run) -> list[Picture]:
    """The figures of the summary, as far as the run has the files for them."""
    labelled = labelled_rows(run)
    pictures = [
        plot_example(run),
        plot_doses(run) if len(run.doses) else None,
        plot_totals(run.scores),
        plot_parts(run.scores),
        plot_grades(labelled) if len(labelled) else None,
        plot_reliability(labelled) if len(labelled) else None,
        plot_curve(run.experiments["curve"], run.scores) if "curve" in run.experiments else None,
    ]
    return [picture for picture in pictures if picture]


def plot_doses(run: Run) -> Picture:
    """Dose-response curves of the models, the oracle and simulated readers."""
    slope, by_group = run.stress.get("slope"), run.stress.get("slope_by_group") or {}
    caption = (
        f"One location narrowed step by step in {run.doses['body'].nunique()} simulated bodies, all else unchanged: "
        "probabilities of the models and the oracle, shares of simulated readers (marks), and the cut-offs of an "
        "error-free reader (vertical lines)."
    )
    if slope is not None:
        names = {key: group.score for key, group in GROUPS.items()}
        groups = ", ".join(f"{names.get(key, key)} {each:.2f}" for key, each in by_group.items())
        caption += f" The ensemble's slope is {slope:.2f} of the oracle's ({groups or 'all groups'})."
    ends = run.doses[run.doses["dose"] == run.doses["dose"].max()].groupby("model")["severe"].mean()
    texts = ", ".join(f"{model_name(model)} {ends[model]:.2f}" for model in ("oracle", "ensemble"))
    figure = Figure(figsize=(12, 4.4))
    figures.show_doses(figure, run.doses)
    alt = f"Probability against narrowing, a panel for each condition group. Severe at full narrowing: {texts}."
    return Picture("doses", caption, alt, figure, wide=True)


def plot_totals(scores: dict[str, Any]) -> Picture:
    """Total score of each model with its interval: out of fold filled, test hollow."""
    shown, handles, totals = models(scores)[::-1], [], {}
    figure = Figure(figsize=(6, 1.6 + 0.5 * len(shown)))
    ax = figure.add_subplot()
    for k, (name, block) in enumerate(blocks(scores).items()):
        totals[BLOCK_NAMES[name]] = {model_name(model): value(block, "scores", model) for model in shown[::-1]}
        for y, model in enumerate(shown):
            total, colour = value(block, "scores", model), figures.MODEL_COLOURS.get(model, BLACK)
            if total is not None:
                ax.plot(value(block, "interval", model) or [total] * 2, [y - 0.32 * k] * 2, color=colour, linewidth=2)
                ax.plot(total, y - 0.32 * k, "os"[k], color=colour, markerfacecolor=[colour, "white"][k], markersize=8)
        style = {"linestyle": "none", "color": BLACK, "markerfacecolor": [BLACK, "white"][k], "markersize": 8}
        handles.append(Line2D([], [], marker="os"[k], label=BLOCK_NAMES[name], **style))
    ax.set(yticks=np.arange(len(shown)), yticklabels=map(model_name, shown), ylim=(-0.8, len(shown) - 0.5))
    ax.set(xlabel="Weighted log loss (lower is better)", title="Total score of each model")
    figure.legend(handles=handles, **OUTSIDE)
    caption = "Total score of each model; lines are 95 % intervals from resampling studies."
    return Picture("totals", caption, _words(totals), figure)


def _words(values: dict[str, dict[Any, float | None]]) -> str:
    """Numbers of a figure as its text alternative, e.g. `Test: Prior 0.815, Oracle 0.339`."""
    lines = (
        f"{name}: {', '.join(f'{key} {number(each)}' for key, each in row.items())}" for name, row in values.items()
    )
    return "; ".join(lines)


def plot_parts(scores: dict[str, Any]) -> Picture:
    """The parts of each model's out-of-fold score: as skill where an oracle is known, else as scores."""
    block = scores["oof"]
    kind, name = ("skill", "Skill") if block.get("skill") else ("scores", "Score")
    left_out = ("prior", "oracle") if kind == "skill" else ()  # their skill is 0 and 1
    shown = [model for model in models(scores) if model in block[kind] and model not in left_out]
    values = {model_name(model): {PART_NAMES[p]: value(block, kind, model, p) for p in PARTS} for model in shown}
    figure = Figure(figsize=(6, 4.6))
    ax = figure.add_subplot()
    colours = [figures.MODEL_COLOURS.get(model, BLACK) for model in shown]
    pd.DataFrame(values, dtype=float).plot.bar(ax=ax, width=0.8, rot=0, color=colours, legend=False)
    if kind == "skill":
        ax.axhline(0, color=BLACK, linewidth=1)
        ax.axhline(1, color=figures.MODEL_COLOURS["oracle"], linestyle="--", linewidth=1.2)
    ax.set(title=f"{name} by part, out of fold", ylabel=name)
    ax.set_xticks(range(len(PARTS)), [PART_NAMES[part].replace(" ", "\n") for part in PARTS])
    ax.grid(False, axis="x")
    figure.legend(**OUTSIDE)
    skill = "Skill is 0 for the label-frequency baseline and 1 (dashed) for the oracle."
    return Picture("parts", skill if kind == "skill" else "Lower is better.", _words(values), figure)


def plot_curve(curve: pd.DataFrame, scores: dict[str, Any]) -> Picture:
    """The ensemble's total by the number of training studies, with its interval, the baseline and the oracle."""
    figure, totals = Figure(figsize=(6, 4.2)), {}
    ax = figure.add_subplot()
    for (name, title), dashes in zip(BLOCK_NAMES.items(), ("--", "-"), strict=True):
        rows = curve[curve["block"] == name].set_index("n_train").sort_index()
        if len(rows):
            totals[title] = rows["total"].to_dict()
            ax.fill_between(rows.index, rows["low"], rows["high"], color=BLACK, alpha=0.12, linewidth=0)
            ax.plot(rows.index, rows["total"], f"o{dashes}", color=BLACK, label=f"Ensemble, {title.lower()}")
    for model in ("prior", "oracle"):
        total = value(scores.get("test") or {}, "scores", model)
        if total is not None:
            ax.axhline(total, color=figures.MODEL_COLOURS[model], linewidth=1.2, label=f"{model_name(model)}, test")
    sizes = sorted(curve["n_train"].unique())
    ax.set_xscale("log")
    ax.set_xticks(sizes, [str(n) for n in sizes], minor=False)
    ax.minorticks_off()
    ax.set(xlabel="Training studies", ylabel="Weighted log loss (lower is better)", title="Learning curve")
    figure.legend(**OUTSIDE)
    caption = "The ensemble's total with its 95 % interval. All sizes share the same test studies."
    return Picture("curve", caption, _words(totals), figure)


def plot_reliability(labelled: pd.DataFrame) -> Picture:
    """The share of each severity among rows of similar natural probability; `labelled`: `run.labelled_rows`."""
    natural, severity = labelled[PROBABILITIES].to_numpy(), labelled["severity"].to_numpy()
    figure = Figure(figsize=(6, 4.6))
    figures.show_reliability(figure.add_subplot(), natural, severity, "Reliability of the ensemble, out of fold")
    figure.legend(**OUTSIDE)
    error = calibration_error(natural, severity)
    caption = f"Points on the dashed line are calibrated; the expected calibration error is {error:.3f}."
    return Picture("reliability", caption, f"Reliability of the three severities. {caption}", figure)


def plot_grades(labelled: pd.DataFrame) -> Picture:
    """Confusion matrices of labels and grades, one for each condition group."""
    severity, grade = labelled["severity"].to_numpy(int), labelled[PROBABILITIES].to_numpy().argmax(axis=1)
    group = labelled["condition"].map({name: condition.group for name, condition in CONDITIONS.items()}).to_numpy()
    figure, texts = Figure(figsize=(9, 3.6)), []
    for ax, key in zip(figure.subplots(1, len(GROUPS)), GROUPS, strict=True):
        name, rows = PART_NAMES[GROUPS[key].score], group == key
        figures.show_confusion(ax, severity[rows], grade[rows], name)
        texts.append(f"{name}: {(severity[rows] == grade[rows]).sum()} of {rows.sum()} rows have the label's grade")
    caption = "Out-of-fold rows by label and grade (the most probable severity); shares are of the label's row."
    return Picture("grades", caption, "; ".join(texts), figure, wide=True)


def plot_example(run: Run) -> Picture | None:
    """The training study with most severe labels: of each series type the slice at the worst grade.

    None where the run has no detected points or no slices.
    """
    if run.labels.empty or not (run.folder / "predictions/points_oof.parquet").is_file():
        return None
    rows = read_graded(run.folder, "oof").dropna(subset=["X"])
    severe = run.labels["severity"].eq(2).groupby(run.labels["study_id"]).sum()
    severe = severe[severe.index.isin(rows["study_id"])]
    stacks = load_study(run.folder / "slices", int(severe.idxmax())) if len(severe) else []
    if not stacks:
        return None
    rows = rows[rows["study_id"] == severe.idxmax()]
    caption = f"Study {severe.idxmax()}, graded out of fold: one slice of each series type, with the ensemble's grades."
    counts = ", ".join(f"{count} {SEVERITY_NAMES[k]}" for k, count in rows["grade"].value_counts().sort_index().items())
    alt = f"{caption} Grades: {counts}."
    return Picture("example", caption, alt, draw_still(stacks, rows), wide=True, slices=True)
