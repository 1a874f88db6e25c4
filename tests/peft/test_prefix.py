"""Prefixes against key/value caches, other attention functions, and formulas."""

from __future__ import annotations

import inspect
import sys

import pytest
import tiny
import torch
from tiny import bound, close, run, weights_for
from torch import nn
from transformers import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bhpeft_pyro.peft import Attachment, Prefix

ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "modernbert", "t5")


@pytest.mark.parametrize(
    "model_type",
    ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text", "bert"],
)
def test_prefix_equals_a_filled_cache(model_type):
    options = {"sliding_window": 64} if model_type in ("mistral", "gemma3_text") else {}
    if model_type == "bert":
        options = {"is_decoder": True}

    def build():
        return tiny.build(model_type, **options)

    batch, kinds, length = tiny.inputs(), [Prefix(4)], 4
    attachment = Attachment(build(), kinds)
    weights = tiny.draw(attachment.sites)
    ours = bound(Attachment(build(), kinds), weights, batch)
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
    ours = bound(Attachment(tiny.build(model_type), kinds), weights, batch)
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
