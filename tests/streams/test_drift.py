"""The drift signal on a conjugate model: how often it cries wolf, and how often it sees one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from onehot import FIT, NOISE, WIDTH, exactly, model, words

import bhpeft_pyro as bh
from bhpeft_pyro.base.isolation import seeded
from bhpeft_pyro.diagnostics import psis
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.forecast.metrics import evaluate
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.model.likelihoods import Normal
from bhpeft_pyro.posterior.mixture import MixturePosterior
from bhpeft_pyro.prediction.draws import draw_parts
from bhpeft_pyro.prediction.predict import simulate
from bhpeft_pyro.streams import Drift, drift
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

BATCH = words(64, seed=7)
SAMPLES = 39


@pytest.fixture(scope="module")
def posterior() -> Any:
    """Two examples a word: what it does not know makes the labels of a word hang together."""
    return exact_fit(words(32, seed=1))


def exact_fit(data: bh.data.Examples) -> bh.Posterior:
    with pytest.MonkeyPatch.context() as patch:
        exactly(patch)
        return bh.fit(model(), "normal", data, **FIT)


def labelled(weights: torch.Tensor, seed: int) -> bh.data.Examples:
    """The batch with labels from the weights (16,)."""
    generator = torch.Generator().manual_seed(seed)
    mean = weights[BATCH.tokens.ids.long() - 5]
    labels = mean + NOISE * torch.randn(len(BATCH), generator=generator)
    return dataclasses.replace(BATCH, labels=labels)


def assess_many(posterior: bh.Posterior, shift: float, count: int) -> list[Drift]:
    """Truths drawn from the posterior, then moved by `shift` of its sds."""
    truths = posterior.sample(count, seed=123)["head.weight"][:, 0]
    sds = posterior.guide.scales()["head.weight"][0]  # type: ignore[operator]
    return [
        posterior.assess(labelled(truth + shift * sds, seed), SAMPLES, seed=seed)
        for seed, truth in enumerate(truths)
    ]


def test_without_drift_p_values_are_uniform(posterior: bh.Posterior) -> None:
    found = assess_many(posterior, 0.0, count=60)
    alarms = sum(each.surprising for each in found)
    assert alarms <= 9  # 3 expected; more have a probability of 0.1 %
    p = torch.tensor([each.nll.p for each in found if each.nll is not None])
    assert abs(p.mean() - 0.5) < 3 * (12 * len(p)) ** -0.5
    assert abs(p.std() - 12**-0.5) < 0.08  # labels drawn one by one would spread it to the ends


def test_drift_is_seen(posterior: bh.Posterior) -> None:
    found = assess_many(posterior, 2.5, count=12)
    assert sum(each.surprising for each in found) >= 11


def test_statistics_are_those_of_a_loop(posterior: bh.Posterior) -> None:
    data = labelled(torch.ones(WIDTH), seed=0)
    found = posterior.assess(data, SAMPLES, seed=5)
    forecast = posterior.predict(data, seed=10)
    assert found.nll is not None and data.labels is not None
    assert found.nll.observed == pytest.approx(
        bh.forecast.metrics.evaluate(forecast)["nll"], rel=1e-5
    )
    classes = bh.fit(tiny_model(()), "normal", tiny_examples(), max_steps=4, progress=False)
    batch = tiny_examples(9, seed=3)
    found = classes.assess(batch, 30)
    scores = bh.forecast.metrics.evaluate(found.forecast)
    assert found.nll is not None
    assert found.nll.observed == pytest.approx(scores["nll"], rel=1e-5)
    assert found.epistemic == pytest.approx(scores["mutual_information"], rel=1e-5)
    draws = draw_parts(classes.model, classes.guide, 30, 1)
    with seeded(0):
        simulated, *_ = simulate(classes.model, draws, CachedBatches(classes.model, batch))
    values = []
    for labels in simulated:
        chosen = found.forecast.probabilities[range(9), labels]  # type: ignore[union-attr]
        values.append(-chosen.log().mean().item())
    assert found.nll.expected == pytest.approx(sum(values) / 30, rel=1e-4)
    as_large = sum(value >= found.nll.observed for value in values)
    assert found.nll.p == pytest.approx((1 + as_large) / 31)


def test_advice(posterior: bh.Posterior) -> None:
    truth = posterior.guide.means()["head.weight"][0]  # type: ignore[operator]
    assert posterior.assess(labelled(truth, 0), SAMPLES).advice == "update"
    expert = exact_fit(words(2000, seed=1))
    truth = expert.guide.means()["head.weight"][0]  # type: ignore[operator]
    assert expert.assess(labelled(truth, 0), SAMPLES).advice == "keep"
    turned = expert.assess(labelled(-truth, 0), SAMPLES)
    assert turned.advice == "start anew" and turned.surprising
    assert turned.alternatives[0.0] < turned.alternatives[0.5]
    # Every alternative is the NLL under that prior: of N(0, prior sd^2) weights, and noise.
    labels = labelled(-truth, 0).labels
    assert labels is not None
    sd = (0.7**2 + NOISE**2) ** 0.5
    exact = -torch.distributions.Normal(0.0, sd).log_prob(labels).mean().item()
    assert turned.alternatives[0.0] == pytest.approx(exact, abs=0.15)
    moved = expert.assess(labelled(truth + 0.3, 0), SAMPLES)
    assert moved.surprising and moved.advice in ("update", "forget")
    assert "expected" in str(moved) and "keep=0.5" in str(moved)


def test_without_labels_only_uncertainty_is_found(posterior: bh.Posterior) -> None:
    found = posterior.assess(list(BATCH.texts), SAMPLES)
    assert found.nll is None and not found.surprising
    assert found.metrics().keys() == {"epistemic", "known"}
    var = posterior.guide.scales()["head.weight"][0].square()  # type: ignore[operator]
    exact = var[BATCH.tokens.ids.long() - 5].mean().item()
    assert found.epistemic == pytest.approx(exact, rel=0.25)
    assert found.known == pytest.approx(NOISE**2 / (exact + NOISE**2), abs=0.1)


def test_too_few_samples_for_a_p_value(posterior: bh.Posterior) -> None:
    with pytest.raises(ConfigError, match="samples=10"):
        posterior.assess(BATCH, 10)


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_alternatives_of_a_mixture_are_mixtures(guide: str) -> None:
    """Every component forgets by itself, towards the first prior that is its own."""
    options: dict[str, Any] = {"components": 2, "max_steps": 60, "progress": False}
    fitted = bh.fit(tiny_model(aligned=True), guide, tiny_examples(48), **options)
    assert isinstance(fitted, MixturePosterior)
    data, how = tiny_examples(32, seed=4), {"seed": 1}
    assert data.labels is not None
    kept = drift._nll_with(fitted, 1 - 1e-7, data, **how)
    assert kept == pytest.approx(fitted.evaluate(data, 200)["nll"], abs=0.05)
    half, anew = (drift._nll_with(fitted, keep, data, **how) for keep in (0.5, 0.0))
    assert kept < half < anew
    turned = dataclasses.replace(data, labels=1 - data.labels)
    found = fitted.assess(turned, SAMPLES)
    assert found.surprising and found.alternatives[0.0] < found.alternatives[0.5]


def test_alternatives_are_of_the_linearised_network_if_the_posterior_is() -> None:
    """What keeps (nearly) all has the NLL of the posterior itself; without the linearisation a wide
    posterior's is another one."""
    wide = tiny_model(prior=bh.priors.FunctionSpaceNormal(change=3.0, head=2.0), aligned=True)
    options = {"components": 1, "max_steps": 40, "progress": False}
    fitted = bh.fit(wide, "laplace", tiny_examples(48), **options)
    data, how = tiny_examples(32, seed=4), {"seed": 1}
    kept = drift._nll_with(fitted, 1 - 1e-7, data, **how)
    assert kept == pytest.approx(fitted.evaluate(data, 400)["nll"], abs=0.05)
    weights = {name: draws.unsqueeze(1) for name, draws in fitted.sample(400).items()}
    (batch,) = data.batches(len(data))
    itself = wide.predictive(weights, batch).probs.mean(0).gather(1, batch.labels[:, None]).log()
    assert abs(kept + itself.mean().item()) > 0.1


def test_alternatives_of_ratings_are_in_closed_form_as_the_posterior_is() -> None:
    """A mixture over draws of the weights would have a higher NLL than the posterior, for less."""
    network = bh.RandomPEFT(tiny_backbone(), bh.presets.lora(rank=2), bh.Head(1), tiny_tokenizer())
    model = bh.Model(network, likelihood=Normal(center=0.0, spread=1.0))
    generator = torch.Generator().manual_seed(0)
    data = dataclasses.replace(
        tiny_examples(48), labels=0.05 * torch.randn(48, generator=generator), kind="rating"
    )
    fitted = bh.fit(model, "laplace", data, components=1, max_steps=30, tau=0.01, progress=False)
    kept = drift._nll_with(fitted, 1 - 1e-7, data, seed=2**62)  # the largest that is allowed
    assert kept == pytest.approx(evaluate(fitted.predict(data))["nll"], abs=1e-3)


def test_a_value_that_a_sure_posterior_did_not_expect_is_infinitely_far() -> None:
    assert drift.Signal(87.0, 0.0, 0.0, 0.01).z == float("inf")
    assert drift.Signal(0.0, 0.0, 0.0, 1.0).z == 0.0


def test_every_seed_that_is_allowed_can_be_used() -> None:
    """Others are derived from it."""
    options: dict[str, Any] = {"components": 2, "max_steps": 1, "progress": False}
    found = bh.fit(tiny_model(()), "normal", tiny_examples(), seed=2**62, **options)
    assert found.assess(tiny_examples(seed=1), 20, seed=2**62).nll is not None
    assert found.update(tiny_examples(seed=1), max_steps=1).report.steps == 2
    assert found.to_arviz(samples=2, seed=2**62).posterior.sizes["chain"] == 2
    first = found.components[0]
    assert first.predict(["w5"], 3, seed=2**62).draws == 3
    assert psis(first, tiny_examples(), 100, seed=2**62).effective_samples > 0
    for seed in (2**62 + 1, -1):
        with pytest.raises(ConfigError, match=f"seed={seed}"):
            found.assess(tiny_examples(seed=1), 20, seed=seed)
