"""The curvature of a linearised network: the Fisher information of all examples, N F.

It is kept as its leading directions and the diagonal of the rest. It is computed from the
derivatives of the outputs with respect to the weights, example by example; labels are not used.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...base.distributions import leading
from ...data.batch import Batch
from ...model.fisher import all_outcomes, one_outcome
from ...model.linearized import LinearOutputs
from ...model.model import Model
from ..budget import examples_at_once, gradients_at_once
from .laplace_guide import LaplaceGuide

_LABELS = 256  # drawn for each example, where the expectation over labels has no closed form

Jacobians = Iterable[tuple[Batch, LinearOutputs, Tensor]]
"""Batches with their outputs and the (B, E, D) derivatives of these."""


@dataclass(frozen=True)
class Curvature:
    """N F in units of the prior's scale: diag(rest) + root root', (D,) and (D, rank)."""

    rest: Tensor
    root: Tensor

    def times(self, factor: Tensor) -> Curvature:
        """C N F C, with C the diagonal matrix of the roots of `factor`, (D,)."""
        return Curvature(factor * self.rest, factor.sqrt().unsqueeze(-1) * self.root)


@torch.no_grad()
def measured(model: Model, guide: LaplaceGuide, rows: Jacobians, weight: float) -> Curvature:
    """N F at the guide's mean, from the Jacobians of some examples, each of which counts `weight`
    times."""
    like, scale = guide.loc.detach(), guide.prior.covariance.scale
    room = guide.rank + gradients_at_once(len(like), guide.rank)
    most = examples_at_once(len(like), model.network.outputs)
    gathered = Gathered(like, guide.rank, room + most)
    for _, outputs, jacobians in rows:
        for score in _scores(outputs):
            gathered.add(torch.einsum("be,bed->bd", score, jacobians) * scale)
            if gathered.count >= room:
                gathered.shorten()
    root, rest = gathered.parts()
    return Curvature(weight * rest, weight**0.5 * root)


def _scores(outputs: LinearOutputs) -> list[Tensor]:
    """(B, E) vectors whose outer products sum to the Fisher information of the outputs."""
    values = outputs.mean.detach().requires_grad_()
    with torch.enable_grad():
        found = [each.sum() for each in all_outcomes(outputs.labels(values))]
        if found:
            by_outcome = [
                torch.autograd.grad(total, values, retain_graph=True)[0]
                for total in found
                if total.requires_grad  # not a fixed noise scale
            ]
            likelihood = outputs.model.likelihood
            if likelihood.noise_site is None or likelihood.constant_noise:
                return by_outcome
            # Ratings tell a noise scale times a text's factor: along a larger scale and smaller
            # factors the posterior would be as wide as the prior. So the scale counts as known to
            # the factors, and they to it.
            own = outputs.of_noise
            return [part for each in by_outcome for part in (each * ~own, each * own)]
        values = outputs.mean.detach().expand(_LABELS, -1, -1).clone().requires_grad_()
        (total,) = one_outcome(outputs.labels(values))
        (scores,) = torch.autograd.grad(total.sum(), values)
    information = torch.einsum("sbe,sbf->bef", scores, scores) / _LABELS
    strengths, axes = torch.linalg.eigh(information)
    return list((axes * strengths.clamp_min(0).sqrt().unsqueeze(1)).unbind(-1))


class Gathered:
    """A sum of outer products of vectors, kept as a low-rank root and a diagonal.

    The vectors are in one preallocated table: lists of them, and their concatenation, would take
    several times the memory.

    Args:
        like: a tensor (D,) of the vectors' dtype and device.
        rank: of the root.
        room: the largest number of vectors in the table.

    Attributes:
        count: the number of vectors in the table.
        diagonal: (D,) the diagonal of the sum of all vectors added so far.
    """

    def __init__(self, like: Tensor, rank: int, room: int) -> None:
        self.rank = rank
        self.count = 0
        self.diagonal = torch.zeros_like(like)
        self._table = like.new_empty(room, len(like))

    def add(self, vectors: Tensor) -> None:
        """Add M vectors, (M, D)."""
        self._table[self.count : self.count + len(vectors)] = vectors
        self.diagonal += torch.einsum("nd,nd->d", vectors, vectors)
        self.count += len(vectors)

    def parts(self) -> tuple[Tensor, Tensor]:
        """The root of the best low-rank approximation, (D, rank), and the diagonal of the rest,
        (D,)."""
        root = self._root()
        return root, (self.diagonal - root.square().sum(-1)).clamp_min(0)

    def _root(self) -> Tensor:
        axes, strength = leading(self._table[: self.count].mT, self.rank)
        return axes.mul_(strength.sqrt())

    def shorten(self) -> None:
        """Replace the vectors by the root."""
        root = self._root()
        self.count = root.shape[-1]
        self._table[: self.count] = root.mT
