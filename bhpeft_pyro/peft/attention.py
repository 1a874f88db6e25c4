"""Keys and values in front of a layer's own, through Hugging Face's attention interface.

The functions registered here do exactly what "sdpa" or "eager" do, unless a binding with a
prefix for the calling module is in force.

One forward pass of the frozen transformer that measures how large its signals are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ArchitectureError
from .architectures import Block, Projection
from .binding import Binding, activate, active, install, new_token

__all__ = [
    "Scales",
    "claim",
    "measure",
    "release",
]


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


ROWS, LENGTH = 8, 32


@dataclass(eq=False)
class Scales:
    """Root mean squares in the frozen transformer, over tokens and features, as 0-d tensors."""

    hidden_size: int
    device: torch.device
    _squares: dict[tuple[nn.Module, str | int], list[Tensor]] = field(default_factory=dict)

    def record(self, module: nn.Module, what: str | int, x: Tensor) -> None:
        """Note the mean square of `x`; a module that runs several times is averaged over."""
        self._squares.setdefault((module, what), []).append(x.detach().float().square().mean())

    def _rms(self, module: nn.Module, what: str | int) -> Tensor:
        mean = torch.stack([s.to(self.device) for s in self._squares[module, what]]).mean()
        return mean.sqrt().clamp_min(1e-6)

    def inputs(self, projection: Projection) -> Tensor:
        """Of what the projection is applied to."""
        return self._rms(projection.module, "inputs")

    def outputs(self, projection: Projection) -> Tensor:
        """Of what it gives."""
        return self._rms(projection.module, projection.start)

    def keys(self, block: Block) -> Tensor:
        """Of the keys as they enter attention (rotated and normalised)."""
        return self._rms(block.attention, "keys")

    def values(self, block: Block) -> Tensor:
        """Of the values as they enter attention."""
        return self._rms(block.attention, "values")


def measure(base: PreTrainedModel, blocks: Sequence[Block], attention: bool) -> Scales:
    """Run `base` on 8 x 32 random token ids (seeded) and measure every projection.

    `attention` asks for keys and values too; it needs the attention function of
    `attention.py` in place.
    """
    device = next(base.parameters()).device
    scales = Scales(0, device)
    binding = Binding(new_token(), base, 1, None)
    for block in blocks:
        for projection in block.projections.values():
            _watch(binding, scales, projection)
        if attention:
            _watch_attention(binding, scales, block.attention)
    handles = install(binding)
    try:
        with torch.no_grad(), activate(binding):
            ids = _token_ids(base).to(device)
            output = base(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    scales.hidden_size = output[0].shape[-1]
    return scales


def _watch(binding: Binding, scales: Scales, projection: Projection) -> None:
    module, start, stop = projection.module, projection.start, projection.start + projection.outputs

    def after(x: Tensor, output: Tensor) -> Tensor:
        # One row is something that all rows share (DeBERTa's relative positions).
        if x.shape[0] > 1:
            scales.record(module, "inputs", x)
            scales.record(module, start, output[..., start:stop])
        return output

    binding.add_after(module, after)


def _watch_attention(binding: Binding, scales: Scales, attention: nn.Module) -> None:
    def attend(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        scales.record(attention, "keys", key)
        scales.record(attention, "values", value)
        return key, value

    binding.attend[attention] = attend


def _token_ids(base: PreTrainedModel) -> Tensor:
    """(8, 32) token ids, the same on every machine, without the special ones."""
    config = base.config
    embedding = base.get_input_embeddings()
    vocabulary = int(getattr(embedding, "num_embeddings", config.vocab_size))
    special: set[int | None] = set()
    for name in ("pad", "bos", "eos", "cls", "sep", "mask", "unk", "decoder_start"):
        value = getattr(config, f"{name}_token_id", None)
        special.update(value if isinstance(value, list | tuple) else [value])
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    # Learned positions may start at an offset of a few, so stay clear of the end.
    longest = getattr(config, "max_position_embeddings", None) or LENGTH + 4
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(
        len(ordinary), (ROWS, max(1, min(LENGTH, longest - 4))), generator=generator
    )
    return ordinary[picks]
