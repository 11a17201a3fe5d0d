"""The studies of one shard of a prediction, read from the table in which `pipeline.predict` listed their files."""

import os
from pathlib import Path

import pandas as pd

from lsdc_utils.data import competition
from lsdc_utils.data.competition import Competition
from lsdc_utils.vocabulary import study_row_ids

NONE = -1  # series of a study that has none


def read_listed(root: str | Path, table: str | Path) -> Competition:
    """The studies of one shard as a Competition without labels, all as test studies."""
    listed = pd.read_parquet(table)
    series = listed.loc[listed["series_id"] != NONE, ["study_id", "series_id", "series_type"]].drop_duplicates()
    there = listed[listed["file"] != b""].groupby(["study_id", "series_id"])["file"]
    return Competition(
        root=Path(root),
        labels=pd.DataFrame(columns=[*competition.KEY, "severity"]),
        coordinates=pd.DataFrame(columns=competition.POINTS),
        series=series.assign(split="test").reset_index(drop=True),
        sample_rows=[row for study in listed["study_id"].unique() for row in study_row_ids(study)],
        findings=pd.DataFrame(columns=competition.FINDINGS),
        files={key: tuple(Path(os.fsdecode(file)) for file in files) for key, files in there},
    )
