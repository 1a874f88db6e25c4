"""Plots of fits: what is drawn is what was computed, and it is labelled."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.collections import LineCollection

from bhpeft_pyro import plots
from bhpeft_pyro.errors import DataError


def trace(count: int, nll: float = 1.0) -> list[dict[str, float]]:
    return [
        {"step": 10.0 * i, "nll": nll + (i % 2), "kl": 5.0 - i / count, "loss": nll + 5.0}
        for i in range(count)
    ]


def test_elbo_trace_draws_nll_and_kl_apart(ax):
    history = trace(20)
    plots.elbo_trace(history, ax)
    lines = {line.get_label(): line for line in ax.lines}
    assert list(lines["NLL"].get_ydata()) == [row["nll"] for row in history]
    assert list(lines["KL"].get_ydata()) == [row["kl"] for row in history]
    assert list(lines["loss (negative ELBO)"].get_ydata()) == [row["loss"] for row in history]
    assert list(lines["KL"].get_xdata()) == [row["step"] for row in history]
    assert (ax.get_yscale(), ax.get_xlabel(), ax.get_ylabel()) == (
        "log",
        "step",
        "nats per example",
    )


@pytest.mark.parametrize(
    ("temperature", "labels"), [(0.0, ["NLL"]), (0.5, ["loss", "NLL", "minus log prior"])]
)
def test_the_trace_of_a_point_has_no_kl(ax, temperature, labels):
    plots.elbo_trace([row | {"draws": 0, "temperature": temperature} for row in trace(20)], ax)
    assert [line.get_label() for line in ax.lines] == labels


def test_elbo_trace_has_the_validation_nll_and_is_linear_where_it_must_be(ax):
    history = trace(20, nll=-3.0)
    history[9]["validation_nll"], history[19]["validation_nll"] = 1.5, 1.25
    assert plots.elbo_trace(history, ax).get_yscale() == "linear"
    (points,) = [line for line in ax.lines if line.get_label() == "validation NLL"]
    assert points.get_xydata().tolist() == [[90.0, 1.5], [190.0, 1.25]]


def test_long_traces_have_a_running_mean(ax):
    history = trace(400)
    plots.elbo_trace(history, ax)
    (smooth,) = [line for line in ax.lines if line.get_label() == "NLL"]
    values = [row["nll"] for row in history]
    for i in (0, 3, 200, 399):
        window = values[max(0, i - 8) : i + 9]
        assert smooth.get_ydata()[i] == pytest.approx(sum(window) / len(window))
    assert any(list(line.get_ydata()) == values for line in ax.lines)


def test_a_forest_has_means_and_intervals_layer_by_layer(ax):
    given = {
        "lora.query": {0: torch.rand(200), 3: torch.rand(200)},
        "adapter": {3: torch.rand(200)},
    }
    assert plots.change_forest(given, ax) is ax
    strokes = [c for c in ax.collections if isinstance(c, LineCollection)]
    points = [line for line in ax.lines if line.get_label() in given]
    assert [line.get_label() for line in points] == list(given)
    for stroke, line, layers in zip(strokes, points, given.values(), strict=True):
        drawn = zip(stroke.get_segments(), *line.get_data(), layers.items(), strict=True)
        for segment, x, y, (layer, sizes) in drawn:
            assert round(y) == layer
            assert x == pytest.approx(sizes.mean().item())
            ends = sizes.quantile(torch.tensor([0.05, 0.95])).tolist()
            assert segment[:, 0].tolist() == pytest.approx(ends, rel=1e-5)
            assert segment[:, 1].tolist() == pytest.approx([y, y])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "3"]
    assert ax.yaxis_inverted() and ax.get_xlim()[0] == 0
    assert "90%" in ax.get_xlabel().replace(" ", "") and ax.get_ylabel() == "layer"


def test_what_cannot_be_plotted_is_refused():
    with pytest.raises(DataError, match="empty"):
        plots.elbo_trace([])
    with pytest.raises(DataError, match="'kl'"):
        plots.elbo_trace([{"step": 0, "nll": 1.0, "loss": 1.0}])
    with pytest.raises(DataError, match="'step'"):
        plots.elbo_trace([{"kl": 1.0, "nll": 1.0, "loss": 1.0}])
    with pytest.raises(DataError, match="empty"):
        plots.change_forest({})
    assert plt.get_fignums() == []
