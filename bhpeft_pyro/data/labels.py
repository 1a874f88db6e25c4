"""Classes in a table: one a text by name or number, or any number of them a text."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import ClassLabel
from torch import Tensor

from ..base.checks import shown
from ..errors import DataError
from .columns import as_list, check_types, each_row, is_number, wrong
from .doubts import warn_of_classes


def name_of(value: Any) -> str:
    """The name of a class that a file has as a number or truth value.

    >>> name_of(3.0), name_of(True)
    ('3', 'True')
    """
    return str(_whole(value))


def by_name(values: Sequence[Any], feature: object, names: Sequence[str] | None) -> list[Any]:
    """Labels by the names of the classes, where there are names and the labels determine them.

    A `ClassLabel` with other names determines them; so do numbers where a name is a number, and
    truth values where all names are truth values. Other numbers are indices. A name may be in
    another Unicode normal form; new names are in NFC.
    """
    values = in_one_form(values, names)
    own = feature.names if isinstance(feature, ClassLabel) else None
    if names is None or (own is not None and tuple(own) == tuple(names)):
        return list(values)
    if own is not None:
        valid = range(len(own))
        return [own[value] if value in valid else value for value in values]
    if any(map(is_number, names)) or all(name in ("True", "False") for name in names):
        # A reader may have made 1.1 of "1.10", the class's name in another file.
        known: dict[float, str] = {}
        numbers = any(isinstance(value, (int, float)) for value in values)
        for name in filter(is_number, names):
            if (other := known.setdefault(float(name), name)) != name and numbers:
                raise DataError(
                    f"label_names: {other!r} and {name!r} are the same number, and the labels are "
                    "numbers; expected labels that are texts, or classes named otherwise"
                )
        return [_name_among(known, v) if isinstance(v, (int, float)) else v for v in values]
    return list(values)


def in_one_form(values: Sequence[Any], names: Sequence[str] | None = None) -> list[Any]:
    """The values with texts as they are in `names` if these have them in any Unicode normal form,
    and in NFC if not.

    >>> in_one_form(["cafe\u0301", 3]) == ["caf\u00e9", 3]
    True
    """
    known = {_composed(name): name for name in names or ()} | {name: name for name in names or ()}
    return [
        known.get(value) or known.get(plain := _composed(value), plain)
        if isinstance(value, str)
        else value
        for value in values
    ]


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _name_among(known: Mapping[float, str], value: float) -> Any:
    if value != value:
        return value
    return name_of(value) if isinstance(value, bool) else known.get(value, name_of(value))


def read_classes(
    values: Sequence[Any],
    column: str,
    feature: object,
    names: Sequence[str] | None,
    num_labels: int | None,
    new_names: bool,
) -> tuple[Tensor, tuple[str, ...] | None, int]:
    """(N,) int64 class indices, the names of the classes, and their number.

    If `names` are not given and `new_names` are allowed, they come from a `ClassLabel` feature or
    from the strings in the column (sorted).
    """
    if isinstance(feature, ClassLabel):
        check_types(values, column, (int,), "an integer")
        _check_range(values, column, len(feature.names))
        if names is None and new_names:
            names = feature.names
    values = [_whole(value) for value in by_name(values, feature, names)]
    check_types(values, column, (int, str), "an integer or a str")
    if names is None and new_names and all(isinstance(value, bool) for value in values):
        names = ("False", "True")
    elif any(isinstance(value, bool) for value in values):  # whose names, if any, are others
        expected = "the number of a class" if names is None else f"one of {tuple(names)}"
        check_types(values, column, (int, str), expected, bool)
    if isinstance(values[0], str):
        if empty := [i for i, value in enumerate(values) if not value.strip()]:
            raise wrong(column, empty, "the label is empty")
        if names is None and not new_names:
            values = _numbers(values, column, num_labels)
        else:
            if names is None:
                names = sorted(set(values))
                warn_of_classes(column, values)
            names = tuple(names)
            index = {name: k for k, name in enumerate(names)}
            if unknown := [i for i, value in enumerate(values) if value not in index]:
                raise wrong(column, unknown, f"{values[unknown[0]]!r} is not one of {names}")
            values = [index[value] for value in values]
    if names is not None and num_labels not in (None, len(names)):
        raise DataError(
            f"num_labels={num_labels}, but column {column!r} has the {len(names)} classes "
            f"{tuple(names)}; label_names says which there are"
        )
    count = len(names) if names is not None else num_labels
    _check_range(values, column, count)
    labels = torch.tensor(values, dtype=torch.int64)
    names = None if names is None else tuple(names)
    return labels, names, int(labels.max()) + 1 if count is None else count


def _whole(value: Any) -> Any:
    """A class's index: pandas makes floats of a column that has had a gap."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _numbers(values: Sequence[str], column: str, count: int | None) -> list[int]:
    """Indices that a file has as text."""
    if named := [i for i, value in enumerate(values) if not re.fullmatch(r"-?\d+", value)]:
        until = "" if count is None else f" to {count - 1}"
        what = f"{shown(values[named[0]])} is a name, and the classes have none"
        raise wrong(column, named, f"{what}; expected their numbers, 0{until}")
    return [int(value) for value in values]


def read_labels(
    values: Sequence[Any],
    column: str,
    feature: object,
    names: Sequence[str] | None,
    num_labels: int | None,
    new_names: bool,
) -> tuple[Tensor, tuple[str, ...] | None, int]:
    """(N, K) float32: 1 where a text has a label; the names of the labels, and their number.

    A cell is a list of names, or of K numbers 0 or 1; in a CSV file as JSON. Of a list of
    `ClassLabel` it is a list of indices. Other arguments are those of `read_classes`.
    """
    cells = each_row(values, lambda i, value: as_list(value, column, i))
    check_types(cells, column, (list, tuple), 'a list of names, such as ["sport", "money"]')
    inner = getattr(feature, "feature", None)
    if isinstance(inner, ClassLabel):
        known = dict(enumerate(inner.names))
        cells = [[known.get(each, each) for each in cell] for cell in cells]
        names = inner.names if names is None and new_names else names
    cells = [in_one_form(cell, names) for cell in cells]
    every = [each for cell in cells for each in cell]
    called = {each for each in every if isinstance(each, str)}
    if called or (names is not None and not every):
        if names is None and not new_names:
            raise DataError(f"column {column!r} has names, and the labels of this model have none")
        if names is None:
            warn_of_classes(column, [each for each in every if isinstance(each, str)])
        names = tuple(names or sorted(filter(str.strip, called)))
        unknown = [(i, each) for i, cell in enumerate(cells) for each in cell if each not in names]
        if unknown:
            rows = [*dict.fromkeys(i for i, _ in unknown)]
            raise wrong(column, rows, f"{shown(unknown[0][1])} is not one of {names}")
        cells = [[int(name in cell) for name in names] for cell in cells]
    count = len(names) if names is not None else num_labels or len(cells[0])
    if not count:
        raise wrong(column, 0, "[]; expected a number 0 or 1 for each label, or names in some row")
    if num_labels not in (None, count):
        raise DataError(
            f"num_labels={num_labels}, but column {column!r} has {count} labels: {names}; "
            "label_names says which there are"
        )
    if bad := [
        i
        for i, cell in enumerate(cells)
        if len(cell) != count or any(each not in (0, 1) for each in cell)
    ]:
        expected = f"names of labels, or {count} numbers 0 or 1"
        raise wrong(column, bad, f"{shown(cells[bad[0]])}; expected a list of {expected}")
    labels = torch.tensor(cells, dtype=torch.float32)
    return labels, None if names is None else tuple(names), count


def _check_range(values: Sequence[int], column: str, count: int | None) -> None:
    most = math.inf if count is None else count - 1
    if bad := [i for i, value in enumerate(values) if not 0 <= value <= most]:
        limit = "0 or more" if count is None else f"0 to {most}"
        hint = "; label_names=(...) is for classes whose numbers are their names"
        if values[bad[0]] == -1:
            hint = " (-1 marks rows without a label: use labelled=False)"
        raise wrong(column, bad, f"label {values[bad[0]]}; expected {limit}{hint}")
