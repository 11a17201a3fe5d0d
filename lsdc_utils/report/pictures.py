"""The figures of a run's summary, each with a caption and a text alternative, and images for pages."""

import base64
import io
from dataclasses import dataclass
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from lsdc_utils import figures
from lsdc_utils.data.stacks import load_study
from lsdc_utils.grading.dose_figure import show_doses
from lsdc_utils.grading.marks import draw_still
from lsdc_utils.grading.run_tables import read_graded
from lsdc_utils.metric import PARTS, PROBABILITIES, calibration_error, overall
from lsdc_utils.report import run as tables
from lsdc_utils.report.card import sentences
from lsdc_utils.report.run import BLOCK_NAMES, PART_NAMES, Run, value
from lsdc_utils.vocabulary import GROUPS, SEVERITY_NAMES

BLACK = figures.MODEL_COLOURS["ensemble"]
LOSS = "Weighted log loss (lower is better)"
OUTSIDE = {"loc": "outside lower center", "ncols": 3}  # of legends, so that they cover nothing


@dataclass(frozen=True)
class Picture:
    """A figure with its caption and text alternative."""

    name: str
    caption: str
    alt: str
    figure: Figure
    wide: bool = False  # takes the whole width of a page

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a notebook shows: the figure with its text alternative, and the caption in a plain terminal."""
        content = io.BytesIO()
        self.figure.savefig(content, format="png")
        return {"image/png": content.getvalue(), "text/plain": self.caption}, {"image/png": {"alt": self.alt}}

    def address(self) -> str:
        """The figure embedded in a page: SVG with text as outlines (no font needed), or AVIF where it shows slices."""
        content = io.BytesIO()
        if self.name == "example":
            self.figure.savefig(content, format="png", dpi=150)
            return avif(Image.open(content))
        self.figure.savefig(content, format="svg", metadata={"Date": None})
        return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"


def avif(image: Image.Image, quality: int = 37, largest: int = 4096) -> str:
    """An image as the address of an embedded AVIF image, scaled down to `largest` pixels a side."""
    image = image.convert("RGB")
    image.thumbnail((largest, largest))
    content = io.BytesIO()
    image.save(content, "AVIF", quality=quality, speed=8)  # 4 times as fast as 6, the default; 14 % larger
    return f"data:image/avif;base64,{base64.b64encode(content.getvalue()).decode()}"


def run_pictures(run: Run) -> list[Picture]:
    """The figures of the summary, as far as the run has the files for them."""
    labelled = tables.labelled_rows(run)
    pictures = [plot_example(run), plot_doses(run), plot_totals(run.scores), plot_parts(run.scores)]
    pictures += plot_grades(labelled) if len(labelled) else ()
    pictures += [plot_curve(run.experiments["curve"], run.scores)] if "curve" in run.experiments else []
    return [picture for picture in pictures if picture]


def plot_doses(run: Run) -> Picture | None:
    """Dose-response curves of the models, the oracle and simulated readers; None where 07 did not draw any."""
    if run.doses.empty:
        return None
    caption = " ".join(sentences(run, "doses", bodies=run.doses["body"].nunique()))
    ends = run.doses[run.doses["dose"] == run.doses["dose"].max()].groupby("model")["severe"].mean()
    texts = ", ".join(f"{tables.model_name(model)} {ends[model]:.2f}" for model in ("oracle", "ensemble"))
    figure = Figure(figsize=(12, 4.4))
    show_doses(figure, run.doses)
    alt = f"Probability against narrowing, a panel for each condition group. Severe at full narrowing: {texts}."
    return Picture("doses", caption, alt, figure, wide=True)


def plot_totals(scores: dict[str, Any]) -> Picture:
    """Total score of each model with its interval: out of fold filled, test hollow."""
    shown, totals, last = tables.models(scores)[::-1], {}, overall(scores["oof"]["scores"]["prior"])
    figure = Figure(figsize=(6, 1.6 + 0.5 * len(shown)))
    ax = figure.add_subplot()
    for k, (name, block) in enumerate(tables.blocks(scores).items()):
        totals[BLOCK_NAMES[name]] = {tables.model_name(model): value(block, "scores", model) for model in shown[::-1]}
        style = {"marker": "os"[k], "linestyle": "none", "markersize": 8}
        for y, model in enumerate(shown):
            total, colour = value(block, "scores", model), figures.model_colour(model)
            if total is not None:
                ax.plot(value(block, "interval", model) or [total] * 2, [y - 0.32 * k] * 2, color=colour, linewidth=2)
                ax.plot(total, y - 0.32 * k, color=colour, markerfacecolor=[colour, "white"][k], **style)
        ax.plot([], [], color=BLACK, markerfacecolor=[BLACK, "white"][k], label=BLOCK_NAMES[name], **style)
    ax.set_yticks(range(len(shown)), [tables.model_name(model) for model in shown])
    name = "Total score" if last == "total" else PART_NAMES[last]
    ax.set(xlabel=LOSS, title=f"{name} of each model", ylim=(-0.8, len(shown) - 0.5))
    figure.legend(**OUTSIDE)
    caption = f"{name} of each model; lines are 95 % intervals from resampling studies."
    return Picture("totals", caption, _words(totals), figure)


def _words(values: dict[str, dict[Any, float | None]]) -> str:
    """Numbers of a figure as its text alternative, e.g. `Test: Prior 0.815, Oracle 0.339`."""
    texts = (f"{name}: {', '.join(f'{key} {tables.number(row[key])}' for key in row)}" for name, row in values.items())
    return "; ".join(texts)


def plot_parts(scores: dict[str, Any]) -> Picture:
    """The parts of each model's out-of-fold score: as skill where an oracle is known, else as scores."""
    block, kind, name, left_out, caption = scores["oof"], "scores", "Score", (), "Lower is better."
    if block.get("skill"):
        kind, name, left_out = "skill", "Skill", ("prior", "oracle")  # their skill is 0 and 1
        caption = "Skill is 0 for the label-frequency baseline and 1 (dashed) for the oracle."
    shown = [model for model in tables.models(scores) if model in block[kind] and model not in left_out]
    parts = (*PARTS[:-1], overall(block["scores"]["prior"]))
    values = {tables.model_name(model): {PART_NAMES[p]: value(block, kind, model, p) for p in parts} for model in shown}
    figure = Figure(figsize=(6, 4.6))
    ax = figure.add_subplot()
    colours = [figures.model_colour(model) for model in shown]
    pd.DataFrame(values, dtype=float).plot.bar(ax=ax, width=0.8, rot=0, color=colours, legend=False)
    if kind == "skill":
        ax.axhline(0, color=BLACK, linewidth=1)
        ax.axhline(1, color=figures.MODEL_COLOURS["oracle"], linestyle="--", linewidth=1.2)
    ax.set(title=f"{name} by part, out of fold", ylabel=name)
    ax.set_xticks(range(len(PARTS)), [PART_NAMES[part].replace(" ", "\n") for part in parts])
    ax.grid(False, axis="x")
    figure.legend(**OUTSIDE)
    return Picture("parts", caption, _words(values), figure)


def plot_curve(curve: pd.DataFrame, scores: dict[str, Any]) -> Picture:
    """The ensemble's total by the number of training studies, with its interval, the baseline and the oracle."""
    figure, totals = Figure(figsize=(6, 4.2)), {}
    ax = figure.add_subplot()
    for name, rows in curve.set_index("n_train").sort_index().groupby("block"):
        totals[BLOCK_NAMES[name]] = rows["total"].to_dict()
        line, label = "o-" if name == "test" else "o--", f"Ensemble, {BLOCK_NAMES[name].lower()}"
        ax.fill_between(rows.index, rows["low"], rows["high"], color=BLACK, alpha=0.12, linewidth=0)
        ax.plot(rows.index, rows["total"], line, color=BLACK, label=label)
    for model in ("prior", "oracle"):
        total = value(scores.get("test") or {}, "scores", model)
        if total is not None:
            name = f"{tables.model_name(model)}, test"
            ax.axhline(total, color=figures.MODEL_COLOURS[model], linewidth=1.2, label=name)
    ax.set(xscale="log", xlabel="Training studies", ylabel=LOSS, title="Learning curve")
    sizes = sorted(curve["n_train"].unique())
    ax.set_xticks(sizes, sizes)
    ax.minorticks_off()
    figure.legend(**OUTSIDE)
    caption = "The ensemble's total with its 95 % interval. All sizes share the same test studies."
    return Picture("curve", caption, _words(totals), figure)


def plot_grades(labelled: pd.DataFrame) -> tuple[Picture, Picture]:
    """Labels against grades by condition group, and how probabilities are calibrated; of `run.labelled_rows`."""
    natural, severity = labelled[PROBABILITIES].to_numpy(), labelled["severity"].to_numpy(int)
    grade, confusion, texts = natural.argmax(axis=1), Figure(figsize=(9, 3.6)), []
    there = [group for key, group in GROUPS.items() if key in set(labelled["group"])]
    for ax, group in zip(confusion.subplots(1, len(there), squeeze=False)[0], there, strict=True):
        name, rows = PART_NAMES[group.score], (labelled["group"] == group.key).to_numpy()
        figures.show_confusion(ax, severity[rows], grade[rows], name)
        texts.append(f"{name}: {(severity[rows] == grade[rows]).sum()} of {rows.sum()} rows have the label's grade")
    caption = "Out-of-fold rows by label and grade (the most probable severity); shares are of the label's row."
    grades = Picture("grades", caption, "; ".join(texts), confusion, wide=True)
    figure, error = Figure(figsize=(6, 4.6)), calibration_error(natural, severity)
    figures.show_reliability(figure.add_subplot(), natural, severity, "Reliability of the ensemble, out of fold")
    figure.legend(**OUTSIDE)
    caption = f"Points on the dashed line are calibrated; the expected calibration error is {error:.3f}."
    return grades, Picture("reliability", caption, f"Reliability of the three severities. {caption}", figure)


def plot_example(run: Run) -> Picture | None:
    """The training study with most severe labels: a slice of each series type; None where no points are known."""
    if not (run.folder / "predictions/points_oof.parquet").is_file():
        return None
    rows = read_graded(run.folder, "oof")
    severe = rows["severity"].eq(2).groupby(rows["study_id"]).sum()
    rows = rows.dropna(subset=["X"])
    study = severe[severe.index.isin(rows["study_id"])].idxmax() if len(rows) else 0
    stacks = load_study(run.folder / "slices", study)
    if not stacks:
        return None
    rows = rows[rows["study_id"] == study]
    caption = f"Study {study}, graded out of fold: one slice of each series type, with the ensemble's grades."
    counts = ", ".join(f"{count} {SEVERITY_NAMES[k]}" for k, count in rows["grade"].value_counts().sort_index().items())
    return Picture("example", caption, f"{caption} Grades: {counts}.", draw_still(stacks, rows), wide=True)
