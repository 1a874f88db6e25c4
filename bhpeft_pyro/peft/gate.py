"""A gate per example, as in UniPELT (Mao et al. 2022): how much of a kind an example gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import ConfigError
from .architectures import Block
from .binding import Binding
from .kinds import Stack, Weights
from .sites import Site, zeros

__all__ = ["OPENING", "Gate", "keep_opening", "opening"]

OPENING = 0.5
"""Where a gate stands with zero weights, and about its mean under unit weights."""


class Gate:
    """sigmoid(w.x + b), averaged over an example's real tokens; one (w, b) a layer."""

    def __init__(self, kind: str, blocks: Sequence[Block], width: Callable[[Block], int]) -> None:
        self.weight = Stack(f"{kind}.gate.weight", blocks, width)
        self.bias = Stack(f"{kind}.gate.bias", blocks, lambda block: 1)

    def sites(self, rms: Callable[[Block], Tensor], device: torch.device) -> list[Site]:
        """Weight and bias; `rms` is the RMS of what the gate reads."""
        width = self.weight.width
        return [
            *self.weight.sites(
                lambda inputs: (inputs,),
                ("in",),
                "gate",
                lambda block: 1 / (rms(block) * width(block) ** 0.5),
                lambda shape, unit: zeros(shape, device),
            ),
            *self.bias.sites(
                lambda _: (),
                (),
                "gate",
                lambda block: torch.ones((), device=device),
                lambda shape, unit: zeros(shape, device),
            ),
        ]

    def rows(self, weights: Weights) -> list[tuple[Tensor, Tensor]]:
        """One (w, b), of shapes (S, in) and (S,), a block."""
        return list(zip(self.weight.rows(weights), self.bias.rows(weights), strict=True))


def opening(binding: Binding, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The gates (S, R/S) of examples x (R, T, in), or (R*T, in) where a model flattens them."""
    mask = binding.mask
    if x.ndim == 2 and mask is None:
        raise ConfigError(
            "gated adapters need bind(weights, attention_mask) on this architecture, which "
            "flattens rows and tokens"
        )
    rows, length = x.shape[:2] if mask is None else mask.shape
    if rows * length * x.shape[-1] != x.numel():
        raise ConfigError(
            f"gates average over the tokens that attention_mask {(rows, length)} marks, but "
            f"the transformer ran on hidden states of shape {tuple(x.shape)}"
        )
    each = binding.rows_per_particle(rows)
    flat = x.reshape(binding.particles, -1, x.shape[-1])
    logits = torch.bmm(flat, weight.to(x)[:, :, None]).float().reshape(-1, each, length)
    gates = torch.sigmoid(logits + bias.to(logits)[:, None, None])
    if mask is None:
        return gates.mean(-1)
    real = mask.to(gates.device, gates.dtype).reshape(gates.shape)
    return (gates * real).sum(-1) / real.sum(-1).clamp_min(1)


def keep_opening(
    binding: Binding, key: tuple[str, int], weight: Tensor, bias: Tensor, x: Tensor
) -> None:
    """Leave the gates of one layer in `binding.scratch[key]`, for a branch further on in it."""
    binding.scratch[key] = opening(binding, x, weight, bias)
