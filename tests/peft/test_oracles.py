"""The kinds against other code that computes the same: peft, key/value caches, formulas."""

from __future__ import annotations

import inspect
import sys

import peft
import pytest
import tiny
import torch
from torch import nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bhpeft_pyro.peft import Adapter, Attachment, LoRA, Prefix

ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "modernbert", "t5")
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


def run(model, batch):
    return model(**batch).last_hidden_state


def bound(model, kinds, weights, batch):
    attachment = Attachment(model, kinds)
    with torch.no_grad(), attachment.bind(weights, batch["attention_mask"]):
        return run(model, batch)


def weights_for(model_type, kinds, particles=1):
    return tiny.draw(Attachment(tiny.build(model_type), kinds).sites, particles)


def close(ours, theirs, tolerance=1e-4):
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# ------------------------------------------------------------------------------------- LoRA


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
    close(bound(tiny.build(model_type), kinds, weights, batch), expected)


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
    close(bound(tiny.build(model_type), kinds, weights, batch), expected)


def test_lora_leaves_debertas_relative_positions_alone():
    # Query and key project the hidden states and, with the same weights, the positions. With
    # S particles the latter are shared, so by definition LoRA acts on the former only.
    model, batch, kinds = tiny.build("deberta-v2"), tiny.inputs(), [LoRA(("query", "key"), rank=3)]
    weights = weights_for("deberta-v2", kinds)
    ours = bound(tiny.build("deberta-v2"), kinds, weights, batch)

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
    close(bound(tiny.build("deberta-v2"), kinds, weights, one), ours[:1])


# ----------------------------------------------------------------------------------- prefix


@pytest.mark.parametrize(
    "model_type",
    ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "bert"],
)
def test_prefix_equals_a_filled_cache(model_type):
    options = {"sliding_window": 64} if model_type in ("mistral", "gemma2", "gemma3_text") else {}
    if model_type == "bert":
        options = {"is_decoder": True}

    def build():
        return tiny.build(model_type, **options)

    batch, kinds, length = tiny.inputs(), [Prefix(4)], 4
    attachment = Attachment(build(), kinds)
    weights = tiny.draw(attachment.sites)
    ours = bound(build(), kinds, weights, batch)
    model = build()
    cache = DynamicCache(config=model.config)
    rows, tokens = batch["input_ids"].shape
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    with torch.no_grad():
        for layer in range(2):
            pair = [
                side.view(1, length, heads, -1).transpose(1, 2).repeat(rows, 1, 1, 1)
                for side in prefix(weights, layer)
            ]
            cache.update(*pair, layer)
        known = inspect.signature(type(model).forward).parameters
        arguments = {
            "input_ids": batch["input_ids"],
            "attention_mask": nn.functional.pad(batch["attention_mask"], (length, 0), value=1),
            "position_ids": torch.arange(tokens).expand(rows, -1),
            "cache" if "cache" in known else "past_key_values": cache,
            "use_cache": True,
        }
        expected = model(**arguments).last_hidden_state
    real = batch["attention_mask"].bool()
    close(ours[real], expected[real])


def prefix(weights, layer):
    """Keys and values of one layer, (position, out)."""
    return weights["prefix.key"][0, layer], weights["prefix.value"][0, layer].T.contiguous()


@pytest.mark.parametrize("model_type", ENCODERS)
def test_prefix_equals_keys_and_values_written_into_eager_attention(model_type, monkeypatch):
    batch, kinds = tiny.inputs(), [Prefix(4)]
    weights = weights_for(model_type, kinds)
    ours = bound(tiny.build(model_type), kinds, weights, batch)
    model = tiny.build(model_type, attn_implementation="eager")
    modules = [m for m in model.modules() if hasattr(m, "is_causal")]
    assert len(modules) == (1 if model_type == "albert" else 2)
    home = sys.modules[type(modules[0]).__module__]
    eager = home.eager_attention_forward

    def with_prefix(module, query, key, value, attention_mask, **kwargs):
        layer, (rows, heads, _, size) = modules.index(module), key.shape
        front = [side.view(4, heads, size).transpose(0, 1) for side in prefix(weights, layer)]
        key, value = (
            torch.cat([f.expand(rows, -1, -1, -1), own], 2)
            for f, own in zip(front, (key, value), strict=True)
        )
        if kwargs.get("position_bias") is not None:
            kwargs["position_bias"] = nn.functional.pad(kwargs["position_bias"], (4, 0))
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (4, 0))
        return eager(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setattr(home, "eager_attention_forward", with_prefix)
    with torch.no_grad():
        expected = run(model, batch)
    real = batch["attention_mask"].bool()
    close(ours[real], expected[real])


def test_mpnets_prefix_equals_its_formula():
    """softmax(q [P_k; K]^T / sqrt(d) + [0; bias]) [P_v; V]: a prefix has no relative position."""
    batch, kinds = tiny.inputs(length=20), [Prefix(4)]
    weights = weights_for("mpnet", kinds)
    model = tiny.build("mpnet")
    with torch.no_grad():
        h = model.embeddings(batch["input_ids"])
        rows, tokens, width = h.shape
        offsets = torch.arange(tokens)[None] - torch.arange(tokens)[:, None]
        bias = model.encoder.relative_attention_bias(
            model.encoder.relative_position_bucket(offsets)
        ).permute(2, 0, 1)
        visible = batch["attention_mask"][:, None, None, :].bool()
        for number, layer in enumerate(model.encoder.layer):
            own = layer.attention.attn
            q, k, v = (m(h).view(rows, tokens, 4, 8).transpose(1, 2) for m in (own.q, own.k, own.v))
            scores = (q @ k.mT / 8**0.5 + bias).masked_fill(~visible, -torch.inf)
            more_k, more_v = (x.view(4, 4, 8).transpose(0, 1) for x in prefix(weights, number))
            scores = torch.cat([q @ more_k.mT / 8**0.5, scores], -1)
            values = torch.cat([more_v.expand(rows, -1, -1, -1), v], 2)
            mixed = (scores.softmax(-1) @ values).transpose(1, 2).reshape(rows, tokens, width)
            x = layer.attention.LayerNorm(own.o(mixed) + h)
            h = layer.output(layer.intermediate(x), x)
    real = batch["attention_mask"].bool()
    ours = bound(tiny.build("mpnet"), kinds, weights, batch)
    close(ours[real], h[real])


@pytest.mark.parametrize(
    ("model_type", "window"), [("mistral", 5), ("gemma3_text", 5), ("modernbert", None)]
)
def test_prefix_is_visible_beyond_a_sliding_window(model_type, window):
    # What reaches the original attention is prefix, then the band of the window.
    model, length = tiny.build(model_type), 12
    attachment = Attachment(model, [Prefix(3)])
    seen = []
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, attention_mask, **kwargs):
        seen.append((module, attention_mask))
        return inner(module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy  # local to this object, see GeneralInterface
    try:
        with torch.no_grad(), attachment.bind(tiny.draw(attachment.sites)):
            run(model, tiny.inputs(rows=2, length=length, padded=0))
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    sliding = [a for m, a in seen if model_type == "mistral" or m.sliding_window]
    mask = sliding[0]
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    if window is None:  # a window to both sides
        reach = model.config.sliding_window
        band = (i - j).abs() <= reach
        assert 0 < reach < length - 1
    else:
        band = (j <= i) & (i - j < window)
    expected = torch.cat([torch.ones(length, 3, dtype=torch.bool), band], 1)
    assert torch.equal(mask, expected.expand(2, 1, -1, -1))


def test_shared_encoder_equals_its_formula():
    batch, kinds = tiny.inputs(), [Prefix(5, encoder=3)]
    weights = weights_for("llama", kinds, particles=2)
    direct = {"prefix.key": [], "prefix.value": []}
    for s in range(2):
        hidden = torch.tanh(weights["prefix.embedding"][s] @ weights["prefix.down"][s].T)
        for kv, name in enumerate(direct):
            layers = [hidden @ weights["prefix.up"][s, layer, kv].T for layer in range(2)]
            direct[name].append(torch.stack(layers))
    written = {name: torch.stack(parts) for name, parts in direct.items()}
    written["prefix.value"] = written["prefix.value"].mT
    expected = bound(tiny.build("llama"), [Prefix(5)], written, batch)
    close(bound(tiny.build("llama"), kinds, weights, batch), expected, 1e-5)


# --------------------------------------------------------------------------------- adapters

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
    close(bound(tiny.build(model_type), [kind], weights, batch), expected)


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
    close(bound(tiny.build("bert"), [kind], weights, batch), h)


# ------------------------------------------------------------------------------------ gates


def gate_of(x, mask, weights, kind):
    """mean over real tokens of sigmoid(w.x + b), one an example."""
    logits = x @ weights[f"{kind}.gate.weight"][0, 0] + weights[f"{kind}.gate.bias"][0, 0]
    opened, real = torch.sigmoid(logits), mask.float()
    return (opened * real).sum(1) / real.sum(1)


@pytest.mark.parametrize("name", ["lora", "adapter", "sequential", "prefix"])
@pytest.mark.parametrize("model_type", ["bert", "opt"])
def test_gates_equal_their_formula(name, model_type):
    # On the first layer what a gate reads is that of the frozen model. A gated kind then equals
    # the ungated one whose output side is scaled row by row, each row a particle of its own.
    batch = tiny.inputs()
    rows = len(batch["input_ids"])

    def kinds(gated):
        return {
            "lora": LoRA(("query", "ffn_out"), rank=3, gated=gated, layers=(0,)),
            "adapter": Adapter(size=4, gated=gated, layers=(0,)),
            "sequential": Adapter(size=4, placement="sequential", gated=gated, layers=(0,)),
            "prefix": Prefix(3, gated=gated, layers=(0,)),
        }[name]

    weights = weights_for(model_type, [kinds(True)])
    model, reads = tiny.build(model_type), {}
    layer = model.encoder.layer[0] if model_type == "bert" else model.decoder.layers[0]
    bert = model_type == "bert"
    query = layer.attention.self.query if bert else layer.self_attn.q_proj
    query.register_forward_hook(lambda m, args, out: reads.update(attention=args[0]))
    first, last = (layer.intermediate.dense, layer.output.dense) if bert else (layer.fc1, layer.fc2)
    first.register_forward_hook(lambda m, args, out: reads.update(adapter=args[0]))
    last.register_forward_hook(lambda m, args, out: reads.update(sequential=out))
    with torch.no_grad():
        run(model, batch)
    x = reads[name if name in reads else "attention"]
    x = x.reshape(rows, -1, x.shape[-1])
    gate = gate_of(x, batch["attention_mask"], weights, "adapter" if "se" in name else name)
    assert gate.std() > 0.02  # the rows do differ
    scaled = {}
    for site, value in weights.items():
        if ".gate." not in site:
            value = value.repeat(rows, *[1] * (value.ndim - 1))
            if site.endswith((".B", ".up", ".key", ".value")):
                value = value * gate.view(-1, *[1] * (value.ndim - 1))
            scaled[site] = value
    expected = bound(tiny.build(model_type), [kinds(False)], scaled, batch)
    close(bound(tiny.build(model_type), [kinds(True)], weights, batch), expected)
