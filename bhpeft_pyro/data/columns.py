"""How a table is read, and its columns as checked texts, class indices, ratings and answers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from datasets import ClassLabel
from torch import Tensor

from ..checks import Number, Rule, check_fields, shown, string
from ..errors import ConfigError, DataError

__all__ = [
    "Columns",
    "Kind",
    "by_name",
    "check_texts",
    "is_number",
    "name_of",
    "read_answers",
    "read_choices",
    "read_classes",
    "read_ratings",
    "unlabelled",
]

Kind = Literal["class", "rating", "choice"]
"""A class index or name, a real number, or the index of the right one of several choices."""

_MAX_CHOICES = 8


@dataclass(frozen=True)
class Columns:
    """How a table is read.

    Attributes:
        text: the column of the text (kinds "class" and "rating").
        pair: the column of a second text that is read after the first (premise and hypothesis).
        label: the column of the class or rating.
        question: the column of the question (kind "choice").
        choices: that of 2 to 8 answers: a list of str, or `{"text": [...], "label": [...]}`.
        answer: that of the right choice: its index, its text, or its entry in `label`.
        max_length: longer texts are cut to this number of tokens; by default to the tokenizer's
            limit, and in `fit` also to the backbone's.
        label_names: the classes in the order of their indices; by default those of the data.

    Raises:
        ConfigError: two columns are the same, or `label_names` are not two or more different str.

    >>> Columns(text="review", label_names=["bad", "good"]).label_names
    ('bad', 'good')
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    max_length: int | None = None
    label_names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        every = ("text", "pair", "label", "question", "choices", "answer")
        rules: dict[str, Rule] = {
            name: string for name in every if name != "pair" or self.pair is not None
        }
        rules["max_length"] = Number(least=1, whole=True, none=True)
        check_fields(self, rules, "columns")
        for names in (
            (self.text, self.pair, self.label),
            (self.question, self.choices, self.answer),
        ):
            given = [name for name in names if name is not None]
            if len(set(given)) < len(given):
                raise ConfigError(
                    f"columns: {', '.join(map(repr, given))} must be different columns"
                )
        classes: Any = self.label_names
        if classes is None:
            return
        if isinstance(classes, np.ndarray):
            classes = classes.tolist()  # which is no list if it has no dimensions
        if not isinstance(classes, Sequence) or isinstance(classes, str):
            raise ConfigError(f"label_names={shown(classes)}; expected a sequence of str")
        classes = [string("label_names", name) for name in classes]
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ConfigError(f"label_names={shown(classes)}; expected two or more different names")
        object.__setattr__(self, "label_names", tuple(classes))

    def inputs(self, kind: Kind) -> tuple[str, ...]:
        """The columns that hold text, in reading order."""
        if kind == "choice":
            return (self.question, self.choices)
        return (self.text,) if self.pair is None else (self.text, self.pair)

    def target(self, kind: Kind) -> str:
        """The column to predict."""
        return self.answer if kind == "choice" else self.label


def check_texts(values: Sequence[Any], column: str) -> list[str]:
    """The values, if all of them are str that are not blank."""
    for i, value in enumerate(values):
        _check_text(value, column, i)
    return list(values)


def read_choices(
    values: Sequence[Any], column: str
) -> tuple[list[list[str]], list[list[Any] | None]]:
    """The texts of each example's choices, and their names (A, B, C, ...) if there are any."""
    texts: list[list[str]] = []
    names: list[list[Any] | None] = []
    for i, value in enumerate(values):
        labels = None
        if isinstance(value, str):  # a cell of a CSV file
            try:
                value = json.loads(value)
            except ValueError as error:
                expected = 'is not a list; expected JSON such as ["yes", "no"]'
                raise _wrong(column, i, f"{shown(value)} {expected}") from error
        if isinstance(value, dict) and "text" in value:
            value, labels = value["text"], value.get("label")
        if not isinstance(value, list):
            raise _wrong(column, i, f"a {type(value).__name__}; expected a list of str")
        if not 2 <= len(value) <= _MAX_CHOICES:
            raise _wrong(column, i, f"{len(value)} choices; expected 2 to {_MAX_CHOICES}")
        if labels is not None and len(labels) != len(value):
            raise _wrong(column, i, f"{len(value)} texts but {len(labels)} labels")
        for k, text in enumerate(value):
            _check_text(text, column, i, f"choice {k}: ")
        texts.append(value)
        names.append(labels)
    return texts, names


def _check_text(value: Any, column: str, row: int, where: str = "") -> None:
    if value is None:
        raise _wrong(column, row, f"{where}the text is missing; drop the row or fill it in")
    if not isinstance(value, str):
        what = f"{shown(value)} is a {type(value).__name__}"
        raise _wrong(column, row, f"{where}{what}; expected a str")
    if not value.strip():
        raise _wrong(column, row, f"{where}the text is empty; drop the row or fill it in")


def unlabelled(values: Sequence[Any]) -> bool:
    """Whether a label is missing, or all are -1, the placeholder in test splits of the hub."""
    missing = any(value is None or value == "" or value != value for value in values)
    return missing or all(value == -1 for value in values)


def is_number(value: Any) -> bool:
    """Whether a cell is a finite number, or a str that reads as one."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def name_of(value: Any) -> str:
    """The name of a class that a file has as a number or truth value.

    >>> name_of(3.0), name_of(True)
    ('3', 'True')
    """
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def by_name(values: Sequence[Any], feature: object, names: Sequence[str] | None) -> list[Any]:
    """Labels by the names of the classes, where there are names and the labels determine them.

    A `ClassLabel` with other names determines them; so do numbers where a name is a number, and
    truth values where all names are truth values. Other numbers are indices.
    """
    own = feature.names if isinstance(feature, ClassLabel) else None
    if names is None or (own is not None and tuple(own) == tuple(names)):
        return list(values)
    if own is not None:
        valid = range(len(own))
        return [own[value] if value in valid else value for value in values]
    if any(map(is_number, names)) or all(name in ("True", "False") for name in names):
        # A reader may have made 1.1 of "1.10", the class's name in another file.
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
    names: Sequence[str] | None,
    num_labels: int | None,
    new_names: bool,
) -> tuple[Tensor, tuple[str, ...] | None, int]:
    """(N,) int64 class indices, the names of the classes, and their number.

    If `names` are not given and `new_names` are allowed, they come from a `ClassLabel` feature or
    from the strings in the column (sorted).
    """
    if isinstance(feature, ClassLabel):
        _check_range(values, column, len(feature.names))
        if names is None and new_names:
            names = feature.names
    values = by_name(values, feature, names)
    _check_types(values, column, (int, str), 'an integer or a str; kind="rating" is real')
    if isinstance(values[0], str):
        empty = next((i for i, value in enumerate(values) if not value.strip()), None)
        if empty is not None:
            raise _wrong(column, empty, "the label is empty")
        if names is None and not new_names:
            values = _numbers(values, column, num_labels)
        else:
            names = tuple(names or sorted(set(values)))
            index = {name: k for k, name in enumerate(names)}
            for i, value in enumerate(values):
                if value not in index:
                    raise _wrong(column, i, f"{value!r} is not one of {names}")
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


def _numbers(values: Sequence[str], column: str, count: int | None) -> list[int]:
    """Indices that a file has as text."""
    for i, value in enumerate(values):
        if not re.fullmatch(r"-?\d+", value):
            until = "" if count is None else f" to {count - 1}"
            what = f"{shown(value)} is a name, and the classes have none"
            raise _wrong(column, i, f"{what}; expected their numbers, 0{until}")
    return [int(value) for value in values]


def read_ratings(values: Sequence[Any], column: str) -> Tensor:
    """(N,) float32 ratings."""
    # First, because one such cell makes a reader turn all the others into str.
    for i, value in enumerate(values):
        if isinstance(value, str) and not is_number(value):
            raise _wrong(column, i, f"{shown(value)} is not a number; expected a rating, as 3.5")
    _check_types(values, column, (float, int), "a real number", refused=bool)
    ratings = torch.tensor(values, dtype=torch.float32)
    for i in (~ratings.isfinite()).nonzero().flatten().tolist():
        problem = "is too large for float32" if math.isfinite(values[i]) else "is not finite"
        raise _wrong(column, i, f"{values[i]!r} {problem}")
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
            if (found := options.count(value)) != 1:
                what = f"{value!r} matches {found} of the choices {options}"
                raise _wrong(column, i, f"{what}; expected exactly one")
            value = options.index(value)
        if not 0 <= value < len(texts):
            raise _wrong(column, i, f"answer {value}; expected 0 to {len(texts) - 1}")
        answers.append(value)
    return torch.tensor(answers, dtype=torch.int64)


def _check_types(
    values: Sequence[Any],
    column: str,
    types: tuple[type, ...],
    expected: str,
    refused: type | tuple[type, ...] = (),
) -> None:
    """All values of the right types, and none missing."""
    # First, because a missing label makes a reader turn the others into floats.
    missing = next((i for i, value in enumerate(values) if value is None), None)
    if missing is not None:
        raise _wrong(column, missing, "the label is missing (None)")
    for i, value in enumerate(values):
        if not isinstance(value, types) or isinstance(value, refused):
            what = f"{shown(value)} is a {type(value).__name__}"
            raise _wrong(column, i, f"{what}; expected {expected}")


def _check_range(values: Sequence[int], column: str, count: int | None) -> None:
    for i, value in enumerate(values):
        if value < 0 or (count is not None and value >= count):
            limit = "0 or more" if count is None else f"0 to {count - 1}"
            hint = "; label_names=(...) is for classes whose numbers are their names"
            if value == -1:
                hint = " (-1 marks rows without a label: use labelled=False)"
            raise _wrong(column, i, f"label {value}; expected {limit}{hint}")


def _wrong(column: str, row: int, problem: str) -> DataError:
    return DataError(f"column {column!r}, row {row}: {problem}")
