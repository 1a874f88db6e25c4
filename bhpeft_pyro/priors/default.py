"""The default prior: scales set by what the weights do, not by what they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyro
import pyro.distributions as dist
from torch import Tensor

from ..errors import PriorError
from ..peft.sites import Site

__all__ = ["FunctionSpaceNormal", "default"]

# Sites whose product with another random site makes a change: the factor goes on one side only.
_INPUT_SIDE = (".A", ".down", ".embedding", ".gate.weight")


@dataclass(frozen=True)
class FunctionSpaceNormal:
    """Independent Normals whose scales mean the same on every backbone.

    A site's `unit` is the sd at which its branch would be as large as the frozen output that it is
    added to. The prior gives the input side (LoRA A, adapter down) its unit and the output side
    (LoRA B, adapter up, prefix) `change` times its unit: under the prior each block's output
    changes by about that fraction.

    Args:
        change: relative change of a block's output under the prior.
        head: sd of each output (logit) under the prior of the head's weights.
        other: scale of the likelihood's own sites, in their units.

    >>> from bhpeft_pyro.head import Head
    >>> prior = FunctionSpaceNormal(head=2.0)
    >>> sorted(prior(Head(3).sites(16)))
    ['head.bias', 'head.weight']
    """

    change: float = 0.05
    head: float = 2.0
    other: float = 1.0

    def __post_init__(self) -> None:
        for name in ("change", "head", "other"):
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
        return 1.0 if any(mark in site.name for mark in _INPUT_SIDE) else self.change

    def __call__(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return {
            site.name: pyro.sample(
                site.name,
                dist.Normal(0.0, self.scale(site) * site.unit)
                .expand(site.shape)
                .to_event(site.ndim),
            )
            for site in sites
        }


def default() -> FunctionSpaceNormal:
    """The prior used when none is given."""
    return FunctionSpaceNormal()
