"""Tables of small data folders, read, checked and repaired."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from data_folders import Tables, save, write_tables

from lsdc_utils import vocabulary as words
from lsdc_utils.data import checks, competition
from lsdc_utils.data.competition import CompetitionError
from lsdc_utils.pipeline.graph import NOTEBOOKS
from lsdc_utils.pipeline.parameters import load_parameters


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
    first = tables["train"][list(words.COLUMNS)].iloc[0].map(words.SEVERITY_NAMES.index)
    assert comp.labels.severity[:25].tolist() == first.tolist()
    assert comp.series.split.value_counts().to_dict() == {"train": 36, "test": 6}
    assert comp.sample_rows == tables["sample_submission"].row_id.tolist()
    assert set(comp.coordinates.condition) == set(words.CONDITIONS)
    assert comp.coordinates.study_id.dtype == comp.labels.study_id.dtype == comp.series.study_id.dtype == np.int64


def test_each_fault_of_the_tables_is_found_and_no_grade_changed(tmp_path: Path, tables: Tables) -> None:
    train, points, series = (tables[name] for name in ("train", "train_label_coordinates", "train_series_descriptions"))
    canal = words.COLUMNS[0]
    train.loc[0, canal] = np.nan  # study 101: its point stays
    train.loc[1, canal] = "grave"  # study 102: not a word of the vocabulary
    points.loc[points.study_id == 103, "series_id"] = 99
    points = points.drop(points.index[points.study_id == 104][:2])
    points.loc[points.study_id == 105, "x"] = [np.nan] + [50.0] * 24
    moved = (points.study_id == 106) & (points.condition == "Spinal Canal Stenosis")
    points.loc[moved, "series_id"] = 1061  # on T1
    series = series[series.series_id != 1081]  # study 108 without T1
    series = pd.concat([series, pd.DataFrame([[109, 1094, words.AXIAL]], columns=series.columns)])
    series = pd.concat([series, pd.DataFrame([[110, 1104, "Localizer"]], columns=series.columns)])
    train = pd.concat([train, train.iloc[[5]], train.iloc[[6]].assign(study_id=900)])
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
        "series_type_missing": 1,
        "series_type_repeated": 1,
        "series_type_unknown": 1,
        "study_repeated": 1,
        "study_without_series": 1,
        "point_repeated": 1,
    }
    graded = comp.labels.pivot(index="study_id", columns=["condition", "level"], values="severity")
    kept = train.drop_duplicates("study_id").set_index("study_id")[list(words.COLUMNS)]
    codes = kept.apply(lambda column: column.map(dict(zip(words.SEVERITY_NAMES, range(3), strict=True))))
    expected = codes.fillna(words.MISSING).to_numpy(int)
    assert (graded.loc[kept.index].to_numpy() == expected).all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train", lambda t: t[["study_id"]], r"lacks the column\(s\) study_id, spinal_canal_stenosis_l1_l2 \.\.\., or"),
        ("train", lambda t: t.assign(study_id=["1e5", *t.study_id[1:]]), "study_id in line 2 is '1e5'"),
        ("train_label_coordinates", lambda t: t.drop(columns="x"), "lacks the column"),
        ("train_series_descriptions", lambda t: t.assign(series_id=1.5), "not a whole number"),
        ("sample_submission", lambda t: t.replace("^501_", "5.01E+02_", regex=True), "row_id in line 2 is '5.01E"),
        ("sample_submission", lambda t: t.assign(row_id="501_stenosis"), "row_id in line 2 is '501_stenosis'; exp"),
    ],
)
def test_tables_that_cannot_be_used_are_named(tmp_path: Path, tables, name: str, change, message: str) -> None:
    save(tmp_path, {name: change(tables[name])})
    with pytest.raises(CompetitionError, match=message) as error:
        competition.read(tmp_path)
    assert f"{name}.csv" in str(error.value)


def test_an_instance_number_that_may_have_lost_digits_names_no_image(tmp_path: Path, tables: Tables) -> None:
    numbers = ["1.23E+03", "12.5", "7.0", *["8"] * 297]
    save(tmp_path, {"train_label_coordinates": tables["train_label_coordinates"].assign(instance_number=numbers)})
    comp = competition.read(tmp_path)
    assert comp.coordinates.instance_number.tolist() == [7, *[8] * 297]
    assert rules(comp.findings) == {"point_unusable": 2, "grade_without_point": 1}


def test_no_test_studies_and_no_images(tmp_path: Path, tables: Tables) -> None:
    save(tmp_path, {name: tables[name].iloc[:0] for name in ("test_series_descriptions", "sample_submission")})
    comp = competition.read(tmp_path)
    assert comp.sample_rows == [] and set(comp.series.split) == {"train"}
    checked = checks.check(comp)
    assert rules(checked.findings) == {"images_missing": 1}
    assert len(checked.series) == 36 and (checked.series.n_slices == 0).all()
    assert len(checked.labels) == 300 and checked.labels.x.notna().all() and checked.labels.X.isna().all()


def test_a_folder_of_test_studies_alone(tmp_path: Path, tables: Tables) -> None:
    for name in ("train", "train_label_coordinates", "train_series_descriptions", "sample_submission"):
        (tmp_path / f"{name}.csv").unlink()
    comp = competition.read(tmp_path)
    assert comp.labels.empty and comp.coordinates.empty and comp.findings.empty
    assert comp.sample_rows == tables["sample_submission"].row_id.tolist()
    assert checks.label_table(comp).empty
    (tmp_path / "test_series_descriptions.csv").unlink()
    with pytest.raises(CompetitionError, match=r"no train_series_descriptions\.csv or test_series"):
        competition.read(tmp_path)


def test_answers_beside_the_test_tables_are_not_opened(tmp_path: Path, tables: Tables) -> None:
    before = competition.read(tmp_path)
    for name in ("solution", "solution_coordinates", "latents", "oracle"):
        (tmp_path / f"{name}.csv").write_bytes(b"\xff\x00 no table")
    after = competition.read(tmp_path)
    pd.testing.assert_frame_equal(before.labels, after.labels)
    assert before.sample_rows == after.sample_rows


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


def write_csv(file: Path, columns: list[str], *rows: tuple) -> Path:
    """A table for exclude_csv or points_csv."""
    pd.DataFrame(list(rows), columns=columns).to_csv(file, index=False)
    return file


def test_exclude_csv_leaves_out_studies_series_and_points_but_no_grade(tmp_path: Path, tables: Tables) -> None:
    file = write_csv(
        tmp_path / "exclude.csv",
        competition.EXCLUDE,
        (101, "", "", "", "another patient"),
        (102, 1021, "", "", "moved"),
        (103, "", "Spinal Canal Stenosis", "L4/L5", "click in the disc"),
        (104, "", "", "l5_s1", "transitional vertebra"),
        (105, 1053, "", "L1/L2", ""),
        (501, "", "", "", "no patient"),
    )
    before, comp = competition.read(tmp_path), competition.read(tmp_path, exclude_csv=file)
    lost = before.coordinates.merge(comp.coordinates, how="left", on=competition.KEY, indicator=True)
    assert (lost._merge == "left_only").groupby(lost.study_id).sum()[:6].tolist() == [25, 10, 1, 5, 2, 0]
    assert {101, 501}.isdisjoint(comp.series.study_id) and 1021 not in set(comp.series.series_id)
    assert comp.labels.equals(before.labels[before.labels.study_id != 101])
    assert comp.sample_rows == before.sample_rows  # a test study is answered all the same
    excluded = comp.findings[comp.findings.rule == "excluded"]
    assert excluded.study_id.tolist() == [101, 102, 103, 104, 105, 501]
    assert excluded.value[:3].tolist() == ["another patient", "moved", "click in the disc"]
    assert excluded.action[2:4].tolist() == ["points not used: spinal_canal_stenosis l4_l5", "points not used: l5_s1"]
    assert set(rules(comp.findings)) == {"excluded", "series_type_missing", "grade_without_point"}


LISTED = [  # what is not trained on, and the rows of studies 101 to 106 that each line fits
    ((101, "", "", "", "left out"), 25),
    (("", 1023, "", "", "another region"), 10),  # the axial series of study 102: both recesses of five levels
    ((103, "", "foraminal", "", "sides exchanged"), 10),
    ((104, "", "Spinal Canal Stenosis", "L4/L5", ""), 1),
    ((105, "", "", "l5_s1", ""), 5),
    ((106, 1061, "left foraminal", "", ""), 5),
    ((999, "", "", "", "of a larger data set"), 0),
]


def label_rows(comp: competition.Competition) -> pd.DataFrame:
    """The labels with the series of their points, as the label table has them."""
    rows = comp.labels.merge(comp.coordinates, how="left", on=competition.KEY)
    return rows.assign(series_id=rows.series_id.fillna(competition.NONE).astype("int64"))


@pytest.mark.parametrize(("line", "count"), LISTED)
def test_a_line_says_which_rows_are_not_trained_on(tmp_path: Path, tables: Tables, line: tuple, count: int) -> None:
    labels = label_rows(competition.read(tmp_path))
    left = labels[~competition.trained_rows(labels, write_csv(tmp_path / "list.csv", competition.EXCLUDE, line))]
    assert len(left) == count
    assert set(left.study_id) <= {int(line[0] or 102)}
    if line[2] == "foraminal":
        assert set(left.condition) == {c.name for c in words.CONDITIONS.values() if c.group == "nfn"}
    if line[2].startswith("left"):
        assert set(left.condition) == {"left_neural_foraminal_narrowing"}


@pytest.mark.parametrize(
    "line",
    [("", "", "foraminal", "", ""), ("1,5", "", "", "", ""), (101, "", "spine", "", ""), (101, "", "", "L6", "")],
)
def test_a_line_that_cannot_be_read_is_named(tmp_path: Path, tables: Tables, line: tuple) -> None:
    file = write_csv(tmp_path / "list.csv", competition.EXCLUDE, (101, "", "", "", ""), line)
    with pytest.raises(CompetitionError, match="line 3 cannot be read") as error:
        competition.trained_rows(label_rows(competition.read(tmp_path)), file)
    assert str(file) in str(error.value)


def test_the_list_of_profile_kaggle_names_studies_series_and_foramina() -> None:
    parameters = load_parameters("kaggle")
    file = NOTEBOOKS / parameters["not_trained_csv"]
    listed = pd.read_csv(file, dtype=str)
    whole, series = listed[listed.condition.isna() & listed.study_id.notna()], listed[listed.series_id.notna()]
    foraminal = listed[listed.condition == "foraminal"]
    assert (len(whole), len(series), len(foraminal), len(listed)) == (4, 7, 17, 28)
    assert listed.source.notna().all()
    columns = ["study_id", "series_id", "condition", "level"]
    names, ids = list(words.CONDITIONS), [*whole.study_id, *foraminal.study_id, 1]
    rows = [(int(study), 7, name, level) for study in ids for name in names for level in words.LEVELS]
    rows += [(1, int(series_id), "left_subarticular_stenosis", "l4_l5") for series_id in series.series_id]
    left = ~competition.trained_rows(pd.DataFrame(rows, columns=columns), file)
    assert left.sum() == 4 * 25 + 17 * 10 + 7


def test_points_csv_replaces_and_adds_points(tmp_path: Path, tables: Tables) -> None:
    original = tables["train_label_coordinates"].drop(index=1)
    save(tmp_path, {"train_label_coordinates": original})
    file = write_csv(
        tmp_path / "points.csv",
        competition.POINTS,
        (101, 1012, 4, "Spinal Canal Stenosis", "L1/L2", 1.5, 2.5),
        (101, 1012, 5, "spinal_canal_stenosis", "l2_l3", 3.5, 4.5),
    )
    comp = competition.read(tmp_path, points_csv=file)
    assert len(comp.coordinates) == len(original) + 1
    points = comp.coordinates.merge(pd.read_csv(file)[["study_id", "x"]], on=["study_id", "x"]).set_index("level")
    assert points.y.to_dict() == {"l1_l2": 2.5, "l2_l3": 4.5}
    assert points.instance_number.to_dict() == {"l1_l2": 4, "l2_l3": 5}
    corrected = comp.findings[comp.findings.rule == "point_corrected"]
    assert corrected.action.tolist() == ["replaces the table's point", "added"]
    assert rules(comp.findings) == {"point_corrected": 2}


@pytest.mark.parametrize(
    ("kind", "row", "message"),
    [
        ("exclude", (999, "", "", "", ""), "line 3 names study_id 999, which"),
        ("exclude", (101, 1021, "", "", ""), "line 3 names study_id 101 and series_id 1021, which"),
        ("exclude", (101, "first", "", "", ""), "series_id first"),
        (
            "exclude",
            (101, "", "stenosis", "", ""),
            "line 3 names condition 'stenosis'; known are Spinal Canal Stenosis",
        ),
        ("exclude", (101, "", "", "L6", ""), "line 3 names level 'L6'"),
        ("exclude", ("all", "", "", "", ""), "line 3 names study_id all, which"),
        ("exclude", ("1,5", "", "", "", ""), "study_id in line 3 is '1,5'"),
        ("points", (101, 1012, 4, "Spinal Canal Stenosis", "L1/L2", "left", 1), "line 3 is not a point"),
        ("points", (999, 1012, 4, "Spinal Canal Stenosis", "L1/L2", 1, 1), "line 3 names a study that train.csv"),
        ("points", (102, 1012, 4, "Spinal Canal Stenosis", "L1/L2", 1, 1), "line 3 names a series that is not"),
        ("points", (101, 1012, 4, "Spinal Canal Stenosis", "L5/S1", 1, 1), "line 3 names a label that an earlier"),
    ],
)
def test_a_wrong_line_of_exclude_or_points_is_named(tmp_path: Path, tables: Tables, kind, row, message: str) -> None:
    first = {"exclude": (101, "", "", "", ""), "points": (101, 1012, 4, "Spinal Canal Stenosis", "L5/S1", 1, 1)}[kind]
    columns = {"exclude": competition.EXCLUDE, "points": competition.POINTS}[kind]
    file = write_csv(tmp_path / f"{kind}.csv", columns, first, row)
    with pytest.raises(CompetitionError, match=message) as error:
        competition.read(tmp_path, **{f"{kind}_csv": file})
    assert str(file) in str(error.value)
    with pytest.raises(CompetitionError, match="no such file"):
        competition.read(tmp_path, **{f"{kind}_csv": tmp_path / "gone.csv"})


def spoilt(root: Path, change, encoding: str = "utf-8") -> None:
    """Rewrite the text of each table that is read."""
    for file in (*root.glob("train*.csv"), root / "test_series_descriptions.csv"):
        file.write_bytes(change(file.read_text()).encode(encoding))


@pytest.mark.parametrize(
    ("change", "encoding"),
    [
        (lambda text: text.replace("\n", "\r\n"), "utf-8-sig"),
        (lambda text: text.replace(".", "§").replace(",", ";").replace("§", ","), "utf-8"),  # decimal commas
        (lambda text: "\n\n" + text.replace(",", "\t") + "\t\t\n\n", "utf-16"),
        (lambda text: "".join(f"Müller,{line}\n" for line in text.swapcase().splitlines()), "latin-1"),
        (lambda text: re.sub(r"([^,\n]+)", r' "\1"', text).replace("\n", ",\n"), "utf-8"),
        (lambda text: re.sub(r"^(\d+),", r"+\1.0,", text, flags=re.MULTILINE), "utf-8"),
    ],
)
def test_tables_of_spreadsheets_are_read_alike(tmp_path: Path, tables: Tables, change, encoding: str) -> None:
    before = competition.read(tmp_path)
    spoilt(tmp_path, change, encoding)
    after = competition.read(tmp_path)
    for name in ("labels", "coordinates", "series"):
        pd.testing.assert_frame_equal(getattr(before, name), getattr(after, name))
    assert after.findings.empty


@pytest.mark.parametrize(
    "cell", ["1.01E+02", "1.01e2", '"1,010"', "1.010", "101.5", "-101", "9007199254740993.0", "9" * 19]
)
def test_an_id_that_may_have_lost_digits_is_refused_with_its_line(tmp_path: Path, tables: Tables, cell: str) -> None:
    spoilt(tmp_path, lambda text: "\n" + text.replace("\n102,", f"\n{cell},"))
    with pytest.raises(CompetitionError, match=r"train_series_descriptions.csv: study_id in line 6 is .*") as error:
        competition.read(tmp_path)
    assert cell.strip('"') in str(error.value)


def test_ids_beyond_floats_keep_each_digit(tmp_path: Path, tables: Tables) -> None:
    spoilt(tmp_path, lambda text: re.sub(r"\b102\b", "9007199254740993", text))
    comp = competition.read(tmp_path)
    assert all(9007199254740993 in set(table.study_id) for table in (comp.labels, comp.coordinates, comp.series))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("study_id", "patient"), "lacks the column.* study_id; the header has: .*patient"),
        (lambda text: text.replace("study_id", "study_id,study_id"), "several columns study_id"),
        (lambda text: text.replace("\n102,", "\n102,0,0,"), "line 5 has 5 cells, the header 3"),
        (lambda text: text.replace("\n102,", '\n"102,'), "cannot be read as a table"),
        (lambda text: text.replace("102", "1\00002"), "nul bytes"),
        (lambda text: "", "the header has: $"),
    ],
)
def test_a_table_that_would_be_misread_is_refused(tmp_path: Path, tables: Tables, change, message: str) -> None:
    file = tmp_path / "train_series_descriptions.csv"
    file.write_text(change(file.read_text()))
    with pytest.raises(CompetitionError, match=message):
        competition.read(tmp_path)


def test_numbers_that_may_be_thousands_are_no_points(tmp_path: Path, tables: Tables) -> None:
    points = tables["train_label_coordinates"].assign(x="1,024")
    save(tmp_path, {"train_label_coordinates": points})
    comp = competition.read(tmp_path)
    assert comp.coordinates.empty and rules(comp.findings)["point_unusable"] == len(points)
