"""What a table is used for: classes, labels, ratings or multiple choice."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import names
from ..base.checks import few, shown
from ..data import Columns, Kind
from ..data.columns import wrong
from ..data.labels import names_in, read_ratings
from ..data.table import is_number, need, numbered, reads_as_number
from ..errors import DataError
from ..model import tasks
from ..model.model import Model
from ..peft import Kind as PEFT
from .options import Reading

_RATINGS = ("rating", "stars", "score")
_LABELS = ("label", "labels", *_RATINGS)
_NO_HEADER = (
    "the first line of the file may be a row; expected the names of the columns there, such as "
    "text,label"
)
_LEVELS = 11  # 0 to 10: of more whole numbers the ends may not be those of the scale


@dataclass(frozen=True)
class Task:
    """What is to be predicted from which columns."""

    name: names.Task
    columns: Columns  # with the names of the classes or labels
    scale: tuple[float, float] = (0.0, 1.0)  # the lowest and the highest rating
    levels: int = 0  # different ratings, if they are few whole numbers

    def __str__(self) -> str:
        kind: Kind = "choice" if self.name == "choices" else "class"
        inputs = " and ".join(self.columns.inputs(kind))
        head = f"{self.name}: {self.columns.target(kind)!r} from {inputs!r}"
        if self.name == "ratings":
            return f"{head}, between {self.scale[0]:g} and {self.scale[1]:g}"
        if called := self.columns.label_names:
            return f"{head}, {len(called)} {self.name} ({few(called)})"
        return head

    def model(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[PEFT]
    ) -> Model:
        """The model for the task, with PEFT weights of some kinds."""
        how: dict[str, Any] = {"kinds": kinds, "tokenizer": tokenizer}
        if self.name == "choices":
            return tasks.multiple_choice(backbone, **how)
        if called := self.columns.label_names:
            several = self.name == "labels"
            return tasks.categories(backbone, len(called), several=several, **how)
        return tasks.ratings(backbone, *self.scale, limits=bool(self.levels), **how)


def infer(rows: pd.DataFrame, reading: Reading) -> Task:
    """The task of a table, from its columns and labels where it is not given.

    >>> from bhpeft_pyro.data import table
    >>> rows = table({"review": ["good", "bad"], "stars": [5, 1]})
    >>> print(infer(rows, Reading()))
    ratings: 'stars' from 'review', between 1 and 5
    """
    with numbered(rows):
        return _infer(need(rows), reading)


def _infer(rows: pd.DataFrame, reading: Reading) -> Task:
    there = [*rows]
    needed = (Columns.question, Columns.choices, reading.label_column or Columns.answer)
    name, pair = reading.task, reading.pair_column
    if name == "choices" or (not name and not reading.label_column and set(needed) <= set(there)):
        if missing := [column for column in needed if column not in there]:
            raise DataError(f"choices need a column {missing[0]!r}; columns there: {few(there)}")
        for option, given in (("text", reading.text_column), ("pair", pair)):
            if given is not None:
                raise DataError(
                    f"--{option}-column: got {given!r}, but multiple choice reads the columns "
                    f"{needed[0]!r} and {needed[1]!r}; --task chooses another task"
                )
        return Task("choices", Columns(answer=needed[2], max_length=reading.max_length))
    labels = [column for column in _LABELS if column in there]
    label = _column("label", reading.label_column, labels, rows)
    texts = [column for column in there if column not in (label, pair) and _is_text(rows[column])]
    text = _column("text", reading.text_column, ["text"] if "text" in there else texts, rows)
    if text == label:
        raise DataError(
            f"column {text!r} cannot be the text and the label; name the other with "
            "--text-column or --label-column"
        )
    if pair is not None:
        _column("pair", pair, [], rows)
    values: list[Any] = rows[label].tolist()
    if missing_rows := [i for i, value in enumerate(values) if value is None]:
        if not any(cell not in (None, "") for cell in rows.iloc[missing_rows[0]]):
            raise DataError.of_rows("", missing_rows[:1], "all cells are empty; delete the line")
        raise wrong(label, missing_rows, "the label is missing")
    if _is_cell(label, values):
        raise DataError(f"column {label!r}: its name is like its cells; {_NO_HEADER}")
    name = name or _guess(values, label)
    columns = Columns(text=text, pair=pair, label=label, max_length=reading.max_length)
    task = Task(name, columns)
    if name in ("classes", "labels"):
        called = names_in(values, label, "labels" if name == "labels" else "class")
        if name == "classes" and len(called) < 2:
            raise DataError(
                f"column {label!r}: all {len(values)} labels are {values[0]!r}; "
                "expected at least two classes"
            )
        called = rows.attrs.get("classes", {}).get(label, called)
        return replace(task, columns=replace(columns, label_names=called))
    read_ratings(values, label)
    levels = {float(value) for value in values}  # some may be texts
    scale = min(levels), max(levels)
    if len(levels) == 1:
        raise DataError(f"column {label!r}: all {len(values)} ratings are {scale[0]:g}")
    steps = len(levels) <= _LEVELS and all(map(float.is_integer, levels))
    return replace(task, scale=scale, levels=len(levels) if steps else 0)


def _column(what: str, given: str | None, likely: Sequence[str], rows: pd.DataFrame) -> str:
    there = [*rows]
    if given is not None:
        if given not in there:
            raise DataError(f"--{what}-column: no column {given!r}; columns there: {few(there)}")
        return given
    if len(likely) == 1:
        return likely[0]
    if likely:
        problem = f"{few(likely)} may all be the {what}; name it with --{what}-column"
        raise DataError(f"{problem}, one of {few(there)}")
    known = f"no column is known to be the {what}; columns there: {few(there)}"
    if any(_is_cell(column, rows[column].tolist()) for column in there):
        raise DataError(f"{known}; {_NO_HEADER}")
    example = next((column for column in there if what in column.lower()), there[-1])
    raise DataError(f"{known}; name it, as in --{what}-column {shlex.quote(example)}")


def _is_cell(column: str, values: Sequence[Any]) -> bool:
    """Whether the name of a column is rather the first of its cells."""
    return is_number(column) or column in map(str, values)


def _is_text(cells: pd.Series) -> bool:
    """Whether the cells of a column are texts, and not all of them read as numbers."""
    some = cells.dropna().tolist()
    return all(isinstance(cell, str) for cell in some) and not all(map(reads_as_number, some))


def _guess(values: Sequence[Any], label: str) -> names.Task:
    if isinstance(values[0], bool):
        return "classes"
    if _is_list(values[0]):
        return "labels"
    if listed := [i for i, value in enumerate(values) if _is_list(value) or _is_literal(value)]:
        what = f"{shown(values[listed[0]])} looks like a list; expected one in JSON in every row"
        raise wrong(label, listed, f"{what}, or --task classes")
    # Most of them, so that the cells that are no numbers are refused. 3,5 counts too: it is refused
    # as a rating, where it would become a class.
    dotted = (value.replace(",", ".") if isinstance(value, str) else value for value in values)
    if label in _RATINGS and 2 * sum(map(is_number, dotted)) > len(values):
        return "ratings"
    if not all(map(reads_as_number, values)):  # such as "007" too
        return "classes"
    numbers = {float(value) for value in values}
    if not all(map(float.is_integer, numbers)):
        return "ratings"
    if numbers == {*range(len(numbers))}:
        return "classes"
    raise DataError(
        f"column {label!r} has whole numbers from {min(numbers):g} to {max(numbers):g}: "
        "choose --task classes, or --task ratings (if their order matters)"
    )


def _is_list(value: object) -> bool:
    """Whether a cell is a list, in a CSV file as JSON."""
    if isinstance(value, str) and not value.lstrip().startswith("["):
        return False  # sooner than a reader of JSON says so
    try:
        return isinstance(json.loads(value) if isinstance(value, str) else value, list)
    except (ValueError, RecursionError):
        return False


def _is_literal(value: object) -> bool:
    """Whether a cell is a list as Python shows it, and as `DataFrame.to_csv` writes it."""
    if not (isinstance(value, str) and value.startswith("[") and value.endswith("]")):
        return False
    try:
        return isinstance(ast.literal_eval(value), list)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return False
