"""Labels a word: which tokens are a word's, which words have labels, which go together."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Sequence, Value
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from toy_tokenizers import SPECIAL, bert_like, gpt_like
from transformers import PreTrainedTokenizerFast

from bhpeft_pyro.data import Batch, Columns, Examples, encode
from bhpeft_pyro.data.batch import shuffled
from bhpeft_pyro.data.columns import as_words
from bhpeft_pyro.data.examples import describe, revive
from bhpeft_pyro.data.tokens import tokenise_words
from bhpeft_pyro.errors import DataError
from bhpeft_pyro.testing import tiny_tokenizer

NER = Columns(text="tokens", label="tags")
SENTENCES = [["Ada", "didn't", "visit", "U.S.A."], ["So"], ["New York", "café", "-", "ok"]]


def wordpiece(**options: Any) -> PreTrainedTokenizerFast:
    """BERT's: a word becomes its letters and marks."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *"'.-"]
    backend = Tokenizer(models.WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    marks = {"unk_token": "[UNK]", "pad_token": "[PAD]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **marks, **options)


def own_ids(examples: Examples, number: int) -> list[int]:
    """The token ids of one word."""
    sequence, begin, end, _ = examples.words[number].tolist()
    ids: list[int] = examples.tokens.padded(torch.tensor([sequence]))["input_ids"][0].tolist()
    return ids[begin:end]


def words_of(sentences: Any, tokenizer: Any, **options: Any) -> Examples:
    columns = Columns(text="tokens", **options)
    return encode(
        {"tokens": sentences}, tokenizer, kind="class", each_word=True, labelled=False,
        columns=columns,
    )  # fmt: skip


def tagged(tokens: Any, tags: Any, **options: Any) -> Examples:
    options = {"kind": "class", "columns": NER} | options
    return encode({"tokens": tokens, "tags": tags}, tiny_tokenizer(), each_word=True, **options)


def many(count: int = 60) -> Examples:
    """Sentences of one to five words."""
    tokens = [[f"w{5 + (7 * i + k) % 41}" for k in range(1 + i % 5)] for i in range(count)]
    return tagged(tokens, [[(i + k) % 3 for k in range(len(t))] for i, t in enumerate(tokens)])


def test_lists_of_words_in_a_csv_file_are_json() -> None:
    cells = ['["New York", "w5"]', "w5 w6", "[1] w7", '["open', "[1]"]
    found = [as_words(cell) for cell in cells]
    assert found == [["New York", "w5"], ["w5", "w6"], ["[1]", "w7"], ['["open'], ["[1]"]]


def test_a_word_has_the_tokens_that_the_tokenizer_says() -> None:
    tokenizer = wordpiece()
    examples = words_of(SENTENCES, tokenizer)
    encoded = tokenizer(SENTENCES, is_split_into_words=True)
    found = {tuple(word) for word in examples.words[:, [0, 3, 1, 2]].tolist()}
    expected = set()
    for i, sentence in enumerate(SENTENCES):
        ids = encoded.word_ids(i)
        for k in range(len(sentence)):
            at = [t for t, word in enumerate(ids) if word == k]
            expected.add((i, i, at[0], at[-1] + 1))
    assert found == expected
    assert examples.tokens.ids.tolist() == [*chain.from_iterable(encoded["input_ids"])]
    assert examples.texts == tuple(word for sentence in SENTENCES for word in sentence)
    assert examples.unit == "words" and examples.rows.tolist() == [0] * 4 + [1] + [2] * 4


def test_bytes_are_read_as_running_text() -> None:
    tokenizer = gpt_like()
    examples = words_of(SENTENCES, tokenizer)
    running = tokenizer([" ".join(words) for words in SENTENCES])["input_ids"]
    assert examples.tokens.ids.tolist() == [*chain.from_iterable(running)]
    spaced = [f" {word}" if k else word for words in SENTENCES for k, word in enumerate(words)]
    assert [own_ids(examples, i) for i in range(len(spaced))] == tokenizer(spaced)["input_ids"]


def test_a_text_is_split_at_white_space() -> None:
    tokenizer = wordpiece()
    text, words = (
        words_of(["Ada  is\there"], tokenizer),
        words_of([["Ada", "is", "here"]], tokenizer),
    )
    assert text.texts == words.texts and text.fingerprint == words.fingerprint
    alone = encode([["ada", "is"], ["so"]], tokenizer, kind="class", each_word=True, labelled=False)
    assert alone.texts == ("ada", "is", "so")


@pytest.mark.parametrize("make", [wordpiece, gpt_like])
@pytest.mark.parametrize("side", ["right", "left"])
def test_no_word_of_a_long_sentence_is_cut(make: Any, side: str) -> None:
    sentence = [letter * (1 + i % 4) for i, letter in enumerate("abcdefghijklmnopqrst")]
    tokenizer = make(truncation_side=side)
    long, whole = words_of([sentence], tokenizer, max_length=12), words_of([sentence], tokenizer)
    assert int(long.lengths.max()) <= 12 < int(whole.lengths[0])
    assert len(long.tokens.lengths) > 2 and len(whole.tokens.lengths) == 1
    assert [own_ids(long, i) for i in range(20)] == [own_ids(whole, i) for i in range(20)]
    # Of overlapping sequences, each word is in one where it has context on both sides.
    begin, end = long.words[5:15, 1], long.words[5:15, 2]
    assert int(torch.minimum(begin, long.lengths[5:15] - end).min()) >= 1
    assert long.rows.tolist() == [0] * 20


def test_words_without_a_token_are_unknown_ones() -> None:
    tokenizer = wordpiece()
    examples = words_of([["a", "\u200b", "b"], ["c"]], tokenizer)
    assert own_ids(examples, 1) == [tokenizer.unk_token_id]
    assert [own_ids(examples, i) for i in (0, 2, 3)] == [
        tokenizer.convert_tokens_to_ids([letter]) for letter in "abc"
    ]
    tokenizer.unk_token = None
    message = re.escape("column 'tokens', row 1: word 1: the tokenizer finds")
    with pytest.raises(DataError, match=message):
        tokenise_words(tokenizer, [["a"], ["b", "\u200b"]], None, "tokens")


def test_words_without_a_label_are_left_out() -> None:
    tokens = [["w5", "w6"], ["w7"], ["w8", "w9", "w10"]]
    examples = tagged(tokens, [["O", "B"], [None], ["B", None, "O"]])
    assert examples.texts == ("w5", "w6", "w8", "w10")
    assert examples.labels is not None and examples.labels.tolist() == [1, 0, 0, 1]
    assert examples.label_names == ("B", "O")
    features = Features(
        {"tokens": Sequence(Value("string")), "tags": Sequence(ClassLabel(names=["O", "B"]))}
    )
    rows = Dataset.from_dict({"tokens": tokens, "tags": [[0, 1], [-100], [1, -100, 0]]}, features)
    hub = encode(rows, tiny_tokenizer(), kind="class", each_word=True, columns=NER)
    assert hub.label_names == ("O", "B") and hub.labels is not None
    assert hub.labels.tolist() == [0, 1, 1, 0]
    whole = tagged(tokens, [["O", "B"], [None], ["B", None, "O"]], labelled=False)
    assert len(whole) == 6 and whole.labels is None
    with pytest.raises(DataError, match="column 'tags': no word has a label"):
        tagged(tokens, [[None, None], [-100], [None] * 3])


def test_numbers_and_several_labels_a_word() -> None:
    times = tagged([["w5", "w6"], ["w7"]], [[1.5, 2.0], [0.5]], kind="rating")
    assert times.labels is not None and times.labels.tolist() == [1.5, 2.0, 0.5]
    several = tagged([["w5", "w6"], ["w7"]], [[["a"], []], [["a", "b"]]], kind="labels")
    assert several.labels is not None and several.labels.tolist() == [[1, 0], [0, 0], [1, 1]]


def test_extra_columns_are_those_of_the_sentence() -> None:
    rows = {"tokens": [["w5", "w6"], ["w7"]], "tags": [["a", None], ["b"]], "age": [1, 2]}
    columns = Columns(text="tokens", label="tags", extra=["age"])
    examples = encode(rows, tiny_tokenizer(), kind="class", each_word=True, columns=columns)
    assert examples.extra["age"].tolist() == [1, 2]


def test_a_csv_file_has_texts_and_json(tmp_path: Path) -> None:
    file = tmp_path / "data.csv"
    file.write_text('tokens,tags\nw5 w6,"[""O"", ""B""]"\nw7,"[""O""]"\n')
    examples = encode(file, tiny_tokenizer(), kind="class", each_word=True, columns=NER)
    assert examples.texts == ("w5", "w6", "w7") and examples.label_names == ("B", "O")
    lines = [{"tokens": ["w5", "w6"], "tags": ["O", "B"]}, {"tokens": ["w7"], "tags": ["O"]}]
    other = tmp_path / "data.jsonl"
    other.write_text("\n".join(map(json.dumps, lines)))
    same = encode(other, tiny_tokenizer(), kind="class", each_word=True, columns=NER)
    assert same.fingerprint == examples.fingerprint


@pytest.mark.parametrize(
    ("tokens", "tags", "message"),
    [
        ([["w5"], ["w6", "w7"]], [["O"], ["O"]], "'tags', row 1: 1 labels for 2 words"),
        ([["w5"], ["w6", "w7"]], [[0], [None, -3]], "'tags', row 1: word 1: label -3"),
        ([["w5"], ["w6", "w7"]], [["O"], ["B", " "]], "'tags', row 1: word 1: the label is empty"),
        ([["w5"], ["w6"]], ["O", "B"], "row 0: 'O' is not a list"),
        ([["w5"], ["w6"]], [0, 1], "row 0: 0; expected a list with a label for each word"),
        ([["w5"], ["w6", ""]], [["O"], ["O", "B"]], "'tokens', row 1: word 1: the text is empty"),
        ([["w5"], []], [["O"], []], "'tokens', row 1: there is no word"),
        ([5, 6], [["O"], ["B"]], "'tokens', row 0: 5; expected a list of words, or a text"),
    ],
)  # fmt: skip
def test_errors_name_the_word(tokens: Any, tags: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        tagged(tokens, tags)
    assert message in str(caught.value)


def test_what_does_not_go_together_is_refused() -> None:
    rows = {"tokens": [["w5"], ["w6"]], "tags": [["O"], ["B"]]}
    with pytest.raises(DataError, match="each_word is not for kind='choice'"):
        encode(rows, tiny_tokenizer(), kind="choice", each_word=True)
    with pytest.raises(DataError, match=r"columns.pair='b' is not for each_word=True"):
        encode(rows, tiny_tokenizer(), kind="class", each_word=True, columns=Columns(pair="b"))
    examples = tagged(**rows)
    with pytest.raises(DataError, match="each_word=True; expected each_word=False"):
        encode(examples, tiny_tokenizer(), kind="class")
    texts = encode({"text": ["w5", "w6"], "label": [0, 1]}, tiny_tokenizer(), kind="class")
    with pytest.raises(DataError, match="each_word=False; expected each_word=True"):
        encode(texts, tiny_tokenizer(), kind="class", each_word=True)
    with pytest.raises(DataError, match=r"differ in .*each_word"):
        texts.concat(examples)
    slow = bert_like()
    slow.__class__ = type("Slow", (PreTrainedTokenizerFast,), {"is_fast": False})
    with pytest.raises(DataError, match="tokenizer: Slow does not say which tokens a word has"):
        words_of([["a"]], slow)


def readings(batch: Batch) -> list[tuple[int, ...]]:
    """For each word its label, its tokens and those of its sentence."""
    assert batch.spans is not None and batch.labels is not None
    found = []
    for (row, begin, end), label in zip(
        batch.spans.tolist(), batch.labels.flatten().tolist(), strict=True
    ):
        ids = batch.inputs["input_ids"][row]
        real = ids[batch.inputs["attention_mask"][row].bool()]
        found.append((label, *ids[begin:end].tolist(), *real.tolist()))
    return found


def test_parts_and_their_sums_keep_their_words() -> None:
    examples = many()
    every = readings(next(examples.batches(len(examples))))
    chosen = torch.randperm(len(examples))[:40]
    part = examples.subset(chosen)
    assert readings(next(part.batches(40))) == [every[i] for i in chosen]
    assert len(part.tokens.lengths) == len(examples.words[chosen, 0].unique())
    both = part.concat(examples)
    assert readings(next(both.batches(400))) == [*(every[i] for i in chosen), *every]
    assert len(both.rows.unique()) == len(part.rows.unique()) + 60
    again = revive(*describe(part))
    assert readings(next(again.batches(40))) == readings(next(part.batches(40)))
    assert again.fingerprint == part.fingerprint


def test_the_fingerprint_knows_words_from_sentences() -> None:
    tokens, tags = [["w5", "w6", "w5"], ["w7"]], [["A", "B", "B"], ["A"]]
    prints = {
        tagged(tokens, tags).fingerprint,
        tagged(tokens, [["B", "B", "A"], ["A"]]).fingerprint,  # the same words with the same labels
        tagged([["w5", "w6"], ["w5"], ["w7"]], [["A", "B"], ["B"], ["A"]]).fingerprint,
        tagged(tokens, [["A", "B", None], ["A"]]).fingerprint,
    }
    assert len(prints) == 4
    examples = tagged(tokens, tags)
    shuffled = examples.subset([3, 1, 2, 0])
    assert shuffled.fingerprint == examples.fingerprint
    turned = tagged(tokens[::-1], tags[::-1])
    assert turned.fingerprint == examples.fingerprint


def test_sentences_are_held_out_whole() -> None:
    examples = many()
    rest, held_out = examples.hold_out(0)
    assert held_out is not None
    assert len(held_out.rows.unique()) == 12 and len(rest.rows.unique()) == 48
    assert not {*rest.rows.tolist()} & {*held_out.rows.tolist()}
    assert len(rest) + len(held_out) == len(examples)
    few = many(49)  # 147 words
    assert few.hold_out(0) == (few, None)


def test_batches_hold_whole_sentences() -> None:
    examples = many()  # 180 words
    torch.manual_seed(0)
    batches = list(examples.batches(20, shuffle=True))
    assert [len(batch) for batch in batches] == [20] * 9
    seen = [reading for batch in batches for reading in readings(batch)]
    assert sorted(seen) == sorted(readings(next(examples.batches(180))))
    # Each sentence is read once, or twice where a batch ends in it.
    assert sum(len(batch.inputs["input_ids"]) for batch in batches) <= 60 + 10
    planned = [indices for indices, _ in examples.by_length(20)]
    assert sorted(torch.cat(planned).tolist()) == [*range(180)]
    rows = sum(len(batch.inputs["input_ids"]) for _, batch in examples.by_length(20))
    assert rows <= 60 + 9


def test_every_word_is_equally_likely_at_every_step() -> None:
    """So (N / B) * (sum over a batch) is unbiased, though words come in whole sentences, and some
    of them twice."""
    groups = torch.tensor([0, 1, 1, 1, 1, 2, 2])
    epochs, generator = 1500, torch.Generator().manual_seed(0)
    counts = torch.zeros(2, 7)
    for _ in range(epochs):
        plan = torch.stack(shuffled(groups, 4, 2, generator, groups))  # two batches for 7 words
        counts.scatter_add_(1, plan, torch.ones(2, 4))
    assert counts.sum() == 8 * epochs
    sd = (4 / 7 / epochs) ** 0.5  # of how often a word is in a batch, at the most
    assert (counts / epochs - 4 / 7).abs().max() < 4 * sd


@pytest.mark.parametrize("particles", [1, 2, 6])
def test_shares_of_a_batch_read_the_same_words(particles: int) -> None:
    batch = next(many().batches(24))
    shared = batch.split(particles)
    assert readings(shared) == readings(batch)
    assert shared.spans is not None and len(shared) == 24
    rows = len(shared.inputs["input_ids"])
    assert rows % particles == 0
    owner: Tensor = shared.spans[:, 0] // (rows // particles)
    assert owner.tolist() == sorted([*range(particles)] * (24 // particles))
    assert readings(shared.split(24)) == readings(batch)  # of what was shared out already
