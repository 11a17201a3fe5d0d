"""Grades of the phantom: a latent narrowing for each of the 25 columns, and the label a reader gives it.

The narrowing of column c is u = Phi(a_c + b_c z_c), z a vector of 25 correlated normal numbers. A reader sees u with an
error and grades it against two cut-offs, the same for every level and side. `a_c`, `b_c` and the correlation of z are
solved so that labels, after that error, have the real prevalences and Spearman correlations (`facts.json`).
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from scipy.optimize import root
from scipy.special import ndtr, ndtri

from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVELS

COLUMN_GROUPS = np.array([c.group for c in CONDITIONS.values() for _ in LEVELS])  # nfn, scs or ss of each column

# Narrowing at which an error-free reader turns from normal/mild to moderate and from moderate to severe.
CUTS = {"scs": (0.50, 0.70), "nfn": (0.45, 0.70), "ss": (0.45, 0.65)}
# Standard deviation of a reader's error in narrowing: it leaves the oracle near the competition's best scores.
NOISE = {"scs": 0.112, "nfn": 0.116, "ss": 0.121}
SHARED = 0.6  # share of the error's variance that one reader carries through all columns of a study: strict or lenient
SMALLEST_EIGENVALUE = 1e-3  # of the latent correlation: kept off 0 so that its Cholesky factor is stable
TOLERATED = 0.02  # error of a label correlation that is left as it is

_GRID = np.linspace(-5.0, 5.0, 201)  # nodes for expectations over a standard normal latent
_CUTS = np.array([CUTS[g] for g in COLUMN_GROUPS])  # (25, 2)
_NOISE = np.array([NOISE[g] for g in COLUMN_GROUPS])  # (25,)


@dataclass(frozen=True)
class Grades:
    """Grades of n studies, columns as `COLUMNS`: narrowing (n, 25), labels (n, 25) in {0, 1, 2}, oracle (n, 25, 3)."""

    narrowing: np.ndarray
    labels: np.ndarray
    oracle: np.ndarray


@functools.cache
def real_facts() -> dict:
    """Aggregate facts of the real training set, stored in `facts.json`."""
    return json.loads(resources.files(__package__).joinpath("facts.json").read_text())


def real_prevalence() -> np.ndarray:
    """Share (25, 3) of normal/mild, moderate and severe among the labels of each real column."""
    counts = np.array([real_facts()["label_counts"][column][:3] for column in COLUMNS], dtype=float)
    return counts / counts.sum(axis=1, keepdims=True)


def draw_grades(n: int, seed: int | Sequence[int]) -> Grades:
    """Draw the grades of `n` studies. The first m rows of a longer draw are the draw of m with the same seed."""
    offset, slope, correlation = latent_model()
    latent_rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
    z = latent_rng.standard_normal((n, len(COLUMNS))) @ np.linalg.cholesky(correlation).T
    return grade(np.round(ndtr(offset + slope * z), 6), seed)  # rounded: a product's last bits cannot matter


def grade(narrowing: np.ndarray, seed: int | Sequence[int]) -> Grades:
    """The grades of studies with this narrowing (n, 25), read as by `draw_grades` with this seed."""
    reader_rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(2)[1])
    return Grades(narrowing, read(narrowing, reader_rng), oracle(narrowing))


def read(narrowing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels (n, 25) of one reader for studies with this narrowing (n, 25); a second call is a second reader."""
    error = rng.standard_normal((len(narrowing), 1 + len(COLUMNS)))
    error = np.sqrt(SHARED) * error[:, :1] + np.sqrt(1 - SHARED) * error[:, 1:]
    return ((narrowing + _NOISE * error)[..., None] > _CUTS).sum(axis=-1)


def oracle(narrowing: np.ndarray) -> np.ndarray:
    """Natural probability (n, 25, 3) of each label given the narrowing (n, 25): the best that any model can know."""
    exceeds = ndtr((narrowing[..., None] - _CUTS) / _NOISE[:, None])
    return np.stack([1 - exceeds[..., 0], exceeds[..., 0] - exceeds[..., 1], exceeds[..., 1]], axis=-1)


@functools.cache
def latent_model() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset a (25,), slope b (25,) and correlation (25, 25) of the latent; rounded, so that threads cannot matter."""
    offset, slope = np.array([_solve_column(c) for c in range(len(COLUMNS))]).T
    spearman, steps = _label_spearman(offset, slope)
    wanted = np.array(real_facts()["label_spearman"])
    pairs = list(zip(*np.tril_indices(len(COLUMNS), -1), strict=True))
    latent = np.eye(len(COLUMNS))
    for i, j in pairs:
        latent[i, j] = latent[j, i] = np.interp(wanted[i, j], spearman[:, i, j], steps)
    target = latent.copy()
    for _ in range(4):  # the nearest matrix is far off for few pairs only: correct these, the others have room
        nearest = nearest_correlation(target)
        for i, j in pairs:
            if abs(np.interp(nearest[i, j], steps, spearman[:, i, j]) - wanted[i, j]) > TOLERATED:
                target[i, j] = target[j, i] = target[i, j] + latent[i, j] - nearest[i, j]
    return offset.round(6), slope.round(6), nearest_correlation(target).round(6)


def nearest_correlation(matrix: np.ndarray) -> np.ndarray:
    """Nearest positive-definite correlation matrix (Higham, IMA J. Numer. Anal. 22, 2002: alternating projections)."""
    current, correction = matrix.copy(), np.zeros_like(matrix)
    for _ in range(200):
        projected = _lift_eigenvalues(current - correction)
        correction = projected - (current - correction)
        current = projected.copy()
        np.fill_diagonal(current, 1.0)
    current = _lift_eigenvalues(current)
    scale = np.sqrt(np.diag(current))
    return current / np.outer(scale, scale)


def _lift_eigenvalues(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, SMALLEST_EIGENVALUE)) @ vectors.T


def _solve_column(column: int) -> tuple[float, float]:
    """Offset and slope of one column: two unknowns for two shares, moderate or worse and severe."""
    prevalence = real_prevalence()[column]
    wanted = ndtri([prevalence[1] + prevalence[2], prevalence[2]])
    weights = np.exp(-(_GRID**2) / 2)
    weights /= weights.sum()

    def miss(unknown: np.ndarray) -> np.ndarray:
        narrowing = ndtr(unknown[0] + np.exp(unknown[1]) * _GRID)
        exceeds = ndtr((narrowing - _CUTS[column][:, None]) / _NOISE[column])
        return ndtri(np.clip(exceeds @ weights, 1e-9, 1 - 1e-9)) - wanted

    solved = root(miss, [-1.0, np.log(0.5)])
    if not solved.success:
        raise ValueError(f"no latent gives the prevalence of {COLUMNS[column]}: cut-offs or reader noise too wide")
    return solved.x[0], np.exp(solved.x[1])


def _label_spearman(offset: np.ndarray, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spearman correlation (steps, 25, 25) of labels for each correlation (steps,) that latents may have, by expected
    mid-ranks over a grid of latents and of the reader's shared error."""
    prevalence = real_prevalence()
    ranks = np.cumsum(prevalence, axis=1) - prevalence / 2  # mid-ranks of the three labels, as a share of the studies
    mean = (ranks * prevalence).sum(axis=1)
    sd = np.sqrt((prevalence * (ranks - mean[:, None]) ** 2).sum(axis=1))
    shared, shares = np.polynomial.hermite_e.hermegauss(9)
    shares /= shares.sum()
    narrowing = ndtr(offset[:, None] + slope[:, None] * _GRID)
    read_as = narrowing[..., None] + np.sqrt(SHARED) * _NOISE[:, None, None] * shared  # (25, grid, shared)
    own = np.sqrt(1 - SHARED) * _NOISE[:, None, None]
    rank = ranks[:, 0, None, None] + sum(
        np.diff(ranks)[:, k, None, None] * ndtr((read_as - _CUTS[:, k, None, None]) / own) for k in (0, 1)
    )
    steps = np.linspace(-0.3, 0.995, 60)
    spearman = np.empty((len(steps), len(offset), len(offset)))
    for s, rho in enumerate(steps):
        weights = np.exp((2 * rho * np.outer(_GRID, _GRID) - _GRID[:, None] ** 2 - _GRID**2) / (2 * (1 - rho**2)))
        weights /= weights.sum()
        together = sum(w * rank[:, :, k] @ weights @ rank[:, :, k].T for k, w in enumerate(shares))
        spearman[s] = (together - np.outer(mean, mean)) / np.outer(sd, sd)
    return spearman, steps
