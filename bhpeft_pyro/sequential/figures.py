"""Plots of a stream. Each draws on `ax` (or a new figure's) and returns it, as in `plots`."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import DataError
from ..plots.forecasts import BLUE, GREY, VERMILLION, new_axes
from .record import Record

__all__ = ["over_time", "overview", "scores"]

_MANY = 12  # names of ticks, or numbers in a row, that can be read


def over_time(
    record: Record, metric: str, expected: str | None = None, ax: Axes | None = None
) -> Axes:
    """A metric of each batch before it was learnt, and what was expected of it.

    Args:
        record: of a stream.
        metric: a column of the record, e.g. "accuracy", "nll", "drift/nll_z".
        expected: a column that is drawn dashed beside it, e.g. "drift/nll_expected".

    Raises:
        DataError: no round has it.
    """
    ax = new_axes(ax)
    names = [str(row["batch"]) for row in record.rows]
    looks = [(metric, BLUE, "o-", metric), (expected, VERMILLION, "--", "expected")]
    for column, colour, dash, label in looks:
        if column is None:
            continue
        values = record.column(column)
        if values.isnan().all():
            raise DataError(f"metric={column!r}: no round of the record has it")
        ax.plot(range(len(names)), values.numpy(), dash, color=colour, label=label, markersize=4)
    _name_ticks(ax, names)
    ax.set(xlabel="batch", ylabel=metric)
    if expected is not None:
        ax.legend()
    return ax


def scores(record: Record, ax: Axes | None = None) -> Axes:
    """The matrix R[i][j]: the score on test j after round i.

    In numbers; of a matrix too large for them, in colours with a bar.
    """
    ax = new_axes(ax)
    matrix = record.matrix
    image = ax.imshow(matrix.numpy(), cmap="viridis", aspect="auto")
    if max(matrix.shape) > _MANY:
        ax.figure.colorbar(image, ax=ax, label="score")
    else:
        middle = (matrix.min() + matrix.max()) / 2
        for (row, column), score in np.ndenumerate(matrix.numpy()):
            shade = "white" if score < middle else "black"
            ax.text(column, row, f"{score:.2f}", ha="center", va="center", color=shade)
    _name_ticks(ax, record.tests)
    ax.set_yticks(range(len(record.rows)), [str(row["batch"]) for row in record.rows])
    ax.set(xlabel="tested on", ylabel="after learning")
    return ax


def overview(record: Record) -> Figure:
    """Accuracy, NLL, calibration and drift over time, and the matrix of scores with tests.

    Of ratings the first is the MSE, and calibration the coverage of 90 % intervals, not the ECE.
    """
    classes = any("accuracy" in row for row in record.rows)
    error, calibration = ("accuracy", "ece") if classes else ("mse", "coverage_90")
    panels = 4 + bool(record.tests)
    figure, axes = plt.subplots(panels, 1, figsize=(8, 2.6 * panels), layout="constrained")
    over_time(record, error, None, axes[0])
    over_time(record, "nll", "drift/nll_expected", axes[1])
    over_time(record, calibration, None, axes[2])
    over_time(record, "drift/nll_z", None, axes[3])
    axes[2].axhline(0.0 if classes else 0.9, color=GREY, linewidth=1)  # right
    axes[3].axhline(1.645, color=GREY, linewidth=1)  # 5 % of a Normal lie above
    if record.tests:
        scores(record, axes[4])
    return figure


def _name_ticks(ax: Axes, names: list[str]) -> None:
    step = -(-len(names) // _MANY)
    ax.set_xticks(range(0, len(names), step), names[::step], rotation=45, ha="right")
