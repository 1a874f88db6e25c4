"""What a prior is, short forms for one, and checks.

A prior is a Pyro function from the sites to their tensors. It samples each site under its name, and
may also sample other latents, such as scales. A site that it computes from such latents is recorded
by `pyro.deterministic` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions import Distribution

from ..base.isolation import alone, undisturbed
from ..base.names import sort_by_pattern
from ..errors import PriorError, is_out_of_memory
from ..peft.sites import Site
from .ready_priors import FunctionSpaceNormal
from .vectorised import for_all_draws, with_tensors

Prior = Callable[[Sequence[Site]], Mapping[str, Tensor]]
"""A Pyro function from the sites to their tensors, by name."""
SitePrior = TorchDistribution | Callable[[Site], TorchDistribution] | FunctionSpaceNormal
"""A distribution for each weight of a site, a function from the site to one, or a ready prior."""
PriorLike = Prior | TorchDistribution | Mapping[str, SitePrior]
"""A prior or a short form: one distribution for every weight, or a prior by site pattern."""


def as_prior(prior: PriorLike) -> Prior:
    """A prior from any accepted form.

    Args:
        prior: a Pyro function (returned as it is); a distribution, independent for every weight;
            or a mapping from patterns of site names ("lora.*.B", "*") to a distribution, to a
            function `site -> distribution`, or to a ready prior. The first pattern that matches a
            site is used.

    Raises:
        PriorError: it is none of these.

    >>> import pyro.distributions as dist
    >>> from bhpeft_pyro.model.head import Head
    >>> prior = as_prior({"*.bias": dist.Normal(0., 10.),
    ...                   "*": lambda site: dist.Laplace(0., site.unit)})
    >>> {name: tuple(value.shape) for name, value in prior(Head(3).sites(8)).items()}
    {'head.weight': (3, 8), 'head.bias': (3,)}
    """
    _refuse_class(prior)
    if isinstance(prior, TorchDistributionMixin):  # most of Pyro's are not a TorchDistribution
        return PatternPrior({"*": prior})
    if isinstance(prior, Mapping):
        return PatternPrior(prior)
    if callable(prior):
        return prior
    raise PriorError(
        f"prior: got a {type(prior).__name__}, expected a Pyro function, a distribution or a "
        "mapping from patterns of site names"
    )


def _refuse_class(prior: object) -> None:
    if isinstance(prior, type):
        raise PriorError(
            f"prior: got the class {prior.__name__}, expected an instance of it: "
            f"{prior.__name__}(...)"
        )


class PatternPrior:
    """Independent priors by site pattern: the mapping form of `as_prior`."""

    def __init__(self, patterns: Mapping[str, SitePrior]) -> None:
        if not patterns:
            raise PriorError("prior: the mapping from site patterns is empty")
        for value in patterns.values():
            _refuse_class(value)
        self.patterns = dict(patterns)
        self.vectorised = all(
            getattr(value, "vectorised", isinstance(value, Distribution))
            for value in patterns.values()
        )

    @property
    def open(self) -> bool:
        """Whether a `laplace` guide sets the scales of all sites."""
        return all(getattr(prior, "open", False) for prior in self.patterns.values())

    def with_fixed_scales(self) -> PatternPrior:
        """This prior with the default scales of ready priors in place of None."""
        fixed = {
            pattern: prior.with_fixed_scales() if isinstance(prior, FunctionSpaceNormal) else prior
            for pattern, prior in self.patterns.items()
        }
        return PatternPrior(fixed)

    def __repr__(self) -> str:
        parts = ", ".join(f"{name!r}: {prior}" for name, prior in self.patterns.items())
        return f"{{{parts}}}"

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        names = (site.name for site in sites)
        pattern_of = sort_by_pattern(names, self.patterns, "prior", PriorError)
        values: dict[str, Tensor] = {}
        prior: object
        for pattern, prior in self.patterns.items():
            if isinstance(prior, FunctionSpaceNormal):
                own = [site for site in sites if pattern_of[site.name] == pattern]
                values |= prior(own)
        for site in sites:
            if site.name not in values:
                distribution = expand_to_site(self.patterns[pattern_of[site.name]], site)
                values[site.name] = pyro.sample(site.name, distribution)
        return values


def expand_to_site(prior: Any, site: Site) -> TorchDistribution:
    """A distribution of one weight, or of a site's last dims, as one of the whole site."""
    distribution = prior
    if not isinstance(prior, TorchDistributionMixin) and callable(prior):
        distribution = prior(site)
    if not isinstance(distribution, TorchDistributionMixin):
        raise PriorError(
            f"prior: got a {type(distribution).__name__} for the site {site.name!r}, expected a "
            "distribution"
        )
    if (device := site.unit.device).type != "cpu":
        distribution = with_tensors(distribution, lambda tensor: tensor.to(device))
    last = distribution.event_dim
    try:
        if last > site.ndim or distribution.event_shape != site.shape[site.ndim - last :]:
            raise ValueError
        wide = distribution.expand(torch.Size(site.shape[: site.ndim - last]))
    except (RuntimeError, ValueError) as error:
        raise PriorError(
            f"prior: a distribution of shape {tuple(distribution.shape())} cannot be expanded to "
            f"the site {site.name!r} of shape {site.shape}"
        ) from error
    return wide.to_event(site.ndim - last)


def checked(prior: Prior, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Call a prior, and check that it returns every site with its shape."""
    with poutine.trace() as tracer:
        try:
            values = for_all_draws(prior, sites)
        except RuntimeError as error:  # torch's, of shapes
            if is_out_of_memory(error):
                raise
            done = tracer.trace.nodes
            where = next((f"at the site {s.name!r}" for s in sites if s.name not in done), "")
            hint = ""
            if "vmap" in str(error) or "data-dependent" in str(error):
                hint = (
                    ". Priors run under torch.vmap, which cannot branch on a value (docs/priors.md)"
                )
            where = where or "after its last site"
            raise PriorError(f"prior: it fails {where}: {error}{hint}") from error
    if not isinstance(values, Mapping):
        raise PriorError(
            f"prior: it returns a {type(values).__name__}, expected a mapping from site names to "
            "tensors; for a function of one site write {'*': f}"
        )
    for site in sites:
        if not isinstance(value := values.get(site.name), Tensor):
            raise PriorError(
                f"prior: it returns no tensor for the site {site.name!r}, but {value!r:.60} (its "
                f"sites: {', '.join(sorted(values)) or 'none'})"
            )
        shape = tuple(value.shape)
        if shape[len(shape) - site.ndim :] != site.shape or len(shape) < site.ndim:
            raise PriorError(
                f"prior: shape {shape} for the site {site.name!r}, expected {site.shape}; is "
                ".expand(site.shape).to_event(site.ndim) missing?"
            )
    return dict(values)


def complete(
    prior: Prior, sites: Sequence[Site], latents: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Latents, and the sites that a prior computes from them, all with the same leading dims.

    Args:
        prior: the prior; it is not run if all sites are among the latents.
        sites: the model's sites.
        latents: a value, `(*P, *shape)`, of each variable that the prior samples.

    Raises:
        PriorError: the prior samples something that has no value here.

    >>> import pyro.distributions as dist
    >>> from bhpeft_pyro.model.head import Head
    >>> def prior(sites):
    ...     size = pyro.sample("size", dist.LogNormal(0., 1.))
    ...     return {s.name: pyro.deterministic(s.name, size * torch.ones(s.shape)) for s in sites}
    >>> complete(prior, Head(2).sites(8), {"size": torch.tensor(3.)})["head.bias"]
    tensor([3., 3.])
    """
    if all(site.name in latents for site in sites):
        return dict(latents)
    prior = getattr(prior, "structure", None) or prior  # of an earlier posterior
    with poutine.block(), poutine.trace() as tracer, poutine.condition(data=dict(latents)):
        values = checked(prior, sites)
    if unknown := tracer.trace.stochastic_nodes:
        raise PriorError(
            f"prior: it samples {', '.join(map(repr, unknown))}, but there are only values of "
            f"{', '.join(latents)}"
        )
    whole = {**latents, **values}
    particles = torch.broadcast_shapes(
        *(whole[site.name].shape[: whole[site.name].dim() - site.ndim] for site in sites)
    )
    return whole | {s.name: whole[s.name].expand(*particles, *s.shape) for s in sites}


def check_prior(prior: Prior, sites: Sequence[Site], vectorised: bool = False) -> None:
    """Run a prior once as a fit does, with several draws at once if `vectorised`.

    Raises:
        PriorError: it fails, its density is not known, it is not of the default dtype, it returns
            other values than it samples, or it has parameters, which nothing would train.
    """
    if not getattr(prior, "has_density", True):
        raise PriorError(
            "prior: the density of a mixture of posteriors is not known, so no guide can be fitted "
            "under it; expected one component's, such as posterior.components[0].as_prior(), or "
            "posterior.update(data), which fits each under its own"
        )
    with (
        undisturbed(),
        alone(),
        poutine.trace() as tracer,
        pyro.plate("draws", 2, dim=-2) if vectorised else nullcontext(),
    ):
        try:
            values = checked(prior, sites)
        except PriorError:
            raise
        except ValueError as error:
            why = str(error).split("\n")[0].rstrip(": ")
            advice = (
                ". Expected no plates, whose dims collide with those of the draws; declare dims as "
                "events with .to_event()"
            )
            raise PriorError(f"prior: {why}{advice if 'collide' in why else ''}") from error
    if (default := torch.get_default_dtype()) != torch.float32:
        raise PriorError(
            f"prior: torch's default dtype is {default}, expected torch.float32, in which weights "
            "are sampled: torch.set_default_dtype(torch.float32)"
        )
    for site in sites:
        node: Any = tracer.trace.nodes.get(site.name, {"value": values[site.name]})
        if not torch.equal(*torch.broadcast_tensors(node["value"], values[site.name])):
            raise PriorError(
                f"prior: it samples {site.name!r} and returns another value for it; expected that "
                "one. A site that is computed needs a latent variable of another name, and "
                f"pyro.deterministic({site.name!r}, value, event_dim=site.ndim)"
            )
        if (dtype := values[site.name].dtype) != default:
            raise PriorError(
                f"prior: the site {site.name!r} has dtype {dtype}, expected {default}; "
                "torch.from_numpy(...).float() converts NumPy arrays"
            )
    names = [name for name, node in tracer.trace.nodes.items() if node["type"] == "param"]
    if isinstance(prior, nn.Module):
        names += [name for name, value in prior.named_parameters() if value.requires_grad]
    if names:
        raise PriorError(
            f"prior: the parameters {', '.join(map(repr, names))} would not be trained, as a fit "
            "trains the guide only; expected pyro.sample for what is learnt, and tensors for what "
            "is fixed"
        )
