"""Every accepted source becomes one `datasets.Dataset` with only the columns that are needed."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    MappingView,
    Sequence,
    Set,
)
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
from datasets import (
    Column,
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    concatenate_datasets,
    load_dataset,
)
from datasets.table import InMemoryTable

from ..base.checks import data_file, shallow, shown, warn
from ..errors import DataError
from .assets import hub_or_cache
from .cells import by_column, check_once, columns_of, expect, values_of
from .columns import Columns, Kind, wrong

_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?:\[(?P<config>[^\[\]]+)\])?(?::(?P<split>.+))?")
_EXPECTED = (
    "a datasets.Dataset or IterableDataset, the name of one on the hub, a path to a .csv, .json or "
    ".jsonl file, a pandas DataFrame, a mapping of lists, a list of dicts, or (to predict) a list "
    "of texts"
)

_DEEPEST = 40  # levels of a cell


def read(source: object, kind: Kind, columns: Columns, labelled: bool | None) -> Dataset:
    """The rows of `source`, whatever it is; the target column may be absent if not `labelled`, and
    is left out if that is None."""
    needed, target = (*columns.inputs(kind), *columns.extra), columns.target(kind)
    empty = dict.fromkeys((*needed, target), ())
    if isinstance(source, (DatasetDict, IterableDatasetDict)):
        splits = ", ".join(map(repr, source))
        name = type(source).__name__
        raise DataError(f"source is a {name}; pass one of its splits: {splits}")
    if isinstance(source, (str, Path)):
        source = _loaded(source, columns.texts(kind), columns.classes(kind))
    elif isinstance(source, IterableDataset):
        stream: Any = source.with_format(None)
        names = stream.column_names or ()  # it may not know them
        if {*needed} <= {*names}:
            stream = stream.select_columns([n for n in (*needed, target) if n in names])
        cells = by_column([*stream])
        source = cells or empty
        if cells and stream.features is not None:
            source = Dataset.from_dict(cells, stream.features)
    elif isinstance(source, pd.DataFrame):
        check_once([*source.columns])
        source = {name: values_of(source[name]) for name in source.columns}
    elif isinstance(source, (list, tuple, Column, pd.Series, pd.Index, np.ndarray, Iterator)):
        if labelled and isinstance(source, tuple) and len(source) == 2:
            raise DataError("source is a pair; expected {'text': texts, 'label': labels}")
        rows = source.tolist() if isinstance(source, np.ndarray) else list(source)
        rows = rows if isinstance(rows, list) else [rows]  # from an array without dimensions
        source = _from_rows(rows, kind, columns) if rows else empty

    if not isinstance(source, (Dataset, Mapping)):
        package, name = type(source).__module__.partition(".")[0], type(source).__name__
        what = name if package == "builtins" else f"{package}.{name}"
        raise DataError(f"source is a {what}; expected {_EXPECTED}")
    names = source.column_names if isinstance(source, Dataset) else list(source)
    for name in (*needed, target) if labelled else needed:
        if name not in names:
            there = ", ".join(repr(other) for other in names) or "none"
            raise DataError(
                f"column {name!r} is missing; columns there: {there}; in Python, `columns` says "
                "which column holds what"
            )
    wanted = [*needed] if labelled is None or target not in names else [*needed, target]
    if isinstance(source, Dataset):
        if source.format["type"] == "custom":
            raise DataError(
                "source has a transform, which would not be applied; expected a Dataset that "
                "source.map(...) made"
            )
        table = source.select_columns(wanted).with_format(None)
    else:
        lists = {name: source[name] for name in wanted}
        table = _from_lists(lists, texts=columns.inputs(kind))
    if len(table) == 0:
        raise DataError("source is empty: at least one example is needed")
    return table


def ordered_categories(source: object, column: str, unused: bool) -> list[str] | None:
    """Those of a column of a data frame, in their order, if it has any and they are texts; the
    `unused` ones too, or not."""
    kind = source.dtypes.get(column) if isinstance(source, pd.DataFrame) else None
    if not (isinstance(kind, pd.CategoricalDtype) and kind.ordered):
        return None
    assert isinstance(source, pd.DataFrame)
    found = source[column] if unused else source[column].cat.remove_unused_categories()
    names = found.cat.categories.tolist()
    return names if all(isinstance(name, str) for name in names) else None


def load(
    source: str | Path, texts: Collection[str] | None = (), classes: str | None = None
) -> Dataset:
    """All columns of a file, or of a data set of the hub, if it has rows. Columns with cells of
    different types are left out, with a warning.

    Args:
        source: of the rows.
        texts: columns of a CSV file to keep as text, whatever they look like; None for all.
        classes: a column of it that has numbers only if all are whole, as 1.10 and 1.1 may be
            names of two classes.
    """
    table = _loaded(source, texts, classes)
    with in_file(source):
        return table if isinstance(table, Dataset) else _from_lists(table, source)


def cells_of(
    source: str | Path, texts: Collection[str], typed: bool = True
) -> dict[str, list[Any]]:
    """The cells of each column, as `load` reads them, or unless `typed` all of a CSV file as texts;
    also of columns with different types."""
    table = _loaded(source, texts, None, typed)
    return table[:] if isinstance(table, Dataset) else table


def records(source: str | Path, texts: Collection[str] = ()) -> list[dict[str, Any]]:
    """The rows, whose cells are as they are in the file, but for decimal commas in other columns
    than `texts`; None where a row has none."""
    cells = cells_of(source, texts, typed=False)
    return [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]


def places(source: object) -> tuple[str, str, Callable[[int], int]]:
    """How the rows of a source are called outside: the name of the file, what a row is in it, and
    the number that a row (from 0) has there. Rows of other sources than files count from 0, and
    have no name."""
    path = data_file(source) if isinstance(source, (str, Path)) else None
    if path is None:
        return "", "row", int
    if path.suffix.lower() == ".csv":
        return path.name, "row", (2).__add__  # after the header
    with path.open(encoding="utf-8-sig") as file:
        lines = array("q", (number for number, line in enumerate(file, 1) if line.strip()))
    return path.name, "line", lines.__getitem__


@contextmanager
def in_file(source: object) -> Iterator[None]:
    """In errors about rows of a file, name it, and number them as it does."""
    try:
        yield
    except DataError as error:
        if error.file or not error.rows:
            raise
        name, unit, number = places(source)
        if not name:
            raise
        raise error.placed(name, unit, number) from error


def _loaded(
    source: str | Path,
    texts: Collection[str] | None,
    classes: str | None,
    typed: bool = True,
) -> Dataset | dict[str, list[Any]]:
    path, called = data_file(source), shown(str(source))
    table: Dataset | dict[str, list[Any]]
    if path is None:
        table = _from_hub(str(source))
    else:
        try:
            table = columns_of(path, texts, classes, typed)
        except UnicodeDecodeError as error:
            what = f"source={called}: expected a text file that was saved as UTF-8: {error}"
            raise DataError(what) from error
        except (OSError, ValueError, RecursionError) as error:  # a DataError is a ValueError
            raise DataError(f"source={called} cannot be read: {error}") from error
    if not (len(table) if isinstance(table, Dataset) else any(table.values())):
        raise DataError(f"source={called} is empty: at least one row is needed")
    return table


def _from_hub(source: str) -> Dataset:
    called, match = shown(source), _HUB_NAME.fullmatch(source)
    if match is None:
        raise DataError(
            f"source={called} is neither a file nor the name of a data set on the hub; expected "
            "'owner/name', 'owner/name:split' or 'owner/name[config]:split' "
            "(a single text goes in a list)"
        )
    try:
        with hub_or_cache():
            name, split = match["name"], match["split"] or "train"
            return load_dataset(name, name=match["config"], split=split)
    except Exception as error:  # whatever goes wrong inside: network, syntax, split
        cause = error.__cause__ or error  # which may be hidden behind an error of its own
        raise DataError(
            f"source={called} is not a file here, and cannot be loaded from the hub (a single "
            f"text goes in a list): {type(cause).__name__}: {cause}".rstrip()
        ) from error


def _from_rows(rows: Sequence[object], kind: Kind, columns: Columns) -> dict[str, list[Any]]:
    """A list of dicts, of texts, or of pairs (text and pair, question and choices)."""
    if isinstance(rows[0], Mapping):
        return by_column(rows)
    names = columns.inputs(kind)
    if len(names) == 1:
        return {names[0]: expect(rows, str, "a text")}
    what = f"a pair ({names[0]}, {names[1]})"
    pairs = expect(rows, (tuple, list), what)
    if bad := [i for i, pair in enumerate(pairs) if len(pair) != 2]:
        raise DataError.of_rows("source", bad, f"{len(pairs[bad[0]])} entries; expected {what}")
    return {name: [pair[k] for pair in pairs] for k, name in enumerate(names)}


def _from_lists(
    columns: Mapping[str, Any], file: object = None, texts: Collection[str] = ()
) -> Dataset:
    """A mapping of lists, arrays or tensors of one length, `texts` among them; of those of a `file`
    without the columns that cannot be used, if there are others."""
    lists: dict[str, list[Any]] = {}
    for name, column in columns.items():
        values: Any = None
        # The views of a mapping are in its order; other sets have none.
        unordered = isinstance(column, Set) and not isinstance(column, MappingView)
        if hasattr(column, "tolist"):
            values = column.tolist()  # a number, of an array without dimensions
        elif isinstance(column, Iterable) and not isinstance(column, (str, bytes, Mapping)):
            values = None if unordered else list(column)
        if not isinstance(values, list):
            raise DataError(
                f"column {shown(name)} is a {type(column).__name__}; expected a list of values, in "
                "the order of the rows"
            )
        # pandas has NaN, among texts, or NA where there is nothing.
        gaps: tuple[type, ...] = (float,) if any(isinstance(v, str) for v in values) else ()
        lists[name] = [
            None if v is pd.NA or (isinstance(v, gaps) and v != v) else v for v in values
        ]
    if len({len(column) for column in lists.values()}) > 1:
        counts = ", ".join(f"{name!r} {len(column)}" for name, column in lists.items())
        raise DataError(f"columns differ in length: {counts}")
    if not any(lists.values()):
        return Dataset.from_dict(lists)  # joining tables without rows would lose columns
    tables, failed = [], []
    for name, column in lists.items():
        try:
            tables.append(_table(name, column, name in texts))
        except DataError as error:
            failed.append(error)
    if failed and (file is None or not tables):
        raise failed[0]
    for why in failed:
        if why.rows:
            why = why.placed(*places(file))
        warn(f"{why}; this column is left out")
    return tables[0] if len(tables) == 1 else concatenate_datasets(tables, axis=1)


def _table(name: str, column: list[Any], is_text: bool) -> Dataset:
    deep = next((i for i, cell in enumerate(column) if not shallow(cell, _DEEPEST)), None)
    if deep is not None:  # Arrow would end the process
        raise DataError(
            f"column {name!r}, row {deep}: {shown(column[deep])} contains itself, or lists more "
            f"than {_DEEPEST} deep"
        )
    try:
        if all(type(cell) is str for cell in column):
            # A name in place of a hash, which takes longer than to tokenise a text.
            return Dataset(InMemoryTable.from_pydict({name: column}), fingerprint=uuid4().hex)
        return Dataset.from_dict({name: column})
    except (TypeError, ValueError, OverflowError, NotImplementedError) as error:
        counts = Counter(type(cell) for cell in column if cell is not None)
        if is_text and str in counts and list not in counts:  # however many numbers there are
            usual: type = str
        else:
            usual = max(counts, key=counts.__getitem__, default=type(None))
        odd = [i for i, value in enumerate(column) if not _fits(value, usual)]
        unicode = isinstance(error, UnicodeError)
        why = f"{'not valid Unicode' if unicode else 'mixed or unknown types'}: {error}"
        if not odd:
            raise DataError(f"column {name!r}: {why}") from error
        other = column[odd[0]]
        if not unicode:
            why = f"a {type(other).__name__}, where other rows have a {usual.__name__}"
        raise wrong(name, odd, f"{shown(other)}: {why}") from error


def _fits(value: object, kind: type) -> bool:
    """Whether a cell can stand in a column of a type."""
    if isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
        return False  # half of a pair, such as of an emoji that was cut
    return value is None or type(value) is kind
