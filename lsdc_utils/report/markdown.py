"""A run as Markdown: its scores for the README, and the card that goes with its weights."""

from __future__ import annotations

import json
import re
from typing import Any

import pandas as pd

from lsdc_utils.report.pages import WARNING, duration
from lsdc_utils.report.run import Run, about, limits, provenance, score_table, summary

LICENCES = {
    "kaggle": "Trained on the competition's images and labels, which Kaggle and the RSNA give for non-commercial use "
    "only: under the competition's rules these weights go to people alone who accepted them, and serve nothing else.",
    "phantom": "Trained on a phantom that the repository draws itself; no rights of others are in it.",
}


def record_of(run: Run) -> dict[str, Any]:
    """What the README says of a run, for docs/<run>.json; FileNotFoundError where the run has no report yet."""
    return {
        "facts": provenance(run),
        "scores": run.scores,
        "localisation": run.localisation.to_dict("records"),
        "settings": run.settings.to_dict("records"),
        "experiments": {name: json.loads(table.to_json(orient="records")) for name, table in run.experiments.items()},
        "seconds": float(run.steps["seconds"].sum()),
        "memory": float(run.steps["memory"].fillna(0).max()) if len(run.steps) else 0.0,
    }


def score_lines(run: str, record: dict[str, Any]) -> str:
    """Sentences, the score table, and whose numbers these are, as Markdown."""
    facts = record["facts"]
    cost = f"its steps took {duration(record['seconds'])} in sum and at most {record['memory'] / 1024:.1f} GiB each"
    about = f"Run `{run}`, {facts['Made']}, commit {facts['Commit']}, data: {facts['Data']}; {cost}."
    return "\n\n".join([" ".join(summary(record["scores"])), markdown(score_table(record["scores"])), about])


def titled(tables: dict[str, pd.DataFrame]) -> str:
    """Tables of text as Markdown, each under its name."""
    return "\n\n".join(f"{name}:\n\n{markdown(table)}" for name, table in tables.items())


def markdown(table: pd.DataFrame) -> str:
    """A table of text as Markdown; of column names in two rows the upper stands before the lower."""
    head = [table.index.name, *(name if isinstance(name, str) else ": ".join(name) for name in table.columns)]
    lines = [head, ["---", *["---:"] * len(table.columns)], *table.reset_index().to_numpy().tolist()]
    return "\n".join("| " + " | ".join(re.sub(r"([|<>`*_])", r"\\\1", cell) for cell in line) + " |" for line in lines)


def model_card(run: Run) -> str:
    """What somebody who is given the weights of a run must know: data, scores, use, limits, licence."""
    kind = run.data.get("kind", "")
    facts = "\n".join(f"- {label}: {text}" for label, text in provenance(run).items())
    known = "\n\n".join(
        f"{heading}:\n\n" + "\n".join(f"- {sentence}" for sentence in sentences)
        for heading, sentences in limits(run).items()
    )
    return f"""# Models of run {run.name}

{about(run)}

**{WARNING}**

## Scores

{score_lines(run.name, record_of(run))}

## Use

For research on grading lumbar-spine MRI: `./run_all.sh predict DIR --run FILE` grades a folder of DICOM studies with
this archive. Grades are natural probabilities of normal/mild, moderate and severe; `submission.csv` alone holds rows
that are weighted for the score.

## Limits

{known}

## Origin

{facts}

## Licence

AGPL-3.0-or-later, which ultralytics asks of weights that its trainer makes. {LICENCES.get(kind, "")}
"""
