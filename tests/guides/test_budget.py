"""Sizes of guides: as foretold, and refused before they are made."""

from __future__ import annotations

from typing import Any

import pyro
import pytest
import torch
from memory import Memory
from transformers import BertModel

import bhpeft_pyro as bh
from bhpeft_pyro.errors import GuideError
from bhpeft_pyro.guides import LaplaceGuide, budget
from bhpeft_pyro.guides.laplace import curvature
from bhpeft_pyro.model import linearized
from bhpeft_pyro.priors import FunctionSpaceNormal
from bhpeft_pyro.testing import tiny_backbone, tiny_batch, tiny_examples, tiny_model, tiny_tokenizer


@pytest.mark.filterwarnings("ignore:The `init_loc_fn` argument")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("normal", {}),
        ("delta", {}),
        ("AutoDelta", {}),
        ("AutoNormal", {}),
        ("AutoDiagonalNormal", {}),
        ("AutoLowRankMultivariateNormal", {}),
        ("AutoLowRankMultivariateNormal", {"rank": 3}),
        ("AutoMultivariateNormal", {}),
        ("AutoLaplaceApproximation", {}),
        ("structured", {}),
        ("laplace", {}),
        ("AutoIAFNormal", {}),
        ("AutoIAFNormal", {"num_transforms": 2, "hidden_dim": [40]}),
    ],
)
def test_parameters_are_as_many_as_foretold(name: str, options: dict[str, Any]) -> None:
    model = tiny_model(())
    with pyro.get_param_store().scope():
        guide = bh.autoguide(name, model, components=1, **options)
        guide(tiny_batch(4))  # Pyro's make their parameters when first called
    latents = sum(site.numel for site in model.sites)
    size = budget(name, latents, [site.shape for site in model.sites], **options)
    assert size is not None and size.latents == latents
    assert size.parameters == sum(p.numel() for p in guide.parameters())


def wide_model() -> bh.Model:
    config = tiny_backbone().config
    config.hidden_size = 256
    head = bh.Head(3, principal=False)
    network = bh.RandomPEFT(BertModel(config), bh.presets.lora(rank=8), head, tiny_tokenizer())
    return bh.Model(network, FunctionSpaceNormal(change=0.1, head=1.0))


@pytest.mark.parametrize("rank", [16, 64])
def test_no_more_is_held_than_foretold_while_a_width_is_measured(rank: int) -> None:
    """By the training rows, and chosen by held-out ones."""
    model = wide_model()
    texts = tiny_examples(160).texts
    rows = {"text": list(texts or ()), "label": [i % 3 for i in range(160)]}
    examples = bh.data.encode(rows, model.network.tokenizer, kind="class")
    guide = LaplaceGuide(model, rank)
    size = budget("laplace", len(guide.loc), **({} if rank == 16 else {"rank": rank}))
    assert size is not None
    with Memory() as memory:
        learnt, held_out = examples.subset(range(128)), examples.subset(range(128, 160))
        guide.strategy.compute_width(model, learnt, held_out, bh.FitOptions())
    kept = 2 * sum(buffer.nbytes for buffer in guide.buffers()) + 16 * len(guide.loc)
    assert guide.covariance.rank == rank
    assert kept + memory.peak <= size.bytes < 2 * (kept + memory.peak)


def test_with_many_weights_fewer_gradients_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the covariance is nearly the same."""
    found = []
    for limit in (2**31, 2**19):
        for module in (linearized, curvature):
            monkeypatch.setattr(module, "AT_ONCE", limit)
        model = wide_model()
        guide = LaplaceGuide(model, rank=4)
        size = budget("laplace", len(guide.loc), rank=4)
        assert size is not None
        with Memory() as memory:
            guide.strategy.compute_width(model, tiny_examples(40), None, bh.FitOptions(tau=1.0))
        assert memory.peak < size.bytes
        found.append((size.bytes, memory.peak, guide.covariance.variance))
    (size, peak, variance), (smaller, less, other) = found
    assert smaller < 0.5 * size and less < 0.5 * peak
    assert (variance.log() - other.log()).abs().max() < 0.1


def test_a_guide_too_large_is_refused_with_the_figures() -> None:
    message = r"it would take 34 latents, 1,224 parameters.*a lower rank.*'delta'"
    with pytest.raises(GuideError, match=message):
        bh.autoguide("AutoMultivariateNormal", tiny_model(()), max_bytes=16 * 1223)
    bh.autoguide("AutoMultivariateNormal", tiny_model(()), max_bytes=16 * 1224)
    for name in ({"*": "normal"}, "A only"):
        with pytest.raises(GuideError, match="max_bytes"):
            bh.autoguide(name, tiny_model(), max_bytes=1000)
    with pytest.raises(GuideError, match="unknown guide"):
        budget("a guide of your own", 10)
    assert budget("down only", 10) is None  # it depends on the sites


def test_without_random_weights_there_is_no_size_to_refuse() -> None:
    def fixed(sites: Any) -> dict[str, torch.Tensor]:
        return {
            s.name: pyro.deterministic(s.name, torch.zeros(s.shape), event_dim=len(s.shape))
            for s in sites
        }

    with pytest.raises(GuideError, match="no random weights"):
        bh.autoguide("laplace", tiny_model((), prior=fixed), components=1)
