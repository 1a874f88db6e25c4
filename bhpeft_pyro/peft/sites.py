"""A site: one random PEFT tensor, stacked over the layers that carry it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

__all__ = ["Role", "Site"]

Role = Literal["input", "output", "gate", "head", "other"]
"""What a site is to its branch: the change a branch makes is the product of its two sides."""


@dataclass(frozen=True, eq=False)
class Site:
    """Name, shape and natural scale of one random tensor.

    Attributes:
        name: what `pyro.sample` calls it, for example "lora.query.A".
        shape: its shape without particles; the first dimension is the layer where there is one.
        dims: one name a dimension: layer, rank, in, out, position, bottleneck, kv; of the head
            output, feature.
        unit: the sd, broadcastable to `shape`, at which the branch this tensor belongs to has
            unit effect if all its weights are N(0, unit^2). On the input side: their output has
            RMS 1 for the RMS of the input they really get. On the output side: the branch has the
            RMS of the frozen output it is added to. Prefix: the RMS of the frozen keys, or values,
            of that layer.
        init: draws a start for a guide's location, of `shape`; the branch is (nearly) off there.
        layers: the layers' numbers along dimension "layer", () if there is no such dimension.
        anchor: of the input side: the projection, of `shape`, that a prior may be centred on. A
            prior centred on zero makes every draw another projection, and the output side learns
            nothing that survives the next draw.
        role: "input" side (LoRA's A, an adapter's down, a prefix's keys), "output" side (LoRA's B,
            an adapter's up, a prefix's values), "gate", "head", or "other" (a likelihood's). The
            ready priors go by it.

    >>> site = Site("head.bias", (3,), ("output",), torch.ones(1), lambda: torch.zeros(3))
    >>> site.ndim, site.numel
    (1, 3)
    """

    name: str
    shape: tuple[int, ...]
    dims: tuple[str, ...]
    unit: Tensor
    init: Callable[[], Tensor]
    layers: tuple[int, ...] = ()
    anchor: Tensor | None = None
    role: Role = "other"

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    def to(self, device: torch.device) -> Site:
        """The same, with its tensors on a device."""
        if self.unit.device == device:
            return self
        anchor = None if self.anchor is None else self.anchor.to(device)
        init = self.init
        return replace(
            self, unit=self.unit.to(device), init=lambda: init().to(device), anchor=anchor
        )


def projection(name: str, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) entries, by name, so the same in every call, process and round."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator)


def zeros(shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    """A start at zero."""
    return lambda: torch.zeros(shape, device=device)


def kaiming(shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
    """U(-1/sqrt(in), 1/sqrt(in)), as `torch.nn.Linear` and LoRA start; `in` is the last dim."""
    bound = shape[-1] ** -0.5
    return lambda: torch.empty(shape, device=device).uniform_(-bound, bound)


def normal(shape: tuple[int, ...], sd: Tensor) -> Callable[[], Tensor]:
    """N(0, sd^2), with `sd` broadcastable to `shape`."""
    return lambda: torch.randn(shape, device=sd.device) * sd
