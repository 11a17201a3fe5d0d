"""The models of a run as one archive: weights, blend, checksums, class order and a model card.

It names no study and no folder of the machine that made it. The same run gives the same bytes.
"""

import hashlib
import json
import re
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import Any

import yaml

from lsdc_utils.files import atomic, sha256
from lsdc_utils.grading.run_tables import read_recipe, weight_files
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.vocabulary import COLUMNS, SEVERITIES

MANIFEST = "manifest.json"
FORMAT = 1
LARGEST = 16 * 2**30  # bytes of all files together; fifteen YOLOv10x and five ViTs take 1.5 GiB
MOST = 500  # files
NAME = re.compile(r"(weights/)?[A-Za-z0-9]\w*(\.\w+)+")


def pack_run(run: Path, out: Path) -> list[str]:
    """Write the archive `out` of the run in folder `run`; return its names; RunError or UsageError if unfinished."""
    recipe = read_recipe(run)
    if missing := [name for name in ("provenance.json", "scores.json") if not (run / name).is_file()]:
        raise UsageError(f"the run in {run} lacks {', '.join(missing)}: run it to its report")
    from lsdc_utils.report.card import model_card  # takes a second, which unpacking does not need
    from lsdc_utils.report.run import Run

    weights = weight_files(recipe["folds"])
    contents = {name: (run / name).read_bytes() for name in (*weights, "blend.json", "scores.json")}
    for name in ("provenance.json", *(str(Path(name).with_suffix(".json")) for name in weights)):
        about = without_places(json.loads((run / name).read_text()))
        if "studies" in about:
            about["studies"] = len(about["studies"])
        contents[name] = _json(about)
    parameters = without_places(yaml.safe_load((run / "parameters.yml").read_text())) | {"example_study": 0}
    contents["parameters.yml"] = yaml.safe_dump(parameters, sort_keys=False).encode()
    contents["MODEL_CARD.md"] = model_card(Run(run)).encode()
    listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    manifest = {"format": FORMAT, "run": run.name, "columns": COLUMNS, "severities": SEVERITIES, "files": listed}
    contents[MANIFEST] = _json(manifest)
    with atomic(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name)  # with the zip format's first day as its date
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, contents[name])
    return sorted(contents)


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
    """Unpack an archive to `folder`/<its checksum>, unless it is there; return that folder, which appears whole.

    UsageError if the archive is broken, was changed, or holds names, sizes or numbers of files that none of ours has.
    """
    ready = folder / sha256(archive)[:16]
    if ready.is_dir():
        return ready
    beside = folder / f".unpacking-{ready.name}"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            for name, (size, digest) in _listed(opened, archive).items():
                # zipfile writes at most as many bytes as the archive says that a file has
                if opened.getinfo(name).file_size != size or sha256(opened.extract(name, beside)) != digest:
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
        files = {name: (int(entry["size"]), entry["sha256"]) for name, entry in manifest["files"].items()}
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
    if len(files) > MOST or sum(size for size, _ in files.values()) > LARGEST:
        raise UsageError(f"{archive}: {len(files)} files are too many, or too large, for an archive of models")
    return files
