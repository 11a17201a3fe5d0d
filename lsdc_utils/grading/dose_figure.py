"""The figure of dose and response, for 07 and the report."""

import pandas as pd
from matplotlib.figure import Figure

from lsdc_utils import figures
from lsdc_utils.vocabulary import GROUP_OF, GROUPS

DOSE_LINES = {"oracle": "--", "yolo": ":", "vit3d": "-.", "ensemble": "-"}  # columns of a table of doses


def show_doses(figure: Figure, responses: pd.DataFrame) -> None:
    """Draw the dose-response curves of a table such as stress/doses.csv: one panel for each condition group. Curves are
    means over bodies and sides: P(moderate or worse) and P(severe) of each model. Marks are the shares of simulated
    readers, vertical lines the cut-offs of an error-free reader."""
    for ax, (key, group) in zip(figure.subplots(1, len(GROUPS), sharey=True), GROUPS.items(), strict=True):
        rows = responses[responses["condition"].map(GROUP_OF) == key]
        for event, severity in (("moderate", 1), ("severe", 2)):
            colour, marker = figures.SEVERITY_COLOURS[severity], figures.SEVERITY_MARKERS[severity]
            curves = rows.pivot_table(index="dose", columns="model", values=event)
            for model, line in DOSE_LINES.items():
                ax.plot(curves.index, curves[model], line, color=colour)
            ax.plot(curves.index, curves["readers"], marker, color=colour, markersize=5, alpha=0.6)
            ax.axvline(rows[f"{event}_from"].iloc[0], color="#606060", linewidth=0.8, linestyle="--")
        ax.set(title=group.score, xlabel="Narrowing (0 open, 1 closed)", ylim=(-0.02, 1.02))
    first = figure.axes[0]
    first.set_ylabel("Probability")
    for line, name in zip(DOSE_LINES.values(), ("oracle", "detectors", "3D ViT", "ensemble"), strict=True):
        first.plot([], [], line, color="#404040", label=name)
    for severity, name in ((1, "moderate or worse"), (2, "severe")):
        marker, colour = figures.SEVERITY_MARKERS[severity], figures.SEVERITY_COLOURS[severity]
        first.plot([], [], marker=marker, color=colour, label=f"{name} (marks: readers)")
    figure.legend(loc="outside lower center", ncols=6)
    figure.suptitle("Dose and response: one location narrowed step by step, everything else unchanged")
