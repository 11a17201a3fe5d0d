"""Dirt that the phantom adds on purpose: each kind does what it says and nothing else, and is listed when planted."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from lsdc_utils import dicom
from lsdc_utils.phantom import ALL_DIRT, study, write_phantom
from lsdc_utils.phantom.spoil import FORMS, IN_TEST, KINDS, OF_FILES, OF_POINTS, OF_TABLES, SYNTAXES, deal
from lsdc_utils.vocabulary import AXIAL, SERIES_TYPES, T1

CLEAN = dict.fromkeys(study.Dirt.__dataclass_fields__, 0.0)
ANATOMY = ("anatomy.csv", "discs.csv", "spines.csv")
CSV = ("train", "train_series_descriptions", "train_label_coordinates")
PLANTED = {kind: [kind] for kind in KINDS} | {  # kind -> rules by which a validator must report it
    "study_without_series": ["study_without_series", "grade_without_point"],
    "plane_differs": ["plane_differs", "series_type_repeated"],
    "grade_unknown": ["grade_unknown", "labels_missing"],
    "point_on_unknown_series": ["point_on_unknown_series", "grade_without_point"],
    "foramina_swapped": ["point_on_wrong_side"] * 4,
    "levels_out_of_order": ["levels_out_of_order"] * 2,
    "localiser": ["series_not_in_tables"],
    "spacing_outlier": ["spacing_outlier", "series_type_repeated"],
    "contrast_differs": ["contrast_differs"] * 2,
    "files_broken": ["file_unusable"] * 5,
    "tags_missing": ["file_repaired"] * 2,
}
ROWS = dict.fromkeys(OF_POINTS, (1, 3, 25)) | {  # kind -> rows that its study has in the tables of CSV
    "study_not_in_tables": (0, 0, 0),
    "study_without_series": (1, 0, 0),
    "study_without_labels": (0, 3, 0),
    "study_repeated": (2, 3, 25),
    "series_repeated": (1, 4, 25),
    "series_type_unknown": (1, 4, 25),
    "plane_differs": (1, 4, 25),
    "grade_unknown": (1, 3, 24),
    "point_repeated": (1, 3, 26),
}


def make(root: Path, kinds: tuple[str, ...], **options: bool) -> tuple[Path, dict[int, str | None]]:
    """A phantom in which each of `kinds` befalls one training study and one study is as it was, and who has which."""
    n = len(kinds) + 1
    write_phantom(root, n, 0, 4, workers=2, **options, **CLEAN | dict.fromkeys(kinds, 0.01))
    dealt = deal(n, "train", study.Dirt(**dict.fromkeys(kinds, 0.01)), [4, 5, 0])
    latents = pd.read_csv(root / "latents.csv")
    studies = latents["row_id"].str.partition("_")[0].astype(int).unique()
    return root, dict(zip(studies.tolist(), [one and one[0] for one in dealt], strict=True))


def planted(root: Path) -> pd.DataFrame:
    return pd.read_csv(
        root / "planted.csv", dtype={"series_id": "Int64"}, keep_default_na=False, na_values={"series_id": ""}
    )


def rows_of(root: Path, study_id: int) -> list[pd.DataFrame]:
    tables = [pd.read_csv(root / f"{name}.csv") for name in CSV]
    return [table[table["study_id"] == study_id].reset_index(drop=True) for table in tables]


@pytest.fixture(scope="module")
def spoilt_tables(tmp_path_factory) -> tuple[Path, dict[int, str | None]]:
    return make(tmp_path_factory.mktemp("phantom") / "tables", OF_TABLES + OF_POINTS, images=False)


@pytest.fixture(scope="module")
def clean_tables(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("phantom") / "clean"
    return write_phantom(root, len(OF_TABLES + OF_POINTS) + 1, 0, 4, images=False, **CLEAN)


@pytest.fixture(scope="module")
def spoilt_files(tmp_path_factory) -> tuple[Path, dict[int, str | None]]:
    return make(tmp_path_factory.mktemp("phantom") / "files", OF_FILES)


def test_without_dirt_the_phantom_is_what_it_was(tmp_path):
    root = write_phantom(tmp_path / "p", 8, 2, 3, images=False, second_axial=0.5)
    told = hashlib.sha256()
    for file in sorted(root.glob("*.csv")):
        if file.name not in ("planted.csv", "wrong_labels.csv", *ANATOMY):
            told.update(file.read_bytes())
    # Taken when the phantom knew no other kinds than those of the real data: a kind that is off changes no byte.
    assert told.hexdigest() == "a66d5acfccb06170a7e4941082e126bfc09cdf5c4d0e05f12ba9270010faf2b8"


def test_kinds_are_dealt_in_turn_one_a_study():
    dealt = deal(60, "train", study.Dirt(**ALL_DIRT), [0])
    assert {kind for kind, _ in filter(None, dealt)} == set(KINDS)
    assert sum(one is None for one in dealt) > 20  # room for the real kinds
    assert {kind for kind, _ in filter(None, deal(30, "test", study.Dirt(**ALL_DIRT), [0]))} == set(IN_TEST)
    few = [one for one in deal(5, "train", study.Dirt(**ALL_DIRT), [0]) if one]
    assert len(set(few)) == 5 and {turn for _, turn in few} == {0}
    assert deal(4, "train", study.Dirt(study_repeated=1.0), [0]).count(None) == 0
    assert deal(4, "train", study.Dirt(), [0]) == [None] * 4


def test_each_kind_spoils_rows_of_its_study_and_nothing_else(spoilt_tables, clean_tables):
    root, dealt = spoilt_tables
    assert set(dealt.values()) == {*OF_TABLES, *OF_POINTS, None}
    for study_id, kind in dealt.items():
        rows, before = rows_of(root, study_id), rows_of(clean_tables, study_id)
        same = [one.equals(other) for one, other in zip(rows, before, strict=True)]
        assert all(same) == (kind is None), kind
        if kind in OF_POINTS:
            assert same == [True, True, False]
        if kind is not None:
            assert tuple(map(len, rows)) == ROWS[kind], kind


def test_what_is_planted_is_listed_with_what_follows_from_it(spoilt_tables, spoilt_files, clean_tables):
    assert planted(clean_tables).empty
    for root, dealt in (spoilt_tables, spoilt_files):
        table = planted(root)
        assert set(table["study_id"]) <= set(dealt)
        for study_id, kind in dealt.items():
            rules = PLANTED.get(kind, []) if kind != "study_not_in_tables" else []  # nothing is there without images
            assert list(table.loc[table["study_id"] == study_id, "rule"]) == rules, kind


def test_the_anatomy_is_told_whatever_was_spoilt(spoilt_tables, clean_tables):
    for name in ANATOMY:
        spoilt, clean = ((root / name).read_bytes() for root in (spoilt_tables[0], clean_tables))
        told, before = (set(pd.read_csv(root / name)["study_id"]) for root in (spoilt_tables[0], clean_tables))
        assert told == before == set(spoilt_tables[1])
        assert name == "spines.csv" or len(spoilt) >= len(clean)  # a second axial series sees it too


def test_spoilt_points_are_where_they_should_not_be(spoilt_tables, clean_tables):
    root, dealt = spoilt_tables
    study_of = {kind: study_id for study_id, kind in dealt.items()}
    points = {kind: rows_of(root, study_of[kind])[2] for kind in OF_POINTS}
    series = {kind: rows_of(root, study_of[kind])[1].set_index("series_id").squeeze() for kind in OF_POINTS}
    types = {kind: table["series_id"].map(series[kind]["series_description"]) for kind, table in points.items()}
    assert types["point_on_unknown_series"].isna().sum() == 1
    canal = points["point_on_other_series_type"]["condition"].str.startswith("Spinal")
    assert (types["point_on_other_series_type"][canal] == T1).sum() == 1
    assert (points["point_on_missing_instance"]["instance_number"] > 5000).sum() == 1
    assert (points["point_outside_image"]["x"] > 160).sum() == 1
    assert points["point_repeated"].duplicated(["condition", "level"]).sum() == 1
    pairs = points["one_side_twice"][types["one_side_twice"] == AXIAL].pivot(index="level", columns="condition")
    assert (np.ptp(pairs["x"].to_numpy(), axis=1) == 0).sum() == 1
    moved = {}
    for kind in ("foramina_swapped", "levels_out_of_order", "level_points_apart"):
        key = ["condition", "level"]
        both = points[kind].merge(rows_of(clean_tables, study_of[kind])[2], on=key)
        moved[kind] = both[(both["x_x"] != both["x_y"]) | (both["y_x"] != both["y_y"])]
    assert [len(table) for table in moved.values()] == [4, 2, 1]
    assert sorted(moved["foramina_swapped"]["x_x"]) == sorted(moved["foramina_swapped"]["x_y"])


def test_spoilt_files_are_what_the_reader_meets(spoilt_files):
    root, dealt = spoilt_files
    series = pd.read_csv(root / "train_series_descriptions.csv")
    for study_id, kind in dealt.items():
        folder = root / "train_images" / str(study_id)
        mine = series.loc[series["study_id"] == study_id, "series_id"].astype(str)
        on_disk = {path.name for path in folder.glob("*")}
        lacking = {"study_not_on_disk": 3, "series_not_on_disk": 1}.get(kind, 0)
        assert len(set(mine) - on_disk) == lacking, kind
        assert len(on_disk - set(mine)) == (kind == "localiser"), kind
        if lacking:
            continue
        read, unusable = [], 0
        for name in mine:
            try:
                read.append(dicom.read_series(folder / name))
            except dicom.DicomError:
                unusable += 1
        assert unusable == (kind == "series_unusable"), kind
        assert sum(len(one.skipped) for one in read) == (5 if kind == "files_broken" else 0), kind
        mixed = sum(len({image.shape for image in one.slices}) > 1 for one in read)
        assert mixed == (kind == "shapes_mixed"), kind
        wide = sum(one.slices[0].spacing[0] > 5 or one.steps().max() > 50 for one in read)
        assert wide == (kind == "spacing_outlier"), kind


def test_forms_of_pixels_mean_the_same_image(tmp_path):
    plain = write_phantom(tmp_path / "plain", 2, 0, 6, **CLEAN)
    series = pd.read_csv(plain / "train_series_descriptions.csv").astype(str)
    folders = [Path("train_images") / row.study_id / row.series_id for row in series.itertuples()]
    assert len(folders) == 2 * len(SERIES_TYPES)
    before = [dicom.read_series(plain / folder) for folder in folders]
    variants = {  # forms -> slope and intercept that the reader gives back
        ("uncompressed", "headers_silent"): (1.0, 0.0),
        ("monochrome1", "high_bits"): (1.0, 0.0),
        FORMS: (0.5, -0.5 * 2048 - 100),
    }
    for forms, (slope, intercept) in variants.items():
        root = write_phantom(tmp_path / forms[0] / forms[1], 2, 0, 6, **CLEAN | dict.fromkeys(forms, 1.0))
        syntaxes = set()
        for folder, old in zip(folders, before, strict=True):
            new = dicom.read_series(root / folder)
            assert not new.skipped
            assert [image.instance_number for image in new.slices] == [image.instance_number for image in old.slices]
            for one, other in zip(new.pixels, old.pixels, strict=True):
                assert np.array_equal(one, slope * other.astype(float) + intercept), forms
            header = pydicom.dcmread(new.slices[0].file)
            syntaxes.add(header.file_meta.TransferSyntaxUID)
            assert ("SeriesDescription" in header) == ("headers_silent" not in forms)
        assert len(syntaxes) == (len(SYNTAXES) if "uncompressed" in forms else 1)
        assert planted(root).empty


def test_dirt_has_the_same_bytes_whatever_the_workers(tmp_path):
    dirt = ALL_DIRT | dict.fromkeys((*FORMS, "headers_silent"), 0.5)
    one = write_phantom(tmp_path / "one", 2, 2, 7, **dirt)
    two = write_phantom(tmp_path / "two", 2, 2, 7, workers=2, **dirt)
    files = sorted(file.relative_to(one) for file in one.rglob("*") if file.is_file())
    assert files == sorted(file.relative_to(two) for file in two.rglob("*") if file.is_file())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_all_dirt_plants_every_rule_of_tables_in_sixty_studies(tmp_path):
    root = write_phantom(tmp_path / "p", 60, 0, 3, workers=2, images=False, **ALL_DIRT)
    real = {"point_without_grade", "labels_missing", "grade_without_point", "series_type_missing"}
    of_tables = {rule for kind in OF_TABLES + OF_POINTS for rule in PLANTED[kind]} - {"study_not_in_tables"}
    assert set(planted(root)["rule"]) == of_tables | real
