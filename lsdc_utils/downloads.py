"""Where data and pretrained weights come from: a given path, Kaggle's mount, or, if asked for, a download."""

import json
import os
import re
import urllib.request
from pathlib import Path

from lsdc_utils.files import sha256, write_json

COMPETITION = "rsna-2024-lumbar-spine-degenerative-classification"
INPUT = Path(os.environ.get("LSDC_KAGGLE", "/kaggle")) / "input"  # elsewhere in a rehearsal
MOUNTS = (INPUT, INPUT / "competitions")  # where Kaggle shows a competition's files
ULTRALYTICS = "ultralytics/assets", "v8.4.0"  # repository and release of YOLO weights
RELEASE, ASSET = "https://api.github.com/repos/{}/releases/tags/{}", "https://github.com/{}/releases/download/{}/{}"
HUB = "https://huggingface.co/timm/{}/{}/main/model.safetensors"  # of a timm model's weights, or of their checksum
CREDENTIALS = ("KAGGLE_API_TOKEN", "KAGGLE_KEY")  # in the environment; or a file in ~/.kaggle


class DataNotFound(ValueError):
    """There are no data where they were looked for; the message says what to do."""


class WeightsNotFound(ValueError):
    """There are no pretrained weights, or not the right ones; the message says what to do."""


def find_data(data_dir: str = "", download: bool = False) -> tuple[Path, str]:
    """The data's folder and kind: `data_dir` (folder or phantom), else Kaggle's mount or, if `download` is true and
    credentials are set, the download (kaggle). DataNotFound says what is missing."""
    if data_dir:
        folder = Path(os.path.expanduser(data_dir)).resolve()
        if not folder.is_dir():
            raise DataNotFound(f"data_dir: there is no folder {folder}")
        return folder, "phantom" if (folder / "phantom.json").is_file() else "folder"
    for mounted in (mount / COMPETITION for mount in MOUNTS):
        if mounted.is_dir():
            return mounted, "kaggle"
    if not download:
        ways = "Give its folder with --data DIR, or download it with download=true"
        rules = "after accepting the competition's rules on kaggle.com"
        raise DataNotFound(f"The real data set is not in {MOUNTS[0] / COMPETITION}. {ways} {rules}.")
    files = [Path(os.path.expanduser("~/.kaggle"), name) for name in ("kaggle.json", "access_token")]
    if not any(map(os.environ.get, CREDENTIALS)) and not any(file.is_file() for file in files):
        where = "put kaggle.json into ~/.kaggle, or set KAGGLE_USERNAME and KAGGLE_KEY"
        raise DataNotFound(f"The download needs Kaggle's credentials: {where}.")
    import kagglehub  # here, since nothing else needs it and it looks for the network when imported

    return Path(kagglehub.competition_download(COMPETITION)), "kaggle"


def find_weights(name: str, fetch: bool = False) -> Path:
    """The file of pretrained weights `name`: a path, else a file in the cache, else a download into the cache.

    YOLO weights (yolov10x.pt) come from ultralytics' release, timm's (<model>.safetensors) from the Hugging Face hub.
    The download must match the SHA-256 that its own source states at that time, which is kept beside the file and
    compared on every later use. Nothing is downloaded unless `fetch` is true.
    """
    path, cached = Path(os.path.expanduser(name)), cache() / Path(name).name
    if path.is_file():
        return path.resolve()
    about = cached.with_name(f"{cached.name}.json")
    if not cached.is_file():
        if not fetch:
            ways = f"Put the file into {Path.cwd()} or {cached.parent}, give its path, or download it once"
            raise WeightsNotFound(f"there are no pretrained weights {name}. {ways} with fetch_weights=true")
        from torch.hub import download_url_to_file  # here, since importing torch takes seconds

        url, checksum = _source(cached.name)
        print(f"downloading {url}; its source states SHA-256 {checksum}", flush=True)
        cached.parent.mkdir(parents=True, exist_ok=True)
        try:
            download_url_to_file(url, str(cached), hash_prefix=checksum, progress=False)
        except (OSError, RuntimeError) as error:  # of the network, or of the checksum
            raise WeightsNotFound(f"{url}: {error}") from error
        write_json(about, {"url": url, "sha256": checksum})
    if about.is_file() and json.loads(about.read_text())["sha256"] != sha256(cached):
        raise WeightsNotFound(f"{cached} is not the file that {about.name} describes (sha256 differs): remove it")
    return cached


def cache() -> Path:
    """The folder of downloaded weights: $LSDC_CACHE, else ~/.cache/lsdc."""
    return Path(os.path.expanduser(os.environ.get("LSDC_CACHE") or "~/.cache/lsdc")).resolve()


def _source(name: str) -> tuple[str, str]:
    """The address of weights, and the SHA-256 that their source states."""
    if re.fullmatch(r"yolo\w+\.pt", name):
        url, assets = ASSET.format(*ULTRALYTICS, name), json.loads(_read(RELEASE.format(*ULTRALYTICS)))["assets"]
        stated = next((asset.get("digest") or "" for asset in assets if asset["name"] == name), "")
    elif match := re.fullmatch(r"([\w.]+)\.safetensors", name):
        # The raw file is the pointer to a large file, which holds its checksum.
        url, stated = HUB.format(match[1], "resolve"), _read(HUB.format(match[1], "raw"))
    else:
        raise WeightsNotFound(f"weights {name!r}: only yolo*.pt and <timm model>.safetensors can be downloaded")
    checksum = re.search(r"sha256:([0-9a-f]{64})", stated)
    if not checksum:
        raise WeightsNotFound(f"{url}: its source states no checksum, so it is not used; give a file by its path")
    return url, checksum[1]


def _read(url: str) -> str:
    """The start of what an address answers, as text; WeightsNotFound if it does not answer."""
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.read(2**22).decode(errors="replace")
    except OSError as error:
        raise WeightsNotFound(f"{url}: {error}") from error
