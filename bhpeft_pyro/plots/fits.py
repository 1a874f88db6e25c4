"""Plots of fits: the loss, the weights layer by layer, and what a stream of them did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from torch import Tensor

from ..errors import DataError
from .forecasts import BLUE, GREEN, GREY, STYLES, VERMILLION, new_axes

if TYPE_CHECKING:
    from ..streams import Record

_LONG = 200  # steps; a longer trace is drawn faint, with its running mean over it

_MANY = 12  # batches whose names can be read

_LABELS = {
    "accuracy": "accuracy",
    "mse": "mean squared error",
    "nll": "NLL (nats per example)",
    "ece": "ECE",
    "coverage_90": "coverage of 90 % intervals",
    "drift/nll_z": "surprise (z of the NLL)",
}


def elbo_trace(history: Sequence[Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """Expected NLL under the posterior, KL to the prior, and their sum, the negative ELBO.

    They are drawn separately because a falling loss may be all KL: a posterior that only returns
    to its prior. The scale is logarithmic if everything is positive. A trace of more than 200
    steps is drawn faint, under its running mean.

    Args:
        history: one mapping per step, with `step`, `nll`, `kl` and `loss`. A `validation_nll`
            that some steps have is drawn as points. With `draws` of 0 it is the trace of a point
            estimate, where the KL is minus the log prior; without a prior only the NLL is drawn.
    """
    if not history:
        raise DataError("history is empty")
    table = pandas.DataFrame(list(history))
    for key in ("step", "nll", "kl", "loss"):
        if key not in table or table[key].isna().any():
            raise DataError(f"history has steps without {key!r}")
    table = table.set_index("step")
    point = history[0].get("draws") == 0
    curves = {
        "loss": ("loss" if point else "loss (negative ELBO)", "black", "-"),
        "nll": ("NLL", BLUE, "--"),
        "kl": ("minus log prior" if point else "KL", VERMILLION, "-."),
    }
    if point and not any(row.get("temperature", 1.0) for row in history):
        curves = {"nll": curves["nll"]}  # the loss is the NLL
    ax = new_axes(ax)
    for key, (words, colour, dash) in curves.items():
        values = table[key]
        if len(values) > _LONG:
            ax.plot(values.index, values, color=colour, alpha=0.2, linewidth=0.8)
            window = 2 * (len(values) // 50) + 1
            values = values.rolling(window, center=True, min_periods=1).mean()
        ax.plot(values.index, values, dash, color=colour, linewidth=1.8, label=words)
    drawn = table[[*curves]]
    if "validation_nll" in table:
        drawn = drawn.join(table["validation_nll"])
        held_out = table["validation_nll"].dropna()
        ax.plot(held_out, "o", color=GREEN, markersize=3, label="validation NLL")
    if not (drawn <= 0).any(axis=None):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="step", ylabel="nats per example")
    ax.legend()
    return ax


def change_forest(changes: Mapping[str, Mapping[int, Tensor]], ax: Axes | None = None) -> Axes:
    """How much each PEFT branch changes each layer: means and central 90 % intervals.

    A branch about which nothing was learnt is where the prior's draws are.

    Args:
        changes: branch to layer number to (S,) sizes under S draws; see `changes.changes`.
    """
    if not changes:
        raise DataError("changes is empty: there are no PEFT weights")
    ax = new_axes(ax)
    step = 0.7 / len(changes)
    for i, (branch, layers) in enumerate(changes.items()):
        colour, marker = STYLES[i % len(STYLES)]
        # Within a layer the first branch is on top, as in the legend.
        rows = np.array([*layers]) + step * (i - (len(changes) - 1) / 2)
        draws = np.stack([sizes.numpy() for sizes in layers.values()])
        ax.hlines(rows, *np.quantile(draws, [0.05, 0.95], 1), color=colour, linewidth=1.5)
        ax.plot(draws.mean(1), rows, marker, color=colour, markersize=4, label=branch)
    numbers = sorted({layer for layers in changes.values() for layer in layers})
    ax.set_yticks(numbers, [str(number) for number in numbers])
    for number in numbers[1:]:
        ax.axhline(number - 0.5, color=GREY, alpha=0.25, linewidth=0.6)
    ax.set_xlim(left=0)
    ax.invert_yaxis()
    ax.set(xlabel="change, as a share of the frozen signal (mean, 90 % interval)", ylabel="layer")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return ax


def stream_overview(record: Record) -> Figure:
    """Accuracy, NLL, calibration and surprise over time.

    Bars are 95 % intervals over the examples of a batch (1.96 standard errors on each side).
    For ratings the first is the MSE, and calibration is the coverage of 90 % intervals.

    Raises:
        DataError: there are fewer than two rounds; nothing is predicted before the first.
    """
    if len(record.rows) < 2:
        raise DataError("record: expected two rounds or more")
    classes = any("accuracy" in row for row in record.rows)
    score, calibration = ("accuracy", "ece") if classes else ("mse", "coverage_90")
    figure, axes = plt.subplots(4, 1, figsize=(8, 8.8), layout="constrained", sharex=True)
    _over_time(record, score, axes[0])
    _over_time(record, "nll", axes[1], "drift/nll_expected")
    _over_time(record, calibration, axes[2])
    _over_time(record, "drift/nll_z", axes[3])
    axes[0].set_title("Each batch before it was learnt (bars: 95 % intervals over its examples)")
    axes[3].set_xlabel("batch")
    ideal = {"color": GREY, "linewidth": 1, "linestyle": ":"}
    axes[2].axhline(0.0 if classes else 0.9, label="ideal", **ideal)
    axes[3].axhline(1.645, label="5 % limit", **ideal)
    for ax in axes[1:]:
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return figure


def _over_time(record: Record, metric: str, ax: Axes, expected: str | None = None) -> None:
    """A metric of each batch before it was learnt, and what the posterior expected of it."""
    looks = {metric: (BLUE, "o-", "observed")}
    if expected is not None:
        looks[expected] = (VERMILLION, "--", "expected")
    for column, (colour, dash, label) in looks.items():
        values = record.column(column).numpy()
        ax.plot(range(len(values)), values, dash, color=colour, label=label, markersize=4)
        errors = 1.96 * record.column(f"{column}_se").numpy()
        if not np.isnan(errors).all():
            ax.errorbar(range(len(values)), values, errors, fmt="none", ecolor=colour)
    step = -(-len(record.rows) // _MANY)
    names = [str(row["batch"]) for row in record.rows][::step]
    new_axes(ax).set_xticks(range(0, len(record.rows), step), names, rotation=45, ha="right")
    ax.set_ylabel(_LABELS[metric])
