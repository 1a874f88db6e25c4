"""Fitted posteriors as priors, for sequential updating."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from ..base.distributions import Covariance, LowRankNormal, base_of
from ..errors import PriorError
from ..peft.sites import Site
from .prior import Prior, complete

JOINT = "weights"
"""Name of the latent that holds all weights."""

Moments = Mapping[str, tuple[Tensor, Tensor]]
"""Mean and sd of each site, of its shape."""


class PosteriorPrior:
    """An earlier posterior with a distribution for each latent, matched by name and shape.

    Args:
        distributions: from `Guide.distributions()`: of sites, and of other latents such as scales.
        structure: the earlier prior, if it computes sites from other latents.

    >>> prior = PosteriorPrior({"tau": dist.LogNormal(0., 1.)})
    >>> sorted(prior([]))
    ['tau']
    """

    vectorised = True

    def __init__(
        self, distributions: Mapping[str, TorchDistribution], structure: Prior | None = None
    ) -> None:
        self.distributions = {name: q.to_event() for name, q in distributions.items()}
        self.structure = structure

    def __repr__(self) -> str:
        count = sum(latent.event_shape.numel() for latent in self.distributions.values())
        return f"an earlier posterior of {count:,} independent weights: " + ", ".join(
            self.distributions
        )

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        for site in sites:
            latent = self.distributions.get(site.name)
            if latent is not None or self.structure is None:
                _check_shape(site, None if latent is None else tuple(latent.event_shape))
        values = {name: pyro.sample(name, latent) for name, latent in self.distributions.items()}
        made = [site for site in sites if site.name not in values]
        if self.structure is not None and made:
            whole = complete(self.structure, sites, values)
            for site in made:
                values[site.name] = pyro.deterministic(
                    site.name, whole[site.name], event_dim=site.ndim
                )
        return values

    def independent(self) -> PosteriorPrior:
        """The nearest prior without correlations between sites: itself."""
        return self

    def tempered(self, keep: float, first: Moments) -> PosteriorPrior:
        """The normalised q^keep p0^(1 - keep), with q this prior (`posterior.forgetting`).

        Args:
            keep: the power.
            first: p0 by site.

        Raises:
            PriorError: a site is not Normal under q.
        """
        normals = moments_of(self.distributions, first, "keep")
        mixed = dict(self.distributions)
        for name, (m0, s0) in first.items():
            m, s = normals[name]
            precision = keep * s**-2 + (1 - keep) * s0**-2
            mean = (keep * m * s**-2 + (1 - keep) * m0 * s0**-2) / precision
            mixed[name] = dist.Normal(mean, precision.rsqrt()).to_event(mean.dim())
        return PosteriorPrior(mixed, self.structure)


class JointPrior:
    """One Normal over all weights, of which sites are parts, matched by name and shape.

    Args:
        normal: of vectors of D weights.
        shapes: of the sites, in the order of their weights in the vector.
        name: of the latent variable.
        open: whether a `laplace` guide sets the scales of the first round's prior in it.

    >>> normal = LowRankNormal(torch.zeros(3), Covariance.diagonal(torch.ones(3)))
    >>> sorted(JointPrior(normal, {"head.bias": (3,)})([]))
    ['head.bias']
    """

    vectorised = True

    def __init__(
        self,
        normal: LowRankNormal,
        shapes: Mapping[str, tuple[int, ...]],
        name: str = JOINT,
        open: bool = False,
    ) -> None:
        self.normal, self.shapes, self.name, self.open = normal, dict(shapes), name, open

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return self.sample(sites, self.normal)

    def sample(self, sites: Sequence[Site], whole: TorchDistribution) -> dict[str, Tensor]:
        """Sample the latent from a distribution, for the sites."""
        for site in sites:
            _check_shape(site, self.shapes.get(site.name))
        infer: Any = {"sites": self.shapes}  # for guides
        values = unpack(pyro.sample(self.name, whole, infer=infer), self.shapes)
        return {
            name: pyro.deterministic(name, value, event_dim=len(self.shapes[name]))
            for name, value in values.items()
        }

    def __repr__(self) -> str:
        count, rank = len(self.normal.loc), self.normal.covariance.rank
        return f"an earlier posterior of {count:,} weights with rank {rank}: " + ", ".join(
            self.shapes
        )

    def with_fixed_scales(self) -> JointPrior:
        """This prior, with scales that no guide sets."""
        return JointPrior(self.normal, self.shapes, self.name)

    def moments(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and sd of each site."""
        means, sds = (
            unpack(part.clone(), self.shapes) for part in (self.normal.loc, self.normal.stddev)
        )
        return {name: (means[name], sds[name]) for name in self.shapes}

    def marginal(self, sites: Collection[str]) -> JointPrior:
        """The marginal of some sites, with the correlations among them."""
        shapes = {name: shape for name, shape in self.shapes.items() if name in sites}
        if len(shapes) == len(self.shapes):
            return self
        index = places(self.shapes, shapes).to(self.normal.loc.device)
        covariance = self.normal.covariance.marginal(index)
        return JointPrior(LowRankNormal(self.normal.loc[index], covariance), shapes, self.name)

    def independent(self) -> PosteriorPrior:
        """The independent Normals p with the least KL(q || p) from this q: those with the means and
        sds of q, as in assumed density filtering (Opper 1998)."""
        normals = {
            name: dist.Normal(mean, sd).to_event(mean.dim())
            for name, (mean, sd) in self.moments().items()
        }
        return PosteriorPrior(normals)

    def tempered(self, keep: float, first: Moments) -> JointPrior:
        """q^keep p0^(1 - keep) by an average of precision matrices."""
        loc, sd = (torch.cat([first[name][i].flatten() for name in self.shapes]) for i in range(2))
        old, rest = self.normal.covariance, (1 - keep) * sd**-2
        root = keep**0.5 * old.precision_root()
        covariance = Covariance.from_precision(keep * old.scale**-2 + rest, root)
        # As a difference from the old mean, which is exact where the posterior is narrow.
        mean = self.normal.loc + covariance.apply(rest * (loc - self.normal.loc))
        return JointPrior(LowRankNormal(mean, covariance), self.shapes, self.name, self.open)


def _check_shape(site: Site, shape: tuple[int, ...] | None) -> None:
    if shape != site.shape:
        there = "there is no such site" if shape is None else f"its shape is {shape}"
        raise PriorError(
            f"prior: this model's site {site.name!r} has shape {site.shape}; in the earlier "
            f"posterior {there}"
        )


def unpack(flat: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """From `(*P, D)` to a tensor `(*P, *shape)` for each of the shapes, in order."""
    ends = [0, *accumulate(map(prod, shapes.values()))]
    return {
        name: flat[..., start:end].reshape((*flat.shape[:-1], *shape))
        for (name, shape), start, end in zip(shapes.items(), ends, ends[1:], strict=False)
    }


def places(shapes: Mapping[str, tuple[int, ...]], names: Iterable[str]) -> Tensor:
    """Where the weights of some sites are in the vector that `unpack` takes, site by site."""
    numbers = unpack(torch.arange(sum(map(prod, shapes.values()))), shapes)
    return torch.cat([numbers[name].flatten() for name in names])


def moments_of(
    distributions: Mapping[str, Any], names: Iterable[str], purpose: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and sd of some Normals; another distribution is a PriorError."""
    moments = {}
    for name in names:
        fn: Any = distributions.get(name)
        base = base_of(fn)
        if not isinstance(base, dist.Normal):
            raise PriorError(
                f"{purpose}: {name!r} is {type(base).__name__} under the prior; expected Normal"
            )
        shape = fn.event_shape
        moments[name] = (base.loc.expand(shape).clone(), base.scale.expand(shape).clone())
    return moments
