"""The one operation behind LoRA and the adapters: add up(act(down x)) to a frozen output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .binding import Binding

__all__ = ["add_low_rank"]


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
    the dtype of `output`, which is what autocast would do.
    """
    particles, shape = down.shape[0], output.shape
    if x.ndim > 2:
        binding.rows_per_particle(x.shape[0])
    x = x.to(output.dtype).reshape(particles, -1, x.shape[-1])
    hidden = torch.bmm(x, down.to(output).transpose(1, 2))
    if activation is not None:
        hidden = activation(hidden)
    if gate is not None:
        rows = hidden.reshape(particles, gate.shape[1], -1, hidden.shape[-1])
        hidden = (rows * gate.to(output)[..., None, None]).reshape(hidden.shape)
    frozen = output.reshape(particles, -1, shape[-1])
    up = up.to(output).transpose(1, 2)
    return torch.baddbmm(frozen, hidden, up, alpha=scale).reshape(shape)
