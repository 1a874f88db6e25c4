"""The labels of a table: classes by name, several labels a text, ratings, and answers to multiple
choice."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Container, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..base.checks import shown, warn
from ..errors import DataError
from .columns import CellError, Kind, as_list, naming_rows, read_cells, wrong
from .copies import warn_of_classes
from .table import is_number


def unlabelled(values: Sequence[Any], column: str, placeholder: bool) -> bool:
    """Whether a label is missing, or is -1, the placeholder for classes in test splits of the hub.
    Warns if there are others, which are then not used."""
    missing = sum(
        value is None or value == "" or value != value or (placeholder and value == -1)
        for value in values
    )
    if 0 < missing < len(values):
        warn(f"column {column!r}: {missing} of {len(values)} labels are missing, so none is used")
    return bool(missing)


def check_types(
    values: Sequence[Any],
    column: str,
    types: tuple[type, ...],
    expected: str,
    refused: type | tuple[type, ...] = (),
    what: str = "label",
) -> None:
    """All values of the right types, and none missing."""

    def check_there(value: Any) -> None:
        if value is None or (value != value and float not in types):
            raise CellError(f"the {what} is missing ({value})")

    def check_type(value: Any) -> None:
        if not isinstance(value, types) or isinstance(value, refused):
            raise CellError(f"{shown(value)} is a {type(value).__name__}; expected {expected}")

    # First, because a missing label makes a reader turn the others into floats.
    read_cells(values, column, check_there)
    read_cells(values, column, check_type)


def read_ratings(values: Sequence[Any], column: str, what: str = "rating") -> Tensor:
    """(N,) float32 ratings, or other numbers."""

    def check_number(value: Any) -> None:
        if isinstance(value, str) and not is_number(value):
            comma = " and not 3,5" if is_number(value.replace(",", ".")) else ""
            raise CellError(f"{shown(value)} is not a number; expected a {what}, as 3.5{comma}")

    # One cell in another form, such as " 3.5", makes a reader turn all the others into str.
    read_cells(values, column, check_number)
    values = [float(value) if isinstance(value, str) else value for value in values]
    missing = "label" if what == "rating" else what
    check_types(values, column, (float, int), "a real number", bool, missing)
    ratings = torch.tensor(values, dtype=torch.float32)
    if bad := (~ratings.isfinite()).nonzero().flatten().tolist():
        first = values[bad[0]]
        problem = "is too large for float32" if math.isfinite(first) else "is not finite"
        raise wrong(column, bad, f"{first!r} {problem}")
    return ratings


def read_answers(
    values: Sequence[Any],
    column: str,
    choices: Sequence[tuple[Sequence[str], Sequence[Any] | None]],
) -> Tensor:
    """(N,) int64 indices of the right choices, of which there are the texts and the names."""
    values = [_whole(value) for value in values]
    check_types(values, column, (int, str), "an index, or the text or name of a choice", bool)

    def read(row: tuple[Any, tuple[Sequence[str], Sequence[Any] | None]]) -> int:
        value, (texts, names) = row
        options = [*map(str, texts if names is None else names)]
        if isinstance(value, str) and value not in options and re.fullmatch(r"-?\d+", value):
            value = int(value)  # a CSV file has text alone
        # A reader may have made 1 of "1", the name of a choice.
        if isinstance(value, str) or any(map(is_number, names or ())):
            if (count := options.count(str(value))) != 1:
                what = f"{value!r} matches {count} of the choices {options}"
                raise CellError(f"{what}; expected exactly one")
            value = options.index(str(value))
        if not 0 <= value < len(texts):
            raise CellError(f"answer {value}; expected 0 to {len(texts) - 1}")
        return int(value)

    return torch.tensor(read_cells(zip(values, choices, strict=True), column, read))


def name_of(value: Any, names: Container[str] = ()) -> str:
    """The name of a class, in NFC, by a cell: a text, a truth value, or a whole number, which may
    be written "3.0" or "+3" unless `names` has this.

    >>> name_of(3), name_of(3.0), name_of("3.0"), name_of(True), name_of("3.0", ["3.0", "3.1"])
    ('3', '3', '3', 'True', '3.0')
    """
    name = unicodedata.normalize("NFC", str(_whole(value)))
    number = re.fullmatch(r"\+?(-?\d+)(?:\.0*)?", name)
    return number[1] if number and name not in names else name


def _whole(value: Any) -> Any:
    """A whole number: pandas makes floats of a column that has had a gap."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def are_positions(labels: Iterable[Any], names: Iterable[str]) -> bool:
    """Whether labels are places in `names`: whole numbers where no name is a number.

    >>> are_positions([0, 1], ["bad", "good"]), are_positions([0, 1], ["0", "1"])
    (True, False)
    """
    whole = all(type(_whole(label)) is int for label in labels)
    return whole and not any(map(is_number, names))


def placed(classes: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Classes by name: numbers that are places in `names` become these; others stay as they are.

    >>> placed(["0", "1"], ["bad", "good"])
    ('bad', 'good')
    """
    numbers = [int(name) for name in classes if name.isdecimal()]
    if len(numbers) < len(classes) or not are_positions(numbers, names):
        return tuple(classes)
    return tuple(names[k] if k < len(names) else str(k) for k in numbers)


def numbered_names(count: int) -> tuple[str, ...]:
    """The names of classes that nobody has named.

    >>> numbered_names(3)
    ('0', '1', '2')
    """
    return tuple(map(str, range(count)))


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Different names, sorted; by size if all of them are numbers.

    >>> in_order(["10", "9", "9"])
    ('9', '10')
    """
    names = sorted(set(names))
    return tuple(sorted(names, key=float) if all(map(is_number, names)) else names)


def completed(names: Sequence[str], count: int | None, column: str) -> tuple[str, ...]:
    """The names of all `count` classes, if it is known how many there are: `names`, or the numbers
    from 0 if these are some of them."""
    if count is None or len(names) == count:
        return tuple(names)
    if not {*names} <= {*numbered_names(count)}:
        raise DataError(
            f"column {column!r} has {len(names)} classes, {tuple(names)}, and the model has "
            f"{count}; label_names says which there are"
        )
    return numbered_names(count)


def names_in(
    values: Sequence[Any], column: str, kind: Kind = "class", ordered: bool = False
) -> tuple[str, ...]:
    """The names of the classes or labels in a column, sorted; if the classes are `ordered`, by the
    numbers in them. Warns if some look like mistakes."""
    rows: Sequence[int] = range(len(values))
    if kind == "labels":
        cells = _lists(values, column)
        rows, values = _entries(cells)
        if not any(isinstance(value, str) for value in values):
            return numbered_names(max(map(len, cells)))
    with naming_rows(rows):
        values = _class_cells(values, column)
    called = [name_of(value) for value in values]
    names = in_order(called)
    if any(isinstance(value, str) for value in values):
        warn_of_classes(column, called)
    return _in_order(names, column) if ordered else names


def _class_cells(values: Sequence[Any], column: str) -> list[Any]:
    """Texts and whole numbers, none of which is missing or blank."""
    cells = [_whole(value) for value in values]
    check_types(cells, column, (int, str), "a text or a whole number")
    if empty := [i for i, cell in enumerate(cells) if not str(cell).strip()]:
        raise wrong(column, empty, "the label is empty")
    return cells


def read_classes(values: Sequence[Any], column: str, names: Sequence[str]) -> Tensor:
    """(N,) int64 indices of classes, which are looked up by name, or are places in `names`."""
    cells = _class_cells(values, column)
    positions = are_positions(cells, names)
    index = {str(k) if positions else name: k for k, name in enumerate(names)}

    def place(value: Any) -> int:
        name = name_of(value, index)
        if name not in index:
            missing = "; -1 marks rows without a label; in Python, labelled=False reads them"
            hint = missing if value == -1 else ""
            known = f"the positions 0 to {len(names) - 1} in " if positions else ""
            raise CellError(f"{shown(name)} is not one of {known}{tuple(names)}{hint}")
        return index[name]

    return torch.tensor(read_cells(cells, column, place), dtype=torch.int64)


def _in_order(names: Sequence[str], column: str) -> tuple[str, ...]:
    """Names of ordered classes by the numbers in them; refused unless each has one of its own."""
    # A hyphen after a letter is no minus, and commas may be between thousands.
    found = [re.search(r"(?:(?<!\w)-)?\d+(?:[.,]\d+)*", name) for name in names]
    numbers = {m.string: float(m[0]) for m in found if m and is_number(m[0])}
    if len({*numbers.values()}) < len(names):
        raise DataError(
            f"column {column!r}: the classes {tuple(names)} are ordered, and their names do not "
            "say how; expected label_names, from the lowest to the highest"
        )
    return tuple(sorted(names, key=numbers.__getitem__))


def read_labels(values: Sequence[Any], column: str, names: Sequence[str]) -> Tensor:
    """(N, K) float32: 1 where a text has a label. A cell is a list of names, or of K numbers 0 or
    1; in a CSV file as JSON."""
    cells = _lists(values, column)
    rows, labels = _entries(cells)
    if labels and not any(isinstance(label, str) for label in labels):
        count = len(names)

        def check_row(cell: list[Any]) -> None:
            if len(cell) != count or any(label not in (0, 1) for label in cell):
                what = f"names of labels, or {count} numbers 0 or 1"
                raise CellError(f"{shown(cell)}; expected a list of {what}")

        read_cells(cells, column, check_row)
        return torch.tensor(cells, dtype=torch.float32)
    with naming_rows(rows):
        check_types(labels, column, (str,), "a name, as other labels are")
        indices = read_classes(labels, column, names)
    matrix = torch.zeros(len(cells), len(names))
    matrix[torch.tensor(rows, dtype=torch.int64), indices] = 1
    return matrix


def _lists(values: Sequence[Any], column: str) -> list[Any]:
    """Cells that are lists."""
    cells = read_cells(values, column, as_list)
    check_types(cells, column, (list, tuple), 'a list of names, such as ["sport", "money"]')
    return cells


def _entries(cells: Sequence[Sequence[Any]]) -> tuple[list[int], list[Any]]:
    """The row of each entry of lists, and the entries."""
    return [i for i, cell in enumerate(cells) for _ in cell], [*chain.from_iterable(cells)]
