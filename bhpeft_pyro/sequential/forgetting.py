"""Forgetting: a prior between the last posterior and the first prior."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..checks import SHARE, check_fields, string
from ..errors import BHPEFTError, ConfigError
from ..patterns import check_used, first_match
from ..peft.sites import Site
from ..priors import Prior, closed_form, independent_normals


def _keep(name: str, value: Any, error: type[BHPEFTError]) -> float | dict[str, float]:
    if isinstance(value, Mapping):
        return {string(name, key): SHARE(f"{name}[{key!r}]", each) for key, each in value.items()}
    return SHARE(name, value, error)


@dataclass(frozen=True)
class Forgetting:
    """The power prior p(w) = q(w)^keep p0(w)^(1 - keep) / Z, with q the last posterior and p0 the
    first prior.

    As q is p0 times a likelihood, this is p0 times that likelihood to the power `keep` (Ibrahim and
    Chen 2000). After R rounds the first round's evidence counts keep^(R - 1). For independent
    Normals q = N(m, s^2) and p0 = N(m0, s0^2):

        1 / v = keep / s^2 + (1 - keep) / s0^2
        mean  = v (keep m / s^2 + (1 - keep) m0 / s0^2)

    For a joint Normal the precision matrices are averaged in the same way.

    Args:
        keep: from 0 (start again) to 1 (forget nothing), or a mapping from patterns of site names
            to such numbers. The first pattern that matches a site is used; sites that no pattern
            matches are kept.

    Raises:
        ConfigError: `keep` is out of range.

    >>> import torch
    >>> import pyro.distributions as dist
    >>> from bhpeft_pyro.priors import PosteriorPrior
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

    def __post_init__(self) -> None:
        check_fields(self, {"keep": _keep})

    def share(self, site: str) -> float:
        """`keep` at a site."""
        if not isinstance(self.keep, Mapping):
            return self.keep
        pattern = first_match(site, self.keep)
        return 1.0 if pattern is None else self.keep[pattern]

    def __call__(self, posterior: Prior, first: Prior | None, sites: Sequence[Site]) -> Prior:
        """The next round's prior, from q, p0 and the model's sites.

        Raises:
            ConfigError: a pattern matches no site.
            PriorError: p0 is unknown, q or p0 is not Normal at a site with keep < 1, or q is joint
                and `keep` differs between sites.
        """
        if isinstance(self.keep, Mapping):
            check_used((site.name for site in sites), self.keep, "keep", ConfigError)
        keep = {site.name: self.share(site.name) for site in sites}
        keep = {name: share for name, share in keep.items() if share < 1}
        if not keep:
            return posterior
        known = closed_form(posterior, "keep")
        firsts = independent_normals(first, sites, keep, "keep")
        return known.tempered(keep, firsts)
