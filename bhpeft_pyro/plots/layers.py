"""Plots of the weights, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from matplotlib.axes import Axes
from torch import Tensor

from ..errors import ConfigError, DataError
from .style import GREY, STYLES, new_axes

if TYPE_CHECKING:
    from ..shift import Shift

__all__ = ["change_forest", "shift_by_layer"]

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
