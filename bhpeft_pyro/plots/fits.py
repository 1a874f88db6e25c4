"""Plots of fits and of how far they may be trusted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from .style import BLUE, GREEN, GREY, SKY, STYLES, VERMILLION, new_axes

__all__ = ["elbo_trace", "rank_ecdf"]

_LONG = 200  # steps; a longer trace is drawn faint, with its running mean over it


def elbo_trace(history: Sequence[Mapping[str, float]], ax: Axes | None = None) -> Axes:
    """NLL (expected, under the posterior), KL (to the prior) and their sum, the negative ELBO.

    Apart, because a falling loss may be all KL: a posterior that only returns to its prior.
    The scale is logarithmic while all is positive. Over 200 steps a running mean is drawn. The
    first steps of a joint guide, at the mean of the weights, are shaded: there is no noise yet.

    Args:
        history: one mapping a step, with `step`, `nll`, `kl` and `loss`; a `validation_nll` that
            some of them have is drawn as points. With `draws` of 0 it is the trace of a point,
            and without `kl`'s curve where the prior does not pull at it.
    """
    if not history:
        raise DataError("history is empty")
    for key in ("step", "nll", "kl", "loss"):
        if not all(key in row for row in history):
            raise DataError(f"history has steps without {key!r}")
    ax = new_axes(ax)
    steps = torch.tensor([row["step"] for row in history], dtype=torch.float64)
    positive = True
    point = history[0].get("draws") == 0
    curves = [
        ("loss", "loss" if point else "loss (negative ELBO)", "black", "-"),
        ("nll", "NLL", BLUE, "--"),
        ("kl", "-log prior" if point else "KL", VERMILLION, "-."),
    ]
    if point and not any(row.get("temperature", 1.0) for row in history):
        curves = curves[1:2]  # the loss is the NLL
    for key, words, colour, dash in curves:
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
    if positive:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel="step", ylabel="nats per example")
    ax.legend()
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
    ax = new_axes(ax)
    at = torch.arange(1, len(lower) + 1).double().numpy() / (len(lower) + 1)
    ax.fill_between(at, lower - at, upper - at, color=SKY, alpha=0.35, linewidth=0, label="band")
    outside = {
        name: ecdf for name, ecdf in ecdfs.items() if ((ecdf < lower) | (ecdf > upper)).any()
    }
    for name, ecdf in ecdfs.items():
        if name not in outside:
            ax.plot(at, ecdf - at, color=GREY, linewidth=0.9)
    looks = cycle(STYLES)
    for (name, ecdf), (colour, marker) in zip(outside.items(), looks, strict=False):
        every = max(1, len(at) // 12)
        ax.plot(at, ecdf - at, color=colour, marker=marker, markevery=every, label=name)
    ax.set(xlabel="rank of the truth, as a fraction", ylabel="ECDF - uniform", xlim=(0, 1))
    ax.legend(fontsize="small")
    return ax


def _running_mean(values: Tensor, width: int) -> Tensor:
    """Mean over the `width` steps before and after each; fewer at the ends."""
    total = torch.cat([values.new_zeros(1), values.cumsum(0)])
    index = torch.arange(len(values))
    start, stop = (index - width).clamp(min=0), (index + width + 1).clamp(max=len(values))
    return (total[stop] - total[start]) / (stop - start)
