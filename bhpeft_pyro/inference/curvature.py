"""The covariance of a `LowRankGuide`, measured from gradients example by example.

At the optimum of the variational bound a Normal guide's precision is the prior's plus N / T times
the expected curvature of the loss under the guide itself (Opper and Archambeau 2009). The curvature
is taken as the Fisher information, gradients' outer products, as in Mishkin et al. (2018): its
leading directions are kept as they are and the diagonal of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pyro
import torch
from torch import Tensor

from ..batch import Batch
from ..distributions import Covariance, leading
from ..guides import Guide, LowRankGuide
from ..model import Model
from .fisher import every, scores

__all__ = ["narrowed"]

_BLOCK = 128  # gradients gathered before the leading directions are sought again


def narrowed(
    model: Model,
    guide: Guide,
    block: LowRankGuide,
    batches: Sequence[Batch],
    size: float,
    share: float,
) -> Covariance:
    """A covariance once its precision has moved towards its optimum.

    Args:
        guide: draws the weights at which the curvature is measured.
        block: whose covariance it is: the guide, or a block of it.
        batches: examples, not shared out; no label is looked at.
        size: N / T, the number of examples that these stand for, over the temperature.
        share: of the way from the precision at hand to the one measured; 1 forgets the former.
    """
    prior, own = block.prior.covariance, block.covariance
    unit = prior.scale.unsqueeze(-1)  # precisions are gathered in units of the prior's scale
    diagonal = share + (1 - share) * (prior.scale / own.scale).square()
    columns = [
        share**0.5 * unit * prior.precision_root(),
        (1 - share) ** 0.5 * unit * own.precision_root(),
    ]
    total = sum(part.square().sum(-1) for part in columns)
    weight = (share * size / sum(map(len, batches))) ** 0.5
    width = sum(part.shape[-1] for part in columns)
    for batch in batches:
        for gradients in _gradients(model, guide, block, batch):
            columns.append(weight * unit * gradients.mT)
            total = total + columns[-1].square().sum(-1)
            width += len(batch)
            if width >= block.rank + _BLOCK:
                columns = [_shortened(columns, block.rank)]
                width = block.rank
    root = _shortened(columns, block.rank)
    rest = (total - root.square().sum(-1)).clamp_min(0)
    return Covariance.from_precision((diagonal + rest) / unit[:, 0].square(), root / unit)


def _gradients(model: Model, guide: Guide, block: LowRankGuide, batch: Batch) -> Iterator[Tensor]:
    """For each outcome (B, D) weighted gradients, each example at a draw of its own."""
    with torch.no_grad(), pyro.plate("draws", len(batch), dim=-2):
        drawn = guide()
    own = {name: drawn.pop(name) for name in block.means()}
    for gradients in scores(model, own, batch.to(model.network.device), drawn, every):
        yield torch.cat([gradient.reshape(len(batch), -1) for gradient in gradients.values()], 1)


def _shortened(columns: list[Tensor], rank: int) -> Tensor:
    """(D, rank) with nearly the same outer product."""
    axes, strength = leading(torch.cat(columns, -1), rank)
    return axes * strength.sqrt()
