"""A guide as a function, as Pyro's users write one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import bhpeft_pyro as bh


def around(model: bh.Model, start: Callable[..., Tensor] = torch.zeros) -> Callable[[Any], None]:
    """A Normal of sd 0.1 at each site, around a parameter that begins at `start`."""

    def guide(batch: object) -> None:
        for site in model.sites:
            loc = pyro.param(f"{site.name}.loc", start(site.shape))
            pyro.sample(site.name, dist.Normal(loc, 0.1).to_event(site.ndim))

    return guide
