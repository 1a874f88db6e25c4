"""What is learnt of a forward pass: kernel ridge regression, and covariances of outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bhpeft_pyro.model import amortized
from bhpeft_pyro.model.amortized import LogKernel, OutputCovariance, mean_variance, of_pass


def features(count: int, width: int = 4, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def values(x: Tensor) -> Tensor:
    """Two smooth functions, of which the second is far smaller."""
    return torch.stack([x[:, 0].exp() + 0.1, 1e-3 * (1 + x[:, 1].square())], 1)


@pytest.fixture(scope="module")
def learnt() -> LogKernel:
    x = features(200)
    return LogKernel.fitted(x, values(x), 2)


def test_left_out_residuals_are_those_of_a_loop() -> None:
    x, y = features(15).double(), torch.log(values(features(15))).double()
    kernel = amortized._kernel(x, x, torch.tensor(4.0))
    _, residuals = amortized._ridge(kernel, y)
    for column in range(2):
        tried = []
        for penalty in amortized._PENALTIES * 15:
            left = []
            for i in range(15):
                others = [k for k in range(15) if k != i]
                system = kernel[others][:, others] + penalty * torch.eye(14)
                left.append(
                    y[i, column] - kernel[i, others] @ torch.linalg.solve(system, y[others, column])
                )
            tried.append(torch.stack(left))
        best = min(tried, key=lambda each: each.square().mean().item())
        torch.testing.assert_close(residuals[:, column], best, atol=1e-6, rtol=1e-6)


def test_it_follows_what_was_learnt_and_is_the_mean_far_away(learnt: LogKernel) -> None:
    new = features(60, seed=1)
    error = (learnt(new) / values(new)).log()
    plain = values(new).log() - values(features(200)).log().mean(0)
    assert (error.square().mean(0) < 0.3 * plain.square().mean(0)).all()
    torch.testing.assert_close(learnt(1e3 + new), learnt.mean.exp().expand(60, 2))


def test_values_that_features_do_not_tell_are_their_mean() -> None:
    """And not the exponential of their mean logarithm, here 0.61 of it."""
    x, noise = features(400), torch.randn(400, 1, generator=torch.Generator().manual_seed(7)).exp()
    said = LogKernel.fitted(x, noise, 2)(features(100, seed=2))
    assert said.mean().item() == pytest.approx(noise.mean().item(), rel=0.15)


def test_the_unit_of_a_feature_does_not_matter(learnt: LogKernel) -> None:
    x, new, units = features(200), features(60, seed=1), torch.tensor([30.0, 0.02, 1.0, 1e3])
    other = LogKernel.fitted(x * units, values(x), 2)
    torch.testing.assert_close(other(new * units), learnt(new), rtol=1e-3, atol=0)


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_a_feature_that_never_changed_says_nothing(constant: float) -> None:
    """A unit behind a ReLU may be 0 for all texts that are learnt, and not for others."""
    x, new, noise = features(200), features(60, seed=1), 1e-7 * features(200, 1, seed=4)
    with_it = LogKernel.fitted(torch.cat([constant + noise, x], 1), values(x), 3)
    without = with_it(torch.cat([torch.full((60, 1), constant), new], 1))
    moved = with_it(torch.cat([torch.full((60, 1), constant + 1e-3), new], 1))
    torch.testing.assert_close(moved, without, rtol=1e-3, atol=0)
    assert not torch.allclose(moved, with_it.mean.exp().expand(60, 2), rtol=0.1)


def test_autocast_does_not_reach_it(learnt: LogKernel) -> None:
    new = features(60, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(learnt(new), learnt(new.double()), rtol=1e-5, atol=0)
        rounded = learnt(new)
    torch.testing.assert_close(rounded, learnt(new), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", ["points", "coefficients", "scale", "length"])
def test_tensors_that_do_not_fit_are_refused(name: str, learnt: LogKernel) -> None:
    tensors = {**vars(learnt), "other": torch.zeros(1)}
    assert torch.equal(LogKernel.of_tensors(tensors)(features(3)), learnt(features(3)))
    with pytest.raises(ValueError, match=f"{name} has shape"):
        LogKernel.of_tensors(tensors | {name: torch.zeros(3, 1, 2)})


# Covariances of outputs


def shape_of(size: int, seed: int = 3) -> Tensor:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    return root @ root.mT + 0.1 * torch.eye(size)


def scaled(shape: Tensor, factor: Tensor, inside: int) -> Tensor:
    """(N, E, E) covariances whose first `inside` outputs have a factor."""
    sds = torch.ones(len(factor), 1, len(shape))
    sds[:, :, :inside] = factor.reshape(-1, 1, 1).sqrt()
    return sds.mT * shape * sds


@pytest.mark.parametrize("own", [0, 2])
def test_a_shape_times_a_factor_is_found_again(own: int) -> None:
    """The likelihood's own weights have one covariance for all texts; theirs with the outputs has
    the root of the factor."""
    x = features(150)
    factor, shape = (0.5 * x[:, 0]).exp(), shape_of(3 + own)
    learnt = OutputCovariance.fitted(x, scaled(shape, factor, 3), 3, 2)
    torch.testing.assert_close(learnt(x, None), scaled(shape, factor, 3), rtol=0.1, atol=0.02)
    torch.testing.assert_close(learnt(x, None)[:, 3:, 3:], shape[3:, 3:].expand(150, own, own))
    again = OutputCovariance.of_tensors(learnt.tensors(), 3)
    assert torch.equal(again(x, None), learnt(x, None))


def test_the_factor_has_the_least_divergence() -> None:
    """Of covariances that are no multiples of one shape."""
    matrices = torch.stack([shape_of(3, seed) for seed in range(40)]).double()
    factors, _ = amortized._parts_of(matrices, 3)
    network = (matrices / factors.reshape(-1, 1, 1)).mean(
        0
    )  # is about the shape, once it converged
    for matrix, factor in zip(matrices, factors, strict=True):
        exact = torch.linalg.solve(network, matrix).trace() / 3
        assert factor.item() == pytest.approx(exact.item(), rel=0.02)


def test_any_text_has_a_covariance() -> None:
    x = features(100)
    learnt = OutputCovariance.fitted(x, torch.stack([shape_of(4, s) for s in range(100)]), 3, 2)
    for new in (features(20, seed=5), 100 * features(20, seed=5), torch.zeros(1, 4)):
        assert torch.linalg.eigvalsh(learnt(new, None)).min() >= -1e-5


def test_under_a_softmax_only_differences_vary() -> None:
    contrast = torch.eye(4) - 0.25
    shape, x = contrast @ shape_of(4) @ contrast, features(100)
    factor = (0.5 * x[:, 0]).exp()
    learnt = OutputCovariance.fitted(x, scaled(shape, factor, 4), 4, 2)
    covariance = learnt(features(20, seed=5), None)
    assert covariance.sum(-1).abs().max() < 1e-4
    torch.testing.assert_close(learnt(x, None), scaled(shape, factor, 4), rtol=0.1, atol=0.02)


def test_choices_vary_as_much_as_they_did_and_others_not_at_all() -> None:
    exist = torch.arange(5) < torch.tensor([2, 5, 3]).repeat(40).unsqueeze(1)
    x, there = features(120), exist.float()
    factor = (0.5 * x[:, 0]).exp()
    contrasts = torch.diag_embed(there) - there.unsqueeze(1) * there.unsqueeze(2) / there.sum(
        1
    ).reshape(-1, 1, 1)
    covariances = factor.reshape(-1, 1, 1) * contrasts
    variance = mean_variance(covariances, exist)
    torch.testing.assert_close(variance.flatten(), factor)
    learnt = OutputCovariance.fitted(x, variance, 1, 2)
    torch.testing.assert_close(learnt(x, exist), covariances, rtol=0.1, atol=0.02)
    narrow = learnt(x[:1], exist[:1, :2])  # its batch has no more choices
    torch.testing.assert_close(narrow, learnt(x[:1], exist[:1])[:, :2, :2])


@pytest.mark.parametrize("spoilt", [7.0, -1e6])
def test_choices_that_do_not_exist_say_nothing(spoilt: float) -> None:
    exist = torch.tensor([[True, True, False], [True, True, True]])
    read, scores = features(6, 3).reshape(2, 3, 3), features(6, 1, seed=1).reshape(2, 3, 1)
    expected = of_pass(read, scores, exist)
    other: Any = [value.clone() for value in (read, scores)]
    for value in other:
        value[0, 2] = spoilt
    torch.testing.assert_close(of_pass(*other, exist), expected)
    assert expected.shape == (2, 3 + amortized.OF_CHOICES)
    assert expected[0, 3:].sum().item() == pytest.approx(1)
    alone = of_pass(read[:1, :2], scores[:1, :2], exist[:1, :2])
    torch.testing.assert_close(alone, expected[:1])
