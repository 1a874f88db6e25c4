"""The experiments' data: tables of rows, split by a seed into train, validation and tests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import torch
from datasets import Dataset, load_dataset

from bhpeft_pyro.data import Columns
from bhpeft_pyro.data.copies import plain
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.model.likelihoods import Likelihood

from .tiny import ROWS

_TYPOS = 0.3  # of the words

UNLABELLED = 2000
"""Texts for a student, at most."""

__all__ = ["Shift", "Split", "Task", "digest_of", "once", "read", "split"]


def digest_of(plain: Mapping[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Shift:
    """Rows of another kind than those that are learnt.

    Attributes:
        source: as a task's.
        label: only rows with this label; None for all.
        labelled: whether its labels are the task's.
        typos: whether its texts get typing errors.
    """

    source: str
    label: int | None = None
    labelled: bool = False
    typos: bool = False


@dataclass(frozen=True)
class Task:
    """What is to be learnt.

    Attributes:
        source: a JSON lines file of the data folder, without its ending; or toy rows in `tiny`.
        outputs: numbers the head gives.
        likelihood: makes the likelihood.
        columns: where the rows keep what.
        max_length: texts are cut to so many tokens.
        classes: rows with labels from here on are left out; None for none.
        shifts: further test rows, by name.
    """

    source: str
    outputs: int
    likelihood: Callable[[], Likelihood]
    columns: Columns = Columns()
    max_length: int = 64
    classes: int | None = None
    shifts: Mapping[str, Shift] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The columns that are read: of the text, or of the question and its choices."""
        return self.columns.inputs(self.likelihood().kind)

    @property
    def text(self) -> str:
        """The column of the text, or of the question."""
        return self.inputs[0]

    @property
    def target(self) -> str:
        """The column to predict."""
        return self.columns.target(self.likelihood().kind)


@dataclass(frozen=True)
class Split:
    """Rows that share no text, case and spaces aside.

    Attributes:
        train: to learn.
        validation: to choose by, and to fit a temperature on.
        tests: "test" and the shifts.
        unlabelled: texts that are in none of these, `UNLABELLED` at most.
        digest: of all texts and labels: results of others are not to be compared with.
    """

    train: Dataset
    validation: Dataset
    tests: Mapping[str, Dataset]
    unlabelled: Dataset
    digest: str


def read(folder: Path | None, source: str) -> Dataset:
    """All rows of a source.

    Raises:
        ConfigError: there is no folder.
        DataError: there is no such file.
    """
    if source in ROWS:
        return Dataset.from_list(ROWS[source]())
    if folder is None:
        raise ConfigError("--data: name the folder of the JSON lines files")
    path = folder / f"{source}.jsonl"
    if not path.exists():
        raise DataError(f"--data: there is no {path.name} in {folder}")
    return load_dataset("json", data_files=str(path), split="train")


def split(
    folder: Path | None, task: Task, rows: int, validation: int, test: int, seed: int
) -> Split:
    """Random rows for each part; another seed gives other rows in every part.

    Raises:
        DataError: a source cannot be read, or it has too few rows.
    """
    generator = torch.Generator().manual_seed(seed)
    learnt = None if task.classes is None else lambda label: label < task.classes
    table = once(_rows(folder, task, task.source, generator, learnt), task.text)
    counts = (rows, validation, test)
    train, held_out, tested = _cut(table, counts, task.source)
    rest = table.select([*range(sum(counts), min(len(table), sum(counts) + UNLABELLED))])
    seen = {plain(text) for part in (train, held_out) for text in _texts(part, task)}
    tests = {"test": tested}
    for name, shift in task.shifts.items():
        only: Any = None if shift.label is None else shift.label.__eq__
        only = learnt if shift.typos else only  # texts of what was learnt
        table = _rows(folder, task, shift.source, generator, only)
        texts = map(plain, _texts(table, task))
        table = table.select([i for i, text in enumerate(texts) if text not in seen])
        if not shift.labelled and task.target in table.column_names:
            table = table.remove_columns(task.target)
        table = table.select(range(min(test, len(table))))
        tests[name] = mistyped(table, task.text, seed) if shift.typos else table
    read_of = {"train": train, "validation": held_out, **tests}
    digest = digest_of({name: _read(part, task) for name, part in read_of.items()})
    return Split(train, held_out, tests, rest.select_columns(list(task.inputs)), digest)


def _rows(
    folder: Path | None,
    task: Task,
    source: str,
    generator: torch.Generator,
    kept: Callable[[Any], bool] | None,
) -> Dataset:
    """Rows in random order, each text once: those whose label is kept, or all."""
    table = read(folder, source)
    first = {text: i for i, text in reversed([*enumerate(_texts(table, task))])}
    table = table.select(sorted(first.values()))
    if kept is not None:
        table = table.select([i for i, label in enumerate(table[task.target][:]) if kept(label)])
    return table.select(torch.randperm(len(table), generator=generator).tolist())


def once(table: Dataset, column: str) -> Dataset:
    """The rows without those whose text is a row's before, case and spaces aside."""
    first = {plain(text): i for i, text in reversed([*enumerate(table[column][:])])}
    return table.select(sorted(first.values()))


def mistyped(table: Dataset, column: str, seed: int) -> Dataset:
    """The rows with typing errors: in three of ten words of four letters or more, two neighbours
    within change places.

    >>> mistyped(Dataset.from_dict({"text": ["several letters move"]}), "text", 1)["text"][0]
    'sveeral lettres move'
    """
    draw = Random(seed)

    def word(text: str) -> str:
        if len(text) < 4 or draw.random() >= _TYPOS:
            return text
        at = draw.randrange(1, len(text) - 2)
        return f"{text[:at]}{text[at + 1]}{text[at]}{text[at + 2 :]}"

    texts = [" ".join(map(word, text.split())) for text in table[column][:]]
    return Dataset.from_dict(
        {name: table[name][:] for name in table.column_names} | {column: texts}
    )


def _read(table: Dataset, task: Task) -> dict[str, list[Any]]:
    """What is read of the rows, as plain data."""
    names = (*task.inputs, task.target)
    return {name: list(table[name][:]) for name in names if name in table.column_names}


def _texts(table: Dataset, task: Task) -> list[str]:
    return list(table[task.text][:])


def _cut(table: Dataset, counts: tuple[int, ...], source: str) -> list[Dataset]:
    total = sum(counts)
    if len(table) < total:
        raise DataError(f"{source}: it has {len(table)} rows, {total} are needed")
    ends = torch.tensor((0, *counts)).cumsum(0).tolist()
    return [table.select(range(a, b)) for a, b in pairwise(ends)]
