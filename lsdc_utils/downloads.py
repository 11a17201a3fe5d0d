"""Where data and pretrained weights come from: a place that was named, Kaggle's mount, or, if asked for, a download."""

from __future__ import annotations

import hashlib
import json
import os
import re
import urllib.request
from pathlib import Path

from lsdc_utils.files import atomic, write_json

COMPETITION = "rsna-2024-lumbar-spine-degenerative-classification"
INPUT = Path(os.environ.get("LSDC_KAGGLE", "/kaggle")) / "input"  # elsewhere in a rehearsal
MOUNTS = (INPUT, INPUT / "competitions")  # where Kaggle shows a competition's files
ULTRALYTICS = "ultralytics/assets", "v8.4.0"  # repository and release of YOLO weights
RELEASE, ASSET = "https://api.github.com/repos/{}/releases/tags/{}", "https://github.com/{}/releases/download/{}/{}"
HUB = "https://huggingface.co/timm/{}/{}/main/model.safetensors"  # of a timm model's weights, or of their checksum
LARGEST = 4 * 2**30  # bytes of weights
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


# ---- pretrained weights --------------------------------------------------------------------------------------------


class WeightsNotFound(ValueError):
    """No pretrained weights where they were looked for, or not the ones that were meant; says what to do about it."""


def find_weights(name: str, fetch: bool = False) -> Path:
    """The file of pretrained weights `name`: as a path from here, else in the cache, else fetched into it.

    YOLO weights (yolov10x.pt) come from ultralytics' release, timm's (<model>.safetensors) from its page on the Hugging
    Face hub, each with the checksum that its source states, which is compared whenever the file is taken from the
    cache. Nothing is fetched unless `fetch` is true. WeightsNotFound names the file and where to put it.
    """
    given, cached = Path(name).expanduser(), cache() / Path(name).name
    if given.is_file():
        return given.resolve()
    if not cached.is_file():
        if not fetch:
            raise WeightsNotFound(
                f"pretrained weights {name} are not there. Put the file into {Path.cwd()} or {cached.parent}, give its "
                "path, or let it be fetched once with fetch_weights=true"
            )
        _fetch(cached)
    about = cached.with_name(f"{cached.name}.json")
    if about.is_file() and json.loads(about.read_text())["sha256"] != _sha256(cached):
        raise WeightsNotFound(f"{cached} is not the file that {about.name} describes (sha256 differs): remove it")
    return cached


def cache() -> Path:
    """The folder of fetched weights: $LSDC_CACHE, else ~/.cache/lsdc."""
    return Path(os.environ.get("LSDC_CACHE") or "~/.cache/lsdc").expanduser().resolve()


def _fetch(target: Path) -> None:
    """Fetch weights by their name and keep their checksum beside them."""
    url, stated = _source(target.name)
    print(f"fetching {url}", flush=True)
    with atomic(target) as temporary:
        with _open(url) as answer, temporary.open("wb") as file:
            size = 0
            while (part := answer.read(2**20)) and size <= LARGEST:
                size += file.write(part)
        if (found := _sha256(temporary)) != stated:
            raise WeightsNotFound(f"{url}: {size} bytes with sha256 {found}, where its source states {stated}")
        write_json(target.with_name(f"{target.name}.json"), {"url": url, "sha256": stated})


def _source(name: str) -> tuple[str, str]:
    """The address of weights and the sha256 that their source states."""
    if re.fullmatch(r"yolo\w+\.pt", name):
        with _open(RELEASE.format(*ULTRALYTICS)) as answer:
            assets = {asset["name"]: asset.get("digest") or "" for asset in json.load(answer)["assets"]}
        url, stated = ASSET.format(*ULTRALYTICS, name), assets.get(name, "")
    elif match := re.fullmatch(r"([\w.]+)\.safetensors", name):
        url = HUB.format(match[1], "resolve")
        with _open(HUB.format(match[1], "raw")) as answer:  # a large file's pointer, which holds its checksum
            stated = answer.read(1024).decode(errors="replace")
    else:
        raise WeightsNotFound(f"weights {name!r}: only yolo*.pt and <timm model>.safetensors can be fetched")
    checksum = re.search(r"sha256:([0-9a-f]{64})", stated)
    if not checksum:
        raise WeightsNotFound(f"{url}: its source states no checksum, so it is not taken; give a file by its path")
    return url, checksum[1]


def _open(url: str) -> urllib.request.addinfourl:
    """The answer of an address; WeightsNotFound where there is none."""
    try:
        return urllib.request.urlopen(url, timeout=30)
    except OSError as error:
        raise WeightsNotFound(f"{url}: {error}") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
