"""Layers below the first with PEFT weights run once, and all is as if they always ran."""

from __future__ import annotations

import copy
import gc
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import MODEL_TYPES, build, draw, inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

import bhpeft_pyro as bh
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.errors import ConfigError
from bhpeft_pyro.peft import Adapter, Kind, LoRA, Prefix
from bhpeft_pyro.peft.binding import LayerForward

SKIPPED = [each for each in MODEL_TYPES if each not in ("t5", "albert")]


def kinds_of(model_type: str, layers: Sequence[int] | None = (-1,)) -> tuple[Kind, ...]:
    chosen = None if layers is None else tuple(layers)
    kinds = (
        LoRA(rank=2, gated=True, layers=chosen),
        Adapter(size=3, layers=chosen),
        Prefix(2, gated=True, layers=chosen),
    )
    return kinds[:2] if model_type == "deberta-v2" else kinds


def network_of(backbone: PreTrainedModel, layers: Sequence[int] | None = (-1,)) -> bh.RandomPEFT:
    return bh.RandomPEFT(backbone, kinds_of(backbone.config.model_type, layers), bh.Head(3))


def run(network: bh.RandomPEFT, batch: Batch, particles: int = 2) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the gradients of a random sum of them by all weights."""
    generator = torch.Generator().manual_seed(3)
    weights = draw(network.sites, particles)
    outputs = network(weights, batch)
    probe = torch.randn(outputs.shape, generator=generator)
    return outputs.detach(), [
        *torch.autograd.grad((outputs * probe).sum(), [*weights.values()], allow_unused=True)
    ]


def assert_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    torch.testing.assert_close(other[0], one[0], atol=1e-6, rtol=1e-6)
    for found, expected in zip(other[1], one[1], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def calls_of(module: nn.Module) -> list[Any]:
    calls: list[Any] = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("model_type", SKIPPED)
@pytest.mark.parametrize("split", [1, 2])
def test_outputs_and_gradients_are_the_same(model_type: str, split: int) -> None:
    network, batch = network_of(build(model_type)), Batch(inputs())
    assert network.attachment.constant == 1
    kept = replace(batch, states=network.constant_states(batch))
    expected = run(network, batch.split(split))
    calls = calls_of(network.attachment._layers[0].attention)
    assert_same(expected, run(network, kept.split(split)))
    assert not calls


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_only_the_layers_below_are_skipped_and_only_they_run_for_the_states(
    model_type: str,
) -> None:
    network = network_of(build(model_type, num_hidden_layers=5), (2, 4))
    calls = [calls_of(block.attention) for block in network.attachment._layers]
    batch = Batch(inputs())
    kept = replace(batch, states=network.constant_states(batch))
    assert [*map(len, calls)] == [1, 1, 0, 0, 0]
    outputs = run(network, kept)
    assert [*map(len, calls)] == [1, 1, 1, 1, 1]
    assert_same(run(network, batch), outputs)


@pytest.mark.parametrize("split", [1, 2])
def test_choices(split: int) -> None:
    network = network_of(build("roberta"))
    batch = Batch({name: value.unflatten(0, (2, 2)) for name, value in inputs().items()})
    states = network.constant_states(batch)
    assert states is not None and states.shape == (2, 2, 9, 32)
    assert_same(
        run(network, batch.split(split)), run(network, replace(batch, states=states).split(split))
    )


@pytest.mark.parametrize("model_type", ["t5", "albert", "bert"])
def test_where_nothing_can_be_kept_there_are_no_states(model_type: str) -> None:
    # T5's first layer hands on the positions' bias; ALBERT has one layer; here BERT's first has
    # weights.
    network = network_of(build(model_type), (0, -1) if model_type == "bert" else (-1,))
    batch = Batch(inputs())
    assert network.constant_states(batch) is None
    with pytest.raises(ConfigError, match="states: all layers have to run"):
        run(network, replace(batch, states=torch.zeros(4, 9, 32)))


def test_layers_that_run_several_times_are_not_skipped() -> None:
    backbone = build("albert", num_hidden_layers=4, inner_group_num=2)
    assert network_of(backbone).constant_states(Batch(inputs())) is None


def test_a_result_that_is_used_elsewhere_is_noticed() -> None:
    """What the first layer computes is added to the last states too."""
    backbone = build("bert")
    seen: list[Tensor] = []
    backbone.encoder.layer[0].register_forward_hook(lambda _, args, output: seen.append(output))

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + seen[-1]
        return output

    backbone.encoder.register_forward_hook(add)
    assert network_of(backbone).constant_states(Batch(inputs())) is None


def test_checkpointed_layers() -> None:
    backbone = build("gpt2")
    network, batch = network_of(backbone), Batch(inputs())
    expected = run(network, batch)
    backbone.gradient_checkpointing_enable()
    calls = calls_of(network.attachment._layers[1].attention)
    assert_same(expected, run(network, replace(batch, states=network.constant_states(batch))))
    assert len(calls) == 2  # forward, and again in the backward pass


def test_training_mode_is_refused() -> None:
    network = network_of(build("bert"))
    network.train()  # the backbone is not this module's
    batch = Batch(inputs())
    assert network.constant_states(batch) is not None
    network.backbone.train()
    with pytest.raises(ConfigError, match="training mode"):
        network.constant_states(batch)


def test_another_network_on_the_backbone_and_copies_are_not_disturbed() -> None:
    backbone, batch = build("bert"), Batch(inputs())
    plain = backbone(**batch.inputs, output_hidden_states=True).hidden_states
    whole, upper = network_of(backbone, None), network_of(backbone)
    expected = run(whole, batch), run(upper, batch)
    kept = replace(batch, states=upper.constant_states(batch))
    assert_same(expected[1], run(copy.deepcopy(upper), kept))
    assert_same(expected[0], run(whole, batch))
    after = backbone(**batch.inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(after, plain)
    del whole
    gc.collect()
    assert_same(expected[1], run(upper, kept))
    del upper
    gc.collect()
    assert not any(isinstance(layer.forward, LayerForward) for layer in backbone.encoder.layer)
