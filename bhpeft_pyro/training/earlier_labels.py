"""A round with new labels: earlier rows say that texts like theirs have none of these.

Where some classes are new, the likelihood of an earlier row has two factors: the probability of its
class among the earlier ones, which the last posterior has learnt, and the probability that its
class is an earlier one. The second is not in that posterior, which had no outputs for new classes.
Rows of the round that have earlier labels stand for the earlier rows in it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro.distributions as dist
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ..data import Examples
from ..guides.strategy import Earlier


class EarlierLabels(Messenger):
    """An effect handler under which the log density of a row with an earlier label y is

        log p(y | x) + times * log p(an earlier label | x).

    Args:
        learnt: (C,) bool, which labels are earlier ones.
        times: how many earlier rows such a row stands for.

    >>> import pyro
    >>> with EarlierLabels(torch.tensor([True, True, False]), 3.0):
    ...     site = pyro.poutine.trace(pyro.sample).get_trace(
    ...         "label", dist.Categorical(logits=torch.zeros(2, 3)), obs=torch.tensor([0, 2])
    ...     ).nodes["label"]
    >>> site["fn"].log_prob(site["value"])  # log 1/3 + 3 log 2/3; log 1/3
    tensor([-2.3150, -1.0986])
    """

    def __init__(self, learnt: Tensor, times: float) -> None:
        super().__init__()
        self.learnt, self.times = learnt, times

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "label" and isinstance(msg["fn"], dist.Categorical):
            msg["fn"] = _Counted(msg["fn"].logits, self.learnt.to(msg["value"].device), self.times)


class _Counted(dist.Categorical):
    def __init__(self, logits: Tensor, learnt: Tensor, times: float) -> None:
        super().__init__(logits=logits, validate_args=False)
        self.learnt, self.times = learnt, times

    def log_prob(self, value: Tensor) -> Tensor:
        earlier = self.logits[..., self.learnt].logsumexp(-1)  # the logits are normalised
        return super().log_prob(value) + self.times * earlier * self.learnt[value]


def earlier_labels(earlier: Earlier | None, examples: Examples) -> AbstractContextManager[object]:
    """The handler for a round's fit; one that does nothing where no label is new, or where no row
    has an earlier one."""
    if earlier is None or earlier.learnt is None or examples.labels is None:
        return nullcontext()
    rows = int(earlier.learnt[examples.labels].sum())
    return EarlierLabels(earlier.learnt, earlier.rows / rows) if rows else nullcontext()
