"""What a round says it did to the answers to texts of earlier rounds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from guide_functions import around
from saves import load

import bhpeft_pyro as bh
from bhpeft_pyro.data import CutWarning
from bhpeft_pyro.posterior.forgetting import compared, kept_texts
from bhpeft_pyro.testing import tiny_backbone, tiny_examples, tiny_model, tiny_tokenizer

QUICK: dict[str, Any] = {"keep_texts": True, "max_steps": 40, "lr": 0.05, "progress": False}


def table(seed: int = 0, turned: bool = False, size: int = 60) -> dict[str, list[Any]]:
    examples = tiny_examples(size, seed)
    assert examples.labels is not None
    return {"text": [*examples.texts], "label": [i % 2 != turned for i in range(size)]}


def fit(rows: dict[str, list[Any]], **options: Any) -> bh.Posterior:
    return bh.fit(tiny_model(), "laplace", rows, **{**QUICK, "components": 2, **options})


@pytest.fixture(scope="module")
def first() -> bh.Posterior:
    return fit(table())


@pytest.mark.filterwarnings("ignore:data. the labels contradict")
def test_a_round_counts_the_answers_that_it_changed(first: bh.Posterior, tmp_path: Path) -> None:
    assert (first.report.compared, first.report.changed) == (0, 0)
    agreeing = load(first.save(tmp_path / "a")).update(table(1), max_steps=2).report
    assert (agreeing.compared, agreeing.changed) == (60, 0)
    assert "0 of 60 answers to kept texts of earlier rounds changed" in str(agreeing)

    turned = first.update(table(1, turned=True), max_steps=24)
    texts = table()["text"]
    before, after = (p.predict(texts, samples=0).label for p in (first, turned))  # type: ignore[union-attr]
    changed = int((before != after).sum())
    assert turned.report.changed == changed > 12
    assert load(turned.save(tmp_path / "b")).report.changed == changed


def test_new_labels_are_no_answer_before_they_are_learnt(first: bh.Posterior) -> None:
    new = {"text": [f"w7 w{10 + i}" for i in range(30)], "label": ["new"] * 28 + ["True"] * 2}
    grown = first.update(new, grow=True, max_steps=40)
    before, after = (p.predict(table()["text"], samples=0).label for p in (first, grown))  # type: ignore[union-attr]
    assert grown.report.compared == 60
    assert grown.report.changed == int((before != after).sum())


def test_a_rating_changes_if_it_moves_by_more_than_its_sd() -> None:
    network = bh.RandomPEFT(tiny_backbone(), (bh.peft.LoRA(rank=2),), bh.Head(1), tiny_tokenizer())
    model = bh.Model(network, likelihood=bh.likelihoods.Normal(spread=2.0))
    rows = {**table(), "label": [4.0 * (i % 2) for i in range(60)]}
    first = bh.fit(model, "laplace", rows, **{**QUICK, "components": 1})
    turned = {"text": table(1)["text"], "label": [4.0 - rating for rating in rows["label"]]}
    with pytest.warns(bh.data.LabelWarning):
        second = first.update(turned, max_steps=60)
    before, after = (p.predict(rows["text"], samples=0) for p in (first, second))
    moved = (after.mean - before.mean).abs()  # type: ignore[union-attr]
    expected = int((moved > before.total.sqrt()).sum())
    assert second.report.changed == expected > 12


def test_several_labels_of_a_text_count_once() -> None:
    model = bh.Model(
        bh.RandomPEFT(tiny_backbone(), (), bh.Head(2), tiny_tokenizer()),
        likelihood=bh.likelihoods.MultiLabel(),
    )
    rows = {"text": table()["text"], "label": [[i % 2, 1 - i % 2] for i in range(60)]}
    first = bh.fit(model, "normal", rows, **QUICK)
    turned = {"text": table(1)["text"], "label": [pair[::-1] for pair in rows["label"]]}
    second = first.update(turned, max_steps=100)
    before, after = (p.predict(rows["text"], samples=0).label for p in (first, second))  # type: ignore[union-attr]
    assert second.report.changed == int((before != after).any(1).sum()) > 12


@pytest.mark.parametrize("forget", [{"keep_texts": False}, {}])
def test_without_texts_nothing_is_compared(forget: dict[str, Any]) -> None:
    pairs = {**table(), "other": table(2)["text"]}
    columns = {} if forget else {"columns": bh.Columns(pair="other")}
    how: dict[str, Any] = {**forget, **columns, "components": 1, "max_steps": 2}
    first = fit(table() if forget else pairs, **how)
    report = first.update({**table(1), "other": table(3)["text"]}, max_steps=2).report
    assert (report.compared, report.changed) == (0, 0) and "answers to kept" not in str(report)


def test_a_guide_without_central_values_compares_nothing() -> None:
    model = tiny_model(())
    first = bh.fit(model, around(model), table(), **{**QUICK, "max_steps": 2})
    assert first.novelty is not None and len(first.novelty.texts) == 60
    texts = kept_texts(first, first.encode(table(1)))
    assert texts is not None and compared(first, first, texts) is first


def test_that_they_are_cut_is_not_said_again() -> None:
    long = {"text": [f"w{5 + i % 2} " + "w9 " * 40 + f"w{10 + i}" for i in range(20)]}
    with pytest.warns(CutWarning):
        short: dict[str, Any] = {"components": 1, "max_steps": 2}
        first = fit({**long, "label": [False, True] * 10}, **short)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CutWarning)
        assert first.update(table(1)).report.compared > 0


def test_of_many_texts_some_are_compared(
    first: bh.Posterior, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bhpeft_pyro.posterior.forgetting.CHECKED", 20)
    assert first.update(table(1), max_steps=2).report.compared == 20
