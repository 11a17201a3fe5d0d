"""The models of a run as one archive that travels: weights, blend, checksums, class order and a model card.

Nothing in it names a study or a folder of the machine that it was made on. The same run gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lsdc_utils.files import atomic
from lsdc_utils.pipeline.predict import PredictError, read_recipe
from lsdc_utils.vocabulary import COLUMNS, GROUPS, SEVERITIES

MANIFEST = "manifest.json"
FORMAT = 1
LARGEST = 16 * 2**30  # bytes of all files together; fifteen YOLOv10x and five ViTs take 1.5 GiB
MOST = 500  # files
NAME = re.compile(r"(weights/)?[A-Za-z0-9]\w*(\.\w+)+")


class PackError(ValueError):
    """An archive that cannot be made or used; the message names it, and what in it is wrong."""


# ---- making one ----------------------------------------------------------------------------------------------------


def pack_run(run: Path, out: Path) -> list[str]:
    """Write the archive `out` of the finished run in folder `run`; return the names in it. PackError where the run
    lacks something."""
    try:
        recipe = read_recipe(run)
    except PredictError as error:
        raise PackError(str(error)) from error
    if missing := [name for name in ("provenance.json", "scores.json") if not (run / name).is_file()]:
        raise PackError(f"the run in {run} lacks {', '.join(missing)}: run it to its report")
    contents = dict(_contents(run, recipe["folds"]))
    listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    manifest = {"format": FORMAT, "run": run.name, "columns": COLUMNS, "severities": SEVERITIES, "files": listed}
    contents[MANIFEST] = _json(manifest)
    with atomic(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name)  # with the zip format's first day as its date
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, contents[name])
    return sorted(contents)


def _contents(run: Path, folds: list[int]) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of each file."""
    from lsdc_utils.report.card import (
        model_card,
    )  # a second to import, not needed to unpack
    from lsdc_utils.report.run import read_run

    for fold in folds:
        for model in (*(f"yolo_{key}" for key in GROUPS), "vit3d"):
            about = json.loads((run / f"weights/{model}_fold{fold}.json").read_text())
            if "studies" in about:
                about["studies"] = len(about["studies"])
            yield f"weights/{model}_fold{fold}.json", _json(without_places(about))
            weights = f"weights/{model}_fold{fold}{'.safetensors' if model == 'vit3d' else '.pt'}"
            yield weights, (run / weights).read_bytes()
    for name in ("blend.json", "scores.json"):
        yield name, (run / name).read_bytes()
    yield "provenance.json", _json(without_places(json.loads((run / "provenance.json").read_text())))
    parameters = without_places(yaml.safe_load((run / "parameters.yml").read_text())) | {"example_study": 0}
    yield "parameters.yml", yaml.safe_dump(parameters, sort_keys=False).encode()
    yield "MODEL_CARD.md", model_card(read_run(run)).encode()


def without_places(value: Any) -> Any:
    """`value` with every absolute path cut to its last name."""
    if isinstance(value, dict):
        return {key: without_places(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_places(one) for one in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


# ---- using one -----------------------------------------------------------------------------------------------------


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive to `folder`/<its checksum>, unless it is there; return that folder, a run as far as `predict`
    needs one.

    It appears whole, after every file's checksum was compared with the manifest's. PackError where the archive is
    broken, holds a name, a size or a number of files that no archive of ours has, or was changed.
    """
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    ready = folder / digest[:16]
    if ready.is_dir():
        return ready
    beside = folder / f".unpacking-{digest[:16]}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            for name, (size, sha256) in _listed(opened, archive).items():
                if _extract(opened, name, size, beside / name) != sha256:
                    raise PackError(f"{archive}: {name} is not the file that {MANIFEST} describes (size or sha256)")
        beside.rename(ready)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise PackError(f"{archive} is no archive of models, or a broken one: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return ready


def _listed(opened: zipfile.ZipFile, archive: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file that the manifest of an opened archive lists; PackError where it lists others than
    are there, or what no archive of ours has."""
    names = opened.namelist()
    if MANIFEST not in names or opened.getinfo(MANIFEST).file_size > 2**20:
        raise PackError(f"{archive} has no {MANIFEST}: it was not made by ./run_all.sh pack")
    try:
        manifest = json.loads(opened.read(MANIFEST))
        files = {str(name): (int(one["size"]), str(one["sha256"])) for name, one in manifest["files"].items()}
        known = (manifest["format"], manifest["columns"], manifest["severities"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PackError(f"{archive}: {MANIFEST} cannot be read: {error!r}") from error
    if known != (FORMAT, list(COLUMNS), list(SEVERITIES)):
        raise PackError(f"{archive} was made by another version: its format, columns or severities differ")
    if strange := [name for name in files if not NAME.fullmatch(name)]:
        raise PackError(f"{archive}: {strange[0]!r} is no name of a file in such an archive")
    if sorted(names) != sorted([*files, MANIFEST]):
        odd = sorted({*names} ^ {*files, MANIFEST})
        raise PackError(f"{archive}: files and {MANIFEST} differ in {', '.join(map(repr, odd)) or 'their number'}")
    sizes = [size for size, _ in files.values()]
    if len(sizes) > MOST or sum(sizes) > LARGEST or any(size < 0 for size in sizes):
        raise PackError(f"{archive}: {len(sizes)} files of {sum(sizes)} bytes are no archive of models")
    return files


def _extract(opened: zipfile.ZipFile, name: str, size: int, target: Path) -> str:
    """Write one file, of which no more than a byte beyond `size` is taken; its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), size + 1
    with opened.open(name) as source, target.open("wb") as file:
        while part := source.read(min(left, 2**20)):
            digest.update(part)
            file.write(part)
            left -= len(part)
    return digest.hexdigest()
