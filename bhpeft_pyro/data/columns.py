"""How a table is read, and its columns as checked texts, answers and numbers."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ..base.checks import MAYBE_COUNT, Rule, check_fields, shown, string, strings
from ..errors import ConfigError, DataError

Kind = Literal["class", "labels", "rating", "choice"]
"""A class, several labels, a real number, or the index of the right one of several choices."""

MAX_CHOICES = 8

V = TypeVar("V")
W = TypeVar("W")


@dataclass(frozen=True)
class Columns:
    """How a table is read.

    Attributes:
        text: the column of the text (all kinds but "choice"), or of the list of words.
        pair: the column of a second text that is read after the first (premise and hypothesis).
        label: the column of the class, of the list of classes, or of the rating; of a list of
            them, one for each word, where words are labelled.
        question: the column of the question (kind "choice").
        choices: that of 2 to 8 answers: a list of str, or `{"text": [...], "label": [...]}`.
        answer: that of the right choice: its entry in `label`, or without `label` its text; or its
            index, unless the entries are numbers.
        max_length: longer texts are cut to this number of tokens; by default to the tokenizer's
            limit, and in `fit` also to the backbone's.
        label_names: the classes in the order of their indices; by default those of the data.
        extra: columns of numbers that the likelihood reads; a model adds those of its own.

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
    extra: Sequence[str] = ()

    def __post_init__(self) -> None:
        every = ("text", "pair", "label", "question", "choices", "answer")
        rules: dict[str, Rule] = {
            name: string for name in every if name != "pair" or self.pair is not None
        }
        rules["max_length"] = MAYBE_COUNT
        check_fields(self, rules, "columns")
        object.__setattr__(self, "extra", strings("extra", self.extra))
        for names in (
            (self.text, self.pair, self.label, *self.extra),
            (self.question, self.choices, self.answer),
        ):
            given = [name for name in names if name is not None]
            if len(set(given)) < len(given):
                raise ConfigError(
                    f"columns: {', '.join(map(repr, given))} must be different columns"
                )
        if self.label_names is None:
            return
        classes = strings("label_names", self.label_names)
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ConfigError(f"label_names={shown(classes)}; expected two or more different names")
        object.__setattr__(self, "label_names", classes)

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
    return each_row(values, lambda i, value: check_text(value, column, i))


def each_row(values: Iterable[V], read: Callable[[int, V], W]) -> list[W]:
    """What `read` makes of each row's number and value; one error for all rows that it refuses."""
    found: list[W] = []
    errors: list[DataError] = []
    for i, value in enumerate(values):
        try:
            found.append(read(i, value))
        except DataError as error:
            if not error.rows:
                raise
            errors.append(error)
    if errors:
        rows = [row for error in errors for row in error.rows]
        raise DataError.of_rows(errors[0].where, rows, errors[0].problem)
    return found


def read_choices(
    values: Sequence[Any], column: str
) -> tuple[list[list[str]], list[list[Any] | None]]:
    """The texts of each example's choices, and their names (A, B, C, ...) if there are any."""

    def read(i: int, value: Any) -> tuple[list[str], list[Any] | None]:
        labels = None
        value = as_list(value, column, i)
        if isinstance(value, dict) and "text" in value:
            value, labels = value["text"], value.get("label")
        for each in (value,) if labels is None else (value, labels):
            if not isinstance(each, list):
                raise wrong(column, i, f"a {type(each).__name__}; expected a list of str")
        if not 2 <= len(value) <= MAX_CHOICES:
            raise wrong(column, i, f"{len(value)} choices; expected 2 to {MAX_CHOICES}")
        if labels is not None and len(labels) != len(value):
            raise wrong(column, i, f"{len(value)} texts but {len(labels)} labels")
        for k, text in enumerate(value):
            check_text(text, column, i, f"choice {k}: ")
        return value, labels

    every = each_row(values, read)
    return [texts for texts, _ in every], [names for _, names in every]


def as_list(value: Any, column: str, row: int) -> Any:
    """A cell, read as JSON if it is a str, as in a CSV file."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        expected = 'is not a list; expected JSON such as ["yes", "no"]'
        raise wrong(column, row, f"{shown(value)} {expected}") from error


FILL_IN = "; drop the row or fill it in"


def check_text(value: Any, column: str, row: int, where: str = "") -> str:
    """One text, which is a str that is not blank."""
    if value is None:
        raise wrong(column, row, f"{where}the text is missing{FILL_IN}")
    if not isinstance(value, str):
        what = f"{shown(value)} is a {type(value).__name__}"
        raise wrong(column, row, f"{where}{what}; expected a str")
    if not value.strip():
        raise wrong(column, row, f"{where}the text is empty{FILL_IN}")
    return value


def unlabelled(values: Sequence[Any], column: str, placeholder: bool) -> bool:
    """Whether a label is missing, or all are -1, the placeholder for classes in test splits of the
    hub. Warns if there are others, which are then not used."""
    missing = sum(value is None or value == "" or value != value for value in values)
    if 0 < missing < len(values):
        warnings.warn(
            f"column {column!r}: {missing} of {len(values)} labels are missing, so none is used",
            stacklevel=5,
        )
    return bool(missing) or (placeholder and all(value == -1 for value in values))


def is_number(value: Any) -> bool:
    """Whether a cell is a finite number, or a str that reads as one."""
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def read_ratings(values: Sequence[Any], column: str, what: str = "rating") -> Tensor:
    """(N,) float32 ratings, or other numbers."""

    def check_number(i: int, value: Any) -> None:
        if isinstance(value, str) and not is_number(value):
            raise wrong(column, i, f"{shown(value)} is not a number; expected a {what}, as 3.5")

    # First, because one such cell makes a reader turn all the others into str.
    each_row(values, check_number)
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
    choices: Sequence[Sequence[str]],
    names: Sequence[Sequence[Any] | None],
) -> Tensor:
    """(N,) int64 indices of the right choices."""
    check_types(values, column, (int, str), "an index, or the text or name of a choice", bool)

    def read(i: int, row: tuple[Any, Sequence[str], Sequence[Any] | None]) -> int:
        value, texts, labels = row
        # A reader may have made 1 of "1", the name of a choice.
        if isinstance(value, str) or any(map(is_number, labels or ())):
            options = [*map(str, texts if labels is None else labels)]
            if (found := options.count(str(value))) != 1:
                what = f"{value!r} matches {found} of the choices {options}"
                raise wrong(column, i, f"{what}; expected exactly one")
            value = options.index(str(value))
        if not 0 <= value < len(texts):
            raise wrong(column, i, f"answer {value}; expected 0 to {len(texts) - 1}")
        return int(value)

    answers = each_row(zip(values, choices, names, strict=True), read)
    return torch.tensor(answers, dtype=torch.int64)


def check_types(
    values: Sequence[Any],
    column: str,
    types: tuple[type, ...],
    expected: str,
    refused: type | tuple[type, ...] = (),
    what: str = "label",
) -> None:
    """All values of the right types, and none missing."""

    def check_there(i: int, value: Any) -> None:
        if value is None or (value != value and float not in types):
            raise wrong(column, i, f"the {what} is missing ({value})")

    def check_type(i: int, value: Any) -> None:
        if not isinstance(value, types) or isinstance(value, refused):
            given = f"{shown(value)} is a {type(value).__name__}"
            raise wrong(column, i, f"{given}; expected {expected}")

    # First, because a missing label makes a reader turn the others into floats.
    each_row(values, check_there)
    each_row(values, check_type)


def wrong(column: str, rows: int | Sequence[int], problem: str) -> DataError:
    """The error about a cell of a row, or about those of several."""
    return DataError.of_rows(
        f"column {column!r}", [rows] if isinstance(rows, int) else rows, problem
    )
