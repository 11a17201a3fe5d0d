"""Discs named from below: a chain of candidates chosen together, and the probability of that choice.

A choice gives each disc of `STATES` one candidate or none. Its weight is the product of the evidence and of how likely
the steps between neighbours are; the sum over all choices is computed exactly, as the best one is (forward algorithm
and Viterbi, see Rabiner 1989, A tutorial on hidden Markov models). Evidence tells only the lumbosacral disc and S1/S2
from other discs, so a name is a count from below. Coordinates are LPS mm.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import logsumexp

from lsdc_utils.vocabulary import LEVELS

STATES = ("t11_t12", "t12_l1", *LEVELS, "s1_s2")
LUMBAR = slice(STATES.index(LEVELS[0]), STATES.index(LEVELS[-1]) + 1)
STEPS = np.array([0.86, 0.93, 1.0, 1.02, 1.0, 0.92, 0.8])  # from state to state, against the study's own mean step
STEP_SPREAD = 0.13  # of a step, as a share of it
SCALES = np.arange(22.0, 47.0, 2.0)  # mm: mean steps that a study may have
UNIT = 5.0  # mm in which likelihoods of steps are densities, against those of discs that are missed
LEAST_STEP = 8.0  # mm of height: the next disc lies at least this far below
SAME_PLACE = 4.0  # mm: spread of the kernel by which detections support each other
SAME_LEVEL = 15.0  # mm, under half a step: candidates this close to a place are of its level
NOTHING = 1e-3  # evidence that counts as none
SHARPNESS = 3.0  # power of the evidence: at 1, weak candidates slip in between discs rather than that one is missed
MISSED = np.array([0.3, 0.3, *[0.02] * len(LEVELS), 0.3])  # how likely each disc has no candidate, or is not imaged
NO_CANDIDATE = np.log(MISSED * NOTHING)  # log weight of each disc without a candidate
CLEAR = 0.1  # support from which a candidate between two chosen ones costs weight
LEAST_SUPPORT = 0.01  # of detections together, below which they are clutter
SAME_DISC = 8.0  # mm: spread of the kernel by which a candidate explains detections
MOST, FEW = 2000, 40  # detections that count, the strongest ones, which bounds memory; candidates
SURE = 0.8  # level confidence below which a study's levels are to be checked
TEMPERATURES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # among which `calibrate` chooses
CEILINGS = (0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.985, 0.99, 0.995)  # likewise


@dataclass(frozen=True)
class Chain:
    """Candidates for the discs and the log weights of their choices."""

    index: np.ndarray  # (k,) which detections are the candidates
    plane: np.ndarray  # (k, 2) their y and z, mm
    gain: np.ndarray  # (k, 8) log evidence of each for each disc
    move: np.ndarray  # (8, 8, k, k) log weight of going from disc to disc, and from candidate to candidate

    def weight(self) -> float:
        """Log weight of the best choice."""
        return self._ends(self._forward(self.gain, 1.0, np.max), 1.0).max(initial=-np.inf)

    def best(self) -> np.ndarray:
        """The choice of greatest weight: (8,) indices into the candidates, -1 for a disc without one."""
        totals = self._forward(self.gain, 1.0, np.max)
        ends = self._ends(totals, 1.0)
        chosen = np.full(len(STATES), -1)
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
        """Probability of all choices that agree with `places` (5, 2), y and z of the lumbar levels in mm or NaN: each
        has a candidate within `SAME_LEVEL` of its place, or none; without any of them a choice confirms nothing."""
        with np.errstate(invalid="ignore"):
            agrees = np.linalg.norm(self.plane[:, None] - places[None], axis=2) <= SAME_LEVEL
        gain = self.gain.copy()
        gain[:, LUMBAR] = np.where(agrees, gain[:, LUMBAR], -np.inf)
        without = gain.copy()
        without[:, LUMBAR] = -np.inf
        sums = np.array([self._log_sum(some, temperature) for some in (gain, without, self.gain)])
        return float(np.exp(sums[0] - sums[2]) - np.exp(sums[1] - sums[2]))

    def _log_sum(self, gain: np.ndarray, temperature: float) -> float:
        ends = self._ends(self._forward(gain, temperature, logsumexp), temperature)
        return float(logsumexp(np.append(ends, NO_CANDIDATE.sum() / temperature)))

    def _ends(self, totals: list[np.ndarray], temperature: float) -> np.ndarray:
        """Log weights (8, k) of choices whose last disc is this one, at this candidate."""
        return np.stack([total + NO_CANDIDATE[i + 1 :].sum() / temperature for i, total in enumerate(totals)])

    def _forward(self, gain: np.ndarray, temperature: float, reduce: Callable) -> list[np.ndarray]:
        """For each level and candidate (k,) the maximum or sum over all choices of the levels above it."""
        totals: list[np.ndarray] = []
        for level in range(len(STATES)):
            arrivals = self._arrivals(totals, temperature, level)
            totals.append(gain[:, level] / temperature + reduce(arrivals, axis=0))
        return totals

    def _arrivals(self, totals: list, temperature: float, level: int) -> np.ndarray:
        """Log weights (1 + level * k, k) of reaching a level: as the first one, or from each candidate above it."""
        rows = [np.full((1, len(self.index)), NO_CANDIDATE[:level].sum() / temperature)]
        for above in range(level):
            move = self.move[above, level] + NO_CANDIDATE[above + 1 : level].sum()
            rows.append(totals[above][:, None] + move / temperature)
        return np.concatenate(rows)


def chain(points: np.ndarray, evidence: np.ndarray) -> Chain:
    """The candidates among detections at points (m, 3), with their evidence (m, 8) for each disc.

    Steps are likely by the mean step, among `SCALES`, at which the best choice has the greatest weight.
    """
    index, support = _candidates(points, evidence)
    plane, gain = points[index, 1:], SHARPNESS * np.log(support + NOTHING)
    step, down = np.linalg.norm(plane[:, None] - plane[None], axis=2), plane[:, None, 1] - plane[None, :, 1]
    lost, z = SHARPNESS * np.log(np.maximum(support.max(axis=1, initial=0) / CLEAR, 1)), plane[:, 1]
    passed = (lost * (z[:, None, None] > z) * (z > z[None, :, None])).sum(axis=2)  # between two candidates
    place = np.concatenate([[0], np.cumsum(STEPS)])
    chains = []
    above, below = np.triu_indices(len(STATES), 1)
    discs, gaps = (values[:, None, None] for values in (below - above, place[below] - place[above]))
    for scale in SCALES:
        move, wide = np.full((len(STATES), len(STATES), *step.shape), -np.inf), STEP_SPREAD * scale * np.sqrt(discs)
        likely = -0.5 * ((step - scale * gaps) / wide) ** 2 - np.log(wide / UNIT)
        move[above, below] = np.where(down >= LEAST_STEP * discs, likely - passed, -np.inf)
        chains.append(Chain(index, plane, gain, move))
    return max(chains, key=lambda one: one.weight())


def _candidates(points: np.ndarray, evidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which detections (k,) are candidates, best first, and their support (k, 8).

    Detections close to each other in the sagittal plane support each other. A detection supports one candidate only;
    otherwise a disc with spread detections would count twice.
    """
    kept = np.sort(np.argsort(-evidence.max(axis=1), kind="stable")[:MOST])
    plane, rest = points[kept, 1:], evidence[kept].astype(float)
    near = cdist(plane, plane, "sqeuclidean")
    near *= -0.5 / SAME_PLACE**2
    np.exp(near, out=near)  # in place: of 2000 detections it has 32 MB
    support, index, supports = near @ rest, [], []
    while len(index) < FEW and support.max(initial=0) >= LEAST_SUPPORT:
        index.append(int(support.max(axis=1).argmax()))
        supports.append(support[index[-1]].copy())
        apart = np.linalg.norm(plane - plane[index[-1]], axis=1)
        here = np.flatnonzero(apart < 3 * SAME_DISC)
        explained = rest[here] * np.exp(-0.5 * (apart[here] / SAME_DISC) ** 2)[:, None]
        rest[here] -= explained
        support -= near[here].T @ explained
    return kept[np.array(index, dtype=int)], np.reshape(supports, (-1, len(STATES)))


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
