"""The information that data have about the weights of a linearised network.

It is the Fisher information of all examples, N F, kept as its leading directions and the diagonal
of the rest. It is computed from the derivatives of the outputs with respect to the weights, example
by example; labels are not used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...base.distributions import Covariance, leading
from ...base.isolation import without_autocast
from ...base.progress import tracked
from ...data import Examples
from ...data.batch import Batch
from ...model.cached_batches import CachedBatches
from ...model.fisher import all_outcomes, one_outcome
from ...model.linearized import AT_ONCE, LinearOutputs, examples_at_once, jacobian
from ...model.model import Model
from ...priors import unpack

_LABELS = 256  # drawn for each example, where the expectation over labels has no closed form
_GATHERED = 256  # gradients
_REUSED, _MOST = 256, 2**30  # Jacobian rows that are kept for another use, in so many bytes

Jacobians = Iterable[tuple[Batch, LinearOutputs, Tensor]]
"""Batches with their outputs and the (B, E, D) derivatives of these."""


def gradients_at_once(latents: int, rank: int) -> int:
    """How many gradients are gathered before the leading directions are computed again: as many as
    2 GiB hold, at least `rank` and at most 256."""
    return max(rank, min(_GATHERED, AT_ONCE // (4 * max(latents, 1))))


def rows_kept(latents: int) -> int:
    """How many rows of Jacobians are kept for another use: 256 if 1 GiB holds them, or else none,
    and they are computed again."""
    return _REUSED if 4 * latents * _REUSED <= _MOST else 0


def jacobians(
    model: Model,
    at: Mapping[str, Tensor],
    examples: Examples,
    share: float = 1.0,
    first: bool = False,
) -> Jacobians:
    """Those of examples at some weights, by site, as many at a time as there is memory for. `share`
    is that of the progress bar; `first` as for `jacobian`."""
    at_once = examples_at_once(_count(at), _outputs(model, examples))
    batches = CachedBatches(model, examples).prediction(at_once)
    for _, indexed in tracked(batches, "", -(-len(examples) // at_once), share):
        batch = indexed.to(model.network.device)
        yield batch, *jacobian(model, at, batch, first)


def repeatable(
    model: Model, at: Mapping[str, Tensor], examples: Examples
) -> Callable[[], Jacobians]:
    """`jacobians` at every call, computed once if there is memory to keep them."""
    compute = partial(jacobians, model, at, examples)
    if len(examples) * _outputs(model, examples) > rows_kept(_count(at)):
        return compute
    kept = [*compute()]
    return lambda: kept


def _count(at: Mapping[str, Tensor]) -> int:
    return sum(value.numel() for value in at.values())


def _outputs(model: Model, examples: Examples) -> int:
    return model.network.outputs * examples.width


@torch.no_grad()
def equal_effect(
    model: Model, shapes: Mapping[str, tuple[int, ...]], scale: Tensor, rows: Jacobians
) -> Tensor:
    """Prior sds under which every site of the network has the same effect on the outputs.

    The variance of a site's weights is 1 / (number of sites * sum of its squared Jacobian entries),
    the sum averaged over examples and over outputs (under a softmax over the contrasts between
    them, one less). So the prior sd of an output of the linearised network is 1. Gates, whose
    effect is that of what they multiply, and the likelihood's own sites keep their `scale`.

    The sds before and after are (D,), in the order of the sites in `shapes`.
    """
    kept = {site.name for site in model.likelihood.sites}
    kept |= {site.name for site in model.sites if site.role == "gate"}
    total = torch.zeros_like(scale)
    count = 0
    for batch, outputs, derivatives in rows:
        inside = derivatives[:, : math.prod(outputs.shape)]
        there = inside.shape[:2].numel()
        if batch.choices is not None:  # others have no effect
            exist = batch.choices.repeat_interleave(outputs.shape[-1], 1)
            inside, there = inside * exist.unsqueeze(-1), int(exist.sum())
        total += inside.square().sum((0, 1))
        count += there - len(inside) * model.likelihood.softmax
    effects = {name: part.sum().item() for name, part in unpack(total / count, shapes).items()}
    effects = {name: effect for name, effect in effects.items() if name not in kept and effect > 0}
    scales = [
        torch.full_like(part, (len(effects) * effects[name]) ** -0.5) if name in effects else part
        for name, part in unpack(scale, shapes).items()
    ]
    return torch.cat([part.flatten() for part in scales])


@dataclass(frozen=True, eq=False)
class Information:
    """What data say about the weights, I = N_1 F_1 + N_2 F_2 + ..., in units of the precision of
    the first round's prior, P = diag(`first`^-2): diag(rest) + root root', (D,) and (D, rank).

    A covariance is the inverse of tau P + I. It is computed from I, which at a large tau could not
    be found again by subtraction.

    >>> import torch
    >>> information = Information(torch.tensor([3.0, 8.0]), torch.zeros(2, 0))
    >>> information.covariance(torch.tensor([0.5, 0.5]), tau=1.0).variance
    tensor([0.0625, 0.0278])
    """

    rest: Tensor
    root: Tensor

    @classmethod
    @torch.no_grad()
    def of(
        cls, rows: Jacobians, first: Tensor, rank: int, outputs: int, weight: float
    ) -> Information:
        """From the Jacobians of some examples, each of which counts `weight` times; `rank`
        directions are kept."""
        room = rank + gradients_at_once(len(first), rank)
        gathered = Gathered(first, rank, room + examples_at_once(len(first), outputs))
        for _, linear, derivatives in rows:
            for score in _scores(linear):
                gathered.add(torch.einsum("be,bed->bd", score, derivatives) * first)
                if gathered.count >= room:
                    gathered.shorten()
        root, rest = gathered.parts()
        return cls(weight * rest, weight**0.5 * root)

    @classmethod
    def within(cls, covariance: Covariance, first: Tensor) -> Information:
        """That in the inverse of P + I."""
        rest = (first / covariance.scale).square() - 1
        return cls(rest, first.unsqueeze(-1) * covariance.precision_root())

    def leading(self, tau: float) -> tuple[Tensor, Tensor]:
        """The axes (D, K) and strengths (K,) of `root`, with tau P + diag(rest) for the unit."""
        return leading((tau + self.rest).rsqrt().unsqueeze(-1) * self.root)

    def covariance(self, first: Tensor, tau: float) -> Covariance:
        """The inverse of tau P + I."""
        axes, strength = self.leading(tau)
        return Covariance(first * (tau + self.rest).rsqrt(), axes, (1 + strength).rsqrt())

    @property
    def is_zero(self) -> bool:
        # A prior's covariance leaves rounding errors.
        return not (self.root.shape[1] or (self.rest > 0.002).any())

    def times(self, factor: Tensor) -> Information:
        """C I C, with C the diagonal matrix of the roots of `factor`, (D,)."""
        return Information(factor * self.rest, factor.sqrt().unsqueeze(-1) * self.root)

    @without_autocast()
    def plus(self, other: Information, rank: int) -> Information:
        """The sum: its `rank` leading directions, and the diagonal of the rest."""
        root, rest = self.root, self.rest + other.rest
        if other.root.shape[1]:
            both = torch.cat([root, other.root], 1)
            gathered = Gathered(rest, rank, both.shape[1])
            gathered.add(both.mT)
            root, left = gathered.parts()
            rest = rest + left
        return Information(rest, root)


def _scores(outputs: LinearOutputs) -> list[Tensor]:
    """(B, E) vectors whose outer products sum to the Fisher information of the outputs."""
    values = outputs.mean.detach().requires_grad_()
    with torch.enable_grad():
        totals = [part.sum() for part in all_outcomes(outputs.labels(values))]
        if totals:
            by_outcome = [
                torch.autograd.grad(total, values, retain_graph=True)[0]
                for total in totals
                if total.requires_grad  # not a fixed noise scale
            ]
            likelihood = outputs.model.likelihood
            if likelihood.noise_site is None or math.prod(outputs.shape) == 1:
                return by_outcome
            # Ratings tell a noise scale times a text's factor: along a larger scale and smaller
            # factors the posterior would be as wide as the prior. So the scale counts as known to
            # the factors, and they to it.
            noise = outputs.of_noise
            return [part for score in by_outcome for part in (score * ~noise, score * noise)]
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
        room: the largest number of vectors in the table; there are `count` now.
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
