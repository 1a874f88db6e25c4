"""The paper's three tasks as recipes: each learns what was planted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bhpeft_pyro as bh
from bhpeft_pyro.testing import tiny_backbone, tiny_tokenizer

KINDS: dict[str, Any] = {"kinds": bh.presets.lora(rank=2), "tokenizer": tiny_tokenizer()}
FIT: dict[str, Any] = {"epochs": 20, "progress": False}
BAD, GOOD = "w5 w5 w5", "w6 w6 w6"


def test_ratings() -> None:
    model = bh.tasks.ratings(tiny_backbone(), 1, 5, **KINDS)
    data = {"text": [BAD, GOOD] * 16, "label": [1.5, 4.5] * 16}
    forecast = bh.fit(model, "normal", data, **FIT).predict([BAD, GOOD], samples=8)
    assert 1 < forecast.mean[0] < 2.5 and 3.5 < forecast.mean[1] < 5


def test_categories() -> None:
    model = bh.tasks.categories(tiny_backbone(), 3, **KINDS)
    texts = [BAD, GOOD, "w7 w7 w7"]
    data = {"text": texts * 10, "label": ["world", "sport", "trade"] * 10}
    posterior = bh.fit(
        model, "normal", data, **FIT, columns=bh.Columns(label_names=["sport", "trade", "world"])
    )
    assert posterior.predict(texts, samples=8).label.tolist() == [2, 0, 1]


def test_a_backbone_by_name(tmp_path: Path) -> None:
    tiny_backbone().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    network = bh.tasks.categories(str(tmp_path), 3, kinds=()).network
    assert network.outputs == 3 and network.backbone.config.hidden_size == 16
    assert network.tokenizer("w5")["input_ids"] == tiny_tokenizer()("w5")["input_ids"]


def test_multiple_choice() -> None:
    model = bh.tasks.multiple_choice(tiny_backbone(), **KINDS)
    data = {
        "question": ["w8"] * 24,
        "choices": [[BAD, GOOD], [GOOD, BAD, "w7"]] * 12,
        "answer": [1, 0] * 12,
    }
    posterior = bh.fit(model, "normal", data, **FIT)
    test = {"question": ["w8"] * 2, "choices": [[GOOD, BAD, BAD], [BAD, GOOD]]}
    assert posterior.predict(test, samples=8).label.tolist() == [0, 1]
