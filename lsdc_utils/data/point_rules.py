"""Rules of where label points lie in the patient: on their side of the canal, levels in order and near each other."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from lsdc_utils import vocabulary as words

MARGIN = 3.0  # mm beyond the canal that a point may lie on the other side: readers and patients move
LEAN = 0.15  # mm more per mm of height to the nearest place where the canal is known: spines lean
MIDDLE_MARGIN = 8.0  # mm, if the canal is only known to be near the middle of the sagittal slices
HALF_PAIR = 4.0  # mm from each of two points to their midpoint; closer pairs do not locate the canal
CANAL_REACH = 20.0  # mm of height over which a known place of the canal counts
LEVEL_APART = 25.0  # mm of height: points of one level lie within 16 on three series, levels 25 to 40 apart


def judge(places: pd.DataFrame, middles: Mapping[int, float]) -> list[str]:
    """The rule that each point breaks, '' if none; the first of side, order of levels, distance of levels. places:
    study_id, series_id, condition, level, X, Y, Z (LPS mm), at most one row per label. middles: patient x of the middle
    of a study's sagittal slices, used if nothing else locates the canal."""
    if places.empty:
        return []
    places = places.reset_index(drop=True)
    rules = _side_rules(places, middles)
    rules[(rules == "") & places.index.isin(_out_of_order(places))] = "levels_out_of_order"
    # far from their level on most of at least two witnesses: the nearest point of another series, or the other side
    pairs = places.reset_index().merge(places, on=["study_id", "level"], suffixes=("", "_other"))
    pairs = pairs[pairs.condition != pairs.condition_other]
    witness = pairs.condition_other.where(pairs.series_id == pairs.series_id_other, pairs.series_id_other.astype(str))
    far = (pairs.Z - pairs.Z_other).abs().groupby([pairs["index"], witness]).min() > LEVEL_APART
    share = far.groupby(level=0).agg(["size", "mean"])
    apart = share.index[(share["size"] >= 2) & (share["mean"] > 0.5)]
    rules[(rules == "") & places.index.isin(apart)] = "level_points_apart"
    return rules.tolist()


def _side_rules(places: pd.DataFrame, middles: Mapping[int, float]) -> pd.Series:
    """The rule that each point on the wrong side of the canal breaks, otherwise ''; a swapped pair does by itself."""
    conditions = places.condition.map(words.CONDITIONS)
    discs = places.assign(group=[c.group for c in conditions], side=[c.side or "canal" for c in conditions])
    keys = ["study_id", "group", "level"]
    sides = discs.pivot(index=keys, columns="side", values="X").reindex(columns=["left", "right", "canal"])
    left, right = sides.left, sides.right
    wide = (left - right).abs() > 2 * HALF_PAIR
    sides["known"] = sides.canal.fillna(((left + right) / 2).where(wide))
    sides["z"] = discs.groupby(keys).Z.mean()
    located = [row for study, part in sides.groupby("study_id") for row in _canal(part, middles.get(study, np.nan))]
    canal, margin = np.array(located).reshape(-1, 2).T
    pair = left.notna() & right.notna()
    both_left = pair & (np.minimum(left, right) - canal > margin)
    both_right = pair & (np.maximum(left, right) - canal < -margin)
    swapped = left - right < -2 * MARGIN
    twice = np.stack([both_right, both_left], axis=1)
    wrong = [swapped | ~pair & (left - canal < -margin), swapped | ~pair & (right - canal > margin)]
    wrong = np.stack(wrong, axis=1) & ~twice.any(axis=1, keepdims=True)
    rules = np.select([twice, wrong], ["one_side_twice", "point_on_wrong_side"], "")
    rules = pd.DataFrame(rules, sides.index, pd.Index(words.SIDES, name="side")).stack().rename("rule").reset_index()
    return discs.merge(rules, "left", [*keys, "side"])["rule"].fillna("")


def _canal(discs: pd.DataFrame, middle: float) -> list[tuple[float, float]]:
    """x of the canal at a study's discs, by the median of the others (NaN: none), and how far points may lie beyond."""
    heights, xs = discs.z.to_numpy(), discs.known.to_numpy()
    rows = []
    for disc, height in enumerate(heights):
        others = [k for k in np.argsort(xs) if k != disc and np.isfinite(xs[k])]
        if not others:
            rows.append((middle, MIDDLE_MARGIN))
            continue
        off = (heights[others] - height) / CANAL_REACH
        share = np.cumsum(np.exp(-(off**2 - (off**2).min()) / 2))
        nearest = np.searchsorted(share, share[-1] * np.array([0.5 - 1e-9, 0.5 + 1e-9]))
        rows.append((xs[others][nearest].mean(), MARGIN + LEAN * CANAL_REACH * np.abs(off).min()))
    return rows


def _out_of_order(places: pd.DataFrame) -> list[int]:
    """The points, most contradicting first, without which the levels of each study and condition are in order."""
    removed = []
    for _, left in places.sort_values("level").groupby(["study_id", "condition"]).Z:
        while len(left) > 1:
            wrong = np.triu(left.to_numpy()[:, None] <= left.to_numpy(), 1)
            counts = wrong.sum(axis=0) + wrong.sum(axis=1)
            worst = (counts > 0) & (counts == counts.max())
            if not worst.any():
                break
            removed += left.index[worst].tolist()
            left = left[~worst]
    return removed
