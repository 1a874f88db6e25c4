"""What a person can read of draws of the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import change
from ..peft.sites import Site

if TYPE_CHECKING:
    from ..posterior import Posterior

__all__ = ["branches", "with_changes"]


def _sizes(posterior: Posterior, weights: dict[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    network = posterior.model.network
    if not network.kinds:
        return {}
    return change.sizes(network, change.of_transformer(network, weights))


def with_changes(posterior: Posterior, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """(S, *shape) weights, and (S, layers) for each PEFT branch."""
    return weights | {
        f"change.{branch}": torch.stack([layers[n] for n in sorted(layers)], 1)
        for branch, layers in _sizes(posterior, weights).items()
    }


def branches(posterior: Posterior, weights: dict[str, Tensor]) -> list[Site]:
    """The changes of `with_changes` as if they were sites, for their names and layers."""
    return [
        Site(
            f"change.{branch}",
            (len(layers),),
            ("layer",),
            torch.ones(1),
            lambda: torch.zeros(1),
            layers=tuple(sorted(layers)),
        )
        for branch, layers in _sizes(posterior, weights).items()
    ]
