"""Plots of a stream's record show its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bhpeft_pyro import plots
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.streams import Record


def record(rounds: int, *, classes: bool = True) -> Record:
    scores = ("accuracy", "ece") if classes else ("mse", "coverage_90")
    columns = (*scores, "nll", "drift/nll_expected", "drift/nll_z")
    rows: list[dict[str, Any]] = []
    for i in range(rounds):
        row: dict[str, Any] = {"batch": f"week {i}"}
        if i:  # nothing is predicted before the first round
            row |= {name: 0.5 + 0.01 * i + 0.1 * j for j, name in enumerate(columns)}
        rows.append(row)
    return Record(rows)


@pytest.mark.parametrize("classes", [True, False])
def test_the_overview_has_all_that_the_record_has(classes: bool) -> None:
    given = record(4, classes=classes)
    axes = plots.stream_overview(given).axes
    assert len(axes) == 4
    score, calibration = ("accuracy", "ece") if classes else ("mse", "coverage_90")
    for ax, name in zip(axes, (score, "nll", calibration, "drift/nll_z"), strict=False):
        np.testing.assert_array_equal(ax.lines[0].get_ydata(), given.column(name))
    np.testing.assert_array_equal(axes[1].lines[1].get_ydata(), given.column("drift/nll_expected"))


def test_chance_does_not_look_like_growth() -> None:
    """Of few rows 0.25 was at the foot of the axis and 0.31 at its top, from dark to light."""
    given = record(4)
    for row in given.rows[1:]:
        row |= {"accuracy_se": 0.08, "nll_se": 0.2}
    axes = plots.stream_overview(given).axes
    for ax, name, error in ((axes[0], "accuracy", 0.08), (axes[1], "nll", 0.2)):
        (bars,) = ax.collections
        ends = np.array([[y for _, y in bar] for bar in bars.get_segments() if len(bar)])
        ends = ends[~np.isnan(ends).any(1)]
        np.testing.assert_allclose(ends.mean(1), given.column(name)[1:])
        np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * 1.96 * error)


def test_a_first_round_has_nothing_to_show() -> None:
    with pytest.raises(DataError, match="record: expected two rounds"):
        plots.stream_overview(record(1))


def test_of_many_rounds_some_have_names() -> None:
    ax = plots.stream_overview(record(52)).axes[-1]
    assert [label.get_text() for label in ax.get_xticklabels()][:2] == ["week 0", "week 5"]
    assert len(ax.get_xticks()) <= 12
