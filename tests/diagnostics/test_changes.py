"""What the weights do, compared with running them; how far they moved, with the guide's numbers."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from tiny import build, drawn
from torch import Tensor
from torch.distributions import Normal, kl_divergence

import bhpeft_pyro as bh
from bhpeft_pyro import priors
from bhpeft_pyro.diagnostics.changes import changes, head_norms, shifts, sizes
from bhpeft_pyro.errors import GuideError, PriorError
from bhpeft_pyro.guides import FunctionGuide, NormalGuide
from bhpeft_pyro.peft import Adapter, LoRA, Prefix
from bhpeft_pyro.peft.architectures import layers_of
from bhpeft_pyro.peft.signals import measure
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model

KINDS = (LoRA(("query", "ffn_out"), rank=3, alpha=5.0), Adapter(size=4, scale=2.0), Prefix(3))
FEW = (LoRA(("query",), rank=2), Adapter(3, layers=(1,)))
REPORT = bh.training.FitReport(1, "", bh.FitOptions())
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}


def rms(values: Tensor) -> Tensor:
    """(S,) over all but the draws."""
    return values.flatten(1).square().mean(1).sqrt()


# Sizes of branches.


def test_sizes_are_what_the_branches_add() -> None:
    """LoRA for inputs in no preferred direction, an adapter with its activation on average, a
    prefix beside the text's own keys and values."""
    network = bh.RandomPEFT(tiny_backbone(), KINDS)
    weights = drawn(network.sites, 400, seed=2)
    found = sizes(network, weights)
    assert list(found) == ["lora.query", "lora.ffn_out", "adapter", "prefix.key", "prefix.value"]
    blocks = layers_of(network.backbone)
    scales = measure(network.backbone, blocks, attention=True)
    generator = torch.Generator().manual_seed(1)
    for layer, block in enumerate(blocks):
        for target in ("query", "ffn_out"):
            projection = block.projections[target]
            x = torch.randn(40_000, projection.inputs, generator=generator)
            a, b = (weights[f"lora.{target}.{side}"][:5, layer] for side in "AB")
            added = 5 / 3 * (x * scales.inputs(projection)) @ a.mT @ b.mT
            expected = rms(added) / scales.outputs(projection)
            torch.testing.assert_close(
                found[f"lora.{target}"][layer][:5], expected, rtol=0.03, atol=0.0
            )
        for site, frozen in (("key", scales.keys(block)), ("value", scales.values(block))):
            expected = rms(weights[f"prefix.{site}"][:, layer]) / frozen
            torch.testing.assert_close(found[f"prefix.{site}"][layer], expected)
        x = torch.randn(50, 16, generator=generator) * scales.inputs(block.projections["ffn_in"])
        hidden = (x @ weights["adapter.down"][:, layer].mT).relu()
        added = rms(2 * hidden @ weights["adapter.up"][:, layer].mT).square().mean().sqrt()
        expected = added / scales.outputs(block.projections["ffn_out"])
        size = found["adapter"][layer].square().mean().sqrt()
        assert size.item() == pytest.approx(expected.item(), rel=0.1)


def test_layers_keep_their_numbers_and_gates_are_no_branch() -> None:
    kinds = (LoRA(("query",), rank=2, gated=True, layers=(1,)), Prefix(3, encoder=2))
    network = bh.RandomPEFT(build("bert"), kinds)
    found = sizes(network, drawn(network.sites, 2, seed=2))
    layers = {branch: list(by_layer) for branch, by_layer in found.items()}
    assert layers == {"lora.query": [1], "prefix.up": [0, 1]}


@pytest.mark.parametrize(("architecture", "keys"), [("gpt2", 4), ("llama", 2)])
def test_heads_have_the_rows_that_make_their_outputs(architecture: str, keys: int) -> None:
    """GPT-2 fuses query, key and value; two query heads of this Llama share one of keys."""
    network = bh.RandomPEFT(build(architecture), (LoRA(("query", "key"), rank=2, alpha=5.0),))
    weights = drawn(network.sites, 3, seed=2)
    found = head_norms(network, weights)
    for target, count in {"query": 4, "key": keys}.items():
        delta = 5 / 2 * weights[f"lora.{target}.B"] @ weights[f"lora.{target}.A"]
        for layer, norms in found[f"lora.{target}"].items():
            rows = delta[:, layer].chunk(count, 1)
            expected = torch.stack([r.flatten(1).norm(dim=1) for r in rows], 1)
            torch.testing.assert_close(norms, expected)


def test_changes_are_the_sizes_of_the_weights_behind_the_coordinates() -> None:
    model = tiny_model(kinds=KINDS, aligned=True)
    posterior = bh.fit(model, "normal", tiny_examples(), **QUICK)
    coordinates = model.network.coordinates
    assert bool(coordinates.fitted)
    expected = sizes(model.network, coordinates(posterior.sample(20, seed=3)))
    torch.testing.assert_close(changes(posterior, samples=20, seed=3), expected)


@pytest.fixture(scope="module")
def laplace() -> bh.Posterior:
    model = tiny_model(kinds=KINDS, aligned=True)
    return bh.fit(model, "laplace", tiny_examples(), components=2, **QUICK)


def test_changes_of_laplace_are_those_at_the_components_centres(laplace: bh.Posterior) -> None:
    network, found = laplace.model.network, changes(laplace)
    for number, part in enumerate(laplace.components):
        centre = {name: value.unsqueeze(0) for name, value in part.guide.means().items()}
        own = {b: {n: v[number, None] for n, v in layers.items()} for b, layers in found.items()}
        torch.testing.assert_close(own, sizes(network, network.coordinates(centre)))


def test_a_linearised_branch_has_no_products_of_what_was_drawn(laplace: bh.Posterior) -> None:
    """In `changes` as in an export, which once multiplied draws of both factors."""
    posterior = laplace.components[0]
    network, draws = posterior.model.network, posterior.sample(5)
    centre = {name: value[None] for name, value in posterior.weights().items()}
    ends = [network.coordinates(weights) for weights in (centre, draws)]
    found, exported = changes(posterior, 5), posterior.to_arviz(samples=5, sites="*").posterior
    for target in ("query", "ffn_out"):
        (a0, b0), (a, b) = ([end[f"lora.{target}.{side}"] for side in "AB"] for end in ends)
        product = b0 @ a0 + (b - b0) @ a0 + b0 @ (a - a0)
        down, up = (s for s in network.attachment.sites if s.name.startswith(f"lora.{target}"))
        size = (product / down.unit / up.unit).flatten(2).square().mean(2).sqrt() / 3**0.5
        for layer in range(2):
            torch.testing.assert_close(found[f"lora.{target}"][layer], size[:, layer])
        exported_size = torch.from_numpy(exported[f"change.lora.{target}"].values[0])
        torch.testing.assert_close(exported_size, size, rtol=1e-4, atol=1e-3)


# Shifts from the prior.


@pytest.fixture(scope="module")
def rounds() -> tuple[bh.Posterior, bh.Posterior]:
    first = bh.fit(tiny_model(FEW), "normal", tiny_examples(), max_steps=5, progress=False)
    return first, first.update(tiny_examples(8, seed=1), max_steps=20)


def test_kls_of_layers_sum_to_the_fit_s(rounds: tuple[bh.Posterior, bh.Posterior]) -> None:
    """Of independent Normals the KL of a whole round is the sum over kinds and layers."""
    for posterior in rounds:
        found = shifts(posterior)
        layers = {kind: list(by_layer) for kind, by_layer in found.items()}
        assert layers == {"lora": [0, 1], "adapter": [1], "head": [None]}
        total = sum(shift.kl for by_layer in found.values() for shift in by_layer.values())
        assert total == pytest.approx(sum(posterior.report.kl.values()), rel=1e-4)
        assert total > 0.1


def test_an_update_is_held_against_the_round_before(
    rounds: tuple[bh.Posterior, bh.Posterior],
) -> None:
    before, after = (posterior.guide for posterior in rounds)

    def of(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([values[f"lora.query.{side}"][1].flatten() for side in "AB"]).double()

    moved = (of(after.means()) - of(before.means())) / of(before.scales())
    ratios = of(after.scales()) / of(before.scales())
    pairs = [Normal(of(guide.means()), of(guide.scales())) for guide in (after, before)]
    found = shifts(rounds[1])["lora"][1]
    assert found.moved == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-4)
    assert found.narrowed == pytest.approx(ratios.log().mean().exp().item(), rel=1e-4)
    assert found.kl == pytest.approx(kl_divergence(*pairs).sum().item(), rel=1e-3)


def test_means_drawn_from_the_prior_have_moved_by_one_sd() -> None:
    model = tiny_model((LoRA(rank=8),))
    guide = NormalGuide(model)
    guide.move(model.prior(model.sites))
    for shift in shifts(bh.Posterior(model, guide, (REPORT,)))["lora"].values():  # of 512 weights
        assert shift.moved == pytest.approx(1.0, abs=0.15)
        assert shift.narrowed == pytest.approx(1.0, abs=1e-5)
        assert shift.kl == pytest.approx(512 / 2 * shift.moved**2, rel=1e-3)


def test_joint_posteriors_have_their_marginals() -> None:
    options: dict[str, Any] = {"components": 1, "max_steps": 5, "progress": False}
    first = bh.fit(tiny_model(()), "laplace", tiny_examples(), **options)
    second = first.update(tiny_examples(8, seed=1))
    old, new = first.sample(2000), second.sample(2000, seed=1)
    names = ("head.weight", "head.bias")
    q, p = (torch.cat([draws[n].flatten(1) for n in names], 1) for draws in (new, old))
    found = shifts(second)["head"][None]
    moved = ((q.mean(0) - p.mean(0)) / p.std(0)).square().mean().sqrt().item()
    assert found.moved == pytest.approx(moved, abs=0.07)
    ratio = (q.std(0) / p.std(0)).log().mean().exp().item()
    assert found.narrowed == pytest.approx(ratio, rel=0.03)


def test_points_are_infinitely_far() -> None:
    families = {"head.*": "normal", "*": "delta"}
    found = shifts(bh.fit(tiny_model((LoRA(rank=2),)), families, tiny_examples(), **QUICK))
    assert found["lora"][0].kl == torch.inf and found["lora"][0].narrowed == 0
    assert 0 < found["head"][None].kl < torch.inf


def test_guides_that_tell_no_sds_are_no_points() -> None:
    """Those of their marginals, as in a later round."""
    model = tiny_model(())
    posterior = bh.fit(model, "mvn", tiny_examples(), max_steps=10, progress=False)
    draws = posterior.sample(4000)
    prior_sds = [priors.default().sd(s).expand(s.shape).flatten() for s in model.sites]
    sds = [draws[s.name].std(0).flatten() for s in model.sites]
    ratio = (torch.cat(sds) / torch.cat(prior_sds)).log().mean().exp().item()
    for one in (posterior, bh.Posterior.from_draws(model, draws)):
        found = shifts(one)["head"][None]
        assert found.narrowed == pytest.approx(ratio, rel=0.05)
        assert 0 < found.kl < torch.inf


def test_what_has_no_closed_form_is_refused() -> None:
    for prior, words in (
        (dist.Laplace(0.0, 1.0), "is Laplace"),
        (priors.Hierarchical(), "also samples"),
    ):
        model = tiny_model(FEW, prior=prior)
        with pytest.raises(PriorError, match=words):
            shifts(bh.Posterior(model, NormalGuide(model), (REPORT,)))

    def chained(sites: Any) -> Any:
        last, values = torch.tensor(0.0), {}
        for site in sites:
            normal = dist.Normal(last, 1.0).expand(site.shape).to_event()
            values[site.name] = pyro.sample(site.name, normal)
            last = values[site.name].mean()
        return values

    model = tiny_model(FEW, prior=chained)
    with pytest.raises(PriorError, match="depends on what else the prior samples"):
        shifts(bh.Posterior(model, NormalGuide(model), (REPORT,)))

    def scaled(sites: Any) -> Any:
        scale = pyro.sample("tau", dist.HalfNormal(1.0))
        return {
            s.name: pyro.sample(s.name, dist.Normal(0.0, scale).expand(s.shape).to_event())
            for s in sites
        }

    quick: dict[str, Any] = {"max_steps": 1, "progress": False}
    posterior = bh.fit(tiny_model((), prior=scaled), "AutoNormal", tiny_examples(), **quick)
    with pytest.raises(PriorError, match="also samples tau, on which its sites may depend"):
        shifts(posterior)
    with pytest.raises(GuideError, match="FunctionGuide"):
        shifts(bh.Posterior(tiny_model(FEW), FunctionGuide(lambda batch: None), (REPORT,)))
