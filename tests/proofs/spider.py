"""Localisation on real scans that anyone can get: `python tests/proofs/spider.py DIR [--run RUN]`.

DIR holds images/ and masks/ of SPIDER (van der Graaf et al., Scientific Data 2024; CC BY 4.0, see docs/real-data.md).
Its masks number the discs from below (201 is L5/S1) and mark the spinal canal (100). Each series is graded alone, as a
study of its own, by the ready-made models or by a finished run. The canal point of a level is on the right disc if the
true point nearest to it in the sagittal plane is that of its level. Printed per kind of series: counts, and
shares with 95 % intervals (patients resampled). A point that was not found counts as wrong. Nothing is trained.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.spatial import cKDTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from lsdc_utils.data import competition  # noqa: E402
from lsdc_utils.files import git_commit  # noqa: E402
from lsdc_utils.grading.grade import grade_studies, load_models  # noqa: E402
from lsdc_utils.grading.run_tables import read_recipe  # noqa: E402
from lsdc_utils.phantom.files import write_slice  # noqa: E402
from lsdc_utils.vocabulary import LEVELS, T1, T2  # noqa: E402

CANAL, LOWEST_DISC = 100, 201  # labels of the masks
KINDS = {"t1": T1, "t2": T2, "t2_SPACE": T2}  # how the names of SPIDER's files end -> series type
SLAB = 3.0  # mm along the canal to either side of a disc's back edge, over which the canal's middle is taken
SHARES = ("right_disc", "within_10_mm", "within_5_mm")
DRAWS = 2000
LOGGED = {  # column of the log -> of the table
    "right_disc_points": "right_disc",
    "right_disc_series": "all_right_disc",
    "within_10_mm_points": "within_10_mm",
    "within_10_mm_series": "all_within_10_mm",
    "within_5_mm_points": "within_5_mm",
}


def read_mha(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (slices, rows, columns) of a MetaImage: slices towards the left, rows towards the feet, columns towards
    the back; and the affine (4, 4) from (column, row, slice, 1) to LPS mm."""
    import SimpleITK as sitk  # of requirements-proofs.txt

    image = sitk.DICOMOrient(sitk.ReadImage(str(file)), "PIL")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image), affine


def canal_points(mask: np.ndarray, affine: np.ndarray) -> dict[str, np.ndarray]:
    """The middle of the canal (LPS mm) at each of the five lowest discs that a mask (slices, rows, columns) holds."""

    def places(label: int) -> np.ndarray:
        found = np.argwhere(mask == label)[:, ::-1]
        return found @ affine[:3, :3].T + affine[:3, 3]

    canal, points = places(CANAL), {}
    for number, level in enumerate(reversed(LEVELS)):
        disc = places(LOWEST_DISC + number)
        if not len(disc) or not len(canal):
            continue
        gap = cKDTree(disc).query(canal)[0]
        edge = canal[gap <= gap.min() + 2].mean(axis=0)
        near = canal[np.linalg.norm(canal - edge, axis=1) < 30]
        along = np.linalg.svd(near - near.mean(axis=0), full_matrices=False)[2][0]  # the canal's own direction
        points[level] = near[np.abs((near - edge) @ along) <= SLAB].mean(axis=0)
    return points


def write_study(
    root: Path, study: int, series_type: str, voxels: np.ndarray, affine: np.ndarray
) -> tuple[int, int, str]:
    """Write a volume as a study of one DICOM series; returns its line of test_series_descriptions.csv."""
    folder = root / "test_images" / str(study) / str(series := study * 10)
    folder.mkdir(parents=True)
    low, high = np.percentile(voxels, (0.1, 99.9))
    scaled = np.clip((voxels - low) / max(high - low, 1e-6) * 4000, 0, 4095).astype(np.uint16)
    for number, image in enumerate(scaled, start=1):
        place = affine.copy()
        place[:3, 3] += (number - 1) * affine[:3, 2]
        header = {"SOPInstanceUID": f"1.2.3.{series}.{number}", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"}
        header |= {"StudyInstanceUID": f"1.2.3.{study}", "SeriesInstanceUID": f"1.2.3.{series}"}
        header |= {"Modality": "MR", "SeriesDescription": series_type, "InstanceNumber": str(number)}
        write_slice(folder / f"{number}.dcm", image, place, header)
    return study, series, series_type


def convert(folder: Path, root: Path) -> pd.DataFrame:
    """Write every image of SPIDER that has a mask to `root` in the competition's layout; returns the true points:
    study_id, patient, source (how the file's name ends), level, X, Y, Z (LPS mm)."""
    lines, truth = [], []
    for file in sorted((folder / "images").glob("*.mha")):
        patient, _, source = file.stem.partition("_")
        mask = folder / "masks" / file.name
        if source not in KINDS or not mask.is_file():
            print(f"{file.name} is skipped: no mask, or a name that does not end in {', '.join(KINDS)}")
            continue
        study = int(patient) * 10 + list(KINDS).index(source) + 1
        lines.append(write_study(root, study, KINDS[source], *read_mha(file)))
        truth += [(study, patient, source, level, *point) for level, point in canal_points(*read_mha(mask)).items()]
    if not lines:
        raise SystemExit(
            f"{folder}: no images/<patient>_<{'|'.join(KINDS)}>.mha with a mask of the same name in masks/"
        )
    table = pd.DataFrame(lines, columns=["study_id", "series_id", "series_description"])
    table.to_csv(root / "test_series_descriptions.csv", index=False)
    return pd.DataFrame(truth, columns=["study_id", "patient", "source", "level", *"XYZ"])


def judge(truth: pd.DataFrame, points: pd.DataFrame) -> pd.DataFrame:
    """A line for each true point, with `SHARES` as booleans. points: predicted canal points (study_id, level, Y, Z)."""
    found = points.drop_duplicates(["study_id", "level"]).set_index(["study_id", "level"])[["Y", "Z"]]
    judged = truth.join(found.add_suffix("_found"), on=["study_id", "level"])
    off = np.hypot(judged["Y"] - judged["Y_found"], judged["Z"] - judged["Z_found"])
    for row in judged.itertuples():
        others = truth[truth["study_id"] == row.study_id]
        gaps = np.hypot(others["Y"] - row.Y_found, others["Z"] - row.Z_found)
        judged.loc[row.Index, "right_disc"] = gaps.notna().all() and others.loc[gaps.idxmin(), "level"] == row.level
    judged["right_disc"] = judged["right_disc"].astype(bool)
    return judged.assign(within_10_mm=off <= 10, within_5_mm=off <= 5)


def summarise(judged: pd.DataFrame) -> pd.DataFrame:
    """The table: a row for each source and for all; shares are text with the 95 % interval of `DRAWS` draws of
    patients."""
    studies = judged.groupby(["source", "patient", "study_id"])[list(SHARES[:2])].all().reset_index()
    rows = []
    for source in [*dict.fromkeys(judged["source"]), "all"]:
        of_points, of_studies = (table[(table["source"] == source) | (source == "all")] for table in (judged, studies))
        row = {"source": source, "patients": of_points["patient"].nunique()}
        row |= {"series": len(of_studies), "points": len(of_points)}
        row |= {share: with_interval(of_points, share) for share in SHARES}
        row |= {f"all_{share}": with_interval(of_studies, share) for share in SHARES[:2]}
        rows.append(row)
    return pd.DataFrame(rows)


def with_interval(table: pd.DataFrame, column: str) -> str:
    """A share as text, with its 95 % interval from resampling patients, e.g. `0.967 (0.931 to 0.992)`."""
    counts = table.groupby("patient")[column].agg(["sum", "count"]).to_numpy(float)
    drawn = counts[np.random.default_rng(0).integers(len(counts), size=(DRAWS, len(counts)))].sum(axis=1)
    low, high = np.percentile(drawn[:, 0] / drawn[:, 1], (2.5, 97.5))
    return f"{table[column].mean():.3f} ({low:.3f} to {high:.3f})"


def add_to_log(log: Path, run: Path, table: pd.DataFrame) -> None:
    """Add the table's shares to a log of all times that real scans were judged."""
    lines = pd.DataFrame({"date": time.strftime("%Y-%m-%d", time.gmtime()), "commit": git_commit()[:12],
                          "models": run.name, "series": table["source"], "count": table["series"],
                          "points": table["points"]})  # fmt: skip
    for name, column in LOGGED.items():
        lines[name] = table[column].str.split(n=1).str[0].astype(float)
    lines.to_csv(log, mode="a", header=not log.exists(), index=False)


def main(folder: Path, run: Path, out: Path | None, log: Path | None) -> pd.DataFrame:
    """Convert, grade, judge and print; the table is also written to `out`, and its shares added to `log`."""
    recipe = read_recipe(run)
    chosen = (recipe[key] for key in ("folds", "vit_views", "conditions", "members"))
    models = load_models(run / "weights", *chosen)
    with tempfile.TemporaryDirectory() as root:
        truth = convert(folder, Path(root))
        comp = competition.read(root)
        points = grade_studies(models, comp, "test", sorted(comp.series["study_id"]))["points"]
    table = summarise(judge(truth, points[points["condition"] == "scs"]))
    print(table.to_string(index=False))
    if out:
        table.to_csv(out, index=False)
    if log:
        add_to_log(log, run, table)
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of SPIDER with images/ and masks/")
    parser.add_argument("--run", default="pretrained", help="a run in outputs/ (default: the ready-made models)")
    parser.add_argument("--out", type=Path, help="also write the table to this CSV, for pack --ready --measured")
    parser.add_argument("--log", type=Path, help="add the shares to this CSV, e.g. docs/scans.csv")
    asked = parser.parse_args()
    main(asked.folder, ROOT / "outputs" / asked.run, asked.out, asked.log)
