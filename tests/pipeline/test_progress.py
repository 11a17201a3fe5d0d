"""What a person sees of a run: Snakemake's messages, logs, scores."""

from __future__ import annotations

from pathlib import Path

from lsdc_utils.pipeline.progress import PARTS, Progress, last_lines, score_table


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
