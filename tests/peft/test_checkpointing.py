"""Gradient checkpointing changes memory, and nothing else."""

from __future__ import annotations

import threading

import pytest
import tiny
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.peft import Adapter, Attachment, LoRA, Prefix
from bhpeft_pyro.peft.binding import LayerForward
from bhpeft_pyro.testing import tiny_examples, tiny_model

# Hugging Face has none for the others.
CAPABLE = [t for t in tiny.MODEL_TYPES if t not in ("albert", "mpnet")]


def kinds_for(model_type):
    kinds = (LoRA(rank=3, gated=True), Adapter(size=4), Prefix(3, encoder=2, gated=True))
    return kinds[:2] if model_type in tiny.WITHOUT_PREFIX else kinds


def gradients(model, attachment, seed=2, thread=False, after=None):
    batch = tiny.inputs()
    weights = tiny.draw(attachment.sites, particles=2, seed=seed)
    with attachment.bind(weights, batch["attention_mask"]):
        output = model(**batch).last_hidden_state
    if after is not None:
        after()
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    loss = (output * probe).sum()
    if thread:  # as on an accelerator, where the engine has threads of its own
        worker = threading.Thread(target=loss.backward)
        worker.start()
        worker.join()
    else:
        loss.backward()
    return output.detach(), {name: value.grad for name, value in weights.items()}


def assert_same(one, two):
    torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("model_type", CAPABLE)
def test_gradients_are_equal(model_type):
    # Dropout is configured; were it on in the checkpointed layers, nothing would be equal.
    model = tiny.build(model_type)
    attachment = Attachment(model, kinds_for(model_type))
    calls = tiny.attention_calls(attachment)
    plain = gradients(model, attachment)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    checkpointed = gradients(model, attachment)
    assert len(calls) == 3  # forward, and again in the backward pass
    assert_same(plain, checkpointed)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("guide", ["normal", "laplace"])
def test_a_fit_is_the_same_fit(guide):
    """Its noisy steps too, which of joint guides are the last 40 %."""
    fitted, calls = [], []
    for checkpointed in (False, True):
        model = tiny_model(aligned=True)
        if checkpointed:
            model.network.backbone.gradient_checkpointing_enable()
        passes = tiny.attention_calls(model.network.attachment)
        fitted.append(bh.fit(model, guide, tiny_examples(), max_steps=10, progress=False))
        calls.append(len(passes))
    assert calls[1] >= calls[0] + 10
    one, other = (torch.tensor([step["loss"] for step in f.report.history]) for f in fitted)
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_the_backward_pass_may_run_in_another_thread(use_reentrant):
    model = tiny.build("bert")
    attachment = Attachment(model, kinds_for("bert"))
    plain = gradients(model, attachment)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert_same(plain, gradients(model, attachment, thread=True))


def test_the_recomputation_takes_the_weights_it_started_with():
    # Between forward and backward other weights were bound, and still are.
    model = tiny.build("llama")
    attachment = Attachment(model, kinds_for("llama"))
    plain = gradients(model, attachment)
    model.gradient_checkpointing_enable()
    others = tiny.draw(attachment.sites, particles=4, seed=9)
    binding = attachment.bind(others)
    assert_same(plain, gradients(model, attachment, after=binding.__enter__))
    binding.__exit__(None, None, None)


def test_two_attachments_checkpoint_side_by_side():
    model = tiny.build("gpt2")
    one, two = Attachment(model, kinds_for("gpt2")), Attachment(model, (LoRA(("key",), rank=2),))
    plain = gradients(model, one), gradients(model, two)
    model.gradient_checkpointing_enable()
    assert_same(plain[0], gradients(model, one))
    assert_same(plain[1], gradients(model, two))
    del one
    assert_same(plain[1], gradients(model, two))
    del two
    assert not any(isinstance(layer.forward, LayerForward) for layer in model.h)


def test_without_gradients_nothing_changes():
    # neither a graph nor a key/value cache that is dropped for a recomputation
    model, ids = tiny.build("llama"), tiny.inputs(padded=0)["input_ids"]
    attachment = Attachment(model, (LoRA(rank=3), Prefix(3)))
    weights = tiny.draw(attachment.sites)
    model.gradient_checkpointing_enable()
    with torch.no_grad(), attachment.bind(weights):
        first = model(input_ids=ids, use_cache=True)
        assert first.last_hidden_state.grad_fn is None
        cache = first.cache if "cache" in first else first.past_key_values
        assert cache.get_seq_length() == ids.shape[1]


def test_outside_bind_and_switched_off_the_layers_run_as_before():
    model, batch = tiny.build("bert"), tiny.inputs()
    attachment = Attachment(model, kinds_for("bert"))
    model.gradient_checkpointing_enable()
    gradients(model, attachment)
    calls = tiny.attention_calls(attachment)
    model.gradient_checkpointing_disable()
    gradients(model, attachment)
    assert len(calls) == 1
    model.gradient_checkpointing_enable()
    embeddings = torch.randn(4, 9, 32, requires_grad=True)
    model(inputs_embeds=embeddings, attention_mask=batch["attention_mask"])[0].sum().backward()
    assert len(calls) == 2  # Hugging Face does not checkpoint in evaluation mode


def test_the_users_own_checkpointing_outside_bind_is_as_before():
    model, batch = tiny.build("bert", hidden_dropout_prob=0.0), tiny.inputs()
    attachment = Attachment(model, kinds_for("bert"))
    model.gradient_checkpointing_enable()
    gradients(model, attachment)
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.embeddings.word_embeddings.weight.requires_grad_(True)
    calls = tiny.attention_calls(attachment)
    model(**batch).last_hidden_state.sum().backward()
    assert len(calls) == 2
