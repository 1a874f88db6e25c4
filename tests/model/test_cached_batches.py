"""Batches: what does not depend on PEFT weights is computed once; rows that are not finite."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from pyro.infer.autoguide import AutoNormal

import bhpeft_pyro as bh
from bhpeft_pyro.data import Examples, encode
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.model import cached_batches
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.model.likelihoods import MultipleChoice
from bhpeft_pyro.model.model import Model
from bhpeft_pyro.peft import Adapter, LoRA, Prefix
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

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
    monkeypatch.setattr(cached_batches, "MAX_ROWS", 4)
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


@pytest.mark.parametrize("kinds", [(LoRA(rank=2),), (), UPPER])
def test_passes_on_a_cpu_have_few_tokens(kinds: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data, seen = tiny_model(kinds), tiny_examples(40), []
    posterior = bh.fit(model, "delta", data, max_steps=1, progress=False)
    whole = posterior.predict(data, 0)
    model.network.backbone.register_forward_pre_hook(
        lambda _, __, inputs: seen.append(inputs["input_ids"].shape), with_kwargs=True
    )
    monkeypatch.setattr(cached_batches, "_ON_CPU", 24)
    few = posterior.predict(data, 0)
    assert len(seen) > 3 and all(rows * length <= 24 for rows, length in seen)
    torch.testing.assert_close(few.probabilities, whole.probabilities)


def fitted(guide: Any, **options: Any) -> Any:
    """A posterior, and how often the lower layer has run."""
    model, data = tiny_model(UPPER), tiny_examples(50)
    calls: list[int] = []
    module = model.network.attachment._layers[0].attention
    module.register_forward_hook(lambda *_: calls.append(1))
    options = {"max_steps": 3, "batch_size": 8, "progress": False, **options}
    return bh.fit(model, guide, data, **options), calls


@pytest.mark.parametrize("guide", ["laplace", AutoNormal])
def test_a_fit_and_its_forecast_are_the_same(guide: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"components": 2} if guide == "laplace" else {"particles": 4}
    texts = tiny_examples(20)
    kept, few = fitted(guide, **options)
    forecast = kept.predict(texts)
    monkeypatch.setattr(cached_batches, "_MAX_STATES", 0)
    plain, many = fitted(guide, **options)
    assert len(few) < len(many) / 2
    for one, other in zip(kept.report.history, plain.report.history, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    torch.testing.assert_close(
        forecast.probabilities, plain.predict(texts).probabilities, atol=1e-5, rtol=1e-5
    )


def test_components_and_draws_share_the_lower_layers() -> None:
    posterior, calls = fitted("laplace", components=3, max_steps=2)
    posterior = posterior.replace(novelty=None)  # which reads all layers
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
    monkeypatch.setattr(cached_batches, "_MAX_STATES", states.nbytes)
    assert CachedBatches(model, examples).states is not None
    monkeypatch.setattr(cached_batches, "_MAX_STATES", states.nbytes - 1)
    assert CachedBatches(model, examples).states is None


# Rows that are not finite


GOOD = {"text": [f"w{5 + i % 2} w{10 + i}" for i in range(16)], "label": [0, 1] * 8}
BAD = {"text": [*GOOD["text"][:3], "w6 w33", "w5"], "label": [0, 1, 0, 1, 0]}
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}


def model(kinds: Any) -> bh.Model:
    backbone = tiny_backbone()

    def spoil(_: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        bad = (given[0][:, :1] == 6) & (given[0] == 33)
        return output.masked_fill(bad.unsqueeze(-1), torch.nan)

    backbone.embeddings.word_embeddings.register_forward_hook(spoil)
    return bh.Model(bh.RandomPEFT(backbone, kinds, bh.Head(2), tiny_tokenizer()))


@pytest.mark.filterwarnings("ignore:data. 3 of 5 rows were learnt")
@pytest.mark.parametrize("kinds", [(), bh.presets.lora(rank=2)], ids=["head", "lora"])
def test_the_row_is_named(kinds: Any) -> None:
    named = r"data, row 3: of 'w6 w33' the backbone makes numbers that are not finite"
    with pytest.raises(DataError, match=named):
        bh.fit(model(kinds), "normal", BAD, **QUICK)
    posterior = bh.fit(model(kinds), "normal", GOOD, **QUICK)
    before = posterior.sample(3)
    update = partial(posterior.update, again=True)
    for act in (posterior.predict, posterior.evaluate, posterior.assess, update):
        with pytest.raises(DataError, match=named):
            act(BAD)
    with pytest.raises(DataError, match=named.replace("data,", "validation,")):
        posterior.update({"text": ["w7", "w8"], "label": [0, 1]}, validation=BAD)
    assert all(torch.equal(value, before[name]) for name, value in posterior.sample(3).items())


def test_the_error_has_all_rows_so_that_the_others_can_be_predicted() -> None:
    posterior = bh.fit(model(bh.presets.lora(rank=2)), "normal", GOOD, **QUICK)
    # 40 rows are two batches; the first that fails is not the one with row 1.
    texts = ["w5", "w6 w33", *["w5 w9 w8"] * 30, "w6 w33 w8 w9 w10", *["w5"] * 7]
    named = r"data, row 1: of 'w6 w33' the backbone .* \(and 1 more: row 32\)$"
    with pytest.raises(DataError, match=named) as caught:
        posterior.predict(texts)
    assert caught.value.rows == (1, 32)
    kept = [i for i in range(len(texts)) if i not in caught.value.rows]
    forecast = posterior.predict([texts[i] for i in kept])
    assert len(forecast) == len(texts) - 2
    with pytest.raises(DataError) as caught:
        posterior.predict([])
    assert caught.value.rows == ()


def test_a_damaged_backbone_is_refused_when_the_network_is_made() -> None:
    backbone = tiny_backbone()
    backbone.encoder.layer[1].output.dense.weight.data[3, 2] = torch.nan
    with pytest.raises(ConfigError, match=r"layer\.1\.output\.dense\.weight' are not finite"):
        bh.RandomPEFT(backbone)
