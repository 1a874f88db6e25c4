"""The default prior: Normal, with scales set by what the weights do."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..peft.sites import Site
from .scales import FunctionSpacePrior

__all__ = ["FunctionSpaceNormal", "default"]


@dataclass(frozen=True)
class FunctionSpaceNormal(FunctionSpacePrior):
    """Independent Normals whose scales mean the same on every backbone.

    Args:
        change, spread, head, other: sds, as for every `FunctionSpacePrior`.

    >>> from bhpeft_pyro.head import Head
    >>> prior = FunctionSpaceNormal(head=2.0)
    >>> sorted(prior(Head(3).sites(16)))
    ['head.bias', 'head.weight']
    """

    def sample(self, site: Site) -> Tensor:
        return self.normal(site)


def default() -> FunctionSpaceNormal:
    """The prior used when none is given."""
    return FunctionSpaceNormal()
