"""What a Pyro user tries first: SVI by hand, autoguides by name, priors with plates and factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from guide_functions import around
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.reparam.strategies import AutoReparam
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, GuideError, LikelihoodError, PriorError
from bhpeft_pyro.guides import MeanFieldGuide, latent
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.testing import tiny_backbone, tiny_batch, tiny_examples, tiny_model, tiny_tokenizer
from bhpeft_pyro.training.elbo import ELBO

Sites = Sequence[Site]
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}
FEW, CLASSES = tiny_examples(), bh.likelihoods.Categorical()


def sampled(site: Site, sd: Tensor | float = 1.0) -> Tensor:
    wide = dist.Normal(0.0, torch.as_tensor(sd * site.unit).expand(site.shape))
    return pyro.sample(site.name, wide.to_event(site.ndim))


@pytest.mark.parametrize("name", ["normal", "laplace", {"head.*": "delta", "*": "normal"}])
def test_svi_by_hand_trains_a_guide_and_leaves_the_store_alone(name: Any) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, batch = tiny_model(), tiny_batch(16)
    guide = bh.autoguide(name, model)
    before = {key: value.clone() for key, value in guide.named_parameters()}
    other = bh.autoguide(name, model)  # of the same names
    untouched = {key: value.clone() for key, value in other.named_parameters()}
    elbo = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    losses = [svi.step(batch) for _ in range(60 if name == "normal" else 10)]
    assert all(not torch.equal(value, before[key]) for key, value in guide.named_parameters())
    assert all(torch.equal(value, untouched[key]) for key, value in other.named_parameters())
    assert not list(pyro.get_param_store().keys())
    if name == "normal":
        assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("name", ["AutoNormal", "mvn", "AutoDiagonalNormal", "lowrank"])
def test_pyros_guides_start_as_wide_as_the_prior(name: str) -> None:
    model = tiny_model()
    found = {x.name: x.scale for x in latent.latents(model)}
    guide = bh.autoguide(name, model)
    prior = guide.as_prior()
    draws = poutine.trace(pyro.plate("draws", 4000, dim=-2)(prior)).get_trace(model.sites)
    for site, sd in found.items():
        ratio = draws.nodes[site]["value"].std(0).squeeze(0) / sd
        torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0.1, atol=0)
    # At Pyro's 0.1 the KL alone would be some thirty nats an example.
    posterior = bh.fit(model, name, tiny_examples(60), epochs=2, progress=False)
    # (The factor of a low rank is drawn at random, and is no part of the prior.)
    assert posterior.report.last("kl") < (2 if name == "lowrank" else 1)


@contextmanager
def double_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_double_default_dtype_is_refused_by_its_name() -> None:
    model, refused = tiny_model(()), r"default dtype is torch.float64, expected torch.fl"
    with double_default(), pytest.raises(PriorError, match=refused):
        bh.fit(model, "normal", tiny_examples(), **QUICK)


@pytest.mark.parametrize("guide", ["laplace", "normal"])
def test_forecasts_are_the_same_under_a_double_default(tmp_path: Path, guide: str) -> None:
    """Outputs in closed form are drawn too; and a posterior may be loaded in double precision."""
    backbone, tokenizer = tiny_backbone(), tiny_tokenizer()
    network = bh.RandomPEFT(backbone, bh.presets.lora(rank=1), bh.Head(1), tokenizer)
    model = bh.Model(network, likelihood=bh.likelihoods.OrderedLogistic(3))
    data = {"text": ["w5 w20", "w6 w21", "w7"] * 4, "label": [0, 1, 2] * 4}
    posterior = bh.fit(model, guide, data, components=1, **QUICK)
    posterior.save(tmp_path / "one")
    expected = posterior.predict(["w5 w9"])
    with double_default():
        loaded = bh.Posterior.load(tmp_path / "one", backbone, tokenizer=tokenizer)
        for each in (posterior, loaded):
            assert torch.equal(each.predict(["w5 w9"]).probabilities, expected.probabilities)


def test_an_easy_guide_in_a_function() -> None:
    """As docs/own-guide.md says: its prototype is a run of the model without data."""
    model = tiny_model(())

    class Easy(EasyGuide):
        def guide(self, batch: object) -> None:
            around(model)(batch)

    easy = Easy(model)
    posterior = bh.fit(model, lambda batch: easy(batch), tiny_examples(), **QUICK)
    assert any(value.any() for value in posterior.guide.state_dict().values())


def test_what_an_easy_guide_cannot_do_is_an_error_of_the_guide() -> None:
    """Pyro's `map_estimate` makes an attribute of the site's name, in which there may be no dot."""
    model = tiny_model(())

    class Easy(EasyGuide):
        def guide(self, batch: object) -> None:
            self.map_estimate("head.bias")

    easy = Easy(model)
    with pytest.raises(GuideError, match=r"calling .* with None, .*name can.*t contain"):
        bh.fit(model, lambda batch: easy(batch), tiny_examples(), **QUICK)


def test_standard_normal_latents_converge_under_pyro_s_own_guide() -> None:
    examples = tiny_examples(16)
    batch = next(examples.batches(16))

    def losses(prior: Any, **options: Any) -> list[float]:
        pyro.set_rng_seed(0)
        with pyro.get_param_store().scope():
            model = tiny_model(prior=prior)
            elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
            guide = AutoNormal(model, **options)
            svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), elbo)
            return [float(svi.step(batch)) for _ in range(60)]

    standard = poutine.reparam(bh.priors.default(), AutoReparam(centered=0.0))
    found, plain = losses(standard, init_scale=1.0), losses(bh.priors.default())
    assert sum(found[-10:]) / 10 < 2 * math.log(2) * 16  # all texts even: log 2 nats each
    assert sum(plain[-10:]) > 20 * sum(found[-10:])


@pytest.mark.parametrize("name", ["AutoNormal", "mvn"])
def test_pyro_s_guides_by_name_under_a_reparameterised_prior(name: str) -> None:
    standard = poutine.reparam(bh.priors.default(), AutoReparam(centered=0.0))
    posterior = bh.fit(tiny_model((), prior=standard), name, tiny_examples(), **QUICK)
    assert posterior.sample(3)["head.bias"].shape == (3, 2)


def one_scale(sites: Sites, apart: bool) -> Mapping[str, Tensor]:
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    values = {}
    for s in sites:
        sd = s.unit * (scale.reshape(*scale.shape, *[1] * s.ndim) if apart else scale)
        wide = sd.expand(*scale.shape, *s.shape) if apart else sd.expand(s.shape)
        values[s.name] = pyro.sample(s.name, dist.Normal(0.0, wide).to_event(s.ndim))
    return values


def test_a_prior_for_one_draw_learns_as_one_that_knows_of_several() -> None:
    # Four classes and four draws: no class may get another draw's scale.
    labels = [0, 1, 2, 3] * 4
    data = {"text": [f"w{5 + label}" for label in labels], "label": labels}

    def history(apart: bool) -> list[dict[str, float]]:
        network = bh.RandomPEFT(tiny_backbone(), (), bh.Head(4), tiny_tokenizer())
        model = bh.Model(network, lambda sites: one_scale(sites, apart))
        return bh.fit(model, "normal", data, particles=4, **QUICK).report.history

    assert history(False) == history(True)


def factored(sites: Sites) -> Mapping[str, Tensor]:
    values = {site.name: sampled(site) for site in sites}
    pyro.factor("near zero", -100 * values["head.bias"].sum(-1) ** 2)
    return values


def seen(sites: Sites) -> Mapping[str, Tensor]:
    values = {site.name: sampled(site) for site in sites}
    bias = dist.Normal(values["head.bias"], 0.1).to_event(1)
    pyro.sample("seen", bias, obs=torch.ones(2))
    return values


@pytest.mark.parametrize(("prior", "name"), [(factored, "near zero"), (seen, "seen")])
def test_a_laplace_approximation_refuses_what_its_covariance_would_leave_out(
    prior: Callable[..., Any], name: str
) -> None:
    with pytest.raises(GuideError, match=f"use 'normal'.*factors, scales or masks at {name}"):
        bh.autoguide("laplace", tiny_model((), prior=prior))


def test_normal_follows_a_factor() -> None:
    model = tiny_model((), prior=factored)
    posterior = bh.fit(model, "normal", tiny_examples(40), epochs=60, progress=False)
    # By the factor each of the two has a variance of 1 / 200, and less by prior and data.
    sd = posterior.guide.scales()["head.bias"]  # type: ignore[operator]
    assert (sd < 1.2 * 200**-0.5).all()
    assert (sd > 0.2 * 200**-0.5).all()


def test_a_prior_may_not_have_parameters_that_nobody_trains() -> None:
    def prior(sites: Sites) -> Mapping[str, Tensor]:
        return {s.name: sampled(s, pyro.param(f"sd.{s.name}", torch.tensor(0.5))) for s in sites}

    class Trained(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sd = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, sites: Sites) -> Mapping[str, Tensor]:
            return {s.name: sampled(s, self.sd) for s in sites}

    own = Trained()
    with pytest.raises(PriorError, match="the parameters 'sd' would not be trained"):
        bh.fit(tiny_model((), prior=own), "normal", tiny_examples(), max_steps=1, progress=False)
    own.eval().requires_grad_(False)
    bh.fit(tiny_model((), prior=own), "normal", tiny_examples(), max_steps=1, progress=False)
    model, refused = tiny_model((), prior=prior), "'sd.head.weight', 'sd.head.bias' would not be tr"
    with pytest.raises(PriorError, match=refused):
        bh.fit(model, "normal", tiny_examples(), **QUICK)
    with pytest.raises(PriorError, match=refused):  # their trained values are in Pyro's store
        bh.Posterior.of(model, MeanFieldGuide(tiny_model(())))


def test_a_guide_that_cannot_be_reparameterised_is_refused() -> None:
    model = tiny_model(())

    def guide(batch: object) -> None:
        for site in model.sites:
            loc = pyro.param(f"{site.name}.loc", torch.zeros(2, *site.shape))
            parts = dist.Normal(loc, 0.1).to_event(site.ndim)
            mixture = dist.Categorical(torch.ones(2))
            pyro.sample(site.name, dist.MixtureSameFamily(mixture, parts))

    with pytest.raises(GuideError, match=r"MixtureSameFamily.*'head.weight' cannot be reparam"):
        bh.fit(model, guide, tiny_examples(), **QUICK)


def test_masks_count_as_in_pyro() -> None:
    def prior(sites: Sites) -> Mapping[str, Tensor]:
        with poutine.mask(mask=False):
            return {site.name: sampled(site, 3.0) for site in sites}

    model, batch = tiny_model((), prior=prior), tiny_batch(16)
    sites = model.sites

    def guide(batch: object) -> None:
        with poutine.mask(mask=False):
            for site in sites:
                sampled(site, 0.01)

    ours = ELBO(num_particles=1).loss(model, guide, batch)
    pyros = TraceMeanField_ELBO(vectorize_particles=True, max_plate_nesting=1)
    expected = pyros.loss(model, guide, batch)
    # Without the masks the KL would be some hundred nats.
    assert ours == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize(
    ("guide", "component"), [("normal", dist.LogNormal), ("AutoNormal", dist.Normal)]
)
def test_a_spike_and_a_slab(guide: str, component: Any) -> None:
    """A mixture's support is that of its components, which torch does not tell a guide."""

    def prior(sites: Sites) -> dict[str, Tensor]:
        sds = torch.tensor([0.1, 1.0])
        values = {}
        for site in sites:
            mixture = dist.MixtureSameFamily(
                dist.Categorical(torch.tensor([0.8, 0.2]).expand(*site.shape, 2)),
                component(torch.zeros(2), sds.expand(*site.shape, 2)),
            )
            values[site.name] = pyro.sample(site.name, mixture.to_event(site.ndim))
        return values

    model = tiny_model((), prior=prior)
    posterior = bh.fit(model, guide, tiny_examples(24), max_steps=40, lr=0.3, progress=False)
    weights = posterior.sample(50)["head.weight"]
    assert (weights < 0).any() == (component is dist.Normal)
    trace = poutine.trace(poutine.condition(model, data=posterior.sample(1))).get_trace(
        tiny_batch()
    )
    assert trace.log_prob_sum().isfinite()


REFUSED: dict[str, tuple[type[Exception], Callable[[bh.Model], object]]] = {
    "backbone": (
        ConfigError,
        lambda model: bh.RandomPEFT(torch.compile(tiny_backbone(), backend="eager")),
    ),
    "network": (ConfigError, lambda model: bh.Model(model)),
    "likelihood": (PriorError, lambda model: bh.Model(model.network, CLASSES)),
    "an instance": (
        LikelihoodError,
        lambda model: bh.Model(model.network, likelihood=type(CLASSES)),
    ),
    "model": (ConfigError, lambda model: bh.fit(lambda batch: model(batch), "normal", FEW)),
    "samples": (ConfigError, lambda model: bh.fit(model, "normal", FEW, **QUICK).sample(0)),
    "seed": (ConfigError, lambda model: bh.fit(model, "normal", FEW, seed=None)),
    "lr": (ConfigError, lambda model: bh.fit(model, "normal", FEW, lr="1e-3")),
    "temperature": (ConfigError, lambda model: bh.fit(model, "normal", FEW, temperature=math.inf)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_things_are_refused_by_name(name: str) -> None:
    error, call = REFUSED[name]
    with pyro.validation_enabled(True), pytest.raises(error, match=name):
        call(tiny_model(()))  # torch.compile turns torch's validation off
