"""Where data comes from: a folder that was named, the competition's mount on Kaggle, or its download."""

from __future__ import annotations

import os
from pathlib import Path

COMPETITION = "rsna-2024-lumbar-spine-degenerative-classification"
MOUNTS = (Path("/kaggle/input"), Path("/kaggle/input/competitions"))  # where Kaggle shows a competition's files
CREDENTIALS = ("KAGGLE_API_TOKEN", "KAGGLE_KEY")  # in the environment; or a file in ~/.kaggle


class DataNotFound(ValueError):
    """No data where it was looked for, and what to do about it."""


def find_data(data_dir: str = "", download: bool = False) -> tuple[Path, str]:
    """The folder of the data and its kind: `data_dir` (folder), else Kaggle's mount or the download (kaggle).

    Nothing is downloaded unless `download` is true and credentials are set. DataNotFound says what is missing.
    """
    if data_dir:
        folder = Path(data_dir).expanduser().resolve()
        if not folder.is_dir():
            raise DataNotFound(f"data_dir: there is no folder {folder}")
        return folder, "folder"
    for mount in MOUNTS:
        if (mount / COMPETITION).is_dir():
            return mount / COMPETITION, "kaggle"
    if not download:
        raise DataNotFound(
            f"The real data set is not in {MOUNTS[0] / COMPETITION}. Give its folder with --data DIR, "
            "or let it be downloaded with download=true after accepting the competition's rules on kaggle.com."
        )
    if not any(os.environ.get(name) for name in CREDENTIALS) and not any(
        (Path.home() / ".kaggle" / name).is_file() for name in ("kaggle.json", "access_token")
    ):
        raise DataNotFound(
            "The download needs Kaggle's credentials: "
            "put kaggle.json into ~/.kaggle, or set KAGGLE_USERNAME and KAGGLE_KEY."
        )
    import kagglehub  # here, since nothing else needs it and it looks for the network when imported

    return Path(kagglehub.competition_download(COMPETITION)), "kaggle"
