"""Steps of a run: their notebook, parameters and source. `python -m lsdc_utils.pipeline.graph RUN_DIR STEP` runs one.
A step is one execution of one notebook; the training notebooks have a step per fold (and condition). The Snakefiles ask
here what a step depends on besides files: its parameters and a hash of the code that it uses."""

import ast
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import modulefinder
import os
import re
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lsdc_utils.costs import measured
from lsdc_utils.files import sha256
from lsdc_utils.pipeline.arguments import UsageError
from lsdc_utils.vocabulary import GROUPS, SERIES_TYPES, T2

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "notebooks"
NOTEBOOK_ORDER = ("00_get_data", "phantom", "01_eda", "02_convert_labels", "03_train_localiser", "03_train_yolo",
                  "04_train_vit3d", "05_ensemble_inference", "06_evaluation", "07_stress_tests",
                  "08_report")  # fmt: skip
GRADED_TABLES = ("yolo", "vit3d", "ensemble", "points", "sources")  # of predictions/, for out of fold and test each
STRESS_TABLES = ("doses.csv", "leaks.csv", "looks.csv", "settings.csv", "moves.csv", "numbers.json")  # of stress/
PREDICTION_PLACES = ("weights_dir", "data_dir", "out_dir", "studies_table")  # set by `predict`, which tracks contents
ON_PHANTOM = {  # parameters of a `phantom_run`, whatever the run's own are
    "phantom": True, "data_dir": "", "phantom_scale": "realistic", "wrong_labels": 0.0, "n_test": 1, "n_splits": 5,
    "folds": [0, 1, 2, 3, 4], "points_from": "../outputs/pretrained", "blend_of": "", "vit_soften": 0.0,
    **dict.fromkeys(("exclude_csv", "points_csv", "not_trained_csv", "folds_csv"), ""),
    **dict.fromkeys(("pretrain_phantom", "example_study", "stress_bodies"), 0),
}  # fmt: skip
STEP_PARAMETERS = ("run_dir", "condition", "fold", "member", "inner")  # set by the run and the step, never by a profile
MEMBER = {"encoder": "vit_encoder", "head": "vit_head", "pooling": "vit_pooling", "weights": "vit_encoder_weights"}


@dataclass(frozen=True)
class Step:
    """One notebook with what sets it apart from the notebook's other steps."""

    name: str  # e.g. 03_train_yolo_scs_fold0: names log, benchmark and executed notebook
    notebook: str  # e.g. 03_train_yolo
    given: dict[str, Any] = field(default_factory=dict)  # condition and fold of a training, files of a shard
    cwd: Path = NOTEBOOKS  # of its kernel


def all_steps(parameters: dict[str, Any]) -> list[Step]:
    """Every step of a run in the order of the notebooks, or of a prediction if there are `n_shards`. Only the `folds`
    are trained, and detectors of the `conditions`."""
    if "n_shards" in parameters:
        out, name = parameters["predict_dir"], "05_ensemble_inference"
        shards = [f"shard{number:03d}" for number in range(parameters["n_shards"])]
        given = [{"out_dir": f"{out}/shards/{k}", "studies_table": f"{out}/tables/{k}.parquet"} for k in shards]
        return [Step(f"{name}_{shard}", name, own) for shard, own in zip(shards, given, strict=True)]
    steps = {name: [Step(name, name)] for name in NOTEBOOK_ORDER}
    localiser, yolo, vit, folds = "03_train_localiser", "03_train_yolo", "04_train_vit3d", parameters["folds"]
    steps[localiser] = [training(localiser, {"fold": fold}) for fold in folds]
    steps[yolo] = [training(yolo, {"condition": c, "fold": fold}) for c in parameters["conditions"] for fold in folds]
    inner = range(parameters["vit_inner_folds"] if parameters["vit_soften"] else 0)
    vits = [member_parameters(member, parameters) for member in parameters["vit_members"] or [{}]]
    if first := phantom_run(parameters):
        vits = [own | {"start_from": f"../outputs/{first[0]}"} for own in vits]
    steps[vit] = [training(vit, own | {"fold": fold, "inner": k}) for own in vits for fold in folds for k in inner]
    steps[vit] += [training(vit, own | {"fold": fold}) for own in vits for fold in folds]
    if parameters["data_dir"] or not parameters["phantom"]:
        del steps["phantom"]
    if parameters["published_method"]:  # whose detectors look at whole images
        del steps[localiser]
    if not parameters["stress_bodies"]:
        del steps["07_stress_tests"]
    return [step for group in steps.values() for step in group]


def phantom_run(parameters: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """Name and parameters of the run that comes first where `pretrain_phantom` asks for it: it trains transformers on
    so many phantom studies with the pixel sizes of scanners, at points of the ready-made models, and those of the run
    start from the ones of the same name. Runs share it unless what its trainings read differs."""
    if not (count := parameters.get("pretrain_phantom")):
        return None
    own = parameters | ON_PHANTOM | {"n_train": count, "phantom_seed": parameters["phantom_seed"] + 9000}
    keys = set().union(*map(declared, ("00_get_data", "04_train_vit3d"))) & own.keys() - {"workers", "download"}
    digest = hashlib.sha256(json.dumps({key: own[key] for key in keys}, sort_keys=True).encode())
    return f"on-phantom-{digest.hexdigest()[:8]}", own


def member_parameters(member: dict[str, Any], parameters: dict[str, Any]) -> dict[str, Any]:
    """What sets the training of one of `vit_members` apart, as parameters of 04. A square is so many mm wide on T2, and
    on other series in the proportions of `vit_spacing`."""
    own = {MEMBER.get(key, key): value for key, value in member.items() if key not in ("name", "squares")}
    own |= {key: parameters[key] | value for key, value in own.items() if isinstance(value, dict) and key in parameters}
    if squares := member.get("squares"):
        (mm, pixels, slices), *wider = squares
        ratio = mm / pixels / parameters["vit_spacing"][SERIES_TYPES.index(T2)]
        spacing = [round(ratio * usual, 6) for usual in parameters["vit_spacing"]]
        own |= {"vit_size": pixels, "vit_spacing": spacing, "vit_slices": slices}
        own["vit_wider"] = [[other / mm, count] for other, _, count in wider]
    return own | {"member": member.get("name", "")}


def training(notebook: str, given: dict[str, Any]) -> Step:
    """One training of a notebook; its name tells member (of 04), condition (of 03_train_yolo), fold and inner fold."""
    marks = {"member": "-", "condition": "_", "fold": "_fold", "inner": "_inner"}
    ending = [f"{mark}{given[key]}" for key, mark in marks.items() if given.get(key, "") != ""]
    return Step(notebook + "".join(ending), notebook, given)


def select_steps(steps: list[Step], name: str) -> list[Step]:
    """Steps by the name of a step or a notebook, or by 04 or 04_fold0; UsageError if there is none."""
    numbers = [(step.notebook[:2], f"{step.notebook[:2]}_fold{step.given.get('fold')}") for step in steps]
    selected = [s for s, own in zip(steps, numbers, strict=True) if name in (s.name, s.notebook, *own)]
    if not selected:
        raise UsageError(f"no step {name!r}; steps are: {', '.join(step.name for step in steps)}")
    return selected


def read_parameters(run_dir: str | Path) -> dict[str, Any]:
    """Parameters of a run, as the command line resolved them: key -> value."""
    return yaml.safe_load((Path(run_dir) / "parameters.yml").read_text())


@functools.cache
def code_cells(notebook: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Source and tags of each code cell, without what papermill injected when it was executed."""
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    tagged = [("".join(cell["source"]), tuple(cell["metadata"].get("tags", ()))) for cell in code]
    return tuple((source, tags) for source, tags in tagged if "injected-parameters" not in tags)


@functools.cache
def declared(notebook: str) -> dict[str, Any]:
    """Names and defaults in the notebook's parameters cell; ValueError if a line is not NAME: TYPE = LITERAL."""
    names = {}
    for source in (source for source, tags in code_cells(notebook) if "parameters" in tags):
        for node in ast.parse(source).body:
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value):
                raise ValueError(f"{notebook}.ipynb: parameters cell, line {node.lineno}: not NAME: TYPE = VALUE")
            names[node.target.id] = ast.literal_eval(node.value)
    return names


def step_parameters(step: Step, parameters: dict[str, Any], run_name: str) -> dict[str, Any]:
    """What papermill injects into the step's notebook: the parameters that it declares, and no other."""
    own = {"run_dir": f"../outputs/{run_name}", "member": "", "inner": -1}  # a prediction names its run
    values = {**own, **parameters, **step.given}
    return {name: values[name] for name in declared(step.notebook)}


def tracked_parameters(step: Step, parameters: dict[str, Any]) -> str:
    """The parameters whose change re-runs the step, as JSON: of a value by condition the step's own entry, of a file
    (`*_csv`, weights) its content, of a data folder its tables, of models what lies beside their weights; not the run's
    folder, so that a run may be renamed."""
    values = step_parameters(step, parameters, "")
    for name in ("run_dir", *(PREDICTION_PLACES if "n_shards" in parameters else ())):
        values.pop(name, None)
    condition = step.given.get("condition")
    for name, value in values.items():
        if condition and isinstance(value, dict) and set(value) == set(GROUPS):
            values[name] = value[condition]
        elif name.endswith(("_csv", "yolo_model", "encoder_weights")) and (NOTEBOOKS / value).is_file():
            values[name] = sha256(NOTEBOOKS / value)
        elif name in ("start_from", "points_from") and value:
            values[name] = [value, *map(sha256, sorted((NOTEBOOKS / value).glob("weights/*.json")))]
        elif name == "data_dir" and value:
            values[name] = [value, *map(sha256, sorted(Path(value).glob("*.csv")))]
    return json.dumps(values, sort_keys=True)


@functools.cache
def _tree(source: str) -> ast.Module:
    """Parsed source; of lines that are magics, their text."""
    try:
        return ast.parse(source)
    except SyntaxError:
        return ast.parse(re.sub(r"^(\s*)([%!].*)$", lambda line: line[1] + repr(line[2]), source, flags=re.MULTILINE))


def module_files(source: str) -> set[Path]:
    """Files of lsdc_utils that `source` may use: modules imported transitively, and data files beside them."""
    finder = modulefinder.ModuleFinder([str(ROOT)])
    text = io.StringIO(ast.unparse(_tree(source)))
    finder.load_module("__main__", text, "source", ("", "r", modulefinder._PY_SOURCE))  # reads imports, runs nothing
    modules = (module for module in finder.modules.values() if module.__name__ != "__main__")
    files = {Path(module.__file__) for module in modules if module.__file__}
    for folder in {file.parent for file in files} - {ROOT / "lsdc_utils"}:  # e.g. page templates
        files |= {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    return files


def source_hash(notebook: str) -> str:
    """Hash of the code that a step runs: code cells without the parameters cell, and the modules that they import."""
    return code_hash(*(source for source, tags in code_cells(notebook) if "parameters" not in tags))


@functools.cache
def code_hash(*cells: str) -> str:
    """Hash of code and of the modules of lsdc_utils that it imports; comments and layout do not count."""
    digest = hashlib.sha256("\0".join(ast.dump(_tree(source)) for source in cells).encode())
    for file in sorted(module_files("\n".join(ast.unparse(_tree(source)) for source in cells))):
        content = ast.dump(_tree(file.read_text())).encode() if file.suffix == ".py" else file.read_bytes()
        digest.update(f"\0{file.relative_to(ROOT)}\0".encode() + content)
    return digest.hexdigest()


@contextlib.contextmanager
def own_gpu() -> Iterator[None]:
    """Hold one of several visible GPUs for this process, across all runs of this user; waits until one is free."""
    devices = [device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
    locks = Path(tempfile.gettempdir()) / f"lsdc_utils_{os.getuid()}"
    locks.mkdir(exist_ok=True)
    while len(devices) > 1:
        for device in devices:
            with (locks / f"gpu-{device.replace('/', '-')}").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process, however that ends
                except BlockingIOError:
                    continue
                os.environ["CUDA_VISIBLE_DEVICES"] = device
                yield
                return
        time.sleep(1)
    yield


def has_error(cell: Any) -> bool:
    """Whether an executed code cell ended with an error."""
    return any(output.output_type == "error" for output in cell.outputs)


def all_ran(notebook: Any) -> bool:
    """Whether every code cell ran to its end. papermill's metadata claim this even if the kernel was killed."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.source.strip()]
    return all(cell.execution_count is not None and not has_error(cell) for cell in code)


def without_figure(notebook: Any) -> list[int]:
    """Numbers of executed code cells that end a figure, outside any loop or condition, and hold none."""
    lost = []
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code" and "plt.show()" in map(ast.unparse, _tree(cell.source).body):
            kinds = [kind for output in cell.outputs for kind in output.get("data", {})]
            lost += [] if any(kind.startswith("image/") for kind in kinds) else [number]
    return lost


def execute(run_dir: Path, step: Step, parameters: dict[str, Any] | None = None) -> None:
    """Execute the step's notebook beside its log, logs/<step>.log; it moves to notebooks/ only when every cell ran.
    parameters: default: those of the run. RuntimeError if a cell did not run or a figure is not there."""
    import papermill  # takes a second, which the Snakefile and the command line do not need
    from traitlets.config import Config

    parameters = read_parameters(run_dir) if parameters is None else parameters
    parameters = step_parameters(step, parameters, run_dir.name)
    os.environ.setdefault("PYTHONPATH", str(ROOT))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS"):
        os.environ.pop(name, None)  # Snakemake sets them by --cores, and threads change the weights of a training
        if "threads" in parameters:
            os.environ[name] = str(parameters["threads"])
    executed = run_dir / "logs" / f"{step.name}.ipynb"
    done = run_dir / "notebooks" / executed.name
    for file in (executed, done):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.unlink(missing_ok=True)
    with executed.with_suffix(".log").open("w", errors="surrogateescape") as log, own_gpu():
        settings = {"kernel_name": "python3", "cwd": step.cwd, "stdout_file": log, "stderr_file": log}
        shutil.copyfile(NOTEBOOKS / f"{step.notebook}.ipynb", executed)
        path = str(executed.relative_to(run_dir))  # papermill fills in braces, and writes its name into the notebook
        try:
            with contextlib.chdir(run_dir), tempfile.TemporaryDirectory() as sockets:
                # Not TCP: another kernel that starts in the same moment may take a port, and this one dies.
                settings["config"] = Config(KernelManager={"transport": "ipc", "ip": f"{sockets}/kernel"})
                notebook = papermill.execute_notebook(path, path, parameters, progress_bar=False, **settings)
            if not all_ran(notebook):  # papermill takes sys.exit(0) in a cell for success
                raise RuntimeError(f"{step.notebook}.ipynb ended before all of its cells had run")
            if lost := without_figure(notebook):
                message = "calls plt.show() and holds no figure; is another matplotlib backend set?"
                raise RuntimeError(f"{step.notebook}.ipynb: cell {lost[0]} {message}")
        except Exception:
            traceback.print_exc(file=log)
            raise
    os.replace(executed, done)


if __name__ == "__main__":
    base = Path(sys.argv[1]).resolve()
    with measured(base / "logs" / f"{sys.argv[2]}.json"):
        execute(base, select_steps(all_steps(read_parameters(base)), sys.argv[2])[0])
