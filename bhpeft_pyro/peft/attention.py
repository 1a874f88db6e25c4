"""Keys and values in front of a layer's own, through Hugging Face's attention interface.

The functions registered here do exactly what "sdpa" or "eager" do, unless a binding with a
prefix for the calling module is in force.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ArchitectureError
from .binding import Binding, active

__all__ = ["claim", "release"]

SUPPORTED = ("sdpa", "eager")
PREFIX = "bhpeft_"

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

    Layers mostly share one mask, so the widened one is kept while that mask lives.
    """
    if mask is None:
        return None
    known = binding.padded.get(mask)
    if known is None:
        visible = True if mask.dtype == torch.bool else 0.0
        known = binding.padded[mask] = nn.functional.pad(mask, (extra, 0), value=visible)
    return known


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
