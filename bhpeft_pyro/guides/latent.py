"""What a guide must cover: the latent variables of a model's prior."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from ..errors import PriorError
from ..model import Model
from ..peft.sites import Site
from ..priors import checked

__all__ = ["Latent", "is_real", "latents"]


@dataclass(frozen=True, eq=False)
class Latent:
    """One latent variable, in unconstrained coordinates.

    Attributes:
        name: its site.
        support: where its values live; `biject_to(support)` maps there.
        loc: where a guide starts.
        scale: the prior's sd, where a guide's sd starts.
    """

    name: str
    support: Constraint
    loc: Tensor
    scale: Tensor


def is_real(support: Constraint | None) -> bool:
    """Whether values on this support are already unconstrained."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))  # a copied guide has copies of it


def latents(model: Model) -> list[Latent]:
    """The latents of a model, found by running its prior once.

    PEFT and head sites start at their prior's mean, or at their own `init` if it is zero (or
    there is none); what a prior samples besides (scales, gates) starts at the value drawn. The
    global random state is left as it was.

    Raises:
        PriorError: a site was sampled with independent (batch) dims: plates and mini-batches
            need all dims of a weight to be event dims.
    """
    sites = {site.name: site for site in model.sites}
    device = model.network.device
    with torch.random.fork_rng(devices=[]), torch.no_grad(), poutine.block():
        trace = poutine.trace(checked).get_trace(model.prior, model.sites)
    found = []
    for name, node in trace.iter_stochastic_nodes():
        fn: Any = node["fn"]
        if len(fn.batch_shape):
            raise PriorError(
                f"prior: the site {name!r} has batch shape {tuple(fn.batch_shape)}, expected (): "
                "declare its dims as events with .to_event()"
            )
        if fn.support.is_discrete:
            raise PriorError(f"prior: the site {name!r} is discrete; guides need continuous ones")
        support = fn.support
        transform = biject_to(support)
        start: Any = _start(fn, sites[name]) if name in sites else node["value"]
        loc = transform.inv(start.to(device)).detach().clone()
        found.append(Latent(name, support, loc, _prior_scale(fn, loc, sites.get(name))))
    missing = sites.keys() - {latent.name for latent in found}
    if missing:
        raise PriorError(f"prior: it has no sample statement for {', '.join(sorted(missing))}")
    return found


def _start(fn: Any, site: Site) -> Tensor:
    """The prior mean where it says something; zero would be a saddle of BA."""
    try:
        mean: Tensor = fn.mean
    except NotImplementedError:
        return site.init()
    return mean.clone() if mean.isfinite().all() and mean.any() else site.init()


def _prior_scale(fn: TorchDistribution, loc: Tensor, site: object) -> Tensor:
    """The prior's sd where there is one on the unconstrained scale; a site's unit, or 1, if not."""
    fallback = getattr(site, "unit", torch.ones(()))
    scale = fallback.to(loc).expand(loc.shape)
    if is_real(fn.support):
        try:
            sd = fn.stddev.to(loc)
        except NotImplementedError:
            return scale.clone()
        scale = torch.where(sd.isfinite() & (sd > 0), sd.expand(loc.shape), scale)
    return scale.clone()
