"""How the last round's fit went: the group `sample_stats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import xarray as xr

__all__ = ["trace"]

_TRACE = ("loss", "nll", "kl", "lr", "gradient", "validation_nll")


def trace(history: Sequence[Mapping[str, float]], kl: Mapping[str, float]) -> xr.Dataset:
    """(step,) traces, NaN where a quantity was not evaluated, and the (site,) KL at the end."""
    steps = np.array([entry["step"] for entry in history], dtype=np.int64)
    known = [name for name in _TRACE if any(name in entry for entry in history)]
    traces = {
        name: (("step",), np.array([entry.get(name, np.nan) for entry in history]))
        for name in known
    }
    sites = {"site_kl": (("site",), np.array(list(kl.values())))}
    return xr.Dataset(traces | sites, coords={"step": steps, "site": list(kl)})
