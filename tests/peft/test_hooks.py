"""Hooks and what is bound: threads, nesting, several attachments, copies, precision."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import tiny
import torch
from tiny import bound, run
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bhpeft_pyro.errors import ArchitectureError, ConfigError
from bhpeft_pyro.peft import Adapter, Attachment, LoRA, Prefix
from bhpeft_pyro.peft.hooks import LayerForward, bare_copy

KINDS = (LoRA(rank=3), Adapter(size=4), Prefix(3))


def hooks(model):
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def test_two_attachments_on_one_backbone_do_not_touch_each_other():
    batch = tiny.inputs()
    alone = []
    for kinds in (KINDS, (LoRA(("key",), rank=2), Prefix(5))):
        attachment = Attachment(tiny.build("llama"), kinds)
        alone.append(bound(attachment, tiny.draw(attachment.sites), batch))
    model = tiny.build("llama")
    first, second = Attachment(model, KINDS), Attachment(model, (LoRA(("key",), rank=2), Prefix(5)))
    one, two = tiny.draw(first.sites), tiny.draw(second.sites)
    assert torch.equal(bound(first, one, batch), alone[0])
    assert torch.equal(bound(second, two, batch), alone[1])
    # an inner binding replaces the outer one, which is back afterwards
    with first.bind(one, batch["attention_mask"]):
        assert torch.equal(run(model, batch), alone[0])
        assert torch.equal(bound(second, two, batch), alone[1])
        assert torch.equal(run(model, batch), alone[0])


def test_a_backbone_gets_its_hooks_once():
    batch, model = tiny.inputs(), tiny.build("llama")
    first = Attachment(model, KINDS)
    weights, before = tiny.draw(first.sites), hooks(model)
    expected = bound(first, weights, batch)
    others = [Attachment(model, KINDS) for _ in range(3)]
    assert hooks(model) == before > 0
    assert torch.equal(bound(first, weights, batch), expected)
    assert torch.equal(bound(others[-1], weights, batch), expected)


SECOND = {
    "another": lambda _: Attachment(tiny.build("gpt2"), KINDS),
    "copied": copy.deepcopy,
    "pickled": lambda first: pickle.loads(pickle.dumps(first)),
}


@pytest.mark.parametrize("which", SECOND)
def test_bindings_on_two_backbones_hold_at_once(which):
    batch, first = tiny.inputs(), Attachment(tiny.build("bert"), KINDS)
    second = SECOND[which](first)
    one, two = tiny.draw(first.sites), tiny.draw(second.sites)
    expected = bound(first, one, batch), bound(second, two, batch)
    with first.bind(one, batch["attention_mask"]), second.bind(two, batch["attention_mask"]):
        assert torch.equal(run(first.backbone, batch), expected[0])
        assert torch.equal(run(second.backbone, batch), expected[1])


def test_two_threads_at_once_see_their_own_weights():
    batch, model = tiny.inputs(), tiny.build("bert")
    attachment = Attachment(model, KINDS)
    weights = [tiny.draw(attachment.sites, seed=seed) for seed in range(2)]
    expected = [bound(attachment, w, batch) for w in weights]
    frozen = run(model, batch)
    barrier, wrong = threading.Barrier(3), []

    def work(index):
        for _ in range(20):
            barrier.wait()  # all three inside `bind`, or running, at the same time
            if index == 2:
                result, target = run(model, batch), frozen
            else:
                with attachment.bind(weights[index], batch["attention_mask"]):
                    barrier.wait()
                    result, target = run(model, batch), expected[index]
            if index == 2:
                barrier.wait()
            if not torch.equal(result, target):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_a_bare_copy_has_nothing_of_it(model_type):
    batch, model = tiny.inputs(), tiny.build(model_type)
    attention, frozen, before = model.config._attn_implementation, run(model, batch), hooks(model)
    attachment = Attachment(model, KINDS)
    weights = tiny.draw(attachment.sites)
    expected = bound(attachment, weights, batch)
    bare = bare_copy(model)
    assert hooks(bare) == before < hooks(model)
    assert bare.config._attn_implementation == attention
    assert model.config._attn_implementation == f"bhpeft_{attention}"
    with attachment.bind(weights, batch["attention_mask"]):
        assert torch.equal(run(bare, batch), frozen)
        assert torch.equal(run(model, batch), expected)


def test_bound_weights_are_freed_with_the_binding():
    model, batch = tiny.build("bert"), tiny.inputs()
    attachment = Attachment(model, KINDS)
    weights = tiny.draw(attachment.sites)
    some = weakref.ref(weights["lora.query.A"])
    bound(attachment, weights, batch)
    del weights
    gc.collect()
    assert some() is None


def test_a_failed_attachment_leaves_nothing_behind():
    model = tiny.build("llama")
    with pytest.raises(IndexError):
        Attachment(model, (Prefix(3), LoRA(layers=(9,))))
    assert hooks(model) == 0
    assert model.config._attn_implementation == "sdpa"
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "electra"])
def test_a_copied_or_pickled_backbone_is_free_of_the_binding(model_type):
    batch, model = tiny.inputs(), tiny.build(model_type)
    frozen = run(model, batch)
    attachment = Attachment(model, (LoRA(rank=3, layers=(1,)), Prefix(3, layers=(1,))))
    assert isinstance(model.encoder.layer[0].forward, LayerForward)  # which can be skipped
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with attachment.bind(tiny.draw(attachment.sites), batch["attention_mask"]):
            assert torch.equal(run(other, batch), frozen)
        with torch.no_grad():  # and is a model of its own
            other.encoder.layer[0].output.dense.weight.zero_()
        assert not torch.allclose(run(other, batch), frozen, atol=1e-3)
    assert torch.equal(run(model, batch), frozen)


def test_a_prefix_needs_the_attention_function_of_pytorch():
    batch, model = tiny.inputs(), tiny.build("bert")
    without = Attachment(model, (LoRA(rank=3), Adapter(size=4)))
    bound(without, tiny.draw(without.sites), batch)
    assert model.config._attn_implementation == "sdpa"  # which other kinds leave alone
    attachment = Attachment(model, (Prefix(3),))
    weights = tiny.draw(attachment.sites)
    expected = bound(attachment, weights, batch)
    model.set_attn_implementation("sdpa")
    assert torch.equal(bound(attachment, weights, batch), expected)
    model.set_attn_implementation("eager")
    with pytest.raises(ArchitectureError, match=r"prefix.*'sdpa'.*'eager'"):
        bound(attachment, weights, batch)
    with pytest.raises(ArchitectureError, match=r"prefix.*'sdpa'.*'eager'"):
        Attachment(model, (Prefix(3),))


@pytest.mark.parametrize(
    ("auto", "model_type"),
    [
        (AutoModelForSequenceClassification, "bert"),
        (AutoModelForSequenceClassification, "distilbert"),
        (AutoModelForCausalLM, "gpt2"),
        (AutoModelForCausalLM, "llama"),
        (AutoModelForCausalLM, "opt"),
        (AutoModelForCausalLM, "gemma3_text"),
    ],
)
def test_models_with_a_head(auto, model_type):
    batch, model = tiny.inputs(), tiny.build(model_type, auto=auto)
    frozen = run(model, batch)
    attachment = Attachment(model, KINDS)
    weights = tiny.draw(attachment.sites)
    assert torch.equal(run(model, batch), frozen)
    assert not torch.allclose(bound(attachment, weights, batch), frozen, atol=1e-2)
    # the base model alone is under the same weights
    with attachment.bind(weights, batch["attention_mask"]):
        hidden = run(model.base_model, batch)
    alone = Attachment(model.base_model, KINDS)
    assert alone.hidden_size == attachment.hidden_size == hidden.shape[-1]
    assert torch.equal(bound(alone, weights, batch), hidden)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "llama", "t5", "modernbert"])
@pytest.mark.parametrize("how", ["bfloat16", "float16", "autocast"])
def test_half_precision(model_type, how):
    batch = tiny.inputs()
    kinds = (LoRA(rank=3, gated=True), Adapter(size=4, gated=True), Prefix(3, gated=True))
    attachment = Attachment(tiny.build(model_type), kinds)
    weights = tiny.draw(attachment.sites, scale=0.3)
    exact = bound(attachment, weights, batch)
    model = tiny.build(model_type)
    if how != "autocast":
        model = model.to(getattr(torch, how))
    other = Attachment(model, kinds)
    for old, new in zip(attachment.sites, other.sites, strict=True):
        assert new.unit.dtype == torch.float32
        torch.testing.assert_close(new.unit, old.unit, rtol=0.05, atol=0)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"),
        other.bind(weights, batch["attention_mask"]),
    ):
        output = model(**batch)[0]
    output.float().sum().backward()
    assert all(w.grad is not None and w.grad.dtype == torch.float32 for w in weights.values())
    if how != "autocast":
        assert output.dtype == getattr(torch, how)
    real = batch["attention_mask"].bool()
    difference = (output.float() - exact)[real].abs()
    assert difference.mean() < 0.1 * exact[real].abs().mean()


def test_a_projection_kept_in_float32():
    # as Hugging Face keeps T5's last one when the rest is loaded in half precision
    model, batch = tiny.build("t5").to(torch.bfloat16), tiny.inputs()
    for block in model.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    attachment = Attachment(model, (Adapter(size=4, gated=True), LoRA(("ffn_out",), rank=3)))
    assert bound(attachment, tiny.draw(attachment.sites), batch).isfinite().all()


def test_autocast_entered_inside_bind_computes_in_its_dtype():
    batch, model = tiny.inputs(), tiny.build("bert")
    attachment = Attachment(model, KINDS)
    weights, dtypes = tiny.draw(attachment.sites), []
    query = model.encoder.layer[1].attention.self.query
    query.register_forward_hook(lambda m, args, out: dtypes.append(out.dtype))
    with attachment.bind(weights, batch["attention_mask"]), torch.autocast("cpu", torch.bfloat16):
        run(model, batch)
    assert dtypes == [torch.bfloat16]


@pytest.mark.parametrize("kinds", [(), *((kind,) for kind in KINDS)])
def test_rows_that_particles_cannot_share_are_an_error(kinds):
    model, batch = tiny.build("bert"), tiny.inputs(rows=4)
    attachment = Attachment(model, kinds)
    weights = tiny.draw(attachment.sites, particles=3)
    if kinds:
        with pytest.raises(ConfigError, match=r"4 rows.*3 particles"):
            bound(attachment, weights, batch)
    else:
        assert torch.equal(bound(attachment, weights, batch), run(model, batch))
