"""The bounds on size and order of the code hold, and would be seen if they did not."""

from __future__ import annotations

from pathlib import Path

import house


def test_the_house_keeps_its_bounds() -> None:
    assert house.faults() == []


def test_every_bound_is_checked() -> None:
    nothing = house.Bounds(package=1, training=1, file=1, function=1, top=1, cell=1, notebook=1)
    faults = "\n".join(house.faults(nothing))
    for words in ("package: ", "training: ", "files at the top", "graph.py: ", "execute has", "code cell 1 has"):
        assert words in faults, words
    assert "lines of code, at most 1" in faults
    assert len(house.FLOORS) <= 8


def write_package(folder: Path, **modules: str) -> Path:
    for name, source in modules.items():
        file = folder / f"{name.replace('__', '/', 1)}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return folder


def test_circles_are_found_through_folders_and_inner_imports(tmp_path: Path) -> None:
    package = write_package(
        tmp_path,
        metric="from lsdc_utils.data import checks",
        data__checks="def late():\n    from . import folds",
        data__folds="from lsdc_utils import metric",
        files="import json",
    )
    direct = house.imports(package)
    assert direct["data", "checks"] == {("data", "folds")}
    assert {line.split(" ")[0] for line in house.circles(direct)} == {"metric", "data.checks", "data.folds"}


def test_imports_from_above_and_strangers_are_found(tmp_path: Path) -> None:
    package = write_package(
        tmp_path, vit__model="import lsdc_utils.report.run", report__run="from lsdc_utils import vit", other=""
    )
    assert list(house.upwards(house.imports(package))) == [
        "other: is on no floor",
        "vit.model imports report.run from a floor above",
    ]
