"""Natural probabilities of studies by trained networks, and prediction tables of them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import pandas as pd
import torch
from torch import nn

from lsdc_utils.vit.augment import augment
from lsdc_utils.vit.inputs import DEVICE, Rows, Studies, prediction_views, seen_studies, shown_slices, study_input
from lsdc_utils.vit.model import SLOTS_OF_SIDE, VitConfig
from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, SEVERITIES, SIDES, study_row_ids

DEVICES = [torch.device("cuda", k) for k in range(torch.cuda.device_count() * (DEVICE.type == "cuda"))] or [DEVICE]


@dataclass(frozen=True)
class Classifier:
    """A network and how studies are prepared for it: all that notebook 04 needs to train it and to predict."""

    build: Callable[[], nn.Module]  # the untrained network
    see: Callable = study_input  # (stacks, points, config) -> the input of a study, or None
    augment: Callable = augment  # a training batch
    views: Callable = prediction_views  # views at prediction
    show: Callable = shown_slices  # images of a batch for figures
    usable: Callable = lambda labels: labels  # the label table of the studies that training uses


@torch.inference_mode()
def probabilities(
    models: list[nn.Module],
    inputs: np.ndarray | Rows,
    n_views: int = 1,
    batch: int = 8,
    views: Callable = prediction_views,
) -> np.ndarray:
    """Natural probabilities float64 (n, 25, 3) of inputs (n, ...): the mean over models of one config and views. Where
    this process sees several GPUs, they compute side by side, each a part of the models."""
    total = np.zeros((len(inputs), len(COLUMNS), len(SEVERITIES)))
    placed = [(model.to(device).eval(), device) for model, device in zip(models, cycle(DEVICES), strict=False)]
    for start in range(0, len(inputs), batch):
        part = np.array(inputs[start : start + batch])  # a copy, since torch takes no read-only file
        seen, orders = zip(*views(part, models[0].config, n_views), strict=True)
        stacked = [torch.cat(parts) for parts in zip(*seen, strict=True)]  # a third faster than view by view
        answers = []  # those of a GPU are computed while the next model is called
        for model, device in placed:
            with torch.autocast(device.type, torch.float16, enabled=device.type == "cuda"):
                answers.append(model(*(tensor.to(device, non_blocking=True) for tensor in stacked)))
        for log_natural in answers:
            natural = np.split(log_natural.float().exp().cpu().numpy(), len(orders))
            for order, of_view in zip(orders, natural, strict=True):
                total[start : start + batch] += of_view[:, order]
    return total / total.sum(-1, keepdims=True)


def prediction_rows(study_ids: Iterable[int], natural: np.ndarray) -> pd.DataFrame:
    """Probabilities (n, 25, 3) as a prediction table: row_id, normal_mild, moderate, severe."""
    rows = pd.DataFrame(natural.reshape(-1, len(SEVERITIES)), columns=list(SEVERITIES))
    rows.insert(0, "row_id", [row for study in study_ids for row in study_row_ids(study)])
    return rows


def shown_rows(ids: Iterable[int], natural: np.ndarray, inputs: np.ndarray | Rows, config: VitConfig) -> pd.DataFrame:
    """`prediction_rows` of studies with these inputs, without places that no slice of any series shows."""
    rows = prediction_rows(ids, natural)
    if not inputs[:1].dtype.names:  # of the published method
        return rows
    there = np.array([np.isfinite(inputs[k : k + 1]["places"][0]) for k in range(len(inputs))])  # (n, levels, images)
    halves = [there[..., np.isin(config.slots, slots)].any(axis=-1) for slots in SLOTS_OF_SIDE]
    of_side = {None: halves[0] | halves[1]} | dict(zip(SIDES, halves, strict=True))
    return rows[np.concatenate([of_side[condition.side] for condition in CONDITIONS.values()], axis=1).ravel()]


def answer_matrix(rows: pd.DataFrame, study_ids: Iterable[int]) -> np.ndarray:
    """Natural probabilities (n, 25, 3) in COLUMNS order from a prediction table, NaN where it has no row."""
    wanted = [row for study in study_ids for row in study_row_ids(study)]
    natural = rows.set_index("row_id")[list(SEVERITIES)].reindex(wanted)
    return natural.to_numpy(dtype=float).reshape(-1, len(COLUMNS), len(SEVERITIES))


def predict_studies(
    models: list[nn.Module], studies: Studies, points: pd.DataFrame,
    n_views: int = 1, see: Callable = study_input, views: Callable = prediction_views,
) -> pd.DataFrame:  # fmt: skip
    """The prediction table of studies (id, stacks) by the mean of `models`, which share one config.

    points: of all studies, as in `crop_centres`. A study without a canal point or a series has no rows, nor has a place
    that no slice shows. Studies are read, cut and released one by one.
    """
    config, tables = models[0].config, [prediction_rows([], np.zeros((0, len(COLUMNS), len(SEVERITIES))))]
    for study_id, seen in seen_studies(studies, points, config, see):
        natural = probabilities(models, seen[None], n_views, views=views)
        tables.append(shown_rows([study_id], natural, seen[None], config))
    return pd.concat(tables, ignore_index=True)
