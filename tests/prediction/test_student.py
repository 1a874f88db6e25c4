"""Students: one pass, whatever the batch, and what goes to files."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from students import fitted, table, unlabelled, with_student
from tiny import build
from torch import Tensor

import bhpeft_pyro as bh
from bhpeft_pyro.prediction import predict as module
from bhpeft_pyro.testing import tiny_tokenizer

KINDS = ["class", "stars", "labels", "rating", "noisy rating", "choice"]
LONG = {"text": [" ".join(["w9"] * 30)]}
MANY = {"question": ["w9 " * 20], "choices": [["w5", "w6", "w7", "w8", "w10", "w11"]]}


def numbers(forecast: Any) -> dict[str, Tensor]:
    """What a forecast says of each text."""
    names = ["total", "aleatoric", "epistemic"]
    names.append("mean" if isinstance(forecast, bh.forecast.RatingForecast) else "probabilities")
    return {name: getattr(forecast, name) for name in names}


def close(one: Any, other: Any, order: Any = slice(None)) -> None:
    for name, value in numbers(one).items():
        expected = numbers(other)[name][order]
        if value.dim() == 2:  # alone, questions have their own choices
            width = min(value.shape[1], expected.shape[1])
            value, expected = value[:, :width], expected[:, :width]
        torch.testing.assert_close(value, expected, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("method", ["student", "exact"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_forecast_does_not_depend_on_the_other_texts(kind: str, method: Any) -> None:
    """Order, the size of batches, and padding by a long text or by more choices."""
    posterior, texts = with_student(kind), unlabelled(kind, 12, seed=5)
    whole = posterior.predict(texts, method=method)
    assert len(whole.epistemic.unique()) > 6 and whole.method == method
    close(
        posterior.predict({k: v[::-1] for k, v in texts.items()}, method=method),
        whole,
        range(11, -1, -1),
    )
    close(posterior.predict(texts, method=method, max_rows=1), whole)
    close(posterior.predict({k: v[3:4] for k, v in texts.items()}, method=method), whole, [3])
    more = MANY if kind == "choice" else LONG
    beside = posterior.predict({k: [*v, *more[k]] for k, v in texts.items()}, method=method)
    for name, value in numbers(beside).items():
        expected = numbers(whole)[name]
        cut = value[:12, : expected.shape[1]] if value.dim() == 2 else value[:12]
        torch.testing.assert_close(cut, expected, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_texts_beside_it_do_not_matter_to_a_decoder(name: str) -> None:
    network = bh.RandomPEFT(build(name), bh.presets.lora(rank=2), bh.Head(3), tiny_tokenizer())
    posterior = bh.fit(
        bh.Model(network), "laplace", table("class"), components=1,
        max_steps=3, progress=False,
    ).distill(unlabelled("class", 60), epochs=1, progress=False)  # fmt: skip
    texts = unlabelled("class", 8, seed=5)["text"]
    for method in ("student", "exact"):
        alone = posterior.predict(texts, method=method)
        beside = posterior.predict([*LONG["text"], *texts], method=method)
        for value, expected in zip(numbers(beside).values(), numbers(alone).values(), strict=True):
            torch.testing.assert_close(value[1:], expected, atol=2e-5, rtol=2e-3)


@pytest.mark.parametrize("kind", ["class", "choice"])
def test_parts_are_joined(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    posterior, texts = with_student(kind), unlabelled(kind, 11, seed=5)
    whole = posterior.predict(texts)
    monkeypatch.setattr(module, "PART", 4)
    parts = posterior.predict(texts)
    close(parts, whole)
    assert torch.equal(parts.novelty, whole.novelty)
    assert parts.texts == whole.texts and (parts.method, parts.passes) == ("student", 2)


@pytest.mark.parametrize("kind", ["class", "choice"])
def test_max_rows_bounds_a_pass(kind: str) -> None:
    posterior, rows = with_student(kind), []
    hook = posterior.model.network.backbone.register_forward_pre_hook(
        lambda _, __, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    try:
        posterior.predict(unlabelled(kind, 40, seed=5), max_rows=8)
    finally:
        hook.remove()
    assert max(rows) <= 8


@pytest.mark.parametrize("method", ["student", "exact"])
@pytest.mark.parametrize("kind", ["class", "rating"])
def test_bf16_is_near(kind: str, method: Any) -> None:
    """Also the uncertainty, which is a sum of hundreds of terms."""
    posterior, texts = with_student(kind), unlabelled(kind, 40, seed=5)
    exact = posterior.predict(texts, method=method)
    rounded = posterior.predict(texts, method=method, bf16=True)
    assert not torch.equal(exact.total, rounded.total)
    assert (rounded.epistemic / exact.epistemic).log().abs().max() < 0.15


def test_labels_stay() -> None:
    posterior = with_student()
    data = unlabelled("class", 6) | {"label": [0, 1, 2, 0, 1, 2]}
    forecast = posterior.predict(data)
    assert forecast.method == "student" and forecast.labels is not None
    assert posterior.evaluate(data)["nll"] == pytest.approx(forecast.nlls().mean().item())


def test_a_report_in_words() -> None:
    student = with_student().student
    assert student is not None
    report = replace(student.report, nll=0.5, posterior_nll=0.25, rank_correlation=0.9)
    assert "rank correlation with the posterior's uncertainty 0.90" in str(report)
    assert "decides otherwise for" in str(report) and "NLL 0.500, of the posterior 0.250" in str(
        report
    )
    bare = str(replace(student.report, rank_correlation=None, nll=None, rating=True))
    assert "rank correlation" not in bare and "NLL" not in bare and "its means differ by" in bare


def test_only_the_precision_of_a_student_is_learnt() -> None:
    """Its probabilities are the network's own, under its weights."""
    posterior = with_student()
    student = posterior.student
    assert student is not None
    examples = posterior.encode(unlabelled("class", 9, seed=5), labelled=False)
    (batch,) = examples.batches(9)
    with torch.no_grad():
        expected = posterior.model.predictive(student.weights, batch).probs  # type: ignore[attr-defined]
    torch.testing.assert_close(posterior.predict(examples).probabilities, expected)
    assert fitted().student is None
