"""Greys of the tissues: from relaxation times and the equations of each sequence, or perturbed, or drawn freely.

Relaxation times in ms at 1.5 T and 3 T: muscle, fat (of marrow too) and joint fluid Gold et al., AJR 2004; vertebral
marrow, kidney de Bazelaire et al., Radiology 2004; cord Stanisz et al., Magn Reson Med 2005; CSF Rooney et al., Magn
Reson Med 2007; nucleus and annulus within Perry et al., AJNR 2006. In a turbo spin echo fat has an apparent T2 of 120
to 180 ms (Henkelman et al., J Magn Reson Imaging 1992). Fat's T1 is a tenth below Gold's, so that the usual inversion
times null it. Densities, shares of fat and the times of all other tissues are assumed.
"""

from dataclasses import dataclass

import numpy as np

Array = np.ndarray
SEQUENCES = ("t1", "t2", "t2fs", "stir")  # t2fs: spectral fat suppression
TISSUES = {  # proton density, share of fat; T1 of the water at 1.5 T and 3 T, T2 at 1.5 T and 3 T
    "air": (0.0, 0.0, 1000, 1000, 50, 50),
    "fat": (0.90, 1.0, 1000, 1000, 50, 50),
    "muscle": (0.80, 0.03, 1130, 1420, 35, 32),
    "marrow": (0.75, 0.45, 950, 1080, 50, 48),
    "cortex": (0.20, 0.05, 500, 550, 10, 8),
    "disc": (0.65, 0.0, 950, 1130, 42, 38),
    "nucleus": (0.85, 0.0, 1050, 1250, 120, 110),
    "csf": (1.00, 0.0, 4300, 4300, 2000, 1800),
    "void": (0.14, 0.0, 4300, 4300, 300, 300),
    "cord": (0.80, 0.0, 745, 993, 74, 78),
    "root": (0.78, 0.0, 800, 1000, 62, 60),
    "ligament": (0.40, 0.02, 700, 800, 16, 14),
    "vessel": (0.08, 0.0, 1441, 1932, 290, 275),
    "bowel": (0.75, 0.05, 900, 1100, 55, 50),
    "fluid": (1.00, 0.0, 2850, 3620, 1210, 767),
    "oedema": (0.85, 0.20, 1100, 1300, 95, 90),
    "haemangioma": (0.95, 0.60, 1200, 1400, 120, 110),
    "kidney": (0.85, 0.0, 966, 1142, 87, 76),
}
NAMES = list(TISSUES)
FAT_T1 = (255.0, 335.0)
GREY_LIMITS = {  # of perturbed greys, as shares of the leading tissue (fat on T1, CSF otherwise): grades stay readable
    "t1": {"csf": 0.45, "void": 0.45, "disc": 0.55, "ligament": 0.4, "root": 0.55, "cortex": 0.4, "vessel": 0.4},
    "t2": {"disc": 0.4, "ligament": 0.3, "root": 0.6, "cord": 0.65, "cortex": 0.3, "void": 0.4, "vessel": 0.5},
}


@dataclass(frozen=True)
class Visit:
    """What all series of a patient share. water: (n, 4) density, share of fat, T1 and T2 in the order of NAMES."""

    tesla: float  # 1.5 or 3
    water: Array
    fat: tuple[float, float]  # T1, apparent T2 in ms
    plausible: bool  # greys by physics alone, else perturbed widely
    view: float  # mm of the longer side of sagittal images; series differ up to 1.5-fold
    coil: float  # mm over which the coil's signal falls to 1/e, infinite in a third of scanners
    cut: bool  # the sagittal field may miss the upper levels

    @staticmethod
    def draw(rng: np.random.Generator, cut: bool = False) -> "Visit":
        """Half of all patients in either field strength, and half of each with plausible greys."""
        high, plausible = (rng.random(2) < 0.5).tolist()
        table = np.array(list(TISSUES.values()), float)[:, [0, 1, 2 + high, 4 + high]]
        table *= np.exp(rng.normal(0, [0.05, 0.15, 0.08, 0.08], table.shape))
        table[:, 1] = np.where(table[:, 1] > 0.8, 1, table[:, 1])
        fat = FAT_T1[high] * rng.normal(1, 0.04), rng.uniform(120, 180)
        view, coil = np.exp(rng.uniform(np.log([220, 40]), np.log([343, 320]))).tolist()
        return Visit((1.5, 3.0)[high], table, fat, plausible, view, coil if rng.random() < 2 / 3 else np.inf, cut)


def draw_greys(rng: np.random.Generator, visit: Visit, sequence: str, free: bool = False) -> dict[str, np.float32]:
    """Signal of each tissue as a share of the brightest. free: every grey drawn by itself, order included."""
    if free:
        greys = rng.uniform(0.03, 1, len(NAMES))
        greys[NAMES.index("air")] = 0
    else:
        greys = signal(visit, sequence, *_draw_times(rng, sequence, visit.tesla))
        if sequence != "t1":  # CSF and what floats in it lose signal as they flow
            greys[NAMES.index("csf")] *= rng.uniform(0.75, 0.97)
        greys = greys / greys.max()
        greys = greys if visit.plausible else _perturbed(rng, greys, sequence)
    return dict(zip(NAMES, greys.astype(np.float32), strict=True))


def signal(visit: Visit, sequence: str, tr: float, te: float, ti: float, left: float) -> Array:
    """Signal (n,) of the tissues; times in ms. left: share of the fat's signal after spectral suppression.

    Spin echo: PD (1 - exp(-TR/T1)) exp(-TE/T2); inversion recovery: PD |1 - 2 exp(-TI/T1) + exp(-TR/T1)| exp(-TE/T2)
    (Bernstein et al., Handbook of MRI Pulse Sequences, 2004). Water and fat of a tissue add up before the magnitude.
    """

    def weight(t1: Array | float, t2: Array | float) -> Array | float:
        end = np.exp(-tr / t1)
        return (1 - 2 * np.exp(-ti / t1) + end if sequence == "stir" else 1 - end) * np.exp(-te / t2)

    density, fat, t1, t2 = visit.water.T
    return np.abs(density * ((1 - fat) * weight(t1, t2) + fat * left * weight(*visit.fat)))


def _draw_times(rng: np.random.Generator, sequence: str, tesla: float) -> tuple[float, float, float, float]:
    """TR, TE and TI in ms, and the share of fat's signal that is left."""
    ranges = {"t1": ((450, 8), (750, 15)), "stir": ((3500, 40), (5500, 80))}
    tr, te = rng.uniform(*ranges.get(sequence, ((2800, 80), (5000, 120))))
    ti, left = rng.uniform(*(((140, 0.03), (175, 0.2)) if tesla < 2 else ((190, 0.03), (230, 0.2))))
    return tr, te, ti, left if sequence == "t2fs" else 1.0


def _perturbed(rng: np.random.Generator, greys: Array, sequence: str) -> Array:
    """Greys with another gamma and every tissue moved widely, within GREY_LIMITS."""
    greys = np.minimum(greys ** rng.uniform(0.6, 1.4) * np.exp(rng.normal(0, 0.45, greys.size)), 1)
    greys = dict(zip(NAMES, greys, strict=True))
    lead, limits = ("fat", GREY_LIMITS["t1"]) if sequence == "t1" else ("csf", GREY_LIMITS["t2"])
    greys[lead] = rng.uniform(0.75, 1)
    for tissue, share in limits.items():
        greys[tissue] = min(greys[tissue], share * greys[lead])
    if sequence == "t2":  # fat round a root is what shows it
        greys["fat"] = max(greys["fat"], greys["root"] + 0.2)
    return np.array(list(greys.values()))
