"""Is a difference more than chance? Paired permutation tests, corrected for their number."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats
from torch import Tensor

from ..errors import DataError

__all__ = ["holm", "permutation_p"]

_RESAMPLES, _ROWS_AT_ONCE = 9999, 100


def permutation_p(ours: Tensor, theirs: Tensor, seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test on the mean difference.

    Under the null hypothesis it does not matter which of a pair is whose, so every sign of a
    difference is as likely as the other (Fisher's randomisation test). The pairs are examples, so
    this is about these fits on texts like these; what another fit would give, the standard errors
    over seeds say.

    Args:
        ours, theirs: (N,) losses of the same examples.

    >>> permutation_p(torch.zeros(20), torch.zeros(20))
    1.0
    """
    if ours.shape != theirs.shape or ours.ndim != 1 or len(ours) < 2:
        raise DataError(
            f"ours {tuple(ours.shape)} and theirs {tuple(theirs.shape)} must both be (N,), N > 1"
        )
    difference = (ours.double() - theirs.double()).numpy()
    if not difference.any():
        return 1.0
    test = stats.permutation_test(
        (difference,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=_RESAMPLES,
        batch=_ROWS_AT_ONCE,
        axis=0,
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


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
