"""Checks of a data folder: each rule is found where it is broken, and nowhere else."""

from __future__ import annotations

import ast
import re
import shutil
from collections import Counter
from pathlib import Path

import data_folders
import dicom_files
import numpy as np
import pandas as pd
import pytest
import spoil
from data_folders import Tables, save, write_images, write_series, write_tables

from lsdc_utils import phantom
from lsdc_utils import vocabulary as words
from lsdc_utils.data import checks, competition, point_rules

TABLE_DIRT = {  # switch of the phantom -> rule that finds it
    "series_missing": "series_type_missing",
    "second_axial": "series_type_repeated",
    "point_missing": "grade_without_point",
    "label_missing": "point_without_grade",
    "short_stack": "labels_missing",
}
REAL_RATES = {*TABLE_DIRT.values(), "grade_without_point"}  # rules that a phantom with the real rates may break
LEFT, RIGHT = (f"{side}_{words.SUBARTICULAR}" for side in words.SIDES)


@pytest.fixture
def tables(tmp_path: Path) -> Tables:
    """The tables of a clean data folder of four studies with images at tmp_path, to be changed and saved again."""
    tables = write_tables(tmp_path, n_train=4, n_test=1)
    write_images(tmp_path, tables)
    return tables


def check(root: Path) -> checks.Checked:
    return checks.check(competition.read(root))


def rows_of(findings: pd.DataFrame) -> set[tuple]:
    """study, series, rule and value of each finding; 0 for a missing id."""
    return set(
        findings.fillna({"study_id": 0, "series_id": 0}).drop(columns="action").itertuples(index=False, name=None)
    )


def folder(root: Path, series_id: int) -> Path:
    return competition.series_folder(root, "train", series_id // 10, series_id)


def places_of(spine: np.ndarray | float = 0.0, study: int = 1) -> pd.DataFrame:
    """A study's 25 points as `point_rules.judge` takes them; `spine`: x of the canal at the five levels, mm."""
    rows = []
    for c in words.CONDITIONS.values():
        off = data_folders.OFF_CANAL[c.group] * {"left": 1, "right": -1, None: 0}[c.side]
        for k, level in enumerate(words.LEVELS):
            x = off + np.broadcast_to(spine, 5)[k]
            rows.append((study, words.SERIES_TYPES.index(words.GROUPS[c.group].series_type), c.name, level, x, 0.0))
    table = pd.DataFrame(rows, columns=["study_id", "series_id", "condition", "level", "X", "Y"])
    return table.assign(Z=table.level.map(dict(zip(words.LEVELS, (62.0, 32, 0, -31, -57), strict=True))))


def judged(places: pd.DataFrame, middle: float | None = None) -> dict[str, str]:
    """Column (condition and level) -> the rule that its point breaks."""
    rules = point_rules.judge(places, {} if middle is None else {1: middle})
    return {name: rule for name, rule in zip(competition.label_names(places), rules, strict=True) if rule}


def at(places: pd.DataFrame, condition: str, level: str) -> pd.Series:
    return (places.condition == condition) & (places.level == level)


# ---- tables and images ----------------------------------------------------------------------------------------------


def test_a_clean_folder_has_no_findings_and_is_measured(tmp_path: Path, tables: Tables, monkeypatch) -> None:
    checked = check(tmp_path)
    series, labels = checked.series, checked.labels
    assert checked.findings.empty and len(series) == 15
    assert series.n_slices.tolist() == series.series_type.map({words.AXIAL: 13}).fillna(9).tolist()
    assert series.slice_step.tolist() == series.series_type.map({words.AXIAL: 10.0}).fillna(4.0).tolist()
    assert (series.spacing_x == 2.0).all() and (series.n_blocks == 1).all()
    assert [tuple(shape) for shape in series[["rows", "cols"]].to_numpy()] == [
        data_folders.SHAPES[words.PLANES[kind]] for kind in series.series_type
    ]
    assert series.plane.tolist() == series.series_type.map(words.PLANES).tolist()
    assert labels.row_id[:25].tolist() == words.study_row_ids(101)
    place = labels.set_index("row_id").loc[f"101_{RIGHT}_l4_l5", ["X", "Y", "Z"]]
    assert place.tolist() == [-8.0, 0.0, -30.0]
    series.to_parquet(tmp_path / "series.parquet")
    monkeypatch.setattr("lsdc_utils.data.checks.FEW_SERIES", 2)
    for one, other in zip(
        vars(checked).values(), vars(checks.check(competition.read(tmp_path), 2)).values(), strict=True
    ):
        pd.testing.assert_frame_equal(one, other)


def test_each_fault_of_files_and_folders_is_found(tmp_path: Path, tables: Tables) -> None:
    (folder(tmp_path, 1021) / "2.dcm").write_bytes(b"no DICOM")
    for file in folder(tmp_path, 1031).iterdir():
        file.write_bytes(b"no DICOM")
    for series, numbers in ((1032, (1, 2, 3, 4)), (1042, (2,))):  # of other sizes, and a single stranger
        for k in numbers:
            dicom_files.write_slice(
                folder(tmp_path, series) / f"{k}.dcm", k, (4.0 * k - 20, -50.0, 80.0), dicom_files.SAGITTAL,
                spacing=(2.0, 2.0), pixels=np.zeros((70, 50), "uint16"),
            )  # fmt: skip
    shutil.rmtree(folder(tmp_path, 1041))
    shutil.rmtree(tmp_path / "test_images/501")
    write_series(folder(tmp_path, 1019), words.T1)
    write_series(tmp_path / "train_images/77/771", words.T1)
    (tmp_path / "test_images/aside").mkdir()
    localiser = pd.DataFrame([[104, 1049, "Localizer"]], columns=["study_id", "series_id", "series_description"])
    save(tmp_path, {"train_series_descriptions": pd.concat([tables["train_series_descriptions"], localiser])})
    write_series(folder(tmp_path, 1049), words.T1)  # named by the table, though not used
    checked = check(tmp_path)
    found = {(study, series, rule) for study, series, rule, _ in rows_of(checked.findings)}
    assert found == {
        (102, 1021, "file_unusable"),
        (103, 1031, "series_unusable"),
        (103, 1032, "shapes_mixed"),
        (104, 1041, "series_not_on_disk"),
        (104, 1042, "file_unusable"),
        (501, 0, "study_not_on_disk"),
        (101, 1019, "series_not_in_tables"),
        (77, 0, "study_not_in_tables"),
        (0, 0, "study_not_in_tables"),
        (104, 1049, "series_type_unknown"),
    }
    by_id = checked.series.set_index("series_id")
    assert by_id.n_slices[[1021, 1031, 1032, 1041, 1042]].tolist() == [8, 0, 9, 0, 8]
    assert by_id.n_skipped[1021] == 1 and (by_id.rows[1032], by_id.cols[1032]) == (80, 50)


def test_series_that_are_not_what_the_table_says(tmp_path: Path, tables: Tables) -> None:
    shutil.rmtree(folder(tmp_path, 1013))
    write_series(folder(tmp_path, 1013), words.T1)  # in the place of an axial series
    for file in folder(tmp_path, 1021).iterdir():
        file.unlink()
    write_series(folder(tmp_path, 1021), words.T1, SeriesDescription="SAG T2 FRFSE")
    write_series(folder(tmp_path, 1022), words.T2, SeriesDescription="sag stir")
    for k in range(1, 14):
        file = folder(tmp_path, 1033) / f"{k}.dcm"
        dicom_files.write_slice(
            file, k, (-60.0, -50.0, 60.0 - k), spacing=(20.0, 20.0), pixels=np.zeros((50, 60), "uint16")
        )
    checked = check(tmp_path)
    found = {(series, rule): value for _, series, rule, value in rows_of(checked.findings)}
    assert set(found) == {(1013, "plane_differs"), (1021, "contrast_differs"), (1033, "spacing_outlier")}
    assert found[1021, "contrast_differs"] == "T2 in the header, described as Sagittal T1"
    assert found[1033, "spacing_outlier"] == "pixels of 20 x 20 mm"
    assert checked.series.set_index("series_id").loc[1033, "n_slices"] == 0  # it is left out
    labels = checked.labels.set_index("study_id")
    recess = labels.condition.isin([LEFT, RIGHT])
    unused = labels.x.isna()
    assert (unused == (recess & labels.index.isin([101, 103]))).all()
    assert (labels.instance_number[unused] == -1).all() and (labels.series_id[unused] == -1).all()
    assert labels.severity.tolist() == competition.read(tmp_path).labels.severity.tolist()


def test_points_that_are_not_in_their_images(tmp_path: Path, tables: Tables) -> None:
    points = tables["train_label_coordinates"]
    points.loc[0, "instance_number"] = 40
    points.loc[1, "x"] = 50.0
    points.loc[2, "x"] = 49.4
    save(tmp_path, {"train_label_coordinates": points.drop(index=7)})
    checked = check(tmp_path)
    assert rows_of(checked.findings) == {
        (101, 1012, "point_on_missing_instance", "spinal_canal_stenosis_l1_l2"),
        (101, 1012, "point_outside_image", "spinal_canal_stenosis_l2_l3"),
        (101, 0, "grade_without_point", "1 of 25"),
    }
    labels = checked.labels
    assert labels.index[labels.X.isna()].tolist() == labels.index[labels.x.isna()].tolist() == [0, 1, 7]


def test_a_repaired_file_is_reported(tmp_path: Path, tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    read = checks.dicom.read_series

    def repairing(source: Path, pixels: bool = True, labelled: bool = True):
        series = read(source, pixels, labelled)
        files = ((source / "2.dcm", "spacing taken from the others"),) if source.name == "1011" else ()
        object.__setattr__(series, "repaired", files)
        return series

    monkeypatch.setattr(checks.dicom, "read_series", repairing)
    assert rows_of(check(tmp_path).findings) == {(101, 1011, "file_repaired", "2.dcm: spacing taken from the others")}


# ---- points in the patient ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spine", [0.0, [0, 8, 16, 8, 0], [-14, -7, 0, 7, 14]], ids=["straight", "curved", "leaning"])
@pytest.mark.parametrize("left_out", ["none", "canal", "right", "foramina", "some levels"])
def test_points_where_they_belong_break_no_rule(spine, left_out: str) -> None:
    places = places_of(spine)
    canal, right = places.condition == words.SPINAL_CANAL, places.condition.str.startswith("right")
    out = {
        "none": canal & False,
        "canal": canal,
        "right": right,
        "foramina": places.condition.str.endswith(words.FORAMINAL),
        "some levels": (canal & (places.level != "l3_l4")) | (right & (places.level < "l4")),
    }[left_out]
    assert judged(places[~out], middle=3.0) == {}
    clicked = places[~out]  # each point beside its place, as clicks and moving patients are
    rng = np.random.default_rng(0)
    for _ in range(20):
        moved = clicked.assign(
            X=clicked.X + rng.uniform(-2, 2, len(clicked)), Z=clicked.Z + rng.uniform(-5, 5, len(clicked))
        )
        assert judged(moved) == {}


@pytest.mark.parametrize("group", ["nfn", "ss"])
@pytest.mark.parametrize("without_canal", [False, True])
def test_points_on_the_wrong_side(group: str, without_canal: bool) -> None:
    left, right = (c.name for c in words.CONDITIONS.values() if c.group == group and c.side)
    places = places_of([0, 3, 6, 3, 0])
    places = places[(places.condition != words.SPINAL_CANAL) | (not without_canal)]
    swapped = places.replace({"condition": {left: right, right: left}})
    wrong = {f"{side}_{level}": "point_on_wrong_side" for side in (left, right) for level in words.LEVELS}
    assert judged(swapped) == wrong
    one = places.copy()
    one.loc[at(one, left, "l4_l5"), "X"] = one.X[at(one, right, "l4_l5")].item() - 1.0
    assert judged(one) == {f"{left}_l4_l5": "one_side_twice"}
    assert judged(one[~at(one, right, "l4_l5")]) == {f"{left}_l4_l5": "point_on_wrong_side"}
    both_left = places.copy()
    both_left.loc[at(both_left, right, "l1_l2"), "X"] = both_left.X[at(both_left, left, "l1_l2")].item()
    assert judged(both_left) == {f"{right}_l1_l2": "one_side_twice"}


def test_the_side_of_a_lone_point_comes_from_the_middle_of_the_slices_where_nothing_else_is_known() -> None:
    places = places_of()
    lone = places[at(places, LEFT, "l4_l5")]
    assert judged(lone) == {} and judged(lone, middle=0.0) == {} and judged(lone, middle=12.0) == {}
    assert judged(lone, middle=17.0) == {f"{LEFT}_l4_l5": "point_on_wrong_side"}
    pair = places[at(places, LEFT, "l4_l5") | at(places, RIGHT, "l4_l5")]
    swapped = pair.replace({"condition": {LEFT: RIGHT, RIGHT: LEFT}})
    assert judged(pair) == {} and set(judged(swapped)) == {f"{LEFT}_l4_l5", f"{RIGHT}_l4_l5"}


def test_levels_out_of_order() -> None:
    exchanged = places_of()
    here = exchanged.condition == LEFT
    exchanged.loc[here, "level"] = exchanged.level[here].replace({"l3_l4": "l4_l5", "l4_l5": "l3_l4"})
    rule = "levels_out_of_order"
    assert judged(exchanged) == {f"{LEFT}_l3_l4": rule, f"{LEFT}_l4_l5": rule}
    assert judged(exchanged[here]) == judged(exchanged)  # no other condition is needed
    far = places_of()
    far.loc[at(far, words.SPINAL_CANAL, "l1_l2"), "Z"] = -80.0
    assert judged(far) == {f"{words.SPINAL_CANAL}_l1_l2": rule}
    backwards = places_of()
    backwards["Z"] *= -1  # all levels named from below: every condition contradicts itself
    assert set(judged(backwards).values()) == {rule}


def test_points_of_a_level_far_apart() -> None:
    rule = "level_points_apart"
    for condition, level, moved in ((words.SPINAL_CANAL, "l1_l2", 30.0), (LEFT, "l5_s1", -30.0)):
        places = places_of()
        places.loc[at(places, condition, level), "Z"] += moved
        assert judged(places) == {f"{condition}_{level}": rule}
        places.loc[at(places, condition, level), "Z"] -= 0.3 * moved
        assert judged(places) == {}
    axial = places_of()
    axial.loc[axial.series_id == 2, "Z"] += 34.0  # a level too high on the whole axial series
    assert judged(axial) == {f"{side}_{level}": rule for side in (LEFT, RIGHT) for level in words.LEVELS}
    assert judged(axial[axial.series_id > 0]) == {}  # with only two series it is unknown which is right


def test_a_point_that_breaks_a_rule_has_no_place_and_keeps_its_grade(tmp_path: Path, tables: Tables) -> None:
    points = tables["train_label_coordinates"]
    titles = {c.title: words.CONDITIONS[words.mirrored(c.name)].title for c in words.CONDITIONS.values()}
    here = (points.study_id == 101) & (points.level == "L4/L5") & points.condition.str.contains("Subarticular")
    points.loc[here, "condition"] = points.condition[here].map(titles)
    save(tmp_path, {"train_label_coordinates": points})
    checked = check(tmp_path)
    assert rows_of(checked.findings) == {(101, 1013, "point_on_wrong_side", f"{side}_l4_l5") for side in (LEFT, RIGHT)}
    labels = checked.labels.set_index("row_id")
    lost = labels[labels.x.isna()]
    assert set(lost.index) == {f"101_{side}_l4_l5" for side in (LEFT, RIGHT)}
    assert lost[["X", "Y", "Z"]].isna().all(axis=None) and (lost[["series_id", "instance_number"]] == -1).all(axis=None)
    assert labels.severity.tolist() == competition.read(tmp_path).labels.severity.tolist()
    pd.testing.assert_frame_equal(checked.labels, checks.label_table(competition.read(tmp_path)))


# ---- phantoms -------------------------------------------------------------------------------------------------------


def test_points_of_the_phantom_come_together_in_the_patient(tmp_path: Path) -> None:
    dirt = ("tilted_blocks", "far_numbers", "number_gaps", "axial_reversed", "sagittal_reversed", "non_square")
    rates = dict.fromkeys((*TABLE_DIRT, "sides_swapped"), 0.0) | dict.fromkeys(dirt, 1.0)
    checked = check(phantom.write_phantom(tmp_path / "data", 1, 0, seed=3, **rates))
    assert checked.findings.empty
    axial = checked.series[checked.series.series_type == words.AXIAL]
    assert axial.n_blocks.sum() == 5 and (axial.instance_order == "down").all()
    assert (checked.series.first_instance >= 100).all() and (checked.series.rows != checked.series.cols).all()
    labels = checked.labels
    assert labels[["X", "Y", "Z"]].notna().all(axis=None)
    side = labels.condition.map({c.name: c.side for c in words.CONDITIONS.values()})
    for _, part in labels.groupby("level"):
        x = part.groupby(side[part.index].fillna("canal")).X.agg(["min", "max"])
        assert x.loc["right", "max"] < x.loc["canal", "min"] <= x.loc["canal", "max"] < x.loc["left", "min"]
        assert np.ptp(part.Z) < 25 and np.ptp(part.Y) < 25


def test_sides_swapped_by_the_phantom_are_all_found_and_no_others(tmp_path: Path) -> None:
    one, other = (
        check(phantom.write_phantom(tmp_path / f"swapped{rate}", 4, 0, seed=8, sides_swapped=rate, short_stack=0.0))
        for rate in (0.0, 1.0)
    )
    assert set(one.findings.rule) <= REAL_RATES
    keys = ["study_id", "series_id", "instance_number", "x", "y"]
    before, after = (competition.read(tmp_path / f"swapped{rate}").coordinates for rate in (0.0, 1.0))
    moved = before.merge(after, on=competition.KEY).query("x_x != x_y or y_x != y_y")
    found = other.findings[other.findings.rule == "point_on_wrong_side"]
    assert len(moved) > 10 and set(zip(found.study_id, found.value, strict=True)) == set(
        zip(moved.study_id, competition.label_names(moved), strict=True)
    )
    kept = other.labels.dropna(subset="x")
    assert len(kept.merge(one.labels, on=[*keys, "condition", "level"])) == len(kept)


def test_dirt_of_the_phantoms_tables_is_found(tmp_path: Path) -> None:
    clean = dict.fromkeys((*TABLE_DIRT, "sides_swapped"), 0.0)
    for switch, rule in TABLE_DIRT.items():
        root = phantom.write_phantom(tmp_path / switch, 8, 0, seed=5, images=False, **clean | {switch: 0.5})
        assert rule in set(competition.read(root).findings.rule)
    root = phantom.write_phantom(tmp_path / "clean", 8, 0, seed=5, images=False, **clean)
    assert competition.read(root).findings.empty


def counted(rows: pd.DataFrame) -> Counter:
    """How often study, series, rule and value occur; of values only names of labels and of files count."""
    first = rows.value.str.split(r"[: ]", n=1, regex=True).str[0]
    value = first.where(rows.rule.str.startswith("file_") | first.isin(words.COLUMNS), "")
    ids = rows[["study_id", "series_id"]].astype("Int64").fillna(0)
    return Counter(zip(ids.study_id, ids.series_id, rows.rule, value, strict=True))


def test_everything_planted_is_found_and_nothing_invented(tmp_path: Path) -> None:
    """The table of what was planted and what was found is printed: `pytest -s -k planted tests/data/test_checks.py`."""
    rates = {"series_missing": 0.06, "second_axial": 0.4, "axial_split": 0.3, "short_stack": 0.06}
    rates |= {"label_missing": 0.002, "point_missing": 0.01, "tilted_blocks": 0.1, "step": 1.5}
    n = 2 * len(spoil.KINDS)
    root = phantom.write_phantom(tmp_path / "spoilt", n, 0, seed=6, workers=2, sides_swapped=0.06, **rates)
    straight = phantom.write_phantom(tmp_path / "straight", n, 0, seed=6, images=False, sides_swapped=0.0, **rates)
    spoil.change_forms(root, spoil.FORMS, share=0.05)
    rows, _ = spoil.spoil(root, straight=straight)
    planted, found = counted(rows), counted(check(root).findings)
    for rule in sorted({key[2] for key in planted | found}):
        n_planted, n_found = (sum(n for key, n in table.items() if key[2] == rule) for table in (planted, found))
        print(f"{rule:28} planted {n_planted:3}   found {n_found:3}")
    assert len({key[2] for key in planted}) > 25
    assert not planted - found, "missed"
    assert not found - planted, "invented"


# ---- the rules and the command --------------------------------------------------------------------------------------


def test_every_rule_that_the_code_names_has_a_meaning() -> None:
    named = set()
    for module in ("unsorted", "competition", "tables", "point_rules", "checks", "stacks"):
        tree = ast.parse((Path(checks.__file__).parent / f"{module}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add" and len(node.args) == 4:
                named |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
            if isinstance(node, ast.Tuple) and len(node.elts) in (3, 5):
                rule = node.elts[len(node.elts) - 3]
                if isinstance(rule, ast.Constant) and isinstance(node.elts[-1], ast.Constant):
                    named |= {rule.value} if isinstance(node.elts[-1].value, str) else set()
    rules = {word for word in named if re.fullmatch(r"[a-z]+(_[a-z]+)+", str(word))}
    assert len(rules) > 25
    assert rules <= set(checks.RULES)


def test_the_command_counts_and_writes_findings(tmp_path: Path, tables: Tables, capsys) -> None:
    assert checks.main(tmp_path) == 0
    clean = capsys.readouterr().out
    assert "train: 4 studies, 12 series, 124 images" in clean and "usable: 15 of 15 series" in clean
    shutil.rmtree(folder(tmp_path, 1021))
    assert checks.main(tmp_path, tmp_path / "out" / "findings.csv") == 0
    text = capsys.readouterr().out
    assert "series_not_on_disk: 1 (studies: 1)" in text and "action: series left out" in text
    assert checks.RULES["series_not_on_disk"] in text and "example: 102/1021: Sagittal T1" in text
    assert pd.read_csv(tmp_path / "out" / "findings.csv").rule.tolist() == ["series_not_on_disk"]


@pytest.mark.parametrize("fault", ["tables", "images", "pixels"])
def test_a_folder_that_cannot_be_used_says_why(tmp_path: Path, tables: Tables, capsys, fault: str) -> None:
    if fault == "tables":
        (tmp_path / "train.csv").write_text("study_id\nx\n")
    for file in sorted(tmp_path.glob("*_images/*/*/*.dcm")) if fault == "pixels" else ():
        file.write_bytes(b"")
    for split in competition.SPLITS if fault == "images" else ():
        shutil.rmtree(tmp_path / f"{split}_images")
    assert checks.main(tmp_path) == 1
    expected = {"tables": "lacks the column", "images": "no image of any series", "pixels": "no image of any series"}
    assert f"not usable: {'' if fault != 'tables' else str(tmp_path)}" in (text := capsys.readouterr().out)
    assert expected[fault] in text


ALL = "nfn (4 studies), scs (4 studies), ss (4 studies)"
ONE = "only one study has a usable point with a grade for"
NO_POINT = "no study has a usable point with a grade for"


@pytest.mark.parametrize(
    ("fault", "uses"),
    [
        ("", f"training {ALL}, evaluating nfn, scs, ss, predicting (5 studies)"),
        (
            "no points",
            f"training {ALL}, evaluating nfn, scs, ss, predicting (5 studies); levels and points from MODELS",
        ),
        (
            "grades",
            "training nfn (4 studies), scs (4 studies), evaluating nfn, scs, ss, predicting (5 studies); train with "
            "conditions=nfn,scs; cannot train ss: no grades for right subarticular stenosis",
        ),
        (
            "points",
            "training scs (4 studies), ss (4 studies), evaluating nfn, scs, ss, predicting (5 studies); train with "
            "conditions=scs,ss; nfn with conditions=nfn: levels and points from MODELS",
        ),
        (
            "T1 alone",
            "training nfn (3 studies, 2 with points), evaluating nfn, predicting (5 studies); "
            "no T2: levels from T1; no axial T2",
        ),
        ("ss alone", "training ss (4 studies), evaluating ss, predicting (5 studies); levels from MODELS"),
        (
            "axial alone",
            "evaluating ss, predicting (5 studies); no T1; no T2; cannot train ss: there is no sagittal series to tell "
            "the levels",
        ),
        (
            "one study",
            "evaluating nfn, scs, ss, predicting (5 studies); "
            + "; ".join(f"cannot train {key}: {ONE} {group.score} stenosis" for key, group in words.GROUPS.items()),
        ),
        ("empty", "predicting (5 studies)"),
        ("no train.csv", "predicting (5 studies)"),
        ("no training tables", "predicting (1 study)"),
    ],
)
def test_what_a_folder_can_be_used_for(tmp_path: Path, tables: Tables, capsys, fault: str, uses: str) -> None:
    train, points = tables["train"], tables["train_label_coordinates"]
    group = {"T1 alone": "foraminal", "ss alone": "subarticular", "axial alone": "subarticular"}.get(fault, "")
    if group:
        train = train[["study_id", *(name for name in words.COLUMNS if group in name)]]
        points = points[points.condition.str.lower().str.contains(group)]
    if fault in ("T1 alone", "axial alone"):
        for split in competition.SPLITS:
            kinds = tables[f"{split}_series_descriptions"].series_description
            kept = kinds == (words.T1 if fault == "T1 alone" else words.AXIAL)
            save(tmp_path, {f"{split}_series_descriptions": tables[f"{split}_series_descriptions"][kept]})
    if fault == "T1 alone":
        train = train.mask(train.study_id == 101).assign(study_id=train.study_id)
        points = points[points.study_id != 102]
    elif fault == "grades":
        train[[name for name in words.COLUMNS if name.startswith(RIGHT)]] = np.nan
    elif fault == "points":
        points = points[~points.condition.str.contains("Foraminal")]
    elif fault in ("one study", "empty"):
        train = train[: int(fault == "one study")]
    save(tmp_path, {"train": train, "train_label_coordinates": points[: 0 if fault == "no points" else None]})
    for file in tmp_path.glob({"no train.csv": "train.csv", "no training tables": "train*.csv"}.get(fault, "none")):
        file.unlink()
    (tmp_path / "outputs/pretrained").mkdir(parents=True)
    (tmp_path / "outputs/pretrained/blend.json").touch()
    assert checks.main(tmp_path, source=tmp_path / "outputs/pretrained") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"usable for: {uses}".replace("MODELS", "outputs/pretrained")


def test_without_ready_made_models_labels_without_points_train_nothing(tmp_path: Path, tables: Tables, capsys) -> None:
    (tmp_path / "train_label_coordinates.csv").unlink()
    assert checks.main(tmp_path, source=tmp_path) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        "usable for: evaluating nfn, scs, ss, predicting (5 studies); cannot train nfn: no label has"
    )


@pytest.mark.parametrize(
    ("points", "message"),
    [("images", f"{NO_POINT} foraminal stenosis"), ("gone", "no label has a point, and there are no models")],
)
def test_why_models_cannot_be_trained_is_one_sentence(tmp_path: Path, tables: Tables, points: str, message) -> None:
    table = tables["train_label_coordinates"]
    if points == "images":
        table.loc[table.condition.str.contains("Foraminal"), "instance_number"] = 999
    save(tmp_path, {"train_label_coordinates": table[: 0 if points == "gone" else None]})
    assert checks.untrainable(check(tmp_path).labels).startswith(f"cannot train: {message}")


def test_each_fold_needs_each_condition_and_there_are_two(tmp_path: Path, tables: Tables) -> None:
    labels = checks.label_table(competition.read(tmp_path))
    assert checks.untrainable(labels) == "" == checks.untrainable(labels.assign(fold=labels.study_id % 2))
    assert "all studies are in one fold" in checks.untrainable(labels.assign(fold=0))
    lost = (labels.study_id % 2 == 1) & labels.condition.str.endswith("foraminal_narrowing")
    cut = labels.assign(fold=labels.study_id % 2, X=labels.X.mask(lost))
    assert checks.untrainable(cut).endswith("for foraminal stenosis in fold 1")


def test_some_conditions_need_nothing_of_the_others(tmp_path: Path, tables: Tables) -> None:
    labels = checks.label_table(competition.read(tmp_path))
    alone = labels.assign(severity=labels.severity.where(labels.condition.str.contains("foraminal"), words.MISSING))
    assert checks.wanted(alone, ["all"], "") == (["nfn"], [])
    assert checks.untrainable(alone, ["nfn"]) == "" != checks.untrainable(alone)
    with pytest.raises(ValueError, match="no study has a grade for spinal stenosis"):
        checks.wanted(alone, ["nfn", "scs"], "")
    assert "no sagittal series" in checks.untrainable(alone, ["nfn"], types=[words.AXIAL])
    one_study = alone[alone.study_id == alone.study_id.iloc[0]]
    assert "only one study has a usable point" in checks.untrainable(one_study, ["nfn"])


def test_models_are_taken_where_labels_have_no_points(tmp_path: Path, tables: Tables) -> None:
    labels = checks.label_table(competition.read(tmp_path)).assign(fold=lambda rows: rows.study_id % 2)
    bare, group = labels.assign(X=np.nan), labels.condition.map(words.GROUP_OF)
    both, ready = ["localiser", "yolo"], tmp_path / "pretrained"
    assert checks.taken_models(labels, ["nfn"]) == [] and checks.taken_models(labels, ["nfn"], "other") == both
    assert checks.taken_models(bare, ["nfn"]) == both
    axial = labels.assign(X=labels.X.where(group == "ss"))
    assert checks.taken_models(axial, ["ss"]) == ["localiser"] and checks.taken_models(axial, ["nfn"]) == both
    left = labels.assign(X=labels.X.where(labels.condition.str.startswith("left")))
    assert checks.taken_models(left, ["nfn"]) == ["localiser"]  # a foramen of one side does not tell the canal
    canal = (group == "ss") | (group == "scs") & (labels.fold == 0)
    one_fold = labels.assign(X=labels.X.where(canal))  # the other one has no point of the canal
    assert checks.taken_models(one_fold, ["ss"]) == ["localiser"]
    for table, why in ((bare, "no label has a point"), (axial, "no points on sagittal images tell the levels")):
        assert why in (fault := checks.untrainable(table, ["ss"], source=ready)) and "points_from" in fault
    ready.mkdir()
    (ready / "blend.json").touch()
    assert checks.untrainable(bare, ["ss"], source=ready) == "" == checks.untrainable(axial, ["ss"], source=ready)
    ungraded = bare.assign(severity=bare.severity.where(bare.fold == 0, words.MISSING))
    assert "no training study has a grade in fold 1" in checks.untrainable(ungraded, ["ss"], source=ready)
