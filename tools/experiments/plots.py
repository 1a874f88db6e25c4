"""Plots of the experiments' tables."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .tables import Row, Table

__all__ = ["curves", "dots", "profiles"]

_DRAWN = ("nll", "crps", "AUROC total", "accuracy", "step / HF peft's LoRA", "fit / delta's")
_LEFT_OUT = ("temperature", "seeds", "measurements")
_BARS: dict[str, Any] = {"capsize": 2, "markersize": 4, "linewidth": 1}


def dots(table: Table) -> Figure:
    """One number of each line, with its standard error: NLL where there is one."""
    column = _drawn(table)
    rows = [row for row in table.rows if column in row.cells]
    figure, ax = plt.subplots(figsize=(7, 1 + 0.28 * len(rows)), layout="constrained")
    names = [_name(row, table) for row in rows]
    cells = [row.cells[column] for row in rows]
    errors = [cell.error or 0.0 for cell in cells]
    ax.errorbar([cell.value for cell in cells], names, xerr=errors, fmt="o", **_BARS)
    ax.invert_yaxis()
    ax.grid(axis="y", alpha=0.3)
    return _finish(figure, ax, table, column)


def curves(table: Table) -> Figure:
    """A method's number along rows or draws."""
    column = _drawn(table)
    figure, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for method in dict.fromkeys(row.head[0] for row in table.rows):
        rows = [row for row in table.rows if row.head[0] == method and column in row.cells]
        cells = [row.cells[column] for row in rows]
        errors = [cell.error or 0.0 for cell in cells]
        places = [float(row.head[1]) for row in rows]
        ax.errorbar(places, [c.value for c in cells], yerr=errors, fmt="o-", label=method, **_BARS)
    ax.set_xscale("log", base=2)
    ax.set_ylabel(column)
    figure.legend(fontsize="small", loc="outside right upper")
    return _finish(figure, ax, table, table.head[1])


def profiles(table: Table) -> Figure:
    """A line's numbers along the columns that are shares: rejection curves. Else `dots`."""
    shares = [column for column in table.columns if column.endswith(" %") and column[0].isdigit()]
    if not shares:
        return dots(table)
    figure, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for row in table.rows:
        cells = [row.cells[column] for column in shares]
        ax.plot(
            [float(column.removesuffix(" %")) for column in shares],
            [cell.value for cell in cells],
            "o-",
            markersize=3,
            linewidth=1,
            label=_name(row, table),
        )
    ax.set_ylabel("of those kept")
    figure.legend(fontsize="x-small", loc="outside right upper")
    return _finish(figure, ax, table, "rejected (%)")


def _drawn(table: Table) -> str:
    return next((name for name in _DRAWN if name in table.columns), table.columns[0])


def _name(row: Row, table: Table) -> str:
    kept = zip(row.head, table.head, strict=True)
    return ", ".join(text for text, name in kept if name not in _LEFT_OUT and text)


def _finish(figure: Figure, ax: Axes, table: Table, label: str) -> Figure:
    ax.set_title(table.title, loc="left", fontsize="medium")
    ax.set_xlabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    return figure
