"""The viewer of a study, moved as a front end would: the picture follows; where nobody clicks there is a still one."""

from __future__ import annotations

import base64
import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from report_run import make_rows, write_images

from lsdc_utils import figures, viewer
from lsdc_utils.data.stacks import load_study
from lsdc_utils.grading import marks, run_tables
from lsdc_utils.pipeline import run
from lsdc_utils.vocabulary import CONDITIONS, SERIES_TYPES, T1


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> pd.DataFrame:
    """Rows of three studies with a point each; `read` of the test below finds their slices."""
    labels, _ = make_rows(np.random.default_rng(3), 3)
    folder = tmp_path_factory.mktemp("run")
    (folder / "predictions").mkdir()
    write_images(folder, labels)
    points = pd.read_parquet(folder / "predictions/points_oof.parquet")
    named = labels.assign(
        study_id=labels["study_id"].astype(str),
        side=labels["condition"].str.extract(r"^(left|right)_")[0].fillna(""),
        group=labels["condition"].map({name: c.group for name, c in CONDITIONS.items()}),
    )
    placed = named.join(run_tables.points_of(named, points), on="row_id").astype({"study_id": int})
    placed.attrs["slices"] = str(folder / "slices")
    return placed.assign(grade=placed["severity"], confidence=0.5, words="<b>L4/L5</b> & so on")


@pytest.fixture
def read(rows):
    return lambda study_id: load_study(rows.attrs["slices"], study_id)


@pytest.fixture
def shown(read, rows) -> viewer.Viewer:
    figures.use_style()
    return viewer.Viewer(read, rows, {"scs": 30.0})


def coloured(content: bytes) -> int:
    """Pixels of a PNG that are no grey."""
    image = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)
    return int((np.ptp(image, axis=2) > 60).sum())


def test_it_begins_with_a_marked_slice_of_each_series(shown):
    assert [name.split(" (")[0] for name, _ in shown.series.options] == list(SERIES_TYPES)
    for number in range(3):
        shown.series.value = number
        assert shown.slice.max == 7 and coloured(shown.image.value) > 50
    assert "&lt;b&gt;L4/L5&lt;/b&gt; &amp; so on" in shown.text.value  # words of data stay words


def test_the_picture_follows_slice_window_and_study(shown):
    pictures = [bytes(shown.image.value)]
    for control, value in ((shown.slice, 1), (shown.window, (0, 60)), (shown.study, 2), (shown.series, 2)):
        control.value = value
        pictures.append(bytes(shown.image.value))
    assert len(set(pictures)) == len(pictures)
    assert shown.stacks[0].study_id == 2


def test_points_and_boxes_can_be_taken_off(shown):
    shown.series.value = 1
    both = coloured(shown.image.value)
    shown.boxes.value = False
    points = coloured(shown.image.value)
    shown.points.value = False
    assert both > points > coloured(shown.image.value) == 0


def test_a_study_without_images_says_so(rows):
    empty = viewer.Viewer(lambda study_id: [], rows)
    assert bytes(empty.image.value) == b"" and "no series" in empty.text.value
    empty.slice.value = 1
    figures.use_style()
    assert marks.draw_still([], rows[rows["study_id"] == 1]).axes[0].get_title().endswith("nothing found")


def test_a_picture_has_a_part_for_each_type_of_series_that_there_is(read, rows):
    figures.use_style()
    stacks, of_study = read(1), rows[rows["study_id"] == 1]
    types = {stack.series_type for stack in stacks}
    assert len(marks.draw_still(stacks, of_study).axes) == len(types) > 1
    [ax] = marks.draw_still([stack for stack in stacks if stack.series_type == T1], of_study).axes
    assert ax.get_title().startswith(T1)


def test_rows_without_points_leave_the_slices(read, rows):
    bare = viewer.Viewer(read, rows.assign(X=np.nan))
    assert coloured(bare.image.value) == 0 and len(bare.image.value) > 1000


def test_a_run_shows_a_still_picture_alone(read, rows, monkeypatch):
    sent = []
    monkeypatch.setattr(viewer, "display", lambda bundle, raw, metadata: sent.append((bundle, metadata)))
    monkeypatch.setenv(viewer.RUN_MARK, "a run")
    assert viewer.show(read, rows) is None
    monkeypatch.delenv(viewer.RUN_MARK)
    assert isinstance(viewer.show(read, rows), viewer.Viewer)
    live = "application/vnd.jupyter.widget-view+json"
    assert [live in bundle for bundle, _ in sent] == [False, True]
    for bundle, metadata in sent:
        assert coloured(base64.b64decode(bundle["image/png"])) > 100 and metadata["image/png"]["alt"].startswith(
            "Study"
        )


def test_a_point_outside_an_image_is_not_on_it(read, rows):
    [stack] = [stack for stack in read(1) if stack.series_type == SERIES_TYPES[2]]
    mine = rows[rows["study_id"] == 1].head(1).assign(X=0.0, Y=0.0, Z=0.0)
    height, width = stack.shapes[0]
    corner = stack.affines[0] @ [width - 1.0, height - 1.0, 0.0, 1.0]
    right = mine.assign(X=corner[0] + 25.0, Y=corner[1], Z=corner[2])
    assert marks.distances(stack, right)[0, 0] == pytest.approx(25.0)
    assert marks.distances(stack, mine.assign(X=corner[0], Y=corner[1], Z=corner[2]))[0, 0] == pytest.approx(0.0)
    assert marks.worst_slice([stack], right) is None


def test_a_run_is_marked_as_the_runner_marks_it():
    assert viewer.RUN_MARK == run.RUN_MARK


def test_no_study_is_no_viewer(read, rows, capsys):
    assert viewer.show(read, rows[:0]) is None
    assert "no study" in capsys.readouterr().out
