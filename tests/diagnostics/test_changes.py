"""What the weights do in each layer, compared with running them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import build, drawn
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.diagnostics.changes import changes, sizes
from bhpeft_pyro.peft import Adapter, LoRA, Prefix
from bhpeft_pyro.peft.architectures import layers_of
from bhpeft_pyro.peft.signals import measure
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model

KINDS = (LoRA(("query", "ffn_out"), rank=3, alpha=5.0), Adapter(size=4, scale=2.0), Prefix(3))
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}


def rms(values: Tensor) -> Tensor:
    """(S,) over all but the draws."""
    return values.flatten(1).square().mean(1).sqrt()


def test_sizes_are_what_the_branches_add() -> None:
    """LoRA for inputs in no preferred direction, an adapter with its activation on average, a
    prefix beside the text's own keys and values."""
    network = bh.RandomPEFT(tiny_backbone(), KINDS)
    weights = drawn(network.sites, 400, seed=2)
    found = sizes(network, weights)
    assert list(found) == ["lora.query", "lora.ffn_out", "adapter", "prefix.key", "prefix.value"]
    blocks = layers_of(network.backbone)
    places = {module: block for block in blocks for module in block.modules}
    scales = measure(network.backbone, places, trained=False)
    generator = torch.Generator().manual_seed(1)
    for layer, block in enumerate(blocks):
        for target in ("query", "ffn_out"):
            projection = block.projections[target]
            x = torch.randn(40_000, projection.inputs, generator=generator)
            a, b = (weights[f"lora.{target}.{side}"][:5, layer] for side in "AB")
            added = 5 / 3 * (x * scales.rms(projection, "inputs")) @ a.mT @ b.mT
            expected = rms(added) / scales.rms(projection, "outputs")
            torch.testing.assert_close(
                found[f"lora.{target}"][layer][:5], expected, rtol=0.03, atol=0.0
            )
        for site in ("key", "value"):
            expected = rms(weights[f"prefix.{site}"][:, layer]) / scales.rms(block, f"{site}s")
            torch.testing.assert_close(found[f"prefix.{site}"][layer], expected)
        x = torch.randn(50, 16, generator=generator)
        x = x * scales.rms(block.projections["ffn_in"], "inputs")
        hidden = (x @ weights["adapter.down"][:, layer].mT).relu()
        added = rms(2 * hidden @ weights["adapter.up"][:, layer].mT).square().mean().sqrt()
        expected = added / scales.rms(block.projections["ffn_out"], "outputs")
        size = found["adapter"][layer].square().mean().sqrt()
        assert size.item() == pytest.approx(expected.item(), rel=0.1)


def test_layers_keep_their_numbers_and_gates_are_no_branch() -> None:
    kinds = (LoRA(("query",), rank=2, gated=True, layers=(1,)), Prefix(3))
    network = bh.RandomPEFT(build("bert"), kinds)
    found = sizes(network, drawn(network.sites, 2, seed=2))
    layers = {branch: list(by_layer) for branch, by_layer in found.items()}
    assert layers == {"lora.query": [1], "prefix.key": [0, 1], "prefix.value": [0, 1]}


def test_changes_are_the_sizes_of_the_weights_behind_the_coordinates() -> None:
    model = tiny_model(kinds=KINDS, aligned=True)
    posterior = bh.fit(model, "normal", tiny_examples(), **QUICK)
    coordinates = model.network.coordinates
    assert bool(coordinates.fitted)
    expected = sizes(model.network, coordinates(posterior.sample(20, seed=3)))
    torch.testing.assert_close(changes(posterior, samples=20, seed=3), expected)


@pytest.mark.parametrize("samples", [0, 5])
def test_changes_of_laplace_are_those_at_the_components_centres(samples: int) -> None:
    """However many draws: a product of drawn factors is not what the linearised network adds."""
    model = tiny_model(kinds=KINDS, aligned=True)
    posterior = bh.fit(model, "laplace", tiny_examples(), components=2, **QUICK)
    network, found = posterior.model.network, changes(posterior, samples)
    for number, part in enumerate(posterior.components):
        centre = {name: value.unsqueeze(0) for name, value in part.guide.means().items()}
        own = {b: {n: v[number, None] for n, v in layers.items()} for b, layers in found.items()}
        torch.testing.assert_close(own, sizes(network, network.coordinates(centre)))
        assert all(len(v) == 2 for layers in found.values() for v in layers.values())
    exported = posterior.to_arviz(samples=2)
    for group in (exported.posterior, exported.prior):
        assert "head.weight" in group and not any("change" in name for name in group.data_vars)
