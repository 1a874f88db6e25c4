"""What is learnt of a forward pass by kernel ridge regression."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bhpeft_pyro.prediction import log_kernel
from bhpeft_pyro.prediction.log_kernel import LogKernel, of_pass


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
    kernel = log_kernel._kernel(x, x, torch.tensor(4.0))
    _, residuals = log_kernel._ridge(kernel, y)
    for column in range(2):
        tried = []
        for penalty in log_kernel._PENALTIES * 15:
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


@pytest.mark.parametrize("spoilt", [7.0, -1e6])
def test_choices_that_do_not_exist_say_nothing(spoilt: float) -> None:
    exist = torch.tensor([[True, True, False], [True, True, True]])
    read, scores = features(6, 3).reshape(2, 3, 3), features(6, 1, seed=1).reshape(2, 3, 1)
    expected = of_pass(read, scores, exist)
    other: Any = [value.clone() for value in (read, scores)]
    for value in other:
        value[0, 2] = spoilt
    torch.testing.assert_close(of_pass(*other, exist), expected)
    assert expected.shape == (2, 3 + log_kernel.OF_CHOICES)
    assert expected[0, 3:].sum().item() == pytest.approx(1)
    alone = of_pass(read[:1, :2], scores[:1, :2], exist[:1, :2])
    torch.testing.assert_close(alone, expected[:1])
