"""A site: one random PEFT tensor, stacked over the layers that carry it."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Role = Literal["input", "output", "gate", "head", "other"]
"""A site's part in its branch: the change a branch makes is the product of its two sides."""


@dataclass(frozen=True, eq=False, repr=False)
class Site:
    """Name, shape and natural scale of one random tensor.

    Attributes:
        name: the name in `pyro.sample`, for example "lora.query.A".
        shape: its shape without particles; the first dimension is the layer where there is one.
        dims: one name for each dimension: layer, rank, in, out, position, bottleneck; in the head,
            output and feature.
        unit: the sd of its weights, broadcastable to `shape`, at which its branch is as large as
            the frozen output that it is added to (docs/method.md). On the input side, the branch's
            inner values then have RMS 1, given the RMS of the branch's real input. On the output
            side, the branch has the RMS of that output. For a prefix it is the RMS of the layer's
            frozen keys, or values.
        init: draws a starting value of `shape` for a guide's mean; the branch is (nearly) off
            there.
        layers: the layers' numbers along dimension "layer", () if there is no such dimension.
        anchor: for an input side, a random projection of `shape` on which a prior may be centred.
            Around zero every draw would be another projection, and the output side would learn
            nothing that survives the next draw.
        role: "input" side (LoRA's A, an adapter's down, a prefix's keys), "output" side (LoRA's B,
            an adapter's up, a prefix's values), "gate", "head", or "other" (a likelihood's). The
            ready priors choose their scales by it.

    >>> site = Site("head.bias", (3,), ("output",), torch.ones(1), lambda: torch.zeros(3))
    >>> site.ndim, site.numel
    (1, 3)
    >>> site
    <Site head.bias: output 3, role other, unit 1>
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

    @property
    def sizes(self) -> str:
        """The dimensions with their sizes, in words."""
        pairs = zip(self.dims, self.shape, strict=True)
        return " x ".join(f"{dim} {size}" for dim, size in pairs) or "a scalar"

    @property
    def unit_range(self) -> str:
        """The unit, or its least and largest value, in words."""
        least, most = (f"{value:.3g}" for value in self.unit.aminmax())
        return least if least == most else f"{least} to {most}"

    def __repr__(self) -> str:
        return f"<Site {self.name}: {self.sizes}, role {self.role}, unit {self.unit_range}>"

    def to(self, device: torch.device) -> Site:
        """This site with its tensors on `device`."""
        if self.unit.device == device:
            return self
        anchor = None if self.anchor is None else self.anchor.to(device)
        init = partial(_moved, self.init, device)
        return replace(self, unit=self.unit.to(device), init=init, anchor=anchor)


def _moved(init: Callable[[], Tensor], device: torch.device) -> Tensor:
    return init().to(device)


class Sites(tuple[Site, ...]):
    """Sites in order. Printed, they are a line each; a notebook shows them as a table."""

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))

    def _repr_html_(self) -> str:
        from ..plots.html import sites_html  # matplotlib is slow to import

        return sites_html(self)


def projection(name: str, shape: tuple[int, ...]) -> Tensor:
    """N(0, 1) entries that depend on the name alone: the same in every process and round."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float32)


def zeros(shape: tuple[int, ...], unit: Tensor) -> Callable[[], Tensor]:
    """An `init` of zeros, on the device of `unit`."""
    return partial(torch.zeros, shape, dtype=unit.dtype, device=unit.device)
