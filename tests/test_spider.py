"""The proof on SPIDER's files: truth from masks, shares and intervals, and .mha files made from a phantom's study."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from lsdc_utils import geometry, phantom
from lsdc_utils.data import competition, windows
from lsdc_utils.data.stacks import Stack, read_study
from lsdc_utils.vocabulary import LEVELS, T2

sys.path.append(str(ROOT / "tests/proofs"))
import spider

# (column, row, slice, 1) to LPS mm: rows towards the feet, columns towards the back, slices towards the left
AFFINE = np.array([[0, 0, 4, -20], [1.0, 0, 0, -60], [0, -1.0, 0, 100], [0, 0, 0, 1]])


def paint(shape: tuple[int, int, int], affine: np.ndarray, points: pd.DataFrame) -> np.ndarray:
    """A mask as SPIDER's: a tube of 7 mm radius through canal points (level, X, Y, Z), and discs in front of them."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)[..., ::-1]
    places = index @ affine[:3, :3].T + affine[:3, 3]
    points = points.sort_values("Z")
    middle = [np.interp(places[..., 2], points["Z"], points[axis]) for axis in "XY"]
    mask = np.where(np.hypot(places[..., 0] - middle[0], places[..., 1] - middle[1]) < 7, spider.CANAL, 0)
    for row in points.itertuples():
        centre = np.array([row.X, row.Y - 26, row.Z])
        inside = (((places - centre) / (22, 17, 5)) ** 2).sum(axis=-1) < 1
        mask[inside & (mask == 0)] = spider.LOWEST_DISC + LEVELS[::-1].index(row.level)
    return mask.astype(np.uint8)


def spine(study: int = 11, patient: str = "1", source: str = "t2") -> pd.DataFrame:
    """Canal points of five levels on a lordotic line, the highest first."""
    heights = np.array([72.0, 38.0, 4.0, -30.0, -62.0])
    points = {"level": LEVELS, "X": 2.0, "Y": 8 - (heights / 40) ** 2, "Z": heights}
    return pd.DataFrame({"study_id": study, "patient": patient, "source": source, **points})


def test_the_canal_s_middle_at_each_disc_is_found_in_a_mask() -> None:
    truth = spine()
    mask = paint((12, 200, 130), AFFINE, truth)
    points = spider.canal_points(mask, AFFINE)
    assert sorted(points) == sorted(LEVELS)
    for row in truth.itertuples():
        assert np.linalg.norm(points[row.level] - (row.X, row.Y, row.Z)) < 3, row.level
    mask[mask == spider.LOWEST_DISC + 2] = 0
    assert "l3_l4" not in spider.canal_points(mask, AFFINE)
    assert spider.canal_points(np.zeros_like(mask), AFFINE) == {}


def test_a_point_counts_for_the_disc_that_it_is_nearest_to() -> None:
    truth = pd.concat([spine(11), spine(21, "2")], ignore_index=True)
    found = truth.copy()
    found.loc[found["study_id"] == 11, "Z"] -= 7.0  # within 10 mm, on the right disc
    shifted = found["study_id"] == 21
    found.loc[shifted, "level"] = [*LEVELS[1:], LEVELS[0]]  # a level off
    judged = spider.judge(truth, found[found["level"] != "l5_s1"])
    own = judged[judged["study_id"] == 11].set_index("level")
    assert own["right_disc"].to_dict() == {level: level != "l5_s1" for level in LEVELS}
    assert own["within_10_mm"].sum() == 4 and not own["within_5_mm"].any()
    assert not judged.loc[judged["study_id"] == 21, list(spider.SHARES)].any(axis=None)


def test_the_table_has_sources_and_intervals_by_patient() -> None:
    truth = pd.concat([spine(10 * k + 1, str(k), "t2" if k % 2 else "t1") for k in range(1, 41)], ignore_index=True)
    found = truth[~(truth["patient"].isin(["2", "4"]) & truth["level"].eq("l1_l2"))]
    table = spider.summarise(spider.judge(truth, found)).set_index("source")
    assert list(table.index) == ["t2", "t1", "all"]
    assert table.loc["all", ["patients", "series", "points"]].tolist() == [40, 40, 200]
    assert table.loc["t2", "right_disc"] == "1.000 (1.000 to 1.000)"
    assert table.loc["t1", "right_disc"].startswith("0.980 (0.9") and table.loc["t1", "all_right_disc"][:5] == "0.900"
    low, high = (float(part) for part in table.loc["t1", "all_right_disc"][7:-1].split(" to "))
    assert low == pytest.approx(0.75, abs=0.06) and high == 1  # of 20 patients


@pytest.mark.slow
def test_mha_files_of_a_phantom_are_read_graded_and_judged(tmp_path: Path, monkeypatch, capsys) -> None:
    sitk = pytest.importorskip("SimpleITK", reason="pip install -r requirements-proofs.txt")
    root = phantom.write_phantom(tmp_path / "phantom", 0, 1, seed=5, far_numbers=0)
    comp = competition.read(root)
    [study] = comp.series["study_id"].unique()
    stack = next(stack for stack in read_study(comp, "test", study)[0] if stack.series_type == T2)
    truth = pd.read_csv(root / "anatomy.csv").query("condition == 'spinal_canal_stenosis' and series_type == @T2")
    write_mha(sitk, tmp_path / "spider", stack, truth)

    def graded(models, converted, split, studies):
        with monkeypatch.context() as flat:  # the stack was flattened once
            flat.setattr(windows, "_gains", lambda images, *_: [np.full((1, 1), 255, np.float32) for _ in images])
            [(made, _)] = [read_study(converted, split, one) for one in studies]
        assert same_places(stack, made[0]) > 0.97
        return {"points": truth.assign(study_id=studies[0], condition="scs", Y=truth["Y"] + 6)}

    recipe = dict.fromkeys(("folds", "vit_views", "conditions", "members"))
    monkeypatch.setattr(spider, "read_recipe", lambda run: recipe)
    monkeypatch.setattr(spider, "load_models", lambda *_: SimpleNamespace())
    monkeypatch.setattr(spider, "grade_studies", graded)
    log = tmp_path / "log.csv"
    for _ in range(2):
        table = spider.main(tmp_path / "spider", tmp_path, tmp_path / "table.csv", log).set_index("source")
    assert table.loc["t2", "points"] == len(truth) >= 4
    assert table.loc["t2", "all_within_10_mm"].startswith("1.000") and table.loc["t2", "right_disc"].startswith("1.000")
    assert float(table.loc["t2", "within_5_mm"][:5]) < 0.5
    assert "x_t2.mha is skipped" in capsys.readouterr().out
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "table.csv").set_index("source"), table)
    lines = pd.read_csv(log)  # of both times
    assert list(lines["series"]) == ["t2", "all"] * 2 and lines["commit"].str.fullmatch("[0-9a-f]{12}").all()
    assert list(lines["right_disc_points"]) == [1.0] * 4 and list(lines["points"]) == [len(truth)] * 4


def test_the_docs_show_the_last_lines_of_the_log_of_real_scans() -> None:
    log = pd.read_csv(ROOT / "docs/scans.csv").drop_duplicates(["models", "series"], keep="last")
    section = (ROOT / "docs/results.md").read_text().partition("## Levels on real scans")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:2] == "| "]
    assert len(rows) == len(log) + 1  # and the head
    for models, series, *shares in rows[1:]:
        count, kind = series.split(", ")
        [line] = log[(log["models"] == models) & (log["series"] == kind)].to_numpy().tolist()
        assert [float(share.split()[0]) for share in shares] == line[-5:] and line[4] == int(count)


def write_mha(sitk, folder: Path, stack: Stack, truth: pd.DataFrame) -> None:
    """Image and mask as SPIDER has them, with axes in another order than ours; and an image without a mask."""
    affine = stack.affines[0].copy()
    affine[:3, 2] = (stack.affines[-1] - stack.affines[0])[:3, 3] / (len(stack.affines) - 1)
    for name, voxels in (("images", stack.pixels), ("masks", paint(stack.pixels.shape, affine, truth))):
        (folder / name).mkdir(parents=True)
        image = sitk.GetImageFromArray(voxels)
        image.SetOrigin(affine[:3, 3])
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        image.SetSpacing(spacing)
        image.SetDirection((affine[:3, :3] / spacing).ravel())
        image = sitk.DICOMOrient(sitk.PermuteAxes(image, [2, 0, 1]), "RIP")
        sitk.WriteImage(image, str(folder / name / "1_t2.mha"), useCompression=True)
        if name == "images":
            sitk.WriteImage(image, str(folder / name / "x_t2.mha"))


def same_places(first: Stack, second: Stack) -> float:
    """Correlation of two stacks' grey values at the same patient points."""
    rng = np.random.default_rng(0)
    values = []
    for number in rng.integers(len(first.pixels), size=400):
        x, y = rng.integers(20, np.array(first.shapes[number])[::-1] - 20)
        point = geometry.to_patient(first.affines[number], np.array([x, y], float))
        local = geometry.to_pixels(second.affines, point[None])
        near = np.abs(local[:, 2]).argmin()
        assert abs(local[near, 2]) < 0.1
        column, row = local[near, :2].round().astype(int)
        values.append((first.pixels[number, y, x], second.pixels[near, row, column]))
    return float(np.corrcoef(np.array(values, float).T)[0, 1])
