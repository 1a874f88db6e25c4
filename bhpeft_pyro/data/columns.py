"""How a table is read: which column holds what, how much of a text, and which classes there are.

Checks of the text columns: no missing, empty or foreign entry gets as far as the tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError, DataError

__all__ = ["DEFAULT_COLUMNS", "MAX_CHOICES", "Columns", "Kind", "check_texts", "read_choices"]

Kind = Literal["class", "rating", "choice"]
"""A class index or name, a real number, or the index of the right one of several choices."""


@dataclass(frozen=True)
class Columns:
    """How a table is read.

    Attributes:
        text: the text (kinds "class" and "rating").
        pair: a second text that is read after the first one (premise and hypothesis, say).
        label: class or rating.
        question: the question (kind "choice").
        choices: 2 to 8 possible answers: a list of str, or `{"text": [...], "label": [...]}`.
        answer: the right choice: its index, its text, or its entry in `label`.
        max_length: longer texts are cut to so many tokens; by default to the tokenizer's limit
            (`fit` also looks at the backbone's).
        label_names: the classes, in the order of their indices; by default those of the data.

    Raises:
        ConfigError: one column has two uses, or `label_names` are not two or more different str.

    >>> Columns(text="review").text
    'review'
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
        for names in (
            (self.text, self.pair, self.label),
            (self.question, self.choices, self.answer),
        ):
            given = [name for name in names if name is not None]
            if len(set(given)) < len(given):
                raise ConfigError(
                    f"columns: {', '.join(map(repr, given))} must be different columns"
                )
        classes = self.label_names
        if classes is None:
            return
        if isinstance(classes, str) or not all(isinstance(name, str) for name in classes):
            raise ConfigError(f"label_names={classes!r}; expected a sequence of str")
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise ConfigError(f"label_names={classes!r}; expected two or more different names")
        object.__setattr__(self, "label_names", tuple(classes))

    def inputs(self, kind: Kind) -> tuple[str, ...]:
        """The columns that hold text, in reading order."""
        if kind == "choice":
            return (self.question, self.choices)
        return (self.text,) if self.pair is None else (self.text, self.pair)

    def target(self, kind: Kind) -> str:
        """The column that holds what is to be predicted."""
        return self.answer if kind == "choice" else self.label


DEFAULT_COLUMNS = Columns()


MAX_CHOICES = 8


def check_texts(values: Sequence[Any], column: str) -> list[str]:
    """The values, all of them str with something to read."""
    for i, value in enumerate(values):
        _check_text(value, f"column {column!r}, row {i}")
    return list(values)


def read_choices(
    values: Sequence[Any], column: str
) -> tuple[list[list[str]], list[list[Any] | None]]:
    """The texts of each example's choices, and their names (A, B, C, ...) where there are any."""
    texts: list[list[str]] = []
    names: list[list[Any] | None] = []
    for i, value in enumerate(values):
        where = f"column {column!r}, row {i}"
        labels = None
        if isinstance(value, str):  # a cell of a CSV file
            value = _from_json(value, where)
        if isinstance(value, dict) and "text" in value:
            value, labels = value["text"], value.get("label")
        if not isinstance(value, list):
            raise DataError(f"{where}: a {type(value).__name__}; expected a list of str")
        if not 2 <= len(value) <= MAX_CHOICES:
            raise DataError(f"{where}: {len(value)} choices; expected 2 to {MAX_CHOICES}")
        if labels is not None and len(labels) != len(value):
            raise DataError(f"{where}: {len(value)} texts but {len(labels)} labels")
        for k, text in enumerate(value):
            _check_text(text, f"{where}, choice {k}")
        texts.append(value)
        names.append(labels)
    return texts, names


def _from_json(cell: str, where: str) -> Any:
    try:
        return json.loads(cell)
    except ValueError as error:
        raise DataError(
            f'{where}: {cell!r:.60} is no list of str; expected one in JSON, such as ["yes", "no"]'
        ) from error


def _check_text(value: Any, where: str) -> None:
    if value is None:
        raise DataError(f"{where}: the text is missing; drop the row or fill it in")
    if not isinstance(value, str):
        raise DataError(f"{where}: {value!r:.60} is a {type(value).__name__}; expected a str")
    if not value.strip():
        raise DataError(f"{where}: the text is empty ({value!r:.60}); drop the row or fill it in")
