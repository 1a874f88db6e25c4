"""A guide of independent blocks: a family of its own for each group of sites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from ..data.batch import Batch
from ..errors import GuideError
from ..model.model import Model
from ..patterns import sort_by_pattern
from ..priors import BlockPrior, JointPrior, Prior
from .budget import Budget, budget
from .delta import DeltaGuide
from .guide import Guide
from .latent import Latent, latents
from .lowrank import FullGuide, LowRankGuide
from .normal import NormalGuide

__all__ = ["FAMILIES", "BlockGuide", "Family", "plan", "title"]

FAMILIES: dict[str, type[NormalGuide | LowRankGuide | DeltaGuide]] = {
    "normal": NormalGuide,
    "lowrank": LowRankGuide,
    "full": FullGuide,
    "delta": DeltaGuide,
}
Family = str | tuple[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Block:
    """What becomes of the latents that a pattern matches."""

    pattern: str
    family: str
    options: Mapping[str, Any]
    latents: Sequence[Latent]

    @property
    def names(self) -> list[str]:
        return [name for latent in self.latents for name in latent.names]

    @property
    def budget(self) -> Budget:
        size = budget(self.family, sum(x.loc.numel() for x in self.latents), **self.options)
        assert size is not None  # of a family
        return size

    def make(self, model: Model, whole: bool) -> Guide:
        """The guide; one that covers the whole model needs no names."""
        names = None if whole else self.names
        try:
            return FAMILIES[self.family](model, names=names, **self.options)
        except TypeError as error:
            raise GuideError(
                f"guide: {self.family!r} at {self.pattern!r} does not take "
                f"{dict(self.options)}: {error}"
            ) from error


class BlockGuide(Guide):
    """q(w) = prod_b q_b(w_b): mean-field between blocks, anything within.

    Each block is fitted as it would be alone, by steps of its own, given draws of the others. A
    block of points ("delta") has no KL: what it adds to the loss is minus the logarithm of its
    prior density, so it is the MAP estimate under what the others leave uncertain.

    Args:
        model: the model whose latents it covers.
        families: from patterns of site names to "normal", "lowrank", "full" or "delta", or to a
            pair of such a name and its options; the first pattern that matches a site holds. What
            a prior samples besides its sites (scales, gates) is matched by its own name.

    Raises:
        GuideError: an unknown family or option; a latent that no pattern matches, or a pattern
            that matches none; a family that cannot follow the prior.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> guide = BlockGuide(tiny_model(), {
    ...     "head.*": "full", "lora.*.A": ("lowrank", {"rank": 4}), "*": "delta"})
    >>> [type(block).__name__ for block in guide.blocks()]
    ['FullGuide', 'LowRankGuide', 'DeltaGuide']
    """

    def __init__(self, model: Model, families: Mapping[str, Family]) -> None:
        super().__init__()
        self.families = dict(families)
        planned = plan(families, latents(model))
        self.guides = nn.ModuleList(block.make(model, len(planned) == 1) for block in planned)

    def blocks(self) -> list[Guide]:
        return [*self.guides]

    def forward(self, batch: Batch | None = None) -> dict[str, Tensor]:
        return {name: value for guide in self.guides for name, value in guide(batch).items()}

    def distributions(self) -> dict[str, TorchDistribution]:
        return {k: q for block in self.blocks() for k, q in block.distributions().items()}

    def as_prior(self) -> Prior:
        single: dict[str, TorchDistribution] = {}
        joint: list[JointPrior] = []
        for block in self.blocks():
            if isinstance(block, LowRankGuide):
                joint.append(block.as_prior())
            else:
                single |= block.distributions()
        return BlockPrior.of(single, joint)

    def follow(self, model: Model) -> None:
        for block in self.blocks():
            block.follow(model)

    def means(self) -> dict[str, Tensor]:
        return {k: value for block in self.blocks() for k, value in block.means().items()}

    def move(self, values: Mapping[str, Tensor]) -> None:
        for block in self.blocks():
            block.move(values)

    def scales(self) -> dict[str, Tensor]:
        return {k: value for block in self.blocks() for k, value in block.scales().items()}

    @torch.no_grad()
    def narrow(self, information: Mapping[str, Tensor]) -> None:
        for block in self.blocks():
            block.narrow(information)

    def grow(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for block in self.blocks():
            if own := {name: rows[name] for name in block.means() if name in rows}:
                block.grow(own)

    def options(self) -> dict[str, Any]:
        return {"families": self.families}

    def natural_pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return [pair for block in self.blocks() for pair in block.natural_pairs()]


def title(guide: object) -> str:
    """A guide in a line: its class, and of blocks which family covers which pattern.

    >>> from bhpeft_pyro.testing import tiny_model
    >>> title(BlockGuide(tiny_model(), {"head.*": "full", "*": ("lowrank", {"rank": 4})}))
    'BlockGuide(head.*: full, *: lowrank(rank=4))'
    """
    name = type(guide).__name__
    if not isinstance(guide, BlockGuide):
        return name
    covered = []
    for pattern, family in guide.families.items():
        kind, options = _parsed(pattern, family)
        told = ", ".join(f"{option}={value!r}" for option, value in options.items())
        covered.append(f"{pattern}: {kind}" + (f"({told})" if told else ""))
    return f"{name}({', '.join(covered)})"


def plan(families: Mapping[str, Family], found: Sequence[Latent]) -> list[Block]:
    """Which latents go to which block, in the order of the patterns.

    Raises:
        GuideError: as for `BlockGuide`.
    """
    parsed = {pattern: _parsed(pattern, family) for pattern, family in families.items()}
    members: dict[str, list[Latent]] = {pattern: [] for pattern in families}
    names = [name for latent in found for name in latent.names]
    pattern_of = sort_by_pattern(names, families, "guide", GuideError)
    for latent in found:
        patterns = {pattern_of[name] for name in latent.names}
        if len(patterns) > 1:
            raise GuideError(
                f"guide: the prior holds {', '.join(latent.names)} together, so one pattern must "
                f"match them all; these do: {', '.join(map(repr, sorted(patterns)))}"
            )
        members[patterns.pop()].append(latent)
    return [Block(pattern, *parsed[pattern], own) for pattern, own in members.items()]


def _parsed(pattern: str, family: Family) -> tuple[str, Mapping[str, Any]]:
    match family:
        case str(name):
            options: Mapping[str, Any] = {}
        case (str(name), Mapping() as options):  # a pair that was saved is a list
            pass
        case _:
            raise GuideError(
                f"guide: expected a family's name at {pattern!r}, or a pair of a name and a "
                f"mapping of options, got {family!r}"
            )
    if name not in FAMILIES:
        raise GuideError(
            f"guide: unknown family {name!r} at {pattern!r}; known: {', '.join(FAMILIES)}"
        )
    return name, options
