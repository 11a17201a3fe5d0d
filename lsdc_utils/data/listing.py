"""A table of studies and their files: prediction lists them once, and each of its shards reads its part."""

import os
from collections.abc import Iterable
from pathlib import Path

import pandas as pd

from lsdc_utils.data import competition
from lsdc_utils.data.competition import Competition
from lsdc_utils.vocabulary import study_row_ids

NONE = -1  # series of a study that has none


def files_of(comp: Competition, series: pd.DataFrame, studies: Iterable[int]) -> pd.DataFrame:
    """The files of the studies: study_id, series_id, series_type, file (bytes: a name need not be UTF-8), size (bytes),
    time (ns). A series without files, or a study without series, has one line with an empty file."""
    lines = []
    by_study = dict(list(series.groupby("study_id")))
    for study_id in studies:
        if study_id not in by_study:
            lines.append((study_id, NONE, "", b"", 0, 0))
            continue
        for row in by_study[study_id].itertuples():
            source = comp.source(row.split, study_id, row.series_id)
            if isinstance(source, Path):
                inside = source.iterdir() if source.is_dir() else ()
                source = sorted(file for file in inside if file.is_file() and not file.name.startswith("."))
            stats = [(os.fsencode(file), file.stat()) for file in source]
            facts = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats] or [(b"", 0, 0)]
            lines += [(study_id, row.series_id, row.series_type, *fact) for fact in facts]
    return pd.DataFrame(lines, columns=["study_id", "series_id", "series_type", "file", "size", "time"])


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
