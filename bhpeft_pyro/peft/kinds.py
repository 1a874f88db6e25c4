"""What the kinds of PEFT share: their layers, stacks of one tensor for each layer, and a gate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import index
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ArchitectureError, ConfigError
from ..plain import make_plain
from .architectures import Block
from .binding import Binding
from .scales import Scales
from .sites import Role, Site, projection, zeros

__all__ = ["Kind", "check_count"]

OPENING = 0.5
"""A gate's value at zero weights, and about its mean under unit weights."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Kind(ABC):
    """One kind of PEFT, on all layers or some of them.

    Attributes:
        layers: numbers of the layers that carry it (negative ones count from the last), or None
            for all.
        gated: whether a sigmoid gate for each example, as in UniPELT (Mao et al. 2022), scales it.
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

    @property
    def boost(self) -> float:
        """The factor that makes up for a half-open gate."""
        return 1 / OPENING if self.gated else 1.0

    def blocks(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        """Those of the transformer's layers that carry this kind, or an error if they cannot."""
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

    @abstractmethod
    def sites(self, blocks: Sequence[Block], scales: Scales) -> list[Site]:
        """The random tensors of this kind on these blocks."""

    @abstractmethod
    def wire(self, weights: Weights, blocks: Sequence[Block], binding: Binding) -> None:
        """Enter into `binding` what these weights, `(S, *site.shape)`, do at which module."""


def stack(
    name: str,
    role: Role,
    dims: tuple[str, ...],
    blocks: Sequence[Block],
    shape: Callable[[Block], tuple[int, ...]],
    unit: Callable[[Block], Tensor],
    start: Callable[[tuple[int, ...], Tensor], Callable[[], Tensor]],
    anchor: float | None = None,
) -> Site:
    """The site of one tensor for each block, stacked along the dimension "layer".

    Args:
        name, role: as the site's.
        dims, shape, unit: of one block's tensor; its unit broadcasts against its shape.
        start: makes the site's `init` from its shape and unit.
        anchor: the sd, in units, of a random projection to centre on; None for none.
    """
    shapes = {shape(block) for block in blocks}
    if len(shapes) > 1:
        raise ArchitectureError(
            f"{name}: its shape differs between layers, {sorted(shapes)}; choose layers of the "
            "same width, with layers=(...)"
        )
    full = (len(blocks), *shapes.pop())
    units = torch.stack([unit(block) for block in blocks])
    units = units.reshape(*units.shape, *[1] * (len(full) - units.ndim))
    fixed = None if anchor is None else anchor * projection(name, full).to(units) * units
    numbers = tuple(block.number for block in blocks)
    return Site(name, full, ("layer", *dims), units, start(full, units), numbers, fixed, role)


def rows(weights: Weights, name: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """One tensor `(S, *shape)` for each block of a stack.

    Indexing layer by layer instead would allocate the whole stack's gradient for every layer in the
    backward pass.
    """
    stacked = weights[name] if dtype is None else weights[name].to(dtype)
    return stacked.unbind(1)


# A gate is sigmoid(w.x + b), averaged over an example's real tokens; each layer has its (w, b).


def attention_width(block: Block) -> int:
    """The width of the attention's input."""
    return block.projections["query"].inputs


def gate_sites(
    kind: str,
    blocks: Sequence[Block],
    rms: Callable[[Block], Tensor],
    width: Callable[[Block], int] = attention_width,
) -> list[Site]:
    """Weight and bias of the gates; `rms` and `width` are those of what they read."""

    def unit(block: Block) -> Tensor:
        return 1 / (rms(block) * width(block) ** 0.5)

    def one(block: Block) -> Tensor:
        return torch.ones_like(rms(block))

    name = f"{kind}.gate"
    return [
        stack(f"{name}.weight", "gate", ("in",), blocks, lambda b: (width(b),), unit, zeros),
        stack(f"{name}.bias", "gate", (), blocks, lambda b: (), one, zeros),
    ]


def gate_rows(kind: str, weights: Weights) -> list[tuple[Tensor, Tensor]]:
    """One (w, b), of shapes (S, in) and (S,), for each block."""
    w, b = rows(weights, f"{kind}.gate.weight"), rows(weights, f"{kind}.gate.bias")
    return list(zip(w, b, strict=True))


def wire_gates(kind: str, weights: Weights, blocks: Sequence[Block], binding: Binding) -> None:
    """At each attention's input, leave its gates in `binding.scratch[kind, layer number]`."""
    for block, gate in zip(blocks, gate_rows(kind, weights), strict=True):
        keep = partial(_keep_opening, binding, (kind, block.number), *gate)
        binding.add_before(block.projections["query"].module, keep)


def _keep_opening(
    binding: Binding, key: tuple[str, int], weight: Tensor, bias: Tensor, x: Tensor
) -> None:
    binding.scratch[key] = opening(binding, x, weight, bias)


def opening(binding: Binding, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gates (S, R/S) of examples x (R, T, in), or (R*T, in) where a model flattens them."""
    mask = binding.mask
    if x.ndim == 2 and mask is None:
        raise ConfigError(
            "gated adapters need bind(weights, attention_mask) on this architecture, which "
            "flattens rows and tokens"
        )
    rows, length = x.shape[:2] if mask is None else mask.shape
    if rows * length * x.shape[-1] != x.numel():
        raise ConfigError(
            f"gates average over the tokens that attention_mask {(rows, length)} marks, but "
            f"the transformer ran on hidden states of shape {tuple(x.shape)}"
        )
    each = binding.rows_per_particle(rows)
    flat = x.reshape(binding.particles, -1, x.shape[-1])
    logits = torch.bmm(flat, weight.to(x)[:, :, None]).float().reshape(-1, each, length)
    gates = torch.sigmoid(logits + bias.to(logits)[:, None, None])
    if mask is None:
        return gates.mean(-1)
    real = mask.to(gates.device, gates.dtype).reshape(gates.shape)
    return (gates * real).sum(-1) / real.sum(-1).clamp_min(1)


def check_count(kind: str, argument: str, value: object, least: int = 1) -> None:
    """Raise unless `value` is an int of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{kind}: {argument}={value!r} must be a whole number, {least} or more")
