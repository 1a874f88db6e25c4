"""Draws of a guide, and which guides make a chain each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..inference.draws import blocks
from .variables import variables

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["chains", "chosen_draws"]


def chains(guide: Callable[..., Any]) -> Sequence[Callable[..., Any]]:
    """The guides whose draws are a chain each: a mixture's `components`, else the guide alone.

    Components come from independent fits and count alike: chains that differ are optima that
    differ, and all chains together are the mixture.

    >>> from bhpeft_pyro.guides import NormalGuide
    >>> from bhpeft_pyro.testing import tiny_model
    >>> len(chains(NormalGuide(tiny_model())))
    1
    """
    components: Sequence[Callable[..., Any]] = getattr(guide, "components", (guide,))
    return components


def chosen_draws(
    posterior: Posterior,
    guide: Callable[..., Any],
    chosen: Collection[str],
    samples: int,
    seed: int,
) -> dict[str, Tensor]:
    """(S, *shape) draws of the chosen variables, on the CPU; never all of all draws at once."""
    parts: dict[str, list[Tensor]] = {name: [] for name in chosen}
    for block in blocks(posterior.model, guide, samples, seed):
        drawn = variables(posterior, {name: value[:, 0] for name, value in block.items()})
        for name in chosen:
            parts[name].append(drawn[name].values.cpu())
    return {name: torch.cat(values) for name, values in parts.items()}
