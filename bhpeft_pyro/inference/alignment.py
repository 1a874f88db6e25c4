"""Fitting a network's coordinates: along which directions of its weights predictions change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

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

    coordinates.fit_anchors(_leading(model, batches, inner, lambda site: values(site, _SMALL)))
    coordinates.fit_axes(*_moments(model, batches, outer, lambda site: values(site, 0.0)))


def _gradients(
    model: Model, batches: Sequence[Batch], value: Callable[[Site], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """For each batch the gradients of every site, example by example."""
    for batch in batches:
        weights = {
            site.name: torch.stack([value(site) for _ in range(len(batch))]).unsqueeze(1)
            for site in model.sites
        }
        yield from scores(model, weights, batch.to(model.network.device))


def _moments(
    model: Model, batches: Sequence[Batch], names: Sequence[str], value: Callable[[Site], Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[G G'] and E[G' G] of the gradients G, (layer, a, b), of the sites `names`."""
    lefts: dict[str, Tensor] = {}
    rights: dict[str, Tensor] = {}
    for gradients in _gradients(model, batches, value):
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


def _leading(
    model: Model, batches: Sequence[Batch], names: Sequence[str], value: Callable[[Site], Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of E[G' G], of the gradients G, (layer, a, b), the a largest eigenvalues, and eigenvectors.

    Where b is large, it is the few gradients that are kept: a matrix (b, b) of every layer would
    take more room, and its eigenvectors minutes.
    """
    count = sum(map(len, batches))
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for gradients in _gradients(model, batches, value):
        for name in names:
            g = gradients[name]
            if count * g.shape[2] < g.shape[3]:
                rows[name].append(g.transpose(0, 1).flatten(1, 2))
            else:
                total = torch.einsum("nlab,nlac->lbc", g, g)
                rows[name] = [sum(rows[name], total)]
    ranks = {site.name: min(site.shape[1:]) for site in model.sites if site.name in rows}
    found = {}
    for name, parts in rows.items():
        layers = [_eigen(each, ranks[name]) for each in torch.cat(parts, 1)]
        strengths, vectors = zip(*layers, strict=True)
        found[name] = torch.stack(strengths) / count, torch.stack(vectors)
    return found


def _eigen(rows: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest eigenvalues and eigenvectors of a symmetric (b, b), or of the product G' G of
    fewer rows G, (m, b)."""
    rows = rows.double()
    if len(rows) == rows.shape[1]:
        strength, vectors = torch.linalg.eigh(rows)
        return strength[-rank:], vectors[:, -rank:]
    strength, mix = torch.linalg.eigh(rows @ rows.mT)
    return strength[-rank:], torch.linalg.qr(rows.mT @ mix[:, -rank:])[0]
