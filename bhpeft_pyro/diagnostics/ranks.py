"""The outcome of simulation-based calibration: ranks, a test of them, a plot.

Are ranks uniform? A test of the whole ECDF with a declared false-alarm rate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy.stats import binom, wilcoxon
from torch import Tensor

from ..errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Calibration",
    "band",
    "symmetric",
    "uniform",
]


_SIMULATIONS = 20_000


def uniform(ranks: np.ndarray, draws: int) -> float:
    """p-value of R ranks in 0..L being uniform, by the ECDF as a whole (Säilynoja et al. 2022).

    The statistic is the least of the two-sided binomial tail probabilities of the ECDF over all
    L points; its distribution is simulated, always from the same seed. Where no simulation is as
    extreme, L times the statistic is a bound on the p-value, and may be the smaller one.

    Args:
        ranks: (R,) integers.
        draws: L.

    >>> uniform(np.arange(100), draws=99) > 0.9, uniform(np.full(100, 50), draws=99) < 0.001
    (True, True)
    """
    counts = np.bincount(ranks, minlength=draws + 1).cumsum()[None, :-1]
    found = _statistic(counts, len(ranks))[0]
    below = np.searchsorted(_null(len(ranks), draws), found, "right")
    return float(min((1 + below) / (_SIMULATIONS + 1), draws * found))


def band(replications: int, draws: int, level: float) -> tuple[np.ndarray, np.ndarray]:
    """(L,), (L,) the ends of a band that holds the whole ECDF of uniform ranks, at 0..L-1, with
    probability `level`."""
    least = (1 - level) / draws  # as for `uniform`
    if (1 - level) * (_SIMULATIONS + 1) > 1:
        least = np.quantile(_null(replications, draws), 1 - level, method="inverted_cdf")
    lower = binom.ppf(least / 2, replications, _points(draws))
    return lower / replications, 1 - lower[::-1] / replications


def symmetric(ranks: np.ndarray, draws: int) -> float:
    """p-value of the ranks being symmetric about L/2: what Yao et al. (2018) test, by Wilcoxon.

    A posterior that is too narrow, as mean-field posteriors are, passes; a biased one doesn't.
    """
    off = ranks - draws / 2
    return float(wilcoxon(off).pvalue) if off.any() else 1.0


def _points(draws: int) -> np.ndarray:
    return np.arange(1, draws + 1) / (draws + 1)


def _statistic(counts: np.ndarray, replications: int) -> np.ndarray:
    """Of cumulative counts (M, L): (M,)."""
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
    """The statistic of uniform ranks, simulated, in order."""
    bins = np.full(draws + 1, 1 / (draws + 1))
    generator = np.random.default_rng(0)
    counts = generator.multinomial(replications, bins, _SIMULATIONS).cumsum(-1)[:, :-1]
    return np.sort(_statistic(counts, replications))


_CLEAR = 3.0  # sds of a mean rank, or of its spread, that give a name to what is wrong


@dataclass(frozen=True, eq=False)
class Calibration:
    """Where the truth ranks among posterior draws, over R simulated data sets; made by `sbc`.

    Attributes:
        names: of the Q quantities.
        ranks: (R, Q) how many of the L draws lie below the truth: uniform in 0..L if the draws
            are of the posterior.
        draws: L.
        false_alarm: the probability that exact posteriors fail, over all quantities together.

    >>> import torch
    >>> narrow = Calibration(("slope",), torch.tensor([[0], [99]] * 50), draws=99)
    >>> print(narrow)
    failed: 1 of 1 quantities over 100 data sets (exact posteriors fail with probability 0.01)
      slope  p 0.0000  too narrow  (bias: p 1.0000)
    """

    names: tuple[str, ...]
    ranks: Tensor
    draws: int
    false_alarm: float = 0.01

    def __post_init__(self) -> None:
        if self.ranks.dim() != 2 or self.ranks.shape[1] != len(self.names):
            raise ConfigError(
                f"ranks have shape {tuple(self.ranks.shape)}, expected (R, {len(self.names)})"
            )
        if not 0 < self.false_alarm < 1:
            raise ConfigError(f"false_alarm={self.false_alarm} must lie between 0 and 1")

    @cached_property
    def p_values(self) -> dict[str, float]:
        """Per quantity, of its ranks being uniform (`uniformity.uniform`)."""
        columns = self.ranks.T.numpy()
        return {
            name: uniform(column, self.draws)
            for name, column in zip(self.names, columns, strict=True)
        }

    @cached_property
    def bias(self) -> dict[str, float]:
        """Per quantity, the p-value of ranks symmetric about their middle (Yao et al. 2018)."""
        columns = self.ranks.T.numpy()
        return {
            name: symmetric(column, self.draws)
            for name, column in zip(self.names, columns, strict=True)
        }

    @property
    def failed(self) -> list[str]:
        """Quantities whose ranks are not uniform, at `false_alarm` / Q each (Bonferroni)."""
        return [name for name, p in self.p_values.items() if p < self._each]

    @property
    def biased(self) -> list[str]:
        """Quantities whose ranks are not symmetric, at `false_alarm` / Q each."""
        return [name for name, p in self.bias.items() if p < self._each]

    @property
    def passed(self) -> bool:
        """Whether none failed."""
        return not self.failed

    @property
    def _each(self) -> float:
        return self.false_alarm / len(self.names)

    def shape(self, name: str) -> str:
        """How the posterior of a quantity misses the truth: "too low", "too narrow", or ""."""
        rank = self.ranks[:, self.names.index(name)].double()
        place = ((rank + 0.5) / (self.draws + 1)).numpy() - 0.5  # uniform: mean 0, square 1/12
        root = len(place) ** 0.5
        shift = place.mean() * root * 12**0.5
        spread = (np.square(place).mean() - 1 / 12) * root * 180**0.5
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
            words = self.shape(name)
            lines.append(
                f"  {name:<{width}}  p {p:.4f}  {words + '  ' if words else ''}"
                f"(bias: p {self.bias[name]:.4f})"
            )
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """The ranks' ECDFs less the uniform one, and the band that holds one of them, if exact,
        with probability 1 - `false_alarm` / Q."""
        from ..plots import rank_ecdf

        lower, upper = band(len(self.ranks), self.draws, 1 - self._each)
        ecdfs = {}
        for name, column in zip(self.names, self.ranks.T.numpy(), strict=True):
            counts = np.bincount(column, minlength=self.draws + 1).cumsum()[:-1]
            ecdfs[name] = counts / len(self.ranks)
        return rank_ecdf(ecdfs, lower, upper, ax)
