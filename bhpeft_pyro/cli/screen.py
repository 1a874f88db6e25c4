"""What commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import os
import shlex
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ..base.checks import harmless
from ..errors import BHPEFTWarning


def command(*words: object) -> str:
    """A command of this program as it is typed, with quotes where they are needed.

    >>> command("update", "runs/first week", "new.csv")
    "bhpeft update 'runs/first week' new.csv"
    """
    return shlex.join(["bhpeft", *map(str, words)])


def say(text: str) -> None:
    """Print a line to stderr, without markup and line breaks."""
    console = Console(stderr=True, emoji=False)  # which would replace labels such as ":a:"
    console.print(harmless(text), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """Print this package's warnings as lines, and leave out those of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=BHPEFTWarning)
        warnings.showwarning = lambda message, *_args, **_more: say(f"note: {message}")
        yield


def interactive() -> bool:
    """Whether stderr is a terminal with a size, in which progress bars can be drawn."""
    return sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno()))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table to stdout; text too long for its column is cut, and None is a dash."""
    grid = Table(
        title=Text(harmless(title)), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold"
    )
    grid.collapse_padding, grid.pad_edge = True, False  # so that more fits on 80 columns
    console, texts, widths = Console(), [], []
    for i in range(len(columns)):
        texts.append(any(isinstance(row[i], str) for row in rows))
        widths.append(max((len(_cell(row[i])) for row in rows), default=0))
    whole = [i for i in range(len(columns)) if i == 0 or not texts[i]]
    wide = sum(2 + max(widths[i], len(columns[i])) for i in whole) > console.width
    if wide:  # a number that is cut would be another number: headings are broken instead
        columns = [column.replace("/", "/ ") for column in columns]
        words = [max(map(len, column.split()), default=0) for column in columns]
        by_word = [max(pair) for pair in zip(widths, words, strict=True)]
        if sum(2 + by_word[i] for i in whole) <= console.width:
            widths = by_word
    for i, column in enumerate(columns):
        width = widths[i] if wide and i in whole else None
        justify: JustifyMethod = "left" if texts[i] else "right"
        heading = Text(harmless(column), overflow="fold")
        grid.add_column(heading, justify=justify, width=width, no_wrap=not wide and i in whole)
    for row in rows:
        grid.add_row(*(Text(_cell(value), no_wrap=True, overflow="ellipsis") for value in row))
    console.print(grid, highlight=False)


def show_metrics(title: str, columns: Mapping[str, Mapping[str, float]]) -> None:
    """Print a row for each metric and a column for each posterior."""
    from ..forecast.metrics import MEANINGS

    first, *_ = columns.values()
    rows = [
        (name, *(scores[name] for scores in columns.values()), MEANINGS.get(name, ""))
        for name in first
    ]
    table(title, ("", *columns, ""), rows)


def print_json(value: Mapping[str, Any]) -> None:
    """Print `strict_json` to stdout."""
    from ..base.files import strict_json  # slow to import

    typer.echo(strict_json(value))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):  # several labels
        value = ", ".join(map(str, value))
    return f"{value:.3f}" if isinstance(value, float) else harmless(str(value))
