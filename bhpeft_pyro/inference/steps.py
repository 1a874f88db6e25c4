"""Which optimiser moves which parameters of a guide."""

from __future__ import annotations

from torch import nn
from torch.optim import Adam, Optimizer

from ..distributions import Covariance
from ..errors import GuideError
from ..guides import DeltaGuide, Guide, LaplaceGuide, LowRankGuide
from ..guides.guide import blocks_of
from .joint import WhitenedAdam
from .natural import NaturalGradient
from .options import FitOptions

__all__ = ["optimizers", "trained"]

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
