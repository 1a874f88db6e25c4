"""Reading and writing of what the commands work on: tables and saved posteriors."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from datasets import Dataset

from ..data import Examples
from ..data.columns import by_name
from ..data.sources import load
from ..errors import ConfigError, DataError
from ..posterior import io
from ..posterior.posterior import Posterior
from ..sequential import History
from .options import fraction
from .screen import say

__all__ = [
    "check_out",
    "hold_out",
    "naming",
    "open_run",
    "read_table",
    "rounds_of",
    "rows_for",
]

Rows = TypeVar("Rows", Dataset, Examples)

_ROUNDS = "rounds"  # in the folder of a stream


def read_table(source: str, texts: Collection[str] | None = ()) -> Dataset:
    """All rows and columns of a file, or of a data set on the hub; `texts` is as for `load`."""
    table = load(source, texts)
    if len(table) == 0:
        raise DataError(f"{source} is empty: at least one row is needed")
    return table


def rows_for(posterior: Posterior, source: str, labelled: bool) -> Dataset:
    """A table that a posterior is to read: its columns are checked.

    Raises:
        DataError: a column is missing.
    """
    kind, columns = posterior.model.likelihood.kind, posterior.columns
    table = read_table(source, columns.inputs(kind))
    needed = (*columns.inputs(kind), *((columns.target(kind),) if labelled else ()))
    for column in needed:
        if column not in table.column_names:
            raise DataError(
                f"{source} has no column {column!r}, which this posterior was fitted on; "
                f"columns there: {', '.join(table.column_names)}"
            )
    names, label = columns.label_names, columns.target(kind)
    first = table[0][label] if labelled and names else None
    if names and type(first) is int and by_name([first], table.features[label], names) == [first]:
        say(f"labels are numbers: 0 stands for {names[0]!r}, 1 for {names[1]!r} and so on")
    return table


def hold_out(
    rows: Rows, validation: str, seed: int, option: str = "--validation"
) -> tuple[Rows, Rows | str | None]:
    """Rows to learn from, and those held out: a share of them, or a file still to be read."""
    if not re.fullmatch(r"[\d.]+%?", validation):
        return rows, validation
    share = fraction(validation, option)
    count = round(share * len(rows))
    if share and not 0 < count < len(rows):
        raise DataError(
            f"{option} {validation} of {len(rows)} rows are {count}; take another share, "
            "or 0 for none"
        )
    if count == 0:
        return rows, None
    numbers = Dataset.from_dict({"row": range(len(rows))})
    parts = numbers.train_test_split(test_size=count, seed=seed)
    pick = rows.subset if isinstance(rows, Examples) else rows.select
    return pick(parts["train"]["row"][:]), pick(parts["test"]["row"][:])


@contextmanager
def naming(file: str, option: str = "--validation") -> Iterator[None]:
    """Say of an error in held-out rows which file they are in, as it is not the data's."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{option} {file}: {error}") from error


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a posterior or a stream, before any work is done."""
    if io.exists(out) and not overwrite:
        raise ConfigError(f"--out: {out} holds a posterior already; --overwrite replaces it")
    if (out / _ROUNDS).is_dir():
        raise ConfigError(f"--out: {out} holds a stream; expected another folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out: {out} is a file; expected a folder, or the name of a new one")


def rounds_of(folder: Path) -> History:
    """The rounds of a stream, by its own folder or by that of its rounds."""
    inner = folder / _ROUNDS
    return History(inner if inner.is_dir() else folder)


def open_run(folder: Path, backbone: str | None, device: str) -> Posterior:
    """A saved posterior on the backbone that it names, or on the one given; of a stream the last.

    Raises:
        ConfigError: the stream has branches.
    """
    if not io.exists(folder) and _ROUNDS in (folder.name, *(p.name for p in folder.glob("*"))):
        history = rounds_of(folder)
        leaves = history.leaves
        if len(leaves) > 1:
            raise ConfigError(
                f"run: {history.folder} has branches, which end in {', '.join(leaves)}; expected "
                f"one of them, as in {history.folder / leaves[0]}"
            )
        folder = history.folders[leaves[0]] if leaves else history.folder
    return Posterior.load(folder, backbone, device=device)
