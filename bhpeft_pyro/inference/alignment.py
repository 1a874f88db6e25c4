"""Fitting a network's coordinates: along which directions of its weights predictions change."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..batch import Batch
from ..model import Model
from ..peft.sites import Site
from .fisher import scores

__all__ = ["align"]

# Size of the output side, in units, while the input side is looked at: at zero it has no effect.
_SMALL = 0.1


def align(model: Model, batches: Sequence[Batch]) -> None:
    """Choose the coordinates of the PEFT sites, unless an earlier round has.

    Neither labels nor the prior are looked at: the Fisher information is that of the frozen
    transformer under random heads with outputs of sd 1, each example under a head of its own.
    """
    coordinates = model.network.coordinates
    if coordinates is None or coordinates.fitted or not coordinates.outer:
        return
    inner, outer = coordinates.inner, coordinates.outer

    def values(site: Site, size: float) -> Tensor:
        """One example's value of a site; `size` of the output side, in units."""
        if site.name in outer:
            return size * site.unit * torch.randn(site.shape, device=site.unit.device)
        if site.name.startswith("head."):
            return site.unit * torch.randn(site.shape, device=site.unit.device)
        return site.init()

    _, rights = _moments(model, batches, inner, lambda site: values(site, _SMALL))
    coordinates.fit_anchors(rights)
    coordinates.fit_axes(*_moments(model, batches, outer, lambda site: values(site, 0.0)))


def _moments(
    model: Model, batches: Sequence[Batch], names: Sequence[str], value: Callable[[Site], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[G G'] and E[G' G] of the gradients G, (layer, a, b), of the sites `names`."""
    device = model.network.device
    lefts: dict[str, Tensor] = {}
    rights: dict[str, Tensor] = {}
    for batch in batches:
        weights = {
            site.name: torch.stack([value(site) for _ in range(len(batch))]).unsqueeze(1)
            for site in model.sites
        }
        (gradients,) = scores(model, weights, batch.to(device))
        for name in names:
            left, right = (
                torch.einsum(pattern, gradients[name], gradients[name])
                for pattern in ("nlab,nlcb->lac", "nlab,nlac->lbc")
            )
            lefts[name] = lefts.get(name, 0) + left
            rights[name] = rights.get(name, 0) + right
    count = sum(map(len, batches))
    return (
        {name: total / count for name, total in lefts.items()},
        {name: total / count for name, total in rights.items()},
    )
