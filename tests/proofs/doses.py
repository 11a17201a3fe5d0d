"""Does each grade answer to its own narrowing: `python tests/proofs/doses.py RUN [--bodies 12] [--seed 4711]`.

Every condition of some phantom bodies is narrowed in nine steps, in one row, all else unchanged. Printed for detectors,
transformer and ensemble: the slope of the response as a share of the oracle's by condition group, and the leak: the
95th percentile, over bodies and other rows, of their change as a share of the oracle's change of the narrowed row. 95 %
intervals resample bodies, which are drawn for this measurement alone. Takes about ten minutes of processor time.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lsdc_utils.stress.answers import MODELS, answer  # noqa: E402
from lsdc_utils.stress.cases import dose_cases  # noqa: E402
from lsdc_utils.stress.responses import leaks, responses, slopes  # noqa: E402
from lsdc_utils.vocabulary import CONDITIONS, GROUPS  # noqa: E402

DOSES = np.linspace(0, 1, 9).round(3)
RESAMPLES = 500


def group_slopes(curves: pd.DataFrame, model: str) -> pd.Series:
    """Mean share of the oracle's slope by group, and over all conditions and events their median."""
    table = slopes(curves)
    share = table[model] / table["oracle"]
    by_group = share.groupby([GROUPS[CONDITIONS[c].group].score for c, _ in share.index], sort=False).mean()
    return pd.concat([by_group, pd.Series({"median": share.median()})])


def leak_shares(cases: list, rows: pd.DataFrame, curves: pd.DataFrame, model: str) -> pd.DataFrame:
    """Change of each other row over the oracle's change of the narrowed one: body, share."""
    table = leaks(cases, rows[rows["model"] == model].assign(model="ensemble"))
    own = curves[curves["model"] == "oracle"]
    span = own.groupby(["condition", "level", "body"])["moderate"].agg(np.ptp).reset_index()
    span["narrowed"] = span["condition"] + "_" + span["level"]
    table = table.merge(span[["narrowed", "body", "moderate"]], on=["narrowed", "body"], validate="many_to_one")
    return table.assign(share=table["leak"] / table["moderate"])[["body", "share"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--bodies", type=int, default=12)
    parser.add_argument("--seed", type=int, default=4711)
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    recipe = json.loads((asked.run / "blend.json").read_text())
    cases = [replace(case, occlude=False) for case in dose_cases(asked.bodies, DOSES, asked.seed)]
    rows = answer(cases, asked.run, recipe, asked.seed, asked.workers, 1).rows
    curves, rng, lines = responses(cases, rows), np.random.default_rng(0), {}
    by_body = dict(list(curves.groupby("body")))
    drawn = [rng.choice(list(by_body), len(by_body)) for _ in range(RESAMPLES)]
    for model in MODELS:
        shares = leak_shares(cases, rows, curves, model)
        spans = {body: part["share"].to_numpy() for body, part in shares.groupby("body")}
        measured = group_slopes(curves, model).to_dict() | {"leak": shares["share"].quantile(0.95)}
        again = [
            group_slopes(pd.concat([by_body[body] for body in bodies]), model).to_dict()
            | {"leak": np.quantile(np.concatenate([spans[body] for body in bodies]), 0.95)}
            for bodies in drawn
        ]
        low, high = pd.DataFrame(again).quantile([0.025, 0.975]).to_numpy()
        texts = zip(measured.items(), low, high, strict=True)
        lines[model] = {name: f"{value:.2f} ({a:.2f} to {b:.2f})" for (name, value), a, b in texts}
    print(pd.DataFrame(lines).T.to_string())


if __name__ == "__main__":
    main()
