"""Forgetting on purpose, against the same sums in double precision."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch

from bhpeft_pyro import fit
from bhpeft_pyro.distributions import Covariance, LowRankNormal
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.priors import JointPrior, as_prior
from bhpeft_pyro.sequential.forgetting import forget
from bhpeft_pyro.testing import tiny_examples, tiny_model


@pytest.mark.parametrize("ratio", [0.1, 0.01, 0.001])
def test_a_sharp_joint_posterior_keeps_its_mean_when_a_part_is_forgotten(ratio: float) -> None:
    """Sums of precision times mean lose it in float32: 90 nats of it at a ratio of 0.003."""
    sites = tiny_model(()).sites
    size, shapes = sum(site.numel for site in sites), {site.name: site.shape for site in sites}
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(size, 5))[0]
    root, loc = axes * (ratio**-2 - 1) ** 0.5, torch.randn(size)
    old = LowRankNormal(loc, Covariance.from_precision(torch.ones(size), root))
    first = as_prior(dist.Normal(0.5, 1.0))
    mixed = forget(0.9, JointPrior(old, shapes), first, sites)
    assert isinstance(mixed, JointPrior)
    unit = torch.eye(size).double()
    precision = 0.9 * (unit + root.double() @ root.double().T)
    pull = precision @ loc.double() + 0.1 * torch.full((size,), 0.5).double()
    away = mixed.normal.mean.double() - torch.linalg.solve(precision + 0.1 * unit, pull)
    assert away @ precision @ away / 2 < 1e-3  # nats


@pytest.mark.parametrize("keep", ["0.9", None])
def test_shares_are_numbers(keep: Any) -> None:
    posterior = fit(tiny_model(()), "normal", tiny_examples(), max_steps=1, progress=False)
    expected = "keep=.* must be a finite number of at least 0 and at most 1"
    with pytest.raises(ConfigError, match=expected):
        posterior.update(tiny_examples(seed=1), keep=keep)
