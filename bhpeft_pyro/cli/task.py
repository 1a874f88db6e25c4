"""What a table is used for: classes, labels, ratings or multiple choice."""

from __future__ import annotations

import ast
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..base import names
from ..base.checks import few, shown, warn
from ..data import Columns, Kind, LabelWarning
from ..data.cells import is_number
from ..data.columns import wrong
from ..data.doubts import warn_of_classes
from ..data.labels import check_types, in_one_form, name_of, read_labels, read_ratings
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
    columns: Columns  # with the names of the classes, if they have any
    classes: int = 0  # or labels
    scale: tuple[float, float] = (0.0, 1.0)  # the lowest and the highest rating
    levels: int = 0  # different ratings, if they are few whole numbers
    noise_by_text: bool = False  # a noise scale of ratings for each text

    def __str__(self) -> str:
        kind: Kind = "choice" if self.name == "choices" else "class"
        inputs = " and ".join(self.columns.inputs(kind))
        head = f"{self.name}: {self.columns.target(kind)!r} from {inputs!r}"
        if self.name == "ratings":
            return f"{head}, between {self.scale[0]:g} and {self.scale[1]:g}"
        if self.classes:
            called = self.columns.label_names or [str(k) for k in range(self.classes)]
            what = "labels" if self.name == "labels" else "classes"
            return f"{head}, {self.classes} {what} ({few(called)})"
        return head

    def model(
        self, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, kinds: Sequence[PEFT]
    ) -> Model:
        """The model for the task, with PEFT weights of some kinds."""
        how: dict[str, Any] = {"kinds": kinds, "tokenizer": tokenizer}
        if self.name == "choices":
            return tasks.multiple_choice(backbone, **how)
        if self.classes:
            several = self.name == "labels"
            return tasks.categories(backbone, self.classes, several=several, **how)
        how |= {"limits": bool(self.levels), "noise_by_text": self.noise_by_text}
        return tasks.ratings(backbone, *self.scale, **how)


def infer(table: Dataset, reading: Reading) -> Task:
    """The task of a table, from its columns and labels where it is not given.

    >>> table = Dataset.from_dict({"review": ["good", "bad"], "stars": [5, 1]})
    >>> print(infer(table, Reading()))
    ratings: 'stars' from 'review', between 1 and 5
    """
    there = table.column_names
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
        _check_noise("choices", reading)
        return Task("choices", Columns(answer=needed[2], max_length=reading.max_length))
    labels = [column for column in _LABELS if column in there]
    label = _column("label", reading.label_column, labels, table)
    texts = [
        column
        for column, feature in table.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
        and column not in (label, pair)
    ]
    text = _column("text", reading.text_column, ["text"] if "text" in there else texts, table)
    if text == label:
        raise DataError(
            f"column {text!r} cannot be the text and the label; name the other with "
            "--text-column or --label-column"
        )
    if pair is not None:
        _column("pair", pair, [], table)
    values, feature = table[label][:], table.features[label]
    if missing_rows := [i for i, value in enumerate(values) if value is None]:
        if not any(cell not in (None, "") for cell in table[missing_rows[0]].values()):
            raise DataError.of_rows("", missing_rows[:1], "all cells are empty; delete the line")
        raise wrong(label, missing_rows, "the label is missing")
    if _is_cell(label, values):
        warn(LabelWarning(f"column {label!r}: its name is like its cells; {_NO_HEADER}"))
    name = name or _guess(values, label, feature)
    _check_noise(name, reading)
    columns = Columns(text=text, pair=pair, label=label, max_length=reading.max_length)
    task = Task(name, columns, noise_by_text=reading.noise_by_text)
    if name == "classes":
        return _classes(task, values, feature)
    if name == "labels":
        _, called, count = read_labels(values, label, feature, None, None, new_names=True)
        return replace(task, classes=count, columns=replace(columns, label_names=called))
    read_ratings(values, label)
    levels = {float(value) for value in values}  # some may be texts
    scale = min(levels), max(levels)
    if len(levels) == 1:
        raise DataError(f"column {label!r}: all {len(values)} ratings are {scale[0]:g}")
    steps = len(levels) <= _LEVELS and all(map(float.is_integer, levels))
    return replace(task, scale=scale, levels=len(levels) if steps else 0)


def _check_noise(task: names.Task, reading: Reading) -> None:
    if reading.noise_by_text and task != "ratings":
        raise DataError(f"--noise-by-text: the task is {task}; expected --task ratings")


def _column(what: str, given: str | None, likely: Sequence[str], table: Dataset) -> str:
    there = table.column_names
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
    if any(_is_cell(column, table[column][:]) for column in there):
        raise DataError(f"{known}; {_NO_HEADER}")
    example = next((column for column in there if what in column.lower()), there[-1])
    raise DataError(f"{known}; name it, as in --{what}-column {shlex.quote(example)}")


def _is_cell(column: str, values: Sequence[Any]) -> bool:
    """Whether the name of a column is rather the first of its cells."""
    return is_number(column) or column in map(str, values)


def _guess(values: Sequence[Any], label: str, feature: object) -> names.Task:
    if isinstance(feature, ClassLabel) or isinstance(values[0], bool):
        return "classes"
    if _is_list(values[0]):
        return "labels"
    if listed := [i for i, value in enumerate(values) if _is_list(value) or _is_literal(value)]:
        what = f"{shown(values[listed[0]])} looks like a list; expected one in JSON in every row"
        raise wrong(label, listed, f"{what}, or --task classes")
    # Most of them, as one cell that is not a number turns the whole column into text. 3,5 counts
    # too: it is refused as a rating, where it would become a class.
    dotted = (value.replace(",", ".") if isinstance(value, str) else value for value in values)
    if label in _RATINGS and 2 * sum(map(is_number, dotted)) > len(values):
        return "ratings"
    if isinstance(values[0], str):
        return "classes"
    if any(not is_number(value) or value != int(value) for value in values):
        return "ratings"
    if set(values) == set(range(len(set(values)))):
        return "classes"
    raise DataError(
        f"column {label!r} has whole numbers from {min(values)} to {max(values)}: "
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


def _classes(task: Task, values: Sequence[Any], feature: object) -> Task:
    label = task.columns.label
    check_types(values, label, (int, float, str), "an integer or a str")
    values = in_one_form(values)
    labels = set(values)
    if len(labels) < 2:
        raise DataError(
            f"column {label!r}: all {len(values)} labels are {values[0]!r}; "
            "expected at least two classes"
        )
    warn_of_classes(label, [name_of(value) for value in values])
    if isinstance(feature, ClassLabel):
        called = tuple(feature.names)
    elif type(values[0]) is int and labels == set(range(len(labels))):
        return replace(task, classes=len(labels))
    else:
        called = tuple(name_of(value) for value in sorted(labels))
    return replace(task, classes=len(called), columns=replace(task.columns, label_names=called))
