"""The loss: the score's weighted cross entropy, with missing labels left out row by row."""

import numpy as np
import torch
from torch.nn import functional as F

from lsdc_utils.vit.model import COLUMN_GROUP
from lsdc_utils.vocabulary import GROUPS, MISSING, SEVERITY_WEIGHTS


def row_weights(labels: np.ndarray, among: np.ndarray | None = None) -> np.ndarray:
    """Weights float32 (n, 25) by which the mean over studies of (weight * loss).sum(1) is the score's mean over its
    groups of rows that have labels: 1, 2, 4 by the label, normalised in each group; 0 for a missing label. among: the
    labels (m, 25) of all studies, if `labels` are a batch of them."""
    among = labels if among is None else among
    weights, total = (np.where(y == MISSING, 0.0, np.array(SEVERITY_WEIGHTS)[y]) for y in (labels, among))
    columns = [np.array(COLUMN_GROUP) == group for group in GROUPS]
    sums = [total[:, own].sum() for own in columns]
    for own, sum_of_group in zip(columns, sums, strict=True):
        weights[:, own] *= len(among) / max(sum_of_group, 1e-9) / max(np.count_nonzero(sums), 1)
    return weights.astype(np.float32)


def row_losses(log_natural: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy (B, 25) of the weighted rows w_k p_k / sum that the score asks for; a missing label gives a number
    that its weight of 0 removes."""
    weighted = F.log_softmax(log_natural + torch.tensor(SEVERITY_WEIGHTS, device=log_natural.device).log(), dim=-1)
    return -weighted.gather(-1, labels.clamp(min=0).long().unsqueeze(-1)).squeeze(-1)
