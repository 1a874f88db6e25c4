"""What the PEFT kinds have in common: layers, gate, and stacks of one tensor a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import index
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError
from ..plain import make_plain
from .architectures import Block
from .attention import Scales
from .binding import Binding
from .sites import Role, Site, projection

__all__ = ["Kind", "Stack", "check_count"]

Weights = Mapping[str, Tensor]
Start = Callable[[tuple[int, ...], Tensor], Callable[[], Tensor]]
"""Makes a site's `init` from its shape and its unit."""


@dataclass(frozen=True)
class Kind(ABC):
    """One kind of PEFT, on all layers or some of them.

    Attributes:
        layers: numbers of the layers that carry it (negative ones count from the last), or None
            for all.
        gated: whether a sigmoid gate per example, as in UniPELT (Mao et al. 2022), scales it.
    """

    layers: tuple[int, ...] | None = field(default=None, kw_only=True)
    gated: bool = field(default=False, kw_only=True)

    name: ClassVar[str]

    def __post_init__(self) -> None:
        make_plain(self)
        if isinstance(self.layers, int):
            raise ConfigError(
                f"{self.name}: layers={self.layers} must be a tuple of numbers, as in "
                f"layers=({self.layers},), or None for all"
            )
        if self.layers is not None:
            try:
                layers = tuple(map(index, self.layers))
            except TypeError:
                raise ConfigError(
                    f"{self.name}: layers={self.layers!r} must be whole numbers, or None for all"
                ) from None
            object.__setattr__(self, "layers", layers)

    def blocks(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """Those of the transformer's layers that carry this kind."""
        if self.layers is None:
            return tuple(blocks)
        count = len(blocks)
        wrong = [n for n in self.layers if not -count <= n < count]
        if wrong or not self.layers:
            raise ConfigError(
                f"{self.name}: layers={self.layers} must name some of the {count} layers, "
                f"{-count} to {count - 1}"
            )
        numbers = sorted({n % count for n in self.layers})
        if len(numbers) < len(self.layers):
            raise ConfigError(f"{self.name}: layers={self.layers} names a layer twice")
        return tuple(blocks[n] for n in numbers)

    def check(self, blocks: Sequence[Block]) -> None:  # noqa: B027 (most have nothing to check)
        """Raise if these blocks cannot carry this kind."""

    @abstractmethod
    def sites(self, blocks: Sequence[Block], scales: Scales) -> list[Site]:
        """The random tensors of this kind on these blocks."""

    @abstractmethod
    def wire(self, weights: Weights, blocks: Sequence[Block], binding: Binding) -> None:
        """Enter into `binding` what these weights, `(S, *site.shape)`, do at which module."""


@dataclass(frozen=True, eq=False)
class Stack:
    """One tensor a block, stacked along dimension "layer".

    Blocks on which the tensor has another width form a group, and a site, of their own, with the
    width as a suffix of its name.
    """

    name: str
    blocks: Sequence[Block]
    width: Callable[[Block], int]

    def groups(self) -> dict[str, tuple[int, list[Block]]]:
        """Site name to (width, blocks)."""
        by_width: dict[int, list[Block]] = {}
        for block in self.blocks:
            by_width.setdefault(self.width(block), []).append(block)
        single = len(by_width) == 1
        return {
            self.name if single else f"{self.name}.{width}": (width, members)
            for width, members in by_width.items()
        }

    def sites(
        self,
        shape: Callable[[int], tuple[int, ...]],
        dims: tuple[str, ...],
        role: Role,
        unit: Callable[[Block], Tensor],
        start: Start,
        anchor: float | None = None,
    ) -> list[Site]:
        """The sites of the groups.

        `shape` gives the shape of one layer's tensor from its width; `unit` one layer's unit,
        which broadcasts against that shape. `anchor` asks for one, a random projection with
        entries of that sd, in units.
        """
        sites = []
        for name, (width, members) in self.groups().items():
            one = shape(width)
            units = torch.stack([unit(block) for block in members])
            units = units.reshape(*units.shape, *[1] * (1 + len(one) - units.ndim))
            full = (len(members), *one)
            numbers = tuple(block.number for block in members)
            fixed = None if anchor is None else anchor * projection(name, full).to(units) * units
            sites.append(
                Site(name, full, ("layer", *dims), units, start(full, units), numbers, fixed, role)
            )
        return sites

    def rows(self, weights: Weights, dtype: torch.dtype | None = None) -> list[Tensor]:
        """One tensor `(S, *shape)` a block, in the blocks' order.

        `unbind` once: indexing layer by layer would allocate the whole stack's gradient for
        every layer in the backward pass.
        """
        found: dict[int, Tensor] = {}
        for name, (_, members) in self.groups().items():
            stacked = weights[name] if dtype is None else weights[name].to(dtype)
            found.update(zip((b.number for b in members), stacked.unbind(1), strict=True))
        return [found[block.number] for block in self.blocks]


def check_count(kind: str, argument: str, value: object, least: int = 1) -> None:
    """Raise unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{kind}: {argument}={value!r} must be a whole number, {least} or more")
