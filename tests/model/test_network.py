"""`RandomPEFT` against plain loops and plain Hugging Face models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import CAUSAL, build, drawn, take
from torch.nn import functional

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.testing import tiny_backbone, tiny_batch, tiny_examples, tiny_model

HYBRID = (bh.peft.LoRA(rank=2), bh.peft.Adapter(size=3), bh.peft.Prefix(length=2))


@pytest.fixture(scope="module")
def network() -> bh.RandomPEFT:
    return tiny_model(HYBRID, outputs=3).network


@pytest.mark.parametrize("plate", [(), (1,)])
def test_folded_draws_equal_a_loop(network: bh.RandomPEFT, plate: tuple[int, ...]) -> None:
    batch, weights = tiny_batch(6), drawn(network.sites, 3, *plate)
    with torch.no_grad():
        together = network(weights, batch)
        assert together.shape == (3, 6, 3)
        for s in range(3):
            alone = network(take(weights, s, *[0] * len(plate)), batch)
            torch.testing.assert_close(together[s], alone, rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_two_particle_dims_are_kept(network: bh.RandomPEFT) -> None:
    batch, weights = tiny_batch(4), drawn(network.sites, 2, 3)
    with torch.no_grad():
        together = network(weights, batch)
        assert together.shape == (2, 3, 4, 3)
        alone = network(take(weights, 1, 2), batch)
    torch.testing.assert_close(together[1, 2], alone, rtol=1e-4, atol=1e-4)


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
    network = bh.RandomPEFT(build(model_type), HYBRID, bh.Head(3))
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


def test_inputs_go_together(network: bh.RandomPEFT) -> None:
    ids = torch.ones(3, 5, dtype=torch.long)
    batch = bh.data.Batch(
        {"input_ids": ids, "attention_mask": ids[:, None, None].expand(3, 1, 5, 5)}
    )
    with pytest.raises(DataError, match=r"attention_mask has shape \(3, 1, 5, 5\), expected"):
        network(drawn(network.sites), batch)


def test_auto_pools_decoders_at_the_end_and_encoders_over_all() -> None:
    for model_type, causal in (("gpt2", True), ("llama", True), ("bert", False), ("t5", False)):
        assert bh.RandomPEFT(build(model_type), (), bh.Head(2)).causal == causal
    hidden, mask = torch.randn(1, 3, 8), torch.ones(1, 3)
    head = bh.Head(2)
    last, mean = (bh.Head(2, how).pool(hidden, mask, False) for how in ("last", "mean"))  # type: ignore[arg-type]
    torch.testing.assert_close(head.pool(hidden, mask, True), last)
    torch.testing.assert_close(head.pool(hidden, mask, False), mean)


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


def test_errors_of_head_and_kinds() -> None:
    for outputs in (0, 2.0):
        with pytest.raises(
            ConfigError, match=f"outputs={outputs} must be an integer of at least 1"
        ):
            bh.Head(outputs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="pooling='max' must be one of"):
        bh.Head(2, "max")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"kinds: expected a tuple of LoRA.*, got tensor\(3\)"):
        tiny_model(torch.tensor(3))  # type: ignore[arg-type]


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
