"""Bottleneck adapters at the feed-forward block, parallel (He et al. 2022) or sequential."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..base.checks import COUNT, POSITIVE, Rule, check_fields, one_of
from .architectures import Layer
from .binding import After, Binding
from .kinds import Kind, Weights, gate_rows, gate_sites, input_unit, opening, rows, stack
from .lora import add_low_rank
from .signals import Scales
from .sites import Site, kaiming, zeros

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
        rules: dict[str, Rule] = {
            "size": COUNT,
            "scale": POSITIVE,
            "placement": one_of(*PLACEMENTS),
            "activation": one_of(*ACT2FN),
        }
        check_fields(self, rules, "adapter")

    def sites(self, layers: Sequence[Layer], scales: Scales) -> list[Site]:
        outputs = [layer.projections["ffn_out"] for layer in layers]
        rms = [scales.outputs(p) for p in outputs]
        inputs = [(size, p.outputs) for size, p in zip(rms, outputs, strict=True)]
        if self.placement == "parallel":
            sources = [layer.projections["ffn_in"] for layer in layers]
            inputs = [(scales.inputs(p), p.inputs) for p in sources]
        reach = self.scale * self.size**0.5 * _rms_after(ACT2FN[self.activation])
        shapes_down = [(self.size, width) for _, width in inputs]
        shapes_up = [(p.outputs, self.size) for p in outputs]
        units_down = [input_unit(size, width) for size, width in inputs]
        units_up = [self.boost * size / reach for size in rms]
        inner, outer = ("bottleneck", "in"), ("out", "bottleneck")
        return [
            stack("adapter.down", "input", inner, layers, shapes_down, units_down, kaiming, 1.0),
            stack("adapter.up", "output", outer, layers, shapes_up, units_up, zeros),
            *(gate_sites("adapter", layers, inputs) if self.gated else ()),
        ]

    @property
    def factor(self) -> float:
        return self.scale

    def wire(self, weights: Weights, layers: Sequence[Layer], binding: Binding) -> None:
        gates: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        if self.gated:
            gates = [*gate_rows("adapter", weights)]
        pair = (rows(weights, f"adapter.{side}", binding.dtype) for side in ("down", "up"))
        for layer, gate, down, up in zip(layers, gates, *pair, strict=True):
            source = None
            if self.placement == "parallel":
                source = layer.projections["ffn_in"].module
                binding.before[source].append(partial(binding.scratch.__setitem__, source))
            branch = self._branch(binding, source, down, up, gate)
            binding.after[layer.projections["ffn_out"].module].append(branch)

    def _branch(
        self,
        binding: Binding,
        source: nn.Module | None,
        down: Tensor,
        up: Tensor,
        gate: tuple[Tensor, Tensor] | None,
    ) -> After:
        activation = ACT2FN[self.activation]

        def after(_: Tensor, output: Tensor) -> Tensor:
            x = output if source is None else binding.scratch.pop(source)
            openings = None if gate is None else opening(binding, x, *gate)
            return add_low_rank(binding, output, x, down, up, self.factor, activation, openings)

        return after


def _rms_after(activation: Callable[[Tensor], Tensor]) -> float:
    """RMS of activation(z), z ~ N(0, 1), on 4,095 quantiles."""
    z = torch.special.ndtri(torch.linspace(0, 1, 4097, dtype=torch.float64)[1:-1]).float()
    with torch.no_grad():
        return float(activation(z).square().mean().sqrt().clamp_min(1e-3))
