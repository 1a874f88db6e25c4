"""Weight draws from a fitted guide."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from ..guides import Guide

__all__ = ["draw", "point"]

# Pyro keeps its stack of effect handlers in a global: one thread at a time may sample. Running the
# network under the drawn weights needs no Pyro and no lock.
_LOCK = threading.Lock()


def draw(guide: Callable[..., Any], samples: int, seed: int | None = None) -> dict[str, Tensor]:
    """Joint draws of every latent.

    Args:
        guide: any Pyro guide; it is called with None for a batch.
        samples: S.
        seed: makes the draws repeatable and leaves the global random state alone; None uses it.

    Returns:
        Site name to a detached (S, 1, *site shape) tensor: the 1 is the data plate's place.
    """
    devices = range(torch.cuda.device_count()) if seed is not None else []
    with (
        _LOCK,
        torch.no_grad(),
        torch.random.fork_rng(devices, enabled=seed is not None),
        pyro.get_param_store().scope(),
        poutine.block(),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        with poutine.trace() as tracer, pyro.plate("draws", samples, dim=-2):
            guide(None)
    return {
        name: site["value"].detach()
        for name, site in tracer.trace.iter_stochastic_nodes()
        if not site["infer"].get("is_auxiliary") and name != "draws"
    }


def point(guide: Callable[..., Any]) -> dict[str, Tensor]:
    """The guide's central values as a single draw, (1, 1, *site shape)."""
    if isinstance(guide, Guide):
        means = guide.means()
    else:  # Pyro's autoguides call it the median
        with _LOCK, torch.no_grad(), pyro.get_param_store().scope():
            means = guide.median(None)  # type: ignore[attr-defined]
    return {name: value[None, None] for name, value in means.items()}
