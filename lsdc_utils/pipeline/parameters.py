"""Parameters of a run: profile demo, then the chosen profile, then KEY=VALUE, all in the types of the defaults."""

import contextlib
import hashlib
import itertools
import os
import re
from pathlib import Path
from typing import Any

import yaml

from lsdc_utils.pipeline import graph
from lsdc_utils.pipeline.arguments import OUTPUTS, UsageError
from lsdc_utils.pipeline.graph import NOTEBOOK_ORDER, NOTEBOOKS, STEP_PARAMETERS, declared, read_parameters
from lsdc_utils.vocabulary import GROUPS, groups_of

PROFILES = NOTEBOOKS / "profiles"
ARCHITECTURE = ("published_method", "localiser_widths", "yolo_model", "yolo_neighbours", *(f"vit_{name}" for name in (
    "size", "slices", "wider", "encoder", "channels", "patch", "width", "depth", "heads", "readout", "mix", "pooling",
    "head", "members",
)))  # fmt: skip
LEAST = {"vit_epochs": 1, "vit_views": 1, "vit_batch": 1, "yolo_batch": 1, "localiser_batch": 1, "threads": 1,
         "workers": 1, "n_train": 2, "n_test": 0, "stress_doses": 2, "stress_studies": 1, "stress_bodies": 0,
         "report_studies": 0, "vit_inner_folds": 2}  # fmt: skip
BORROWED = ("start_from", "points_from")  # parameters that name other models
COMMON = ("vit_views", "vit_soften", "vit_inner_folds")  # of all members: 05 reads one, others read the answers of each


def converted(key: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`, else UsageError. A single value becomes a list of one if a list is expected; a
    dict may hold some of the keys of `default`, which has the others."""
    if isinstance(default, list) and not isinstance(value, list):
        value = [value]
    if isinstance(default, float) and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):  # YAML takes 1e-3 for text
            value = float(value)
    if (given := type(value)) is not (wanted := type(default)):
        raise UsageError(f"{key}: {value!r} is {given.__name__}, expected {wanted.__name__} like {default!r}")
    if isinstance(default, list) and len({type(item) for item in default} - {dict}) == 1:  # a member is like no other
        return [converted(key, item, default[0]) for item in value]
    if isinstance(default, dict):
        if unknown := ", ".join(str(name) for name in value if name not in default):
            raise UsageError(f"{key}: unknown key {unknown}; keys are: {', '.join(default)}")
        return default | {name: converted(f"{key}.{name}", item, default[name]) for name, item in value.items()}
    return value


def parse_override(text: str, defaults: dict[str, Any]) -> tuple[str, Any]:
    """`KEY=VALUE` to key and value in the type of the default; UsageError if key or type is wrong. Values are YAML,
    except that text stays as typed (007, no) and a list may be given as 0,1. Relative paths become absolute, since
    notebooks run elsewhere; names of pretrained models that are not files stay as they are."""
    key, equals, raw = text.partition("=")
    if not equals or key not in defaults:
        raise UsageError(f"{text!r}: not KEY=VALUE, or an unknown key; keys are: {', '.join(sorted(defaults))}")
    if isinstance(defaults[key], str):
        path = Path(os.path.expanduser(raw))  # Path's own raises where ~NAME is not a user
        is_path = bool(raw) and (key == "data_dir" or key.endswith("_csv"))
        if key in BORROWED and raw:  # a run by name, or a folder
            path, is_path = next(place for place in (OUTPUTS / raw, path) if place.is_dir() or place is path), True
        is_path |= key in ("yolo_model", "vit_encoder_weights") and path.is_file()
        return key, str(path.resolve()) if is_path else raw
    if isinstance(defaults[key], list) and not raw.startswith("["):
        raw = f"[{raw}]"
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise UsageError(f"{key}: cannot read {raw!r}: {error}") from error
    return key, converted(key, value, defaults[key])


def load_parameters(profile: str, overrides: list[str] = ()) -> dict[str, Any]:
    """Every parameter of a run: profile demo, changed by `profile` (original-full: by original first), then by
    KEY=VALUE; UsageError if one is wrong."""
    files = {file.stem: file for file in PROFILES.glob("*.yml")}
    if profile not in files:
        raise UsageError(f"no profile {profile!r}; there are: {', '.join(sorted(files))}")
    parameters = yaml.safe_load(files["demo"].read_text())
    for name in filter(files.get, itertools.accumulate(profile.split("-"), "{}-{}".format)):
        try:
            given = yaml.safe_load(files[name].read_text()) or {}
        except yaml.YAMLError as error:
            raise UsageError(f"profile {name}: {error}") from error
        parameters = changed(parameters, given, f"profile {name}: ")
    parameters.update(parse_override(text, parameters) for text in overrides)
    names = set().union(*map(declared, NOTEBOOK_ORDER)) - set(STEP_PARAMETERS)
    if names != set(parameters):
        differing = ", ".join(sorted(names ^ set(parameters)))
        raise UsageError(f"profile demo and the parameters cells of the notebooks differ in: {differing}")
    if not parameters["folds"] or not set(parameters["folds"]) <= set(range(parameters["n_splits"])):
        raise UsageError(f"folds={parameters['folds']}: expected some of 0 to {parameters['n_splits'] - 1} (n_splits)")
    if not 0 <= parameters.get("vit_soften", 0) <= 1:
        raise UsageError(f"vit_soften={parameters['vit_soften']}: expected 0 to 1, the share of other models' answers")
    for key, least in LEAST.items():
        if parameters.get(key, least) < least:
            raise UsageError(f"{key}={parameters[key]}: expected {least} or more")
    check_members(parameters)
    return parameters


def check_members(parameters: dict[str, Any]) -> None:
    """UsageError unless `vit_members` are mappings with names of their own and settings that a transformer can have."""
    members, known = parameters["vit_members"], declared("04_train_vit3d") | {"squares": [], "name": ""}
    own = (name for name in known if name.startswith("vit_") and name not in COMMON)
    keys = ["name", "squares", *graph.MEMBER, "seed", *own]
    if members and parameters["published_method"]:
        raise UsageError("vit_members: published_method has one transformer")
    for number, member in enumerate(members, start=1):
        name = member.get("name") if isinstance(member, dict) else None
        if not isinstance(name, str) or not re.fullmatch("[a-z0-9]+", name):
            raise UsageError(f"vit_members, number {number}: needs a name of small letters and digits: {member!r}")
        if any(isinstance(other, dict) and other.get("name") == name for other in members[: number - 1]):
            raise UsageError(f"vit_members: the name {name} is there twice")
        if unknown := [key for key in member if key not in keys]:
            raise UsageError(f"vit_members, {name}: unknown key {unknown[0]!r}; keys are: {', '.join(keys)}")
        try:
            check_member(parameters | {k: converted(k, v, known[k]) for k, v in _settings(member, parameters).items()})
        except (ValueError, TypeError) as error:
            raise UsageError(f"vit_members, {name}: {error}") from error


def _settings(member: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    squares = member.get("squares", [[1, 1, 1]])
    if not all(isinstance(square, list) and len(square) == 3 and min(square) > 0 for square in squares):
        raise ValueError(f"squares is {squares!r}; expected a list of [mm, pixels, slices]")
    if len({pixels for _, pixels, _ in squares}) > 1:
        raise ValueError("all squares of a member have as many pixels as the first, since they share an encoder")
    return graph.member_parameters(member, parameters)


def check_member(own: dict[str, Any]) -> None:
    """ValueError if 04 could not train a transformer with these parameters."""
    import timm  # takes a second, as the others

    from lsdc_utils.vit.augment import Augmentation, check_margin
    from lsdc_utils.vit.model import VitConfig

    config = VitConfig(**{name: own[f"vit_{name}"] for name in VitConfig.__dataclass_fields__})
    check_margin(config, Augmentation(**own["vit_augment"]))
    if own["vit_encoder"] != "conv" and not timm.is_model(own["vit_encoder"]):
        raise ValueError(f"timm has no encoder {own['vit_encoder']!r}")


def resolve_conditions(parameters: dict[str, Any]) -> None:
    """Replace `conditions` by the keys of the groups to train; UsageError for a wrong one, or one without any grade.
    Without all three there are no stress tests, whose phantom narrows each; a line is printed then."""
    folder, graded = parameters["data_dir"], GROUPS
    if not parameters["conditions"]:
        raise UsageError(f"conditions= has no value; write conditions=all, or some of {', '.join(GROUPS)}")
    if folder and Path(folder, "train.csv").is_file():
        from lsdc_utils.data import competition  # takes a second

        graded = competition.graded_groups(competition.read_labels(folder))
    try:
        parameters["conditions"] = groups_of(parameters["conditions"], graded)
    except ValueError as error:
        raise UsageError(f"{folder}: {error}" if folder else str(error)) from error
    if not parameters["conditions"]:
        raise UsageError(f"{folder}: no training study has a grade")
    if len(parameters["conditions"]) == len(GROUPS):
        return
    if parameters["published_method"]:
        raise UsageError("published_method trains all three conditions")
    if parameters.get("stress_bodies"):
        parameters["stress_bodies"] = 0
        print(f"no stress tests: they need all three conditions, this run has {', '.join(parameters['conditions'])}")


def check_start(parameters: dict[str, Any]) -> None:
    """UsageError unless `start_from` and `points_from` are empty, or folders of models that were trained on other
    studies, since out-of-fold studies would have been seen; a start has the same architecture as well."""
    if count := parameters.get("pretrain_phantom"):
        if not 10 <= count <= 5000:
            raise UsageError(f"pretrain_phantom={count}: expected 0, or 10 to 5000 studies")
        if other := next(filter(parameters.get, ("start_from", "published_method")), None):
            raise UsageError(f"pretrain_phantom cannot be used with {other}")
    for name in filter(parameters.get, BORROWED):
        place = Path(parameters[name])
        if not (place / "parameters.yml").is_file() or not (place / "weights").is_dir():
            raise UsageError(f"{name}: {place} is neither a run in outputs/ nor a folder of packed models")
        theirs = load_parameters("demo") | read_parameters(place)  # which may be older
        there, here = (  # of paths the name alone: models may have moved, and packed ones have no folders
            {key: os.path.basename(v) if isinstance(v := values.get(key), str) else str(v) for key in ARCHITECTURE}
            for values in (theirs, parameters)
        )
        differ = {key: f"{key} ({there[key]} there, {here[key]} here)" for key in there if there[key] != here[key]}
        needed, has = (set(groups_of(values.get("conditions", GROUPS))) for values in (parameters, theirs))
        if lacking := sorted(needed - has):
            raise UsageError(f"{name}: there is no detector for {', '.join(lacking)} in {place}")
        if differ and name == "start_from":
            raise UsageError(f"{name}: the models in {place} have another architecture: {', '.join(differ.values())}")
        if _studies(parameters) in studies_seen(theirs):
            raise UsageError(f"{name}: the models in {place} were trained on studies that this run holds out")


def _studies(parameters: dict[str, Any]) -> str:
    """Which studies a run has, as a hash: of a phantom's seed, or of a folder's name, since it may have moved."""
    name, folder = f"phantom {parameters['phantom_seed']}", parameters["data_dir"]
    name = name if parameters["phantom"] and not folder else os.path.basename(folder)
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def studies_seen(parameters: dict[str, Any]) -> set[str]:
    """The `_studies` of a run, of the one that came first, and of those whose models it took; packed models name them
    as `seen`, since they have no paths."""
    taken = [Path(parameters[name]) for name in BORROWED if os.path.isabs(parameters.get(name) or "")]
    others = [load_parameters("demo") | read_parameters(run) for run in taken if (run / "parameters.yml").is_file()]
    others += [first[1]] if (first := graph.phantom_run(parameters)) else []
    return {_studies(parameters), *parameters.get("seen", ())}.union(*map(studies_seen, others))


def changed(parameters: dict[str, Any], change: dict[str, Any], place: str = "") -> dict[str, Any]:
    """The parameters with some changed; of a dict, `change` may name only some keys."""
    result = dict(parameters)
    for key, value in change.items():
        if key not in parameters:
            raise UsageError(f"{place}unknown parameter {key!r}")
        result[key] = converted(key, value, parameters[key])
    return result
