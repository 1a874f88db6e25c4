"""A text of which the backbone makes NaN is named, and nothing is learnt from it silently."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

GOOD = {"text": [f"w{5 + i % 2} w{10 + i}" for i in range(16)], "label": [0, 1] * 8}
BAD = {"text": [*GOOD["text"][:3], "w6 w33", "w5"], "label": [0, 1, 0, 1, 0]}
QUICK: dict[str, Any] = {"max_steps": 2, "progress": False}


def model(kinds: Any) -> bh.Model:
    backbone = tiny_backbone()

    def spoil(_: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        bad = (given[0][:, :1] == 6) & (given[0] == 33)
        return output.masked_fill(bad.unsqueeze(-1), torch.nan)

    backbone.embeddings.word_embeddings.register_forward_hook(spoil)
    return bh.Model(bh.RandomPEFT(backbone, kinds, bh.Head(2), tiny_tokenizer()))


@pytest.mark.parametrize("kinds", [(), bh.presets.lora(rank=2)], ids=["head", "lora"])
def test_the_row_is_named(kinds: Any) -> None:
    named = r"data, row 3: of 'w6 w33' the backbone makes numbers that are not finite"
    with pytest.raises(DataError, match=named):
        bh.fit(model(kinds), "normal", BAD, **QUICK)
    posterior = bh.fit(model(kinds), "normal", GOOD, **QUICK)
    before = posterior.sample(3)
    for act in (posterior.predict, posterior.evaluate, posterior.assess, posterior.update):
        with pytest.raises(DataError, match=named):
            act(BAD)
    with pytest.raises(DataError, match=named.replace("data,", "validation,")):
        posterior.update({"text": ["w7", "w8"], "label": [0, 1]}, validation=BAD)
    assert all(torch.equal(value, before[name]) for name, value in posterior.sample(3).items())


def test_the_error_has_all_rows_so_that_the_others_can_be_predicted() -> None:
    posterior = bh.fit(model(bh.presets.lora(rank=2)), "normal", GOOD, **QUICK)
    # 40 rows are two batches; the first that fails is not the one with row 1.
    texts = ["w5", "w6 w33", *["w5 w9 w8"] * 30, "w6 w33 w8 w9 w10", *["w5"] * 7]
    named = r"data, row 1: of 'w6 w33' the backbone .* \(and 1 more: row 32\)$"
    with pytest.raises(DataError, match=named) as caught:
        posterior.predict(texts)
    assert caught.value.rows == (1, 32)
    kept = [i for i in range(len(texts)) if i not in caught.value.rows]
    forecast = posterior.predict([texts[i] for i in kept])
    assert len(forecast) == len(texts) - 2
    with pytest.raises(DataError) as caught:
        posterior.predict([])
    assert caught.value.rows == ()


def test_a_damaged_backbone_is_refused_when_the_network_is_made() -> None:
    backbone = tiny_backbone()
    backbone.encoder.layer[1].output.dense.weight.data[3, 2] = torch.nan
    with pytest.raises(ConfigError, match=r"layer\.1\.output\.dense\.weight' are not finite"):
        bh.RandomPEFT(backbone)


def test_what_cannot_fit_in_memory_is_refused_with_what_would() -> None:
    posterior = bh.fit(model(()), "normal", GOOD, **QUICK)
    for act in (
        lambda: posterior.sample(10**12),
        lambda: posterior.predict(["w5"], 10**12, keep_samples=True),
        lambda: posterior.predict(["w5"], 10**12),
        lambda: bh.fit(model(()), "normal", GOOD, components=10**12, **QUICK),
    ):
        with pytest.raises(ConfigError, match=r"=1,000,000,000,000 needs .* expected at most \d"):
            act()


def test_a_refused_argument_costs_no_pass_over_the_texts() -> None:
    posterior = bh.fit(model(()), "normal", GOOD, **QUICK)
    passes = []
    posterior.model.network.backbone.register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ConfigError, match="keep"):
        posterior.update({"text": ["w7 w8"] * 4, "label": [0, 1] * 2}, keep={"nothing.*": 0.5})
    assert not passes
