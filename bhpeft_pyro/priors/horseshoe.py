"""The regularised horseshoe (Piironen and Vehtari 2017): a few weights matter, most do not."""

from __future__ import annotations

from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..peft.sites import Site
from .scales import FunctionSpacePrior, along, log_of, multiplied

__all__ = ["Horseshoe"]


@dataclass(frozen=True)
class Horseshoe(FunctionSpacePrior):
    """A scale for every single weight, with much mass at zero and heavy tails up to a slab.

        log_tau   ~ log HalfCauchy(share)                 a site ("<site>.log_tau")
        log_local ~ log HalfCauchy(1)                     a weight ("<site>.log_local")
        weight    ~ N(loc, (sd * t / sqrt(1 + t^2))^2),   t = exp(log_tau + log_local)

    The numbers of `FunctionSpacePrior` are the sds of the slab: no weight is wider than that, and
    those that matter get there. It doubles the number of latents. It depends on the coordinates:
    "few weights" are few axes of the Fisher information in an aligned network.

    Args:
        share: roughly the share of weights that are expected to matter.

    >>> from bhpeft_pyro.head import Head
    >>> trace = pyro.poutine.trace(Horseshoe()).get_trace(Head(3).sites(16)[:1])
    >>> list(trace.stochastic_nodes)
    ['head.weight.log_tau', 'head.weight.log_local', 'head.weight.standard']
    """

    share: float = 0.1

    def sample(self, site: Site) -> Tensor:
        one = site.unit.new_ones(())
        log_tau = pyro.sample(f"{site.name}.log_tau", log_of(dist.HalfCauchy(self.share * one)))
        log_local = pyro.sample(
            f"{site.name}.log_local",
            log_of(dist.HalfCauchy(one.expand(site.shape))).to_event(site.ndim),
        )
        log_t = along(log_tau, site, ()) + log_local
        # t / sqrt(1 + t^2), which overflows for no t.
        share_of_slab = (2 * log_t).sigmoid().sqrt()
        return multiplied(site, self.loc(site), self.sd(site) * share_of_slab)
