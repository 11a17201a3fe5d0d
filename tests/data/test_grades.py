"""Tables of grades in the forms that people have: read with the right values, or refused with the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from lsdc_utils import vocabulary as words
from lsdc_utils.data import competition
from lsdc_utils.data.competition import CompetitionError
from lsdc_utils.data.tables import Findings, label_parts, named_label, read_grades

LEFT, RIGHT = (f"{side}_{words.FORAMINAL}" for side in words.SIDES)
LABELS = {(7, LEFT, "l4_l5"): 0, (7, RIGHT, "l5_s1"): 1, (8, words.SPINAL_CANAL, "l1_l2"): 2}


def read(tmp_path: Path, text: str) -> tuple[dict[tuple, int], Findings]:
    """The grades of a table by label, without missing ones, and the findings about it."""
    file, findings = tmp_path / "grades.csv", Findings()
    file.write_text(text)
    labels = read_grades(file, findings)
    assert len(labels) == 25 * labels.study_id.nunique() and labels.severity.dtype == labels.study_id.dtype == "int64"
    assert (labels.condition + "_" + labels.level).tolist()[:25] == list(words.COLUMNS)
    graded = labels[labels.severity >= 0].set_index(competition.KEY)
    return graded.severity.to_dict(), findings


def form(findings: Findings) -> str:
    table = findings.table()
    (value,) = table.value[table.rule == "labels_read_as"]
    return value


@pytest.mark.parametrize(
    "text",
    [
        "study_id,left_neural_foraminal_narrowing_l4_l5,right_neural_foraminal_narrowing_l5_s1,"
        "spinal_canal_stenosis_l1_l2\n7,Normal/Mild,Moderate,\n8,,,Severe\n",
        "Study-ID;Left NFN L4/L5;L5-S1 nfn right;SCS L1-2\n7;normal;MODERATE;NA\n8; ;null;severe \n",
        "StudyID,left foraminal L4-L5,nfn_r_l5s1,spinal L1/2\n7,mild,moderate,\n8,nan,,Severe\n",
        "study id,condition,level,severity\n7,Left Neural Foraminal Narrowing,L4/L5,Normal\n"
        "7,right_neural_foraminal_narrowing,l5_s1,moderate\n8,spinal canal stenosis,L1-L2,SEVERE\n",
        "study_id,side,level,condition,grade\n7,L,L4-5,nfn,0\n7,right,L5-S1,Foraminal,1.0\n8,,L1/L2,scs,2\n",
        "row_id,severity\n7_left_neural_foraminal_narrowing_l4_l5,normal / mild\n"
        "7_RIGHT_neural_foraminal_narrowing_L5_S1,moderate\n8_spinal_canal_stenosis_l1_l2,severe\n",
        "study_id,level,nfn left,nfn right,scs\n7,L4/L5,1,,\n7,L5/S1,,2,\n8,L1/L2,,,3\n",
    ],
)
def test_each_form_is_read_with_the_same_values(tmp_path: Path, text: str) -> None:
    graded, findings = read(tmp_path, text)
    assert graded == LABELS
    assert form(findings).split("; ")[-1] in ("words", "numbers 0, 1, 2", "numbers 1, 2, 3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("study_id,scs_l1_l2,comment\n7,0,x\n8,2,y\n", "1 columns of grades; not read: comment; numbers 0, 1, 2"),
        ("study_id,level,scs\n7,L1/L2,Severe\n", "1 columns of grades; words"),
        (
            "study_id,condition,level,grade\n7,scs,L1/L2,1\n7,scs,L2/L3,2\n7,scs,L3/L4,3\n",
            "one row a finding; numbers 1,",
        ),
        (
            "row_id,severity,reader\n7_spinal_canal_stenosis_l1_l2,Severe,A\n",
            "one row a finding; not read: reader; words",
        ),
    ],
)
def test_how_a_table_was_read_is_said(tmp_path: Path, text: str, expected: str) -> None:
    assert form(read(tmp_path, text)[1]).startswith(expected)


def test_numbers_of_25_columns_are_said_and_words_are_not(tmp_path: Path) -> None:
    header = f"study_id,{','.join(words.COLUMNS)}\n"
    assert read(tmp_path, f"{header}7{',Moderate' * 25}\n")[1].table().empty
    graded, findings = read(tmp_path, f"{header}7{',0' * 24},1\n")
    assert set(graded.values()) == {0, 1} and form(findings) == "25 columns of grades; numbers 0, 1, 2"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ((1, 2), "line 2 holds the grade '1', and the table has no 0, nor all of 1, 2, 3"),
        ((2, 3), "line 2 holds the grade '2', and the table has no 0"),
        ((0, 3), "line 3 holds the grade '3', where numbers must be 0, 1, 2"),
        ((1, 2, 3, 4), "line 5 holds the grade '4', where numbers must be 1, 2, 3"),
        ((0, 1, -1), "line 4 holds the grade '-1', where other grades are numbers"),
        ((0, 1.5, 1), "line 3 holds the grade '1.5', where other grades are numbers"),
        ((0, 1, "Severe"), "line 4 holds the grade 'Severe', where other grades are numbers"),
        (("Severe", "normal", 1), "line 4 holds the grade '1', where other grades are words"),
        (("Severe", "normal", "grave"), "line 4 holds the grade 'grave', which is not a known word"),
    ],
)
def test_a_grade_that_is_not_certain_is_refused_with_its_line(tmp_path: Path, cells: tuple, message: str) -> None:
    text = "study_id,scs_l1_l2\n" + "".join(f"{7 + n},{cell}\n" for n, cell in enumerate(cells))
    with pytest.raises(CompetitionError, match=message) as error:
        read(tmp_path, text)
    assert str(error.value).startswith(f"{tmp_path}/grades.csv: line ") and "write Normal/Mild" in str(error.value)


def test_a_stray_word_among_many_is_missing(tmp_path: Path) -> None:
    text = "study_id,scs_l1_l2\n" + "".join(f"{n},{'grave' if n == 3 else 'Severe'}\n" for n in range(10))
    graded, findings = read(tmp_path, text)
    assert set(graded.values()) == {2} and len(graded) == 9
    unknown = findings.table().query("rule == 'grade_unknown'")
    assert unknown[["study_id", "value", "action"]].to_numpy().tolist() == [[3, "grave", "read as missing"]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "study_id,condition,level,severity\n7,nfn,L4/L5,Severe\n",
            "line 2 names 'nfn L4/L5', expected condition, side",
        ),
        ("study_id,condition,level,severity\n7,left scs,L4/L5,Severe\n", "line 2 names 'left scs L4/L5'"),
        ("study_id,condition,level,severity\n\n7,scs,L4/S1,Severe\n", "line 3 names 'scs L4/S1'"),
        ("study_id,condition,side,level,grade\n7,left nfn,right,L4/5,0\n", "line 2 names 'left nfn L4/5 right'"),
        ("study_id,condition,level,severity\n7,,,Severe\n", "line 2 names ''"),
        ("study_id,left_nfn\n7,Severe\n", "line 2 names 'left_nfn'"),
        (
            "row_id,severity\n7_scs_l1_l2,0\n",
            "row_id in line 2 is '7_scs_l1_l2'; expected <study_id>_<condition>_<level>",
        ),
        ("row_id,severity\n7e5_spinal_canal_stenosis_l1_l2,0\n", "row_id in line 2 is '7e5_spinal"),
        ("study_id,scs_l1_l2\n7,\n,Severe\n", "study_id in line 3 is ''"),
        ("patient,scs_l1_l2\n7,Severe\n", r"lacks the column\(s\) study_id, .*; the header has: patient, scs_l1_l2"),
        ("study_id,study id,scs_l1_l2\n7,7,Severe\n", "several columns study_id"),
    ],
)
def test_a_label_that_is_not_certain_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CompetitionError, match=message):
        read(tmp_path, text)


def test_contradictions_are_refused_with_both_lines_and_equal_grades_count_once(tmp_path: Path) -> None:
    lines = "study_id,scs_l1_l2,scs_l2_l3\n7,Severe,\n8,Severe,Mild\nA-7,mild,mild\n"
    graded, findings = read(tmp_path, f"{lines}7,severe,Moderate\n")
    canal = words.SPINAL_CANAL
    assert graded[7, canal, "l1_l2"] == 2 and graded[7, canal, "l2_l3"] == 1 and len(graded) == 6
    assert findings.table().query("rule == 'study_repeated'").study_id.tolist() == [7]
    message = r"lines 4 and 6 have different grades of A-7 spinal_canal_stenosis l2_l3; keep the right one"
    with pytest.raises(CompetitionError, match=message):
        read(tmp_path, f"{lines}7,,\nA-7,mild,Severe\n")
    with pytest.raises(CompetitionError, match="lines 2 and 2 have different grades of 7"):
        read(tmp_path, "study_id,scs_l1_l2,spinal canal stenosis L1/L2\n7,Severe,Mild\n")


def test_words_for_labels() -> None:
    assert named_label("Right Subarticular Stenosis") == named_label("SS, r") == (f"right_{words.SUBARTICULAR}", None)
    assert named_label("L5-1") == named_label("L5/S1") == named_label("l5s1") == (None, "l5_s1")
    assert named_label("scs l1_l2 L1-2") == (words.SPINAL_CANAL, "l1_l2") and named_label("left NFN, L")[0] == LEFT
    for text in ("L4-L6", "scs comment", "left right nfn", "left scs", "nfn", "l1_l2 l2_l3", ""):
        assert named_label(text) == (None, None), text
    assert label_parts("") == {} and label_parts("nfn left") == {"group": "nfn", "side": "left"}
    assert all(named_label(name)[1] == level for name, level in zip(words.LEVEL_NAMES, words.LEVELS, strict=True))
    assert all(named_label(c.title) == (c.name, None) == named_label(c.name) for c in words.CONDITIONS.values())
