"""Particle dims of the weights: as many as are given, and any site may go without."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive
from tiny import drawn, take
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, GuideError
from bhpeft_pyro.model.likelihoods import Likelihood, Normal, OrderedLogistic
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.testing import tiny_batch, tiny_examples, tiny_model


def test_a_single_draw_keeps_its_dim() -> None:
    """P = (1,) was taken for the data plate's place, and lost."""
    model, batch = tiny_model((), 3), tiny_batch(4)
    weights = drawn(model.sites, 1)
    with torch.no_grad():
        outputs = model.network(weights, batch)
        assert torch.equal(outputs, model.network(take(weights, 0), batch)[None])
    assert model.predictive(weights, batch).batch_shape == (1, 4)


@pytest.mark.parametrize("particles", [(4,), (4, 1), (2, 4)])
@pytest.mark.parametrize("likelihood", [Normal(), OrderedLogistic(3)])
def test_each_draw_has_its_own_noise(likelihood: Likelihood, particles: tuple[int, ...]) -> None:
    """With as many draws as examples, the noise of draw s was given to example s."""
    model, batch = tiny_model((), 1, likelihood=likelihood), bh.data.Batch(tiny_batch(4).inputs)
    weights = drawn(model.sites, *particles)
    labels = torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        together = model.predictive(weights, batch).log_prob(labels)
        rows = together.reshape(-1, 4)  # draw by draw
        for row, index in zip(rows, product(*map(range, particles)), strict=True):
            alone = model.predictive(take(weights, *index), batch).log_prob(labels)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fixed", [None, "head.bias", "head.weight", "lora.query.A"])
def test_a_site_without_particle_dims_is_the_same_for_all_draws(fixed: str | None) -> None:
    """The particle dims were those of the last site alone."""
    model, batch = tiny_model(), bh.data.Batch(tiny_batch(5).inputs)
    weights = drawn(model.sites, 3, 1)
    weights = {name: 3 * value for name, value in weights.items()}  # draws that differ, and
    weights["head.weight"] *= 1e3  # logits so far apart that labels are certain
    held = {} if fixed is None else {fixed: weights.pop(fixed)[0, 0]}
    conditioned = poutine.condition(model, held)
    with torch.no_grad():
        together = Predictive(conditioned, weights, parallel=True)(batch)["label"]
        for s in range(3):
            alone = poutine.condition(conditioned, take(weights, s, 0))(batch)
            assert torch.equal(together[s], alone)
    assert len(together.unique(dim=0)) > 1


@pytest.mark.parametrize("particles", [(4,), (4, 1)])
def test_the_noise_alone_may_be_random(particles: tuple[int, ...]) -> None:
    """Its particle dims were looked for in the network's sites, which need have none."""
    model, batch = tiny_model((), 1, likelihood=Normal()), bh.data.Batch(tiny_batch(4).inputs)
    fixed, noise = drawn(model.network.sites), drawn(model.likelihood.sites, *particles)
    fitted = model.predictive(fixed | noise, batch)
    assert fitted.batch_shape == (4, 4)
    expected = noise["noise.log_scale"].exp().reshape(4, 1).expand(4, 4)
    torch.testing.assert_close(fitted.stddev, expected)


def constant(name: str) -> Any:
    def prior(sites: Sequence[Site]) -> dict[str, Tensor]:
        values = {}
        for s in sites:
            if s.name == name:
                values[name] = pyro.deterministic(name, 0.1 * torch.ones(s.shape), event_dim=s.ndim)
            else:
                normal = dist.Normal(0.0, 0.1).expand(s.shape).to_event(s.ndim)
                values[s.name] = pyro.sample(s.name, normal)
        return values

    return prior


@pytest.mark.parametrize("name", ["head.bias", "lora.query.A"])
@pytest.mark.parametrize("guide", ["normal", "AutoNormal"])
def test_a_prior_may_hold_a_site_constant(name: str, guide: str) -> None:
    model = tiny_model(prior=constant(name))
    posterior = bh.fit(model, guide, tiny_examples(), max_steps=8, progress=False)
    assert (posterior.sample(3)[name] == 0.1).all()
    assert (posterior.sample(3)["lora.query.B"] != 0).all()
    forecast = posterior.predict(["w5 w20"], keep_samples=True)
    assert forecast.samples is not None and forecast.samples.std(0).max() > 0  # type: ignore[union-attr]


def test_a_prior_that_holds_a_site_is_refused_for_a_laplace_approximation() -> None:
    """Its prior is one Normal over all that the network has."""
    message = r"prior does not sample head\.bias; expected a Normal at every site.*use 'normal'"
    with pytest.raises(GuideError, match=message):
        bh.fit(tiny_model(prior=constant("head.bias")), "laplace", tiny_examples(), progress=False)


def test_particle_dims_that_do_not_go_together_are_refused() -> None:
    model = tiny_model(())
    weights = drawn(model.sites, 3) | {"head.bias": torch.zeros(4, 2)}
    with pytest.raises(ConfigError, match=r"weights: .*head.weight \(3,\).*head.bias \(4,\)"):
        model.network(weights, tiny_batch(4))
