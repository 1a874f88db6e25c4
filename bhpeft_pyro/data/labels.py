"""From a column to a tensor of class indices, ratings or answers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import ClassLabel
from torch import Tensor

from ..errors import DataError

__all__ = [
    "by_name",
    "is_number",
    "name_of",
    "read_answers",
    "read_classes",
    "read_ratings",
    "unlabelled",
]


def unlabelled(values: Sequence[Any]) -> bool:
    """Whether a label is missing, or all are -1, the placeholder in test splits of the hub."""
    missing = any(value is None or value == "" or value != value for value in values)
    return missing or all(value == -1 for value in values)


def name_of(value: Any) -> str:
    """What a class is called that a file has as a number or truth value.

    >>> name_of(3.0), name_of(True)
    ('3', 'True')
    """
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def by_name(values: Sequence[Any], feature: object, names: Sequence[str] | None) -> list[Any]:
    """Labels as the classes are known: by name, where they have names and the labels tell.

    A `ClassLabel` that names the classes otherwise tells; so do numbers where a name is one, and
    truth values where all names are such. Other numbers are indices.
    """
    own = feature.names if isinstance(feature, ClassLabel) else None
    if names is None or (own is not None and tuple(own) == tuple(names)):
        return list(values)
    if own is not None:
        valid = range(len(own))
        return [own[value] if value in valid else value for value in values]
    if any(map(is_number, names)) or all(name in ("True", "False") for name in names):
        # A reader may have made 1.1 of "1.10", as the class was called in another file.
        known = {float(name): name for name in names if is_number(name)}
        return [_name_among(known, v) if isinstance(v, (int, float)) else v for v in values]
    return list(values)


def _name_among(known: Mapping[float, str], value: float) -> Any:
    if value != value:
        return value
    return name_of(value) if isinstance(value, bool) else known.get(value, name_of(value))


def read_classes(
    values: Sequence[Any],
    column: str,
    feature: object,
    label_names: Sequence[str] | None,
    num_labels: int | None,
    new_names: bool,
) -> tuple[Tensor, tuple[str, ...] | None, int]:
    """(N,) int64 class indices, the names of the classes, and their number.

    Names come from `label_names`, else, if `new_names`, from a `ClassLabel` feature or from the
    strings found (sorted). Labels are mapped by name where they tell (`by_name`).
    """
    names = None if label_names is None else tuple(label_names)
    if isinstance(feature, ClassLabel):
        _check_range(values, column, len(feature.names))
        if names is None and new_names:
            names = tuple(feature.names)
    values = by_name(values, feature, names)
    _check_types(values, column, (int, str), "an integer or a str", hint='; kind="rating" is real')
    if isinstance(values[0], str):
        empty = next((i for i, value in enumerate(values) if not value.strip()), None)
        if empty is not None:
            raise DataError(f"column {column!r}, row {empty}: the label is empty")
        if names is None and not new_names:
            values = _numbers(values, column, num_labels)
        else:
            names = names or tuple(sorted(set(values)))
            index = {name: k for k, name in enumerate(names)}
            for i, value in enumerate(values):
                if value not in index:
                    raise DataError(f"column {column!r}, row {i}: {value!r} is none of {names}")
            values = [index[value] for value in values]
    if names is not None and num_labels not in (None, len(names)):
        raise DataError(
            f"num_labels={num_labels}, but column {column!r} has the {len(names)} classes {names}; "
            "label_names says which there are"
        )
    count = len(names) if names is not None else num_labels
    _check_range(values, column, count)
    labels = torch.tensor(values, dtype=torch.int64)
    return labels, names, int(labels.max()) + 1 if count is None else count


def _numbers(values: Sequence[str], column: str, count: int | None) -> list[int]:
    """Indices that a file has as text."""
    for i, value in enumerate(values):
        if not re.fullmatch(r"-?\d+", value):
            until = "" if count is None else f" to {count - 1}"
            raise DataError(
                f"column {column!r}, row {i}: {value!r:.60} is a name, and the classes have none; "
                f"expected their numbers, 0{until}"
            )
    return [int(value) for value in values]


def is_number(value: Any) -> bool:
    """Whether a cell is a finite number, or a str that reads as one."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def read_ratings(values: Sequence[Any], column: str) -> Tensor:
    """(N,) float32 ratings."""
    # First, because one such cell makes a reader turn all the others into str.
    for i, value in enumerate(values):
        if isinstance(value, str) and not is_number(value):
            raise DataError(
                f"column {column!r}, row {i}: {value!r:.60} is no number; expected a rating, "
                "such as 3.5"
            )
    _check_types(values, column, (float, int), "a real number", refused=bool)
    for i, value in enumerate(values):
        if not math.isfinite(value):
            raise DataError(f"column {column!r}, row {i}: {value!r}; expected a finite number")
    ratings = torch.tensor(values, dtype=torch.float32)
    if not bool(ratings.isfinite().all()):
        row = int((~ratings.isfinite()).nonzero()[0])
        raise DataError(f"column {column!r}, row {row}: {values[row]!r} is too large for float32")
    return ratings


def read_answers(
    values: Sequence[Any],
    column: str,
    choices: Sequence[Sequence[str]],
    names: Sequence[Sequence[Any] | None],
) -> Tensor:
    """(N,) int64 indices of the right choices."""
    _check_types(values, column, (int, str), "an index, or the text or name of a choice", bool)
    answers = []
    for i, (value, texts, labels) in enumerate(zip(values, choices, names, strict=True)):
        if isinstance(value, str):
            options = list(labels) if labels is not None else list(texts)
            found = [k for k, option in enumerate(options) if option == value]
            if len(found) != 1:
                raise DataError(
                    f"column {column!r}, row {i}: {value!r} matches {len(found)} of the choices "
                    f"{options}; expected exactly one"
                )
            value = found[0]
        if not 0 <= value < len(texts):
            raise DataError(
                f"column {column!r}, row {i}: answer {value}; expected 0 to {len(texts) - 1}"
            )
        answers.append(value)
    return torch.tensor(answers, dtype=torch.int64)


def _check_types(
    values: Sequence[Any],
    column: str,
    types: tuple[type, ...],
    what: str,
    refused: type | tuple[type, ...] = (),
    hint: str = "",
) -> None:
    """All values of the right types, and all str or none."""
    # First, because a missing label makes a reader turn the others into floats.
    missing = next((i for i, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise DataError(f"column {column!r}, row {missing}: the label is missing (None)")
    for i, value in enumerate(values):
        if not isinstance(value, types) or isinstance(value, refused):
            raise DataError(
                f"column {column!r}, row {i}: {value!r:.60} is a {type(value).__name__}; "
                f"expected {what}{hint}"
            )
        if isinstance(value, str) != isinstance(values[0], str):
            raise DataError(
                f"column {column!r}: mixed types: row 0 is {values[0]!r:.60}, "
                f"row {i} is {value!r:.60}"
            )


def _check_range(values: Sequence[int], column: str, count: int | None) -> None:
    for i, value in enumerate(values):
        if value < 0 or (count is not None and value >= count):
            limit = "0 or more" if count is None else f"0 to {count - 1}"
            hint = "; label_names=(...) is for classes whose numbers are their names"
            if value == -1:
                hint = " (-1 marks rows without a label: use labelled=False)"
            raise DataError(f"column {column!r}, row {i}: label {value}; expected {limit}{hint}")
