"""LoRA and adapters against other code that computes the same: peft, hooks, formulas."""

from __future__ import annotations

import peft
import pytest
import tiny
import torch
from tiny import bound, close, run, weights_for
from torch import nn

from bhpeft_pyro.peft import Adapter, Attachment, LoRA

# Where each architecture keeps the projections, written down a second time, for peft.
MODULES = {
    "bert": {"query": "query", "value": "value", "ffn_in": "intermediate.dense"},
    "mpnet": {"query": "attn.q", "value": "attn.v", "output": "attn.o"},
    "distilbert": {"query": "q_lin", "key": "k_lin", "output": "out_lin"},
    "albert": {"query": "query", "ffn_out": "ffn_output"},
    "t5": {"query": "SelfAttention.q", "ffn_in": "wi_1", "ffn_gate": "wi_0", "ffn_out": "wo"},
    "opt": {"key": "k_proj", "output": "out_proj", "ffn_in": "fc1"},
    "llama": {"query": "q_proj", "value": "v_proj", "ffn_gate": "gate_proj", "ffn_in": "up_proj"},
    "qwen3": {"query": "q_proj", "key": "k_proj", "ffn_out": "down_proj"},
    "gpt2": {"output": "attn.c_proj", "ffn_in": "c_fc", "ffn_out": "mlp.c_proj"},
    "deberta-v2": {"value": "value_proj", "ffn_out": "output.dense"},
}


@pytest.mark.parametrize("model_type", MODULES)
def test_lora_equals_peft(model_type):
    modules, batch = MODULES[model_type], tiny.inputs()
    kinds = [LoRA(tuple(modules), rank=3, alpha=5.0)]
    weights = weights_for(model_type, kinds)
    options = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=list(modules.values()))
    theirs = peft.get_peft_model(tiny.build(model_type), options)
    seen = dict.fromkeys(modules, 0)
    with torch.no_grad():
        for name, module in theirs.named_modules():
            for target, path in modules.items():
                if hasattr(module, "lora_A") and name.endswith("." + path):
                    if model_type == "deberta-v2" and "attention.output" in name:
                        module.lora_B["default"].weight.zero_()
                        continue
                    module.lora_A["default"].weight.copy_(
                        weights[f"lora.{target}.A"][0, seen[target]]
                    )
                    module.lora_B["default"].weight.copy_(
                        weights[f"lora.{target}.B"][0, seen[target]]
                    )
                    seen[target] += 1
        assert set(seen.values()) == {1 if model_type == "albert" else 2}
        expected = run(theirs.eval(), batch)
    close(bound(Attachment(tiny.build(model_type), kinds), weights, batch), expected)


@pytest.mark.parametrize(
    ("model_type", "path", "targets"),
    [
        ("gpt2", "c_attn", ("query", "key", "value")),
        ("gpt2", "c_attn", ("value", "query")),
        ("modernbert", "Wqkv", ("query", "value")),
        ("modernbert", "Wi", ("ffn_gate", "ffn_in")),
    ],
)
def test_lora_on_parts_of_a_fused_projection_equals_peft(model_type, path, targets):
    batch, rank = tiny.inputs(), 2
    kinds = [LoRA(targets, rank=rank, alpha=3.0)]
    weights = weights_for(model_type, kinds)
    # One LoRA on the whole: A's stacked, B's block-diagonal, and the same alpha / rank.
    total = rank * len(targets)
    options = peft.LoraConfig(
        r=total,
        lora_alpha=3.0 * len(targets),
        target_modules=[path],
        fan_in_fan_out=model_type == "gpt2",
    )
    theirs = peft.get_peft_model(tiny.build(model_type), options)
    found = [m for n, m in theirs.named_modules() if n.endswith(path) and hasattr(m, "lora_A")]
    assert len(found) == 2
    order = ("ffn_gate", "ffn_in") if path == "Wi" else ("query", "key", "value")
    with torch.no_grad():
        for layer, module in enumerate(found):
            whole = module.lora_B["default"].weight.zero_()
            width = whole.shape[0] // len(order)
            for i, target in enumerate(targets):
                ranks = slice(rank * i, rank * (i + 1))
                columns = slice(width * order.index(target), width * (order.index(target) + 1))
                a, b = weights[f"lora.{target}.A"], weights[f"lora.{target}.B"]
                module.lora_A["default"].weight[ranks] = a[0, layer]
                whole[columns, ranks] = b[0, layer]
        expected = run(theirs.eval(), batch)
    close(bound(Attachment(tiny.build(model_type), kinds), weights, batch), expected)


def test_lora_leaves_debertas_relative_positions_alone():
    # Query and key project the hidden states and, with the same weights, the positions. With
    # S particles the latter are shared, so by definition LoRA acts on the former only.
    model, batch, kinds = tiny.build("deberta-v2"), tiny.inputs(), [LoRA(("query", "key"), rank=3)]
    weights = weights_for("deberta-v2", kinds)
    ours = bound(Attachment(tiny.build("deberta-v2"), kinds), weights, batch)

    def change(layer, target):
        delta = (
            (16 / 3) * weights[f"lora.{target}.B"][0, layer] @ weights[f"lora.{target}.A"][0, layer]
        )

        def hook(module, args, output):
            return output if args[0].shape[0] == 1 else output + args[0] @ delta.T

        return hook

    for layer, block in enumerate(model.encoder.layer):
        block.attention.self.query_proj.register_forward_hook(change(layer, "query"))
        block.attention.self.key_proj.register_forward_hook(change(layer, "key"))
    with torch.no_grad():
        close(ours, run(model, batch))
    # and one row alone is not taken for positions
    one = {name: value[:1] for name, value in batch.items()}
    close(bound(Attachment(tiny.build("deberta-v2"), kinds), weights, one), ours[:1])


# Modules that are a whole feed-forward block, whatever is inside.
FEED_FORWARD = {
    "distilbert": "transformer.layer.{}.ffn",
    "modernbert": "layers.{}.mlp",
    "gpt2": "h.{}.mlp",
    "llama": "layers.{}.mlp",
    "gemma2": "layers.{}.mlp",
    "t5": "encoder.block.{}.layer.1.DenseReluDense",
}


def branch(x, weights, layer, kind):
    activation = {"relu": torch.relu, "tanh": torch.tanh}[kind.activation]
    down, up = weights["adapter.down"][0, layer], weights["adapter.up"][0, layer]
    return kind.scale * activation(x @ down.T) @ up.T


@pytest.mark.parametrize("model_type", FEED_FORWARD)
@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_adapter_equals_a_wrapped_feed_forward_block(model_type, placement):
    kind = Adapter(size=4, scale=2.5, placement=placement, activation="tanh")
    weights, batch = weights_for(model_type, [kind]), tiny.inputs()
    model = tiny.build(model_type)
    for layer in range(2):

        def hook(module, args, output, layer=layer):
            x = args[0] if placement == "parallel" else output
            return output + branch(x, weights, layer, kind)

        model.get_submodule(FEED_FORWARD[model_type].format(layer)).register_forward_hook(hook)
    with torch.no_grad():
        expected = run(model, batch)
    close(bound(Attachment(tiny.build(model_type), [kind]), weights, batch), expected)


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_adapter_equals_a_handwritten_bert_layer(placement):
    """LayerNorm(x + FFN(x) + s * W_up ReLU(W_down x)): the paper's formula, spelled out."""
    kind = Adapter(size=4, scale=4.0, placement=placement)
    weights, batch = weights_for("bert", [kind]), tiny.inputs()
    model = tiny.build("bert")
    with torch.no_grad():
        h = model.embeddings(batch["input_ids"])
        hidden = batch["attention_mask"][:, None, None, :].bool()
        for number, layer in enumerate(model.encoder.layer):
            own = layer.attention.self
            q, k, v = (
                m(h).view(*h.shape[:2], 4, 8).transpose(1, 2)
                for m in (own.query, own.key, own.value)
            )
            scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~hidden, -torch.inf)
            context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(h.shape)
            out = layer.attention.output
            x = out.LayerNorm(out.dense(context) + h)
            ffn = layer.output.dense(nn.functional.gelu(layer.intermediate.dense(x)))
            added = branch(x if placement == "parallel" else ffn, weights, number, kind)
            h = layer.output.LayerNorm(x + ffn + added)
    close(bound(Attachment(tiny.build("bert"), [kind]), weights, batch), h)
