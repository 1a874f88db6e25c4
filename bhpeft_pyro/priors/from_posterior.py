"""A fitted posterior as a prior: what closes the loop of sequential updating.

A posterior over all weights at once as a prior.

Several posteriors, each over sites of its own, as one prior.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from operator import itemgetter
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ..distributions import LowRankNormal
from ..errors import PriorError
from ..peft.sites import Site
from .prior import Prior, complete

__all__ = [
    "JOINT",
    "BlockPrior",
    "JointPrior",
    "PosteriorPrior",
    "apart",
    "joint_name",
    "unpack",
]


class PosteriorPrior:
    """Yesterday's posterior, matched to today's sites by name and shape.

    Args:
        distributions: one per site, as `Guide.distributions()` gives them; the latents that
            the earlier prior had besides its sites (scales, gates) are among them.
        structure: the earlier prior, if it makes sites out of its other latents; it goes on to.

    >>> import pyro.distributions as dist
    >>> prior = PosteriorPrior({"tau": dist.LogNormal(0., 1.)})
    >>> sorted(prior([]))
    ['tau']
    """

    def __init__(
        self, distributions: Mapping[str, TorchDistribution], structure: Prior | None = None
    ) -> None:
        self.distributions = dict(distributions)
        self.structure = structure

    def covers(self, sites: Sequence[Site]) -> bool:
        """Whether every site has a distribution of its own."""
        return all(site.name in self.distributions for site in sites)

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        for site in sites:
            known = self.distributions.get(site.name)
            if known is None:
                if self.structure is not None:
                    continue
                raise PriorError(
                    f"prior: the earlier posterior has no site {site.name!r}; it has "
                    f"{', '.join(self.distributions)}"
                )
            if tuple(known.event_shape) != site.shape:
                raise PriorError(
                    f"prior: the earlier posterior's site {site.name!r} has shape "
                    f"{tuple(known.event_shape)}, this model's {site.shape}"
                )
        values = {name: pyro.sample(name, known) for name, known in self.distributions.items()}
        made = [site for site in sites if site.name not in values]
        if self.structure is not None and made:
            whole = complete(self.structure, sites, values)
            for site in made:
                values[site.name] = pyro.deterministic(
                    site.name, whole[site.name], event_dim=site.ndim
                )
        return values


JOINT = "weights"
"""Name of the latent that holds all weights; of those that hold some, what it begins with."""


class JointPrior:
    """One Normal over all weights; sites are parts of its draw, matched by name and shape.

    Args:
        normal: over vectors of D weights.
        shapes: of the sites, in the order in which they lie in a draw.
        name: of the latent.

    >>> import torch
    >>> from bhpeft_pyro.distributions import Covariance
    >>> normal = LowRankNormal(torch.zeros(3), Covariance.diagonal(torch.ones(3)))
    >>> sorted(JointPrior(normal, {"head.bias": (3,)})([]))
    ['head.bias']
    """

    def __init__(
        self, normal: LowRankNormal, shapes: Mapping[str, tuple[int, ...]], name: str = JOINT
    ) -> None:
        self.normal, self.shapes, self.name = normal, dict(shapes), name

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        for site in sites:
            if (known := self.shapes.get(site.name)) != site.shape:
                raise PriorError(
                    f"prior: this model's site {site.name!r} has shape {site.shape}, in the "
                    f"earlier posterior {'it has ' + str(known) if known else 'there is none'}"
                )
        infer: Any = {"sites": self.shapes}  # a guide has to know what it is made of
        values = unpack(pyro.sample(self.name, self.normal, infer=infer), self.shapes)
        return {
            name: pyro.deterministic(name, value, event_dim=len(self.shapes[name]))
            for name, value in values.items()
        }

    def marginal(self, sites: Collection[str]) -> JointPrior:
        """That of some of its sites, in its own order, with the correlations among them."""
        shapes = {name: shape for name, shape in self.shapes.items() if name in sites}
        if len(shapes) == len(self.shapes):
            return self
        places = unpack(torch.arange(len(self.normal.loc)), self.shapes)
        index = torch.cat([places[name].flatten() for name in shapes]).to(self.normal.loc.device)
        covariance = self.normal.covariance.marginal(index)
        normal = LowRankNormal(self.normal.loc[index], covariance)
        return JointPrior(normal, shapes, joint_name(shapes))


def joint_name(sites: Iterable[str]) -> str:
    """The latent's name where it holds only some of a model's sites."""
    return f"{JOINT}[{', '.join(sites)}]"


def apart(
    trace: poutine.Trace, take: Callable[[Any], Tensor] = itemgetter("value")
) -> dict[str, Tensor]:
    """The latents of a trace, auxiliary ones left out, a joint one as the sites it is made of.

    Args:
        trace: of a prior or a guide.
        take: from a node to what is wanted of it.
    """
    found: dict[str, Tensor] = {}
    nodes: dict[str, Any] = dict(trace.iter_stochastic_nodes())
    for name, node in nodes.items():
        if sites := node["infer"].get("sites"):
            found |= unpack(take(node), sites)
        elif not (name in found or node["infer"].get("is_auxiliary") or site_is_subsample(node)):
            found[name] = take(node)
    return found


def unpack(flat: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`(*P, D)` to a tensor `(*P, *shape)` for each of the shapes, in their order."""
    ends = [0, *accumulate(map(prod, shapes.values()))]
    return {
        name: flat[..., start:end].reshape((*flat.shape[:-1], *shape))
        for (name, shape), start, end in zip(shapes.items(), ends, ends[1:], strict=False)
    }


class BlockPrior:
    """Independent blocks: what a posterior of blocks is as a prior.

    Args:
        parts: no two with a site in common.

    >>> import torch
    >>> import pyro.distributions as dist
    >>> from bhpeft_pyro.distributions import Covariance, LowRankNormal
    >>> from bhpeft_pyro.model.head import Head
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
