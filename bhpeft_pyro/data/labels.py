"""The labels of a table: classes by name or number, several labels a text, ratings, and answers to
multiple choice."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..base.checks import shown, warn
from ..errors import DataError
from .columns import CellError, as_list, naming_entries, read_cells, wrong
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


def name_of(value: Any) -> str:
    """The name of a class that a file has as a number or truth value.

    >>> name_of(3.0), name_of(True)
    ('3', 'True')
    """
    return str(_whole(value))


def _whole(value: Any) -> Any:
    """A class's index: pandas makes floats of a column that has had a gap."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def in_one_form(values: Sequence[Any], names: Sequence[str] | None = None) -> list[Any]:
    """The values with texts as they are in `names` if these have them in any Unicode normal form,
    or as a whole number in another form, such as "3.0"; else in NFC.

    >>> in_one_form(["cafe\u0301", 3]) == ["caf\u00e9", 3]
    True
    """
    spelt = {_composed(name): name for name in names or ()} | {name: name for name in names or ()}

    def spell(text: str) -> str:
        whole = re.fullmatch(r"\+?(-?\d+)(?:\.0*)?", text)
        forms = (text, _composed(text), *(whole.groups() if whole else ()))
        return next((spelt[form] for form in forms if form in spelt), _composed(text))

    return [spell(value) if isinstance(value, str) else value for value in values]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def by_name(values: Sequence[Any], names: Sequence[str] | None) -> list[Any]:
    """Labels by the names of the classes, where there are names and the labels determine them.

    Numbers do where a name is a number, and truth values where all names are truth values. Other
    numbers are indices. A name may be in another Unicode normal form; new names are in NFC.
    """
    values = in_one_form(values, names)
    if names is None:
        return values
    if not any(map(is_number, names)) and not all(name in ("True", "False") for name in names):
        return values
    # A reader may have made 1.1 of "1.10", the class's name in another file.
    of_number: dict[float, str] = {}
    numbers = any(isinstance(value, (int, float)) for value in values)
    for name in filter(is_number, names):
        if (other := of_number.setdefault(float(name), name)) != name and numbers:
            raise DataError(
                f"label_names: {other!r} and {name!r} are the same number, and the labels are "
                "numbers; expected labels that are texts, or classes named otherwise"
            )

    def called_by(value: Any) -> Any:
        if not isinstance(value, (int, float)) or value != value:
            return value
        return name_of(value) if isinstance(value, bool) else of_number.get(value, name_of(value))

    return [called_by(value) for value in values]


Classes = tuple[Tensor, tuple[str, ...] | None, int]
"""Labels as a tensor, the names of the classes if they have any, and the number of classes."""


def read_classes(
    values: Sequence[Any],
    column: str,
    names: Sequence[str] | None,
    num_labels: int | None,
    new_names: bool,
    ordered: bool = False,
) -> Classes:
    """(N,) int64 class indices, the names of the classes, and their number.

    If `names` are not given and `new_names` are allowed, they are the strings in the column:
    sorted, or if the classes are `ordered` by numbers in them.
    """
    values = [_whole(value) for value in by_name(values, names)]
    check_types(values, column, (int, str), "an integer or a str")
    if names is None and new_names and all(isinstance(value, bool) for value in values):
        names = ("False", "True")
    elif any(isinstance(value, bool) for value in values):  # whose names, if any, are others
        expected = "the number of a class" if names is None else f"one of {tuple(names)}"
        check_types(values, column, (int, str), expected, bool)
    if any(isinstance(value, str) for value in values):
        check_types(values, column, (str,), "a name, as other labels are")
        if empty := [i for i, value in enumerate(values) if not value.strip()]:
            raise wrong(column, empty, "the label is empty")
        if names is None and new_names:
            names = sorted(set(values))
            if ordered:
                names = _in_order(names, column)
            warn_of_classes(column, values)
        values = _indices(values, column, names, num_labels)
    count = _agreed(column, names, num_labels)
    _check_range(values, column, count)
    labels = torch.tensor(values, dtype=torch.int64)
    count = int(labels.max()) + 1 if count is None else count
    return labels, None if names is None else tuple(names), count


def _in_order(names: Sequence[str], column: str) -> list[str]:
    """Names of ordered classes by the numbers in them; refused unless each has one of its own."""
    # A hyphen after a letter is no minus, and commas may be between thousands.
    found = [re.search(r"(?:(?<!\w)-)?\d+(?:[.,]\d+)*", name) for name in names]
    numbers = {m.string: float(m[0]) for m in found if m and is_number(m[0])}
    if len({*numbers.values()}) < len(names):
        raise DataError(
            f"column {column!r}: the classes {tuple(names)} are ordered, and their names do not "
            "say how; expected label_names, from the lowest to the highest"
        )
    return sorted(names, key=numbers.__getitem__)


def _indices(
    values: Sequence[str], column: str, names: Sequence[str] | None, count: int | None
) -> list[int]:
    """Indices of the classes, by their names or, if they have none, as a file has them as text."""
    index = {name: k for k, name in enumerate(names or ())}

    def place(value: str) -> int:
        if names is not None and value not in index:
            raise CellError(f"{value!r} is not one of {tuple(names)}")
        if names is None and not re.fullmatch(r"-?\d+", value):
            until = "" if count is None else f" to {count - 1}"
            what = f"{shown(value)} is a name, and the classes have none"
            raise CellError(f"{what}; expected their numbers, 0{until}")
        return int(value) if names is None else index[value]

    return read_cells(values, column, place)


def _agreed(column: str, names: Sequence[str] | None, num_labels: int | None) -> int | None:
    """The number of classes, by their names or as it is given; None if neither says it."""
    if names is not None and num_labels not in (None, len(names)):
        raise DataError(
            f"num_labels={num_labels}, but column {column!r} has {len(names)} classes: "
            f"{tuple(names)}; label_names says which there are"
        )
    return num_labels if names is None else len(names)


def _check_range(values: Sequence[int], column: str, count: int | None) -> None:
    def check(value: int) -> None:
        if not 0 <= value < (math.inf if count is None else count):
            limit = "0 or more" if count is None else f"0 to {count - 1}"
            hint = "; in Python, `label_names` is for classes whose numbers are their names"
            if value == -1:
                hint = "; -1 marks rows without a label; in Python, labelled=False reads them"
            raise CellError(f"label {value}; expected {limit}{hint}")

    read_cells(values, column, check)


def read_labels(
    values: Sequence[Any],
    column: str,
    names: Sequence[str] | None,
    num_labels: int | None,
    new_names: bool,
) -> Classes:
    """(N, K) float32: 1 where a text has a label; the names of the labels, and their number.

    A cell is a list of names, or of K numbers 0 or 1; in a CSV file as JSON. Other arguments are
    those of `read_classes`.
    """
    cells = read_cells(values, column, as_list)
    check_types(cells, column, (list, tuple), 'a list of names, such as ["sport", "money"]')
    places = [(i, "") for i, cell in enumerate(cells) for _ in cell]
    labels = [*chain.from_iterable(cells)]
    texts = any(isinstance(label, str) for label in labels)
    if texts and names is None and not new_names:
        raise DataError(f"column {column!r} has names, and the labels of this model have none")
    if texts or (names is not None and not labels):
        with naming_entries(places):
            indices, classes, count = read_classes(labels, column, names, num_labels, new_names)
        matrix = torch.zeros(len(cells), count)
        matrix[torch.tensor([i for i, _ in places], dtype=torch.int64), indices] = 1
        return matrix, classes, count
    count = _agreed(column, names, num_labels) or len(cells[0])
    if not count:
        raise wrong(column, 0, "[]; expected a number 0 or 1 for each label, or names in some row")

    def check_row(cell: list[Any]) -> None:
        if len(cell) != count or any(label not in (0, 1) for label in cell):
            what = f"names of labels, or {count} numbers 0 or 1"
            raise CellError(f"{shown(cell)}; expected a list of {what}")

    read_cells(cells, column, check_row)
    return torch.tensor(cells, dtype=torch.float32), None if names is None else tuple(names), count
