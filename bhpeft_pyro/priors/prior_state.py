"""Priors as plain data and tensors, to save them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal, constraints
from torch.distributions.constraints import Constraint

from ..base.distributions import Constrained, Covariance, LowRankNormal, base_of
from ..base.user_code import given_for, path_of
from ..errors import SaveError
from .from_posterior import JointPrior, MixturePrior, PosteriorPrior
from .prior import Prior, PriorLike, as_prior


def describe(prior: Any, part: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A prior as plain data and tensors whose names start with `part`; a user's own prior by its
    import path. Raises a SaveError if a latent is not Normal in unconstrained coordinates."""
    if _ready(type(prior).__name__) is type(prior):
        return {"kind": "ready", "class": type(prior).__name__, **asdict(prior)}, {}
    if isinstance(prior, JointPrior):
        covariance = prior.normal.covariance
        tensors = {f"{part}.loc": prior.normal.loc}
        tensors |= {f"{part}.{name}": getattr(covariance, name) for name in _COVARIANCE}
        plain = {"name": prior.name, "shapes": prior.shapes, "open": prior.open}
        return {"kind": "joint", **plain}, tensors
    if isinstance(prior, MixturePrior):
        parts, tensors = [], {}
        for number, block in enumerate(prior.parts):
            description, more = describe(block, f"{part}.{number}")
            if description["kind"] == "custom":
                return description, {}
            parts.append(description)
            tensors |= more
        return {"kind": "mixture", "parts": parts}, tensors
    if isinstance(prior, PosteriorPrior):
        tensors, supports = {}, {}
        for name, latent in prior.distributions.items():
            normal, supports[name] = _describe_latent(name, latent)
            tensors |= {f"{part}.{name}.loc": normal.loc, f"{part}.{name}.scale": normal.scale}
        # In the order of draws, so that a seed gives the same draws after loading.
        return {
            "kind": "posterior",
            "latents": list(supports.items()),
            "structure": prior.structure and describe(prior.structure, part)[0],
        }, tensors
    return {"kind": "custom", "path": path_of(prior)}, {}


def revive(
    description: dict[str, Any], tensors: dict[str, Tensor], part: str, given: PriorLike | None
) -> Prior:
    """The inverse of `describe`, with `given` in place of a user's own prior."""
    fields = dict(description)
    kind = fields.pop("kind")
    if kind == "ready":
        if (ready := _ready(name := fields.pop("class"))) is None:
            raise SaveError(f"path: the saved posterior uses an unknown prior, {name!r}")
        return as_prior(ready(**fields))
    if kind == "joint":
        shapes = {name: tuple(shape) for name, shape in fields["shapes"].items()}
        covariance = Covariance(*(tensors[f"{part}.{name}"] for name in _COVARIANCE))
        normal = LowRankNormal(tensors[f"{part}.loc"], covariance)
        return JointPrior(normal, shapes, fields["name"], fields.get("open", False))
    if kind == "mixture":
        parts = enumerate(fields["parts"])
        return MixturePrior([revive(own, tensors, f"{part}.{n}", given) for n, own in parts])
    if kind == "posterior":
        structure, distributions = fields["structure"], {}
        for name, support in fields["latents"]:
            loc, scale = tensors[f"{part}.{name}.loc"], tensors[f"{part}.{name}.scale"]
            distributions[name] = _revive_latent(loc, scale, support)
        return PosteriorPrior(distributions, structure and revive(structure, tensors, part, given))
    if kind != "custom":
        raise SaveError(f"path: the saved posterior uses an unknown kind of prior, {kind!r}")
    own: Prior = given_for("prior", fields["path"], given if given is None else as_prior(given))
    return own


def needs_given(description: dict[str, Any]) -> bool:
    """Whether a user's own prior is a part of what is described."""
    parts = [*description.get("parts", ()), description.get("structure")]
    return description["kind"] == "custom" or any(map(needs_given, filter(None, parts)))


def moved(prior: Prior, change: Callable[[Tensor], Tensor]) -> Prior:
    """An earlier posterior with changed tensors, for example on another device; any other prior is
    returned as it is."""
    try:
        description, tensors = describe(prior, "prior")
    except SaveError:
        return prior
    changed = {name: change(value) for name, value in tensors.items()}
    if all(changed[name] is value for name, value in tensors.items()):
        return prior
    parts = getattr(prior, "parts", [prior])
    structures = (getattr(part, "structure", None) for part in parts)
    return revive(description, changed, "prior", next(filter(None, structures), None))


_COVARIANCE = ("scale", "axes", "ratio")
_SUPPORTS: dict[str, type[Constraint]] = {
    "greater than": constraints.greater_than,
    "at least": constraints.greater_than_eq,
    "less than": constraints.less_than,
    "interval": constraints.interval,
    "half-open interval": constraints.half_open_interval,
    "simplex": type(constraints.simplex),
}


def _describe_latent(name: str, latent: TorchDistribution) -> tuple[Normal, dict[str, Any] | None]:
    """A Normal in unconstrained coordinates, and the support; None for the reals."""
    base, described = base_of(latent), None
    if isinstance(base, Constrained):
        support: Any = base.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        known = next((key for key, cls in _SUPPORTS.items() if type(support) is cls), None)
        if known is None:
            raise SaveError(
                f"prior: {name!r} of the earlier posterior has the support {support}, which cannot "
                f"be saved; expected one of {', '.join(_SUPPORTS)}"
            )
        bounds = {key: torch.as_tensor(bound).tolist() for key, bound in vars(support).items()}
        described, base = {"kind": known, **bounds}, base_of(base.base_dist)
    if not isinstance(base, Normal):
        raise SaveError(
            f"prior: {name!r} of the earlier posterior is {type(base).__name__}, which cannot be "
            "saved; expected a Normal in unconstrained coordinates"
        )
    return base, described


def _revive_latent(
    loc: Tensor, scale: Tensor, described: dict[str, Any] | None
) -> TorchDistribution:
    normal = dist.Normal(loc, scale).to_event(loc.dim())
    if described is None:
        return normal
    bounds = dict(described)
    support = _SUPPORTS[bounds.pop("kind")](
        **{k: loc.new_tensor(v) if isinstance(v, list) else v for k, v in bounds.items()}
    )
    if loc.dim() > support.event_dim:
        support = constraints.independent(support, loc.dim() - support.event_dim)
    return Constrained(normal, support)


def _ready(name: str) -> Any:
    """A prior of this package by the name of its class; a file can name no other code."""
    from .. import priors

    found = getattr(priors, name, None) if name in priors.__all__ else None
    return found if is_dataclass(found) else None
