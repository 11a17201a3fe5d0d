"""Tables as people have them: cells as text by the lines of the file, ids as numbers, and findings about both."""

import csv
import hashlib
import io
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

FINDINGS = ["study_id", "series_id", "rule", "value", "action"]
ABSENT = ("NA", "N/A", "#N/A", "nan", "NaN", "NULL", "null", "None", "<NA>")  # cells that hold nothing
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
    file: Path, columns: Iterable[str], ids: Iterable[str] = (), names: dict[int, str] | None = None
) -> Table:
    """Columns of a table as text, those of `ids` as int64, indexed by the lines of the file.

    names: gets the spelling of the ids. CompetitionError as of `read_table`, or for an id that `number_of` cannot tell.
    """
    table = read_table(file, columns)[list(columns)]
    return table.assign(**{column: numbers(file, table[column], {} if names is None else names) for column in ids})


def read_table(file: Path, columns: Iterable[str], optional: Iterable[str] = ()) -> Table:
    """The cells of a table as text, NaN where they hold nothing, indexed by the lines of the file.

    Read are commas, semicolons or tabs, UTF-8, UTF-16 and Latin-1; names of columns in any case, with blanks or hyphens
    for underscores, or without any. CompetitionError if the file is not there, lacks one of `columns`, has it twice, or
    has a line that cannot be read.
    """
    try:
        lines, header = _cells(file)
    except FileNotFoundError:
        raise CompetitionError(f"{file}: no such file") from None
    except (ValueError, OSError) as error:
        raise CompetitionError(f"{file}: cannot be read as a table ({error})") from None
    columns = list(columns)
    known = {column.replace("_", ""): column for column in (*columns, *optional)}
    header = [known.get(name.replace("_", ""), name) for name in header]
    if lacking := [column for column in columns if column not in header]:
        found = ", ".join(header)[:300]
        raise CompetitionError(f"{file}: lacks the column(s) {', '.join(lacking)}; the header has: {found}")
    if twice := [column for column in known.values() if header.count(column) > 1]:
        raise CompetitionError(f"{file}: has several columns {twice[0]}; keep the right one")
    table = pd.DataFrame(lines.values(), list(lines), header, dtype="str")
    return table.where(~table.isin(["", *ABSENT]))


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
    header = [plain(name) for name in lines.pop(min(lines, default=0), [])]
    for number, row in lines.items():
        if any(row[len(header) :]):
            raise ValueError(f"line {number} has {len(row)} cells, the header {len(header)}")
        lines[number] = (row + [""] * len(header))[: len(header)]
    return lines, header


def plain(text: str) -> str:
    """A text in lower case, its words joined by underscores, e.g. l4_l5 for L4/L5."""
    return re.sub(r"[\W_]+", "_", text.casefold()).strip("_")


def numbers(file: Path, ids: pd.Series, names: dict[int, str]) -> pd.Series:
    """The numbers of a column of ids (int64), see `number_of`; CompetitionError names the line of a wrong one."""
    for line, cell in ids.fillna("").items():
        if number_of(cell, names) is None:
            lost = f"{ids.name} in line {line} is {cell!r}, not a whole number with all its digits"
            raise CompetitionError(f"{file}: {lost}; export the ids as text")
    return pd.Series([number_of(cell) for cell in ids], ids.index, "int64")


def number_of(text: str, names: dict[int, str] | None = None) -> int | None:
    """The number of an id in a table or of a folder's name: a whole number itself, of text 52 bits of its SHA-256.

    Text is what does not look like a number, and digits after a leading zero, and UIDs. None for a number that may have
    lost digits. names: number -> id as it is spelled, which this one is added to; CompetitionError if two ids collide.
    """
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
