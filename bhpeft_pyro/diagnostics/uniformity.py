"""Are ranks uniform? A test of the whole ECDF with a declared false-alarm rate."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy.stats import binom, wilcoxon

__all__ = ["band", "symmetric", "uniform"]

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
