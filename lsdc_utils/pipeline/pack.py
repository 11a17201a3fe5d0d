"""The models of a run as one archive: weights, blend, checksums, class order and a model card.

It names no study and no folder of the machine that made it. The same run gives the same bytes.
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
from lsdc_utils.grading.run_tables import read_recipe, weight_files
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.vocabulary import COLUMNS, SEVERITIES

MANIFEST = "manifest.json"
FORMAT = 1
LARGEST = 16 * 2**30  # bytes of all files together; fifteen YOLOv10x and five ViTs take 1.5 GiB
MOST = 500  # files
NAME = re.compile(r"(weights/)?[A-Za-z0-9]\w*(\.\w+)+")


def pack_run(run: Path, out: Path) -> list[str]:
    """Write the archive `out` of the run in folder `run`; return the names in it. RunError or UsageError if the run is
    not finished."""
    recipe = read_recipe(run)
    if missing := [name for name in ("provenance.json", "scores.json") if not (run / name).is_file()]:
        raise UsageError(f"the run in {run} lacks {', '.join(missing)}: run it to its report")
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
    from lsdc_utils.report.card import model_card  # takes a second, which unpacking does not need
    from lsdc_utils.report.run import Run

    for weights in weight_files(folds):
        name = str(Path(weights).with_suffix(".json"))
        about = json.loads((run / name).read_text())
        if "studies" in about:
            about["studies"] = len(about["studies"])
        yield name, _json(without_places(about))
        yield weights, (run / weights).read_bytes()
    for name in ("blend.json", "scores.json"):
        yield name, (run / name).read_bytes()
    yield "provenance.json", _json(without_places(json.loads((run / "provenance.json").read_text())))
    parameters = without_places(yaml.safe_load((run / "parameters.yml").read_text())) | {"example_study": 0}
    yield "parameters.yml", yaml.safe_dump(parameters, sort_keys=False).encode()
    yield "MODEL_CARD.md", model_card(Run(run)).encode()


def without_places(value: Any) -> Any:
    """`value` with every absolute path cut to its last name."""
    if isinstance(value, dict):
        return {key: without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_places(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack an archive to `folder`/<its checksum>, unless it is there; return that folder, which `predict` can use.

    It appears whole, after all checksums were compared with the manifest. UsageError if the archive is broken, was
    changed, or holds names, sizes or numbers of files that no archive of ours has.
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
                    raise UsageError(f"{archive}: {name} is not the file that {MANIFEST} describes (size or sha256)")
        beside.rename(ready)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"{archive} is not an archive of models, or is broken: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return ready


def _listed(opened: zipfile.ZipFile, archive: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file in the manifest; UsageError if it differs from the archive or is implausible."""
    names = opened.namelist()
    if MANIFEST not in names or opened.getinfo(MANIFEST).file_size > 2**20:
        raise UsageError(f"{archive} has no {MANIFEST}: it was not made by ./run_all.sh pack")
    try:
        manifest = json.loads(opened.read(MANIFEST))
        files = {str(name): (int(entry["size"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        known = (manifest["format"], manifest["columns"], manifest["severities"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{archive}: {MANIFEST} cannot be read: {error!r}") from error
    if known != (FORMAT, list(COLUMNS), list(SEVERITIES)):
        raise UsageError(f"{archive} was made by another version: its format, columns or severities differ")
    if strange := [name for name in files if not NAME.fullmatch(name)]:
        raise UsageError(f"{archive}: {strange[0]!r} is not a file name of such an archive")
    if sorted(names) != sorted([*files, MANIFEST]):
        odd = sorted({*names} ^ {*files, MANIFEST})
        raise UsageError(f"{archive}: files and {MANIFEST} differ in {', '.join(map(repr, odd)) or 'their number'}")
    sizes = [size for size, _ in files.values()]
    if len(sizes) > MOST or sum(sizes) > LARGEST or any(size < 0 for size in sizes):
        raise UsageError(f"{archive}: {len(sizes)} files of {sum(sizes)} bytes are not an archive of models")
    return files


def _extract(opened: zipfile.ZipFile, name: str, size: int, target: Path) -> str:
    """Write one file, reading at most one byte beyond `size`; its sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest, left = hashlib.sha256(), size + 1
    with opened.open(name) as source, target.open("wb") as file:
        while part := source.read(min(left, 2**20)):
            digest.update(part)
            file.write(part)
            left -= len(part)
    return digest.hexdigest()
