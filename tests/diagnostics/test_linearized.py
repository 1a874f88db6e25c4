"""Diagnostics of a Laplace guide are about the linearised network that it is a posterior of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from exact import KnownNoise, random_texts
from linearised import Linearised

import bhpeft_pyro as bh
from bhpeft_pyro.base.checks import derived
from bhpeft_pyro.diagnostics import PSIS, psis
from bhpeft_pyro.diagnostics.psis import log_ratios
from bhpeft_pyro.diagnostics.sbc import _quantities
from bhpeft_pyro.guides import MixtureGuide, as_guide, prior_like
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.posterior.mixture import MixturePosterior
from bhpeft_pyro.prediction.draws import draw_parts
from bhpeft_pyro.prediction.predict import predict
from bhpeft_pyro.testing import tiny_examples, tiny_model

ELSEWHERE = random_texts(12, seed=9)
NOISE = 0.3
PLAIN = {"temperature": 1.0, "tau": 1.0}  # the plain negative ELBO


def ratings() -> dict[str, list[Any]]:
    texts = random_texts(48)
    noise = NOISE * torch.randn(len(texts), generator=torch.Generator().manual_seed(2))
    labels = [0.4 * len(t.split()) - 1.5 + e for t, e in zip(texts, noise.tolist(), strict=True)]
    return {"text": texts, "label": labels}


@pytest.fixture(scope="module")
def posterior() -> bh.Posterior:
    """Of a Normal likelihood: exact for the linearised network, and wide, so that it matters."""
    prior = bh.priors.FunctionSpaceNormal(change=0.5, spread=0.5, head=1.0)
    model = tiny_model(bh.presets.lora(rank=2), 1, prior, KnownNoise(NOISE), aligned=True)
    return bh.fit(
        model,
        bh.autoguide("laplace", model, components=1, rank=64),
        ratings(),
        max_steps=150,
        batch_size=48,
        lr=0.02,
        temperature=1.0,
        tau=1.0,
        progress=False,
    )


def test_an_exact_posterior_is_good(posterior: bh.Posterior) -> None:
    found = psis(posterior, ratings(), samples=300)
    assert found.k_hat < 0.5 and found.effective_samples > 120, str(found)
    model = Linearised(posterior.model, posterior.guide.means())  # type: ignore[operator]
    slow = psis(
        posterior.replace(guide=as_guide(Plain(posterior.guide)), model=model), ratings(), 100
    )
    fast = psis(posterior, ratings(), 100)
    assert fast.log_evidence == pytest.approx(slow.log_evidence, abs=0.01)


@pytest.mark.parametrize("options", [{"tau": 1.0}, {"temperature": 1.0, "tau": 3.0}, PLAIN])
def test_there_is_no_evidence_for_a_prior_that_is_not_the_models(options: dict[str, Any]) -> None:
    how: dict[str, Any] = {"components": 1, "max_steps": 5, "progress": False, **options}
    data = tiny_examples(60)
    found = psis(bh.fit(tiny_model(()), "laplace", data, **how), data, samples=100)
    known = options == PLAIN
    assert math.isfinite(found.log_evidence) == known
    assert ("log evidence" in str(found)) == (known and found.verdict != "bad")


class Plain(torch.nn.Module):
    """The guide as a function, of which nothing is known."""

    def __init__(self, guide: Any) -> None:
        super().__init__()
        self.guide = guide

    def forward(self, batch: Any = None) -> Any:
        return self.guide(batch)


def test_sbc_ranks_what_the_posterior_predicts(posterior: bh.Posterior) -> None:
    model = posterior.model
    examples = bh.data.encode(ELSEWHERE, model.network.tokenizer, kind="rating", labelled=False)
    known = torch.zeros(len(ELSEWHERE))
    feed = CachedBatches(model, dataclasses.replace(examples, labels=known))
    draws = [*draw_parts(model, posterior.guide, 20, seed=3)]
    _, found = _quantities(model, draws, feed, feed, ())
    forecast = posterior.predict(ELSEWHERE, 20, seed=3, keep_samples=True)
    torch.testing.assert_close(found[:, 1:].float(), forecast.means, atol=1e-4, rtol=1e-4)
    density = torch.distributions.Normal(forecast.means, NOISE).log_prob(known).double().sum(-1)
    torch.testing.assert_close(found[:, 0], density, atol=1e-2, rtol=1e-4)


def test_a_prior_predicts_around_its_own_mean() -> None:
    """In the network linearised at the posterior's mean; in closed form and by draws alike."""
    rows = {"text": random_texts(40), "label": [i % 2 for i in range(40)]}
    posterior = bh.fit(tiny_model(()), "laplace", rows, components=1, max_steps=30, progress=False)
    prior = prior_like(posterior.model, posterior.guide)
    examples = posterior.encode(ELSEWHERE, labelled=False)
    for keep in (False, True):
        found = predict(posterior.model, prior, examples, 400, keep_samples=keep)
        assert isinstance(found, bh.forecast.ClassForecast)
        assert (found.probabilities - 0.5).abs().max() < 0.15  # its mean logits are 0


def test_components_are_a_network_each() -> None:
    """Their k-hat and their prior: each component in the network linearised around its own mean."""
    data = tiny_examples(16)
    posterior = bh.fit(tiny_model(), "laplace", data, max_steps=10, components=2, progress=False)
    assert isinstance(posterior, MixturePosterior)
    found = psis(posterior, data, 200)
    ratios = []
    for number, each in enumerate(posterior.components):
        model, guide, temperature = each.guide.strategy.target(
            each.model, each.report.temperature, False
        )
        seed, feed = derived(0, number), CachedBatches(each.model, data)
        ratios.append(log_ratios(model, guide, feed, 100, seed, temperature))
    assert found.log_evidence == pytest.approx(PSIS.of(torch.cat(ratios)).log_evidence, abs=1e-3)
    prior = prior_like(posterior.model, posterior.guide)
    assert isinstance(prior, MixtureGuide) and prior.linear
    for mine, theirs in zip(prior.components, posterior.components, strict=True):
        assert torch.equal(mine.means()["head.bias"], theirs.guide.means()["head.bias"])  # type: ignore[operator]
