"""Priors as plain data and tensors, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from pyro.distributions.constraints import ordered_vector
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import Normal, constraints
from torch.distributions.constraints import Constraint

from ..base.distributions import Constrained, Covariance, LowRankNormal, base_of
from ..base.user_code import given_for, path_of, plain_attributes
from ..errors import SaveError
from ..peft.sites import Site
from .any_prior import held_fixed
from .from_posterior import JointPrior, PosteriorPrior
from .prior import PatternPrior, Prior, PriorLike, as_prior
from .ready_priors import FunctionSpaceNormal, Hierarchical

Plain = dict[str, Any]
Tensors = dict[str, Tensor]

_READY = {cls.__name__: cls for cls in (FunctionSpaceNormal, Hierarchical)}
"""Priors of this package by the name of their class; a file can name no other code."""
_COVARIANCE = ("scale", "axes", "ratio")
_SUPPORTS: dict[str, type[Constraint]] = {
    "greater than": constraints.greater_than,
    "at least": constraints.greater_than_eq,
    "less than": constraints.less_than,
    "interval": constraints.interval,
    "half-open interval": constraints.half_open_interval,
    "simplex": type(constraints.simplex),
    "Cholesky factor": type(constraints.lower_cholesky),
    "Cholesky factor of correlations": type(constraints.corr_cholesky),
    "ordered vector": type(ordered_vector),
}


def to_state(prior: Any, part: str) -> tuple[Plain, Tensors]:
    """A prior as plain data, and tensors whose names start with `part`. A user's own prior is its
    import path, with the plain attributes that it must have again; None is one that is not known.
    Raises a SaveError if a latent is not Normal in unconstrained coordinates."""
    name, tensors = type(prior).__name__, Tensors()
    if prior is None:
        return {"kind": "unknown"}, {}
    if _READY.get(name) is type(prior):
        return {"kind": "ready", "class": name, **asdict(prior)}, {}
    if isinstance(prior, JointPrior):
        covariance = prior.normal.covariance
        tensors = {f"{part}.{name}": getattr(covariance, name) for name in _COVARIANCE}
        plain = {"kind": "joint", "name": prior.name, "shapes": prior.shapes, "open": prior.open}
        return plain, {f"{part}.loc": prior.normal.loc, **tensors}
    if isinstance(prior, PosteriorPrior):
        latents = []  # in the order of draws, so that a seed gives the same draws after loading
        for name, latent in prior.distributions.items():
            normal, support = _latent_to_state(name, latent)
            latents.append((name, support))
            tensors |= {f"{part}.{name}.loc": normal.loc, f"{part}.{name}.scale": normal.scale}
        structure = prior.structure and to_state(prior.structure, part)[0]
        return {"kind": "posterior", "latents": latents, "structure": structure}, tensors
    return {"kind": "custom", "path": path_of(prior), "options": plain_attributes(prior)}, {}


def joined(states: Iterable[tuple[Plain, Tensors]]) -> tuple[list[Plain], Tensors]:
    """The plain data of several things, and the tensors of them all."""
    plains, tensors = list[Plain](), Tensors()
    for plain, more in states:
        plains.append(plain)
        tensors |= more
    return plains, tensors


def from_state(plain: Plain, tensors: Tensors, part: str, given: PriorLike | None) -> Any:
    """The inverse of `to_state`, with `given` in place of a user's own prior."""
    fields = dict(plain)
    kind = fields.pop("kind")
    if kind == "ready":
        if (name := str(fields.pop("class"))) not in _READY:
            raise SaveError(f"path: the saved posterior uses an unknown prior, {name!r:.60}")
        return _READY[name](**fields)
    if kind == "joint":
        shapes = {name: tuple(shape) for name, shape in fields["shapes"].items()}
        covariance = Covariance(*(tensors[f"{part}.{name}"] for name in _COVARIANCE))
        normal = LowRankNormal(tensors[f"{part}.loc"], covariance)
        return JointPrior(normal, shapes, fields["name"], fields["open"])
    if kind == "posterior":
        distributions = {
            name: _latent_from_state(
                tensors[f"{part}.{name}.loc"], tensors[f"{part}.{name}.scale"], support
            )
            for name, support in fields["latents"]
        }
        structure = fields["structure"]
        structure = structure and from_state(structure, tensors, part, given)
        return PosteriorPrior(distributions, structure)
    if kind == "custom":
        made = given_for("prior", fields["path"], given if given is None else as_prior(given))
        options = plain_attributes(made)
        for name, saved in fields["options"].items():
            if not name.startswith("__") and (got := options.get(name)) != saved:
                raise SaveError(
                    f"prior: this posterior was saved with {name}={saved!r:.80} of the prior; got "
                    f"{got!r:.80}"
                )
        return made
    if kind != "unknown":
        raise SaveError(f"path: the saved posterior uses an unknown kind of prior, {kind!r}")
    return None


def check_fixed(prior: Prior, sites: Sequence[Site], saved: Tensors) -> None:
    """Refuse a user's own prior that does not hold the sites fixed that the saved one held, at the
    same values."""
    fixed = held_fixed(prior, sites) if saved else {}
    for name, value in saved.items():
        if (got := fixed.get(name)) is None or not torch.allclose(got.to(value), value):
            raise SaveError(
                f"prior: this posterior was saved with {name!r} held fixed at "
                f"{value.tolist()!r:.80}; got {None if got is None else got.tolist()!r:.80}"
            )


def needs_given(plain: Plain) -> bool:
    """Whether a user's own prior is a part of what was saved."""
    parts = [*plain.get("parts", ()), plain.get("structure")]
    return plain["kind"] == "custom" or any(map(needs_given, filter(None, parts)))


def check_needed(plain: Iterable[Plain], known: Sequence[str], given: PriorLike | None) -> None:
    """Refuse a prior that is given, but with which no round began.

    Args:
        plain: the saved priors.
        known: the prior of each round in words, if that is known.
        given: the prior, if any.
    """
    name = "" if given is None else in_words(as_prior(given))
    if name and known and known[0] and name not in known:
        advice = "" if any(map(needs_given, plain)) else ", which needs no prior="
        raise SaveError(f"prior: this posterior was saved with {known[0]}{advice}; got {name}")


def in_words(prior: object) -> str:
    """A prior in words that are the same in every process, with its options; a function or a class
    by its name alone, as code may move. Empty for an earlier posterior.

    >>> in_words(as_prior({"head.*": dist.Normal(0.0, 1.0), "*": lambda site: dist.Normal(0, 1)}))
    "{'head.*': Normal(loc: 0.0, scale: 1.0), '*': <lambda>}"
    """
    if isinstance(prior, JointPrior | PosteriorPrior):
        return ""
    if isinstance(prior, PatternPrior):
        parts = (f"{pattern!r}: {in_words(each)}" for pattern, each in prior.patterns.items())
        return f"{{{', '.join(parts)}}}"
    if type(prior) in _READY.values():
        return repr(prior)
    if isinstance(prior, TorchDistributionMixin):
        with suppress(AttributeError, NotImplementedError):  # of a class without constraints
            return repr(prior)
    name = path_of(prior).rpartition(":")[2].rpartition(".<locals>.")[2]
    options = ", ".join(f"{key}={value!r}" for key, value in plain_attributes(prior).items())
    return f"{name}({options})" if options else name


def _latent_to_state(name: str, latent: TorchDistribution) -> tuple[Normal, Plain | None]:
    """A Normal in unconstrained coordinates, and the support; None for the reals."""
    base, plain = base_of(latent), None
    if isinstance(base, Constrained):
        support: Any = base.support
        while isinstance(support, constraints.independent):
            support = support.base_constraint
        kind = next((kind for kind, cls in _SUPPORTS.items() if type(support) is cls), None)
        if kind is None:
            raise SaveError(
                f"prior: {name!r} of the earlier posterior has the support {support}, which cannot "
                f"be saved; expected one of {', '.join(_SUPPORTS)}"
            )
        bounds = {key: torch.as_tensor(bound).tolist() for key, bound in vars(support).items()}
        plain, base = {"kind": kind, **bounds}, base_of(base.base_dist)
    if not isinstance(base, Normal):
        raise SaveError(
            f"prior: {name!r} of the earlier posterior is {type(base).__name__}, which cannot be "
            "saved; expected a Normal in unconstrained coordinates"
        )
    return base, plain


def _latent_from_state(loc: Tensor, scale: Tensor, plain: Plain | None) -> TorchDistribution:
    normal = dist.Normal(loc, scale).to_event(loc.dim())
    if plain is None:
        return normal
    bounds = dict(plain)
    support = _SUPPORTS[bounds.pop("kind")](
        **{k: loc.new_tensor(v) if isinstance(v, list) else v for k, v in bounds.items()}
    )
    if loc.dim() > support.event_dim:
        support = constraints.independent(support, loc.dim() - support.event_dim)
    return Constrained(normal, support)
