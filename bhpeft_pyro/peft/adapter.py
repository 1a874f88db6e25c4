"""Bottleneck adapters at the feed-forward block, parallel (He et al. 2022) or sequential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..errors import ConfigError
from .architectures import Block
from .binding import Binding
from .kinds import Kind, Weights, check_count, gate_rows, gate_sites, opening, rows, stack
from .lora import add_low_rank
from .scales import Scales
from .sites import Site, kaiming, zeros

__all__ = ["Adapter"]

PLACEMENTS = ("parallel", "sequential")


@dataclass(frozen=True)
class Adapter(Kind):
    """A bottleneck beside or behind the feed-forward block, before the residual sum and the norm.

    With x the input and h = FFN(x) the output of the block, h becomes

        parallel:   h + scale * up(act(down x))     (He et al. 2022; the paper's choice)
        sequential: h + scale * up(act(down h))     (Houlsby et al. 2019 with scale 1)

    Sites: "adapter.down" (layer, bottleneck, in), "adapter.up" (layer, out, bottleneck); no
    biases. If gated, "adapter.gate.weight" and "adapter.gate.bias", reading what `down` reads.

    Attributes:
        size: width of the bottleneck.
        scale: the factor in the formulas.
        placement: "parallel" or "sequential".
        activation: any name that transformers knows ("relu", "gelu", "silu", "tanh", ...).

    >>> Adapter(size=16, placement="sequential", scale=1.0).activation
    'relu'
    """

    size: int = 8
    scale: float = 4.0
    placement: str = "parallel"
    activation: str = "relu"

    name: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("adapter", "size", self.size)
        if not self.scale > 0:
            raise ConfigError(f"adapter: scale={self.scale} must be positive")
        if self.placement not in PLACEMENTS:
            raise ConfigError(f"adapter: placement={self.placement!r} must be one of {PLACEMENTS}")
        if self.activation not in ACT2FN:
            raise ConfigError(
                f"adapter: activation={self.activation!r} must be one of {tuple(ACT2FN)}"
            )

    def _inputs(self, block: Block) -> int:
        """Width of what `down` and the gate read."""
        if self.placement == "parallel":
            return block.projections["ffn_in"].inputs
        return block.projections["ffn_out"].outputs

    def sites(self, blocks: Sequence[Block], scales: Scales) -> list[Site]:
        def rms_out(block: Block) -> Tensor:
            return scales.outputs(block.projections["ffn_out"])

        def rms_in(block: Block) -> Tensor:
            if self.placement == "parallel":
                return scales.inputs(block.projections["ffn_in"])
            return rms_out(block)

        def shape_down(block: Block) -> tuple[int, ...]:
            return self.size, self._inputs(block)

        def shape_up(block: Block) -> tuple[int, ...]:
            return block.projections["ffn_out"].outputs, self.size

        def unit_down(block: Block) -> Tensor:
            return 1 / (rms_in(block) * self._inputs(block) ** 0.5)

        reach = self.scale * self.size**0.5 * _rms_after(ACT2FN[self.activation])

        def unit_up(block: Block) -> Tensor:
            return self.boost * rms_out(block) / reach

        inner, outer = ("bottleneck", "in"), ("out", "bottleneck")
        return [
            stack("adapter.down", "input", inner, blocks, shape_down, unit_down, kaiming, 1.0),
            stack("adapter.up", "output", outer, blocks, shape_up, unit_up, zeros),
            *(gate_sites("adapter", blocks, rms_in, self._inputs) if self.gated else ()),
        ]

    def wire(self, weights: Weights, blocks: Sequence[Block], binding: Binding) -> None:
        activation = ACT2FN[self.activation]
        gates: list[tuple[Tensor, Tensor] | None] = [None] * len(blocks)
        if self.gated:
            gates = [*gate_rows("adapter", weights)]
        pair = (rows(weights, f"adapter.{side}", binding.dtype) for side in ("down", "up"))
        for block, gate, down, up in zip(blocks, gates, *pair, strict=True):
            source = None
            if self.placement == "parallel":
                source = block.projections["ffn_in"].module
                binding.add_before(source, partial(_keep, binding, source))
            branch = partial(_branch, binding, source, down, up, self.scale, activation, gate)
            binding.add_after(block.projections["ffn_out"].module, branch)


def _keep(binding: Binding, module: nn.Module, x: Tensor) -> None:
    binding.scratch[module] = x


def _branch(
    binding: Binding,
    source: nn.Module | None,
    down: Tensor,
    up: Tensor,
    scale: float,
    activation: Callable[[Tensor], Tensor],
    gate: tuple[Tensor, Tensor] | None,
    _: Tensor,
    output: Tensor,
) -> Tensor:
    x = output if source is None else binding.scratch.pop(source)
    openings = None if gate is None else opening(binding, x, *gate)
    return add_low_rank(binding, output, x, down, up, scale, activation, openings)


def _rms_after(activation: Callable[[Tensor], Tensor]) -> float:
    """RMS of activation(z), z ~ N(0, 1), on 4,095 quantiles."""
    z = torch.special.ndtri(torch.linspace(0, 1, 4097, dtype=torch.float64)[1:-1]).float()
    with torch.no_grad():
        return float(activation(z).square().mean().sqrt().clamp_min(1e-3))
