"""Many rounds against the closed form: nothing lost, nothing counted twice, any order."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from onehot import FIT, assert_posterior, exact, exactly, model, words

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Covariance, LowRankNormal
from bhpeft_pyro.posterior.forgetting import forget
from bhpeft_pyro.priors import JointPrior, as_prior
from bhpeft_pyro.testing import tiny_examples, tiny_model

# Texts of one word each come again in other rounds.
pytestmark = pytest.mark.filterwarnings("ignore:data. .* that an earlier round has learnt")

ROUNDS = [words(count, seed) for count, seed in ((48, 1), (32, 2), (64, 3), (48, 4))]


def in_rounds(order: tuple[int, ...], **options: Any) -> list[bh.Posterior]:
    """All rounds in an order; the posteriors after each."""
    posterior = bh.fit(model(), "normal", ROUNDS[order[0]], **FIT)
    posteriors = [posterior]
    for index in order[1:]:
        posteriors.append(posteriors[-1].update(ROUNDS[index], **options))
    return posteriors


@pytest.fixture
def exact_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    exactly(monkeypatch)


def test_rounds_with_forgetting_through_the_whole_stack() -> None:
    """Real fits; their errors are half of what is allowed, and the seed is fixed."""
    last = in_rounds((0, 1, 2), keep=0.5)[-1]
    parts = [(data, 0.5 ** (2 - i)) for i, data in enumerate(ROUNDS[:3])]
    assert_posterior(last.guide, parts, tolerance=0.6)
    mean_ratio = (last.guide.scales()["head.weight"][0] / exact(parts)[1]).log().mean()  # type: ignore[operator]
    assert abs(mean_ratio) < 0.08  # with nothing forgotten it would be -0.2


@pytest.mark.usefixtures("exact_fits")
@pytest.mark.parametrize("order", list(permutations(range(4)))[::8])
def test_rounds_in_any_order_equal_one_fit_on_everything(order: tuple[int, ...]) -> None:
    assert_posterior(in_rounds(order)[-1].guide, [(data, 1.0) for data in ROUNDS])


@pytest.mark.usefixtures("exact_fits")
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.9])
def test_old_evidence_counts_by_powers_of_keep(keep: float) -> None:
    last = in_rounds((0, 1, 2, 3), keep=keep)[-1]
    parts = [(data, keep ** (3 - i)) for i, data in enumerate(ROUNDS)]
    assert_posterior(last.guide, parts)
    assert last.report.keep == keep


def test_the_first_prior_acts_on_few_rows_only() -> None:
    options: dict[str, Any] = {"components": 1, "max_steps": 2, "progress": False}
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(80), **options)
    second = first.update(tiny_examples(100, seed=1))
    third = second.update(tiny_examples(40, seed=2))
    assert [report.temperature for report in third.lineage] == [0, 0, 1]


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
