"""The Fisher information of a model's weights, from gradients of each example.

For the likelihoods of this package it equals the generalised Gauss-Newton matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from pyro import poutine
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Normal

from ..data.batch import Batch
from ..distributions import leading
from ..model.model import Model
from ..priors import complete

__all__ = [
    "Gathered",
    "diagonal",
    "every",
    "from_prior",
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
