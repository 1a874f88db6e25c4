"""Rows, whatever they come from, as one data frame; and back to a file.

Cells of a CSV file or a spreadsheet are texts until it is known what their column is for. People
open CSV files in spreadsheets, which take a text that begins with "=", "+", "-" or "@" for a
formula. It may run a program or send other cells elsewhere. OWASP's advice is an apostrophe before
it. Reading takes it away again, so that a file that was written comes back as it was.
"""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from io import StringIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.parsers.expat import ExpatError, ParserCreate
from zipfile import BadZipFile, ZipFile

import pandas as pd
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
)
from datasets.table import InMemoryTable

from ..base.checks import data_file, optional_library, shown, warn
from ..base.files import writing
from ..base.log import OURS, Log, agreed
from ..base.values import as_python
from ..errors import BHPEFTError, DataError
from .assets import hub_or_cache

_FORMULA = re.compile("'*[=+\\-@\t\r\n＝＋－＠]")
# Neither names such as "007" nor numbers that would lose digits.
_REAL = re.compile(r"[+-]?((0|[1-9]\d{0,14})(\.\d*)?|\.\d+)([eE][+-]?\d{1,2})?")
_COMMA = re.compile(r"[+-]?((0|[1-9]\d{0,14})(,\d*)?|,\d+)([eE][+-]?\d{1,2})?")
_HUB = re.compile(r"(?P<path>[\w.-]+/[\w.-]+)(?:\[(?P<name>[^\[\]]+)\])?(?::(?P<split>.+))?")
_DAMAGE = (OSError, ValueError, LookupError, RecursionError, BadZipFile, ExpatError)
_CELLS = (
    "expected commas between cells (or semicolons or tabs, also in the first line), and quotes "
    "around a cell with such a sign or a line break in it"
)


def table(
    source: object, texts: Sequence[str] = ("text",), encoding: str | None = None
) -> pd.DataFrame:
    """All rows of a source, with None where a cell is empty.

    The index has the numbers of the rows. A header is row 1, so that those of a CSV file or a
    spreadsheet begin at 2; of JSON lines they are the lines. Other rows count from 0. `attrs` has
    the name of the file, and what its rows are called ("row", "line" or "entry"). A table that was
    read, or a part of it, comes back as it is.

    Args:
        source: a path to a .csv, .tsv, .json, .jsonl, .parquet, .xlsx or .ods file; a .db or
            .sqlite file of what people said in `bhpeft review` or to `bhpeft serve`, as the labels
            that they agree on; a data set of the Hugging Face hub by name, "owner/name", with a
            split "owner/name:test" (by default train; slices such as "owner/name:train[:1000]"
            work) and a configuration "owner/name[config]:split"; a `datasets.Dataset` or
            `IterableDataset`; a data frame; a mapping of lists; a list of dicts, of texts, or of
            pairs.
        texts: columns that hold text, in which a comma is no decimal point. A list of texts becomes
            the first of them, a list of pairs the first two.
        encoding: of a text file; by default UTF-8, UTF-16 if the file says so, and otherwise
            Windows-1252, with a warning.

    Raises:
        DataError: there is no such file or data set, or it cannot be read.

    >>> table([{"text": "good", "stars": 5}, {"text": "bad"}])
       text stars
    0  good     5
    1   bad  None
    """
    if isinstance(source, pd.DataFrame):
        ours = "unit" in source.attrs and source.index.is_unique
        if ours and {*source.dtypes.map(str)} <= {"object"}:
            return source
        cells = {name: source[name] for name in _different([*source.columns])}
        return _frame(cells, source.index if ours else None, **(source.attrs if ours else {}))
    if isinstance(source, str | Path) and (path := data_file(source)):
        return _of_file(path, texts, encoding)
    if isinstance(source, str):
        source = _from_hub(source)
    if isinstance(source, DatasetDict | IterableDatasetDict):
        splits = ", ".join(map(repr, source))
        raise DataError(f"source has several splits; expected one of them: {splits}")
    if isinstance(source, Dataset | IterableDataset):
        return _of_dataset(source)
    if isinstance(source, Mapping):
        return _frame(source)
    if not isinstance(source, Iterable) or isinstance(source, bytes | Set):
        what = "a file, a data set, a data frame, a mapping of lists, or a list of dicts or texts"
        raise DataError(f"source is a {type(source).__name__}; expected {what}")
    return _frame(_by_name([*as_python(source)], texts))


def need(rows: pd.DataFrame, *columns: str) -> pd.DataFrame:
    """The rows, or a DataError unless they have these columns and there are any."""
    file = rows.attrs.get("file")
    about = f"{file}: " if file else ""
    if rows.empty:
        raise DataError(f"{about}there are no rows; expected at least one")
    for name in columns:
        if name not in rows:
            there = ", ".join(map(str, rows))
            raise DataError(f"{about}column {name!r} is missing; columns there: {there}")
    return rows


@contextmanager
def numbered(rows: object) -> Iterator[None]:
    """In errors about rows of a table, name its file, and give their numbers in it."""
    try:
        yield
    except DataError as error:
        ours = isinstance(rows, pd.DataFrame) and "unit" in rows.attrs
        if error.file is not None or not (error.rows and ours):
            raise
        about = rows.attrs  # type: ignore[attr-defined]
        number = rows.index.__getitem__  # type: ignore[attr-defined]
        raise error.placed(about["file"], about["unit"], number) from error


def write(path: Path, rows: pd.DataFrame) -> None:
    """Write a CSV file, or JSON lines, whole or not at all."""
    with writing(path) as file:
        # Half an emoji, which JSON may hold, has no UTF-8.
        text = TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="")
        cells = ([*map(_plain, row)] for row in rows.itertuples(index=False, name=None))
        if path.suffix.lower() == ".csv":
            # A bare carriage return, at which readers would end a row, is quoted by the writer only
            # if it is in the writer's own ends of lines.
            lines: Any = SimpleNamespace(write=lambda line: text.write(line[:-2] + "\n"))
            writer = csv.writer(lines, lineterminator="\r\n")
            writer.writerow(map(safe, rows))
            writer.writerows(
                [safe(_json(c) if isinstance(c, list | dict) else c) for c in row] for row in cells
            )
        else:
            for row in cells:
                text.write(_json(dict(zip(rows, row, strict=True)), ensure_ascii=False) + "\n")
        text.detach()  # which writes what is left, and leaves the file open


def safe(cell: object) -> object:
    """A cell as it is written: a formula becomes a text, numbers stay as they are.

    >>> safe("=1+1"), safe("-1.5"), safe("'tis"), safe("'=1")
    ("'=1+1", '-1.5', "'tis", "''=1")
    """
    formula = isinstance(cell, str) and _FORMULA.match(cell) and not is_number(cell)
    return f"'{cell}" if formula else cell


def meant(cell: str) -> str:
    """A cell as it was before `safe` changed it.

    >>> meant("'=1+1"), meant("-1.5"), meant("'tis")
    ('=1+1', '-1.5', "'tis")
    """
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def is_number(cell: Any) -> bool:
    """Whether a cell is a finite number, or a str that reads as one."""
    try:
        return math.isfinite(float(cell)) and "_" not in f"{cell}"  # which Python alone allows
    except (TypeError, ValueError):
        return False


def reads_as_number(cell: Any) -> bool:
    """Whether a cell is a finite number, or a str that is nothing but one: neither "007", a name,
    nor a number that would lose digits."""
    return bool(_REAL.fullmatch(cell)) if isinstance(cell, str) else is_number(cell)


def by_column(rows: Sequence[Mapping[Any, Any]]) -> dict[Any, list[Any]]:
    """The cells of each column; None where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _frame(cells: Mapping[Any, Any], index: Any = None, **attrs: Any) -> pd.DataFrame:
    """Columns of plain cells as a table."""
    lists = {}
    for name, of in cells.items():
        values = as_python(of)
        # A set has no order.
        if not isinstance(values, Iterable) or isinstance(values, str | bytes | Mapping | Set):
            raise DataError(f"column {name!r} is a {type(of).__name__}; expected a list of cells")
        lists[name] = [*map(_plain, values)]
    if len({*map(len, lists.values())}) > 1:
        counts = ", ".join(f"{name!r} {len(of)}" for name, of in lists.items())
        raise DataError(f"columns differ in length: {counts}")
    rows = pd.DataFrame(lists, index=index, dtype=object)
    rows.attrs = {"file": "", "unit": "row"} | attrs
    return rows


def _plain(cell: Any) -> Any:
    """A cell without NumPy's and PyTorch's types; None if there is nothing."""
    if isinstance(cell, str):
        return cell
    cell = as_python(cell) if not isinstance(cell, tuple) else [*cell]
    nothing = cell is pd.NA or cell is pd.NaT or (isinstance(cell, float) and cell != cell)
    return None if nothing else cell


def _json(value: object, **how: Any) -> str:
    return json.dumps(value, default=str, **how)  # dates, which a data set of the hub may have


def _different(names: Sequence[Any]) -> Sequence[Any]:
    """The names of columns, if each is there once: a reader would keep but one of two."""
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DataError(f"column {shown(twice[0])} is there twice; expected different names")
    return names


def _by_name(rows: Sequence[Any], texts: Sequence[str]) -> Mapping[str, Any]:
    """The columns of a list of dicts, of texts, or of pairs (text and pair, question and
    choices)."""
    if rows and all(isinstance(row, Mapping) for row in rows):
        return by_column(rows)
    pairs = len(texts) > 1
    odd = Mapping if pairs else Mapping | tuple
    for i, row in enumerate(rows):
        if isinstance(row, odd) or (pairs and (isinstance(row, str) or len(row) != 2)):
            what = "a pair" if pairs else "a text"
            got = f"a {type(row).__name__} ({shown(row)})"
            raise DataError(f"source, row {i}: {got}; expected {what}, or dicts alone")
    columns = [[row[k] for row in rows] for k in range(2)] if pairs else [[*rows]]
    return dict(zip(texts, columns, strict=False))


def _of_dataset(source: Dataset | IterableDataset, **attrs: Any) -> pd.DataFrame:
    """The rows of a data set, with classes by name; `attrs["classes"]` has their names in order."""
    if isinstance(source, IterableDataset):
        cells = by_column([*source.with_format(None)])
        cells = cells or {name: [] for name in source.column_names or ()}
    elif source.format["type"] == "custom":  # a transform
        cells = source[:]
    else:
        cells = source.with_format("arrow")[:].to_pydict()  # images are not opened
    classes: dict[str, list[str]] = {}
    for name, feature in (source.features or {}).items():
        several = getattr(feature, "feature", None)
        feature = several if isinstance(several, ClassLabel) else feature
        if name in cells and isinstance(feature, ClassLabel):
            called = dict(enumerate(feature.names)) | {None: None}
            classes[name] = feature.names
            if several is None:
                cells[name] = [called.get(cell) for cell in cells[name]]  # -1: there is none
            else:
                cells[name] = [cell and [called.get(k) for k in cell] for cell in cells[name]]
    return _frame(cells, classes=classes, **attrs)


def _from_hub(source: str) -> Any:
    called, match = shown(source), _HUB.fullmatch(source)
    if match is None:
        raise DataError(
            f"source={called} is neither a file nor the name of a data set on the hub; expected "
            "'owner/name', 'owner/name:split' or 'owner/name[config]:split' "
            "(a single text goes in a list)"
        )
    try:
        with hub_or_cache():
            return load_dataset(match["path"], name=match["name"], split=match["split"] or "train")
    except Exception as error:  # whatever goes wrong inside: network, syntax, split
        cause = error.__cause__ or error  # which may be hidden behind an error of its own
        raise DataError(
            f"source={called} is not a file here, and cannot be loaded from the hub (a single "
            f"text goes in a list): {type(cause).__name__}: {cause}".rstrip()
        ) from error


def _of_file(path: Path, texts: Sequence[str], encoding: str | None) -> pd.DataFrame:
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            from pyarrow import parquet  # type: ignore[import-untyped]

            return _of_dataset(Dataset(InMemoryTable(parquet.read_table(path))), file=path.name)
        if suffix in (".xlsx", ".ods"):
            return _sheet(path)
        if suffix in (".db", ".sqlite"):
            return _labels(path)
        text = _text(path, encoding)
        return _csv(path, text, texts) if suffix in (".csv", ".tsv") else _objects(path, text)
    except _DAMAGE as error:
        problem = error if isinstance(error, BHPEFTError) else f"cannot be read: {error}"
        raise DataError(f"{path}: {problem}") from error


def _text(path: Path, encoding: str | None) -> str:
    """A text file, whatever its encoding is."""
    data, marks = path.read_bytes(), (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    ways = [encoding or ("utf-16" if data.startswith(marks) else "utf-8")]
    ways += [] if encoding else ["Windows-1252", "Latin-1"]
    for way in ways:
        try:
            text = data.decode(way).removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            last = error
            continue
        except LookupError as error:
            raise DataError(f"--encoding: {error}; expected a name such as latin-1") from error
        if way != ways[0]:
            warn(f"{path.name} is not UTF-8; read as {way}; --encoding says otherwise")
        if "\0" in text.partition("\n")[0]:
            raise DataError("NUL characters; expected a text file, in UTF-8 or with --encoding")
        return text
    raise DataError(f"not {ways[0]}: {last}; --encoding says what it is") from last


def _csv(path: Path, text: str, texts: Collection[str]) -> pd.DataFrame:
    skipped = 0
    if said := re.match(r"sep=(.)\r?\n", text):  # which Excel writes and reads
        mark, text, skipped = said[1], text[said.end() :], 1
    elif path.suffix.lower() == ".tsv":
        mark = "\t"
    else:
        head = next(csv.reader(StringIO(text, newline="")), [])
        mark = next((m for m in ";\t" if len(head) == 1 and m in head[0]), ",")
    csv.field_size_limit(2**31 - 1)  # of a cell; not put back, as other threads may read now
    reader = csv.reader(StringIO(text, newline=""), delimiter=mark, strict=True)
    try:
        every = [*reader]
    except csv.Error as error:
        what = f'line {reader.line_num + skipped}: {error}: a quote (") is not closed, or not '
        raise DataError(f"{what}doubled, or no cell ends after it; {_CELLS}") from error
    rows = _with_header(path, every)
    if mark == ";":  # where semicolons are usual, numbers have decimal commas
        for name in rows.columns.difference([*texts]):
            points = _with_points(rows[name].tolist())
            rows[name] = pd.Series(points, rows.index, dtype=object)
    return rows


def _sheet(path: Path) -> pd.DataFrame:
    """The first sheet of a spreadsheet; its cells are texts, as a CSV file has them."""
    engine = "odf" if path.suffix.lower() == ".ods" else "openpyxl"
    optional_library(engine, "sheets")
    if engine == "odf":  # which keeps what comes before a damaged place, and goes on
        with ZipFile(path) as parts:
            ParserCreate().Parse(parts.read("content.xml"), True)
    read: Any = pd.read_excel
    cells = read(path, header=None, dtype=object, na_filter=False, engine=engine)
    return _with_header(path, [[str(cell) for cell in row] for row in cells.to_numpy()])


def _labels(path: Path) -> pd.DataFrame:
    """The labels of a log on which people agree; rows are numbered as in its table."""
    log = Log(path)
    if not {*OURS} <= {*log.names}:
        raise DataError("no labels of bhpeft; expected a file that its review or service wrote")
    label = log.names[log.names.index("person") - 1]
    rows = agreed(log.rows(), label)
    cells = {name: [row[name] for row in rows] for name in log.names}
    return _frame(cells, [row["rowid"] for row in rows], file=path.name, unit="row")


def _with_header(path: Path, every: Sequence[Sequence[str]]) -> pd.DataFrame:
    if not every:
        raise DataError("the file is empty")
    header, *rows = every
    if not any(header):
        raise DataError("the first line is empty; expected the names of the columns")
    while rows and not any(cell.strip() for cell in rows[-1]):
        rows.pop()
    for number, row in enumerate(rows, 2):
        if len(row) > len(header):
            what = f"row {number} has {len(row)} cells, and the header {len(header)}"
            raise DataError(f"{what}; {_CELLS}")
    names = [meant(name) if name else f"Unnamed: {k}" for k, name in enumerate(header)]
    missing = [[""] * (len(header) - len(row)) for row in rows]
    whole = ([*row, *end] for row, end in zip(rows, missing, strict=True))
    cells = [[meant(cell) or None for cell in row] for row in whole]
    index = pd.RangeIndex(2, len(rows) + 2)
    table = pd.DataFrame(cells, index=index, columns=_different(names), dtype=object)
    table.attrs = {"file": path.name, "unit": "row"}
    return table


def _with_points(cells: Sequence[str | None]) -> list[str | None]:
    """A column with decimal points in its numbers, if most of its cells are numbers; a cell that is
    none stays, so that it alone is refused. Nothing changes if other numbers have points, which may
    be between thousands."""
    there = [cell for cell in cells if cell is not None]
    pointed = any("." in cell and _REAL.fullmatch(cell) for cell in there)
    if pointed or 2 * sum(bool(_COMMA.fullmatch(cell)) for cell in there) <= len(there):
        return [*cells]
    return [c.replace(",", ".") if c is not None and _COMMA.fullmatch(c) else c for c in cells]


def _objects(path: Path, text: str) -> pd.DataFrame:
    """JSON lines, or an array of objects."""
    # Not by pandas, which parses dates, nor by `datasets`, which infers types from a first part.
    if text.lstrip().startswith("["):
        rows = json.loads(text, object_pairs_hook=_once)
        numbers, unit = [*range(len(rows))], "entry"
    else:
        lines = {n: line for n, line in enumerate(text.split("\n"), 1) if line.strip()}
        rows, numbers, unit = [*map(_object, lines, lines.values())], [*lines], "line"
    if bad := [n for n, row in zip(numbers, rows, strict=True) if not isinstance(row, dict)]:
        raise DataError(f"{unit} {bad[0]} is no object; expected an object a line, or an array")
    return _frame(by_column(rows), numbers, file=path.name, unit=unit)


def _object(number: int, line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_once)
    except json.JSONDecodeError as error:
        what = f"line {number} is not JSON ({error}); expected an object a line, or an array"
        raise DataError(what) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _different([name for name, _ in pairs])
    return dict(pairs)
