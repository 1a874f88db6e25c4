"""Scales that are learnt: pooled over layers, or as points by empirical Bayes.

Automatic relevance determination over LoRA's rank: components that are not needed go.
"""

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
from .scales import FunctionSpacePrior, along, log_of, multiplied

if TYPE_CHECKING:
    from ..posterior.posterior import Posterior

__all__ = [
    "ARD",
    "EmpiricalBayes",
    "Hierarchical",
    "effective_rank",
    "empirical_scales",
]


_DIMS = (("layer", "rank"), ("layer", "bottleneck"))


@dataclass(frozen=True)
class ARD(FunctionSpacePrior):
    """A scale for each layer and rank of LoRA's B, and for each bottleneck unit of adapters.

        log_ranks ~ log HalfNormal(1)             ("<site>.log_ranks", layer x rank)
        column    ~ N(0, (sd * exp(log_ranks))^2)

    A weight's sd, the scales integrated out, is that of the other priors; the half-Normal has
    mass near 0, where a column goes that the data do not need. A column of B off, its row of A
    does nothing, so A needs no scales of its own. All other sites are Normal.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> trace = pyro.poutine.trace(ARD()).get_trace(tiny_model().sites)
    >>> [name for name in trace.stochastic_nodes if "log" in name]
    ['lora.query.B.log_ranks', 'lora.value.B.log_ranks']
    """

    def sample(self, site: Site) -> Tensor:
        dims = _dims(site)
        if dims is None:
            return self.normal(site)
        sizes = [site.shape[site.dims.index(dim)] for dim in dims]
        log_ranks = pyro.sample(
            f"{site.name}.log_ranks",
            log_of(dist.HalfNormal(site.unit.new_ones(sizes))).to_event(len(dims)),
        )
        return multiplied(site, self.loc(site), self.sd(site) * along(log_ranks, site, dims).exp())


def effective_rank(
    posterior: Posterior, samples: int = 200, seed: int = 0
) -> dict[str, dict[int, float]]:
    """How many columns of LoRA's B (units of an adapter) a posterior makes use of, in each layer.

    With p_r the squared length of column r (the geometric mean over draws, as scales have heavy
    tails): (sum p)^2 / sum p^2. It is 1 if one column does everything, and the full rank if all are
    alike, as under a prior.

    Args:
        posterior: of a fit under any prior; only one such as `ARD` makes it small.
        samples: draws of the weights.
        seed: of the draws.

    Returns:
        Site to layer number to effective rank.

    Raises:
        PriorError: no LoRA or adapter among the sites.

    >>> from bhpeft_pyro import fit
    >>> from bhpeft_pyro.testing import tiny_examples, tiny_model
    >>> model = tiny_model(prior=ARD())
    >>> fitted = fit(model, "normal", tiny_examples(), max_steps=3, progress=False)
    >>> [list(layers) for layers in effective_rank(fitted).values()]
    [[0, 1], [0, 1]]
    """
    chosen = {site: dims for site in posterior.model.sites if (dims := _dims(site))}
    if not chosen:
        raise PriorError("effective_rank: the model has neither LoRA nor adapters")
    draws = posterior.sample(samples, seed)
    found = {}
    for site, dims in chosen.items():
        rest = [i + 1 for i, dim in enumerate(site.dims) if dim not in dims]
        log_power = draws[site.name].square().sum(rest).log().mean(0)
        power = log_power.softmax(-1)
        rank = 1 / power.square().sum(-1)
        found[site.name] = dict(zip(site.layers, rank.tolist(), strict=True))
    return found


def _dims(site: Site) -> tuple[str, str] | None:
    """The dims over which scales vary: of sites (layer, out, rank or bottleneck)."""
    if site.role != "output":
        return None
    return next((dims for dims in _DIMS if set(dims) <= set(site.dims)), None)


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

    >>> from bhpeft_pyro.model.head import Head
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

    >>> from bhpeft_pyro.model.head import Head
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
