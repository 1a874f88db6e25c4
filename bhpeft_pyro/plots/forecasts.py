"""Plots of forecasts: calibration, rejection, uncertainty.

Colours, marks and axes of all plots.

The colours are Okabe and Ito's, told apart by colour-blind readers; marks and dashes differ too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from torch import Tensor

from ..errors import ConfigError, LikelihoodError
from ..forecast import ClassForecast, Forecast
from ..forecast.metrics import BINS, calibration_bins, rejection_curve

__all__ = [
    "epistemic_aleatoric",
    "new_axes",
    "rejection",
    "reliability",
    "uncertainty_histogram",
]


BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#767676"
)  # fmt: skip
STYLES = tuple(zip((BLUE, VERMILLION, GREEN, ORANGE, PURPLE), "osD^v", strict=True))


def new_axes(ax: Axes | None) -> Axes:
    """The given axes or a new figure's, without the frame."""
    if ax is None:
        ax = plt.subplots(layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


_WORDS = {
    "epistemic": "epistemic uncertainty: mutual information (nats)",
    "aleatoric": "aleatoric uncertainty: expected entropy (nats)",
    "total": "total uncertainty: predictive entropy (nats)",
    "variance": "variance of the sampled class probabilities",
    "confidence": "1 - confidence",
}


def reliability(
    forecast: ClassForecast,
    labels: Tensor | Sequence[int] | None = None,
    ax: Axes | None = None,
    *,
    bins: int = BINS,
) -> Axes:
    """Reliability diagram (Guo et al. 2017): accuracy against confidence in equal bins.

    A stroke in each bin leads from its accuracy to the diagonal at its mean confidence; ECE is
    the mean length of the strokes, weighted by the numbers of examples, which stand above.
    """
    correct = _correct(forecast, labels)
    binned = calibration_bins(forecast.confidence, correct, bins)
    ax = new_axes(ax)
    filled = binned.count > 0
    left = binned.edges[:-1][filled].numpy()
    accuracy, confidence = binned.accuracy[filled].numpy(), binned.confidence[filled].numpy()
    ax.bar(left, accuracy, 1 / bins, align="edge", color=SKY, edgecolor="white", label="accuracy")
    ax.plot([0, 1], [0, 1], "--", color="black", linewidth=1, label="perfectly calibrated")
    ax.vlines(
        confidence, accuracy, confidence, color=VERMILLION, linewidth=2.5, label="calibration gap"
    )
    above: dict[str, Any] = {
        "xycoords": ("data", "axes fraction"),
        "textcoords": "offset points",
        "fontsize": 7,
    }
    for x, count in zip(left + 0.5 / bins, binned.count[filled].tolist(), strict=True):
        ax.annotate(f"{count:.0f}", (x, 1), (0, 3), ha="center", color=GREY, **above)
    ax.annotate("examples", (0, 1), (4, 9), ha="right", color=GREY, **above)
    ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")
    ax.set_title(f"ECE {binned.expected_error:.3f}", pad=16)
    ax.legend(loc="upper left")
    return ax


def rejection(
    forecasts: Forecast | Mapping[str, Forecast],
    labels: Tensor | Sequence[float] | None = None,
    ax: Axes | None = None,
    *,
    by: str = "total",
) -> Axes:
    """Accuracy (or MSE) of what is kept when 0, 10, ... 90 % least certain are rejected.

    Several named forecasts of the same kind may be compared; `labels` are those of all of them.
    """
    named = forecasts if isinstance(forecasts, Mapping) else {"": forecasts}
    kinds = {isinstance(forecast, ClassForecast) for forecast in named.values()}
    if len(kinds) != 1:
        raise ConfigError("forecasts must be one or more, all of classes or all of ratings")
    curves = {name: rejection_curve(each, labels, by=by) for name, each in named.items()}
    ax = new_axes(ax)
    looks = cycle(STYLES)
    for (name, (fractions, scores)), (colour, marker) in zip(curves.items(), looks, strict=False):
        ax.plot((100 * fractions).numpy(), scores.numpy(), color=colour, marker=marker, label=name)
    quality = "accuracy" if kinds == {True} else "MSE"
    ax.set(xlabel=f"rejected by {_short(by)} (%)", ylabel=f"{quality} of the examples kept")
    if isinstance(forecasts, Mapping):
        ax.legend()
    return ax


def uncertainty_histogram(
    forecast: ClassForecast,
    labels: Tensor | Sequence[int] | None = None,
    ax: Axes | None = None,
    *,
    by: str = "total",
    bins: int = 20,
) -> Axes:
    """Uncertainty of right and of wrong predictions, each as shares of their own number."""
    correct = _correct(forecast, labels)
    values = forecast.uncertainty(by).double()
    ax = new_axes(ax)
    span = (min(values.min().item(), 0.0), max(values.max().item(), 1e-12))
    for name, chosen, colour, hatch in (
        ("right", correct, BLUE, ""),
        ("wrong", ~correct, VERMILLION, "///"),
    ):
        count = int(chosen.sum())
        shares = torch.full((count,), 1 / max(count, 1))
        ax.hist(
            values[chosen].numpy(),
            bins=bins,
            range=span,
            weights=shares.numpy(),
            histtype="stepfilled",
            facecolor=(colour, 0.35),
            edgecolor=colour,
            linewidth=1.5,
            hatch=hatch,
            label=f"{name} ({count})",
        )
    ax.set(xlabel=_WORDS[by], ylabel="share of the predictions")
    ax.legend()
    return ax


def epistemic_aleatoric(
    forecast: Forecast,
    labels: Tensor | Sequence[float] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """One point an example; predictions of classes known to be wrong are crosses, drawn last."""
    if labels is not None:
        forecast = forecast.with_labels(labels)
    aleatoric, epistemic = forecast.uncertainty("aleatoric"), forecast.uncertainty("epistemic")
    ax = new_axes(ax)
    if isinstance(forecast, ClassForecast):
        ax.set(xlabel=_WORDS["aleatoric"], ylabel=_WORDS["epistemic"])
    else:
        ax.set(xlabel="aleatoric variance", ylabel="epistemic variance")
    if not isinstance(forecast, ClassForecast) or forecast.labels is None:
        ax.scatter(aleatoric.numpy(), epistemic.numpy(), 14, color=BLUE, alpha=0.5, linewidths=0)
        return ax
    correct = forecast.label == forecast.labels
    looks: tuple[tuple[str, Tensor, dict[str, Any]], ...] = (
        ("right", correct, {"color": BLUE, "s": 14, "alpha": 0.4, "linewidths": 0}),
        ("wrong", ~correct, {"color": VERMILLION, "s": 22, "alpha": 0.8, "marker": "x"}),
    )
    for name, chosen, look in looks:
        ax.scatter(
            aleatoric[chosen].numpy(),
            epistemic[chosen].numpy(),
            label=f"{name} ({int(chosen.sum())})",
            **look,
        )
    ax.legend()
    return ax


def _short(by: str) -> str:
    return by if by in ("variance", "confidence") else f"{by} uncertainty"


def _correct(forecast: ClassForecast, labels: Tensor | Sequence[int] | None) -> Tensor:
    """(N,) bool, True where the predicted class is the label."""
    if not isinstance(forecast, ClassForecast):
        raise LikelihoodError(f"forecast must be a ClassForecast, got {type(forecast).__name__}")
    return forecast.label == forecast.observed(labels)
