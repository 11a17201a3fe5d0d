"""The published mean of the models' rows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from lsdc_utils.grading.grade import rows_of
from lsdc_utils.published import grade
from lsdc_utils.vocabulary import SEVERITIES


@pytest.fixture
def given() -> dict[str, pd.DataFrame]:
    """What two models say of one study; the detectors lack its first three rows, the transformer the first."""
    rows, rng = rows_of([1])["row_id"], np.random.default_rng(0)
    tables = {}
    for model, missing in (("yolo", 3), ("vit3d", 1)):
        table = pd.DataFrame(rng.dirichlet([2, 1, 1], size=25), columns=list(SEVERITIES))
        table.insert(0, "row_id", rows)
        tables[model] = table[missing:].reset_index(drop=True)
    return tables


@pytest.fixture
def prior() -> pd.DataFrame:
    shares = dict(zip(SEVERITIES, (0.7, 0.2, 0.1), strict=True))
    return rows_of([1])[["row_id"]].assign(**shares)


def test_rows_are_the_published_mean_and_one_model_s_or_the_prior_s_where_others_are_missing(given, prior):
    rows = grade.published_mean(given, prior).set_index("row_id")
    yolo, vit3d = (table.set_index("row_id") for table in given.values())
    pd.testing.assert_frame_equal(rows[3:], 0.65 * yolo + 0.35 * vit3d.loc[yolo.index])
    pd.testing.assert_frame_equal(rows[1:3], vit3d[:2])
    pd.testing.assert_frame_equal(rows[:1], prior.set_index("row_id")[:1])


def test_parts_are_left_as_they_are_and_sources_are_named(given, prior):
    tables, sources = grade.blend_rows(grade.fit_blends(given, prior, prior), given, prior)
    assert set(tables) == {"yolo", "vit3d", "ensemble"}
    assert list(sources[:4]) == ["prior", "vit3d", "vit3d", "yolo+vit3d"]
    np.testing.assert_allclose(tables["yolo"][list(SEVERITIES)][3:], given["yolo"][list(SEVERITIES)])
    np.testing.assert_allclose(tables["yolo"][list(SEVERITIES)][:3], prior[list(SEVERITIES)][:3])


def test_nothing_is_fitted(given, prior):
    recipe = grade.fit_blends(given, prior, prior)
    assert recipe["kind"] == "published" and sum(recipe["ensemble"].values()) == 1
    in_sample, out_of_fold = (grade.blend_rows(recipe, given, prior, labels=labels)[0] for labels in (None, prior))
    pd.testing.assert_frame_equal(in_sample["ensemble"], out_of_fold["ensemble"])
