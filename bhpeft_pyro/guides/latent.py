"""What a guide must cover: the latent variables of a model's prior."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Delta, LogNormal, Normal, TorchDistribution
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.constraints import Constraint

from ..base.distributions import Constrained, Covariance, LowRankNormal, base_of
from ..base.isolation import undisturbed
from ..errors import GuideError, PriorError
from ..model.model import Model
from ..priors import JOINT, JointPrior, checked
from ..priors.any_prior import check_no_evidence, independent_normals

_TAKEN = ("data", "label", "draw", "draws")  # sites and plates of the model and of predictions


@dataclass(frozen=True, eq=False)
class Latent:
    """One latent variable, in unconstrained coordinates.

    Attributes:
        name: as it is sampled.
        support: of its values; `biject_to(support)` maps to them.
        loc: where a guide starts.
        scale: the prior's sd, where a guide's sd starts.
        prior: its distribution under the prior, given initial values of the others.
        unit: the site's unit, in which widths are given; 1 if it is not a site.
        is_site: whether it is a site of the model rather than, say, a scale.
        sites: of a latent that joins several sites, their shapes in order.
    """

    name: str
    support: Constraint
    loc: Tensor
    scale: Tensor
    prior: TorchDistribution
    unit: Tensor
    is_site: bool
    sites: Mapping[str, tuple[int, ...]]

    @property
    def names(self) -> tuple[str, ...]:
        """The names that patterns match, which are those of its sites for a joint latent."""
        return tuple(self.sites) or (self.name,)


def is_real(support: Constraint | None) -> bool:
    """Whether values on this support are already unconstrained."""
    while isinstance(support, constraints.independent | constraints.MixtureSameFamilyConstraint):
        support = support.base_constraint
    return isinstance(support, type(constraints.real))  # a copied guide has a copy of it


def normal_on(support: Constraint, loc: Tensor, scale: Tensor) -> TorchDistribution:
    """A Normal of one event, in unconstrained coordinates, as a distribution on a support."""
    normal = Normal(loc, scale).to_event(loc.dim())
    return normal if is_real(support) else Constrained(normal, support)


def latents(model: Model, names: Collection[str] | None = None) -> list[Latent]:
    """The latents of a model, in the order in which its prior samples them.

    Sites start at their prior's mean, or at their own `init` if the mean is zero or unknown; those
    with bounds, and other latents, such as scales, start at their median or mean. A site that the
    prior computes from others is not a latent. The global random state is unchanged.

    Args:
        model: the model.
        names: those asked for, a joint latent by the names of its sites; by default all.

    Raises:
        PriorError: a latent is discrete, or a site is not sampled.
    """
    sites = {site.name: site for site in model.sites}
    device = model.network.device
    trace = _traced(model)
    covered = []
    for name, node in trace.iter_stochastic_nodes():
        fn: Any = node["fn"]
        infer: Any = node["infer"]
        if name in _TAKEN or (name == JOINT and "sites" not in infer):
            raise PriorError(
                f"prior: it samples {name!r}, which is a name of the model's own; expected another"
            )
        if fn.support.is_discrete:
            raise PriorError(f"prior: the site {name!r} is discrete, expected a continuous one")
        if isinstance(base_of(fn), Delta):
            raise PriorError(
                f"prior: the site {name!r} is a Delta, which has no density; to hold a site fixed, "
                "condition the prior on it (pyro.poutine.condition)"
            )
        value: Any = node["value"]
        try:
            loc = biject_to(fn.support).inv(value.to(device)).detach().clone()
        except NotImplementedError as error:
            raise PriorError(
                f"prior: the site {name!r} has the support {fn.support}, which no guide covers; "
                "expected one that is a transform of the real numbers"
            ) from error
        unit = sites[name].unit if name in sites else torch.ones(())
        unit = unit.to(loc).expand(loc.shape)
        scale = _prior_scale(fn, loc, unit)
        joined = infer.get("sites", {})
        covered.append(Latent(name, fn.support, loc, scale, fn, unit, name in sites, joined))
    if missing := sites.keys() - {latent.name for latent in covered} - {*trace.observation_nodes}:
        raise PriorError(f"prior: it has no sample statement for {', '.join(sorted(missing))}")
    return [latent for latent in covered if names is None or set(latent.names) <= set(names)]


def check_attributes(names: Sequence[str], guide: str) -> None:
    """Refuse names that collide in some of Pyro's guides: what belongs to latent "a.b" is an
    attribute "b" there of what belongs to "a"."""
    for outer, inner in permutations(names, 2):
        if inner.startswith(f"{outer}."):
            other = f"{inner.removeprefix(f'{outer}.')}.{outer}"
            raise GuideError(
                f"{guide}: the prior samples {outer!r} and {inner!r}, whose names collide as "
                f"attributes; rename the second, for example to {other!r}"
            )


def check_separate(guide: str, covered: Sequence[Latent]) -> None:
    """Raise a GuideError if one latent contains several sites."""
    if parts := [name for latent in covered for name in latent.sites]:
        raise GuideError(
            f"guide: this prior samples {', '.join(parts)} jointly, and {guide} samples each site "
            "on its own; expected 'laplace', or the prior's marginals: "
            "posterior.as_prior().independent()"
        )


def with_mean(model: Model) -> set[str]:
    """The names of sites whose prior has a mean that is known and other than zero. A joint prior
    with such a mean has it at all of its sites."""
    moved = (latent for latent in latents(model) if has_mean(latent.prior))
    return {name for latent in moved for name in latent.names}


def joint_normal(model: Model) -> tuple[JointPrior, tuple[str, ...], Tensor]:
    """The prior of a model as one Normal over all sites; the sites that it samples one by one,
    which are none if it is joint already; and (D,) values at which a guide starts.

    Args:
        model: its prior is an independent Normal at every site, or an earlier posterior that is
            joint over all of them.

    Raises:
        GuideError: the prior is another one, or has observations.
    """
    covered = latents(model)
    if not covered:
        raise GuideError("LaplaceGuide: the model has no random weights")
    # The next prior may sample the sites in another order.
    order = [site.name for site in model.sites]
    covered.sort(key=lambda latent: order.index(latent.name) if latent.is_site else -1)
    shapes: dict[str, tuple[int, ...]] = {}
    for latent in covered:
        shapes |= latent.sites or {latent.name: tuple(latent.loc.shape)}
    joint = covered[0] if covered[0].sites else None
    try:
        if joint is None:
            moments = independent_normals(model.prior, model.sites, shapes, "reason")
        else:
            check_no_evidence(model.prior, model.sites, "reason")
    except PriorError as error:
        raise GuideError(f"use 'normal' under this prior; {error}") from error
    if joint is not None:
        normal, name = joint.prior, joint.name
    else:
        loc, scale = (
            torch.cat([moments[name][i].flatten() for name in shapes]).to(covered[0].loc)
            for i in range(2)
        )
        normal, name = LowRankNormal(loc, Covariance.diagonal(scale)), JOINT
    if missing := [name for name in order if name not in shapes]:
        raise GuideError(
            "use 'normal' under this prior; reason: the prior does not sample "
            f"{', '.join(missing)}; expected a Normal at every site"
        )
    prior = JointPrior(normal, shapes, name, bool(getattr(model.prior, "open", False)))
    sampled = tuple(shapes) if joint is None else ()
    return prior, sampled, torch.cat([latent.loc.flatten() for latent in covered])


def _traced(model: Model) -> poutine.Trace:
    """A run of a model's prior at initial values, without a change of the global random state."""
    sites = {site.name: site for site in model.sites}
    device = model.network.device

    def start(node: dict[str, Any]) -> Tensor:
        fn, site = node["fn"], sites.get(node["name"])
        if site is None or tuple(fn.shape()) != site.shape or not is_real(fn.support):
            return _center(fn)
        # The prior mean, unless it is zero, a saddle point of B A.
        mean: Tensor = fn.mean.clone() if has_mean(fn) else site.init()
        return mean.to(device)

    with undisturbed(), torch.no_grad(), poutine.block(), InitMessenger(start):
        return prune_subsample_sites(poutine.trace(checked).get_trace(model.prior, model.sites))


def has_mean(fn: Any) -> bool:
    """Whether a distribution has a mean that is known and other than zero."""
    try:
        return bool(fn.mean.isfinite().all() and fn.mean.any())
    except NotImplementedError:
        return False


def _center(fn: Any) -> Tensor:
    """The median, the mean, or else a draw."""
    base: Any = base_of(fn)
    if isinstance(base, Constrained):  # it has neither, but its coordinates do
        return biject_to(base.support)(base.base_dist.mean).clone()
    for center in (lambda: base.icdf(torch.tensor(0.5)), lambda: fn.mean):
        try:
            value: Tensor = center()
        except NotImplementedError:
            continue
        if value.isfinite().all():
            return value.clone()
    draw: Tensor = fn.sample()
    return draw


def _prior_scale(fn: Any, loc: Tensor, unit: Tensor) -> Tensor:
    """The prior's sd in unconstrained coordinates; the unit if there is none."""
    base: Any = base_of(fn)
    if isinstance(base, (Constrained, LogNormal)):  # a Normal in unconstrained coordinates
        fn = base.base_dist
    elif not is_real(fn.support):
        return unit.clone()
    try:
        sd = fn.stddev.to(loc)
    except NotImplementedError:
        return unit.clone()
    return torch.where(sd.isfinite() & (sd > 0), sd.expand(loc.shape), unit).clone()
