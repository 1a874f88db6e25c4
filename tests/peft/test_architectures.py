"""Every supported architecture under every kind: what must hold whatever the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, T5Model

from bhpeft_pyro.errors import ArchitectureError
from bhpeft_pyro.peft import (
    Adapter,
    Architecture,
    Attachment,
    LoRA,
    Part,
    Prefix,
    register_architecture,
)
from bhpeft_pyro.peft import architectures as registry
from bhpeft_pyro.peft.architectures import positions_of

TARGETS = ("query", "key", "value", "output", "ffn_in", "ffn_out")
GATED_FFN = ("modernbert", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
all_types = pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)


def all_kinds(model_type, gated=False):
    gate_target = ("ffn_gate",) if model_type in GATED_FFN else ()
    kinds = [
        LoRA(TARGETS + gate_target, rank=3, gated=gated),
        Adapter(size=4, gated=gated),
        Prefix(3, gated=gated),
    ]
    return kinds[:2] if model_type in tiny.WITHOUT_PREFIX else kinds


def run(model, batch):
    return model(**batch).last_hidden_state


@pytest.fixture
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))


@all_types
@pytest.mark.parametrize("gated", [False, True])
def test_padding_changes_nothing(model_type, gated):
    model = tiny.build(model_type)
    attachment = Attachment(model, all_kinds(model_type, gated))
    weights = tiny.draw(attachment.sites)
    short = tiny.inputs(rows=2, length=6, padded=0)
    pad = model.config.pad_token_id or 0
    ids = torch.nn.functional.pad(short["input_ids"], (0, 4), value=pad)
    mask = torch.nn.functional.pad(short["attention_mask"], (0, 4))
    with torch.no_grad(), attachment.bind(weights, short["attention_mask"]):
        alone = run(model, short)
    with torch.no_grad(), attachment.bind(weights, mask):
        padded = run(model, {"input_ids": ids, "attention_mask": mask})[:, :6]
    torch.testing.assert_close(padded, alone, atol=1e-4, rtol=1e-4)


@all_types
@pytest.mark.parametrize("gated", [False, True])
def test_folded_particles_equal_a_loop(model_type, gated):
    model, batch = tiny.build(model_type), tiny.inputs(rows=6)
    attachment = Attachment(model, all_kinds(model_type, gated))
    weights = tiny.draw(attachment.sites, particles=3)
    with torch.no_grad(), attachment.bind(weights, batch["attention_mask"]):
        folded = run(model, batch)
    for s in range(3):
        rows = {name: value[2 * s : 2 * s + 2] for name, value in batch.items()}
        one = {name: value[s : s + 1] for name, value in weights.items()}
        with torch.no_grad(), attachment.bind(one, rows["attention_mask"]):
            looped = run(model, rows)
        torch.testing.assert_close(folded[2 * s : 2 * s + 2], looped, atol=1e-4, rtol=1e-4)


@all_types
@pytest.mark.parametrize("which", ["lora", "adapter", "sequential", "prefix", "all"])
def test_every_site_gets_a_gradient_and_the_backbone_none(model_type, which):
    kinds = {
        "lora": [LoRA(TARGETS, rank=3)],
        "adapter": [Adapter(size=4)],
        "sequential": [Adapter(size=4, placement="sequential", activation="gelu")],
        "prefix": [Prefix(3)],
        "all": all_kinds(model_type, gated=True),
    }[which]
    model, batch = tiny.build(model_type), tiny.inputs()
    if model_type in tiny.WITHOUT_PREFIX and which == "prefix":
        with pytest.raises(ArchitectureError, match=f"prefix.*{model_type}.*LoRA and Adapter work"):
            Attachment(model, kinds)
        return
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attachment = Attachment(model, kinds)
    weights = tiny.draw(attachment.sites, particles=2)
    with attachment.bind(weights, batch["attention_mask"]):
        output = run(model, batch)
    probe = torch.randn(output.shape, generator=torch.Generator().manual_seed(0))
    (output * probe).sum().backward()
    for site in attachment.sites:
        gradient = weights[site.name].grad
        assert gradient is not None and gradient.isfinite().all(), site.name
        # one number a particle and, if the site is stacked, a layer
        parts = gradient.flatten(2 if site.layers else 1) if gradient.ndim > 2 else gradient
        assert (parts.abs() if parts.ndim < 3 else parts.abs().sum(-1)).gt(0).all(), site.name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@all_types
def test_outside_bind_and_switched_off_the_backbone_is_as_before(model_type):
    model, batch = tiny.build(model_type).requires_grad_(False), tiny.inputs()
    frozen = run(model, batch)
    attachment = Attachment(model, all_kinds(model_type))
    assert torch.equal(run(model, batch), frozen)
    assert attachment.hidden_size == frozen.shape[-1]
    with torch.no_grad(), attachment.bind(tiny.draw(attachment.sites), batch["attention_mask"]):
        assert not torch.allclose(run(model, batch), frozen, atol=1e-2)
    assert torch.equal(run(model, batch), frozen)
    off = Attachment(model, all_kinds(model_type)[:2])
    weights = tiny.draw(off.sites)
    weights |= {k: torch.zeros_like(v) for k, v in weights.items() if k.endswith((".B", ".up"))}
    with torch.no_grad(), off.bind(weights, batch["attention_mask"]):
        torch.testing.assert_close(run(model, batch), frozen, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("model_type", ["bert", "modernbert", "gpt2", "llama", "gemma3_text"])
def test_without_a_mask_equals_an_all_ones_mask(model_type):
    # Hugging Face then leaves the mask out and, in decoders, relies on sdpa's causal flag.
    model = tiny.build(model_type)
    attachment = Attachment(model, all_kinds(model_type))
    weights, batch = tiny.draw(attachment.sites), tiny.inputs(padded=0)
    with torch.no_grad(), attachment.bind(weights):
        masked, bare = run(model, batch), run(model, {"input_ids": batch["input_ids"]})
    torch.testing.assert_close(bare, masked, atol=1e-5, rtol=1e-5)


@all_types
def test_it_runs_on_as_many_tokens_as_it_has_positions_for(model_type):
    options = {"n_positions": 40} if model_type == "gpt2" else {"max_position_embeddings": 40}
    model = tiny.build(model_type, **({} if model_type == "t5" else options))
    most = positions_of(model)
    rotary = model_type in (*GATED_FFN, "t5")
    assert (most is None) == rotary
    ids = tiny.inputs(rows=2, length=(most or 70) + 1, padded=0)["input_ids"]
    with torch.no_grad():
        run(model, {"input_ids": ids if rotary else ids[:, :most]})
        if not rotary:
            with pytest.raises((RuntimeError, IndexError)):
                run(model, {"input_ids": ids})


# Declarations.


def test_an_unknown_architecture_is_named_and_can_be_declared(own_registry):
    config = AutoConfig.for_model(
        "phi3",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=tiny.VOCABULARY,
        pad_token_id=0,
    )
    model, batch = AutoModel.from_config(config).eval(), tiny.inputs()
    with pytest.raises(ArchitectureError) as caught:
        Attachment(model, (LoRA(rank=3),))
    for part in ("'phi3'", "modernbert", "gpt2", "register_architecture(", "layers="):
        assert part in str(caught.value)

    def heads(config):  # fused into parts of unequal width
        size = config.hidden_size // config.num_attention_heads
        own = size * config.num_key_value_heads
        return config.hidden_size, own, own

    phi3 = Architecture(
        layers="layers",
        query=Part("self_attn.qkv_proj", 0, heads),
        key=Part("self_attn.qkv_proj", 1, heads),
        value=Part("self_attn.qkv_proj", 2, heads),
        output="self_attn.o_proj",
        ffn_gate=Part("mlp.gate_up_proj", 0, 2),
        ffn_in=Part("mlp.gate_up_proj", 1, 2),
        ffn_out="mlp.down_proj",
        attention="self_attn",
    )
    register_architecture("phi3", phi3)
    attachment = Attachment(model, (LoRA(("query", "value"), rank=3), Adapter(size=4), Prefix(3)))
    found = {site.name: site.shape for site in attachment.sites}
    assert found["lora.value.B"] == (2, 16, 3) and found["prefix.key"] == (2, 3, 16)
    weights = tiny.draw(attachment.sites)
    seen = {}
    qkv = model.layers[0].self_attn.qkv_proj
    handle = qkv.register_forward_hook(lambda m, a, out: seen.update(x=a[0], out=out))
    with attachment.bind(weights, batch["attention_mask"]):
        run(model, batch)
    handle.remove()
    with torch.no_grad():
        delta = seen["out"] - qkv(seen["x"])
        scale = 16 / 3
        for target, columns in {"query": slice(0, 32), "value": slice(48, 64)}.items():
            a, b = weights[f"lora.{target}.A"][0, 0], weights[f"lora.{target}.B"][0, 0]
            expected = scale * seen["x"] @ a.T @ b.T
            torch.testing.assert_close(delta[..., columns], expected, atol=1e-4, rtol=1e-4)
        assert delta[..., 32:48].abs().max() < 1e-5  # the keys


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (LoRA(rank=3), {"query": "attention.output.LayerNorm"}, "linear module.*LayerNorm"),
        (LoRA(), {"query": Part("attention.self.query", 0, 3)}, "not fit an output of width 32"),
        (LoRA(), {"query": Part("attention.self.query", 2, 2)}, "do not fit"),
        (Prefix(), {"attention": "attention"}, "BertAttention showed no keys .* interface"),
    ],
)
def test_a_wrong_declaration_is_an_error(kind, changes, message, own_registry):
    register_architecture("bert", replace(registry.architecture_of("bert"), **changes))
    with pytest.raises(ArchitectureError, match=message):
        Attachment(tiny.build("bert"), (kind,))


class ByKeyword(nn.Module):
    """A layer that gets its hidden states by keyword."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states, attention_mask, *_, **__):
        return self.layer(hidden_states=hidden_states, attention_mask=attention_mask)


def test_layers_that_are_called_by_keyword(own_registry):
    batch, kinds = tiny.inputs(), (LoRA(rank=3, layers=(-1,)), Adapter(size=4, layers=(-1,)))
    plain, model = Attachment(tiny.build("bert"), kinds), tiny.build("bert")
    model.encoder.layer = nn.ModuleList(ByKeyword(layer) for layer in model.encoder.layer)
    register_architecture(
        "bert", replace(registry.architecture_of("bert"), layers="encoder.layer.*")
    )
    attachment, weights = Attachment(model, kinds), tiny.draw(plain.sites)
    assert torch.equal(tiny.bound(attachment, weights, batch), tiny.bound(plain, weights, batch))
    assert (plain.constant, attachment.constant) == (1, 0)  # which are skipped
    means = [some.layer_means(batch, batch["attention_mask"]) for some in (plain, attachment)]
    assert all(map(torch.equal, *means))


def test_an_encoder_decoder_is_an_error():
    model = T5Model(tiny.config("t5", is_encoder_decoder=True))
    with pytest.raises(ArchitectureError, match="T5EncoderModel"):
        Attachment(model, (LoRA(rank=3),))
