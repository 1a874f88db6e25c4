"""Heavy-tailed priors: most weights nearer to zero than a Normal's, a few much further away."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site
from .scales import FunctionSpacePrior

__all__ = ["Laplace", "StudentT"]


@dataclass(frozen=True)
class Laplace(FunctionSpacePrior):
    """Independent Laplace weights, of the sds that a `FunctionSpacePrior`'s numbers say.

    >>> from bhpeft_pyro.head import Head
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

    >>> from bhpeft_pyro.head import Head
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
