"""What commands print: results to stdout, everything else to stderr; messages of the Python API in
the words of the command line."""

from __future__ import annotations

import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from ..base.checks import harmless
from ..errors import BHPEFTWarning

Flags = Mapping[str, tuple[str, str]]
"""By the name of an argument its option, and the option that turns it off (or "")."""


def command(*words: object) -> str:
    """A command of this program as it is typed, with quotes where they are needed.

    >>> command("update", "runs/first week", "new.csv")
    "bhpeft update 'runs/first week' new.csv"
    """
    return shlex.join(["bhpeft", *map(str, words)])


_VALUE = r"('[^']*'|\"[^\"]*\"|\((?:\.\.\.)?\)|[^\s,;:()]+)"
_QUOTED = r"(?<!\w)(?:'[^']*'|\"[^\"]*\")"  # a text of the user's, or a name
# Advice that only Python offers, up to the next piece of the message.
_IN_PYTHON = r"; in Python,.*?(?=; | \(and \d|$)"
# What a program's user knows by the names of its options, though other arguments stand for it.
_ALIASES: Flags = {
    "text": ("--text-column", ""),
    "pair": ("--pair-column", ""),
    "label": ("--label-column", ""),
    "answer": ("--label-column", ""),
    "level": ("--coverage", ""),
    "source": ("", ""),
}


def in_options(text: str, flags: Flags) -> str:
    """The message with options in place of arguments.

    >>> flags = {"patience": ("--patience", ""), "bf16": ("--bf16", "--no-bf16")}
    >>> in_options("patience=3 needs rows; patience=None fits to the end; in Python, lr=2", flags)
    '--patience 3 needs rows; no --patience fits to the end'
    >>> in_options("bf16: of 'patience=3' nothing is left; expected bf16=False", flags)
    "--bf16: of 'patience=3' nothing is left; expected --no-bf16"
    """
    flags = {**_ALIASES, **flags}
    text = re.sub(_IN_PYTHON, "", text).removeprefix("columns: ")
    names = "|".join(map(re.escape, flags))

    def option(match: re.Match[str]) -> str:
        name, value = match.groups()
        if name is None:
            return match[0]
        flag, off = flags[name]
        if value in ("False", "None"):
            return off or f"no {flag}"
        return flag if value == "True" else f"{flag} {value}".strip()

    text = re.sub(rf"{_QUOTED}|(?<![\w.\-(`])({names})={_VALUE}", option, text)
    return re.sub(rf"^({names})(?=[:,] )", lambda match: flags[match[1]][0], text)


def say(text: str) -> None:
    """Print a line to stderr, without markup and line breaks."""
    console = Console(stderr=True, emoji=False)  # which would replace labels such as ":a:"
    console.print(harmless(text), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def spoken_warnings(translated: Callable[[str], str]) -> Iterator[None]:
    """Print this package's warnings as lines, `translated`, and leave out those of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=BHPEFTWarning)
        warnings.showwarning = lambda message, *_args, **_more: say(
            f"note: {translated(str(message))}"
        )
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
