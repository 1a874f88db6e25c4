"""Writes an experiment's tables and plots."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .tables import Table

__all__ = ["publish"]


def publish(
    folder: Path, about: str, tables: Sequence[Table], draw: Callable[[Table], Figure]
) -> None:
    """Each table as CSV and as a plot, all of them as Markdown and as LaTeX."""
    folder.mkdir(parents=True, exist_ok=True)
    for table in tables:
        stem = re.sub(r"[^\w.]+", "-", table.title).strip("-")
        (folder / f"{stem}.csv").write_text(table.csv())
        figure = draw(table)
        figure.savefig(folder / f"{stem}.png", dpi=110)
        plt.close(figure)
    text = "\n\n".join([f"# {about}", *(table.markdown() for table in tables)])
    (folder / "tables.md").write_text(text + "\n")
    (folder / "tables.tex").write_text("\n\n".join(table.latex() for table in tables) + "\n")
