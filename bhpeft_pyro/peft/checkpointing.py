"""Gradient checkpointing under a binding.

The recomputation of a layer runs in the backward pass, after `bind` was left and perhaps in
another thread, so it has to bring the weights back with it. Hugging Face checkpoints a layer only
in training mode, which would also turn its dropout on; under a binding the layer's call is
therefore checkpointed here, in evaluation mode, wherever `gradient_checkpointing_enable()` set
the layer's flag. Re-entrant checkpointing is never used: it cannot see weights that are not
arguments of the layer.

PEFT weights of a layer learn through the layers above it: these must let gradients through.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from ..errors import ArchitectureError
from .architectures import Block
from .binding import active, restore

__all__ = [
    "check_gradients",
    "install_checkpointing",
    "wants_checkpointing",
]


def check_gradients(base: PreTrainedModel, blocks: Sequence[Block]) -> None:
    """Run each projection on one row, and back.

    Quantised layers made for inference give an output without a gradient, and no error: a fit
    would go on, with all weights but those of the last layer left as they were.

    Raises:
        ArchitectureError: with the first projection that lets no gradient through.

    >>> from bhpeft_pyro.testing import tiny_backbone
    >>> from bhpeft_pyro.peft.architectures import blocks_of
    >>> check_gradients(tiny_backbone(), blocks_of(tiny_backbone()))
    """
    inputs = {
        projection.module: (f"layer {block.number}, {target}", projection.inputs)
        for block in blocks
        for target, projection in block.projections.items()
    }
    for module, (where, width) in inputs.items():
        try:
            weight = getattr(module, "weight", None)  # a layer may be kept in float32
            dtype = base.dtype
            if isinstance(weight, torch.Tensor) and weight.is_floating_point():
                dtype = weight.dtype
            with torch.enable_grad():  # the caller may have turned it off
                x = torch.zeros(1, width, device=base.device, dtype=dtype, requires_grad=True)
                gradient = torch.autograd.grad(module(x).sum(), x, allow_unused=True)[0]
            cause = None
        except RuntimeError as error:  # the output needs no gradient, or there is no way back
            gradient, cause = None, error
        if gradient is None:
            raise ArchitectureError(
                f"backbone: {where} ({type(module).__module__}.{type(module).__name__}) lets no "
                "gradient through, so PEFT weights below it could not learn; expected layers that "
                "can be trained through (quantised ones often cannot). The head alone needs none: "
                "presets.head_only()"
            ) from cause


def wants_checkpointing(layer: nn.Module) -> bool:
    """Whether gradient checkpointing is enabled on this layer."""
    return bool(getattr(layer, "gradient_checkpointing", False))


class CheckpointedForward:
    """A layer's `forward` that is the old one unless a binding is in force.

    A class rather than a closure, so that copying or pickling the backbone takes the layer along.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.forward: Callable[..., Any] = layer.forward
        self._own = layer.__dict__.get("forward")
        layer.forward = self

    def remove(self) -> None:
        """Take it off its layer, unless something else was put there since."""
        if self.layer.__dict__.get("forward") is not self:
            return
        if self._own is None:
            del self.layer.forward
        else:
            self.layer.forward = self._own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bindings = active()
        bound = any(self.layer in binding.layers for binding in bindings.values())
        if not (bound and torch.is_grad_enabled() and wants_checkpointing(self.layer)):
            return self.forward(*args, **kwargs)
        # A recomputation would write to a key/value cache a second time, so there is none.
        args = tuple(None if isinstance(x, Cache) else x for x in args)
        kwargs = {name: None if isinstance(x, Cache) else x for name, x in kwargs.items()}
        return checkpoint(
            partial(self.forward, **kwargs),
            *args,
            use_reentrant=False,
            preserve_rng_state=False,  # no dropout, no randomness
            context_fn=lambda: (nullcontext(), restore(bindings)),
        )


def install_checkpointing(layer: nn.Module) -> Callable[[], None] | None:
    """Put a `CheckpointedForward` on a layer that has none; returns how to take it off."""
    if isinstance(layer.__dict__.get("forward"), CheckpointedForward):
        return None
    return CheckpointedForward(layer).remove
