"""Who won, and whether the test rows are enough to say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from ..forecast import ClassForecast
from ..metrics import BINS

__all__ = ["Comparison", "compare", "summary"]

_RESAMPLES = 1000


def _accuracy(p: Tensor, y: Tensor) -> Tensor:
    return (p.argmax(-1) == y).double()[:, None]


def _nll(p: Tensor, y: Tensor) -> Tensor:
    return -p.gather(1, y[:, None]).log()


def _gaps(p: Tensor, y: Tensor) -> Tensor:
    """Right (1) or wrong (0) less confidence, in the column of its bin."""
    confidence, predicted = p.max(-1)
    bins = (confidence * BINS).ceil().long().clamp(1, BINS) - 1
    return one_hot(bins, BINS) * ((predicted == y).double() - confidence)[:, None]


# Each metric is the sum over columns of |mean over rows|: so all resamples are one product.
_METRICS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "accuracy": _accuracy,
    "NLL": _nll,
    "ECE": _gaps,
}


@dataclass(frozen=True)
class Comparison:
    """Two forecasts of the same test rows by one metric.

    Attributes:
        metric: "accuracy" (larger is better), "NLL" or "ECE" (smaller is better).
        where: which test rows.
        difference: the first's value minus the second's.
        low, high: 95 % interval of the difference over resampled test rows (paired bootstrap).
            It says what other test rows would change; another training seed would change more.
        winner: the name of the better one, or None if the interval holds 0.
    """

    metric: str
    where: str
    difference: float
    low: float
    high: float
    winner: str | None


def compare(
    metric: str, where: str, first: tuple[str, ClassForecast], second: tuple[str, ClassForecast]
) -> Comparison:
    """Compare two named forecasts.

    >>> good = ClassForecast.from_draws(torch.tensor([[[0.9, 0.1]] * 40]), labels=[0] * 40)
    >>> bad = ClassForecast.from_draws(torch.tensor([[[0.4, 0.6]] * 40]), labels=[0] * 40)
    >>> compare("NLL", "films", ("A", bad), ("B", good)).winner
    'B'
    >>> compare("accuracy", "films", ("A", good), ("B", good)).winner is None
    True
    """
    labels = first[1].observed()
    count = len(labels)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(count, (_RESAMPLES, count), generator=generator)
    # How often each row is in each resample; the first one is the sample itself.
    often = torch.zeros(_RESAMPLES, count, dtype=torch.float64)
    often.scatter_add_(1, rows, torch.ones_like(often))
    often = torch.cat([torch.ones(1, count, dtype=torch.float64), often])
    values = [
        (often @ _METRICS[metric](forecast.probabilities.double(), labels) / count).abs().sum(-1)
        for _, forecast in (first, second)
    ]
    differences = values[0] - values[1]
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    low, high = differences[1:].quantile(ends).tolist()
    winner = None
    if low > 0 or high < 0:
        winner = first[0] if (low > 0) == (metric == "accuracy") else second[0]
    return Comparison(metric, where, differences[0].item(), low, high, winner)


def summary(comparisons: Sequence[Comparison]) -> list[str]:
    """One line for each winner, and one for what is too close to call.

    >>> summary([Comparison("NLL", "films", -0.2, -0.3, -0.1, "A"),
    ...          Comparison("ECE", "films", 0.0, -0.1, 0.1, None)])
    ['A won on: NLL (films)', 'Too close to call: ECE (films)']
    """
    won: dict[str | None, list[str]] = {}
    for each in comparisons:
        won.setdefault(each.winner, []).append(f"{each.metric} ({each.where})")
    undecided = won.pop(None, [])
    lines = [f"{winner} won on: {', '.join(what)}" for winner, what in won.items()]
    return lines + ([f"Too close to call: {', '.join(undecided)}"] if undecided else [])
