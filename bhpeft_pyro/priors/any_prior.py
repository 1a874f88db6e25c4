"""What is asked of any prior, of a user's own function too."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor

from ..base.checks import few
from ..base.distributions import Covariance, LowRankNormal, with_tensors
from ..base.isolation import undisturbed
from ..base.user_code import path_of, plain_attributes
from ..errors import PriorError
from ..peft.sites import Site
from .from_posterior import JointPrior, PosteriorPrior, moments_of
from .prior import PatternPrior, Prior, checked
from .ready_priors import FunctionSpaceNormal, Hierarchical

Draw = dict[str, Any]
"""The sample statements of one draw of a prior, by name, as nodes of a trace of Pyro's."""


def joint(prior: Prior | None) -> JointPrior | None:
    """The prior, if it is one Normal over all weights."""
    return prior if isinstance(prior, JointPrior) else None


def with_structure(prior: Prior, earlier: Prior, sites: Sequence[Site]) -> Prior:
    """A posterior as a prior, in which sites that the earlier prior computes from others still
    are."""
    if not isinstance(prior, PosteriorPrior) or all(s.name in prior.distributions for s in sites):
        return prior
    structure = getattr(earlier, "structure", None) or earlier
    return PosteriorPrior(prior.distributions, structure)


def earlier_posterior(prior: Prior, purpose: str) -> PosteriorPrior | JointPrior:
    """The prior, if it is an earlier posterior that can be tempered; any other is a
    PriorError that starts with `purpose`."""
    if not isinstance(prior, PosteriorPrior | JointPrior):
        raise PriorError(
            f"{purpose}: {type(prior).__name__} has no closed form; expected an earlier posterior "
            "of 'laplace', 'normal', or a Normal guide of Pyro"
        )
    return prior


def with_fixed_scales(prior: Any) -> Any:
    """The prior, with scales of its own where it leaves them to a `laplace` guide."""
    return prior.with_fixed_scales() if hasattr(prior, "with_fixed_scales") else prior


def with_rows(prior: Prior | None, rows: Mapping[str, int]) -> Prior | None:
    """A prior for sites with more rows. A `JointPrior` of independent weights gets rows of mean
    zero with the sds of the last row; others are returned as they are."""
    if not isinstance(prior, JointPrior) or prior.normal.covariance.rank:
        return prior
    normals = prior.moments()
    for name, count in rows.items():
        mean, sd = normals[name]
        more = sd[-1:].expand(count, *sd.shape[1:])
        normals[name] = torch.cat([mean, torch.zeros_like(more)]), torch.cat([sd, more])
    loc, scale = (torch.cat([pair[i].flatten() for pair in normals.values()]) for i in range(2))
    shapes = {name: tuple(mean.shape) for name, (mean, _) in normals.items()}
    normal = LowRankNormal(loc, Covariance.diagonal(scale))
    return JointPrior(normal, shapes, prior.name, prior.open)


def moved(prior: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An earlier posterior with changed tensors, for example on another device. It is the same
    object if none changes; so is a prior of any other kind."""
    if not isinstance(prior, PosteriorPrior | JointPrior):
        return prior
    changed = list[bool]()

    def noting(tensor: Tensor) -> Tensor:
        new = change(tensor)
        changed.append(new is not tensor)
        return new

    twin = copy.copy(prior)
    vars(twin).update(with_tensors(vars(prior), noting))
    return twin if any(changed) else prior


def independent_normals(
    prior: Prior | None, sites: Sequence[Site], names: Iterable[str], purpose: str
) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and sd of some sites of a model under a prior of independent Normals.

    Raises:
        PriorError: the prior is None, as it is not known; a site is not Normal; other latents are
            sampled, on which sites may depend; or it has what `check_no_evidence` refuses. It
            starts with `purpose`.
    """
    if prior is None:
        raise PriorError(
            f"{purpose}: the first prior is not known, because it is your own function; pass "
            "prior=... to Posterior.load"
        )
    if isinstance(prior, JointPrior) and not prior.normal.covariance.rank:
        moments = prior.moments()
        return {name: moments[name] for name in names}
    names = [*names]
    drawn, again = (
        {name: node["fn"] for name, node in draw.items() if not node["is_observed"]}
        for draw in check_no_evidence(prior, sites, purpose)
    )
    if others := drawn.keys() - {site.name for site in sites}:
        raise PriorError(
            f"{purpose}: the prior also samples {few(sorted(others), 2)}, on which its sites "
            "may depend; expected independent Normals"
        )
    first, second = (moments_of(each, names, purpose) for each in (drawn, again))
    for name in names:
        if not all(map(torch.equal, first[name], second[name])):
            raise PriorError(
                f"{purpose}: {name!r} depends on what else the prior samples; expected independent "
                "Normals"
            )
    return first


def check_no_evidence(prior: Prior, sites: Sequence[Site], purpose: str) -> tuple[Draw, Draw]:
    """Two draws of a prior. It may have no observations or factors, and scale or mask nothing that
    it samples: neither draws of it nor the distributions that it samples from have any of it.

    A site that is held fixed is an observation if its density depends on what is sampled, such as
    its scale.

    Raises:
        PriorError: it has some; starts with `purpose`.
    """
    known = {site.name for site in sites}
    first, second = _draws(prior, sites, 2)

    def left_out(name: str) -> bool:
        node = first[name]
        if not node["is_observed"]:
            return bool(node["scale"] != 1 or node["mask"] is not None)
        fixed = name in known and torch.equal(node["log_prob"], second[name]["log_prob"])
        return not (fixed or node["infer"].get("_deterministic"))

    if lost := [*filter(left_out, first)]:
        raise PriorError(
            f"{purpose}: the prior has observations, factors, scales or masks at "
            f"{', '.join(lost)}, which would be left out"
        )
    return first, second


def in_words(prior: object) -> str:
    """A prior in words that are the same in every process, with its options; a function or a class
    by its name alone, as code may move. Empty for an earlier posterior.

    >>> import pyro.distributions as dist
    >>> from bhpeft_pyro.priors import as_prior
    >>> in_words(as_prior({"head.*": dist.Normal(0.0, 1.0), "*": lambda site: dist.Normal(0, 1)}))
    "{'head.*': Normal(loc: 0.0, scale: 1.0), '*': <lambda>}"
    """
    if isinstance(prior, JointPrior | PosteriorPrior):
        return ""
    if isinstance(prior, PatternPrior):
        parts = (f"{pattern!r}: {in_words(each)}" for pattern, each in prior.patterns.items())
        return f"{{{', '.join(parts)}}}"
    if type(prior) in (FunctionSpaceNormal, Hierarchical):
        return repr(prior)
    if isinstance(prior, TorchDistributionMixin):
        with suppress(AttributeError, NotImplementedError):  # of a class without constraints
            return repr(prior)
    name = path_of(prior).rpartition(":")[2].rpartition(".<locals>.")[2]
    options = ", ".join(f"{key}={value!r}" for key, value in plain_attributes(prior).items())
    return f"{name}({options})" if options else name


def held_fixed(prior: Prior, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The values of the sites that a prior observes, as under `poutine.condition`; of a posterior,
    those of the first prior, by which it still computes sites."""
    (draw,) = _draws(getattr(prior, "structure", None) or prior, sites, 1)
    nodes = {site.name: draw[site.name] for site in sites if site.name in draw}
    return {
        name: node["value"]
        for name, node in nodes.items()
        if node["is_observed"] and not node["infer"].get("_deterministic")
    }


def _draws(prior: Prior, sites: Sequence[Site], count: int) -> list[Draw]:
    draws = []
    with undisturbed(), torch.no_grad(), poutine.block():
        for _ in range(count):
            trace = poutine.trace(checked).get_trace(prior, sites)
            trace.compute_log_prob(lambda name, node: node["is_observed"])
            nodes: dict[str, Any] = trace.nodes
            draws.append({name: node for name, node in nodes.items() if node["type"] == "sample"})
    return draws
