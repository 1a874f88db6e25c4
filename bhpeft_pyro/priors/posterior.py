"""A fitted posterior as a prior: what closes the loop of sequential updating."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyro
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site
from .prior import Prior, complete

__all__ = ["PosteriorPrior"]


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
