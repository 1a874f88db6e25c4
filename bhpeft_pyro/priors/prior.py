"""What a prior is, short forms for one, and how it is called.

A prior is a Pyro function from the sites to their tensors. It samples each site under its name, and
may also sample other latents, such as scales. A site that it computes from such latents is recorded
by `pyro.deterministic` instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from ..base.distributions import with_tensors
from ..base.isolation import alone, undisturbed
from ..base.names import sort_by_pattern
from ..errors import PriorError
from ..peft.sites import Site
from .draw_by_draw import draw_by_draw
from .ready_priors import FunctionSpaceNormal

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
    if isinstance(prior, TorchDistributionMixin):  # most of Pyro's are not a TorchDistribution
        return PatternPrior({"*": prior})
    if isinstance(prior, Mapping):
        return PatternPrior(prior)
    if callable(prior) and not isinstance(prior, type):
        return prior
    raise PriorError(
        f"prior: got {prior!r:.60}, expected a Pyro function, a distribution or a mapping from "
        "patterns of site names"
    )


class PatternPrior:
    """Independent priors by site pattern: the mapping form of `as_prior`."""

    def __init__(self, patterns: Mapping[str, SitePrior]) -> None:
        self.patterns = dict(patterns)
        self.vectorised = all(
            getattr(prior, "vectorised", isinstance(prior, TorchDistributionMixin))
            for prior in patterns.values()
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
        return repr(self.patterns)

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        names = (site.name for site in sites)
        pattern_of = sort_by_pattern(names, self.patterns, "prior", PriorError)
        values: dict[str, Tensor] = {}
        for site in sites:
            prior: Any = self.patterns[pattern_of[site.name]]
            if isinstance(prior, FunctionSpaceNormal):
                values[site.name] = prior.sample(site)
            else:
                values[site.name] = pyro.sample(site.name, expand_to_site(prior, site))
        return values


def expand_to_site(prior: Any, site: Site) -> TorchDistribution:
    """A distribution of one weight, or of a site's last dims, as one of the whole site."""
    distribution = prior if isinstance(prior, TorchDistributionMixin) else prior(site)
    if (device := site.unit.device).type != "cpu":
        distribution = with_tensors(distribution, lambda tensor: tensor.to(device))
    lead = site.shape[: max(0, site.ndim - distribution.event_dim)]
    wide: TorchDistribution = distribution.expand(lead).to_event()
    if wide.event_shape != site.shape:
        raise PriorError(
            f"prior: a distribution of shape {tuple(distribution.shape())} cannot be expanded to "
            f"the site {site.name!r} of shape {site.shape}"
        )
    return wide


def checked(prior: Prior, sites: Sequence[Site]) -> dict[str, Tensor]:
    """Call a prior, once for each draw, and check that it returns every site with its shape.

    A prior with the attribute `vectorised`, as those of this package, handles the leading dims of
    draws itself.
    """
    if getattr(prior, "vectorised", False):
        return dict(prior(sites))

    def one_draw() -> dict[str, Tensor]:
        values = prior(sites)
        for site in sites:
            value = values.get(site.name)
            if not isinstance(value, Tensor) or value.shape != site.shape:
                got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise PriorError(
                    f"prior: it returns {got:.60} for the site {site.name!r}, expected a tensor of "
                    f"shape {site.shape}"
                )
        return dict(values)

    return draw_by_draw(one_draw, PriorError)


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


def check_prior(prior: Prior, sites: Sequence[Site]) -> None:
    """Run a prior once as a fit does.

    Raises:
        PriorError: torch's default dtype is not float32; the prior returns other values than it
            samples, or has parameters, which nothing would train.
    """
    if (default := torch.get_default_dtype()) != torch.float32:
        raise PriorError(
            f"prior: torch's default dtype is {default}, expected torch.float32, in which weights "
            "are sampled: torch.set_default_dtype(torch.float32)"
        )
    with undisturbed(), alone(), poutine.trace() as tracer:
        values = checked(prior, sites)
    nodes: dict[str, Any] = tracer.trace.nodes
    for name, value in values.items():
        if name in nodes and not torch.equal(nodes[name]["value"], value):
            raise PriorError(
                f"prior: it samples {name!r} and returns another value for it; expected that "
                "one. A site that is computed needs a latent variable of another name, and "
                f"pyro.deterministic({name!r}, value)"
            )
    names = [name for name, node in nodes.items() if node["type"] == "param"]
    if isinstance(prior, nn.Module):
        names += [name for name, value in prior.named_parameters() if value.requires_grad]
    if names:
        raise PriorError(
            f"prior: the parameters {', '.join(map(repr, names))} would not be trained, as a fit "
            "trains the guide only; expected pyro.sample for what is learnt, and tensors for what "
            "is fixed"
        )
