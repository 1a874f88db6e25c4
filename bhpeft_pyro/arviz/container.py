"""ArviZ's containers: all that differs between its versions 0.x and 1.x."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

with warnings.catch_warnings():  # ArviZ 0.23 announces 1.0 at every import
    warnings.simplefilter("ignore", FutureWarning)
    import arviz

__all__ = ["dataset", "join"]


def dataset(
    variables: Mapping[str, Any], coords: Mapping[str, Any], attrs: Mapping[str, Any] = {}
) -> xr.Dataset:
    """A group of draws: from variables (dims, values), their dims (chain, draw, ...)."""
    shape = next((values.shape for _, values in variables.values()), (0, 0))
    numbers = {dim: np.arange(size) for dim, size in zip(("chain", "draw"), shape, strict=False)}
    return xr.Dataset(dict(variables), coords={**numbers, **coords}, attrs=dict(attrs))


def join(groups: dict[str, xr.Dataset]) -> Any:
    """The container of the installed ArviZ."""
    for group in groups.values():
        group.attrs["inference_library"] = "bhpeft_pyro"
    if "InferenceData" in vars(arviz):  # 1.3 answers to the old name, with a DataTree
        return arviz.InferenceData(**dict[str, Any](groups))
    return xr.DataTree.from_dict(groups)
