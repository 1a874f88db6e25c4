"""Plots of the experiments with streams, from their result files alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bhpeft_pyro.plots import score_matrix

from .stream_tables import average, by_arm

__all__ = ["curves", "matrices"]


def curves(results: Sequence[dict[str, Any]]) -> Figure:
    """Accuracy and NLL of each batch before it was learnt: the mean of each arm over seeds."""
    figure, axes = plt.subplots(2, 1, figsize=(8, 7), layout="constrained", sharex=True)
    for arm, runs in by_arm(results).items():
        record = average(runs)
        names = [row["batch"] for row in record.rows[1:]]
        for ax, metric in zip(axes, ("accuracy", "nll"), strict=True):
            ax.plot(names, record.column(metric)[1:].numpy(), "o-", markersize=4, label=arm)
            ax.set_ylabel(metric)
            ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize="small")
    axes[1].tick_params("x", rotation=45)
    axes[1].set_xlabel("batch")
    return figure


def matrices(results: Sequence[dict[str, Any]]) -> Figure:
    """R[i][j] of each arm, the mean over seeds: accuracy on test j after round i."""
    arms = by_arm(results)
    columns = min(len(arms), 3)
    rows = -(-len(arms) // columns)
    figure = plt.figure(figsize=(3.6 * columns, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    records = {arm: average(runs) for arm, runs in arms.items()}
    low = min(record.matrix.min().item() for record in records.values())
    high = max(record.matrix.max().item() for record in records.values())
    for ax in axes[len(arms) :]:
        ax.remove()
    for ax, (arm, record) in zip(axes, records.items(), strict=False):
        score_matrix(record, ax).set_title(arm, fontsize="small")
        ax.images[0].set_clim(low, high)
    return figure
