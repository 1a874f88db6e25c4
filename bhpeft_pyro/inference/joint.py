"""Natural-gradient steps for the mean of a `LowRankGuide`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..guides import LowRankGuide
from .natural import average

__all__ = ["JointNaturalGradient"]


class JointNaturalGradient(Optimizer):
    """loc <- loc - lr * covariance * gradient: Newton's step, in the posterior's own metric.

    The gradient is averaged over steps first. The covariance is the guide's own, at each step.

    Args:
        guide: its `loc` is what is moved.
        lr: the step size rho, without units; 1 jumps to the optimum of a nearby quadratic.
        momentum: exponential averaging of the gradient.
        trust: the longest step, in posterior sds (the Mahalanobis norm).
    """

    def __init__(
        self, guide: LowRankGuide, lr: float = 0.1, momentum: float = 0.9, trust: float = 3.0
    ) -> None:
        super().__init__([guide.loc], {"lr": lr, "momentum": momentum, "trust": trust})
        self.guide = guide

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            (loc,) = group["params"]
            if loc.grad is None:
                continue
            state = self.state[loc]
            if not state:
                state["step"], state["slope"] = 0, torch.zeros_like(loc)
            state["step"] += 1
            slope = average(state["slope"], loc.grad, group["momentum"], state["step"])
            step: Tensor = group["lr"] * self.guide.covariance.apply(slope)
            length = (group["lr"] * (step @ slope)).clamp_min(0).sqrt()
            loc.sub_(step * (group["trust"] / length.clamp_min(1e-30)).clamp_max(1.0))
        return loss
