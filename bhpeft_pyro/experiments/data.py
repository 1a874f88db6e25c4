"""The experiments' data: JSON lines in a folder, split by a seed into train, validation, test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset

from ..data import Columns
from ..errors import DataError
from ..likelihoods import Categorical, Likelihood, MultipleChoice, Normal

__all__ = ["TASKS", "Split", "Task", "read", "split"]


@dataclass(frozen=True)
class Task:
    """One row group of the table.

    Attributes:
        file: name of the JSON lines file, without ending.
        rows: number of training rows.
        outputs: numbers the head gives.
        likelihood: makes the likelihood.
        columns: where the file keeps what.
        max_length: texts are cut to so many tokens.
    """

    file: str
    rows: int
    outputs: int
    likelihood: Callable[[], Likelihood]
    columns: Columns = Columns()
    max_length: int = 64


TASKS = {
    "news-agnews-400": Task("news-agnews", 400, 4, Categorical),
    "news-agnews-2000": Task("news-agnews", 2000, 4, Categorical),
    "sentiment-movies": Task(
        "sentiment-movies", 400, 1, lambda: Normal(spread=2.0), Columns(label="rating"), 48
    ),
    "commonsense-socialiqa": Task("commonsense-socialiqa", 400, 1, MultipleChoice),
}


@dataclass(frozen=True)
class Split:
    """Rows that share no text."""

    train: Dataset
    validation: Dataset
    test: Dataset


def read(folder: Path, file: str) -> Dataset:
    """All rows of a JSON lines file, named without its ending.

    Raises:
        DataError: no such file.
    """
    path = folder / f"{file}.jsonl"
    if not path.exists():
        raise DataError(f"--data: there is no {path.name} in {folder}")
    return load_dataset("json", data_files=str(path), split="train")


def split(folder: Path, task: Task, seed: int, validation: int, test: int) -> Split:
    """Random rows for each part; another seed gives other rows in every part.

    Raises:
        DataError: no such file, or it has too few rows.
    """
    rows = read(folder, task.file)
    total = task.rows + validation + test
    if len(rows) < total:
        raise DataError(f"{task.file}.jsonl: it has {len(rows)} rows, the task needs {total}")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    ends = (task.rows, task.rows + validation, total)
    return Split(*(rows.select(order[a:b]) for a, b in zip((0, *ends[:2]), ends, strict=True)))
