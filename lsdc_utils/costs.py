"""What the steps of a run cost: elapsed and processor time, memory."""

import contextlib
import ctypes
import itertools
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lsdc_utils.files import atomic, write_json

ADOPT = 36  # PR_SET_CHILD_SUBREAPER of prctl(2)


@contextlib.contextmanager
def measured(record: Path) -> Iterator[None]:
    """Write the cost of the with-body to the JSON file `record` unless it raises: its start and end (seconds since the
    epoch) and cpu_s, user and system seconds of this process and of all its descendants that have ended."""
    record.unlink(missing_ok=True)
    ctypes.CDLL(None).prctl(ADOPT, 1)  # a kernel's process pool has a server that outlives the kernel
    began = time.time()
    yield
    with contextlib.suppress(ChildProcessError):  # none is left
        for _ in range(100):
            time.sleep(0.05 * (os.waitpid(-1, os.WNOHANG)[0] == 0))
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    write_json(record, {"began": began, "ended": time.time(), "cpu_s": round(cpu_s, 2)})


def shares(spans: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Elapsed seconds of each step, from its start and end; time in which n steps ran counts 1/n for each of them."""
    result = dict.fromkeys(spans, 0.0)
    for start, end in itertools.pairwise(sorted(set(itertools.chain(*spans.values())))):
        running = [step for step, (began, ended) in spans.items() if began <= start and end <= ended]
        result |= {step: result[step] + (end - start) / len(running) for step in running}
    return result


def step_table(run: Path) -> Any:
    """Table of the costs of each finished step of the run in folder `run`, NaN if not measured.

    seconds, memory (MiB) and load (cores in use) are Snakemake's, cpu_s of `measured`, share_s of `shares`. They are of
    the start that finished the step: what a start that was killed took before is not counted.
    """
    import pandas as pd  # takes a while, which the command line does not need

    costs = {file.stem: pd.read_csv(file, sep="\t").iloc[-1].to_dict() for file in sorted(run.glob("logs/*.tsv"))}
    for record in run.glob("logs/*.json"):
        costs.get(record.stem, {}).update(json.loads(record.read_text()))
    names = {"s": "seconds", "max_rss": "memory", "mean_load": "load"}
    table = pd.DataFrame(costs, index=["s", "cpu_s", "max_rss", "mean_load", "began", "ended"]).T.rename(columns=names)
    table = table.apply(pd.to_numeric, errors="coerce")
    spans = table[["began", "ended"]].dropna()
    share = shares(dict(zip(spans.index, spans.to_numpy().tolist(), strict=True)))
    return table.drop(columns=spans.columns).assign(load=table["load"] / 100, share_s=pd.Series(share, dtype=float))


def write_step_table(run: Path) -> None:
    """Write logs/steps.csv of the run in folder `run`: its step table, and a line of totals (of memory the largest)."""
    table = step_table(run)
    table.loc["total"] = table.sum(min_count=1).to_dict() | {"memory": table["memory"].max(), "load": float("nan")}
    with atomic(run / "logs/steps.csv") as temporary:
        table.to_csv(temporary, index_label="step", float_format="%.2f")
