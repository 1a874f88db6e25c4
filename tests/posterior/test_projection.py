"""Another family of guides in a later round: what is kept is exact, what is lost is reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from exact import Exact, dense, flat, own_network, random_ratings, regression
from saves import load
from torch.distributions import MultivariateNormal, kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Covariance, LowRankNormal
from bhpeft_pyro.errors import GuideError, PriorError
from bhpeft_pyro.guides import BlockGuide, LaplaceGuide, NormalGuide, PyroGuide
from bhpeft_pyro.posterior.update import in_family
from bhpeft_pyro.priors import JointPrior, PosteriorPrior
from bhpeft_pyro.testing import tiny_examples, tiny_model

NOISE = 2.0
FIT: dict[str, Any] = {
    "max_steps": 200,
    "batch_size": 64,
    "lr": 0.1,
    "temperature": 1.0,
    "tau": 1.0,
    "components": 1,
    "progress": False,
}
QUICK: dict[str, Any] = {"max_steps": 6, "lr": 0.1, "progress": False}
FAMILIES: list[tuple[Any, type]] = [
    ("normal", NormalGuide),
    ("laplace", LaplaceGuide),
    ("AutoNormal", PyroGuide),
    ({"lora.*": "normal", "*": ("delta", {"width": 0.1})}, BlockGuide),
]


def whole(normal: LowRankNormal) -> MultivariateNormal:
    return MultivariateNormal(normal.loc.detach().double(), dense(normal.covariance))


def test_the_nearest_independent_normals_have_the_same_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    root = 2 * torch.randn(10, 5, generator=generator)
    covariance = Covariance.from_precision(0.5 + torch.rand(10, generator=generator), root)
    normal = LowRankNormal(torch.randn(10, generator=generator), covariance)
    found, divergence = JointPrior(normal, {"a": (2, 3), "b": (4,)}).independent()
    parts = [found.distributions[name] for name in "ab"]
    mean, variance = (
        torch.cat([getattr(part, what).flatten() for part in parts]).double()
        for what in ("mean", "variance")
    )
    q = whole(normal)
    torch.testing.assert_close(mean, q.mean)
    torch.testing.assert_close(variance, q.variance, rtol=1e-4, atol=1e-6)
    exact = kl_divergence(q, MultivariateNormal(mean, variance.diag())).item()
    assert divergence == pytest.approx(exact, rel=1e-4)
    # No product is nearer: neither with other means nor with other widths.
    for scale, shift in ((1.05, 0.0), (0.95, 0.0), (1.0, 0.01)):
        other = MultivariateNormal(mean + shift, (scale * variance).diag())
        assert kl_divergence(q, other) > divergence


def test_a_marginal_is_as_narrow_as_it_should_be() -> None:
    """Single precision has no room for 1 - 1e-6."""
    sharp = Covariance.from_precision(torch.ones(6), 1e3 * torch.eye(6)[:, :4])
    half = sharp.marginal(torch.tensor([0, 1, 5]))
    torch.testing.assert_close(half.ratio, torch.tensor([1e-3, 1e-3]), rtol=1e-2, atol=0)


def gaussian(posterior: bh.Posterior) -> MultivariateNormal:
    """What a guide over the head is, in the order of `Exact`."""
    guide: Any = posterior.guide
    if isinstance(guide, LaplaceGuide):
        return whole(guide.as_prior().normal)
    return MultivariateNormal(flat(guide.means()), flat(guide.scales()).square().diag())


def following(
    prior: MultivariateNormal, model: bh.Model, more: bh.data.Examples
) -> MultivariateNormal:
    """The exact posterior of linear regression under a Normal prior."""
    x = Exact.of(model, more).x
    assert more.labels is not None
    precision = prior.precision_matrix + x.T @ x / NOISE**2
    pull = prior.precision_matrix @ prior.mean + x.T @ more.labels.double() / NOISE**2
    return MultivariateNormal(torch.linalg.solve(precision, pull), precision_matrix=precision)


def test_laplace_takes_over_a_normal_posterior_as_it_is() -> None:
    model = regression(own_network(), noise=NOISE)
    first = bh.fit(model, "normal", random_ratings(model, 64, 3), **FIT)
    more = random_ratings(model, 48, 4)
    second = first.update(more, guide="laplace")
    assert second.report.projection == 0.0 and "exact" in str(second.report)
    truth, now = following(gaussian(first), model, more), gaussian(second)
    assert ((now.mean - truth.mean) / truth.stddev).abs().max() < 0.1
    half = torch.linalg.inv(torch.linalg.cholesky(truth.covariance_matrix))
    ratios = torch.linalg.eigvalsh(half @ now.covariance_matrix @ half.T)
    assert ratios.min() > 0.9 and ratios.max() < 1.1
    assert isinstance(first.guide, NormalGuide)  # the old round stays


def test_a_normal_guide_takes_over_the_marginals_of_laplace() -> None:
    model = regression(own_network(), noise=NOISE)
    first = bh.fit(model, "laplace", random_ratings(model, 64, 3), **FIT)
    more = random_ratings(model, 48, 4)
    second = first.update(more, guide="normal")
    q = gaussian(first)
    p = MultivariateNormal(q.mean, torch.diag(q.variance))
    lost = kl_divergence(q, p).item()
    assert lost > 1  # there are correlations to lose
    assert second.report.projection == pytest.approx(lost, rel=1e-3)
    assert f"KL {lost:.2f} nats" in str(second.report)
    truth, now = following(p, model, more), gaussian(second)
    best = truth.precision_matrix.diagonal().rsqrt()  # of the nearest independent Normals
    assert ((now.mean - truth.mean) / truth.stddev).abs().max() < 0.4
    assert (now.stddev / best).log().abs().max() < 0.15
    third = second.update(random_ratings(model, 32, 5), max_steps=3)
    assert isinstance(third.guide, NormalGuide) and third.report.projection is None


@pytest.mark.parametrize("old", [family for family, _ in FAMILIES], ids=str)
def test_any_family_starts_where_any_other_was(old: Any) -> None:
    first = bh.fit(tiny_model(), old, tiny_examples(16), components=1, **QUICK)
    model, last = first.model, first.as_prior()
    means = first.guide.means()  # type: ignore[operator]
    for new, kind in FAMILIES:
        guide, prior, divergence = in_family(model, last, new, seed=0)
        assert type(guide) is kind
        for name, value in guide.means().items():
            torch.testing.assert_close(value, means[name])
        # A second time there is nothing left to lose.
        assert divergence >= 0 == in_family(model, prior, new, seed=0)[2]


def test_a_round_of_another_family_is_saved_and_forgets(tmp_path: Path) -> None:
    posterior = bh.fit(tiny_model(), "normal", tiny_examples(16), **QUICK)
    for number, (new, kind) in enumerate([*FAMILIES[1:], FAMILIES[0]]):
        options: Any = {"keep": 0.7} if number % 2 else {}
        rows = tiny_examples(12, seed=1 + number)
        posterior = posterior.update(rows, guide=new, max_steps=2, **options)
        folder = posterior.save(tmp_path / str(number))
        again = load(folder)
        assert again.report == posterior.report and again.report.projection is not None
        more, unseen = tiny_examples(12, seed=20), tiny_examples(20, seed=9)
        here, there = (p.update(more) for p in (posterior, again))
        assert torch.equal(*(p.predict(unseen, 4).probabilities for p in (here, there)))
        assert type(there.guide) is kind


def test_what_cannot_take_over_is_refused() -> None:
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(), components=1, **QUICK)
    more = tiny_examples(12, seed=1)
    with pytest.raises(GuideError, match="unknown guide 'fuller'"):
        first.update(more, guide="fuller")
    with pytest.raises(GuideError, match=r"no pattern matches the site 'head\.bias'"):
        first.update(more, guide={"*.weight": "normal"})
    scaled = bh.fit(tiny_model(prior=bh.priors.Hierarchical()), "normal", tiny_examples(), **QUICK)
    with pytest.raises(GuideError, match="also samples"):
        scaled.update(more, guide="laplace")
    # What has no correlations keeps all it has, a prior's own scales included.
    again = scaled.update(more, guide={"*": "normal"})
    assert isinstance(again.model.prior, PosteriorPrior) and again.report.projection == 0.0
    with pytest.raises(PriorError, match="has no closed form"):
        in_family(first.model, lambda sites: {}, "normal", seed=0)
