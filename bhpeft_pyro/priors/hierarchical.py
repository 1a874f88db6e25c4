"""Scales that are learnt: pooled over layers, or as points by empirical Bayes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site
from .from_posterior import PosteriorPrior
from .scales import FunctionSpacePrior, along, multiplied

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["EmpiricalBayes", "Hierarchical", "empirical_scales"]


@dataclass(frozen=True)
class Hierarchical(FunctionSpacePrior):
    """Every site has a scale of its own, and every layer another near it (partial pooling).

        log_scale   ~ N(-v, overall^2)           a site ("<site>.log_scale")
        log_layers  ~ N(log_scale, between^2)    each of its layers ("<site>.log_layers")
        weight      ~ N(loc, (sd * exp(log_layers))^2)

    With v = overall^2 + between^2 a weight's sd, the scales integrated out, is that of the other
    priors. Sites with layers are non-centred; the head, about which data say a lot, has only the
    first scale, and is not.

    Args:
        overall: sd of a site's log scale.
        between: sd of the log scales of its layers.

    >>> from bhpeft_pyro.head import Head
    >>> list(pyro.poutine.trace(Hierarchical()).get_trace(Head(3).sites(16)).stochastic_nodes)
    ['head.weight.log_scale', 'head.weight', 'head.bias.log_scale', 'head.bias']
    """

    overall: float = 0.5
    between: float = 0.5

    def sample(self, site: Site) -> Tensor:
        zero = site.unit.new_zeros(())
        layered = "layer" in site.dims
        variance = self.overall**2 + (self.between**2 if layered else 0.0)
        log_scale = pyro.sample(
            f"{site.name}.log_scale", dist.Normal(zero - variance, self.overall)
        )
        if not layered:
            return self.normal(site, along(log_scale, site, ()).exp())
        layers = log_scale.unsqueeze(-1).expand(*log_scale.shape, site.shape[0])
        log_layers = pyro.sample(
            f"{site.name}.log_layers", dist.Normal(layers, self.between).to_event(1)
        )
        factor = along(log_layers, site, ("layer",)).exp()
        return multiplied(site, self.loc(site), self.sd(site) * factor)


@dataclass(frozen=True)
class EmpiricalBayes(FunctionSpacePrior):
    """One scale a site, of maximum evidence: `empirical_scales` reads it off a fit.

        log_scale ~ N(0, wide^2),   weight ~ N(loc, (sd * exp(log_scale))^2)

    The hyperprior is so wide that it says nothing. A mean-field Normal guide then is empirical
    Bayes: the weights see the scale only through E[exp(-2 log_scale)], and at the optimum that is
    1 / mode^2, with the mode of q(scale) where the evidence lower bound of a fixed scale is
    highest. So draws of this prior itself mean little, and the numbers of `FunctionSpacePrior`
    are only where the scale starts. Where data say little about single weights, scale and weights
    follow each other slowly: give it epochs, or take `Hierarchical`.

    Args:
        wide: sd of the log scales.

    >>> from bhpeft_pyro.head import Head
    >>> list(pyro.poutine.trace(EmpiricalBayes()).get_trace(Head(3).sites(16)).stochastic_nodes)
    ['head.weight.log_scale', 'head.weight', 'head.bias.log_scale', 'head.bias']
    """

    wide: float = 5.0

    def sample(self, site: Site) -> Tensor:
        log_scale = pyro.sample(
            f"{site.name}.log_scale", dist.Normal(site.unit.new_zeros(()), self.wide)
        )
        return self.normal(site, along(log_scale, site, ()).exp())


def empirical_scales(posterior: Posterior) -> dict[str, float]:
    """The scales that a fit under `EmpiricalBayes` found, as multiples of the prior's own sds.

    Raises:
        PriorError: the posterior has no scale that depends on a site alone.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> model = tiny_model((), prior=EmpiricalBayes())
    >>> fitted = fit(model, "normal", tiny_examples(), max_steps=3, progress=False)
    >>> list(empirical_scales(fitted))
    ['head.weight', 'head.bias']
    """
    found = {}
    prior = posterior.as_prior()
    known = prior.distributions if isinstance(prior, PosteriorPrior) else {}
    for site in posterior.model.sites:
        q = known.get(f"{site.name}.log_scale")
        if q is not None and not q.event_shape:
            # The mode of a log-normal.
            found[site.name] = float(torch.exp(q.mean - q.variance))
    if not found:
        raise PriorError(
            "empirical_scales: this posterior has no '<site>.log_scale'; was it fitted under "
            f"EmpiricalBayes? It has {', '.join(known)}"
        )
    return found
