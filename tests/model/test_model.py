"""A model behaves as PyTorch and Pyro expect: copies, devices, hooks, priors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from tiny import drawn
from torch import Tensor
from torch.distributions import kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.guides import GUIDES, Guide
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.priors import PosteriorPrior
from bhpeft_pyro.priors.any_prior import moved
from bhpeft_pyro.priors.prior import expand_to_site
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model

QUICK: dict[str, Any] = {"max_steps": 4, "progress": False}
TEXTS = ["w5 w20", "w6 w21 w22"]
EVERY_GUIDE = pytest.mark.parametrize("name", GUIDES)
KINDS = (*bh.presets.lora(rank=2), *bh.presets.prefix(2))


@cache
def fitted(name: str) -> bh.Posterior:
    """Never to be changed."""
    return bh.fit(tiny_model(KINDS), name, tiny_examples(), components=1, **QUICK)


def draws(guide: Any) -> dict[str, Tensor]:
    torch.manual_seed(0)
    values: dict[str, Tensor] = guide()
    return values


def nats(posterior: bh.Posterior, guide: Guide) -> list[float]:
    """KL to the prior, where it has a form."""
    if isinstance(guide, bh.guides.LaplaceGuide):
        return [kl_divergence(guide.as_prior().normal, guide.prior).item()]
    trace = poutine.trace(posterior.model.prior).get_trace(posterior.model.sites)
    return [
        kl_divergence(node["fn"], trace.nodes[name]["fn"]).item()
        for name, node in poutine.trace(guide).get_trace().nodes.items()
        if isinstance(guide, bh.guides.MeanFieldGuide) and node["type"] == "sample"
    ]


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@EVERY_GUIDE
def test_a_copied_posterior_predicts_the_same_and_goes_its_own_way(name: str) -> None:
    """What a forward pass leaves behind could not be copied."""
    posterior = fitted(name)
    before = posterior.predict(TEXTS).probabilities
    copied = copy.deepcopy(posterior)
    torch.testing.assert_close(copied.predict(TEXTS).probabilities, before, rtol=0, atol=0)
    bh.fit(copied.model, copied.guide, tiny_examples(seed=1), **QUICK)
    assert not torch.equal(copied.predict(TEXTS).probabilities, before)
    torch.testing.assert_close(posterior.predict(TEXTS).probabilities, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", [*GUIDES, "AutoNormal", "AutoDelta", "structured", "mvn"])
def test_a_pickled_guide_draws_the_same(name: str) -> None:
    """Remembered divergences could not be pickled, nor the first values of Pyro's guides."""
    posterior = fitted(name)
    again = pickle.loads(pickle.dumps(posterior.guide))
    with pyro.get_param_store().scope():  # in which Pyro's guides keep their parameters
        assert_same(draws(again), draws(posterior.guide))
        assert nats(posterior, again) == nats(posterior, posterior.guide)


def where(model: bh.Model) -> set[str]:
    """The devices of all that a model is made of."""
    network = model.network
    found = [*network.backbone.parameters(), *model.buffers(), *(s.unit for s in model.sites)]
    assert network.coordinates is not None
    found += [site.unit for site in network.coordinates.sites]
    found += [site.init() for site in model.sites]
    return {value.device.type for value in found}


def test_a_model_moves_as_a_whole() -> None:
    """The backbone stayed where it was, and sites always did."""
    model = tiny_model(KINDS, 1, likelihood=bh.likelihoods.Normal(), aligned=True)
    assert where(model) == {"cpu"}
    model.to("meta")
    assert where(model) == {"meta"} and model.network.device.type == "meta"


def made(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Sites made of latents: an earlier posterior of theirs asks this function for the sites."""
    size = pyro.sample("size", dist.LogNormal(-2.0, 0.3))
    values = {}
    for s in sites:
        value = size.reshape(*size.shape, *[1] * s.ndim) * torch.ones_like(s.init())
        values[s.name] = pyro.deterministic(s.name, value, event_dim=s.ndim)
    return values


EARLIER: dict[str, Callable[[], bh.Posterior]] = {
    **{name: partial(fitted, name) for name in ("normal", "laplace")},
    "blocks": lambda: bh.fit(
        tiny_model(KINDS),
        {"head.*": "normal", "*": ("delta", {"width": 0.1})},
        tiny_examples(),
        **QUICK,
    ),
    "latents": lambda: bh.fit(tiny_model((), prior=made), "normal", tiny_examples(), **QUICK),
}


@pytest.mark.parametrize("name", EARLIER)
def test_an_earlier_posterior_moves_with_the_model_whose_prior_it_is(name: str) -> None:
    """It stayed where it was: the model had sites in one place and their prior in another."""
    first = EARLIER[name]()
    prior = first.as_prior()
    model = bh.Model(tiny_model(first.model.network.kinds).network, prior)
    again = [draws(partial(each, model.sites)) for each in (prior, moved(prior, Tensor.clone))]
    assert_same(*again)
    assert model.to("cpu").prior is prior
    with pyro.validation_enabled(False):  # nothing can be read on the meta device
        values = model.to("meta").prior(model.sites)
        assert {value.device.type for value in values.values()} == {"meta"}
    assert {value.device.type for value in again[0].values()} == {"cpu"}


def test_a_prior_of_any_distributions_moves_and_a_function_stays() -> None:
    heavy = PosteriorPrior({"head.bias": dist.StudentT(3.0, torch.zeros(2)).to_event(1)})
    (there,) = moved(heavy, lambda tensor: tensor.to("meta")).distributions.values()
    assert there.base_dist.loc.device.type == "meta"
    assert tiny_model((), prior=made).to("meta").prior is made


def test_a_backbone_moved_alone_is_an_error_that_says_what_to_do() -> None:
    """It failed deep in torch, on one of the tensors left behind."""
    model = tiny_model(KINDS, aligned=True)
    weights = drawn(model.sites, 1)
    model.network.backbone.to("meta")
    for use in (
        lambda: bh.fit(model, "normal", tiny_examples(), **QUICK),
        lambda: model.network(weights, tiny_batch(2)),
    ):
        with pytest.raises(ConfigError, match=r"moved to meta, .* on cpu; .*network.to\('meta'\)"):
            use()
    model.to("meta")
    assert where(model) == {"meta"}
    with pytest.raises(ConfigError, match=r"are on cpu, the network is on meta; .*guide.to"):
        model.network(weights, tiny_batch(2))


@pytest.mark.parametrize("convert", [bh.Model.double, bh.Model.half])
def test_a_model_has_one_precision(convert: Callable[[bh.Model], Any]) -> None:
    """Half of it was converted, and no batch could be run."""
    model = tiny_model(KINDS, aligned=True)
    before = drawn(model.sites, 1)
    outputs = model.network(before, tiny_batch(2))
    with pytest.raises(ConfigError, match=r"torch\.float32 whatever the backbone is in"):
        convert(model)
    assert torch.equal(model.network(before, tiny_batch(2)), outputs)
    assert model.float() is model


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_converted_guide_is_converted_whole(rounds: int) -> None:
    """The covariance, or the prior, stayed behind: on a GPU, on another device."""
    posterior = fitted("laplace")
    if rounds == 2:
        posterior = posterior.update(tiny_examples(seed=1), **QUICK)
    guide = copy.deepcopy(posterior.guide)
    before = nats(posterior, guide)[0]
    guide.double()
    kl = kl_divergence(guide.as_prior().normal, guide.prior)
    assert kl.item() == pytest.approx(before, rel=1e-3)
    for value in (kl, *guide().values(), *guide.scales().values(), *guide.means().values()):
        assert value.dtype == torch.float64
    meta = guide.to("meta")
    values = (meta.loc, meta.covariance.scale, meta.prior.loc, meta.prior.covariance.ratio)
    assert {value.device.type for value in values} == {"meta"}


def test_a_prior_in_its_short_form_is_where_the_sites_are() -> None:
    """The numbers of `dist.Normal(0, 1)` are tensors on the CPU."""
    site = tiny_model(()).to("meta").sites[0]
    own = dist.Laplace(torch.zeros(()), torch.ones(()))
    for short in (dist.Normal(0.0, 1.0), dist.LogNormal(0.0, 1.0), lambda site: own):
        with pyro.validation_enabled(False):
            wide = expand_to_site(short, site)
            assert wide.sample().device.type == "meta"
        assert wide.event_shape == site.shape


def test_a_guide_that_has_seen_no_data_is_pickled_with_its_model() -> None:
    """As it is sent to the workers of an executor."""
    guide = bh.autoguide("structured", tiny_model(()))
    again = pickle.loads(pickle.dumps(guide))
    posterior = bh.fit(tiny_model(()), again, tiny_examples(), max_steps=1, progress=False)
    assert posterior.guide.means().keys() == {"head.weight", "head.bias"}
