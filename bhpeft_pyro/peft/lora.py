"""Low-rank adaptation (Hu et al. 2022), and the operation that LoRA and adapters share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..base.checks import COUNT, POSITIVE, check_fields, shown
from ..errors import ArchitectureError, ConfigError
from .architectures import TARGETS, Layer
from .binding import After, Binding
from .kinds import (
    Kind,
    Products,
    Weights,
    attention_inputs,
    gate_sites,
    input_unit,
    rows,
    stack,
    wire_gates,
)
from .signals import Scales
from .sites import Site, kaiming, zeros


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


@dataclass(frozen=True)
class LoRA(Kind):
    """W x becomes W x + alpha/rank * B A x on the targeted projections.

    Sites, for each target: "lora.<target>.A" (layer, rank, in) and "lora.<target>.B"
    (layer, out, rank). If gated, "lora.gate.weight" and "lora.gate.bias": one gate for each layer,
    which reads the attention's input.

    Attributes:
        targets: out of query, key, value, output, ffn_in, ffn_gate (gated feed-forward blocks
            only) and ffn_out.
        rank: r, at most the width of the projections.
        alpha: the branch is scaled by alpha / rank.

    >>> LoRA(("query",), rank=4).alpha
    16.0
    """

    targets: Sequence[str] = ("query", "value")
    rank: int = 8
    alpha: float = 16.0

    name: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.targets, str) or not isinstance(self.targets, Sequence):
            raise ConfigError(
                f"lora: targets={shown(self.targets)} must be a tuple, ({shown(self.targets)},)"
            )
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"lora: targets={shown(self.targets)} must be one or more, each once, of {TARGETS}"
            )
        check_fields(self, {"rank": COUNT, "alpha": POSITIVE}, "lora")

    def chosen(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        chosen = super().chosen(layers)
        for layer, target in product(chosen, self.targets):
            projection = layer.projections.get(target)
            if projection is None:
                raise ArchitectureError(
                    f"lora: this architecture has no {target!r}; layer {layer.number} has "
                    f"{tuple(layer.projections)}"
                )
            width = min(projection.inputs, projection.outputs)
            if self.rank > width:
                raise ConfigError(
                    f"lora: rank={self.rank} exceeds the width {width} of {target!r} in layer "
                    f"{layer.number}"
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
                stack(a, "input", ("rank", "in"), layers, shapes_a, units_a, kaiming, anchor=1.0),
                stack(b, "output", ("out", "rank"), layers, shapes_b, units_b, zeros),
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
