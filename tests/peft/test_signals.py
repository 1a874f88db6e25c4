"""`Site.unit`: weights N(0, unit^2) give a branch the size of what it is added to."""

from __future__ import annotations

import pytest
import tiny
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bhpeft_pyro.peft import Adapter, Attachment, LoRA, Prefix
from bhpeft_pyro.peft.signals import random_tokens

MODELS = ("bert", "modernbert", "gpt2", "opt", "llama", "t5", "deberta-v2")
PARTICLES = 48


def rms(x):
    return x.float().square().mean().sqrt()


def branch_and_frozen(model_type, kind, target, layer):
    """RMS of branch and of frozen output at one projection, under draws at unit scale.

    The kind is on that layer alone, so what reaches the module is the frozen model's.
    """
    model = tiny.build(model_type)
    attachment = Attachment(model, (kind,))
    ids = random_tokens(model)[:2]
    outputs = []
    module = attachment._layers[layer].projections[target].module
    module.register_forward_hook(lambda m, a, out: outputs.append(out))
    with torch.no_grad():
        model(input_ids=ids)
        weights = tiny.draw(attachment.sites, PARTICLES)
        rows = ids.repeat(PARTICLES, 1)
        with attachment.bind(weights, torch.ones_like(rows)):
            model(input_ids=rows)
    frozen, bound = outputs
    change = bound.reshape(PARTICLES, *frozen.shape) - frozen
    return rms(change), rms(frozen)


# A gate stands between 0 and 1, so that what it lets through is less exactly foreseen.
@pytest.mark.parametrize(("gated", "tolerance"), [(False, 0.25), (True, 0.4)])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("model_type", MODELS)
def test_unit_of_lora(model_type, layer, gated, tolerance):
    kind = LoRA(("output",), rank=4, alpha=7.0, layers=(layer,), gated=gated)
    branch, frozen = branch_and_frozen(model_type, kind, "output", layer)
    assert branch / frozen == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize(("activation", "scale"), [("relu", 4.0), ("tanh", 1.0)])
@pytest.mark.parametrize("model_type", MODELS)
def test_unit_of_adapter(model_type, activation, scale, placement):
    kind = Adapter(6, scale=scale, activation=activation, placement=placement, layers=(1,))
    branch, frozen = branch_and_frozen(model_type, kind, "ffn_out", 1)
    assert branch / frozen == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("model_type", ["bert", "llama", "qwen3", "t5"])
def test_unit_of_prefix(model_type):
    """Prefix keys and values have the RMS of the layer's own, as they enter attention."""
    model = tiny.build(model_type)
    attachment = Attachment(model, (Prefix(5),))
    weights = tiny.draw(attachment.sites, PARTICLES)
    ids = random_tokens(model)
    seen = []
    inner = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, *args, **kwargs):
        seen.append((key, value))
        return inner(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = spy  # local to this object, see GeneralInterface
    try:
        with torch.no_grad(), attachment.bind(weights):
            model(input_ids=ids.repeat(PARTICLES, 1))
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    # the first layer: nothing upstream changed
    (prefix_key, key), (prefix_value, value) = (x.tensor_split([5], 2) for x in seen[0])
    assert rms(prefix_key) / rms(key) == pytest.approx(1, abs=0.15)
    assert rms(prefix_value) / rms(value) == pytest.approx(1, abs=0.15)


def test_unit_is_measured_in_each_layer():
    model = tiny.build("bert")
    with torch.no_grad():
        model.encoder.layer[1].attention.self.value.weight *= 10
        model.encoder.layer[1].attention.self.value.bias *= 10
    sites = {site.name: site for site in Attachment(model, (LoRA(rank=4), Prefix(3))).sites}
    for name in ("lora.value.B", "prefix.value"):
        first, second = sites[name].unit.flatten()
        assert second / first > 4
    first, second = sites["lora.query.B"].unit.flatten()
    assert 0.3 < second / first < 3


def test_unit_is_that_of_a_projections_own_part():
    model = tiny.build("gpt2")
    with torch.no_grad():
        model.h[0].attn.c_attn.weight[:, 64:] *= 10
        model.h[0].attn.c_attn.bias[64:] *= 10
    sites = {site.name: site for site in Attachment(model, (LoRA(rank=4),)).sites}
    assert sites["lora.value.B"].unit[0] / sites["lora.query.B"].unit[0] > 5


def test_unit_does_not_count_debertas_relative_positions():
    model = tiny.build("deberta-v2")
    first = Attachment(model, (LoRA(rank=4),)).sites[0].unit[0]
    with torch.no_grad():
        model.encoder.LayerNorm.weight.fill_(100.0)
    torch.testing.assert_close(Attachment(model, (LoRA(rank=4),)).sites[0].unit[0], first)


def test_units_are_the_same_every_time_and_leave_the_random_state_alone():
    model = tiny.build("bert")
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = Attachment(model, (LoRA(rank=4),)).sites
    torch.manual_seed(4)
    second = Attachment(model, (LoRA(rank=4),)).sites
    assert all(torch.equal(a.unit, b.unit) for a, b in zip(first, second, strict=True))
    torch.manual_seed(3)
    Attachment(model, (LoRA(rank=4), Prefix(3)))
    assert torch.equal(torch.get_rng_state(), state)
