"""Low-rank adaptation (Hu et al. 2022), and the operation that LoRA and adapters share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import ArchitectureError, ConfigError
from .architectures import TARGETS, Block, Projection
from .binding import Binding
from .kinds import Kind, Weights, check_count, gate_sites, rows, stack, wire_gates
from .scales import Scales
from .sites import Site, kaiming, zeros

__all__ = ["LoRA", "add_low_rank"]


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
        if isinstance(self.targets, str):
            raise ConfigError(
                f"lora: targets={self.targets!r} must be a tuple, ({self.targets!r},)"
            )
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"lora: targets={self.targets} must be one or more, each once, of {TARGETS}"
            )
        check_count("lora", "rank", self.rank)
        if not self.alpha > 0:
            raise ConfigError(f"lora: alpha={self.alpha} must be positive")

    def blocks(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        chosen = super().blocks(blocks)
        for block, target in product(chosen, self.targets):
            projection = block.projections.get(target)
            if projection is None:
                raise ArchitectureError(
                    f"lora: this architecture has no {target!r}; layer {block.number} has "
                    f"{tuple(block.projections)}"
                )
            width = min(projection.inputs, projection.outputs)
            if self.rank > width:
                raise ConfigError(
                    f"lora: rank={self.rank} exceeds the width {width} of {target!r} in layer "
                    f"{block.number}"
                )
        return chosen

    def sites(self, blocks: Sequence[Block], scales: Scales) -> list[Site]:
        sites: list[Site] = []
        for target in self.targets:
            sites += self._pair(target, blocks, scales)
        if self.gated:
            sites += gate_sites("lora", blocks, lambda b: scales.inputs(b.projections["query"]))
        return sites

    def _pair(self, target: str, blocks: Sequence[Block], scales: Scales) -> list[Site]:
        def shape_a(block: Block) -> tuple[int, ...]:
            return self.rank, block.projections[target].inputs

        def shape_b(block: Block) -> tuple[int, ...]:
            return block.projections[target].outputs, self.rank

        def unit_a(block: Block) -> Tensor:
            projection = block.projections[target]
            return 1 / (scales.inputs(projection) * projection.inputs**0.5)

        def unit_b(block: Block) -> Tensor:
            # A x has RMS 1 in each of r dimensions, so B A x has sd(B) * sqrt(r).
            rms = scales.outputs(block.projections[target])
            return self.boost * rms * self.rank**0.5 / self.alpha

        a, b = f"lora.{target}.A", f"lora.{target}.B"
        return [
            stack(a, "input", ("rank", "in"), blocks, shape_a, unit_a, kaiming, anchor=1.0),
            stack(b, "output", ("out", "rank"), blocks, shape_b, unit_b, zeros),
        ]

    def wire(self, weights: Weights, blocks: Sequence[Block], binding: Binding) -> None:
        parts: dict[tuple[int, nn.Module], list[tuple[Projection, Tensor, Tensor]]] = {}
        for target in self.targets:
            pair = (rows(weights, f"lora.{target}.{side}", binding.dtype) for side in "AB")
            for block, a, b in zip(blocks, *pair, strict=True):
                projection = block.projections[target]
                parts.setdefault((block.number, projection.module), []).append((projection, a, b))
        if self.gated:
            wire_gates("lora", weights, blocks, binding)
        for (number, module), together in parts.items():
            a, b = _merge(together)
            gate = ("lora", number) if self.gated else None
            binding.add_after(module, partial(_branch, binding, a, b, self.alpha / self.rank, gate))


def _merge(parts: list[tuple[Projection, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """A (S, r', in) and B (S, total, r') of all targets in one, perhaps fused, module.

    B is zero in the columns of the other parts, so one fused product serves them all.
    """
    downs, ups = [], []
    for projection, a, b in parts:
        after = projection.total - projection.start - projection.outputs
        downs.append(a)
        ups.append(nn.functional.pad(b, (0, 0, projection.start, after)) if projection.fused else b)
    if len(parts) == 1:
        return downs[0], ups[0]
    return torch.cat(downs, 1), torch.cat(ups, 2)


def _branch(
    binding: Binding,
    a: Tensor,
    b: Tensor,
    scale: float,
    gate: tuple[str, int] | None,
    x: Tensor,
    output: Tensor,
) -> Tensor:
    openings = None if gate is None else binding.scratch[gate]
    return add_low_rank(binding, output, x, a, b, scale, gate=openings)
