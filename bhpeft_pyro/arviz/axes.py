"""Names and coordinates of the dims of variables."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor

from .container import dataset
from .variables import Variable

__all__ = ["Axes"]

# ArviZ 1.x labels the rows of its tables rightly if each variable's dims come in the order in which
# dims first appear in the dataset: so do those of the sites, if variables are sorted by these.
_ORDER = ("layer", "kv", "position", "out", "rank", "bottleneck", "in", "output", "feature")


class Axes:
    """Names and coordinates of the dims of variables.

    A name that two variables use for dims of different size or coordinates (the layers of a
    subset, say) becomes one name a variable, "layer.adapter.up".

    Args:
        variables: by name.
        label_names: the coordinates of dims "output", if there are as many.
    """

    def __init__(
        self, variables: Mapping[str, Variable], label_names: Sequence[str] | None = None
    ) -> None:
        self._dims: dict[str, tuple[str, ...]] = {}
        self._coords: dict[str, list[Hashable]] = {}
        own = {name: _coordinates(one, label_names) for name, one in variables.items()}
        found: dict[str, set[tuple[Hashable, ...]]] = {}
        for coords in own.values():
            for dim, values in coords.items():
                found.setdefault(dim, set()).add(values)
        for variable, coords in own.items():
            names = [dim if len(found[dim]) == 1 else f"{dim}.{variable}" for dim in coords]
            self._coords |= dict(zip(names, map(list, coords.values()), strict=True))
            self._dims[variable] = tuple(names)

    def dataset(
        self, chains: Sequence[Mapping[str, Tensor]], attrs: Mapping[str, Any]
    ) -> xr.Dataset:
        """A group of the draws (S, *shape), by variable, of each chain."""
        variables = {}
        for name in sorted(chains[0], key=self._place):
            values = np.stack([chain[name].numpy() for chain in chains])
            # What a prior of one's own samples besides the sites has dims without names.
            plain = tuple(f"{name}_dim_{i}" for i in range(values.ndim - 2))
            variables[name] = (("chain", "draw", *(self._dims[name] or plain)), values)
        used = {dim for dims, _ in variables.values() for dim in dims}
        coords = {dim: values for dim, values in self._coords.items() if dim in used}
        return dataset(variables, coords, attrs)

    def _place(self, variable: str) -> list[int]:
        return [_ORDER.index(dim) if dim in _ORDER else len(_ORDER) for dim in self._dims[variable]]


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
