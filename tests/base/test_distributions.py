"""The low-rank Normal against dense matrices and torch's multivariate Normal."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from bhpeft_pyro.base.distributions import Covariance, LowRankNormal, leading

SIZE = 9


def random_precision(rank: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    diagonal = 0.5 + torch.rand(SIZE, generator=generator)
    return diagonal, 2 * torch.randn(SIZE, rank, generator=generator)


def dense(diagonal: Tensor, root: Tensor) -> Tensor:
    return torch.linalg.inv(torch.diag(diagonal) + root @ root.T)


def normals(rank: int, seed: int) -> tuple[LowRankNormal, MultivariateNormal]:
    diagonal, root = random_precision(rank, seed)
    loc = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed + 100))
    covariance = Covariance.from_precision(diagonal, root)
    return LowRankNormal(loc, covariance), MultivariateNormal(loc, dense(diagonal, root))


@pytest.mark.parametrize("rank", [0, 1, 4, SIZE])
def test_every_product_is_that_of_the_dense_matrix(rank: int) -> None:
    diagonal, root = random_precision(rank, seed=rank)
    covariance, matrix = Covariance.from_precision(diagonal, root), dense(diagonal, root)
    eye = torch.eye(SIZE)
    assert covariance.rank == rank
    near = {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(torch.stack([covariance.apply(e) for e in eye]), matrix, **near)
    torch.testing.assert_close(covariance.variance, matrix.diagonal(), **near)
    half = covariance.root(eye)  # rows are images of the unit vectors
    torch.testing.assert_close(half.T @ half, matrix, **near)
    torch.testing.assert_close(covariance.unroot(half), eye, **near)
    torch.testing.assert_close(2 * covariance.log_det(), torch.logdet(matrix), **near)
    again = covariance.precision_root()
    whole = torch.diag(covariance.scale**-2) + again @ again.T
    torch.testing.assert_close(whole, torch.linalg.inv(matrix), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("narrow", [1.0, 1e-2, 1e-4])
def test_what_varies_along_narrow_axes_alone_is_not_lost_in_rounding(narrow: float) -> None:
    torch.manual_seed(0)
    root = 30 * torch.randn(500, 16)
    rows = torch.randn(20, 1, 16) @ root.T
    covariance = Covariance.from_precision(torch.full((500,), narrow), root)
    precision = narrow * torch.eye(500).double() + root.double() @ root.double().T
    expected = rows.double() @ torch.linalg.solve(precision, rows.double().mT)
    torch.testing.assert_close(covariance.projected(rows).double(), expected, atol=0.0, rtol=0.1)


def test_density_and_divergence_are_those_of_torch() -> None:
    q, q_dense = normals(3, seed=1)
    p, p_dense = normals(5, seed=2)
    values = torch.randn(4, SIZE)
    torch.testing.assert_close(q.log_prob(values), q_dense.log_prob(values), atol=1e-4, rtol=1e-4)
    for first, second, exact in ((q, p, (q_dense, p_dense)), (p, q, (p_dense, q_dense))):
        expected = kl_divergence(*exact)  # not symmetric: a swap would show
        torch.testing.assert_close(kl_divergence(first, second), expected, atol=1e-3, rtol=1e-4)
    assert kl_divergence(q, q).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("strength", [1e2, 1e4, 1e6])
def test_a_divergence_along_axes_that_are_narrow_in_both_is_exact(strength: float) -> None:
    """As between rounds of many rows, whose information doubles."""
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(5000, 8, generator=generator).double())[0].float()
    one, two = (
        Covariance(torch.ones(5000), axes, torch.full((8,), (1 + n * strength) ** -0.5))
        for n in (1, 2)
    )
    share = (1 + strength) / (1 + 2 * strength)  # of the variance along each axis
    expected = 8 * 0.5 * (share - 1 - math.log(share))
    assert two.divergence(one).item() == pytest.approx(expected, rel=1e-2)


def test_draws_have_its_moments_and_carry_gradients() -> None:
    q, q_dense = normals(4, seed=3)
    draws = q.expand((50_000,)).rsample()
    assert (draws.mean(0) - q_dense.mean).abs().max() < 0.02  # sds are at most 1.4
    assert (draws.T.cov() - q_dense.covariance_matrix).abs().max() < 0.03
    loc = q.loc.clone().requires_grad_()
    LowRankNormal(loc, q.covariance).rsample().sum().backward()
    torch.testing.assert_close(loc.grad, torch.ones(SIZE))


def test_leading_directions() -> None:
    factor = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    axes, strength = leading(factor, 5)
    torch.testing.assert_close(axes.T @ axes, torch.eye(5), atol=1e-5, rtol=0)
    exact = torch.linalg.eigvalsh(factor @ factor.T)[-5:]
    torch.testing.assert_close(strength, exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(factor @ (factor.T @ axes), axes * strength, rtol=1e-3, atol=1e-3)
