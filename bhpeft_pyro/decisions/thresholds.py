"""Above which threshold few answers are wrong, by exact tests on calibration rows.

**Why it holds.** Let R(s) be the error of the population among the share s of texts with the
highest values; it is continuous in s. Thresholds at the ranks k_1 < k_2 < ... of the calibration
rows are tested in this order, each by the exact binomial tail of the errors among the k_j - 1 rows
above it, up to the first test that does not pass at level 1 - confidence (fixed-sequence testing;
Angelopoulos et al. 2021, "Learn then test"). The promise is broken only if the test of the first
threshold with R > error passes. The set where R > error is a union of intervals, at whose ends R
equals `error`. Take as given how many rows lie in each of them, and in each gap between them: this
says which test is the first such one, and leaves the rows in each independent. In each interval and
gap below this threshold's own interval, a row is then wrong with probability `error` exactly, and
in the part of that interval before the threshold with a higher one. So the errors are binomial at
least, and the test passes with probability at most 1 - confidence, although the thresholds are
values of the same rows: none are spent on choosing them. (Rows with exactly the same value are
answered together or not at all.) Rows that are never answered, since their texts are unlike what
was learnt, are left out first. Whether a text is so depends on it alone, not on other rows or on
its label, so the remaining rows are a random sample of the texts that may be answered.
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import beta, binom
from torch import Tensor

from ..errors import DataError

__all__ = ["ALL", "by_error", "by_share", "rows_needed"]

ALL = -1.0
"""A threshold below all probabilities."""

_STEPS = 50  # thresholds that are tested
_FIRST = (1.1, 4.0)  # the first one has so many times the fewest rows above it, between these,
_SHARE = 1 / 3  # or this share of all rows


def rows_needed(error: float, confidence: float) -> int:
    """The fewest answered calibration rows on which an error can be promised, none of them wrong.

    >>> [rows_needed(error, 0.9) for error in (0.1, 0.05, 0.01)]
    [22, 45, 230]
    """
    return math.ceil(math.log1p(-confidence) / math.log1p(-error))


def by_error(chance: Tensor, wrong: Tensor, error: float, confidence: float) -> float | None:
    """The lowest threshold that a fixed sequence of tests passes; None if it passes none."""
    rows, fewest = len(chance), rows_needed(error, confidence)
    first = min(max(_SHARE * rows, _FIRST[0] * fewest), _FIRST[1] * fewest, rows)
    counts = np.linspace(first, rows, _STEPS).round().astype(int)
    found = None
    for threshold, answered, mistakes in _at_counts(chance, wrong, counts):
        if binom.cdf(mistakes, answered, error) > 1 - confidence:
            break
        found = threshold
    return found


def by_share(
    chance: Tensor, wrong: Tensor, to_people: float, confidence: float
) -> tuple[float, float]:
    """The threshold above which at least all texts but the share `to_people` lie, and the error
    that is not exceeded there; each with half of the doubt. Rows whose `chance` is `ALL` are never
    answered.

    Raises:
        DataError: too many are never answered.
    """
    rows, doubt = len(chance), (1 - confidence) / 2
    # The share of texts at or above the k-th of N values has the distribution Beta(k, N - k + 1).
    # The k-th row is answered too: if others have its value, the share above it is smaller.
    ranks = np.arange(1, rows + 1)
    enough = beta.cdf(1 - to_people, ranks, rows - ranks + 1) <= doubt
    count = int(ranks[enough][0]) if enough.any() else rows
    never = int((chance <= ALL).sum())
    if count > rows - never:
        raise DataError(
            f"max_share_to_people={to_people:g}: {never} of {rows} calibration rows are unlike "
            f"what was learnt and left to people, where at most {rows - count} may be; expected a "
            "larger share or more rows, or answer_unlike=True"
        )
    ((threshold, answered, mistakes),) = _at_counts(chance, wrong, np.array([count]))
    bound = beta.ppf(1 - doubt, mistakes + 1, answered - mistakes) if mistakes < answered else 1.0
    return threshold, float(bound)


def _at_counts(chance: Tensor, wrong: Tensor, counts: np.ndarray) -> list[tuple[float, int, int]]:
    """Thresholds with so many rows above each, or more where values are the same: the threshold,
    that number, and how many of these rows are wrong."""
    order = chance.argsort(descending=True, stable=True)
    values, mistakes = chance[order].numpy(), wrong[order].cumsum(0)
    # The last row of those with the same value.
    ends = np.unique(np.searchsorted(-values, -values[counts - 1], side="right"))
    return [
        (float(values[end]) if end < len(values) else ALL, int(end), int(mistakes[end - 1]))
        for end in ends
    ]
