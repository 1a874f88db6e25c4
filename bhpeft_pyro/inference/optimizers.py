"""Which optimiser moves which parameters of a guide.

Natural-gradient steps for Normal guides, as a small torch optimiser.

With one learning rate for means and sds the sds never leave their starting value; with two, steps
of equal size on every weight spend thousands of nats of KL that the data never asked for. A
natural-gradient step is measured in the posterior's own units, so both problems are gone.

Adam for a joint mean, in units in which one step size suits all weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from ..distributions import Covariance
from ..errors import ConfigError, GuideError
from ..guides import DeltaGuide, Guide, LaplaceGuide, LowRankGuide
from ..guides.guide import blocks_of
from .options import FitOptions

__all__ = [
    "NaturalGradient",
    "WhitenedAdam",
    "optimizers",
    "trained",
]


_TRUST = 0.2  # largest change of a log precision per step


class NaturalGradient(Optimizer):
    """The improved Bayesian learning rule of Lin, Schmidt and Khan (2020) on (loc, log scale).

    With u = log scale, precision P = exp(-2u), the loss L = N E[nll] + KL in nats, and
    h = (dL/du) P minus its natural gradient with respect to the precision, the rule reads

        P   <- P + lr h + (lr h)^2 / (2 P) + ...  =  P exp(lr h / P),   that is
        u   <- u - lr (dL/du) / 2
        loc <- loc - lr (dL/dloc) / P

    Lin et al. stop at the second order, which keeps P positive for any step. All orders do so
    too, and treat a noisy gradient alike in both directions: with two orders, noise alone
    shrinks the sds (measured: a bias' sd 0.03 where it should be 0.13). Both gradients are
    averaged over steps first (`momentum` for loc, `averaging` for u). One step moves a loc by
    at most its own sd and a sd by at most 10 %: starting far too wide, the gradients are
    mostly noise, and larger steps leave some sds near zero with their locs stuck far off.

    Args:
        pairs: (loc, log scale) parameters of equal shape.
        lr: the step size rho, without units; 1 jumps to the optimum of a nearby quadratic.
        momentum: exponential averaging of the gradient of loc.
        averaging: exponential averaging of the gradient of log scale.

    >>> loc, log_scale = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    >>> optimiser = NaturalGradient([(loc, log_scale)], lr=0.5, momentum=0.0, averaging=0.0)
    >>> for _ in range(50):  # KL(N(loc, scale^2) || N(3, 0.1^2))
    ...     scale = log_scale.exp()
    ...     loss = ((loc - 3) ** 2 + scale**2) / 0.02 - log_scale
    ...     optimiser.zero_grad(); loss.sum().backward(); optimiser.step()
    >>> round(loc.item(), 3), round(log_scale.exp().item(), 3)
    (3.0, 0.1)
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Tensor, Tensor]],
        lr: float = 0.1,
        momentum: float = 0.9,
        averaging: float = 0.9,
    ) -> None:
        groups: list[dict[str, Any]] = [{"params": list(pair)} for pair in pairs]
        if not lr > 0:
            raise ConfigError(f"NaturalGradient: lr must be positive, got {lr}")
        for name, value in (("momentum", momentum), ("averaging", averaging)):
            if not 0 <= value < 1:
                raise ConfigError(f"NaturalGradient: {name} must be in [0, 1), got {value}")
        for group in groups:
            shapes = [tuple(tensor.shape) for tensor in group["params"]]
            if len(shapes) != 2 or shapes[0] != shapes[1]:
                raise ConfigError(
                    f"NaturalGradient: a pair needs two tensors of one shape, got {shapes}"
                )
        super().__init__(groups, {"lr": lr, "momentum": momentum, "averaging": averaging})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from the gradients at hand; parameters without one are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            loc, log_scale = group["params"]
            if loc.grad is None or log_scale.grad is None:
                continue
            state = self.state[loc]
            if not state:
                state["step"] = 0
                state["loc"] = torch.zeros_like(loc)
                state["log_scale"] = torch.zeros_like(log_scale)
            state["step"] += 1
            slope = average(state["loc"], loc.grad, group["momentum"], state["step"])
            bend = average(state["log_scale"], log_scale.grad, group["averaging"], state["step"])
            log_scale.sub_((group["lr"] * bend).clamp_(-_TRUST, _TRUST), alpha=0.5)
            scale = log_scale.exp()
            loc.sub_((group["lr"] * scale * slope).clamp_(-1, 1).mul_(scale))
        return loss


def average(buffer: Tensor, gradient: Tensor, decay: float, step: int) -> Tensor:
    """Exponential average, corrected for its start at zero as in Adam."""
    buffer.lerp_(gradient, 1 - decay)
    return buffer / (1 - decay**step)


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


_NOISE = 10.0  # step size of a point's noise scale, of the other weights': it has far to go


def trained(guide: nn.Module) -> list[nn.Parameter]:
    """The parameters to be fitted.

    Raises:
        GuideError: there are none.
    """
    found = [p for p in guide.parameters() if p.requires_grad]
    if not found:
        raise GuideError("the guide has no parameters to fit")
    return found


def optimizers(guide: nn.Module, options: FitOptions, examples: int) -> list[Optimizer]:
    """Natural gradients for means and sds, Adam for joint means and for what else there is.

    Args:
        guide: any; one made of blocks has the steps of each of them.
        options: how to fit.
        examples: N.
    """
    rest = {id(parameter): parameter for parameter in trained(guide)}
    found: list[Optimizer] = []
    for block in blocks_of(guide):
        if isinstance(block, LaplaceGuide):
            steps = Covariance.diagonal(1 + (_NOISE - 1) * block.of_likelihood())
            found.append(WhitenedAdam(block.loc, block.loc.detach().clone(), steps, options.lr))
            del rest[id(block.loc)]
        elif isinstance(block, LowRankGuide):
            normal = block.prior
            found.append(WhitenedAdam(block.loc, normal.loc, normal.covariance, options.joint_lr))
            del rest[id(block.loc)]
        elif isinstance(block, DeltaGuide) and (own := block.of_likelihood()):
            found.append(Adam(own, lr=_NOISE * options.lr))
            for parameter in own:
                del rest[id(parameter)]
    pairs = guide.natural_pairs() if isinstance(guide, Guide) else []
    if pairs:
        found.append(NaturalGradient(pairs, lr=natural_lr(options, examples)))
        for parameter in (parameter for pair in pairs for parameter in pair):
            rest.pop(id(parameter), None)
    if rest:
        found.append(Adam(rest.values(), lr=options.lr))
    return found


def natural_lr(options: FitOptions, examples: int) -> float:
    """B / N unless given: with a step size rho on batches of B out of N the mean jitters with
    variance rho N / (2 B), in units of the posterior's, so more would be mostly noise.

    The sds of a cold posterior are small by sqrt(T), and steps are measured in their squares."""
    if options.natural_lr is not None:
        return options.natural_lr
    cold = min(options.temperature or 1.0, 1.0)
    return min(options.batch_size * options.accumulate / examples, 0.1) / cold
