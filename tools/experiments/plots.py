"""Plots of the experiments' tables."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .tables import Table

__all__ = ["curves", "dots", "profiles"]

_DRAWN = ("nll", "crps", "AUROC total", "accuracy", "step / HF peft's LoRA")
_LEFT_OUT = ["temperature", "seeds"]
_BARS: dict[str, Any] = {"capsize": 2, "markersize": 4, "linewidth": 1}


def dots(table: Table) -> Figure:
    """One number of each row with its standard error: NLL if the table has it."""
    column = _drawn(table)
    means = table.means[column].dropna()
    errors = table.errors.loc[means.index, column].fillna(0.0)
    figure, ax = plt.subplots(figsize=(7, 1 + 0.28 * len(means)), layout="constrained")
    ax.errorbar(means, _names(table, means.index), xerr=errors, fmt="o", **_BARS)
    ax.invert_yaxis()
    ax.grid(axis="y", alpha=0.3)
    return _finish(figure, ax, table, column)


def curves(table: Table) -> Figure:
    """A method's number by the number of training rows."""
    column = _drawn(table)
    figure, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for method, means in table.means[column].dropna().groupby(level=0, sort=False):
        errors = table.errors.loc[means.index, column].fillna(0.0)
        places = means.index.get_level_values(1).astype(float)
        ax.errorbar(places, means, yerr=errors, fmt="o-", label=method, **_BARS)
    ax.set_xscale("log", base=2)
    ax.set_ylabel(column)
    figure.legend(fontsize="small", loc="outside right upper")
    return _finish(figure, ax, table, str(table.means.index.names[1]))


def profiles(table: Table) -> Figure:
    """A row's numbers along the columns that are shares: rejection curves. Else `dots`."""
    shares = [name for name in table.means if name.endswith(" %") and name[0].isdigit()]
    if not shares:
        return dots(table)
    figure, ax = plt.subplots(figsize=(9, 4.5), layout="constrained")
    places = [float(name.removesuffix(" %")) for name in shares]
    names = _names(table, table.means.index)
    for name, values in zip(names, table.means[shares].to_numpy(), strict=True):
        ax.plot(places, values, "o-", markersize=3, linewidth=1, label=name)
    ax.set_ylabel("of the rows kept")
    figure.legend(fontsize="x-small", loc="outside right upper")
    return _finish(figure, ax, table, "rows rejected (%)")


def _drawn(table: Table) -> str:
    return next((name for name in _DRAWN if name in table.means), table.means.columns[0])


def _names(table: Table, index: Any) -> list[str]:
    """The rows of an index, in words."""
    frame = index.to_frame(index=False).drop(columns=_LEFT_OUT, errors="ignore")
    return [", ".join(filter(None, row)) for row in frame.to_numpy()]


def _finish(figure: Figure, ax: Axes, table: Table, label: str) -> Figure:
    ax.set_title(table.title, loc="left", fontsize="medium")
    ax.set_xlabel(label)
    ax.spines[["top", "right"]].set_visible(False)
    return figure
