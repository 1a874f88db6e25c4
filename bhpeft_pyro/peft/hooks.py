"""Hooks on a frozen transformer, and what is bound to it in this thread.

A backbone gets its hooks once: one on each projection, a `forward` around that of each layer and,
for a prefix, an attention function. They do nothing unless `BOUND` has something for the backbone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import ArchitectureError
from .architectures import Layer, architecture_of

SDPA, PREFIXED = "sdpa", "bhpeft_sdpa"
"""Names of attention functions: PyTorch's, and that to which a prefix may be bound."""

Args = tuple[Any, ...]
Kwargs = Mapping[str, Any]
Bindings = Mapping[nn.Module, "Bound"]

BOUND: ContextVar[Bindings] = ContextVar("bhpeft_bound", default=MappingProxyType({}))
"""What is bound in this thread, by base model."""


@dataclass(eq=False)
class Bound:
    """What is bound to a backbone, as its hooks call it; this one at most skips layers."""

    places: Mapping[nn.Module, Layer]  # of the backbone's layers, attentions and projections
    # Layers that compute nothing. They return `states`, or by default what the first of them gets;
    # beside these what is given here (None: the states alone).
    skipped: Mapping[Layer, Args | None] = field(default_factory=dict)
    states: Tensor | None = None
    note: Callable[[Tensor], None] | None = None  # is shown what each of the other layers gets
    # Masks already padded for a prefix: layers mostly share one.
    padded: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    def run(self, layer: Layer, forward: Callable[..., Any], args: Args, kwargs: Kwargs) -> Any:
        """What a layer returns."""
        if layer not in self.skipped:
            if self.note is not None:
                self.note(hidden_states(args, kwargs))
            return forward(*args, **kwargs)
        if self.states is None:
            self.states = args[0]
        beside = self.skipped[layer]
        return self.states if beside is None else (self.states, *beside)

    def project(self, module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """What a linear module returns for x."""
        return output

    def attend(self, module: nn.Module, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (R, heads, T, head dim) of an attention, maybe more than it computed."""
        return key, value

    def pad(self, mask: Tensor | None, extra: int) -> Tensor | None:
        """A mask (or bias) over keys, padded on the left by `extra` visible positions."""
        if mask is not None and mask not in self.padded:
            visible = True if mask.dtype == torch.bool else 0.0
            self.padded[mask] = nn.functional.pad(mask, (extra, 0), value=visible)
        return None if mask is None else self.padded[mask]


@contextmanager
def in_force(bindings: Bindings) -> Iterator[None]:
    """Bind exactly these, in this thread."""
    token = BOUND.set(bindings)
    try:
        yield
    finally:
        BOUND.reset(token)


def bound_to(module: nn.Module) -> Bound | None:
    """What is bound to this module's backbone."""
    return next((bound for bound in BOUND.get().values() if module in bound.places), None)


def hidden_states(args: Args, kwargs: Kwargs) -> Tensor:
    """What a layer gets first: some models call their layers by keyword."""
    states: Tensor = args[0] if args else next(iter(kwargs.values()))
    return states


class LayerForward:
    """A layer's `forward`, which asks what is bound: hooks cannot replace what a module computes. A
    class, not a closure, so that copying or pickling the backbone takes the module along."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.forward: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (bound := bound_to(self.module)) is None:
            return self.forward(*args, **kwargs)
        return bound.run(bound.places[self.module], self.forward, args, kwargs)


def _project(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    bound = bound_to(module)
    return output if bound is None else bound.project(module, args[0], output)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What "sdpa" computes, with the prefix that is bound."""
    length, bound = key.shape[2], bound_to(module)
    if bound is not None:
        key, value = bound.attend(module, key, value)
    if bound is not None and (extra := key.shape[2] - length):
        if attention_mask is None and _causal(module, query, kwargs.get("is_causal")):
            shape = 1, 1, query.shape[2], length
            attention_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        attention_mask = bound.pad(attention_mask, extra)
        if "position_bias" in kwargs:
            kwargs["position_bias"] = bound.pad(kwargs["position_bias"], extra)
    sdpa: Callable[..., tuple[Tensor, Tensor | None]] = ALL_ATTENTION_FUNCTIONS[SDPA]
    return sdpa(module, query, key, value, attention_mask, **kwargs)


def _causal(module: nn.Module, query: Tensor, flag: bool | None) -> bool:
    """Whether "sdpa", given no mask, would hide the future."""
    return query.shape[2] > 1 and bool(getattr(module, "is_causal", True) if flag is None else flag)


AttentionInterface.register(PREFIXED, _attention)
AttentionMaskInterface.register(PREFIXED, ALL_MASK_ATTENTION_FUNCTIONS[SDPA])


def install(layers: Sequence[Layer]) -> None:
    """Put the hooks on these layers, where they are not yet."""
    for layer in layers:
        if not isinstance(layer.module.forward, LayerForward):
            layer.module.forward = LayerForward(layer.module)
        for projection in layer.projections.values():
            if _project not in projection.module._forward_hooks.values():
                projection.module.register_forward_hook(_project)


def install_attention(base: PreTrainedModel) -> None:
    """Let a backbone's attention go through `_attention`, if it goes through "sdpa"."""
    model_type, name = base.config.model_type, base.config._attn_implementation
    if not architecture_of(model_type).prefix:
        raise ArchitectureError(
            f"prefix: {model_type!r} computes its attention in a way of its own and cannot carry a "
            "prefix; LoRA and Adapter work (--preset lora)"
        )
    if name not in (SDPA, PREFIXED):
        raise ArchitectureError(
            f"prefix: needs attn_implementation 'sdpa', but this backbone uses {name!r}: load it "
            "with from_pretrained(..., attn_implementation='sdpa')"
        )
    base.config._attn_implementation = PREFIXED


def bare_copy(backbone: PreTrainedModel) -> PreTrainedModel:
    """A copy of a backbone without these hooks."""
    copied = copy.deepcopy(backbone)
    for module in copied.modules():
        if isinstance(module.forward, LayerForward):
            module.forward = module.forward.forward
        for number in [n for n, hook in module._forward_hooks.items() if hook is _project]:
            del module._forward_hooks[number]
    if copied.config._attn_implementation == PREFIXED:
        copied.config._attn_implementation = SDPA
    return copied
