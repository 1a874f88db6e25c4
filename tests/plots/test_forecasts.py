"""Plots of forecasts: what is drawn is what was computed, and it is labelled."""

from __future__ import annotations

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.patches import Rectangle

from bhpeft_pyro import plots
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.forecast import ClassForecast, LabelsForecast, RatingForecast
from bhpeft_pyro.forecast.metrics import aurc, evaluate, rejection_curve


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
    assert f"{evaluate(forecast)['ece']:.3f}" in plots.reliability(forecast).get_title()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("confidence", "accuracy")


def test_given_labels_come_before_the_forecasts_own(ax):
    forecast = forecast_of(0)
    plots.reliability(forecast, forecast.label, ax)
    assert {bar.get_height() for bar in bars(ax)} == {1.0}


def test_rejection_draws_each_named_forecast(ax):
    """As many as `compare` makes of classes, and all look different."""
    named = {f"method {i}": forecast_of(i) for i in range(7)}
    plots.rejection(named, ax=ax, by="total")
    assert [line.get_label().split(" (")[0] for line in ax.lines] == list(named)
    third = named["method 3"]
    area = aurc(third.loss(third.observed()), third.total)
    assert ax.lines[3].get_label() == f"method 3 (AURC {area:.3f})"
    for line, forecast in zip(ax.lines, named.values(), strict=True):
        fractions, accuracy = rejection_curve(forecast, by="total")
        assert list(line.get_xdata()) == pytest.approx((100 * fractions).tolist())
        assert list(line.get_ydata()) == pytest.approx(accuracy.tolist())
    assert len({(line.get_color(), line.get_marker()) for line in ax.lines}) == 7
    assert "total uncertainty" in ax.get_xlabel() and "accuracy" in ax.get_ylabel()


def test_rejection_of_ratings_is_in_mse(ax):
    forecast = ratings()
    plots.rejection(forecast, ax=ax)
    assert list(ax.lines[0].get_ydata()) == pytest.approx(rejection_curve(forecast)[1].tolist())
    assert "squared error" in ax.get_ylabel() and ax.get_legend() is None
    assert ax.get_title() == f"AURC {evaluate(forecast)['aurc']:.3f} by total uncertainty"


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


def test_an_answer_with_one_wrong_label_is_a_cross(ax: Axes) -> None:
    draws = torch.tensor([[[0.9, 0.2], [0.9, 0.2], [0.6, 0.7]]])
    forecast = LabelsForecast.from_draws(draws, labels=[[1, 0], [1, 1], [1, 1]])
    plots.epistemic_aleatoric(forecast, ax=ax)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["right (2)", "wrong (1)"]


def test_scatter_without_labels_and_of_ratings_is_one_cloud(ax):
    forecast = ratings()
    plots.epistemic_aleatoric(forecast, ax=ax)
    (cloud,) = ax.collections
    expected = torch.stack([forecast.aleatoric, forecast.epistemic], 1)
    torch.testing.assert_close(torch.tensor(cloud.get_offsets()).float(), expected)
    assert ax.get_ylabel() == "epistemic uncertainty: variance"
    bare = ClassForecast.from_draws(torch.full((2, 5, 2), 0.5))
    assert len(plots.epistemic_aleatoric(bare).collections) == 1


def test_what_cannot_be_plotted_is_refused():
    bare = ClassForecast.from_draws(torch.full((2, 5, 2), 0.5))
    for plot in (plots.reliability, plots.rejection):
        with pytest.raises(DataError, match="labels are needed"):
            plot(bare)
    with pytest.raises(ConfigError, match="by="):
        plots.rejection(forecast_of(0), by="entropy")
    for mixed in ({"a": forecast_of(0), "b": ratings()}, {}):
        with pytest.raises(ConfigError, match="forecasts"):
            plots.rejection(mixed)
    assert plt.get_fignums() == []
    ax = plots.reliability(forecast_of(0))
    assert plt.get_fignums() == [ax.figure.number]


def test_each_twentieth_of_the_p_values_has_its_share(ax):
    forecast = ClassForecast.from_draws(torch.full((1, 8, 2), 0.5))
    p = torch.tensor([0.01, 0.02, 0.049, 0.3, 0.51, 0.52, 0.97, 1.0], dtype=torch.float64)
    plots.novelty(replace(forecast, novelty=p), ax=ax)
    heights = [bar.get_height() for bar in ax.patches]
    assert [heights[0], heights[5], heights[10], heights[19]] == [3 / 8, 1 / 8, 2 / 8, 2 / 8]
    assert sum(heights) == 1
    assert ax.get_title() == "37.5 % of the texts have p at most 0.05 (5 % expected)"
    words = [text.get_text() for text in ax.get_legend().get_texts()]
    assert sorted(words) == ["expected", "flagged as unlike"]


@pytest.mark.parametrize("count", [20, 100])
def test_p_values_on_edges_are_in_the_bin_that_they_end(ax, count):
    """As they are of 19 or 99 learnt texts, and then the first bar is the share that is unlike."""
    forecast = ClassForecast.from_draws(torch.full((1, count, 2), 0.5))
    p = torch.arange(1, count + 1, dtype=torch.float64) / count
    plots.novelty(replace(forecast, novelty=p), ax=ax)
    assert [bar.get_height() for bar in ax.patches] == [0.05] * 20
