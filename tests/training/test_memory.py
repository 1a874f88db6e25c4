"""Memory foretold from shapes alone equals what a real forward pass keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModel, LlamaConfig, PreTrainedModel

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, GuideError
from bhpeft_pyro.guides import budget
from bhpeft_pyro.model.backbone import load_backbone
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

LORA = bh.presets.lora(rank=2)


def without_weights(config: object) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModel.from_config(config)


def really_kept(backbone: PreTrainedModel) -> int:
    network = bh.RandomPEFT(backbone, LORA)
    weights = {s.name: s.init()[None].requires_grad_() for s in network.attachment.sites}
    frozen = {weight.data_ptr() for weight in backbone.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda x: x), network.attachment.bind(weights):
        backbone(torch.ones(3, 9, dtype=torch.long))
    return sum(x.untyped_storage().nbytes() for at, x in held.items() if at not in frozen)


def test_activations_are_those_of_a_real_pass() -> None:
    real = tiny_backbone()
    plan = bh.plan(without_weights(real.config), LORA, batch_size=3, tokens=9)
    assert plan.activations == pytest.approx(really_kept(real), rel=0.1)
    longer = bh.plan(without_weights(real.config), LORA, batch_size=3, tokens=18)
    assert 1.9 * plan.activations < longer.activations
    assert plan.checkpointed < 0.8 * plan.activations


def test_a_plan_does_not_depend_on_checkpointing_and_leaves_it_on() -> None:
    backbone = without_weights(tiny_backbone().config)
    expected = bh.plan(backbone, LORA)
    backbone.gradient_checkpointing_enable()
    assert bh.plan(backbone, LORA) == expected
    assert backbone.is_gradient_checkpointing


def test_lower_layers_without_peft_weights_keep_nothing() -> None:
    backbone = without_weights(tiny_backbone().config)
    upper = bh.plan(backbone, bh.peft.LoRA(("query",), 2, layers=[1]), tokens=9)
    both = bh.plan(backbone, bh.peft.LoRA(("query",), 2), tokens=9)
    assert 0 < upper.activations < 0.7 * both.activations


def test_texts_may_be_as_long_as_the_table_of_positions() -> None:
    config = tiny_backbone().config
    most = config.max_position_embeddings
    plans = [bh.plan(without_weights(config), LORA, tokens=n) for n in (most - 1, most, 2 * most)]
    assert plans[0].activations < plans[1].activations == plans[2].activations


def test_weights_are_counted_in_their_own_precision() -> None:
    real = tiny_backbone()
    plan = bh.plan(without_weights(real.config), LORA)
    assert plan.backbone >= sum(p.nbytes for p in real.parameters())
    half = bh.plan(without_weights(real.config).to(torch.bfloat16), LORA)
    assert half.backbone < 0.6 * plan.backbone


@pytest.mark.slow
def test_eight_billion_parameters_fit_the_default_limit() -> None:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_key_value_heads": 8}
    config = LlamaConfig(vocab_size=1000, num_hidden_layers=32, **sizes)
    backbone = without_weights(config)
    plan = bh.plan(backbone, bh.presets.lora(rank=8), batch_size=1, tokens=8)
    assert plan.guide.latents == 32 * (8 * (4096 + 4096) + 8 * (4096 + 1024)) + 2 * 4097
    plan.guide.check(2**33)
    bh.plan(backbone, bh.presets.bh_peft(), batch_size=1, tokens=8).guide.check(2**33)


@pytest.mark.parametrize("guide", ["normal", "delta", "AutoNormal"])
def test_other_guides(guide: str) -> None:
    plan = bh.plan(without_weights(tiny_backbone().config), LORA, bh.Head(3), guide)
    assert plan.guide == budget(guide, plan.guide.latents)


def test_a_backbone_with_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"it is on cpu.*device=.meta"):
        bh.plan(tiny_backbone())
    with pytest.raises(GuideError, match="unknown guide 'other'"):
        bh.plan(without_weights(tiny_backbone().config), guide="other")


def test_a_backbone_by_name_reads_no_weights(tmp_path: object) -> None:
    tiny_backbone().config.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    backbone, _ = load_backbone(str(tmp_path), device="meta")
    assert "transformer" in str(bh.plan(backbone))
    assert "unit unknown" in repr(bh.RandomPEFT(backbone, LORA).sites)
