"""The tests' own dirt: each kind spoils its study and nothing else, and other forms of a file mean the same image."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
import spoil

from lsdc_utils import dicom
from lsdc_utils.phantom import study, write_phantom

CLEAN = dict.fromkeys(study.Dirt.__dataclass_fields__, 0.0)
RULES = {kind: [kind] for kind in spoil.KINDS} | {  # kind -> rules by which data checks must report it
    "study_without_series": ["study_without_series", "grade_without_point"],
    "grade_unknown": ["grade_unknown", "labels_missing"],
    "point_on_unknown_series": ["point_on_unknown_series", "grade_without_point"],
    "foramina_swapped": ["point_on_wrong_side"] * 4,
    "levels_out_of_order": ["levels_out_of_order"] * 2,
    "localiser": ["series_not_in_tables"],
    "wide_pixels": ["spacing_outlier"],
    "wide_steps": ["spacing_outlier"],
    "contrast_differs": ["contrast_differs"] * 2,
    "files_broken": ["file_unusable"] * 5,
    "shapes_mixed": ["file_unusable"],
    "tags_missing": ["file_repaired"] * 2,
}


def contents(root: Path, study_id: int) -> list:
    """The rows of a study in each table, and its files."""
    tables = [pd.read_csv(root / f"{name}.csv") for name in ("train", "train_series_descriptions")]
    points = pd.read_csv(root / "train_label_coordinates.csv")
    rows = [table[table["study_id"] == study_id].to_csv(index=False) for table in (*tables, points)]
    files = sorted((root / "train_images" / str(study_id)).rglob("*.dcm"))
    return [*rows, {str(file.relative_to(root)): file.read_bytes() for file in files}]


def test_each_kind_spoils_its_study_alone_and_is_listed(tmp_path):
    clean = write_phantom(
        tmp_path / "clean", len(spoil.KINDS) + 1, 0, 4, workers=2, step=1.5, **CLEAN | {"second_axial": 1.0}
    )
    root = shutil.copytree(clean, tmp_path / "spoilt")
    planted, spoilt = spoil.spoil(root)
    assert sorted(spoilt.values()) == sorted(spoil.KINDS)
    for study_id in pd.read_csv(clean / "train.csv")["study_id"]:
        kind = spoilt.get(study_id)
        same = [after == before for after, before in zip(*(contents(p, study_id) for p in (root, clean)), strict=True)]
        assert all(same) == (kind is None), kind
        if kind in spoil.OF_POINTS or kind in spoil.OF_FILES:
            changed = {"point": 2, "files": 3}["point" if kind in spoil.OF_POINTS else "files"]
            assert [k for k, value in enumerate(same) if not value] == [changed], kind
        rules = planted.loc[planted["study_id"] == study_id, "rule"]
        rules = rules[rules != "series_type_repeated"]  # every study has two axial series
        assert list(rules) == RULES.get(kind, []), kind


@pytest.mark.parametrize(
    ("forms", "slope", "intercept"),
    [
        (("uncompressed", "headers_silent"), 1.0, 0.0),
        (("monochrome1", "high_bits"), 1.0, 0.0),
        (spoil.FORMS[:-1], 0.5, 100 - 0.5 * 2047),  # MONOCHROME1 turns rescaled values round
    ],
)
def test_forms_of_pixels_mean_the_same_image(tmp_path, forms, slope, intercept):
    plain = write_phantom(tmp_path / "plain", 2, 0, 6, **CLEAN)
    root, syntaxes = shutil.copytree(plain, tmp_path / "other"), set()
    spoil.change_forms(root, forms)
    for folder in sorted(root.glob("train_images/*/*")):
        new, old = dicom.read_series(folder), dicom.read_series(plain / folder.relative_to(root))
        assert not new.skipped
        assert [image.instance_number for image in new.slices] == [image.instance_number for image in old.slices]
        for image, before in zip(new.pixels, old.pixels, strict=True):
            assert np.array_equal(image, slope * before.astype(float) + intercept)
        header = pydicom.dcmread(new.slices[0].file)
        syntaxes.add(header.file_meta.TransferSyntaxUID)
        assert ("SeriesDescription" in header) == ("headers_silent" not in forms)
    assert len(syntaxes) == (len(spoil.SYNTAXES) if "uncompressed" in forms else 1)
