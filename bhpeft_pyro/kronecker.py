"""A Normal's covariance along axes that are Kronecker products, site by site and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Self

import torch
from torch import Tensor

from .distributions import Covariance, exact
from .errors import PriorError

__all__ = ["KroneckerCovariance", "between", "matrices"]


@dataclass(frozen=True, eq=False, init=False)
class KroneckerCovariance(Covariance):
    """diag(scale) U diag(ratio)^2 U' diag(scale), U of blocks left (x) right (George et al. 2018).

    A Laplace approximation whose Fisher information is seen along the eigenvectors of its Kronecker
    factors (Martens and Grosse 2015). It takes two numbers a weight and the factors.

    Attributes:
        scale: (D,) the prior's sds.
        ratio: (D,) sds along the axes, in units of `scale`.
        factors: for each site (L, a, a) and (L, b, b) orthogonal matrices; its weights are L
            matrices (a, b).

    >>> turn = torch.tensor([[[0.6, -0.8], [0.8, 0.6]]])
    >>> covariance = KroneckerCovariance(
    ...     torch.ones(2), torch.tensor([0.5, 1.0]), ((torch.ones(1, 1, 1), turn),))
    >>> covariance.variance, covariance.rank
    (tensor([0.7300, 0.5200]), 2)
    """

    factors: Sequence[tuple[Tensor, Tensor]]

    def __init__(
        self, scale: Tensor, ratio: Tensor, factors: Sequence[tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__(scale, scale.new_zeros(len(scale), 0), ratio)
        object.__setattr__(self, "factors", factors)

    @property
    def variance(self) -> Tensor:
        squares = [(left.square(), right.square()) for left, right in self.factors]
        return self.scale.square() * _between(squares, self.ratio.square())

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        factors = tuple((change(left), change(right)) for left, right in self.factors)
        return type(self)(change(self.scale), change(self.ratio), factors)

    def turned(self, vector: Tensor) -> Tensor:
        """(..., D) from weights, in units of `scale`, to coordinates along the axes."""
        return _between([(left.mT, right.mT) for left, right in self.factors], vector)

    def marginal(self, index: Tensor) -> Covariance:
        raise self.no_form()

    def precision_root(self) -> Tensor:
        raise self.no_form()

    def no_form(self) -> PriorError:
        """What is wrong where correlations are to be kept in another form."""
        return PriorError(
            "a Kronecker-factored posterior has no form with the correlations that this asks for; "
            "go on with 'laplace', or update(guide='normal')"
        )

    def _divergence(self, prior: Covariance) -> Tensor:
        if isinstance(prior, KroneckerCovariance):
            if prior.factors is not self.factors:
                raise NotImplementedError("other axes")  # then it is averaged over draws
            share = (self.ratio / prior.ratio).square()
            return 0.5 * (share - 1 - share.log()).sum()
        if prior.rank:
            raise NotImplementedError("other axes")
        share = (self.variance.sqrt() / prior.scale).square()
        return (
            0.5 * (share - 1).sum()
            - (self.scale / prior.scale).log().sum()
            - self.ratio.log().sum()
        )

    def _along(self, vector: Tensor, change: Tensor) -> Tensor:
        with exact(vector):
            along = self.turned(vector) * change
            return vector + _between(self.factors, along)


def _between(factors: Sequence[tuple[Tensor, Tensor]], vector: Tensor) -> Tensor:
    """left X right' of every matrix X in `vector`, (..., D)."""
    shapes = [(len(left), left.shape[1], right.shape[1]) for left, right in factors]
    parts = vector.split([prod(shape) for shape in shapes], -1)
    done = []
    for part, shape, (left, right) in zip(parts, shapes, factors, strict=True):
        x = part.reshape(*part.shape[:-1], *shape)
        done.append(between(left, x, right).reshape(part.shape))
    return torch.cat(done, -1)


def between(left: Tensor, x: Tensor, right: Tensor) -> Tensor:
    """left X right', layer by layer, of every X in (..., layer, a, b).

    As matmuls, these would copy the factors for every draw.
    """
    turned = torch.einsum("...lij,lbj->...lib", x, right)
    return torch.einsum("lai,...lib->...lab", left, turned)


def matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """A site's weights as L matrices (a, b).

    >>> matrices((12, 8, 384)), matrices((4, 384)), matrices((4,))
    ((12, 8, 384), (1, 4, 384), (1, 1, 4))
    """
    *layers, a, b = (1, 1, *shape)
    return prod(layers), a, b
