"""Writes an experiment's tables and plots beside its result files."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib.pyplot as plt

from . import plots
from .catalogue import Experiment
from .grid import Grid
from .report import tables
from .tables import Table

__all__ = ["publish"]


def publish(name: str, experiment: Experiment, grid: Grid) -> list[Table]:
    """Make all that can be made of the outcomes that are there.

    Returns:
        The tables, which are also in `grid.out / name`, as Markdown, CSV and LaTeX.
    """
    found = tables(experiment, grid.methods, grid.outcomes())
    folder = grid.out / name
    folder.mkdir(parents=True, exist_ok=True)
    for table in found:
        stem = re.sub(r"[^\w.]+", "-", table.title).strip("-")
        (folder / f"{stem}.csv").write_text(table.csv())
        _draw(experiment, table, folder / f"{stem}.png")
    text = "\n\n".join([f"# {experiment.about}", *(table.markdown() for table in found)])
    (folder / "tables.md").write_text(text + "\n")
    (folder / "tables.tex").write_text("\n\n".join(table.latex() for table in found) + "\n")
    return found


def _draw(experiment: Experiment, table: Table, path: Path) -> None:
    if experiment.curve:
        figure = plots.curves(table)
    elif any(column == "0 %" for column in table.columns):
        figure = plots.profiles(table)
    else:
        figure = plots.dots(table)
    figure.savefig(path, dpi=110)
    plt.close(figure)
