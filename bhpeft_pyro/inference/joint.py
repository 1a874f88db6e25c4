"""Steps for the mean of a `LowRankGuide`: Adam, in units of the prior."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.optim import Adam

from ..guides import LowRankGuide

__all__ = ["WhitenedAdam"]


class WhitenedAdam(Adam):
    """Adam (Kingma and Ba 2015) on z, where loc = prior mean + prior root z.

    In these coordinates the prior is N(0, I), whatever the scales of the weights and, from the
    second round on, however narrow the last posterior is along some axes: so one step size suits
    all of them.

    Args:
        guide: its `loc` is what is moved.
        lr: the step size, in sds of the prior.
    """

    def __init__(self, guide: LowRankGuide, lr: float = 0.05) -> None:
        self.guide = guide
        self.white = nn.Parameter(torch.empty_like(guide.loc))
        super().__init__([self.white], lr=lr)
        self.follow()

    @torch.no_grad()
    def follow(self) -> None:
        """Go on from the mean that the guide has now."""
        offset = self.guide.loc - self.guide.prior.loc
        self.white.copy_(self.guide.prior.covariance.unroot(offset))

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.guide.loc.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        prior, loc = self.guide.prior, self.guide.loc
        assert loc.grad is not None
        self.white.grad = prior.covariance.pull(loc.grad)
        loss = super().step(closure)
        loc.copy_(prior.loc + prior.covariance.root(self.white))
        return loss
