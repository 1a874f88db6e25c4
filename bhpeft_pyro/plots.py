"""Plots of forecasts and fits. Each draws on `ax` (or a new figure's) and returns it.

Colours are Okabe and Ito's, told apart by colour-blind readers; marks and dashes differ as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor

from .errors import ConfigError, DataError, LikelihoodError
from .forecast import ClassForecast, Forecast
from .metrics import BINS, calibration_bins, rejection_curve

__all__ = [
    "change_forest",
    "elbo_trace",
    "epistemic_aleatoric",
    "rank_ecdf",
    "rejection",
    "reliability",
    "uncertainty_histogram",
]

BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY, GREY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#767676"
)  # fmt: skip
_STYLES = tuple(zip((BLUE, VERMILLION, GREEN, ORANGE, PURPLE), "osD^v", strict=True))
_LONG = 200  # steps; a longer trace is drawn faint, with its running mean over it

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
    ax = _axes(ax)
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
    by: str = "epistemic",
) -> Axes:
    """Accuracy (or MSE) of what is kept when 0, 10, ... 90 % least certain are rejected.

    Several named forecasts of the same kind may be compared; `labels` are those of all of them.
    """
    named = forecasts if isinstance(forecasts, Mapping) else {"": forecasts}
    kinds = {isinstance(forecast, ClassForecast) for forecast in named.values()}
    if len(kinds) != 1:
        raise ConfigError("forecasts must be one or more, all of classes or all of ratings")
    curves = {name: rejection_curve(each, labels, by=by) for name, each in named.items()}
    ax = _axes(ax)
    looks = cycle(_STYLES)
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
    by: str = "epistemic",
    bins: int = 20,
) -> Axes:
    """Uncertainty of right and of wrong predictions, each as shares of their own number."""
    correct = _correct(forecast, labels)
    values = forecast.uncertainty(by).double()
    ax = _axes(ax)
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
    ax = _axes(ax)
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


def elbo_trace(history: Sequence[Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """NLL (expected, under the posterior), KL (to the prior) and their sum, the negative ELBO.

    Apart, because a falling loss may be all KL: a posterior that only returns to its prior.
    The scale is logarithmic while all is positive. Over 200 steps a running mean is drawn.

    Args:
        history: one mapping a step, with `step`, `nll`, `kl` and `loss`; a `validation_nll` that
            some of them have is drawn as points.
    """
    if not history:
        raise DataError("history is empty")
    for key in ("step", "nll", "kl", "loss"):
        if not all(key in row for row in history):
            raise DataError(f"history has steps without {key!r}")
    ax = _axes(ax)
    steps = torch.tensor([row["step"] for row in history], dtype=torch.float64)
    positive = True
    for key, words, colour, dash in (
        ("loss", "loss (negative ELBO)", "black", "-"),
        ("nll", "NLL", BLUE, "--"),
        ("kl", "KL", VERMILLION, "-."),
    ):
        values = torch.tensor([row[key] for row in history], dtype=torch.float64)
        positive = positive and bool((values > 0).all())
        if len(values) > _LONG:
            ax.plot(steps.numpy(), values.numpy(), color=colour, alpha=0.2, linewidth=0.8)
            values = _running_mean(values, len(values) // 50)
        ax.plot(steps.numpy(), values.numpy(), dash, color=colour, linewidth=1.8, label=words)
    held_out = [row for row in history if "validation_nll" in row]
    if held_out:
        values = torch.tensor([row["validation_nll"] for row in held_out], dtype=torch.float64)
        positive = positive and bool((values > 0).all())
        at = [row["step"] for row in held_out]
        ax.plot(at, values.numpy(), "o", color=GREEN, markersize=4, label="validation NLL")
    ax.set_yscale("log" if positive else "linear")
    ax.set(xlabel="step", ylabel="nats per example")
    ax.legend()
    return ax


def change_forest(
    changes: Mapping[str, Mapping[int, Tensor]], ax: Axes | None = None, *, level: float = 0.9
) -> Axes:
    """Forest plot of how much each PEFT branch changes each layer: mean, and central interval.

    A branch about which nothing was learnt is where the prior's draws are.

    Args:
        changes: branch to layer number to (S,) sizes under S draws; see `change.changes`.
        level: probability of the intervals.
    """
    if not changes:
        raise DataError("changes is empty: there are no PEFT weights")
    if not 0 < level < 1:
        raise ConfigError(f"level={level} must be above 0 and below 1")
    ax = _axes(ax)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    step = 0.7 / len(changes)
    for i, (branch, layers) in enumerate(changes.items()):
        colour, marker = _STYLES[i % len(_STYLES)]
        # Within a layer the first branch comes highest, as in the legend.
        rows = torch.tensor(list(layers), dtype=torch.float64) + step * (i - (len(changes) - 1) / 2)
        draws = torch.stack([sizes.double() for sizes in layers.values()])
        lower, upper = draws.quantile(ends, dim=1)
        ax.hlines(rows.numpy(), lower.numpy(), upper.numpy(), color=colour, linewidth=1.5)
        ax.plot(
            draws.mean(1).numpy(), rows.numpy(), marker, color=colour, markersize=4, label=branch
        )
    numbers = sorted({layer for layers in changes.values() for layer in layers})
    ax.set_yticks(numbers, [str(number) for number in numbers])
    for number in numbers[1:]:
        ax.axhline(number - 0.5, color=GREY, alpha=0.25, linewidth=0.6)
    ax.set_xlim(left=0)
    ax.invert_yaxis()
    ax.set(xlabel=f"change, as a share of the frozen signal (mean, {level:.0%} interval)")
    ax.set_ylabel("layer")
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return ax


def rank_ecdf(
    ecdfs: Mapping[str, NDArray], lower: NDArray, upper: NDArray, ax: Axes | None = None
) -> Axes:
    """ECDFs of ranks less that of uniform ones, and the band in which each should stay.

    A curve above zero at the left and below at the right: too narrow; the reverse: too wide; on
    one side throughout: biased. Those that leave the band are coloured and named.

    Args:
        ecdfs: by name (L,), the share of ranks up to 0, 1, ..., L - 1.
        lower, upper: (L,) the ends of the band.
    """
    if not ecdfs or any(ecdf.shape != lower.shape for ecdf in ecdfs.values()):
        raise DataError(f"ecdfs must be one or more of shape {lower.shape}, that of the band")
    ax = _axes(ax)
    at = torch.arange(1, len(lower) + 1).double().numpy() / (len(lower) + 1)
    ax.fill_between(at, lower - at, upper - at, color=SKY, alpha=0.35, linewidth=0, label="band")
    outside = {
        name: ecdf for name, ecdf in ecdfs.items() if ((ecdf < lower) | (ecdf > upper)).any()
    }
    for name, ecdf in ecdfs.items():
        if name not in outside:
            ax.plot(at, ecdf - at, color=GREY, linewidth=0.9)
    looks = cycle(_STYLES)
    for (name, ecdf), (colour, marker) in zip(outside.items(), looks, strict=False):
        every = max(1, len(at) // 12)
        ax.plot(at, ecdf - at, color=colour, marker=marker, markevery=every, label=name)
    ax.set(xlabel="rank of the truth, as a fraction", ylabel="ECDF - uniform", xlim=(0, 1))
    ax.legend(fontsize="small")
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is None:
        ax = plt.subplots(layout="constrained")[1]
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _short(by: str) -> str:
    return by if by in ("variance", "confidence") else f"{by} uncertainty"


def _correct(forecast: ClassForecast, labels: Tensor | Sequence[int] | None) -> Tensor:
    """(N,) bool, True where the predicted class is the label."""
    if not isinstance(forecast, ClassForecast):
        raise LikelihoodError(f"forecast must be a ClassForecast, got {type(forecast).__name__}")
    return forecast.label == forecast.observed(labels)


def _running_mean(values: Tensor, width: int) -> Tensor:
    """Mean over the `width` steps before and after each; fewer at the ends."""
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    index = torch.arange(len(values))
    start, stop = (index - width).clamp(min=0), (index + width + 1).clamp(max=len(values))
    return (total[stop] - total[start]) / (stop - start)
