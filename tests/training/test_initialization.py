"""Where a fit starts: a guide that has been fitted before, at what that fit found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.guides import Guide
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

RATINGS = {"text": [*tiny_examples(60).texts], "label": [i % 5 + 0.01 * i for i in range(60)]}
HOW: dict[str, Any] = {"lr": 0.05, "progress": False}


def of_ratings(kinds: Any) -> bh.Model:
    network = bh.RandomPEFT(tiny_backbone(), kinds, bh.Head(1), tiny_tokenizer())
    return bh.Model(network, likelihood=bh.likelihoods.Normal())


def parameters(guide: Guide) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in guide.named_parameters()}


@pytest.mark.parametrize("name", ["laplace", "delta", "normal", "AutoNormal", "mvn"])
def test_a_fitted_guide_goes_on_from_where_it_is(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = of_ratings(() if name == "mvn" else bh.presets.lora(rank=1))
    guide = bh.fit(model, name, RATINGS, components=1, max_steps=5, **HOW).guide
    before, starts = parameters(guide), []

    def noted(last: Any, setups: Any, *_: Any) -> None:
        starts.append(parameters(setups[0].guide))
        raise KeyboardInterrupt

    monkeypatch.setattr("bhpeft_pyro.posterior.fit.learn", noted)
    with pytest.raises(KeyboardInterrupt):
        bh.fit(model, guide, RATINGS, max_steps=5, **HOW)
    assert all(torch.equal(starts[0][name], value) for name, value in before.items())


def test_weights_that_were_moved_before_the_first_fit_leave_the_rest_to_it() -> None:
    """Such as a head of one's own: the sds, the noise and the projections are still the fit's."""
    for name in ("normal", "delta"):
        model = of_ratings(bh.presets.lora(rank=1))
        guide = bh.autoguide(name, model)
        guide.move({"head.bias": torch.ones(1)})
        before = {k: value.clone() for k, value in guide.means().items()}
        posterior = bh.fit(model, guide, RATINGS, max_steps=1, lr=1e-9, progress=False)
        if name == "delta":
            assert not torch.allclose(guide.means()["lora.query.A"], before["lora.query.A"])
        else:
            assert min(posterior.report.scales.values()) < 0.5


def test_every_step_of_a_fit_moves_the_weights() -> None:
    for steps in (3, 40):
        posterior = bh.fit(tiny_model(()), "delta", tiny_examples(16), max_steps=steps, **HOW)
        rates = [entry["lr"] for entry in posterior.report.history]
        assert min(rates) > 0 and max(rates) == HOW["lr"]
