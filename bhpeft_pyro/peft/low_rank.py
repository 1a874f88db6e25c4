"""LoRA (Hu et al. 2022) and bottleneck adapters: low-rank branches at linear layers.

Adapters stand beside the feed-forward block (parallel, He et al. 2022) or behind it (sequential,
Houlsby et al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..base.checks import shown
from ..base.values import Count, Names, Positive, checked_dataclass
from ..errors import ArchitectureError, ConfigError
from .architectures import TARGETS, Layer
from .binding import After, Binding
from .kinds import (
    Kind,
    Products,
    Weights,
    attention_inputs,
    gate_rows,
    gate_sites,
    input_unit,
    opening,
    rows,
    stack,
    wire_gates,
)
from .signals import Scales
from .sites import Site


def add_low_rank(
    binding: Binding,
    output: Tensor,
    x: Tensor,
    down: Tensor,
    up: Tensor,
    scale: float,
    activation: Callable[[Tensor], Tensor] | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """output + scale * gate * up(activation(down x)), each particle with its own weights.

    Shapes: output (R, T, out), x (R, T, in), down (S, r, in), up (S, out, r), gate (S, R/S).
    Architectures that flatten rows and tokens, (R*T, d), work just as well. All is computed in
    the dtype of `output`, as autocast would do.
    """
    particles, shape = down.shape[0], output.shape
    if x.ndim > 2:
        binding.rows_per_particle(x.shape[0])
    x = x.to(output.dtype).reshape(particles, -1, x.shape[-1])
    hidden = torch.bmm(x, down.to(output).transpose(1, 2))
    if activation is not None:
        hidden = activation(hidden)
    if gate is not None:
        examples = hidden.reshape(particles, gate.shape[1], -1, hidden.shape[-1])
        hidden = (examples * gate.to(output)[..., None, None]).reshape(hidden.shape)
    frozen = output.reshape(particles, -1, shape[-1])
    up = up.to(output).transpose(1, 2)
    return torch.baddbmm(frozen, hidden, up, alpha=scale).reshape(shape)


@checked_dataclass
class LoRA(Kind):
    """W x becomes W x + alpha/rank * B A x on the targeted projections.

    Sites, for each target: "lora.<target>.A" (layer, rank, in) and "lora.<target>.B"
    (layer, out, rank). If gated, "lora.gate.weight" and "lora.gate.bias": one gate for each layer,
    which reads the attention's input.

    Attributes:
        targets: out of query, key, value, output, ffn_in, ffn_gate (gated feed-forward blocks
            only) and ffn_out.
        rank: r, the rows of A and columns of B.
        alpha: the branch is scaled by alpha / rank.

    >>> LoRA(("query",), rank=4).alpha
    16.0
    """

    targets: Names = ("query", "value")
    rank: Count = 8
    alpha: Positive = 16.0

    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"lora: targets={shown(self.targets)} must be one or more, each once, of {TARGETS}"
            )

    def chosen(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        chosen = super().chosen(layers)
        for layer, target in product(chosen, self.targets):
            if target not in layer.projections:
                raise ArchitectureError(
                    f"lora: this architecture has no {target!r}; layer {layer.number} has "
                    f"{tuple(layer.projections)}"
                )
        return chosen

    def sites(self, layers: Sequence[Layer], scales: Scales) -> list[Site]:
        sites: list[Site] = []
        for target in self.targets:
            a, b = f"lora.{target}.A", f"lora.{target}.B"
            maps = [layer.projections[target] for layer in layers]
            shapes_a = [(self.rank, p.inputs) for p in maps]
            shapes_b = [(p.outputs, self.rank) for p in maps]
            units_a = [input_unit(scales.inputs(p), p.inputs) for p in maps]
            # A x has RMS 1 in each of r dimensions, so B A x has sd(B) * sqrt(r).
            units_b = [self.boost * scales.outputs(p) * self.rank**0.5 / self.alpha for p in maps]
            sites += [
                stack(a, "input", ("rank", "in"), layers, shapes_a, units_a, anchor=1.0),
                stack(b, "output", ("out", "rank"), layers, shapes_b, units_b),
            ]
        if self.gated:
            sites += gate_sites("lora", layers, attention_inputs(layers, scales))
        return sites

    @property
    def factor(self) -> float:
        return self.alpha / self.rank

    def products(
        self, weights: Weights, layers: Sequence[Layer], dtype: torch.dtype | None = None
    ) -> Products:
        parts: dict[tuple[int, nn.Module], tuple[list[Tensor], list[Tensor]]] = {}
        for target in self.targets:
            pair = (rows(weights, f"lora.{target}.{side}", dtype) for side in "AB")
            for layer, a, b in zip(layers, *pair, strict=True):
                projection = layer.projections[target]
                downs, ups = parts.setdefault((layer.number, projection.module), ([], []))
                downs.append(a)
                ups.append(projection.whole(b))  # one product serves all fused ones
        return {
            key: (torch.cat(downs, 1), torch.cat(ups, 2)) for key, (downs, ups) in parts.items()
        }

    def wire(self, weights: Weights, layers: Sequence[Layer], binding: Binding) -> None:
        if self.gated:
            wire_gates("lora", weights, layers, binding)
        for (number, module), (a, b) in self.products(weights, layers, binding.dtype).items():
            binding.after[module].append(self._branch(binding, a, b, number))

    def _branch(self, binding: Binding, a: Tensor, b: Tensor, number: int) -> After:
        def after(x: Tensor, output: Tensor) -> Tensor:
            gate = binding.scratch["lora", number] if self.gated else None
            return add_low_rank(binding, output, x, a, b, self.factor, gate=gate)

        return after


@checked_dataclass
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

    size: Count = 8
    scale: Positive = 4.0
    placement: Literal["parallel", "sequential"] = "parallel"
    activation: str = "relu"

    name: ClassVar[str] = "adapter"

    def __post_init__(self) -> None:
        if self.activation not in ACT2FN:
            raise ConfigError(
                f"activation={shown(self.activation)}: expected one of {', '.join(ACT2FN)}"
            )

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
            stack("adapter.down", "input", inner, layers, shapes_down, units_down, anchor=1.0),
            stack("adapter.up", "output", outer, layers, shapes_up, units_up),
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
