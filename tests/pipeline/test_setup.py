"""Setting up: --help without packages, .venv from the pins, the environment that is taken."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

STUB_PYTHON = """\
#!/bin/bash
# Stands for a Python without the pins: it records its arguments, and makes an environment like itself.
echo "$0 $*" >> "{record}"
case "$*" in
*pipeline.arguments*) exit 3 ;;
"- "*) exit 1 ;;
"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip install "*--requirement*) printf '%s\\n' "WARNING: Location x is ignored" "Collecting torch==2 (from y)" \
    "  Downloading torch-2.whl (900.0 MB)" "Installing collected packages: torch"; exit {pip} ;;
"-c import cv2") exit 1 ;;
"-m lsdc_utils.pipeline.commands"*) echo handed over ;;
esac
"""


def stub_tool(folder: Path, name: str, text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def run_with_tools(project: Path, tools: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(project)}
    command = ["bash", str(project / "run_all.sh"), *arguments]
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


@pytest.fixture
def bare_project(tmp_path: Path) -> Path:
    """Only what setting up needs."""
    for name in ("run_all.sh", "requirements.txt", "environment.yml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def stub_pythons(project: Path, pip: int = 0) -> Path:
    """A folder of stand-ins for Python, with an exit status of pip."""
    for name in ("python", "python3"):
        stub_tool(project / "tools", name, STUB_PYTHON.format(record=project / "record", pip=pip))
    return project / "tools"


def test_without_an_environment_one_is_made_from_the_pins(bare_project: Path) -> None:
    tools = stub_pythons(bare_project)
    done = run_with_tools(bare_project, tools, "--dry-run")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "handed over\n"
    calls = (bare_project / "record").read_text()
    python = f"{bare_project}/.venv/bin/python"
    assert f"{tools}/python3 -m venv {bare_project}/.venv\n" in calls
    assert f"{python} -m pip install --progress-bar off --requirement {bare_project}/requirements.txt\n" in calls
    # If cv2 does not load because a desktop's libraries are missing, the build without them takes its place.
    assert re.search(r"--no-deps opencv-python-headless==\d+\.\d+", calls)
    assert calls.endswith(f"{python} -m lsdc_utils.pipeline.commands --dry-run\n")
    count = (ROOT / "requirements.txt").read_text().count("==")
    assert f"installing about {count} packages (2 to 10 minutes, 7 GB on disk)" in done.stderr
    assert f"[1 of about {count}] Collecting torch==2\n" in done.stderr and "torch-2.whl (900.0 MB)" in done.stderr
    assert "is ignored" not in done.stderr and re.search(r"ready after \d+ min \d+ s", done.stderr)


def test_an_environment_whose_python_is_gone_is_made_again(bare_project: Path) -> None:
    (bare_project / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "python3"):
        (bare_project / ".venv" / "bin" / name).symlink_to("/nowhere/python3.11")
    done = run_with_tools(bare_project, stub_pythons(bare_project), "--dry-run")
    assert done.returncode == 0 and done.stdout == "handed over\n", done.stderr
    assert not (bare_project / ".venv/bin/python").is_symlink()


def test_settings_of_the_user_s_python_and_pip_stay_out(bare_project: Path) -> None:
    tools = stub_pythons(bare_project)
    show = f'env > "{bare_project}/$(echo "$*" | tr -dc a-z).env"\n'
    for tool in tools.iterdir():
        tool.write_text(tool.read_text().replace("case ", f"{show}case ", 1))
    foreign = {"PYTHONPATH": "/foreign", "PYTHONWARNINGS": "error", "PYTHONHOME": "/foreign", "MPLBACKEND": "Agg"}
    foreign |= {"JUPYTER_PATH": "/foreign", "MPLCONFIGDIR": "/foreign", "IPYTHONDIR": "/foreign"}
    foreign |= {"PIP_USER": "1", "PIP_TARGET": "/foreign", "LSDC_PYTHONPATH": "/mine", "HOME": "/dev/null"}
    foreign["CDPATH"] = "/"
    environment = {"PATH": f"{tools}:/usr/bin:/bin", "TMPDIR": str(bare_project), **foreign}
    command = ["bash", f"{bare_project.name}/run_all.sh", "--dry-run"]
    done = subprocess.run(command, cwd=bare_project.parent, env=environment, capture_output=True, text=True)
    assert done.stdout == "handed over\n", done.stderr
    seen = {path.name: dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)
            for path in bare_project.glob("*.env")}  # fmt: skip
    [started] = [variables for name, variables in seen.items() if "commands" in name]
    assert started["PYTHONPATH"] == f"{bare_project}:/mine" and started["PYTHONUTF8"] == "1" and started["LOGNAME"]
    assert not {"PYTHONWARNINGS", "PYTHONHOME", "MPLBACKEND", "JUPYTER_PATH", "CDPATH"} & set(started)
    assert Path(started["HOME"]).parent.resolve() == bare_project.resolve()  # /dev/null is not a home
    for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR"):
        assert started[name].startswith(started["HOME"]), name
    for pip in (variables for name, variables in seen.items() if "install" in name):
        assert pip["PIP_USER"] == "0" and "PIP_TARGET" not in pip


def test_a_folder_that_python_cannot_import_from_is_one_sentence(tmp_path: Path) -> None:
    project = bare_copy(tmp_path / "a:b")
    done = run_with_tools(project, tmp_path)
    assert done.returncode == 1 and "without a colon" in done.stderr and done.stderr.count("\n") == 1


def test_a_failing_pip_is_shown_with_its_log(bare_project: Path) -> None:
    done = run_with_tools(bare_project, stub_pythons(bare_project, pip=1), "--dry-run")
    assert done.returncode == 1 and not done.stdout
    assert f"could not install the packages; last lines of {bare_project}/.venv/setup.log" in done.stderr
    assert "      Collecting torch==2" in done.stderr and "is ignored" not in done.stderr


def bare_copy(target: Path) -> Path:
    """run_all.sh and the package, as in a fresh clone."""
    shutil.copytree(ROOT / "lsdc_utils", target / "lsdc_utils", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_all.sh", "requirements.txt"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.mark.parametrize("words", [["--help"], ["predict", "-h"], ["lab", "--help"], ["kaggle-bundle", "--help"]])
def test_help_needs_no_package_and_sets_nothing_up(tmp_path: Path, words: list[str]) -> None:
    project, tools = bare_copy(tmp_path / "clone"), tmp_path / "tools"
    base = getattr(
        sys, "_base_executable", sys.executable
    )  # -I: no PYTHONPATH but run_all.sh's own, no user's packages
    for name in ("python3", "python"):
        stub_tool(tools, name, f'#!/bin/bash\nPYTHONNOUSERSITE=1 exec "{base}" -S "$@"\n')
    done = run_with_tools(project, tools, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: ./run_all.sh") and not done.stderr
    wrong = run_with_tools(project, tools, "--nonsense")
    assert wrong.returncode == 2 and "unrecognized arguments: --nonsense" in wrong.stderr
    assert not (project / ".venv").exists()


def test_without_any_python_bash_prints_the_usage(tmp_path: Path) -> None:
    project, tools = bare_copy(tmp_path / "clone"), tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "env", "grep"):
        (tools / name).symlink_to(shutil.which(name))
    for words, status in ((["--help"], 0), ([], 1)):
        command = [str(tools / "bash"), str(project / "run_all.sh"), *words]
        done = subprocess.run(command, env={"PATH": str(tools)}, capture_output=True, text=True)
        assert done.returncode == status
        assert "usage: ./run_all.sh" in done.stdout if words else "Python 3.11 or later is needed" in done.stderr


def test_the_arguments_need_the_standard_library_of_an_old_python_only() -> None:
    """Nothing but the standard library, and no syntax that Python 3.8 lacks."""
    for name in ("__init__.py", "pipeline/__init__.py", "pipeline/arguments.py"):
        tree = ast.parse((ROOT / "lsdc_utils" / name).read_text(), feature_version=(3, 8))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert modules <= set(sys.stdlib_module_names)


def test_an_environment_that_satisfies_the_pins_is_taken(bare_project: Path) -> None:
    record, tools = bare_project / "record", bare_project / "tools"
    real = f'#!/bin/bash\n[ "$1" = -m ] && echo "$0" && exit\nexec "{sys.executable}" "$@"\n'
    stub_tool(tools, "python", STUB_PYTHON.format(record=record, pip=0))
    stub_tool(bare_project / ".venv/bin", "python", real)
    assert run_with_tools(bare_project, tools).stdout == f"{bare_project}/.venv/bin/python\n"
    stub_tool(tools, "python", real)  # the active one comes first
    assert run_with_tools(bare_project, tools).stdout == f"{tools}/python\n"
    with (bare_project / "requirements.txt").open("a") as pins:
        pins.write("a-package-nobody-has==1\n")
    stub_tool(tools, "python3", STUB_PYTHON.format(record=record, pip=0))
    assert run_with_tools(bare_project, tools).stdout == "handed over\n"


def test_conda_users_get_the_same_pins(bare_project: Path) -> None:
    """A stub stands for conda and records its arguments, since no channel can be reached where tests run."""
    record, tools = bare_project / "record", bare_project / "tools"
    stub_tool(tools, "conda", f'#!/bin/bash\necho "$*" >> "{record}"\n')
    text = (bare_project / "environment.yml").read_text()
    command = re.search(r"^# +(conda env create .*?) &&", text, re.MULTILINE)[1]
    environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    subprocess.run(command, shell=True, check=True, cwd=bare_project, env=environment)
    assert record.read_text() == "env create --file environment.yml\n"
    assert yaml.safe_load(text)["dependencies"][-1] == {"pip": ["-r requirements.txt"]}


def test_pins_are_exact_and_bound_to_no_platform() -> None:
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[\w.]+", line) for line in lines)
    names = [line.split("==")[0].lower() for line in lines]
    assert len(names) == len(set(names))
    assert {"torch", "torchvision", "ultralytics", "timm", "snakemake", "papermill"} <= set(names)
    assert not [name for name in names if re.match(r"nvidia-(?!ml-py)|cuda|triton", name)]
