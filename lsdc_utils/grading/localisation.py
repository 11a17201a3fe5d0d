"""Distances in LPS mm of detected points to readers' points and, on a phantom, to the true anatomy. `in_plane` leaves
out the direction across the slices: a reader may click on a neighbouring one, 4 mm and more away."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from lsdc_utils.vocabulary import CONDITIONS, GROUP_OF, GROUPS, SPINAL_CANAL, mirrored

NEAR_DISC = 4.0  # mm: an axial slice this close to a disc's plane, at the canal, shows that disc's level
SLICES = "axial slices"  # their name in the column condition
WITHIN = {"within": "distance", "in_plane_within": "in_plane"}  # beginning of a column's name -> distances it counts
SIDE_OF = {name: condition.side or "" for name, condition in CONDITIONS.items()}


def point_errors(points: pd.DataFrame, truth: pd.DataFrame) -> pd.DataFrame:
    """Truth's row_id, severity (if any) and keys, the detected points' confidence, distance, in_plane (sagittal: y, z,
    axial: x, y), both NaN where nothing was detected, and exchanged: whether a point lies nearer to the true point of
    the other side than to its own.

    points: study_id, level, side, X, Y, Z, confidence and, where they are of several detectors, condition (a key of
    GROUPS). truth: study_id, condition, level, X, Y, Z (rows without are left out): the label table, or `true_points`.
    """
    known = truth.dropna(subset=["X", "Y", "Z"]).astype({"condition": str, "level": str})
    known = known.assign(side=known["condition"].map(SIDE_OF), group=known["condition"].map(GROUP_OF))
    keys = ["study_id", "level", "side"] + ["group"] * ("condition" in points)
    both = known.merge(points.rename(columns={"condition": "group"}), on=keys, how="left", suffixes=("", "_detected"))
    others = known.assign(condition=known["condition"].map(mirrored))[["study_id", "condition", "level", *"XYZ"]]
    both = both.merge(others, on=["study_id", "condition", "level"], how="left", suffixes=("", "_other"))
    ends = ("", "_detected", "_other")
    true, detected, other = (both[[f"{axis}{end}" for axis in "XYZ"]].to_numpy(float) for end in ends)
    off, distance = np.abs(detected - true), np.linalg.norm(detected - true, axis=1)
    axial = (both["group"] == "ss").to_numpy()
    in_plane = np.where(axial, np.hypot(off[:, 0], off[:, 1]), np.hypot(off[:, 1], off[:, 2]))
    exchanged = np.linalg.norm(detected - other, axis=1) < distance
    names = ["row_id", "study_id", "condition", "level", "side", "severity", "confidence"]
    return both[[n for n in names if n in both]].assign(distance=distance, in_plane=in_plane, exchanged=exchanged)


def localisation(errors: pd.DataFrame) -> pd.DataFrame:
    """By condition, of `point_errors`: points, share found, median distance, shares within 5 and 10 mm, exchanged."""
    distance, kinds = errors["distance"], {"points": "sum", "found": "mean", "median_mm": "median"}
    counted = errors.assign(points=1, found=distance.notna(), median_mm=distance, sides_exchanged=errors["exchanged"])
    for (name, column), mm in itertools.product(WITHIN.items(), (5, 10)):
        counted[f"{name}_{mm}_mm"], kinds[f"{name}_{mm}_mm"] = errors[column] <= mm, "mean"
    return counted.groupby("condition", as_index=False).agg(kinds | {"sides_exchanged": "sum"})


def true_points(anatomy: pd.DataFrame) -> pd.DataFrame:
    """study_id, condition, level, X, Y, Z of a phantom's anatomy in the series on which each is graded (a mean)."""
    graded_on = anatomy["condition"].map(lambda condition: GROUPS[GROUP_OF[condition]].series_type)
    places = anatomy[anatomy["series_type"] == graded_on]
    return places.groupby(["study_id", "condition", "level"], as_index=False)[list("XYZ")].mean()


def slice_levels(slices: pd.DataFrame, anatomy: pd.DataFrame) -> pd.DataFrame:
    """The slices of `canal.axial_slices` within `NEAR_DISC` of a true disc at the canal, with its true_level."""
    if slices.empty:
        return slices.assign(level="", true_level="")
    canal = anatomy.loc[anatomy["condition"] == SPINAL_CANAL, ["study_id", "series_id", "level", *"XYZ"]]
    both = slices.reset_index(names="slice").merge(canal, on=["study_id", "series_id"], suffixes=("", "_true"))
    way = both[["X_true", "Y_true", "Z_true"]].to_numpy(float) - both[list("XYZ")].to_numpy(float)
    off = np.abs((way * both[["normal_x", "normal_y", "normal_z"]].to_numpy(float)).sum(axis=1))
    near = both.assign(off=off)[off <= NEAR_DISC].sort_values("off", kind="stable").drop_duplicates("slice")
    return near.rename(columns={"level_true": "true_level"}).sort_values("slice")[[*slices.columns, "true_level"]]


def against_anatomy(
    root: Path, studies: Sequence[int], points: pd.DataFrame, slices: pd.DataFrame
) -> pd.DataFrame | None:
    """How well studies were located, against the anatomy in a phantom's folder `root`; None where it has none. Rows:
    for spines all, ordinary and other, each condition as in `localisation`, and the axial slices near a disc: points
    (their number), found (share given any level) and level_right (share given the right one). points: of all detectors,
    with column condition (a key of GROUPS); slices: `canal.axial_slices` of all studies."""
    if not all((root / name).is_file() for name in ("anatomy.csv", "spines.csv")):
        return None
    anatomy, spines = (pd.read_csv(root / name) for name in ("anatomy.csv", "spines.csv"))
    anatomy = anatomy[anatomy["study_id"].isin(studies)]
    ordinary = set(spines.loc[spines["ordinary"], "study_id"])
    errors, near = point_errors(points, true_points(anatomy)), slice_levels(slices, anatomy)
    tables = []
    for name, kinds in (("all", (True, False)), ("ordinary", (True,)), ("other", (False,))):
        table = localisation(errors[errors["study_id"].isin(ordinary).isin(kinds)])
        rows = near[near["study_id"].isin(ordinary).isin(kinds)]
        line = {"condition": SLICES, "points": len(rows), "found": (rows["level"] != "").mean()}
        line["level_right"] = (rows["level"] == rows["true_level"]).mean()
        tables.append(pd.concat([table, pd.DataFrame([line])], ignore_index=True).assign(spines=name))
    joined = pd.concat(tables, ignore_index=True).astype({"points": int, "sides_exchanged": "Int64"})
    return joined[["spines", *joined.columns.drop("spines")]]
