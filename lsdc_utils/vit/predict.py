"""Natural probabilities of studies by trained networks, and prediction tables of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from lsdc_utils.data.stacks import Stack
from lsdc_utils.vit.augment import augment
from lsdc_utils.vit.inputs import prediction_views, shown_slices, study_input
from lsdc_utils.vit.loss import row_losses, row_weights
from lsdc_utils.vocabulary import COLUMNS, SEVERITIES, study_row_ids


@dataclass(frozen=True)
class Classifier:
    """A network and how studies are prepared for it: all that notebook 04 needs to train it and to predict."""

    build: Callable[[], nn.Module]  # the untrained network
    see: Callable = study_input  # (stacks, points, config) -> the input of a study, or None
    augment: Callable = augment  # a training batch, as `augment.augment` makes it
    views: Callable = prediction_views  # views at prediction
    show: Callable = shown_slices  # images of a batch for figures
    usable: Callable = lambda labels: labels  # the label table of the studies that training uses


def choose_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def probabilities(
    models: list[nn.Module],
    inputs: np.ndarray,
    views_count: int = 1,
    batch: int = 8,
    views: Callable = prediction_views,
) -> np.ndarray:
    """Natural probabilities float64 (n, 25, 3) of inputs (n, ...): the mean over models of one config and views."""
    device = choose_device()
    total = np.zeros((len(inputs), len(COLUMNS), len(SEVERITIES)))
    models = [model.to(device).eval() for model in models]
    for start in range(0, len(inputs), batch):
        part = inputs[start : start + batch]
        seen, orders = zip(*views(part, models[0].config, views_count, device), strict=True)
        stacked = [torch.cat(parts) for parts in zip(*seen, strict=True)]  # a third faster than view by view
        for model in models:
            natural = model(*stacked).exp().cpu().numpy()
            for order, of_view in zip(orders, np.split(natural, len(orders)), strict=True):
                total[start : start + batch] += of_view[:, order]
    return total / total.sum(-1, keepdims=True)


def loss_of(natural: np.ndarray, labels: np.ndarray) -> float:
    """The score's mean over its three groups of rows, of probabilities (n, 25, 3); missing labels do not count."""
    losses = row_losses(torch.from_numpy(natural).log(), torch.from_numpy(labels)).numpy()
    return float((losses * row_weights(labels)).sum(1).mean())


def prediction_rows(study_ids: Iterable[int], natural: np.ndarray) -> pd.DataFrame:
    """Probabilities (n, 25, 3) as a prediction table: row_id, normal_mild, moderate, severe."""
    rows = pd.DataFrame(natural.reshape(-1, len(SEVERITIES)), columns=list(SEVERITIES))
    rows.insert(0, "row_id", [row for study in study_ids for row in study_row_ids(study)])
    return rows


def predict_studies(
    models: list[nn.Module],
    studies: Iterable[tuple[int, list[Stack]]],
    points: pd.DataFrame,
    views_count: int = 1,
    batch: int = 8,
    see: Callable = study_input,
    views: Callable = prediction_views,
) -> pd.DataFrame:
    """The prediction table of studies (id, stacks), 25 rows each, by the mean of `models`, which share one config.

    points: canal points of all studies (study_id, level, X, Y, Z, maybe confidence). A study that cannot be seen, for
    lack of a point or a series, has no rows. Studies are read, cut and released one by one.
    """
    by_study = dict(list(points.groupby("study_id")))
    ids, natural = [], []
    for study_id, stacks in studies:
        seen = see(stacks, by_study.get(study_id, points.iloc[:0]), models[0].config)
        if seen is not None:
            ids.append(int(study_id))
            natural.append(probabilities(models, seen[None], views_count, batch, views))
    return prediction_rows(ids, np.concatenate(natural) if natural else np.zeros((0, len(COLUMNS), len(SEVERITIES))))
