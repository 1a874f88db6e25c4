"""How a table is read, and its cells: texts and choices."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

from ..base.checks import shown
from ..base.values import Count, Names, checked_dataclass
from ..errors import ConfigError, DataError

Kind = Literal["class", "labels", "rating", "choice"]
"""A class, several labels, a real number, or the index of the right one of several choices."""

MAX_CHOICES = 8
FILL_IN = "; drop the row or fill it in"

_HALF = re.compile("[\ud800-\udfff]")  # of a pair, such as of an emoji that was cut

V = TypeVar("V")
W = TypeVar("W")


@checked_dataclass
class Columns:
    """How a table is read.

    Attributes:
        text: the column of the text (all kinds but "choice").
        pair: the column of a second text that is read after the first (premise and hypothesis).
        label: the column of the class, of the list of classes, or of the rating.
        question: the column of the question (kind "choice").
        choices: the column of the 2 to 8 answers: a list of str, or
            `{"text": [...], "label": [...]}`.
        answer: the column of the right choice, given by its entry in `label` (without `label`, by
            its text) or by its index from 0. If the entries of `label` are numbers, a number is an
            entry and not an index; so is a number in a CSV file that is the text of a choice.
        max_length: longer texts are cut to this number of tokens; by default to the tokenizer's
            limit, and in `fit` also to the backbone's.
        label_names: the classes in the order of their indices; by default those of the data, or
            "0", "1" and so on.
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
    max_length: Count | None = None
    label_names: Names | None = None
    extra: Names = ()

    def __post_init__(self) -> None:
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
        classes = tuple(unicodedata.normalize("NFC", name) for name in self.label_names)
        if not 1 < len(set(classes)) == len(classes):
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


def wrong(column: str, rows: int | Sequence[int], problem: str) -> DataError:
    """The error about a cell of a row, or about those of several."""
    rows = [rows] if isinstance(rows, int) else rows
    return DataError.of_rows(f"column {column!r}", rows, problem)


class CellError(Exception):
    """Says what is wrong with a cell; `read_cells` says where it is."""


def read_cells(values: Iterable[V], column: str, read: Callable[[V], W]) -> list[W]:
    """Apply `read` to each cell; one error for all cells of which it raises a CellError."""
    results: list[W] = []
    rows: list[int] = []
    problem = ""
    for i, value in enumerate(values):
        try:
            results.append(read(value))
        except CellError as error:
            rows.append(i)
            problem = problem or str(error)
    if rows:
        raise wrong(column, rows, problem)
    return results


def check_text(value: Any, where: str = "") -> str:
    """A text, which is a str that is not blank."""
    if value is None:
        raise CellError(f"{where}the text is missing{FILL_IN}")
    if not isinstance(value, str):
        raise CellError(f"{where}{shown(value)} is a {type(value).__name__}; expected a str")
    if not value.strip():
        raise CellError(f"{where}the text is empty{FILL_IN}")
    check_unicode(value)
    return value


def check_unicode(value: Any) -> None:
    """A label, or a list of labels, of whole characters."""
    for name in value if isinstance(value, list) else [value]:
        if isinstance(name, str) and _HALF.search(name):
            raise CellError(f"{shown(name)} is not valid Unicode: half of a character")


def as_list(value: Any) -> Any:
    """A cell, read as JSON if it is a str, as in a CSV file."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        expected = 'is not a list; expected JSON such as ["yes", "no"]'
        raise CellError(f"{shown(value)} {expected}") from error


def as_choices(value: Any) -> tuple[list[str], list[Any] | None]:
    """The texts of the choices in a cell, and their names (A, B, C, ...) if there are any."""
    texts, names = as_list(value), None
    if isinstance(texts, dict) and "text" in texts:
        texts, names = texts["text"], texts.get("label")
    for part in (texts,) if names is None else (texts, names):
        if not isinstance(part, list):
            raise CellError(f"a {type(part).__name__}; expected a list of str")
    if not 2 <= len(texts) <= MAX_CHOICES:
        raise CellError(f"{len(texts)} choices; expected 2 to {MAX_CHOICES}")
    if names is not None and len(names) != len(texts):
        raise CellError(f"{len(texts)} texts but {len(names)} labels")
    return [check_text(text, f"choice {k}: ") for k, text in enumerate(texts)], names


@contextmanager
def naming_rows(rows: Sequence[int]) -> Iterator[None]:
    """Within the block the entries of lists are read one after the other, and errors name the
    `rows` in which they are."""
    try:
        yield
    except DataError as error:
        bad = [*dict.fromkeys(rows[i] for i in error.rows)]
        raise DataError.of_rows(error.where, bad, error.problem) from error
