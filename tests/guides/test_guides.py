"""The guides' contract."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import GUIDES, FunctionGuide, Guide, NormalGuide, PyroGuide, latents
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model


def with_extras(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Besides the sites a positive scale, a share and a simplex."""
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(3)).to_event(1))
    pyro.sample("share", dist.Beta(2.0, 2.0))
    pyro.sample("mix", dist.Dirichlet(torch.ones(4)))
    return {
        site.name: pyro.sample(
            site.name,
            dist.Normal(0.0, tau[..., 0].reshape(tau.shape[:-1] + (1,) * site.ndim))
            .expand(tau.shape[:-1] + site.shape)
            .to_event(site.ndim),
        )
        for site in sites
    }


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        GuideError,
        match=r"unknown guide 'gauss'; known: laplace, normal, delta, down only.*AutoIAF",
    ):
        bh.autoguide("gauss", tiny_model(()))
    for name in GUIDES:
        assert isinstance(bh.autoguide(name, tiny_model(())), bh.guides.Guide)


def test_an_unknown_option_names_guide_and_option() -> None:
    with pytest.raises(GuideError, match=r"normal.*does not take \{'rank': 3\}"):
        bh.autoguide("normal", tiny_model(()), rank=3)
    for name, wrong in (("laplace", {"rank": "8"}), ("iaf", {"hidden_dim": 64})):
        with pytest.raises(GuideError, match=f"{name}.*(does not take|must be an integer)"):
            bh.autoguide(name, tiny_model(()), **wrong)  # type: ignore[arg-type]
    with pytest.raises(
        GuideError, match=r"^autoguide: 'normal': .*scale=0\.0 must be a finite number"
    ):
        bh.autoguide("normal", tiny_model(()), init_scale=0.0)


@pytest.mark.parametrize("name", ["AutoNormal", AutoNormal])
def test_pyros_guides_start_at_the_sites_own_start(name: Any) -> None:
    """B at 0 and A away from it: all at Pyro's median would be a saddle of the product."""
    model = tiny_model()
    guide = bh.autoguide(name, model)
    assert isinstance(guide, PyroGuide) and isinstance(guide.auto, AutoNormal)
    for site_name, value in weights_of(model, guide).items():
        zero = bool((value == 0).all())
        assert zero == (not site_name.endswith(".A")), site_name


def weights_of(model: bh.Model, guide: Any) -> dict[str, Tensor]:
    """The central values, as weights of the transformer and not as coordinates."""
    return model.network.coordinates({name: v[None] for name, v in guide.means().items()})


def test_ours_start_at_the_sites_own_start_and_the_priors_sd() -> None:
    model = tiny_model(prior={"lora.*": dist.Normal(0.0, 0.3), "*": dist.StudentT(3.0, 0.0, 0.5)})
    guide = NormalGuide(model)
    for name, weights in weights_of(model, guide).items():
        assert bool((weights == 0).all()) == (not name.endswith(".A"))
    scales = guide.scales()
    torch.testing.assert_close(scales["lora.query.A"], torch.full((2, 2, 16), 0.3))
    sd = 0.5 * 3**0.5  # of a Student t with 3 degrees of freedom
    torch.testing.assert_close(scales["head.bias"], torch.full((2,), sd))
    narrow = NormalGuide(model, init_scale=0.01).scales()
    assert all(torch.allclose(scale, torch.tensor(0.01)) for scale in narrow.values())


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
    scales = NormalGuide(model).scales()
    torch.testing.assert_close(scales["head.weight"], torch.full((2, 16), 0.25))  # 1 / sqrt(16)


def test_latents_leave_the_random_state_alone() -> None:
    model = tiny_model((), prior=with_extras)
    before = torch.get_rng_state()
    found = latents(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert {latent.name for latent in found} == {
        "tau",
        "share",
        "mix",
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("name", ["normal", "delta", "AutoNormal"])
def test_constrained_latents_stay_in_their_support(name: str) -> None:
    model = tiny_model((), prior=with_extras)
    with pyro.get_param_store().scope():
        guide: Any = bh.autoguide(name, model)
        guide(tiny_batch())
        with torch.no_grad():
            for parameter in guide.parameters():
                parameter.add_(2 * torch.randn_like(parameter))
        with poutine.trace() as tracer, pyro.plate("draws", 50, dim=-2):
            guide(tiny_batch())
    values = {name: node["value"] for name, node in tracer.trace.nodes.items()}
    assert values["tau"].shape == (50, 1, 3)
    assert (values["tau"] > 0).all()
    assert ((values["share"] > 0) & (values["share"] < 1)).all()
    torch.testing.assert_close(values["mix"].sum(-1), torch.ones(50, 1))


def test_distributions_and_means_are_detached_copies() -> None:
    model = tiny_model((), prior=with_extras)
    guide = NormalGuide(model, init_scale=0.2)
    kept = guide.distributions()
    values = {name: guide.means()[name] for name in kept}
    before = {name: q.log_prob(values[name]) for name, q in kept.items()}
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(1.0)
    for name, q in kept.items():
        assert not q.log_prob(values[name]).requires_grad
        assert not q.sample().requires_grad
        torch.testing.assert_close(q.log_prob(values[name]), before[name])
        assert (guide.distributions()[name].log_prob(values[name]) != before[name]).all()


def test_the_priors_of_the_next_round_have_the_same_density() -> None:
    model = tiny_model((), prior=with_extras)
    guide = NormalGuide(model, init_scale=0.2)
    trace = poutine.trace(guide).get_trace()
    prior = bh.priors.PosteriorPrior(guide.distributions())
    replayed = poutine.trace(poutine.replay(prior, trace)).get_trace(model.sites)
    torch.testing.assert_close(replayed.log_prob_sum(), trace.log_prob_sum())


def test_a_function_guide_keeps_its_parameters_and_their_constraints() -> None:
    def guide(batch: bh.data.Batch | None) -> None:
        scale = pyro.param("scale", torch.tensor(0.5), constraint=dist.constraints.positive)
        loc = pyro.param("a.loc", torch.zeros(2))
        pyro.sample("head.bias", dist.Normal(loc, scale).to_event(1))

    module = FunctionGuide(guide)
    parameters = dict(module.named_parameters())
    assert len(parameters) == 2
    assert all(isinstance(value, nn.Parameter) for value in parameters.values())
    with torch.no_grad():
        for name, value in parameters.items():
            if name.endswith("scale"):
                assert value.item() == pytest.approx(torch.tensor(0.5).log().item())
                value.fill_(-3.0)
    trace = poutine.trace(module).get_trace(None)
    assert trace.nodes["scale"]["value"].item() == pytest.approx(torch.tensor(-3.0).exp().item())
    trace.log_prob_sum().backward()
    assert all(value.grad is not None for value in parameters.values())
    assert len(pyro.get_param_store()) == 0


def test_function_guides_do_not_share_what_they_start_from() -> None:
    start = torch.zeros(2)

    def guide(batch: bh.data.Batch | None) -> None:
        pyro.sample("head.bias", dist.Normal(pyro.param("b", start), 0.1).to_event(1))

    one, other = FunctionGuide(guide), FunctionGuide(guide)
    with torch.no_grad():
        next(one.parameters()).add_(5.0)
    assert not next(other.parameters()).any() and not start.any()


def test_a_function_guide_cannot_declare_parameters_for_data_alone() -> None:
    model = tiny_model(())

    def guide(batch: bh.data.Batch | None) -> None:
        for site in model.sites:
            loc = pyro.param(f"{site.name}.loc", torch.zeros(site.shape))
            if batch is not None:
                loc = loc + pyro.param(f"{site.name}.shift", torch.zeros(site.shape))
            pyro.sample(site.name, dist.Normal(loc, 0.01).to_event(site.ndim))

    with pytest.raises(GuideError, match=r"guide: .*'head.weight.shift', 'head.bias.shift'.*None"):
        bh.fit(model, guide, tiny_examples(), max_steps=4, progress=False)
    assert len(pyro.get_param_store()) == 0


def with_scales_named(pattern: str) -> Any:
    def prior(sites: Sequence[Site]) -> dict[str, Tensor]:
        values = {}
        for s in sites:
            tau = pyro.sample(pattern.format(s.name), dist.LogNormal(0.0, 0.5))
            normal = dist.Normal(0.0, tau.reshape(*tau.shape, *[1] * s.ndim))
            wide = normal.expand((*tau.shape, *s.shape)).to_event(s.ndim)
            values[s.name] = pyro.sample(s.name, wide)
        return values

    return prior


@pytest.mark.parametrize(
    "name", ["AutoNormal", "AutoDelta", "structured", "AutoMultivariateNormal"]
)
def test_latents_that_collide_as_attributes_are_named(name: str) -> None:
    fit = {"max_steps": 2, "progress": False}
    bh.fit(tiny_model((), prior=with_scales_named("scale.{}")), name, tiny_examples(), **fit)
    within = tiny_model((), prior=with_scales_named("{}.scale"))
    if name == "AutoMultivariateNormal":  # which keeps one vector
        bh.fit(within, name, tiny_examples(), **fit)
        return
    collide = r"prior samples 'head.weight' and 'head.weight.scale'.*rename.*'scale.head.weight'"
    with pytest.raises(GuideError, match=collide):
        bh.autoguide(name, within)


def test_a_function_that_trains_nothing_is_refused() -> None:
    """It runs a module, whose parameters are its own, not those that `fit` trains."""
    model = tiny_model(())
    module = NormalGuide(model)

    def registered(batch: bh.data.Batch | None) -> Any:
        pyro.module("guide", module)
        return module(batch)

    with pytest.raises(GuideError, match=r"does not depend on 'guide\$\$\$loc"):
        bh.fit(model, registered, tiny_examples(8), max_steps=2, progress=False)

    def half(batch: bh.data.Batch | None) -> None:
        pyro.param("unused", torch.zeros(2))
        for site in model.sites:
            loc = pyro.param(f"{site.name}.loc", site.init())
            pyro.sample(site.name, dist.Normal(loc, 0.1).to_event(site.ndim))

    with pytest.raises(GuideError, match="does not depend on 'unused'"):
        bh.fit(model, half, tiny_examples(8), max_steps=2, progress=False)


def test_what_a_guide_of_one_s_own_lacks_is_named() -> None:
    class Bare(Guide):
        def __init__(self, model: bh.Model) -> None:
            super().__init__()
            self.loc = torch.nn.ParameterDict({"w": torch.zeros(2, 16), "b": torch.zeros(2)})

        def forward(self, batch: Any = None) -> dict[str, torch.Tensor]:
            pairs = (("head.weight", "w"), ("head.bias", "b"))
            return {
                name: pyro.sample(name, dist.Normal(self.loc[k], 0.1).to_event(self.loc[k].dim()))
                for name, k in pairs
            }

    model = tiny_model(())
    fitted = bh.fit(model, Bare(model), tiny_examples(), max_steps=1, progress=False)
    assert fitted.predict(["w5"], samples=2).probabilities.shape == (1, 2)
    with pytest.raises(GuideError, match=r"Bare does not define means\(\)"):
        fitted.predict(["w5"], samples=0)
    with pytest.raises(GuideError, match=r"Bare does not define distributions\(\)"):
        fitted.update(tiny_examples(seed=1))
