"""Plots: what is drawn is what was computed, and it is labelled."""

from __future__ import annotations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.patches import Rectangle

from bhpeft_pyro import plots
from bhpeft_pyro.errors import ConfigError, DataError, LikelihoodError
from bhpeft_pyro.forecast import ClassForecast, RatingForecast
from bhpeft_pyro.forecast.metrics import evaluate, rejection_curve


@pytest.fixture(autouse=True)
def no_open_figures():
    settings = dict(matplotlib.rcParams)
    yield
    plt.close("all")
    assert dict(matplotlib.rcParams) == settings


@pytest.fixture
def ax() -> Axes:
    return plt.subplots()[1]


def forecast_of(seed: int) -> ClassForecast:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (200,), generator=generator)
    logits = 2 * torch.nn.functional.one_hot(labels, 3) + torch.randn(200, 3, generator=generator)
    draws = (logits + torch.randn(6, 200, 3, generator=generator)).softmax(-1)
    return ClassForecast.from_draws(draws, labels=labels)


def ratings() -> RatingForecast:
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(4, 50, generator=generator)
    return RatingForecast.from_draws(mean, 0.5 + mean.abs(), labels=mean[0])


def bars(ax: Axes) -> list[Rectangle]:
    return [patch for patch in ax.patches if isinstance(patch, Rectangle)]


def test_reliability_bars_are_the_accuracy_in_their_bins(ax):
    forecast = forecast_of(0)
    assert plots.reliability(forecast, ax=ax, bins=10) is ax
    correct = (forecast.label == forecast.labels).double()
    confidence = forecast.confidence.double()
    total = 0
    gaps = []
    for bar in bars(ax):
        inside = (confidence > bar.get_x() + 1e-12) & (confidence <= bar.get_x() + 0.1 + 1e-12)
        assert bar.get_width() == pytest.approx(0.1)
        assert bar.get_height() == pytest.approx(correct[inside].mean().item())
        gaps.append([(confidence[inside].mean().item(), bar.get_height())])
        total += int(inside.sum())
    assert total == 200
    counts = [int(text.get_text()) for text in ax.texts if text.get_text().isdigit()]
    assert sum(counts) == 200
    (strokes,) = [c for c in ax.collections if isinstance(c, LineCollection)]
    for stroke, [(mean, accuracy)] in zip(strokes.get_segments(), gaps, strict=True):
        assert stroke.ravel().tolist() == pytest.approx([mean, accuracy, mean, mean])


def test_reliability_states_the_ece_that_evaluate_gives(ax):
    forecast = forecast_of(0)
    plots.reliability(forecast, ax=ax)
    assert f"{evaluate(forecast)['ece']:.3f}" in ax.get_title()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")


def test_given_labels_come_before_the_forecasts_own(ax):
    forecast = forecast_of(0)
    plots.reliability(forecast, forecast.label, ax)
    assert {bar.get_height() for bar in bars(ax)} == {1.0}


def test_rejection_draws_each_named_forecast(ax):
    named = {"BH-PEFT": forecast_of(0), "LoRA": forecast_of(1)}
    plots.rejection(named, ax=ax, by="total")
    assert [line.get_label() for line in ax.lines] == ["BH-PEFT", "LoRA"]
    for line, forecast in zip(ax.lines, named.values(), strict=True):
        fractions, accuracy = rejection_curve(forecast, by="total")
        assert list(line.get_xdata()) == pytest.approx((100 * fractions).tolist())
        assert list(line.get_ydata()) == pytest.approx(accuracy.tolist())
    looks = {(line.get_color(), line.get_marker()) for line in ax.lines}
    assert len(looks) == 2
    assert "total uncertainty" in ax.get_xlabel()
    assert "accuracy" in ax.get_ylabel()


def test_rejection_of_ratings_is_in_mse(ax):
    forecast = ratings()
    plots.rejection(forecast, ax=ax)
    assert list(ax.lines[0].get_ydata()) == pytest.approx(rejection_curve(forecast)[1].tolist())
    assert "MSE" in ax.get_ylabel()
    assert ax.get_legend() is None


def test_rejection_refuses_to_mix_accuracy_and_mse():
    with pytest.raises(ConfigError, match="forecasts"):
        plots.rejection({"a": forecast_of(0), "b": ratings()})
    with pytest.raises(ConfigError, match="forecasts"):
        plots.rejection({})


def test_histograms_are_the_shares_of_right_and_wrong(ax):
    forecast = forecast_of(0)
    plots.uncertainty_histogram(forecast, ax=ax, by="total", bins=8)
    correct = forecast.label == forecast.labels
    top = forecast.total.max().item()
    assert len(ax.patches) == 2
    for patch, chosen, name in zip(
        ax.patches, (correct, ~correct), ("right", "wrong"), strict=True
    ):
        values = forecast.total[chosen].double()
        shares = torch.histc(values, 8, 0, top) / len(values)
        # The outline goes up and along the bars' tops, two corners a bar, then back along zero.
        heights = patch.get_path().vertices[1:17:2, 1]
        assert heights.tolist() == pytest.approx(shares.tolist(), abs=1e-6)
        assert patch.get_label() == f"{name} ({int(chosen.sum())})"
    assert "total uncertainty" in ax.get_xlabel()


def test_histogram_with_nothing_wrong_and_nothing_uncertain(ax):
    forecast = ClassForecast.from_draws(torch.tensor([[[1.0, 0.0]] * 4]), labels=[0] * 4)
    plots.uncertainty_histogram(forecast, ax=ax)
    assert ax.patches[0].get_label() == "right (4)"


def test_scatter_has_right_and_wrong_where_they_are(ax):
    forecast = forecast_of(0)
    plots.epistemic_aleatoric(forecast, ax=ax)
    correct = forecast.label == forecast.labels
    clouds = [c for c in ax.collections if isinstance(c, PathCollection)]
    for cloud, chosen in zip(clouds, (correct, ~correct), strict=True):
        expected = torch.stack([forecast.aleatoric[chosen], forecast.epistemic[chosen]], 1)
        torch.testing.assert_close(torch.tensor(cloud.get_offsets()).float(), expected)
    assert ax.get_xlabel().startswith("aleatoric")
    assert ax.get_ylabel().startswith("epistemic")


def test_scatter_without_labels_and_of_ratings_is_one_cloud(ax):
    forecast = ratings()
    plots.epistemic_aleatoric(forecast, ax=ax)
    (cloud,) = ax.collections
    expected = torch.stack([forecast.aleatoric, forecast.epistemic], 1)
    torch.testing.assert_close(torch.tensor(cloud.get_offsets()).float(), expected)
    assert ax.get_ylabel() == "epistemic variance"
    bare = ClassForecast.from_draws(torch.full((2, 5, 2), 0.5))
    assert len(plots.epistemic_aleatoric(bare).collections) == 1


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
    ("temperature", "labels"), [(0.0, ["NLL"]), (0.5, ["loss", "NLL", "-log prior"])]
)
def test_the_trace_of_a_point_has_no_kl(ax, temperature, labels):
    plots.elbo_trace([row | {"draws": 0, "temperature": temperature} for row in trace(20)], ax)
    assert [line.get_label() for line in ax.lines] == labels


def test_elbo_trace_has_the_validation_nll_where_it_was_evaluated(ax):
    history = trace(20)
    history[9]["validation_nll"], history[19]["validation_nll"] = 1.5, 1.25
    plots.elbo_trace(history, ax)
    (points,) = [line for line in ax.lines if line.get_label() == "validation NLL"]
    assert points.get_xydata().tolist() == [[90.0, 1.5], [190.0, 1.25]]


def test_elbo_trace_of_a_point_has_no_shade(ax):
    plots.elbo_trace([{**row, "draws": 0} for row in trace(20)], ax)
    assert not ax.patches


def test_elbo_trace_of_negative_values_is_linear(ax):
    assert plots.elbo_trace(trace(20, nll=-3.0), ax).get_yscale() == "linear"


def test_long_traces_have_a_running_mean(ax):
    history = trace(400)
    plots.elbo_trace(history, ax)
    (smooth,) = [line for line in ax.lines if line.get_label() == "NLL"]
    values = [row["nll"] for row in history]
    for i in (0, 3, 200, 399):
        window = values[max(0, i - 8) : i + 9]
        assert smooth.get_ydata()[i] == pytest.approx(sum(window) / len(window))
    assert any(list(line.get_ydata()) == values for line in ax.lines)


def test_without_axes_a_figure_is_made_and_returned():
    assert plt.get_fignums() == []
    ax = plots.reliability(forecast_of(0))
    assert plt.get_fignums() == [ax.figure.number]


def test_what_cannot_be_plotted_is_refused():
    bare = ClassForecast.from_draws(torch.full((2, 5, 2), 0.5))
    for plot in (plots.reliability, plots.uncertainty_histogram, plots.rejection):
        with pytest.raises(DataError, match="labels are needed"):
            plot(bare)
    with pytest.raises(LikelihoodError, match="ClassForecast"):
        plots.reliability(ratings())
    with pytest.raises(ConfigError, match="by="):
        plots.uncertainty_histogram(forecast_of(0), by="entropy")
    with pytest.raises(DataError, match="empty"):
        plots.elbo_trace([])
    with pytest.raises(DataError, match="'kl'"):
        plots.elbo_trace([{"step": 0, "nll": 1.0, "loss": 1.0}])
    assert plt.get_fignums() == []
