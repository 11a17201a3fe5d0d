"""Canal points: the level that an axial slice shows, and readers' points that stand in where no canal was clicked."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from lsdc_utils import geometry
from lsdc_utils.data.stacks import Stack
from lsdc_utils.detector.classes import CANAL_FROM_FORAMINA
from lsdc_utils.vocabulary import AXIAL, GROUP_OF, LEVELS, SIDES

AXIAL_REACH = 7.0  # mm off a level's point up to which an axial slice shows that level
RECESS_TO_CANAL = 3.0  # mm to posterior: mean over the training studies of the demo
FEW_PAIRS = 5  # studies; below this a median of labels is worth less than that of other data


def axial_levels(stack: Stack, canal: pd.DataFrame) -> np.ndarray:
    """The level that each slice of an axial series shows, (n,) numbers in LEVELS: that whose canal point (canal: level,
    X, Y, Z of one study) lies nearest to its plane; -1 if none lies within `AXIAL_REACH`. This is the one place
    where axial slices get their level."""
    if canal.empty:
        return np.full(len(stack.pixels), -1)
    distances = np.abs(geometry.plane_distances(stack.affines, canal[["X", "Y", "Z"]].to_numpy(dtype=float)))
    numbers = np.array([LEVELS.index(level) for level in canal["level"]])
    return np.where(distances.min(axis=1) <= AXIAL_REACH, numbers[distances.argmin(axis=1)], -1)


def _points(labels: pd.DataFrame, pairs: str = "nfn") -> tuple[pd.DataFrame, pd.DataFrame]:
    """X, Y, Z by study and level: the clicked canal points, and the middles of levels with both points of `pairs`."""
    placed = labels.dropna(subset=[*"XYZ"])
    group = placed["condition"].map(GROUP_OF)
    canal, sides = (placed[group == key].set_index(["study_id", "level"])[[*"XYZ"]] for key in ("scs", pairs))
    sides = sides.groupby(["study_id", "level"])
    return canal.astype(float), sides.mean()[sides.size() == len(SIDES)].astype(float)


def canal_from_foramina(labels: pd.DataFrame) -> tuple[tuple[float, float], ...]:
    """For each level the median over studies, in mm to posterior and to the head, of the way from the middle of its two
    foramen points to its canal point, by the label table. A level that few studies show this way: by the phantom's."""
    canal, middle = _points(labels)
    way = (canal - middle)[["Y", "Z"]].dropna().groupby("level")
    known = way.median()[way.size() >= FEW_PAIRS].round(2)
    usual = dict(zip(LEVELS, CANAL_FROM_FORAMINA, strict=True))
    return tuple(tuple(known.loc[level].tolist()) if level in known.index else usual[level] for level in LEVELS)


def readers_canal(labels: pd.DataFrame, offsets: Sequence[Sequence[float]]) -> pd.DataFrame:
    """The readers' canal points (study_id, level, X, Y, Z) in a label table of any studies; where none was clicked,
    from a level's two foramen points by the offsets of `canal_from_foramina`."""
    canal, middle = _points(labels)
    middle[["Y", "Z"]] += np.array(offsets)[[LEVELS.index(level) for level in middle.index.get_level_values("level")]]
    return canal.combine_first(middle).reset_index()


def recess_canal(labels: pd.DataFrame) -> pd.DataFrame:
    """Points (study_id, level, X, Y, Z) behind the middle of a level's two recess points. They place windows on axial
    slices where no other point was clicked; patients move, so they are no evidence on sagittal images."""
    return (_points(labels, "ss")[1] + [0.0, RECESS_TO_CANAL, 0.0]).reset_index()


def axial_slices(stacks: Sequence[Stack], canal: pd.DataFrame) -> pd.DataFrame:
    """Every axial slice of a study with its plane and the level that the canal points give it, '' where they give none.

    canal: detected points of the study (level, X, Y, Z). Columns: study_id, series_id, instance_number, level; X, Y, Z,
    a point of the plane, and normal_x, normal_y, normal_z, its unit normal.
    """
    tables, columns = [], (*"XYZ", "normal_x", "normal_y", "normal_z")
    for stack in (stack for stack in stacks if stack.series_type == AXIAL):
        ids = {"study_id": stack.study_id, "series_id": stack.series_id, "instance_number": stack.instance_numbers}
        levels = np.array([*LEVELS, ""])[axial_levels(stack, canal)]  # -1 is the last
        planes = np.hstack([stack.affines[:, :3, 3], geometry.normals(stack.affines)])
        tables.append(pd.DataFrame({**ids, "level": levels, **dict(zip(columns, planes.T, strict=True))}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=["study_id"])
