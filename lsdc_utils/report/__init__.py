"""A run as pages that a person reads: scores, figures, cost and provenance, and every executed notebook as a chapter.

run: what a run's files say, as tables and sentences; pictures: its figures; pages: HTML; readme: the README's result.
"""

from lsdc_utils.report.pages import write_report
from lsdc_utils.report.pictures import run_pictures
from lsdc_utils.report.run import blocks, experiment_tables, parts_table, read_run, score_table, summary

__all__ = [
    "blocks",
    "experiment_tables",
    "parts_table",
    "read_run",
    "run_pictures",
    "score_table",
    "summary",
    "write_report",
]
