"""Tables as people have them, read by the lines of the file: ids as numbers or text, grades in several forms. What is
not certain is refused with its line; nothing is guessed."""

import csv
import hashlib
import io
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd

from lsdc_utils import vocabulary as words

KEY = ["study_id", "condition", "level"]  # identify a label, and its point
IDS = ("row_id", "study_id", "patient_id", "patient")  # columns; the last two say whose a study is
FINDINGS = ["study_id", "series_id", "rule", "value", "action"]
ABSENT = ("NA", "N/A", "#N/A", "nan", "NaN", "NULL", "null", "None", "<NA>")  # cells that hold nothing
# Words for a part of a label -> the part and its value; longer words first.
LABEL_WORDS = {
    w: ("level", level) for level in words.LEVELS for w in (level, level[:3] + level[4:], level[:2] + level[3:])
}
LABEL_WORDS |= {
    w: ("group", key) for key, g in words.GROUPS.items() for w in (g.base, f"{g.score}_stenosis", g.score, key)
}
LABEL_WORDS |= {w: ("side", side) for side in words.SIDES for w in (side, side[0])}
GRADE_WORDS = {name: k for k, name in enumerate(words.SEVERITIES)} | {"normal": 0, "mild": 0}
FEW = 0.1  # largest share of the grades that may be unknown words, which are read as missing: slips, not another scale
ROW_ID = re.compile(rf"(.+)_({'|'.join(words.COLUMNS)})", re.IGNORECASE)
Table = pd.DataFrame


class CompetitionError(ValueError):
    """A data folder that cannot be used; the message names the table and the reason."""


@dataclass
class Findings:
    """Collects findings, and ids in the spelling of the tables, while tables are read."""

    tables: list[Table] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)  # see `number_of`

    def add(self, rows: Table, rule: str, value: str | pd.Series, action: str) -> None:
        """One finding for each of `rows` (study_id, and series_id if there is one)."""
        if len(rows):
            value = value.astype(str).to_numpy() if isinstance(value, pd.Series) else value
            self.tables.append(rows.assign(rule=rule, value=value, action=action).reindex(columns=FINDINGS))

    def table(self) -> Table:
        """All findings; a missing id is <NA>."""
        table = pd.concat(self.tables, ignore_index=True) if self.tables else pd.DataFrame(columns=FINDINGS)
        return table.astype({"study_id": "Int64", "series_id": "Int64", "rule": str, "value": str, "action": str})


def read_required_table(
    file: Path, columns: Sequence[str], ids: Sequence[str] = (), names: dict[int, str] | None = None
) -> Table:
    """Columns (none: all) of a table as text (NaN: nothing), those of `ids` as int64, indexed by the file's lines. Read
    are commas, semicolons or tabs, UTF-8, UTF-16 and Latin-1, and headers in any case, with blanks or hyphens. names:
    gets the ids, see `number_of`. CompetitionError if no file is there, or it or a line cannot be read exactly."""
    try:
        lines, header = _cells(file)
    except FileNotFoundError:
        raise CompetitionError(f"{file}: no such file") from None
    except (ValueError, OSError) as error:
        raise CompetitionError(f"{file}: cannot be read as a table ({error})") from None
    if lacking := [column for column in columns if column not in header]:
        found = f"{', '.join(lacking)}; the header has: {', '.join(header)[:300]}"
        raise CompetitionError(f"{file}: lacks the column(s) {found}")
    if twice := [column for column in columns if header.count(column) > 1]:
        raise CompetitionError(f"{file}: has several columns {twice[0]}; keep the right one")
    table = pd.DataFrame(lines.values(), list(lines), header, dtype="str")
    table = table.where(~table.isin(["", *ABSENT]))
    for column in ids:
        numbers = {cell: number_of(cell, names) for cell in table[column].fillna("").unique()}
        for line, cell in table[column].fillna("").items():
            if numbers[cell] is None:
                lost = f"{column} in line {line} is {cell!r}, not a whole number with all its digits"
                raise CompetitionError(f"{file}: {lost}; export the ids as text")
        table[column] = table[column].map(numbers).astype("int64")
    return table[columns] if columns else table


def _cells(file: Path) -> tuple[dict[int, list[str]], list[str]]:
    """The cells of each line that is not blank, by the line's number, and the header; ValueError says what is wrong."""
    data = Path(file).read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # names and reasons of western spreadsheets
    if "\0" in text:
        raise ValueError("it holds nul bytes; save it as csv in UTF-8")
    first = next(filter(str.strip, text.splitlines()), "")
    mark = max(",;\t", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=mark, skipinitialspace=True, strict=True)
    rows = ((reader.line_num, [cell.strip() for cell in row]) for row in reader)
    try:
        lines = {number: row for number, row in rows if any(row)}
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    header = map(plain, lines.pop(min(lines, default=0), []))
    header = [re.sub(r"^(study|series|row|patient)id$", r"\1_id", name) for name in header]
    for number, row in lines.items():
        if any(row[len(header) :]):
            raise ValueError(f"line {number} has {len(row)} cells, the header {len(header)}")
        lines[number] = (row + [""] * len(header))[: len(header)]
    return lines, header


def plain(text: str) -> str:
    """A text in lower case, its words joined by underscores, e.g. l4_l5 for L4/L5."""
    return re.sub(r"[\W_]+", "_", text.casefold()).strip("_")


def number_of(text: str, names: dict[int, str] | None = None) -> int | None:
    """The number of an id in a table or of a folder's name: a whole number itself, of text 52 bits of its SHA-256 (also
    of a UID, and of digits after a leading zero). None for a number that may have lost digits. names: number -> id as
    it is spelled, which this one is added to; CompetitionError if two ids collide."""
    text = unicodedata.normalize("NFC", text.strip())
    spelled, number = text, None if re.match(r"\+?0\d", text) else whole_number(text)
    if number is not None:
        spelled = str(number)
    elif re.fullmatch(r"0\d+|\d+(\.\d+){4,}|(?![\d.,' ]+(e[-+]?\d+)?$)\w[^/\\]*", text, re.IGNORECASE):
        number = int.from_bytes(hashlib.sha256(text.encode(errors="replace")).digest()[:7]) >> 4
    else:
        return None
    if names is not None and names.setdefault(number, spelled) != spelled:
        raise CompetitionError(f"the ids {names[number]!r} and {spelled!r} have the same number: rename one of them")
    return number


def whole_number(text: str) -> int | None:
    """The id that a cell holds, None if digits may be lost: 2.30E+08, 1,234, 123.000, or a float beyond 2**53."""
    found = re.fullmatch(r"\+?([0-9]+)(\.00?)?", text.strip())
    number = int(found[1]) if found else 2**63
    return number if number < (2**53 if found and found[2] else 2**63) else None


@cache
def label_parts(text: str) -> dict[str, str] | None:
    """The level, group (nfn, scs, ss) and side that a text such as 'Left NFN, L4-5' names; None if it holds more."""
    rest, parts = f"_{plain(text)}_", {}
    for word, (part, value) in LABEL_WORDS.items():
        while f"_{word}_" in rest and parts.setdefault(part, value) == value:
            rest = rest.replace(f"_{word}_", "_", 1)
    return None if rest.strip("_") else parts


def named_label(text: str) -> tuple[str | None, str | None]:
    """The condition and the level that a text names, None for what it does not name or not clearly."""
    parts = label_parts(text) or {}
    name = "_".join(filter(None, (parts.get("side"), words.GROUPS[parts["group"]].base))) if "group" in parts else ""
    return name if name in words.CONDITIONS else None, parts.get("level")


def row_keys(file: Path, row_ids: pd.Series, names: dict[int, str]) -> Table:
    """study_id and label (one of `vocabulary.COLUMNS`) of row ids; CompetitionError names the line of a wrong one."""
    keys = []
    for line, row in row_ids.fillna("").items():
        match = ROW_ID.fullmatch(row)
        if not match or (number := number_of(match[1], names)) is None:
            asked = f"expected <study_id>_<condition>_<level>, with all digits, e.g. 1_{words.COLUMNS[0]}"
            raise CompetitionError(f"{file}: row_id in line {line} is {row!r}; {asked}")
        keys.append((number, match[2].lower()))
    return pd.DataFrame(keys, row_ids.index, ["study_id", "label"]).astype({"study_id": "int64"})


def read_grades(file: Path, findings: Findings) -> Table:
    """The labels of a table of grades: study_id, condition, level, severity (0, 1, 2, -1 missing), 25 rows a study.

    A row holds one grade (column severity or grade) or several, in columns named by their labels. Columns row_id, or
    study_id, condition, level and side say what these names do not. How another table than the competition's was read
    is a finding. CompetitionError names the line of a grade or label that is not certain, or both of a contradiction.
    """
    rows, form = _grade_rows(file, findings.names)
    rows["severity"], scale = _severities(file, rows)
    if form or scale:
        value = f"{form or '25 columns of grades'}; {f'numbers {scale}' if scale else 'words'}"
        findings.add(pd.DataFrame({"study_id": [pd.NA]}), "labels_read_as", value, "used")
    unknown = rows[rows.grade.notna() & rows.severity.isna()]
    findings.add(unknown, "grade_unknown", unknown.grade, "read as missing")
    graded = rows.dropna(subset="severity")
    first = graded.groupby(KEY)[["line", "severity"]].transform("first")
    for n in (graded.severity != first.severity).to_numpy().nonzero()[0][:1]:
        line, study, *label = graded.iloc[n, :4]
        both = f"lines {first.line.iloc[n]} and {line}"
        label = " ".join((findings.names[study], *label))
        raise CompetitionError(f"{file}: {both} have different grades of {label}; keep the right one")
    repeated = rows.loc[rows.duplicated(KEY), ["study_id"]].drop_duplicates()
    findings.add(repeated, "study_repeated", "in the table of grades", "equal grades used once")
    keys = pd.MultiIndex.from_product([rows.study_id.unique(), words.CONDITIONS, words.LEVELS], names=KEY)
    severity = graded.drop_duplicates(KEY).set_index(KEY).severity.reindex(keys).astype(float).fillna(words.MISSING)
    labels = severity.astype("int64").reset_index().astype({"study_id": "int64"})
    missing = (labels.severity == words.MISSING).groupby(labels.study_id).sum().loc[lambda n: n > 0]
    findings.add(missing.reset_index(), "labels_missing", missing.map("{} of 25".format), "masked in loss and score")
    return labels


def _grade_rows(file: Path, names: dict[int, str]) -> tuple[Table, str]:
    """One row a grade: line, study_id, condition, level, grade (text or NaN); and the form, '' if the competition's."""
    table = read_required_table(file, ())
    header = list(table.columns)
    columns = {k: name for k, name in enumerate(header) if label_parts(name)}
    form = f"{len(columns)} columns of grades" if columns else "one row a finding"
    columns = columns or {k: "" for k, name in enumerate(header) if name in ("severity", "grade")}
    if not columns or not {"study_id", "row_id"} & set(header):
        expected = f"study_id, {words.COLUMNS[0]} ..., or study_id, condition, level, severity, or row_id, severity"
        raise CompetitionError(f"{file}: lacks the column(s) {expected}; the header has: {', '.join(header)[:300]}")
    if "row_id" in header:
        said = row_keys(file, table.row_id, names)
        studies = said.pop("study_id")
    else:
        studies = read_required_table(file, ["study_id"], ["study_id"], names).study_id
        said = table[[name for name in ("condition", "level", "side") if name in header]].fillna("")
    rows = []
    for line, study, texts, cells in zip(table.index, studies, said.to_numpy(), table.to_numpy(), strict=True):
        for k, name in columns.items():
            label = named_label(text := " ".join((*texts, name)).strip())
            if None in label:
                expected = f"condition, side (not of the canal) and level, e.g. Left {words.FORAMINAL}, L1/L2"
                raise CompetitionError(f"{file}: line {line} names {text!r}, expected {expected}")
            rows.append((line, study, *label, cells[k]))
    others = [n for k, n in enumerate(header) if n not in ("", *IDS, *said) and k not in columns]
    form += f"; not read: {', '.join(others)[:200]}" * bool(others)
    return pd.DataFrame(rows, columns=["line", *KEY, "grade"]), form * (set(columns.values()) != set(words.COLUMNS))


def _severities(file: Path, rows: Table) -> tuple[pd.Series, str]:
    """The grades of `rows` as 0, 1, 2, without those not known; and the scale, '' of words."""
    cells = rows.grade.dropna().astype(str)
    codes, digits = cells.map(plain).map(GRADE_WORDS), cells.str.extract(r"^\+?([0-9])(?:\.0+)?$")[0]
    scale, mostly = "0, 1, 2" if (digits == "0").any() else "1, 2, 3", digits.notna().mean()
    if not mostly > 0:
        scale, wrong, why = "", codes.isna() & (codes.isna().mean() > FEW), "which is not a known word"
    elif mostly < 1:
        wrong, why = digits.isna() == (mostly > 0.5), f"where other grades are {'numbers' if mostly > 0.5 else 'words'}"
    else:
        codes, wrong = digits.astype(float) - int(scale[0]), ~digits.isin(scale.split(", "))
        why = f"where numbers must be {scale}"
        if scale[0] == "1" and not wrong.any() and digits.nunique() < 3:
            wrong, why = ~wrong, "and the table has no 0, nor all of 1, 2, 3: its scale is not certain"
    for n, cell in cells[wrong].items():
        asked = f"write {', '.join(words.SEVERITY_NAMES)}, or leave the cell empty"
        raise CompetitionError(f"{file}: line {rows.line[n]} holds the grade {cell!r}, {why}; {asked}")
    return codes, scale
