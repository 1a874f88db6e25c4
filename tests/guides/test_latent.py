"""What a guide must cover, and where it starts."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scaled_priors import with_extras, with_scales_named
from torch.distributions.transforms import SigmoidTransform

import bhpeft_pyro as bh
from bhpeft_pyro.errors import PriorError
from bhpeft_pyro.guides import MeanFieldGuide, latents
from bhpeft_pyro.testing import tiny_examples, tiny_model


def test_a_positive_latent_starts_at_the_priors_sd_of_its_logarithm() -> None:
    model = tiny_model((), prior=with_scales_named("tau.{}"))
    scales = {latent.name: latent.scale.item() for latent in latents(model) if not latent.is_site}
    assert scales == pytest.approx({"tau.head.weight": 0.5, "tau.head.bias": 0.5})
    posterior = bh.fit(model, "normal", tiny_examples(), max_steps=30, progress=False)
    before, after = posterior.guide.scales(), posterior.update(tiny_examples(seed=1), max_steps=1)
    for latent in latents(after.model):  # the prior of the next round is this posterior
        torch.testing.assert_close(latent.scale, before[latent.name])  # type: ignore[operator]


def test_a_prior_without_sd_starts_at_the_units() -> None:
    model = tiny_model((), prior=dist.Cauchy(0.0, 3.0))
    scales = MeanFieldGuide(model).scales()
    torch.testing.assert_close(scales["head.weight"], torch.full((2, 16), 0.25))  # 1 / sqrt(16)


@pytest.mark.parametrize("family", ["normal", "delta", "mvn"])
@pytest.mark.parametrize(
    "prior",
    [
        dist.HalfCauchy(0.3),
        dist.TransformedDistribution(dist.Normal(0.0, 1.0), [SigmoidTransform()]),
        dist.FoldedDistribution(dist.Normal(0.0, 0.3)),
    ],
)
def test_bounded_weights_start_inside_of_their_bounds(prior: Any, family: str) -> None:
    """Also where the prior has no mean: at zero all of them would stay at the bound."""
    model = tiny_model((), prior={"*": prior})
    assert all(latent.loc.abs().max() < 10 for latent in latents(model))
    before = bh.autoguide(family, model).means()
    posterior = bh.fit(model, family, tiny_examples(), max_steps=5, progress=False)
    after = posterior.guide.means()
    assert all(bool((after[name] > 0).all()) for name in after)
    assert not torch.equal(before["head.weight"], after["head.weight"])


@pytest.mark.parametrize("support", [dist.LogNormal(-1.0, 0.5), dist.Uniform(-1.0, 1.0)])
@pytest.mark.parametrize("family", ["normal", "mvn"])
def test_a_posterior_of_bounded_weights_is_a_prior_with_their_bounds(
    support: Any, family: str
) -> None:
    model = tiny_model((), prior={"*": support})
    first = bh.fit(model, "normal", tiny_examples(), max_steps=20, progress=False)
    under, data = model.with_prior(first.as_prior()), tiny_examples(seed=1)
    second = bh.fit(under, family, data, max_steps=5, progress=False)
    for value in second.sample(20).values():
        assert support.support.check(value).all()


def test_latents_leave_the_random_state_alone() -> None:
    model = tiny_model((), prior=with_extras)
    before = torch.get_rng_state()
    found = latents(model)
    assert torch.equal(torch.get_rng_state(), before)
    names = [latent.name for latent in found]
    assert sorted(names) == ["head.bias", "head.weight", "mix", "share", "tau"]


@pytest.mark.parametrize(
    ("name", "distribution", "words"),
    [
        ("data", dist.Normal(0.0, 1.0), "'data', which is a name of the model's own"),
        ("weights", dist.Normal(0.0, 1.0), "'weights', which is a name of the model's own"),
        ("w", dist.ProjectedNormal(torch.ones(3)), "'w' has the support .*no guide covers"),
    ],
)
def test_latents_that_no_guide_can_have_are_refused(
    name: str, distribution: Any, words: str
) -> None:
    def prior(sites: Any) -> Any:
        pyro.sample(name, distribution)
        return {
            s.name: pyro.sample(s.name, dist.Normal(0.0, 1.0).expand(s.shape).to_event())
            for s in sites
        }

    with pytest.raises(PriorError, match=words):
        bh.fit(tiny_model((), prior=prior), "normal", tiny_examples(), max_steps=1)
