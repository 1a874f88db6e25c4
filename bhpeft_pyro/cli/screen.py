"""What the commands print: results to stdout, everything else to stderr."""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["bars", "print_json", "say", "spoken_warnings", "table"]


def say(text: str) -> None:
    """A line on stderr, as it is: square brackets in it are no markup, and it is not broken."""
    Console(stderr=True).print(text, markup=False, highlight=False, soft_wrap=True)


def bars() -> bool:
    """Whether progress bars make sense: not in a log file."""
    return sys.stderr.isatty()


def print_json(value: Mapping[str, Any]) -> None:
    """JSON on stdout; what is not finite is null, as JSON has no other word for it."""
    typer.echo(json.dumps(_finite(value), indent=1))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1) -> None:
    """A table on stdout, texts and the first `left` columns to the left, numbers to the right.

    What is None is shown as a dash.
    """
    grid = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        texts = i < left or any(isinstance(row[i], str) for row in rows)
        grid.add_column(column, justify="left" if texts else "right")
    for row in rows:
        grid.add_row(*map(_cell, row))
    Console().print(grid, highlight=False)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else escape(str(value))


@contextmanager
def spoken_warnings() -> Iterator[None]:
    """This package's warnings become lines, those of others are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("always", category=UserWarning, module=r"bhpeft_pyro\.")
        warnings.showwarning = lambda message, *_args, **_more: say(f"note: {message}")
        yield


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
