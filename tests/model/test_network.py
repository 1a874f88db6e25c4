"""The network under draws of its weights: particles, layers that stay constant, generation."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import peft
import pyro
import pyro.distributions as dist
import pytest
import tiny
import torch
from pyro import poutine
from pyro.infer import Predictive
from tiny import CAUSAL, MODEL_TYPES, attention_calls, build, draw, drawn, inputs, take
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

import bhpeft_pyro as bh
from bhpeft_pyro.data.batch import Batch
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.model.likelihoods import Likelihood, Normal, OrderedLogistic
from bhpeft_pyro.peft import Adapter, Kind, LoRA, Prefix
from bhpeft_pyro.peft.sites import Site
from bhpeft_pyro.testing import tiny_backbone, tiny_batch, tiny_examples, tiny_model, tiny_tokenizer

HYBRID = (bh.peft.LoRA(rank=2), bh.peft.Adapter(size=3), bh.peft.Prefix(length=2))


@pytest.fixture(scope="module")
def network() -> bh.RandomPEFT:
    return tiny_model(HYBRID, outputs=3).network


@pytest.mark.parametrize("particles", [(1,), (3,), (3, 1), (2, 3)])
def test_folded_draws_equal_a_loop(network: bh.RandomPEFT, particles: tuple[int, ...]) -> None:
    """Of two or more dims a last one of 1 is the data plate's place."""
    batch, weights = tiny_batch(6), drawn(network.sites, *particles)
    with torch.no_grad():
        together = network(weights, batch)
        assert together.shape == ((3,) if particles == (3, 1) else particles) + (6, 3)
        rows = together.reshape(-1, 6, 3)
        for row, index in zip(rows, product(*map(range, particles)), strict=True):
            alone = network(take(weights, *index), batch)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)
    assert len(rows) == 1 or (rows[0] - rows[1]).abs().max() > 0.1


def test_a_batch_shared_out_shows_each_draw_its_part(network: bh.RandomPEFT) -> None:
    batch, weights = tiny_batch(6), drawn(network.sites, 3, 1)
    with torch.no_grad():
        shared = network(weights, batch.split(3))
        repeated = network(weights, batch)
    assert shared.shape == (3, 2, 3)
    for s in range(3):
        torch.testing.assert_close(shared[s], repeated[s, 2 * s : 2 * s + 2], rtol=1e-4, atol=1e-4)


def test_a_share_for_every_draw_or_an_error(network: bh.RandomPEFT) -> None:
    with pytest.raises(ConfigError, match=r"batch.particles=3, but the weights carry 2 draws"):
        network(drawn(network.sites, 2, 1), tiny_batch(6).split(3))
    with pytest.raises(ConfigError, match="particles=4 must divide the batch of 6"):
        tiny_batch(6).split(4)
    with pytest.raises(DataError, match="neither inputs nor features"):
        network(drawn(network.sites), bh.data.Batch({}))


@pytest.mark.parametrize("split", [1, 2])
def test_choices_are_rows_of_their_own(split: int) -> None:
    network = tiny_model(HYBRID, outputs=1).network
    flat = tiny_batch(12)
    nested = bh.data.Batch(
        {name: value.unflatten(0, (4, 3)) for name, value in flat.inputs.items()}
    )
    weights = drawn(network.sites, 2, 1)
    with torch.no_grad():
        found = network(weights, nested.split(split))
        expected = network(weights, flat).unflatten(1, (4, 3))
    assert found.shape == (2, 4 // split, 3, 1)
    for s in range(2):
        share = slice(None) if split == 1 else slice(2 * s, 2 * s + 2)
        torch.testing.assert_close(found[s], expected[s, share], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["mean", "first", "last"])
def test_pooling_against_a_loop(pooling: Any) -> None:
    backbone = tiny_backbone()
    network = bh.RandomPEFT(backbone, (), bh.Head(2, pooling, principal=False))
    batch, weights = tiny_batch(5), drawn(network.sites)
    with torch.no_grad():
        features, outputs = network.features(batch), network(weights, batch)
        for i in range(5):
            count = int(batch.inputs["attention_mask"][i].sum())
            ids = batch.inputs["input_ids"][i : i + 1, :count]
            states = backbone(input_ids=ids).last_hidden_state[0]
            pooled = {"mean": states.mean(0), "first": states[0], "last": states[-1]}[pooling]
            pooled = (pooled - pooled.mean()) / (pooled.var(unbiased=False) + 1e-5).sqrt()
            torch.testing.assert_close(features[i], pooled, rtol=1e-3, atol=1e-4)
            expected = weights["head.weight"] @ pooled + weights["head.bias"]
            torch.testing.assert_close(outputs[i], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("pooling", "places"), [("last", (3, 1)), ("first", (2, 0))])
def test_pooling_is_of_valid_tokens_with_padding_on_the_left_too(
    pooling: Any, places: tuple[int, int]
) -> None:
    hidden = torch.randn(2, 4, 8)
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]])
    pooled = bh.Head(2, pooling).pool(hidden, mask, causal=False)
    expected = torch.stack([row[place] for row, place in zip(hidden, places, strict=True)])
    torch.testing.assert_close(pooled, functional.layer_norm(expected, (8,)))


@pytest.mark.parametrize("model_type", CAUSAL)
def test_a_decoder_reads_a_text_alike_with_padding_on_either_side(model_type: str) -> None:
    """A prefix has no position, so that how far a token is from it depends on where it is."""
    kinds = HYBRID[: 2 if model_type in tiny.WITHOUT_PREFIX else 3]
    network = bh.RandomPEFT(build(model_type), kinds, bh.Head(3))
    kept: list[Any] = []
    network.backbone.base_model.register_forward_hook(
        lambda _, args, kwargs, out: kept.append(out.past_key_values), with_kwargs=True
    )
    texts = torch.tensor([[5, 9, 14, 22], [7, 31, 2, 18]])
    weights = drawn(network.sites)
    made = []
    for padding in ((0, 3), (3, 0)):
        ids = functional.pad(texts, padding, value=0)
        mask = functional.pad(torch.ones_like(texts), padding, value=0)
        with torch.no_grad():
            made.append(network(weights, bh.data.Batch({"input_ids": ids, "attention_mask": mask})))
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)
    assert kept == [None, None]  # no keys and values for texts to come


def test_weights_of_another_shape_are_named(network: bh.RandomPEFT) -> None:
    weights, batch = drawn(network.sites), tiny_batch(3)
    name = "lora.query.A"
    with pytest.raises(ConfigError, match=r"weights: there is no 'lora\.query\.A'"):
        network({k: v for k, v in weights.items() if k != name}, batch)
    narrow = {**weights, name: weights[name][..., :1]}  # would be stretched over a whole row
    with pytest.raises(ConfigError, match=r"A'\] have shape \(2, 2, 1\), expected \(\*P, 2, 2, "):
        network(narrow, batch)


def test_auto_pools_decoders_at_the_end_and_encoders_over_all() -> None:
    for model_type, causal in (("gpt2", True), ("llama", True), ("bert", False), ("t5", False)):
        assert bh.RandomPEFT(build(model_type), (), bh.Head(2)).causal == causal
    hidden, mask = torch.randn(1, 3, 8), torch.ones(1, 3)
    for causal, pooling in ((True, "last"), (False, "mean")):
        expected = bh.Head(2, pooling).pool(hidden, mask, False)  # type: ignore[arg-type]
        torch.testing.assert_close(bh.Head(2).pool(hidden, mask, causal), expected)


@pytest.mark.parametrize("head", [bh.Head(2), bh.ClassifierHead(2)])
def test_a_backbone_that_returns_tuples(head: Any) -> None:
    found, batch, auto = [], tiny_batch(), AutoModelForSequenceClassification
    for whole in (True, False):
        backbone = build("gpt2", auto=auto, pad_token_id=0, return_dict=whole)
        network = bh.RandomPEFT(backbone, (LoRA(rank=2),), head)
        outputs = network(drawn(network.sites, seed=0), batch)
        means = network.attachment.layer_means(batch.inputs, batch.inputs["attention_mask"])
        found.append((outputs, *means))
    assert all(map(torch.equal, *found))


def test_features_take_the_place_of_tokens() -> None:
    network = tiny_model((), outputs=3).network
    batch, weights = tiny_batch(6), drawn(network.sites, 2, 1)
    short = bh.data.Batch({}, batch.labels, features=network.features(batch))
    with torch.no_grad():
        torch.testing.assert_close(network(weights, short), network(weights, batch))
        torch.testing.assert_close(
            network(weights, short.split(2)), network(weights, batch.split(2))
        )
        nested = bh.data.Batch({k: v.unflatten(0, (2, 3)) for k, v in batch.inputs.items()})
        features = network.features(nested)
        assert features.shape == (2, 3, 16)
        torch.testing.assert_close(
            network(weights, bh.data.Batch({}, features=features)), network(weights, nested)
        )
    assert not features.requires_grad


def test_features_are_the_frozen_transformers_whatever_the_weights(
    network: bh.RandomPEFT,
) -> None:
    weights, batch = drawn(network.sites), tiny_batch()
    frozen = bh.RandomPEFT(network.backbone, (), network.head)
    features = network.features(batch)
    torch.testing.assert_close(features, frozen.features(batch))
    with_features = bh.data.Batch({}, features=features)
    torch.testing.assert_close(network(weights, with_features), frozen(weights, batch))
    assert not torch.allclose(network(weights, batch), frozen(weights, batch), atol=1e-3)


def test_the_backbone_is_no_part_of_the_module(network: bh.RandomPEFT) -> None:
    model = bh.Model(network)
    for module in (network, model):
        assert list(module.parameters()) == []
        assert not any("encoder" in name or "embed" in name for name in module.state_dict())
    assert not any(parameter.requires_grad for parameter in network.backbone.parameters())
    assert not network.backbone.training


def test_features_make_no_peft_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many draws at once they would take room, for nothing."""
    network = tiny_model(aligned=True).network
    texts = tiny_examples(4)
    (_, batch), *_ = texts.by_length(4)
    weights = {site.name: torch.randn(3, 1, *site.shape) for site in network.sites}
    frozen = replace(batch, inputs={}, features=network.features(batch))
    expected = network(
        {**weights, **{n: torch.zeros_like(w) for n, w in weights.items() if "lora" in n}}, frozen
    )
    monkeypatch.setattr(network.coordinates, "forward", None)
    assert torch.equal(network(weights, frozen), expected)


# Particles


@pytest.mark.parametrize("particles", [(1,), (4,), (4, 1), (2, 4)])
@pytest.mark.parametrize("likelihood", [Normal(), OrderedLogistic(3)])
def test_each_draw_has_its_own_noise(likelihood: Likelihood, particles: tuple[int, ...]) -> None:
    """With as many draws as examples, the noise of draw s was given to example s."""
    model, batch = tiny_model((), 1, likelihood=likelihood), bh.data.Batch(tiny_batch(4).inputs)
    weights = drawn(model.sites, *particles)
    labels = torch.tensor([0, 1, 2, 1])
    with torch.no_grad():
        together = model.predictive(weights, batch).log_prob(labels)
        assert together.shape == ((4, 4) if particles == (4, 1) else (*particles, 4))
        rows = together.reshape(-1, 4)  # draw by draw
        for row, index in zip(rows, product(*map(range, particles)), strict=True):
            alone = model.predictive(take(weights, *index), batch).log_prob(labels)
            torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fixed", [None, "head.bias", "head.weight", "lora.query.A"])
def test_a_site_without_particle_dims_is_the_same_for_all_draws(fixed: str | None) -> None:
    """The particle dims were those of the last site alone."""
    model, batch = tiny_model(), bh.data.Batch(tiny_batch(5).inputs)
    weights = drawn(model.sites, 3, 1)
    weights = {name: 3 * value for name, value in weights.items()}  # draws that differ, and
    weights["head.weight"] *= 1e3  # logits so far apart that labels are certain
    held = {} if fixed is None else {fixed: weights.pop(fixed)[0, 0]}
    conditioned = poutine.condition(model, held)
    with torch.no_grad():
        together = Predictive(conditioned, weights, parallel=True)(batch)["label"]
        for s in range(3):
            alone = poutine.condition(conditioned, take(weights, s, 0))(batch)
            assert torch.equal(together[s], alone)
    assert len(together.unique(dim=0)) > 1


@pytest.mark.parametrize("particles", [(4,), (4, 1)])
def test_the_noise_alone_may_be_random(particles: tuple[int, ...]) -> None:
    """Its particle dims were looked for in the network's sites, which need have none."""
    model, batch = tiny_model((), 1, likelihood=Normal()), bh.data.Batch(tiny_batch(4).inputs)
    fixed, noise = drawn(model.network.sites), drawn(model.likelihood.sites, *particles)
    fitted = model.predictive(fixed | noise, batch)
    assert fitted.batch_shape == (4, 4)
    expected = noise["noise.log_scale"].exp().reshape(4, 1).expand(4, 4)
    torch.testing.assert_close(fitted.stddev, expected)


def constant(name: str) -> Any:
    def prior(sites: Sequence[Site]) -> dict[str, Tensor]:
        values = {}
        for s in sites:
            if s.name == name:
                values[name] = pyro.deterministic(name, 0.1 * torch.ones(s.shape), event_dim=s.ndim)
            else:
                normal = dist.Normal(0.0, 0.1).expand(s.shape).to_event(s.ndim)
                values[s.name] = pyro.sample(s.name, normal)
        return values

    return prior


@pytest.mark.parametrize("name", ["head.bias", "lora.query.A"])
@pytest.mark.parametrize("guide", ["normal", "AutoNormal"])
def test_a_prior_may_hold_a_site_constant(name: str, guide: str) -> None:
    model = tiny_model(prior=constant(name))
    posterior = bh.fit(model, guide, tiny_examples(), max_steps=8, progress=False)
    assert (posterior.sample(3)[name] == 0.1).all()
    assert (posterior.sample(3)["lora.query.B"] != 0).all()
    forecast = posterior.predict(["w5 w20"], keep_samples=True)
    assert forecast.samples is not None and forecast.samples.std(0).max() > 0  # type: ignore[union-attr]


def test_particle_dims_that_do_not_go_together_are_refused() -> None:
    model = tiny_model(())
    weights = drawn(model.sites, 3) | {"head.bias": torch.zeros(4, 2)}
    with pytest.raises(ConfigError, match=r"weights: .*head.weight \(3,\).*head.bias \(4,\)"):
        model.network(weights, tiny_batch(4))


# Layers below the first PEFT weights


SKIPPED = [each for each in MODEL_TYPES if each not in ("t5", "albert")]


def kinds_of(model_type: str, layers: Sequence[int] | None = (-1,)) -> tuple[Kind, ...]:
    chosen = None if layers is None else tuple(layers)
    kinds = (
        LoRA(rank=2, gated=True, layers=chosen),
        Adapter(size=3, layers=chosen),
        Prefix(2, gated=True, layers=chosen),
    )
    return kinds[:2] if model_type in tiny.WITHOUT_PREFIX else kinds


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
    torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_type", SKIPPED)
@pytest.mark.parametrize("split", [1, 2])
def test_outputs_and_gradients_are_the_same(model_type: str, split: int) -> None:
    network, batch = network_of(build(model_type)), Batch(inputs())
    assert network.attachment.constant == 1
    kept = replace(batch, states=network.constant_states(batch))
    expected = run(network, batch.split(split))
    calls = attention_calls(network.attachment)
    assert_same(expected, run(network, kept.split(split)))
    assert not calls


@pytest.mark.parametrize("model_type", ["bert", "llama"])
def test_only_the_layers_below_are_skipped_and_only_they_run_for_the_states(
    model_type: str,
) -> None:
    network = network_of(build(model_type, num_hidden_layers=5), (2, 4))
    calls = [attention_calls(network.attachment, layer) for layer in range(5)]
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


def test_layers_that_run_several_times_are_not_skipped() -> None:
    backbone = build("albert", num_hidden_layers=4, inner_group_num=2)
    assert network_of(backbone).constant_states(Batch(inputs())) is None


def test_a_result_that_is_used_elsewhere_is_noticed() -> None:
    """What the first layer computes is added to the last states too."""
    backbone = build("bert", num_hidden_layers=3)
    seen: list[Tensor] = []
    backbone.encoder.layer[0].register_forward_hook(lambda _, args, output: seen.append(output))

    def add(_: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + seen[-1]
        return output

    backbone.encoder.register_forward_hook(add)
    assert network_of(backbone).constant_states(Batch(inputs())) is None


def test_gradient_checkpointing_of_the_backbone_changes_nothing() -> None:
    """Hugging Face recomputes layers in training mode only, in which dropout would be on."""
    backbone = build("gpt2")
    network, batch = network_of(backbone), Batch(inputs())
    expected = run(network, batch)
    backbone.gradient_checkpointing_enable()
    calls = attention_calls(network.attachment, 1)
    assert_same(expected, run(network, batch))
    assert len(calls) == 1


def test_training_mode_is_refused() -> None:
    network = network_of(build("bert"))
    network.train()  # the backbone is not this module's
    batch = Batch(inputs())
    assert network.constant_states(batch) is not None
    network.backbone.train()
    for use in (network.constant_states, network.features, lambda batch: run(network, batch)):
        with pytest.raises(ConfigError, match="training mode"):
            use(batch)


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


# Generation under a draw


NEW = 6
KINDS = bh.presets.bh_peft()
PEFT = {"query": "q_proj", "value": "v_proj", "ffn_out": "down_proj"}
WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampled": {"do_sample": True, "temperature": 1.3, "num_return_sequences": 2},
}


def language_model(model_type: str = "llama", **options: Any) -> PreTrainedModel:
    return tiny.build(model_type, auto=AutoModelForCausalLM, eos_token_id=None, **options)


def prompts(rows: int = 4) -> dict[str, Tensor]:
    """Padded on the left, as `generate` wants them."""
    inputs = {name: value.flip(1) for name, value in tiny.inputs(rows, length=7).items()}
    return inputs | {"input_ids": inputs["input_ids"] * inputs["attention_mask"]}


def generated(model: Any, inputs: dict[str, Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    """The new tokens (R, NEW) and the logits that they were chosen by (R, NEW, V)."""
    torch.manual_seed(3)
    out = model.generate(
        **inputs,
        **options,
        max_new_tokens=NEW,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, 1)


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp_min(0)


def without_cache(model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same greedily, each token by a pass over the whole text."""
    ids, mask, logits = inputs["input_ids"], inputs["attention_mask"], []
    for _ in range(NEW):
        with torch.no_grad():
            out = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        logits.append(out.logits[:, -1])
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    return ids[:, -NEW:], torch.stack(logits, 1)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def network_on(model: PreTrainedModel, kinds: Any = KINDS) -> bh.RandomPEFT:
    return bh.RandomPEFT(model, kinds, bh.Head(2), tiny_tokenizer())


def adapted(model: PreTrainedModel, network: bh.RandomPEFT, weights: dict[str, Tensor]) -> Any:
    """A `PeftModel` with these weights of LoRA."""
    own = network.coordinates({name: value[None] for name, value in weights.items()})
    config = peft.LoraConfig(r=3, lora_alpha=5.0, target_modules=[*PEFT.values()])
    theirs = peft.get_peft_model(model, config)
    for target, path in PEFT.items():
        modules = [m for name, m in theirs.named_modules() if name.endswith(f".{path}")]
        for layer, module in enumerate(modules):
            module.lora_A["default"].weight.data = own[f"lora.{target}.A"][0, layer]
            module.lora_B["default"].weight.data = own[f"lora.{target}.B"][0, layer]
    return theirs.eval()


@pytest.mark.parametrize("model_type", ["llama", "gemma"])
def test_generate_as_peft_does(model_type: str) -> None:
    network = network_on(language_model(model_type), LoRA(tuple(PEFT), rank=3, alpha=5.0))
    weights = tiny.drawn(network.sites, seed=2, scale=0.3)
    theirs = adapted(language_model(model_type), network, weights)
    plain, inputs = generated(network.backbone, prompts())[1], prompts()
    for way in WAYS.values():
        expected = generated(theirs, inputs, **way)
        with network.bind(weights) as model:
            tokens, logits = generated(model, inputs, **way)
        assert torch.equal(tokens, expected[0])
        close(logits, expected[1])
    assert not torch.allclose(logits[:4], plain, atol=0.1)
    assert torch.equal(generated(network.backbone, inputs)[1], plain), "something remained"


@pytest.mark.parametrize("model_type", tiny.CAUSAL)
def test_a_cache_changes_nothing(model_type: str) -> None:
    """LoRA, adapter and prefix; texts grow beyond the sliding windows."""
    kinds = KINDS[: 2 if model_type in tiny.WITHOUT_PREFIX else 3]
    network = network_on(language_model(model_type), kinds)
    weights, inputs = tiny.drawn(network.sites, 1, seed=2), prompts()
    with network.bind(weights) as model:
        tokens, logits = without_cache(model, inputs)
        close(generated(model, inputs)[1], logits, 1e-4)
        assert torch.equal(generated(model, inputs)[0], tokens)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prefix_in_every_cache(cache: str) -> None:
    network = network_on(language_model(), Prefix(3))
    weights = tiny.drawn(network.sites, 1, seed=2)
    for texts in (prompts(), prompts(2)):  # the second without padding
        with network.bind(weights) as model:
            found = generated(model, texts, cache_implementation=cache)[1]
            close(found, without_cache(model, texts)[1], 1e-4)
        assert not torch.allclose(found, without_cache(network.backbone, texts)[1], atol=0.1)


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_draws_together_are_draws_alone(way: str) -> None:
    network = network_on(language_model())
    draws, inputs = tiny.drawn(network.sites, 3, seed=2, scale=0.5), prompts(2)
    with network.bind(draws) as model:
        tokens, _ = generated(model, {k: v.repeat(3, 1) for k, v in inputs.items()}, **WAYS[way])
    alone = []
    for number in range(3):
        with network.bind({name: value[number] for name, value in draws.items()}) as model:
            alone.append(generated(model, inputs, **WAYS[way])[0])
    assert torch.equal(tokens, torch.cat(alone))
    assert not torch.equal(alone[0], alone[1])


def test_gates_are_refused() -> None:
    network = network_on(language_model(), bh.presets.unipelt())
    with (
        pytest.raises(ConfigError, match=r"bind: gates average .* expected gated=False"),
        network.bind(tiny.drawn(network.sites, 1, seed=2)),
    ):
        pass


# ------------------------------------------------------------------------- of a posterior


@pytest.fixture(scope="module")
def mixture() -> bh.Posterior:
    """Its labels are of a task; what it says about text is noise, and different in each part."""
    network = network_on(language_model(), bh.presets.lora(rank=2))
    options = {"epochs": 4, "lr": 0.05, "progress": False}
    return bh.fit(bh.Model(network), "laplace", tiny_examples(24), components=2, **options)


def test_components_in_threads_of_their_own(mixture: bh.Posterior) -> None:
    inputs, backbone = prompts(), mixture.model.network.backbone
    expected = []
    for part in mixture.components:
        with mixture.model.network.bind(part.guide.means()) as model:
            expected.append(generated(model, inputs)[1])
    plain = generated(backbone, inputs)[1]
    found: dict[int, Tensor] = {}

    def work(number: int) -> None:
        with mixture.bind(number) as model:
            found[number] = generated(model, inputs)[1]

    with mixture.bind(0) as model:
        for number in (0, 1):
            thread = threading.Thread(target=work, args=(number,))
            thread.start()
            thread.join()
            close(found[number], expected[number])
        other = threading.Thread(target=lambda: found.update({2: generated(model, inputs)[1]}))
        other.start()
        other.join()
        assert torch.equal(found[2], plain), "a thread saw the weights of another"
    assert not torch.allclose(expected[0], expected[1], atol=0.01)
    with pytest.raises(KeyError), mixture.bind(1):
        raise KeyError
    assert torch.equal(generated(backbone, inputs)[1], plain), "something remained"


def test_weights_of_a_component_or_a_draw(mixture: bh.Posterior) -> None:
    for number, part in enumerate(mixture.components):
        for name, value in mixture.weights(number).items():
            assert torch.equal(value, part.guide.means()[name])
    assert mixture.weights(np.int64(1)).keys() == mixture.weights(1).keys()  # type: ignore[arg-type]
    for wrong in (None, 2, -1, 0.5, True):
        with pytest.raises(ConfigError, match=f"component={wrong}"):
            mixture.bind(wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="draw=7: this posterior is of the network linearised"):
        mixture.bind(1, draw=7)
    network = network_on(language_model(), bh.presets.lora(rank=2))
    normal = bh.fit(bh.Model(network), "normal", tiny_examples(8), max_steps=2, progress=False)
    draws = [normal.weights(draw=number) for number in (7, 8, 7)]
    for name, value in normal.sample(1, seed=7).items():
        assert torch.equal(draws[0][name], value[0])
        assert torch.equal(draws[0][name], draws[2][name])
        assert not torch.equal(draws[0][name], draws[1][name])
