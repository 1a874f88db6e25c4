"""Fitting a network's coordinates: along which directions of its weights predictions change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pyro
import torch
from torch import Tensor

from ..batch import Batch
from ..guides import Guide
from ..model import Model
from ..priors import complete
from .fisher import scores

__all__ = ["align"]

# Size of the output side, in units, while the input side is looked at: at zero it has no effect.
_SMALL = 0.1


def align(model: Model, batches: Sequence[Batch], heads: Guide | None = None) -> None:
    """Choose the coordinates of the PEFT sites, unless an earlier round has.

    The Fisher information is that of the frozen transformer, each example under a head of its own.
    No label is looked at here.

    Args:
        heads: draws the heads, and the likelihood's own weights: once fitted to the frozen
            features it knows where outputs should go, so the directions are those that matter for
            these labels. Of few labels it knows little, and its heads are nearly the prior's.
            Without it heads are random, with outputs of sd 1.
    """
    coordinates = model.network.coordinates
    if coordinates.fitted or not coordinates.outer:
        return
    inner, outer = coordinates.inner, coordinates.outer

    peft = {site.name for site in coordinates.sites}

    def values(count: int, size: float) -> dict[str, Tensor]:
        """A value of each site for each example; `size` of the output side, in units."""
        drawn = {} if heads is None else _drawn(model, heads, count)
        found = {}
        for site in model.sites:
            noise = site.unit * torch.randn(count, 1, *site.shape, device=site.unit.device)
            if site.name in outer:
                found[site.name] = size * noise
            elif site.name in drawn and site.name not in peft:
                found[site.name] = drawn[site.name]
            elif site.role == "head":
                found[site.name] = noise
            else:
                found[site.name] = torch.stack([site.init() for _ in range(count)]).unsqueeze(1)
        return found

    coordinates.fit_anchors(_leading(model, batches, inner, lambda n: values(n, _SMALL)))
    coordinates.fit_axes(*_moments(model, batches, outer, lambda n: values(n, 0.0)))


@torch.no_grad()
def _drawn(model: Model, guide: Guide, count: int) -> dict[str, Tensor]:
    """For each site `count` draws, (count, 1, *shape)."""
    with pyro.plate("draws", count, dim=-2):
        return complete(model.prior, model.sites, guide())


Values = Callable[[int], Mapping[str, Tensor]]
"""From a number of examples to a value of each site for each of them."""


def _gradients(
    model: Model, batches: Sequence[Batch], values: Values
) -> Iterator[dict[str, Tensor]]:
    """For each batch the gradients of every site, example by example."""
    for batch in batches:
        yield from scores(model, values(len(batch)), batch.to(model.network.device))


def _moments(
    model: Model, batches: Sequence[Batch], names: Sequence[str], values: Values
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """E[G G'] and E[G' G] of the gradients G, (layer, a, b), of the sites `names`."""
    lefts: dict[str, Tensor] = {}
    rights: dict[str, Tensor] = {}
    for gradients in _gradients(model, batches, values):
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
    model: Model, batches: Sequence[Batch], names: Sequence[str], values: Values
) -> dict[str, tuple[Tensor, Tensor]]:
    """Of E[G' G], of the gradients G, (layer, a, b), the a largest eigenvalues, and eigenvectors.

    Where b is large, it is the few gradients that are kept: a matrix (b, b) of every layer would
    take more room, and its eigenvectors minutes.
    """
    count = sum(map(len, batches))
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    for gradients in _gradients(model, batches, values):
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
    # The largest first, which would else be made orthogonal to rounding errors.
    vectors = torch.linalg.qr((rows.mT @ mix[:, -rank:]).flip(1))[0]
    return strength[-rank:], vectors.flip(1)
