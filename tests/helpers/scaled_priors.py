"""Priors that sample more than the sites."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bhpeft_pyro.peft.sites import Site


def with_extras(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Besides the sites a positive scale, a share and a simplex."""
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(3)).to_event(1))
    pyro.sample("share", dist.Beta(2.0, 2.0))
    pyro.sample("mix", dist.Dirichlet(torch.ones(4)))
    return {
        site.name: pyro.sample(
            site.name,
            dist.Normal(0.0, tau[..., 0].reshape(tau.shape[:-1] + (1,) * site.ndim))
            .expand(tau.shape[:-1] + site.shape)
            .to_event(site.ndim),
        )
        for site in sites
    }


def with_scales_named(pattern: str) -> Any:
    def prior(sites: Sequence[Site]) -> dict[str, Tensor]:
        values = {}
        for s in sites:
            tau = pyro.sample(pattern.format(s.name), dist.LogNormal(0.0, 0.5))
            normal = dist.Normal(0.0, tau.reshape(*tau.shape, *[1] * s.ndim))
            wide = normal.expand((*tau.shape, *s.shape)).to_event(s.ndim)
            values[s.name] = pyro.sample(s.name, wide)
        return values

    return prior
