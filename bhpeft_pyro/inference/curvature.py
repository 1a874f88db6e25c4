"""The covariance of a `LowRankGuide`, measured from gradients example by example.

At the optimum of the variational bound a Normal guide's precision is the prior's plus N / T times
the expected curvature of the loss under the guide itself (Opper and Archambeau 2009). The curvature
is taken as the Fisher information, gradients' outer products, as in Mishkin et al. (2018): its
leading directions are kept as they are and the diagonal of the rest.

The Fisher information of a model's weights, from gradients example by example.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal

from ..data.batch import Batch
from ..distributions import Covariance, leading
from ..guides import Guide, LowRankGuide
from ..guides.budget import GATHERED
from ..model.model import Model
from ..priors import complete

__all__ = [
    "Gathered",
    "diagonal",
    "every",
    "from_prior",
    "narrowed",
    "sampled",
    "scores",
]


_DRAWS = 32  # of a prior


def _slopes(total: Tensor, leaves: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Gradients by each leaf, zero where it has no part; the graph stays for more."""
    every = list(leaves.values())
    return torch.autograd.grad(
        total, every, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def sampled(predictive: TorchDistribution) -> list[Tensor]:
    """log p(y) of one outcome for each example, drawn."""
    return [predictive.log_prob(predictive.sample())]


def every(predictive: TorchDistribution) -> list[Tensor]:
    """What has gradients whose outer products sum to the Fisher information.

    For K classes these are K - 1 contrasts. The scores g_k = root(p_k) grad log p_k would do, but
    sum_k root(p_k) g_k = 0: so a reflection that takes root(p) to the last axis leaves nothing for
    the last of them. Of a Normal, the mean in sds and root(2) times the logarithm of the sd, whose
    scores are independent. Of any other distribution log p of a draw.
    """
    if predictive.has_enumerate_support:
        logs = predictive.log_prob(predictive.enumerate_support())
        roots = (0.5 * logs.detach()).exp()
        # An outcome that cannot be, such as a choice that does not exist, has no gradient.
        logs = logs.masked_fill(roots == 0, 0.0)
        share = roots[-1] / (1 + roots[-1])
        return list(roots[:-1] * (logs[:-1] - share * logs[-1]))
    if isinstance(predictive, Normal):
        return [predictive.mean / predictive.stddev.detach(), 2**0.5 * predictive.stddev.log()]
    return sampled(predictive)


def scores(
    model: Model,
    weights: Mapping[str, Tensor],
    batch: Batch,
    given: Mapping[str, Tensor] = MappingProxyType({}),
    outcomes: Callable[[TorchDistribution], list[Tensor]] = sampled,
) -> Iterator[dict[str, Tensor]]:
    """Gradients of log p(y | x, w), example by example.

    The sum of their squares is the diagonal of the Fisher information; no label is looked at. Every
    example is run as a particle, under weights of its own.

    Args:
        weights: for each site of the model, or for each latent of its prior, a tensor
            (B, 1, *shape).
        batch: B examples, not shared out.
        given: the other sites or latents, of which no gradients are asked for.
        outcomes: of which y: one drawn from the model itself, or `every` one.

    Yields:
        For each of the `outcomes` the names of `weights` to (B, *shape).
    """
    leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
    with torch.enable_grad():
        whole = complete(model.prior, model.sites, {**given, **leaves})
        predictive = model.predictive(whole, replace(batch.split(len(batch)), labels=None))
        for total in (each.sum() for each in outcomes(predictive)):
            if not total.requires_grad:  # PEFT weights alone, on frozen features
                yield {name: torch.zeros_like(leaf[:, 0]) for name, leaf in leaves.items()}
                continue
            grads = _slopes(total, leaves)
            yield {name: grad[:, 0] for name, grad in zip(leaves, grads, strict=True)}


def diagonal(
    model: Model, weights: Mapping[str, Tensor], batches: Iterable[Batch]
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of one example, at one value of the weights.

    Args:
        weights: for each site of the model, or for each latent of its prior, a tensor of its shape.

    Returns:
        The same names to tensors of the same shapes.
    """
    sums = {name: torch.zeros_like(value) for name, value in weights.items()}
    count = 0
    for batch in batches:
        count += len(batch)
        copies = {name: weights[name].expand(len(batch), 1, *sums[name].shape) for name in sums}
        for gradients in scores(model, copies, batch, outcomes=every):
            for name, gradient in gradients.items():
                sums[name] += gradient.square().sum(0)
    return {name: total / count for name, total in sums.items()}


def from_prior(model: Model, latents: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What latents tell about others that their prior depends on (weights about their scale).

    The diagonal of the Fisher information of p(latents), apart from each one's own density: no
    data are looked at.

    Args:
        latents: one value, of its shape, of each latent of the prior.

    Returns:
        The same names to tensors of the same shapes.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in latents.items()}
    sums = {name: torch.zeros_like(value) for name, value in leaves.items()}
    with torch.enable_grad(), poutine.block():
        conditioned = poutine.condition(model.prior, data=leaves)
        nodes: dict[str, Any] = poutine.trace(conditioned).get_trace(model.sites).nodes
        for _ in range(_DRAWS):
            densities = (nodes[name]["fn"] for name in leaves)
            log_prob = sum((fn.log_prob(fn.sample()).sum() for fn in densities), torch.zeros(()))
            if not log_prob.requires_grad:  # no latent's prior depends on another
                break
            grads = _slopes(log_prob, leaves)
            for name, grad in zip(leaves, grads, strict=True):
                sums[name] += grad.square()
    return {name: total / _DRAWS for name, total in sums.items()}


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
