"""Plots of a stream's record."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import DataError
from .forecasts import BLUE, GREY, VERMILLION, new_axes

if TYPE_CHECKING:
    from ..streams import Record

_MANY = 12  # names of ticks, or numbers in a row, that can be read

_LABELS = {
    "accuracy": "accuracy",
    "mse": "mean squared error",
    "nll": "NLL (nats per example)",
    "ece": "ECE",
    "coverage_90": "coverage of 90 % intervals",
    "drift/nll_z": "surprise (z of the NLL)",
}


def score_matrix(record: Record, ax: Axes | None = None) -> Axes:
    """The matrix R[i, j]: the score on test j after round i, in colours; a small one in numbers."""
    ax = new_axes(ax)
    matrix = record.matrix.numpy()
    image = ax.imshow(matrix, cmap="viridis", aspect="auto")
    if max(matrix.shape) > _MANY:
        ax.figure.colorbar(image, ax=ax, label="score")
    else:
        middle = (np.nanmin(matrix) + np.nanmax(matrix)) / 2
        for (row, column), score in np.ndenumerate(matrix):
            if not np.isnan(score):
                shade = "white" if score <= middle else "black"
                ax.text(column, row, f"{score:.2f}", ha="center", va="center", color=shade)
    _name_batches(ax, record.tests)
    ax.set_yticks(range(len(record.rows)), [str(row["batch"]) for row in record.rows])
    ax.set(xlabel="tested on", ylabel="after learning")
    return ax


def stream_overview(record: Record) -> Figure:
    """Accuracy, NLL, calibration and surprise over time, and with tests the matrix of scores.

    For ratings the first is the MSE, and calibration is the coverage of 90 % intervals.

    Raises:
        DataError: there are fewer than two rounds; nothing is predicted before the first.
    """
    if len(record.rows) < 2:
        raise DataError("record: expected two rounds or more")
    classes = any("accuracy" in row for row in record.rows)
    score, calibration = ("accuracy", "ece") if classes else ("mse", "coverage_90")
    heights = [1, 1, 1, 1, 1.6][: 4 + bool(record.tests)]
    figure, axes = plt.subplots(
        len(heights),
        1,
        figsize=(8, 2.2 * sum(heights)),
        layout="constrained",
        height_ratios=heights,
    )
    _over_time(record, score, axes[0])
    _over_time(record, "nll", axes[1], "drift/nll_expected")
    _over_time(record, calibration, axes[2])
    _over_time(record, "drift/nll_z", axes[3])
    axes[0].set_title("Each batch before it was learnt")
    axes[3].set_xlabel("batch")
    ideal = {"color": GREY, "linewidth": 1, "linestyle": ":"}
    axes[2].axhline(0.0 if classes else 0.9, label="ideal", **ideal)
    axes[3].axhline(1.645, label="5 % limit", **ideal)
    for ax in axes[:3]:  # the four have the same batches
        ax.tick_params(labelbottom=False)
    for ax in axes[1:4]:
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    if record.tests:
        title = "Accuracy" if classes else "Minus the MSE"
        score_matrix(record, axes[4]).set_title(f"{title} on each test after each round")
    return figure


def _over_time(record: Record, metric: str, ax: Axes, expected: str | None = None) -> None:
    """A metric of each batch before it was learnt, and what the posterior expected of it."""
    looks = {metric: (BLUE, "o-", "observed")}
    if expected is not None:
        looks[expected] = (VERMILLION, "--", "expected")
    for column, (colour, dash, label) in looks.items():
        values = record.column(column).numpy()
        ax.plot(range(len(values)), values, dash, color=colour, label=label, markersize=4)
    _name_batches(new_axes(ax), [str(row["batch"]) for row in record.rows])
    ax.set_ylabel(_LABELS[metric])


def _name_batches(ax: Axes, names: list[str]) -> None:
    step = -(-len(names) // _MANY)
    ax.set_xticks(range(0, len(names), step), names[::step], rotation=45, ha="right")
