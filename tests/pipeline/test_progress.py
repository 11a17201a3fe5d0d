"""What a person sees of a run: Snakemake's messages, logs, scores."""

from __future__ import annotations

import re
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from lsdc_utils.pipeline.graph import Step
from lsdc_utils.pipeline.progress import PARTS, Progress, failure, last_lines, score_table

MESSAGES = Path(__file__).resolve().parents[1] / "data" / "snakemake_demo.log"  # of a demo from 03 on, one core
EARLIER = {  # seconds of an earlier demo on the same machine, by other code
    "00_get_data": 296, "01_eda": 36, "02_convert_labels": 104, "phantom": 10,
    "03_train_localiser_fold0": 411, "03_train_localiser_fold1": 397,
    "03_train_yolo_nfn_fold0": 99, "03_train_yolo_nfn_fold1": 104, "03_train_yolo_scs_fold0": 87,
    "03_train_yolo_scs_fold1": 85, "03_train_yolo_ss_fold0": 84, "03_train_yolo_ss_fold1": 76,
    "04_train_vit3d_fold0": 92, "04_train_vit3d_fold1": 92,
    "05_ensemble_inference": 111, "06_evaluation": 9, "07_stress_tests": 277, "08_report": 80,
}  # fmt: skip


def test_the_last_line_is_what_a_progress_bar_shows_now(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("first\n  1%\r 50%\r100%\x1b[0m\n\n")
    assert last_lines(log) == ["100%"]
    assert last_lines(log, 5) == ["first", "100%"]
    assert last_lines(tmp_path / "none") == []


def test_progress_is_read_from_snakemakes_messages() -> None:
    progress = Progress()
    said = [progress.read(line) for line in SNAKEMAKE_SAYS.splitlines()]
    assert [line for line in said if line] == [
        "[1/2] 01_eda",
        "[1/2] 01_eda done in 0:00",
        "[2/2] 04_train_vit3d_fold0",
        "04_train_vit3d_fold0 failed",
    ]
    assert progress.reasons["01_eda"] == "Missing output files: a"
    assert progress.failed == ["04_train_vit3d_fold0"]
    assert progress.running == {}


def test_the_message_of_a_cluster_on_a_failed_job_is_shown() -> None:
    progress, words = Progress(), SNAKEMAKE_SAYS.replace("None", "SLURM-job '5' ran out of time")
    said = [progress.read(line) for line in words.splitlines()]
    assert said[-1] == "04_train_vit3d_fold0 failed: SLURM-job '5' ran out of time"


@pytest.mark.parametrize(("past", "first", "error"), [(EARLIER, 10, 4.0), ({}, 21, 4.0)])
def test_the_expected_end_of_a_recorded_run(past: dict, first: int, error: float, monkeypatch) -> None:
    """Minutes left, asked every 30 seconds: from an earlier run's table, and from what is done alone."""
    progress, now, said, start = Progress(past), [0.0], {}, None
    monkeypatch.setattr(time, "time", lambda: now[0])
    for line in MESSAGES.read_text().splitlines():
        if not (stamp := re.match(r"\[(\w{3} \w{3} +\d+ [\d:]+ \d{4})\]", line)):
            progress.read(line)
            continue
        moment = datetime.strptime(stamp[1], "%a %b %d %H:%M:%S %Y").timestamp()
        start = moment if start is None else start
        for now[0] in np.arange(now[0] or start, moment, 30):  # noqa: B020
            said[(now[0] - start) / 60] = progress.left()
        now[0] = moment
    total = (now[0] - start) / 60
    assert len(progress.spans) == 14
    assert total == pytest.approx(41.8, abs=0.1)
    minutes = {at: int(re.fullmatch(r" \| about (\d+) min left", text)[1]) for at, text in said.items() if text}
    assert min(minutes) == pytest.approx(first, abs=1)  # when the first step, or half of them, was done
    errors = [left - (total - at) for at, left in minutes.items()]
    print(f"mean error {np.mean(np.abs(errors)):.1f} min of {total:.1f}, largest {np.max(np.abs(errors)):.1f}")
    assert np.mean(np.abs(errors)) < error


def test_the_end_is_told_after_a_minute_and_with_a_finished_step(monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    progress = Progress({"a": 30.0, "b": 600.0}, total=2, planned={"a": 1, "b": 1}, rules={"a": "a"})
    progress.running["a"] = 0.0
    now[0] = 120.0
    assert progress.left() == ""  # nothing is finished
    progress.spans["a"] = (progress.running.pop("a"), 30.0)
    now[0] = 40.0
    assert progress.left() == ""  # the first minute
    progress.rules["b"], progress.running["b"] = "b", 30.0
    now[0] = 150.0
    assert progress.left() == " | about 8 min left"  # 600 s as before, of which 120 are over
    now[0] = 1000.0
    assert progress.left() == " | about 1 min left"
    assert Progress({}, 3, progress.planned, progress.rules, spans=progress.spans).left() == ""  # b is unknown


SNAKEMAKE_SAYS = """\
total                    2

localrule eda:
    input: data.json
    log: logs/01_eda.log
    jobid: 3
    reason: Missing output files: a
Finished jobid: 3 (Rule: eda)
rule train_vit3d:
    log: logs/04_train_vit3d_fold0.log
    jobid: 1
    reason: Params have changed
RuleException:
Error in rule train_vit3d:
    message: None
    jobid: 1
    log: logs/04_train_vit3d_fold0.log (check log file(s) for error details)
"""


@pytest.mark.parametrize("content", ["", '{"cells": [{"cell_ty', "{}"])
def test_a_failure_is_told_where_the_notebook_is_half_written(content: str, tmp_path: Path) -> None:
    (tmp_path / "01_eda.ipynb").write_text(content)
    (tmp_path / "01_eda.log").write_text("OSError: No space left on device\n")
    assert "No space left on device" in failure(tmp_path, Step("01_eda", "01_eda", {}))


def test_scores_show_test_first_and_out_of_fold_alone_without_test_labels() -> None:
    parts = dict.fromkeys(PARTS, 0.5)
    block = {
        "n_studies": 7,
        "scores": {"prior": parts, "ensemble": parts},
        "skill": {"ensemble": {**parts, "total": 0.25}},
        "interval": {"ensemble": {"total": [0.4, 0.6]}},
    }
    both = score_table({"oof": block, "test": block})
    assert both.index("test studies") < both.index("out of fold")
    assert "0.250" in both
    assert "0.400 to 0.600" in both
    alone = score_table({"oof": {**block, "skill": None}, "test": None})
    assert "test studies" not in alone
    assert "skill" not in alone
    some = dict.fromkeys(PARTS) | {"foraminal": 0.7, "mean_of_groups": 0.7}
    block |= {"groups": ["nfn"], "scores": {"ensemble": some}, "skill": {"ensemble": some}, "interval": {}}
    lines = score_table({"oof": block, "test": None}).splitlines()
    assert "mean of groups" in lines[2] and "total" not in lines[2]
    assert lines[3].split() == ["ensemble", "-", "0.700", "-", "-", "0.700", "0.700"]
    few = block | {"interval": {"ensemble": {"mean_of_groups": [None, None]}}}  # of few patients
    assert score_table({"oof": few, "test": None}).splitlines() == lines
