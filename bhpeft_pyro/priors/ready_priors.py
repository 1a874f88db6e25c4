"""The ready priors: the default, whose scales are set by the effect of the weights, and one with
random scales, for 'normal' and Pyro's guides (not 'laplace').

docs/own-model.md has more, as functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..base.values import Positive, checked_dataclass
from ..peft.sites import Site

_CHANGE, _HEAD = 0.1, 1.0


@checked_dataclass
class FunctionSpaceNormal:
    """Independent Normals, with sds in the sites' units so that they mean the same on every
    backbone.

    Args:
        change: sd of the output side (LoRA B, adapter up, prefix values); by default 0.1. In
            fitted `Coordinates` each such site of each layer moves the predictions by change^2
            nats under the prior; in others it changes its block's output by this fraction.
        spread: sd of the input side (LoRA A, adapter down, prefix keys) around its anchor.
        head: sd of each output (logit) under the prior of the head's weights; by default 1. If
            neither `change` nor `head` is given, a `laplace` guide sets the scale of every site by
            its effect on the outputs.
        other: sd of the likelihood's own sites.

    Raises:
        ConfigError: a number is not positive and finite.

    >>> from bhpeft_pyro.model.head import Head
    >>> prior = FunctionSpaceNormal(head=2.0)
    >>> sorted(prior(Head(3).sites(16)))
    ['head.bias', 'head.weight']
    """

    change: Positive | None = None
    spread: Positive = 0.1
    head: Positive | None = None
    other: Positive = 1.0

    @property
    def open(self) -> bool:
        """Whether a `laplace` guide sets the scales of the sites."""
        return type(self) is FunctionSpaceNormal and self.change is None and self.head is None

    @property
    def vectorised(self) -> bool:
        """Whether it handles the dims of draws itself, as those of this package do."""
        return type(self) in (FunctionSpaceNormal, Hierarchical)

    def scale(self, site: Site) -> float:
        """The prior sd of a site, in its units."""
        match site.role:
            case "input":
                return self.spread
            case "output":
                return _CHANGE if self.change is None else self.change
            case "gate":  # what it multiplies has the scale `change` already
                return _CHANGE
            case "head":
                return _HEAD if self.head is None else self.head
            case "other":
                return self.other

    def with_fixed_scales(self) -> Self:
        """This prior with its default scales in place of None.

        >>> FunctionSpaceNormal(head=2.0).with_fixed_scales()
        FunctionSpaceNormal(change=0.1, spread=0.1, head=2.0, other=1.0)
        """
        return replace(
            self,
            change=_CHANGE if self.change is None else self.change,
            head=_HEAD if self.head is None else self.head,
        )

    def sd(self, site: Site) -> Tensor:
        """The prior sd of a site's weights, broadcastable to its shape."""
        return self.scale(site) * site.unit

    def loc(self, site: Site) -> Tensor:
        """The prior mean of a site: its anchor, or zero."""
        return torch.zeros_like(site.unit) if site.anchor is None else site.anchor

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return {site.name: self.sample(site) for site in sites}

    def sample(self, site: Site) -> Tensor:
        """Sample one site, and what its scale depends on; for subclasses."""
        return self.normal(site)

    def normal(self, site: Site, factor: Tensor | float = 1.0) -> Tensor:
        """Sample a site as N(loc, (sd * factor)^2), given a factor `(*P, *broadcastable)`."""
        normal = dist.Normal(self.loc(site), self.sd(site) * factor)
        lead = normal.batch_shape[: len(normal.batch_shape) - site.ndim]
        value: Tensor = pyro.sample(site.name, normal.expand(lead + site.shape).to_event(site.ndim))
        return value

    def non_centred(self, site: Site, factor: Tensor) -> Tensor:
        """Compute a site as loc + sd * factor * a standard Normal ("<site>.standard").

        Data say little about single PEFT weights. In this form weights and their scale are then
        nearly independent in the posterior, as a mean-field guide assumes.
        """
        zero = torch.zeros_like(site.unit)
        standard = pyro.sample(
            f"{site.name}.standard",
            dist.Normal(zero, torch.ones_like(zero)).expand(site.shape).to_event(site.ndim),
        )
        made = self.loc(site) + self.sd(site) * factor * standard
        value: Tensor = pyro.deterministic(site.name, made, event_dim=site.ndim)
        return value


def default() -> FunctionSpaceNormal:
    """The prior used when none is given."""
    return FunctionSpaceNormal()


@checked_dataclass
class Hierarchical(FunctionSpaceNormal):
    """For 'normal' and Pyro's guides: a scale for every site, and one for every layer around it
    (partial pooling).

        log_scale   ~ N(-v, overall^2)           a site ("<site>.log_scale")
        log_layers  ~ N(log_scale, between^2)    each of its layers ("<site>.log_layers")
        weight      ~ N(loc, (sd * exp(log_layers))^2)

    With v = overall^2 + between^2 the marginal sd of a weight is that of `FunctionSpaceNormal`.
    Sites with layers are non-centred. The head, which the data determine well, is centred and has
    the first scale only.

    Args:
        overall: sd of a site's log scale.
        between: sd of the log scales of its layers.

    >>> from bhpeft_pyro.model.head import Head
    >>> list(pyro.poutine.trace(Hierarchical()).get_trace(Head(3).sites(16)).stochastic_nodes)
    ['head.weight.log_scale', 'head.weight', 'head.bias.log_scale', 'head.bias']
    """

    overall: Positive = 0.5
    between: Positive = 0.5

    def sample(self, site: Site) -> Tensor:
        zero = site.unit.new_zeros(())
        layered = "layer" in site.dims
        variance = self.overall**2 + (self.between**2 if layered else 0.0)
        log_scale = pyro.sample(
            f"{site.name}.log_scale", dist.Normal(zero - variance, self.overall)
        )
        if not layered:
            return self.normal(site, log_scale.exp()[(..., *[None] * site.ndim)])
        layers = log_scale.unsqueeze(-1).expand(*log_scale.shape, site.shape[0])
        log_layers = pyro.sample(
            f"{site.name}.log_layers", dist.Normal(layers, self.between).to_event(1)
        )
        return self.non_centred(site, log_layers.exp()[(..., *[None] * (site.ndim - 1))])
