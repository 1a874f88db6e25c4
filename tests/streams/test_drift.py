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
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.prediction.draws import draw_parts
from bhpeft_pyro.prediction.predict import simulate
from bhpeft_pyro.streams import Drift, drift
from bhpeft_pyro.testing import tiny_examples, tiny_model

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


def test_a_turned_rule_is_said_to_be_surprising(posterior: bh.Posterior) -> None:
    truth = posterior.guide.means()["head.weight"][0]  # type: ignore[operator]
    same, turned = (posterior.assess(labelled(w, 0), SAMPLES) for w in (truth, -truth))
    assert not same.surprising and "surprising" not in str(same)
    assert turned.surprising and str(turned).endswith(": surprising")
    assert "64 examples" in str(turned) and "expected" in str(turned)


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
