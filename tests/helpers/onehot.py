"""A conjugate model that any subset of the data leaves diagonal: each word has a weight of its own.

The bias is held at zero by its prior, so the posterior over the 16 weights is exactly
independent, in every round.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import WIDTH, Designed, KnownNoise
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.guides import LaplaceGuide

PRIOR_SD, NOISE = 0.7, 0.5
FIT: dict[str, Any] = {
    "max_steps": 100,
    "batch_size": 32,
    "particles": 4,
    "lr": 0.1,
    "progress": False,
}


def network() -> Designed:
    table = torch.zeros(50, WIDTH)
    table[5 : 5 + WIDTH] = torch.eye(WIDTH)
    return Designed(table)


def model() -> bh.Model:
    prior = {"head.bias": dist.Normal(0.0, 1e-4), "*": dist.Normal(0.0, PRIOR_SD)}
    return bh.Model(network(), prior, KnownNoise(NOISE))


def words(count: int, seed: int) -> bh.data.Examples:
    """Random words with ratings: a fixed true mean each, and noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, 5 + WIDTH, (count,), generator=generator)
    truth = torch.randn(WIDTH, generator=torch.Generator().manual_seed(99))
    labels = truth[tokens - 5] + NOISE * torch.randn(count, generator=generator)
    data = {"text": [f"w{token}" for token in tokens.tolist()], "label": labels.tolist()}
    return bh.data.encode(data, network().tokenizer, kind="rating")


def exact(parts: Sequence[tuple[bh.data.Examples, float]]) -> tuple[Tensor, Tensor]:
    """Mean and sd (16,) when each part's likelihood is raised to its power."""
    precision = torch.full((WIDTH,), PRIOR_SD**-2, dtype=torch.float64)
    shift = torch.zeros(WIDTH, dtype=torch.float64)
    for data, power in parts:
        assert data.labels is not None
        at = data.tokens.ids.long() - 5
        precision += power * at.bincount(minlength=WIDTH) / NOISE**2
        shift += power * at.bincount(data.labels.double(), minlength=WIDTH) / NOISE**2
    return shift / precision, precision.rsqrt()


def solve(setup: Any, report: Any) -> None:
    """In place of `optimise`: the exact posterior under the model's prior, which is Normal."""
    model, guide, examples = setup.model, setup.guide, setup.data
    assert examples.labels is not None
    laplace = isinstance(guide, LaplaceGuide)  # its prior is joint, and `fit` computes its width
    if laplace:
        prior = guide.prior
        mean, variance = (guide.unpack(x)["head.weight"][0] for x in (prior.loc, prior.variance))
    else:
        nodes = pyro.poutine.trace(model.prior).get_trace(model.sites).nodes
        of_site = nodes["head.weight"]["fn"]
        mean, variance = of_site.mean[0], of_site.variance[0]
    at = examples.tokens.ids.long() - 5
    precision = 1 / variance + at.bincount(minlength=WIDTH) / NOISE**2
    shift = mean / variance + at.bincount(examples.labels.double(), minlength=WIDTH) / NOISE**2
    guide.move({"head.weight": (shift / precision)[None].float()})
    if not laplace:
        with torch.no_grad():
            guide.log_scale["head/weight"].copy_(-0.5 * precision.log()[None])


def exactly(patch: pytest.MonkeyPatch) -> None:
    """Every fit ends at the exact posterior, so what is left to go wrong is the accounts."""
    patch.setattr("bhpeft_pyro.posterior.learn.optimise", solve)
    patch.setattr("bhpeft_pyro.posterior.fit.start", lambda *args: None)


def assert_posterior(
    guide: Any, parts: Sequence[tuple[bh.data.Examples, float]], tolerance: float = 1e-4
) -> None:
    """The means in units of the sd, and the sds, are the exact ones."""
    mean, sd = exact(parts)
    found_mean = guide.means()["head.weight"][0].double()
    ratio = (guide.scales()["head.weight"][0].double() / sd).log()
    assert ((found_mean - mean) / sd).abs().max() < tolerance
    assert ratio.abs().max() < tolerance
