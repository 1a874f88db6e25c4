"""Plots of forecasts: calibration, rejection, uncertainty; and the colours of all plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from torch import Tensor

from ..errors import ConfigError
from ..forecast import ClassForecast, Forecast
from ..forecast.metrics import BINS, aurc, calibration_bins, rejection_curve

# Okabe and Ito's colours, distinct for colour-blind readers; markers and dashes differ too.
BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#767676"
)  # fmt: skip
STYLES = tuple(
    zip((BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, "black", GREY), "osD^vPX*", strict=True)
)

_P_BINS = 20  # of p-values


def new_axes(ax: Axes | None) -> Axes:
    """The given axes or a new figure's, without the frame."""
    if ax is None:
        ax = plt.subplots(layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def reliability(
    forecast: ClassForecast,
    labels: Tensor | Sequence[int] | None = None,
    ax: Axes | None = None,
    *,
    bins: int = BINS,
) -> Axes:
    """Reliability diagram (Guo et al. 2017): accuracy against confidence in equal bins.

    In each bin a line connects its accuracy with the diagonal at its mean confidence. ECE is the
    mean length of these lines, weighted by the numbers of examples, at the foot of the bins.
    """
    correct = forecast.label == forecast.observed(labels)
    binned = calibration_bins(forecast.confidence, correct, bins)
    ax = new_axes(ax)
    filled = binned.count > 0
    left = binned.edges[:-1][filled].numpy()
    accuracy, confidence = binned.accuracy[filled].numpy(), binned.confidence[filled].numpy()
    bar: dict[str, Any] = {"color": SKY, "edgecolor": "white", "label": "accuracy (examples)"}
    ax.bar(left, accuracy, 1 / bins, align="edge", **bar)
    ax.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="perfectly calibrated")
    ax.vlines(
        confidence, accuracy, confidence, color=VERMILLION, linewidth=2.5, label="calibration gap"
    )
    small: dict[str, Any] = {"fontsize": 7, "textcoords": "offset points"}
    small["path_effects"] = [withStroke(linewidth=2, foreground="white")]  # over bars and lines
    for x, count in zip(left + 0.5 / bins, binned.count[filled].tolist(), strict=True):
        ax.annotate(f"{count:.0f}", (x, 0), (0, 3), ha="center", **small)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.set_title(f"ECE {binned.expected_error:.3f}")
    ax.legend(loc="best")
    return ax


def rejection(
    forecasts: Forecast | Mapping[str, Forecast], ax: Axes | None = None, *, by: str = "total"
) -> Axes:
    """Accuracy of the rest when the 0, 10, ... 90 % least certain are rejected; of several labels
    the share that is right, of ratings the MSE.

    Several named forecasts of the same kind can be compared. Their areas are those of
    `metrics.aurc`.
    """
    named = forecasts if isinstance(forecasts, Mapping) else {"": forecasts}
    if len(qualities := {forecast.quality for forecast in named.values()}) != 1:
        raise ConfigError("forecasts: expected one or more, all of the same kind")
    curves = {name: rejection_curve(forecast, by=by) for name, forecast in named.items()}
    ax = new_axes(ax)
    looks = cycle(STYLES)
    for (name, (fractions, scores)), (colour, marker) in zip(curves.items(), looks, strict=False):
        forecast = named[name]
        area = f"AURC {aurc(forecast.loss(forecast.observed()), forecast.uncertainty(by)):.3f}"
        label = f"{name} ({area})"
        ax.plot((100 * fractions).numpy(), scores.numpy(), color=colour, marker=marker, label=label)
    words = by if by in ("variance", "confidence", "novelty") else f"{by} uncertainty"
    ax.set(xlabel=f"rejected by {words} (%)", ylabel=f"{qualities.pop()} of the examples kept")
    if isinstance(forecasts, Mapping):
        ax.legend()
    else:
        ax.set_title(f"{area} by {words}")
    return ax


def epistemic_aleatoric(forecast: Forecast, ax: Axes | None = None) -> Axes:
    """A scatter plot of the examples; where labels are known, wrong answers are crosses on top.

    An answer with several labels is wrong if one of them is; ratings are neither right nor wrong.
    """
    x, y = (forecast.uncertainty(kind).numpy() for kind in ("aleatoric", "epistemic"))
    ax = new_axes(ax)
    dot: dict[str, Any] = {"color": BLUE, "s": 14, "alpha": 0.45, "linewidths": 0}
    ax.set_xlabel(f"aleatoric uncertainty: {forecast.in_words['aleatoric']}")
    ax.set_ylabel(f"epistemic uncertainty: {forecast.in_words['epistemic']}")
    if forecast.labels is None or not forecast.higher_is_better:  # no rating is quite right
        ax.scatter(x, y, **dot)
        return ax
    right = ~forecast.wrong().numpy()
    cross: dict[str, Any] = {"color": VERMILLION, "s": 22, "alpha": 0.8, "marker": "x"}
    ax.scatter(x[right], y[right], label=f"right ({right.sum()})", **dot)
    ax.scatter(x[~right], y[~right], label=f"wrong ({(~right).sum()})", **cross)
    ax.legend()
    return ax


def novelty(forecast: Forecast, ax: Axes | None = None) -> Axes:
    """The share of the texts in each twentieth of the p-values `novelty`.

    Each has 5 % of texts like the learnt ones (dashed); those unlike them are in the first.
    """
    unlike, p = forecast.unlike().double().mean().item(), forecast.novelty
    assert p is not None  # or `unlike` raises
    ax = new_axes(ax)
    ends = torch.arange(1, _P_BINS, dtype=p.dtype) / _P_BINS  # each belongs to the bin on its left
    shares = torch.bucketize(p, ends).bincount(minlength=_P_BINS).numpy() / len(p)
    left = [number / _P_BINS for number in range(_P_BINS)]
    looks: dict[str, Any] = {"color": [VERMILLION, *[SKY] * (_P_BINS - 1)], "edgecolor": "white"}
    words = ["flagged as unlike", *["_"] * (_P_BINS - 1)]
    ax.bar(left, shares, 1 / _P_BINS, align="edge", label=words, **looks)
    ax.axhline(1 / _P_BINS, linestyle="--", color="black", linewidth=1, label="expected")
    ax.set(xlim=(0, 1), xlabel="p-value", ylabel="share of the texts")
    ax.set_title(f"{100 * unlike:.1f} % of the texts have p at most 0.05 (5 % expected)")
    ax.legend()
    return ax
