"""A posterior as the prior of another fit, with any family of guides."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import pytest
import torch
from exact import Exact, dense, flat, own_network, random_ratings, regression
from guide_functions import around
from torch.distributions import MultivariateNormal, kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Covariance, LowRankNormal
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.guides.latent import latents
from bhpeft_pyro.priors import JointPrior
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


def whole(normal: LowRankNormal) -> MultivariateNormal:
    return MultivariateNormal(normal.loc.detach().double(), dense(normal.covariance))


def test_the_nearest_independent_normals_have_the_same_moments() -> None:
    generator = torch.Generator().manual_seed(0)
    root = 2 * torch.randn(10, 5, generator=generator)
    covariance = Covariance.from_precision(0.5 + torch.rand(10, generator=generator), root)
    normal = LowRankNormal(torch.randn(10, generator=generator), covariance)
    found = JointPrior(normal, {"a": (2, 3), "b": (4,)}).independent()
    parts = [found.distributions[name] for name in "ab"]
    mean, variance = (
        torch.cat([getattr(part, what).flatten() for part in parts]).double()
        for what in ("mean", "variance")
    )
    q = whole(normal)
    torch.testing.assert_close(mean, q.mean)
    torch.testing.assert_close(variance, q.variance, rtol=1e-4, atol=1e-6)
    divergence = kl_divergence(q, MultivariateNormal(mean, variance.diag()))
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
    second = bh.fit(model.with_prior(first.as_prior()), "laplace", more, **FIT)
    truth, now = following(gaussian(first), model, more), gaussian(second)
    assert ((now.mean - truth.mean) / truth.stddev).abs().max() < 0.1
    half = torch.linalg.inv(torch.linalg.cholesky(truth.covariance_matrix))
    ratios = torch.linalg.eigvalsh(half @ now.covariance_matrix @ half.T)
    assert ratios.min() > 0.9 and ratios.max() < 1.1


def test_a_normal_guide_takes_over_the_marginals_of_laplace() -> None:
    model = regression(own_network(), noise=NOISE)
    first = bh.fit(model, "laplace", random_ratings(model, 64, 3), **FIT)
    more = random_ratings(model, 48, 4)
    apart: Any = first.as_prior()
    second = bh.fit(model.with_prior(apart.independent()), "normal", more, **FIT)
    q = gaussian(first)
    p = MultivariateNormal(q.mean, torch.diag(q.variance))
    assert kl_divergence(q, p) > 1  # there are correlations to lose
    truth, now = following(p, model, more), gaussian(second)
    best = truth.precision_matrix.diagonal().rsqrt()  # of the nearest independent Normals
    assert ((now.mean - truth.mean) / truth.stddev).abs().max() < 0.4
    assert (now.stddev / best).log().abs().max() < 0.15


def robust(posterior: bh.Posterior) -> dict[str, Any]:
    """0.9 the old posterior + 0.1 the wide, weight by weight."""
    old = posterior.as_prior().distributions  # type: ignore[attr-defined]

    def mixture(site: Any) -> Any:
        loc, sd = old[site.name].mean, old[site.name].stddev
        parts = dist.Normal(
            torch.stack([loc, 0 * loc], -1), torch.stack([sd, 0 * sd + site.unit], -1)
        )
        weights = torch.tensor([0.9, 0.1]).expand(*site.shape, 2)
        return dist.MixtureSameFamily(dist.Categorical(weights), parts)

    return {"*": mixture}


@pytest.fixture(scope="module")
def first() -> bh.Posterior:
    return bh.fit(tiny_model(()), "normal", tiny_examples(24), **QUICK)


def test_a_mixture_of_real_parts_is_real(first: bh.Posterior) -> None:
    """Its sd is known then, from which guides start and to which reports compare."""
    prior = robust(first)
    model = first.model.with_prior(prior)
    for latent, site in zip(latents(model), model.sites, strict=True):
        torch.testing.assert_close(latent.scale, prior["*"](site).stddev)
    second = bh.fit(model, "normal", tiny_examples(9, seed=3), **QUICK)
    assert isinstance(
        second.as_prior().distributions["head.bias"].base_dist,  # type: ignore[attr-defined]
        dist.Normal,
    )


def test_a_posterior_that_is_passed_on_by_hand_stays_what_it_is() -> None:
    """No guide sets its scales again, as if it were the default prior."""
    model = tiny_model(())
    guide = bh.guides.LaplaceGuide(model, rank=1)  # most of what is learnt is in the diagonal
    first = bh.fit(model, guide, tiny_examples(400, seed=1), **QUICK)
    prior: Any = first.as_prior()
    data = tiny_examples(9, seed=3)
    known = first.update(data, **QUICK).model.prior.moments()["head.weight"]  # type: ignore[attr-defined]
    again = bh.fit(bh.Model(model.network, prior), "laplace", data, components=1, **QUICK)
    torch.testing.assert_close(again.model.prior.moments()["head.weight"], known)  # type: ignore[attr-defined]


def test_a_guide_function_goes_on_under_the_moments_of_its_draws() -> None:
    model, data = tiny_model(()), tiny_examples(9, seed=3)
    first = bh.fit(model, around(model), tiny_examples(24), **QUICK)
    with pytest.raises(GuideError, match=r"FunctionGuide does not say.*from_draws"):
        first.update(data, **QUICK)
    prior = bh.Posterior.from_draws(model, first.sample(200)).as_prior()
    second = bh.fit(model.with_prior(prior), around(model), data, **QUICK)
    before, after = (each.guide.state_dict() for each in (first, second))
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_random_scales_go_on_under_normal_alone() -> None:
    scaled = bh.fit(tiny_model(prior=bh.priors.Hierarchical()), "normal", tiny_examples(), **QUICK)
    under, more = scaled.model.with_prior(scaled.as_prior()), tiny_examples(12, seed=1)
    with pytest.raises(GuideError, match="also samples"):
        bh.fit(under, "laplace", more, **QUICK)
    again = bh.fit(under, "normal", more, **QUICK)
    assert "head.weight.log_scale" in again.guide.means()
