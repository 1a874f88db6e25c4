"""Draws of a posterior and of its prior, and which guides make a chain each."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..diagnostics.passes import prior_guide
from ..guides import Guide
from ..inference.draws import blocks
from ..model import Model
from .variables import variables

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["chains", "chosen_draws", "prior_of"]


class _LinearPrior(Guide):
    """The prior of the network that was fitted: the one linearised around a guide's means."""

    linear = True

    def __init__(self, model: Model, guide: Guide) -> None:
        super().__init__()
        self._draw, self.guide = prior_guide(model), guide

    def forward(self, batch: object = None) -> dict[str, Tensor]:
        return dict(self._draw(batch))

    def means(self) -> dict[str, Tensor]:
        return self.guide.means()


def prior_of(posterior: Posterior) -> Callable[..., Any]:
    """The prior of the last round in the form of a guide."""
    guide = posterior.guide
    if isinstance(guide, Guide) and guide.linear:
        return _LinearPrior(posterior.model, guide)
    return prior_guide(posterior.model)


def chains(guide: Callable[..., Any]) -> Sequence[Callable[..., Any]]:
    """The guides whose draws are a chain each: a mixture's `components`, else the guide alone.

    Components come from restarts and count alike: chains that differ are optima that differ, and
    all chains together are the mixture.

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
