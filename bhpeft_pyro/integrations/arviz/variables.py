"""The variables of an export: the weights, and what a person can read in them, with named dims."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from ...diagnostics.changes import factors, head_norms, sizes
from ...guides import Guide
from ...model.model import Model
from ...peft.sites import Site
from ...prediction.draws import Draws, draw_parts
from ...priors.structured import gated_layers

# ArviZ 1.x labels the rows of its tables correctly only if each variable's dims come in the order
# in which dims first appear in the dataset. Sorted by these, the variables' do.
_ORDER = ("layer", "kv", "position", "out", "rank", "bottleneck", "in", "output", "feature")

# What the ready priors sample besides the sites, by the end of its name: over which of the dims of
# its site; and what they sample for each of its weights.
_LATENTS = {"log_layers": {"layer"}, "log_ranks": {"layer", "rank", "bottleneck"}}
_BY_WEIGHT = {"standard", "log_local"}


@dataclass(frozen=True, eq=False)
class Variable:
    """Draws of one quantity.

    Attributes:
        values: (S, *shape).
        dims: names of the dims of the shape, if they are known.
        layers: the layers' numbers along "layer".
    """

    values: Tensor
    dims: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()

    @property
    def numel(self) -> int:
        """Numbers per draw."""
        return self.values[0].numel()


def variables(model: Model, block: Draws) -> dict[str, Variable]:
    """Everything that draws of the latents and sites contain, by name: the draws, and what
    docs/arviz.md lists."""
    network, draws = model.network, {name: value[:, 0] for name, value in block.weights.items()}
    sites = {site.name: site for site in model.sites}
    found = {name: _variable(name, values, sites) for name, values in draws.items()}
    if network.kinds:
        weights = factors(network, block)
        for what, dims, by_branch in (
            ("change", ("layer",), sizes(network, weights)),
            ("head_norm", ("layer", "head"), head_norms(network, weights)),
        ):
            for branch, by_layer in by_branch.items():
                numbers = tuple(sorted(by_layer))
                stacked = torch.stack([by_layer[number] for number in numbers], 1)
                found[f"{what}.{branch}"] = Variable(stacked, dims, numbers)
    for kind, layers in gated_layers(model.sites).items():
        if (logits := draws.get(f"gates.{kind}")) is not None:
            found[f"gates.{kind}"] = Variable(logits, ("layer",), tuple(layers))
            found[f"gate.{kind}"] = Variable(logits.sigmoid(), ("layer",), tuple(layers))
    if network.axes is not None and network.axes.fitted:
        effect = (draws["head.weight"] * network.axes.sds).flip(-1)
        found["head.effect"] = Variable(effect, ("output", "axis"))
    return found


def _variable(name: str, values: Tensor, sites: Mapping[str, Site]) -> Variable:
    if name in sites:
        return Variable(values, sites[name].dims, sites[name].layers)
    of, _, what = name.rpartition(".")
    site = sites.get(of)
    if site is not None and (what in _BY_WEIGHT or what in _LATENTS):
        dims = tuple(dim for dim in site.dims if what in _BY_WEIGHT or dim in _LATENTS[what])
        return Variable(values, dims, site.layers)
    return Variable(values)


def chosen_draws(
    model: Model, guide: Guide, chosen: Sequence[str], samples: int, seed: int
) -> dict[str, Variable]:
    """S draws of the chosen variables, on the CPU; of the others, a few draws at a time."""
    parts = []
    for block in draw_parts(model, guide, samples, seed):
        every = variables(model, block)
        parts.append(
            {name: replace(every[name], values=every[name].values.cpu()) for name in chosen}
        )
    return {
        name: replace(first, values=torch.cat([part[name].values for part in parts]))
        for name, first in parts[0].items()
    }


def dataset(
    chains: Sequence[Mapping[str, Variable]], label_names: Sequence[str] | None, **attrs: Any
) -> xr.Dataset:
    """A group with dims (chain, draw, ...), from the variables of each chain. `label_names` are the
    coordinates of dims "output", if there are as many.

    A name that two variables use for dims of different size or coordinates (such as the layers of
    a subset) becomes one name per variable: "layer.adapter.up".
    """
    coords = {name: _coordinates(each, label_names) for name, each in chains[0].items()}
    known: dict[str, set[tuple[Hashable, ...]]] = {}
    for by_dim in coords.values():
        for dim, of_dim in by_dim.items():
            known.setdefault(dim, set()).add(of_dim)

    def place(name: str) -> list[int]:
        dims = [dim if len(known[dim]) == 1 else "" for dim in coords[name]]
        return [_ORDER.index(dim) if dim in _ORDER else len(_ORDER) for dim in dims]

    arrays = {}
    for name in sorted(coords, key=place):
        values = np.stack([chain[name].values.numpy() for chain in chains])
        own = {
            dim if len(known[dim]) == 1 else f"{dim}.{name}": [*of_dim]
            for dim, of_dim in coords[name].items()
        }
        # What your own prior samples besides the sites has dims without names.
        dims = [*own] or [f"{name}_dim_{i}" for i in range(values.ndim - 2)]
        arrays[name] = xr.DataArray(values, own, ["chain", "draw", *dims])
    group = xr.Dataset(arrays, attrs=attrs)
    return group.assign_coords({dim: np.arange(group.sizes[dim]) for dim in ("chain", "draw")})


def _coordinates(
    variable: Variable, label_names: Sequence[str] | None
) -> dict[str, tuple[Hashable, ...]]:
    found: dict[str, tuple[Hashable, ...]] = {}
    for dim, size in zip(variable.dims, variable.values.shape[1:], strict=bool(variable.dims)):
        found[dim] = tuple(range(size))
        if dim == "layer":
            found[dim] = variable.layers
        elif dim == "output" and label_names is not None and len(label_names) == size:
            found[dim] = tuple(label_names)
        elif dim == "kv":
            found[dim] = ("key", "value")
    return found
