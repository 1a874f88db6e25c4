"""The change that PEFT weights make, compared with running them."""

from __future__ import annotations

import pytest
import torch
from tiny import build, drawn

import bhpeft_pyro as bh
from bhpeft_pyro.diagnostics.changes import changes, sizes
from bhpeft_pyro.peft import Adapter, LoRA, Prefix
from bhpeft_pyro.peft.architectures import blocks_of
from bhpeft_pyro.peft.scales import measure
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model

KINDS = (LoRA(("query", "ffn_out"), rank=3, alpha=5.0), Adapter(size=4, scale=2.0), Prefix(3))
DRAWS = 5


def rms(values: torch.Tensor) -> torch.Tensor:
    """(S,) over all but the draws."""
    return values.flatten(1).square().mean(1).sqrt()


@pytest.fixture
def network() -> bh.RandomPEFT:
    return bh.RandomPEFT(tiny_backbone(), KINDS)


@pytest.fixture
def weights(network):
    return drawn(network.sites, DRAWS, seed=2)


def test_sizes_are_what_the_branches_add(network, weights):
    found = sizes(network, weights)
    assert list(found) == [*("lora.query", "lora.ffn_out", "adapter", "prefix.key", "prefix.value")]
    blocks = blocks_of(network.backbone)
    scales = measure(network.backbone, blocks, attention=False)
    generator = torch.Generator().manual_seed(1)
    for layer, block in enumerate(blocks):
        for target in ("query", "ffn_out"):
            projection = block.projections[target]
            x = torch.randn(40_000, projection.inputs, generator=generator)
            a, b = (weights[f"lora.{target}.{side}"][:, layer] for side in "AB")
            added = 5 / 3 * (x * scales.inputs(projection)) @ a.mT @ b.mT
            expected = rms(added) / scales.outputs(projection)
            torch.testing.assert_close(
                found[f"lora.{target}"][layer], expected, rtol=0.03, atol=0.0
            )


def test_an_adapter_counts_its_activation_on_average(network):
    many = drawn(network.sites, 400, seed=2)
    block = blocks_of(network.backbone)[1]
    scales = measure(network.backbone, [block], attention=False)
    x = torch.randn(50, 16, generator=torch.Generator().manual_seed(1))
    hidden = (x * scales.inputs(block.projections["ffn_in"])) @ many["adapter.down"][:, 1].mT
    added = 2 * hidden.relu() @ many["adapter.up"][:, 1].mT
    expected = rms(added).square().mean().sqrt() / scales.outputs(block.projections["ffn_out"])
    found = sizes(network, many)["adapter"][1].square().mean().sqrt()
    assert found.item() == pytest.approx(expected.item(), rel=0.1)


def test_a_prefix_is_compared_with_the_texts_own_keys_and_values(network, weights):
    found = sizes(network, weights)
    blocks = blocks_of(network.backbone)
    scales = measure(network.backbone, blocks, attention=True)
    for layer, block in enumerate(blocks):
        for site, own in (("key", scales.keys(block)), ("value", scales.values(block))):
            expected = rms(weights[f"prefix.{site}"][:, layer]) / own
            torch.testing.assert_close(found[f"prefix.{site}"][layer], expected)


def test_layers_keep_their_numbers_and_gates_are_no_branch():
    kinds = (LoRA(("query",), rank=2, gated=True, layers=(1,)), Prefix(3, encoder=2))
    network = bh.RandomPEFT(build("bert"), kinds)
    weights = drawn(network.sites, 2, seed=2)
    found = sizes(network, weights)
    assert {branch: list(layers) for branch, layers in found.items()} == {
        "lora.query": [1],
        "prefix.up": [0, 1],
    }


def test_changes_are_the_sizes_of_the_weights_behind_the_coordinates():
    data = tiny_examples()
    model = tiny_model(kinds=KINDS, aligned=True)
    posterior = bh.fit(model, "normal", data, max_steps=2, progress=False)
    found = changes(posterior, samples=20, seed=3)
    coordinates = model.network.coordinates
    assert bool(coordinates.fitted)
    expected = sizes(model.network, coordinates(posterior.sample(20, seed=3)))
    assert found.keys() == expected.keys()
    for branch, layers in expected.items():
        for layer, size in layers.items():
            torch.testing.assert_close(found[branch][layer], size)


def laplace(**options) -> bh.Posterior:
    options = {"max_steps": 2, "progress": False} | options
    return bh.fit(tiny_model(kinds=KINDS, aligned=True), "laplace", tiny_examples(), **options)


def test_changes_without_draws_are_those_at_the_components_centres():
    posterior = laplace(components=2)
    network, found = posterior.model.network, changes(posterior, samples=0)
    for number, each in enumerate(posterior.components):
        centre = {name: value.unsqueeze(0) for name, value in each.guide.means().items()}
        for branch, layers in sizes(network, network.coordinates(centre)).items():
            for layer, size in layers.items():
                torch.testing.assert_close(found[branch][layer][number], size[0])


def test_a_linearised_branch_has_no_products_of_what_was_drawn():
    """The same in `changes` and in an export, which multiplied draws of both factors."""
    posterior = laplace(components=1)
    network, draws = posterior.model.network, posterior.sample(5)
    centre = {name: value[None] for name, value in posterior.weights().items()}
    ends = [network.coordinates(each) for each in (centre, draws)]

    found, exported = changes(posterior, 5), posterior.to_arviz(samples=5, sites="*").posterior
    for target in ("query", "ffn_out"):
        (a0, b0), (a, b) = ([each[f"lora.{target}.{side}"] for side in "AB"] for each in ends)
        product = b0 @ a0 + (b - b0) @ a0 + b0 @ (a - a0)
        down, up = (s for s in network.attachment.sites if s.name.startswith(f"lora.{target}"))
        size = (product / down.unit / up.unit).flatten(2).square().mean(2).sqrt() / 3**0.5
        for layer in range(2):
            torch.testing.assert_close(found[f"lora.{target}"][layer], size[:, layer])
        drawn = torch.from_numpy(exported[f"change.lora.{target}"].values[0])
        torch.testing.assert_close(drawn, size, rtol=1e-4, atol=1e-3)
    for number in range(2):
        expected = exported["change.adapter"].values[0, :, number]
        torch.testing.assert_close(found["adapter"][number], torch.from_numpy(expected))
