"""Is a difference more than chance? Paired tests over texts and over fits, and their correction."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy import stats
from torch import Tensor

from bhpeft_pyro.errors import DataError

__all__ = ["fits_p", "holm", "permutation_p"]

_RESAMPLES, _AT_ONCE = 10_000, 1000


def permutation_p(ours: Tensor, theirs: Tensor, seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test on the mean difference.

    Under the null hypothesis it does not matter which of a pair is whose, so every sign of a
    difference is as likely as the other (Fisher's randomisation test). The pairs are examples, so
    this is about these fits on texts like these; what another fit would give, `fits_p` says.

    Args:
        ours, theirs: (N,) losses of the same examples.

    >>> permutation_p(torch.zeros(20), torch.zeros(20))
    1.0
    """
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise DataError(
            f"ours {tuple(ours.shape)} and theirs {tuple(theirs.shape)} must both be (N,), N > 1"
        )
    difference = ours.double() - theirs.double()
    count = len(difference)
    observed = difference.sum().abs() - 1e-9 * difference.abs().sum()  # equal but for rounding
    if 2**count <= _RESAMPLES:
        bits = torch.arange(2**count).unsqueeze(-1) >> torch.arange(count) & 1
        return _extreme(bits, difference, observed) / 2**count
    generator = torch.Generator().manual_seed(seed)
    found = 1  # the signs that were observed
    for _ in range(_RESAMPLES // _AT_ONCE):
        bits = torch.randint(2, (_AT_ONCE, count), generator=generator)
        found += _extreme(bits, difference, observed)
    return found / (1 + _RESAMPLES)


def fits_p(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Two-sided p-value of a paired t-test on the mean difference over fits.

    The pairs are seeds, with other rows to learn from and to be tested on. They are of one pool of
    rows, so that they are not quite independent, and true p-values are somewhat larger.

    Args:
        ours, theirs: mean losses, one a seed, of two seeds at least.

    >>> round(fits_p([0.4, 0.5, 0.6], [0.5, 0.7, 0.8]), 3), fits_p([0.4, 0.5], [0.4, 0.5])
    (0.038, 1.0)
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise DataError(f"{len(ours)} and {len(theirs)} fits: expected as many, and 2 at least")
    if all(a == b for a, b in zip(ours, theirs, strict=True)):
        return 1.0
    return float(stats.ttest_rel(ours, theirs).pvalue)


def _extreme(bits: Tensor, difference: Tensor, observed: Tensor) -> int:
    """How many of the (R, N) signs, as 0 and 1, give a sum as far from zero as `observed`."""
    signs = 2 * bits.to(difference.dtype) - 1
    return int(((signs @ difference).abs() >= observed).sum())


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected so that any false alarm among all is as rare as a level says (Holm 1979).

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(values)), key=values.__getitem__)
    corrected, worst = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        worst = max(worst, (len(values) - rank) * values[index])
        corrected[index] = min(1.0, worst)
    return corrected
