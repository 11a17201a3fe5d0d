"""Studies drawn with what they share drawn once: the same stacks as from the files of a phantom."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lsdc_utils.data import competition
from lsdc_utils.data.stacks import Stack, read_study
from lsdc_utils.phantom import scanner, write_phantom
from lsdc_utils.phantom.study import image_study
from lsdc_utils.phantom.write import Design, plan_studies
from lsdc_utils.stress import drawing
from lsdc_utils.stress.cases import CONTROLLED
from lsdc_utils.vocabulary import COLUMNS, SPINAL_CANAL, T1


def studies() -> list[dict]:
    """Arguments of `write_phantom` for one body: as usual, narrowed in one place, noisy, and with other slices."""
    usual = np.full(len(COLUMNS), 0.3)
    narrowed = usual.copy()
    narrowed[COLUMNS.index(f"{SPINAL_CANAL}_l4_l5")] = 1.0
    return [
        CONTROLLED | {"bodies": [7], "narrowing": [narrowing]} | choices
        for narrowing, choices in ((usual, {}), (narrowed, {}), (usual, {"noise": 3.0}), (usual, {"step": 2.0}))
    ]


def read_files(folder: Path, choices: dict) -> list[Stack]:
    """The stacks of the one study of a phantom that is written to a folder."""
    comp = competition.read(write_phantom(folder, 0, 1, 3, **choices))
    return read_study(comp, "test", int(comp.series["study_id"].iloc[0]))[0]


def test_drawn_studies_are_those_of_the_files_and_what_they_share_is_drawn_once(tmp_path, monkeypatch):
    drawn, exposures = drawing.Drawing(tmp_path / "series"), []
    monkeypatch.setattr(drawing, "expose", lambda *given: exposures.append(1) or scanner.expose(*given))
    for number, choices in enumerate(studies()):
        [plan] = plan_studies(Design.of(0, 1, 3, **choices))
        own, files = drawn.stacks(plan), read_files(tmp_path / str(number), choices)
        assert [stack.series_id for stack in own] == [stack.series_id for stack in files]
        for one, other in zip(own, files, strict=True):
            assert one.series_type == other.series_type and one.study_id == other.study_id
            assert np.abs(one.pixels.astype(int) - other.pixels).max() <= 1  # of rounding
            assert (one.pixels != other.pixels).mean() < 1e-4
            for name in ("shapes", "affines", "instance_numbers", "blocks"):
                assert np.array_equal(getattr(one, name), getattr(other, name))
    assert len(exposures) == 6 and len(drawn.read) == 6  # of the usual study, and of the one with other slices


def test_a_series_with_a_blank_image_goes_through_files_each_time(tmp_path):
    drawn, [plan] = drawing.Drawing(tmp_path / "series"), plan_studies(Design.of(0, 1, 3, **studies()[0]))
    part, pixels = next(image_study(plan))
    whole = drawn._stack(plan.study_id, part, pixels)
    spoiled = pixels.copy()
    spoiled[2] = 7
    for _ in range(2):
        stack = drawn._stack(plan.study_id, part, spoiled)
        assert len(stack.pixels) == len(whole.pixels) - 1
        assert part.numbers[2] not in stack.instance_numbers
    assert not (tmp_path / "series").exists()


@pytest.fixture
def two_bodies() -> list:
    """A body as usual and with a narrower foramen, and a T1 series of it."""
    bodies = []
    for narrowing in (0.1, 0.9):
        given = np.full(len(COLUMNS), 0.2)
        given[COLUMNS.index("left_neural_foraminal_narrowing_l4_l5")] = narrowing
        bodies.append(scanner.Body.draw(np.random.default_rng(4), given, slip=False, transitional=False))
    return [*bodies, scanner.plan_series(np.random.default_rng(5), bodies[0], T1)]


def test_only_what_a_narrowing_alters_is_drawn_again(two_bodies, monkeypatch):
    usual, narrow, plan = two_bodies
    images = scanner.expose(usual, plan, kept := [])
    whole, drawn, paint = scanner.expose(narrow, plan), [], scanner.paint
    monkeypatch.setattr(scanner, "paint", lambda points: drawn.append(points.u.size) or paint(points))
    again = scanner.expose_again(narrow, plan, images, kept, usual.tables)
    assert np.abs(again - whole).max() < 1e-6 < np.abs(images - whole).max()
    assert 0 < sum(drawn) < 0.5 * sum(value.size for *_, value in kept)
    drawn.clear()
    assert np.array_equal(scanner.expose_again(usual, plan, images, kept, usual.tables), images) and not drawn
