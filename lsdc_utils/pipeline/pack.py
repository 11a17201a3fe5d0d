"""A run's models as one archive or as the folder of ready-made models: weights, blend, checksums, classes, model card.
They name no study and no path of the machine that made them. The same run gives the same bytes."""

import hashlib
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from lsdc_utils.data.cohort import TRAINED_ON, trained_on
from lsdc_utils.files import atomic, atomic_folder, sha256
from lsdc_utils.grading.evaluation import reference
from lsdc_utils.grading.run_tables import read_recipe, weight_files
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.pipeline.graph import read_parameters
from lsdc_utils.pipeline.parameters import studies_seen
from lsdc_utils.vocabulary import COLUMNS, GROUPS, SEVERITIES

MANIFEST = "manifest.json"
FORMAT = 1
LARGEST = 16 * 2**30  # bytes of all files together; fifteen YOLOv10x and five ViTs take 1.5 GiB
MOST = 500  # files
READY_SIZE = 25_000_000  # bytes of all ready-made models, which are committed
NAME = re.compile(r"(weights/)?[A-Za-z0-9][\w-]*(\.\w+)+")


def pack_run(run: Path, out: Path) -> list[str]:
    """Write the archive `out` of the run in folder `run`; return its names; RunError or UsageError if unfinished."""
    contents = _contents(run, read_recipe(run))
    with atomic(out) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(contents):
            entry = zipfile.ZipInfo(name)  # with the zip format's first day as its date
            entry.external_attr, entry.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(entry, contents[name])
    return sorted(contents)


def pack_ready(run: Path, out: Path, real: Path | None, workers: int) -> pd.DataFrame:
    """Write the folder `out` of ready-made models from a finished run; return the table of `temper.temper_run`. Weights
    are kept in 16 bits (used in 32); the blend is tempered. real: a CSV of results on real scans, for the card.
    UsageError if the run lacks a condition or all files together exceed `READY_SIZE`."""
    recipe, measured = read_recipe(run), {"real": pd.read_csv(real, dtype=str)} if real else {}
    if recipe["kind"] != "fitted":
        raise UsageError(f"{run} is by the published method, which has no blend to temper")
    if len(recipe["conditions"]) < len(GROUPS):
        raise UsageError(
            f"{run} grades {', '.join(recipe['conditions'])} alone: ready-made models grade all conditions"
        )
    if (size := sum(map(len, _contents(run, recipe, measured).values()))) > READY_SIZE:
        most = f"{size / 1e6:.1f} MB, more than {READY_SIZE / 1e6:.0f}"
        raise UsageError(f"the models in {run} take {most}: train one fold, or smaller models")
    from lsdc_utils.pipeline.temper import temper_run

    recipe, measured["tempering"] = temper_run(run, recipe, workers)
    with atomic_folder(out) as folder:
        (folder / "weights").mkdir()
        for name, content in _contents(run, recipe, measured).items():
            (folder / name).write_bytes(content)
    return measured["tempering"]


def _contents(run: Path, recipe: dict[str, Any], measured: dict[str, pd.DataFrame] | None = None) -> dict[str, bytes]:
    """Name -> bytes of each file of an archive; with what was measured, of ready-made models, without cut-offs."""
    if missing := [name for name in ("provenance.json", "scores.json") if not (run / name).is_file()]:
        raise UsageError(f"the run in {run} lacks {', '.join(missing)}: run it to its report")
    from lsdc_utils.report.card import model_card  # takes a second, which unpacking does not need
    from lsdc_utils.report.run import Run

    weights = weight_files(recipe["folds"], recipe["kind"] == "published", recipe["conditions"], recipe["members"])
    if gone := {*json.loads((run / "blend.json").read_text()).get("members", [])}.difference(recipe["members"]):
        remedy = "run it again, with allow_missing_members=true if they cannot be trained"
        raise UsageError(f"the scores of the run in {run} are with {', '.join(sorted(gone))}, now absent: {remedy}")
    contents = {name: (run / name).read_bytes() for name in (*weights, "scores.json")}
    for name in ("provenance.json", *(str(Path(name).with_suffix(".json")) for name in weights)):
        about = without_places(json.loads((run / name).read_text()))
        if isinstance(about.get("studies"), list):  # else their number already, in weights that were packed
            about["studies"] = len(about["studies"])
        if measured is not None and (file := str(Path(name).with_suffix(".safetensors"))) in contents:
            contents[file] = in_half(contents[file])
            about["sha256"] = hashlib.sha256(contents[file]).hexdigest()
        contents[name] = _json(about)
    parameters = read_parameters(run)
    parameters = without_places(parameters) | {"example_study": 0, "seen": sorted(studies_seen(parameters))}
    contents["parameters.yml"] = yaml.safe_dump(parameters, sort_keys=False).encode()
    contents |= {f"measured_{key}.csv": table.to_csv(index=False).encode() for key, table in (measured or {}).items()}
    contents["reference.json"] = _json(reference(run, recipe) | ({} if measured is None else {"cut_offs": {}}))
    if known := trained_on(run):
        contents[TRAINED_ON] = _json(known)
    digests = {name: hashlib.sha256(contents[name]).hexdigest() for name in weights}
    told = {name: json.loads(contents[str(Path(name).with_suffix(".json"))])["sha256"] for name in weights}
    if other := [name for name in weights if told[name] != digests[name]]:
        raise UsageError(f"the run in {run}: {', '.join(other)} is not the file that its .json describes: run it again")
    contents["blend.json"] = _json(recipe | {"weights": {Path(name).stem: text for name, text in digests.items()}})
    contents["MODEL_CARD.md"] = model_card(Run(run), measured, digests).encode()
    listed = {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()}
    manifest = {"format": FORMAT, "run": run.name, "columns": COLUMNS, "severities": SEVERITIES, "files": listed}
    return contents | {MANIFEST: _json(manifest)}


def in_half(content: bytes) -> bytes:
    """A safetensors file with its 32-bit numbers in 16 bits."""
    from safetensors.torch import load, save

    tensors = load(content)
    return save({name: value.half() if value.is_floating_point() else value for name, value in tensors.items()})


def check_ready(folder: Path) -> None:
    """UsageError if the ready-made models are absent, are not the files of their manifest, or cannot be loaded."""
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} holds no ready-made models: name a run or an archive with --run NAME")
    names = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    for name, (_, digest) in _listed(names, (folder / MANIFEST).read_bytes(), folder).items():
        if sha256(folder / name) != digest:
            raise UsageError(f"{folder}: {name} is not the file that {MANIFEST} describes: check it out again with git")
    from lsdc_utils.grading.grade import load_models

    recipe = read_recipe(folder)
    try:
        load_models(folder / "weights", *(recipe[name] for name in ("folds", "vit_views", "conditions", "members")))
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(f"this version of the code cannot load the models in {folder}: {error!r}") from error


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
    UsageError if the archive is broken or changed, or holds names, sizes or numbers of files that none of ours has."""
    ready = folder / sha256(archive)[:16]
    if ready.is_dir():
        return ready
    try:
        with zipfile.ZipFile(archive) as opened, atomic_folder(ready) as beside:
            names = opened.namelist()
            small = MANIFEST in names and opened.getinfo(MANIFEST).file_size <= 2**20
            for name, (size, digest) in _listed(names, opened.read(MANIFEST) if small else b"", archive).items():
                # zipfile writes at most as many bytes as the archive says that a file has
                if opened.getinfo(name).file_size != size or sha256(opened.extract(name, beside)) != digest:
                    raise UsageError(f"{archive}: {name} is not the file that {MANIFEST} describes (size or sha256)")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UsageError(f"{archive} is not an archive of models, or is broken: {error}") from error
    return ready


def _listed(names: list[str], text: bytes, archive: Path) -> dict[str, tuple[int, str]]:
    """Size and sha256 of each file in the manifest `text`; UsageError if it is implausible or has other `names`."""
    if not text:
        raise UsageError(f"{archive} has no {MANIFEST}: it was not made by ./run_all.sh pack")
    try:
        manifest = json.loads(text)
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
