"""Predictions are made in parts of bounded memory, and joined: the same as in one piece."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from counts import Counts
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.errors import ConfigError, DataError
from bhpeft_pyro.forecast import ClassForecast
from bhpeft_pyro.model.likelihoods import MultiLabel, MultipleChoice, Normal
from bhpeft_pyro.prediction import predict as module
from bhpeft_pyro.testing import tiny_model

TEXTS = [f"w{5 + i % 2} w{10 + i}" + " w9" * (i % 5) for i in range(11)]
CHOICES = [[f"w{20 + i}", "w6", "w7 w8", "w9"][: 2 + i % 3] for i in range(11)]
DATA: dict[str, tuple[Any, int, dict[str, Any]]] = {
    "class": (None, 2, {"text": TEXTS, "label": [i % 2 for i in range(11)]}),
    "labels": (MultiLabel(), 3, {"text": TEXTS, "label": [[i % 2, 1, 0] for i in range(11)]}),
    "rating": (Normal(), 1, {"text": TEXTS, "label": [i / 5 for i in range(11)]}),
    "count": (Counts(), 1, {"text": TEXTS, "label": [i % 4 for i in range(11)]}),
    "choice": (
        MultipleChoice(),
        1,
        {"question": TEXTS, "choices": CHOICES, "answer": [i % 2 for i in range(11)]},
    ),
}


def fitted(kind: str, guide: str) -> bh.Posterior:
    likelihood, outputs, data = DATA[kind]
    model = tiny_model(outputs=outputs, likelihood=likelihood)
    return bh.fit(model, guide, data, components=1, max_steps=2, progress=False, seed=1)


def tensors(forecast: Any) -> dict[str, Tensor]:
    """Every tensor of a forecast."""
    found: dict[str, Tensor] = {}
    for field in fields(forecast):
        value = getattr(forecast, field.name)
        if isinstance(value, Tensor):
            found[field.name] = value
        elif field.name == "pairs":
            found |= tensors(value)
    return found


@pytest.mark.parametrize(
    ("kind", "guide", "keep"),
    [
        ("class", "laplace", False),
        ("class", "normal", True),
        ("labels", "laplace", False),
        ("labels", "normal", True),
        ("rating", "laplace", False),
        ("rating", "normal", False),
        ("choice", "laplace", False),
        ("choice", "normal", True),
    ],
)
def test_parts_are_joined(
    kind: str, guide: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    posterior, data = fitted(kind, guide), DATA[kind][2]
    whole = posterior.predict(data, 7, keep_samples=keep)
    monkeypatch.setattr(module, "PART", 4)  # parts of 4, 4 and 3
    parts = posterior.predict(data, 7, keep_samples=keep)
    assert parts.texts == whole.texts and len(parts) == 11
    assert tensors(parts).keys() == tensors(whole).keys()
    for name, value in tensors(whole).items():
        torch.testing.assert_close(tensors(parts)[name], value, atol=1e-5, rtol=1e-4)


def test_labels_that_are_drawn_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, data = fitted("count", "normal"), DATA["count"][2]
    whole = posterior.predict(data, 5)
    monkeypatch.setattr(module, "PART", 4)
    parts = posterior.predict(data, 5)
    assert parts.outcomes is not None and whole.outcomes is not None
    assert parts.outcomes.shape == whole.outcomes.shape
    torch.testing.assert_close(parts.log_prob(), whole.log_prob(), atol=1e-4, rtol=1e-4)


def test_the_draws_of_one_part_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 4)
    posterior, shapes = fitted("class", "laplace"), []
    reduced = ClassForecast.from_draws

    def from_draws(draws: Tensor, **given: Any) -> ClassForecast:
        shapes.append(tuple(draws.shape))
        return reduced(draws, **given)

    monkeypatch.setattr(ClassForecast, "from_draws", from_draws)
    assert len(posterior.predict(TEXTS)) == 11
    assert shapes == [(1000, 4, 2), (1000, 4, 2), (1000, 3, 2)]


def test_draws_are_counted_for_a_part_unless_they_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    posterior = fitted("class", "normal")
    monkeypatch.setattr(module, "PART", 4)
    monkeypatch.setattr("bhpeft_pyro.base.checks._memory", lambda: 12 * 2 * 5 * 100)
    assert len(posterior.predict(TEXTS, 100)) == 11
    with pytest.raises(ConfigError, match="samples=100 needs"):
        posterior.predict(TEXTS, 100, keep_samples=True)


def test_rows_are_counted_from_the_first_part(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = fitted("class", "normal")
    words = posterior.model.network.backbone.embeddings.word_embeddings

    def spoil(_: Any, given: Any, output: Tensor) -> Tensor:
        return output.masked_fill((given[0] == 49).unsqueeze(-1), torch.nan)

    words.register_forward_hook(spoil)
    monkeypatch.setattr(module, "PART", 4)
    texts = [*TEXTS[:6], "w5 w49", *TEXTS[6:9], "w49"]
    named = r"data, row 6: of 'w5 w49' the backbone .* \(and 1 more: row 10\)$"
    with pytest.raises(DataError, match=named) as caught:
        posterior.predict(texts)
    assert caught.value.rows == (6, 10)
