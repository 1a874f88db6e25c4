"""The default prior, a Normal whose scales are set by the effect of the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions.transforms import ExpTransform

from ..base.checks import Number, check_fields
from ..errors import PriorError
from ..peft.sites import Site

_PACKAGE = __name__.rpartition(".")[0]
_CHANGE, _HEAD = 0.1, 1.0
_OPEN = ("change", "head")  # may be None


@dataclass(frozen=True)
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
        PriorError: a number is not positive and finite.

    >>> from bhpeft_pyro.model.head import Head
    >>> prior = FunctionSpaceNormal(head=2.0)
    >>> sorted(prior(Head(3).sites(16)))
    ['head.bias', 'head.weight']
    """

    change: float | None = None
    spread: float = 0.1
    head: float | None = None
    other: float = 1.0

    def __post_init__(self) -> None:
        rules = {field.name: Number(above=0, none=field.name in _OPEN) for field in fields(self)}
        check_fields(self, rules, type(self).__name__, PriorError)  # an improper one has no draws

    @property
    def open(self) -> bool:
        """Whether a `laplace` guide sets the scales of the sites."""
        return type(self) is FunctionSpaceNormal and self.change is None and self.head is None

    @property
    def vectorised(self) -> bool:
        """Whether it handles the dims of draws itself, as those of this package do."""
        return type(self).__module__.startswith(_PACKAGE)

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


def along(values: Tensor, site: Site, dims: Sequence[str]) -> Tensor:
    """`(*P, *sizes)` by `dims` to `(*P, *sizes and ones)`, broadcastable to the site.

    >>> site = Site("lora.query.B", (6, 9, 4), ("layer", "out", "rank"), torch.ones(1), lambda: ...)
    >>> along(torch.ones(2, 1, 6, 4), site, ("layer", "rank")).shape
    torch.Size([2, 1, 6, 1, 4])
    """
    lead = values.shape[: values.dim() - len(dims)]
    sizes = (n if dim in dims else 1 for dim, n in zip(site.dims, site.shape, strict=True))
    return values.reshape(*lead, *sizes)


def log_of(positive: TorchDistribution) -> TorchDistribution:
    """The distribution of the logarithm, which is real-valued as Normal guides are.

    >>> log_of(dist.HalfCauchy(torch.ones(3))).icdf(torch.tensor(0.5))
    tensor([0., 0., 0.])
    """
    return dist.TransformedDistribution(positive, [ExpTransform().inv])


def default() -> FunctionSpaceNormal:
    """The prior used when none is given."""
    return FunctionSpaceNormal()
