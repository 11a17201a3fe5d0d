"""Grades of the phantom: a latent narrowing for each of the 25 columns, and the label a reader gives it.

The narrowing of column c is u = Phi(a_c + b_c z_c), z a vector of 25 correlated normal numbers. A reader sees u with an
error and grades it against two cut-offs, the same for every level and side. A few labels are gross errors: the reader's
grade of a neighbouring level, of the other side, or one two steps off. `a_c`, `b_c` and the correlation of z are solved
so that labels, after all errors, have the real prevalences and Spearman correlations (`facts.json`).
"""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import numpy as np
from scipy.linalg import block_diag
from scipy.optimize import root
from scipy.special import ndtr, ndtri

from lsdc_utils.vocabulary import COLUMNS, CONDITIONS, LEVELS, mirrored

COLUMN_GROUPS = np.array([c.group for c in CONDITIONS.values() for _ in LEVELS])  # nfn, scs or ss of each column

# Narrowing at which an error-free reader turns from normal/mild to moderate and from moderate to severe.
CUTS = {"scs": (0.50, 0.70), "nfn": (0.45, 0.70), "ss": (0.45, 0.65)}
# Standard deviation of a reader's error in narrowing: it leaves the oracle near the competition's best scores.
NOISE = {"scs": 0.103, "nfn": 0.110, "ss": 0.117}
SHARED = 0.6  # share of the error's variance that one reader carries through all columns of a study: strict or lenient
GROSS = 0.01  # share of labels that are gross errors (assumed); about a third of them change the grade
# Shares of the kinds (assumed); where one cannot occur, the others take its share. Were more labels two steps off, they
# alone would make more severe left foramina at L1/L2 than are real (2 of 1,975).
GROSS_KINDS = {"level": 0.60, "side": 0.35, "two steps": 0.05}
TWO_STEPS = np.array([[2, 0, 0], [2, 2, 0]])  # what grades 0, 1, 2 turn into: either row in half of the cases
SMALLEST_EIGENVALUE = 1e-3  # of the latent correlation: kept off 0 so that its Cholesky factor is stable
TOLERATED = 0.02  # error of a label correlation that is left as it is

_GRID = np.linspace(-5.0, 5.0, 101)  # nodes for expectations over a standard normal latent
_CUTS = np.array([CUTS[g] for g in COLUMN_GROUPS])  # (25, 2)
_NOISE = np.array([NOISE[g] for g in COLUMN_GROUPS])  # (25,)


def _sources() -> np.ndarray:
    """Chance (25, 27) of where a label comes from: the reader's own grade of a column (25), or `TWO_STEPS` (2)."""
    beside = np.kron(np.eye(len(CONDITIONS)), np.eye(len(LEVELS), k=1) + np.eye(len(LEVELS), k=-1))
    across = np.kron([[a != b == mirrored(a) for b in CONDITIONS] for a in CONDITIONS], np.eye(len(LEVELS)))
    of_level, of_side, of_steps = GROSS_KINDS.values()
    others = of_level * beside / beside.sum(axis=1, keepdims=True) + of_side * across
    gross = np.hstack([others, np.full((len(COLUMNS), 2), of_steps / 2)])
    return GROSS * gross / gross.sum(axis=1, keepdims=True) + (1 - GROSS) * np.eye(*gross.shape)


_SOURCES = _sources()
# Matrix (75, 75): probabilities of a study's own grades, three for each column, to those of its labels
_MIXTURE = np.kron(_SOURCES[:, : len(COLUMNS)], np.eye(3)) + sum(
    np.kron(np.diag(chance), np.eye(3)[steps].T) for chance, steps in zip(_SOURCES.T[-2:], TWO_STEPS, strict=True)
)


@dataclass(frozen=True)
class Grades:
    """Grades of n studies, columns as `COLUMNS`: narrowing (n, 25), labels (n, 25) in {0, 1, 2}, oracle (n, 25, 3).

    own (n, 25): the reader's grades without gross errors; gross (n, 25): the error's kind in `GROSS_KINDS`, or ''."""

    narrowing: np.ndarray
    labels: np.ndarray
    own: np.ndarray
    gross: np.ndarray
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
    return Grades(narrowing, *_read(narrowing, reader_rng), oracle(narrowing))


def read(narrowing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Labels (n, 25) of one reader for studies with this narrowing (n, 25); a second call is a second reader."""
    return _read(narrowing, rng)[0]


def _read(narrowing: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, own and gross of `Grades`. A study's numbers are drawn together, so that longer draws begin alike."""
    columns, (of_level, of_side, of_steps) = np.arange(len(COLUMNS)), GROSS_KINDS
    draws = rng.standard_normal((len(narrowing), 1 + 2 * len(columns)))
    shared, private, chance = np.split(draws, [1, 1 + len(columns)], axis=1)
    error = np.sqrt(SHARED) * shared + np.sqrt(1 - SHARED) * private
    own = ((narrowing + _NOISE * error)[..., None] > _CUTS).sum(axis=-1)
    source = (ndtr(chance)[..., None] > np.cumsum(_SOURCES, axis=1)[:, :-1]).sum(axis=-1)
    steps = source - len(columns)  # row of TWO_STEPS; negative where there is none
    told = np.take_along_axis(own, np.where(steps < 0, source, columns), axis=1)
    same, beside = source == columns, source // len(LEVELS) == columns // len(LEVELS)
    gross = np.select([same, steps >= 0, beside], ["", of_steps, of_level], of_side)
    return np.where(steps < 0, told, TWO_STEPS[steps.clip(0), told]), own, gross


def oracle(narrowing: np.ndarray) -> np.ndarray:
    """Natural probability (..., 25, 3) of each label given all narrowings of its study (..., 25): the best that any
    model can know of a row. Exact: a mixture of the reader's own grades there, beside, across and two steps off."""
    own = _own_odds(narrowing, _NOISE)
    return (own.reshape(*narrowing.shape[:-1], len(_MIXTURE)) @ _MIXTURE.T).reshape(own.shape)


def _own_odds(narrowing: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Probability (..., 25, 3) of a reader's own grades for narrowings (..., 25) seen with noise (25,)."""
    exceeds = ndtr((narrowing[..., None] - _CUTS) / noise[:, None])
    return -np.diff(exceeds, axis=-1, prepend=1.0, append=0.0)


@functools.cache
def latent_model() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Offset a (25,), slope b (25,) and correlation (25, 25) of the latent; rounded, so that threads cannot matter."""
    own = np.linalg.solve(_MIXTURE, real_prevalence().ravel()).reshape(-1, 3)  # shares of own grades
    offset, slope = np.array([_solve_column(c, own[c]) for c in range(len(COLUMNS))]).T
    spearman, steps = _label_spearman(offset, slope, own)
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
    current, correction = matrix, np.zeros_like(matrix)
    for _ in range(200):
        before, current = current, _lift_eigenvalues(current - correction)
        correction += current - before
        np.fill_diagonal(current, 1.0)
    current = _lift_eigenvalues(current)
    scale = np.sqrt(np.diag(current))
    return current / np.outer(scale, scale)


def _lift_eigenvalues(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.maximum(values, SMALLEST_EIGENVALUE)) @ vectors.T


def _solve_column(column: int, prevalence: np.ndarray) -> tuple[float, float]:
    """Offset and slope of one column: two unknowns for two of the shares (3,) of its own grades."""
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


def _label_spearman(offset: np.ndarray, slope: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spearman correlation (steps, 25, 25) of labels for each correlation (steps,) that latents may have, by expected
    mid-ranks over a grid of latents and of the reader's shared error. own: shares (25, 3) of own grades. What gross
    errors bring in from other columns is taken as correlated alike, which moves none by more than 0.01."""
    prevalence = real_prevalence()
    ranks = np.cumsum(prevalence, axis=1) - prevalence / 2 - 0.5  # mid-ranks of the three labels, as a share of studies
    ranks /= np.sqrt((prevalence * ranks**2).sum(axis=1, keepdims=True))
    rank = block_diag(*ranks) @ _MIXTURE  # (25, 75): a label's expected rank by own grades
    shared, shares = np.polynomial.hermite_e.hermegauss(9)
    seen = ndtr(offset + slope * _GRID[:, None]) + np.sqrt(SHARED) * _NOISE * shared[:, None, None]
    odds = _own_odds(seen, np.sqrt(1 - SHARED) * _NOISE).reshape(*seen.shape[:2], -1)  # (shared, grid, 75)
    one_column = np.kron(np.eye(len(own)), np.ones((3, 3))) > 0
    steps = np.linspace(-0.3, 0.995, 60)
    spearman = np.empty((len(steps), len(own), len(own)))
    for s, rho in enumerate(steps):
        weights = np.exp((2 * rho * np.outer(_GRID, _GRID) - _GRID[:, None] ** 2 - _GRID**2) / (2 * (1 - rho**2)))
        weights /= weights.sum()
        together = sum(w * p.T @ weights @ p for w, p in zip(shares / shares.sum(), odds, strict=True))
        spearman[s] = rank @ np.where(one_column, np.diag(own.ravel()), together) @ rank.T
    return spearman, steps
