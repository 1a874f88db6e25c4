"""What the transformer gets is what its tokenizer says, example by example."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_tokenizers import WORDS, bert_like, gpt_like, texts_of
from transformers import AutoTokenizer, BertModel, PreTrainedTokenizerFast

from bhpeft_pyro.data import Columns, CutWarning, Examples, encode
from bhpeft_pyro.data import tokens as tokenising
from bhpeft_pyro.data.tokens import Tokens
from bhpeft_pyro.testing import tiny_backbone

QUIZ = [
    ("why was the film so long", ["yes", "no no"]),
    ("is the plot good", ["so so", "bad", "not very good", "dull"]),
    ("a", ["the", "a a", "long"]),
]
both = pytest.mark.parametrize("make", [bert_like, gpt_like])


def read(source: Any, tokenizer: Any, kind: Any = "class", **columns: Any) -> Examples:
    return encode(source, tokenizer, kind=kind, labelled=False, columns=Columns(**columns))


def rows_of(examples: Examples) -> list[list[dict[str, Any]]]:
    """For each example each sequence as lists without padding, read back from a batch of all."""
    batch = next(examples.batches(len(examples)))
    inputs = {k: v if v.dim() == 3 else v.unsqueeze(1) for k, v in batch.inputs.items()}
    there = torch.ones_like(inputs["input_ids"][..., 0], dtype=torch.bool)
    if batch.choices is not None:
        there = batch.choices
    result: list[list[dict[str, Any]]] = []
    for b in range(len(examples)):
        result.append([])
        for c in there[b].nonzero().flatten().tolist():
            length = int(inputs["attention_mask"][b, c].sum())
            assert inputs["attention_mask"][b, c, :length].all()  # padding only on the right
            result[-1].append({k: v[b, c, :length].tolist() for k, v in inputs.items()})
    return result


@both
def test_texts_and_pairs_of_texts(make: Any) -> None:
    tokenizer, first, second = make(), texts_of([3, 1, 7]), texts_of([2, 5, 1])
    examples = read(first, tokenizer)
    assert rows_of(examples) == [[dict(tokenizer(text))] for text in first]
    assert examples.lengths.tolist() == [len(tokenizer(text)["input_ids"]) for text in first]
    pairs = [*zip(first, second, strict=True)]
    parts = [pair if make is bert_like else (" ".join(pair),) for pair in pairs]
    assert rows_of(read(pairs, tokenizer, pair="b")) == [[dict(tokenizer(*each))] for each in parts]


@both
def test_ragged_choices(make: Any) -> None:
    tokenizer = make()
    examples = read(QUIZ, tokenizer, "choice")

    def one(question: str, choice: str) -> dict[str, Any]:
        separate = make is bert_like
        return dict(tokenizer(question, choice) if separate else tokenizer(f"{question} {choice}"))

    assert rows_of(examples) == [[one(q, c) for c in options] for q, options in QUIZ]
    batch = next(examples.batches(3))
    assert batch.choices is not None
    assert batch.choices.tolist() == [[True] * n + [False] * (4 - n) for n in (2, 4, 3)]
    dummy = batch.inputs["attention_mask"][~batch.choices]
    assert dummy[:, 0].all() and not dummy[:, 1:].any()
    assert (batch.inputs["input_ids"][~batch.choices] == examples.tokens.pad).all()
    # C is that of the batch at hand.
    assert [b.inputs["input_ids"].shape[1] for b in examples.batches(1)] == [2, 4, 3]


def test_dummy_choices_do_no_harm() -> None:
    model: BertModel = tiny_backbone().eval()
    examples = read(QUIZ, bert_like(), "choice")
    batch = next(examples.batches(3))
    assert batch.choices is not None
    with torch.no_grad():
        flat = {name: value.flatten(0, 1) for name, value in batch.inputs.items()}
        hidden = model(**flat).last_hidden_state[:, 0]
        assert hidden.isfinite().all()
        alone = [
            model(**{k: v[0] for k, v in b.inputs.items()}).last_hidden_state[:, 0]
            for b in examples.batches(1)
        ]
    torch.testing.assert_close(hidden[batch.choices.flatten()], torch.cat(alone))


@both
def test_cutting_long_texts(make: Any) -> None:
    texts = texts_of([3, 9, 8, 1, 12])
    limit = 10 if make is bert_like else 20
    tokenizer = make(padding_side="left")
    before = copy.deepcopy(tokenizer)
    expected = [dict(tokenizer(text, truncation=True, max_length=limit)) for text in texts]
    over = sum(len(tokenizer(text)["input_ids"]) > limit for text in texts)
    assert 0 < over < 5
    with pytest.warns(CutWarning) as caught:
        examples = encode(
            texts, tokenizer, kind="class", labelled=False, columns=Columns(max_length=limit)
        )
    assert len(caught) == 1 and f"{over} of 5 texts" in str(caught[0].message)
    assert Path(caught[0].filename) == Path(__file__)
    assert [row[0] for row in rows_of(examples)] == expected
    for name in ("pad_token", "eos_token", "padding_side", "truncation_side", "model_max_length"):
        assert getattr(tokenizer, name) == getattr(before, name), name
    with pytest.warns(CutWarning, match=f"{over} of 5"):  # the tokenizer's own limit
        limited = read(texts, make(model_max_length=limit))
    assert limited.fingerprint == examples.fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = read(texts, make(model_max_length=limit), max_length=200)
    assert int(longer.lengths.max()) > limit


@both
def test_cutting_choices_keeps_them_apart(make: Any) -> None:
    tokenizer, pairs = make(), [(" ".join(WORDS), ["good", "bad film"]), ("why", ["yes", "no"])]
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        examples = read(pairs, tokenizer, "choice", max_length=14)
    assert tokenizer.truncation_side == "right"  # the caller's is left alone
    long, short = rows_of(examples)
    assert all(len(row["input_ids"]) == 14 for row in long)
    assert long[0] != long[1]
    assert len(short[0]["input_ids"]) < 14
    for row, choice in zip(long, pairs[0][1], strict=True):
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        last = len(row["input_ids"]) - tokenizer.num_special_tokens_to_add() // 2
        assert row["input_ids"][last - len(ids) : last] == ids  # all of the choice is left


def test_padding_without_a_pad_token() -> None:
    assert gpt_like().pad_token is None
    batch = next(read(["a", "good"], gpt_like()).batches(2))
    assert batch.inputs["input_ids"][0, 1:].tolist() == [gpt_like().eos_token_id] * 3
    assert batch.inputs["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert "token_type_ids" not in batch.inputs
    neither = bert_like()
    neither.pad_token = None
    assert Tokens.of(neither, [[1]], None).pad == 0


@pytest.mark.filterwarnings("ignore::bhpeft_pyro.data.CutWarning")
def test_many_texts_take_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: Any, texts: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(texts, list):
            sizes.append(len(texts))
        return call(self, texts, *rest, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    texts = texts_of([1 + i % 9 for i in range(1000)])
    whole = read(texts, bert_like(), max_length=8)
    sizes.clear()
    monkeypatch.setattr(tokenising, "CHUNK", 400)
    pieces = read(texts, bert_like(), max_length=8)
    over = [sum(len(text.split()) > 6 for text in texts[k : k + 400]) for k in (0, 400, 800)]
    assert sizes == [400, over[0], 400, over[1], 200, over[2]]
    assert pieces.fingerprint == whole.fingerprint


def test_minilm(minilm_path: Path) -> None:
    # Its tokenizer file says to cut at 128 and to pad to 128; neither may be used.
    tokenizer = AutoTokenizer.from_pretrained(minilm_path)
    texts = ["A film so dull it hurts.", "Br\u00efght! \U0001f600", "word " * 300]
    examples = read(texts, tokenizer)
    assert rows_of(examples) == [[dict(tokenizer(text, truncation=False))] for text in texts]
    assert examples.lengths.tolist()[-1] == 302
