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
from ..guides.budget import GATHERED
from ..model import Model
from .fisher import every, scores

__all__ = ["Gathered", "narrowed"]


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
    unit = prior.scale  # precisions are gathered in units of it
    room = max(prior.rank + own.rank, block.rank + GATHERED) + max(map(len, batches))
    gathered = Gathered(unit, block.rank, room)
    for part, covariance in ((share, prior), (1 - share, own)):
        gathered.add([covariance.precision_root().mT], part**0.5 * unit)
    weight = (share * size / sum(map(len, batches))) ** 0.5
    for batch in batches:
        for gradients in _gradients(model, guide, block, batch):
            gathered.add(gradients, weight * unit)
            if gathered.count >= block.rank + GATHERED:
                gathered.shorten()
    root, rest = gathered.root(), gathered.diagonal
    del gathered, gradients
    rest = (rest - root.square().sum(-1)).clamp_min(0)
    diagonal = share + (1 - share) * (unit / own.scale).square()
    root.div_(unit.unsqueeze(-1))
    return Covariance.from_precision((diagonal + rest) / unit.square(), root)


class Gathered:
    """Vectors whose outer products are summed, in one table: with lists of them and what these are
    joined to, a measurement would take several times the room.

    Attributes:
        count: how many there are.
        diagonal: (D,) of the sum of all that were added.
    """

    def __init__(self, like: Tensor, rank: int, room: int) -> None:
        self.rank = rank
        self.count = 0
        self.diagonal = torch.zeros_like(like)
        self._table = like.new_empty(room, len(like))

    def add(self, parts: Sequence[Tensor], weight: Tensor) -> None:
        """M vectors, of which each part has some entries, (M, .), times `weight`, (D,)."""
        rows = self._table[self.count : self.count + len(parts[0])]
        torch.cat([*parts], 1, out=rows).mul_(weight)
        self.diagonal += torch.einsum("nd,nd->d", rows, rows)
        self.count += len(rows)

    def root(self) -> Tensor:
        """(D, rank) with nearly the same outer product."""
        axes, strength = leading(self._table[: self.count].mT, self.rank)
        return axes.mul_(strength.sqrt())

    def shorten(self) -> None:
        """Keep that instead."""
        root = self.root()
        self.count = root.shape[-1]
        self._table[: self.count] = root.mT


def _gradients(
    model: Model, guide: Guide, block: LowRankGuide, batch: Batch
) -> Iterator[list[Tensor]]:
    """For each outcome, by site, (B, .) weighted gradients, each example at a draw of its own."""
    with torch.no_grad(), pyro.plate("draws", len(batch), dim=-2):
        drawn = guide()
    own = {name: drawn.pop(name) for name in block.means()}
    for gradients in scores(model, own, batch.to(model.network.device), drawn, every):
        yield [gradient.reshape(len(batch), -1) for gradient in gradients.values()]
