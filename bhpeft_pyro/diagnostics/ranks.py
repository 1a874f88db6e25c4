"""The outcome of simulation-based calibration: ranks, a test of their uniformity, a plot."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binom
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIMULATIONS = 20_000
_CLEAR = 3.0  # z-value of a mean rank, or of its spread, from which the deviation gets a name


def uniform(ranks: np.ndarray, draws: int) -> float:
    """p-value of (R,) ranks in 0..L being uniform, by the whole ECDF (Säilynoja et al. 2022).

    The statistic is the smallest of the two-sided binomial tail probabilities of the ECDF at its
    L points. Its distribution is simulated, always from the same seed. Where no simulation is as
    extreme, L times the statistic bounds the p-value. SciPy has no such test.
    """
    counts = np.bincount(ranks, minlength=draws + 1).cumsum()[None, :-1]
    statistic = _statistic(counts, len(ranks))[0]
    below = np.searchsorted(_null(len(ranks), draws), statistic, "right")
    return float(min((1 + below) / (_SIMULATIONS + 1), draws * statistic))


def band(replications: int, draws: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """(L,), (L,) the ends of a band that contains the whole ECDF of uniform ranks, at 0..L-1, with
    probability `level`."""
    least = (1 - level) / draws  # as for `uniform`
    if (1 - level) * (_SIMULATIONS + 1) > 1:
        least = np.quantile(_null(replications, draws), 1 - level, method="inverted_cdf")
    lower = binom.ppf(least / 2, replications, _points(draws))
    return lower / replications, (replications - lower[::-1]) / replications


def _points(draws: int) -> np.ndarray:
    return np.arange(1, draws + 1) / (draws + 1)


def _statistic(counts: np.ndarray, replications: int) -> np.ndarray:
    """(M,) from cumulative counts (M, L)."""
    tails = _tails(replications, counts.shape[-1])
    return np.take_along_axis(tails, counts, 0).min(-1)


@lru_cache(maxsize=8)
def _tails(replications: int, draws: int) -> np.ndarray:
    """(R + 1, L): the two-sided tail probability of each count at each point."""
    counts, at = np.arange(replications + 1)[:, None], _points(draws)
    below, above = binom.cdf(counts, replications, at), binom.sf(counts - 1, replications, at)
    return 2 * np.minimum(below, above)


@lru_cache(maxsize=8)
def _null(replications: int, draws: int) -> np.ndarray:
    """The statistic of simulated uniform ranks, sorted."""
    bins = np.full(draws + 1, 1 / (draws + 1))
    generator = np.random.default_rng(0)
    counts = generator.multinomial(replications, bins, _SIMULATIONS).cumsum(-1)[:, :-1]
    return np.sort(_statistic(counts, replications))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Ranks of the truth among posterior draws, over R simulated data sets; made by `sbc`.

    Attributes:
        names: of the Q quantities.
        ranks: (R, Q) how many of the L draws lie below the truth: uniform in 0..L if the draws
            are from the posterior.
        draws: L.
        false_alarm: the probability that exact posteriors fail, over all quantities together.

    >>> import torch
    >>> narrow = Calibration(("slope",), torch.tensor([[0], [99]] * 50), draws=99)
    >>> print(narrow)
    failed: 1 of 1 quantities over 100 data sets (exact posteriors fail with probability 0.01)
      slope  p 0.0000  too narrow
    """

    names: tuple[str, ...]
    ranks: Tensor
    draws: int
    false_alarm: float = 0.01

    @property
    def _columns(self) -> dict[str, np.ndarray]:
        return dict(zip(self.names, self.ranks.T.numpy(), strict=True))

    @cached_property
    def p_values(self) -> dict[str, float]:
        """Per quantity, the p-value of its ranks being uniform (`ranks.uniform`)."""
        return {name: uniform(ranks, self.draws) for name, ranks in self._columns.items()}

    @property
    def failed(self) -> list[str]:
        """Quantities whose ranks are not uniform, at `false_alarm` / Q each (Bonferroni)."""
        return [name for name, p in self.p_values.items() if p < self._level]

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return not self.failed

    @property
    def _level(self) -> float:
        return self.false_alarm / len(self.names)

    def shape(self, name: str) -> str:
        """How the posterior of a quantity misses the truth: "too low", "too narrow", or ""."""
        place = (self._columns[name] + 0.5) / (self.draws + 1) - 0.5
        root = len(place) ** 0.5
        variance = (1 - (self.draws + 1) ** -2) / 12  # of a place, if ranks are uniform
        shift = place.mean() * root / variance**0.5
        spread = (np.square(place).mean() - variance) * root * 180**0.5
        words = []
        if abs(shift) > _CLEAR:
            words.append("too low" if shift > 0 else "too high")
        if abs(spread) > _CLEAR and abs(spread) > abs(shift):
            words.append("too narrow" if spread > 0 else "too wide")
        return ", ".join(words)

    def __str__(self) -> str:
        share = f"failed: {len(self.failed)} of" if self.failed else "passed:"
        lines = [
            f"{share} {len(self.names)} quantities over {len(self.ranks)} data sets (exact "
            f"posteriors fail with probability {self.false_alarm:g})"
        ]
        width = max(map(len, self.names))
        for name, p in self.p_values.items():
            lines.append(f"  {name:<{width}}  p {p:.4f}  {self.shape(name)}".rstrip())
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the ranks' ECDFs less that of uniform ranks, and a band.

        If the posterior is exact, each curve stays in the band with probability
        1 - `false_alarm` / Q. Those of quantities that `failed` are coloured and named. One that is
        positive at the left and negative at the right means too narrow a posterior, the reverse too
        wide a one, and a curve on one side a biased one.
        """
        from ..plots.forecasts import GREY, SKY, STYLES, new_axes  # Matplotlib is slow to import

        ax = new_axes(ax)
        at = _points(self.draws)
        lower, upper = band(len(self.ranks), self.draws, 1 - self._level)
        ax.fill_between(at, lower - at, upper - at, color=SKY, alpha=0.35, lw=0, label="band")
        for (name, ranks), (colour, _) in zip(self._columns.items(), cycle(STYLES), strict=False):
            ecdf = np.bincount(ranks, minlength=self.draws + 1).cumsum()[:-1] / len(ranks)
            failed = name in self.failed
            look = {"color": colour, "label": name} if failed else {"color": GREY, "lw": 0.9}
            ax.plot(at, ecdf - at, **look)
        ax.set(xlabel="rank of the truth, as a fraction", ylabel="ECDF - uniform", xlim=(0, 1))
        ax.legend(fontsize="small")
        return ax
