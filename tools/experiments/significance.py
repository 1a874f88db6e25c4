"""Is a difference more than chance? Paired tests over texts and over fits, and their correction."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats

__all__ = ["fits_p", "holm", "permutation_p"]


def permutation_p(ours: np.ndarray, theirs: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test on the mean difference.

    Under the null hypothesis the two losses of an example could be exchanged. So this compares
    these very fits on texts like these; `fits_p` says what to expect of other fits.

    Args:
        ours, theirs: (N,) losses of the same examples.

    >>> permutation_p(np.zeros(20), np.zeros(20))
    1.0
    """
    difference = ours - theirs

    def distance(signed: np.ndarray, axis: int) -> np.ndarray:
        return np.abs(signed.mean(axis))

    tested = stats.permutation_test(
        (difference,),
        distance,
        permutation_type="samples",  # of one sample: random signs
        vectorized=True,
        n_resamples=10_000,
        batch=1000,
        alternative="greater",
        rng=seed,
    )
    return float(tested.pvalue)


def fits_p(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Two-sided p-value of a paired t-test on the mean difference over fits.

    The pairs are seeds, with other rows to learn from and to be tested on. All of these rows come
    from one pool, so the seeds are not quite independent, and true p-values are somewhat larger.

    Args:
        ours, theirs: mean losses, one for each seed, of at least two seeds.

    >>> round(fits_p([0.4, 0.5, 0.6], [0.5, 0.7, 0.8]), 3), fits_p([0.4, 0.5], [0.4, 0.5])
    (0.038, 1.0)
    """
    if all(a == b for a, b in zip(ours, theirs, strict=True)):
        return 1.0
    return float(stats.ttest_rel(ours, theirs).pvalue)


def holm(values: Sequence[float]) -> list[float]:
    """P-values corrected so that any false alarm among all is as rare as one alone (Holm 1979).

    SciPy corrects for the false discovery rate only.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = np.argsort(values)
    raised = np.arange(len(values), 0, -1) * np.asarray(values)[order]
    corrected = np.empty(len(values))
    corrected[order] = np.maximum.accumulate(raised).clip(max=1.0)
    return corrected.tolist()
