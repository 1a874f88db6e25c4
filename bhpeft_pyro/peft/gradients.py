"""PEFT weights of a layer learn through the layers above it: these must let gradients through."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from ..errors import ArchitectureError
from .architectures import Block

__all__ = ["check_gradients"]


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
