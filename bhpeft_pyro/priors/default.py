"""The default prior: scales set by what the weights do, not by what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site

__all__ = ["FunctionSpaceNormal", "default"]


# Of two random sites whose product makes the change, the factor goes on the other.
_INPUT_SIDE = (".A", ".down", ".embedding")


@dataclass(frozen=True)
class FunctionSpaceNormal:
    """Independent Normals whose scales mean the same on every backbone.

    Args:
        change: sd of the output side (LoRA B, adapter up), in units. In fitted `Coordinates` each
            such site of each layer moves the predictions by change^2 nats under the prior; in a
            network with `aligned=False` it changes its block's output by this fraction.
        spread: sd of the input side (LoRA A, adapter down) around its anchor, in units.
        prefix: sd of prefixes, as a fraction of the frozen keys and values.
        head: sd of each output (logit) under the prior of the head's weights.
        other: scale of the likelihood's own sites, in their units.

    >>> from bhpeft_pyro.head import Head
    >>> prior = FunctionSpaceNormal(head=2.0)
    >>> sorted(prior(Head(3).sites(16)))
    ['head.bias', 'head.weight']
    """

    change: float = 0.1
    spread: float = 0.1
    prefix: float = 0.1
    head: float = 2.0
    other: float = 1.0

    def __post_init__(self) -> None:
        for name in ("change", "spread", "prefix", "head", "other"):
            if not getattr(self, name) > 0:
                raise PriorError(
                    f"FunctionSpaceNormal: {name} must be positive, got {getattr(self, name)}"
                )

    def scale(self, site: Site) -> float:
        """The prior sd of a site, in its units."""
        kind = site.name.split(".")[0]
        if kind == "head":
            return self.head
        if kind not in ("lora", "adapter", "prefix"):
            return self.other
        if any(mark in site.name for mark in _INPUT_SIDE):
            return self.spread
        return self.prefix if kind == "prefix" else self.change

    def loc(self, site: Site) -> Tensor:
        """The prior mean of a site: its anchor, or zero."""
        return torch.zeros_like(site.unit) if site.anchor is None else site.anchor

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return {
            site.name: pyro.sample(
                site.name,
                dist.Normal(self.loc(site), self.scale(site) * site.unit)
                .expand(site.shape)
                .to_event(site.ndim),
            )
            for site in sites
        }


def default() -> FunctionSpaceNormal:
    """The prior used when none is given."""
    return FunctionSpaceNormal()
