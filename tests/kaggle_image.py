"""What Kaggle's image has (kaggle_image.txt), and what the bundle must bring: `python tests/kaggle_image.py` prints the
list that belongs in lsdc_utils/pipeline/kaggle_wheels.txt."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions, requires, version
from pathlib import Path

import nbformat
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lsdc_utils.pipeline import kaggle
from lsdc_utils.pipeline.graph import module_files

IMAGE = Path(__file__).with_name("kaggle_image.txt")
PIN = re.compile(r"^([A-Za-z0-9][\w.-]*)==(\S+)$", re.MULTILINE)
NEVER = {"torch", "torchvision", "numpy"}  # not replaced: the image's other packages were built for them
EXACT = {"timm", "opencv-python"}  # ours: timm's layers may change; OpenCV 4 samples images otherwise (1e-5 in a row)
UNNAMED = ("pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pyjpegls", "pyarrow", "torchvision")  # by no import


class MissingError(RuntimeError):
    """A package of the image that will not do and cannot be replaced."""


def read_image() -> dict[str, str]:
    """What Kaggle's image has, as far as it matters here: name -> version, including Python."""
    return {canonicalize_name(name): found for name, found in PIN.findall(IMAGE.read_text())}


def imported(source: str) -> set[str]:
    """Top-level modules that Python source imports, except the standard library and this package."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {node.module} if isinstance(node, ast.ImportFrom) and not node.level else set()
    return {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"lsdc_utils"}


def roots() -> set[str]:
    """The distributions that 05 and the modules that it uses import, or load by name."""
    cells = [cell.source for cell in nbformat.read(kaggle.GRADES, as_version=4).cells if cell.cell_type == "code"]
    files = set().union(*map(module_files, cells))
    names = set().union(*map(imported, [*cells, *(file.read_text() for file in files if file.suffix == ".py")]))
    provides = packages_distributions()
    return {*UNNAMED, *(distribution for name in names for distribution in provides[name])}


def lacking(image: dict[str, str], python: str, wanted: Iterable[str]) -> dict[str, str]:
    """Which of the `wanted` distributions and their requirements an image lacks, or has in a version that does not do:
    name -> version here. What the image has brings its own requirements."""
    environment = default_environment() | {"python_version": ".".join(python.split(".")[:2]), "extra": ""}
    waiting, missing = [Requirement(name) for name in wanted], {}
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        there = image.get(name)
        if name in missing or (there and there == version(name)):
            continue
        if there and name not in EXACT and requirement.specifier.contains(there):
            continue
        if there and name in NEVER:
            raise MissingError(f"{requirement} is needed; Kaggle's image has {there}, which cannot be replaced")
        missing[name] = version(name)
        needed = [Requirement(text) for text in requires(name) or ()]
        waiting += [entry for entry in needed if entry.marker is None or entry.marker.evaluate(environment)]
    return missing


def wheels() -> dict[str, str]:
    """What the bundle must bring: name -> version here."""
    return lacking(read_image(), kaggle.PYTHON, roots())


if __name__ == "__main__":
    print(
        "# Packages that Kaggle's image lacks, or has in a version that does not do; written by tests/kaggle_image.py."
    )
    print(*sorted(wheels()), sep="\n")
