"""Weight draws from a fitted guide."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor

from ..errors import GuideError
from ..guides import Guide
from ..model import Model
from ..priors import complete

__all__ = ["blocks", "draw", "point", "seeded"]

_BLOCK = 16  # draws made at a time

# Pyro keeps its stack of effect handlers in a global: one thread at a time may sample. Running the
# network under the drawn weights needs no Pyro and no lock.
_LOCK = threading.Lock()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's random state set to `seed`, and put back at the end."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def draw(model: Model, guide: Callable[..., Any], samples: int, seed: int = 0) -> dict[str, Tensor]:
    """Joint draws of every latent, and of the sites made out of them.

    Args:
        model: the model, whose prior may make sites out of other latents.
        guide: any Pyro guide; it is called with None for a batch.
        samples: S.
        seed: makes the draws repeatable; the global random state is left alone.

    Returns:
        Site name to a detached (S, 1, *site shape) tensor: the 1 is the data plate's place.
    """
    parts = list(blocks(model, guide, samples, seed))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def blocks(
    model: Model, guide: Callable[..., Any], samples: int, seed: int
) -> Iterator[dict[str, Tensor]]:
    """The draws of `draw`, some at a time, so that not all need be held at once."""
    seeds = torch.Generator().manual_seed(seed)
    for start in range(0, samples, _BLOCK):
        own = int(torch.randint(2**62, (), generator=seeds))
        with (
            _LOCK,
            torch.no_grad(),
            seeded(own),
            pyro.get_param_store().scope(),
            poutine.block(),
            poutine.trace() as tracer,
            pyro.plate("draws", min(_BLOCK, samples - start), dim=-2),
        ):
            guide(None)
        nodes: dict[str, Any] = dict(tracer.trace.iter_stochastic_nodes())
        yield _complete(
            model,
            {
                name: site["value"].detach()
                for name, site in nodes.items()
                if not site["infer"].get("is_auxiliary") and name != "draws"
            },
        )


def point(model: Model, guide: Callable[..., Any]) -> dict[str, Tensor]:
    """The guide's central values as a single draw, (1, 1, *site shape)."""
    if isinstance(guide, Guide):
        means = guide.means()
    elif isinstance(guide, AutoGuide):
        with _LOCK, torch.no_grad(), pyro.get_param_store().scope():
            means = guide.median(None)
    else:
        raise GuideError(
            f"samples=0 asks for the guide's central values, which {type(guide).__name__} does "
            "not tell; give samples=1 or more"
        )
    return _complete(model, {name: value[None, None] for name, value in means.items()})


def _complete(model: Model, latents: dict[str, Tensor]) -> dict[str, Tensor]:
    with _LOCK, torch.no_grad():
        return complete(model.prior, model.sites, latents)
