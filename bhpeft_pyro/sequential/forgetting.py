"""Forgetting on purpose: a prior between the last posterior and the first prior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from ..distributions import Covariance, LowRankNormal, base_of
from ..errors import ConfigError, PriorError
from ..patterns import check_used, first_match
from ..peft.sites import Site
from ..plain import make_plain
from ..priors import BlockPrior, JointPrior, PosteriorPrior, Prior, checked, unpack

__all__ = ["Forgetting", "normals"]

P = TypeVar("P", bound=Prior)


@dataclass(frozen=True)
class Forgetting:
    """The power prior p(w) = q(w)^keep p0(w)^(1 - keep) / Z, q the posterior, p0 the first prior.

    As q is p0 times a likelihood, this is p0 times the likelihood to the power `keep`: the power
    prior of Ibrahim and Chen (2000), as if a share `keep` of the old evidence had been seen. After
    R rounds the first round's evidence counts keep^(R - 1). For independent Normals
    q = N(m, s^2) and p0 = N(m0, s0^2) the exponents add up, weight by weight:

        1 / v = keep / s^2 + (1 - keep) / s0^2
        mean  = v (keep m / s^2 + (1 - keep) m0 / s0^2)

    so precisions are averaged, and each mean with its precision.

    Args:
        keep: from 0 (start anew) to 1 (forget nothing); or a mapping from patterns of site names,
            of which the first that matches holds; other sites are kept.
        floor: then no sd is less than this share of the first prior's, so every weight can still
            move, however many rounds there have been.

    Raises:
        ConfigError: `keep` or `floor` out of range.

    >>> q = {"w": dist.Normal(torch.tensor([3.0]), 0.5).to_event(1)}
    >>> p0 = {"w": dist.Normal(torch.tensor([0.0]), 1.0).to_event(1)}
    >>> site = Site("w", (1,), ("in",), torch.ones(1), lambda: torch.zeros(1))
    >>> forget = Forgetting(keep=0.5)
    >>> prior = forget(PosteriorPrior(q), PosteriorPrior(p0), [site])
    >>> normal = prior.distributions["w"]        # precision (4 + 1) / 2, mean 4 * 3 / (4 + 1)
    >>> normal.variance.item(), round(normal.mean.item(), 4)
    (0.4000..., 2.4)
    """

    keep: float | Mapping[str, float] = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        make_plain(self)
        shares = self.keep.values() if isinstance(self.keep, Mapping) else [self.keep]
        for share in shares:
            if not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ConfigError(f"keep={self.keep!r} must be a number in [0, 1]")
        if not isinstance(self.floor, int | float) or not 0 <= self.floor <= 1:
            raise ConfigError(f"floor={self.floor!r} must be a number in [0, 1]")

    def share(self, site: str) -> float:
        """How much of a site's posterior is kept."""
        if not isinstance(self.keep, Mapping):
            return self.keep
        pattern = first_match(site, self.keep)
        return 1.0 if pattern is None else self.keep[pattern]

    def __call__(self, posterior: Prior, first: Prior | None, sites: Sequence[Site]) -> Prior:
        """The next round's prior.

        Args:
            posterior: q, as `Posterior.as_prior` gives it.
            first: p0.
            sites: the model's.

        Raises:
            ConfigError: a pattern that matches no site.
            PriorError: p0 is unknown; or a site that is to be forgotten has no independent Normal
                in q or in p0 (q may also be that of a `lowrank` guide, or block).
        """
        if isinstance(self.keep, Mapping):
            check_used((site.name for site in sites), self.keep, "keep", ConfigError)
        if isinstance(posterior, BlockPrior):
            return BlockPrior(
                self._of_block(part, first, sites, posterior.sites_of(part, sites))
                for part in posterior.parts
            )
        if isinstance(posterior, JointPrior):
            return self._of_joint(posterior, first, sites)
        return self._of_sites(posterior, first, sites, sites)

    def _of_block(
        self,
        part: JointPrior | PosteriorPrior,
        first: Prior | None,
        sites: Sequence[Site],
        own: Sequence[Site],
    ) -> JointPrior | PosteriorPrior:
        if isinstance(part, PosteriorPrior):
            return self._of_sites(part, first, sites, own)
        shares = {self.share(site.name) for site in own}
        alike = replace(self, keep=shares.pop()) if len(shares) == 1 else self
        return alike._of_joint(part, first, sites)

    def _of_sites(
        self, posterior: P, first: Prior | None, sites: Sequence[Site], own: Sequence[Site]
    ) -> P | PosteriorPrior:
        """For independent Normals: each of the sites that are its `own`."""
        changed = [s.name for s in own if self.floor > 0 or self.share(s.name) < 1]
        if not changed:
            return posterior
        old = normals(posterior, own, changed, "keep, floor")
        new = normals(first, sites, changed, "keep, floor")
        assert isinstance(posterior, PosteriorPrior)
        mixed = dict(posterior.distributions)
        for name in changed:
            keep = self.share(name)
            (m, s), (m0, s0) = old[name], new[name]
            precision = keep * s**-2 + (1 - keep) * s0**-2
            mean = (keep * m * s**-2 + (1 - keep) * m0 * s0**-2) / precision
            sd = precision.rsqrt().maximum(self.floor * s0)
            mixed[name] = dist.Normal(mean, sd).to_event(mean.dim())
        return PosteriorPrior(mixed)

    def _of_joint(
        self, posterior: JointPrior, first: Prior | None, sites: Sequence[Site]
    ) -> JointPrior:
        """For one Normal over several sites: precision matrices are averaged."""
        if self.keep == 1 and self.floor == 0:
            return posterior
        if isinstance(self.keep, Mapping) or self.floor > 0:
            raise PriorError(
                f"keep, floor: a joint posterior of {', '.join(posterior.shapes)} has no parts; "
                "expected keep as one number for them all, and no floor"
            )
        names = list(posterior.shapes)
        found = normals(first, sites, names, "keep").values()
        loc, sd = (
            torch.cat([part.flatten() for part in parts]) for parts in zip(*found, strict=True)
        )
        old, rest = posterior.normal.covariance, (1 - self.keep) * sd**-2
        root = self.keep**0.5 * old.precision_root()
        covariance = Covariance.from_precision(self.keep * old.scale**-2 + rest, root)
        # By its difference from the old one, which is exact where that is sharp.
        mean = posterior.normal.loc + covariance.apply(rest * (loc - posterior.normal.loc))
        normal = LowRankNormal(mean, covariance)
        return JointPrior(normal, posterior.shapes, posterior.name)


def normals(
    prior: Prior | None, sites: Sequence[Site], names: Iterable[str], purpose: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and sd of the sites `names` under a prior of independent Normals.

    Raises:
        PriorError: it is unknown, or no such prior. (One that samples anything besides the sites,
            such as a scale of theirs, is refused: they may depend on it.)
    """
    if prior is None:
        raise PriorError(
            f"{purpose}: the first prior is a function of your own; pass prior=... to "
            "Posterior.load"
        )
    if isinstance(prior, JointPrior) and not prior.normal.covariance.rank:
        means, sds = (
            unpack(part, prior.shapes) for part in (prior.normal.loc, prior.normal.covariance.scale)
        )
        return {name: (means[name].clone(), sds[name].clone()) for name in names}
    with torch.random.fork_rng(range(torch.cuda.device_count())), torch.no_grad(), poutine.block():
        trace = poutine.trace(checked).get_trace(prior, sites)
    nodes: dict[str, Any] = dict(trace.iter_stochastic_nodes())
    if others := nodes.keys() - {site.name for site in sites}:
        raise PriorError(
            f"{purpose}: the prior also samples {', '.join(sorted(others))}, on which its sites "
            "may depend; there is a closed form for independent Normals only"
        )
    found = {}
    for name in names:
        fn = nodes[name]["fn"]
        base = base_of(fn)
        if not isinstance(base, dist.Normal):
            raise PriorError(
                f"{purpose}: {name!r} is {type(base).__name__} under the prior; expected Normal"
            )
        shape = nodes[name]["value"].shape
        found[name] = (base.loc.expand(shape).clone(), base.scale.expand(shape).clone())
    return found
