"""What a table is to be used for: classes, ratings or multiple choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import ClassLabel, Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data import Columns, Kind
from ..data.columns import is_number, name_of, read_ratings
from ..errors import DataError
from ..model import tasks
from ..model.model import Model
from ..peft import Kind as PEFT
from .recipe import TaskName

__all__ = ["Task", "infer"]


_KINDS: dict[TaskName, Kind] = {"classes": "class", "ratings": "rating", "choices": "choice"}
# Columns that hold a label, unless one is named, and those whose numbers are ratings.
_LABELS = ("label", "rating", "stars", "score")
_RATINGS = ("rating", "stars", "score")


@dataclass(frozen=True)
class Task:
    """Which columns there are, and what is to be predicted.

    Attributes:
        name: "classes", "ratings" or "choices".
        columns: which column holds what.
        classes: the number of classes.
        names: the classes' names, where they have any.
        scale: the least and the greatest rating.
    """

    name: TaskName
    columns: Columns
    classes: int = 0
    names: tuple[str, ...] | None = None
    scale: tuple[float, float] = (0.0, 1.0)

    def __str__(self) -> str:
        text = " and ".join(self.columns.inputs(_KINDS[self.name]))
        head = f"{self.name}: {self.columns.target(_KINDS[self.name])!r} from {text!r}"
        if self.name == "ratings":
            return f"{head}, between {self.scale[0]:g} and {self.scale[1]:g}"
        if self.name == "classes":
            names = self.names or [str(k) for k in range(self.classes)]
            return f"{head}, {self.classes} classes ({_few(names)})"
        return head

    def model(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        kinds: Sequence[PEFT],
        noise_by_text: bool,
    ) -> Model:
        """The recipe of `tasks` for it."""
        if self.name == "choices":
            return tasks.multiple_choice(backbone, kinds=kinds, tokenizer=tokenizer)
        if self.name == "classes":
            return tasks.categories(backbone, self.classes, kinds=kinds, tokenizer=tokenizer)
        return tasks.ratings(
            backbone, *self.scale, noise_by_text=noise_by_text, kinds=kinds, tokenizer=tokenizer
        )


def infer(
    table: Dataset,
    name: TaskName | None = None,
    text: str | None = None,
    label: str | None = None,
    pair: str | None = None,
) -> Task:
    """The task of a table, from its columns and labels where it is not given.

    Raises:
        DataError: it is not clear, or a column is missing; the message names the option.

    >>> print(infer(Dataset.from_dict({"review": ["good", "bad"], "stars": [5, 1]})))
    ratings: 'stars' from 'review', between 1 and 5
    """
    there = table.column_names
    quiz = Columns()
    choice_columns = (quiz.question, quiz.choices, quiz.answer)
    if name == "choices" or (name is None and not label and set(choice_columns) <= set(there)):
        if missing := [column for column in choice_columns if column not in there]:
            raise DataError(f"choices need a column {missing[0]!r}; columns there: {_few(there)}")
        return Task("choices", quiz)
    label = _label(there, label)
    columns = Columns(text=_text(table, text, {label, pair}), pair=pair, label=label)
    if pair is not None and pair not in there:
        raise DataError(f"--pair-column: there is no {pair!r}; columns there: {_few(there)}")
    values = table[label][:]
    missing_row = next((i for i, value in enumerate(values) if value is None), None)
    if missing_row is not None:
        raise DataError(f"column {label!r}, row {missing_row}: the label is missing")
    feature = table.features[label]
    name = name or _guess(values, label, feature)
    if name == "classes":
        return _classes(Task(name, columns), values, feature)
    read_ratings(values, label)
    scale = float(min(values)), float(max(values))
    if scale[0] == scale[1]:
        raise DataError(f"column {label!r}: all {len(values)} ratings are {scale[0]:g}")
    return Task(name, columns, scale=scale)


def _label(there: Sequence[str], label: str | None) -> str:
    found = [column for column in _LABELS if column in there]
    if label is None and len(found) == 1:
        return found[0]
    if label is None:
        problem = f"{_few(found)} may all be the label" if found else "no column is named 'label'"
        raise DataError(f"{problem}; say --label-column, one of {_few(there)}")
    if label not in there:
        raise DataError(f"--label-column: there is no {label!r}; columns there: {_few(there)}")
    return label


def _text(table: Dataset, text: str | None, taken: set[str | None]) -> str:
    there = table.column_names
    if text is not None:
        if text not in there:
            raise DataError(f"--text-column: there is no {text!r}; columns there: {_few(there)}")
        return text
    if "text" in there:
        return "text"
    strings = [c for c, f in table.features.items() if f.dtype in ("string", "large_string")]
    found = [column for column in strings if column not in taken]
    if len(found) == 1:
        return found[0]
    problem = f"{_few(found)} may all be the text" if found else "no column holds text"
    raise DataError(f"{problem}; say --text-column, one of {_few(there)}")


def _guess(values: Sequence[Any], label: str, feature: object) -> TaskName:
    if isinstance(feature, ClassLabel) or isinstance(values[0], bool):
        return "classes"
    # Most, as one cell that is no number makes a reader take the whole column for texts.
    if label in _RATINGS and 2 * sum(map(is_number, values)) > len(values):
        return "ratings"
    if isinstance(values[0], str):
        return "classes"
    if any(not is_number(value) or value != int(value) for value in values):
        return "ratings"
    if set(values) == set(range(len(set(values)))):
        return "classes"
    raise DataError(
        f"column {label!r} has whole numbers from {min(values)} to {max(values)}: "
        "say --task classes or --task ratings"
    )


def _classes(task: Task, values: Sequence[Any], feature: object) -> Task:
    for row, value in enumerate(values):
        if not isinstance(value, (int, float, str)):
            raise DataError(
                f"column {task.columns.label!r}, row {row}: expected an integer or a str, got "
                f"{value!r:.60}"
            )
    if isinstance(feature, ClassLabel):
        names: tuple[str, ...] | None = tuple(feature.names)
    elif type(values[0]) is int and set(values) == set(range(len(set(values)))):
        names = None
    else:
        names = tuple(name_of(value) for value in sorted(set(values)))
    count = len(set(values)) if names is None else len(names)
    if len(set(values)) < 2:
        raise DataError(
            f"column {task.columns.label!r}: all {len(values)} labels are {values[0]!r}; "
            "expected at least two classes"
        )
    return replace(task, classes=count, names=names)


def _few(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
