"""Several posteriors, each over sites of its own, as one prior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pyro.distributions import TorchDistribution
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site
from .joint import JointPrior
from .posterior import PosteriorPrior

__all__ = ["BlockPrior"]


class BlockPrior:
    """Independent blocks: what a posterior of blocks is as a prior.

    Args:
        parts: no two with a site in common.

    >>> import torch
    >>> import pyro.distributions as dist
    >>> from bhpeft_pyro.distributions import Covariance, LowRankNormal
    >>> from bhpeft_pyro.head import Head
    >>> weight = LowRankNormal(torch.zeros(16), Covariance.diagonal(torch.ones(16)))
    >>> bias = dist.Normal(torch.zeros(2), 1.0).to_event(1)
    >>> parts = [JointPrior(weight, {"head.weight": (2, 8)}), PosteriorPrior({"head.bias": bias})]
    >>> sorted(BlockPrior(parts)(Head(2).sites(8)))
    ['head.bias', 'head.weight']
    """

    def __init__(self, parts: Iterable[JointPrior | PosteriorPrior]) -> None:
        self.parts = tuple(parts)

    def sites_of(self, part: JointPrior | PosteriorPrior, sites: Sequence[Site]) -> list[Site]:
        """Those of the sites that a part is a prior of."""
        known = part.shapes if isinstance(part, JointPrior) else part.distributions
        return [site for site in sites if site.name in known]

    @classmethod
    def of(
        cls, single: Mapping[str, TorchDistribution], joint: Sequence[JointPrior]
    ) -> BlockPrior | JointPrior | PosteriorPrior:
        """Of latents on their own, and of those that belong together: a prior of one part is that
        part itself."""
        parts: list[JointPrior | PosteriorPrior] = [*joint]
        if single or not joint:
            parts.insert(0, PosteriorPrior(single))
        return cls(parts) if len(parts) > 1 else parts[0]

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for part in self.parts:
            values |= part(self.sites_of(part, sites))
        if unknown := [site.name for site in sites if site.name not in values]:
            raise PriorError(f"prior: the earlier posterior has no site {', '.join(unknown)}")
        return values
