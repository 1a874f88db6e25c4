"""Heads for each word of a text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linearised import centred
from pyro import poutine
from tiny import build, drawn, take
from torch import Tensor
from torch.nn import functional

import bhpeft_pyro as bh
from bhpeft_pyro.base.distributions import Covariance
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.diagnostics.sbc import _remembering
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.model.cached_batches import CachedBatches
from bhpeft_pyro.model.linearized import jacobian
from bhpeft_pyro.testing import tiny_batch, tiny_model, tiny_tokenizer

COLUMNS = bh.Columns(text="tokens", label="tags")
# One of the words has two tokens, and so a span of its own.
TOKENS = [["w5", "w20 w21", "w6"], ["w30"], ["w7", "w8", "w9", "w31 w11 w12"]]
TAGS = [[0, 1, 2], [1], [2, 0, 1, 1]]
PLACES = [(0, 1), (1, 3), (3, 4)], [(0, 1)], [(0, 1), (1, 2), (2, 3), (3, 6)]


def model_of(
    name: str = "bert", pooling: Any = "auto", kinds: Any = None, principal: bool = False
) -> bh.Model:
    head = bh.Head(3, pooling=pooling, principal=principal, each_word=True)
    kinds = bh.presets.bh_peft() if kinds is None else kinds
    return bh.Model(bh.RandomPEFT(build(name), kinds, head, tiny_tokenizer()))


def examples_of(model: bh.Model) -> bh.data.Examples:
    return model.encode({"tokens": TOKENS, "tags": TAGS}, COLUMNS)


def whole(model: bh.Model) -> Batch:
    return next(examples_of(model).batches(8))


def by_hand(model: bh.Model, weights: dict[str, Tensor], pooling: str) -> Tensor:
    """(8, 3) outputs under one draw, sentence by sentence, without spans."""
    network, found = model.network, []
    one = {name: value.unsqueeze(0) for name, value in weights.items()}
    for words, places in zip(TOKENS, PLACES, strict=True):
        inputs = dict(tiny_tokenizer()(" ".join(words), return_tensors="pt"))
        inputs.pop("token_type_ids", None)
        with network.attachment.bind(network.coordinates(one), inputs["attention_mask"]):
            states = network.backbone(**inputs).last_hidden_state[0]
        for begin, end in places:
            own = states[begin:end]
            kept = {"mean": own.mean(0), "first": own[0], "last": own[-1]}[pooling]
            found.append(functional.layer_norm(kept, kept.shape))
    return torch.stack(found) @ weights["head.weight"].mT + weights["head.bias"]


@pytest.mark.parametrize(
    ("name", "pooling", "same"),
    [
        ("bert", "auto", "mean"),
        ("bert", "first", "first"),
        ("bert", "last", "last"),
        ("gpt2", "auto", "last"),
        ("llama", "mean", "mean"),
    ],
)
def test_outputs_are_those_of_one_sentence_at_a_time(name: str, pooling: Any, same: str) -> None:
    model = model_of(name, pooling)
    weights, batch = drawn(model.sites, 4), whole(model)
    expected = torch.stack(
        [by_hand(model, {k: v[s] for k, v in weights.items()}, same) for s in range(4)]
    )
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(model.network(weights, batch), expected, **close)
    shared = model.network(weights, batch.split(4))
    for s in range(4):  # the s-th draw sees the s-th two words
        torch.testing.assert_close(shared[s], expected[s, 2 * s : 2 * s + 2], **close)
    log_prob = poutine.trace(poutine.condition(model, take(weights, 0))).get_trace(batch)
    log_prob.compute_log_prob()
    own = functional.cross_entropy(expected[0], batch.labels, reduction="sum")
    torch.testing.assert_close(-log_prob.nodes["label"]["log_prob_sum"], own, **close)


def test_an_epoch_sums_to_the_whole_loss() -> None:
    model = model_of()
    weights = drawn(model.sites)
    conditioned = poutine.condition(model, weights)

    def loss(batch: Batch) -> Tensor:
        trace = poutine.trace(conditioned).get_trace(batch)
        trace.compute_log_prob()
        value: Tensor = trace.nodes["label"]["log_prob_sum"]  # scaled by N / B
        return value

    every = loss(whole(model))
    steps = [loss(batch) for batch in examples_of(model).batches(4, shuffle=True)]
    torch.testing.assert_close(torch.stack(steps).mean(), every)


def test_constant_layers_are_skipped_for_words_too() -> None:
    model = model_of(kinds=(bh.peft.LoRA(rank=2, layers=(-1,)),))
    examples, weights = examples_of(model), drawn(model.sites, 2)
    batches = CachedBatches(model, examples)
    assert batches.states is not None and len(batches.states) == len(examples.tokens.ids)
    for indices, batch in batches.prediction(3):
        plain = next(examples.subset(indices).batches(3))
        for draws in (1, len(batch)):  # as for a Jacobian, with one word to each draw
            own = {
                name: value[:1].expand(draws, *value.shape[1:]) for name, value in weights.items()
            }
            torch.testing.assert_close(
                model.network(own, batch.split(draws)), model.network(own, plain.split(draws))
            )


def test_a_sentence_runs_once_for_all_its_words() -> None:
    model, rows = model_of(), []
    model.network.backbone.embeddings.register_forward_hook(
        lambda _module, _args, out: rows.append(len(out))
    )
    batch = whole(model)
    assert len(batch) == 8
    model.network(drawn(model.sites, 5), batch)
    assert rows == [3 * 5]


def test_what_a_words_state_has_seen() -> None:
    """In a decoder what precedes it, in an encoder all of the sentence."""
    for name, before in (("gpt2", True), ("bert", False)):
        model = model_of(name)
        first, other = (
            model.network.features(next(model.encode_texts([text]).batches(9)))
            for text in ("w5 w6 w7", "w5 w6 w9")
        )
        assert torch.allclose(first[:2], other[:2], atol=1e-6) == before
        assert not torch.allclose(first[2], other[2], atol=1e-3)


def test_the_heads_axes_are_those_of_words() -> None:
    model = model_of(kinds=(), principal=True)
    examples = examples_of(model)
    plain = CachedBatches(model, examples).features
    assert plain is not None and plain.shape == (8, 32)
    batches = [batch for _, batch in examples.by_length(3)]
    model.network.align(batches)
    assert model.network.axes is not None
    features = CachedBatches(model, examples).features
    torch.testing.assert_close(features, model.network.axes(plain))
    torch.testing.assert_close(model.network.axes.center, plain.mean(0))
    weights = drawn(model.sites, 2)  # a batch of features is one of sequences
    for indices, batch in CachedBatches(model, examples).prediction(3):
        torch.testing.assert_close(
            model.network(weights, batch), model.network(weights, whole(model))[:, indices]
        )


def test_moments_are_those_of_each_words_jacobian() -> None:
    model = model_of(kinds=bh.presets.lora(rank=2))
    batch, at = whole(model), drawn(model.sites)
    leaves = {name: value.requires_grad_() for name, value in at.items()}
    flat = by_hand(model, leaves, "mean").flatten()
    rows = [
        torch.autograd.grad(
            each, [*leaves.values()], retain_graph=True, allow_unused=True, materialize_grads=True
        )
        for each in flat
    ]
    brute = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    expected = centred(model, brute, batch)
    at = {name: value.detach() for name, value in at.items()}
    outputs, found = jacobian(model, at, batch)
    torch.testing.assert_close(outputs.mean, flat.detach().reshape(8, 3), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)
    sds = torch.rand(brute.shape[1], generator=torch.Generator().manual_seed(1))
    moments = Covariance.diagonal(sds).projected(found)
    by_rows = expected * sds
    torch.testing.assert_close(moments, by_rows @ by_rows.mT, atol=1e-3, rtol=1e-3)


def test_features_are_remembered_word_by_word() -> None:
    """Simulation-based calibration computes the features of each batch once."""
    model = model_of(kinds=())
    words = model.encode({"tokens": TOKENS[:1], "tags": TAGS[:1]}, COLUMNS)
    remembering = _remembering(model.network)
    for number in (0, 2, 0):  # of the same sentence
        batch = next(words.subset([number]).batches(1))
        torch.testing.assert_close(remembering.features(batch), model.network.features(batch))


def test_batches_and_heads_that_do_not_go_together_are_refused() -> None:
    model, plain = model_of(kinds=()), tiny_model((), 3)
    with pytest.raises(DataError, match=r"batch: it has no spans of words; .* each_word=True"):
        model.network(drawn(model.sites, 1), tiny_batch(2))
    with pytest.raises(DataError, match=r"batch: it has spans of words; .* each_word=False"):
        plain.network(drawn(plain.sites, 1), whole(model))
