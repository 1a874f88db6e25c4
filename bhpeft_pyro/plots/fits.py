"""Plots of fits and of how far they may be trusted.

Plots of the weights, layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray
from torch import Tensor

from ..errors import ConfigError, DataError
from .forecasts import BLUE, GREEN, GREY, SKY, STYLES, VERMILLION, new_axes

if TYPE_CHECKING:
    from ..changes import Shift

__all__ = [
    "change_forest",
    "elbo_trace",
    "rank_ecdf",
    "shift_by_layer",
]


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


_SHIFTS = {
    "moved": "shift of the means (rms, in prior sds)",
    "narrowed": "posterior sd / prior sd (geometric mean)",
    "kl": "KL from the prior (nats)",
}


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
    ax = new_axes(ax)
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    step = 0.7 / len(changes)
    for i, (branch, layers) in enumerate(changes.items()):
        colour, marker = STYLES[i % len(STYLES)]
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


def shift_by_layer(
    shifts: Mapping[str, Mapping[int | None, Shift]], ax: Axes | None = None, *, by: str = "moved"
) -> Axes:
    """How far a round moved each PEFT kind of each layer from its prior; the head stands below.

    Args:
        shifts: kind to layer number (or None) to shift; see `shift.shifts`.
        by: "moved" (in prior sds), "narrowed" (sd ratio) or "kl" (nats).
    """
    if not shifts:
        raise DataError("shifts is empty: there are no weights")
    if by not in _SHIFTS:
        raise ConfigError(f"by={by!r} must be one of {', '.join(map(repr, _SHIFTS))}")
    ax = new_axes(ax)
    numbers = sorted({n for layers in shifts.values() for n in layers if n is not None})
    below = numbers[-1] + 1 if numbers else 0
    names = [str(number) for number in numbers]
    for i, (kind, layers) in enumerate(shifts.items()):
        colour, marker = STYLES[i % len(STYLES)]
        values = [getattr(shift, by) for shift in layers.values()]
        rows = [below if number is None else number for number in layers]
        ax.plot(values, rows, marker + "-", color=colour, linewidth=1, label=kind)
        if None in layers:
            numbers.append(below)
            names.append(kind)
            below += 1
    ax.set_yticks(numbers, names)
    ax.set_ylabel("layer")
    ax.invert_yaxis()
    at = 1.0 if by == "narrowed" else 0.0
    ax.axvline(at, color=GREY, linewidth=1, linestyle=":")
    ax.set_xlabel(_SHIFTS[by])
    ax.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return ax
