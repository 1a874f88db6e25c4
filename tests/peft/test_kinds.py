"""Sites, layers, presets, and the errors of bad options."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import bound, close, run, weights_for
from torch import nn

from bhpeft_pyro.errors import ArchitectureError, BHPEFTError, ConfigError
from bhpeft_pyro.peft import Adapter, Attachment, LoRA, Prefix, presets


def shapes(attachment):
    return {site.name: (site.shape, site.dims, site.layers) for site in attachment.sites}


def test_sites_of_lora_and_adapter():
    attachment = Attachment(
        tiny.build("bert"), (Adapter(size=5), LoRA(("query", "ffn_in"), rank=3))
    )
    layers = (0, 1)
    assert shapes(attachment) == {
        "lora.query.A": ((2, 3, 32), ("layer", "rank", "in"), layers),
        "lora.query.B": ((2, 32, 3), ("layer", "out", "rank"), layers),
        "lora.ffn_in.A": ((2, 3, 32), ("layer", "rank", "in"), layers),
        "lora.ffn_in.B": ((2, 48, 3), ("layer", "out", "rank"), layers),
        "adapter.down": ((2, 5, 32), ("layer", "bottleneck", "in"), layers),
        "adapter.up": ((2, 32, 5), ("layer", "out", "bottleneck"), layers),
    }


def test_sites_of_a_gated_prefix_with_grouped_heads():
    attachment = Attachment(tiny.build("llama"), (Prefix(7, layers=(-1,), gated=True),))
    assert shapes(attachment) == {
        "prefix.key": ((1, 7, 16), ("layer", "position", "in"), (1,)),
        "prefix.value": ((1, 16, 7), ("layer", "out", "position"), (1,)),
        "prefix.gate.weight": ((1, 32), ("layer", "in"), (1,)),
        "prefix.gate.bias": ((1,), ("layer",), (1,)),
    }


@pytest.mark.parametrize("model_type", tiny.MODEL_TYPES)
def test_units_and_starts_fit_their_sites(model_type):
    kinds = presets.unipelt()[: 2 if model_type in tiny.WITHOUT_PREFIX else 3]
    model, batch = tiny.build(model_type), tiny.inputs()
    frozen = run(model, batch)
    attachment = Attachment(model, kinds)
    for site in attachment.sites:
        assert torch.broadcast_shapes(site.unit.shape, site.shape) == site.shape
        assert (site.unit > 0).all() and site.unit.isfinite().all()
        start = site.init()
        assert start.shape == site.shape and start.dtype == torch.float32
        assert (start == 0).all()  # `anchor` is where a prior may lie
    # B and up are zero, so without a prefix the start is the frozen model
    weights = {site.name: site.init()[None] for site in attachment.sites}
    if model_type in tiny.WITHOUT_PREFIX:
        with attachment.bind(weights, batch["attention_mask"]):
            torch.testing.assert_close(run(model, batch), frozen)


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5"])
def test_a_kind_on_some_layers_equals_it_on_all_with_zeros_elsewhere(model_type):
    batch = tiny.inputs()
    some = Attachment(tiny.build(model_type), (LoRA(rank=3, layers=(-1,)),))
    every = Attachment(tiny.build(model_type), (LoRA(rank=3),))
    weights = tiny.draw(every.sites)
    for name in weights:
        if name.endswith(".B"):
            weights[name] = weights[name] * torch.tensor([0.0, 1.0]).view(1, 2, 1, 1)
    last = {name: value[:, 1:] for name, value in weights.items()}
    with some.bind(last, batch["attention_mask"]):
        ours = run(some.backbone, batch)
    with every.bind(weights, batch["attention_mask"]):
        expected = run(every.backbone, batch)
    torch.testing.assert_close(ours, expected)


def test_layers_keep_their_numbers_and_shared_ones_have_one_row():
    model = tiny.build("bert", num_hidden_layers=3)
    sites = Attachment(model, (LoRA(rank=3, layers=(-1, 0)),)).sites
    assert all(site.layers == (0, 2) and site.shape[0] == 2 for site in sites)
    model = tiny.build("albert", num_hidden_layers=5)
    attachment = Attachment(model, (LoRA(rank=3), Prefix(2)))
    assert all(site.shape[0] == 1 and site.layers == (0,) for site in attachment.sites)
    groups = tiny.build("albert", num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2)
    assert Attachment(groups, (LoRA(rank=3),)).sites[0].layers == (0, 1, 2, 3)


def test_layers_of_differing_width_are_an_error_unless_left_out():
    model = tiny.build("bert")
    with pytest.raises(KeyError, match="ffn_gate"):
        Attachment(model, (LoRA(("ffn_gate",), rank=3),))
    layer = model.encoder.layer[0]
    layer.intermediate.dense = nn.Linear(32, 64)
    layer.output.dense = nn.Linear(64, 32)
    with pytest.raises(ArchitectureError, match=r"lora.ffn_in.B: .*\(48, 3\), \(64, 3\)"):
        Attachment(model, (LoRA(("ffn_in",), rank=3),))
    sites = Attachment(model, (LoRA(("ffn_in",), rank=3, layers=(1,)), Adapter(size=4))).sites
    assert [site.shape for site in sites[:2]] == [(1, 3, 32), (1, 48, 3)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRA(("query", "keys")), "lora: targets=.*keys"),
        (lambda: LoRA(rank=0), "rank=0"),
        (lambda: Adapter(placement="serial"), "placement="),
        (lambda: Prefix(0), "length=0"),
        (lambda: Attachment(tiny.build("bert"), (LoRA(), LoRA(rank=2))), "at most once"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, BHPEFTError)


def test_presets():
    names = {
        "bh_peft": ["lora", "adapter", "prefix"],
        "mam": ["adapter", "prefix"],
        "unipelt": ["lora", "adapter", "prefix"],
        "lora": ["lora"],
        "adapter": ["adapter"],
        "prefix": ["prefix"],
        "head_only": [],
    }
    for name, expected in names.items():
        kinds = getattr(presets, name)()
        assert [kind.name for kind in kinds] == expected
        Attachment(tiny.build("bert"), kinds)
    assert presets.bh_peft() == (
        LoRA(("query", "value"), rank=8, alpha=16.0),
        Adapter(size=8, scale=4.0, placement="parallel"),
        Prefix(length=10),
    )
    assert presets.mam() == (Adapter(size=8, scale=4.0), Prefix(length=30))
    assert all(kind.gated for kind in presets.unipelt())
    assert presets.lora(rank=2) == (LoRA(rank=2),)


# Gates.


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
    expected = bound(Attachment(tiny.build(model_type), [kinds(False)]), scaled, batch)
    close(bound(Attachment(tiny.build(model_type), [kinds(True)]), weights, batch), expected)
