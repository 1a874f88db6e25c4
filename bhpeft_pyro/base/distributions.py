"""A Normal over many weights whose covariance is narrow along few axes; supports and tensors of
others."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro.distributions import TorchDistribution, TransformedDistribution
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints, register_kl
from torch.distributions.constraint_registry import biject_to, transform_to
from torch.distributions.constraints import Constraint
from torch.distributions.transforms import Transform

from .isolation import without_autocast

__all__ = [
    "Constrained",
    "Covariance",
    "LowRankNormal",
    "base_of",
    "leading",
    "with_tensors",
]

_NO_DIMS = torch.Size()
CHUNK = 2**18
"""Numbers converted to double at a time. In single precision weak axes are not orthogonal."""


@dataclass(frozen=True, eq=False)
class Covariance:
    """diag(scale) (I + V (diag(ratio)^2 - 1) V') diag(scale).

    That is the inverse of a diagonal plus a matrix of rank K, which a diagonal prior becomes when
    data inform K directions (SLANG; Mishkin et al. 2018). Every product below costs O(D K); no
    D x D matrix is made.

    Attributes:
        scale: (D,) sds away from the axes.
        axes: (D, K) V, with orthonormal columns, in units of `scale`.
        ratio: (K,) sds along the axes, in the same units.

    >>> prior = Covariance.diagonal(torch.ones(3))
    >>> after = Covariance.from_precision(torch.ones(3), torch.tensor([[0.0], [0.0], [3.0]]))
    >>> after.variance, round(after.divergence(prior).item(), 3)
    (tensor([1.0000, 1.0000, 0.1000]), 0.701)
    """

    scale: Tensor
    axes: Tensor
    ratio: Tensor

    @classmethod
    def diagonal(cls, scale: Tensor) -> Covariance:
        """Independent weights."""
        return cls(scale, scale.new_zeros(len(scale), 0), scale.new_zeros(0))

    @classmethod
    def from_precision(cls, diagonal: Tensor, root: Tensor) -> Covariance:
        """The inverse of diag(`diagonal`) + `root` `root`', from (D,) and (D, K)."""
        scale = diagonal.rsqrt()
        whitened = scale.unsqueeze(-1) * root
        axes, strength = leading(whitened)
        return cls(scale, axes, (1 + strength).rsqrt())

    @classmethod
    def dense(cls, matrix: Tensor) -> Covariance:
        """Any covariance matrix (D, D), along its eigenvectors.

        >>> Covariance.dense(torch.tensor([[4.0, 1.0], [1.0, 1.0]])).apply(torch.tensor([1.0, 0.0]))
        tensor([4.0000, 1.0000])
        """
        sds = matrix.double().diagonal().sqrt()
        strength, axes = torch.linalg.eigh(matrix.double() / torch.outer(sds, sds))
        ratio = (strength / strength[-1]).clamp_min(0).sqrt()  # at most 1
        scale = sds * strength[-1].sqrt()
        return cls(scale.to(matrix), axes.to(matrix).contiguous(), ratio.to(matrix))

    def marginal(self, index: Tensor) -> Covariance:
        """The covariance of the entries at `index`, (M,), for ratios of at most 1."""
        if not self.rank:
            return Covariance.diagonal(self.scale[index])
        narrow = self.ratio.double().square()
        axes, strength = leading(self.axes[index].double() * (1 - narrow).clamp_min(0).sqrt())
        # No direction of the remaining rows is narrower than the narrowest of all.
        ratio = (1 - strength).maximum(narrow.min()).sqrt()
        return Covariance(self.scale[index], axes.to(self.axes), ratio.to(self.ratio))

    @property
    def rank(self) -> int:
        """K."""
        return len(self.ratio)

    @property
    def variance(self) -> Tensor:
        """(D,) marginal variances."""
        if not self.rank:
            return self.scale.square()
        narrow = self.ratio.square()
        share = 1 + self.axes.square() @ (narrow - 1)  # rounding could make it negative
        return self.scale.square() * share.maximum(narrow.min().clamp_max(1))

    def root(self, noise: Tensor) -> Tensor:
        """From (..., D) standard normal noise to noise with this covariance."""
        return self.scale * self._along(noise, self.ratio - 1)

    def unroot(self, value: Tensor) -> Tensor:
        """The inverse of `root`."""
        return self._along(value / self.scale, 1 / self.ratio - 1)

    def apply(self, vector: Tensor) -> Tensor:
        """(D,) vector times the covariance."""
        return self.scale * self._along(self.scale * vector, self.ratio.square() - 1)

    def solve(self, vector: Tensor) -> Tensor:
        """(D,) vector times the inverse."""
        return self._along(vector / self.scale, self.ratio.pow(-2) - 1) / self.scale

    def projected(self, rows: Tensor) -> Tensor:
        """The covariance of J w, (..., E, E), for J of (..., E, D)."""
        # A square, as along narrow axes a difference of products is all rounding error.
        half = rows * self.scale
        with without_autocast():
            half += ((half @ self.axes) * (self.ratio - 1)) @ self.axes.mT
            return half @ half.mT

    def precision_root(self) -> Tensor:
        """(D, K) R with inverse = diag(1 / scale^2) + R R', for ratios of at most 1."""
        gain = (self.ratio.pow(-2) - 1).clamp_min(0).sqrt()
        return self.axes * gain / self.scale.unsqueeze(-1)

    def log_det(self) -> Tensor:
        """Half the log determinant."""
        return self.scale.log().sum() + self.ratio.log().sum()

    def divergence(self, prior: Covariance) -> Tensor:
        """KL(N(0, self) || N(0, prior)); it costs O(D K K')."""
        share = self.scale / prior.scale
        narrower, wider = self.ratio.square() - 1, prior.ratio.pow(-2) - 1
        weight = share.square()
        with without_autocast():
            overlap = prior.axes.mT @ (share.unsqueeze(-1) * self.axes)
            # A square, as along axes that are narrow in both a difference is all rounding error.
            half = prior.axes.mT * share + (overlap * (self.ratio - 1)) @ self.axes.mT
            trace = weight @ (self.axes.square() @ narrower) + wider @ half.square().sum(1)
        diagonal = (weight - 1 - weight.log()).sum()
        return 0.5 * (diagonal + trace) - self.ratio.log().sum() + prior.ratio.log().sum()

    def _along(self, vector: Tensor, change: Tensor) -> Tensor:
        with without_autocast():
            return vector + ((vector @ self.axes) * change) @ self.axes.mT


def base_of(distribution: Distribution) -> Distribution:
    """A distribution without the wrappers that declare event dims.

    >>> import pyro.distributions as dist
    >>> type(base_of(dist.LogNormal(torch.zeros(3), 1.0).to_event(1))).__name__
    'LogNormal'
    """
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    return distribution


def with_tensors(
    part: Any, change: Callable[[Tensor], Tensor], made: dict[int, Any] | None = None
) -> Any:
    """A distribution, a part of one, or several of them, with other tensors."""
    made = {} if made is None else made  # a transform and its inverse hold each other
    if id(part) in made:
        return made[id(part)]
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, list):
        return [with_tensors(each, change, made) for each in part]
    if isinstance(part, dict):
        return {key: with_tensors(value, change, made) for key, value in part.items()}
    if isinstance(part, (Distribution, Transform, Constraint, Covariance)):
        twin = made[id(part)] = copy.copy(part)
        vars(twin).update(with_tensors(vars(part), change, made))
        return twin
    return part


class Constrained(TransformedDistribution):
    """A distribution of unconstrained coordinates, mapped onto a support.

    A `TransformedDistribution` forgets bounds: its support is that of its last transform, which is
    affine for positive numbers and intervals, so all of the reals. A guide made for it later would
    leave the true support.

    Args:
        base: over the unconstrained coordinates, all of whose dims are event dims.
        onto: the support.

    >>> import pyro.distributions as dist
    >>> Constrained(dist.Normal(0.0, 1.0), constraints.positive).support
    GreaterThan(lower_bound=0.0)
    """

    def __init__(
        self, base: TorchDistribution, onto: Constraint, validate_args: bool | None = None
    ) -> None:
        super().__init__(base, biject_to(onto), validate_args)
        self._onto = onto

    @constraints.dependent_property(is_discrete=False)
    def support(self) -> Constraint:
        return self._onto

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Constrained:
        return Constrained(self.base_dist.expand(batch_shape), self._onto, False)


# Torch has no transform for mixtures. Components with one support (spike and slab) share its own.
for registry in (biject_to, transform_to):
    registry.register(
        constraints.MixtureSameFamilyConstraint,
        lambda mixture, registry=registry: registry(mixture.base_constraint),
    )


def leading(factor: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """The leading eigenvectors (D, K) and eigenvalues (K,) of F F', for `factor` F (D, M)."""
    rows = factor.split(max(1, CHUNK // max(1, factor.shape[-1])))
    gram = sum(few.mT @ few for few in map(Tensor.double, rows))
    strength, mix = torch.linalg.eigh(gram)
    if rank is not None:
        strength, mix = strength[-rank:], mix[:, -rank:]
    keep = strength > 1e-7 * strength[-1:].clamp_min(1e-30)
    strength, mix = strength[keep], mix[:, keep]
    axes = factor @ (mix / strength.sqrt()).to(factor)
    return axes, strength.to(factor)


class LowRankNormal(TorchDistribution):
    """N(loc, covariance) over (D,) vectors, with a `Covariance`.

    Args:
        loc: (D,) mean.
        covariance: of D entries.

    >>> normal = LowRankNormal(torch.zeros(3), Covariance.diagonal(torch.ones(3)))
    >>> normal.log_prob(torch.zeros(3))
    tensor(-2.7568)
    """

    arg_constraints = {"loc": constraints.real_vector}  # noqa: RUF012 - as torch declares it
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        covariance: Covariance,
        batch_shape: torch.Size = _NO_DIMS,
        validate_args: bool | None = None,
    ) -> None:
        self.loc, self.covariance = loc, covariance
        super().__init__(batch_shape, loc.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> LowRankNormal:
        """Give it another batch shape."""
        return LowRankNormal(self.loc, self.covariance, torch.Size(batch_shape), False)

    @property
    def mean(self) -> Tensor:
        return self.loc.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        return self.covariance.variance.expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Any = _NO_DIMS) -> Tensor:
        shape = self._extended_shape(sample_shape)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.loc + self.covariance.root(noise)

    def log_prob(self, value: Tensor) -> Tensor:
        distance = self.covariance.unroot(value - self.loc).square().sum(-1)
        size = len(self.loc) * math.log(2 * math.pi)
        log_prob: Tensor = -0.5 * (distance + size) - self.covariance.log_det()
        return log_prob


@register_kl(LowRankNormal, LowRankNormal)
def _kl(q: LowRankNormal, p: LowRankNormal) -> Tensor:
    distance = p.covariance.unroot(q.loc - p.loc).square().sum(-1)
    total = q.covariance.divergence(p.covariance) + 0.5 * distance
    return total.expand(q.batch_shape)
