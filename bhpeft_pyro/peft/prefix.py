"""Prefix tuning (Li and Liang 2021): extra keys and values in every attention.

They enter through Hugging Face's attention interface. The functions registered here do exactly
what "sdpa" or "eager" do, unless a binding with a prefix for the calling module is in force.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ArchitectureError
from .architectures import Block
from .binding import Binding, active
from .kinds import Kind, Weights, check_count, gate_sites, rows, stack, wire_gates
from .scales import Scales
from .sites import Site, kaiming, normal, projection

__all__ = ["Prefix", "claim", "release"]

SMALL = 0.1
"""Starting size of a prefix, in units of the frozen keys and values: larger keys draw attention
off the text, whatever the values are."""
TANH_RMS = 0.628
"""RMS of tanh(z), z ~ N(0, 1)."""

SUPPORTED = ("sdpa", "eager")
PREFIX = "bhpeft_"


@dataclass(frozen=True)
class Prefix(Kind):
    """softmax(q [P_k; K]^T) [P_v; V]: every token also attends to `length` free positions.

    Direct sites: "prefix.key" (layer, position, in), which says how much a token reads of a
    position, and "prefix.value" (layer, out, position), what it reads there: the two sides of an
    adapter whose activation is the softmax (He et al. 2022). With a shared encoder (the paper's),
    P = up tanh(down E) for all layers at once, with the sites "prefix.embedding" (position, in),
    "prefix.down" (bottleneck, in) and "prefix.up" (layer, kv, out, bottleneck); kv 0 are the keys.
    `out` is key/value heads x head dim. If gated, "prefix.gate.weight" and "prefix.gate.bias" read
    the attention's input and scale P_k and P_v.

    The prefix enters after rotation and normalisation of the keys, so tokens keep their positions,
    and is visible to every token, under causal and sliding-window masks too.

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

    def blocks(self, blocks: Sequence[Block]) -> tuple[Block, ...]:
        chosen = super().blocks(blocks)
        for block in chosen:
            if self.encoder is not None and _width(block, "key") != _width(block, "value"):
                raise ArchitectureError(
                    f"prefix: encoder={self.encoder} needs keys and values of the same width, but "
                    f"those of layer {block.number} differ; use encoder=None"
                )
        return chosen

    def sites(self, blocks: Sequence[Block], scales: Scales) -> list[Site]:
        sites = (
            self._direct(blocks, scales)
            if self.encoder is None
            else self._encoded(self.encoder, blocks, scales)
        )
        if self.gated:
            sites += gate_sites("prefix", blocks, lambda b: scales.inputs(b.projections["query"]))
        return sites

    def _direct(self, blocks: Sequence[Block], scales: Scales) -> list[Site]:
        def unit_key(block: Block) -> Tensor:
            return self.boost * scales.keys(block)

        def unit_value(block: Block) -> Tensor:
            return self.boost * scales.values(block)

        def shape_key(block: Block) -> tuple[int, ...]:
            return self.length, _width(block, "key")

        def shape_value(block: Block) -> tuple[int, ...]:
            return _width(block, "value"), self.length

        key, value = ("position", "in"), ("out", "position")
        return [
            stack("prefix.key", "input", key, blocks, shape_key, unit_key, _small, SMALL),
            stack("prefix.value", "output", value, blocks, shape_value, unit_value, _small),
        ]

    def _encoded(self, size: int, blocks: Sequence[Block], scales: Scales) -> list[Site]:
        one = torch.ones(1, 1, device=scales.device)
        width = scales.hidden_size

        def shared(name: str, dim: str, rows: int, inverse: float, start: Any) -> Site:
            shape, unit = (rows, width), one / inverse
            anchor = projection(name, shape).to(one) / inverse
            init = start(shape, unit)
            return Site(name, shape, (dim, "in"), unit, init, anchor=anchor, role="input")

        def shape_up(block: Block) -> tuple[int, ...]:
            return 2, _width(block, "key"), size

        def unit_up(block: Block) -> Tensor:
            both = torch.stack([scales.keys(block), scales.values(block)])
            return self.boost * both / (size**0.5 * TANH_RMS)

        up = ("kv", "out", "bottleneck")
        return [
            shared("prefix.embedding", "position", self.length, 1.0, normal),
            shared("prefix.down", "bottleneck", size, width**0.5, kaiming),
            stack("prefix.up", "output", up, blocks, shape_up, unit_up, _small),
        ]

    def _rows(self, weights: Weights) -> list[tuple[Tensor, Tensor]]:
        """One (keys, values), each (S, P, out), for each block."""
        if self.encoder is None:
            values = (value.mT for value in rows(weights, "prefix.value"))
            return list(zip(rows(weights, "prefix.key"), values, strict=True))
        down, up = weights["prefix.down"].transpose(1, 2), weights["prefix.up"]
        hidden = torch.tanh(torch.bmm(weights["prefix.embedding"], down))
        flat = torch.bmm(hidden, up.flatten(1, 3).transpose(1, 2))
        both = flat.reshape(*flat.shape[:2], *up.shape[1:4])  # (S, P, layer, kv, out)
        return [(row[:, :, 0], row[:, :, 1]) for row in both.unbind(2)]

    def wire(self, weights: Weights, blocks: Sequence[Block], binding: Binding) -> None:
        for block, (keys, values) in zip(blocks, self._rows(weights), strict=True):
            gate = ("prefix", block.number) if self.gated else None
            keys, values = keys.to(binding.dtype), values.to(binding.dtype)
            binding.attend[block.attention] = partial(_prepend, binding, keys, values, gate)
        if self.gated:
            wire_gates("prefix", weights, blocks, binding)


def _width(block: Block, target: str) -> int:
    return block.projections[target].outputs


def _small(shape: tuple[int, ...], unit: Tensor) -> Any:
    return normal(shape, SMALL * unit)


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
    count, heads, _, size = own.shape
    each = binding.rows_per_particle(count)
    length = prefix.shape[1]
    front = prefix.to(own).reshape(-1, length, heads, size).transpose(1, 2)[:, None]
    front = front.expand(-1, each, -1, -1, -1)
    if scale is not None:
        front = front * scale.to(own)
    joined = torch.cat([front, own.reshape(-1, each, *own.shape[1:])], 3)
    return joined.reshape(count, heads, -1, size)


_claims: dict[int, set[int]] = {}


def claim(config: PretrainedConfig, token: int) -> None:
    """Send the attention of a backbone through this module, on behalf of attachment `token`.

    `config._attn_implementation` reads "bhpeft_sdpa" afterwards instead of "sdpa", until the last
    claim is released.
    """
    name = config._attn_implementation
    if not str(name).startswith(PREFIX):
        if name not in SUPPORTED or getattr(config, "reorder_and_upcast_attn", False):
            raise ArchitectureError(
                f"prefix: needs attn_implementation 'sdpa' or 'eager' (and no "
                f"reorder_and_upcast_attn), but this backbone uses {name!r}: load it with "
                "from_pretrained(..., attn_implementation='sdpa')"
            )
        config._attn_implementation = PREFIX + name
    _claims.setdefault(id(config), set()).add(token)


def release(config: PretrainedConfig, token: int) -> None:
    """Take a claim back; with the last one the configuration is as it was."""
    tokens = _claims.get(id(config), set())
    tokens.discard(token)
    if not tokens:
        _claims.pop(id(config), None)
        config._attn_implementation = str(config._attn_implementation).removeprefix(PREFIX)


def _attention(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    inner = _eager_of(module) if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
    for binding in active().values():
        attend = binding.attend.get(module)
        if attend is None:
            continue
        length = key.shape[2]
        key, value = attend(key, value)
        extra = key.shape[2] - length
        if extra:
            if attention_mask is None and name == "sdpa" and _causal(module, query, kwargs):
                attention_mask = torch.ones(
                    1, 1, query.shape[2], length, dtype=torch.bool, device=query.device
                ).tril()
            attention_mask = _pad(binding, attention_mask, extra)
            if "position_bias" in kwargs:
                kwargs["position_bias"] = _pad(binding, kwargs["position_bias"], extra)
    return inner(module, query, key, value, attention_mask, **kwargs)


def _causal(module: nn.Module, query: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether "sdpa", given no mask, would hide the future by its `is_causal` flag."""
    flag = kwargs.get("is_causal")
    return query.shape[2] > 1 and bool(getattr(module, "is_causal", True) if flag is None else flag)


def _pad(binding: Binding, mask: Tensor | None, extra: int) -> Tensor | None:
    """A mask (or bias) over keys, widened on the left by `extra` visible positions.

    Layers mostly share one mask, so the widened one is kept as long as that mask lives.
    """
    if mask is None:
        return None
    wide = binding.padded.get(mask)
    if wide is None:
        visible = True if mask.dtype == torch.bool else 0.0
        wide = binding.padded[mask] = nn.functional.pad(mask, (extra, 0), value=visible)
    return wide


def _eager_of(module: nn.Module) -> Any:
    """The model's own eager attention, which Hugging Face keeps beside the module's class."""
    for cls in type(module).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise ArchitectureError(
        f"prefix: {type(module).__name__} has no eager attention; load the backbone with "
        "attn_implementation='sdpa'"
    )


for _name in SUPPORTED:
    AttentionInterface.register(PREFIX + _name, partial(_attention, _name))
    AttentionMaskInterface.register(PREFIX + _name, ALL_MASK_ATTENTION_FUNCTIONS[_name])
