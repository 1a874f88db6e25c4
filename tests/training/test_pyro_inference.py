"""One model, every inference that Pyro has: it is an ordinary Pyro model.

Where a posterior is compared with the closed form, means are in units of the exact sd.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from exact import WIDTH, Exact, flat, own_network, random_texts, ratings, regression
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from pyro.optim import Adam
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import MeanFieldGuide
from bhpeft_pyro.guides.guide import key
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model

FIT: dict[str, Any] = {
    "batch_size": 24,
    "particles": 4,
    "lr": 0.1,
    "progress": False,
}


@pytest.fixture(scope="module")
def model() -> bh.Model:
    # Much noise, so that prior and data both matter and features are not too correlated.
    return regression(own_network(), noise=2.0)


@pytest.fixture(scope="module")
def data(model: bh.Model) -> bh.data.Examples:
    return ratings(model.network, random_texts(24), seed=3, noise=2.0)


@pytest.fixture(scope="module")
def exact(model: bh.Model, data: bh.data.Examples) -> Exact:
    exact = Exact.of(model, data)
    assert (exact.sd / exact.mean_field_sd).max() > 1.5  # a mean field can be told from the truth
    return exact


@pytest.fixture(scope="module")
def batch(model: bh.Model, data: bh.data.Examples) -> bh.data.Batch:
    whole = next(data.batches(len(data)))
    return bh.data.Batch({}, whole.labels, features=model.network.features(whole))


def assert_near(
    draws: Tensor, exact: Exact, sd: Tensor, mean_tol: float = 0.3, sd_tol: float = 0.25
) -> None:
    """Means within `mean_tol` sds, sds within `sd_tol`; `draws` add 0.05 of noise to either."""
    assert ((draws.mean(0) - exact.mean) / exact.sd).abs().max() < mean_tol
    ratio = (draws.std(0) / sd).log()
    assert ratio.abs().max() < sd_tol
    assert ratio.mean().abs() < sd_tol / 2


@pytest.mark.parametrize(
    ("guide", "steps", "full"),
    [
        ("mvn", 700, True),
        pytest.param("lowrank", 600, None, marks=pytest.mark.slow),
    ],
)
def test_fit_with_a_guide_by_name(
    guide: str, steps: int, full: bool | None, model: bh.Model, data: bh.data.Examples, exact: Exact
) -> None:
    posterior = bh.fit(model, guide, data, **FIT, max_steps=steps)
    draws = flat(posterior.sample(2000))
    if full is None:  # between the two: the mean is what it must get right
        assert ((draws.mean(0) - exact.mean) / exact.sd).abs().max() < 0.4
        assert (draws.std(0) > 0.7 * exact.mean_field_sd).all()
        return
    assert_near(draws, exact, exact.sd if full else exact.mean_field_sd, 0.4, 0.3)


def test_pyros_own_svi(model: bh.Model, batch: bh.data.Batch, exact: Exact) -> None:
    with pyro.get_param_store().scope():
        guide = AutoNormal(model, init_scale=0.1)
        elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(model, guide, Adam({"lr": 0.03}), elbo)
        losses = [svi.step(batch) for _ in range(500)]
        predictive = Predictive(guide, num_samples=1000, parallel=True)
        draws = predictive(batch)
    assert losses[-1] < losses[0]
    assert_near(flat(draws), exact, exact.mean_field_sd, 0.5, 0.4)


def hand_written(batch: bh.data.Batch | None) -> None:
    for name, shape in (("head.weight", (1, WIDTH)), ("head.bias", (1,))):
        loc = pyro.param(f"{name}.loc", torch.zeros(shape))
        scale = pyro.param(
            f"{name}.scale", 0.3 * torch.ones(shape), constraint=dist.constraints.positive
        )
        pyro.sample(name, dist.Normal(loc, scale).to_event(len(shape)))


class Written(PyroModule):
    """The same as a module."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in (("weight", (1, WIDTH)), ("bias", (1,))):
            setattr(self, f"{name}_loc", PyroParam(torch.zeros(shape)))
            scale = PyroParam(0.3 * torch.ones(shape), dist.constraints.positive)
            setattr(self, f"{name}_scale", scale)

    def forward(self, batch: bh.data.Batch | None) -> None:
        for name in ("weight", "bias"):
            loc, scale = getattr(self, f"{name}_loc"), getattr(self, f"{name}_scale")
            pyro.sample(f"head.{name}", dist.Normal(loc, scale).to_event(loc.dim()))


@pytest.mark.parametrize("kind", ["function", "module"])
def test_fit_with_a_guide_of_ones_own(
    kind: str, model: bh.Model, data: bh.data.Examples, exact: Exact
) -> None:
    guide = hand_written if kind == "function" else Written()
    posterior = bh.fit(model, guide, data, **FIT, max_steps=500 if kind == "function" else 5)
    if kind == "function":
        assert_near(flat(posterior.sample(2000)), exact, exact.mean_field_sd, 0.4, 0.3)
    assert len(pyro.get_param_store()) == 0
    assert posterior.predict(data, samples=4).mean.shape == (24,)  # type: ignore[union-attr]
    with pytest.raises(GuideError, match=r"samples=0 .*(FunctionGuide|Written)"):
        posterior.predict(data, samples=0)


def test_nuts_meets_the_closed_form(model: bh.Model, batch: bh.data.Batch, exact: Exact) -> None:
    kernel = NUTS(model, jit_compile=False, max_tree_depth=5)
    mcmc = MCMC(kernel, num_samples=200, warmup_steps=60, disable_progbar=True)
    mcmc.run(batch)
    # At least 74 effective draws in three runs: standard errors of 0.12 sds for a mean, and 8 % for
    # an sd.
    assert_near(flat(mcmc.get_samples()), exact, exact.sd, 0.3, 0.25)


def test_nuts_on_features_that_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same density as with the network, which is run before sampling only."""
    model, data = tiny_model(()), tiny_examples(12)
    batch = bh.training.whole_batch(model, data)
    weights = {site.name: torch.randn(site.shape) for site in model.sites}
    conditioned = poutine.condition(model, weights)
    sums = [
        poutine.trace(conditioned).get_trace(each).log_prob_sum().item()
        for each in (batch, next(data.batches(12)))
    ]
    assert sums[0] == pytest.approx(sums[1], rel=1e-4)
    monkeypatch.setattr(model.network.backbone, "forward", None)  # any call would be an error
    kernel = NUTS(model, step_size=0.05, adapt_step_size=False, max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=3, warmup_steps=2, disable_progbar=True)
    mcmc.run(batch)
    monkeypatch.undo()
    posterior = bh.Posterior.from_draws(model, mcmc.get_samples(), data)
    assert posterior.predict(["w5 w9"]).probabilities.isfinite().all()


def test_a_sampler_in_double_precision(model: bh.Model, batch: bh.data.Batch) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        kernel = NUTS(model, max_tree_depth=2)
        mcmc = MCMC(kernel, num_samples=2, warmup_steps=2, disable_progbar=True)
        mcmc.run(batch)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(draws.isfinite().all() for draws in mcmc.get_samples().values())


def test_predictive_from_the_prior_and_from_a_guide() -> None:
    model, batch = tiny_model(()), bh.data.Batch(tiny_batch(5).inputs)
    found = Predictive(model, num_samples=7, parallel=True)(batch)
    assert found["label"].shape == (7, 5)
    assert found["head.weight"].std() > 0
    guide = MeanFieldGuide(model, ("normal", {"init_scale": 1e-6}))
    with torch.no_grad():
        guide.loc[key("head.bias")].copy_(torch.tensor([0.0, 100.0]))
    found = Predictive(model, guide=guide, num_samples=7, parallel=True)(batch)
    assert (found["label"] == 1).all()


def test_weight_draws_of_the_linearised_network_warn_in_the_network_itself() -> None:
    batch = bh.data.Batch(tiny_batch(5).inputs)
    for kinds in (bh.presets.lora(), ()):
        model, options = tiny_model(kinds), {"max_steps": 2, "progress": False}
        posterior = bh.fit(model, "laplace", tiny_examples(12), components=1, **options)
        predictive = Predictive(posterior.model, guide=posterior.guide, num_samples=2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # silent, as it is right
            posterior.predict(tiny_examples(4), samples=2, keep_samples=True)
        with pytest.warns(UserWarning, match="linearised") if kinds else nullcontext() as caught:
            assert predictive(batch)["label"].shape == (2, 5)
        assert all(warning.filename == __file__ for warning in caught or ())


def test_conditioning_on_a_weight(model: bh.Model, batch: bh.data.Batch, exact: Exact) -> None:
    values = {
        "head.weight": exact.mean[:WIDTH].float().reshape(1, WIDTH),
        "head.bias": exact.mean[WIDTH:].float(),
    }
    trace = poutine.trace(poutine.condition(model, data=values)).get_trace(batch)
    assert trace.nodes["head.weight"]["is_observed"]
    everything = torch.distributions.Normal(0.0, exact.prior_sd).log_prob(exact.mean).sum()
    residual = exact.y - exact.x @ exact.mean
    everything += torch.distributions.Normal(0.0, exact.noise).log_prob(residual).sum()
    assert trace.log_prob_sum().item() == pytest.approx(everything.item(), rel=1e-5)


@pytest.mark.parametrize("guide", ["normal", "delta", "laplace", "lowrank"])
def test_a_fit_leaves_global_state_alone_and_repeats_itself(guide: str) -> None:
    data, states, fits = tiny_examples(12), [], []
    pyro.param("of.the.user", torch.ones(1))
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        fits.append(bh.fit(tiny_model(()), guide, data, max_steps=4, progress=False, seed=7))
        fits[-1].predict(data, samples=3)
        assert torch.equal(torch.get_rng_state(), before)
        states.append([guide.state_dict() for guide in fits[-1].guides])
        assert list(pyro.get_param_store()) == ["of.the.user"]
    pyro.clear_param_store()
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    losses = [[entry["loss"] for entry in fit.report.history] for fit in fits]
    assert losses[0] == losses[1]
