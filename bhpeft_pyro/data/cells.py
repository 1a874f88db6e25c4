"""The cells of CSV and JSON files, column by column.

People open CSV files in spreadsheets, which take a text that begins with "=", "+", "-" or "@" for a
formula. It may run a program or send other cells elsewhere. OWASP's advice is an apostrophe before
it. Reading takes it away again, so that a file that was written comes back as it was.
"""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd

from ..base.checks import shown
from ..base.files import writing
from ..errors import DataError

_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")
# Neither names such as "007" nor numbers that would lose digits.
_INTEGER = r"-?(?:0|[1-9]\d{0,14})"
_WHOLE = r"[+-]?(?:0|[1-9]\d{0,14})(?:\.0*)?"
_REAL = r"[+-]?(?:(?:0|[1-9]\d{0,14})(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,2})?"
_CELLS = (
    "expected commas between cells (or semicolons or tabs, also in the first line), and quotes "
    "around a cell with such a sign or a line break in it"
)


def safe(value: object) -> object:
    """A cell as it is written: a formula becomes a text, numbers stay as they are.

    >>> safe("=1+1"), safe("-1.5"), safe("'tis"), safe("'=1")
    ("'=1+1", '-1.5', "'tis", "''=1")
    """
    if isinstance(value, str) and _FORMULA.match(value) and not is_number(value):
        return f"'{value}"
    return value


def meant(cell: str) -> str:
    """A cell as it was before `safe` changed it.

    >>> meant("'=1+1"), meant("-1.5"), meant("'tis")
    ('=1+1', '-1.5', "'tis")
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def is_number(value: Any) -> bool:
    """Whether a cell is a finite number, or a str that reads as one."""
    try:
        return math.isfinite(float(value)) and "_" not in f"{value}"  # which Python alone allows
    except (TypeError, ValueError):
        return False


def columns_of(
    path: Path, texts: Collection[str] | None, classes: str | None, typed: bool
) -> dict[str, list[Any]]:
    """The cells of each column of a file; `texts` and `classes` are as for `sources.load`. Unless
    `typed`, the cells of a CSV file are all texts."""
    if path.suffix.lower() != ".csv":
        return by_column([*_objects(path)])
    table, comma = _frame(path)
    if not isinstance(table.index, pd.RangeIndex):
        raise DataError(f"rows have more cells than the header has names; {_CELLS}")
    cells = {}
    for name, column in table.items():
        text = texts is None or name in texts
        column = _with_points(column) if comma and not text else column
        if typed and not text:
            cells[name] = _typed(column, _WHOLE if name == classes else _REAL)
        else:
            cells[name] = values_of(column)
    return cells


def _objects(path: Path) -> Iterator[object]:
    """One JSON object a line."""
    # Not by `datasets`, which infers a column's type from a file's first part, and parses dates.
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if line.lstrip().startswith("["):
                raise DataError(
                    f"line {number} begins a list; expected an object a line (JSON lines); in "
                    'Python, pandas.read_json(...).to_json(..., orient="records", lines=True) '
                    "writes it"
                )
            try:
                cells = json.loads(line, object_pairs_hook=_once)
            except json.JSONDecodeError as error:
                what = f"line {number} is not JSON ({error}); expected an object a line"
                raise DataError(what) from error
            if not isinstance(cells, dict):
                what = f"a {type(cells).__name__} ({shown(cells)})"
                raise DataError(f"line {number}: {what}; expected an object")
            yield cells


def _frame(path: Path) -> tuple[pd.DataFrame, bool]:
    """A CSV file with all cells as text, and whether its numbers have decimal commas: where these
    are usual, spreadsheets put semicolons between cells."""
    # Not by `datasets`, which infers a column's type from its first rows alone. The texts "NA",
    # "None" and "null" are not missing values.
    how: dict[str, Any] = {"dtype": str, "keep_default_na": False, "encoding": "utf-8-sig"}
    how["skip_blank_lines"] = False  # a blank line is a row, whose cells are empty
    # pandas would give a column that comes twice another name.
    try:
        header = pd.read_csv(path, header=None, nrows=1, **how).iloc[0]
        if len(header) == 1 and (mark := next((m for m in ";\t" if m in header[0]), None)):
            how["sep"] = mark
            header = pd.read_csv(path, header=None, nrows=1, **how).iloc[0]
        if any("\0" in name for name in header):
            raise DataError("the header has a NUL character; expected a text file in UTF-8")
        check_once([meant(name) for name in header if name])
        _check_quotes(path, how.get("sep", ","))
        table = pd.read_csv(path, na_values="", **how)
    except pd.errors.EmptyDataError as error:
        empty = "the first line is empty; expected the names of the columns"
        raise DataError(empty if path.stat().st_size else "the file is empty") from error
    except pd.errors.ParserError as error:
        raise DataError(f"{_CELLS} ({' '.join(str(error).split())})") from error
    count = len(table)  # without the empty rows at the end
    while count and not table.iloc[count - 1].fillna("").str.strip().any():
        count -= 1
    cells = table[:count].rename(columns=meant).map(meant, na_action="ignore")
    return cells, how.get("sep") == ";"


def _check_quotes(path: Path, mark: str) -> None:
    """Refuse a quote that ends no cell: pandas would take it as the end of one that an earlier line
    has left open, with all rows between them."""
    csv.field_size_limit(2**31 - 1)  # of a cell; not put back, as other threads may read now
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=mark, strict=True)
            for _ in reader:
                pass
    except csv.Error as error:
        what = f'line {reader.line_num}: {error}: a quote (") is not closed, or not doubled, or no '
        raise DataError(f"{what}cell ends after it; {_CELLS}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    check_once([name for name, _ in pairs])
    return dict(pairs)


def check_once(names: Sequence[object]) -> None:
    """Refuse a column that is there twice, of which a reader would keep but one."""
    twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
    if twice is not None:
        raise DataError(f"column {shown(twice)} is there twice; expected different names")


def _with_points(column: pd.Series) -> pd.Series:
    """A column with decimal points in its numbers, if most of its cells are numbers; a cell that is
    none stays, so that it alone is refused. Nothing changes if other numbers have points, which may
    be between thousands."""
    column = column.astype(object)  # an empty one has no texts
    number = column.str.fullmatch(_REAL.replace(r"\.", ",")).eq(True)
    if 2 * number.sum() <= column.notna().sum():
        return column
    commas = number & column.str.contains(",").eq(True)
    points = column.str.fullmatch(_REAL).eq(True) & column.str.contains(".", regex=False).eq(True)
    if commas.any() and points.any():
        return column
    return column.where(~number, column.str.replace(",", "."))


def _typed(column: pd.Series, reals: str) -> list[Any]:
    there = column.dropna()
    for pattern, number in ((_INTEGER, int), (reals, float)):
        if len(there) and there.str.fullmatch(pattern).all():
            return [None if pd.isna(cell) else number(cell) for cell in column]
    return values_of(column)


def values_of(column: pd.Series) -> list[Any]:
    """Plain values, None where there are none."""
    return column.astype(object).where(column.notna(), None).tolist()


def by_column(rows: Sequence[object]) -> dict[str, list[Any]]:
    """The cells of each column; None where a row has none."""
    dicts = expect(rows, Mapping, "a dict")
    names = dict.fromkeys(name for row in dicts for name in row)
    return {name: [row.get(name) for row in dicts] for name in names}


def expect(rows: Sequence[Any], types: type | tuple[type, ...], what: str) -> list[Any]:
    """The rows, if all are of a type."""
    if bad := [i for i, row in enumerate(rows) if not isinstance(row, types)]:
        first = rows[bad[0]]
        got = f"a {type(first).__name__} ({shown(first)})"
        raise DataError.of_rows("source", bad, f"{got}; expected {what}")
    return [*rows]


_json = partial(json.dumps, default=str)  # dates, which a data set of the hub may have


def write_rows(out: Path, records: Iterable[dict[str, Any]], names: Iterable[str]) -> None:
    """Write a CSV file, or JSON lines."""
    with writing(out) as file:
        # Half an emoji, which JSON may hold, has no UTF-8.
        text = TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        if out.suffix == ".csv":
            # A bare carriage return, at which readers would end a row, is quoted by the writer only
            # if it is in the writer's own ends of lines.
            lines: Any = SimpleNamespace(write=lambda line: text.write(line[:-2] + "\n"))
            writer = csv.DictWriter(lines, [*names], lineterminator="\r\n")
            writer.writerow({name: safe(name) for name in names})
            for record in records:
                nested = {k: _json(v) for k, v in record.items() if isinstance(v, list | dict)}
                writer.writerow({k: safe(v) for k, v in (record | nested).items()})
        else:
            for record in records:
                text.write(_json(record, ensure_ascii=False) + "\n")
        text.detach()  # which writes what is left, and leaves the file open
