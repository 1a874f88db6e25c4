"""Elastic weight consolidation, a rival of `update` in the experiments with streams."""

from __future__ import annotations

import copy

import pytest
import torch
from pyro import poutine

import bhpeft_pyro as bh
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_tokenizer
from tools.experiments.arms import Setup, elastic
from tools.experiments.ewc import Elastic, information, products


def model() -> bh.Model:
    torch.manual_seed(0)
    kinds = (*bh.presets.lora(rank=2), *bh.presets.adapter())
    return bh.Model(bh.RandomPEFT(tiny_backbone(), kinds, bh.Head(2), tiny_tokenizer()))


def drawn(of: bh.Model) -> dict[str, torch.Tensor]:
    return {site.name: torch.randn(site.shape) * site.unit for site in of.sites}


def test_the_information_of_a_product_is_its_squared_slope() -> None:
    of, data = model(), tiny_examples(1)
    (batch,) = data.batches(1)
    weights = drawn(of)
    a, b = "lora.value.A", "lora.value.B"
    anchor = of.network.coordinates.anchor(a)
    assert anchor is not None
    weights[a][:, 1], weights[b][:, :, 1] = -anchor[:, 1], 0.0  # half of A and of B is zero

    def log_odds(step: float) -> float:
        """With one entry of B A larger by `step`, by this half."""
        changed = copy.deepcopy(weights)
        changed[a][1, 1, 5] += 1.0
        changed[b][1, 3, 1] = step
        logits = of.network(changed, batch)[0]
        return float(logits[1] - logits[0])

    slope = (log_odds(0.01) - log_odds(-0.01)) / (0.02 * of.network.kinds[0].factor)
    odds = torch.tensor(log_odds(0.0))
    expected = slope**2 * odds.sigmoid() * (-odds).sigmoid()
    found = information(of, weights, data)["lora.value"][1, 3, 5]
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=0.0)
    assert not any(p.requires_grad for p in of.network.backbone.parameters())


def test_the_information_of_several_texts_adds_up() -> None:
    of, data = model(), tiny_examples(6)
    weights = drawn(of)
    whole = information(of, weights, data)
    parts = [information(of, weights, data.subset(rows)) for rows in ([0, 1], [2, 3, 4, 5])]
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[0][name] + parts[1][name])


def test_the_penalty_knows_only_products() -> None:
    of = model()
    weights, moved = drawn(of), drawn(of)
    precision = {name: torch.rand_like(w) for name, w in products(of.network, weights).items()}
    prior = Elastic(of.network, products(of.network, weights), precision, strength=3.0)

    def penalty(values: dict[str, torch.Tensor]) -> float:
        trace = poutine.trace(poutine.condition(prior, values)).get_trace(of.sites)
        trace.compute_log_prob()
        return -float(trace.nodes["ewc"]["log_prob_sum"])

    now, before = products(of.network, moved), products(of.network, weights)
    assert penalty(moved) == pytest.approx(
        sum(
            1.5 * float((p * (now[name] - before[name]) ** 2).sum())
            for name, p in precision.items()
        )
    )
    assert penalty(weights) == 0.0
    # Twice A and half of B are the same product.
    anchor = of.network.coordinates.anchor("lora.query.A")
    assert anchor is not None
    same = weights | {
        "lora.query.A": weights["lora.query.A"] + (anchor + weights["lora.query.A"]),
        "lora.query.B": weights["lora.query.B"] / 2,
    }
    assert penalty(same) == pytest.approx(0.0, abs=1e-6)


def test_a_strong_penalty_holds_what_was_learnt() -> None:
    batches = {str(i): tiny_examples(16, seed=i) for i in range(2)}
    setup = Setup(model, batches)

    def change(strength: float) -> float:
        learn = elastic(strength)(setup)
        first = learn(None, batches["0"])
        second = learn(first, batches["1"])
        assert second.report.parent == first.report.id
        before, after = (products(p.model.network, p.guide.means()) for p in (first, second))
        held = information(first.model, first.guide.means(), batches["0"])
        return sum(float((held[n] * (after[n] - before[n]) ** 2).sum()) for n in held)

    assert change(1e4) < change(0.0) / 10


def test_a_killed_run_does_not_go_on_without_what_it_held() -> None:
    batches = {str(i): tiny_examples(8, seed=i) for i in range(2)}
    setup = Setup(model, batches)
    first = elastic(1.0)(setup)(None, batches["0"])
    with pytest.raises(DataError, match="not saved; delete them"):
        elastic(1.0)(setup)(first, batches["1"])
