"""The published 3D-ViT: mirrored studies, its two views, and that notebook 04 trains it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from spines import mirror_study, noisy_study, spine
from vit_inputs import SMALL, train

from lsdc_utils.published import vit as published_vit
from lsdc_utils.published.vit import MIRROR
from lsdc_utils.vit.augment import Augmentation
from lsdc_utils.vit.model import load_vit
from lsdc_utils.vit.predict import probabilities
from lsdc_utils.vocabulary import COLUMNS, SERIES_TYPES, SEVERITIES, study_row_ids

GRID = dataclasses.replace(SMALL, size=16, patch=4)


def draw_grids(n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.integers(0, 255, (n, 3, 16, 16, 16)).astype(np.uint8), rng.choice(3, (n, 25)).astype(np.int8)


def test_mirrored_grids_carry_exchanged_labels():
    rngs = [np.random.default_rng([0, study]) for study in range(16)]
    grids, _ = draw_grids(16)
    labels = np.tile(np.arange(25), (16, 1))
    still = Augmentation(intensity=0.0, drop_series=0.0)
    (values,), targets = published_vit.augment(grids, labels[..., None].repeat(3, axis=-1), GRID, still, rngs)
    truth = targets[..., 0]
    turned = truth[:, 5] != 5
    assert 0 < turned.sum() < 16 and (truth == np.where(turned[:, None], MIRROR, np.arange(25))).all()
    assert [COLUMNS[k] for k in truth[turned][0][[0, 5, 24]]] == [
        "spinal_canal_stenosis_l1_l2",
        "right_neural_foraminal_narrowing_l1_l2",
        "left_subarticular_stenosis_l5_s1",
    ]
    for study in range(16):
        expected = grids[study, :, ::-1] if turned[study] else grids[study]
        np.testing.assert_allclose(values[study].numpy(), expected, rtol=1e-5, atol=1e-3)
    (_, same), (_, mirrored) = published_vit.mirror_views(grids, GRID, 2)
    assert same == list(range(25)) and mirrored == list(MIRROR)


def test_only_complete_studies_are_trained_on():
    labels = pd.DataFrame({"study_id": [1, 1, 2, 2], "severity": [0, 2, 1, -1]})
    assert published_vit.complete(labels)["study_id"].tolist() == [1, 1]


def test_notebook_04_trains_it_and_a_mirrored_study_gets_exchanged_answers(tmp_path):
    studies = draw_grids(4)
    options = {"published_method": True, "vit_epochs": 2, "vit_batch": 2}
    trained = train(tmp_path, studies, GRID, **options)
    views = published_vit.mirror_views
    natural = probabilities([trained["model"]], studies[0], 2, views=views)
    mirrored = probabilities([trained["model"]], studies[0][:, :, ::-1], 2, views=views)
    np.testing.assert_allclose(natural, mirrored[:, list(MIRROR)], atol=1e-6)
    (loaded,) = published_vit.load_vits(tmp_path / "weights", [0])
    np.testing.assert_array_equal(probabilities([loaded], studies[0], 2, views=views), natural)
    with pytest.raises(ValueError, match="published_method"):
        load_vit(tmp_path / "weights/vit3d_fold0.safetensors")
    planes = published_vit.classifier(GRID).show(next(views(studies[0], GRID, 1))[0], 0, 2, GRID)
    assert [kind for kind, *_ in planes] == list(SERIES_TYPES)


def test_studies_are_predicted_without_points():
    torch.manual_seed(0)
    model = published_vit.StudyVit(GRID).eval()
    torch.nn.init.normal_(model.head.linear.weight)
    stacks, none = noisy_study(), spine().iloc[:0]
    rows = published_vit.predict_studies([model], [(7, stacks), (9, [])], none, 2)
    turned = published_vit.predict_studies([model], [(7, [mirror_study(s) for s in stacks])], none, 2)
    assert rows["row_id"].tolist() == study_row_ids(7)
    natural, mirrored = rows[list(SEVERITIES)].to_numpy(), turned[list(SEVERITIES)].to_numpy()
    np.testing.assert_allclose(mirrored[list(MIRROR)], natural, atol=1e-3)
