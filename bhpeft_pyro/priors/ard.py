"""Automatic relevance determination over LoRA's rank: components that are not needed go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site
from .scales import FunctionSpacePrior, along, log_of, multiplied

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["ARD", "effective_rank"]

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
