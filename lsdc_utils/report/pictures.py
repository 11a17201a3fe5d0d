"""The figures of a run's summary. Each comes with a caption, and a text for readers who cannot see it."""

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
from lsdc_utils.report.run import (
    BLOCK_NAMES,
    PART_NAMES,
    Run,
    blocks,
    labelled_rows,
    model_name,
    models,
    number,
    value,
)
from lsdc_utils.stress import trials
from lsdc_utils.vocabulary import CONDITIONS, GROUPS, SEVERITY_NAMES

PLAIN = "#1A1A1A"  # of what has no colour of its own
OUTSIDE = {"loc": "outside lower center", "ncols": 3}  # of legends, so that they cover nothing


@dataclass(frozen=True)
class Picture:
    """A figure with the words that go with it."""

    name: str
    caption: str
    alt: str
    figure: Figure
    wide: bool = False  # takes the whole width of a page
    slices: bool = False  # holds images, which take less room as such

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a notebook shows: the figure with its description, the caption where there are no images."""
        content = io.BytesIO()
        self.figure.savefig(content, format="png")
        return {"image/png": content.getvalue(), "text/plain": self.caption}, {"image/png": {"alt": self.alt}}


def run_pictures(run: Run) -> list[Picture]:
    """The figures of the summary, as far as the run has what they show."""
    pictures = [plot_totals(run.scores), plot_parts(run.scores)]
    labelled = labelled_rows(run)
    if len(labelled):
        pictures += [plot_grades(labelled), plot_reliability(labelled)]
    if "curve" in run.experiments:
        pictures.append(plot_curve(run.experiments["curve"], run.scores))
    if len(run.doses):
        pictures.insert(0, plot_doses(run))
    example = plot_example(run)
    return [example, *pictures] if example else pictures


def plot_doses(run: Run) -> Picture:
    """Answers to one narrowing that grows, beside the oracle's and the readers'."""
    bodies, ratio = run.doses["body"].nunique(), trials.slopes(run.doses)["ratio"]
    caption = (
        f"One place narrowed step by step on {bodies} {'body' if bodies == 1 else 'bodies'}, all else the same: the "
        "models' probabilities, the oracle's, the shares of simulated readers (marks), and the cut-offs of an "
        "error-free reader (dashed)."
    )
    rises = trials.by_group(ratio)
    caption += f" There the ensemble rises {ratio.mean():.2f} times as steeply as the oracle ({rises})."
    ends = run.doses[run.doses["dose"] == run.doses["dose"].max()].groupby("model")["severe"].mean()
    said = ", ".join(f"{model_name(model)} {ends[model]:.2f}" for model in ("oracle", "ensemble"))
    alt = f"Probabilities against narrowing, a panel a condition group. Severe at the end: {said}."
    figure = Figure(figsize=(12, 4.4))
    figures.show_doses(figure, run.doses)
    return Picture("doses", caption, alt, figure, wide=True)


def plot_totals(scores: dict[str, Any]) -> Picture:
    """Total score of each model with its interval: out of fold filled, test hollow."""
    shown, said = models(scores)[::-1], []
    figure = Figure(figsize=(6, 1.6 + 0.5 * len(shown)))
    ax = figure.add_subplot()
    for k, (name, block) in enumerate(blocks(scores).items()):
        for y, model in enumerate(shown):
            total = value(block, "scores", model)
            if total is None:
                continue
            place, colour = y - 0.32 * k, figures.MODEL_COLOURS.get(model, PLAIN)
            ax.plot(value(block, "interval", model) or [total] * 2, [place] * 2, color=colour, linewidth=2)
            ax.plot(total, place, "os"[k], color=colour, markerfacecolor=[colour, "white"][k], markersize=8)
            said.append(f"{model_name(model)}, {BLOCK_NAMES[name].lower()}: {number(total)}")
    ax.set(yticks=np.arange(len(shown)), yticklabels=map(model_name, shown), ylim=(-0.8, len(shown) - 0.5))
    ax.set(xlabel="Weighted log loss (lower is better)", title="Total score of each model")
    fill = {"linestyle": "none", "color": PLAIN, "markersize": 8}
    handles = [Line2D([], [], marker="os"[k], markerfacecolor=[PLAIN, "white"][k], **fill) for k in range(2)]
    figure.legend(handles[: len(blocks(scores))], [BLOCK_NAMES[name] for name in blocks(scores)], **OUTSIDE)
    caption = "Total score of each model; the line is the 95 % interval from resampling studies."
    return Picture("totals", caption, "; ".join(said), figure)


def plot_parts(scores: dict[str, Any]) -> Picture:
    """The parts of the score of each model, out of fold: as skill where an oracle is known, else as scores."""
    block = scores["oof"]
    kind = "skill" if block.get("skill") else "scores"
    known = [model for model in models(scores) if model in block[kind]]
    shown = [model for model in known if kind == "scores" or model not in ("prior", "oracle")]
    figure = Figure(figsize=(6, 4.6))
    ax = figure.add_subplot()
    width, said = 0.8 / max(len(shown), 1), []
    for k, model in enumerate(shown):
        numbers = [value(block, kind, model, part) for part in PARTS]
        places = np.arange(len(PARTS)) + (k - (len(shown) - 1) / 2) * width
        colour = figures.MODEL_COLOURS.get(model, PLAIN)
        ax.bar(places, np.array(numbers, float), 0.9 * width, color=colour, label=model_name(model))
        texts = [f"{PART_NAMES[part]} {number(found, 2)}" for part, found in zip(PARTS, numbers, strict=True)]
        said.append(f"{model_name(model)}: {', '.join(texts)}")
    if kind == "skill":
        ax.axhline(0, color=PLAIN, linewidth=1)
        ax.axhline(1, color=figures.MODEL_COLOURS["oracle"], linestyle="--", linewidth=1.2)
    name = "Skill" if kind == "skill" else "Score"
    ax.set(title=f"{name} by part, out of fold", ylabel=name)
    ax.set_xticks(range(len(PARTS)), [PART_NAMES[part].replace(" ", "\n") for part in PARTS])
    ax.grid(False, axis="x")
    figure.legend(**OUTSIDE)
    caption = "Lower is better." if kind == "scores" else "0 is counting labels, 1 (dashed) is the limit of the labels."
    return Picture("parts", caption, ". ".join(said), figure)


def plot_curve(curve: pd.DataFrame, scores: dict[str, Any]) -> Picture:
    """The ensemble's total by the number of training studies, with intervals; of test studies prior and oracle too."""
    figure, said = Figure(figsize=(6, 4.2)), []
    ax = figure.add_subplot()
    for (name, title), dashes in zip(BLOCK_NAMES.items(), ("--", "-"), strict=True):
        mine = curve[curve["block"] == name].sort_values("n_train")
        if mine.empty:
            continue
        colour = figures.MODEL_COLOURS["ensemble"]
        ax.fill_between(mine["n_train"], mine["low"], mine["high"], color=colour, alpha=0.12, linewidth=0)
        ax.plot(mine["n_train"], mine["total"], "o", linestyle=dashes, color=colour, label=f"Ensemble, {title.lower()}")
        told = [f"{n} {number(total)}" for n, total in zip(mine["n_train"], mine["total"], strict=True)]
        said.append(f"{title}: {', '.join(told)}")
    for model in ("prior", "oracle"):
        total = value(scores.get("test") or {}, "scores", model)
        if total is not None:
            ax.axhline(total, color=figures.MODEL_COLOURS[model], linewidth=1.2, label=f"{model_name(model)}, test")
    sizes = sorted(curve["n_train"].unique())
    ax.set_xscale("log")
    ax.set_xticks(sizes, [str(n) for n in sizes], minor=False)
    ax.minorticks_off()
    ax.set(xlabel="Training studies", ylabel="Weighted log loss (lower is better)", title="What more studies are worth")
    figure.legend(**OUTSIDE)
    caption = (
        "The ensemble's total by the number of training studies, with its 95 % interval. Test studies are "
        "the same at each size; out of fold each size has its own."
    )
    return Picture("curve", caption, "; ".join(said), figure)


def plot_reliability(labelled: pd.DataFrame) -> Picture:
    """How often a severity occurs among rows of like natural probability; `labelled`: `run.labelled_rows`."""
    natural, severity = labelled[PROBABILITIES].to_numpy(), labelled["severity"].to_numpy()
    figure = Figure(figsize=(6, 4.6))
    figures.show_reliability(figure.add_subplot(), natural, severity, "Reliability of the ensemble, out of fold")
    figure.legend(**OUTSIDE)
    error = calibration_error(natural, severity)
    caption = f"Points on the dashed line are calibrated; the expected calibration error is {error:.3f}."
    return Picture("reliability", caption, f"Reliability of the three severities. {caption}", figure)


def plot_grades(labelled: pd.DataFrame) -> Picture:
    """Labels against grades (the severity of highest natural probability), a matrix a condition group."""
    severity, grade = labelled["severity"].to_numpy(int), labelled[PROBABILITIES].to_numpy().argmax(axis=1)
    group = np.array([CONDITIONS[condition].group for condition in labelled["condition"]])
    figure, said = Figure(figsize=(9, 3.6)), []
    for ax, key in zip(figure.subplots(1, len(GROUPS)), GROUPS, strict=True):
        name, mine = PART_NAMES[GROUPS[key].score], group == key
        figures.show_confusion(ax, severity[mine], grade[mine], name)
        said.append(f"{name}: {(severity[mine] == grade[mine]).sum()} of {mine.sum()} rows have the label's grade")
    caption = "Out-of-fold rows by label and grade, the most probable severity; shares are of the label's row."
    return Picture("grades", caption, "; ".join(said), figure, wide=True)


def plot_example(run: Run) -> Picture | None:
    """The training study with most severe labels, with its out-of-fold grades where the detectors found the levels.

    One slice of each series type: where the worst finding lies. None where the run has no points or no slices.
    """
    if run.labels.empty or not (run.folder / "predictions/points_oof.parquet").is_file():
        return None
    points = read_graded(run.folder, "oof").dropna(subset=["X"])
    if points.empty:
        return None
    severe = run.labels["severity"].eq(2).groupby(run.labels["study_id"]).sum()
    study_id = int(severe[severe.index.isin(points["study_id"])].idxmax())
    stacks = load_study(run.folder / "slices", study_id)
    if not stacks:
        return None
    points = points[points["study_id"] == study_id]
    figure = draw_still(stacks, points)
    caption = (
        f"Study {study_id}, graded by models that had not seen it: one slice of each series type, "
        "with the ensemble's grades where the detectors found the levels."
    )
    counts = points["grade"].value_counts().sort_index()
    said = ", ".join(f"{count} {SEVERITY_NAMES[k]}" for k, count in counts.items())
    return Picture("example", caption, f"{caption} Grades at the points found: {said}.", figure, wide=True, slices=True)
