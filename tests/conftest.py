"""Shared by several tests: a tiny project with stand-in notebooks, and the pipeline run once at the smallest size."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import private
import pytest
import yaml

from lsdc_utils import phantom
from lsdc_utils.pipeline import graph

ROOT = Path(__file__).resolve().parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One file that needs the run of profile smoke comes first and makes it, the others last: so no process waits."""
    need = sorted({item.path for item in items if "smoke_project" in getattr(item, "fixturenames", ())})
    items.sort(key=lambda item: 2 if item.path in need[1:] else int(item.path not in need))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """On the build machine, where everything that the tests need is installed, a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    skipped = reporter.stats.get("skipped", []) if reporter else []
    if os.environ.get("CI") == "true" and skipped and exitstatus == pytest.ExitCode.OK:
        reporter.write_line(f"{len(skipped)} tests were skipped, which is a failure with CI=true")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def run_all(
    project: Path, *arguments: str, timeout: float = 1800, offline: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """`./run_all.sh` of a project, with the Python of these tests as the active environment.

    offline: connections beyond this machine are refused and listed by `looks_of`; it has a network of its own if
    the machine allows that.
    """
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    variables = {**os.environ, "PATH": path, "LSDC_PYTHONPATH": "", **environment}
    command = ["bash", str(project / "run_all.sh"), *arguments]
    if offline:
        variables |= {"LSDC_PYTHONPATH": str(ROOT / "tests" / "watch"), "LSDC_LOOKS": str(project / "looks.txt")}
        alone = ["unshare", "--user", "--map-root-user", "--net", "bash", "-euc", 'ip link set lo up; "$@"', "alone"]
        if shutil.which("ip") and not subprocess.run([*alone, "true"], capture_output=True).returncode:
            command = [*alone, *command]
    read = {"capture_output": True, "text": True, "errors": "surrogateescape"}
    return subprocess.run(command, cwd=project, env=variables, timeout=timeout, **read)


def _run_once(project: Path, *arguments: str, **options: Any) -> None:
    """The run of a project that several tests share; what it printed is in first_run.txt."""
    done = run_all(project, *arguments, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    (project / "first_run.txt").write_text(done.stdout)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A project that `make` makes and runs at its first use, in a folder that all processes of the tests share."""
    folder = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    project = folder / name
    project.parent.mkdir(exist_ok=True)
    with project.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (project / "first_run.txt").is_file():
            shutil.rmtree(project, ignore_errors=True)  # of a process whose run failed
            make(project)
    return project


def looks_of(project: Path) -> list[str]:
    """Attempted connections beyond this machine in an offline run of a project."""
    looks = project / "looks.txt"
    return looks.read_text().splitlines() if looks.is_file() else []


def copy_project(target: Path) -> Path:
    """A copy of what is under version control or could be, without outputs."""
    for name in ("lsdc_utils", "notebooks"):
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("run_all.sh", "requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, target / name)
    return target


# ---- a tiny project: the real command line and graph, notebooks that write their files and little else ---------------

GPUS = {"CUDA_VISIBLE_DEVICES": "4,5"}  # pretended
PIPELINE_NEEDS = ("__init__.py", "costs.py", "files.py", "parallel.py", "vocabulary.py")  # besides pipeline/
TINY_PROFILE = """\
data_dir: ""
conditions: [all]
phantom: true
phantom_seed: 101
n_train: 3
workers: 1
n_splits: 2
folds: [0, 1]
threads: 1
yolo_epochs: {nfn: 2, scs: 3, ss: 1}
yolo_batch: 2
yolo_size: {nfn: [8, 8], scs: [8, 8], ss: [8, 8]}
localiser_batches: 2
start_from: ""
pretrain_phantom: 0
published_method: false
vit_batch: 2
vit_size: 8
vit_lr: 0.001
vit_soften: 0.0
vit_inner_folds: 2
blend_of: ""
vit_members: []
allow_missing_members: false
missing_members: []
stress_bodies: 1
tta: true
"""
TINY_NOTEBOOKS = {  # parameters, code, and the files that the notebook writes
    "00_get_data": (
        'data_dir: str = ""\nconditions: list = ["all"]\nphantom: bool = True\nphantom_seed: int = 101\n'
        "n_train: int = 3\nworkers: int = 1",
        "import json\n(run / '../data').mkdir(exist_ok=True)\n"
        "(run / 'data.json').write_text(json.dumps({'data_dir': '../data', 'kind': 'phantom', 'n': n_train}))",
        [],
    ),
    "01_eda": ('data_dir: str = ""', "", ["tables/series.parquet", "tables/findings.csv"]),
    "02_convert_labels": (
        "n_splits: int = 2",
        "from lsdc_utils import used",
        [
            "tables/labels.parquet",
            "trained_on.json",
            "slices/1.npz",
            *(f"yolo/{c}/data.yaml" for c in ("nfn", "scs", "ss")),
        ],
    ),
    "03_train_localiser": (
        "fold: int = 0\nthreads: int = 1\nlocaliser_batches: int = 2",
        "import os\nname = f'fold{fold}'\nprint('device', os.environ.get('CUDA_VISIBLE_DEVICES'))",
        [
            *(f"weights/localiser_{{name}}.{e}" for e in ("safetensors", "json", "csv")),
            "predictions/points_canal_{name}_oof.parquet",
        ],
    ),
    "03_train_yolo": (
        'condition: str = "scs"\nfold: int = 0\nthreads: int = 1\npublished_method: bool = False\n'
        'yolo_epochs: dict = {"nfn": 2, "scs": 3, "ss": 1}\n'
        'yolo_batch: int = 2\nyolo_size: dict = {"nfn": [8, 8], "scs": [8, 8], "ss": [8, 8]}',
        "import os\nname = f'{condition}_fold{fold}'\nprint('threads', os.environ['OMP_NUM_THREADS'])\n"
        "for epoch in range(yolo_epochs[condition]):\n    print(f'epoch {epoch + 1}/{yolo_epochs[condition]}')",
        [
            *(f"weights/yolo_{{name}}.{e}" for e in ("pt", "json", "csv")),
            *(f"predictions/{t}_{{name}}_oof.parquet" for t in ("yolo", "points")),
        ],
    ),
    "04_train_vit3d": (
        "fold: int = 0\nmember: str = ''\ninner: int = -1\nfolds: list = [0, 1]\nthreads: int = 1\n"
        "vit_lr: float = 0.001\nstart_from: str = ''\npretrain_phantom: int = 0\n"
        "vit_batch: int = 2\nvit_size: int = 8\nvit_soften: float = 0.0\nvit_inner_folds: int = 2",
        "name, vit = f'fold{fold}' + f'_inner{inner}' * (inner >= 0), f'vit3d-{member}'.rstrip('-')\nfor k in folds:\n"
        "    assert (run / f'predictions/points_scs_fold{k}_oof.parquet').is_file()",
        [
            *(f"weights/{{vit}}_{{name}}.{e}" for e in ("safetensors", "json")),
            *(f"predictions/{{vit}}{t}_{{name}}_oof.parquet" for t in ("", "_at_readers")),
        ],
    ),
    "05_ensemble_inference": (
        'tta: bool = True\nblend_of: str = ""\nvit_members: list = []\nallow_missing_members: bool = False\n'
        "missing_members: list = []",
        "import json\nparts = dict(spinal=.4, foraminal=.6, subarticular=.7, any_severe=None, total=.5)\n"
        "for k in vit_members:\n    for part in ('oof', 'test'):\n"
        "        (run / f'predictions/vit3d-{k[\"name\"]}_{part}.parquet').parent.mkdir(exist_ok=True)\n"
        "        (run / f'predictions/vit3d-{k[\"name\"]}_{part}.parquet').write_text('whole')\n"
        "(run / 'scores.json').write_text(json.dumps({'oof': {'n_studies': 3, 'scores': {'ensemble': parts},\n"
        "    'skill': None, 'interval': {'ensemble': {'total': [.4, .6]}}}, 'test': None}))",
        [
            *(f"predictions/{t}_{p}.parquet" for t in graph.GRADED_TABLES for p in ("oof", "test")),
            "predictions/findings_test.parquet",
            "predictions/slices_test.parquet",
            "blend.json",
            "submission.csv",
        ],
    ),
    "06_evaluation": ("tta: bool = True", "", ["evaluation.json", "localisation.csv", "suspect_labels.csv"]),
    "phantom": ('data_dir: str = ""', "", []),
    "07_stress_tests": ("stress_bodies: int = 1", "", [f"stress/{name}" for name in graph.STRESS_TABLES]),
    "08_report": ("tta: bool = True", "from lsdc_utils import report", ["report/index.html", "provenance.json"]),
}


def write_tiny_notebook(project: Path, name: str, code: str | None = None) -> None:
    """Write a stand-in notebook, with other code where it is given."""
    parameters, own_code, files = TINY_NOTEBOOKS[name]
    cells = [
        nbformat.v4.new_code_cell(f'run_dir: str = "../outputs/demo"\n{parameters}', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell("from pathlib import Path\nrun = Path(run_dir)"),
        nbformat.v4.new_code_cell(own_code if code is None else code),
        nbformat.v4.new_code_cell(
            f"known = {{'vit': '', 'name': '', **globals()}}\n"
            f"for file in {files!r}:\n    file = run / file.format(**known)\n"
            "    file.parent.mkdir(parents=True, exist_ok=True)\n    file.write_text('whole')"
        ),
    ]
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), project / "notebooks" / f"{name}.ipynb")


def make_tiny_project(project: Path) -> Path:
    """The real command line and Snakefile, with notebooks that take a second each."""
    for folder in ("lsdc_utils", "notebooks/profiles"):
        (project / folder).mkdir(parents=True)
    for module in PIPELINE_NEEDS:
        shutil.copy(ROOT / "lsdc_utils" / module, project / "lsdc_utils")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "lsdc_utils" / "pipeline", project / "lsdc_utils" / "pipeline", ignore=ignored)
    for module in ("used", "report"):
        (project / "lsdc_utils" / f"{module}.py").write_text('"""A module that one notebook uses."""\n')
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, project)
    shutil.copy(ROOT / "notebooks" / "Snakefile", project / "notebooks")
    shutil.copytree(ROOT / "notebooks" / "profiles" / "slurm", project / "notebooks" / "profiles" / "slurm")
    for name in TINY_NOTEBOOKS:
        write_tiny_notebook(project, name)
    (project / "notebooks/profiles/demo.yml").write_text(TINY_PROFILE)
    (project / "notebooks/profiles/other.yml").write_text("n_train: 4\nfolds: [0]\n")
    return project


@pytest.fixture(scope="session")
def finished_tiny_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project that has run once, on two pretended GPUs; not to be changed."""
    return made_once(
        tmp_path_factory, "tiny", lambda folder: _run_once(make_tiny_project(folder), "--cores", "2", **GPUS)
    )


@pytest.fixture
def tiny_project(finished_tiny_project: Path, tmp_path: Path) -> Path:
    """A copy of the tiny project that has run once, for one test to change."""
    return shutil.copytree(finished_tiny_project, tmp_path / "tiny")


# ---- the pipeline itself, at the smallest size -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def smoke_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project in which profile smoke has run once; not to be changed.

    The run is named demo, so that the notebooks' own defaults lead to it where a test executes one by hand. The
    headers of its phantom are full of what must not leave them, and it has no network.
    """
    return made_once(tmp_path_factory, "smoke/project", lambda folder: _run_smoke(copy_project(folder)))


def _run_smoke(project: Path) -> None:
    """Run profile smoke in a project."""
    size = [yaml.safe_load((ROOT / "notebooks/profiles/smoke.yml").read_text())[key] for key in ("n_train", "n_test")]
    seed = yaml.safe_load((ROOT / "notebooks/profiles/demo.yml").read_text())["phantom_seed"]
    folder = project / "outputs" / "data" / f"phantom-{phantom.fingerprint(*size, seed, label_wrong=0.0)}"
    private.plant(phantom.write_phantom(folder, *size, seed, workers=2, label_wrong=0.0))
    _run_once(project, "--profile", "smoke", "--run", "demo", offline=True)


@pytest.fixture
def smoke_copy(smoke_project: Path, tmp_path: Path) -> Path:
    """A copy of the project that has run profile smoke, for one test to change."""
    return shutil.copytree(smoke_project, tmp_path / "project")
