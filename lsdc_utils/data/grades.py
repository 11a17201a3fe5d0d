"""Tables of grades in the forms that people have: wide or one row a finding, words or numbers; nothing is guessed."""

import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

import pandas as pd

from lsdc_utils import vocabulary as words
from lsdc_utils.data.tables import CompetitionError, Findings, Table, number_of, numbers, plain, read_table

KEY = ["study_id", "condition", "level"]  # identify a label, and its point
PARTS = {  # of a label -> the words for each, longest first
    "level": {word: level for level in words.LEVELS for word in (level, level[:3] + level[4:], level.replace("_", ""))},
    "group": {
        word: key
        for key, group in words.GROUPS.items()
        for word in (group.base, f"{group.score}_stenosis", group.score, key)
    },
    "side": {word: side for side in words.SIDES for word in (side, side[0])},
}
GRADES = {plain(name): k for k, name in enumerate(words.SEVERITY_NAMES)} | {"normal": 0, "mild": 0}
FEW = 0.1  # largest part of the grades that may be words not known, each of which is read as missing
A_LABEL = f"condition, side (not of the canal) and level, e.g. Left {words.FORAMINAL}, L1/L2"
ROW_ID = re.compile(rf"(.+)_({'|'.join(words.COLUMNS)})", re.IGNORECASE)


@cache
def parts_of(text: str) -> dict[str, str] | None:
    """The level, group (nfn, scs, ss) and side that a text names, e.g. 'Left NFN, L4-5'; None if it holds more."""
    rest, parts = f"_{plain(text)}_", {}
    for part, meaning in PARTS.items():
        for word in meaning:
            if f"_{word}_" in rest:
                rest, parts[part] = rest.replace(f"_{word}_", "_", 1), meaning[word]
                break
    return None if rest.strip("_") else parts


def condition_of(parts: Mapping[str, str]) -> str | None:
    """The condition that the parts of a label name, None if they do not name one."""
    base = words.GROUPS[parts["group"]].base if "group" in parts else None
    name = f"{parts['side']}_{base}" if "side" in parts else base
    return name if name in words.CONDITIONS else None


def condition_named(text: str) -> str | None:
    """The condition that a text names, and nothing else."""
    parts = parts_of(text) or {}
    return None if "level" in parts else condition_of(parts)


def level_named(text: str) -> str | None:
    """The level that a text names, and nothing else."""
    return PARTS["level"].get(plain(text))


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
    study_id, condition, level and side say what the names of the columns do not. How any other table than the
    competition's was read is a finding. CompetitionError names the line of a grade or label that is not certain, and
    both lines of a contradiction.
    """
    rows, form = _rows(file, findings.names)
    rows["severity"], scale = _severities(file, rows)
    if form or scale:
        value = f"{file.name}: {form or '25 columns of grades'}; {scale and 'numbers '}{scale or 'words'}"
        action = f"used as {', '.join(words.SEVERITY_NAMES)}" if scale else "used"
        findings.add(pd.DataFrame({"study_id": [pd.NA]}), "labels_read_as", value, action)
    unknown = rows[rows["grade"].notna() & rows["severity"].isna()]
    findings.add(unknown, "grade_unknown", unknown["grade"], "read as missing")
    graded = rows.dropna(subset="severity")
    first = graded.groupby(KEY)[["line", "severity"]].transform("first")
    for n in (graded["severity"] != first["severity"]).to_numpy().nonzero()[0][:1]:
        line, study, condition, level = graded.iloc[n, :4]
        label = f"{findings.names[study]} {condition} {level}"
        fault = f"lines {first['line'].iloc[n]} and {line} have different grades of {label}; keep the right one"
        raise CompetitionError(f"{file}: {fault}")
    repeated = rows.loc[rows.duplicated(KEY), ["study_id"]].drop_duplicates()
    findings.add(repeated, "study_repeated", f"in {file.name}", "equal grades used once")
    keys = pd.MultiIndex.from_product([rows["study_id"].unique(), words.CONDITIONS, words.LEVELS], names=KEY)
    severity = graded.drop_duplicates(KEY).set_index(KEY)["severity"].reindex(keys).fillna(words.MISSING)
    labels = severity.astype("int64").reset_index().astype({"study_id": "int64"})
    missing = (labels["severity"] == words.MISSING).groupby(labels["study_id"]).sum().loc[lambda n: n > 0]
    findings.add(missing.reset_index(), "labels_missing", missing.map("{} of 25".format), "masked in loss and score")
    return labels


def _rows(file: Path, names: dict[int, str]) -> tuple[Table, str]:
    """One row a grade: line, study_id, condition, level, grade (text or NaN); and the form, '' if the competition's."""
    table = read_table(file, (), ("study_id", "row_id"))
    header, heads = list(table.columns), [parts_of(name) or {} for name in table.columns]
    columns = [k for k, parts in enumerate(heads) if parts]
    long = not columns
    columns = columns or [k for k, name in enumerate(header) if name in ("severity", "grade")]
    if not columns or not {"study_id", "row_id"} & set(header):
        expected = f"study_id, {words.COLUMNS[0]} ..., or study_id, condition, level, severity, or row_id, severity"
        raise CompetitionError(f"{file}: lacks the column(s) {expected}; the header has: {', '.join(header)[:300]}")
    said = table[[name for name in ("condition", "level", "side") if name in header]].fillna("")
    if "row_id" in header:
        said = row_keys(file, table["row_id"], names)
        studies = said.pop("study_id")
    else:
        studies = numbers(file, table["study_id"], names)
    rows = []
    for line, study, texts, cells in zip(table.index, studies, said.to_numpy(), table.to_numpy(), strict=True):
        for k in columns:
            parts = _merged((heads[k], *map(parts_of, texts)))
            if not ((condition := condition_of(parts)) and "level" in parts):
                told = " ".join(filter(None, (*texts, "" if long else header[k]))) or "nothing"
                raise CompetitionError(f"{file}: line {line} names {told!r}, which is not {A_LABEL}")
            rows.append((line, study, condition, parts["level"], cells[k]))
    form = f"{len(columns)} columns of grades" + f" for each {' and '.join(said)}" * bool(said.size)
    used = {"", "study_id", "row_id", *said, *(header[k] for k in columns)}
    others = [name for name in header if name not in used]
    form = ("one row a finding" if long else form) + f"; not read: {', '.join(others)[:200]}" * bool(others)
    same = {*words.COLUMNS} == {header[k] for k in columns}
    return pd.DataFrame(rows, columns=["line", *KEY, "grade"]), "" if same else form


def _merged(parts: Iterable[dict[str, str] | None]) -> dict[str, str]:
    """All parts of a label; none if one could not be read, or two contradict each other."""
    whole = {}
    for some in parts:
        if some is None or any(whole.setdefault(part, word) != word for part, word in some.items()):
            return {}
    return whole


def _severities(file: Path, rows: Table) -> tuple[pd.Series, str]:
    """The grades of `rows` as 0, 1, 2, without those not known; and the scale, '' of words."""
    cells = rows["grade"].dropna().astype(str)
    codes, digits = cells.map(plain).map(GRADES), cells.str.extract(r"^\+?([0-9])(?:\.0+)?$")[0]
    scale = "" if digits.isna().all() else "0, 1, 2" if (digits == "0").any() else "1, 2, 3"
    wrong, why = codes.isna(), "which is not a known word"
    if scale and digits.isna().any():
        mostly = digits.notna().mean() > 0.5
        wrong, why = digits.isna() == mostly, f"where other grades are {'numbers' if mostly else 'words'}"
    elif scale:
        wrong, why = ~digits.isin(scale.split(", ")), f"where numbers must be {scale}"
        if scale[0] == "1" and not wrong.any() and digits.nunique() < 3:
            wrong, why = ~wrong, "and the table has no 0, nor all of 1, 2, 3: its scale is not certain"
        codes = digits.astype(float) - int(scale[0])
    elif wrong.mean() <= FEW:
        return codes, scale
    for n, cell in cells[wrong].items():
        asked = f"write {', '.join(words.SEVERITY_NAMES)}, or leave the cell empty"
        raise CompetitionError(f"{file}: line {rows.at[n, 'line']} holds the grade {cell!r}, {why}; {asked}")
    return codes, scale
