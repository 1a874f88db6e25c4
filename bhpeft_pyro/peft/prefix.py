"""Prefix tuning (Li and Liang 2021): extra keys and values in every attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ArchitectureError
from .architectures import Block
from .attention import Scales
from .binding import Binding
from .gate import OPENING, Gate, keep_opening
from .kinds import Kind, Stack, Weights, check_count
from .sites import Site, kaiming, normal, projection

__all__ = ["Prefix"]

SMALL = 0.1
"""Start of a prefix, in units of the frozen keys and values: larger keys draw attention off the
text, whatever the values are."""
TANH_RMS = 0.628
"""RMS of tanh(z), z ~ N(0, 1)."""


@dataclass(frozen=True)
class Prefix(Kind):
    """softmax(q [P_k; K]^T) [P_v; V]: every token also attends to `length` free positions.

    Direct sites: "prefix.key" (layer, position, in), which says how much a token reads of a
    position, and "prefix.value" (layer, out, position), what it reads there: the two sides of an
    adapter whose activation is the softmax (He et al. 2022). With a shared encoder
    (the paper's), P = up tanh(down E) for all layers at once, of the sites "prefix.embedding"
    (position, in), "prefix.down" (bottleneck, in) and "prefix.up" (layer, kv, out, bottleneck);
    kv 0 are the keys. `out` is key/value heads x head dim. The prefix enters after rotation and
    normalisation of the keys, so tokens keep their positions, and is visible to every token,
    under causal and sliding-window masks too. If gated, "prefix.gate.weight" and
    "prefix.gate.bias" read the attention's input and scale P_k and P_v.

    Attributes:
        length: number of positions.
        encoder: bottleneck of the shared encoder, or None for a direct prefix.

    >>> Prefix(length=30, encoder=8).layers is None
    True
    """

    length: int = 30
    encoder: int | None = None

    name: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("prefix", "length", self.length)
        if self.encoder is not None:
            check_count("prefix", "encoder", self.encoder)

    def _gate(self, blocks: Sequence[Block]) -> Gate:
        return Gate(self.name, blocks, lambda block: block.projections["query"].inputs)

    def _stacks(self, blocks: Sequence[Block]) -> tuple[Stack, Stack]:
        return (
            Stack("prefix.key", blocks, lambda block: block.projections["key"].outputs),
            Stack("prefix.value", blocks, lambda block: block.projections["value"].outputs),
        )

    def _up(self, blocks: Sequence[Block]) -> Stack:
        return Stack("prefix.up", blocks, lambda block: block.projections["key"].outputs)

    def check(self, blocks: Sequence[Block]) -> None:
        for block in blocks:
            if (
                self.encoder is not None
                and block.projections["key"].outputs != block.projections["value"].outputs
            ):
                raise ArchitectureError(
                    f"prefix: encoder={self.encoder} needs keys and values of one width, which "
                    f"layer {block.number} has not; use encoder=None"
                )

    def sites(self, blocks: Sequence[Block], scales: Scales) -> list[Site]:
        boost = 1 / OPENING if self.gated else 1.0
        sites: list[Site] = []
        if self.encoder is None:
            keys, values = self._stacks(blocks)
            sites += keys.sites(
                lambda width: (self.length, width),
                ("position", "in"),
                "input",
                lambda block: boost * scales.keys(block),
                lambda shape, unit: normal(shape, SMALL * unit),
                anchor=SMALL,
            )
            sites += values.sites(
                lambda width: (width, self.length),
                ("out", "position"),
                "output",
                lambda block: boost * scales.values(block),
                lambda shape, unit: normal(shape, SMALL * unit),
            )
        else:
            sites += self._encoder_sites(self.encoder, blocks, scales, boost)
        if self.gated:
            sites += self._gate(blocks).sites(
                lambda block: scales.inputs(block.projections["query"]), scales.device
            )
        return sites

    def _encoder_sites(
        self, size: int, blocks: Sequence[Block], scales: Scales, boost: float
    ) -> list[Site]:
        width = scales.hidden_size
        one = torch.ones(1, 1, device=scales.device)
        embedding, down = (self.length, width), (size, width)

        def unit_up(block: Block) -> Tensor:
            both = torch.stack([scales.keys(block), scales.values(block)])
            return boost * both / (size**0.5 * TANH_RMS)

        return [
            Site(
                "prefix.embedding",
                embedding,
                ("position", "in"),
                one,
                normal(embedding, one),
                anchor=projection("prefix.embedding", embedding).to(one),
                role="input",
            ),
            Site(
                "prefix.down",
                down,
                ("bottleneck", "in"),
                one / width**0.5,
                kaiming(down, scales.device),
                anchor=projection("prefix.down", down).to(one) / width**0.5,
                role="input",
            ),
            *self._up(blocks).sites(
                lambda out: (2, out, size),
                ("kv", "out", "bottleneck"),
                "output",
                unit_up,
                lambda shape, unit: normal(shape, SMALL * unit),
            ),
        ]

    def _rows(self, weights: Weights, blocks: Sequence[Block]) -> list[tuple[Tensor, Tensor]]:
        """One (keys, values), each (S, P, out), a block."""
        if self.encoder is None:
            keys, values = (stack.rows(weights) for stack in self._stacks(blocks))
            return list(zip(keys, (value.mT for value in values), strict=True))
        down = weights["prefix.down"].transpose(1, 2)
        hidden = torch.tanh(torch.bmm(weights["prefix.embedding"], down))
        up = self._up(blocks)
        encoded = {}
        for name in up.groups():
            w = weights[name]
            flat = torch.bmm(hidden, w.flatten(1, 3).transpose(1, 2))
            # (S, P, layer * kv * out) to the (S, layer, P, kv, out) that `rows` expects
            encoded[name] = flat.reshape(*flat.shape[:2], *w.shape[1:4]).transpose(1, 2)
        return [(row[:, :, 0], row[:, :, 1]) for row in up.rows(encoded)]

    def wire(self, weights: Weights, blocks: Sequence[Block], binding: Binding) -> None:
        for block, (keys, values) in zip(blocks, self._rows(weights, blocks), strict=True):
            gate = ("prefix", block.number) if self.gated else None
            keys, values = keys.to(binding.dtype), values.to(binding.dtype)
            binding.attend[block.attention] = partial(_prepend, binding, keys, values, gate)
        if self.gated:
            for block, (weight, bias) in zip(blocks, self._gate(blocks).rows(weights), strict=True):
                binding.add_before(
                    block.projections["query"].module,
                    partial(keep_opening, binding, ("prefix", block.number), weight, bias),
                )


def _prepend(
    binding: Binding,
    prefix_keys: Tensor,
    prefix_values: Tensor,
    gate: tuple[str, int] | None,
    key: Tensor,
    value: Tensor,
) -> tuple[Tensor, Tensor]:
    """keys and values (R, heads, T, head dim) to (R, heads, P + T, head dim)."""
    scale = None if gate is None else binding.scratch[gate][..., None, None, None]
    return (
        _join(binding, prefix_keys, key, scale),
        _join(binding, prefix_values, value, scale),
    )


def _join(binding: Binding, prefix: Tensor, own: Tensor, scale: Tensor | None) -> Tensor:
    rows, heads, _, size = own.shape
    each = binding.rows_per_particle(rows)
    length = prefix.shape[1]
    front = prefix.to(own).reshape(-1, length, heads, size).transpose(1, 2)[:, None]
    front = front.expand(-1, each, -1, -1, -1)
    if scale is not None:
        front = front * scale.to(own)
    joined = torch.cat([front, own.reshape(-1, each, *own.shape[1:])], 3)
    return joined.reshape(rows, heads, -1, size)
