"""The size and order of the code: `python tests/house.py` prints the table and what breaks a bound.

Counted are lines of Python files, with blank lines and comments; of notebooks, lines of code cells.
"""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lsdc_utils.pipeline import graph  # noqa: E402

FLOORS = (  # a module or folder imports from its own floor and from those before it
    ("vocabulary", "geometry", "files", "costs", "parallel", "dicom"),
    ("phantom", "data", "metric", "figures", "checkpoint", "downloads"),
    ("detector", "vit"),
    ("published", "grading"),
    ("stress", "viewer", "export"),
    ("report",),
    ("pipeline",),
)
FLOOR_OF = {name: number for number, names in enumerate(FLOORS, start=1) for name in names}
TRAINING = ("01_eda", "02_convert_labels", "03_train_localiser", "03_train_yolo", "04_train_vit3d",
            "05_ensemble_inference")  # fmt: skip
CELL_LINES = {
    "03_train_localiser": 45,
    "03_train_yolo": 45,
    "04_train_vit3d": 45,
}  # the longest cell; in other notebooks 25


@dataclass(frozen=True)
class Bounds:
    """Largest numbers of lines; `top` is the number of files at the top of the package."""

    package: int = 15_166  # 13,290; labelled folders 747, recipe 709 of 700, uncertain numbering 58, silent faults 359
    training: int = 8_220  # modules that TRAINING imports, transitively
    file: int = 450
    function: int = 50
    top: int = 16
    cell: int = 25
    notebook: int = 320


def count(file: Path) -> int:
    """Lines of a file."""
    return len(file.read_text().splitlines())


def modules(package: Path) -> dict[tuple[str, ...], Path]:
    """Every module of the package by name, e.g. ("dicom", "series"); a folder's __init__ has the folder's name."""
    files = sorted(file for file in package.rglob("*.py") if "__pycache__" not in file.parts)
    names = [file.relative_to(package).with_suffix("").parts for file in files]
    return {name[:-1] if name[-1] == "__init__" else name: file for name, file in zip(names, files, strict=True)}


def imported(source: str, package: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Names in lsdc_utils that `source`, code of the package `package`, imports, e.g. ("phantom", "body")."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {tuple(alias.name.split(".")) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ("lsdc_utils", *package)[: len(package) + 2 - node.level] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names |= {(*module, alias.name) for alias in node.names}
    return {name[1:] for name in names if name[0] == "lsdc_utils"}


def imports(package: Path) -> dict[tuple[str, ...], set[tuple[str, ...]]]:
    """The modules of the package that each module imports itself, anywhere in its code."""
    known, direct = modules(package), {}
    for module, file in known.items():
        inside = module if file.name == "__init__.py" else module[:-1]
        names = imported(file.read_text(), inside)
        prefixes = (next((name[:k] for k in range(len(name), 0, -1) if name[:k] in known), None) for name in names)
        direct[module] = {name for name in prefixes if name and name != module}
    return direct


def circles(direct: dict[tuple[str, ...], set[tuple[str, ...]]]) -> list[str]:
    """Modules that import each other, directly or through others."""
    reached = {module: set(others) for module, others in direct.items()}
    for through in direct:
        for others in reached.values():
            others |= reached[through] if through in others else set()
    return [f"{'.'.join(module)} imports itself, through others" for module in direct if module in reached[module]]


def upwards(direct: dict[tuple[str, ...], set[tuple[str, ...]]]) -> Iterator[str]:
    """Imports from a floor above, and modules that stand on no floor."""
    for module, others in direct.items():
        if module and module[0] not in FLOOR_OF:
            yield f"{'.'.join(module)}: is on no floor"
        for other in others if module else ():
            if FLOOR_OF.get(other[0], 0) > FLOOR_OF.get(module[0], 9):
                yield f"{'.'.join(module)} imports {'.'.join(other)} from a floor above"


def long_functions(file: Path, most: int) -> Iterator[str]:
    """Functions of more than `most` lines."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef) and (lines := node.end_lineno - node.lineno + 1) > most:
            yield f"{file.relative_to(ROOT)}: {node.name} has {lines} lines, at most {most}"


def code_cells(notebook: Path) -> list[str]:
    """Source of each code cell, without the parameters cell."""
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    return ["".join(cell["source"]) for cell in cells if "parameters" not in cell["metadata"].get("tags", ())]


def notebook_faults(notebook: Path, bounds: Bounds) -> Iterator[str]:
    """Cells and notebooks with too many lines."""
    lengths = [len(source.splitlines()) for source in code_cells(notebook)]
    most = CELL_LINES.get(notebook.stem, bounds.cell)
    for number, length in enumerate(lengths, start=1):
        if length > most:
            yield f"{notebook.name}: code cell {number} has {length} lines, at most {most}"
    if sum(lengths) > bounds.notebook:
        yield f"{notebook.name}: {sum(lengths)} lines of code, at most {bounds.notebook}"


def sizes(package: Path = ROOT / "lsdc_utils") -> dict[str, int]:
    """Lines of each module and folder at the top, of all, and of what the notebooks of the training import."""
    lines: dict[str, int] = {}
    for module, file in modules(package).items():
        top = module[0] if module else "__init__"
        lines[top] = lines.get(top, 0) + count(file)
    cells = [source for name in TRAINING for source in code_cells(ROOT / "notebooks" / f"{name}.ipynb")]
    used = set().union(*map(graph.module_files, cells))
    training = sum(count(file) for file in used if file.suffix == ".py")
    return lines | {"package": sum(lines.values()), "training": training}


def faults(bounds: Bounds = Bounds()) -> list[str]:
    """A sentence for each bound that does not hold."""
    package, lines = ROOT / "lsdc_utils", sizes()
    direct, files = imports(package), modules(package).values()
    top = len(list(package.glob("*.py")))
    sums = {"package": bounds.package, "training": bounds.training}
    result = [f"{name}: {lines[name]} lines, at most {most}" for name, most in sums.items() if lines[name] > most]
    result += [f"{top} files at the top of lsdc_utils, at most {bounds.top}"] if top > bounds.top else []
    for file in files:
        if count(file) > bounds.file:
            result.append(f"{file.relative_to(ROOT)}: {count(file)} lines, at most {bounds.file}")
        result += long_functions(file, bounds.function)
    result += [*circles(direct), *upwards(direct)]
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        result += notebook_faults(notebook, bounds)
    return result


def main() -> int:
    """Print lines by floor, and every fault; 1 if there is one."""
    lines, listed = sizes(), faults()
    for number, names in enumerate(FLOORS, start=1):
        print(f"{number}  {', '.join(f'{name} {lines[name]}' for name in names if name in lines)}")
    print(f"package {lines['package']} lines; notebooks 01 to 05 import {lines['training']} of them")
    print(*listed, sep="\n")
    return int(bool(listed))


if __name__ == "__main__":
    sys.exit(main())
