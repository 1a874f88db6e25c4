"""The base of the kinds of PEFT: their layers, stacks of one tensor for each layer, and a gate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..base.checks import shown
from ..base.values import Flag, Numbers, checked_dataclass
from ..errors import ArchitectureError, ConfigError
from .architectures import Layer
from .binding import Binding
from .signals import Scales
from .sites import Role, Site, projection, zeros

OPENING = 0.5
"""A gate's value at zero weights, and about its mean under unit weights."""

Weights = Mapping[str, Tensor]
Products = dict[tuple[int, nn.Module], tuple[Tensor, Tensor]]
"""By a layer's number and a module, A (S, r, in) and B (S, out, r), all parts of a fused module
together: `factor * B A` is added to the module's weights."""


@checked_dataclass
class Kind(ABC):
    """One kind of PEFT, on all layers or some of them.

    Attributes:
        layers: numbers of the layers that carry it (negative ones count from the last), or None
            for all.
        gated: whether a sigmoid gate for each example, as in UniPELT (Mao et al. 2022), scales it.
    """

    layers: Numbers | None = field(default=None, kw_only=True)
    gated: Flag = field(default=False, kw_only=True)

    name: ClassVar[str]

    @property
    def boost(self) -> float:
        """The factor that makes up for a half-open gate."""
        return 1 / OPENING if self.gated else 1.0

    @property
    def factor(self) -> float:
        """The number that multiplies the output of its branches."""
        return 1.0

    def chosen(self, layers: Sequence[Layer]) -> tuple[Layer, ...]:
        """Those of the transformer's layers that carry this kind, or an error if they cannot."""
        if self.layers is None:
            return tuple(layers)
        count = len(layers)
        numbers = sorted({n % count for n in self.layers if -count <= n < count})
        if not numbers or len(numbers) < len(self.layers):
            raise ConfigError(
                f"{self.name}: layers={shown(self.layers)} must name some of the {count} layers, "
                f"{-count} to {count - 1}, each once"
            )
        return tuple(layers[n] for n in numbers)

    @abstractmethod
    def sites(self, layers: Sequence[Layer], scales: Scales) -> list[Site]:
        """The random tensors of this kind on these layers."""

    def products(
        self, weights: Weights, layers: Sequence[Layer], dtype: torch.dtype | None = None
    ) -> Products:
        """The weights that it adds to linear layers; {} if it does anything else."""
        return {}

    @abstractmethod
    def wire(self, weights: Weights, layers: Sequence[Layer], binding: Binding) -> None:
        """Enter into `binding` what these weights, `(S, *site.shape)`, do at which module."""


def stack(
    name: str,
    role: Role,
    dims: tuple[str, ...],
    layers: Sequence[Layer],
    shapes: Iterable[tuple[int, ...]],
    units: Iterable[Tensor],
    anchor: float | None = None,
) -> Site:
    """The site of one tensor for each layer, stacked along the dimension "layer".

    `dims` are those of one layer's tensor; each unit broadcasts against its shape. `anchor` is the
    sd, in units, of a random projection around which a prior may lie.
    """
    shape, *others = set(shapes)
    if others:
        raise ArchitectureError(
            f"{name}: its shape differs between layers, {sorted([shape, *others])}; choose layers "
            "of the same width, with layers=(...)"
        )
    full, unit = (len(layers), *shape), torch.stack([*units])
    unit = unit.reshape(*unit.shape, *[1] * (len(full) - unit.ndim))
    fixed = None if anchor is None else anchor * projection(name, full).to(unit) * unit
    numbers = tuple(layer.number for layer in layers)
    return Site(name, full, ("layer", *dims), unit, zeros(full, unit), numbers, fixed, role)


def input_unit(rms: Tensor, width: int) -> Tensor:
    """The sd of weights whose products with inputs of this RMS and width have RMS 1."""
    return 1 / (rms * width**0.5)


def rows(weights: Weights, name: str, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    """One tensor `(S, *shape)` for each layer of a stack.

    Indexing layer by layer instead would allocate the whole stack's gradient for every layer in the
    backward pass.
    """
    stacked = weights[name] if dtype is None else weights[name].to(dtype)
    return stacked.unbind(1)


# A gate is sigmoid(w.x + b), averaged over an example's real tokens; each layer has its (w, b).


def gate_sites(
    kind: str, layers: Sequence[Layer], inputs: Sequence[tuple[Tensor, int]]
) -> list[Site]:
    """Weight and bias of the gates; `inputs` are RMS and width of what each reads."""
    name, units = f"{kind}.gate", [input_unit(rms, width) for rms, width in inputs]
    ones = [torch.ones_like(unit) for unit in units]
    widths = [(width,) for _, width in inputs]
    return [
        stack(f"{name}.weight", "gate", ("in",), layers, widths, units),
        stack(f"{name}.bias", "gate", (), layers, [()] * len(layers), ones),
    ]


def attention_inputs(layers: Sequence[Layer], scales: Scales) -> list[tuple[Tensor, int]]:
    """RMS and width of what each attention reads."""
    queries = [layer.projections["query"] for layer in layers]
    return [(scales.inputs(query), query.inputs) for query in queries]


def gate_rows(kind: str, weights: Weights) -> list[tuple[Tensor, Tensor]]:
    """One (w, b), of shapes (S, in) and (S,), for each layer."""
    w, b = rows(weights, f"{kind}.gate.weight"), rows(weights, f"{kind}.gate.bias")
    return list(zip(w, b, strict=True))


def wire_gates(kind: str, weights: Weights, layers: Sequence[Layer], binding: Binding) -> None:
    """At each attention's input, leave its gates in `binding.scratch[kind, layer number]`."""

    def keep(key: tuple[str, int], gate: tuple[Tensor, Tensor], x: Tensor) -> None:
        binding.scratch[key] = opening(binding, x, *gate)

    for layer, gate in zip(layers, gate_rows(kind, weights), strict=True):
        query = layer.projections["query"].module
        binding.before[query].append(partial(keep, (kind, layer.number), gate))


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
    per_particle = binding.rows_per_particle(rows)
    flat = x.reshape(binding.particles, -1, x.shape[-1])
    logits = torch.bmm(flat, weight.to(x)[:, :, None]).float().reshape(-1, per_particle, length)
    gates = torch.sigmoid(logits + bias.to(logits)[:, None, None])
    if mask is None:
        return gates.mean(-1)
    real = mask.to(gates.device, gates.dtype).reshape(gates.shape)
    return (gates * real).sum(-1) / real.sum(-1).clamp_min(1)
