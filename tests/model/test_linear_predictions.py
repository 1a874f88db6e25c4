"""Predictions with the linearised network: under `inference_mode`, and within bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from memory import Memory

import bhpeft_pyro as bh
from bhpeft_pyro.guides import LaplaceGuide
from bhpeft_pyro.model import linearized as linear
from bhpeft_pyro.model.likelihoods import Normal
from bhpeft_pyro.testing import tiny_examples, tiny_model

TEXTS = ["w9", "w5 w30 w12 w44 w17", "w6 w7", "w8 w40 w41 w42", "w21 w22 w23"]


def posterior_of(**options: Any) -> bh.Posterior:
    model = tiny_model(bh.presets.lora(rank=8), **options)
    guide = bh.autoguide("laplace", model, components=1)
    assert isinstance(guide, LaplaceGuide)
    guide.set_covariance(guide.prior.covariance)
    return bh.Posterior(model, guide, ())


@pytest.mark.parametrize("guide", ["laplace", "normal", "delta"])
def test_inference_mode_changes_nothing(guide: str) -> None:
    """As many write around predictions; the linearised network takes gradients in it."""
    posterior = bh.fit(tiny_model(), guide, tiny_examples(), max_steps=2, progress=False)
    outside = posterior.predict(TEXTS, 5)
    with torch.inference_mode():
        inside = posterior.predict(TEXTS, 5)
        copied = posterior.predict(tiny_examples(), 5)
    assert torch.equal(inside.probabilities, outside.probabilities)
    assert torch.equal(copied.probabilities, posterior.predict(tiny_examples(), 5).probabilities)


def test_draws_are_held_once() -> None:
    """Draws, their way from the mean, and both flattened side by side would be three copies."""
    posterior, samples = posterior_of(), 2000
    copy = samples * 4 * sum(site.numel for site in posterior.model.sites)
    with Memory() as memory:
        posterior.predict(TEXTS, samples, keep_samples=True)
    assert copy < memory.peak < 1.2 * copy


def test_many_draws_are_predicted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal forecasts, whose memory does not grow; noise scales are parted as the weights are."""
    posterior, samples = posterior_of(outputs=1, likelihood=Normal(3.0, 2.0)), 2000
    whole = posterior.predict(TEXTS, samples, keep_samples=True)
    part = 128 * 4 * sum(site.numel for site in posterior.model.network.sites)
    monkeypatch.setattr(linear, "MAX_BYTES", part)
    with Memory() as memory:
        parted = posterior.predict(TEXTS, samples, keep_samples=True)
    torch.testing.assert_close(parted.means, whole.means, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(parted.sds, whole.sds)
    assert memory.peak < 3 * part < samples / 128 * part
