"""Prefix tuning (Li and Liang 2021): extra keys and values in every attention.

They enter through Hugging Face's attention interface. The functions registered here do exactly
what "sdpa" or "eager" do, unless a binding with a prefix for the calling module is in force.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..base.values import Count, checked_dataclass
from ..errors import ArchitectureError
from .architectures import Layer
from .binding import Attend, Binding, active
from .kinds import Kind, Weights, attention_inputs, gate_sites, rows, stack, wire_gates
from .signals import Scales
from .sites import Site

SMALL = 0.1
"""Starting size of a prefix, in units of the frozen keys and values: larger keys draw attention
off the text, whatever the values are."""

SUPPORTED = ("sdpa", "eager")
PREFIX = "bhpeft_"


@checked_dataclass
class Prefix(Kind):
    """softmax(q [P_k; K]^T) [P_v; V]: every token also attends to `length` free positions.

    Sites: "prefix.key" (layer, position, in), which says how much a token reads of a position, and
    "prefix.value" (layer, out, position), what it reads there: the two sides of an adapter whose
    activation is the softmax (He et al. 2022). `in` and `out` are key/value heads x head dim. If
    gated, "prefix.gate.weight" and "prefix.gate.bias" read the attention's input and scale P_k and
    P_v.

    The prefix enters after rotation and normalisation of the keys, so tokens keep their positions,
    and is visible to every token, under causal and sliding-window masks too.

    Attributes:
        length: number of positions.

    >>> Prefix(length=10).gated
    False
    """

    length: Count = 30

    name: ClassVar[str] = "prefix"

    def sites(self, layers: Sequence[Layer], scales: Scales) -> list[Site]:
        keys = [self.boost * scales.keys(layer) for layer in layers]
        values = [self.boost * scales.values(layer) for layer in layers]
        inner, outer = ("position", "in"), ("out", "position")
        shapes_key = [(self.length, layer.projections["key"].outputs) for layer in layers]
        shapes_value = [(layer.projections["value"].outputs, self.length) for layer in layers]
        sites = [
            stack("prefix.key", "input", inner, layers, shapes_key, keys, anchor=SMALL),
            stack("prefix.value", "output", outer, layers, shapes_value, values),
        ]
        if self.gated:
            sites += gate_sites("prefix", layers, attention_inputs(layers, scales))
        return sites

    def wire(self, weights: Weights, layers: Sequence[Layer], binding: Binding) -> None:
        pair = (rows(weights, f"prefix.{side}", binding.dtype) for side in ("key", "value"))
        for layer, keys, values in zip(layers, *pair, strict=True):
            binding.attend[layer.attention] = self._attend(binding, keys, values.mT, layer.number)
        if self.gated:
            wire_gates("prefix", weights, layers, binding)

    def _attend(self, binding: Binding, keys: Tensor, values: Tensor, number: int) -> Attend:
        def attend(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            scale = binding.scratch["prefix", number][..., None, None, None] if self.gated else None
            return _join(binding, keys, key, scale), _join(binding, values, value, scale)

        return attend


def _join(binding: Binding, prefix: Tensor, frozen: Tensor, scale: Tensor | None) -> Tensor:
    """A prefix (S, P, out) in front of keys or values (R, heads, T, head dim)."""
    count, heads, _, size = frozen.shape
    rows, length = binding.rows_per_particle(count), prefix.shape[1]
    front = prefix.to(frozen).reshape(-1, length, heads, size).transpose(1, 2)[:, None]
    front = front.expand(-1, rows, -1, -1, -1)
    if scale is not None:
        front = front * scale.to(frozen)
    joined = torch.cat([front, frozen.reshape(-1, rows, *frozen.shape[1:])], 3)
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
    """Take a claim back; with the last one the backbone is as it was."""
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
    """A mask (or bias) over keys, padded on the left by `extra` visible positions.

    Layers mostly share one mask, so the padded one is kept as long as that mask lives.
    """
    if mask is None:
        return None
    padded = binding.padded.get(mask)
    if padded is None:
        visible = True if mask.dtype == torch.bool else 0.0
        padded = binding.padded[mask] = nn.functional.pad(mask, (extra, 0), value=visible)
    return padded


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
