"""Fits and predictions keep the states below the first layer with PEFT weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import bhpeft_pyro as bh
from bhpeft_pyro.data import Examples, encode
from bhpeft_pyro.model import cached_batches as passes
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.model.likelihoods import MultipleChoice
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.peft import Adapter, LoRA, Prefix
from bhpeft_pyro.testing import tiny_examples, tiny_model, tiny_tokenizer

UPPER = (LoRA(rank=2, layers=(-1,)), Adapter(size=3, layers=(-1,)), Prefix(2, layers=(-1,)))
QUESTIONS = {
    "question": ["w9 w10", "w12", "w40 w41 w42 w43", "w20 w22"],
    "choices": [["w5", "w6 w7", "w8 w9 w11"], ["w5 w6", "w30"], ["w9", "w11"], ["w6", "w7 w14"]],
    "answer": [0, 1, 0, 1],
}


def choices() -> tuple[Model, Examples]:
    model = tiny_model(UPPER, 1, likelihood=MultipleChoice())
    return model, encode(QUESTIONS, tiny_tokenizer(), kind="choice")


@pytest.mark.parametrize("kind", ["class", "choice"])
def test_batches_of_any_width_get_the_states_of_their_texts(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "MAX_ROWS", 4)
    model, examples = choices() if kind == "choice" else (tiny_model(UPPER), tiny_examples(9))
    feed = CachedBatches(model, examples)
    weights = {s.name: s.unit * torch.randn(s.shape) for s in model.network.sites}
    batches = [batch for _, batch in feed.prediction(3)]
    batches += feed.training(4, 2, torch.Generator().manual_seed(0))
    assert len({batch.inputs["input_ids"].shape for batch in batches}) > 2
    for batch in batches:
        assert batch.states is not None
        expected = model.network.constant_states(batch)
        assert expected is not None
        real = batch.inputs["attention_mask"].bool()
        if batch.choices is not None:
            real = real & batch.choices.unsqueeze(-1)
        torch.testing.assert_close(batch.states[real], expected[real], atol=1e-6, rtol=1e-6)
        assert not batch.states[~real].any()
        assert model.network(weights, batch).isfinite().all()


def fitted(guide: Any, **options: Any) -> Any:
    """A posterior, and how often the lower layer has run."""
    model, data = tiny_model(UPPER), tiny_examples(50)
    calls: list[int] = []
    module = model.network.attachment._layers[0].attention
    module.register_forward_hook(lambda *_: calls.append(1))
    options = {"max_steps": 6, "batch_size": 8, "progress": False, **options}
    return bh.fit(model, guide, data, **options), calls


@pytest.mark.parametrize("guide", ["laplace", AutoNormal])
def test_a_fit_and_its_forecast_are_the_same(guide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"components": 2} if guide == "laplace" else {"particles": 4}
    texts = tiny_examples(20)
    kept, few = fitted(guide, **options)
    forecast = kept.predict(texts)
    monkeypatch.setattr(passes, "_MAX_STATES", 0)
    plain, many = fitted(guide, **options)
    assert len(few) < len(many) / 2
    for one, other in zip(kept.report.history, plain.report.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    torch.testing.assert_close(
        forecast.probabilities, plain.predict(texts).probabilities, atol=1e-5, rtol=1e-5
    )


def test_components_and_draws_share_the_lower_layers() -> None:
    posterior, calls = fitted("laplace", components=3, max_steps=2)
    calls.clear()
    posterior.predict(tiny_examples(20))
    assert len(calls) == 1
    posterior.predict(tiny_examples(20), keep_samples=True)
    assert len(calls) == 2


def test_states_that_would_take_too_much_memory_are_not_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, examples = tiny_model(UPPER), tiny_examples(5)
    states = CachedBatches(model, examples).states
    assert states is not None and states.shape == (len(examples.tokens.ids), 16)
    monkeypatch.setattr(passes, "_MAX_STATES", states.nbytes)
    assert CachedBatches(model, examples).states is not None
    monkeypatch.setattr(passes, "_MAX_STATES", states.nbytes - 1)
    assert CachedBatches(model, examples).states is None


def test_a_forecast_in_inference_mode() -> None:
    posterior, _ = fitted("laplace", components=1, max_steps=2)
    texts = tiny_examples(5)
    with torch.inference_mode():
        found = posterior.predict(texts)
    torch.testing.assert_close(found.probabilities, posterior.predict(texts).probabilities)
