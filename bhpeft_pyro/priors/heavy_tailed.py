"""Heavy-tailed priors: most weights nearer to zero than a Normal's, a few much further away.

The regularised horseshoe (Piironen and Vehtari 2017): a few weights matter, most do not.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site
from .scales import FunctionSpacePrior, along, log_of, multiplied

__all__ = [
    "Horseshoe",
    "Laplace",
    "StudentT",
]


@dataclass(frozen=True)
class Laplace(FunctionSpacePrior):
    """Independent Laplace weights, of the sds that a `FunctionSpacePrior`'s numbers say.

    >>> from bhpeft_pyro.model.head import Head
    >>> sorted(Laplace(head=1.0)(Head(3).sites(16)))
    ['head.bias', 'head.weight']
    """

    def sample(self, site: Site) -> Tensor:
        laplace = dist.Laplace(self.loc(site), self.sd(site) / math.sqrt(2))
        value: Tensor = pyro.sample(site.name, laplace.expand(site.shape).to_event(site.ndim))
        return value


@dataclass(frozen=True)
class StudentT(FunctionSpacePrior):
    """Independent Student-t weights, of the sds that a `FunctionSpacePrior`'s numbers say.

    Args:
        df: degrees of freedom, above 2 so that there is an sd; the smaller, the heavier the tails.

    >>> from bhpeft_pyro.model.head import Head
    >>> sorted(StudentT(df=3.0)(Head(3).sites(16)))
    ['head.bias', 'head.weight']
    """

    df: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.df > 2:
            raise PriorError(f"StudentT: df must be above 2 for an sd to exist, got {self.df}")

    def sample(self, site: Site) -> Tensor:
        scale = self.sd(site) * math.sqrt((self.df - 2) / self.df)
        student = dist.StudentT(self.df, self.loc(site), scale)
        value: Tensor = pyro.sample(site.name, student.expand(site.shape).to_event(site.ndim))
        return value


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

    >>> from bhpeft_pyro.model.head import Head
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
