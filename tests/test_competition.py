"""Tests of lsdc_utils.competition, on small data folders that the tests write."""

from __future__ import annotations

import json
from pathlib import Path

import dicom_files
import numpy as np
import pandas as pd
import pytest

from lsdc_utils import competition, phantom
from lsdc_utils import vocabulary as words
from lsdc_utils.competition import CompetitionError

Tables = dict[str, pd.DataFrame]  # file name without .csv -> its content
TYPES = dict(zip((1, 2, 3), words.SERIES_TYPES, strict=True))  # last digit of a series id -> its type

TABLE_DIRT = {  # switch of the phantom -> rule that finds it
    "series_missing": "series_type_missing",
    "second_axial": "series_type_repeated",
    "sides_swapped": "sides_swapped",
    "point_missing": "grade_without_point",
    "label_missing": "point_without_grade",
    "short_stack": "labels_missing",
}


def write_tables(root: Path, n_train: int = 12, n_test: int = 2, seed: int = 0) -> Tables:
    """A data folder without images: the tables as the competition writes them, which are returned to be changed."""
    rng = np.random.default_rng(seed)
    train, test = range(101, 101 + n_train), range(501, 501 + n_test)
    grades = rng.choice(words.SEVERITY_NAMES, p=[0.7, 0.2, 0.1], size=(n_train, len(words.COLUMNS)))
    points = [
        (
            study,
            study * 10 + list(TYPES.values()).index(words.GROUPS[c.group].series_type) + 1,
            3,
            c.title,
            name,
            50.0,
            9.5,
        )
        for study in train
        for c in words.CONDITIONS.values()
        for name in words.LEVEL_NAMES
    ]
    tables = {
        "train": pd.DataFrame(grades, columns=list(words.COLUMNS)).assign(study_id=list(train)),
        "train_label_coordinates": pd.DataFrame(points, columns=competition.POINTS),
        "sample_submission": pd.DataFrame({"row_id": [row for s in test for row in words.study_row_ids(s)]}),
    }
    for split, studies in (("train", train), ("test", test)):
        series = [(study, study * 10 + k, kind) for study in studies for k, kind in TYPES.items()]
        columns = ["study_id", "series_id", "series_description"]
        tables[f"{split}_series_descriptions"] = pd.DataFrame(series, columns=columns)
    save(root, tables)
    return tables


def save(root: Path, tables: Tables) -> None:
    """Write tables as csv files into `root`."""
    root.mkdir(parents=True, exist_ok=True)
    for name, table in tables.items():
        table.to_csv(root / f"{name}.csv", index=False)


def write_images(root: Path, tables: Tables) -> None:
    """Three small slices for each series of `tables`: instance 1 to 3, 80 x 100 pixels of 1 mm."""
    pixels = np.zeros((80, 100), "uint16")
    for split in competition.SPLITS:
        for row in tables[f"{split}_series_descriptions"].itertuples():
            axial = row.series_description == words.AXIAL
            places = [(0.0, 0.0, -4.0 * k) if axial else (4.0 * k, 0.0, 0.0) for k in range(3)]
            folder = competition.series_folder(root, split, row.study_id, row.series_id)
            orientation = dicom_files.AXIAL if axial else dicom_files.SAGITTAL
            dicom_files.write_stack(folder, places, orientation=orientation, pixels=pixels, spacing=(1.0, 1.0))


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """The tables of a clean data folder at tmp_path, to be changed and saved again."""
    return write_tables(tmp_path)


def rules(findings: pd.DataFrame) -> dict[str, int]:
    """How often each rule was broken."""
    return findings.rule.value_counts().to_dict()


def test_a_clean_folder_is_read_as_it_is(tmp_path: Path, tables: Tables) -> None:
    comp = competition.read(tmp_path)
    assert comp.findings.empty
    assert len(comp.labels) == 12 * 25
    assert (comp.labels.condition + "_" + comp.labels.level).tolist()[:25] == list(words.COLUMNS)
    first = tables["train"][list(words.COLUMNS)].iloc[0].map(words.severity_from_name)
    assert comp.labels.severity[:25].tolist() == first.tolist()
    assert comp.series.split.value_counts().to_dict() == {"train": 36, "test": 6}
    assert comp.sample_rows == tables["sample_submission"].row_id.tolist()
    assert set(comp.coordinates.condition) == set(words.CONDITIONS)
    assert comp.coordinates.study_id.dtype == comp.labels.study_id.dtype == comp.series.study_id.dtype == np.int64


def test_each_fault_of_the_tables_is_found_and_no_grade_changed(tmp_path: Path, tables: Tables) -> None:
    train, points, series = (tables[name] for name in ("train", "train_label_coordinates", "train_series_descriptions"))
    canal = words.COLUMNS[0]
    train.loc[0, canal] = np.nan  # study 101: its point stays
    train.loc[1, canal] = "severe"  # study 102: not a word of the vocabulary
    points.loc[points.study_id == 103, "series_id"] = 99
    points = points.drop(points.index[points.study_id == 104][:2])
    points.loc[points.study_id == 105, "x"] = [np.nan] + [50.0] * 24
    moved = (points.study_id == 106) & (points.condition == "Spinal Canal Stenosis")
    points.loc[moved, "series_id"] = 1061  # on T1
    left = (points.study_id == 107) & (points.condition == "Left Subarticular Stenosis") & (points.level == "L4/L5")
    points.loc[left, "x"] = 10.0
    series = series[series.series_id != 1081]  # study 108 without T1
    series = pd.concat([series, pd.DataFrame([[109, 1094, words.AXIAL]], columns=series.columns)])
    series = pd.concat([series, pd.DataFrame([[110, 1104, "Localizer"]], columns=series.columns)])
    train = pd.concat([train, train.iloc[[5]].assign(**{canal: "Severe"}), train.iloc[[6]].assign(study_id=900)])
    points = pd.concat([points, points.iloc[[-1]].assign(x=1.0)])
    save(tmp_path, tables | {"train": train, "train_label_coordinates": points, "train_series_descriptions": series})

    comp = competition.read(tmp_path)
    assert rules(comp.findings) == {
        "grade_unknown": 1,
        "labels_missing": 2,
        "point_without_grade": 2,
        "point_on_unknown_series": 25 + 10,
        "grade_without_point": 5,  # 103, 104, 105, 108 and 900
        "point_unusable": 1,
        "point_on_other_series_type": 5,
        "sides_swapped": 1,
        "series_type_missing": 1,
        "series_type_repeated": 1,
        "series_type_unknown": 1,
        "study_repeated": 1,
        "study_without_series": 1,
        "point_repeated": 1,
    }
    swapped = comp.findings[comp.findings.rule == "sides_swapped"].iloc[0]
    assert (swapped.study_id, swapped.series_id, swapped.value) == (107, 1073, "l4_l5")
    graded = comp.labels.pivot(index="study_id", columns=["condition", "level"], values="severity")
    kept = train.drop_duplicates("study_id").set_index("study_id")[list(words.COLUMNS)]
    codes = kept.apply(lambda column: column.map(dict(zip(words.SEVERITY_NAMES, range(3), strict=True))))
    expected = codes.fillna(words.MISSING).to_numpy(int)
    assert (graded.loc[kept.index].to_numpy() == expected).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train", lambda t: t.drop(columns=words.COLUMNS[3]), words.COLUMNS[3]),
        ("train", lambda t: t.assign(study_id=["a", *t.study_id[1:]]), "study_id in line 2 is 'a'"),
        ("train_label_coordinates", lambda t: t.drop(columns="x"), "lacks the column"),
        ("train_series_descriptions", lambda t: t.assign(series_id=1.5), "no whole number"),
    ],
)
def test_tables_that_cannot_be_used_are_named(tmp_path: Path, tables, name: str, change, message: str) -> None:
    save(tmp_path, {name: change(tables[name])})
    with pytest.raises(CompetitionError, match=message) as error:
        competition.read(tmp_path)
    assert f"{name}.csv" in str(error.value)


def test_no_test_studies_and_no_images(tmp_path: Path, tables: Tables) -> None:
    save(tmp_path, {name: tables[name].iloc[:0] for name in ("test_series_descriptions", "sample_submission")})
    comp = competition.read(tmp_path)
    assert comp.sample_rows == [] and set(comp.series.split) == {"train"}
    series, findings = competition.scan(comp)
    assert rules(findings) == {"images_missing": 1}
    assert len(series) == 36 and (series.n_slices == 0).all()
    labels = competition.label_table(comp)
    assert len(labels) == 300 and labels.x.notna().all() and labels.X.isna().all()


def test_a_folder_of_test_studies_alone(tmp_path: Path, tables: Tables) -> None:
    for name in ("train", "train_label_coordinates", "train_series_descriptions", "sample_submission"):
        (tmp_path / f"{name}.csv").unlink()
    comp = competition.read(tmp_path)
    assert comp.labels.empty and comp.coordinates.empty and comp.findings.empty
    assert comp.sample_rows == tables["sample_submission"].row_id.tolist()
    assert competition.label_table(comp).empty
    (tmp_path / "test_series_descriptions.csv").unlink()
    with pytest.raises(CompetitionError, match="neither of"):
        competition.read(tmp_path)


def test_answers_beside_the_test_tables_are_not_opened(tmp_path: Path, tables: Tables) -> None:
    before = competition.read(tmp_path)
    for name in ("solution", "solution_coordinates", "latents", "oracle"):
        (tmp_path / f"{name}.csv").write_bytes(b"\xff\x00 no table")
    after = competition.read(tmp_path)
    pd.testing.assert_frame_equal(before.labels, after.labels)
    assert before.sample_rows == after.sample_rows


def test_scan_measures_the_images(tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, tables)
    comp = competition.read(tmp_path)
    series, findings = competition.scan(comp)
    assert findings.empty and len(series) == len(comp.series)
    monkeypatch.setattr(competition, "FEW_TASKS", 2)
    pd.testing.assert_frame_equal(series, competition.scan(comp, workers=2)[0])
    pd.testing.assert_frame_equal(competition.label_table(comp), competition.label_table(comp, workers=2))
    assert (series.n_slices == 3).all() and (series.slice_step == 4.0).all() and (series.n_blocks == 1).all()
    assert (series[["rows", "cols"]] == [80, 100]).all(axis=None)
    assert series.plane.tolist() == series.series_type.map(words.PLANES).tolist()
    series.to_parquet(tmp_path / "series.parquet")


def test_scan_finds_each_fault_of_the_images(tmp_path: Path, tables: Tables) -> None:
    write_images(tmp_path, tables)
    points = tables["train_label_coordinates"]
    points.loc[0, "instance_number"] = 40
    points.loc[1, "x"] = 100.0
    save(tmp_path, {"train_label_coordinates": points})

    def folder(series_id: int) -> Path:
        return competition.series_folder(tmp_path, "train", series_id // 10, series_id)

    (folder(1021) / "2.dcm").write_bytes(b"no DICOM")
    for file in folder(1031).iterdir():
        file.unlink()
    dicom_files.write_slice(folder(1041) / "2.dcm", 2, (4.0, 0.0, 0.0), dicom_files.SAGITTAL, spacing=(1.0, 1.0))
    folder(1053).rename(tmp_path / "aside")
    folder(1051).rename(folder(1053))
    dicom_files.write_stack(folder(1069), [(0.0, 0.0, 0.0)])
    series, findings = competition.scan(competition.read(tmp_path))
    assert rules(findings) == {
        "point_on_missing_instance": 1,
        "point_outside_image": 1,
        "file_unusable": 1,
        "series_unusable": 2,  # empty, and gone
        "shapes_mixed": 1,
        "plane_differs": 1,
        "series_not_in_tables": 1,
    }
    by_id = series.set_index("series_id")
    assert by_id.n_slices[[1021, 1031, 1041, 1051]].tolist() == [2, 0, 3, 0]
    assert by_id.n_skipped[1021] == 1 and (by_id.rows[1041], by_id.cols[1041]) == (80, 100)


def test_labels_get_their_place_in_the_patient(tmp_path: Path, tables: Tables) -> None:
    points = tables["train_label_coordinates"].drop(index=7)
    points.loc[0, "instance_number"] = 40
    save(tmp_path, {"train_label_coordinates": points})
    write_images(tmp_path, tables)
    labels = competition.label_table(competition.read(tmp_path))
    assert labels.row_id[:25].tolist() == words.study_row_ids(101)
    bare, absent, canal, recess = (labels.iloc[k] for k in (7, 0, 1, 15))
    assert (bare.series_id, bare.instance_number) == (-1, -1) and np.isnan([bare.x, bare.X]).all()
    assert absent.instance_number == 40 and absent.x == 50.0 and np.isnan(absent.X)
    assert (canal.X, canal.Y, canal.Z) == (8.0, 50.0, -9.5)
    assert (recess.X, recess.Y, recess.Z) == (50.0, 9.5, -8.0)


def test_folds_are_alike_and_the_same_again(tmp_path: Path) -> None:
    write_tables(tmp_path, n_train=101)
    labels = competition.read(tmp_path).labels
    folds = competition.make_folds(labels, 4, seed=52)
    assert folds.study_id.tolist() == sorted(labels.study_id.unique())
    assert folds.fold.value_counts().between(25, 26).all()
    shuffled = labels.sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(folds, competition.make_folds(shuffled, 4, seed=52))
    assert not folds.fold.equals(competition.make_folds(labels, 4, seed=53).fold)
    joined = labels.merge(folds, on="study_id").assign(
        group=lambda t: t.condition.map({c.name: c.group for c in words.CONDITIONS.values()})
    )
    severe = joined[joined.severity == 2].groupby(["group", "fold"]).size().unstack()
    assert (severe.max(axis=1) - severe.min(axis=1)).max() <= 4
    spinal = joined[(joined.group == "scs") & (joined.severity == 2)]
    any_severe = spinal.groupby("fold").study_id.nunique()
    assert any_severe.max() - any_severe.min() <= 3
    with pytest.raises(CompetitionError, match="into 102 folds"):
        competition.make_folds(labels, 102, seed=52)


def test_published_folds(tmp_path: Path) -> None:
    file = tmp_path / "folds.csv"
    pd.DataFrame({"study_id": [1, 1, 2], "fold": [0, 0, 1], "other": "x"}).to_csv(file, index=False)
    assert competition.read_folds(file).to_dict("list") == {"study_id": [1, 2], "fold": [0, 1]}
    pd.DataFrame({"study_id": [1, 1], "fold": [0, 1]}).to_csv(file, index=False)
    with pytest.raises(CompetitionError, match="study 1 is in more than one fold"):
        competition.read_folds(file)
    with pytest.raises(CompetitionError, match="no such file"):
        competition.read_folds(tmp_path / "none.csv")


def test_the_data_folder_of_a_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "data").mkdir()
    with pytest.raises(CompetitionError, match="run 00_get_data first"):
        competition.data_dir(tmp_path / "run")
    (tmp_path / "run" / "data.json").write_text(json.dumps({"data_dir": "../data", "kind": "folder"}))
    assert competition.data_dir(tmp_path / "run") == tmp_path / "data"
    assert competition.data_dir(tmp_path / "run", str(tmp_path)) == tmp_path
    with pytest.raises(CompetitionError, match="does not exist"):
        competition.data_dir(tmp_path / "run", str(tmp_path / "gone"))


def test_points_of_the_phantom_come_together_in_the_patient(tmp_path: Path) -> None:
    dirt = ("tilted_blocks", "far_numbers", "number_gaps", "axial_reversed", "non_square")
    rates = dict.fromkeys(TABLE_DIRT, 0.0) | dict.fromkeys(dirt, 1.0)
    root = phantom.write_phantom(tmp_path / "data", 1, 0, seed=3, **rates)
    comp = competition.read(root)
    series, _ = competition.scan(comp)
    axial = series[series.series_type == words.AXIAL]
    assert axial.n_blocks.sum() == 5 and (axial.instance_order == "down").all()
    assert (series.first_instance >= 100).all() and (series.rows != series.cols).all()
    labels = competition.label_table(comp)
    assert labels[["X", "Y", "Z"]].notna().all(axis=None)
    side = labels.condition.map({c.name: c.side for c in words.CONDITIONS.values()})
    for _, part in labels.groupby("level"):
        x = part.groupby(side[part.index].fillna("canal")).X.agg(["min", "max"])
        assert x.loc["right", "max"] < x.loc["canal", "min"] <= x.loc["canal", "max"] < x.loc["left", "min"]
        assert np.ptp(part.Z) < 25 and np.ptp(part.Y) < 25


def test_dirt_of_the_phantoms_tables_is_found(tmp_path: Path) -> None:
    clean = dict.fromkeys(TABLE_DIRT, 0.0)
    for switch, rule in TABLE_DIRT.items():
        root = phantom.write_phantom(tmp_path / switch, 8, 0, seed=5, images=False, **clean | {switch: 0.5})
        assert rule in rules(competition.read(root).findings)
    root = phantom.write_phantom(tmp_path / "clean", 8, 0, seed=5, images=False, **clean)
    assert competition.read(root).findings.empty
