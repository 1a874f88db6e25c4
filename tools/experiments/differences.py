"""Is a difference more than chance? Paired over seeds, or over the texts of one seed."""

from __future__ import annotations

from collections.abc import Mapping
from math import nan

from scipy import stats
from torch import Tensor

from bhpeft_pyro.forecast.metrics import mean_and_error

from .tables import Number

__all__ = ["DIFFERENCES", "difference"]

DIFFERENCES = (
    "Standard errors over seeds; if there is one seed, over its test rows. p: a paired t-test over "
    "seeds, not corrected for the number of comparisons."
)


def difference(ours: Mapping[int, Tensor], theirs: Mapping[int, Tensor]) -> dict[str, Number]:
    """How much larger our losses are, and the p-value of a paired t-test on it.

    A seed has other rows to learn from and to be tested on. All of these come from one pool, so the
    seeds are not quite independent, and true p-values are somewhat larger.

    Args:
        ours, theirs: by seed, the losses (N,) of the same N test rows; at least one seed in both.

    >>> import torch
    >>> ours, theirs = torch.tensor([[[4.0], [5.0]], [[5.0], [8.0]]])  # two seeds of one row
    >>> difference(dict(enumerate(ours)), dict(enumerate(theirs)))["nll"]
    (-2.0, 1.0)
    """
    seeds = sorted(ours.keys() & theirs.keys())
    behind = [(ours[seed] - theirs[seed]).double() for seed in seeds]
    if len(seeds) == 1:
        return {"nll": mean_and_error(behind[0]), "p": (nan, nan)}
    means = [gap.mean().item() for gap in behind]
    p = 1.0 if not any(means) else float(stats.ttest_1samp(means, 0.0).pvalue)
    return {"nll": mean_and_error(means), "p": (p, nan)}
