"""The loss: the score's weighted cross entropy with a target for each row; missing labels are left out row by row."""

import numpy as np
import torch
from torch.nn import functional as F

from lsdc_utils.vit.model import COLUMN_GROUP
from lsdc_utils.vocabulary import GROUPS, MISSING, SEVERITIES, SEVERITY_WEIGHTS


def target_matrix(labels: np.ndarray, answers: np.ndarray | None = None, share: float = 0.0) -> np.ndarray:
    """What training aims at, float32 (n, 25, 3): 1 at the label of `labels` (n, 25), or 1 - share there and `share` of
    the natural probabilities `answers` (n, 25, 3), NaN where there are none; 0 for a missing label."""
    hard = np.eye(len(SEVERITIES), dtype=np.float32)[np.maximum(labels, 0)]
    answers = hard if answers is None else np.where(np.isnan(answers), hard, answers)
    return ((hard + share * (answers - hard)) * (labels != MISSING)[..., None]).astype(np.float32)


def target_grades(targets: np.ndarray) -> np.ndarray:
    """The severity (n, 25) that has most of each target, -1 where the label is missing."""
    return np.where(targets.any(axis=-1), targets.argmax(axis=-1), MISSING)


def row_weights(targets: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Weights float32 (n, 25, 3) of the severities of each row, by which the mean over studies of `row_losses`.sum(1)
    is the score's mean over its groups of rows that have labels: 1, 2, 4 times the target, normalised in each group; 0
    for a missing label. among: the targets (m, 25, 3) of all studies, if `targets` are a batch of them.

    A softened or mixed row adds the expected loss under its target, so the best weighted row stays w_k p_k. If its
    label weighed it instead, the best one would move towards p_k, which hides severe grades.
    """
    among = targets if among is None else among
    weights, total = (rows * np.array(SEVERITY_WEIGHTS, dtype=float) for rows in (targets, among))
    columns = [np.array(COLUMN_GROUP) == group for group in GROUPS]
    sums = [total[:, own].sum() for own in columns]
    for own, sum_of_group in zip(columns, sums, strict=True):
        weights[:, own] *= len(among) / max(sum_of_group, 1e-9) / max(np.count_nonzero(sums), 1)
    return weights.astype(np.float32)


def row_losses(log_natural: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Cross entropy (B, 25) of the weighted rows w_k p_k / sum that the score asks for, under `row_weights`."""
    weighted = F.log_softmax(log_natural + torch.tensor(SEVERITY_WEIGHTS, device=log_natural.device).log(), dim=-1)
    return -(weights * weighted.masked_fill(weights == 0, 0)).sum(dim=-1)
