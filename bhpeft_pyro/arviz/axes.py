"""Names and coordinates of the dims of a posterior's draws."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import xarray as xr
from torch import Tensor

from ..peft.sites import Site
from .container import dataset

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["Axes"]


class Axes:
    """Names and coordinates of the sites' dims.

    A name that two sites use for dims of different size or coordinates (the layers of a subset,
    say) becomes one name a site, "layer.adapter.up".
    """

    def __init__(self, sites: Sequence[Site], posterior: Posterior) -> None:
        self.dims: dict[str, tuple[str, ...]] = {}
        self.coords: dict[str, Any] = {}
        found: dict[str, set[tuple[Hashable, ...]]] = {}
        for site in sites:
            for dim, size in zip(site.dims, site.shape, strict=True):
                found.setdefault(dim, set()).add(_coordinates(dim, size, site, posterior))
        for site in sites:
            names = []
            for dim, size in zip(site.dims, site.shape, strict=True):
                name = dim if len(found[dim]) == 1 else f"{dim}.{site.name}"
                names.append(name)
                self.coords[name] = list(_coordinates(dim, size, site, posterior))
            self.dims[site.name] = tuple(names)

    def dataset(self, values: Mapping[str, Tensor], attrs: Mapping[str, Any]) -> xr.Dataset:
        """Variables (1, S, *shape) from (S, *shape)."""
        variables = {}
        for name, value in values.items():
            # What a prior samples besides the sites has dims without names.
            plain = tuple(f"{name}_dim_{i}" for i in range(value.dim() - 1))
            dims = ("chain", "draw", *self.dims.get(name, plain))
            variables[name] = (dims, value.cpu().numpy()[None])
        used = {dim for dims, _ in variables.values() for dim in dims}
        coords = {name: values for name, values in self.coords.items() if name in used}
        return dataset(variables, coords, attrs)


def _coordinates(dim: str, size: int, site: Site, posterior: Posterior) -> tuple[Hashable, ...]:
    names = posterior.text.label_names
    if dim == "layer" and len(site.layers) == size:
        return site.layers
    if dim == "label" and names is not None and len(names) == size:
        return names
    return ("key", "value") if dim == "kv" else tuple(range(size))
