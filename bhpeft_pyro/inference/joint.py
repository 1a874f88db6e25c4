"""Adam for a joint mean, in units in which one step size suits all weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Adam

from ..distributions import Covariance

__all__ = ["WhitenedAdam"]


class WhitenedAdam(Adam):
    """Adam (Kingma and Ba 2015) on z, where loc = center + root z.

    With the prior's mean and covariance the prior of z is N(0, I), whatever the scales of the
    weights and, from the second round on, however narrow the last posterior is along some axes.

    Args:
        loc: what is moved.
        center, covariance: of these coordinates.
        lr: the step size, in sds of the covariance.
    """

    def __init__(
        self, loc: nn.Parameter, center: Tensor, covariance: Covariance, lr: float = 0.05
    ) -> None:
        self.loc, self.center, self.covariance = loc, center, covariance
        self.white = nn.Parameter(covariance.unroot(loc.detach() - center))
        super().__init__([self.white], lr=lr)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.loc.grad = None

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        assert self.loc.grad is not None
        self.white.grad = self.covariance.pull(self.loc.grad)
        loss = super().step(closure)
        self.loc.copy_(self.center + self.covariance.root(self.white))
        return loss
