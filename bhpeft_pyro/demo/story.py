"""How the demonstration talks: numbered steps with their time, and tables."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

__all__ = ["Story"]


class Story:
    """Prints to a console, and keeps the wall time of every step.

    Args:
        console: where to print.
        steps: how many steps there will be.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self.console = console
        self.steps = steps
        self.seconds: dict[str, float] = {}

    @property
    def bars(self) -> bool:
        """Whether progress bars make sense: not in a log file."""
        return self.console.is_terminal

    @contextmanager
    def step(self, title: str, why: str) -> Iterator[None]:
        """A headline, a reason, and afterwards the time it took."""
        self.console.print()
        number = len(self.seconds) + 1
        self.console.print(f"[bold]Step {number} of {self.steps}: {title}[/]")
        self.console.print(why, style="dim", highlight=False)
        started = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - started
        self.console.print(f"({self.seconds[title]:.0f} s)", style="dim", highlight=False)

    def say(self, text: str) -> None:
        """A line as it is: square brackets in it are no markup."""
        self.console.print(text, markup=False, highlight=False)

    def table(
        self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], left: int = 1
    ) -> None:
        """Numbers to the right with three decimals, the first `left` columns to the left."""
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="")
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i < left else "right")
        for row in rows:
            table.add_row(*(f"{v:.3f}" if isinstance(v, float) else escape(str(v)) for v in row))
        self.console.print(table, highlight=False)
