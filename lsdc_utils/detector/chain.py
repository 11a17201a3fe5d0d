"""The five levels of a spine chosen together from detections, and the probability of that choice.

A choice gives each level one candidate or none. Its weight is the product of the evidence for each level and of how
likely the steps between neighbours are; the sum over all choices is computed exactly, as the best one is (forward
algorithm and Viterbi, see Rabiner 1989, A tutorial on hidden Markov models). Coordinates are LPS mm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import logsumexp

from lsdc_utils.vocabulary import LEVELS

STEP = (35.0, 9.0)  # mm between the centres of neighbouring lumbar discs, mean and spread
LEAST_STEP = 8.0  # mm of height: the next level lies at least this far below
SAME_PLACE = 4.0  # mm: spread of the kernel by which detections support each other
NEAR = 8.0  # mm: detections this close to a level's point are evidence for it
SAME_LEVEL = 15.0  # mm, under half a step: candidates this close to a place are of its level
EXPECTED_SPREAD = 6.0  # mm: how far a level may lie from where it is expected, one sigma
NOTHING = 1e-3  # evidence that counts as none
MISSED = 0.02  # how likely a detector is to have no candidate at all for a level that is there
NO_CANDIDATE = np.full(len(LEVELS), np.log(MISSED * NOTHING))  # log weight of each level without a candidate
CELL = 2.0  # mm: of detections this close one candidate is enough,
FEW = 40  # and the strongest of each level are enough to choose from
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # among which `calibrate` chooses
CEILINGS = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995)  # likewise


@dataclass(frozen=True)
class Chain:
    """Candidates for the five levels and the log weights of their choices."""

    index: np.ndarray  # (k,) which detections are the candidates
    plane: np.ndarray  # (k, 2) their y and z, mm
    gain: np.ndarray  # (k, 5) log evidence of each for each level
    move: np.ndarray  # (5, k, k) log weight of going n levels down from one candidate to another; [0] is not used

    def best(self) -> np.ndarray:
        """The choice of greatest weight: (5,) indices into the candidates, -1 for a level without one."""
        totals = self._forward(self.gain, 1.0, np.max)
        ends = np.stack([total + NO_CANDIDATE[i + 1 :].sum() for i, total in enumerate(totals)])
        chosen = np.full(len(LEVELS), -1)
        if ends.max(initial=-np.inf) <= NO_CANDIDATE.sum():
            return chosen
        level, candidate = np.unravel_index(ends.argmax(), ends.shape)
        while True:
            chosen[level] = candidate
            before = int(self._arrivals(totals, 1.0, level)[:, candidate].argmax())
            if before == 0:
                return chosen
            level, candidate = divmod(before - 1, len(self.index))

    def chance(self, places: np.ndarray, temperature: float) -> float:
        """Probability of all choices that agree with `places` (5, 2), y and z in mm or NaN: each level has a candidate
        within `SAME_LEVEL` of its place, or none."""
        with np.errstate(invalid="ignore"):
            agrees = np.linalg.norm(self.plane[:, None] - places[None], axis=2) <= SAME_LEVEL
        among = self._log_sum(np.where(agrees, self.gain, -np.inf), temperature)
        return float(np.exp(among - self._log_sum(self.gain, temperature)))

    def _log_sum(self, gain: np.ndarray, temperature: float) -> float:
        totals = self._forward(gain, temperature, logsumexp)
        ends = [total + NO_CANDIDATE[i + 1 :].sum() / temperature for i, total in enumerate(totals)]
        return float(logsumexp(np.append(np.concatenate(ends), NO_CANDIDATE.sum() / temperature)))

    def _forward(self, gain: np.ndarray, temperature: float, reduce: Callable) -> list[np.ndarray]:
        """For each level and candidate (k,) the maximum or sum over all choices of the levels above it."""
        totals: list[np.ndarray] = []
        for level in range(len(LEVELS)):
            arrivals = self._arrivals(totals, temperature, level)
            totals.append(gain[:, level] / temperature + reduce(arrivals, axis=0))
        return totals

    def _arrivals(self, totals: list, temperature: float, level: int) -> np.ndarray:
        """Log weights (1 + level * k, k) of reaching a level: as the first one, or from each candidate above it."""
        rows = [np.full((1, len(self.index)), NO_CANDIDATE[:level].sum() / temperature)]
        for above in range(level):
            move = self.move[level - above] + NO_CANDIDATE[above + 1 : level].sum()
            rows.append(totals[above][:, None] + move / temperature)
        return np.concatenate(rows)


def chain(points: np.ndarray, evidence: np.ndarray, expected: pd.DataFrame | None = None) -> Chain:
    """The candidates among detections at points (m, 3), with their evidence (m, 5) for each level.

    Detections close to each other in the sagittal plane support each other; going down the spine, neighbours lie `STEP`
    apart. `expected`: points (index level) near which levels are looked for.
    """
    _, cell = np.unique(np.round(points[:, 1:] / CELL), axis=0, return_inverse=True)
    strongest = []
    for order in np.argsort(-evidence, axis=0, kind="stable").T:
        _, first = np.unique(cell[order], return_index=True)
        strongest.append(order[np.sort(first)[:FEW]])
    index = np.unique(np.concatenate(strongest))
    plane = points[index, 1:]
    apart = np.linalg.norm(plane[:, None] - points[None, :, 1:], axis=2)
    gain = np.log(np.exp(-0.5 * (apart / SAME_PLACE) ** 2) @ evidence + NOTHING)
    for number, level in enumerate(LEVELS if expected is not None else ()):
        if level in expected.index:
            off = np.linalg.norm(plane - expected.loc[level, ["Y", "Z"]].to_numpy(dtype=float), axis=1)
            gain[:, number] -= 0.5 * (off / EXPECTED_SPREAD) ** 2
    step, down = np.linalg.norm(plane[:, None] - plane[None], axis=2), plane[:, None, 1] - plane[None, :, 1]
    count = np.arange(len(LEVELS))[:, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        move = -0.5 * ((step - STEP[0] * count) / (STEP[1] * np.sqrt(count))) ** 2
    return Chain(index, plane, gain, np.where(down >= LEAST_STEP * np.maximum(count, 1), move, -np.inf))


def calibrate(chances: np.ndarray, right: np.ndarray) -> tuple[float, float]:
    """Temperature and ceiling by which ceiling * chance is how often the levels of a study are right.

    chances: (n, len(TEMPERATURES)) `Chain.chance` of the best choice of held-out studies at each temperature; right:
    (n,) bool. Maximum likelihood, with one right and one wrong study added at the ceiling, so that few studies never
    give certainty, and temperatures near 1 preferred.
    """

    def loss(temperature: int, ceiling: float) -> float:
        """Negative log likelihood, with the preferences as priors; temperature: its number."""
        share = np.clip(ceiling * chances[:, temperature], 1e-9, 1 - 1e-9)
        logs = np.log(np.where(right, share, 1 - share)).sum() + np.log(ceiling * (1 - ceiling))
        return 0.5 * np.log(TEMPERATURES[temperature]) ** 2 - logs

    pairs = [(temperature, ceiling) for temperature in range(len(TEMPERATURES)) for ceiling in CEILINGS]
    temperature, ceiling = min(pairs, key=lambda pair: loss(*pair))
    return TEMPERATURES[temperature], ceiling
